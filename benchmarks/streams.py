"""Long streams: what a stage takes early and late, in a stream of 1,000 tasks of 8 tiny images each."""

import statistics
import tempfile
import time
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
from rich.table import Table

from benchmarks.growth import TINY, write_category
from benchmarks.running import composed
from clbench import assembly, experiment
from clbench.interruption import Interruption
from clbench.recording.checkpoint import Checkpoints
from clbench.recording.provenance import made_by
from clbench.recording.recorder import Recorder
from clbench.recording.run_directory import RunDirectory
from clbench.report import page
from clbench.report.reading import read
from clbench.terminal import Display

TASKS = 1000
RUNS = {
    "PatchCore, native": ("method=patchcore", "method.memory_size=4000"),
    "PaDiM, replay of 100": (
        "method=padim",
        "strategy=replay",
        "replay.size=100",
        "replay.selection=reservoir",
    ),
    "CFA, replay of 100": (
        "method=cfa",
        "strategy=replay",
        "replay.size=100",
        "replay.selection=reservoir",
        "method.epochs=1",
    ),
}
_AT = (10, 100, 1000)  # stages, counted from 1
_AROUND = 9  # stages up to one whose median stands for it


class Ends:
    """When each stage was saved, in s of the CPU, and the bytes that the process had written by then."""

    def __init__(self) -> None:
        self.times = [time.process_time()]
        self.written = [written()]

    def note(self) -> None:
        self.times.append(time.process_time())
        self.written.append(written())

    def at(self, stage: int) -> tuple[float, float]:
        """Milliseconds of the CPU and bytes of a stage, counted from 1: medians of it and of those before it.

        So stages that were evaluated, a few among many, do not count.
        """
        around = range(max(stage - _AROUND, 0), min(stage, len(self.times) - 1))
        return (
            1000 * statistics.median(self.times[one + 1] - self.times[one] for one in around),
            statistics.median(self.written[one + 1] - self.written[one] for one in around),
        )


def written() -> int:
    """The bytes that this process has written so far, to files and pipes (Linux)."""
    lines = Path("/proc/self/io").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("wchar"))


def table(checkpoint: str | None = None, root: str | None = None) -> Table:
    """Milliseconds and bytes of a stage without evaluation, early and late, and what the whole and its report take."""
    shown = Table(title=f"A stream of {TASKS} tasks of 8 images of 32 x 32 pixels", title_justify="left")
    shown.add_column("")
    for stage in _AT:
        shown.add_column(f"ms at {stage}", justify="right")
    for stage in _AT:
        shown.add_column(f"kB at {stage}", justify="right")
    for title in ("learning, s", "evaluating, s", "the rest, s", "peak, MB", "run on disk, MB"):
        shown.add_column(title, justify="right")
    with tempfile.TemporaryDirectory() as folder:
        stream = Path(folder) / "stream"
        for number in range(TASKS):
            write_category(stream / f"product_{number:04d}", np.random.default_rng(number))
        for name, overrides in RUNS.items():
            path = Path(folder) / "outputs" / "long" / name
            given = (
                *overrides,
                *TINY,
                f"dataset.root={stream}",
                f"cache={folder}/cache",
                "evaluate=every:100",
            )
            begin = time.perf_counter()
            ends, summary = run_whole(path, *given)
            spent = summary["time"]
            rest = time.perf_counter() - begin - spent["train_s"] - spent["eval_s"]
            found = [ends.at(stage) for stage in _AT if stage <= TASKS]
            size = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
            shown.add_row(
                name,
                *(f"{each:.0f}" for each, _ in found),
                *(f"{each / 1000:.0f}" for _, each in found),
                *(f"{seconds:.0f}" for seconds in (spent["train_s"], spent["eval_s"], rest)),
                f"{summary['memory']['peak_mb']:.0f}",
                f"{size / 1e6:.1f}",
            )
        begin = time.perf_counter()
        report = page.write_page(read([path.parent]), Path(folder) / "report", "long")
        took, size = time.perf_counter() - begin, report.page.stat().st_size
        shown.caption = f"the report of all {len(RUNS)} runs: {took:.1f} s, a page of {size / 1e6:.1f} MB"
    return shown


def run_whole(path: Path, *overrides: str) -> tuple[Ends, dict]:
    """Do a run as train.py does, with config.yaml for a report; gives its stages' ends and its summary."""
    config = composed(*overrides, "experiment=long")
    directory, ends = RunDirectory(path), Ends()
    with directory.lock(), Display(path.name) as display:
        made = assembly.assemble(config, display.progress)
        directory.write_config(config.plain(), {}, made_by(made.device))
        directory.write_summary(made.identity)
        save = Checkpoints.save_stage

        def noted(self: Checkpoints, *given: Any) -> None:
            save(self, *given)
            ends.note()

        with patch.object(Checkpoints, "save_stage", noted):
            return ends, experiment.run(made, directory, display, Interruption(), Recorder())
