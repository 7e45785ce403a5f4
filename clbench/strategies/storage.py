"""How a buffer keeps images: as they are, compressed, smaller, or as features of frozen networks."""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import cv2
import numpy as np
import torch
from torch import Tensor

from clbench.data.images import Identity, Images, Made
from clbench.errors import UserError
from clbench.methods.base import Detector

Kind = Literal["raw", "jpeg", "webp", "small", "latent"]

QUALITY, SCALE = 75, 2  # where none is given
CODECS = {"jpeg": ".jpg", "webp": ".webp"}
_BATCH = 16  # images whose features are there at a time
_LARGEST = torch.finfo(torch.float16).max


class Stored:
    """Images as a storage keeps them, on the CPU.

    Attributes:
        fixed: bytes that they take together, beside those of each, where there are any.
    """

    fixed = 0

    def __len__(self) -> int:
        raise NotImplementedError

    @property
    def images(self) -> Tensor | Images:
        """The images that are replayed, uint8 [M, 3, H, W]."""
        raise NotImplementedError

    def some(self, rows: Tensor) -> "Stored":
        """Copies of some of them, rows int64 [M]."""
        raise NotImplementedError

    def costs(self) -> Tensor:
        """Bytes that each takes, int64 [M]."""
        raise NotImplementedError

    def tensors(self) -> dict[str, Tensor]:
        """All that is kept of them: an ending of a name -> tensor."""
        raise NotImplementedError


class Storage:
    """A way to keep images. This one keeps them as they are.

    Attributes:
        size: height and width of the stream's images, in pixels; known once one was seen.
    """

    name = "replay.storage=raw"
    size = (0, 0)

    def see(self, images: Tensor | Images) -> None:
        """Take the size of images of the stream, uint8 [N, 3, H, W].

        Raises:
            UserError: they are too small for what the storage makes of them.
        """
        height, width = images.shape[-2:]
        self.size = height, width

    def store(self, images: Images) -> Stored:
        """The images, uint8 [N, 3, H, W] and on the CPU, as they are kept."""
        return _Pixels(
            images[torch.arange(len(images))]
        )  # a copy, where a slice may be a part of a larger tensor

    def restored(self, tensors: Mapping[str, Tensor]) -> Stored:
        """What `Stored.tensors` gave."""
        return _Pixels(tensors[""])

    def costs(self, images: Images) -> Tensor:
        """Bytes that each of the images, uint8 [N, 3, H, W], would take, int64 [N]; here the same for all."""
        return self.store(images.some(slice(1))).costs().expand(len(images))

    def passed(self, images: Images) -> Images | None:
        """The images, uint8 [N, 3, H, W], as they come back when they are replayed; None where they come as they are."""
        return None

    def ready(self, stored: Sequence[Stored]) -> None:
        """Have at hand what learning from these images takes beside them, and let go of what was at hand for others."""


class _Pixels(Stored):
    """Images as they are: uint8 [M, 3, H, W]."""

    def __init__(self, pixels: Tensor):
        self.pixels = pixels

    def __len__(self) -> int:
        return self.pixels.shape[0]  # len() takes four times as long

    @property
    def images(self) -> Tensor | Images:
        return self.pixels

    def some(self, rows: Tensor) -> Stored:
        return _Pixels(self.pixels[rows])

    def costs(self) -> Tensor:
        return torch.full((len(self),), self.pixels[:1].nbytes)

    def tensors(self) -> dict[str, Tensor]:
        return {"": self.pixels}


class _Made(Stored, Made):
    """Stored images that are made when rows are asked for.

    Args:
        storage: which knows their size by then.
    """

    def __init__(self, storage: Storage):
        self._storage = storage

    @property
    def shape(self) -> torch.Size:  # type: ignore[override]
        return torch.Size((len(self), 3, *self._storage.size))

    @property
    def images(self) -> Images:
        return Images([self])

    def made(self, rows: Tensor) -> Tensor:
        found = torch.empty((len(rows), *self.shape[1:]), dtype=torch.uint8)
        for place, row in enumerate(rows.tolist()):
            found[place] = self._one(row)
        return found

    def _one(self, row: int) -> Tensor:
        """The image of a row, uint8 [3, H, W]."""
        raise NotImplementedError


