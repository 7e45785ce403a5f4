"""Predictions of whole images, put together from those of their tiles."""

from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor

from clbench.data.tiles import Tiling
from clbench.methods.base import Prediction


def whole(
    found: Iterable[Prediction], tiling: Tiling, sizes: Sequence[tuple[int, int]]
) -> Iterator[Prediction]:
    """Predictions of tiles, a batch at a time -> one prediction of each image, its map [1, H, W] and score [1].

    A map is the mean of its tiles' maps by `Tiling.weights`; a score is the highest of the tiles' scores; and the model that was
    chosen is that of most tiles, of equally many the oldest. There is one map at a time.

    Args:
        found: of all tiles of the images, in their order.
        tiling: how the images were cut.
        sizes: of the images, (H, W) in pixels.
    """
    tiles = _one_by_one(found)
    for size in sizes:
        mosaic: Mosaic | None = None
        scores, chosen = list[Tensor](), list[Tensor]()
        for number in range(len(tiling.corners(size))):
            tile = next(tiles)
            mosaic = mosaic or Mosaic(tiling, size, tile.maps.device)
            mosaic.add(number, tile.maps)
            scores.append(tile.scores)
            chosen += [] if tile.chosen is None else [tile.chosen]
        assert mosaic is not None
        most = torch.stack(chosen).bincount().argmax()[None] if chosen else None
        yield Prediction(mosaic.map[None], torch.stack(scores).amax()[None], most)


def _one_by_one(found: Iterable[Prediction]) -> Iterator[Prediction]:
    """The predictions of each image of batches: map [H, W], score and the model chosen, scalars."""
    for batch in found:
        for row in range(len(batch.scores)):
            yield batch.each(lambda of_all, row=row: of_all[row])  # type: ignore[misc]


class Mosaic:
    """The map of one image, put together from the maps of its tiles: no memory beside it grows with the image.

    Args:
        tiling: how the image was cut.
        size: the image's, (H, W) in pixels.
        device: where maps are.

    Attributes:
        map: float32 [H, W], whole once each tile was added.
    """

    def __init__(self, tiling: Tiling, size: Sequence[int], device: torch.device):
        height, width = size
        self._side, self._corners = tiling.side, tiling.corners(size)
        self._rows, self._columns = (tiling.weights(length).to(device) for length in size)
        self.map = torch.zeros(height, width, device=device)

    def add(self, tile: int, found: Tensor) -> None:
        """Add the map of a tile, float32 [side, side]; tiles are numbered as in `Tiling.corners`."""
        top, left = self._corners[tile]
        row, column = divmod(tile, len(self._columns))
        weight = self._rows[row, :, None] * self._columns[column]
        self.map[top : top + self._side, left : left + self._side].addcmul_(found, weight)
