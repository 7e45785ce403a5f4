"""Dinomaly: transformer blocks that cannot quite copy reconstruct a foundation network's tokens (Guo et al., 2025)."""

import math
from collections.abc import Mapping, Sequence
from typing import Annotated

import torch
from annotated_types import Ge, Gt, Le, Lt, MinLen
from pydantic import AfterValidator, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt
from torch import Tensor, nn
from torch.nn import functional as F

from clbench.backbones import Backbone
from clbench.data.images import Images
from clbench.errors import UserError
from clbench.methods.base import Detector, Prediction, Share
from clbench.methods.maps import Sigma, resampling, to_image_size
from clbench.methods.stable_adamw import StableAdamW
from clbench.methods.tables import table
from clbench.precision import single_precision
from clbench.randomness import seed_for

_EASY = 0.1  # what gradients at points that are reconstructed well are multiplied by
_MOST_EASY = 0.9  # share of points that count as such at the end
_LOWEST = 0.1  # share of the learning rate that the cosine ends at
_OF_12 = [[2, 3, 4, 5], [6, 7, 8, 9]]  # the original's groups for networks of 12 blocks
_TAPS = 5  # side of the map's smoothing, pixels of the judged map


def _disjoint(groups: list[list[int]]) -> list[list[int]]:
    blocks = [block for group in groups for block in group]
    if not blocks or not all(groups) or len(set(blocks)) < len(blocks) or min(blocks) < 0:
        raise ValueError("give lists of blocks, each block once, e.g. [[2,3,4,5],[6,7,8,9]]")
    return groups


Groups = Annotated[list[list[int]], MinLen(1), AfterValidator(_disjoint)]