class Compressed(Storage):
    """Keeps images as JPEG or WebP files, without names: all bytes one after the other, and where each begins.

    JPEG keeps colours at full resolution (4:4:4), with the usual Huffman tables, so that libraries agree on the bytes; lossy
    WebP has them at half of it (4:2:0) by its format. A row is decoded each time it is asked for.

    Args:
        kind: a key of `CODECS`.
        quality: from 1 to 100, as the encoder's; none is lossless.
    """

    def __init__(self, kind: Literal["jpeg", "webp"], quality: int):
        self.name = f"replay.storage={kind}"
        self._ending = CODECS[kind]
        self._options = (
            [
                *(cv2.IMWRITE_JPEG_QUALITY, quality),
                *(cv2.IMWRITE_JPEG_SAMPLING_FACTOR, cv2.IMWRITE_JPEG_SAMPLING_FACTOR_444),
                *(cv2.IMWRITE_JPEG_OPTIMIZE, 0),
                *(cv2.IMWRITE_JPEG_PROGRESSIVE, 0),
            ]
            if kind == "jpeg"
            else [cv2.IMWRITE_WEBP_QUALITY, quality]
        )

    def store(self, images: Images) -> Stored:
        files = [self._encoded(image) for image in images]
        offsets = torch.tensor([len(file) for file in files]).cumsum(0)
        joined = np.concatenate(files) if files else np.empty(0, np.uint8)
        return _Files(torch.from_numpy(joined), _from_zero(offsets), self)

    def restored(self, tensors: Mapping[str, Tensor]) -> Stored:
        return _Files(tensors[".bytes"], tensors[".offsets"], self)

    def costs(self, images: Images) -> Tensor:
        return torch.tensor([len(self._encoded(image)) + 8 for image in images], dtype=torch.int64)

    def passed(self, images: Images) -> Images | None:
        return Images.of(self.store(images).images)

    def _encoded(self, image: Tensor) -> Any:
        """An image, uint8 [3, H, W] -> the bytes of its file, uint8 [length]."""
        done, file = cv2.imencode(self._ending, _bgr(image), self._options)
        assert done
        return file.reshape(-1)


class _Files(_Made):
    """Compressed images: the bytes of all files, uint8 [length], and where they begin and end, int64 [M + 1], or [0] for none."""

    fixed = 8

    def __init__(self, data: Tensor, offsets: Tensor, storage: Storage):
        super().__init__(storage)
        self._data, self._offsets = data, offsets

    def __len__(self) -> int:
        return max(len(self._offsets) - 1, 0)

    def some(self, rows: Tensor) -> Stored:
        lengths = self._offsets.diff()[rows]
        empty = self._data.new_empty(0)
        data = torch.cat([empty, *(self._file(row) for row in rows.tolist())])
        return _Files(data, _from_zero(lengths.cumsum(0)), self._storage)

    def costs(self) -> Tensor:
        return self._offsets.diff() + 8

    def tensors(self) -> dict[str, Tensor]:
        return {".bytes": self._data, ".offsets": self._offsets}

    def _file(self, row: int) -> Tensor:
        begin, end = self._offsets[row : row + 2].tolist()
        return self._data[begin:end]

    def _one(self, row: int) -> Tensor:
        return _rgb(cv2.imdecode(self._file(row).numpy(), cv2.IMREAD_COLOR))


