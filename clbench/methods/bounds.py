"""Lower bounds on the squared distances from queries to the entries of banks, by one narrow product.

For a query q and an entry b, let m be any vector, and W any matrix [D, k] with a spectral norm of at most 1:

    q' = q - m,  x = W^T q',  r(q)^2 = |q'|^2 - |x|^2,  and b', y, r(b) likewise.

I - W W^T is positive semidefinite, so by Cauchy and Schwarz q'.b' - x.y <= r(q) r(b). Let x~ be x in a type of few bits,
e(q) = |x - x~|, and so for y. Then x.y = x~.y~ + (x - x~).y + x~.(y - y~), and together

    |q - b|^2 = |q'|^2 + |b'|^2 - 2 q'.b'
             >= |q'|^2 + |b'|^2 - 2 (x~.y~ + r(q) r(b) + e(q) |y| + |x~| e(b)),                                   (1)

a product of k + 7 columns: k of coordinates, three of lengths, four of the two squared norms in two pieces each.
With the first principal directions of the banks as W, few columns are enough where features are correlated; with W = I,
which makes r zero, the bound has the rounding to few bits alone against it.

What single precision rounds is paid for too. Let u = 2^-24, and g(n) = 1.01 n u: the relative error of n roundings of
numbers of one sign, in any order, and S = |q'|^2 + |b'|^2, at least 2 |q'| |b'|.
- q' and b' are rounded: by u |q'| and u |b'|, so |q - b|^2 by at most 4.1 u S.
- x and y are products of D terms with columns no longer than 1: off by h |q'| and h |b'| with h = sqrt(k) g(D), so
  2 x.y by 2.1 h S. r(q)^2 is off by 2 h + (D + k + 7) u of |q'|^2: D + 3 and k + 3 roundings of the two squared norms, and
  their difference. That is less than 3 (h + g(D)) where k + 7 <= (2 + sqrt(k)) D: for all k <= D from D = 3 on. It is
  added under the root. With W = I, h and r are 0.
- Lengths are rounded up: to the type of few bits, and by 2 g(D) for their own error.
- A squared norm in two pieces is off by v^2 with v the unit roundoff of the type; and by g(D) before.
- The product adds k + 7 terms, with absolute values of at most 3.2 S together. Matrix units may truncate what they add:
  its error is taken as four times that of rounding, 13 g(k + 7) S.
All of these are multiples of S: the squared norms are multiplied by 1 minus the sum of these factors. What underflows is
below `TINY`, if squared norms are below 2^120. Last, values are rounded to the type, to nearest or to zero: which keeps
their order, so a value above a rounded limit was above the limit.
"""

import functools
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

GROUP = 64  # neighbouring values of which only the minimum is looked at first
TINY = 2.0**-100  # more than underflow takes off a sum

_LEAST_FEATURES = 3  # D, from which on what is added for rounding is enough
_ROWS = 4096  # entries prepared at a time
_FEW = 256  # queries bounded at a time on the CPU where only the least bounds are wanted
_FAR = 2.0**120  # a squared norm
_SPLITS = 16  # coordinates that entries are sorted by
_LENGTHS = 7  # columns beside the coordinates
_COLUMNS = 8  # what the number of columns is a multiple of: kernels like it
# Shares of the entries' variance that bounds leave to Cauchy and Schwarz: what was quickest with patches of ResNet-18.
_LEFT = {torch.bfloat16: 0.04, torch.float32: 0.06}
_LEFT_ROUGH = 0.2


def gamma(roundings: int) -> float:
    """A bound on the relative error of so many roundings in single precision: g of this module's text."""
    return 1.01 * roundings * 2.0**-24


