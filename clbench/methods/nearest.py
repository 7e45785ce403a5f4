"""Nearest neighbours in memory banks: the same entries and distances however they are looked for.

The nearest entry of a query is the one with the smallest squared distance as single precision computes it from
differences, and of several such the first. Entries that cannot be it are left out by lower bounds on distances: those of
a plain product, |q - b|^2 = |q|^2 + |b|^2 - 2 q.b, less what it rounds, or of a narrower one (`clbench.methods.bounds`).

With g(n) = 1.01 n 2^-24, the relative error of n roundings of numbers of one sign: a squared distance from differences has
D + 2 of them, so an entry can only be nearest where |q - b|^2 <= s (1 + 2 g(D + 2)) + `TINY`, with s that of any other.
|b|^2 - 2 q.b is off by at most g(D + 2) (|q|^2 + 2 |b|^2), as its terms add up to |b|^2 + 2 |q| |b|, and norms are off by
less. So entries with fl(|b|^2 (1 - 5 g) - 2 q.b) > s (1 + 2 g) - |q|^2 (1 - 5 g), where g is g(D + 8), are not nearest.

Nothing else decides: not which bounds were quicker, how large blocks are, nor what a GPU has free. So a squared distance must
be the same whichever others are computed beside it, and so must an image's mean distance: see `_of_rows`.

A whole distance matrix is held only in graphs traced for export: other runtimes have no use for blocks.
"""

import functools
import itertools
import math
import threading
import time
import warnings
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from clbench.methods.bounds import GROUP, TINY, Bounds, bounds_of, gamma, whole_sums
from clbench.out_of_memory import free_on_gpu
from clbench.precision import single_precision

_BYTES = 1 << 24  # of numbers held at a time on the CPU: about the caches' size
_GPU_BYTES = 1 << 28  # on a GPU: enough work for a launch
_PIECE = 4096  # entries searched at a time on the CPU
_WORTH = 8  # bounds are prepared for a bank after so many whole queries a feature: that takes about as long
_LEAST = 512  # entries of a bank, on average, from which on bounds are tried
_TRIALS = 2  # blocks of queries that bounds are timed on
_CROWDED = 8  # where bounds leave more than one pair in so many, plain products are quicker
_LOOKED = 1 << 18  # values that are looked at one by one at a time, or a sixteenth of a block
_SUMMED = 64  # rows that a GPU sums at a time, at least
_FAR = 2.0**100  # more than any distance
_LAST = torch.iinfo(torch.int64).max


class Closest(NamedTuple):
    """The bank that each image's patches are nearest to on average, and what helps to find it again.

    Attributes:
        selected: the index of the bank, int64 [B].
        distances: of each patch to its nearest entry there, float32 [B, P].
        rows: of that entry among those of all banks, int64 [B, P].
        least: what the image's mean distance to each bank is not below, float32 [B, K]: nor is that to a bank's first
            entries alone.
    """

    selected: Tensor
    distances: Tensor
    rows: Tensor
    least: Tensor

    @staticmethod
    def concatenated(several: Sequence["Closest"]) -> "Closest":
        """Those of images one after the other."""
        return Closest(*map(torch.cat, zip(*several, strict=True)))


def nearest(queries: Tensor, bank: Tensor, sizes: list[int]) -> tuple[Tensor, Tensor]:
    """The nearest entry of each of several banks for each query, where banks are searched once; else see `Search`."""
    return Search()(queries, bank, sizes)


