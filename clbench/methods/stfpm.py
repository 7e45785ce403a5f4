"""STFPM: a student matches a frozen teacher's feature pyramid (Wang et al., 2021)."""

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
        layers: levels at which the student is to match it.
        epochs, batch_size, learning_rate, momentum, weight_decay: of stochastic gradient descent.
        held_out, patience: of early stopping, see `Detector`.
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
        """Images [B, 3, H, W] -> the sum over levels of the discrepancies' means."""
        return torch.stack([discrepancy.mean() for discrepancy in self.discrepancies(images)]).sum()

    def forward(self, images: Tensor) -> Prediction:
        """The product over levels of upsampled discrepancies: map [B, H, W], score [B] its maximum."""
        size = images.shape[-2:]
        maps = torch.stack(
            [
                F.interpolate(discrepancy[:, None], size, mode="bilinear")[:, 0]
                for discrepancy in self.discrepancies(images)
            ]
        ).prod(0)
        return Prediction(maps, maps.amax((1, 2)))

    def discrepancies(self, images: Tensor) -> list[Tensor]:
        """Half the squared distance of the unit-length features at each position, a map [B, h_l, w_l] a level."""
        return [
            0.5 * (F.normalize(taught, dim=1) - F.normalize(learned.float(), dim=1)).square().sum(1)
            for taught, learned in zip(self.teacher(images), self.student(images), strict=True)
        ]
