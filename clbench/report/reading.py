"""Run directories as they are found: finished, failed, unfinished or damaged."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from clbench.errors import UserError, counted
from clbench.metrics import continual
from clbench.metrics.continual import Matrix
from clbench.metrics.names import METRICS
from clbench.recording.metrics_file import rows_of
from clbench.recording.run_directory import RunDirectory
from clbench.report.settings import Departures, Flags, read_departures
from clbench.results import Results, Values

# What every run has, in the order of the paper's table.
REPORTED = ("image_auroc", "image_f1", "pixel_auroc", "pixel_f1", "pixel_ap", "aupro", "image_ap")
FORGETTING_OF = (
    "image_auroc",
    "pixel_ap",
    "pixel_f1",
)  # whose forgetting is compared with what others published

FoundState = Literal["finished", "failed", "unfinished", "damaged", "repeated"]


@dataclass
class FoundRun:
    """A run directory, and what could be read of it.

    Attributes:
        reason: why it is not among the finished ones.
        summary: what summary.json holds; empty where the run has not begun.
        config: what config.yaml holds.
        results: what metrics.csv holds; None where the run has not begun.
        stages: number of stages that metrics.csv has.
    """

    path: Path
    state: FoundState
    reason: str = ""
    summary: Mapping[str, Any] = field(default_factory=dict)
    config: Mapping[str, Any] = field(default_factory=dict)
    results: Results | None = None
    stages: int = 0

    @property
    def name(self) -> str:
        """Its experiment's and its own folder: `demo/method=padim`."""
        return f"{self.path.parent.name}/{self.path.name}"

    @property
    def seed(self) -> int:
        """The run's seed; a run that has not begun has none.

        Raises:
            KeyError: it has not begun.
        """
        return self.summary["seed"]

    @property
    def tasks(self) -> list[str]:
        """Names of its tasks in their order; empty where the run has not begun."""
        return list(self.summary.get("tasks", []))

    @property
    def categories_by_task(self) -> list[list[str]]:
        """The names of the categories of each task; a pooled task counts as one category."""
        return _categories(self.summary)

    @cached_property
    def task_of(self) -> dict[str, int]:
        """Category -> index of its task, in the order of R's columns."""
        return {name: task for task, names in enumerate(self.categories_by_task) for name in names}

    @cached_property
    def categories(self) -> list[str]:
        """The categories of all tasks, in the order of R's columns; a pooled task counts as one."""
        return list(self.task_of)

    @property
    def pooled(self) -> bool:
        """Whether tasks of several categories were evaluated as one, which earlier versions did."""
        named = (self.config.get("task_order") or {}).get("tasks") or []
        return "categories" not in self.summary and any(
            isinstance(task, list) and len(task) > 1 for task in named
        )

    @cached_property
    def R(self) -> Mapping[str, Matrix]:
        """Metric -> [stage][category], of the stages that were written."""
        return (
            {m: self.results.matrix(m)[: self.stages] for m in self.results.metrics} if self.results else {}
        )

    @property
    def further(self) -> list[str]:
        """The metrics that it has beyond those that every run has, in the order of their list."""
        return [metric for metric in METRICS if metric in self.R and metric not in REPORTED]

    @cached_property
    def flags(self) -> Flags:
        """What the run's strategy can do."""
        return Flags.of(self.summary, self.config)

    @property
    def expected_stages(self) -> int:
        """Number of stages that the run has once it is complete."""
        return 1 if self.flags.joint else len(self.tasks)

    @property
    def learned(self) -> list[int]:
        """The stage, from 0, that learns each category."""
        return [] if self.results is None else self.results.learned

    @cached_property
    def departures(self) -> Departures:
        """What differs from what the run's benchmark gives, see `settings.read_departures`."""
        return read_departures(self.config)

    @property
    def device(self) -> str:
        """The device that the run was made on, in words."""
        return str((self.config.get("made_by") or {}).get("device", "unknown"))

    def over_stages(self, metric: str) -> list[float | None]:
        """The mean of a metric over the categories seen, for each stage; None where the run does not have it."""
        if self.results is None or metric not in self.R:
            return [None] * self.stages
        return [self.results.mean_seen(metric, stage) for stage in range(self.stages)]


def read(folders: Sequence[Path]) -> list[FoundRun]:
    """Read all run directories in the folders of experiments, in order of their names.

    Raises:
        UserError: a folder is not there, cannot be read, or holds no runs.
    """
    runs: list[FoundRun] = []
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
            raise UserError(f"{folder} holds no runs: give {_experiments(folder) or 'outputs/EXPERIMENT'}")
        runs += [_read_run(path) for path in inside]
    return runs


def _begun(path: Path) -> bool:
    """Whether a folder is a run's: config.yaml is not looked for, as folders of configs hold one too."""
    return any((path / name).exists() for name in ("summary.json", "run.lock", "job.json"))


def _experiments(folder: Path) -> str:
    """The folders of runs that lie in a folder, as words of a command line; empty where there are none."""
    found = sorted({path.parent for path in folder.glob("*/*") if path.is_dir() and _begun(path)})
    return " ".join(map(str, found[:8])) + (f" or one of {len(found) - 8} more" if len(found) > 8 else "")


