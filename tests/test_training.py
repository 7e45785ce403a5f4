"""The training loop: what steps see, when it stops, and what it leaves."""

import math
from collections.abc import Mapping

import pytest
import torch
from torch import Tensor, nn

from clbench.methods.base import Detector
from clbench.strategies.replay import Replay
from clbench.testing import SmallDetector
from clbench.training import Batch, Diverged, Hooks, train


class Recorder(Detector):
    """One weight that follows a list of validation losses; remembers every image that it was given."""

    def __init__(self, losses: list[float] | None = None, **settings: object):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(()))
        self.losses = losses
        self.seen: list[Tensor] = []
        self.validated: list[Tensor] = []
        self.epochs_done = 0
        for name, value in settings.items():
            setattr(self, name, value)

    def optimizer(self) -> torch.optim.Optimizer:
        return torch.optim.SGD([self.weight], 1.0)

    def start_task(self, task: int, images: Tensor, stored: Tensor) -> None:
        self.prepared = torch.cat([images, stored])

    def training_step(self, images: Tensor) -> Tensor:
        self.seen.append(images)
        return -self.weight + 0 * torch.rand(())  # the weight counts the steps

    def validation_loss(self, images: Tensor) -> Tensor:
        self.validated.append(images)
        assert self.losses is not None
        self.epochs_done += 1
        return torch.tensor(self.losses[self.epochs_done - 1])

    def finish_task(self, images: Tensor) -> None:
        self.finished = images


def numbered(first: int, count: int) -> Tensor:
    """Images that can be told apart by their first pixel."""
    images = torch.zeros(count, 3, 4, 4, dtype=torch.uint8)
    images[:, 0, 0, 0] = torch.arange(first, first + count)
    return images


def numbers(images: Tensor) -> list[int]:
    return images[:, 0, 0, 0].tolist()


def test_every_epoch_sees_every_image_once_in_an_order_of_its_own() -> None:
    detector = Recorder(epochs=3, batch_size=4)
    train(detector, 0, numbered(0, 10), [], seed=0)
    assert [len(batch) for batch in detector.seen] == [4, 4, 2] * 3
    epochs = [numbers(torch.cat(detector.seen[begin : begin + 3])) for begin in (0, 3, 6)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]


def test_as_many_images_are_replayed_evenly_over_past_tasks() -> None:
    detector = Recorder(epochs=50, batch_size=4)
    stored = [(part, part[:0]) for part in (numbered(100, 30), numbered(150, 3), numbered(200, 1))]
    train(detector, 3, numbered(0, 10), stored, seed=0)
    drawn = []
    for batch in detector.seen:
        current, replayed = batch.chunk(2)
        assert len(current) == len(replayed) and max(numbers(current)) < 10
        tasks = [sum(number >= bound for bound in (150, 200)) for number in numbers(replayed)]
        if len(tasks) == 4:  # three past tasks, each once or twice
            assert sorted(tasks.count(task) for task in range(3)) == [1, 1, 2]
        drawn += tasks
    assert all(abs(drawn.count(task) / len(drawn) - 1 / 3) < 0.06 for task in range(3))


def test_held_out_images_of_current_and_past_tasks_reach_no_step() -> None:
    detector = Recorder([1.0] * 5, epochs=5, batch_size=4, held_out=0.2, patience=9)
    train(detector, 1, numbered(0, 10), [(numbered(100, 8), numbered(108, 2))], seed=0)
    held_out = set(numbers(detector.finished))
    assert len(held_out) == 4 and {number for number in held_out if number >= 100} == {108, 109}
    assert not held_out & set(numbers(torch.cat(detector.seen)))
    assert not held_out & set(numbers(detector.prepared))
    assert set(numbers(torch.cat(detector.validated))) == held_out


def test_what_was_held_out_of_a_task_stays_held_out_when_it_is_replayed() -> None:
    detector = Recorder([1.0] * 100, epochs=2, batch_size=4, held_out=0.2, patience=9)
    strategy = Replay(detector, replay_size=24)
    learned: set[int] = set()
    held_out: set[int] = set()
    for stage in range(5):
        detector.seen.clear()
        strategy.learn(stage, numbered(20 * stage, 20))
        learned |= set(numbers(torch.cat(detector.seen)))
        held_out |= set(numbers(detector.finished))
        stored = strategy.stored_images()
        assert stored is not None and len(stored) == min(24, 20 * (stage + 1))
        kept_out = sum(len(part) for _, part in strategy.replayed())
        assert kept_out == pytest.approx(0.2 * len(stored), abs=stage + 1)
    assert len(held_out) == 5 * 4 and not learned & held_out


def test_a_single_image_is_learned_from_and_not_held_out() -> None:
    detector = Recorder(epochs=2, held_out=0.5, patience=3)
    train(detector, 0, numbered(0, 1), [], seed=0)
    assert len(detector.seen) == 2 and numbers(detector.finished) == [0]


