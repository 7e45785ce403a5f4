"""What a dataset is made of: categories, and samples that know how to read themselves."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import cv2
import numpy as np

from clbench.errors import UserError

Split = Literal["train", "test"]
GOOD = "good"

_ROWS = 256  # of a map that are restored at a time


class Sample(ABC):
    """One image of a category, not yet decoded."""

    name: str  # shown to people: a path, or what was drawn
    kind: str  # GOOD, or the kind of defect
    identity: str  # changes whenever the result of `read` would; known without reading

    @property
    def outlined(self) -> bool:
        """Whether it is known which pixels are defective; a dataset may have labels of images alone."""
        return True

    def content(self) -> str:
        """A text that is the same for samples from which `read` gives the same, wherever they are.

        The key of the cache of decoded images. The default is `identity`, which is right but for files: those may be
        moved or restored.

        Raises:
            UserError: a file is unreadable.
        """
        return self.identity

    def settled(self) -> bool:
        """Whether `identity` would be another if the sample changed from now on; of a new file it might be the same."""
        return True

    def at(self, geometry: "Geometry") -> "Sample":
        """The sample to `read` where only what `geometry` makes of it is wanted: the default is itself."""
        return self

    @abstractmethod
    def read(self) -> tuple[np.ndarray, np.ndarray | None]:
        """The image and the mask of its defect.

        Returns:
            The image, uint8 or uint16 [H, W, 3] RGB, and the mask, bool [H, W]; None where it has no mask. Both have the
            size of the file, unless the sample was asked for `at` a geometry.

        Raises:
            UserError: the file is unreadable or truncated, or its mask is missing or has another size.
        """


@dataclass(frozen=True, eq=False)
class Defect:
    """One outlined defect of a test image, where a dataset tells the defects of an image apart.

    Attributes:
        image: index of its image in the test set.
        pixels: where it is, in the image's mask at the run's size, flattened: int32 [at least 1].
        saturation: how many of its pixels must be found for it to count as found whole.
    """

    image: int
    pixels: np.ndarray
    saturation: int


class Dataset(ABC):
    """Product categories with normal training images and labelled test images.

    Attributes:
        name: the dataset's, as the config has it.
        categories: names of the categories, in the order of the stream unless the config gives another.
        notes: a line for each thing about it that people should know of, such as files that were left out.
    """

    name: str
    categories: list[str]
    notes: Sequence[str] = ()

    @abstractmethod
    def samples(self, category: str, split: Split) -> list[Sample]:
        """The samples of a category in a fixed order; training samples are all good.

        Raises:
            UserError: the category is unknown, or has no image for the split.
        """

    def defects(self, category: str, geometry: "Geometry", directory: Path) -> list[Defect]:
        """The defects of a category's test images; those of which no pixel is left at the run's size are left out.

        Only datasets that list saturation areas have this: the default is never called.

        Args:
            geometry: what masks are brought to.
            directory: folder of the cache of decoded images.

        Raises:
            UserError: a file is missing or unreadable, or masks and saturation areas do not go together.
        """
        raise NotImplementedError


@dataclass(frozen=True)
class Geometry:
    """What images are brought to: 8 bits, and a size.

    Args:
        resize: both sides are brought to so many pixels; None keeps the file's size.
        crop: then the square of so many pixels in the middle is cut out; None keeps all.
        bit_depth: how many bits of 16-bit images the camera has filled: 12 where 4095 is white. None for all 16.

    Raises:
        UserError: a size is not positive, or the crop is larger than what it is cut from.
    """

    resize: int | None = 256
    crop: int | None = None
    bit_depth: int | None = None

    def __post_init__(self) -> None:
        for name, size in (("resize", self.resize), ("crop", self.crop)):
            if size is not None and size < 1:
                raise UserError(
                    f"dataset.{name}={size} is no size: give a positive number of pixels, or null"
                )
        if self.resize is not None and self.crop is not None and self.crop > self.resize:
            raise UserError(
                f"dataset.crop={self.crop} is larger than dataset.resize={self.resize}: "
                f"give a crop of at most {self.resize}, or null for none"
            )

    def eight_bits(self, image: np.ndarray) -> np.ndarray:
        """Image, uint8 or uint16 of any shape -> the same in uint8: white, 2^bit_depth - 1, becomes 255.

        Raises:
            UserError: the image has larger values than `bit_depth` allows.
        """
        if image.dtype != np.uint16:
            return image
        white = 2 ** (self.bit_depth or 16) - 1
        if (peak := int(image.max())) > white:
            raise UserError(
                f"dataset.bit_depth={self.bit_depth} ends at {white}, and there is a pixel of {peak}: "
                f"give at least {peak.bit_length()}, or null for all 16 bits"
            )
        return ((image.astype(np.uint32) * 255 + white // 2) // white).astype(np.uint8)

    def image(self, image: np.ndarray) -> np.ndarray:
        """Image, uint8 or uint16 [H, W, C] -> image, uint8 [h, w, C].

        Raises:
            UserError: the image is smaller than the crop, or has larger values than `bit_depth` allows.
        """
        image = self.eight_bits(image)
        if self.resize is not None:
            # In two steps, since one side may shrink while the other grows.
            height, width = image.shape[:2]
            shrunk = min(height, self.resize), min(width, self.resize)
            image = _resized(image, shrunk, cv2.INTER_AREA)
            image = _resized(image, (self.resize, self.resize), cv2.INTER_LINEAR)
        return self._cropped(image)

    def mask(self, mask: np.ndarray) -> np.ndarray:
        """Mask, bool [H, W] -> mask, bool [h, w] at this size, by nearest neighbours.

        Raises:
            UserError: the mask is smaller than the crop.
        """
        if self.resize is not None:
            size = (self.resize, self.resize)
            mask = _resized(mask.astype(np.uint8), size, cv2.INTER_NEAREST_EXACT).astype(bool)
        return self._cropped(mask)

    def enlargement(self, size: tuple[int, int]) -> float:
        """How many pixels of the resized image there are for one of a file of size (H, W)."""
        return 1.0 if self.resize is None else self.resize**2 / (size[0] * size[1])

    def restore(self, grid: np.ndarray, size: tuple[int, int]) -> np.ndarray:
        """Bring a map of an image that `image` resized and cropped back to the original image's pixels.

        Args:
            grid: the map, float32 [h, w].
            size: size (H, W) of the original image, in pixels.

        Returns:
            The map, float32 [H, W], interpolated linearly; NaN outside the crop, where nothing is known. The same object
            where the image was left as it is.
        """
        if self.resize is None and grid.shape == size:
            return grid
        (low, high, share), columns = (
            _weights(original, self.resize or original, known)
            for original, known in zip(size, grid.shape, strict=True)
        )
        left, right, beyond = columns
        found = np.empty(size, np.float32)
        for begin in range(0, size[0], _ROWS):  # beside a large map there is no second one
            rows = slice(begin, begin + _ROWS)
            strip = (grid[low[rows]] * (1 - share[rows]) + grid[high[rows]] * share[rows]).T
            found[rows] = (strip[left] * (1 - beyond) + strip[right] * beyond).T
        return found

    def _cropped(self, array: np.ndarray) -> np.ndarray:
        if self.crop is None:
            return array
        height, width = array.shape[:2]
        if min(height, width) < self.crop:
            raise UserError(
                f"dataset.crop={self.crop} is larger than an image of {width}x{height}: "
                "give a smaller dataset.crop, or enlarge images with dataset.resize"
            )
        top, left = (height - self.crop) // 2, (width - self.crop) // 2
        return array[top : top + self.crop, left : left + self.crop]


def different_sizes(first: str, size: Sequence[int], other: str, other_size: Sequence[int]) -> UserError:
    """The error for two named images that cannot share a tensor, with their sizes (H, W)."""
    return UserError(
        f"{first} is {size[1]}x{size[0]} but {other} is {other_size[1]}x{other_size[0]}: "
        "bring all images to one size with dataset.resize=..."
    )


def _weights(original: int, resized: int, known: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Weights of linear interpolation along one side.

    Args:
        original: N, the pixels of the side before it was resized.
        resized: its pixels after that.
        known: how many of these, in the middle, are known.

    Returns:
        For each of the N pixels: the two known ones that it lies between, int64 [N] each, and the weight of
        the second, float32 [N, 1]; NaN where the pixel lies outside of what is known.
    """
    centre = (np.arange(original) + 0.5) * (resized / original) - 0.5 - (resized - known) // 2
    within = np.clip(centre, 0, known - 1)
    low = within.astype(np.int64)
    share = np.where((centre >= -0.5) & (centre < known - 0.5), within - low, np.nan)
    return low, np.minimum(low + 1, known - 1), share.astype(np.float32)[:, None]


def _resized(array: np.ndarray, size: tuple[int, int], interpolation: int) -> np.ndarray:
    """`array` [H, W, ...] at `size` (h, w); itself where it has that size."""
    if array.shape[:2] == size:
        return array
    return cv2.resize(np.ascontiguousarray(array), size[::-1], interpolation=interpolation)
