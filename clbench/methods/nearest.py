"""Nearest neighbours in memory banks: matrix products and minima, never a whole distance matrix."""

import torch
from torch import Tensor

_BLOCK = 1 << 22  # distances held at a time: 16 MB


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
    step = max(1, _BLOCK // max(*sizes, queries.shape[1]))
    end = 0
    for index, size in enumerate(sizes):
        begin, end = end, end + size
        entries, entry_norms = bank[begin:end], norms[begin:end]
        for first in range(0, len(queries), step):
            part = slice(first, first + step)
            # |b|^2 - 2 q.b: the query's own norm does not change which entry is nearest
            found = torch.addmm(entry_norms, queries[part], entries.T, alpha=-2).argmin(1)
            rows[index, part] = found + begin
            # By differences, since the product cancels where the distance is small.
            distances[index, part] = (queries[part] - entries[found]).square_().sum(1).sqrt_()
    return distances, rows
