"""Features of images that a frozen network has seen, kept within a budget of memory and, beside a CPU, of disk."""

import os
import tempfile
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from clbench.data.images import Identity, Images
from clbench.out_of_memory import free_on_gpu

_SEGMENT = 256 * 10**6  # bytes of disk taken at a time


def on_disk(floats: int) -> Tensor:
    """Zeros, float32 [floats], mapped from an unnamed temporary file that goes when the tensor goes.

    Raises:
        OSError: the disk has no room for all of it. The room is taken now, so that no later write can fail.
    """
    with tempfile.TemporaryFile(prefix="clbench-") as file:
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(file.fileno(), 0, 4 * floats)
        else:
            for begin in range(0, 4 * floats, _SEGMENT):
                file.write(bytes(min(_SEGMENT, 4 * floats - begin)))
            file.flush()
        return torch.from_numpy(np.memmap(file, np.float32, mode="r+", shape=(floats,)))


class FeatureStore:
    """Levels of features by image content: in memory up to a limit, then in temporary files, then not at all.

    An image is known by its content: the same image is found again in any stage, split or replay buffer, and
    a detector need not know that there is a store. What came first stays: images are seen in the same order
    again and again, where dropping the oldest would make every pass miss. But test images in memory make room for training
    images, which every epoch sees.

    A GPU's features stay in its memory: half of what is free there when the first are kept, at most, and no disk.

    Args:
        memory_limit: bytes of memory for features, at most.
        disk_limit: bytes of temporary files for what memory has no room for, at most.

    Attributes:
        memory_limit: as given, or what a GPU allows where that is less.
        by_gpu: whether it is what a GPU allows.
        paused: True while nothing is to be found or kept.
        learning: True while training images are seen, whose features `release` drops after the stage.
        full: whether there was no room for the image that came last.
        given: levels that somebody else keeps, such as a replay buffer: they are found as those that are kept here, as
            float32, and are neither counted nor dropped here.
    """

    def __init__(self, memory_limit: int, disk_limit: int):
        self.memory_limit, self.disk_limit = memory_limit, disk_limit
        self.memory_used = self.disk_used = 0
        self.paused = self.learning = self.full = self.by_gpu = False
        self.given: Mapping[Identity, Sequence[Tensor]] = {}
        self._entries: dict[Identity, list[Tensor]] = {}
        self._places: dict[Identity, Tensor] = {}  # on disk
        self._free: dict[int, list[Tensor]] = {}  # places on disk that were released, by length
        self._segment = torch.empty(0)  # the free rest of the newest piece of disk
        self._learned: set[Identity] = set()
        self._tests: dict[Identity, None] = {}  # images in memory that no stage learns from
        self._limited = False  # whether a GPU was asked what it has free

    def get(self, image: Identity) -> list[Tensor] | None:
        """The levels [C_l, H_l, W_l] of an image; None where they are not kept."""
        if self.paused:
            return None
        given = self.given.get(image)
        return self._entries.get(image) if given is None else [level.float() for level in given]

    def put(self, image: Identity, levels: list[Tensor]) -> None:
        """Keep the levels [C_l, H_l, W_l] of an image, where there is room for them."""
        if self.paused or image in self._entries:
            return
        device = levels[0].device
        if device.type == "cuda" and not self._limited:
            allowed = free_on_gpu(device) // 2
            self.by_gpu, self._limited = allowed < self.memory_limit, True
            self.memory_limit = min(self.memory_limit, allowed)
        floats = sum(level.numel() for level in levels)
        kept = self._in_memory(image, levels, floats)
        while not kept and self.learning and self._tests:
            self._make_room(next(reversed(self._tests)))
            kept = self._in_memory(image, levels, floats)
        self.full = not (kept or self._on_disk(image, levels, floats))
        if self.learning and not self.full:
            self._learned.add(image)

    def _in_memory(self, image: Identity, levels: list[Tensor], floats: int) -> bool:
        """Keep an image's levels, so many numbers, in memory; False where it has no room."""
        if self.memory_used + 4 * floats > self.memory_limit:
            return False
        self._entries[image] = [level.clone() for level in levels]
        self.memory_used += 4 * floats
        if not self.learning:
            self._tests[image] = None
        return True

    def _on_disk(self, image: Identity, levels: list[Tensor], floats: int) -> bool:
        """Keep an image's levels, so many numbers, on disk; False where it has no room, or they are a GPU's."""
        place = self._place(floats) if levels[0].device.type == "cpu" else None
        if place is None:
            return False
        parts = place.split([level.numel() for level in levels])
        kept = [part.view(level.shape) for part, level in zip(parts, levels, strict=True)]
        for part, level in zip(kept, levels, strict=True):
            part.copy_(level)
        self._entries[image], self._places[image] = kept, place
        self.disk_used += 4 * floats
        return True

    def _make_room(self, image: Identity) -> None:
        """Give up an image's place in memory for one on disk, where there is one."""
        levels = self._entries[image]
        self._drop(image)
        self._on_disk(image, levels, sum(level.numel() for level in levels))

    def _drop(self, image: Identity) -> None:
        """Forget an image's levels."""
        size = 4 * sum(level.numel() for level in self._entries.pop(image))
        self._tests.pop(image, None)
        if (place := self._places.pop(image, None)) is not None:
            self._free.setdefault(len(place), []).append(place)
            self.disk_used -= size
        else:
            self.memory_used -= size

    def release(self, keep: Images | None) -> None:
        """Drop the features of training images, which are not seen after their stage.

        Args:
            keep: images that will be learned again and so stay, uint8 [M, 3, H, W]; None for none.
        """
        again = set(keep.identities(torch.arange(len(keep)))) if keep is not None else set()
        for image in self._learned - again:
            self._drop(image)
        self._learned &= again
        self.full = False

    def _place(self, floats: int) -> Tensor | None:
        """A free place for so many floats on disk, float32 [floats]; None where there is none."""
        if self.disk_used + 4 * floats > self.disk_limit:
            return None
        if self._free.get(floats):
            return self._free[floats].pop()
        if len(self._segment) < floats:
            room = self.disk_limit - self.disk_used
            try:
                self._segment = on_disk(max(min(_SEGMENT, room) // 4, floats))
            except OSError:
                self.disk_limit = self.disk_used  # computing again is slower, but it is right
                return None
        place, self._segment = self._segment[:floats], self._segment[floats:]
        return place
