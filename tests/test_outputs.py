"""Trained outputs, how methods compare them, and the strategies that hold to them: LwF, DER and DER++."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from clbench.backbones import Backbone
from clbench.config import checking
from clbench.config.sources import composed
from clbench.data.images import Images, origin, part_of
from clbench.errors import UserError
from clbench.methods.base import Detector
from clbench.methods.cfa import CFA
from clbench.methods.dinomaly import Dinomaly
from clbench.methods.draem import DRAEM
from clbench.methods.efficientad import EfficientAD
from clbench.methods.fastflow import FastFlow
from clbench.methods.rd4ad import RD4AD
from clbench.methods.simplenet import SimpleNet
from clbench.methods.stfpm import STFPM
from clbench.methods.supersimplenet import SuperSimpleNet
from clbench.methods.ucad import UCAD
from clbench.strategies.der import DER, Form, pooled, stored_as
from clbench.strategies.derpp import DERpp
from clbench.strategies.lwf import LwF
from clbench.strategies.replay import Replay
from clbench.strategies.teacher import taught_outputs
from clbench.testing import SmallDetector, StrategyContract
from clbench.testing.small import Leaving, Left, bytes_of, images
from clbench.testing.strategies import BuildStrategy
from clbench.training import Batch, _batches


def backbone() -> Backbone:
    return Backbone("resnet18", pretrained=False, arguments={"channels": [8, 8, 16, 16]})


def transformer() -> Backbone:
    arguments = {"patch_size": 8, "embed_dim": 16, "depth": 2, "num_heads": 2, "dynamic_img_size": True}
    return Backbone("vit_tiny_patch16_224", pretrained=False, arguments=arguments)


def stfpm() -> STFPM:
    return STFPM(backbone(), layers=[1, 2], epochs=1, batch_size=3, held_out=0.0, patience=None)


def fastflow() -> FastFlow:
    return FastFlow(backbone(), layers=[1, 2], steps=1, epochs=1, batch_size=3)


def small() -> SmallDetector:
    return SmallDetector(epochs=1, batch_size=3)


# A method -> a small detector of it, the channels of its outputs (none for scores of images), and whether its training step
# computes them.
METHODS: dict[str, tuple[Callable[[str], Detector], list[int | None], bool]] = {
    "cfa": (lambda _: CFA(backbone(), layers=[1, 2]), [16], True),
    "stfpm": (lambda _: stfpm(), [8, 8], True),
    "efficientad": (
        lambda cache: EfficientAD(teacher="random", width=8, penalty_count=2, cache=cache),
        [12, 12, 12],
        False,
    ),
    "draem": (
        lambda cache: DRAEM(reconstructive_width=2, discriminative_width=2, texture_count=2, cache=cache),
        [3, 2],
        False,
    ),
    "fastflow": (lambda _: fastflow(), [8, 8], True),
    "rd4ad": (lambda _: RD4AD(backbone()), [8, 8, 16], True),
    "simplenet": (lambda _: SimpleNet(backbone(), layers=[1, 2], hidden=8), [1], False),
    "supersimplenet": (lambda _: SuperSimpleNet(backbone(), layers=[1, 2], hidden=8), [1, None], False),
    "dinomaly": (lambda _: Dinomaly(transformer(), groups=[[0], [1]]), [16, 16], True),
    "ucad": (lambda _: UCAD(transformer(), block=1), [16], True),
}


@pytest.mark.parametrize("name", METHODS)
def test_outputs_are_the_same_maps_in_training_and_reach_all_that_is_trained(
    name: str, tmp_path: Path
) -> None:
    build, channels, noted = METHODS[name]
    detector, given = build(str(tmp_path)), images(3, 0, 64)
    detector.prepare(Images.of(given))
    with torch.no_grad():
        detector.start_task(0, Images.of(given), Images.of(given[:0]))
    learning = detector.train().outputs(given)
    with detector.noting() as step:
        detector.eval().training_step(given)
    judging = detector.outputs(given)
    assert [None if output.dim() == 1 else output.shape[1] for output in judging] == channels
    assert [output.shape for output in learning] == [output.shape for output in judging]
    assert all(output.dtype == torch.float32 and len(output) == 3 for output in learning)
    assert bool(step) == noted
    for own, output in zip(step, judging, strict=False):
        torch.testing.assert_close(own, output)
    assert not detector._noted
    sum(output.square().sum() for output in learning).backward()  # type: ignore[union-attr]
    optimizer = detector.optimizer()
    assert optimizer is not None
    trained = {id(weights) for group in optimizer.param_groups for weights in group["params"]}
    without = [
        own_name
        for own_name, weights in detector.named_parameters()
        if id(weights) in trained and weights.grad is None
    ]
    assert without == (["radius"] if name == "cfa" else [])
    others = [(output + 1).detach() for output in judging]
    assert detector.distance(judging, others) > 0.01
    assert detector.distance(judging, judging).item() == pytest.approx(0, abs=2e-6)


def test_methods_compare_outputs_by_their_own_distance() -> None:
    one, other = torch.randn(2, 2, 5, 4, 3).unbind(0)
    pair, unlike = [one, one[:, :2, 0]], [other, other[:, :2, 0]]
    squares = [(one - other).square().mean(), (one - other)[:, :2, 0].square().mean()]
    torch.testing.assert_close(small().distance(pair, unlike), (squares[0] + squares[1]) / 2)
    cosines = [F.cosine_similarity(one, other), F.cosine_similarity(one[:, :2], other[:, :2])]
    expected = (1 - cosines[0]).mean() + (1 - cosines[1]).mean()
    pair, unlike = [one, 3 * one[:, :2]], [2 * other, other[:, :2]]
    torch.testing.assert_close(stfpm().distance(pair, unlike), expected)
    torch.testing.assert_close(RD4AD(backbone(), loss="positions").distance(pair, unlike), expected)
    whole = [F.cosine_similarity(a.flatten(1), b.flatten(1)) for a, b in zip(pair, unlike, strict=True)]
    torch.testing.assert_close(
        Dinomaly(transformer(), groups=[[0], [1]]).distance(pair, unlike), 1 - torch.cat(whole).mean()
    )


def test_draem_compares_repaired_images_and_probabilities(tmp_path: Path) -> None:
    detector = DRAEM(reconstructive_width=1, discriminative_width=1, cache=str(tmp_path))
    logits = torch.tensor([0.8, 0.2]).log().view(1, 2, 1, 1)  # worked by hand: probabilities 0.8 and 0.2
    others = torch.zeros(1, 2, 1, 1)  # and 0.5 each
    found = detector.distance([torch.ones(1, 3, 1, 1), logits], [torch.zeros(1, 3, 1, 1), others])
    assert float(found) == pytest.approx(1 + 0.5 * math.log(0.5 / 0.8) + 0.5 * math.log(0.5 / 0.2))


def learned(strategy: Replay, stages: int) -> Replay:
    for stage in range(stages):
        strategy.learn(stage, images(6, stage, 32))
    return strategy


def a_batch(strategy: Replay, stage: int, draws: int = 1) -> Batch:
    """The stage's first three images, and the first stored ones of stage 0 as often as they are drawn."""
    given, rows = images(6, stage, 32)[:3], torch.arange(3)
    stored, stages = strategy.replayed(), torch.full((3,), stage)
    if stored:
        past = stored[0][0][rows % len(stored[0][0])]
        given = torch.cat([given, *[past] * draws])
        stages = torch.cat([stages, torch.zeros(3 * draws, dtype=torch.int64)])
        rows = torch.cat([rows, *[rows % len(stored[0][0])] * draws])
    return Batch(given, stages, rows, stage)