class Bounds:
    """Lower bounds on squared distances to the entries of a bank, with 2 (k + 7) + 8 bytes an entry in bfloat16.

    Args:
        bank: float32 [M, D], D >= 3, with squared norms below 2^120.
        pieces: first and last row (excluded) of the parts of it that are searched one at a time.
        dtype: the type of few bits, bfloat16, or float32.
        basis: W, float32 [D, k], with a spectral norm of at most 1; None for the unit matrix.
        centre: m, float32 [D].
        left_out: entries that need not be found, bool [M].

    Attributes:
        bytes: of a value.
        rough: looser bounds of the same, that are quicker; None where there are none.

    Raises:
        ValueError: entries have fewer than 3 features.
    """

    def __init__(
        self,
        bank: Tensor,
        pieces: list[tuple[int, int]],
        dtype: torch.dtype,
        basis: Tensor | None,
        centre: Tensor,
        left_out: Tensor,
    ):
        self._dtype, self._basis, self._centre = dtype, basis, centre
        self.bytes = dtype.itemsize
        size = bank.shape[1]
        if size < _LEAST_FEATURES:
            raise ValueError(
                f"bounds need entries of {_LEAST_FEATURES} features or more, and these have {size}"
            )
        self._count = size if basis is None else basis.shape[1]
        width = self._count + _LENGTHS
        self._width = _COLUMNS * math.ceil(width / _COLUMNS)
        error = gamma(size)
        projecting = 0.0 if basis is None else math.sqrt(self._count) * gamma(size)
        self._below = 3 * (projecting + error) if projecting else 0.0
        unit = torch.finfo(dtype).eps / 2
        self._up = 1 + unit + 2 * gamma(size + 8)
        taken = 5 * gamma(1) + 2.1 * projecting + 1.1 * unit**2 + 2 * gamma(size + 8) + 13 * gamma(width)
        self._shrunk = 1 - taken
        self._integer = {2: torch.int16, 4: torch.int32}[dtype.itemsize]
        self.rough: Bounds | None = None
        self._entries: list[Tensor] = []
        self._rows: list[Tensor] = []
        for begin, end in pieces:
            entries, rows = self._prepare(bank[begin:end], left_out[begin:end])
            self._entries.append(entries)
            self._rows.append(rows + begin)

    def _prepare(self, bank: Tensor, left_out: Tensor) -> tuple[Tensor, Tensor]:
        """A piece's side of the product, [W, K], padded to whole groups, and the row of each in the piece, int64 [W]."""
        count, padded = len(bank), GROUP * math.ceil(len(bank) / GROUP)
        entries = torch.zeros(padded, self._width, dtype=self._dtype, device=bank.device)
        for part, side in zip(bank.split(_ROWS), entries[:count].split(_ROWS), strict=True):
            rounded, error, length, beyond, high, low = self._parts(part)
            side[:, : self._count] = rounded
            ones = torch.ones_like(high)
            lengths = [self._upwards(one) for one in (beyond, length, error)]
            side[:, self._count : self._count + _LENGTHS] = torch.stack([*lengths, high, low, ones, ones], 1)
        high = entries[:, self._count + 3]
        high[:count].masked_fill_(left_out, _FAR)
        high[count:] = _FAR
        rows = torch.arange(padded, device=bank.device).clamp_(max=count - 1)
        if self._basis is not None:  # near ones beside each other: then few groups have any
            order = _near_together(entries[:count, :_SPLITS].float())
            entries[:count], rows[:count] = entries[order], order
        return entries, rows

    def queries(self, queries: Tensor) -> Tensor:
        """The queries' side of the product: float32 [Q, D] -> [Q, K]."""
        rounded, error, length, beyond, high, low = self._parts(queries)
        side = torch.zeros(len(queries), self._width, dtype=self._dtype, device=queries.device)
        torch.mul(rounded, -2, out=side[:, : self._count])
        ones = torch.ones_like(high)
        lengths = [-2 * self._upwards(one) for one in (beyond, error, length + error)]
        side[:, self._count : self._count + _LENGTHS] = torch.stack([*lengths, ones, ones, high, low], 1)
        return side

    def _parts(self, vectors: Tensor) -> tuple[Tensor, ...]:
        """x~ [N, k]; and e, |x|, r, and the squared norm in two pieces, all [N]."""
        centred = vectors - self._centre
        norms = torch.linalg.vector_norm(centred, dim=1).square_()
        exact = centred if self._basis is None else centred @ self._basis
        rounded = exact.to(self._dtype)
        length = torch.linalg.vector_norm(exact, dim=1)
        beyond = (norms - length.square()).clamp_min_(0).add_(norms, alpha=self._below).sqrt_()
        error = torch.linalg.vector_norm(exact - rounded, dim=1)
        shrunk = norms * self._shrunk
        high = shrunk.to(self._dtype)
        return rounded, error, length, beyond, high, (shrunk - high).to(self._dtype)

    def _upwards(self, lengths: Tensor) -> Tensor:
        return (lengths * self._up).to(self._dtype)

    def rows(self, piece: int) -> Tensor:
        """The row of the bank that each column of `values` stands for, int64 [W]."""
        return self._rows[piece]

    def values(self, queries: Tensor, piece: int, memory: Callable[[int, torch.dtype], Tensor]) -> Tensor:
        """Bounds of a piece, [Q, W], as integers in the same order; those below zero in any.

        Args:
            queries: what `queries` gave, [Q, K].
            memory: gives memory for a number of values of a type.
        """
        entries = self._entries[piece]
        values = memory(len(queries) * len(entries), self._dtype).view(len(queries), len(entries))
        return torch.mm(queries, entries.T, out=values).view(self._integer)

    def least(self, queries: Tensor, piece: int, memory: Callable[[int, torch.dtype], Tensor]) -> Tensor:
        """What squared distances to entries of a piece are not below, float32 [Q]; arguments as for `values`."""
        # So that what is written stays in the CPU's caches.
        many = _FEW if queries.device.type == "cpu" else max(len(queries), 1)
        least = torch.cat([self.values(some, piece, memory).amin(1) for some in queries.split(many)])
        return least.view(self._dtype).float().clamp_min_(0).mul_(1 - torch.finfo(self._dtype).eps / 2)

    def limit(self, squared: Tensor) -> Tensor:
        """What `values` of entries at squared distances of at most `squared`, float32 [Q], are not above."""
        return (squared + TINY).to(self._dtype).view(self._integer)


