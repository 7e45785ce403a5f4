"""STFPM: a student matches a frozen teacher's feature pyramid (Wang et al., 2021)."""

from collections.abc import Sequence
from typing import Annotated

import torch
from annotated_types import Ge, Lt
from pydantic import NonNegativeFloat, PositiveFloat, PositiveInt
from torch import Tensor
from torch.nn import functional as F

from clbench.backbones import Backbone, Layers
from clbench.methods.base import Detector, Prediction, Share


class STFPM(Detector):
    """Anomaly where the student fails to reproduce the teacher (supplement, section 1.4).

    Args:
        backbone: the teacher; the student has its architecture and random weights.
        layers: levels at which the student is to match the teacher.
        epochs, batch_size, learning_rate, momentum, weight_decay: settings of stochastic gradient descent.
        held_out, patience: when training stops early, see `Detector`.
    """

    def __init__(
        self,
        backbone: Backbone,
        *,
        layers: Layers,
        epochs: PositiveInt = 100,
        batch_size: PositiveInt = 8,
        learning_rate: PositiveFloat = 0.4,
        momentum: Annotated[float, Ge(0), Lt(1)] = 0.9,
        weight_decay: NonNegativeFloat = 1e-4,
        held_out: Share = 0.1,
        patience: PositiveInt | None = 10,
    ):
        super().__init__()
        self.teacher = backbone.pyramid(layers)
        self.student = backbone.student(layers)
        self.epochs, self.batch_size = epochs, batch_size
        self.learning_rate, self.momentum, self.weight_decay = learning_rate, momentum, weight_decay
        self.held_out, self.patience = held_out, patience

    def optimizer(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(
            self.student.parameters(),
            self.learning_rate,
            momentum=self.momentum,
            weight_decay=self.weight_decay,
            fused=True,
        )

    def training_step(self, images: Tensor) -> Tensor:
        """Images [B, 3, H, W] -> the loss, a scalar: the student's `distance` from the teacher."""
        taught, learned = self.teacher(images), self.outputs(images)
        self.note(learned)
        return self.distance(learned, taught)

    def outputs(self, images: Tensor) -> list[Tensor]:
        """Images [B, 3, H, W] -> the student's levels, float32 [B, C_l, h_l, w_l]."""
        return [level.float() for level in self.student(images)]

    def distance(self, outputs: Sequence[Tensor], others: Sequence[Tensor]) -> Tensor:
        """Levels [B, C_l, h_l, w_l] -> a scalar: each level's mean `discrepancy`, summed over levels."""
        pairs = zip(outputs, others, strict=True)
        return torch.stack([discrepancy(own, other).mean() for own, other in pairs]).sum()

    def forward(self, images: Tensor) -> Prediction:
        """Images [B, 3, H, W] -> maps [B, H, W], and scores [B], their maxima (supplement, section 1.4.3).

        A map is the product over levels of the upsampled discrepancies.
        """
        size = images.shape[-2:]
        levels = map(discrepancy, self.outputs(images), self.teacher(images))
        upsampled = [F.interpolate(level[:, None], size, mode="bilinear")[:, 0] for level in levels]
        maps = torch.stack(upsampled).prod(0)
        return Prediction(maps, maps.amax((1, 2)))


def discrepancy(learned: Tensor, taught: Tensor) -> Tensor:
    """Features of two networks [B, C, h, w] -> a map [B, h, w] (supplement, section 1.4.1).

    At each position: half the squared distance between their features, each of unit length (Wang et al., 2021), in single
    precision.
    """
    difference = F.normalize(taught.float(), dim=1) - F.normalize(learned.float(), dim=1)
    return 0.5 * difference.square().sum(1)