class Small(Storage):
    """Keeps images with sides divided by a number, rounded down: means over areas, brought back by bicubic interpolation.

    Args:
        scale: the number.
    """

    def __init__(self, scale: int):
        self.name = "replay.storage=small"
        self.scale = scale

    def see(self, images: Tensor | Images) -> None:
        super().see(images)
        if min(self.size) < self.scale:
            raise UserError(
                f"replay.scale={self.scale} leaves no pixel of images of {self.size[1]}x{self.size[0]}: give less"
            )

    def store(self, images: Images) -> Stored:
        height, width = (side // self.scale for side in self.size)
        pixels = torch.empty((len(images), 3, height, width), dtype=torch.uint8)
        for row, image in enumerate(images):
            pixels[row] = _rgb(cv2.resize(_bgr(image), (width, height), interpolation=cv2.INTER_AREA))
        return _Reduced(pixels, self)

    def restored(self, tensors: Mapping[str, Tensor]) -> Stored:
        return _Reduced(tensors[""], self)

    def passed(self, images: Images) -> Images | None:
        return Images.of(self.store(images).images)


class _Reduced(_Made):
    """Smaller images: uint8 [M, 3, h, w]."""

    def __init__(self, pixels: Tensor, storage: Storage):
        super().__init__(storage)
        self.pixels = pixels

    def __len__(self) -> int:
        return self.pixels.shape[0]  # len() takes four times as long

    def costs(self) -> Tensor:
        return torch.full((len(self),), self.pixels[:1].nbytes)

    def tensors(self) -> dict[str, Tensor]:
        return {"": self.pixels}

    def some(self, rows: Tensor) -> Stored:
        return _Reduced(self.pixels[rows], self._storage)

    def _one(self, row: int) -> Tensor:
        height, width = self._storage.size
        return _rgb(cv2.resize(_bgr(self.pixels[row]), (width, height), interpolation=cv2.INTER_CUBIC))


class Latent(Storage):
    """Keeps all levels of a detector's frozen networks in half precision, for detectors with `needs_only_features`.

    A detector asks its frozen networks for features of images, and these look first in what they have stored by the image's
    content. So what is replayed are placeholders: black images with a digest of the features in their first pixels, which
    tells them apart and finds the features that are kept. A GPU has a copy of both.

    Args:
        detector: whose networks they are.
    """

    def __init__(self, detector: Detector):
        self.name = "replay.storage=latent"
        self._detector = detector

    @torch.no_grad()
    def store(self, images: Images) -> Stored:
        detector = self._detector
        networks: list[list[Tensor]] = []
        with detector.learning():
            for pyramid in detector.pyramids():
                parts = [pyramid(batch) for batch in images.on(detector.device).split(_BATCH)]
                levels = [torch.cat(level).half().cpu().contiguous() for level in zip(*parts, strict=True)]
                if not all(bool(level.isfinite().all()) for level in levels):
                    raise UserError(
                        f"{self.name} keeps features in half precision, up to {_LARGEST:,.0f}, and the backbone gives larger "
                        "ones: take another storage, or another backbone"
                    )
                networks.append(levels or [torch.empty(0, dtype=torch.float16)])
        return Features(networks, self)

    @torch.no_grad()
    def costs(self, images: Images) -> Tensor:
        one = images[:1].to(self._detector.device)
        nets = self._detector.pyramids() if len(one) else []
        numbers = sum(level[0].numel() for net in nets for level in net.network(net.normalisation(one)))
        return torch.full((len(images),), torch.float16.itemsize * numbers)

    def restored(self, tensors: Mapping[str, Tensor]) -> Stored:
        networks: list[list[Tensor]] = [[] for _ in self._detector.pyramids()]
        for network, level in sorted(tuple(map(int, name.split(".")[1:])) for name in tensors):
            networks[network].append(tensors[f".{network}.{level}"])
        return Features(networks, self)

    def ready(self, stored: Sequence[Stored]) -> None:
        device = self._detector.device
        for number, pyramid in enumerate(self._detector.pyramids()):
            known: dict[Identity, list[Tensor]] = {}
            for share in stored:
                assert isinstance(share, Features)
                levels = [level.to(device) for level in share.networks[number]]
                for row, name in enumerate(share.images.identities(torch.arange(len(share)))):
                    known[name] = [level[row] for level in levels]
            pyramid.store.given = known


class Features(_Made):
    """Features of images: of each network levels, float16 [M, C_l, H_l, W_l] or [M, N, d] each, as it gives them."""

    def __init__(self, networks: list[list[Tensor]], storage: Storage):
        super().__init__(storage)
        self.networks = networks

    def __len__(self) -> int:
        return len(self.networks[0][0])

    def some(self, rows: Tensor) -> Stored:
        return Features([[level[rows] for level in levels] for levels in self.networks], self._storage)

    def costs(self) -> Tensor:
        return torch.full((len(self),), sum(level[:1].nbytes for levels in self.networks for level in levels))

    def tensors(self) -> dict[str, Tensor]:
        return {
            f".{network}.{number}": level
            for network, levels in enumerate(self.networks)
            for number, level in enumerate(levels)
        }

    def _one(self, row: int) -> Tensor:
        digest = hashlib.sha256()
        for level in self.tensors().values():
            digest.update(level[row].numpy().data)
        image = torch.zeros((3, *self._storage.size), dtype=torch.uint8)
        name = torch.frombuffer(bytearray(digest.digest()), dtype=torch.uint8)[: image.numel()]
        image.view(-1)[: len(name)] = name
        return image


def storage_of(
    kind: Kind, quality: int | None, scale: int | None, detector: Callable[[], Detector]
) -> Storage:
    """The storage that settings ask for.

    Args:
        kind, quality, scale: see `Replay`.
        detector: gives the detector whose features are kept, for `latent`.
    """
    if kind == "jpeg" or kind == "webp":
        return Compressed(kind, quality or QUALITY)
    if kind == "small":
        return Small(scale or SCALE)
    return Latent(detector()) if kind == "latent" else Storage()


def _from_zero(ends: Tensor) -> Tensor:
    """Where files begin and end, int64 [M + 1], of where they end, int64 [M]; of no files [0]."""
    return torch.cat([torch.zeros(1, dtype=torch.int64), ends]) if len(ends) else ends.new_empty(0).long()


def _bgr(image: Tensor) -> Any:
    """An image, uint8 [3, H, W], as OpenCV has it: [H, W, 3], blue first."""
    return cv2.merge(list(image.flip(0).numpy()))


def _rgb(image: Any) -> Tensor:
    """An image of OpenCV's, [H, W, 3] with blue first, as uint8 [3, H, W]."""
    return torch.from_numpy(np.stack(cv2.split(image)[::-1]))
