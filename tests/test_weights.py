"""EWC, SI and MAS, which hold weights, and A-GEM, which turns gradients: equations, contracts, and what they refuse."""

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
import yaml
from conftest import ROOT
from test_contracts import backbone
from test_predict import task
from torch import Tensor, nn

from clbench.config import check, composed
from clbench.config.classes import check_settings, own_arguments
from clbench.data.images import Images
from clbench.errors import UserError
from clbench.methods.base import Detector, kept_state
from clbench.methods.cfa import CFA
from clbench.methods.fastflow import FastFlow
from clbench.methods.simplenet import SimpleNet
from clbench.methods.stfpm import STFPM
from clbench.randomness import seed_for
from clbench.strategies.agem import AGEM
from clbench.strategies.anchored import Anchored
from clbench.strategies.base import Strategy
from clbench.strategies.ewc import EWC
from clbench.strategies.finetune import Finetune
from clbench.strategies.lwf import LwF
from clbench.strategies.mas import MAS
from clbench.strategies.si import SI
from clbench.testing import SmallDetector, StrategyContract
from clbench.testing.small import among, images
from clbench.testing.strategies import BuildStrategy
from clbench.training import Diverged, split


class TestWeights(StrategyContract):
    size = 16

    @pytest.fixture(
        params=[
            (EWC, {"weight": 100.0}),
            (SI, {"weight": 10.0, "replay_size": 7}),
            (MAS, {"decay": 0.5, "images": 2, "normalise": "none", "replay_size": 7}),
            (AGEM, {"replay_size": 7}),
        ],
        ids=["ewc", "si, buffer", "mas, buffer", "agem"],
    )
    def build(self, request: pytest.FixtureRequest) -> BuildStrategy:
        kind, settings = request.param
        return lambda detector: kind(detector, **settings)


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        (EWC, {"decay": 0.9, "weight": 1e3, "replay_size": 7}),
        (SI, {"freeze_norm": True}),
        (MAS, {"weight": 0.01}),
    ],
)
def test_it_is_continued_with_and_without_a_buffer(kind: type[Anchored], settings: dict[str, Any]) -> None:
    """Those that the whole contract above does not see, with a detector that has dropout and batch normalisation."""

    class Contract(StrategyContract):
        size = 16

        def detector(self) -> Detector:
            return Noisy(epochs=1)

    Contract().test_a_process_that_ends_at_any_step_loses_nothing(lambda one: kind(one, **settings))


class One(Detector):
    """One weight, and a loss that is its square."""

    def __init__(self, value: float = 0.0):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(value))

    def optimizer(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.1)

    def training_step(self, images: Tensor) -> Tensor:
        return self.weight.square()

    @torch.no_grad()
    def at(self, value: float) -> None:
        self.weight.fill_(value)


def drawn(strategy: Anchored) -> float:
    """The gradient that the penalty adds for the one weight."""
    gradients = {"weight": torch.zeros(())}
    strategy.after_backward(gradients)
    return float(gradients["weight"])


@pytest.mark.parametrize(
    ("decay", "value", "gradient"), [(None, 1.5, 2.0), (0.5, 1.25, 5.0), (1.0, 1.5, 6.0)]
)
def test_ewc_draws_by_the_derivative_of_the_sum_over_tasks(
    decay: float | None, value: float, gradient: float
) -> None:
    strategy = EWC(One(), weight=2.0, normalise="none", decay=decay)
    for importance, anchor in ((2.0, 1.0), (4.0, 0.0)):
        strategy.detector.at(anchor)
        strategy.remember({"weight": torch.tensor(importance)}, strategy.decay)
    theta = torch.tensor(0.5, requires_grad=True)
    tasks = [(2.0, 1.0), (4.0, 0.0)] if decay is None else [(decay * 2.0 + 4.0, 0.0)]
    penalty = torch.stack([2.0 / 2 * f * (theta - anchor) ** 2 for f, anchor in tasks]).sum()
    assert float(penalty.detach()) == pytest.approx(value)
    strategy.detector.at(0.5)
    assert drawn(strategy) == pytest.approx(gradient)
    assert float(torch.autograd.grad(penalty, theta)[0]) == pytest.approx(gradient)
    assert sum(tensor.nbytes for tensor in strategy.kept().values()) == 8  # for one weight