@pytest.mark.parametrize(("build", "which"), [(stfpm, "all"), (fastflow, "replayed"), (small, "new")])
def test_lwf_s_term_and_gradient_are_nothing_right_after_the_stage_it_is_of(
    build: Callable[[], Detector], which: str
) -> None:
    strategy = LwF(build(), weight=3.0, images=which, replay_size=4)  # type: ignore[arg-type]
    assert strategy.penalty(strategy.detector, a_batch(strategy, 0)) is None
    learned(strategy, 1)
    detector, batch = strategy.detector.eval(), a_batch(strategy, 1)
    term = strategy.penalty(detector, batch)
    assert term is not None and term.item() == 0
    detector.zero_grad()
    term.backward()
    assert all(p.grad is None or not p.grad.any() for p in detector.parameters())
    with torch.no_grad():
        before = detector.outputs(batch.images)
        for parameter in detector.parameters():
            parameter.mul_(1.1)
        found = strategy.penalty(detector, batch)
        rows = {"all": slice(6), "new": slice(3), "replayed": slice(3, 6)}[which]
        now = [output[rows] for output in detector.outputs(batch.images)]
        expected = 3 * detector.distance(now, [output[rows] for output in before])
    assert found is not None and expected > 0
    torch.testing.assert_close(found, expected)


