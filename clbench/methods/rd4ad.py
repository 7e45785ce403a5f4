"""RD4AD: a decoder reconstructs a frozen encoder's features from one small embedding (Deng & Li, 2022)."""

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import torch
from pydantic import PositiveFloat, PositiveInt
from timm.models.resnet import BasicBlock, Bottleneck
from torch import Tensor, nn

from clbench.backbones import Backbone, FeaturePyramid
from clbench.errors import UserError
from clbench.methods.base import Detector, Prediction, Share
from clbench.methods.maps import Sigma, to_image_size
from clbench.randomness import seed_for

_HALVINGS = 5  # from the image to the embedding
_SMALLEST_NORM = 1e-8  # of features, where cosines are computed


class RD4AD(Detector):
    """Anomaly where the decoder fails to reproduce the encoder's features (Deng & Li, 2022, section 3).

    The embedding of an image is small, so that what only anomalies have should not pass. The layer that the
    published code registers after the embedding and never calls is left out.

    Args:
        backbone: the encoder, a ResNet of basic or of bottleneck blocks, of which the first three levels run.
        loss: `flattened` compares a whole level of an image as one vector, as the published code does; `positions`
            takes the mean over positions, as the paper's equations (1) and (2) do.
        embedding_width: channels inside the embedding's bottleneck blocks; null for those of the backbone's own last
            level, which is what the published code has. A backbone of basic blocks has no such width.
        sigma: standard deviation of the map's Gaussian smoothing, in pixels.
        epochs, batch_size, learning_rate: settings of the training with Adam.
        beta2: decay of Adam's mean of squared gradients; that of gradients is 0.5.
        held_out: share of the normal images that training does not see; thresholds are set on them.
        seed: seed of the first weights.
    """

    needs_only_features = True

    def __init__(
        self,
        backbone: Backbone,
        *,
        loss: Literal["flattened", "positions"] = "flattened",
        embedding_width: PositiveInt | None = None,
        sigma: Sigma = 4.0,
        epochs: PositiveInt = 200,
        batch_size: PositiveInt = 16,
        learning_rate: PositiveFloat = 0.005,
        beta2: Share = 0.999,
        held_out: Share = 0.0,
        seed: int = 0,
    ):
        super().__init__()
        self.encoder = backbone.pyramid([1, 2, 3])
        levels = mirrored(self.encoder)
        last = levels[-1]
        if last.width is None and embedding_width is not None:
            raise UserError(
                f"method.embedding_width={embedding_width} is the width of bottleneck blocks, and "
                f"{self.encoder.name} has basic ones, which have none: leave it null"
            )
        width = None if last.width is None else embedding_width or 2 * last.width
        torch.manual_seed(seed_for(seed, "rd4ad weights"))
        self.embedding = Embedding([level.channels for level in levels], width, levels[0].blocks)
        self.decoder = Decoder(levels)
        self.apply(_initialise)
        self.dims = (1, 2, 3) if loss == "flattened" else (1,)
        self.sigma, self.beta2 = sigma, beta2
        self.epochs, self.batch_size, self.learning_rate = epochs, batch_size, learning_rate
        self.held_out = held_out

    def check(self, images: Tensor) -> None:
        height, width = images.shape[-2:]
        step = 2**_HALVINGS
        if height % step or width % step:
            near = max(step, round(min(height, width) / step) * step)
            raise UserError(
                f"method=rd4ad halves images {_HALVINGS} times, and takes none of {width}x{height}: give a "
                f"{self.size_setting} that is a multiple of {step}, as {near}"
            )
        super().check(images)

    def optimizer(self) -> torch.optim.Optimizer:
        parameters = [*self.embedding.parameters(), *self.decoder.parameters()]
        return torch.optim.Adam(parameters, self.learning_rate, (0.5, self.beta2), fused=True)

    def training_step(self, images: Tensor) -> Tensor:
        """Images [B, 3, H, W] -> the loss, a scalar: the `distance` of the decoder's levels from the encoder's."""
        levels = self.encoder(images)
        made = self.reconstructed(levels)
        self.note(made)
        return self.distance(made, levels)

    def forward(self, images: Tensor) -> Prediction:
        """Images [B, 3, H, W] -> maps [B, H, W], and scores [B], their maxima (section 3.4).

        A map is the sum over levels of the upsampled distances at each position, smoothed.
        """
        levels, size = self.encoder(images), images.shape[-2:]
        raised = [
            to_image_size(distance(seen, made, (1,)), size, self.sigma, align_corners=True)
            for seen, made in zip(levels, self.reconstructed(levels), strict=True)
        ]
        maps = torch.stack(raised).sum(0)
        return Prediction(maps, maps.amax((1, 2)))

    def outputs(self, images: Tensor) -> list[Tensor]:
        """Images [B, 3, H, W] -> the decoder's levels, float32 [B, C_l, h_l, w_l]."""
        return self.reconstructed(self.encoder(images))

    def distance(self, outputs: Sequence[Tensor], others: Sequence[Tensor]) -> Tensor:
        """Levels [B, C_l, h_l, w_l] -> a scalar: each level's mean distance, summed over levels, as in the loss."""
        pairs = zip(outputs, others, strict=True)
        return torch.stack([distance(other, own, self.dims).mean() for own, other in pairs]).sum()

    def reconstructed(self, levels: Sequence[Tensor]) -> list[Tensor]:
        """The encoder's levels [B, C_l, h_l, w_l] -> the decoder's, float32 of the same shapes."""
        return [level.float() for level in self.decoder(self.embedding(levels))]


