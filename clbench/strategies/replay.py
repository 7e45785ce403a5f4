"""Replay: stored images of earlier tasks are learned again with each new one."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from clbench.methods.base import Detector
from clbench.randomness import generator
from clbench.strategies.base import Strategy
from clbench.training import split


class Replay(Strategy):
    """Each stage sees its own images and the buffer's; banks and statistics are rebuilt from both
    (but CFA's centroids, which its paper averages under replay too).

    The buffer holds at most `replay_size` images in all, an equal share for each task seen; which ones is
    random by seed. A share that shrinks keeps a random part of what it had. What was held out of a task's
    training stays held out when it is replayed.
    """

    has_buffer = True

    def __init__(self, detector: Detector, **settings: Any):
        super().__init__(detector, **settings)
        self.images = torch.empty(0, dtype=torch.uint8)
        self.counts: list[int] = []  # of each task in the buffer: learned from, held out of it, and so on

    def learn(self, stage: int, images: Tensor) -> None:
        if self.detector.rebuilt_by_replay:
            self.detector.forget()
        parts = self.images.to(images.device).split(self.counts)
        self.fit(self.detector, stage, images, list(zip(parts[::2], parts[1::2], strict=True)))
        self._store(stage, images)

    def _store(self, stage: int, images: Tensor) -> None:
        """Give the new task its share, and cut the old tasks down to theirs, each of both its parts."""
        assert self.replay_size is not None
        parts = [
            *(self.images.split(self.counts) if self.counts else ()),
            *split(images, self.detector.held_out, self.seed, stage),
        ]
        tasks = len(parts) // 2
        shares, extra = divmod(self.replay_size, tasks)
        kept: list[Tensor] = []
        for task in range(tasks):
            learned, held = parts[2 * task : 2 * task + 2]
            share = shares + (task < extra)  # what does not divide evenly goes to the oldest tasks
            count = min(share, len(learned) + len(held))
            of_held = round(count * len(held) / (len(learned) + len(held)))
            random = generator(self.seed, "replay buffer", stage, task)
            for part, size in ((learned, count - of_held), (held, of_held)):
                order = torch.randperm(len(part), generator=random)[:size].sort().values
                kept.append(part[order.to(part.device)].clone())
        self.images = torch.cat(kept)
        self.counts = [len(part) for part in kept]

    def stored_images(self) -> Tensor | None:
        return self.images

    def state(self) -> dict[str, Tensor]:
        return {
            **super().state(),
            "buffer.images": self.images,
            "buffer.counts": torch.tensor(self.counts, dtype=torch.int64),
        }

    def restore(self, state: Mapping[str, Tensor]) -> None:
        super().restore(state)
        self.images = state["buffer.images"]
        self.counts = state["buffer.counts"].tolist()
