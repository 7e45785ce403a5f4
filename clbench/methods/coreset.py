"""Farthest-first coresets (greedy k-center) at the speed of matrix products."""

import math
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from clbench.precision import single_precision

# Points whose distances are brought up to date at a time: one block of distances stays near the cache.
_CHUNK = 4096
_SHARE = 8  # of a position's points, one in so many makes the pool, and
_LEAST = 64  # at least so many
_AT_ONCE = 1 << 16  # points whose norms are computed at a time, so that no second copy of all is made
_TOGETHER = 1 << 27  # numbers of points that are worked on at a time on a GPU: 512 MB


def farthest_first(
    points: Tensor,
    count: int,
    start: int = 0,
    pool: int = 1024,
    progress: Callable[[int], None] = lambda chosen: None,
) -> Tensor:
    """Indices int64 [min(count, N)] of a greedy k-center of `points` [N, D], in the order they are chosen.

    Each index after `start` is that of the point farthest from those before it, so every prefix is itself
    the coreset of its size (PatchCore's minimax facility location, Roth et al., 2022, eq. 5).

    Exact, without a pass over all points per choice: the `pool` points that are farthest from the centers
    are searched alone for as long as their maximum is at least the largest distance outside the pool.
    Distances only shrink, so each such choice is the farthest of all points. Then one matrix product brings
    all points up to date with the centers that were chosen.

    In single precision whatever gpu.precision is: small differences decide.

    Memory beside the points: 4 bytes a point, and blocks of 4,096 x (centers chosen from one pool).

    Args:
        points: float32 [N, D], on any device.
        count: how many to choose.
        start: index of the first one.
        pool: how many points are searched alone at a time, the farthest; the choice does not depend on it.
        progress: called with the number chosen so far.
    """
    with single_precision(points.device):
        return _farthest_first(points, count, start, pool, progress)


def _farthest_first(
    points: Tensor, count: int, start: int, pool: int, progress: Callable[[int], None]
) -> Tensor:
    total = len(points)
    count = min(count, total)
    norms = torch.cat([part.square().sum(1) for part in points.split(_AT_ONCE)])
    distances = torch.full((total,), math.inf, device=points.device, dtype=points.dtype)
    chosen = torch.empty(count, dtype=torch.int64, device=points.device)
    chosen[0] = start
    done, fresh = 1, 1
    while done < count:
        _shrink(distances, points, norms, chosen[done - fresh : done])
        distances[chosen[done - fresh : done]] = -1.0  # a center is never chosen again, duplicates or not
        size = min(pool, total)
        farthest = distances.topk(min(size + 1, total))
        outside = float(farthest.values[-1]) if size < total else -math.inf
        candidates = farthest.indices[:size]
        picked = _search_pool(
            points[candidates], farthest.values[:size], outside, min(count - done, size - 1 or 1)
        )
        fresh = len(picked)
        chosen[done : done + fresh] = candidates[picked]
        done += fresh
        progress(done)
    return chosen


def _search_pool(points: Tensor, distances: Tensor, outside: float, count: int) -> Tensor:
    """Farthest-first inside a pool [B, D] while it is known to be global: at most `count` indices, at least 1."""
    norms = points.square().sum(1)
    squared = torch.addmm(norms, points, points.T, alpha=-2).add_(norms[:, None]).clamp_(min=0).cpu().numpy()
    near = distances.clone().cpu().numpy()
    picked: list[int] = []
    while len(picked) < count:
        farthest = int(near.argmax())
        if picked and near[farthest] < outside:
            break
        picked.append(farthest)
        np.minimum(near, squared[farthest], out=near)
        near[farthest] = -1.0
    return torch.tensor(picked, device=points.device)


def farthest_first_at_each(
    points: Tensor, count: int, starts: Tensor, progress: Callable[[int], None] = lambda positions: None
) -> Tensor:
    """A greedy k-center at each of P positions, in the order they are chosen: indices int64 [P, min(count, N)].

    Each is what `farthest_first` gives of the position's points alone. On a CPU one position follows another, whose points
    stay in the cache; elsewhere as many positions as fit go together, with one product of theirs for each center.

    Args:
        points: float32 [P, N, D], on any device; a view is copied a few positions at a time.
        count: how many to choose at each position.
        starts: index of the first one at each position, int64 [P], on the CPU.
        progress: called with the number of positions done so far.
    """
    total = points.shape[1]
    pool = max(_LEAST, total // _SHARE)
    on_cpu = points.device.type == "cpu"
    together = 1 if on_cpu else max(1, _TOGETHER // points[0].numel())
    found = []
    for begin in range(0, len(points), together):
        some = points[begin : begin + together].contiguous()
        with single_precision(points.device):
            if on_cpu:
                chosen = _farthest_first(some[0], count, int(starts[begin]), pool, lambda chosen: None)[None]
            else:
                chosen = _farthest_first_together(some, min(count, total), starts[begin : begin + together])
        found.append(chosen)
        progress(begin + len(some))
    return torch.cat(found)


def _farthest_first_together(points: Tensor, count: int, starts: Tensor) -> Tensor:
    """As `farthest_first_at_each`, at all positions at once; count is at most N."""
    norms = points.square().sum(2)
    distances = torch.full_like(norms, math.inf)
    latest = starts.to(points.device)[:, None]
    chosen = [latest]
    while len(chosen) < count:
        centers = points.gather(1, latest[:, :, None].expand(-1, -1, points.shape[2]))
        squared = torch.baddbmm(norms[:, :, None], points, centers.mT, alpha=-2)[:, :, 0]
        squared = squared.add_(norms.gather(1, latest)).clamp_(min=0)
        distances = torch.minimum(distances, squared).scatter_(1, latest, -1.0)  # none is chosen again
        latest = distances.argmax(1, keepdim=True)
        chosen.append(latest)
    return torch.cat(chosen, 1)


def _shrink(distances: Tensor, points: Tensor, norms: Tensor, centers: Tensor) -> None:
    """distances [N] <- min(distances, squared distance to the nearest of points[centers]), in place."""
    targets, target_norms = points[centers], norms[centers]
    for begin in range(0, len(points), _CHUNK):
        rows = slice(begin, begin + _CHUNK)
        block = torch.addmm(target_norms, points[rows], targets.T, alpha=-2).amin(1)
        nearest = block.add_(norms[rows]).clamp_(min=0)
        torch.minimum(distances[rows], nearest, out=distances[rows])


def projection(features: int, points: int, epsilon: float, generator: torch.Generator) -> Tensor:
    """A random linear map float32 [features, k] that keeps distances between `points` points within epsilon.

    k is the least whole number from the Johnson-Lindenstrauss bound 4 ln(points) / (epsilon^2 / 2 - epsilon^3 / 3)
    on, at most `features`; the entries are Gaussian with variance 1 / k. The paper takes epsilon = 0.9 (supplement,
    1.2.6).

    Args:
        epsilon: relative error of squared distances, between 0 and 1.
    """
    from sklearn.random_projection import johnson_lindenstrauss_min_dim  # a second to import

    # scikit-learn rounds the bound down, which is one too few: ln(points) makes it no whole number.
    bound = int(johnson_lindenstrauss_min_dim(max(points, 2), eps=epsilon)) + 1
    size = min(bound, features)
    return torch.randn(features, size, generator=generator) / math.sqrt(size)