def test_a_teacher_leaves_the_detector_as_it_is() -> None:
    strategy = learned(LwF(stfpm()), 1)
    detector = strategy.detector.train()
    modes = [module.training for module in detector.modules()]
    with torch.no_grad():
        for parameter in detector.student.parameters():
            parameter.add_(0.1)
    before = {name: tensor.clone() for name, tensor in detector.state_dict().items()}
    own = {name: id(parameter) for name, parameter in detector.named_parameters()}
    taught_outputs(strategy.memory, detector, images(3, 0, 32))
    assert all(torch.equal(tensor, before[name]) for name, tensor in detector.state_dict().items())
    assert {name: id(parameter) for name, parameter in detector.named_parameters()} == own
    assert [module.training for module in detector.modules()] == modes


def test_distilling_what_no_step_computes_leaves_running_statistics_to_the_steps() -> None:
    """SimpleNet's normalisation learns of normal features and of noisy ones; STFPM's outputs are those of the step."""
    for detector in (SimpleNet(backbone(), layers=[1], hidden=8, epochs=1, batch_size=3), stfpm()):
        learned(LwF(detector, replay_size=4), 2)
        counts = [
            module.num_batches_tracked
            for name, module in detector.named_modules()
            if isinstance(module, nn.BatchNorm2d) and not name.startswith(("teacher", "pyramid"))
        ]
        assert counts and {int(count) for count in counts} == {4}  # two stages of two steps


@pytest.mark.parametrize("storage", ["full", "half", "pooled"])
def test_der_stores_the_outputs_of_the_moment_and_drops_those_of_dropped_images(storage: Form) -> None:
    strategy = learned(DER(stfpm(), outputs=storage, replay_size=5), 1)
    known = {}
    for stage in (1, 2):
        stored, _ = strategy.replayed()[stage - 1]
        with torch.no_grad():
            outputs = strategy.detector.outputs(stored)
        if storage == "pooled":
            outputs = [plainly_pooled(output) for output in outputs]
        for number, image in enumerate(stored):
            known[image.numpy().tobytes()] = [output[number] for output in outputs]
        for owner, (kept, _) in enumerate(strategy.replayed()):
            for index in range(2):
                there = strategy.memory[f"outputs.{owner}.{index}"]
                assert there.dtype == (torch.float32 if storage == "full" else torch.float16)
                wanted = torch.stack([known[image.numpy().tobytes()][index] for image in kept])
                torch.testing.assert_close(there, wanted.to(there.dtype))
        strategy.learn(stage, images(6, stage, 32))
    assert [len(share) for share, _ in strategy.replayed()] == [2, 2, 1]


