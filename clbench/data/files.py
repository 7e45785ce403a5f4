"""Image and mask files on disk: those that a person names, what they hold, and samples of them."""

import glob
import os
import time
from collections.abc import Iterable, Mapping
from copy import copy
from dataclasses import dataclass, field
from pathlib import Path

import cv2
import numpy as np

from clbench import digests
from clbench.data.decoding import Decoded, decode, file_bytes
from clbench.data.listing import LeftOut, images_in
from clbench.data.masks import Doubtful, marked
from clbench.data.samples import GOOD, Geometry, Sample
from clbench.errors import UserError
from clbench.paths import absolute_of, expanded

_CLOCK_NS = 2_000_000_000  # how coarse the clocks of file systems are: FAT's counts in steps of 2 s


def find_images(
    given: Iterable[Path | str], without: Iterable[Path] = (), left_out: LeftOut | None = None
) -> list[Path]:
    """Image files, absolute, in the order given, each once.

    Args:
        given: texts, in which `~` and variables are replaced, or Paths: files, whatever their suffix; folders, whose image files are taken, sorted, with those of
            folders inside (see `images_in`); and patterns such as `parts/*.png`. A path that does not exist is
            given back.
        without: folders whose files are left out of the folders given.
        left_out: told what is left out of the folders given, but for those in `without`.

    Raises:
        UserError: a pattern matches nothing, a word is empty, or a folder cannot be listed.
    """
    left_out = LeftOut() if left_out is None else left_out
    apart = [Path(absolute_of(folder)) for folder in without]
    found: dict[Path, None] = {}
    for each in given:
        if not str(each):
            raise UserError("an empty word names no image: give files, folders or patterns")
        path = (
            expanded(each) if isinstance(each, str) else each
        )  # a Path is of a program, which has expanded it
        pattern = not path.exists() and glob.has_magic(str(path))
        matches = sorted(map(Path, glob.glob(str(path), recursive=True))) if pattern else [path]
        if not matches:
            raise UserError(f"{each} matches no file: name files, folders or another pattern")
        for match in map(Path, map(absolute_of, matches)):
            if not match.is_dir():
                found[match] = None
            elif not any(folder in (match, *match.parents) for folder in apart):
                found |= dict.fromkeys(images_in(match, left_out, apart))
    return list(found)


@dataclass(frozen=True)
class FileSample(Sample):
    """An image file and the masks of its defect, which are merged; with none, it is good or not outlined.

    Attributes:
        least: pixels of a side that the image will be shrunk to, see `decode`; None for the whole.
    """

    name: str
    kind: str
    image: Path
    masks: tuple[Path, ...] = ()
    least: int | None = None
    identity: str = field(init=False)
    _changed_ns: int = field(init=False, repr=False)

    def __post_init__(self) -> None:
        status = self._status()
        object.__setattr__(self, "identity", _identity(status))
        object.__setattr__(self, "_changed_ns", max(found.st_ctime_ns for found in status.values()))

    def _status(self) -> dict[Path, os.stat_result]:
        """What the system says of each file, the image first.

        Raises:
            UserError: one cannot be found.
        """
        found = {}
        for path in (self.image, *self.masks):
            try:
                found[path] = path.stat()
            except OSError as error:
                raise UserError(f"cannot read image file {path}: {error.strerror}") from error
        return found

    @property
    def outlined(self) -> bool:
        return self.kind == GOOD or bool(self.masks)

    def content(self) -> str:
        """The SHA-256 of each file, the image's first."""
        paths = (self.image, *self.masks)
        found = " ".join(digests.of_bytes(file_bytes(path)) for path in paths)
        self._check_unchanged()
        return found

    def settled(self) -> bool:
        # The image of a container, for one, may have the times and sizes of another.
        if os.statvfs(self.image).f_flag & os.ST_RDONLY:
            return False
        return abs(time.time_ns() - self._changed_ns) > _CLOCK_NS

    def _check_unchanged(self) -> None:
        """Check that the files are those that were listed: what is read stands for the sample's identity.

        Raises:
            UserError: one has changed since.
        """
        if _identity(self._status()) != self.identity:
            raise UserError(
                f"image file {self.image} or its mask changed while it was read: start again when all is written"
            )

    def at(self, geometry: Geometry) -> Sample:
        sample = copy(self)  # of the same identity: a new one would be that of files that may have changed
        object.__setattr__(sample, "least", geometry.resize)
        return sample

    def outlines(self) -> list[tuple[np.ndarray, int]]:
        """Each mask by itself: bool [H, W] at the file's size, and the value of the pixels that it marks.

        Raises:
            UserError: as `read`, or a mask marks pixels with several values.
        """
        found = []
        for path in self.masks:
            mask, levels = _read_levels(path)
            values = np.unique(levels[mask])
            if len(values) > 1:
                raise UserError(
                    f"mask {path} marks with {len(values)} values, {values[0]} to {values[-1]}, where one defect has one: "
                    "copy it again from its source"
                )
            found.append((mask, int(values[0])))
        self._check_unchanged()
        return found

    def read(self) -> tuple[np.ndarray, np.ndarray | None]:
        image = decode(self.image, self.least)
        merged = None
        for path in self.masks:
            mask = read_mask_of(self.image, path, image.size)
            merged = mask if merged is None else merged | mask
        self._check_unchanged()
        return _rgb(image), merged


