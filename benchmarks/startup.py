"""From the start of a small job's process to its first training step, and how much of that is ours."""

import subprocess
import sys
import tempfile
import time

from rich.table import Table

_JOB = """
import json, runpy, sys, time
import clbench.training
def first(*_):
    now = time.time()
    ours = ("clbench", "hydra_plugins.clbench", "train", "__main__")
    print("first step", now, json.dumps([name for name in sys.modules if not name.startswith(ours)]), flush=True)
    raise SystemExit
clbench.training._collect = first
sys.argv = ["train.py", *sys.argv[1:]]
runpy.run_path("train.py", run_name="__main__")
"""
_LIBRARIES = """
import contextlib, importlib, json, sys
for name in json.loads(sys.stdin.read()):
    with contextlib.suppress(ImportError):
        importlib.import_module(name)
"""
_REPEATS = 3


def table(checkpoint: str | None = None, root: str | None = None) -> Table:
    """Seconds, the best of three: a demo job on a warm cache, and a process that only imports what it imports."""
    with tempfile.TemporaryDirectory() as folder:
        job = [sys.executable, "-c", _JOB, f"outputs={folder}/outputs", f"cache={folder}/cache"]
        _first_step(job)  # warms the cache
        jobs = [_first_step(job) for _ in range(_REPEATS)]
    whole = min(seconds for seconds, _ in jobs)
    libraries = min(_importing(jobs[0][1]) for _ in range(_REPEATS))
    built = Table(title="start of a small job, its images decoded already", title_justify="left")
    built.add_column("until")
    built.add_column("s", justify="right")
    built.add_column("share", justify="right")
    for name, seconds in (
        ("libraries are imported", libraries),
        ("the first training step, beyond that", whole - libraries),
        ("the first training step", whole),
    ):
        built.add_row(name, f"{seconds:.2f}", f"{100 * seconds / whole:.0f} %")
    return built


def _first_step(job: list[str]) -> tuple[float, str]:
    """Seconds, and as JSON the modules of others that were imported by then."""
    begin = time.time()
    output = subprocess.run(job, capture_output=True, text=True, check=False).stdout
    line = next(line for line in output.splitlines() if line.startswith("first step"))
    _, _, at, modules = line.split(" ", 3)
    return float(at) - begin, modules


def _importing(modules: str) -> float:
    """Seconds of a process that only imports them, in the same order."""
    begin = time.perf_counter()
    subprocess.run(
        [sys.executable, "-c", _LIBRARIES], input=modules, text=True, check=True, capture_output=True
    )
    return time.perf_counter() - begin