def test_der_stores_the_same_outputs_of_images_that_are_kept_as_features() -> None:
    raw, latent = (
        learned(
            DER(FastFlow(backbone(), layers=[1], steps=2, epochs=1), replay_size=4, replay_storage=storage), 1
        )
        for storage in ("raw", "latent")
    )
    wanted, found = raw.memory["outputs.0.0"], latent.memory["outputs.0.0"]
    assert float((wanted - found).abs().max()) < 0.01 * float(
        wanted.abs().max()
    )  # half precision of features


def test_der_s_outputs_do_not_slip_past_a_budget_of_bytes() -> None:
    with pytest.raises(
        UserError, match=r"replay.budget_mb=1 is of images, .* take strategy.outputs=recompute"
    ):
        DER(small(), replay_budget_mb=1.0)
    DER(small(), replay_budget_mb=1.0, outputs="recompute")


def plainly_pooled(output: Tensor) -> Tensor:
    """Means of 4 x 4 positions, one after the other."""
    height, width = output.shape[-2:]
    rows = [
        torch.stack([output[..., i : i + 4, j : j + 4].mean((2, 3)) for j in range(0, width, 4)], -1)
        for i in range(0, height, 4)
    ]
    return torch.stack(rows, -2)


def test_pooling_takes_what_is_there_at_the_end() -> None:
    output = torch.randn(2, 3, 9, 6)
    torch.testing.assert_close(pooled(output), plainly_pooled(output))
    assert torch.equal(pooled(output[:, 0, 0, 0]), output[:, 0, 0, 0])


def test_half_precision_stores_no_infinity() -> None:
    (stored,) = stored_as([torch.tensor([1e6, -1e6, 0.5])], "half")
    assert stored.tolist() == [65504, -65504, 0.5]


def test_bytes_of_an_image_s_outputs_at_the_paper_s_size() -> None:
    with torch.device("meta"):
        detector = STFPM(Backbone("resnet18", pretrained=False), layers=[1, 2, 3])
        outputs = detector.outputs(torch.empty(1, 3, 256, 256))
    sizes: dict[Form, int] = {"full": 1_835_008, "half": 917_504, "pooled": 57_344}
    assert {storage: bytes_of(stored_as(outputs, storage)) for storage in sizes} == sizes


@pytest.mark.parametrize("kind", [DER, DERpp])
def test_what_der_adds_is_the_distance_of_the_first_draw_and_the_loss_of_the_second(kind: type[DER]) -> None:
    settings: dict[str, Any] = {"alpha": 2.0, "replay_size": 4} | ({"beta": 3.0} if kind is DERpp else {})
    strategy = learned(kind(small(), **settings), 1)
    detector, batch = strategy.detector, a_batch(strategy, 1, strategy.draws)
    with torch.no_grad():
        for parameter in detector.parameters():
            parameter.add_(0.1)
        torch.manual_seed(0)
        found = strategy.penalty(detector, batch)
        torch.manual_seed(0)
        (now,) = detector.outputs(batch.images[3:6])
        expected = 2 * (now - strategy.memory["outputs.0.0"][batch.rows[3:6]]).square().mean()
        if kind is DERpp:
            expected = expected + 3 * detector.training_step(batch.images[6:9])
    assert found is not None
    torch.testing.assert_close(found, expected)


def test_der_s_method_learns_new_images_alone() -> None:
    seen: list[Tensor] = []

    class Seen(SmallDetector):
        def training_step(self, given: Tensor) -> Tensor:
            seen.append(given)
            return super().training_step(given)

    strategy = learned(DER(Seen(epochs=1), replay_size=4), 1)
    strategy.learn(1, given := images(6, 1, 32))
    shown = [image for batch in seen[2:] for image in batch]
    assert len(shown) == 6 and all(any(torch.equal(image, other) for other in given) for image in shown)


