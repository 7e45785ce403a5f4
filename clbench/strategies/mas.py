"""MAS: memory aware synapses (Aljundi et al., 2018)."""

from typing import Annotated, Any

import torch
from annotated_types import Gt, Le
from pydantic import PositiveInt
from torch import Tensor

from clbench.data.images import Images
from clbench.methods.base import Detector
from clbench.strategies.anchored import Anchored


class MAS(Anchored):
    """Weights that the outputs for earlier tasks are sensitive to are drawn back to their values after the last task.

    The loss gets weight * sum_i importance_i * (weight_i - anchor_i)^2. The importance is the mean, over single images that
    a task learned from, of the absolute gradient of the squared Euclidean norm of `Detector.outputs`, all together (Aljundi
    et al., 2018, section 4.1). No loss is needed for it. Outputs that a method normalises would give no gradient.

    Args:
        detector, seed: as for `Strategy`.
        decay: what the importance for earlier tasks is multiplied by with every task; 1 is the paper's sum.
        images: how many of a task's images the importance is estimated from at most, drawn at random; None for all.
        settings: those of `Anchored`.
    """

    needs_outputs = True

    def __init__(
        self,
        detector: Detector,
        *,
        seed: int = 0,
        decay: Annotated[float, Gt(0), Le(1)] = 1.0,
        images: PositiveInt | None = None,
        **settings: Any,
    ):
        super().__init__(detector, seed=seed, **settings)
        self.decay, self.images = decay, images

    def end_stage(self, stage: int, images: Images) -> None:
        self.remember(self.estimated(stage, images, self.images, self._norm, Tensor.abs), self.decay)
        super().end_stage(stage, images)

    def _norm(self, image: Tensor) -> Tensor:
        """An image, uint8 [1, 3, H, W] -> the squared norm of its outputs, a scalar."""
        return torch.stack([output.float().square().sum() for output in self.detector.outputs(image)]).sum()
