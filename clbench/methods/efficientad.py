"""EfficientAD: a student and an autoencoder imitate a distilled teacher (Batzner et al., 2024)."""

import itertools
from typing import Annotated

import torch
from annotated_types import MultipleOf
from pydantic import BeforeValidator, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt
from torch import Tensor, nn
from torch.nn import functional as F

from clbench.backbones import (
    FeaturePyramid,
    Normalisation,
    existing_weights,
    read_weights,
    unit,
    weights_path,
)
from clbench.data.pictures import Folder, Pictures
from clbench.errors import UserError
from clbench.feature_store import FeatureStore
from clbench.methods.base import Detector, Prediction, Share
from clbench.randomness import seed_for

_HARD = 0.999  # quantile of the squared differences from which on they count
_LOW, _HIGH = 0.9, 0.995  # quantiles of normal maps that become 0 and _UNIT
_UNIT = 0.1
_AUTOENCODER_SIDE = 256  # pixels: the autoencoder sees images at this size, whatever theirs
_GREY = 0.3  # share of penalty images shown in grey
_JITTER = 0.2  # of brightness, contrast or saturation


def _teacher(name: str | None) -> str:
    if name is None:
        raise ValueError(
            "it has no value: give a file of distilled weights (clbench distil makes one, published ones "
            "are read too), or random"
        )
    return name if name == "random" else existing_weights(name)


