"""Decoded images of a category or a task, as tensors."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate

import torch
from torch import Tensor

from clbench.data.cache import Contents
from clbench.data.samples import GOOD, different_sizes


@dataclass(frozen=True, eq=False)
class ImageSet:
    """Images of one size, and what is known about each.

    Args:
        images: uint8 [N, 3, H, W], RGB.
        masks: bool [N, H, W], True on defects.
        kinds: `GOOD` or the kind of defect, one for each image.
        names: names to show to people, one for each image.
        unknown: indices of the defective images whose defect was not outlined: their masks mean nothing.
        contents: what was found when they were decoded; nothing where they come from elsewhere.
    """

    images: Tensor
    masks: Tensor
    kinds: list[str]
    names: list[str]
    unknown: list[int] = field(default_factory=list)
    contents: Contents = field(default_factory=lambda: Contents("", None, []))

    def __len__(self) -> int:
        return len(self.images)

    @property
    def labels(self) -> Tensor:
        """bool [N], True where the image shows a defect."""
        return torch.tensor([kind != GOOD for kind in self.kinds], dtype=torch.bool)

    def same_size(self, other: "ImageSet") -> None:
        """Check that another set has images of the same size.

        Raises:
            UserError: it has not.
        """
        if other.images.shape[1:] != self.images.shape[1:]:
            raise different_sizes(self.names[0], self.masks.shape[1:], other.names[0], other.masks.shape[1:])

    @staticmethod
    def concatenate(sets: Sequence["ImageSet"]) -> "ImageSet":
        """The images of several sets in their order; copied, unless there is only one set.

        Raises:
            UserError: the sets differ in image size.
        """
        if len(sets) == 1:
            return sets[0]
        for other in sets[1:]:
            sets[0].same_size(other)
        begins = accumulate((len(part) for part in sets), initial=0)
        return ImageSet(
            images=torch.cat([part.images for part in sets]),
            masks=torch.cat([part.masks for part in sets]),
            kinds=[kind for part in sets for kind in part.kinds],
            names=[name for part in sets for name in part.names],
            unknown=[begin + at for begin, part in zip(begins, sets, strict=False) for at in part.unknown],
        )
