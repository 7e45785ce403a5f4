"""What contract tests work with: small images, a small detector, and a training that is left."""

from collections.abc import Callable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from clbench.backbones import unit
from clbench.methods.base import Detector, Prediction
from clbench.recording.checkpoint import Checkpoints


def images(count: int, seed: int, size: int = 48) -> Tensor:
    """Images of one product, a pattern by `seed` with noise on it: uint8 [N, 3, size, size]."""
    random = torch.Generator().manual_seed(seed)
    coarse = 40 + 160 * torch.rand(1, 3, 6, 6, generator=random)
    noise = 12 * torch.randn(count, 3, size, size, generator=random)
    return (F.interpolate(coarse, (size, size), mode="bilinear") + noise).clamp(0, 255).byte()


class SmallDetector(Detector):
    """A detector of a thousand weights that is trained: an autoencoder, whose error is the anomaly map.

    Args:
        epochs, batch_size, learning_rate: settings of the training, with Adam.
        seed: seed of the weights.

    Attributes:
        error: mean squared error over the images learned from, float32 []; maps are divided by it.
    """

    error: Tensor

    def __init__(self, *, epochs: int = 2, batch_size: int = 3, learning_rate: float = 0.01, seed: int = 0):
        super().__init__()
        self.epochs, self.batch_size, self.learning_rate = epochs, batch_size, learning_rate
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.encoder = nn.Conv2d(3, 8, 3, stride=2, padding=1)
            self.decoder = nn.ConvTranspose2d(8, 3, 4, stride=2, padding=1)
        self.register_buffer("error", torch.ones(()))

    def optimizer(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), self.learning_rate)

    def training_step(self, images: Tensor) -> Tensor:
        """Images, uint8 [B, 3, H, W] -> the mean squared error of their reconstructions from noisy copies."""
        clean = unit(images)
        noisy = clean + 0.05 * torch.randn_like(clean)
        return F.mse_loss(self._reconstructed(noisy).float(), clean)

    def outputs(self, images: Tensor) -> list[Tensor]:
        return [self._reconstructed(unit(images))]

    def finish_task(self, images: Tensor) -> None:
        self.error = F.mse_loss(self._reconstructed(unit(images)).float(), unit(images))

    def forward(self, images: Tensor) -> Prediction:
        maps = (self._reconstructed(unit(images)).float() - unit(images)).square().mean(1) / self.error
        return Prediction(maps, maps.amax((1, 2)))

    def _reconstructed(self, images: Tensor) -> Tensor:
        """Images, float [B, 3, H, W] -> their reconstructions, of the same shape."""
        return self.decoder(F.relu(self.encoder(images)))


class Left(BaseException):
    """Raised where a training is left in the middle, as when a process ends."""


class Leaving:
    """A `Bookmark` in memory that leaves the training at one of the places where it can be left.

    Attributes:
        places: number of such places so far.
        leave_at: number of the place to leave at, counted from 1; None to train to the end.
    """

    def __init__(self) -> None:
        self.places = 0
        self.leave_at: int | None = None
        self._saved: dict[int, tuple[dict[str, Tensor], dict[str, Any]]] = {}

    def find(self, stage: int) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        tensors, data = self._saved.get(stage, (None, None))
        return None if tensors is None or data is None else (copied(tensors), data)

    def due(self, epoch_ended: bool) -> bool:
        self.places += 1
        return self.places == self.leave_at

    def place(self, stage: int, tensors: dict[str, Tensor], data: dict[str, Any]) -> None:
        self._saved[stage] = copied(tensors), data
        raise Left


def left_at_every_place(
    places: int, process: Callable[[Leaving], dict[str, Tensor]]
) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """What trainings end in that a process left and another continued: at each place, and first left nowhere.

    Args:
        places: how many places to leave the training at there are.
        process: trains, from the beginning of a stage or with the bookmark it is given from where it was left, and
            gives the state at the end.
    """
    for place in range(places + 1):
        leaving = Leaving()
        leaving.leave_at = place or None
        try:
            state = process(leaving)
        except Left:
            leaving.leave_at = None
            state = process(leaving)
        yield f"left at place {place}", state


def copied(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Copies of tensors, name -> tensor, from a checkpoint that was written and read."""
    with TemporaryDirectory() as folder:
        Checkpoints(Path(folder)).save_stage(0, tensors, {})
        saved = Checkpoints(Path(folder)).load_stage()
    assert saved is not None
    return saved[1]


def assert_equal(found: dict[str, Tensor], expected: dict[str, Tensor], case: str) -> None:
    """Check that two states have the same names and the same bits.

    Args:
        found, expected: name -> tensor.
        case: what the message of an error begins with.

    Raises:
        AssertionError: they differ; the message names the tensor.
    """
    assert found.keys() == expected.keys(), f"{case}: {sorted(found)} in place of {sorted(expected)}"
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), f"{case}: {name} differs"


def tensors_in(value: Any, seen: set[int] | None = None) -> list[Tensor]:
    """All tensors that an object holds, in containers and in objects that are no modules too."""
    seen = set() if seen is None else seen
    if id(value) in seen or isinstance(value, nn.Module | type):
        return []
    seen.add(id(value))
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, dict):
        return [tensor for one in value.values() for tensor in tensors_in(one, seen)]
    if isinstance(value, list | tuple | set):
        return [tensor for one in value for tensor in tensors_in(one, seen)]
    return tensors_in(vars(value), seen) if hasattr(value, "__dict__") and not callable(value) else []