def test_draws_are_independent_and_the_first_is_that_of_replay() -> None:
    once = _batches([6, 40, 40], 3, 2, 0, 0)
    twice = _batches([6, 40, 40], 3, 2, 0, 0, draws=2)
    for one, both in zip(once, twice, strict=True):
        assert torch.equal(both[:6], one) and len(both) == 9
        assert both[6:].min() >= 6 and not torch.equal(both[6:], both[3:6])


def test_a_part_of_a_batch_is_known_as_the_images_it_is_of() -> None:
    whole = Images.of(images(6, 0, 32))
    part = part_of(whole[torch.tensor([4, 1, 5])], slice(1, None))
    known = origin(part)
    assert known is not None and known[0] is whole and known[1].tolist() == [1, 5]
    assert torch.equal(part, whole[torch.tensor([1, 5])])
    assert origin(part_of(images(2, 0, 32), slice(1))) is None


def test_what_was_stored_in_another_way_is_refused() -> None:
    strategy = learned(DER(stfpm(), replay_size=4), 1)
    kept = strategy.kept()
    for storage in ("half", "pooled", "recompute"):
        with pytest.raises(UserError, match=f"strategy.outputs={storage}.*put back the strategy.outputs"):
            DER(stfpm(), outputs=storage, replay_size=4).restore_kept(kept)  # type: ignore[arg-type]
    strategy.detector = STFPM(backbone(), layers=[1], epochs=1, batch_size=3)
    with pytest.raises(
        UserError, match=r"stage 0 have the shapes \[\(8, 8, 8\), \(8, 4, 4\)\].*\[\(8, 8, 8\)\]: put back"
    ):
        strategy.learn(1, images(6, 1, 32))


def test_what_compares_outputs_is_refused_where_there_are_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(STFPM, "outputs", Detector.outputs)
    with pytest.raises(
        UserError,
        match="strategy=lwf with method=stfpm .*works on the outputs of the trained networks.*gives none",
    ):
        checking.check(composed("method=stfpm", "strategy=lwf"))
    with pytest.raises(UserError, match="strategy.images=replayed .* give replay.size"):
        LwF(small(), images="replayed")


@pytest.mark.parametrize("storage", ["full", "recompute"])
def test_der_is_left_and_continued_in_its_first_stage(storage: Form) -> None:
    whole = learned(DER(small(), outputs=storage, replay_size=4), 1)
    leaving = Leaving()
    leaving.leave_at = 1
    strategy = DER(small(), outputs=storage, replay_size=4)
    strategy.bookmark = leaving
    with pytest.raises(Left):
        learned(strategy, 1)
    again = DER(small(), outputs=storage, replay_size=4)
    again.bookmark, leaving.leave_at = leaving, None
    state = learned(again, 1).state()
    assert all(torch.equal(state[name], tensor) for name, tensor in whole.state().items())


class Small(StrategyContract):
    size = 32


class TestLwF(Small):
    def detector(self) -> Detector:
        return fastflow()

    @pytest.fixture
    def build(self) -> BuildStrategy:
        return LwF


@pytest.mark.long
class TestLwFWithABuffer(Small):
    def detector(self) -> Detector:
        return stfpm()

    @pytest.fixture
    def build(self) -> BuildStrategy:
        return lambda detector: LwF(detector, replay_size=7)


class TestDER(Small):
    def detector(self) -> Detector:
        return fastflow()

    @pytest.fixture
    def build(self) -> BuildStrategy:
        return lambda detector: DER(detector, replay_size=7)


class TestDERpp(Small):
    def detector(self) -> Detector:
        return stfpm()

    @pytest.fixture
    def build(self) -> BuildStrategy:
        return lambda detector: DERpp(detector, outputs="pooled", replay_size=7)


@pytest.mark.long
class TestDERRecomputed(Small):
    def detector(self) -> Detector:
        return SmallDetector(epochs=1, held_out=1 / 3)

    @pytest.fixture
    def build(self) -> BuildStrategy:
        return lambda detector: DER(detector, outputs="recompute", replay_size=7)
