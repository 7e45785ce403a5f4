"""SuperSimpleNet: heads find noise that Perlin masks lay over features, and judge the image (Rolih et al., 2024)."""

import torch
from pydantic import NonNegativeFloat, PositiveFloat, PositiveInt
from torch import Tensor, nn
from torch.nn import functional as F

from clbench.backbones import Backbone, Layers
from clbench.methods.base import Detector, Prediction, Share
from clbench.methods.maps import Sigma, to_image_size
from clbench.methods.simplenet import Discriminator, adamw, gaussian_noise, initialise
from clbench.methods.simulated import perlin
from clbench.precision import single_precision
from clbench.randomness import seed_for

_CLASSIFIED = 128  # channels inside the classification head
_MARGIN = 0.5  # map values beyond it cost nothing
_FOCUS = 4  # gamma of the focal loss


class SuperSimpleNet(Detector):
    """Heads for segmentation and classification over adapted features with noise in places (Rolih et al., 2024).

    Maps and scores are logits: a sigmoid would leave their order, and make large ones equal.

    Args:
        backbone: where features come from; the noise is made for torchvision's first weights.
        layers: levels of its pyramid; all are brought to twice the grid of the first.
        align_corners: whether levels are upsampled corner to corner, as in the authors' code.
        adapt_cls_features: whether the classification head sees adapted features (the ICPR version) or those of the
            backbone with the same noise (the version of 2025).
        stop_grad: whether the classification head teaches the segmentation head nothing.
        hidden: channels inside the segmentation head.
        perlin_threshold: noise is added where Perlin noise is above it; 0.2 for MVTec AD, 0.6 for VisA.
        noise: standard deviation of the noise that is added to each feature.
        sigma: standard deviation of the map's Gaussian smoothing, in pixels.
        epochs, batch_size: settings of the training with AdamW, whose rates are multiplied by 0.4 after 80 % and again
            after 90 % of the steps.
        learning_rate, weight_decay: of the heads.
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
        align_corners: bool = True,
        adapt_cls_features: bool = True,
        stop_grad: bool = True,
        hidden: PositiveInt = 1024,
        perlin_threshold: float = 0.2,
        noise: PositiveFloat = 0.015,
        sigma: Sigma = 4.0,
        epochs: PositiveInt = 300,
        batch_size: PositiveInt = 32,
        learning_rate: PositiveFloat = 2e-4,
        weight_decay: NonNegativeFloat = 1e-5,
        adaptor_learning_rate: PositiveFloat = 1e-4,
        adaptor_weight_decay: NonNegativeFloat = 0.01,
        held_out: Share = 0.0,
        seed: int = 0,
    ):
        super().__init__()
        self.pyramid = backbone.pyramid(layers)
        channels = sum(self.pyramid.channels)
        torch.manual_seed(seed_for(seed, "supersimplenet weights"))
        self.adaptor = nn.Conv2d(channels, channels, 1)
        self.heads = Heads(channels, hidden, stop_grad)
        self.apply(initialise)
        self.align_corners, self.adapt_cls_features = align_corners, adapt_cls_features
        self.perlin_threshold, self.noise, self.sigma = perlin_threshold, noise, sigma
        self.epochs, self.batch_size, self.held_out = epochs, batch_size, held_out
        self.learning_rate, self.weight_decay = learning_rate, weight_decay
        self.adaptor_learning_rate, self.adaptor_weight_decay = adaptor_learning_rate, adaptor_weight_decay

    def optimizer(self) -> torch.optim.Optimizer:
        return adamw(
            (self.heads, self.learning_rate, self.weight_decay),
            (self.adaptor, self.adaptor_learning_rate, self.adaptor_weight_decay),
        )

    def learning_rate_factor(self, done: float) -> float:
        return 1.0 if done < 0.8 else 0.4 if done < 0.9 else 0.16

    def training_step(self, images: Tensor) -> Tensor:
        """Images [B, 3, H, W] -> the loss, a scalar. Every image is taken twice, each with its own noise and mask."""
        features = self.features(images)
        count = 2 * len(features)
        return self.loss(features, gaussian_noise(features, count, self.noise), self.masks(features, count))

    def masks(self, features: Tensor, count: int) -> Tensor:
        """Where noise is added to so many feature maps like these [B, C, h, w]: float32 [count, 1, h, w] of 0 and 1.

        Each is emptied with a probability of one half, and one in which no noise is above the threshold is empty too. As the
        authors do, Perlin noise is drawn on a grid of powers of two, and not turned: its lattice, where it is 0, runs along
        the sides.
        """
        height, width = features.shape[-2:]
        with single_precision(features.device):
            tall, wide = _power_of_two(height), _power_of_two(width)
            noise = perlin(count, tall, wide, features.device, turned=False)[:, None]
            if noise.shape[-2:] != (height, width):
                noise = F.interpolate(noise, (height, width), mode="bilinear")
            filled = torch.rand(count, 1, 1, 1, device=features.device) < 0.5
            return ((noise > self.perlin_threshold) & filled).float()

    def loss(self, features: Tensor, noise: Tensor, masks: Tensor) -> Tensor:
        """The loss L_seg + L_cls, a scalar.

        Args:
            features: of the images, float32 [B, C, h, w].
            noise: float32 [2B, C, h, w].
            masks: where it is added, float32 [2B, 1, h, w] of 0 and 1: what the heads are to find.
        """
        added = (noise * masks).unflatten(0, (2, -1))
        segmented = (self.adaptor(features).float() + added).flatten(0, 1)
        classified = segmented if self.adapt_cls_features else (features + added).flatten(0, 1)
        maps, scores = self.heads(segmented, classified)
        return truncated(maps, masks) + focal(maps, masks) + focal(scores, masks.amax((1, 2, 3)))

    def forward(self, images: Tensor) -> Prediction:
        """Images [B, 3, H, W] -> maps [B, H, W], the segmentation head's upsampled and smoothed, and scores [B]."""
        grid, scores = self.outputs(images)
        return Prediction(to_image_size(grid[:, 0], images.shape[-2:], self.sigma), scores)

    def outputs(self, images: Tensor) -> list[Tensor]:
        """Images [B, 3, H, W] -> logits of anomalies: at each position of the grid [B, 1, h, w], and of images [B]."""
        features = self.features(images)
        adapted = self.adaptor(features)
        return list(self.heads(adapted, adapted if self.adapt_cls_features else features))

    def features(self, images: Tensor) -> Tensor:
        """Images [B, 3, H, W] -> all levels at twice the first one's grid, averaged over 3x3: float32 [B, C, h, w]."""
        levels = self.pyramid(images)
        grid = [2 * side for side in levels[0].shape[-2:]]
        raised = [
            F.interpolate(level, grid, mode="bilinear", align_corners=self.align_corners) for level in levels
        ]
        return F.avg_pool2d(torch.cat(raised, 1), 3, 1, 1)


