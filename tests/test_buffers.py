"""Which images a buffer keeps, how it keeps them, and in how many bytes."""

import hashlib
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from test_contracts import backbone
from test_predict import task
from torch import Tensor

from clbench import assembly
from clbench.config import check
from clbench.config.sources import composed
from clbench.data.images import Images
from clbench.errors import UserError
from clbench.methods.base import Detector, silent
from clbench.methods.fastflow import FastFlow
from clbench.methods.stfpm import STFPM
from clbench.report.settings import read_departures
from clbench.report.titles import strategy_title
from clbench.strategies.buffer import Buffer
from clbench.strategies.replay import Replay
from clbench.strategies.selection import herding, kcenter, mean_features
from clbench.strategies.storage import Kind, storage_of
from clbench.testing import StrategyContract
from clbench.testing.small import bytes_of, images
from clbench.testing.strategies import BuildStrategy
from clbench.thresholds import of_stages
from clbench.training import split


def numbered(count: int, first: int = 0) -> Tensor:
    """Images of one colour each, uint8 [count, 3, 1, 1]: its number."""
    return torch.arange(first, first + count).byte().view(-1, 1, 1, 1).repeat(1, 3, 1, 1)


def numbers(given: Tensor | Images) -> list[int]:
    return given[:][:, 0, 0, 0].tolist()


def unnamed() -> Detector:
    raise AssertionError("no detector is needed")


def test_random_selection_keeps_the_rows_that_it_kept_before_there_were_others() -> None:
    buffer, digest = Buffer(17, 3), hashlib.sha256()
    for stage, (learned, held_out) in enumerate([(20, 3), (4, 1), (30, 0), (9, 9)]):
        rows = buffer.add(
            stage, *(numbered(count, 60 * stage + at) for count, at in ((learned, 0), (held_out, 40)))
        )
        digest.update(repr([[each.tolist() for each in pair] for pair in rows]).encode())
    assert (
        digest.hexdigest() == "d1fb9448ebc07d5f14502392ac9b0b0b3c7494897f980f357c4e97e178f199cc"
    )  # of the version before


def test_a_reservoir_keeps_each_image_seen_with_the_same_chance() -> None:
    sizes, size, draws = [(9, 3), (4, 2), (20, 2)], 10, 300
    kept = torch.zeros(40)
    for seed in range(draws):
        buffer, first = Buffer(size, seed, selection="reservoir"), 0
        for stage, (learned, held_out) in enumerate(sizes):
            buffer.add(stage, numbered(learned, first), numbered(held_out, first + learned))
            first += learned + held_out
        shown = [number for pair in buffer.shares for share in pair for number in numbers(share)]
        assert len(shown) == len(set(shown)) == size
        kept[shown] += 1
    expected = draws * size / 40
    # Of 10 out of 40 images, drawn without replacement, counts vary by (1 - 10/40) less than those of a multinomial.
    statistic = float(((kept - expected) ** 2 / expected).sum()) / (1 - size / 40) * 39 / 40
    assert 16 < statistic < 73  # the 0.0005 and 0.9995 quantiles of chi-squared with 39 degrees of freedom


def test_a_reservoir_of_bytes_keeps_what_drew_least_as_long_as_it_fits() -> None:
    buffer = Buffer(
        None, 0, budget=7 * 3 + 2 * 16, selection="reservoir"
    )  # 16 bytes say how many a stage has had
    buffer.add(0, numbered(9), numbered(3, 9))
    buffer.add(1, numbered(6, 12), numbered(0))
    drawn = [buffer._drawn(stage) for stage in range(2)]
    least = torch.cat([part for pair in drawn for part in pair]).argsort()[:7]
    shown = sorted(number for pair in buffer.shares for share in pair for number in numbers(share))
    assert shown == sorted(least.tolist()) and bytes_of(buffer.tensors().values()) == buffer.budget
    buffer.budget = (
        1000  # as where the images that are dropped for new ones were larger: room is left, but not for
    )
    buffer.add(2, numbered(9, 18), numbered(0))  # what drew more than an image that was dropped
    bound = torch.cat([part for pair in drawn for part in pair]).sort().values[7]
    assert len(buffer.shares[2][0]) == int((buffer._drawn(2)[0] < bound).sum()) < 9