def test_training_stops_when_patience_ends_and_the_best_weights_come_back() -> None:
    losses = [5.0, 4.0, 4.5, 3.0, 3.5, 3.2, 3.0, 1.0]
    detector = Recorder(losses, epochs=8, batch_size=9, held_out=0.1, patience=3)
    train(detector, 0, numbered(0, 10), [], seed=0)
    assert detector.epochs_done == 7  # the third in a row that did not better epoch 4's
    assert float(detector.weight.detach()) == 4  # one step an epoch


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_loss_that_is_no_number_stops_training_and_names_epoch_and_step(bad: float) -> None:
    class Diverging(Recorder):
        def training_step(self, images: Tensor) -> Tensor:
            loss = super().training_step(images)
            return loss * bad if len(self.seen) == 8 else loss

    with pytest.raises(Diverged, match=rf"became -?{bad} in epoch 3, step 2: lower method\.learning_rate"):
        train(Diverging(epochs=5, batch_size=4), 0, numbered(0, 10), [], seed=0)


def test_draws_inside_a_step_depend_on_the_seed_and_the_step_alone() -> None:
    class Drawing(Recorder):
        def training_step(self, images: Tensor) -> Tensor:
            self.seen.append(torch.rand(3))
            return self.weight.square()

    def draws(state: int, seed: int) -> list[list[float]]:
        torch.manual_seed(state)
        detector = Drawing(epochs=2, batch_size=5)
        train(detector, 0, numbered(0, 10), [], seed=seed)
        return [draw.tolist() for draw in detector.seen]

    assert draws(1, 0) == draws(2, 0) != draws(1, 1)
    assert len(set(map(tuple, draws(1, 0)))) == 4


def test_the_learning_rate_follows_the_share_of_steps_done() -> None:
    class Falling(Recorder):
        def learning_rate_factor(self, done: float) -> float:
            return 1.0 if done < 0.5 else 0.1

    detector = Falling(epochs=2, batch_size=5)
    train(detector, 0, numbered(0, 10), [], seed=0)
    assert float(detector.weight.detach()) == pytest.approx(2.2)


class Watching(Hooks):
    """Remembers what it is called with, and draws the weight back."""

    def __init__(self) -> None:
        self.batches: list[Batch] = []
        self.gradients: list[dict[str, float]] = []
        self.steps = 0

    def penalty(self, detector: Detector, batch: Batch) -> Tensor:
        self.batches.append(batch)
        return 3 * next(detector.parameters())

    def after_backward(self, gradients: Mapping[str, Tensor]) -> None:
        self.gradients.append({name: float(gradient) for name, gradient in gradients.items()})
        for gradient in gradients.values():
            gradient.mul_(0.5)

    def after_step(self) -> None:
        self.steps += 1


def test_a_strategy_adds_to_the_loss_changes_gradients_and_knows_where_images_come_from() -> None:
    detector, hooks = Recorder(epochs=2, batch_size=4), Watching()
    stored = [(numbered(100, 3), numbered(190, 1)), (numbered(0, 0), numbered(0, 0)), (numbered(200, 2),) * 2]
    train(detector, 3, numbered(0, 10), stored, seed=0, hooks=hooks)
    assert hooks.steps == 6 and hooks.gradients == [{"weight": 2.0}] * 6  # -1 of the loss, and 3
    assert float(detector.weight.detach()) == -6  # each step goes by half of it
    first = {3: 0, 0: 100, 2: 200}
    for batch in hooks.batches:
        assert len(batch.stages) == len(batch.rows) == len(batch.images)
        assert batch.replayed.tolist() == [False] * (len(batch.images) // 2) + [True] * (len(batch.images) // 2)
    rows = {(stage, row) for b in hooks.batches for stage, row in zip(b.stages.tolist(), b.rows.tolist(), strict=True)}
    assert {stage for stage, _ in rows} == {0, 2, 3}
    shown = {
        (stage, row): number
        for b in hooks.batches
        for stage, row, number in zip(b.stages.tolist(), b.rows.tolist(), numbers(b.images), strict=True)
    }
    assert all(number == first[stage] + row for (stage, row), number in shown.items())


def test_a_hook_that_does_nothing_changes_nothing() -> None:
    class Idle(Hooks):
        def after_backward(self, gradients: Mapping[str, Tensor]) -> None:
            pass

    weights = []
    for hooks in (None, Hooks(), Idle()):
        detector = SmallDetector()
        train(detector, 0, numbered(0, 7).repeat(1, 1, 2, 2), [], seed=0, hooks=hooks)
        weights.append(torch.cat([parameter.detach().flatten() for parameter in detector.parameters()]))
    assert torch.equal(weights[0], weights[1]) and torch.equal(weights[0], weights[2])


@pytest.mark.parametrize("budget", [1, 3, 4, 10])
def test_a_budget_of_steps_ends_training_in_the_middle_of_an_epoch(budget: int) -> None:
    shares = []

    class Scheduled(Recorder):
        def learning_rate_factor(self, done: float) -> float:
            shares.append(done)
            return 1.0

    detector = Scheduled(epochs=1, batch_size=4, step_budget=budget)  # three steps an epoch
    train(detector, 0, numbered(0, 10), [], seed=0)
    assert len(detector.seen) == budget and shares == [step / budget for step in range(budget)]


def test_gradients_are_clipped_to_a_norm_of_all_together() -> None:
    class Steep(Recorder):
        def training_step(self, images: Tensor) -> Tensor:
            return -1000 * self.weight

    detector = Steep(epochs=3, batch_size=10, gradient_clip=0.5)
    train(detector, 0, numbered(0, 10), [], seed=0)
    assert float(detector.weight.detach()) == pytest.approx(1.5)
