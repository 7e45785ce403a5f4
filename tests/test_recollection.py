"""What evaluation keeps of test images from one stage to the next: predictions are those made anew, to the bit."""

from collections.abc import Callable
from itertools import accumulate

import pytest
import torch
from torch import Tensor

from clbench import evaluation
from clbench.backbones import Backbone
from clbench.data.images import Images, ImageSet
from clbench.methods import nearest as searching
from clbench.methods.anomalydino import AnomalyDINO
from clbench.methods.banks import PatchBank
from clbench.methods.base import Detector, Prediction, kept_state, silent
from clbench.methods.bounds import Bounds
from clbench.methods.nearest import Closest, Search
from clbench.methods.patchcore import PatchCore
from clbench.recollection import Recollection
from clbench.strategies.native import Native
from clbench.testing.small import assert_same, copied, images
from clbench.training import train

PRODUCTS = 5


def backbone() -> Backbone:
    return Backbone("resnet18", pretrained=False, arguments={"channels": [8, 16, 32, 64]}, seed=3)


def patchcore() -> Detector:
    return PatchCore(backbone(), layers=[2, 3], memory_size=60)


def seen_later(product: int) -> ImageSet:
    """Six images, in two batches: four of a product, and two of two products at a time."""
    own, other = images(6, product), images(2, (product + 1) % PRODUCTS)
    both = torch.where(torch.arange(48) < 24, own[4:], other)
    masks = torch.zeros(6, 48, 48, dtype=torch.bool)
    return ImageSet(Images([torch.cat([own[:4], both])]), masks, ["good"] * 6, list("abcdef"))


def predicted(
    detector: Detector, recollection: Recollection | None, seen: int, sets: list[ImageSet]
) -> list[Prediction]:
    strategy, cpu = Native(detector), torch.device("cpu")
    return [
        evaluation.predict(strategy, given, task, cpu, silent, recollection)
        for task, given in enumerate(sets[:seen])
    ]


@pytest.mark.parametrize("bounds", [False, True])
@pytest.mark.parametrize(
    "build",
    [patchcore, lambda: AnomalyDINO(backbone(), layers=[2], memory_size=90, masking=False)],
    ids=["patchcore", "anomalydino"],
)
def test_predictions_are_those_made_anew(
    build: Callable[[], PatchBank], bounds: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After every stage, in several budgets, and where a process was killed and another one goes on."""
    monkeypatch.setattr(evaluation, "BATCH_SIZE", 4)
    if bounds:
        by_bounds(monkeypatch)
    detector, sets = build(), [seen_later(product) for product in range(PRODUCTS)]
    image = (
        36 * 8 + 8 + 4 * PRODUCTS
    )  # bytes of one at most: its patches', its bank, and its distances to banks
    recollections = [Recollection(limit) for limit in (0, 13 * image, 10**9)]
    again, restored = Recollection(10**9), build()
    for stage in range(PRODUCTS):
        train(detector, stage, images(6, stage), [], 0)
        anew = predicted(detector, None, stage + 1, sets)
        if stage == 2:
            restored.restore(copied(kept_state(detector)))  # and `again` knows nothing of it
        elif stage > 2:
            train(restored, stage, images(6, stage), [], 0)
        for recollection in recollections:
            for found, expected in zip(predicted(detector, recollection, stage + 1, sets), anew, strict=True):
                assert_same(found, expected, f"stage {stage}, {recollection.limit} bytes")
        if stage >= 2:
            for found, expected in zip(predicted(restored, again, stage + 1, sets), anew, strict=True):
                assert_same(found, expected, f"stage {stage}, another process")
    assert recollections[0].used == 0 < recollections[1].used <= 13 * image < recollections[2].used
    assert detector.recollection is None


def test_nothing_is_recalled_of_banks_that_were_replaced() -> None:
    detector, given, recollection = patchcore(), [seen_later(0)], Recollection(10**9)
    for stage in range(3):
        detector.forget()
        train(detector, stage, images(6, stage), [], 0)
        (found,), (expected,) = (predicted(detector, each, 1, given) for each in (recollection, None))
        assert_same(found, expected, f"stage {stage}")
    assert isinstance(detector, PatchBank)
    detector.bank.mul_(0.5)
    (found,), (expected,) = (predicted(detector, each, 1, given) for each in (recollection, None))
    assert_same(found, expected, "changed in place")


def by_bounds(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have banks of any size be searched by bounds from the first query on."""
    monkeypatch.setattr(searching, "_WORTH", 0)
    monkeypatch.setattr(searching, "_LEAST", 0)
    monkeypatch.setattr(searching, "_TRIALS", -1)

    def made(bank: Tensor, pieces: list[tuple[int, int]], left_out: Tensor) -> Bounds:
        return Bounds(bank, pieces, torch.float32, None, bank.mean(0), left_out)

    monkeypatch.setattr(searching, "bounds_of", made)


@pytest.mark.parametrize("way", ["plain", "products", "bounds"])
def test_banks_are_passed_when_they_are_new(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Over N stages less than 1 + 1/2 + ... + 1/N passes of the memory, and what was cut off is searched for in one bank."""
    stages, memory, patches, width = 12, 720, 40, 12
    if way == "bounds":
        by_bounds(monkeypatch)
    elif way == "plain":
        monkeypatch.setattr(searching, "_LEAST", 0)
        monkeypatch.setattr(searching, "_WORTH", 10**9)
    pairs = [0]
    search = searching._Banks._distances

    def counting(self: searching._Banks, queries: Tensor, bank: Tensor, only: int | None = None):
        sizes = self._sizes if only is None else [self._sizes[only]]
        pairs[0] += len(queries) * sum(sizes)
        return search(self, queries, bank, only)

    monkeypatch.setattr(searching._Banks, "_distances", counting)
    random = torch.Generator().manual_seed(0)
    centers = 0.6 * torch.randn(stages, 1, width, generator=random)
    entries = centers + torch.randn(stages, memory, width, generator=random)
    queries = centers[:3] + torch.randn(3, patches, width, generator=random)
    before: Closest | None = None
    passes = {"recalled": 0.0, "anew": 0.0}
    ways = {name: Search() for name in passes}
    for stage in range(stages):
        sizes = [memory // (stage + 1)] * (stage + 1)
        bank = torch.cat([each[: sizes[0]] for each in entries[: stage + 1]])
        begins = torch.tensor([0, *accumulate(sizes[:-1])])
        if before is not None:
            places = before.rows - earlier[before.selected][:, None]  # noqa: F821
            before = before._replace(rows=places + begins[before.selected][:, None])
        found = {}
        for name, search_in in ways.items():
            pairs[0] = 0
            found[name] = search_in.closest_bank(queries, bank, sizes, before if name == "recalled" else None)
            passes[name] += pairs[0] / (3 * patches * memory)
        for one, other in zip(found["recalled"][:3], found["anew"][:3], strict=True):
            assert torch.equal(one, other), f"stage {stage}"
        before, earlier = found["recalled"], begins  # noqa: F841
    known = sum(1 / (stage + 1) for stage in range(stages))
    cut = sum(1 / (stage + 1) ** 2 for stage in range(1, stages))
    assert passes["recalled"] < known + 2 * cut  # twice for chance, and for banks that come close
    assert way != "plain" or passes["anew"] == pytest.approx(stages, rel=0.01)
    assert (
        way == "plain" or passes["anew"] < known + 2 * cut
    )  # what products or bounds exclude is not searched
