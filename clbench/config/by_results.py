"""Orders of categories by the results of a finished run: easy to hard, or hard to easy. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from itertools import islice
from pathlib import Path
from typing import Any

from clbench.config.schema import Config, TaskOrder
from clbench.errors import UserError, counted
from clbench.metrics.names import METRICS
from clbench.paths import absolute
from clbench.recording.metrics_file import rows_of
from clbench.recording.run_directory import RunDirectory


def with_order(config: Config, directory: RunDirectory) -> Config:
    """The config with the list of tasks that a finished run's results decide on; unchanged where they do not.

    A run that has begun goes on in the order that it began with where the other run is not there any more, or cannot be
    read. Where it can, and gives another order by now, the list differs from the stored one, which is refused as any
    other setting that changed.

    Args:
        config: what `check` gave.
        directory: the run's.

    Raises:
        UserError: as `tasks_by_results`, where the run has not begun or begins anew; or its config.yaml is damaged.
    """
    order = config.task_order
    if not order.by_results:
        return config
    config = config.changed("task_order", run=absolute(str(order.run), "task_order.run"))
    try:
        tasks = tasks_by_results(config.task_order, config.dataset.name)
    except UserError:
        begun = None if config.overwrite else directory.config()
        stored = (begun or {}).get("task_order")
        if not isinstance(stored, dict) or {**stored, "tasks": None} != config.plain()["task_order"]:
            raise
        tasks = stored["tasks"]
    return config.changed("task_order", tasks=tasks)


def order_changed(config: Config) -> bool:
    """Whether the results that decided on a run's order give another one by now; not where they are gone.

    Args:
        config: the run's, with the list that it was made with.
    """
    order = config.task_order
    with suppress(UserError):
        return order.by_results and tasks_by_results(order, config.dataset.name) != order.tasks
    return False


def tasks_by_results(order: TaskOrder, dataset: str) -> list[str | list[str]]:
    """The list of tasks that a finished run's results decide on, as `task_order.tasks` takes it.

    A category counts by its value after the last stage, as metrics.csv has it; those that are alike come by name. The
    run must not depend on an order of categories itself, as those of strategy=joint and single do not.

    Args:
        order: of a kind that goes by results.
        dataset: name of the dataset that the run must be of.

    Raises:
        UserError: there is no such run, it is not finished, damaged, or of another dataset, its results depend on an
            order, it lacks the metric, or that is undefined for a category; or `order.sizes` is of another number.
    """
    path = Path(str(order.run))
    given = f"task_order.run={path}"
    directory = RunDirectory(path)
    summary = _finished(directory, given)
    if summary.get("dataset") != dataset:
        raise UserError(
            f"{given} is of dataset={summary.get('dataset')}, and this is {dataset}: give one on this"
        )
    found = _final(path / "metrics.csv", str(order.metric), given)
    names = [name for task in summary["categories"] for name in task]
    values = {name: value for name in names if (value := found.get(name)) is not None}
    if undefined := [name for name in names if name not in values]:
        raise UserError(
            f"task_order.metric={order.metric} is undefined for {', '.join(undefined)} in {path}: take another metric"
        )
    metric = METRICS.get(str(order.metric))
    lower_is_easier = metric is not None and metric.better == "lower"
    highest_first = (order.kind == "easy_to_hard") != lower_is_easier
    names.sort(key=lambda name: (-values[name] if highest_first else values[name], name))
    if order.sizes is None:
        return list(names)
    if sum(order.sizes) != len(names):
        raise UserError(
            f"task_order.sizes={order.sizes} is of {counted(sum(order.sizes), 'category', 'categories')}, and {path} has "
            f"{len(names)}: give sizes of as many"
        )
    remaining = iter(names)
    return [list(islice(remaining, size)) for size in order.sizes]


def _finished(directory: RunDirectory, given: str) -> Mapping[str, Any]:
    """The summary of a finished run whose results depend on no order of categories.

    Args:
        given: the setting that names the run, to begin messages with.

    Raises:
        UserError: it is none.
    """
    if not directory.path.is_dir():
        raise UserError(
            f"{given} does not exist: give the directory of a finished run, outputs/EXPERIMENT/RUN"
        )
    summary = directory.summary()
    if summary is None:
        damaged = (directory.path / "summary.json").is_file()
        problem = "is damaged (summary.json)" if damaged else "is no directory of a run that has begun"
        raise UserError(f"{given} {problem}: give that of a finished run, outputs/EXPERIMENT/RUN")
    if summary["status"] != "complete":
        raise UserError(f"{given} is not finished ({summary['status']}): repeat its command first")
    if not directory.complete(summary):
        raise UserError(
            f"{given} is damaged (metrics.csv is not as the run wrote it, or config.yaml is missing): repeat its command "
            "first"
        )
    flags = summary.get("strategy_flags")
    if flags is None or "categories" not in summary:
        raise UserError(
            f"{given} is of an earlier version of clbench: make it anew, with another experiment=NAME"
        )
    if not (flags.get("joint") or flags.get("task_known")):
        raise UserError(
            f"{given} is of strategy={summary.get('strategy')}, whose results depend on an order themselves: give a run of "
            "strategy=single or joint"
        )
    return summary


def _final(path: Path, metric: str, given: str) -> Mapping[str, float | None]:
    """The values of a metric after the last stage: category -> value, None where it is undefined.

    Args:
        path: metrics.csv of a finished run.
        metric: its name.
        given: the setting that names the run, to begin messages with.

    Raises:
        UserError: the run has no such metric, or the file does not read as a run's.
    """
    try:
        rows = list(rows_of(path.read_text(encoding="utf-8")))
        last = max(row.stage for row in rows)
    except (OSError, ValueError) as error:
        raise UserError(f"{given} is damaged (metrics.csv): repeat its command first") from error
    metrics = dict.fromkeys(row.metric for row in rows if row.stage == last)
    if metric not in metrics:
        raise UserError(
            f"task_order.metric={metric} was not measured in {path.parent}: give one of {', '.join(metrics)}"
        )
    return {row.category: row.value for row in rows if (row.stage, row.metric) == (last, metric)}