def test_the_anchors_of_many_tasks_take_the_memory_of_one() -> None:
    torch.manual_seed(0)
    detector = SmallDetector()
    strategy = EWC(detector, weight=3.0, normalise="none")
    explicit: dict[str, list[tuple[Tensor, Tensor]]] = {}
    for _ in range(4):
        for name, parameter in detector.named_parameters():
            nn.init.normal_(parameter)
            importance = torch.rand(parameter.shape) * (torch.rand(parameter.shape) < 0.5)  # some are 0
            explicit.setdefault(name, []).append((importance.clone(), parameter.detach().clone()))
            strategy.remember({name: importance}, None)
    for name, parameter in detector.named_parameters():
        gradient = torch.zeros_like(parameter)
        nn.init.normal_(parameter)
        strategy.after_backward({name: gradient})
        expected = sum(3.0 * f * (parameter.detach() - anchor) for f, anchor in explicit[name])
        torch.testing.assert_close(gradient, expected)


def test_si_follows_the_loss_along_the_path_that_weights_really_take() -> None:
    strategy = SI(One(1.0), weight=0.5, normalise="none", damping=0.1)
    gradient = torch.tensor(2.0)
    strategy.after_backward({"weight": gradient})
    gradient.mul_(0.01)  # as clipping does
    strategy.detector.at(0.8)
    strategy.after_step()
    assert float(strategy.memory["path.weight"]) == pytest.approx(0.4)
    strategy.end_stage(0, Images.of(images(2, 0)))
    assert strategy.memory.keys() == {"importance.weight", "anchor.weight"}
    assert float(strategy.memory["importance.weight"]) == pytest.approx(0.4 / 0.14)  # 2.857
    strategy.detector.at(1.0)
    assert drawn(strategy) * 0.2 / 2 == pytest.approx(0.0571, abs=1e-4)  # a quadratic's value, by its slope
    assert float(strategy._before["weight"][0]) == 0  # the penalty's gradient is no part of the path


def test_a_task_in_which_half_precision_overflowed_in_each_step_leaves_nothing() -> None:
    strategy = SI(One(1.0))
    strategy.after_step()
    strategy.end_stage(0, Images.of(images(2, 0)))
    assert not strategy.memory


def test_si_takes_what_a_loss_has_fallen_by() -> None:
    """The path of plain gradient descent with a small rate adds up to the fall of the loss."""

    class Slow(One):
        epochs, batch_size = 200, 9

        def optimizer(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), 1e-3)

    strategy = SI(Slow(1.0), normalise="none", damping=1e-9)
    strategy.learn(0, images(2, 0))
    end = float(strategy.detector.weight.detach())
    fallen = float(strategy.memory["importance.weight"]) * (1 - end) ** 2
    assert fallen == pytest.approx(1 - end**2, rel=2e-3)


class Noisy(SmallDetector):
    """With dropout, batch normalisation, a parameter that nothing uses, and a loss that follows a schedule."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(held_out=1 / 3, **settings)
        self.normalisation = nn.BatchNorm2d(3)
        self.dropout = nn.Dropout(0.5)
        self.unused = nn.Parameter(torch.ones(2))

    def _reconstructed(self, images: Tensor) -> Tensor:
        return self.dropout(self.normalisation(super()._reconstructed(images)))

    def training_step(self, images: Tensor) -> Tensor:
        return (1 + self.done) * super().training_step(images)


def by_hand(
    detector: Detector, given: Tensor, value: Callable[[Tensor], Tensor], change: Callable[[Tensor], Tensor]
) -> dict[str, Tensor]:
    """The mean over images of a function of each image's gradient, one backward pass after the other."""
    learned = split(given, detector.held_out, 0, 0)[0][:]
    detector.eval()
    torch.manual_seed(seed_for(0, "end of stage", 0))
    sums = {name: torch.zeros_like(parameter) for name, parameter in detector.named_parameters()}
    for image in learned:
        detector.zero_grad()
        value(image[None]).backward()
        for name, parameter in detector.named_parameters():
            sums[name] += 0 if parameter.grad is None else change(parameter.grad) / len(learned)
    return sums