def bounds_of(bank: Tensor, pieces: list[tuple[int, int]], left_out: Tensor) -> Bounds | None:
    """The bounds that should be quickest for a bank on its device; None where plain products are.

    On the CPU products are dear: principal directions, as many as leave little variance, where they are at most half
    as many as features. On a GPU, and where features are not correlated: all features, if bfloat16 is quick.

    Args:
        bank, pieces, left_out: as for `Bounds`; the bank may have any values and any number of features.
    """
    if bank.shape[1] < _LEAST_FEATURES or not bool(torch.linalg.vector_norm(bank, dim=1).amax() < 2.0**58):
        return None
    dtype = torch.bfloat16 if _quicker_in_bfloat16(bank.device) else torch.float32
    sample = bank[:: math.ceil(len(bank) / (4 * bank.shape[1]))]
    centre = sample.mean(0)
    shares = (_LEFT[dtype], _LEFT_ROUGH) if bank.device.type == "cpu" else ()
    found = [
        Bounds(bank, pieces, dtype, basis, centre, left_out) for basis in _principal(sample - centre, shares)
    ]
    if not found and dtype == torch.bfloat16:
        found = [Bounds(bank, pieces, dtype, None, centre, left_out)]
    if len(found) > 1:
        found[0].rough = found[1]
    return found[0] if found else None


def _principal(centred: Tensor, shares: Sequence[float]) -> list[Tensor]:
    """Principal directions that leave at most these shares of the variance, float32 [D, k] each; none if k > D / 2.

    Scaled to a spectral norm of at most 1, which is below the root of the largest row sum of |W^T W|.

    Args:
        centred: float32 [N, D].
        shares: none, or from small to large; of several that need as many directions, the first counts.
    """
    if not shares:
        return []
    size = centred.shape[1]
    scaled = centred / centred.abs().amax().clamp_min(TINY)
    covariance = scaled.T @ scaled
    trace = covariance.trace()
    # The k largest eigenvalues sum to at most sqrt(k) |covariance|: often enough to see without them that k is large.
    if trace * (1 - shares[0]) > math.sqrt(size / 2) * torch.linalg.matrix_norm(covariance):
        return []
    try:
        values, vectors = torch.linalg.eigh(covariance)
    except torch.linalg.LinAlgError:  # it has not converged
        return []
    explained = values.flip(0).cumsum(0)
    needed = [int((explained < (1 - share) * trace).sum()) + 1 + _LENGTHS for share in shares]
    counts = dict.fromkeys(_COLUMNS * math.ceil(count / _COLUMNS) - _LENGTHS for count in needed)
    bases = []
    for count in counts if max(counts) <= size // 2 else ():
        basis = vectors.flip(1)[:, :count].contiguous()
        double = basis.double()
        norm = (double.T @ double).abs().sum(1).max().sqrt()
        bases.append(basis * ((1 - 2.0**-16) / norm).float())
    return bases


@contextmanager
def whole_sums() -> Iterator[None]:
    """Inside, a GPU adds products of bfloat16 matrices up in single precision, as bounds take it to."""
    settings: Any = torch.backends.cuda.matmul
    before = settings.allow_bf16_reduced_precision_reduction
    settings.allow_bf16_reduced_precision_reduction = False
    try:
        yield
    finally:
        settings.allow_bf16_reduced_precision_reduction = before


def _near_together(points: Tensor) -> Tensor:
    """An order, int64 [N], in which each `GROUP` neighbouring points [N, S] are near each other, by halving at medians."""

    def halves(rows: Tensor) -> list[Tensor]:
        groups = math.ceil(len(rows) / GROUP)
        if groups < 2:
            return [rows]
        inside = points[rows]
        rows = rows[inside[:, int(inside.var(0).argmax())].argsort()]
        return [*halves(rows[: groups // 2 * GROUP]), *halves(rows[groups // 2 * GROUP :])]

    return torch.cat(halves(torch.arange(len(points), device=points.device)))


@functools.cache
def _quicker_in_bfloat16(device: torch.device) -> bool:
    """Whether a device multiplies bfloat16 matrices clearly quicker than float32 ones, adding in single precision."""
    size = 512
    left, right = (
        torch.arange(1.0 * size * size, device=device).mul_(step).sin_().view(size, size)
        for step in (0.7, 1.1)
    )
    quickest = dict.fromkeys((torch.float32, torch.bfloat16), math.inf)
    for dtype in [*quickest] * 8:
        one, other = left.to(dtype), right.to(dtype).T
        begin = time.perf_counter()
        product = one @ other
        product[0, 0].item()  # waits for a GPU
        quickest[dtype] = min(quickest[dtype], time.perf_counter() - begin)
    exact = left.bfloat16().double() @ right.bfloat16().double().T
    allowed = 2.0**-8 * exact.abs() + 4 * gamma(size) * size
    return 1.5 * quickest[torch.bfloat16] < quickest[torch.float32] and bool(
        ((product.double() - exact).abs() <= allowed).all()
    )
