"""How a detector meets the stream: the images of a stage, what is added to the loss, and what is kept."""

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from clbench.data.images import Images
from clbench.data.stream import Task
from clbench.errors import UserError, counted
from clbench.methods.base import Detector, Prediction, kept_state
from clbench.randomness import seed_for
from clbench.training import OF_STEPS, Bookmark, Hooks, overrides, split, train, with_prefix


def ignore_epoch(stage: int, epoch: int, loss: float) -> None:
    """An `on_epoch` that does nothing."""


class Strategy(Hooks):
    """Learns the stages of a stream with a detector, and predicts with what was learned.

    Class attributes say what a strategy can do; config, footprint, recording and report look there and never
    at its name. A subclass's further constructor arguments are the settings of its file in `conf/strategy/`,
    checked against their annotations when a run is composed. It takes part through hooks: `begin_stage` and
    `end_stage` here, and inside the training loop those of `Hooks`.
    Random numbers are drawn from `clbench.randomness.generator(self.seed, purpose, ...)`: a run that is
    killed and continued draws the same.

    Args:
        detector: a detector that has learned nothing yet.
        seed: seed of the random numbers that the strategy draws.

    Attributes:
        has_buffer: whether it can keep images of earlier tasks. Then its constructor takes the settings of the
            `replay` group, under names that begin with `replay_`.
        needs_buffer: whether one that has a buffer makes no sense without; if not, `replay_size` is None where none is
            asked for.
        joint: whether one stage learns all tasks.
        task_known: whether an image comes with its task, so that each task has a model of its own.
        continual: whether it learns task by task and predicts without being told the task. Reports mark the
            best among such strategies and put them into Pareto fronts; the others are bounds to compare with.
        needs_gradients: whether it works on an optimizer's steps, so that it makes no sense for a detector
            without one. True for a class that overrides `penalty`, `combine`, `after_backward` or `after_step`, unless
            it says False itself: then it does something for detectors without one too, as to replay images.
        needs_outputs: whether it works on what `Detector.outputs` gives, so that it makes no sense for a detector that
            gives none.
        needs_lasting_weights: whether it holds weights to what earlier tasks left, so that it makes no sense for a detector
            that begins each task with new ones.
        needs_native_update: whether it relies on the method's own update of banks and statistics.
        why_no_buffer: the reason given in the error where a buffer is asked for.
        memory: tensors that it keeps, by name: what `kept` gives and `restore_kept` takes, unless a class
            overrides both.
        bookmark: where a stage that is being learned is kept and continued from; None for nowhere.
        on_epoch: called after each epoch with the stage, the epoch, both 0-based, and the mean loss.
    """

    has_buffer = False
    needs_buffer = True
    joint = False
    task_known = False
    continual = True
    needs_gradients = False
    needs_outputs = False
    needs_lasting_weights = False
    needs_native_update = False
    why_no_buffer = "it keeps no images"

    def __init_subclass__(cls, **arguments: Any) -> None:
        super().__init_subclass__(**arguments)
        parent = next(base for base in cls.__mro__[1:] if issubclass(base, Strategy))
        if "needs_gradients" not in vars(cls) and overrides(cls, OF_STEPS, parent):
            cls.needs_gradients = True

    def __init__(self, detector: Detector, *, seed: int = 0):
        self.detector = detector
        self.seed = seed
        self.memory: dict[str, Tensor] = {}
        self.bookmark: Bookmark | None = None
        self.on_epoch: Callable[[int, int, float], None] = ignore_epoch

    @classmethod
    def flags(cls) -> dict[str, bool]:
        """The class attributes that summary.json holds and reports read: name -> value."""
        names = ("has_buffer", "joint", "task_known", "continual", "needs_gradients")
        return {name: getattr(cls, name) for name in names}

    @classmethod
    def check_buffer(
        cls, given: Mapping[str, Any], detector: type[Detector], has_backbone: bool, side: int | None
    ) -> None:
        """Check, when a run is composed, that the settings of the buffer go together, and with the method.

        Args:
            given: settings by their keys in the group `replay`, each checked by itself.
            detector: the method's class.
            has_backbone: whether it takes features from a frozen backbone.
            side: of images, in pixels; None where it is not known yet.

        Raises:
            UserError: they do not.
        """

    @property
    def routes(self) -> bool:
        """Whether the detector keeps a model for each stage and chooses one for an image."""
        return self.needs_native_update and self.detector.chooses and not (self.joint or self.task_known)

    def stages(self, tasks: int) -> list[list[int]]:
        """The indices of the tasks that each stage learns: one task a stage, or all in one (`joint`)."""
        return [list(range(tasks))] if self.joint else [[task] for task in range(tasks)]

    def check(self, tasks: Sequence[Task]) -> None:
        """Check, before training, that the detector can learn and predict images of these tasks.

        Tasks without images were learned in an earlier run, and are not checked.

        Raises:
            UserError: the detector takes no images of their size, or a batch is larger than a task.
        """
        detector = self.detector
        first = next(task.train.pieces for task in tasks if len(task.train))
        detector.check(first[:1].to(detector.device))
        stages = [stage for stage in self.stages(len(tasks)) if all(len(tasks[task].train) for task in stage)]
        images = [Images.concatenate([tasks[task].train.pieces for task in stage]) for stage in stages]
        counts = [len(of_stage) for of_stage in images]
        learned = [len(split(of_stage, detector.held_out, self.seed, 0)[0]) for of_stage in images]
        kept = len(self.stages(len(tasks))) if self.needs_native_update else 1
        detector.check_stages(learned, kept)
        if not detector.has_gradients():
            return
        what = "image" if first.parents is None else "tile"
        for stage, count, rest in zip(stages, counts, learned, strict=True):
            if detector.batch_size > rest:
                name = "+".join(tasks[task].name for task in stage)
                raise UserError(
                    f"method.batch_size={detector.batch_size} is larger than the {counted(rest, what)} of task "
                    f"'{name}' that are learned from (held out: {count - rest}): give at most {rest}"
                )

    def learn(self, stage: int, images: Tensor | Images) -> None:
        """Learn a stage, 0-based, from its images, uint8 [N, 3, H, W].

        A process that continues within a stage calls `begin_stage` again, with what was kept after the stage
        before; training then continues from the stage's own checkpoint.

        Raises:
            Diverged, Stopped, UserError: as `clbench.training.train`.
        """
        images = Images.of(images).on(self.detector.device)
        torch.manual_seed(seed_for(self.seed, "begin of stage", stage))
        self.begin_stage(stage, images)
        stored = self.replayed()
        shown = self.shown(stage, images)
        train(self.detector, stage, shown, stored, self.seed, self.bookmark, self.on_epoch, self)
        torch.manual_seed(seed_for(self.seed, "end of stage", stage))
        self.end_stage(stage, images)

    def shown(self, stage: int, images: Images) -> Images:
        """A stage's images, uint8 [N, 3, H, W], as training is to see them, in their order; a continued stage asks again.

        Thresholds are set on images as they are.
        """
        return images

    def begin_stage(self, stage: int, images: Images) -> None:
        """Called before a stage is learned from its images, uint8 [N, 3, H, W], of which the rows that are asked for are on
        the device.

        torch's own generators are seeded for it. In the first stage, weights that depend on the size of images
        may not have theirs yet: `Detector.prepare` comes later.
        """

    def end_stage(self, stage: int, images: Images) -> None:
        """Called after a stage was learned from its images, uint8 [N, 3, H, W]; torch's own generators are
        seeded for it.
        """

    def replayed(self) -> Sequence[tuple[Tensor | Images, Tensor | Images]]:
        """Stored images of each earlier stage, both uint8 [M, 3, H, W]: those that are learned again, and
        those that were held out and stay so. Nothing where there is no buffer.
        """
        return ()

    def kept(self) -> dict[str, Tensor]:
        return self.memory

    def restore_kept(self, tensors: dict[str, Tensor]) -> None:
        self.memory = dict(tensors)

    def detector_for(self, task: int) -> Detector:
        """The detector that predicts images of a task, 0-based.

        Only strategies with `task_known` may use the task.
        """
        return self.detector

    def predict(self, images: Tensor, task: int) -> Prediction:
        """Images of a task, uint8 [B, 3, H, W] -> maps [B, H, W] and scores [B].

        A strategy that predicts otherwise overrides `detector_for`, by which a loaded run predicts too.
        """
        return self.detector_for(task).predict(images)

    def unchanged(self, stage: int, learned: int) -> bool:
        """Whether predictions for a task are the same after a stage as after the one before.

        Args:
            stage: the stage that has just been learned, at least 1.
            learned: the stage that learned the task.
        """
        return False

    def drop(self, stage: int) -> None:
        """Drop what was learned in one stage, 0-based, where there is a model of it alone.

        Raises:
            UserError: there is not.
        """
        if not self.routes:
            raise UserError(
                "one model has learned all tasks, and no part of it is of one task alone: repeat the run's command without it"
            )
        self.detector.drop(stage)

    def stored_images(self) -> Images | None:
        """All images kept for replay, uint8 [M, 3, H, W]; None where there are none."""
        stored = [images for pair in self.replayed() for images in pair]
        return Images.concatenate(stored) if stored else None

    def detectors(self) -> Sequence[Mapping[str, Tensor]]:
        """The state of each detector that is kept, name -> tensor, without frozen networks.

        There is one, or with `task_known` one for each task.
        """
        return [kept_state(self.detector)]

    def state(self) -> dict[str, Tensor]:
        """Tensors to save so that a new process continues after this stage: name -> tensor."""
        return {**self.detector_state(), **{f"kept.{name}": tensor for name, tensor in self.kept().items()}}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Take what `state` gave, to continue after that stage."""
        self.restore_detector(state)
        self.restore_kept(with_prefix(state, "kept."))

    def detector_state(self) -> dict[str, Tensor]:
        """The tensors of `state` that predicting needs: name -> tensor."""
        return {f"detector.{name}": tensor for name, tensor in kept_state(self.detector).items()}

    @classmethod
    def predicts_with(cls, name: str, task: int) -> bool:
        """Whether predicting images of a task, 0-based, needs a tensor of `state`: others are not loaded for that."""
        return not name.startswith("kept.")

    def restore_detector(self, state: Mapping[str, Tensor]) -> None:
        """Take what predicting needs out of what `state` gave."""
        self.detector.restore(with_prefix(state, "detector."))


def copy_of(detector: Detector) -> Detector:
    """A copy of a detector that shares its frozen networks and nothing else."""
    shared: dict[int, Any] = {id(pyramid): pyramid for pyramid in detector.pyramids()}
    return copy.deepcopy(detector, shared)