def _read_run(path: Path) -> FoundRun:
    directory = RunDirectory(path)
    try:
        summary, config = directory.summary(), directory.config() or {}
        written = (path / "metrics.csv").read_bytes() if (path / "metrics.csv").is_file() else b""
    except (UserError, OSError) as error:
        return FoundRun(path, "damaged", f"a file cannot be read: {error}")
    if summary is None:
        if (path / "summary.json").is_file():
            return FoundRun(path, "damaged", "summary.json is damaged", config=config)
        return FoundRun(path, "unfinished", "not begun", config=config)
    run = FoundRun(path, "unfinished", "", summary, config)
    try:
        _check_summary(summary)
        if not isinstance(config.get("made_by") or {}, dict):
            raise TypeError("made_by in config.yaml")
        whole, newline, torn = written.rpartition(b"\n")
        expected = run.expected_stages
        run.results, run.stages = _results((whole + newline).decode(), run)
        if summary["status"] == "complete" and "metrics_sha256" in summary:
            run.stages = expected  # also those that left no row, as no image to evaluate was there
    except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
        return FoundRun(path, "damaged", f"it does not read as a run: {type(error).__name__} {error}")
    if summary["status"] == "failed":
        run.state, run.reason = "failed", str(summary.get("reason", "it did not say why"))
    elif summary["status"] != "complete":
        run.reason = f"under way or interrupted, {run.stages} of {counted(expected, 'stage')} written"
    elif summary.get("metrics_sha256", digest := hashlib.sha256(written).hexdigest()) != digest:
        run.state, run.reason = (
            "damaged",
            "metrics.csv is not as the run wrote it; its command, repeated, writes it again",
        )
    elif wrong := "metrics.csv ends within a line" if torn else _wrong(run):
        run.state, run.reason = "damaged", wrong
    else:
        run.state = "finished"
    return run


def _check_summary(summary: Mapping[str, Any]) -> None:
    """Check that summary.json says what every run says of itself.

    Raises:
        KeyError, TypeError, ValueError: it does not.
    """
    for name in ("method", "strategy", "dataset"):
        if not isinstance(summary[name], str):
            raise TypeError(f"{name}={summary[name]!r} in summary.json")
    if not _are_names(summary["tasks"]):
        raise TypeError("tasks in summary.json")
    categories = _categories(summary)
    if not (isinstance(categories, list) and all(map(_are_names, categories))):
        raise TypeError("categories in summary.json")
    if len(categories) != len(summary["tasks"]):
        raise ValueError(
            f"summary.json has {counted(len(summary['tasks']), 'task')} and categories of {len(categories)}"
        )
    if not isinstance(summary["seed"], int) or not isinstance(summary["replay_size"], int | None):
        raise TypeError("seed or replay_size in summary.json")
    if summary["status"] == "complete":
        memory, time = summary["memory"], summary["time"]
        spent = [memory["architecture_mb"], memory["additional_mb"], memory["peak_mb"]]
        spent += [time["train_s"], time["eval_s"], time["inference_ms_per_image"]]
        final = {metric: summary["final"][metric] for metric in REPORTED}
        final |= {metric: value for metric, value in summary["final"].items() if metric in METRICS}
        values = [*spent, *(value for value in final.values() if value is not None)]
        if not all(isinstance(value, int | float) and math.isfinite(value) for value in values):
            raise TypeError("a number in summary.json is none")
        if min(spent) < 0:
            raise ValueError("memory or time in summary.json is less than nothing")


def _are_names(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(name, str) for name in value)


def _categories(summary: Mapping[str, Any]) -> list[list[str]]:
    """The categories of each task; in summaries of earlier versions, which have none, the task's name."""
    return summary.get("categories") or [[task] for task in summary.get("tasks", [])]


def _wrong(run: FoundRun) -> str:
    """What is wrong with a run that says it is complete; empty where nothing is."""
    if not run.config:
        return "config.yaml is missing"
    if run.stages != run.expected_stages:
        return f"metrics.csv has {run.stages} of {counted(run.expected_stages, 'stage')}"
    final, mean = run.summary["final"]["pixel_f1"], continual.final_mean(run.R["pixel_f1"])
    if (final is None) != (mean is None) or (
        final is not None and mean is not None and abs(final - mean) > 1e-5
    ):
        return f"summary.json has a final pixel F1 of {final}, and metrics.csv of {mean}"
    return ""


def _results(text: str, run: FoundRun) -> tuple[Results, int]:
    """What the text of metrics.csv holds, with or without `category`, and the number of stages that it has.

    Raises:
        ValueError, IndexError: the text is none of a metrics.csv of the run's tasks.
    """
    tasks, categories = run.tasks, _categories(run.summary)
    columns = {name: column for column, name in enumerate(run.categories)}
    found: dict[tuple[int, int], Values] = {}
    rows = list(rows_of(text))
    there = {row.metric for row in rows}
    metrics = (*REPORTED, *(name for name in METRICS if name in there and name not in REPORTED))
    for stage, task, task_name, category, metric, value in rows:
        of_task = tasks[task] == task_name and category in categories[task]
        if stage not in range(len(tasks)) or not of_task:
            raise ValueError(
                f"a row of metrics.csv is of stage {stage}, task {task} '{task_name}' and '{category}'"
            )
        where = stage, columns[category]
        if where not in found:
            found[where] = dict.fromkeys(metrics)
        if metric in found[where]:
            found[where][metric] = value
    stages = 1 + max((stage for stage, _ in found), default=-1)
    every = range(len(tasks))
    learning: list[list[int]] = [list(every)] if run.flags.joint else [[task] for task in every]
    results = Results(categories, learning + [[]] * (stages - len(learning)), metrics)
    for (stage, column), one in found.items():
        results.add(stage, column, one)
    return results, stages
