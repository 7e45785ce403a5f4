"""Image and mask files on disk: decoded whole, or refused."""

import glob
import io
import os
import stat
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
from PIL import Image

from clbench.data.samples import GOOD, Sample
from clbench.errors import UserError
from clbench.paths import expanded

FORMATS = ("PNG", "JPEG", "BMP", "TIFF", "WEBP")
SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp")

_WHITE_IS_ZERO = 0  # TIFF tag 262, photometric interpretation
_SEPARATE_PLANES = 2  # TIFF tag 284, planar configuration


def find_images(given: Iterable[Path | str], without: Path | None = None) -> list[Path]:
    """Image files, absolute, in the order given, each once.

    Args:
        given: files, whatever their suffix; folders, whose image files are taken, sorted, with those of
            folders inside; and patterns such as `parts/*.png`. A path that does not exist is given back.
        without: a folder whose files are left out of the folders given.

    Raises:
        UserError: a pattern matches nothing.
    """
    found: dict[Path, None] = {}
    for each in given:
        path = expanded(each)
        pattern = not path.exists() and glob.has_magic(str(path))
        matches = sorted(map(Path, glob.glob(str(path), recursive=True))) if pattern else [path]
        if not matches:
            raise UserError(f"{each} matches no file: name files, folders or another pattern")
        for match in map(_absolute, matches):
            if not match.is_dir():
                found[match] = None
                continue
            for file in sorted(match.rglob("*")):
                inside = file.relative_to(match).parts
                hidden = any(part.startswith(".") for part in inside)
                left_out = without is not None and _absolute(without) in file.parents
                if file.suffix.lower() in SUFFIXES and file.is_file() and not (hidden or left_out):
                    found[file] = None
    return list(found)


def _absolute(path: Path) -> Path:
    """The absolute path without `..`: the same file has one name."""
    return Path(os.path.abspath(path))


@dataclass(frozen=True)
class FileSample(Sample):
    """An image file and the masks of its defect, which are merged; with none, it is good or not outlined."""

    name: str
    kind: str
    identity: str
    image: Path
    masks: tuple[Path, ...] = ()

    @property
    def outlined(self) -> bool:
        return self.kind == GOOD or bool(self.masks)

    def read(self) -> tuple[np.ndarray, np.ndarray | None]:
        image = read_image(self.image)
        merged = None
        for path in self.masks:
            mask = read_mask_of(self.image, path, image.shape[:2])
            merged = mask if merged is None else merged | mask
        return image, merged


def read_image(path: Path) -> np.ndarray:
    """Read an image file as a person sees it: uint8 [H, W, 3] RGB.

    Grey becomes three equal channels, 16 bits are scaled by the full range (65535 -> 255: / 257, rounded),
    alpha is dropped, and the EXIF orientation is applied.

    Raises:
        UserError: the file is missing, no regular file, truncated, corrupt, or has pixels that cannot be read
            for certain (float, 32-bit, and two kinds of 16-bit TIFF).
    """
    pixels = _decode(path)
    if pixels.dtype == np.uint16:
        pixels = ((pixels.astype(np.uint32) + 128) // 257).astype(np.uint8)
    return cv2.cvtColor(pixels, cv2.COLOR_BGR2RGB)


def read_mask(path: Path) -> np.ndarray:
    """Read a mask file: bool [H, W], True where any channel but alpha is positive.

    Raises:
        UserError: as `read_image`, or the mask marks no pixel.
    """
    mask: np.ndarray = np.any(_decode(path), axis=2)
    if not mask.any():
        raise UserError(f"mask {path} marks no pixel: draw the defect in it, or move its image to {GOOD}")
    return mask


def read_mask_of(image: Path, path: Path, size: tuple[int, ...] | None) -> np.ndarray:
    """Read the mask of an image: bool [H, W].

    Args:
        image: the image's file, for the error.
        path: the mask's file.
        size: size (H, W) of the image; None where it is not known, and is not compared.

    Raises:
        UserError: as `read_mask`, or the mask has another size than the image.
    """
    mask = read_mask(path)
    if size is not None and mask.shape != size:
        raise UserError(
            f"mask {path} is {mask.shape[1]}x{mask.shape[0]} but its image is {size[1]}x{size[0]}: "
            f"replace it by the mask of {image}"
        )
    return mask


def _decode(path: Path) -> np.ndarray:
    """Pixels as stored, uint8 or uint16 [H, W, 3] BGR, with the EXIF orientation applied."""
    try:
        if stat.S_IFMT(path.stat().st_mode) not in (stat.S_IFREG, stat.S_IFDIR):  # a pipe is waited for
            raise _broken(path, "a pipe, socket or device")
        data = path.read_bytes()
    except OSError as error:
        raise UserError(f"cannot read image file {path}: {error.strerror}") from error
    if not data:
        raise UserError(f"image file {path} is empty: copy it again from its source")
    _check_whole(path, data)
    # BGR on purpose: OpenCV 5.0's IMREAD_COLOR_RGB returns noise for 16-bit RGB TIFF.
    try:
        pixels = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR | cv2.IMREAD_ANYDEPTH)
    except cv2.error as error:
        raise _broken(path, "OpenCV cannot decode it") from error
    if pixels is None:
        raise _broken(path, "OpenCV cannot decode it")
    if pixels.dtype not in (np.uint8, np.uint16):
        raise _unsupported(path, f"{pixels.dtype} pixels")
    return pixels


def _check_whole(path: Path, data: bytes) -> None:
    """Refuse files that OpenCV would decode partly or wrongly without an error.

    Raises:
        UserError: this is one.
    """
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            image.load()
            mode, tags = image.mode, getattr(image, "tag_v2", {})
    except Exception as error:  # Pillow's decoders fail with whatever the damage leads them to
        if isinstance(error, Image.UnidentifiedImageError):
            raise _broken(path, "not a PNG, JPEG, BMP, TIFF or WebP with 8 or 16 bits per channel") from error
        raise _broken(path, error) from error
    if mode in ("F", "I"):
        raise _unsupported(path, "float pixels" if mode == "F" else "signed or 32-bit pixels")
    if max(_as_tuple(tags.get(258, 8))) > 8:
        # OpenCV 5.0 mixes up separate planes, and does not invert white-is-zero.
        if tags.get(284) == _SEPARATE_PLANES:
            raise _unsupported(path, "16-bit separate colour planes")
        if tags.get(262) == _WHITE_IS_ZERO:
            raise _unsupported(path, "16-bit white-is-zero pixels")


def _as_tuple(value: int | tuple[int, ...]) -> tuple[int, ...]:
    return value if isinstance(value, tuple) else (value,)


def _broken(path: Path, reason: object) -> UserError:
    return UserError(
        f"image file {path} is truncated, corrupt or no image ({reason}): copy it again from its source"
    )


def _unsupported(path: Path, what: str) -> UserError:
    return UserError(f"image file {path} has {what}: convert it to 8- or 16-bit unsigned grey or RGB")


def file_identity(path: Path) -> str:
    """A text that changes when the file does: path, size in bytes, time of last change in nanoseconds.

    Raises:
        UserError: the file cannot be found.
    """
    try:
        status = path.stat()
    except OSError as error:
        raise UserError(f"cannot read image file {path}: {error.strerror}") from error
    return f"{path} {status.st_size} {status.st_mtime_ns}"
