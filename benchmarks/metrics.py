"""Pixel metrics of one task: one sort against scikit-learn's separate calls and a direct AU-PRO.

    python -m benchmarks metrics
    python -m benchmarks.metrics --python ENV/bin/python

The second is against anomalib's AU-PRO and AUPIMO, of 100 maps of 256 x 256, in an environment of its own
(`python3 -m venv ENV && ENV/bin/pip install anomalib`).

The direct AU-PRO comes in the two ways that are commonly written: exact, by an argsort of all scores and
cumulative sums of per-region weights, and approximate, by a loop over 200 thresholds. The faster of the
two is the one counted in the total.
"""

import argparse
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
from rich.console import Console
from rich.table import Table
from sklearn.metrics import average_precision_score, precision_recall_curve, roc_auc_score

from clbench.metrics.curves import pixel_metrics
from clbench.metrics.names import USUAL
from clbench.metrics.pimo import aupimo

LIMIT = 0.3
WORKER = Path(__file__).parent / "anomalib_metrics_worker.py"


def synthetic_task(images: int = 150, side: int = 224) -> tuple[np.ndarray, np.ndarray]:
    """Smooth maps float32 [N, side, side] and masks bool: two of three images hold one to five defects."""
    draw = np.random.default_rng(0)
    maps = np.empty((images, side, side), np.float32)
    masks = np.zeros((images, side, side), np.uint8)
    for image, (score, mask) in enumerate(zip(maps, masks, strict=True)):
        for _ in range(draw.integers(1, 6) if image % 3 else 0):
            centre, axes = draw.integers(0, side, 2).tolist(), draw.integers(3, 20, 2).tolist()
            cv2.ellipse(mask, centre, axes, float(draw.uniform(0, 180)), 0, 360, 1, thickness=-1)
        noise = cv2.resize(draw.normal(size=(28, 28)).astype(np.float32), (side, side))
        defects = draw.uniform(0.5, 6) * mask.astype(np.float32)
        score[:] = cv2.GaussianBlur(noise + defects, (0, 0), sigmaX=4)
    return maps, masks.astype(bool)


def best_f1(truth: np.ndarray, scores: np.ndarray) -> float:
    precision, recall, _ = precision_recall_curve(truth, scores)
    return float((2 * precision * recall / np.maximum(precision + recall, 1e-12)).max())


def integrate(x: np.ndarray, y: np.ndarray) -> float:
    """Normalised trapezoid area under points with x ascending, up to LIMIT."""
    inside = x <= LIMIT
    x, y = np.append(x[inside], LIMIT), np.append(y[inside], np.interp(LIMIT, x, y))
    return float(np.trapezoid(y, x)) / LIMIT


def sorted_aupro(maps: np.ndarray, masks: np.ndarray) -> float:
    """Exact: argsort, then each pixel adds to the false positives or, by 1 / area, to its region."""
    overlap, regions = np.zeros(maps.shape), 0
    for mask, weight in zip(masks, overlap, strict=True):
        count, labels, stats, _ = cv2.connectedComponentsWithStats(mask.astype(np.uint8))
        regions += count - 1
        weight[mask] = (1 / stats[:, cv2.CC_STAT_AREA])[labels[mask]]
    order = np.argsort(maps, axis=None)[::-1]
    scores = maps.ravel()[order]
    distinct = np.append(scores[1:] != scores[:-1], True)
    x = np.cumsum(~masks.ravel()[order])[distinct] / np.count_nonzero(~masks)
    y = np.cumsum(overlap.ravel()[order])[distinct] / regions
    return integrate(np.append(0, x), np.append(0, y))


def looped_aupro(maps: np.ndarray, masks: np.ndarray, thresholds: int = 200) -> float:
    """Approximate: binarise all maps at evenly spaced thresholds and count the overlap of every region."""
    regions = []
    for image, mask in zip(maps, masks, strict=True):
        count, labels = cv2.connectedComponents(mask.astype(np.uint8))
        regions += [image[labels == k] for k in range(1, count)]
    normal = maps[~masks]
    points = [(0.0, 0.0)]
    for threshold in np.linspace(maps.max(), maps.min(), thresholds):
        overlap = np.mean([np.count_nonzero(region >= threshold) / region.size for region in regions])
        points.append((np.count_nonzero(normal >= threshold) / normal.size, float(overlap)))
    x, y = np.array(points).T
    return integrate(x, y)


def timed(call: Callable, *arguments: np.ndarray, repeats: int = 1):
    """The call's result and its shortest time in seconds."""
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        result = call(*arguments)
        seconds.append(time.perf_counter() - start)
    return result, min(seconds)


