"""DINOSaur's banks at positions and CADIC's one coreset: worked examples, plain loops, and what they refuse."""

from itertools import combinations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from clbench.backbones import Backbone
from clbench.errors import UserError
from clbench.methods.banks import score_weights
from clbench.methods.base import kept_state
from clbench.methods.cadic import CADIC, Coreset
from clbench.methods.coreset import _farthest_first_together, farthest_first_at_each
from clbench.methods.dinosaur import DINOSaur, squared_in_windows
from clbench.training import train

VIT = {"patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 2, "img_size": 48}


def images(count: int, seed: int = 0, height: int = 48) -> Tensor:
    random = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, 3, height, 48), dtype=torch.uint8, generator=random)


def vit(**arguments: bool) -> Backbone:
    return Backbone("vit_tiny_patch16_224", pretrained=False, arguments=VIT | arguments, batch_size=4)


def numbers(*shape: int, whole: bool = False, seed: int = 0) -> Tensor:
    """Normal numbers; or whole ones from 0 to 4, whose distances are exact and often equal."""
    random = torch.Generator().manual_seed(seed)
    return (
        torch.randint(0, 5, shape, generator=random).float()
        if whole
        else torch.randn(shape, generator=random)
    )


# DINOSaur


@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize(("count", "wanted"), [(30, 12), (300, 280), (7, 20)])
def test_a_k_center_at_each_position_is_that_of_a_plain_loop(count: int, wanted: int, whole: bool) -> None:
    points, starts = numbers(5, count, 6, whole=whole), torch.tensor([3, 0, 5, 6, 2])
    expected = []
    for some, start in zip(points, starts.tolist(), strict=True):
        chosen, left = [start], torch.full((count,), torch.inf)
        while len(chosen) < min(wanted, count):
            left = torch.minimum(left, (some - some[chosen[-1]]).square().sum(1))
            left[chosen] = -1
            chosen.append(int(left.argmax()))
        expected.append(chosen)
    together = _farthest_first_together(points, min(wanted, count), starts)  # as on a GPU
    assert together.tolist() == expected
    if not whole:  # one position after another, any of several that are equally far is taken
        assert farthest_first_at_each(points, wanted, starts).tolist() == expected


