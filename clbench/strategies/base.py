"""How a detector meets the stream: which images a task's steps see, and what happens to what was kept."""

import copy
from collections.abc import Callable, Mapping, Sequence

from torch import Tensor

from clbench.backbones import FeaturePyramid
from clbench.data.stream import Task
from clbench.errors import UserError
from clbench.methods.base import Detector, Prediction, kept_state
from clbench.training import Bookmark, held_out, train


class Strategy:
    """Learns the stages of a stream with a detector, and predicts with what was learned.

    Args:
        detector: fresh.
        seed: of what the strategy draws.
        replay_size: images of the replay buffer; only `replay` has one.

    What a strategy can do is said on its class; configuration, footprint, recording and report look there and never
    at its name.

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
        bookmark: where a training under way is kept and continued from, if anywhere.
        on_epoch: told of every epoch: stage, epoch, mean loss.
    """

    has_buffer = False
    joint = False
    task_known = False
    continual = True
    needs_gradients = False
    needs_native_update = False
    why_no_buffer = "it keeps no images"

    def __init__(self, detector: Detector, *, seed: int = 0, replay_size: int | None = None):
        self.detector = detector
        self.seed = seed
        self.replay_size = replay_size
        self.bookmark: Bookmark | None = None
        self.on_epoch: Callable[[int, int, float], None] = lambda stage, epoch, loss: None

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
        if detector.optimizer() is None:
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
        """Learn a stage from its images, uint8 [N, 3, H, W]."""
        raise NotImplementedError

    def detector_for(self, task: int) -> Detector:
        """The detector that predicts a task's images; only `single` may look at which task it is."""
        return self.detector

    def predict(self, images: Tensor, task: int) -> Prediction:
        """Predict images, uint8 [B, 3, H, W], of a task."""
        return self.detector_for(task)(images)

    def unchanged(self, stage: int, learned: int) -> bool:
        """Whether the predictions for a task learned at stage `learned` are still those of stage - 1."""
        return False

    def stored_images(self) -> Tensor | None:
        """Images kept for replay, uint8 [M, 3, H, W]."""
        return None

    def detectors(self) -> Sequence[Mapping[str, Tensor]]:
        """The state of every detector kept, without frozen networks: one, but for `single`."""
        return [kept_state(self.detector)]

    def state(self) -> dict[str, Tensor]:
        """What is needed to continue after this stage."""
        return {f"detector.{name}": tensor for name, tensor in kept_state(self.detector).items()}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Continue from what `state` gave."""
        self.detector.restore(part(state, "detector."))

    def fit(
        self, detector: Detector, stage: int, images: Tensor, stored: Sequence[tuple[Tensor, Tensor]] = ()
    ) -> None:
        """Teach a detector a stage's images, and with them each earlier task's stored ones, see `train`."""
        train(detector, stage, images, stored, self.seed, self.bookmark, self.on_epoch)


def part(state: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The entries under a prefix, without it."""
    return {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}


def fresh(detector: Detector) -> Detector:
    """A copy that shares the frozen networks and nothing else."""
    shared = {id(module): module for module in detector.modules() if isinstance(module, FeaturePyramid)}
    return copy.deepcopy(detector, shared)
