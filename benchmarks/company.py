"""A run alone and beside busy processes, by how OpenMP's threads wait for one another."""

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from rich.table import Table

from clbench.cores import SPINS

TRAIN = Path(__file__).parents[1] / "train.py"
COMPANY = (0, 1, 2, 4)  # busy processes
_REPEATS = {0: 3}  # of each way where it is alone, the fastest of which counts; one where it is not
_RUN = (
    *(
        "method=stfpm",
        "method.epochs=2",
        "method.patience=null",
        "method.held_out=0",
        "overwrite=true",
        "gpu=cpu",
    ),
    "task_order.tasks=[bottle_top,gear]",
)
_WAYS = {
    "as libgomp does: 300,000 looks": {"GOMP_SPINCOUNT": "300000"},
    f"as clbench asks: {SPINS:,} looks": {"GOMP_SPINCOUNT": str(SPINS)},
    "not at all (OMP_WAIT_POLICY=passive)": {"OMP_WAIT_POLICY": "PASSIVE"},
}


def table(checkpoint: str | None = None, root: str | None = None) -> Table:
    """Seconds of a run of STFPM beside 0 to 4 busy processes, for each way to wait."""
    shown = Table(title="STFPM on two tasks of the synthetic stream, 2 epochs each, s", title_justify="left")
    shown.add_column("threads that wait look")
    for busy in COMPANY:
        shown.add_column(f"beside {busy}" if busy else "alone", justify="right")
    with tempfile.TemporaryDirectory() as folder:
        _run(Path(folder), {})  # which decodes the images
        found: dict[str, list[float]] = {way: [] for way in _WAYS}
        for busy in COMPANY:
            seconds: dict[str, list[float]] = {way: [] for way in _WAYS}
            others = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(busy)]
            try:
                for _ in range(_REPEATS.get(busy, 1)):
                    for way, environment in _WAYS.items():
                        seconds[way].append(_run(Path(folder), environment))
                        print(f"beside {busy}, {way}: {seconds[way][-1]:.1f} s", flush=True)
            finally:
                for other in others:
                    other.kill()
                    other.wait()
            for way, times in seconds.items():
                found[way].append(min(times))
    first = next(iter(found.values()))
    for way, times in found.items():
        shown.add_row(
            way, *(f"{time:.1f} ({time / usual:.2f})" for time, usual in zip(times, first, strict=True))
        )
    return shown


def _run(folder: Path, environment: dict[str, str]) -> float:
    """Seconds of training and evaluation of a run in a process of its own."""
    command = [sys.executable, str(TRAIN), *_RUN, f"outputs={folder}/outputs", f"cache={folder}/cache"]
    begin = time.perf_counter()
    subprocess.run(command, env={**os.environ, **environment}, check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - begin


if __name__ == "__main__":
    from rich.console import Console

    Console(width=120).print(table())
