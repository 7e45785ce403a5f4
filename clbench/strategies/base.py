"""How a detector meets the stream: which images a task's steps see, what is added to its loss, and what is kept."""

import copy
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from clbench.backbones import FeaturePyramid
from clbench.data.stream import Task
from clbench.errors import UserError
from clbench.methods.base import Detector, Prediction, kept_state
from clbench.training import Bookmark, Hooks, held_out, train


class Strategy(Hooks):
    """Learns the stages of a stream with a detector, and predicts with what was learned.

    What a strategy can do is said on its class; configuration, footprint, recording and report look there and never
    at its name. Its further constructor arguments are the settings of its file in `conf/strategy/`, checked against
    their annotations when a run is composed. It takes part through hooks: `begin_stage` and `end_stage` here, and inside
    the training loop `penalty`, `after_backward` and `after_step` (see `Hooks`). All that it draws is drawn from
    `clbench.randomness.generator(self.seed, purpose, ...)`, so that a run that is killed and continued is the run.

    Args:
        detector: fresh.
        seed: of what the strategy draws.

    Attributes:
        has_buffer: whether it keeps images of earlier tasks: the settings of the `replay` group are for it, and its
            constructor takes them, each after `replay_`.
        joint: whether one stage learns all tasks.
        task_known: whether an image comes with its task, so that each task has a model of its own.
        continual: whether it learns task by task and judges without being told the task: it counts in best marks and
            Pareto fronts, and the others are bounds to compare with.
        needs_gradients: whether it works on the steps of an optimizer, and so makes no sense for a detector without.
        needs_native_update: whether it relies on the method's own update of banks and statistics.
        why_no_buffer: said to who gives it a buffer.
        memory: tensors that it keeps, by name: what `kept` gives and `restore_kept` takes, unless a class overrides both.
        bookmark: where a training under way is kept and continued from, if anywhere.
        on_epoch: called after every epoch with stage, epoch and mean loss.
    """

    has_buffer = False
    joint = False
    task_known = False
    continual = True
    needs_gradients = False
    needs_native_update = False
    why_no_buffer = "it keeps no images"

    def __init__(self, detector: Detector, *, seed: int = 0):
        self.detector = detector
        self.seed = seed
        self.memory: dict[str, Tensor] = {}
        self.bookmark: Bookmark | None = None
        self.on_epoch: Callable[[int, int, float], None] = lambda stage, epoch, loss: None

    @classmethod
    def flags(cls) -> dict[str, bool]:
        """What it can do, for summary.json."""
        names = ("has_buffer", "joint", "task_known", "continual", "needs_gradients")
        return {name: getattr(cls, name) for name in names}

    def stages(self, tasks: int) -> list[list[int]]:
        """The tasks that each stage learns: one a stage, or all in one where training is joint."""
        return [list(range(tasks))] if self.joint else [[task] for task in range(tasks)]

    def check(self, tasks: Sequence[Task]) -> None:
        """Whether the detector can learn and judge these tasks, before it begins to.

        Raises:
            UserError: a network takes no images of their size, or a batch is larger than a task.
        """
        detector = self.detector
        detector.check(tasks[0].train.images[:1].to(detector.device))
        if not detector.has_gradients():
            return
        for stage in self.stages(len(tasks)):
            count = sum(len(tasks[task].train) for task in stage)
            left = count - held_out(count, detector.held_out)
            if detector.batch_size > left:
                name = "+".join(tasks[task].name for task in stage)
                raise UserError(
                    f"method.batch_size={detector.batch_size} is larger than the {left} images of task '{name}' "
                    f"that are learned from ({count - left} are held out): give at most {left}"
                )

    def learn(self, stage: int, images: Tensor) -> None:
        """Learn a stage from its images, uint8 [N, 3, H, W].

        In a continued run, `begin_stage` is called again for the stage that was left, with what was kept after the one
        before; training then goes on from its last checkpoint.
        """
        self.begin_stage(stage, images)
        train(
            self.detector,
            stage,
            images,
            self.replayed(),
            self.seed,
            self.bookmark,
            self.on_epoch,
            self,
        )
        self.end_stage(stage, images)

    def begin_stage(self, stage: int, images: Tensor) -> None:
        """Called before a stage is learned from its images, uint8 [N, 3, H, W]."""

    def end_stage(self, stage: int, images: Tensor) -> None:
        """Called once a stage is learned from its images, uint8 [N, 3, H, W]."""

    def replayed(self) -> Sequence[tuple[Tensor, Tensor]]:
        """For each earlier stage, the stored images that it was learned from, to be learned again, and those that were
        held out of it, to be held out again: both uint8 [M, 3, H, W]."""
        return ()

    def kept(self) -> dict[str, Tensor]:
        return self.memory

    def restore_kept(self, tensors: dict[str, Tensor]) -> None:
        self.memory = dict(tensors)

    def detector_for(self, task: int) -> Detector:
        """The detector that predicts a task's images; only a strategy with `task_known` may look at which it is."""
        return self.detector

    def predict(self, images: Tensor, task: int) -> Prediction:
        """Predict images, uint8 [B, 3, H, W], of a task."""
        return self.detector_for(task)(images)

    def unchanged(self, stage: int, learned: int) -> bool:
        """Whether the predictions for a task learned at stage `learned` are still those of stage - 1."""
        return False

    def stored_images(self) -> Tensor | None:
        """All images kept for replay, uint8 [M, 3, H, W]; None where there are none."""
        parts = [images for pair in self.replayed() for images in pair]
        return torch.cat(parts) if parts else None

    def detectors(self) -> Sequence[Mapping[str, Tensor]]:
        """The states of all detectors kept, without frozen networks: one, unless the task is known."""
        return [kept_state(self.detector)]

    def state(self) -> dict[str, Tensor]:
        """All that a new process needs to continue after this stage: name -> tensor."""
        return {**self.detector_state(), **{f"kept.{name}": tensor for name, tensor in self.kept().items()}}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Continue from what `state` gave."""
        self.restore_detector(state)
        self.restore_kept(part(state, "kept."))

    def detector_state(self) -> dict[str, Tensor]:
        """The part of `state` that predicting needs."""
        return {f"detector.{name}": tensor for name, tensor in kept_state(self.detector).items()}

    def restore_detector(self, state: Mapping[str, Tensor]) -> None:
        """Predict as the strategy did that gave this `state`."""
        self.detector.restore(part(state, "detector."))


def part(state: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The entries under a prefix, without it."""
    return {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}


def fresh(detector: Detector) -> Detector:
    """A copy that shares the frozen networks and nothing else."""
    shared = {id(module): module for module in detector.modules() if isinstance(module, FeaturePyramid)}
    return copy.deepcopy(detector, shared)
