"""EWC: elastic weight consolidation (Kirkpatrick et al., 2017), and online EWC (Schwarz et al., 2018)."""

from typing import Annotated, Any

from annotated_types import Gt, Le
from pydantic import PositiveInt
from torch import Tensor

from clbench.data.images import Images
from clbench.methods.base import Detector
from clbench.strategies.anchored import Anchored


class EWC(Anchored):
    """Weights that the loss of earlier tasks is sensitive to are drawn back to their values after these tasks.

    The loss gets weight / 2 * sum_i F_i * (weight_i - anchor_i)^2 (Kirkpatrick et al., 2017, equation 3). F is the diagonal
    of the empirical Fisher information: the mean, over single images that a task learned from, of the squared gradient of
    the method's loss, with the weights that the task ended with. Detectors have no likelihood; their loss stands for it.

    Args:
        detector, seed: as for `Strategy`.
        decay: None for EWC, in which every task has an anchor of its own; the sum over tasks takes the memory of one, as
            `Anchored.remember` says. A number makes it online EWC: F of earlier tasks is multiplied by it with every
            task, and the weights after the last task are the anchor (Schwarz et al., 2018, section 3.2).
        images: how many of a task's images F is estimated from at most, drawn at random; None for all.
        settings: those of `Anchored`.
    """

    gradient_factor = 1.0  # the penalty has half of `weight`

    def __init__(
        self,
        detector: Detector,
        *,
        seed: int = 0,
        decay: Annotated[float, Gt(0), Le(1)] | None = None,
        images: PositiveInt | None = None,
        **settings: Any,
    ):
        super().__init__(detector, seed=seed, **settings)
        self.decay, self.images = decay, images

    def end_stage(self, stage: int, images: Images) -> None:
        self.remember(self.estimated(stage, images, self.images, self._loss, Tensor.square), self.decay)
        super().end_stage(stage, images)

    def _loss(self, image: Tensor) -> Tensor:
        """An image, uint8 [1, 3, H, W] -> its loss, a scalar."""
        loss = self.detector.training_step(image)
        assert loss is not None
        return loss