class Dinomaly(Detector):
    """Anomaly where a decoder fails to reconstruct groups of a frozen transformer's blocks (sections 3.1 to 3.5).

    It is as the authors' code where that and the paper differ. Beside it: the last batch of an epoch may be smaller, and
    the map that is judged is brought back to the image's size, where theirs is compared with masks of its own.

    Args:
        backbone: the encoder; DINOv2 with registers of size B in the original, S and L as variants.
        groups: blocks whose raw tokens are averaged and reconstructed together; the decoder has a block for each of them,
            and the first group is compared with the decoder's last blocks. Those of a network of 24 blocks, such as
            DINOv2 of size L, are [[4,6,8,10],[12,14,16,18]] in the original: others are refused there.
        dropout: share of numbers that the bottleneck drops, in three places; 0.4 for Real-IAD.
        recentred: whether each block's class token is taken off its patches, which alone go on, as in Dinomaly2 (Guo et
            al., 2025b), of which nothing else is known well enough.
        steps: optimizer steps of a task; 50,000 for Real-IAD, 5,000 for one category alone.
        batch_size, learning_rate, weight_decay, gradient_clip: settings of the training with StableAdamW.
        warm_up: steps in which the learning rate rises from 0; then it falls to a tenth along half a cosine.
        mining_steps: steps over which the share of points with damped gradients rises to 0.9; 500 in the paper for one
            category alone, where the code has 1,000 too.
        mining_restart: whether that begins anew with each task; if not, it goes on over the tasks.
        map_side: pixels of the map that is smoothed and scored.
        sigma: standard deviation of its smoothing by 5 x 5 weights, in its pixels; beyond the border there is 0. At 0 it
            is not smoothed.
        top: share of the map's largest values whose mean is the score.
        held_out: share of the normal images that training does not see; thresholds are set on them.
        seed: of the first weights.

    Buffers:
        steps_before: steps of earlier tasks, int64, where the share of damped points goes on over the tasks.
    """

    needs_only_features = True
    steps_before: Tensor

    def __init__(
        self,
        backbone: Backbone,
        *,
        groups: Groups,
        dropout: Annotated[float, Ge(0), Lt(1)] = 0.2,
        recentred: bool = False,
        steps: PositiveInt = 10_000,
        batch_size: PositiveInt = 16,
        learning_rate: PositiveFloat = 2e-3,
        weight_decay: NonNegativeFloat = 1e-4,
        gradient_clip: PositiveFloat | None = 0.1,
        warm_up: NonNegativeInt = 100,
        mining_steps: PositiveInt = 1000,
        mining_restart: bool = True,
        map_side: PositiveInt = 256,
        sigma: Sigma = 4.0,
        top: Annotated[float, Gt(0), Le(1)] = 0.01,
        held_out: Share = 0.0,
        seed: int = 0,
    ):
        super().__init__()
        self.groups = groups
        self.encoder = backbone.blocks(groups, f"method.groups={groups}")
        width, heads = self.encoder.channels[0], _heads(backbone, self.encoder.network)
        if groups == _OF_12 and self.encoder.network.depth == 24:
            raise UserError(
                f"method.groups={_OF_12} is of networks of 12 blocks, and backbone.name={backbone.name} has 24: give the "
                "original's, method.groups=[[4,6,8,10],[12,14,16,18]]"
            )
        self.prefix: int = self.encoder.network.before  # type: ignore[assignment]
        if recentred and not self.prefix:
            raise UserError(
                f"method.recentred=true takes the class token, which backbone.name={backbone.name} has not: set it to "
                "false, or take backbone=dinov2_base_registers"
            )
        torch.manual_seed(seed_for(seed, "dinomaly weights"))
        self.bottleneck = nn.Sequential(nn.Dropout(dropout), *perceptron(width, dropout))
        self.decoder = nn.ModuleList(DecoderBlock(width, heads) for group in groups for _ in group)
        for module in (*self.bottleneck.modules(), *self.decoder.modules()):
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.01, a=-0.03, b=0.03)
                nn.init.zeros_(module.bias)
        self.recentred, self.batch_size = recentred, batch_size
        self.step_budget = self.steps = steps
        self.learning_rate, self.weight_decay, self.gradient_clip = learning_rate, weight_decay, gradient_clip
        self.warm_up, self.mining_steps = warm_up, mining_steps
        self.map_side, self.sigma, self.top = map_side, sigma, top
        self.held_out = held_out
        self._before = 0  # what `steps_before` holds, read when no step would wait for it
        if not mining_restart:
            self.register_buffer("steps_before", torch.zeros((), dtype=torch.int64))

    def prepare(self, images: Images) -> None:
        self._read_steps()

    def restore(self, state: Mapping[str, Tensor]) -> None:
        super().restore(state)
        self._read_steps()

    def _read_steps(self) -> None:
        if "steps_before" in self._buffers:
            self._before = int(self.steps_before)

    def finish_task(self, images: Images) -> None:
        if "steps_before" in self._buffers:
            self.steps_before = self.steps_before + self.steps

    def optimizer(self) -> torch.optim.Optimizer:
        trained = [*self.bottleneck.parameters(), *self.decoder.parameters()]
        return StableAdamW(trained, self.learning_rate, epsilon=1e-10, weight_decay=self.weight_decay)

    def _steps_done(self, done: float) -> int:
        """The steps of the task that are done, of the share that is."""
        return round(done * self.steps)

    def learning_rate_factor(self, done: float) -> float:
        step = self._steps_done(done)
        if step < self.warm_up:
            return step / max(self.warm_up - 1, 1)
        along = (step - self.warm_up) / max(self.steps - self.warm_up, 1)
        return _LOWEST + (1 - _LOWEST) * (1 + math.cos(math.pi * along)) / 2

    def easy_share(self) -> float:
        """The share p of points whose gradients are damped in this step."""
        step = self._before + self._steps_done(self.done)
        return min(_MOST_EASY * step / self.mining_steps, _MOST_EASY)

    def training_step(self, images: Tensor) -> Tensor:
        """Images [B, 3, H, W] -> the loss, a scalar: the mean over groups of `loose_distance`."""
        easy = self.easy_share()
        groups = self.groups_of(images)
        self.note(self._placed(groups[1], images))
        pairs = zip(*groups, strict=True)
        return torch.stack([loose_distance(wanted, learned, easy) for wanted, learned in pairs]).mean()

    def outputs(self, images: Tensor) -> list[Tensor]:
        """Images [B, 3, H, W] -> the reconstruction of each group's patches, float32 [B, d, h, w]."""
        return self._placed(self.groups_of(images)[1], images)

    def distance(self, outputs: Sequence[Tensor], others: Sequence[Tensor]) -> Tensor:
        """Maps [B, d, h, w] -> a scalar: the cosine distance of an image's numbers, its mean over images and groups.

        It is that of the loss, but for the gradients, which are damped at no point.
        """
        pairs = zip(outputs, others, strict=True)
        cosines = [
            F.cosine_similarity(own.float().flatten(1), other.float().flatten(1)) for own, other in pairs
        ]
        return (1 - torch.stack(cosines)).mean()

    def _placed(self, groups: Sequence[Tensor], images: Tensor) -> list[Tensor]:
        """Patches of images, [B, h * w, d] each -> [B, d, h, w]."""
        grid = self.encoder.network.grid(images.shape[-2:])  # type: ignore[operator]
        return [patches.mT.unflatten(2, grid) for patches in groups]

    def forward(self, images: Tensor) -> Prediction:
        """Images [B, 3, H, W] -> maps [B, H, W], and scores [B], the mean of the largest values of the map that is scored.

        At each patch: the cosine distance, averaged over groups, and brought to the image's size with the corners' patches
        in its corners. Then the map is brought to `map_side`, smoothed and scored.
        """
        height, width = images.shape[-2:]
        levels = zip(*self.groups_of(images), strict=True)
        distances = torch.stack([1 - F.cosine_similarity(*pair, dim=2) for pair in levels]).mean(0)
        grid = distances.unflatten(1, self.encoder.network.grid((height, width)))  # type: ignore[operator]
        with single_precision(images.device):
            rows, columns = (
                table(_smoothed, source, size, self.map_side, self.sigma, device=grid.device)
                for source, size in zip(grid.shape[1:], (height, width), strict=True)
            )
            scored = rows @ grid @ columns.T
        maps = to_image_size(scored, (height, width), 0.0)
        largest = scored.flatten(1).topk(max(int(self.top * self.map_side**2), 1), dim=1).values
        return Prediction(maps, largest.mean(1))

    def groups_of(self, images: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """Images [B, 3, H, W] -> for each group the encoder's patches, and the decoder's, float32 [B, h * w, d]."""
        encoded = self.encoder(images)
        before = self.prefix
        if self.recentred:
            encoded, before = [tokens[:, self.prefix :] - tokens[:, :1] for tokens in encoded], 0
        sizes = [len(group) for group in self.groups]
        mean = sum(size * tokens for size, tokens in zip(sizes, encoded, strict=True)) / sum(sizes)
        tokens, decoded = self.bottleneck(mean).float(), []  # what blocks add to, in single precision
        for block in self.decoder:
            tokens = block(tokens)
            decoded.append(tokens)
        decoded.reverse()  # what is decoded first stands for the encoder's last blocks
        learned = []
        for size in sizes:
            own, decoded = decoded[:size], decoded[size:]
            learned.append(torch.stack(own).mean(0)[:, before:])
        return [tokens[:, before:] for tokens in encoded], learned


def loose_distance(wanted: Tensor, learned: Tensor, easy: float) -> Tensor:
    """The mean over images of the cosine distance between all of their numbers, a scalar (section 3.4).

    Its gradients are damped at points that are reconstructed well: at the share `easy` of the smallest cosine distances
    in the batch they are multiplied by 0.1. Its value does not depend on that.

    Args:
        wanted, learned: float32 [B, N, d], points of images.
    """
    with torch.no_grad():
        distances = 1 - F.cosine_similarity(wanted, learned, dim=2)
        count = max(int(distances.numel() * (1 - easy)), 1)
        least = distances.flatten().topk(count).values[-1]
        damping = torch.where(distances < least, _EASY, 1.0)[..., None]
    held = learned.detach()
    damped = held + damping * (learned - held)
    return (1 - F.cosine_similarity(wanted.flatten(1), damped.flatten(1), dim=1)).mean()


class DecoderBlock(nn.Module):
    """A transformer's block, with normalisation before both parts, and linear attention.

    Args:
        width: d, of a token.
        heads: of attention.
    """

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.first_norm = nn.LayerNorm(width, eps=1e-8)
        self.attention = LinearAttention(width, heads)
        self.second_norm = nn.LayerNorm(width, eps=1e-8)
        self.perceptron = nn.Sequential(*perceptron(width, 0.0))

    def forward(self, tokens: Tensor) -> Tensor:
        """Tokens [B, N, d] -> [B, N, d]."""
        tokens = tokens + self.attention(self.first_norm(tokens))
        return tokens + self.perceptron(self.second_norm(tokens))


def perceptron(width: int, dropout: float) -> list[nn.Module]:
    """The parts of a network that works on each token alone: [.., d] -> [.., d], 4 d in between."""
    drop = [nn.Dropout(dropout)] if dropout else []
    return [nn.Linear(width, 4 * width), nn.GELU(), *drop, nn.Linear(4 * width, width), *drop]


class LinearAttention(nn.Module):
    """Attention without softmax, which cannot keep to single tokens, and so does not copy (section 3.3).

    With u(x) = ELU(x) + 1 for queries and keys, of each head: the mean of the values, weighted by u(query) . u(key). It is
    computed in single precision: sums over all tokens overflow half precision, and small weights vanish in it.

    Args:
        width: d, of a token.
        heads: which share it.
    """

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.inward = nn.Linear(width, 3 * width)
        self.outward = nn.Linear(width, width)

    def forward(self, tokens: Tensor) -> Tensor:
        """Tokens [B, N, d] -> [B, N, d]."""
        parts = self.inward(tokens).float().unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        with single_precision(tokens.device):
            queries, keys, values = (
                F.elu(parts[0]) + 1,
                F.elu(parts[1]) + 1,
                parts[2],
            )  # [B, heads, N, d / heads]
            weighted = queries @ (keys.mT @ values)
            total = queries @ keys.sum(2)[..., None]
            mixed = weighted / total
        return self.outward(mixed.transpose(1, 2).flatten(2))


def _heads(backbone: Backbone, network: nn.Module) -> int:
    """The number of heads of a transformer's attention.

    Raises:
        UserError: it has none.
    """
    blocks = getattr(getattr(network, "model", None), "blocks", None) or [None]
    heads = getattr(getattr(blocks[0], "attn", None), "num_heads", None)
    if heads is None:
        raise UserError(
            f"backbone.name={backbone.name} has no attention whose heads the decoder could have: take "
            "backbone=dinov2_base_registers or another of conf/backbone that is a vision transformer"
        )
    return heads


def _smoothed(source: int, size: int, side: int, sigma: float) -> Tensor:
    """The matrix [side, source] that brings a side of a grid to an image's, then to the scored map's, and smooths that."""
    resized = resampling(size, side) @ resampling(source, size, align_corners=True)
    if sigma == 0:
        return resized
    weights = torch.exp(-((torch.arange(_TAPS) - _TAPS // 2) ** 2) / (2 * sigma**2))
    blur = F.conv1d(torch.eye(side)[:, None], (weights / weights.sum())[None, None], padding=_TAPS // 2)
    return blur[:, 0] @ resized
