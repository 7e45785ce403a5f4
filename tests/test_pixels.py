"""Images that are used as a tensor, and come to a device when they are asked for."""

import gc
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from clbench import footprint
from clbench.backbones import Backbone
from clbench.data import images as pixels
from clbench.data.images import Images, identities, origin
from clbench.feature_store import FeatureStore
from clbench.strategies.replay import Replay
from clbench.testing.small import SmallDetector

RANDOM = torch.Generator().manual_seed(0)
PARTS = [
    torch.randint(0, 256, (count, 3, 4, 5), dtype=torch.uint8, generator=RANDOM) for count in (5, 1, 0, 7)
]
WHOLE = torch.cat(PARTS)
ROWS = torch.tensor([12, 0, 5, 5, 4, 7])


@pytest.fixture(params=["one part", "parts", "some of parts", "parts together"])
def pair(request: pytest.FixtureRequest) -> tuple[Images, Tensor]:
    """Images, and the tensor that they stand for."""
    if request.param == "one part":
        return Images.of(WHOLE), WHOLE
    if request.param == "parts":
        return Images(PARTS), WHOLE
    rows = torch.tensor([3, 2, 1, 12, 5, 6, 7, 8, 3, 4, 0, 9, 10])
    if request.param == "some of parts":
        return Images(PARTS).some(rows), WHOLE[rows]
    several = [Images(PARTS).some(rows[:6]), PARTS[0], Images(PARTS).some(rows[6:8])]
    return Images.concatenate(several), torch.cat([WHOLE[rows[:6]], PARTS[0], WHOLE[rows[6:8]]])


def test_they_are_the_tensor_that_they_stand_for(pair: tuple[Images, Tensor]) -> None:
    images, whole = pair
    assert (len(images), images.shape, images.dtype, images.device) == (
        13,
        whole.shape,
        whole.dtype,
        whole.device,
    )
    for rows in (
        slice(None),
        slice(2, 9, 3),
        slice(0),
        ROWS,
        torch.arange(13) > 6,
        torch.empty(0, dtype=torch.int64),
    ):
        assert torch.equal(images[rows], whole[rows])
        assert torch.equal(images.some(rows)[:], whole[rows])
    assert torch.equal(images[-1], whole[-1]) and torch.equal(images[..., 1], whole[..., 1])
    assert all(map(torch.equal, images.split(4), whole.split(4))) and len(list(images.split(4))) == 4
    assert all(map(torch.equal, images, whole)) and len(list(images)) == 13
    assert all(map(torch.equal, images.batches([ROWS, ROWS[:0]]), [whole[ROWS], whole[:0]]))
    assert torch.equal(images.float(), whole.float()) and torch.equal(
        torch.cat([images, whole]), torch.cat([whole] * 2)
    )
    with pytest.raises(IndexError):
        images[13]


def test_only_slices_are_views() -> None:
    given = WHOLE.clone()
    images = Images.of(given)
    images[torch.arange(3)].zero_()
    assert torch.equal(given, WHOLE)
    images[1:3].zero_()
    assert not given[1:3].any()


def test_images_are_known_by_their_content_wherever_they_lie(pair: tuple[Images, Tensor]) -> None:
    images, whole = pair
    expected = identities(whole.clone())
    assert len(set(expected)) == len({each.numpy().tobytes() for each in whole})
    assert images.identities(torch.arange(13)) == expected == identities(images[:])
    assert [identities(batch) for batch in images.batches([ROWS])] == [
        [expected[row] for row in ROWS.tolist()]
    ]
    assert images.some(ROWS).identities(torch.tensor([1])) == [expected[0]]


def test_images_that_were_changed_are_known_by_what_they_are_now() -> None:
    given = WHOLE.clone()
    images = Images.of(given)
    batch = images[ROWS]
    before = identities(batch)
    assert origin(batch) is not None
    batch[0] = 0
    assert origin(batch) is None and identities(batch)[0] != before[0] and identities(batch)[1:] == before[1:]
    images.identities(torch.tensor([0]))
    given[0] = 7
    assert images.identities(torch.tensor([0])) == identities(torch.full((1, 3, 4, 5), 7, dtype=torch.uint8))


