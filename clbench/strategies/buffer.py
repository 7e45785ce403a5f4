"""The replay buffer: stored images of earlier stages, an equal share for each."""

from collections.abc import Mapping

import torch
from torch import Tensor

from clbench.randomness import generator


class Buffer:
    """At most `size` images in all, an equal share for each stage seen; which ones is random by seed.

    A share that shrinks keeps a random part of what it had. What was held out of a stage's training is stored apart, in
    the proportion that it had, and stays held out when the rest is replayed.

    Attributes:
        parts: for each stage, the stored images that it was learned from and those held out of it, uint8 [M, 3, H, W].
    """

    def __init__(self, size: int, seed: int):
        self.size = size
        self.seed = seed
        self.parts: list[tuple[Tensor, Tensor]] = []

    def add(self, stage: int, learned: Tensor, held_out: Tensor) -> None:
        """Give a new stage its share, and cut the earlier ones down to theirs.

        Args:
            learned, held_out: the stage's images, uint8 [N, 3, H, W].
        """
        parts = [*self.parts, (learned, held_out)]
        shares, extra = divmod(self.size, len(parts))
        self.parts = []
        for owner, pair in enumerate(parts):
            share = shares + (owner < extra)  # what does not divide evenly goes to the oldest stages
            there = sum(map(len, pair))
            count = min(share, there)
            of_held_out = round(count * len(pair[1]) / there) if there else 0
            random = generator(self.seed, "replay buffer", stage, owner)
            kept = []
            for part, size in zip(pair, (count - of_held_out, of_held_out), strict=True):
                order = torch.randperm(len(part), generator=random)[:size].sort().values
                kept.append(part[order.to(part.device)].clone())
            self.parts.append((kept[0], kept[1]))

    def tensors(self) -> dict[str, Tensor]:
        """The stored images by name, for `Strategy.kept`."""
        return {
            f"buffer.{stage}.{kind}": images
            for stage, part in enumerate(self.parts)
            for kind, images in zip(_KINDS, part, strict=True)
        }

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Take over what `tensors` gave."""
        stages = sum(name.startswith("buffer.") for name in tensors) // len(_KINDS)
        learned, held_out = (
            [tensors[f"buffer.{stage}.{kind}"] for stage in range(stages)] for kind in _KINDS
        )
        self.parts = list(zip(learned, held_out, strict=True))


_KINDS = ("learned", "held_out")