def distance(seen: Tensor, made: Tensor, dims: tuple[int, ...]) -> Tensor:
    """One minus the cosine of two tensors [B, C, h, w] over some of their dimensions, in single precision."""
    seen, made = seen.float(), made.float()
    norms = torch.linalg.vector_norm(seen, dim=dims) * torch.linalg.vector_norm(made, dim=dims)
    return 1 - (seen * made).sum(dims) / norms.clamp_min(_SMALLEST_NORM)


class Level(NamedTuple):
    """What a ResNet's level is made of.

    Attributes:
        blocks: how many residual blocks it has.
        channels: channels of its output.
        width: channels inside its bottleneck blocks; None for basic blocks, which have no others.
    """

    blocks: int
    channels: int
    width: int | None


def mirrored(encoder: FeaturePyramid) -> list[Level]:
    """The levels of a ResNet that a decoder is to mirror.

    Args:
        encoder: a ResNet's levels 1 to 3.

    Raises:
        UserError: it is no ResNet of basic or bottleneck blocks, whose levels halve height and width.
    """
    network: Any = encoder.network
    levels = [list(getattr(network, f"layer{number}", ())) for number in (1, 2, 3)]
    blocks = [block for level in levels for block in level]
    alike = all(levels) and type(blocks[0]) in (BasicBlock, Bottleneck) and len(set(map(type, blocks))) == 1
    halves = network.feature_info.reduction() == [4, 8, 16]
    if not (alike and halves and all(block.conv2.groups == 1 for block in blocks)):
        raise UserError(
            f"method=rd4ad mirrors a ResNet of basic or bottleneck blocks, and {encoder.name}, with its "
            "backbone.arguments, is none: take backbone=resnet18, wide_resnet50_2_tv or small"
        )
    deep = isinstance(blocks[0], Bottleneck)
    return [
        Level(len(level), channels, level[0].conv2.out_channels if deep else None)
        for level, channels in zip(levels, encoder.channels, strict=True)
    ]


class Embedding(nn.Module):
    """The one-class bottleneck embedding: three levels brought to one grid, fused and halved (section 3.3).

    Args:
        channels: C_l of the levels.
        width: channels inside its residual blocks, where they are bottleneck ones; None for basic ones.
        blocks: number of its residual blocks, as many as the ResNet's last level has: 2 for ResNet-18, else 3, which
            is also what its first level has.
    """

    def __init__(self, channels: Sequence[int], width: int | None, blocks: int):
        super().__init__()
        first, second, third = channels
        self.first = nn.Sequential(*_halved(first, second), *_halved(second, third))
        self.second = nn.Sequential(*_halved(second, third))
        self.fused = stage(blocks, 3 * third, width, 2 * third, 0.5)

    def forward(self, levels: Sequence[Tensor]) -> Tensor:
        """Levels [B, C_l, h_l, w_l] -> the embedding [B, 2 C_3, h_3 / 2, w_3 / 2]."""
        first, second, third = levels
        return self.fused(torch.cat([self.first(first), self.second(second), third], 1))