@pytest.mark.parametrize("kind", [EWC, MAS])
def test_importance_is_the_mean_over_single_images_without_dropout(kind: type[EWC | MAS]) -> None:
    given, detector = images(6, 0), Noisy()
    strategy = kind(detector, normalise="none")
    strategy.learn(0, given)
    assert detector.done > 0.99  # the schedule is at its end, not at the last step
    state = {name: tensor.clone() for name, tensor in kept_state(detector).items()}
    if kind is EWC:
        expected = by_hand(detector, given, detector.training_step, Tensor.square)
    else:
        squared = lambda image: detector.outputs(image)[0].square().sum()
        expected = by_hand(detector, given, squared, Tensor.abs)
    assert expected["encoder.weight"].mean() > 0
    for name, tensor in expected.items():
        torch.testing.assert_close(strategy.memory[f"importance.{name}"], tensor)
        assert torch.equal(strategy.memory[f"anchor.{name}"], detector.get_parameter(name))
    few = strategy.estimated(0, Images.of(given), 1, detector.training_step, Tensor.square)
    assert not torch.equal(few["encoder.weight"], expected["encoder.weight"])
    for name, tensor in state.items():
        assert torch.equal(kept_state(detector)[name], tensor), f"an estimate changed {name}"


def test_normalised_importance_has_mean_one_and_does_not_depend_on_the_scale_of_the_loss() -> None:
    class Scaled(SmallDetector):
        scale = 1.0

        def training_step(self, images: Tensor) -> Tensor:
            return self.scale * super().training_step(images)

    def importance(scale: float) -> Tensor:
        strategy = EWC(Scaled())
        strategy.detector.scale = scale
        strategy.end_stage(0, Images.of(images(4, 0)))
        return torch.cat([strategy.memory[f"importance.{name}"].flatten() for name in strategy.trained()])

    torch.manual_seed(0)
    one = importance(1.0)
    torch.manual_seed(0)
    torch.testing.assert_close(importance(1e-6), one)
    assert float(one.mean()) == pytest.approx(1.0)


def far(strategy: Anchored) -> float:
    """How far two stages take weights from where the first ended."""
    strategy.learn(0, images(6, 0))
    before = {name: tensor.clone() for name, tensor in strategy.trained().items()}
    strategy.learn(1, images(6, 1))
    moved = [(tensor - before[name]).detach().square().sum() for name, tensor in strategy.trained().items()]
    return float(torch.stack(moved).sum())


@pytest.mark.parametrize("kind", [EWC, SI, MAS])
def test_a_larger_weight_holds_weights_and_none_lets_them_go_as_in_finetuning(kind: type[Anchored]) -> None:
    free, held = (far(kind(SmallDetector(), weight=weight)) for weight in (0.0, 10.0))
    assert free == far(Anchored(SmallDetector())) and held < 0.5 * free


@pytest.mark.parametrize("kind", [EWC, SI, MAS, LwF])
def test_a_strategy_without_a_buffer_and_of_no_weight_is_fine_tuning(
    kind: type[EWC | SI | MAS | LwF],
) -> None:
    """Of a method that goes on with its statistics under replay too."""

    def learned(build: Callable[[Detector], Strategy]) -> dict[str, Tensor]:
        strategy = build(CFA(backbone(), layers=[1], epochs=1, batch_size=3))
        for stage in range(2):
            strategy.learn(stage, images(6, stage))
        return kept_state(strategy.detector)

    expected, found = learned(Finetune), learned(lambda detector: kind(detector, weight=0.0))
    assert expected.keys() == found.keys() and all(torch.equal(found[name], expected[name]) for name in found)


def test_si_s_path_leads_to_the_weights_that_early_stopping_brings_back() -> None:
    class Rising(One):
        """Every validation after the first is worse."""

        patience, epochs, held_out = 5, 3, 0.5

        def validation_loss(self, images: Tensor) -> Tensor:
            self.validations = getattr(self, "validations", 0) + 1
            return torch.tensor(float(self.validations))

    once, thrice = Rising(1.0), Rising(1.0)
    once.epochs = 1
    found = []
    for detector in (once, thrice):
        strategy = SI(detector, normalise="none")
        strategy.learn(0, images(4, 0))
        found.append(float(strategy.memory["importance.weight"]))
        assert set(strategy.memory) == {"importance.weight", "anchor.weight"}
    assert found[0] == found[1] > 0


def test_what_is_kept_goes_to_the_device_that_a_run_goes_on_with() -> None:
    strategy = EWC(SmallDetector())
    strategy.learn(0, images(6, 0))
    kept = strategy.kept()
    strategy.detector.to("meta")
    strategy.restore_kept(kept)
    assert strategy.memory and {tensor.device.type for tensor in strategy.memory.values()} == {"meta"}


