"""Run directories as they are found: finished, failed, unfinished or damaged."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from clbench.errors import UserError
from clbench.metrics import continual
from clbench.metrics.continual import Matrix
from clbench.recording.run_directory import RunDirectory
from clbench.report.settings import Departures, departures

METRICS = ("image_auroc", "image_f1", "pixel_auroc", "pixel_f1", "pixel_ap", "aupro", "image_ap")

State = Literal["finished", "failed", "unfinished", "damaged", "repeated"]


@dataclass
class Run:
    """A run directory, and what could be read of it.

    Attributes:
        reason: why it is not among the finished ones.
        R: metric -> [stage][task], of the stages that were written.
    """

    path: Path
    state: State
    reason: str = ""
    summary: Mapping[str, Any] = field(default_factory=dict)
    config: Mapping[str, Any] = field(default_factory=dict)
    R: Mapping[str, Matrix] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return f"{self.path.parent.name}/{self.path.name}"

    @property
    def tasks(self) -> list[str]:
        return list(self.summary.get("tasks", []))

    @property
    def stages(self) -> int:
        """Stages that were written."""
        return len(self.R.get("pixel_f1", []))

    @property
    def learned(self) -> list[int]:
        """The stage that learns each task."""
        return [0] * len(self.tasks) if self.summary["strategy"] == "joint" else list(range(len(self.tasks)))

    @cached_property
    def departures(self) -> Departures:
        """See `settings.departures`."""
        return departures(self.config)

    @property
    def device(self) -> str:
        return str((self.config.get("made_by") or {}).get("device", "unknown"))

    def over_stages(self, metric: str) -> list[float | None]:
        """A metric's mean over the tasks seen, after each stage."""
        learned = self.learned
        return [
            continual.final_mean([[value for value, at in zip(row, learned, strict=True) if at <= stage]])
            for stage, row in enumerate(self.R[metric])
        ]


def read(folders: Sequence[Path]) -> list[Run]:
    """The runs of experiments' folders, in order of their names.

    Raises:
        UserError: a folder is not there, cannot be read, or holds no runs.
    """
    runs: list[Run] = []
    for folder in dict.fromkeys(path.resolve() for path in folders):
        if not folder.is_dir():
            near = sorted(path.name for path in folder.parent.glob("*") if path.is_dir())
            there = f"; there are: {', '.join(near[:8])}" if near else ""
            raise UserError(f"{folder} is no folder{there}: give outputs/EXPERIMENT")
        if (folder / "summary.json").is_file():
            raise UserError(f"{folder} is one run: give the folder of its experiment, {folder.parent}")
        try:
            inside = sorted(path for path in folder.iterdir() if path.is_dir() and _begun(path))
        except OSError as error:
            raise UserError(
                f"{folder} cannot be read ({error.strerror}): get the right to, or give another folder"
            ) from error
        if not inside:
            raise UserError(f"{folder} holds no runs: give outputs/EXPERIMENT, of runs that were begun")
        runs += [_read(path) for path in inside]
    return runs


def _begun(path: Path) -> bool:
    return any((path / name).exists() for name in ("summary.json", "config.yaml", "run.lock", "job.json"))


def _read(path: Path) -> Run:
    directory = RunDirectory(path)
    try:
        summary, config = directory.summary(), directory.config()
        text = (path / "metrics.csv").read_text() if (path / "metrics.csv").is_file() else ""
    except (UserError, OSError, UnicodeDecodeError) as error:
        return Run(path, "damaged", f"a file cannot be read: {error}")
    if summary is None:
        if (path / "summary.json").is_file():
            return Run(path, "damaged", "summary.json is damaged", config=config or {})
        return Run(path, "unfinished", "not begun", config=config or {})
    try:
        _check(summary)
        if config and not isinstance(config.get("made_by") or {}, dict):
            raise TypeError("made_by in config.yaml")
        run = Run(path, "unfinished", "", summary, config or {}, _matrices(text, summary["tasks"]))
    except (KeyError, TypeError, ValueError, IndexError, csv.Error) as error:
        return Run(path, "damaged", f"it does not read as a run: {type(error).__name__} {error}")
    expected = 1 if summary["strategy"] == "joint" else len(run.tasks)
    if summary["status"] == "failed":
        run.state, run.reason = "failed", str(summary.get("reason", "it did not say why"))
    elif summary["status"] != "complete":
        run.reason = f"under way or interrupted, {run.stages} of {expected} stages written"
    else:
        run.state, run.reason = "finished", ""
        if wrong := _wrong(run, expected):
            run.state, run.reason = "damaged", wrong
    return run


def _check(summary: Mapping[str, Any]) -> None:
    """Whether what every run says of itself is there.

    Raises:
        KeyError, TypeError, ValueError: it is not.
    """
    for name in ("method", "strategy", "dataset"):
        if not isinstance(summary[name], str):
            raise TypeError(f"{name}={summary[name]!r} in summary.json")
    if not (isinstance(summary["tasks"], list) and all(isinstance(name, str) for name in summary["tasks"])):
        raise TypeError("tasks in summary.json")
    if not isinstance(summary["seed"], int) or not isinstance(summary["replay_size"], int | None):
        raise TypeError("seed or replay_size in summary.json")
    if summary["status"] == "complete":
        memory, time = summary["memory"], summary["time"]
        spent = [memory["architecture_mb"], memory["additional_mb"], memory["peak_mb"]]
        spent += [time["train_s"], time["eval_s"], time["inference_ms_per_image"]]
        values = [*spent, *(summary["final"][m] for m in METRICS if summary["final"][m] is not None)]
        if not all(isinstance(value, int | float) and math.isfinite(value) for value in values):
            raise TypeError("a number in summary.json is none")
        if min(spent) < 0:
            raise ValueError("memory or time in summary.json is less than nothing")


def _wrong(run: Run, expected: int) -> str:
    """What is wrong with a run that says it is complete; nothing, mostly."""
    if not run.config:
        return "config.yaml is missing"
    if run.stages != expected:
        return f"metrics.csv has {run.stages} of {expected} stages"
    final, own = run.summary["final"]["pixel_f1"], continual.final_mean(run.R["pixel_f1"])
    if (final is None) != (own is None) or (
        final is not None and own is not None and abs(final - own) > 1e-5
    ):
        return f"summary.json has a final pixel F1 of {final}, and metrics.csv of {own}"
    return ""


def _matrices(text: str, tasks: Sequence[str]) -> dict[str, Matrix]:
    """R of each metric from the text of metrics.csv.

    Raises:
        KeyError, ValueError, IndexError: it is no such text.
    """
    rows = list(csv.reader(io.StringIO(text)))[1:]
    stages = 1 + max((int(row[0]) for row in rows), default=-1)
    R: dict[str, list[list[float | None]]] = {
        m: [[None] * len(tasks) for _ in range(stages)] for m in METRICS
    }
    for stage, index, task, metric, value in rows:
        if int(stage) < 0 or tasks[int(index)] != task:
            raise ValueError(f"a row of metrics.csv is of stage {stage} and task {index} '{task}'")
        if metric in R:
            R[metric][int(stage)][int(index)] = None if value == "undefined" else float(value)
            if value != "undefined" and not math.isfinite(float(value)):
                raise ValueError(f"{metric} of '{task}' in metrics.csv is {value}")
    return dict(R)
