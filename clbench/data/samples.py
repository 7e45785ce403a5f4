"""What a dataset is made of: categories, and samples that know how to read themselves."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Literal

import cv2
import numpy as np

from clbench.errors import UserError

Split = Literal["train", "test"]
GOOD = "good"


class Sample(ABC):
    """One image of a category, not yet decoded."""

    name: str  # for people: a path, or what was drawn
    kind: str  # GOOD, or the kind of defect
    identity: str  # changes whenever what `read` returns would change: the key of the decoded-image cache

    @property
    def outlined(self) -> bool:
        """Whether it is known which pixels are defective; not so where a dataset has labels of images alone."""
        return True

    @abstractmethod
    def read(self) -> tuple[np.ndarray, np.ndarray | None]:
        """The image, uint8 [H, W, 3] RGB, and its defect mask, bool [H, W], or None where there is none.

        Raises:
            UserError: the file is unreadable, truncated, or its mask is missing or does not fit.
        """


class Dataset(ABC):
    """Product categories with normal training images and labelled test images."""

    name: str
    categories: list[str]

    @abstractmethod
    def samples(self, category: str, split: Split) -> list[Sample]:
        """The samples of one category in a fixed order: the training ones are all good.

        Raises:
            UserError: the category is unknown, or has no image for the split.
        """


@dataclass(frozen=True)
class Geometry:
    """The size images are brought to: both sides to `resize` (None keeps the file's), then the centre `crop`.

    Raises:
        UserError: a size is not positive, or the crop is larger than what it is cut from.
    """

    resize: int | None = 256
    crop: int | None = None

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

    def image(self, image: np.ndarray) -> np.ndarray:
        """Image [H, W, C] -> [h, w, C] of the same type.

        Raises:
            UserError: the image is smaller than the crop.
        """
        if self.resize is not None:
            # In two steps, since one side may shrink while the other grows.
            height, width = image.shape[:2]
            shrunk = min(height, self.resize), min(width, self.resize)
            image = _resized(image, shrunk, cv2.INTER_AREA)
            image = _resized(image, (self.resize, self.resize), cv2.INTER_LINEAR)
        return self._cropped(image)

    def mask(self, mask: np.ndarray) -> np.ndarray:
        """Mask, bool [H, W] -> bool [h, w]: nearest neighbours, so that it stays a mask.

        Raises:
            UserError: the mask is smaller than the crop.
        """
        if self.resize is not None:
            size = (self.resize, self.resize)
            mask = _resized(mask.astype(np.uint8), size, cv2.INTER_NEAREST_EXACT).astype(bool)
        return self._cropped(mask)

    def restore(self, grid: np.ndarray, size: tuple[int, int]) -> np.ndarray:
        """A map of the image that `image` gave, back on the original's pixels.

        Args:
            grid: float32 [h, w].
            size: of the original, (H, W).

        Returns:
            float32 [H, W], interpolated linearly; NaN outside of the crop, where nothing is known.
        """
        rows, columns = (
            _weights(original, self.resize or original, known)
            for original, known in zip(size, grid.shape, strict=True)
        )
        for low, high, share in (rows, columns):
            grid = (grid[low] * (1 - share) + grid[high] * share).T
        return np.ascontiguousarray(grid)

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


def _weights(original: int, resized: int, known: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """For each of `original` pixels along a side that was resized and cut to its middle `known` ones: the two of
    those that it lies between, int [N], and the second one's share, float32 [N, 1]; NaN outside."""
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