def test_herding_and_k_center_give_the_orders_of_their_definitions() -> None:
    features = torch.tensor([[0.0], [1.0], [2.0], [7.0]])
    assert features[herding(features), 0].tolist() == [2, 1, 7, 0]  # worked out by hand, the mean is 2.5
    assert features[kcenter(features), 0].tolist() == [2, 7, 0, 1]
    given = torch.randn(30, 5, generator=torch.Generator().manual_seed(0))
    order = herding(given).tolist()
    for count in (1, 7, 29):  # what is added brings the mean nearest to that of all
        rest = [row for row in range(30) if row not in order[: count - 1]]
        means = [given[[*order[: count - 1], row]].double().mean(0) for row in rest]
        distances = [float((mean - given.double().mean(0)).norm()) for mean in means]
        assert rest[int(np.argmin(distances))] == order[count - 1]
    assert [len(order(given[:0])) for order in (herding, kcenter)] == [0, 0]


@pytest.mark.parametrize("selection", ["herding", "kcenter"])
def test_a_share_chosen_by_features_shrinks_by_its_end(selection: Any) -> None:
    strategy = Replay(FastFlow(backbone(), layers=[1, 2], steps=2), replay_size=5, replay_selection=selection)
    assert strategy.buffer
    given = images(6, 0)
    strategy.buffer.add(0, given, given[:0])
    order = (herding if selection == "herding" else kcenter)(
        mean_features(strategy.detector, Images.of(given))
    )
    assert torch.equal(strategy.buffer.shares[0][0][:], given[order[:5]])
    for stage in (1, 2):
        (rows, _), *_ = strategy.buffer.add(stage, images(6, stage), given[:0])
        assert rows.tolist() == list(range([5, 3, 2][stage]))
    assert torch.equal(strategy.buffer.shares[0][0][:], given[order[:2]])


def test_mean_features_are_means_over_positions_of_every_level() -> None:
    detector = FastFlow(backbone(), layers=[1, 2], steps=2)
    given = images(3, 0)
    levels = detector.pyramid.compute(given)
    expected = torch.cat([level.flatten(2).mean(2) for level in levels], 1)
    torch.testing.assert_close(mean_features(detector, Images.of(given)), expected)


def _jpeg(image: Tensor, quality: int) -> np.ndarray:
    """The JPEG file of an image, with colours at full resolution, by OpenCV from an image of its own kind."""
    flipped = np.ascontiguousarray(image.numpy()[::-1].transpose(1, 2, 0))
    options = [cv2.IMWRITE_JPEG_QUALITY, quality, cv2.IMWRITE_JPEG_SAMPLING_FACTOR, 0x111111]
    return cv2.imencode(".jpg", flipped, options)[1]


STORAGES: list[tuple[Kind, dict[str, Any]]] = [
    ("raw", {}),
    ("jpeg", {"quality": 40}),
    ("webp", {}),
    ("small", {"scale": 3}),
]


@pytest.mark.parametrize(("kind", "settings"), STORAGES)
@pytest.mark.parametrize("selection", ["random", "reservoir"])
def test_bytes_are_never_over_the_budget_and_as_many_images_as_fit(
    kind: Kind, settings: dict[str, Any], selection: Any
) -> None:
    def built() -> Buffer:
        storage = storage_of(kind, settings.get("quality"), settings.get("scale"), unnamed)
        return Buffer(None, 0, budget=40_000, selection=selection, storage=storage)

    buffer = built()
    for stage, held_out in enumerate((2, 0, 1)):
        given = Images.of(images(11, stage))
        rows = buffer.add(stage, given.some(slice(held_out, None)), given.some(slice(held_out)))
        assert [tuple(map(len, pair)) for pair in rows] == [tuple(map(len, pair)) for pair in buffer.shares]
    shares = [share for pair in buffer._stored for share in pair]
    kept = bytes_of(buffer.tensors().values())
    counted = sum(int(share.costs().sum()) + share.fixed * (len(share) > 0) for share in shares)
    assert kept == counted + 16 * 3 * (selection == "reservoir") and kept <= 40_000
    largest = max(int(share.costs().max()) + share.fixed for share in shares if len(share))
    assert sum(map(len, shares)) == 33 or kept > 40_000 - (3 if selection == "random" else 1) * largest
    if selection == "reservoir":  # nothing stays that drew more than what was dropped
        draws = [
            (part.sort().values, share)
            for stage, pair in enumerate(buffer._stored)
            for part, share in zip(buffer._drawn(stage), pair, strict=True)
        ]
        dropped = torch.cat([torch.ones(1), *(part[len(share) :] for part, share in draws)])
        assert all(bool((part[: len(share)] < dropped.min()).all()) for part, share in draws)
    again = built()
    again.restore(buffer.tensors())
    again.begin(Images.of(images(1, 0)))
    for one, other in zip(buffer.shares, again.shares, strict=True):
        assert all(torch.equal(first[:], second[:]) for first, second in zip(one, other, strict=True))


