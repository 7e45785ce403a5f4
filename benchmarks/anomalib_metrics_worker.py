"""AUPIMO and AU-PRO by anomalib: run by `metrics` with the Python that has anomalib.

Imports nothing of clbench. Reads maps and masks from the first argument, and writes to the second: the values, the shortest
of a few times in seconds, the number of points of its curve between AUPIMO's two rates, which it takes from its grid of
thresholds, and for each image how far AUPIMO between the same rates may be from it.
"""

import logging
import math
import sys
import time

import numpy as np
import torch
from anomalib.metrics.aupro import _AUPRO
from anomalib.metrics.pimo.functional import aupimo_scores

LOW, HIGH = 1e-5, 1e-4
REPEATS = 3


def aupimo(maps: torch.Tensor, masks: torch.Tensor) -> tuple:
    """At its own settings: 300,000 thresholds."""
    return aupimo_scores(maps, masks, num_thresholds=300_000, fpr_bounds=(LOW, HIGH))


def aupro(maps: torch.Tensor, masks: torch.Tensor, limit: float) -> float:
    metric = _AUPRO(fpr_limit=limit)
    metric.update(maps, masks)
    return float(metric.compute())


def timed(call, *arguments):
    """The call's result and its shortest time in seconds."""
    seconds = []
    for _ in range(REPEATS):
        begin = time.perf_counter()
        result = call(*arguments)
        seconds.append(time.perf_counter() - begin)
    return result, min(seconds)


def grid_error(rates: np.ndarray, overlaps: np.ndarray) -> tuple[np.ndarray, float, float]:
    """How far AUPIMO may be from another one through the same points, float64 [images], and the two rates that it is between.

    The overlap rises with the rate: between one rate and the next it lies between its lowest value at the first, as several
    thresholds have one rate, and its highest at the second. The two rates are those of the grid that are nearest.

    Args:
        rates: the false-positive rate at each threshold, descending.
        overlaps: float64 [images, thresholds].
    """
    begin, end = (int(np.argmin(np.abs(rates - bound))) for bound in (HIGH, LOW))
    x, y = np.log(rates[begin : end + 1]), overlaps[:, begin : end + 1]
    changes = np.flatnonzero(np.diff(x)) + 1
    first, last = np.append(0, changes), np.append(changes, len(x)) - 1
    between = (-np.diff(x[first]) * (y[:, first[:-1]] - y[:, last[1:]])).sum(axis=1)
    return between / math.log(HIGH / LOW), rates[end], rates[begin]


def main() -> None:
    """Measure and write."""
    logging.disable(logging.WARNING)
    given = np.load(sys.argv[1])
    maps, masks = torch.from_numpy(given["maps"]), torch.from_numpy(given["masks"])
    (_, rates, overlaps, _, areas, points), pimo_seconds = timed(aupimo, maps, masks)
    defective = ~torch.isnan(areas)
    error, low, high = grid_error(rates.double().numpy(), overlaps[defective].double().numpy())
    pro, pro_seconds = timed(aupro, maps, masks.float(), 0.3)
    np.savez(
        sys.argv[2],
        aupimo=areas[defective].numpy(),
        error=error,
        low=low,
        high=high,
        points=points,
        aupimo_seconds=pimo_seconds,
        aupro=pro,
        aupro_5=aupro(maps, masks.float(), 0.05),
        aupro_seconds=pro_seconds,
    )


if __name__ == "__main__":
    main()