class Decoder(nn.Module):
    """A ResNet turned around: from the embedding to its levels, the last one first (section 3.2).

    Its stages have the encoder's numbers of blocks in the encoder's own order, so that the most blocks are where the
    grid is finest.
    """

    def __init__(self, levels: Sequence[Level]):
        super().__init__()
        before = [2 * levels[-1].channels, *(level.channels for level in reversed(levels))]
        self.stages = nn.ModuleList(
            stage(same.blocks, channels, level.width, level.channels, 2)
            for same, channels, level in zip(levels, before, reversed(levels), strict=False)
        )

    def forward(self, x: Tensor) -> list[Tensor]:
        """The embedding [B, 2 C_3, h_3 / 2, w_3 / 2] -> levels [B, C_l, h_l, w_l], in the encoder's order."""
        levels = []
        for one in self.stages:
            x = one(x)
            levels.append(x)
        return levels[::-1]


def stage(blocks: int, before: int, width: int | None, after: int, scale: float) -> nn.Sequential:
    """Residual blocks, the first of which changes channels and size."""
    same = [Block(after, width, after, 1) for _ in range(blocks - 1)]
    return nn.Sequential(Block(before, width, after, scale), *same)


class Block(nn.Module):
    """A residual block that halves, keeps or doubles height and width (He et al., 2016, figure 5).

    Args:
        before: channels of what comes in.
        width: channels inside a bottleneck block; None for a basic block.
        after: channels of what goes out.
        scale: of height and width: 0.5, 1 or 2. With 1, `before` and `after` are equal.
    """

    def __init__(self, before: int, width: int | None, after: int, scale: float):
        super().__init__()
        if width is None:
            body = [
                _resized(before, after, scale), nn.BatchNorm2d(after), nn.ReLU(inplace=True),
                nn.Conv2d(after, after, 3, padding=1, bias=False), nn.BatchNorm2d(after),
            ]  # fmt: skip
        else:
            body = [
                nn.Conv2d(before, width, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU(inplace=True),
                _resized(width, width, scale), nn.BatchNorm2d(width), nn.ReLU(inplace=True),
                nn.Conv2d(width, after, 1, bias=False), nn.BatchNorm2d(after),
            ]  # fmt: skip
        self.body = nn.Sequential(*body)
        self.shortcut: nn.Module = nn.Identity()
        if scale != 1:
            resized = (
                nn.Conv2d(before, after, 1, 2, bias=False) if scale < 1 else _resized(before, after, scale)
            )
            self.shortcut = nn.Sequential(resized, nn.BatchNorm2d(after))

    def forward(self, x: Tensor) -> Tensor:
        """x [B, before, h, w] -> [B, after, scale * h, scale * w]."""
        return torch.relu(self.body(x) + self.shortcut(x))


def _resized(before: int, after: int, scale: float) -> nn.Module:
    """A convolution without bias that halves (3x3), keeps (3x3) or doubles (2x2, transposed) height and width."""
    if scale > 1:
        return nn.ConvTranspose2d(before, after, 2, 2, bias=False)
    return nn.Conv2d(before, after, 3, stride=round(1 / scale), padding=1, bias=False)


def _halved(before: int, after: int) -> list[nn.Module]:
    return [_resized(before, after, 0.5), nn.BatchNorm2d(after), nn.ReLU(inplace=True)]


def _initialise(module: nn.Module) -> None:
    """Convolutions as ResNets are; transposed ones stay as PyTorch makes them, as in the published code."""
    if isinstance(module, nn.Conv2d):
        nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