def read_image(path: Path) -> np.ndarray:
    """Read an image file as a person sees it: uint8 or uint16 [H, W, 3] RGB.

    Grey becomes three equal channels, alpha is dropped, and the EXIF orientation is applied. Of an animation or of
    pages, the first is read.

    Raises:
        UserError: as `decode`.
    """
    return _rgb(decode(path))


def read_image_at(path: Path, geometry: Geometry) -> tuple[np.ndarray, tuple[int, int]]:
    """Read an image file to be brought to a size: as `read_image`, but a large JPEG may be decoded smaller.

    Returns:
        The image, uint8 or uint16 [h, w, 3] RGB, and the size (H, W) of the file's.

    Raises:
        UserError: as `decode`.
    """
    decoded = decode(path, geometry.resize)
    return _rgb(decoded), decoded.size


def _rgb(decoded: Decoded) -> np.ndarray:
    """The pixels in RGB order, in the place of those given: a copy of a large image may not fit beside it.

    Where the file says what is white, they are brought to 8 bits: `dataset.bit_depth` is for files that do not.
    """
    pixels = Geometry().eight_bits(decoded.pixels) if decoded.white_stated else decoded.pixels
    return cv2.cvtColor(pixels, cv2.COLOR_BGR2RGB, dst=pixels)


def read_mask(path: Path) -> np.ndarray:
    """Read a mask file: bool [H, W], True on defects; `clbench.data.masks.marked` says what marks them.

    Raises:
        UserError: as `decode`, or the mask marks no pixel, or it cannot be told which.
    """
    return _read_levels(path)[0]


def _read_levels(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """As `read_mask`, and the level of each pixel: the largest of its channels, uint8 or uint16 [H, W]."""
    decoded = decode(path, look_at_alpha=True)
    try:
        mask = marked(decoded.pixels, decoded.lossy, decoded.alpha)
    except Doubtful as doubt:
        raise UserError(f"mask {path} {doubt}") from doubt
    if not mask.any():
        raise UserError(f"mask {path} marks no pixel: draw the defect in it, or move its image to {GOOD}")
    return mask, decoded.pixels.max(axis=2)


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


def _identity(status: Mapping[Path, os.stat_result]) -> str:
    """A text that changes when a file does: paths, sizes in bytes, times of the last change in nanoseconds.

    Two times of each: what restores a file sets that of its content, but not that of its record. And the record's
    number, which is another for a file that was put in the place of one.
    """
    return " mask ".join(
        f"{path} {found.st_size} {found.st_mtime_ns} {found.st_ctime_ns} {found.st_ino}"
        for path, found in status.items()
    )
