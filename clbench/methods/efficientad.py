"""EfficientAD: a student and an autoencoder imitate a distilled teacher (Batzner et al., 2024)."""

import itertools
from typing import Annotated, Any

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
from clbench.data.images import Images
from clbench.data.pictures import Folder, Pictures
from clbench.errors import UserError, counted
from clbench.feature_store import FeatureStore
from clbench.methods.base import Detector, Prediction, Share
from clbench.methods.tables import table
from clbench.paths import PATH_FOR_USE
from clbench.randomness import seed_for

_HARD = 0.999  # p_hard: the loss counts squared differences from this quantile of them on
_LOW, _HIGH = 0.9, 0.995  # a and b: these quantiles of maps on normal images become 0 and _UNIT
_UNIT = 0.1
_AUTOENCODER_SIDE = 256  # pixels: images of any size are brought to this one for the autoencoder
_GREY_PENALTY = 0.3  # share of penalty images shown in grey
_JITTER = 0.2  # largest relative change of brightness, contrast or saturation


def _teacher(name: Any) -> Any:
    if name is None:
        raise ValueError(
            "it has no value: give a file of distilled weights (clbench distil makes one, published ones "
            "are read too), or random"
        )
    return existing_weights(name) if isinstance(name, str) and name != "random" else name


class EfficientAD(Detector):
    """The average of a student's local and an autoencoder's global anomaly map (supplement, section 1.5).

    Args:
        teacher: file of the distilled network's weights (`clbench distil` makes one;
            published ones of the same width are read too), or `random` for weights drawn by seed.
        width: channels of the networks' first layer: 256 is the paper's medium size.
        penalty_images: folder of out-of-distribution images that the student must not imitate the teacher on,
            ImageNet for the real thing; None for procedural ones.
        penalty_count: number of these images, at most.
        epochs, batch_size, learning_rate, weight_decay: settings of the training with Adam, whose rate falls
            to a tenth after 95 % of the steps.
        held_out, patience: when training stops early, see `Detector`; the maps' quantiles are taken over the
            held-out images.
        feature_memory_mb, feature_disk_mb: how much of the teacher's features may be kept, in memory and then
            in temporary files.
        seed: seed of the first weights and of the choice of penalty images.
        cache: folder that decoded pictures are kept in.

    Buffers:
        channel_mean, channel_deviation: mean and standard deviation of each channel of the teacher's features
            on normal images, float32 [1, C, 1, 1].
        quantiles: float32 [2, 2]: a row for the local and one for the global map, with their 0.9 and 0.995
            quantiles on normal images.
    """

    channel_mean: Tensor
    channel_deviation: Tensor
    quantiles: Tensor

    def __init__(
        self,
        *,
        teacher: Annotated[str, BeforeValidator(_teacher), PATH_FOR_USE],
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
            OneLevel(network),
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

    def check(self, images: Tensor) -> None:
        super().check(images)
        self.pictures.look_up()

    def prepare(self, images: Images) -> None:
        height, width = images.shape[-2:]
        # Penalty images are the middle of pictures of twice the size (Batzner et al., 2024, appendix A).
        larger = self.pictures.load(2 * height, 2 * width)
        middle = larger[..., height // 2 : height // 2 + height, width // 2 : width // 2 + width]
        self._penalties = middle.to(images.device, copy=True)

    def start_task(self, task: int, images: Images, stored: Images) -> None:
        """Set `channel_mean` and `channel_deviation` (Batzner et al., 2024, appendix A).

        They are taken over all positions of all images, the new and the stored ones, uint8 [N, 3, H, W].
        """
        count, mean = 0, torch.zeros_like(self.channel_mean).double()
        scatter = torch.zeros_like(mean)
        everything = Images.concatenate([images, stored])
        for part in everything.split(self.batch_size):
            (features,) = self.teacher(part)
            positions = features.transpose(0, 1).flatten(1).double()
            size = positions.shape[1]
            part_mean = positions.mean(1).view_as(mean)
            squares = (positions - part_mean.view(-1, 1)).square().sum(1).view_as(mean)
            # Chan et al., 1979: mean and scatter of two sets together
            scatter = scatter + squares + (part_mean - mean).square() * (count * size / (count + size))
            mean = mean + (part_mean - mean) * (size / (count + size))
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
        """Images [B, 3, H, W] -> the loss L_ST + L_AE + L_STAE, a scalar.

        L_ST is L_hard plus the penalty for imitating the teacher on one out-of-distribution picture (Batzner
        et al., 2024, sections 3.2 and 3.3).
        """
        batch = len(images)
        plain = unit(images)
        jittered = jitter(plain)
        foreign = unit(self._penalties[torch.randint(len(self._penalties), (1,), device=images.device)])
        if float(torch.rand(())) < _GREY_PENALTY:
            foreign = foreign.mean(1, keepdim=True).expand_as(foreign)
        # The student sees everything in one pass.
        seen = self.student(self.normalisation(torch.cat([plain, jittered, foreign]))).float()
        on_images, on_jittered, on_foreign = seen.split([batch, batch, 1])
        as_teacher, as_autoencoder = on_images[:, : self.channels], on_jittered[:, self.channels :]
        hard = hard_features((self._teacher_features(images) - as_teacher).square())
        penalty = on_foreign[:, : self.channels].square().mean()
        targets = self._normalised(self.teacher.compute(jittered)[0])
        return hard + penalty + self._autoencoder_loss(jittered, targets, as_autoencoder)

    def validation_loss(self, images: Tensor) -> Tensor:
        """Images [B, 3, H, W] -> the training loss without jitter and penalty, which would only add noise."""
        as_teacher, as_autoencoder = self.student(self.normalisation(images)).float().chunk(2, 1)
        targets = self._teacher_features(images)
        hard = hard_features((targets - as_teacher).square())
        return hard + self._autoencoder_loss(images, targets, as_autoencoder)

    def _autoencoder_loss(self, images: Tensor, targets: Tensor, as_autoencoder: Tensor) -> Tensor:
        """L_AE + L_STAE: the autoencoder is to give the teacher's features, the student the autoencoder's.

        Args:
            images: what the autoencoder sees, [B, 3, H, W].
            targets: the teacher's normalised features of these images, [B, C, h, w].
            as_autoencoder: the student's prediction of the autoencoder's output, [B, C, h, w].
        """
        coded = self.autoencoder(self.normalisation(images), targets.shape[-2:]).float()
        return F.mse_loss(coded, targets) + F.mse_loss(as_autoencoder, coded)

    def finish_task(self, images: Images) -> None:
        """Set `quantiles` from normal images [N, 3, H, W]: they bring both maps to one scale.

        Source: Batzner et al., 2024, section 3.4.
        """
        with self.mixed():  # as the maps that they are for
            maps = [torch.stack(self.differences(part)) for part in images.split(self.batch_size)]
        both = torch.cat([part.flatten(1) for part in maps], 1)
        self.quantiles = torch.stack([quantile(both, _LOW), quantile(both, _HIGH)], 1)

    def forward(self, images: Tensor) -> Prediction:
        """Images [B, 3, H, W] -> maps [B, H, W], and scores [B], their maxima (supplement, section 1.5.3).

        A map is the average of the local and the global one, each scaled so that its quantiles are 0 and 0.1.
        """
        height, width = images.shape[-2:]
        levels = []
        for level, (low, high) in zip(self.differences(images), self.quantiles, strict=True):
            # The networks' unpadded convolutions leave out a border, of about four positions a side at 256
            # pixels. No difference is known there: it counts as 0, which ranks below what is normal.
            scaled = _UNIT * (F.pad(level, (4, 4, 4, 4)) - low) / (high - low).clamp_min(1e-12)
            levels.append(F.interpolate(scaled[:, None], (height, width), mode="bilinear")[:, 0])
        maps = torch.stack(levels).mean(0)
        return Prediction(maps, maps.amax((1, 2)))

    def differences(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Images [B, 3, H, W] -> the local and the global map, each [B, h, w] (supplement, section 1.5.3).

        Squared differences, averaged over channels: of teacher and student, and of autoencoder and student. In single
        precision, as are the statistics and quantiles that scale them.
        """
        as_teacher, as_autoencoder, coded = self.outputs(images)
        targets = self._teacher_features(images)
        return (targets - as_teacher).square().mean(1), (coded - as_autoencoder).square().mean(1)

    def outputs(self, images: Tensor) -> list[Tensor]:
        """Images [B, 3, H, W] -> what the student says of the teacher and of the autoencoder, and the autoencoder.

        Each is float32 [B, C, h, w]. A training step shows the student's second half and the autoencoder jittered images,
        and these as they are.
        """
        normalised = self.normalisation(images)
        as_teacher, as_autoencoder = self.student(normalised).float().chunk(2, 1)
        return [as_teacher, as_autoencoder, self.autoencoder(normalised, as_teacher.shape[-2:]).float()]

    def _teacher_features(self, images: Tensor) -> Tensor:
        return self._normalised(self.teacher(images)[0])

    def _normalised(self, features: Tensor) -> Tensor:
        return (features - self.channel_mean) / self.channel_deviation


def hard_features(squares: Tensor) -> Tensor:
    """L_hard: the mean of those squared differences, of any shape, that reach their 0.999 quantile; a scalar.

    Source: Batzner et al., 2024, section 3.2.
    """
    flat = squares.flatten()
    count = max(1, len(flat) - 1 - int(_HARD * (len(flat) - 1)))
    return flat.topk(count, sorted=False).values.mean()


def quantile(values: Tensor, share: float) -> Tensor:
    """The quantile of each row of values [K, N] at a share in [0, 1], interpolated linearly: [K].

    torch.quantile refuses more than 16 million values.
    """
    ranks = values.sort(1).values
    place = share * (values.shape[1] - 1)
    below = int(place)
    above = min(below + 1, values.shape[1] - 1)
    return torch.lerp(ranks[:, below], ranks[:, above], place - below)


def jitter(images: Tensor) -> Tensor:
    """Images [B, 3, H, W] in [0, 1] with brightness, contrast or saturation of each changed by up to 20 %."""
    batch, device = len(images), images.device
    factor = 1 + _JITTER * (2 * torch.rand(batch, 1, 1, 1, device=device) - 1)
    kind = torch.randint(3, (batch, 1, 1, 1), device=device)
    grey = (images * table(_luma, device=device)).sum(1, keepdim=True)
    towards = torch.where(kind == 0, 0.0, torch.where(kind == 1, _mean(grey), grey))
    return torch.lerp(towards.expand_as(images), images, factor.expand_as(images)).clamp(0, 1)


def _luma() -> Tensor:
    """What red, green and blue weigh in grey: [3, 1, 1]."""
    return torch.tensor([0.299, 0.587, 0.114]).view(3, 1, 1)


def _mean(grey: Tensor) -> Tensor:
    return grey.mean((2, 3), keepdim=True).expand_as(grey)


def patch_description_network(width: int, channels: int, padding: bool = False) -> nn.Sequential:
    """The PDN: images [B, 3, H, W] -> features [B, C, h, w] of 33 x 33 pixels each, at stride 4.

    The medium size of Batzner et al., 2024, section 3.1.

    Args:
        width: channels of the first layer.
        channels: channels C of the output.
        padding: whether convolutions pad, so that the border gets features too.
    """
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
    """Read a teacher's weights by the order of their layers, whatever those are called.

    Args:
        network: the teacher, whose weights are replaced.
        file: a .safetensors or .pth file, or one of the package's own.
        width: channels of the network's first layer, for the error.

    Raises:
        UserError: the file cannot be read, is of another size or architecture, or holds what are no numbers.
    """
    state = read_weights(weights_path(file), "method.teacher")
    wanted = network.state_dict()
    given = sorted(state.items(), key=lambda item: _layer(item[0]))
    if len(given) != len(wanted):
        raise UserError(
            f"method.teacher={file} does not fit: it has {counted(len(given), 'tensor')}, and the network of medium "
            f"size has {len(wanted)}, a weight and a bias of each of its six layers; give a teacher of that size"
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


class OneLevel(nn.Module):
    """A network as a pyramid of one level."""

    def __init__(self, network: nn.Module):
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> list[Tensor]:
        """Normalised images [B, 3, H, W] -> a list of one level, [B, C, h, w]."""
        return [self.network(images)]


class Autoencoder(nn.Module):
    """Brings whole images through a bottleneck to features on the student's grid (supplement, section 1.5.1).

    Args:
        width: channels of the patch description networks' first layer, which its own are a part of.
        channels: channels C of the output.
    """

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
