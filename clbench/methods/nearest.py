"""Nearest neighbours in memory banks: matrix products and minima, never a whole distance matrix."""

import math

import torch
from torch import Tensor

_BLOCK = 1 << 22  # distances held at a time: 16 MB
_GROUP = 64  # distances that are reduced to their minimum before the nearest is looked for


def nearest(queries: Tensor, bank: Tensor, sizes: list[int]) -> tuple[Tensor, Tensor]:
    """The nearest entry of each of several banks, for each query.

    Args:
        queries: float32 [Q, D].
        bank: the banks one after the other, float32 [sum of sizes, D].
        sizes: entries of each of the K banks.

    Returns:
        Euclidean distances float32 [K, Q] and rows of `bank` int64 [K, Q].
    """
    norms = bank.square().sum(1)
    distances = torch.empty(len(sizes), len(queries), device=queries.device)
    rows = torch.empty(len(sizes), len(queries), dtype=torch.int64, device=queries.device)
    widest = _GROUP * math.ceil(max(sizes) / _GROUP)
    step = max(1, min(_BLOCK // max(widest, queries.shape[1]), len(queries)))
    memory = queries.new_empty(step * widest)
    end = 0
    for index, size in enumerate(sizes):
        begin, end = end, end + size
        entries, entry_norms = bank[begin:end], norms[begin:end]
        width = _GROUP * math.ceil(size / _GROUP)
        block = memory[: step * width].view(step, width)
        block[:, size:] = math.inf
        for first in range(0, len(queries), step):
            part = queries[first : first + step]
            # |b|^2 - 2 q.b: the query's own norm does not change which entry is nearest
            products = block[: len(part)]
            torch.addmm(entry_norms, part, entries.T, alpha=-2, out=products[:, :size])
            found = _smallest(products)
            rows[index, first : first + step] = found + begin
            # By differences, since the product cancels where the distance is small.
            distances[index, first : first + step] = (part - entries[found]).square_().sum(1).sqrt_()
    return distances, rows


def _smallest(values: Tensor) -> Tensor:
    """argmin over each row [Q, W]: minima of groups vectorise where an argmin does not."""
    groups = values.view(len(values), -1, _GROUP)
    group = groups.amin(2).argmin(1)
    inside = groups[torch.arange(len(values), device=values.device), group].argmin(1)
    return group * _GROUP + inside
