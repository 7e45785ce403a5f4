"""What detectors found out about test images at an earlier stage, so that evaluating them again repeats less of it."""

from typing import Any, NamedTuple

from torch import Tensor

from clbench.data.images import Identity, identities
from clbench.out_of_memory import free_on_gpu

_SHARE_OF_GPU = 8  # of a GPU's free memory, one part in so many


class Found(NamedTuple):
    """What was found out about a batch of images.

    Attributes:
        by: what it was found by, one after the other, of any kind that can be compared: what was found by others says
            nothing.
        tensors: with a row for each image, [B, ...] each.
    """

    by: tuple[Any, ...]
    tensors: tuple[Tensor, ...]


class Recollection:
    """What was found out about batches of images, within a budget of memory; an image is known by its content.

    It belongs to evaluation, which sees the same test images after every stage, and not to what a detector has learned: no
    checkpoint has it and no footprint counts it. A process that continues a run begins without. Predictions are the same
    with it, to the bit. What came first stays: batches come in the same order again and again.

    Args:
        limit: bytes, at most; on a GPU at most an eighth of what is free there when the first batch comes, too.

    Attributes:
        used: bytes.
    """

    def __init__(self, limit: int):
        self.limit, self.used = limit, 0
        self._found: dict[tuple[Identity, ...], Found] = {}
        self._asked_gpu = False

    def get(self, images: Tensor, by: tuple[Any, ...]) -> Found | None:
        """What was put last for a batch of images [B, 3, H, W], by these or by the first of them; None where nothing was."""
        found = self._found.get(tuple(identities(images))) if self._found else None
        return found if found is not None and by[: len(found.by)] == found.by else None

    def put(self, images: Tensor, by: tuple[Any, ...], *tensors: Tensor) -> None:
        """Keep what was found out about a batch of images [B, 3, H, W], in place of what is kept, where there is room.

        Args:
            by, tensors: see `Found`. A tensor that is a view keeps all that it is a view of.
        """
        if not self.limit:
            return
        device = tensors[0].device
        if device.type == "cuda" and not self._asked_gpu:
            self.limit, self._asked_gpu = min(self.limit, free_on_gpu(device) // _SHARE_OF_GPU), True
        batch = tuple(identities(images))
        if (before := self._found.pop(batch, None)) is not None:
            self.used -= _bytes(before)
        found = Found(by, tensors)
        if self.used + _bytes(found) <= self.limit:
            self._found[batch] = found
            self.used += _bytes(found)


def _bytes(found: Found) -> int:
    return sum(tensor.untyped_storage().nbytes() for tensor in found.tensors)
