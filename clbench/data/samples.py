"""What a dataset is made of: categories, and samples that know how to read themselves."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Literal

import numpy as np

Split = Literal["train", "test"]
GOOD = "good"


class Sample(ABC):
    """One image of a category, not yet decoded."""

    name: str  # for people: a path, or what was drawn
    kind: str  # GOOD, or the kind of defect
    identity: str  # changes whenever what `read` returns would change: the key of the decoded-image cache

    @abstractmethod
    def read(self) -> tuple[np.ndarray, np.ndarray | None]:
        """The image, uint8 [H, W, 3] RGB, and its defect mask, bool [H, W], or None where it is good.

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
    """The size images are brought to: both sides to `resize` (None keeps the file's), then the centre `crop`."""

    resize: int | None = 256
    crop: int | None = None