class Heads(nn.Module):
    """The segmentation head, and the classification head, which sees features and the map of the other one.

    Args:
        channels: C of the features.
        hidden: channels inside the segmentation head.
        stop_grad: whether the classification head's gradient ends at the map.
    """

    def __init__(self, channels: int, hidden: int, stop_grad: bool):
        super().__init__()
        self.stop_grad = stop_grad
        self.segmentation = Discriminator(channels, hidden)
        self.classification = nn.Sequential(
            nn.Conv2d(channels + 1, _CLASSIFIED, 5, padding=2),
            nn.BatchNorm2d(_CLASSIFIED),
            nn.ReLU(inplace=True),
        )
        self.score = nn.Linear(2 * _CLASSIFIED + 2, 1)

    def forward(self, segmented: Tensor, classified: Tensor) -> tuple[Tensor, Tensor]:
        """Features for each of the heads [B, C, h, w] -> maps [B, 1, h, w] and scores [B], float32 logits."""
        maps = self.segmentation(segmented)
        seen = maps.detach() if self.stop_grad else maps
        found = self.classification(torch.cat([classified, seen], 1))
        pooled = [found.amax((2, 3)), found.mean((2, 3)), seen.amax((2, 3)), seen.mean((2, 3))]
        return maps.float(), self.score(torch.cat(pooled, 1))[:, 0].float()


def truncated(maps: Tensor, masks: Tensor) -> Tensor:
    """How far logits are on the wrong side of a margin, a scalar: the mean over normal positions, plus that over others.

    A mean over no position is 0.

    Args:
        maps: logits [B, 1, h, w].
        masks: [B, 1, h, w] of 0 and 1.
    """
    wrong = (_MARGIN + (1 - 2 * masks) * maps).clamp_min(0)
    return torch.stack([(wrong * part).sum() / part.sum().clamp_min(1) for part in (1 - masks, masks)]).sum()


def focal(logits: Tensor, targets: Tensor) -> Tensor:
    """The mean focal loss (Lin et al., 2017) of logits against targets of 0 and 1, both of the same shape: a scalar."""
    right = (2 * targets - 1) * logits
    return -(torch.sigmoid(-right) ** _FOCUS * F.logsigmoid(right)).mean()


def _power_of_two(count: int) -> int:
    """The smallest power of two that is not below a number."""
    return 1 << (count - 1).bit_length()
