"""From the start of a small job's process to its first training step, and how much of that is ours."""

import re
import subprocess
import sys
import tempfile
import time
from typing import NamedTuple

from rich.table import Table

_JOB = """
import runpy, sys, time
import clbench.training
def first(*_):
    print("first step", time.time(), flush=True)
    raise SystemExit
clbench.training._collect = first
sys.argv = ["train.py", *sys.argv[1:]]
runpy.run_path("train.py", run_name="__main__")
"""
_IMPORT = re.compile(
    r"import time:\s+(\d+) \|\s+\d+ \|\s*(\S+)"
)  # microseconds of the module's own, its name
_OURS = ("clbench", "hydra_plugins.clbench")
_REPEATS = 3


class Start(NamedTuple):
    """Seconds from the start of a process to its first step, and of those in imports."""

    whole: float
    libraries: float
    own: float


def table(checkpoint: str | None = None, root: str | None = None) -> Table:
    """Where the seconds go, in the best of three starts of a demo job on a warm cache."""
    with tempfile.TemporaryDirectory() as folder:
        job = [f"outputs={folder}/outputs", f"cache={folder}/cache"]
        _start(job)  # warms the cache
        best = min(_start(job) for _ in range(_REPEATS))
    built = Table(title="start of a small job, its images decoded already", title_justify="left")
    built.add_column("until the first training step")
    built.add_column("s", justify="right")
    built.add_column("share", justify="right")
    rest = best.whole - best.libraries - best.own
    for name, seconds in (
        ("importing libraries", best.libraries),
        ("importing clbench", best.own),
        ("composing and checking, building the detector, mapping images", rest),
        ("in all", best.whole),
    ):
        built.add_row(name, f"{seconds:.2f}", f"{100 * seconds / best.whole:.0f} %")
    return built


def _start(job: list[str]) -> Start:
    begin = time.time()
    words = [sys.executable, "-X", "importtime", "-c", _JOB, *job]
    result = subprocess.run(words, capture_output=True, text=True, check=False)
    line = next(line for line in result.stdout.splitlines() if line.startswith("first step"))
    imports = [(int(own), name) for own, name in _IMPORT.findall(result.stderr)]
    own = sum(microseconds for microseconds, name in imports if name.startswith(_OURS))
    everything = sum(microseconds for microseconds, _ in imports)
    return Start(float(line.split()[-1]) - begin, (everything - own) / 1e6, own / 1e6)
