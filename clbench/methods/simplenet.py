"""SimpleNet: a discriminator tells features from the same with noise (Liu et al., 2023)."""

from typing import Any

import torch
from pydantic import NonNegativeFloat, PositiveFloat, PositiveInt
from torch import Tensor, nn
from torch.nn import functional as F

from clbench.backbones import Backbone, Layers
from clbench.methods.base import Detector, Prediction, Share
from clbench.methods.maps import Sigma, to_image_size
from clbench.precision import single_precision
from clbench.randomness import seed_for

_MARGIN = 0.5  # th+ and -th-: scores beyond it cost nothing


class SimpleNet(Detector):
    """Noise on adapted features stands for anomalies (Liu et al., 2023, section 3).

    Args:
        backbone: where features come from; the noise is made for torchvision's first weights.
        layers: levels of its pyramid; all are brought to the grid of the first.
        hidden: channels inside the discriminator.
        noise: standard deviation of the noise that is added to each adapted feature.
        sigma: standard deviation of the map's Gaussian smoothing, in pixels.
        epochs, batch_size: settings of the training with AdamW.
        learning_rate, weight_decay: of the discriminator.
        adaptor_learning_rate, adaptor_weight_decay: of the adaptor.
        held_out: share of the normal images that training does not see; thresholds are set on them.
        seed: seed of the first weights.
    """

    needs_only_features = True

    def __init__(
        self,
        backbone: Backbone,
        *,
        layers: Layers,
        hidden: PositiveInt = 1024,
        noise: PositiveFloat = 0.015,
        sigma: Sigma = 4.0,
        epochs: PositiveInt = 160,
        batch_size: PositiveInt = 8,
        learning_rate: PositiveFloat = 2e-4,
        weight_decay: NonNegativeFloat = 1e-5,
        adaptor_learning_rate: PositiveFloat = 1e-4,
        adaptor_weight_decay: NonNegativeFloat = 0.01,
        held_out: Share = 0.0,
        seed: int = 0,
    ):
        super().__init__()
        self.pyramid = backbone.pyramid(layers)
        self.share = sum(self.pyramid.channels) // len(layers)  # channels of a level's features
        channels = self.share * len(layers)
        torch.manual_seed(seed_for(seed, "simplenet weights"))
        self.adaptor = nn.Conv2d(channels, channels, 1)
        self.discriminator = Discriminator(channels, hidden)
        self.apply(initialise)
        self.noise, self.sigma = noise, sigma
        self.epochs, self.batch_size, self.held_out = epochs, batch_size, held_out
        self.learning_rate, self.weight_decay = learning_rate, weight_decay
        self.adaptor_learning_rate, self.adaptor_weight_decay = adaptor_learning_rate, adaptor_weight_decay

    def optimizer(self) -> torch.optim.Optimizer:
        return adamw(
            (self.discriminator, self.learning_rate, self.weight_decay),
            (self.adaptor, self.adaptor_learning_rate, self.adaptor_weight_decay),
        )

    def training_step(self, images: Tensor) -> Tensor:
        """Images [B, 3, H, W] -> the loss, a scalar (section 3.5)."""
        features = self.features(images)
        return self.loss(features, gaussian_noise(features, len(features), self.noise))

    def loss(self, features: Tensor, noise: Tensor) -> Tensor:
        """The mean hinge loss of features [B, C, h, w], and of the same with noise [B, C, h, w]; a scalar.

        Both go through the discriminator as one batch, whose statistics normalise them.
        """
        adapted = self.adaptor(features).float()
        normal, anomalous = self.discriminator(torch.cat([adapted, adapted + noise])).float().chunk(2)
        return (_MARGIN + normal).clamp_min(0).mean() + (_MARGIN - anomalous).clamp_min(0).mean()

    def forward(self, images: Tensor) -> Prediction:
        """Images [B, 3, H, W] -> maps [B, H, W], and scores [B] (section 3.6).

        A score is the largest at any position of the grid; a map is the grid's scores upsampled and smoothed.
        """
        (grid,) = self.outputs(images)
        maps = to_image_size(grid[:, 0], images.shape[-2:], self.sigma)
        return Prediction(maps, grid.amax((1, 2, 3)))

    def outputs(self, images: Tensor) -> list[Tensor]:
        """Images [B, 3, H, W] -> the grid's scores [B, 1, h, w], higher where anomalous, in a list.

        Of the scores, and not of adapted features: they depend on all weights, and are few.
        """
        return [self.discriminator(self.adaptor(self.features(images))).float()]

    def features(self, images: Tensor) -> Tensor:
        """Images [B, 3, H, W] -> features of 3x3 neighbourhoods, float32 [B, C, h, w] (section 3.2).

        Each level has an equal share of the C channels, which are as many as the levels have together, or a few less where
        that does not divide evenly. They are means of as many consecutive values of a neighbourhood, which are ordered by
        channel, row and column. With two levels of c and 2c channels: of 6 and of 12.
        """
        levels = self.pyramid(images)
        grid = levels[0].shape[-2:]
        parts = []
        for level in levels:
            values = F.unfold(level, 3, padding=1)  # [B, 9 C_l, h_l * w_l]
            means = F.adaptive_avg_pool1d(values.transpose(1, 2), self.share).transpose(1, 2)
            means = means.unflatten(2, level.shape[-2:])
            parts.append(means if means.shape[-2:] == grid else F.interpolate(means, grid, mode="bilinear"))
        return torch.cat(parts, 1)


class Discriminator(nn.Sequential):
    """Features [B, channels, h, w] -> scores [B, 1, h, w], from each position by itself.

    The first layer is computed in single precision whatever gpu.precision is, which would round small noise away.
    """

    def __init__(self, channels: int, hidden: int):
        super().__init__(
            nn.Conv2d(channels, hidden, 1),
            nn.BatchNorm2d(hidden),
            nn.LeakyReLU(0.2, inplace=True),
            nn.Conv2d(hidden, 1, 1, bias=False),
        )

    def forward(self, features: Tensor) -> Tensor:
        first, *others = self
        with single_precision(features.device):
            found = first(features.float())
        for layer in others:
            found = layer(found)
        return found


def adamw(*parts: tuple[nn.Module, float, float]) -> torch.optim.AdamW:
    """An optimizer of modules, each with its own learning rate and weight decay."""
    groups: list[dict[str, Any]] = [
        {"params": module.parameters(), "lr": rate, "weight_decay": decay} for module, rate, decay in parts
    ]
    return torch.optim.AdamW(groups, fused=True)


def gaussian_noise(features: Tensor, count: int, deviation: float) -> Tensor:
    """Noise for so many feature maps like these [B, C, h, w]: float32 [count, C, h, w].

    It is drawn with channels last in memory, as trained convolutions take their inputs.
    """
    _, channels, height, width = features.shape
    drawn = torch.randn(count, height, width, channels, device=features.device).mul_(deviation)
    return drawn.permute(0, 3, 1, 2)


def initialise(module: nn.Module) -> None:
    """Weights of layers as Glorot & Bengio (2010) say; biases and normalisation stay as PyTorch makes them."""
    if isinstance(module, nn.Linear | nn.Conv2d):
        nn.init.xavier_normal_(module.weight)
