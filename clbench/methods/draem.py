"""DRAEM: a network repairs simulated anomalies, and another finds what was repaired (Zavrtanik et al., 2021)."""

import itertools
from collections.abc import Sequence
from typing import Annotated

import torch
from annotated_types import Ge, Le
from pydantic import NonNegativeFloat, PositiveFloat, PositiveInt
from torch import Tensor, nn
from torch.nn import functional as F

from clbench.backbones import unit
from clbench.data.images import Images
from clbench.data.pictures import Folder, Pictures
from clbench.errors import UserError
from clbench.methods.base import Detector, Prediction, Share
from clbench.methods.simulated import change_some, rotated, simulate, uniform
from clbench.methods.tables import table
from clbench.precision import single_precision
from clbench.randomness import seed_for

_MEAN_FILTER = 21  # s_f: side in pixels of the mean filter for image scores
_SSIM_WINDOW, _SSIM_SIGMA = 11, 1.5  # pixels
_SMALLEST = 32  # pixels: images with a shorter side are refused
_FOCUS = 2.0  # gamma of the focal loss


class DRAEM(Detector):
    """A reconstructive and a discriminative sub-network, trained on simulated anomalies (supplement, 1.6).

    Args:
        textures: folder of the pictures that anomalies are made of, the Describable Textures Dataset for the
            real thing; None for procedural ones.
        texture_count: number of these pictures, at most.
        reconstructive_width, discriminative_width: channels of the sub-networks' first blocks.
        rotated_share: share of the normal images that are turned, by up to 90 degrees.
        similarity: lambda, the weight of the structural dissimilarity beside the squared error.
        epochs, batch_size, learning_rate: settings of the training with Adam, whose rate is divided by 5
            after 80 % and again after 90 % of the steps.
        held_out: share of the normal images that training does not see; thresholds are set on them.
        seed: seed of the first weights and of the choice of textures.
        cache: folder that decoded pictures are kept in.
    """

    def __init__(
        self,
        *,
        textures: Folder | None = None,
        texture_count: PositiveInt = 6000,
        reconstructive_width: PositiveInt = 128,
        discriminative_width: PositiveInt = 64,
        rotated_share: Annotated[float, Ge(0), Le(1)] = 0.3,
        similarity: NonNegativeFloat = 1.0,
        epochs: PositiveInt = 50,
        batch_size: PositiveInt = 4,
        learning_rate: PositiveFloat = 1e-4,
        held_out: Share = 0.0,
        seed: int = 0,
        cache: str,
    ):
        super().__init__()
        self.pictures = Pictures(textures, texture_count, "method.textures", seed, cache)
        self.rotated_share, self.similarity = rotated_share, similarity
        self.epochs, self.batch_size, self.learning_rate = epochs, batch_size, learning_rate
        self.held_out = held_out
        torch.manual_seed(seed_for(seed, "draem weights"))
        self.reconstructive = Reconstructive(reconstructive_width)
        self.discriminative = Discriminative(discriminative_width)
        self.apply(_initialise)

    def check(self, images: Tensor) -> None:
        height, width = images.shape[-2:]
        if min(height, width) < _SMALLEST:
            raise UserError(
                f"method=draem halves images five times, and takes none of {width}x{height}: give a "
                f"{self.size_setting} of {_SMALLEST} or more"
            )
        self.pictures.look_up()

    def prepare(self, images: Images) -> None:
        self._textures = self.pictures.load(*images.shape[-2:]).to(images.device)

    def optimizer(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), self.learning_rate, fused=True)

    def learning_rate_factor(self, done: float) -> float:
        return 1.0 if done < 0.8 else 0.2 if done < 0.9 else 0.04

    def training_step(self, images: Tensor) -> Tensor:
        """Images [B, 3, H, W] -> the loss L_rec + L_seg, a scalar (supplement, section 1.6.1)."""
        normal, anomalous, masks = self.material(images)
        repaired, logits = self.parts(anomalous)
        squared = F.mse_loss(repaired, normal)
        return squared + self.similarity * dissimilarity(repaired, normal) + focal(logits, masks)

    def material(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """What a step learns from, made of normal images [B, 3, H, W].

        In single precision whatever the networks' is: rounded coordinates would draw other masks.

        Returns:
            The normal images, some of them turned; the same with simulated anomalies; both float32
            [B, 3, H, W] in [0, 1]; and the anomalies' masks, float32 [B, 1, H, W] of 0 and 1.
        """
        with single_precision(images.device):
            normal = unit(images)
            turned = torch.rand(len(images)) < self.rotated_share
            change_some(normal, turned, lambda t: rotated(t, uniform(t, -90, 90)))
            anomalous, masks = simulate(normal, self._textures)
        return normal, anomalous, masks

    def outputs(self, images: Tensor) -> list[Tensor]:
        """Images [B, 3, H, W] -> repaired images [B, 3, H, W] and logits [B, 2, H, W], without simulated anomalies."""
        return list(self.parts(unit(images)))

    def distance(self, outputs: Sequence[Tensor], others: Sequence[Tensor]) -> Tensor:
        """The mean squared difference of repaired images, plus the divergence of probabilities; a scalar.

        That is Kullback and Leibler's, from the others' probabilities of normal and anomalous, in nats; its mean over
        pixels.
        """
        (repaired, logits), (other_repaired, other_logits) = outputs, others
        learned, taught = (F.log_softmax(each.float(), 1) for each in (logits, other_logits))
        divergence = F.kl_div(learned, taught, reduction="none", log_target=True).sum(1).mean()
        return F.mse_loss(repaired.float(), other_repaired.float()) + divergence

    def parts(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Images [B, 3, H, W] in [0, 1] -> repaired images [B, 3, H, W] and logits [B, 2, H, W].

        The logits are those of normal and anomalous.
        """
        height, width = images.shape[-2:]
        # The networks halve images five times: sides that 32 does not divide are padded, and cut again.
        pad = 0, -width % 32, 0, -height % 32
        padded = F.pad(images, pad, mode="reflect") if any(pad) else images
        repaired = self.reconstructive(padded)
        logits = self.discriminative(torch.cat([repaired, padded], 1))
        return repaired[..., :height, :width].float(), logits[..., :height, :width].float()

    def forward(self, images: Tensor) -> Prediction:
        """Images [B, 3, H, W] -> maps [B, H, W], the probability of an anomaly at each pixel, and scores [B].

        A score is the maximum of the map after a mean filter (supplement, section 1.6.3).
        """
        _, logits = self.parts(unit(images))
        maps = torch.softmax(logits, 1)[:, 1]
        smooth = F.avg_pool2d(maps[:, None], _MEAN_FILTER, 1, _MEAN_FILTER // 2)
        return Prediction(maps, smooth.amax((1, 2, 3)))


def focal(logits: Tensor, masks: Tensor) -> Tensor:
    """L_seg, a scalar: the mean focal loss (Lin et al., 2017) of logits [B, 2, H, W] against masks.

    Masks are [B, 1, H, W] of 0 and 1.
    """
    log_probability = F.log_softmax(logits, 1).gather(1, masks.long())
    return -((1 - log_probability.exp()) ** _FOCUS * log_probability).mean()


def dissimilarity(one: Tensor, other: Tensor) -> Tensor:
    """L_SSIM of two batches of images [B, C, H, W] in [0, 1]: 1 - SSIM, a scalar (Wang et al., 2004).

    The windows are Gaussian.
    Always in single precision: variances are small differences of squares, which half precision loses.
    """
    with single_precision(one.device):
        return _dissimilarity(one.float(), other.float())


def _dissimilarity(one: Tensor, other: Tensor) -> Tensor:
    weights = table(_window, device=one.device)
    channels = 5 * one.shape[1]
    # One depthwise convolution along each side gives all five moments.
    moments = torch.cat([one, other, one * one, other * other, one * other], 1)
    for shape in ((1, 1, _SSIM_WINDOW, 1), (1, 1, 1, _SSIM_WINDOW)):
        moments = F.conv2d(moments, weights.view(shape).expand(channels, -1, -1, -1), groups=channels)
    mean, mean_other, square, square_other, product = moments.chunk(5, 1)
    low, high = 0.01**2, 0.03**2
    covariance = product - mean * mean_other
    variances = square - mean**2 + square_other - mean_other**2
    likeness = (2 * mean * mean_other + low) * (2 * covariance + high)
    return 1 - (likeness / ((mean**2 + mean_other**2 + low) * (variances + high))).mean()


def _window() -> Tensor:
    """The weights of a Gaussian window along one of its sides: [11], of sum 1."""
    offsets = torch.arange(_SSIM_WINDOW) - _SSIM_WINDOW // 2
    weights = torch.exp(-(offsets**2) / (2 * _SSIM_SIGMA**2))
    return weights / weights.sum()


def block(*channels: int) -> nn.Sequential:
    """3x3 convolutions, batch-normalised and rectified, from each number of channels to the next."""
    layers: list[nn.Module] = []
    for before, after in itertools.pairwise(channels):
        layers += [nn.Conv2d(before, after, 3, padding=1), nn.BatchNorm2d(after), nn.ReLU(inplace=True)]
    return nn.Sequential(*layers)


def up(before: int, after: int) -> nn.Sequential:
    """Features [B, before, h, w] -> [B, after, 2h, 2w]: upsampled, then a `block`."""
    upsample = nn.Upsample(scale_factor=2, mode="bilinear", align_corners=True)
    return nn.Sequential(upsample, block(before, after))


class Reconstructive(nn.Module):
    """An encoder and a decoder without skip connections, so that only normal patterns pass.

    Args:
        width: channels of the first block.
    """

    def __init__(self, width: int):
        super().__init__()
        b = width
        down = [block(3, b, b)]
        for before, after in ((b, 2 * b), (2 * b, 4 * b), (4 * b, 8 * b), (8 * b, 8 * b)):
            down += [nn.MaxPool2d(2), block(before, after, after)]  # type: ignore[list-item]
        self.encoder = nn.Sequential(*down)
        self.decoder = nn.Sequential(
            up(8 * b, 8 * b),
            block(8 * b, 8 * b, 4 * b),
            up(4 * b, 4 * b),
            block(4 * b, 4 * b, 2 * b),
            up(2 * b, 2 * b),
            block(2 * b, 2 * b, b),
            up(b, b),
            block(b, b, b),
            nn.Conv2d(b, 3, 3, padding=1),
        )

    def forward(self, images: Tensor) -> Tensor:
        """Images [B, 3, H, W] -> repaired images [B, 3, H, W]; H and W are multiples of 16."""
        return self.decoder(self.encoder(images))


class Discriminative(nn.Module):
    """A U-Net that sees the repaired image and the original.

    Args:
        width: channels of the first block.
    """

    def __init__(self, width: int):
        super().__init__()
        b = width
        sizes = [b, 2 * b, 4 * b, 8 * b, 8 * b, 8 * b]
        self.down = nn.ModuleList(
            block(before, after, after) for before, after in zip([6, *sizes], sizes, strict=False)
        )
        self.up = nn.ModuleList(
            up(before, after)
            for before, after in ((8 * b, 8 * b), (8 * b, 4 * b), (4 * b, 2 * b), (2 * b, b), (b, b))
        )
        self.joined = nn.ModuleList(
            block(before, after, after)
            for before, after in (
                (8 * b + 8 * b, 8 * b),
                (4 * b + 8 * b, 4 * b),
                (2 * b + 4 * b, 2 * b),
                (b + 2 * b, b),
                (b + b, b),
            )
        )
        self.logits = nn.Conv2d(b, 2, 3, padding=1)

    def forward(self, both: Tensor) -> Tensor:
        """Repaired and original images [B, 6, H, W] -> logits [B, 2, H, W]; H and W are multiples of 32."""
        levels: list[Tensor] = []
        for index, level in enumerate(self.down):
            levels.append(level(F.max_pool2d(levels[-1], 2) if index else both))
        x = levels.pop()
        for raised, joined in zip(self.up, self.joined, strict=True):
            x = joined(torch.cat([raised(x), levels.pop()], 1))
        return self.logits(x)


def _initialise(module: nn.Module) -> None:
    if isinstance(module, nn.Conv2d):
        nn.init.normal_(module.weight, 0.0, 0.02)
    elif isinstance(module, nn.BatchNorm2d):
        nn.init.normal_(module.weight, 1.0, 0.02)
