"""FastFlow: two-dimensional normalising flows over a pyramid's levels (Yu et al., 2021)."""

import math
from collections.abc import Mapping
from typing import Annotated, Any

import torch
from annotated_types import Gt
from pydantic import NonNegativeFloat, PositiveFloat, PositiveInt
from torch import Tensor, nn
from torch.nn import functional as F

from clbench.backbones import Backbone, Layers
from clbench.data.images import Images
from clbench.errors import UserError
from clbench.methods.base import Detector, Prediction, Share
from clbench.randomness import generator, seed_for

_CLAMP = 2.0  # bounds the logarithm of a coupling's scales
_SCALE = 0.1  # multiplies subnetworks' outputs and raw scales: a flow starts and stays close to the identity


class FastFlow(Detector):
    """Anomaly where flows trained on normal features find a low likelihood (supplement, 1.7 and 1.8).

    Args:
        backbone: the network that features come from.
        layers: levels of its pyramid, each with a flow of its own.
        steps: couplings of a flow; 8 for convolutional backbones, 20 for transformers.
        hidden_ratio: hidden channels of a coupling's subnetwork, relative to its input channels.
        trained_normalisation: whether a flow begins with a trained factor and offset for each channel and
            position; the paper's number of parameters does not include them.
        epochs, batch_size, learning_rate, weight_decay: settings of the training with Adam.
        held_out: share of the normal images that training does not see; thresholds are set on them.
        seed: seed of the flows' permutations and first weights.
    """

    needs_only_features = True

    def __init__(
        self,
        backbone: Backbone,
        *,
        layers: Layers,
        steps: PositiveInt = 8,
        hidden_ratio: Annotated[float, Gt(0)] = 1.0,
        trained_normalisation: bool = False,
        epochs: PositiveInt = 15,
        batch_size: PositiveInt = 32,
        learning_rate: PositiveFloat = 1e-3,
        weight_decay: NonNegativeFloat = 1e-5,
        held_out: Share = 0.0,
        seed: int = 0,
    ):
        super().__init__()
        self.pyramid = backbone.pyramid(layers)
        if any(channels % 2 for channels in self.pyramid.channels):
            raise UserError(
                f"method.layers={layers} of backbone.name={backbone.name} have {self.pyramid.channels} channels: "
                "a flow halves them, so choose levels with even numbers"
            )
        torch.manual_seed(seed_for(seed, "fastflow weights"))
        self.flows = nn.ModuleList(
            Flow(
                channels,
                steps,
                hidden_ratio,
                seed_for(seed, "fastflow permutations", level),
                affine=trained_normalisation,
            )
            for level, channels in enumerate(self.pyramid.channels)
        )
        self.epochs, self.batch_size = epochs, batch_size
        self.learning_rate, self.weight_decay = learning_rate, weight_decay
        self.held_out = held_out

    @classmethod
    def why_no_tiles(cls, settings: Mapping[str, Any]) -> str | None:
        trained = settings.get("trained_normalisation", False)
        return (
            "method.trained_normalisation=true has a factor for each place of an image" if trained else None
        )

    def lay_out(self) -> None:
        super().lay_out()
        # Couplings split channels in halves, which are not contiguous in memory where channels come last.
        self.flows.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]

    def prepare(self, images: Images) -> None:
        affines = [module for module in self.flows.modules() if isinstance(module, Affine)]
        if affines:
            for affine, level in zip(affines, self.pyramid(images[:1]), strict=True):
                affine.spread(level.shape[1:])

    def optimizer(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(
            self.flows.parameters(), self.learning_rate, weight_decay=self.weight_decay, fused=True
        )

    def training_step(self, images: Tensor) -> Tensor:
        """Images [B, 3, H, W] -> the loss, a scalar: negative log-likelihood, summed over levels.

        With z = f(x) standard normal, and without the constant: |z|^2 / 2 - log |det dz/dx|.
        """
        transformed = self.transformed(images)
        self.note([z for z, _ in transformed])
        losses = [
            (0.5 * z.square().sum((1, 2, 3)) - log_determinant).mean() for z, log_determinant in transformed
        ]
        return torch.stack(losses).sum()

    def forward(self, images: Tensor) -> Prediction:
        """Images [B, 3, H, W] -> maps [B, H, W], and scores [B], their maxima (supplement, section 1.8.2).

        At each position of a level: minus the likelihood exp(-|z|^2 / 2C); then upsampled, and averaged over
        levels.
        """
        size = images.shape[-2:]
        likelihoods = [
            torch.exp(-0.5 * z.square().mean(1, keepdim=True)) for z, _ in self.transformed(images)
        ]
        maps = torch.cat([F.interpolate(-level, size, mode="bilinear") for level in likelihoods], 1).mean(1)
        return Prediction(maps, maps.amax((1, 2)))

    def outputs(self, images: Tensor) -> list[Tensor]:
        """Images [B, 3, H, W] -> each level's z, float32 [B, C_l, h_l, w_l]."""
        return [z for z, _ in self.transformed(images)]

    def transformed(self, images: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Images [B, 3, H, W] -> for each level, its flow's z [B, C_l, h_l, w_l] and log-determinants [B]."""
        levels = self.pyramid(images)
        if not self.pyramid.normalised:
            levels = [F.layer_norm(level, level.shape[1:]) for level in levels]
        return [flow(level) for level, flow in zip(levels, self.flows, strict=True)]


class Flow(nn.Module):
    """Couplings one after the other; their subnetworks' kernels are 3x3 and 1x1 in turn.

    Args:
        channels: channels C of what goes through, an even number.
        steps: number of couplings.
        hidden_ratio: hidden channels of the subnetworks, relative to their input channels.
        seed: seed of the permutations of channels.
        affine: whether an `Affine` comes before the couplings.
    """

    def __init__(self, channels: int, steps: int, hidden_ratio: float, seed: int, affine: bool = False):
        super().__init__()
        self.affine = Affine() if affine else None
        self.couplings = nn.ModuleList(
            Coupling(channels, 1 if step % 2 else 3, hidden_ratio, seed_for(seed, step))
            for step in range(steps)
        )

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x [B, C, h, w] -> z [B, C, h, w], and the log-determinants of the Jacobian [B]."""
        total: Tensor | float = 0.0
        if self.affine is not None:
            x, total = self.affine(x)
        scales = [coupling.scale for coupling in self.couplings]
        # The part of the log-determinants that does not depend on x is computed for all couplings together.
        constants = x.shape[2] * x.shape[3] * torch.stack(scales).log().sum((1, 2, 3, 4))  # type: ignore[arg-type]
        for coupling, scale, constant in zip(self.couplings, scales, constants.unbind(), strict=True):
            x, log_scale = coupling(x, scale)
            total = total + (log_scale.sum((1, 2, 3)) + constant)
        return x, total  # type: ignore[return-value]

    def inverse(self, z: Tensor) -> Tensor:
        """z [B, C, h, w] -> the x that it came from."""
        for coupling in reversed(self.couplings):
            z = coupling.inverse(z)  # type: ignore[operator]
        return z if self.affine is None else self.affine.inverse(z)


class Affine(nn.Module):
    """A trained factor and offset for each channel and position, at first 1 and 0.

    Both are [1, 1, 1] until `spread` gives them the size of the inputs, [C, h, w].
    """

    def __init__(self) -> None:
        super().__init__()
        self.log_factor = nn.Parameter(torch.zeros(1, 1, 1))
        self.offset = nn.Parameter(torch.zeros(1, 1, 1))

    def spread(self, shape: torch.Size) -> None:
        """Give factor and offset this shape, (C, h, w), unless they have been given one."""
        if self.offset.numel() == 1:
            self.log_factor = nn.Parameter(self.log_factor.new_zeros(shape))
            self.offset = nn.Parameter(self.offset.new_zeros(shape))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x [B, C, h, w] -> y [B, C, h, w], and the log-determinant of the Jacobian, one for all images."""
        return x * self.log_factor.exp() + self.offset, self.log_factor.sum()

    def inverse(self, y: Tensor) -> Tensor:
        """y [B, C, h, w] -> the x that it came from."""
        return (y - self.offset) * (-self.log_factor).exp()


class Coupling(nn.Module):
    """An affine coupling: from half of the channels a subnetwork gives scales and shifts of the other half.

    Args:
        channels: channels C of what goes through, an even number.
        kernel: side of the subnetwork's kernels, 1 or 3.
        hidden_ratio: hidden channels of the subnetwork, relative to its input channels.
        seed: seed of the permutation of channels at the end.
    """

    order: Tensor
    inverse_order: Tensor

    def __init__(self, channels: int, kernel: int, hidden_ratio: float, seed: int):
        super().__init__()
        half = channels // 2
        hidden = max(1, int(half * hidden_ratio))
        self.subnetwork = nn.Sequential(
            nn.Conv2d(half, hidden, kernel, padding="same"),
            nn.ReLU(),
            nn.Conv2d(hidden, channels, kernel, padding="same"),
        )
        self.raw_scale = nn.Parameter(torch.full((1, channels, 1, 1), 2 * math.log(math.expm1(0.5 / _SCALE))))
        self.shift = nn.Parameter(torch.zeros(1, channels, 1, 1))
        order = torch.randperm(channels, generator=generator(seed, "permutation"))
        self.register_buffer("order", order, persistent=False)
        self.register_buffer("inverse_order", order.argsort(), persistent=False)

    def forward(self, x: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
        """x [B, C, h, w] -> y [B, C, h, w], and log-scales of half of the channels [B, C/2, h, w].

        Args:
            scale: its own `scale`. The log-determinant of the Jacobian is the sum of the log-scales, and of the
                logarithms of this at each position.
        """
        seen, other = x.chunk(2, 1)
        log_scale, shift = self._coefficients(seen)
        y = torch.cat([seen, other * log_scale.exp() + shift], 1) * scale + self.shift
        return permuted(y, self.order, self.inverse_order), log_scale

    def inverse(self, y: Tensor) -> Tensor:
        """y [B, C, h, w] -> the x that it came from."""
        seen, other = ((y[:, self.inverse_order] - self.shift) / self.scale).chunk(2, 1)
        log_scale, shift = self._coefficients(seen)
        return torch.cat([seen, (other - shift) * (-log_scale).exp()], 1)

    @property
    def scale(self) -> Tensor:
        """The factor of each channel, float32 [1, C, 1, 1]: positive, and at first 1."""
        return _SCALE * F.softplus(self.raw_scale, beta=0.5)

    def _coefficients(self, seen: Tensor) -> tuple[Tensor, Tensor]:
        """Half of the channels -> bounded log-scales and shifts of the other half; all are [B, C/2, h, w].

        The subnetwork alone may be in half precision: determinants are sums over all positions.
        """
        raw, shift = (_SCALE * self.subnetwork(seen).to(seen.dtype)).chunk(2, 1)
        return _CLAMP * raw.tanh(), shift


def permuted(x: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
    """x [B, C, h, w] with its channels in another order.

    Args:
        order: int64 [C], which channel comes where.
        inverse: int64 [C], the order that undoes it.
    """
    if torch.compiler.is_compiling():
        return x[:, order]
    found: Tensor = _Permuted.apply(x, order, inverse)
    return found


class _Permuted(torch.autograd.Function):
    """`permuted`, whose gradient is looked up too; that of an index is added up, which takes longer."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
        ctx.save_for_backward(inverse)
        return x.index_select(1, order)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        (inverse,) = ctx.saved_tensors
        return gradient.index_select(1, inverse), None, None
