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
    query_norms = queries.square().sum(1)
    distances = torch.empty(len(sizes), len(queries), device=queries.device)
    rows = torch.empty(len(sizes), len(queries), dtype=torch.int64, device=queries.device)
    step = max(1, _BLOCK // max(sizes))
    begin = 0
    for index, size in enumerate(sizes):
        entries, entry_norms = bank[begin : begin + size], norms[begin : begin + size]
        for first in range(0, len(queries), step):
            part = slice(first, first + step)
            # |b|^2 - 2 q.b: the query's own norm does not change which entry is nearest
            values, found = torch.addmm(entry_norms, queries[part], entries.T, alpha=-2).min(1)
            distances[index, part] = values
            rows[index, part] = found + begin
        begin += size
    return distances.add_(query_norms).clamp_(min=0).sqrt_(), rows