def table(checkpoint: str | None = None, root: str | None = None) -> Table:
    """Seconds of each way, its ratio to ours for all four metrics, and the difference in value."""
    maps, masks = synthetic_task()
    pixel_metrics(maps[:10], masks[:10])  # first calls load libraries
    ours, our_seconds = timed(pixel_metrics, maps, masks, repeats=3)
    rows = [
        ("scikit-learn roc_auc_score", "pixel_auroc", *timed(roc_auc_score, masks.ravel(), maps.ravel())),
        ("scikit-learn average_precision_score", "pixel_ap",
         *timed(average_precision_score, masks.ravel(), maps.ravel())),
        ("scikit-learn precision_recall_curve", "pixel_f1", *timed(best_f1, masks.ravel(), maps.ravel())),
        ("direct AU-PRO, argsort, exact", "aupro", *timed(sorted_aupro, maps, masks, repeats=2)),
        ("direct AU-PRO, 200 thresholds", "aupro", *timed(looped_aupro, maps, masks, repeats=2)),
    ]  # fmt: skip
    shape = " x ".join(str(n) for n in maps.shape)
    shown = Table("way", "metric", "seconds", "ratio", "|difference|", title=f"Pixel metrics, {shape}")
    for way, metric, value, seconds in rows:
        difference = f"{abs(value - ours[metric]):.0e}"
        shown.add_row(way, metric, f"{seconds:.2f}", f"{seconds / our_seconds:.1f}", difference)
    total = sum(row[3] for row in rows[:3]) + min(row[3] for row in rows[3:])
    shown.add_section()
    shown.add_row(
        "separate calls, faster AU-PRO", "all four", f"{total:.2f}", f"{total / our_seconds:.1f}", ""
    )
    shown.add_row("clbench, one sort", "all four", f"{our_seconds:.2f}", "1.0", "")
    return shown


def beside_anomalib(python: str) -> Table:
    """Seconds and values of AU-PRO and AUPIMO, ours and anomalib's.

    Args:
        python: that of an environment that has anomalib.

    Raises:
        AssertionError: a value is further from anomalib's than its grid of thresholds, or single precision, allows.
    """
    maps, masks = synthetic_task(100, 256)
    defective = masks.any(axis=(1, 2))
    further = [*USUAL[3:], "aupro_5"]
    ours, seconds = timed(lambda: pixel_metrics(maps, masks, further=["aupro_5"]), repeats=3)
    each, pimo_seconds = timed(aupimo, maps, masks, defective, repeats=3)
    with tempfile.TemporaryDirectory() as folder:
        given, found = f"{folder}/given.npz", f"{folder}/found.npz"
        np.savez(given, maps=maps, masks=masks)
        subprocess.run([python, str(WORKER), given, found], check=True)
        theirs = dict(np.load(found))
    # It divides by ln(HIGH / LOW) whichever rates its grid has, and cuts to 1.
    low, high = float(theirs["low"]), float(theirs["high"])
    same = aupimo(maps, masks, defective, low * (1 + 1e-7), high * (1 - 1e-7))
    same = np.minimum(same * np.log(high / low) / np.log(10), 1)
    apart = np.abs(same - theirs["aupimo"])
    assert (apart <= theirs["error"] + 1e-6).all(), (apart, theirs["error"])
    for name in ("aupro", "aupro_5"):
        assert abs(ours[name] - theirs[name]) < 1e-3, (name, ours[name], theirs[name])
    shown = Table(
        "metric", "ours", "anomalib", "|difference|, at most", "its grid's error, at most", "s, ours", "s, anomalib",
        title=f"Beside anomalib, 100 x 256 x 256: its grid has {int(theirs['points'])} thresholds from {low:.4g} to {high:.5g}",
    )  # fmt: skip
    for name in ("aupro", "aupro_5"):
        shown.add_row(
            name, f"{ours[name]:.5f}", f"{theirs[name]:.5f}", f"{abs(ours[name] - theirs[name]):.0e}"
        )
    shown.add_row(
        f"aupimo, {len(each)} images",
        f"{each.mean():.5f}",
        f"{theirs['aupimo'].mean():.5f}",
        f"{apart.max():.0e} at its rates",
        f"{theirs['error'].max():.0e}",
        f"{pimo_seconds:.3f}",
        f"{theirs['aupimo_seconds']:.2f}",
    )
    shown.add_section()
    both = seconds + pimo_seconds, float(theirs["aupimo_seconds"] + theirs["aupro_seconds"])
    shown.add_row(
        f"ours: {', '.join(further)}, aupimo; anomalib: aupro, aupimo",
        *[""] * 4,
        f"{both[0]:.3f}",
        f"{both[1]:.2f}",
    )
    shown.add_row("ratio", *[""] * 5, f"{both[1] / both[0]:.0f}")
    return shown


def main() -> None:
    """Print the table asked for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--python", help="of an environment that has anomalib, to compare with it")
    given = parser.parse_args()
    Console(width=150).print(beside_anomalib(given.python) if given.python else table())


if __name__ == "__main__":
    main()