def test_parameters_that_get_their_size_in_prepare_are_held_too() -> None:
    strategy = EWC(FastFlow(backbone(), layers=[1], steps=2, trained_normalisation=True, epochs=1))
    for stage in range(2):
        strategy.learn(stage, images(4, stage))
    offset = strategy.memory["importance.flows.0.affine.offset"]
    assert offset.shape == (16, 12, 12) and offset.sum() > 0


def test_parameters_of_another_name_or_shape_than_before_are_free() -> None:
    class Changing(One):
        def prepare(self, images: Images) -> None:
            self.batch_size = 9
            if len(images) == 3:  # the second stage has other weights
                self.weight = nn.Parameter(torch.ones(2))
                self.further = nn.Parameter(torch.ones(()))

        def training_step(self, images: Tensor) -> Tensor:
            return torch.stack([parameter.square().sum() for parameter in self.parameters()]).sum()

    for kind in (EWC, SI):
        strategy = kind(Changing(1.0))
        strategy.learn(0, images(2, 0))
        strategy.learn(1, images(3, 1))
        assert torch.allclose(strategy.detector.weight, torch.tensor(0.8))  # one step of gradient descent
        shapes = {name: tensor.shape for name, tensor in strategy.memory.items()}
        assert shapes == {
            f"{which}.{name}": shape
            for which in ("importance", "anchor")
            for name, shape in (("weight", (2,)), ("further", ()))
        }


@pytest.mark.parametrize("freeze", [True, False])
def test_frozen_normalisation_keeps_the_statistics_of_the_first_stage(freeze: bool) -> None:
    strategy = SI(Noisy(), freeze_norm=freeze)
    strategy.learn(0, images(6, 0))
    normalisation = strategy.detector.normalisation
    before = normalisation.running_mean.clone()
    assert before.abs().sum() > 0
    strategy.learn(1, images(6, 1))
    assert torch.equal(normalisation.running_mean, before) == freeze


@pytest.mark.parametrize("settings", [{}, {"replay_size": 4}])
def test_a_penalty_that_is_too_strong_is_named_where_training_diverges(settings: dict[str, int]) -> None:
    strategy = EWC(SmallDetector(epochs=4), weight=1e38, **settings)
    assert strategy.ways_out() == []  # nothing is drawn in the first stage
    strategy.learn(0, images(6, 0))
    strategy.detector.optimizer = lambda: torch.optim.SGD(strategy.detector.parameters(), 1.0)
    with pytest.raises(Diverged, match=r"lower method\.learning_rate, or lower strategy\.weight"):
        strategy.learn(1, images(6, 1))


@pytest.mark.parametrize("scale", [1.0, 65536.0])
@pytest.mark.parametrize(
    ("own", "replayed", "expected"),
    [
        ((1.0, -2.0), (1.0, 1.0), (1.5, -1.5)),
        ((1.0, 2.0), (1.0, 1.0), (1.0, 2.0)),
        ((1.0, -2.0), (0.0, 0.0), (1.0, -2.0)),
    ],
)
def test_a_gem_turns_a_gradient_that_would_raise_the_loss_of_stored_images(
    own: tuple[float, float], replayed: tuple[float, float], expected: tuple[float, float], scale: float
) -> None:
    gradients = {name: scale * torch.tensor([value]) for name, value in zip("ab", own, strict=True)}
    reference = {name: scale * torch.tensor([value]) for name, value in zip("ab", replayed, strict=True)}
    AGEM(One(), replay_size=1).combine(gradients, reference)
    assert [float(gradient) / scale for gradient in gradients.values()] == pytest.approx(expected)


@pytest.mark.parametrize("bad", [torch.inf, -torch.inf, torch.nan])
def test_a_gradient_of_stored_images_that_overflowed_shows(bad: float) -> None:
    gradients = {"weight": torch.tensor([1.0, 1.0])}
    AGEM(One(), replay_size=1).combine(gradients, {"weight": torch.tensor([1.0, bad])})
    assert not gradients["weight"].isfinite().all()


class Checked(AGEM):
    """Keeps the products of gradients before and after they are combined."""

    def combine(self, gradients: Mapping[str, Tensor], replayed: Mapping[str, Tensor]) -> None:
        def cosine() -> float:
            own, other = (
                torch.cat([part[name].flatten() for name in gradients]) for part in (gradients, replayed)
            )
            return float(torch.cosine_similarity(own, other, dim=0))

        before = cosine()
        super().combine(gradients, replayed)
        self.products = [*getattr(self, "products", []), (before, cosine())]