class Search:
    """Nearest entries of banks that stay the same over many calls: what helps to search them is kept between calls.

    A bank's first queries are searched by plain products. Then bounds are prepared, and go on if they are quicker.

    Memory, until the tensor that holds the banks goes or is changed: 4 bytes an entry, and on the CPU a block of 16 MB;
    with bounds, 0.3 times the banks' for patches of ResNet-18, and at most 0.5 times, or where bfloat16 is slow as much.
    """

    def __init__(self) -> None:
        self._banks: _Banks | None = None
        self._alone = threading.Lock()  # what is kept is written to in every call

    def __deepcopy__(self, memo: dict) -> "Search":
        return Search()  # banks are copied with it

    def __call__(self, queries: Tensor, bank: Tensor, sizes: list[int]) -> tuple[Tensor, Tensor]:
        """The nearest entry of each bank for each query. On a GPU: three waits for each bank and block of queries.

        Args:
            queries: float32 [Q, D], without gradients.
            bank: the banks one after the other, float32 [sum of sizes, D], without gradients. Squared norms are below
                2^120: for others some entry is found.
            sizes: numbers of entries of the K banks, none of them 0.

        Returns:
            Euclidean distances float32 [K, Q] and rows of `bank` int64 [K, Q].
        """
        if torch.compiler.is_compiling():
            return _nearest_traced(queries, bank, sizes)
        with self._alone, single_precision(queries.device), whole_sums():
            return self._known(bank, sizes).nearest(queries.contiguous(), bank.contiguous())

    def closest_bank(
        self, queries: Tensor, bank: Tensor, sizes: list[int], before: Closest | None = None
    ) -> Closest:
        """The bank that each image's patches are nearest to on average, the first of several.

        Banks are not searched for an image where a lower bound on its mean distance is above its mean distance to
        another. On a GPU: four waits for each bank that is searched for a block of images, and two more.

        Args:
            queries: patches of images, float32 [B, P, D].
            bank, sizes: as for a call.
            before: what was found for the same patches in the first of these banks, which may have been cut since to their
                first entries: rows from the bank's present beginning on, beyond its end where the entry was cut off. Those
                patches are searched for again in their bank, and all patches in new banks. What is found is the same.
        """
        images, patches, _ = queries.shape
        if torch.compiler.is_compiling():
            distances, rows = _nearest_traced(queries.flatten(0, 1), bank, sizes)
            return _closest(distances.view(-1, images, patches), rows.view(-1, images, patches))
        with self._alone, single_precision(queries.device), whole_sums():
            return self._known(bank, sizes).closest(queries.contiguous(), bank.contiguous(), before)

    def _known(self, bank: Tensor, sizes: list[int]) -> "_Banks":
        if self._banks is None or not self._banks.are(bank, sizes):
            self._banks = None  # what is kept of others goes first
            owner = weakref.ref(self)
            self._banks = _Banks(bank, sizes, lambda _: _forget(owner))
        return self._banks


def _forget(owner: "weakref.ref[Search]") -> None:
    if search := owner():
        search._banks = None


def _closest(distances: Tensor, rows: Tensor) -> Closest:
    """The first bank with the smallest mean of distances, where all were searched: distances and rows [K, B, P]."""
    means = _of_rows(torch.mean, distances.flatten(0, 1)).view(distances.shape[:2])
    selected = means.argmin(0)
    each = torch.arange(distances.shape[1], device=distances.device)
    least = _lowered(means, distances.shape[2]).T
    return Closest(selected, distances[selected, each], rows[selected, each], least)


def _lowered(means: Tensor, count: int) -> Tensor:
    """What is not above means of so many distances, as single precision has them, or of such as are not smaller."""
    return means * (1 - 4 * gamma(count + 2))