def test_files_are_counted_with_the_numbers_that_say_where_they_are() -> None:
    given = Images.of(images(4, 0))
    storage = storage_of("jpeg", None, None, unnamed)
    exact = int(storage.costs(given).sum()) + 8
    for budget, stored in ((exact, 4), (exact - 1, 3)):
        buffer = Buffer(None, 0, budget=budget, storage=storage)
        buffer.add(0, given, given.some(slice(0)))
        assert len(buffer.shares[0][0]) == stored and bytes_of(buffer.tensors().values()) <= budget


def test_a_share_with_no_room_for_an_image_leaves_it_to_the_oldest() -> None:
    buffer = Buffer(None, 0, budget=8)
    for stage in range(3):
        buffer.add(stage, numbered(4), numbered(0))
    assert [len(learned) for learned, _ in buffer.shares] == [1, 1, 0]


def test_what_is_stored_comes_back_as_the_codec_has_it() -> None:
    given = images(5, 0, 32)
    storage = storage_of("jpeg", 60, None, unnamed)
    storage.see(given)
    stored = storage.store(Images.of(given))
    files = [_jpeg(image, 60) for image in given]
    tensors = stored.tensors()
    assert tensors[".bytes"].tolist() == np.concatenate(files).ravel().tolist()
    assert bytes_of(tensors.values()) == sum(map(len, files)) + 8 * (5 + 1)
    decoded = [cv2.imdecode(file, cv2.IMREAD_COLOR)[:, :, ::-1].transpose(2, 0, 1) for file in files]
    assert torch.equal(Images.of(stored.images)[:], torch.from_numpy(np.stack(decoded)))
    chosen = stored.some(torch.tensor([3, 0]))
    assert torch.equal(Images.of(chosen.images)[:], torch.from_numpy(np.stack([decoded[3], decoded[0]])))

    small = storage_of("small", None, 4, unnamed)
    small.see(given)
    (kept,) = small.store(Images.of(given)).tensors().values()
    areas = given.double().unfold(2, 4, 4).unfold(3, 4, 4).mean((4, 5))
    assert kept.shape == (5, 3, 8, 8) and float((kept.double() - areas).abs().max()) <= 0.5
    even = torch.full((1, 3, 32, 32), 77, dtype=torch.uint8)
    for one in (storage, small, storage_of("webp", 90, None, unnamed)):
        one.see(even)
        (returned,) = [one.passed(Images.of(even))]
        assert returned is not None and int((returned[:].int() - 77).abs().max()) <= 2


def test_half_of_the_current_images_pass_the_codec_where_that_is_asked_for() -> None:
    given = Images.of(images(40, 0))
    settings: dict[str, Any] = {"replay_size": 4, "replay_storage": "jpeg", "replay_quality": 10}
    strategy = Replay(FastFlow(backbone(), layers=[1], steps=2), replay_symmetric=True, **settings)
    assert strategy.buffer
    strategy.begin_stage(0, given)
    shown, passed = strategy.shown(0, given)[:], strategy.buffer.storage.passed(given)
    assert passed is not None
    as_it_is = (shown == given[:]).flatten(1).all(1)
    assert torch.equal(shown, torch.where(as_it_is[:, None, None, None], given[:], passed[:]))
    assert 10 <= int(as_it_is.sum()) <= 30 and torch.equal(strategy.shown(0, given)[:], shown)
    assert not torch.equal(strategy.shown(1, given)[:], shown)
    assert Replay(strategy.detector, **settings).shown(0, given) is given


class _Compressed(StrategyContract):
    def replayed_as(self, strategy: Any, given: Tensor) -> Tensor:
        return strategy.buffer.storage.passed(Images.of(given))[:] if len(given) else given


class _Latent(StrategyContract):
    def detector(self) -> Detector:
        return FastFlow(backbone(), layers=[1], steps=2, epochs=1, batch_size=3, held_out=1 / 3)


def test_a_run_that_is_killed_and_continued_is_the_run_and_every_byte_is_counted() -> None:
    compressed: dict[str, Any] = {
        "replay_budget_mb": 0.012,
        "replay_storage": "jpeg",
        "replay_symmetric": True,
    }
    builds: list[BuildStrategy] = [
        lambda detector: Replay(detector, replay_selection="reservoir", **compressed),
        lambda detector: Replay(detector, replay_size=7, replay_storage="latent", replay_selection="herding"),
    ]
    _Compressed().test_images_that_were_held_out_stay_so_when_others_are_learned_again(builds[0])
    for contract, build in zip((_Compressed(), _Latent()), builds, strict=True):
        contract.test_a_process_that_ends_at_any_step_loses_nothing(build)
        contract.test_the_footprint_counts_every_byte_that_it_keeps(build)


