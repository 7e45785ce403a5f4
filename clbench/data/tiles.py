"""Images as overlapping tiles: where they are cut, and what each pixel of a tile counts in the map of the whole."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch
from torch import Tensor

from clbench.data.images import Images, Made
from clbench.errors import UserError


@dataclass(frozen=True)
class Tiling:
    """How images are cut into square tiles that overlap.

    Along each side, tiles begin `side - overlap` pixels after one another; the last one ends at the image's border, and shares
    more with the one before where that is needed.

    Args:
        side: pixels of both sides of a tile.
        overlap: pixels that neighbouring tiles share at least, fewer than `side`.
    """

    side: int
    overlap: int

    def starts(self, length: int) -> list[int]:
        """The pixels at which tiles begin along a side of so many pixels, at least those of a tile."""
        last = length - self.side
        return [*range(0, last, self.side - self.overlap), last]

    def corners(self, size: Sequence[int]) -> list[tuple[int, int]]:
        """The upper left pixel (row, column) of each tile of an image of size (H, W), row by row."""
        height, width = size
        return list(product(self.starts(height), self.starts(width)))

    def weights(self, length: int) -> Tensor:
        """What each pixel of each tile along a side counts in the whole map, float32 [tiles, side].

        It falls linearly from the middle of a tile to its border, and is divided so that the tiles that have a pixel share 1:
        all of it where there is one.
        """
        place = torch.arange(self.side, dtype=torch.float64) + 0.5
        ramp = torch.minimum(place, self.side - place)
        total = torch.zeros(length, dtype=torch.float64)
        pixels = torch.tensor(self.starts(length))[:, None] + torch.arange(self.side)
        total.index_add_(0, pixels.flatten(), ramp.repeat(len(pixels)))
        return (ramp / total[pixels]).float()

    def cut(self, images: Tensor | Images) -> Images:
        """The tiles of images [N, 3, H, W], image by image; nothing is copied. They know their images, `Images.parents`."""
        return Images.of(images).divided(lambda part: Tiles(part, self))

    def check(self, size: Sequence[int], name: str) -> None:
        """Check that an image has room for a tile.

        Args:
            size: its size (H, W), in pixels.
            name: its name, for the error.

        Raises:
            UserError: it has not.
        """
        if min(size) < self.side:
            raise UserError(
                f"dataset.tile={self.side} is larger than {name}, which is {size[1]}x{size[0]}: give a tile of at most "
                f"{min(size)} pixels, or enlarge images with dataset.resize"
            )


class Tiles(Made):
    """The tiles of the images in a tensor, cut out when they are asked for.

    Args:
        part: the images, [N, 3, H, W], uint8, or floats in [0, 1].
        tiling: how they are cut.
    """

    def __init__(self, part: Tensor, tiling: Tiling):
        self.part, self.tiling = part, tiling
        self.corners = tiling.corners(part.shape[-2:])
        self.shape = torch.Size((len(part) * len(self.corners), 3, tiling.side, tiling.side))
        self.dtype, self.device = part.dtype, part.device

    @property
    def _version(self) -> int:  # type: ignore[override]
        return self.part._version

    def made_of(self) -> tuple[Tensor, Any]:
        return self.part, self.tiling

    def made(self, rows: Tensor) -> Tensor:
        found = torch.empty((len(rows), *self.shape[1:]), dtype=self.dtype, device=self.device)
        side = self.tiling.side
        for place, row in enumerate(rows.tolist()):
            image, tile = divmod(row, len(self.corners))
            top, left = self.corners[tile]
            found[place] = self.part[image, :, top : top + side, left : left + side]
        return found