def test_a_gem_s_gradients_never_point_against_those_of_stored_images() -> None:
    detector = SimpleNet(backbone(), layers=[1, 2], hidden=16, epochs=8, batch_size=3, learning_rate=0.01)
    strategy = Checked(detector, replay_size=6)
    seen: list[Tensor] = []
    step = detector.training_step
    detector.training_step = lambda given: seen.append(given) or step(given)
    for stage in range(2):
        strategy.learn(stage, images(6, stage, 32))
    before, after = map(torch.tensor, zip(*strategy.products, strict=True))
    assert (before < -1e-3).any() and (before > 0).any()
    assert (after > -1e-5).all()
    torch.testing.assert_close(after, before.clamp_min(0), atol=1e-5, rtol=0)
    second = seen[-2 * len(strategy.products) :]  # replayed images, and the stage's own, in turns
    assert all(among(batch, images(6, 0, 32)).all() for batch in second[::2])
    assert all(among(batch, images(6, 1, 32)).all() for batch in second[1::2])


def test_a_gem_trains_in_half_precision() -> None:
    class Overflowing(Checked):
        def combine(self, gradients: Mapping[str, Tensor], replayed: Mapping[str, Tensor]) -> None:
            first = not hasattr(self, "products")
            super().combine(gradients, replayed)
            if first:
                AGEM.combine(self, gradients, {name: part * torch.inf for name, part in replayed.items()})

    detector = SmallDetector(batch_size=6)
    detector.compute_in(torch.float16)
    strategy = Overflowing(detector, replay_size=6)
    for stage in range(2):
        strategy.learn(stage, images(6, stage))
    assert all(parameter.isfinite().all() for parameter in detector.parameters())
    assert detector.gradient_scale["scale"] == 65536 / 2  # one step was passed over


@pytest.mark.parametrize(
    ("kind", "name", "value", "why"),
    [
        (EWC, "weight", -1.0, "greater than or equal to 0"),
        (EWC, "decay", 0.0, "greater than 0"),
        (EWC, "images", 0, "greater than 0"),
        (SI, "damping", 0.0, "greater than 0"),
        (MAS, "decay", 1.5, "less than or equal to 1"),
        (MAS, "normalise", "max", "'none' or 'mean'"),
        (AGEM, "weight", 1.0, "there is no setting strategy.weight"),
    ],
)
def test_settings_out_of_range_are_refused(kind: type[Strategy], name: str, value: Any, why: str) -> None:
    with pytest.raises(UserError, match=rf"strategy\.{name}") as caught:
        check_settings("strategy", kind, {name: value})
    assert why in str(caught.value)


class Silent(STFPM):
    """A method that gives no outputs."""

    outputs = Detector.outputs


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["strategy=ewc", "method=patchcore"], "strategy=ewc with method=patchcore makes no sense"),
        (["strategy=mas", "method=stfpm", "method._target_=test_weights.Silent"], "the method gives none"),
        (["strategy=si", "method=ucad", "backbone=small_vit"], "begins each task with new ones"),
    ],
)
def test_methods_that_lack_what_a_strategy_works_on_are_refused(overrides: list[str], words: str) -> None:
    with pytest.raises(UserError, match=words):
        check(composed(*overrides))


def test_batch_normalisation_that_is_not_there_is_not_frozen() -> None:
    strategy = EWC(FastFlow(backbone(), layers=[1], steps=2, batch_size=3), freeze_norm=True)
    with pytest.raises(UserError, match="freeze_norm=true: FastFlow trains no batch normalisation"):
        strategy.check([task("a", images(6, 0))])


@pytest.mark.parametrize("kind", [EWC, SI, MAS, AGEM])
def test_files_of_settings_repeat_the_defaults(kind: type[Strategy]) -> None:
    name = kind.__name__.lower()
    written = yaml.safe_load((ROOT / "conf" / "strategy" / f"{name}.yaml").read_text(encoding="utf-8"))
    assert (written.pop("name"), written.pop("_target_")) == (name, f"{kind.__module__}.{kind.__name__}")
    assert written.keys() == own_arguments("strategy", kind).keys()
    strategy = kind(SmallDetector())
    assert all(getattr(strategy, key) == value for key, value in written.items())
    assert kind.needs_gradients and kind.has_buffer and kind.needs_buffer == (kind is AGEM)
