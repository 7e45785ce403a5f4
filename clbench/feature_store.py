"""Features of images that a frozen network has seen, kept within a budget of memory and then of disk."""

import os
import tempfile

import numpy as np
import torch
from torch import Tensor

from clbench.randomness import generator

Key = tuple[int, int]

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
    again and again, where dropping the oldest would make every pass miss.

    Args:
        memory_limit: bytes of memory for features, at most.
        disk_limit: bytes of temporary files for what memory has no room for, at most.

    Attributes:
        paused: True while nothing is to be found or kept.
        learning: True while training images are seen, whose features `release` drops after the stage.
    """

    def __init__(self, memory_limit: int, disk_limit: int):
        self.memory_limit, self.disk_limit = memory_limit, disk_limit
        self.memory_used = self.disk_used = 0
        self.paused = self.learning = False
        self._entries: dict[Key, list[Tensor]] = {}
        self._places: dict[Key, Tensor] = {}  # on disk
        self._free: dict[int, list[Tensor]] = {}  # places on disk that were released, by length
        self._segment = torch.empty(0)  # the free rest of the newest piece of disk
        self._learned: set[Key] = set()
        self._weights: Tensor | None = None

    def keys(self, images: Tensor) -> list[Key]:
        """Images [B, 3, H, W], uint8 or float32 -> their keys, two independent 64-bit sums over pixels."""
        flat = images.reshape(len(images), -1)
        flat = flat.view(torch.int32) if flat.dtype == torch.float32 else flat
        if self._weights is None or self._weights.shape[1] != flat.shape[1]:
            bounds = -(2**62), 2**62
            random = generator(0, "feature store")
            self._weights = torch.randint(*bounds, (2, flat.shape[1]), generator=random) | 1
        weights = self._weights = self._weights.to(images.device)
        # One image and one sum at a time: products of a whole batch would take 16 times its bytes.
        sums = torch.stack([torch.stack([(row * weight).sum() for weight in weights]) for row in flat])
        return [(first, second) for first, second in sums.tolist()]

    def get(self, key: Key) -> list[Tensor] | None:
        """The levels [C_l, H_l, W_l] of the image with this key; None where they are not kept."""
        return None if self.paused else self._entries.get(key)

    def put(self, key: Key, levels: list[Tensor]) -> None:
        """Keep the levels [C_l, H_l, W_l] of the image with this key, where there is room for them."""
        if self.paused or key in self._entries:
            return
        floats = sum(level.numel() for level in levels)
        if self.memory_used + 4 * floats <= self.memory_limit:
            self._entries[key] = [level.clone() for level in levels]
            self.memory_used += 4 * floats
        elif (place := self._place(floats)) is not None:
            parts = place.split([level.numel() for level in levels])
            kept = [part.view(level.shape) for part, level in zip(parts, levels, strict=True)]
            for part, level in zip(kept, levels, strict=True):
                part.copy_(level)
            self._entries[key], self._places[key] = kept, place
            self.disk_used += 4 * floats
        else:
            return
        if self.learning:
            self._learned.add(key)

    def release(self, keep: Tensor | None) -> None:
        """Drop the features of training images, which are not seen after their stage.

        Args:
            keep: images that will be learned again and so stay, uint8 [M, 3, H, W]; None for none.
        """
        again = set(self.keys(keep)) if keep is not None and len(keep) else set()
        for key in self._learned - again:
            size = 4 * sum(level.numel() for level in self._entries.pop(key))
            if (place := self._places.pop(key, None)) is not None:
                self._free.setdefault(len(place), []).append(place)
                self.disk_used -= size
            else:
                self.memory_used -= size
        self._learned &= again

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