class EfficientAD(Detector):
    """Local maps from a student, global ones from an autoencoder, averaged (supplement, section 1.5).

    Args:
        teacher: file of the distilled network's weights (`clbench distil` makes one;
            published ones of the same width are read too), or `random` for weights drawn by seed.
        width: channels of the networks' first layer: 256 is the paper's medium size.
        penalty_images: folder of out-of-distribution images that the student must not imitate the teacher on,
            ImageNet for the real thing; None for procedural ones.
        penalty_count: how many of them, at most.
        epochs, batch_size, learning_rate, weight_decay: of Adam; the rate falls to a tenth after 95 % of the
            steps.
        held_out, patience: of early stopping, see `Detector`; the maps' quantiles are of the held-out images.
        feature_memory_mb, feature_disk_mb: how much of the teacher's features may be kept.
        seed: of first weights and the choice of penalty images.
        cache: where decoded pictures are kept.

    Buffers:
        channel_mean, channel_deviation: of the teacher's features on normal images, [1, C, 1, 1].
        quantiles: of the local and the global map on normal images, [2, 2].
    """

    channel_mean: Tensor
    channel_deviation: Tensor
    quantiles: Tensor

    def __init__(
        self,
        *,
        teacher: Annotated[str, BeforeValidator(_teacher)],
        width: Annotated[PositiveInt, MultipleOf(8)] = 256,
        penalty_images: Folder | None = None,
        penalty_count: PositiveInt = 1000,
        epochs: PositiveInt = 70,
        batch_size: PositiveInt = 1,
        learning_rate: PositiveFloat = 1e-4,
        weight_decay: NonNegativeFloat = 1e-5,
        held_out: Share = 0.1,
        patience: PositiveInt | None = 10,
        feature_memory_mb: NonNegativeInt = 2000,
        feature_disk_mb: NonNegativeInt = 4000,
        seed: int = 0,
        cache: str,
    ):
        super().__init__()
        self.pictures = Pictures(penalty_images, penalty_count, "method.penalty_images", seed, cache)
        self.epochs, self.batch_size = epochs, batch_size
        self.learning_rate, self.weight_decay = learning_rate, weight_decay
        self.held_out, self.patience = held_out, patience
        self.channels = channels = 3 * width // 2
        torch.manual_seed(seed_for(seed, "efficientad teacher"))
        network = patch_description_network(width, channels)
        if teacher != "random":
            load_teacher(network, teacher, width)
        self.teacher = FeaturePyramid(
            Single(network),
            name="method=efficientad",
            channels=[channels],
            whole_parameters=sum(parameter.numel() for parameter in network.parameters()),
            store=FeatureStore(feature_memory_mb * 10**6, feature_disk_mb * 10**6),
            batch_size=batch_size,
        )
        self.normalisation = Normalisation()
        torch.manual_seed(seed_for(seed, "efficientad weights"))
        self.student = patch_description_network(width, 2 * channels)
        self.autoencoder = Autoencoder(width, channels)
        self.register_buffer("channel_mean", torch.zeros(1, channels, 1, 1))
        self.register_buffer("channel_deviation", torch.ones(1, channels, 1, 1))
        self.register_buffer("quantiles", torch.tensor([[0.0, _UNIT]] * 2))

    def prepare(self, images: Tensor) -> None:
        height, width = images.shape[-2:]
        # The middle of pictures of twice the size (Batzner et al., 2024, appendix A).
        larger = self.pictures.load(2 * height, 2 * width)
        middle = larger[..., height // 2 : height // 2 + height, width // 2 : width // 2 + width]
        self._penalties = middle.to(images.device, copy=True)

    def start_task(self, task: int, images: Tensor, stored: Tensor) -> None:
        """The teacher's mean and deviation of each channel over all positions of all normal images."""
        count, mean = 0, torch.zeros_like(self.channel_mean).double()
        scatter = torch.zeros_like(mean)
        everything = torch.cat([images, stored])
        for part in everything.split(self.batch_size):
            (features,) = self.teacher(part)
            positions = features.transpose(0, 1).flatten(1).double()
            size = positions.shape[1]
            own = positions.mean(1).view_as(mean)
            squares = (positions - own.view(-1, 1)).square().sum(1).view_as(mean)
            # Chan et al., 1979: means and scatters of two sets together
            scatter = scatter + squares + (own - mean).square() * (count * size / (count + size))
            mean = mean + (own - mean) * (size / (count + size))
            count += size
            self.progress("teacher statistics", count // size * len(part), len(everything))
        self.channel_mean = mean.float()
        self.channel_deviation = (scatter / count).sqrt().clamp_min(1e-6).float()

    def optimizer(self) -> torch.optim.Optimizer:
        parameters = [*self.student.parameters(), *self.autoencoder.parameters()]
        return torch.optim.Adam(parameters, self.learning_rate, weight_decay=self.weight_decay, fused=True)

    def learning_rate_factor(self, done: float) -> float:
        return 1.0 if done < 0.95 else 0.1

    def training_step(self, images: Tensor) -> Tensor:
        """Images [B, 3, H, W] -> L_ST (hard features and penalty) + L_AE + L_STAE."""
        batch = len(images)
        jittered = jitter(unit(images))
        penalty = unit(self._penalties[torch.randint(len(self._penalties), (1,), device=images.device)])
        if float(torch.rand(())) < _GREY:
            penalty = penalty.mean(1, keepdim=True).expand_as(penalty)
        # One pass of the student over all that it is to see.
        imitated = self.student(self.normalisation(torch.cat([unit(images), jittered, penalty]))).float()
        normal, changed, foreign = imitated.split([batch, batch, 1])
        taught, repeated = normal[:, : self.channels], changed[:, self.channels :]
        hard = hard_features((self._taught(images) - taught).square())
        targets = self._normalised(self.teacher.compute(jittered)[0])
        return (
            hard
            + foreign[:, : self.channels].square().mean()
            + self._autoencoder_loss(jittered, targets, repeated)
        )

    def validation_loss(self, images: Tensor) -> Tensor:
        """The same without jitter and penalty, which would only add noise."""
        taught, repeated = self.student(self.normalisation(images)).chunk(2, 1)
        targets = self._taught(images)
        return hard_features((targets - taught).square()) + self._autoencoder_loss(images, targets, repeated)

    def _autoencoder_loss(self, images: Tensor, targets: Tensor, repeated: Tensor) -> Tensor:
        """L_AE + L_STAE: the autoencoder is to give the teacher's features, the student the autoencoder's."""
        coded = self.autoencoder(self.normalisation(images), targets.shape[-2:]).float()
        return F.mse_loss(coded, targets) + F.mse_loss(repeated, coded)

    def finish_task(self, images: Tensor) -> None:
        """Quantiles of both maps over normal images: what their scales are made equal by."""
        maps = [torch.stack(self.differences(part)) for part in images.split(self.batch_size)]
        both = torch.cat([part.flatten(1) for part in maps], 1)
        self.quantiles = torch.stack([quantile(both, _LOW), quantile(both, _HIGH)], 1)

    def forward(self, images: Tensor) -> Prediction:
        """The average of both maps in units of their quantiles: map [B, H, W], score [B] its maximum."""
        height, width = images.shape[-2:]
        levels = []
        for level, (low, high) in zip(self.differences(images), self.quantiles, strict=True):
            # Its unpadded convolutions leave out a border, of about four positions a side at 256 pixels: no
            # difference is known there, so it is to rank below what is normal, and not at the quantile.
            scaled = _UNIT * (F.pad(level, (4, 4, 4, 4)) - low) / (high - low).clamp_min(1e-12)
            levels.append(F.interpolate(scaled[:, None], (height, width), mode="bilinear")[:, 0])
        maps = torch.stack(levels).mean(0)
        return Prediction(maps, maps.amax((1, 2)))

    def differences(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Mean squared differences over channels [B, h, w]: teacher and student, autoencoder and student."""
        taught, repeated = self.student(self.normalisation(images)).chunk(2, 1)
        targets = self._taught(images)
        coded = self.autoencoder(self.normalisation(images), targets.shape[-2:])
        return (targets - taught).square().mean(1), (coded - repeated).square().mean(1)

    def _taught(self, images: Tensor) -> Tensor:
        return self._normalised(self.teacher(images)[0])

    def _normalised(self, features: Tensor) -> Tensor:
        return (features - self.channel_mean) / self.channel_deviation


def hard_features(squares: Tensor) -> Tensor:
    """The mean of the squared differences that reach their own 0.999 quantile."""
    flat = squares.flatten()
    count = max(1, len(flat) - 1 - int(_HARD * (len(flat) - 1)))
    return flat.topk(count, sorted=False).values.mean()


def quantile(values: Tensor, share: float) -> Tensor:
    """Of each row [K, N], interpolated; torch.quantile refuses more than 16 million values."""
    ranks = values.sort(1).values
    place = share * (values.shape[1] - 1)
    below = int(place)
    above = min(below + 1, values.shape[1] - 1)
    return torch.lerp(ranks[:, below], ranks[:, above], place - below)


def jitter(images: Tensor) -> Tensor:
    """Images [B, 3, H, W] in [0, 1], each with its brightness, contrast or saturation changed by up to 20 %."""
    batch, device = len(images), images.device
    factor = 1 + _JITTER * (2 * torch.rand(batch, 1, 1, 1, device=device) - 1)
    kind = torch.randint(3, (batch, 1, 1, 1), device=device)
    grey = (images * images.new_tensor([0.299, 0.587, 0.114]).view(3, 1, 1)).sum(1, keepdim=True)
    towards = torch.where(kind == 0, torch.zeros_like(grey), torch.where(kind == 1, _mean(grey), grey))
    return torch.lerp(towards.expand_as(images), images, factor.expand_as(images)).clamp(0, 1)


def _mean(grey: Tensor) -> Tensor:
    return grey.mean((2, 3), keepdim=True).expand_as(grey)


def patch_description_network(width: int, channels: int, padding: bool = False) -> nn.Sequential:
    """Images [B, 3, H, W] -> descriptions [B, C, h, w] of 33 x 33 pixels each, at stride 4."""
    pad = int(padding)
    return nn.Sequential(
        nn.Conv2d(3, width, 4, padding=3 * pad),
        nn.ReLU(inplace=True),
        nn.AvgPool2d(2, padding=pad),
        nn.Conv2d(width, 2 * width, 4, padding=3 * pad),
        nn.ReLU(inplace=True),
        nn.AvgPool2d(2, padding=pad),
        nn.Conv2d(2 * width, 2 * width, 1),
        nn.ReLU(inplace=True),
        nn.Conv2d(2 * width, 2 * width, 3, padding=pad),
        nn.ReLU(inplace=True),
        nn.Conv2d(2 * width, channels, 4),
        nn.ReLU(inplace=True),
        nn.Conv2d(channels, channels, 1),
    )


def load_teacher(network: nn.Module, file: str, width: int) -> None:
    """Read a teacher's weights, whatever its layers are called, by their order.

    Raises:
        UserError: the file cannot be read, is of another size or architecture, or holds what are no numbers.
    """
    state = read_weights(weights_path(file), "method.teacher")
    wanted = network.state_dict()
    given = sorted(state.items(), key=lambda item: _layer(item[0]))
    if len(given) != len(wanted):
        raise UserError(
            f"method.teacher={file} does not fit: it has {len(given)} tensors, and the network of medium size has "
            f"{len(wanted)}, a weight and a bias of each of its six layers; give a teacher of that size"
        )
    for (name, tensor), expected in zip(given, wanted.values(), strict=True):
        if tensor.shape != expected.shape:
            raise UserError(
                f"method.teacher={file} does not fit method.width={width}: its {name} is of shape "
                f"{list(tensor.shape)}, not {list(expected.shape)}; give a teacher of that width, or set method.width "
                "to its own, the channels of its first layer"
            )
        if not bool(tensor.isfinite().all()):
            raise UserError(
                f"method.teacher={file} holds values that are no numbers, in {name}: distil it again"
            )
    network.load_state_dict({name: tensor for name, (_, tensor) in zip(wanted, given, strict=True)})


def _layer(name: str) -> tuple[int, int]:
    """Sorts `0.weight`, `0.bias`, `3.weight`, ... as well as `conv1.weight`, `conv1.bias`, ..."""
    digits = "".join(character for character in name.rpartition(".")[0] if character.isdigit())
    return int(digits or 0), int(name.endswith("bias"))


class Single(nn.Module):
    """A network of one level."""

    def __init__(self, network: nn.Module):
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> list[Tensor]:
        """Images [B, 3, H, W] -> one level."""
        return [self.network(images)]


class Autoencoder(nn.Module):
    """The whole image through a narrow middle, to features on the student's grid."""

    def __init__(self, width: int, channels: int):
        super().__init__()
        narrow, wide = width // 8, width // 4
        sizes = [3, narrow, narrow, wide, wide, wide]
        layers: list[nn.Module] = []
        for before, after in itertools.pairwise(sizes):
            layers += [nn.Conv2d(before, after, 4, 2, 1), nn.ReLU(inplace=True)]
        self.encoder = nn.Sequential(*layers, nn.Conv2d(wide, wide, 8))
        layers = []
        for side in (3, 8, 15, 32, 63, 127):
            layers += [
                nn.Upsample((side, side), mode="bilinear"),
                nn.Conv2d(wide, wide, 4, padding=2),
                nn.ReLU(inplace=True),
                nn.Dropout(0.2),
            ]
        self.decoder = nn.Sequential(*layers)
        self.last = nn.Sequential(
            nn.Conv2d(wide, wide, 3, padding=1),
            nn.ReLU(inplace=True),
            nn.Conv2d(wide, channels, 3, padding=1),
        )

    def forward(self, images: Tensor, grid: torch.Size) -> Tensor:
        """Normalised images [B, 3, H, W] -> features [B, C, h, w] on the grid (h, w)."""
        side = (_AUTOENCODER_SIDE, _AUTOENCODER_SIDE)
        if images.shape[-2:] != side:
            images = F.interpolate(images, side, mode="bilinear", antialias=True)
        decoded = self.decoder(self.encoder(images))
        return self.last(F.interpolate(decoded, grid, mode="bilinear"))
