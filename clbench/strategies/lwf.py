"""LwF: outputs stay close to those of the model before the stage (Li and Hoiem, 2016), here of features and maps."""

from typing import Any, Literal

from pydantic import NonNegativeFloat
from torch import Tensor

from clbench.data.images import Images
from clbench.errors import UserError
from clbench.methods.base import Detector
from clbench.strategies.replay import Replay
from clbench.strategies.teacher import (
    has_teacher,
    keep_teacher,
    lay_out_teacher,
    learner_outputs,
    taught_outputs,
)
from clbench.training import Batch


class LwF(Replay):
    """`weight` times the distance of a batch's outputs from the earlier model's is added to the method's loss.

    The weights after the stage before are kept, and give the outputs that are to be met; from the second stage on. Without
    `replay.size` these are outputs of the new stage's images, which say little of the earlier ones.

    Args:
        detector, seed: as for `Strategy`.
        weight: of the distance, see `Detector.distance`.
        images: of which the outputs are compared: of all in a batch, of the stage's own (`new`), or of the `replayed`.
        replay: settings of the buffer, as for `Replay`, where there is one.

    Raises:
        UserError: it is to compare outputs of replayed images, and there is no buffer.
    """

    needs_buffer = False
    needs_outputs = True
    needs_lasting_weights = True

    def __init__(
        self,
        detector: Detector,
        *,
        seed: int = 0,
        weight: NonNegativeFloat = 1.0,
        images: Literal["all", "new", "replayed"] = "all",
        **replay: Any,
    ):
        super().__init__(detector, seed=seed, **replay)
        self.weight, self.images = weight, images
        if images == "replayed" and self.buffer is None:
            raise UserError(
                "strategy.images=replayed compares outputs of stored images, and there are none: give replay.size, or "
                "take strategy.images=new"
            )

    def begin_stage(self, stage: int, images: Images) -> None:
        super().begin_stage(stage, images)
        lay_out_teacher(self.memory, self.detector)

    def penalty(self, detector: Detector, batch: Batch) -> Tensor | None:
        as_learning = bool(batch.outputs)
        shown = {"all": batch, "new": batch.new, "replayed": batch.past}[self.images]
        if not has_teacher(self.memory) or not len(shown):
            return None
        taught = taught_outputs(self.memory, detector, shown.images)
        return self.weight * detector.distance(learner_outputs(detector, shown, as_learning), taught)

    def end_stage(self, stage: int, images: Images) -> None:
        super().end_stage(stage, images)
        keep_teacher(self.memory, self.detector)
