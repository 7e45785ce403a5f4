"""What evaluation keeps of test images from one stage to the next: predictions are those made anew, to the bit."""

from collections.abc import Callable
from itertools import accumulate

import pytest
import torch
from torch import Tensor

from clbench import evaluation
from clbench.backbones import Backbone
from clbench.data.images import Images, ImageSet
from clbench.methods import dinosaur as dinosaur_file
from clbench.methods import nearest as searching
from clbench.methods import padim as padim_file
from clbench.methods.anomalydino import AnomalyDINO
from clbench.methods.base import Detector, Prediction, kept_state, silent
from clbench.methods.bounds import Bounds
from clbench.methods.dinosaur import DINOSaur
from clbench.methods.nearest import Closest, Search
from clbench.methods.padim import PaDiM
from clbench.methods.patchcore import PatchCore
from clbench.methods.ucad import UCAD
from clbench.recollection import Recollection
from clbench.strategies.native import Native
from clbench.testing.small import assert_same, copied, images
from clbench.training import train

PRODUCTS = 5
TINY_VIT = {"patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 2, "img_size": 48}


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


def anomalydino() -> Detector:
    return AnomalyDINO(backbone(), layers=[2], memory_size=90, masking=False)


def padim() -> Detector:
    return PaDiM(backbone(), layers=[2, 3], features=20, update="per_task")


def dinosaur() -> Detector:
    return DINOSaur(backbone(), layers=[2], smallest=2)


def ucad() -> Detector:
    transformer = Backbone("vit_tiny_patch16_224", pretrained=False, arguments=TINY_VIT, seed=3)
    return UCAD(transformer, block=1, key_size=9, memory_size=9, segment_count=3, epochs=1, batch_size=4)


@pytest.mark.parametrize(
    ("build", "bounds"),
    [
        (patchcore, False),
        (patchcore, True),
        (anomalydino, False),
        (anomalydino, True),
        (padim, False),
        (dinosaur, False),
        (lambda: DINOSaur(backbone(), layers=[2], memory_mb=0.03), False),
        (ucad, False),
    ],
    ids=[
        "patchcore",
        "patchcore-bounds",
        "anomalydino",
        "anomalydino-bounds",
        "padim-per_task",
        "dinosaur",
        "dinosaur-memory_mb",
        "ucad",
    ],
)
def test_predictions_are_those_made_anew(
    build: Callable[[], Detector], bounds: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After every stage, in several budgets, and where a process was killed and another one goes on."""
    monkeypatch.setattr(evaluation, "BATCH_SIZE", 4)
    if bounds:
        by_bounds(monkeypatch)
    detector, sets = build(), [seen_later(product) for product in range(PRODUCTS)]
    little = 700  # bytes: of some batches, not of all
    recollections = [Recollection(limit) for limit in (0, little, 10**9)]
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
    assert recollections[0].used == 0 < recollections[1].used <= little < recollections[2].used
    assert detector.recollection is None


@pytest.mark.parametrize("build", [patchcore, padim, dinosaur, ucad])
def test_nothing_is_recalled_of_what_was_replaced(build: Callable[[], Detector]) -> None:
    detector, given, recollection = build(), [seen_later(0)], Recollection(10**9)
    for stage in range(3):
        detector.forget()
        train(detector, stage, images(6, stage), [], 0)
        (found,), (expected,) = (predicted(detector, each, 1, given) for each in (recollection, None))
        assert_same(found, expected, f"stage {stage}")
    train(detector, 3, images(6, 3), [], 0)
    predicted(detector, recollection, 1, given)
    detector.drop(0)
    (found,), (expected,) = (predicted(detector, each, 1, given) for each in (recollection, None))
    assert_same(found, expected, "without the first")
    for buffer in kept_state(detector).values():
        if buffer.is_floating_point():
            buffer.mul_(0.5)
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


@pytest.mark.parametrize(
    ("build", "owner", "name", "recalled", "anew"),
    [
        # Each batch against each Gaussian; recalled, old batches against the new one and the new batch against all.
        (padim, padim_file, "mahalanobis", 1 + 3 + 5 + 7, 1 + 4 + 9 + 16),
        # Each batch in the bank, or under the prompt, of its task; recalled, the new batch alone, and one that goes elsewhere.
        (dinosaur, dinosaur_file, "squared_in_windows", 4 + 1, 1 + 2 + 3 + 4),
        (ucad, UCAD, "prompted", 4 + 1, 1 + 2 + 3 + 4),
    ],
)
def test_what_did_not_change_is_not_computed_again(
    build: Callable[[], Detector],
    owner: object,
    name: str,
    recalled: int,
    anew: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Four products, each a batch, evaluated after each of four stages."""
    masks = torch.zeros(4, 48, 48, dtype=torch.bool)
    sets = [ImageSet(images(4, product), masks, ["good"] * 4, list("abcd")) for product in range(4)]
    work, calls = getattr(owner, name), 0

    def counting(*given: object) -> object:
        nonlocal calls
        calls += 1
        return work(*given)

    for recollection, expected in ((Recollection(10**9), recalled), (None, anew)):
        detector, calls = build(), 0
        for stage in range(4):
            train(detector, stage, images(6, stage), [], 0)
            before = calls
            monkeypatch.setattr(owner, name, counting)
            predicted(detector, recollection, stage + 1, sets)
            monkeypatch.setattr(owner, name, work)
            assert calls > before
        assert calls <= expected if recollection else calls >= expected
