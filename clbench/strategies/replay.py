"""Replay: stored images of earlier tasks are learned again with each new one."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from clbench.methods.base import Detector
from clbench.randomness import generator
from clbench.strategies.base import Strategy


class Replay(Strategy):
    """Each stage sees its own images and the buffer's; banks and statistics are rebuilt from both
    (but CFA's centroids, which its paper averages under replay too).

    The buffer holds at most `replay_size` images in all, an equal share for each task seen; which ones is
    random by seed. A share that shrinks keeps a random part of what it had.
    """

    replays = True

    def __init__(self, detector: Detector, **settings: Any):
        super().__init__(detector, **settings)
        self.images = torch.empty(0, dtype=torch.uint8)
        self.counts: list[int] = []  # images of each task in the buffer

    def learn(self, stage: int, images: Tensor) -> None:
        if self.detector.rebuilt_by_replay:
            self.detector.forget()
        self.fit(self.detector, stage, images, self.images.to(images.device).split(self.counts))
        self._store(stage, images)

    def _store(self, stage: int, images: Tensor) -> None:
        """Give the new task its share, and cut the old tasks down to theirs."""
        assert self.replay_size is not None
        shares, extra = divmod(self.replay_size, len(self.counts) + 1)
        kept = [*self.images.split(self.counts), images] if self.counts else [images]
        for task, stored in enumerate(kept):
            share = shares + (task < extra)  # what does not divide evenly goes to the oldest tasks
            random = generator(self.seed, "replay buffer", stage, task)
            order = torch.randperm(len(stored), generator=random)[:share].sort().values
            kept[task] = stored[order.to(stored.device)].clone()
        self.images = torch.cat(kept)
        self.counts = [len(stored) for stored in kept]

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