@pytest.mark.parametrize("radius", [0, 1, 3, 20])
def test_a_token_s_distance_is_that_to_the_nearest_entry_in_its_window(
    radius: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    patches, bank = numbers(3, 4, 6, 5), numbers(7, 4, 6, 5, seed=1)
    expected = torch.empty(3, 4, 6)
    for row in range(4):
        for column in range(6):
            rows, columns = (slice(max(0, at - radius), at + radius + 1) for at in (row, column))
            entries = bank[:, rows, columns].flatten(0, 2)
            differences = patches[:, row, column, None] - entries
            expected[:, row, column] = differences.square().sum(2).amin(1)
    torch.testing.assert_close(squared_in_windows(patches, bank, radius), expected)
    monkeypatch.setattr("clbench.methods.dinosaur._CPU_BYTES", 1000)  # in several blocks
    torch.testing.assert_close(squared_in_windows(patches, bank, radius), expected)


@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
@torch.no_grad()
def test_dinosaur_judges_by_the_bank_of_the_nearest_prototype(metric: str) -> None:
    detector = DINOSaur(vit(), layers=[1], rho=0.5, smallest=2, radius=1, metric=metric)
    tasks = [images(8), images(3, seed=1).clamp(max=60)]
    shown = torch.cat([tasks[1][:2], tasks[0][:1], images(2, seed=2)])
    prototypes = []
    for stage, learned in enumerate(tasks):
        train(detector, stage, learned, (), seed=0)
        vector = detector.described(learned)[1].mean(0)
        prototypes.append(F.normalize(vector, dim=0) if metric == "cosine" else vector)
    assert detector.bank_sizes.tolist() == [4, 2]  # half of 8; of 3, the smallest number
    assert detector.bank.shape == (6, 6, 6, 24)
    patches, vectors = detector.described(shown)
    selected = torch.cdist(vectors, torch.stack(prototypes)).argmin(1)
    assert selected[:3].tolist() == [1, 1, 0]
    found = detector(shown)
    assert torch.equal(found.chosen, selected)
    for image, (patch, task) in enumerate(zip(patches, selected.tolist(), strict=True)):
        squared = squared_in_windows(patch[None], detector.bank[[slice(4), slice(4, 6)][task]], 1)
        distances = 1 - (1 - squared / 2) if metric == "cosine" else squared.sqrt()
        torch.testing.assert_close(found.scores[image], distances.max(), rtol=1e-4, atol=1e-6)
        upsampled = F.interpolate(distances[None], (48, 48), mode="bilinear")[0, 0]
        torch.testing.assert_close(found.maps[image], upsampled, rtol=1e-4, atol=1e-5)


def test_a_budget_cuts_position_banks_to_their_first_entries() -> None:
    entry = 4 * 36 * 24  # bytes of one token at each of 6 x 6 positions
    detector = DINOSaur(vit(), layers=[1], memory_mb=7 * entry / 1e6)
    sizes, banks = [], []
    for stage, count in enumerate([5, 9, 9]):
        train(detector, stage, images(count, stage), (), seed=0)
        sizes.append(detector.bank_sizes.tolist())
        banks.append(detector.bank)
    assert sizes == [[5], [3, 3], [2, 2, 2]]
    assert torch.equal(banks[1][:3], banks[0][:3])
    assert torch.equal(banks[2][:2], banks[0][:2]) and torch.equal(banks[2][2:4], banks[1][3:5])


def test_dinosaur_refuses_what_does_not_suit_its_banks() -> None:
    detector = DINOSaur(vit(dynamic_img_size=True), layers=[1])
    with pytest.raises(UserError, match=r"smallest=20 .* stage 2 learns from 12 images: .*smallest=12"):
        detector.check_stages([20, 12, 30], kept=3)
    detector.check_stages([20, 20], kept=2)
    small = DINOSaur(vit(), layers=[1], memory_mb=0.006)
    small.check(images(1))
    with pytest.raises(
        UserError, match=r"memory_mb=0.006 has room for 1 .* 36 positions.* give 0.007 or more"
    ):
        small.check_stages([4, 4], kept=2)
    small.check_stages([4, 4], kept=1)
    train(detector, 0, images(3), (), seed=0)
    for use in (detector, lambda given: train(detector, 1, given, (), seed=0)):
        with pytest.raises(UserError, match=r"5 x 6 positions, and those that were learned 6 x 6.*same size"):
            use(images(2, height=40))


# CADIC


def plain_update(entries: Tensor, candidates: Tensor) -> int:
    """CADIC's replacement rule as it is written; gives the number of replacements."""
    left, replaced = list(candidates), 0
    pairs = torch.tensor(list(combinations(range(len(entries)), 2)))
    while left:
        distances = (torch.stack(left)[:, None] - entries).square().sum(2).amin(1)
        gaps = (entries[pairs[:, 0]] - entries[pairs[:, 1]]).square().sum(1)
        farthest, pair = int(distances.argmax()), int(gaps.argmin())
        if not distances[farthest] > gaps[pair]:
            break
        entries[pairs[pair, 0]] = left.pop(farthest)
        replaced += 1
    return replaced


@pytest.mark.parametrize(
    ("start", "candidates", "expected"),
    [
        ([0, 1, 2], [10], [10, 1, 2]),  # 8 > 1, the distance of 0 and 1
        ([10, 1, 2], [11, 20], [10, 20, 2]),  # 20 takes the place of 1; then 1 is not more than 8
        ([10, 20, 2], [14, 6], [10, 20, 2]),  # 4 is not more than 8
        ([0, 5, 0, 5], [20, 21, 5], [21, 20, 0, 5]),  # of equally close pairs, the first
    ],
)
def test_cadic_s_worked_example(start: list[int], candidates: list[int], expected: list[int]) -> None:
    coreset = Coreset(torch.tensor(start).float()[:, None])
    coreset.update(torch.tensor(candidates).float()[:, None])
    assert coreset.entries[:, 0].tolist() == expected


@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize(("entries", "size"), [(2, 1), (25, 2), (40, 5)])
def test_cadic_s_update_chooses_as_the_plain_loop(entries: int, size: int, whole: bool) -> None:
    kept = numbers(entries, size, whole=whole)
    coreset, replaced = Coreset(kept.clone()), 0
    for step in range(8):
        candidates = numbers(20, size, whole=whole, seed=step + 1) * (1 + step // 4)
        expected = plain_update(kept, candidates)
        assert coreset.update(candidates) == expected
        assert torch.equal(coreset.entries, kept)
        replaced += expected
    assert replaced >= entries / 2


@torch.no_grad()
def test_cadic_fills_its_coreset_and_then_updates_it_image_by_image() -> None:
    detector = CADIC(vit(), layers=[1], memory_size=80, sigma=0.0)  # 36 tokens an image
    wanted = torch.empty(0)
    for stage in range(2):
        shown = images(4, stage)
        train(detector, stage, shown, (), seed=0)
        for image in shown.split(1):
            tokens = detector.patches(image).flatten(0, 2)
            room = 80 - len(wanted)
            wanted = torch.cat([wanted, tokens[:room]]) if room else wanted
            plain_update(wanted, tokens[room:])
        assert torch.equal(detector.bank, wanted)
    judged = images(2, seed=3)
    patches = detector.patches(judged).flatten(1, 2)
    distances = torch.cdist(patches, detector.bank, compute_mode="donot_use_mm_for_euclid_dist").min(2)
    highest, where = distances.values.max(1)
    each = torch.arange(2)
    matched = detector.bank[distances.indices[each, where]]
    weights = score_weights(detector.bank, patches[each, where], matched, highest, 3)
    torch.testing.assert_close(detector(judged).scores, highest * weights)
    assert {name: tuple(tensor.shape) for name, tensor in kept_state(detector).items()} == {"bank": (80, 24)}


def test_cadic_refuses_a_memory_without_a_pair() -> None:
    with pytest.raises(
        UserError, match=r"memory_mb=0.0001 has room for 1 tokens of 24 .* wants 2 .* give 0.001"
    ):
        CADIC(vit(), layers=[1], memory_mb=0.0001).check_stages([4], kept=1)
