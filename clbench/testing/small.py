"""What contract tests work with: small images, a small detector, and a training that is left."""

import gc
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from types import FunctionType, ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from clbench.backbones import FeaturePyramid, unit
from clbench.data.images import Images
from clbench.methods.base import Detector, Prediction
from clbench.recording.checkpoint import Checkpoints


def images(count: int, seed: int, size: int = 48) -> Tensor:
    """Images of one product, a pattern by `seed` with noise on it: uint8 [N, 3, size, size]."""
    random = torch.Generator().manual_seed(seed)
    coarse = 40 + 160 * torch.rand(1, 3, 6, 6, generator=random)
    noise = 12 * torch.randn(count, 3, size, size, generator=random)
    return (F.interpolate(coarse, (size, size), mode="bilinear") + noise).clamp(0, 255).byte()


def strange_images(seed: int, size: int = 48) -> list[Tensor]:
    """Batches that no test learns from, uint8 [B, 3, size, size]: another product, noise, black and white."""
    noise = torch.randint(256, (2, 3, size, size), generator=torch.Generator().manual_seed(seed))
    even = torch.tensor([0, 255])[:, None, None, None].expand_as(noise)
    return [images(3, seed, size), noise.byte(), even.byte()]


class SmallDetector(Detector):
    """A detector of a thousand weights that is trained: an autoencoder, whose error is the anomaly map.

    Args:
        epochs, batch_size, learning_rate: settings of the training, with Adam.
        held_out: share of the images that no step sees.
        seed: seed of the weights.

    Attributes:
        error: mean squared error over the images held out, or over those learned from where none are, float32 [];
            maps are divided by it.
    """

    error: Tensor

    def __init__(
        self,
        *,
        epochs: int = 2,
        batch_size: int = 3,
        learning_rate: float = 0.01,
        held_out: float = 0.0,
        seed: int = 0,
    ):
        super().__init__()
        self.epochs, self.batch_size, self.learning_rate = epochs, batch_size, learning_rate
        self.held_out = held_out
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

    def finish_task(self, images: Images) -> None:
        error = F.mse_loss(self._reconstructed(unit(images[:])).float(), unit(images[:]))
        self.error = error.clone()  # torch's own result keeps the memory of all squared differences

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


def assert_same(found: Prediction, expected: Prediction, case: str) -> None:
    """Check that two predictions have the same bits.

    Args:
        found, expected: the predictions.
        case: what the message of an error begins with.

    Raises:
        AssertionError: they differ; the message says whether maps or scores do.
    """
    assert_equal(found._asdict(), expected._asdict(), case)


def among(images: Tensor, others: Tensor) -> Tensor:
    """Whether each image, uint8 [N, 3, H, W], is one of the others, uint8 [M, 3, H, W]: bool [N]."""
    return torch.tensor(
        [bool((others == image).flatten(1).all(1).any()) for image in images], dtype=torch.bool
    )


def bytes_of(tensors: Iterable[Tensor]) -> int:
    """The bytes that tensors take, all together."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def assert_all_counted(holder: Any, counted: Mapping[str, Tensor], new: Any) -> None:
    """Check that what an object has kept of what it learned is counted, and takes the memory that is counted.

    Args:
        holder: a detector or strategy that has learned.
        counted: what its footprint counts and what it trains, name -> tensor.
        new: another one that has learned nothing: what both hold alike is no memory of what was learned.

    Raises:
        AssertionError: a tensor, array or bytes are held and not counted, or a counted tensor keeps a larger one.
    """
    parts = {(place_of(tensor), tensor.data_ptr(), bytes_of([tensor])) for tensor in counted.values()}
    own: Counter[int] = Counter()
    for place, _, size in parts:
        own[place] += size
    for name, tensor in counted.items():
        whole = tensor.untyped_storage().nbytes()
        assert whole <= own[place_of(tensor)], (
            f"{name} keeps {whole} bytes in memory, as a part of a larger tensor, and "
            f"{bytes_of([tensor])} are counted: keep a clone()"
        )
    alike = arrays_in(new)
    hidden = [
        tuple(array.shape)
        for array in arrays_in(holder)
        if array.numel() and place_of(array) not in own and not any(_equal(array, other) for other in alike)
    ]
    assert not hidden, f"held and not counted: tensors, arrays or bytes of shapes {hidden}"


def place_of(tensor: Tensor) -> int:
    """The address of the memory that a tensor is in, or is a part of."""
    return tensor.untyped_storage().data_ptr()


def arrays_in(holder: Any) -> list[Tensor]:
    """The tensors, NumPy arrays and bytes that an object holds, as tensors.

    It looks into containers, other objects, modules and closures, but not into frozen networks, which the config makes.
    """
    found: list[Tensor] = []
    seen: set[int] = set()
    ahead: list[Any] = [holder]
    while ahead:
        one = ahead.pop()
        if id(one) in seen or isinstance(one, type | ModuleType | FeaturePyramid):
            continue
        seen.add(id(one))
        if isinstance(one, Tensor):
            found.append(one)
        elif isinstance(one, np.ndarray) and one.dtype != object:
            found.append(torch.from_numpy(one))
        elif isinstance(one, bytes | bytearray):
            found.append(torch.from_numpy(np.frombuffer(one, np.uint8).copy()))
        elif isinstance(one, FunctionType):
            ahead.append(one.__closure__)  # beside it, a function refers to all that its file has
        else:
            ahead += gc.get_referents(one)
    return found


def _equal(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors have the same shape, type and bits."""
    return one.shape == other.shape and one.dtype == other.dtype and torch.equal(one, other)
