"""DINOSaur's coresets at 14 x 14 positions, and distances to the entries in windows of 7 x 7, against plain loops."""

import time
from collections.abc import Callable

import torch
from rich.table import Table
from torch import Tensor

from clbench.methods.coreset import farthest_first_at_each
from clbench.methods.dinosaur import squared_in_windows

SIDE, SIZE = 14, 384
CORESETS = ((209, 20), (1000, 100))  # images of a task, and how many are kept
ENTRIES, IMAGES, RADIUS = 20, 16, 3  # of a bank; judged at a time


def plain_coresets(points: Tensor, count: int, starts: Tensor) -> Tensor:
    """Greedy k-center at each position of [P, N, D]: all distances to one new center at a time."""
    chosen = torch.empty(len(points), count, dtype=torch.int64)
    for row, (some, start) in enumerate(zip(points, starts.tolist(), strict=True)):
        chosen[row, 0] = start
        nearest = torch.full((len(some),), torch.inf)
        for done in range(1, count):
            latest = some[chosen[row, done - 1]]
            nearest = torch.minimum(nearest, torch.linalg.vector_norm(some - latest, dim=1))
            chosen[row, done] = nearest.argmax()
    return chosen


def plain_windows(patches: Tensor, bank: Tensor) -> Tensor:
    """As `squared_in_windows`: the entries of each position's window are gathered, and searched by one product."""
    found = torch.empty(patches.shape[:3])
    for row in range(SIDE):
        for column in range(SIDE):
            rows, columns = (slice(max(0, at - RADIUS), at + RADIUS + 1) for at in (row, column))
            entries = bank[:, rows, columns].flatten(0, 2)
            found[:, row, column] = torch.cdist(patches[:, row, column], entries).amin(1).square()
    return found


def timed(call: Callable[[], Tensor], times: int = 1) -> tuple[Tensor, float]:
    """What a call gives, and the seconds of the quickest of some."""
    seconds = []
    for _ in range(times):
        begin = time.perf_counter()
        result = call()
        seconds.append(time.perf_counter() - begin)
    return result, min(seconds)


def table(checkpoint: str | None = None, root: str | None = None) -> Table:
    """Seconds of each way on random numbers, their ratio, and what share of the entries is the same."""
    random = torch.Generator().manual_seed(0)
    shown = Table("what", "plain loop, s", "clbench, s", "ratio", "same", title="Banks at positions")
    for count, kept in CORESETS:
        points = torch.randn(count, SIDE * SIDE, SIZE, generator=random).transpose(0, 1)
        starts = torch.randint(count, (SIDE * SIDE,), generator=random)
        theirs, longer = timed(lambda p=points, k=kept, s=starts: plain_coresets(p, k, s))
        ours, seconds = timed(lambda p=points, k=kept, s=starts: farthest_first_at_each(p, k, s))
        same = float((theirs == ours).float().mean())
        what = f"{kept} of {count:,} images at {SIDE * SIDE} positions"
        shown.add_row(what, f"{longer:.2f}", f"{seconds:.2f}", f"{longer / seconds:.1f}", f"{same:.1%}")
    bank = torch.randn(ENTRIES, SIDE, SIDE, SIZE, generator=random)
    patches = torch.randn(IMAGES, SIDE, SIDE, SIZE, generator=random)
    theirs, longer = timed(lambda: plain_windows(patches, bank), 5)
    ours, seconds = timed(lambda: squared_in_windows(patches, bank, RADIUS), 5)
    same = float(torch.isclose(theirs, ours, rtol=1e-4).float().mean())
    what = f"windows of {2 * RADIUS + 1} x {2 * RADIUS + 1}, {ENTRIES} entries, {IMAGES} images"
    shown.add_row(what, f"{longer:.3f}", f"{seconds:.3f}", f"{longer / seconds:.1f}", f"{same:.1%}")
    return shown