def test_features_of_images_that_were_held_out_stay_held_out() -> None:
    contract = _Latent()
    strategy: Any = contract.learned(
        lambda detector: Replay(detector, replay_size=7, replay_storage="latent"), stages=2
    )
    for stage, pair in enumerate(strategy.buffer._stored):
        parts = split(contract.given(stage), strategy.detector.held_out, strategy.seed, stage)
        for share, own in zip(pair, parts, strict=True):
            (level,) = strategy.detector.pyramid.compute(own[:])
            assert all((level.half() == kept).flatten(1).all(1).any() for kept in share.networks[0][0])


@pytest.mark.parametrize("kind", ["raw", "jpeg", "webp", "small", "latent"])
def test_a_budget_is_spent_where_nothing_is_held_out(kind: Kind) -> None:
    detector = FastFlow(backbone(), layers=[1], steps=2, epochs=1, batch_size=3, held_out=0.0)
    strategy = Replay(detector, replay_budget_mb=0.03, replay_storage=kind)
    for stage in range(2):
        strategy.learn(stage, images(4, stage))
    kept = sum(tensor.nbytes for tensor in strategy.kept().values())
    assert strategy.buffer and all(len(learned) for learned, _ in strategy.buffer._stored)
    assert 0 < kept <= 30_000


MISTAKES: list[tuple[dict[str, Any], str]] = [
    ({"size": 9, "budget_mb": 1.0}, "replay.size=9 with replay.budget_mb=1.0: .* give one of them"),
    (
        {"size": None, "storage": "jpeg"},
        "replay.storage=jpeg is of a buffer, and there is none: give replay.size",
    ),
    ({"size": 9, "quality": 50}, "replay.quality=50 with replay.storage=raw, .* replay.storage=jpeg or webp"),
    (
        {"size": 9, "storage": "jpeg", "scale": 2},
        "replay.scale=2 with replay.storage=jpeg, .* replay.storage=small",
    ),
    ({"size": 9, "storage": "small", "scale": 161}, "replay.scale=161 leaves no pixel of .* 160x160"),
    ({"budget_mb": 0.07}, "replay.budget_mb=0.07 has no room for an image, which takes 76,800 bytes"),
    ({"budget_mb": 0.01, "storage": "small"}, "which takes 19,200 bytes with replay.storage=small"),
    ({"size": 9, "storage": "latent"}, "STFPM learns from more of an image: take replay.storage=raw"),
    ({"size": 9, "selection": "herding"}, "STFPM has none: take replay.selection=random or reservoir"),
    ({"size": 9, "storage": "webp"}, "built without WEBP here: take replay.storage=jpeg or small or raw"),
]


@pytest.mark.parametrize(("given", "said"), MISTAKES, ids=lambda value: str(value)[:40])
def test_settings_that_do_not_go_together_are_refused(
    given: dict[str, Any], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cv2, "haveImageWriter", lambda name: not name.endswith(".webp"))
    with pytest.raises(UserError, match=said):
        Replay.check_buffer(given, STFPM, has_backbone=False, side=160)
    Replay.check_buffer(
        {"size": 9, "storage": "jpeg", "symmetric": True}, STFPM, has_backbone=True, side=None
    )
    Replay.check_buffer({"size": None, "quality": None}, STFPM, has_backbone=True, side=None)


COMPOSED: list[tuple[tuple[str, ...], str]] = [
    (("strategy=replay",), "needs a buffer: give replay.size, .* or replay.budget_mb"),
    (
        ("replay.size=9", "replay.storage=jpeg", "replay.quality=101"),
        "replay.quality=101: .* less than or equal to 100",
    ),
    (("method=draem", "replay.size=9", "replay.selection=kcenter"), "DRAEM has none"),
    (
        ("replay.budget_mb=1", "replay.storage=latent", "replay.symmetric=true"),
        "which changes no image: leave it out",
    ),
    (("strategy=finetune", "replay.budget_mb=5"), r"no setting replay\.budget_mb"),
]


@pytest.mark.parametrize(("words", "said"), COMPOSED, ids=lambda value: str(value)[:40])
def test_that_is_when_a_run_is_composed(words: tuple[str, ...], said: str) -> None:
    with pytest.raises(UserError, match=said):
        check(composed(*words))


