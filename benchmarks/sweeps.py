"""A sweep of 200 tiny runs, and the same command again, which has nothing to do."""

import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from rich.table import Table

from clbench.recording.run_directory import RunDirectory
from clbench.sweeps.runs import SweepRun
from clbench.sweeps.tables import sweep_table

_RUNS = 200
_TINY = (
    "method=padim",
    "method.layers=[3]",
    "dataset.categories=[bottle_top,capsule]",
    "dataset.train=4",
    "dataset.test_good=2",
    "dataset.test_defect=2",
    "dataset.seed=0",
    "dataset.resize=32",
)


def table(checkpoint: str | None = None, root: str | None = None) -> Table:
    """Seconds of the sweep, of its repetition, which starts nothing, and of a table over ten times as many."""
    built = Table(title=f"a sweep of {_RUNS} tiny runs, one after the other", title_justify="left")
    for title in ("", "s", "runs started"):
        built.add_column(title, justify="right" if title else "left")
    with tempfile.TemporaryDirectory() as folder:
        words = [sys.executable, "train.py", "-m", *_TINY, f"seed=range(0,{_RUNS})"]
        words += [f"outputs={folder}/outputs", f"cache={folder}/cache"]
        for name in ("the sweep", "the same command again"):
            begin = time.perf_counter()
            output = subprocess.run(words, check=True, capture_output=True, text=True).stdout
            seconds = time.perf_counter() - begin
            built.add_row(name, f"{seconds:.1f}", str(output.count("just learned → final")))
        finished = sorted(path.parent for path in Path(folder).glob("outputs/default/*/summary.json"))
        copies = [Path(shutil.copytree(path, f"{path},copy={n}")) for path in finished for n in range(10)]
        begin = time.perf_counter()
        sweep_table([SweepRun([path.name], RunDirectory(path), "finished") for path in copies], 200)
        built.add_row(f"the table of {len(copies)} runs", f"{time.perf_counter() - begin:.1f}", "0")
    return built
