"""The replay buffer: stored images of earlier stages, an equal share for each."""

from collections.abc import Mapping

import torch
from torch import Tensor

from clbench.data.images import Images
from clbench.randomness import generator


class Buffer:
    """Stored images: an equal share for each stage seen, chosen at random by seed.

    A share that shrinks keeps a random part of itself. Images that were held out of a stage's training are
    stored apart, in the proportion that they had, and stay held out when the others are replayed.

    Args:
        size: number of images in all, at most.
        seed: seed of the choice.

    Attributes:
        shares: for each stage, the stored images that it was learned from and those held out of it, both
            uint8 [M, 3, H, W], on the CPU.
    """

    def __init__(self, size: int, seed: int):
        self.size = size
        self.seed = seed
        self.shares: list[tuple[Tensor, Tensor]] = []

    def add(
        self, stage: int, learned: Tensor | Images, held_out: Tensor | Images
    ) -> list[tuple[Tensor, Tensor]]:
        """Store images of a new stage, and cut the shares of the earlier ones to the same size.

        Args:
            stage: 0-based.
            learned, held_out: the stage's images, uint8 [N, 3, H, W].

        Returns:
            For each stage, which of its images stay, int64 and ascending: of those that were stored so far, or for
            the new stage were given. What else is kept of an image stays with it by that.
        """
        shares = [
            (Images.of(learned).on(_CPU), Images.of(held_out).on(_CPU))
            for learned, held_out in (*self.shares, (learned, held_out))
        ]
        whole, extra = divmod(self.size, len(shares))
        self.shares = []
        rows: list[tuple[Tensor, Tensor]] = []
        for owner, share in enumerate(shares):
            stored = sum(map(len, share))
            # What does not divide evenly goes to the oldest stages.
            count = min(whole + (owner < extra), stored)
            count_held_out = round(count * len(share[1]) / stored) if stored else 0
            random = generator(self.seed, "replay buffer", stage, owner)
            sizes = count - count_held_out, count_held_out
            first, second = (
                torch.randperm(len(images), generator=random)[:size].sort().values
                for images, size in zip(share, sizes, strict=True)
            )
            rows.append((first, second))
            self.shares.append((share[0][first], share[1][second]))
        return rows

    def tensors(self) -> dict[str, Tensor]:
        """The stored images, name -> uint8 [M, 3, H, W], for `Strategy.kept`."""
        return {
            f"{PREFIX}{stage}.{kind}": images
            for stage, share in enumerate(self.shares)
            for kind, images in zip(_KINDS, share, strict=True)
        }

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Take what `tensors` gave, which may be among others."""
        stages = sum(name.startswith(PREFIX) for name in tensors) // len(_KINDS)
        learned, held_out = (
            [tensors[f"{PREFIX}{stage}.{kind}"].cpu() for stage in range(stages)] for kind in _KINDS
        )
        self.shares = list(zip(learned, held_out, strict=True))


PREFIX = "buffer."  # of the names of its tensors
_KINDS = ("learned", "held_out")
_CPU = torch.device("cpu")