def test_every_task_has_room_for_an_image_that_is_learned_again() -> None:
    shown = [images(1, stage) for stage in range(3)]
    with pytest.raises(UserError, match="replay.size=2 has no room for an image of each of 3 tasks"):
        Buffer(2, 0).check(shown)
    Buffer(3, 0).check(shown)
    Buffer(2, 0, selection="reservoir").check(shown)
    buffer = Buffer(3, 0)
    for stage in range(3):
        buffer.add(stage, numbered(1), numbered(9, 10))
    assert [len(learned) for learned, _ in buffer.shares] == [1, 1, 1]
    for both in ({}, {"budget": 9}):
        with pytest.raises(ValueError, match="give one of them"):
            Buffer(9 if both else None, 0, **both)


def test_thresholds_of_a_task_whose_images_are_gone_are_set_on_the_features_that_are_kept() -> None:
    def thresholds(storage: Kind, *gone: int) -> list[float]:
        detector = FastFlow(backbone(), layers=[1], steps=2, epochs=1, held_out=0.5)
        strategy = Replay(detector, replay_size=17, replay_storage=storage)
        for stage in range(2):
            strategy.learn(stage, images(8, stage))
        tasks = [task(f"{stage}", images(0 if stage in gone else 8, stage)) for stage in range(2)]
        _, scores = of_stages(strategy, tasks, range(2), torch.device("cpu"), silent)
        return sorted(scores)

    for gone in ([0, 1], [0], [1]):
        there, kept, features = thresholds("raw"), thresholds("raw", *gone), thresholds("latent", *gone)
        assert len(there) == len(kept) == len(features) == 8 and there == kept
        np.testing.assert_allclose(features, there, atol=0.02 * (max(there) - min(there)))


def test_features_that_half_precision_cannot_hold_are_refused() -> None:
    detector = FastFlow(backbone(), layers=[1], steps=2)
    with torch.no_grad():
        for parameter in detector.pyramids()[0].parameters():
            parameter.mul_(1e4)
    with pytest.raises(UserError, match="half precision, up to 65,504"):
        storage_of("latent", None, None, lambda: detector).store(Images.of(images(2, 0)))


def test_bytes_without_room_for_an_image_are_refused_before_training() -> None:
    detector = FastFlow(backbone(), layers=[1], steps=2)
    for kind, takes in (("jpeg", 500), ("latent", 2 * 16 * 12 * 12)):
        strategy = Replay(detector, replay_budget_mb=takes / 1e6 - 1e-6, replay_storage=kind)
        assert strategy.buffer
        with pytest.raises(UserError, match=r"has no room for an image, .* give 0\.\d+ or more"):
            strategy.buffer.check([images(1, 0)])
        with pytest.raises(UserError, match="room for an image of each of 2 tasks"):
            strategy.buffer.check([images(1, 0), images(1, 1)])
    strategy.buffer.budget = 2 * takes
    strategy.buffer.check([images(1, 0), images(1, 1)])


def test_auto_means_replay_where_bytes_are_given_and_a_dry_run_says_what_they_hold() -> None:
    config = check(composed("method=cfa", "replay.budget_mb=0.4", "replay.storage=webp"))
    assert (config.strategy.name, config.replay.size) == ("replay", None)
    strategy = assembly.build_strategy(config, FastFlow(backbone(), layers=[1], steps=2))
    assert isinstance(strategy, Replay) and strategy.buffer
    assert strategy.buffer.budget == 400_000 and "webp" in strategy.buffer.storage.name
    assert assembly.buffer_bytes(config) == 400_000
    latent = config.changed("replay", size=10, budget_mb=None, storage="latent")
    pyramid = assembly.build_detector(latent).pyramids()[0]
    numbers_of = [channels * side**2 for channels, side in zip(pyramid.channels, (40, 20, 10), strict=True)]
    assert assembly.buffer_bytes(latent) == 10 * 2 * sum(numbers_of)
    assert assembly.buffer_bytes(config.changed("replay", size=10, budget_mb=None, storage="raw")) == 768_000


def test_a_report_tells_buffers_of_other_storage_apart() -> None:
    def title(**replay: Any) -> str:
        config = {
            "replay": {"size": None, **replay},
            "departures": {f"replay.{name}": "absent" for name in replay},
        }
        changed = read_departures(config).strategy_changed
        return strategy_title("replay", None, [f"{key}={value}" for key, value in changed.items()])

    assert title(budget_mb=3.0, storage="jpeg") == "replay, replay.budget_mb=3.0, replay.storage=jpeg"
    assert (
        title(budget_mb=3.0) != title(budget_mb=3.0, storage="webp") != title(budget_mb=3.0, storage="small")
    )
