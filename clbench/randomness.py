"""Randomness as a function of what it is for: no generator lives longer than its purpose."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def seed_for(seed: int, *purpose: str | int) -> int:
    """A 63-bit seed that depends on `seed` and on every word of `purpose`, and on nothing else."""
    words = "\x1f".join(str(word) for word in (seed, *purpose))
    return int.from_bytes(hashlib.blake2b(words.encode(), digest_size=8).digest(), "little") >> 1


def generator(seed: int, *purpose: str | int) -> torch.Generator:
    """A fresh CPU generator for one purpose, e.g. `generator(seed, "replay buffer", task)`.

    A resumed run asks for the same purposes and so draws the same numbers.
    """
    import torch  # here, as datasets that draw with numpy do without

    return torch.Generator().manual_seed(seed_for(seed, *purpose))