class _Banks:
    """What is known of some banks, and how they are searched.

    Args:
        bank, sizes: as in `Search`.
        gone: called when the tensor `bank` goes.
    """

    def __init__(self, bank: Tensor, sizes: list[int], gone: Callable[[Any], None]):
        self._bank, self._version, self._sizes = weakref.ref(bank, gone), _version(bank), list(sizes)
        self._ends = torch.tensor([*itertools.accumulate(sizes)], device=bank.device)
        self._on_cpu = bank.device.type == "cpu"
        self._error = gamma(bank.shape[1] + 8)
        self._norms = self._norms_of(bank)
        self._pieces: list[tuple[int, int]] = []  # first and last row, excluded
        self._pieces_of: list[list[int]] = []  # bank -> its pieces
        longest = _PIECE if self._on_cpu else 16 * _PIECE
        end = 0
        for size in sizes:
            begin, end = end, end + size
            self._norms[begin + _repeated(bank[begin:end])] = math.inf
            count = math.ceil(size / longest)
            cuts = [begin + size * cut // count for cut in range(count + 1)]
            self._pieces_of.append([len(self._pieces) + index for index in range(count)])
            self._pieces += itertools.pairwise(cuts)
        self._small = len(bank) < _LEAST * len(
            sizes
        )  # bounds are not worth it: a product with all banks excludes most
        widest = min(len(bank), longest) if self._small else max(end - begin for begin, end in self._pieces)
        self._widest = GROUP * math.ceil(widest / GROUP)
        self._memory = torch.empty(0, dtype=torch.uint8, device=bank.device)
        self._bounds: Bounds | None = None
        self._prepared = self._small
        self._seen = 0.0  # queries, of which each was held against all entries
        self._longest = 0  # block that was searched by plain products
        self._trials = 0  # of bounds, on no shorter ones
        self._plain = self._with_bounds = math.inf  # seconds a query and an entry, the least

    def _norms_of(self, vectors: Tensor) -> Tensor:
        """Squared norms, less what is rounded in them and in products, float32 [N]."""
        return torch.linalg.vector_norm(vectors, dim=1).square_().mul_(1 - 5 * self._error)

    def are(self, bank: Tensor, sizes: list[int]) -> bool:
        """Whether these are the banks, unchanged."""
        version = _version(bank)
        return (
            self._bank() is bank and version is not None and version == self._version and self._sizes == sizes
        )

    def nearest(self, queries: Tensor, bank: Tensor) -> tuple[Tensor, Tensor]:
        """As a call of `Search`, both contiguous."""
        distances = torch.empty(len(self._sizes), len(queries), device=queries.device)
        rows = torch.empty(len(self._sizes), len(queries), dtype=torch.int64, device=queries.device)
        step = self._block(queries.shape[1])
        for first in range(0, len(queries), step):
            block = slice(first, first + step)
            with self._timed(len(queries[block]), bank, len(bank)):
                distances[:, block], rows[:, block] = self._distances(queries[block], bank)
        self._release()
        return distances, rows

    def closest(self, queries: Tensor, bank: Tensor, before: Closest | None) -> Closest:
        """As `Search.closest_bank`, both contiguous."""
        found: list[Closest] = []
        done = 0
        for part in queries.split(max(1, self._block(queries.shape[2]) // queries.shape[1])):
            rows = slice(done, done + len(part))
            done = rows.stop
            count = len(part) * part.shape[1]
            if before is not None:
                new = len(self._sizes) - before.least.shape[1]
                with self._timed(count, bank, sum(self._sizes[-new:]) if new else 0):
                    found.append(self._again(part, bank, Closest(*(each[rows] for each in before))))
                continue
            with self._timed(count, bank, len(bank)):
                if len(self._sizes) < 2 or not (self._small or self._bounds):
                    distances, where = self._distances(part.flatten(0, 1), bank)
                    shape = len(self._sizes), *part.shape[:2]
                    found.append(_closest(distances.view(shape), where.view(shape)))
                else:
                    found.append(self._routed(part, bank, self._lower_means(part)))
        self._release()
        return Closest.concatenated(found)

    def _again(self, queries: Tensor, bank: Tensor, before: Closest) -> Closest:
        """As `closest`, for a block of images [B, P, D] of which it is known what was closest before."""
        selected, distances, rows, least = (each.clone() for each in before)
        cut = rows >= self._ends[selected][:, None]
        for index in sorted(set(selected.tolist())):
            of = (cut & (selected == index)[:, None]).view(-1).nonzero()[:, 0]
            if len(of):
                again = queries.flatten(0, 1).index_select(0, of)
                (distances.view(-1)[of],), (rows.view(-1)[of],) = self._distances(again, bank, index)
        known = least.shape[1]
        lower = least.new_zeros(len(self._sizes), len(queries))
        lower[:known] = least.T
        if (self._small or self._bounds) and known < len(lower):
            lower[known:] = self._lower_means(queries, known)
        return self._routed(queries, bank, lower, (selected, distances, rows))

    def _block(self, size: int) -> int:
        """How many queries of this size are searched at a time."""
        distances = _room(self._norms.device) // (4 if self._bounds is None else self._bounds.bytes)
        return max(1, distances // max(self._widest, size))

    def _values(self, count: int, kind: torch.dtype) -> Tensor:
        """Memory for so many values, which may have been used before."""
        if len(self._memory) < count * kind.itemsize:
            self._memory = torch.empty(count * kind.itemsize, dtype=torch.uint8, device=self._norms.device)
        return self._memory[: count * kind.itemsize].view(kind)

    def _release(self) -> None:
        if not self._on_cpu:  # PyTorch keeps it, for others too
            self._memory = self._memory[:0].clone()

    @contextmanager
    def _timed(self, count: int, bank: Tensor, entries: int) -> Iterator[None]:
        """Inside, so many queries are searched: by plain products until bounds are worth it, and if they are quicker.

        Args:
            entries: how many of `bank` they are searched in.
        """
        if not self._prepared and self._seen >= _WORTH * bank.shape[1]:
            self._prepared = True
            self._bounds = bounds_of(bank, self._pieces, self._norms.isinf())
        begin = time.perf_counter()
        yield
        self._seen += count * entries / len(bank)
        seconds = (time.perf_counter() - begin) / max(count * entries, 1)
        if self._bounds is None and entries:
            self._plain = min(seconds, self._plain)
            self._longest = max(count, self._longest)
        elif self._trials < _TRIALS and count >= self._longest and entries == len(bank):
            self._trials += 1
            self._with_bounds = min(seconds, self._with_bounds)
            if self._trials == _TRIALS and self._with_bounds > self._plain:
                self._bounds = None

    def _distances(self, queries: Tensor, bank: Tensor, only: int | None = None) -> tuple[Tensor, Tensor]:
        """Distances and rows of a block of queries in all banks, [K, Q] both, or in one, [1, Q]."""
        narrow = None if self._bounds is None else self._bounds.queries(queries)
        norms = self._norms_of(queries)
        nearest = []
        for pieces in self._pieces_of if only is None else [self._pieces_of[only]]:
            found = _Found(queries, bank)
            for piece in pieces:
                self._search(found, norms, narrow, piece)
            nearest.append(found)
        squared = torch.stack([found.squared for found in nearest])
        return squared.sqrt_(), torch.stack([found.rows for found in nearest])

    def _routed(
        self, queries: Tensor, bank: Tensor, lower: Tensor, found: tuple[Tensor, Tensor, Tensor] | None = None
    ) -> Closest:
        """As `closest`, for a block of images [B, P, D], searching only banks that can be an image's closest.

        Args:
            lower: what an image's mean distance to a bank is not below, [K, B]; raised where more is found out.
            found: for each image a bank that was searched, [B], and distances and rows there, [B, P] both: changed in place.
        """
        images, patches, _ = queries.shape
        left = torch.ones_like(lower, dtype=torch.bool)  # what was not searched and can be closest
        if found is None:
            best = torch.full_like(lower[0], math.inf)
            selected = torch.full_like(best, len(lower), dtype=torch.int64)
            distances = queries.new_empty(images, patches)
            rows = torch.empty(images, patches, dtype=torch.int64, device=queries.device)
        else:
            selected, distances, rows = found
            best, each = _of_rows(torch.mean, distances), torch.arange(images, device=queries.device)
            left[selected, each], lower[selected, each] = False, _lowered(best, patches)
        while True:
            left &= ~(lower > best)
            promising = lower.clamp(max=_FAR).where(left, math.inf).argmin(0).where(left.any(0), -1).tolist()
            for index in sorted(set(promising) - {-1}):
                of = torch.tensor([image for image, choice in enumerate(promising) if choice == index])
                of = of.to(queries.device, non_blocking=True)
                part = queries if len(of) == images else queries.index_select(0, of)
                near, at = (one.view(-1, patches) for one in self._distances(part.flatten(0, 1), bank, index))
                mean, before = _of_rows(torch.mean, near), best[of]
                # What is not a number is taken too.
                taken = ~((mean > before) | ((mean == before) & (index > selected[of])))
                best[of], selected[of] = mean.where(taken, before), selected[of].where(~taken, index)
                distances[of] = near.where(taken[:, None], distances[of])
                rows[of] = at.where(taken[:, None], rows[of])
                left[index, of], lower[index, of] = False, _lowered(mean, patches)
            if max(promising) < 0:
                return Closest(selected, distances, rows, lower.T)

    def _lower_means(self, queries: Tensor, first: int = 0) -> Tensor:
        """What an image's mean distance to a bank, as single precision has it, is not below: [B, P, D] -> [K, B].

        Args:
            first: the first bank that is asked for.
        """
        images, patches, _ = queries.shape
        least = self._least(queries.flatten(0, 1), self._pieces_of[first][0])
        squared = [torch.stack([next(least) for _ in pieces]).amin(0) for pieces in self._pieces_of[first:]]
        lower = torch.stack(squared).mul_(1 - 2 * self._error).sub_(TINY).clamp_min_(0).sqrt_()
        return _lowered(lower.view(-1, images, patches).mean(2), patches)

    def _least(self, queries: Tensor, first: int) -> Iterator[Tensor]:
        """For each piece from one on, what the queries' squared distances to its entries are not below, float32 [Q]."""
        if self._bounds is not None:
            rough = self._bounds.rough or self._bounds
            narrow = rough.queries(queries)
            yield from (rough.least(narrow, piece, self._values) for piece in range(first, len(self._pieces)))
            return
        bank = self._bank()
        assert bank is not None
        norms = self._norms_of(queries)
        while first < len(self._pieces):  # as many at a time as the memory is for
            begin, last = self._pieces[first][0], first + 1
            while last < len(self._pieces) and self._pieces[last][1] - begin <= self._widest:
                last += 1
            end = self._pieces[last - 1][1]
            values = self._values((end - begin) * len(queries), torch.float32).view(end - begin, -1)
            torch.addmm(self._norms[begin:end, None], bank[begin:end], queries.T, alpha=-2, out=values)
            for of in values.split([end - begin for begin, end in self._pieces[first:last]]):
                yield of.amin(0).add_(norms)
            first = last

    def _search(self, found: "_Found", norms: Tensor, narrow: Tensor | None, piece: int) -> None:
        """Look for nearer entries in a piece of a bank.

        Args:
            norms: squared, of the queries, less what is rounded, float32 [Q].
            narrow: the queries' side of the bounds; None to search by plain products.
        """
        bounds = None if narrow is None else self._bounds
        if bounds is None or narrow is None:
            values = self._products(found.queries, found.bank, piece)
        else:
            values = bounds.values(narrow, piece, self._values)
        groups = values.view(len(values), -1, GROUP)
        minima = groups.amin(2)
        found.compare(self._rows(piece, bounds, _smallest(groups, minima)))
        # No more than these can be nearer, or as near and before it.
        limit = found.squared * (1 + 2 * self._error) + TINY
        rest = limit - norms
        limits = rest if bounds is None else bounds.limit(limit)
        some = (minima <= limits[:, None]).view(-1).nonzero()[:, 0]
        pairs = 0
        for part in some.split(max(_LOOKED, values.numel() // 16) // GROUP):
            query, columns = _not_above(groups, part, limits)
            pairs += len(query)
            if bounds is not None and _CROWDED * pairs > values.numel():
                self._search(found, norms, None, piece)
                return
            rows = self._rows(piece, bounds, columns)
            nearer = rows != found.rows.index_select(0, query)
            if bounds is not None and self._on_cpu and _sampled():
                products = _sampled_products(found.queries, found.bank, query, rows, self._norms)
                nearer &= products <= rest.index_select(0, query)
            left = nearer.nonzero()[:, 0]
            if len(left):
                found.add(query.index_select(0, left), rows.index_select(0, left))

    def _rows(self, piece: int, bounds: Bounds | None, columns: Tensor) -> Tensor:
        """The rows of the bank that columns of values stand for."""
        if bounds is not None:
            return bounds.rows(piece).index_select(0, columns)
        begin, end = self._pieces[piece]
        return (columns + begin).clamp_(max=end - 1)

    def _products(self, queries: Tensor, bank: Tensor, piece: int) -> Tensor:
        """|b|^2 - 2 q.b less what is rounded, for the entries of a piece, float32 [Q, W]; infinite in the last columns."""
        begin, end = self._pieces[piece]
        width = GROUP * math.ceil((end - begin) / GROUP)
        values = self._values(len(queries) * width, torch.float32).view(-1, width)
        values[:, end - begin :] = math.inf
        torch.addmm(
            self._norms[begin:end], queries, bank[begin:end].T, alpha=-2, out=values[:, : end - begin]
        )
        return values


class _Found:
    """The nearest entries so far.

    Attributes:
        queries: float32 [Q, D].
        bank: float32 [M, D].
        squared: squared distances, float32 [Q].
        rows: of the bank, int64 [Q].
    """

    def __init__(self, queries: Tensor, bank: Tensor):
        self.queries, self.bank = queries, bank
        self.squared, self.rows = torch.empty(0), torch.empty(0)

    def compare(self, rows: Tensor) -> None:
        """Take the entries of these rows, int64 [Q], where they are nearer than those found before."""
        # From differences: where a distance is small, rounding of products would be all of it.
        squared = _of_rows(torch.sum, self.bank.index_select(0, rows).sub_(self.queries).square_())
        if len(self.rows):
            nearer = squared < self.squared
            squared, rows = squared.where(nearer, self.squared), rows.where(nearer, self.rows)
        self.squared, self.rows = squared, rows

    def add(self, query: Tensor, rows: Tensor) -> None:
        """Compare pairs of a query and an entry, int64 [P] both: the nearest is taken, of equals the first."""
        many = _differences(self.bank)
        squared = torch.cat(
            [
                _of_rows(
                    torch.sum,
                    self.bank.index_select(0, some).sub_(self.queries.index_select(0, of)).square_(),
                )
                for of, some in zip(query.split(many), rows.split(many), strict=True)
            ]
        )
        least = self.squared.scatter_reduce(0, query, squared, "amin")
        before = self.rows.where(self.squared == least, _LAST)
        taken = before.scatter_reduce(
            0, query, rows.where(squared == least.index_select(0, query), _LAST), "amin"
        )
        self.rows, self.squared = taken.where(taken != _LAST, self.rows), least


def _of_rows(reduced: Callable[[Tensor, int], Tensor], values: Tensor) -> Tensor:
    """The sum or mean of each row, [N, D] -> [N]: the same number whichever rows are beside it.

    A GPU has more threads for each of few rows, which add it up in another order. So few are filled up with zeros.
    """
    if values.device.type == "cpu" or torch.compiler.is_compiling() or len(values) >= _SUMMED:
        return reduced(values, 1)
    return reduced(F.pad(values, (0, 0, 0, _SUMMED - len(values))), 1)[: len(values)]


def _smallest(groups: Tensor, minima: Tensor) -> Tensor:
    """The column of the smallest value of each row, int64 [Q]: values [Q, G, GROUP], their minima [Q, G].

    By minima of groups, which vectorise where an argmin does not.
    """
    group = minima.argmin(1)
    rows = torch.arange(len(groups), device=groups.device).mul_(minima.shape[1]).add_(group)
    return groups.view(-1, GROUP).index_select(0, rows).argmin(1).add_(group, alpha=GROUP)


def _not_above(groups: Tensor, some: Tensor, limit: Tensor) -> tuple[Tensor, Tensor]:
    """Rows and columns, int64 [P] both, of the values in some groups that are not above their row's limit [Q], by rows.

    Args:
        groups: values [Q, G, GROUP].
        some: which groups, counted over all rows, int64 ascending.
    """
    query = some // groups.shape[1]
    inside = groups.view(-1, GROUP).index_select(0, some) <= limit.index_select(0, query)[:, None]
    pairs = inside.view(-1).nonzero()[:, 0]
    group = pairs // GROUP
    query, column = query.index_select(0, group), some.index_select(0, group).remainder_(groups.shape[1])
    return query, column.mul_(GROUP).add_(pairs.remainder_(GROUP))


def _sampled_products(queries: Tensor, bank: Tensor, query: Tensor, rows: Tensor, norms: Tensor) -> Tensor:
    """norms[row] - 2 q.b for pairs of a query and an entry, sorted by queries: float32 [P], nothing gathered."""
    ends = queries.new_zeros(len(queries) + 1, dtype=torch.int64)
    torch.cumsum(torch.bincount(query, minlength=len(queries)), 0, out=ends[1:])
    shape = len(queries), len(bank)
    pairs = torch.sparse_csr_tensor(ends, rows, norms.index_select(0, rows), shape, check_invariants=False)
    return torch.sparse.sampled_addmm(pairs, queries, bank.T, alpha=-2).values()


@functools.cache
def _sampled() -> bool:
    """Whether this PyTorch has products sampled by a sparse matrix on the CPU."""
    one = torch.ones(1, 1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # said once in a process: sparse matrices are in beta
        try:
            _sampled_products(one, one, torch.tensor([0]), torch.tensor([0]), one[0])
        except RuntimeError:
            return False
    return True


def _repeated(bank: Tensor) -> Tensor:
    """Rows of entries [M, D] that equal an earlier one, int64: all, but for such as share a projection with others."""
    line = torch.arange(1.0, bank.shape[1] + 1, device=bank.device).sin_()
    along, order = (bank @ line).sort(stable=True)
    equal = (along[1:] == along[:-1]).nonzero()[:, 0]
    if not len(equal):
        return equal
    many = _differences(bank)
    same = [(bank[order[some + 1]] == bank[order[some]]).all(1) for some in equal.split(many)]
    return order[equal[torch.cat(same)] + 1]


def _version(bank: Tensor) -> int | None:
    """A number that changes when the tensor's content does; None where PyTorch has none, in inference mode."""
    return None if bank.is_inference() else bank._version


def _bytes(device: torch.device) -> int:
    """Bytes of numbers that are held at a time, whatever is free: digits of products may go by their number of rows."""
    return _BYTES if device.type == "cpu" else _GPU_BYTES


def _differences(bank: Tensor) -> int:
    """Of how many pairs of a query and an entry [M, D] differences are taken at a time: a quarter of `_bytes`."""
    return max(1, _bytes(bank.device) // 4 // (bank.element_size() * bank.shape[1]))


def _room(device: torch.device) -> int:
    """Bytes for values that only exclude entries: as `_bytes`, or a sixteenth of what a GPU has free, at most 4 GB."""
    if device.type != "cuda":
        return _bytes(device)
    return max(_BYTES, min(free_on_gpu(device) // 16, 1 << 32))


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
    with single_precision(queries.device):
        distances, rows = _KNearest.apply(queries, bank, k)
    return distances, rows


class _KNearest(torch.autograd.Function):
    """`k_nearest` with a gradient that needs k entries a query, and no second product with the whole bank."""

    @staticmethod
    def forward(ctx: Any, queries: Tensor, bank: Tensor, k: int) -> tuple[Tensor, Tensor]:
        queries = queries.float()  # small distances are differences: half precision would lose them
        norms = bank.square().sum(1)
        width = GROUP * math.ceil(len(bank) / GROUP)
        step = max(1, min(_bytes(queries.device) // 4 // width, len(queries)))
        block = queries.new_full((step, width), math.inf)
        distances = queries.new_empty(len(queries), k)
        rows = torch.empty(len(queries), k, dtype=torch.int64, device=queries.device)
        for first in range(0, len(queries), step):
            part = queries[first : first + step]
            products = block[: len(part)]
            torch.addmm(norms, part, bank.T, alpha=-2, out=products[:, : len(bank)])
            smallest, rows[first : first + step] = _k_smallest(products, k)
            distances[first : first + step] = smallest + part.square().sum(1, keepdim=True)
        rows.clamp_(max=len(bank) - 1)  # of what is not a number, rows behind the bank come out
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
    groups = values.view(len(values), -1, GROUP)
    nearest_groups = groups.amin(2).topk(min(k, groups.shape[1]), largest=False).indices
    candidates = groups.gather(1, nearest_groups[:, :, None].expand(-1, -1, GROUP)).flatten(1)
    smallest, inside = candidates.topk(k, largest=False)
    return smallest, nearest_groups.gather(1, inside // GROUP) * GROUP + inside % GROUP
