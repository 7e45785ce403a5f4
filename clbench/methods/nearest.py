"""Nearest neighbours in memory banks, by matrix products and minima, block by block.

A whole distance matrix is held only in graphs traced for export: other runtimes have no use for blocks.
"""

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

_DISTANCES = 1 << 22  # distances held at a time: 16 MB
_GROUP = 64  # neighbouring distances of which only the minimum is looked at first


def nearest(queries: Tensor, bank: Tensor, sizes: list[int]) -> tuple[Tensor, Tensor]:
    """The nearest entry of each of several banks for each query.

    Args:
        queries: float32 [Q, D].
        bank: the banks one after the other, float32 [sum of sizes, D].
        sizes: numbers of entries of the K banks.

    Returns:
        Euclidean distances float32 [K, Q] and rows of `bank` int64 [K, Q].
    """
    if torch.compiler.is_compiling():
        return _nearest_traced(queries, bank, sizes)
    norms = bank.square().sum(1)
    distances = torch.empty(len(sizes), len(queries), device=queries.device)
    rows = torch.empty(len(sizes), len(queries), dtype=torch.int64, device=queries.device)
    widest = _GROUP * math.ceil(max(sizes) / _GROUP)
    step = max(1, min(_DISTANCES // max(widest, queries.shape[1]), len(queries)))
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
            # From differences: where a distance is small, rounding of the products would be all of it.
            distances[index, first : first + step] = (part - entries[found]).square_().sum(1).sqrt_()
    return distances, rows


def _nearest_traced(queries: Tensor, bank: Tensor, sizes: list[int]) -> tuple[Tensor, Tensor]:
    distances, rows = [], []
    begin = 0
    for entries in bank.split(sizes):
        found = torch.addmm(entries.square().sum(1), queries, entries.T, alpha=-2).argmin(1)
        distances.append((queries - entries[found]).square().sum(1).sqrt())
        rows.append(found + begin)
        begin += len(entries)
    return torch.stack(distances), torch.stack(rows)


def k_nearest(queries: Tensor, bank: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k nearest entries of a bank for each query, nearest first; queries get gradients, the bank does not.

    Args:
        queries: float32 [Q, D].
        bank: float32 [M, D], M >= k.

    Returns:
        Squared Euclidean distances float32 [Q, k] and rows of `bank` int64 [Q, k].
    """
    if torch.compiler.is_compiling():
        products = torch.addmm(bank.square().sum(1), queries, bank.T, alpha=-2)
        smallest, rows = products.topk(k, largest=False)
        return (smallest + queries.square().sum(1, keepdim=True)).clamp_min(0), rows
    distances, rows = _KNearest.apply(queries, bank, k)
    return distances, rows


class _KNearest(torch.autograd.Function):
    """`k_nearest` with a gradient that needs k entries a query, and no second product with the whole bank."""

    @staticmethod
    def forward(ctx: Any, queries: Tensor, bank: Tensor, k: int) -> tuple[Tensor, Tensor]:
        queries = queries.float()  # small distances are differences: half precision would lose them
        norms = bank.square().sum(1)
        width = _GROUP * math.ceil(len(bank) / _GROUP)
        step = max(1, min(_DISTANCES // width, len(queries)))
        block = queries.new_full((step, width), math.inf)
        distances = queries.new_empty(len(queries), k)
        rows = torch.empty(len(queries), k, dtype=torch.int64, device=queries.device)
        for first in range(0, len(queries), step):
            part = queries[first : first + step]
            products = block[: len(part)]
            torch.addmm(norms, part, bank.T, alpha=-2, out=products[:, : len(bank)])
            smallest, rows[first : first + step] = _k_smallest(products, k)
            distances[first : first + step] = smallest + part.square().sum(1, keepdim=True)
        ctx.save_for_backward(queries, bank, rows)
        ctx.mark_non_differentiable(rows)
        return distances.clamp_min_(0), rows

    @staticmethod
    def backward(ctx: Any, gradient: Tensor, _: Tensor) -> tuple[Tensor, None, None]:
        # d |q - b|^2 / dq = 2 (q - b), summed over the k entries with the weights that come back
        queries, bank, rows = ctx.saved_tensors
        towards = F.embedding_bag(rows, bank, per_sample_weights=gradient.contiguous(), mode="sum")
        return 2 * (queries * gradient.sum(1, keepdim=True) - towards), None, None


def _k_smallest(values: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k smallest of each row [Q, W], and their columns, both [Q, k].

    They lie in the k groups with the smallest minima.
    """
    groups = values.view(len(values), -1, _GROUP)
    nearest_groups = groups.amin(2).topk(min(k, groups.shape[1]), largest=False).indices
    candidates = groups.gather(1, nearest_groups[:, :, None].expand(-1, -1, _GROUP)).flatten(1)
    smallest, inside = candidates.topk(k, largest=False)
    return smallest, nearest_groups.gather(1, inside // _GROUP) * _GROUP + inside % _GROUP


def _smallest(values: Tensor) -> Tensor:
    """The column of the smallest value of each row [Q, W]: [Q].

    By minima of groups, which vectorise where an argmin does not.
    """
    groups = values.view(len(values), -1, _GROUP)
    group = groups.amin(2).argmin(1)
    inside = groups[torch.arange(len(values), device=values.device), group].argmin(1)
    return group * _GROUP + inside
