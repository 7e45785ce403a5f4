"""Boundaries that are detected in streams without tasks: the ten synthetic products, by transition and drift."""

import tempfile
from collections.abc import Sequence

from rich.table import Table

from benchmarks.running import composed
from clbench import assembly, boundaries
from clbench.data import blurred
from clbench.data.drift import Drift
from clbench.methods.base import silent
from clbench.strategies.selection import mean_features

SEEDS = (1, 2)  # of the images, their order and the detector; 0 was looked at while it was written
_IMAGES = 40  # of each product
STREAMS: dict[str, tuple[int, Drift]] = {
    "sharp": (0, Drift()),
    "transitions of 10 images": (10, Drift()),
    "transitions of 20 images": (20, Drift()),
    "transitions of 40 images": (40, Drift()),
    "sharp; light falls by 40 %": (0, Drift(light=0.4)),
    "sharp; blurred by 2 pixels at the end": (0, Drift(blur=2.0)),
    "sharp; turned by 15 degrees at the end": (0, Drift(geometry=15.0)),
    "of 20 images; all three": (20, Drift(0.4, 2.0, 15.0)),
}


def table(checkpoint: str | None = None, root: str | None = None) -> Table:
    """Transitions that are found, how late, and false alarms, over two draws of ten products; and one product alone."""
    shown = Table(
        title=f"Ten synthetic products of {_IMAGES} images, 64 x 64 pixels, small backbone",
        title_justify="left",
    )
    shown.add_column("stream")
    for title in ("transitions", "found", "images late, median", "most", "false alarms"):
        shown.add_column(title, justify="right")
    with tempfile.TemporaryDirectory() as cache:
        for name, (width, drift) in STREAMS.items():
            shown.add_row(name, *_row([_alarms(seed, width, drift, cache) for seed in SEEDS]))
        alone = [
            _alarms(seed, 0, drift, cache, f"dataset.categories=[{product}]", "dataset.train=200")
            for seed in SEEDS
            for product, drift in (("leather", Drift()), ("gear", Drift()), ("gear", Drift(0.4, 2.0, 15.0)))
        ]
        shown.add_section()
        shown.add_row("200 images of one product, six times, two of them with all drifts", *_row(alone))
    return shown


def _row(alarms: Sequence[boundaries.Alarms]) -> list[str]:
    """Cells that count the alarms of several streams."""
    delays = sorted(delay for each in alarms for delay in each.delays)
    there = len(delays) + sum(each.missed for each in alarms)
    late = [f"{delays[len(delays) // 2]}", f"{delays[-1]}"] if delays else ["", ""]
    return [str(there), str(len(delays)), *late, str(sum(each.false for each in alarms))]


def _alarms(seed: int, width: int, drift: Drift, cache: str, *further: str) -> boundaries.Alarms:
    """How boundaries that are found in a stream compare with those that there are."""
    given = (
        "method=patchcore",
        "dataset.size=64",
        "dataset.resize=64",
        f"dataset.train={_IMAGES}",
        f"seed={seed}",
    )
    config = composed(*given, "dataset.test_good=1", "dataset.test_defect=0", f"cache={cache}", *further)
    tasks = assembly.reader(config, assembly.build_dataset(config))(silent)
    detector = assembly.build_detector(config)
    arrived = blurred.arrivals(tasks, width, drift, seed)
    windows = boundaries.Windows()
    found = boundaries.found(mean_features(detector, arrived.images), windows, seed)
    return boundaries.compared(found, arrived.boundaries, width, 2 * windows.newest)