def test_what_is_known_of_images_keeps_none_alive() -> None:
    given = WHOLE.clone()
    images = Images.of(given)
    kept = weakref.ref(given)
    identities(images[2:5]), identities(images[ROWS])
    del images, given
    gc.collect()
    assert kept() is None


def test_a_batch_that_is_not_full_is_filled_up_with_images_to_come() -> None:
    """One pass through the network for all, however few are asked for at a time; the features are the same."""
    pyramid = Backbone("resnet18", pretrained=False, arguments={"channels": [8, 16, 32, 64]}).pyramid([2])
    computed: list[int] = []
    pyramid.network.register_forward_hook(lambda module, given, result: computed.append(len(given[0])))
    pixels = torch.randint(0, 256, (40, 3, 32, 32), dtype=torch.uint8, generator=RANDOM)
    order = torch.randperm(40, generator=RANDOM)
    (expected,) = pyramid.compute(pixels)
    computed.clear()
    batches = Images.of(pixels).batches(order.split(3))
    found = torch.cat([pyramid(batch)[0] for batch in batches])
    assert torch.equal(found, expected[order])
    assert len(computed) == 3  # of 16 each
    size = expected[0].numel() * 4
    pyramid.store = FeatureStore(
        5 * size, 0
    )  # no room: nothing is computed in advance, but what was asked for
    computed.clear()
    found = torch.cat([pyramid(batch)[0] for batch in Images.of(pixels).batches(order.split(3))])
    assert torch.equal(found, expected[order]) and len(computed) == 14


def test_a_joint_stage_of_36_000_images_of_1_024_pixels_is_never_in_memory(tmp_path: Path) -> None:
    """113 GB of images, in files with holes, of which only the batches that steps take are read."""
    sets = []
    for number in range(12):
        with open(tmp_path / f"{number}.npy", "wb") as file:
            file.truncate(3000 * 3 * 1024 * 1024)
        pixels = np.memmap(tmp_path / f"{number}.npy", np.uint8, "c", shape=(3000, 3, 1024, 1024))
        sets.append(torch.from_numpy(pixels))
    detector = SmallDetector(batch_size=4, held_out=0.1)
    detector.step_budget = 3
    strategy = Replay(detector, replay_size=10)
    footprint.reset_peak(torch.device("cpu"))
    before = footprint.peak(torch.device("cpu"))
    detector.finish_task = lambda images: None  # type: ignore[method-assign]  # this one looks at all of them
    strategy.learn(0, Images.concatenate(sets))
    assert len(strategy.buffer.shares[0][0]) == 9
    assert footprint.peak(torch.device("cpu")) - before < 10**9


def test_copies_that_are_joined_are_known_by_what_they_are_copies_of(monkeypatch: pytest.MonkeyPatch) -> None:
    base = torch.randint(0, 255, (8, 3, 4, 4), dtype=torch.uint8)
    copies = Images([base.clone()])
    copies._origin = Images([base])  # as `copied` leaves it on a GPU
    expected = copies.identities(torch.arange(8))
    hashed: list[bool] = []
    of_part = pixels._identities_of_part
    monkeypatch.setattr(
        pixels, "_identities_of_part", lambda part: (hashed.append(part is base), of_part(part))[1]
    )
    joined = Images.concatenate([copies.some(slice(3)), copies.some(slice(3, None))])
    assert joined.identities(torch.arange(8)) == expected and set(hashed) == {True}
    assert joined.copied_bytes == base.numel() and Images([base]).copied_bytes == 0


def test_features_of_test_images_leave_memory_to_those_that_every_epoch_sees() -> None:
    store = FeatureStore(memory_limit=4 * 100 * 4, disk_limit=4 * 100 * 6)  # four images, and six on disk
    for number in range(4):
        store.put(f"test {number}", [torch.full((100,), float(number))])
    store.learning = True
    for number in range(4):
        store.put(f"train {number}", [torch.zeros(100)])
    assert (store.memory_used, store.disk_used) == (1600, 1600)
    assert set(store._places) == {f"test {number}" for number in range(4)}
    assert all(float(store.get(f"test {number}")[0][0]) == number for number in range(4))  # type: ignore[index]
