"""Tables of a sweep: which runs it would start, and the results of all. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from statistics import mean
from typing import Any

from rich.markup import escape
from rich.table import Table

from clbench.errors import counted
from clbench.metrics.names import METRICS
from clbench.recording.run_directory import RunDirectory
from clbench.sweeps.runs import SweepRun, distinct
from clbench.terminal import SHOWN, further_measured, number


def plan_table(runs: Sequence[SweepRun], wanted: Sequence[SweepRun]) -> Table:
    """What a sweep would do: a row for each run, with memory and time of finished runs like it.

    Args:
        runs: all of the sweep.
        wanted: those of them that would be started.
    """
    table = Table(
        title=f"{counted(len(runs), 'run')}: {sum(run.state == 'finished' for run in runs)} finished, "
        f"{len(wanted)} would be started",
        title_justify="left",
    )
    for title in ("run", "state", "would"):
        table.add_column(title, overflow="fold")
    for title in ("images MB", "buffer MB", "model MB", "peak MB", "minutes"):
        table.add_column(title, overflow="fold", justify="right")
    names = distinct(runs)
    known = _finished_beside(runs)
    total = 0.0
    for run, name in zip(runs, names, strict=True):
        peak, minutes = _expected(run, known)
        starts = run in wanted
        total += minutes or 0.0 if starts else 0.0
        state = run.state if run.reason is None else f"{run.state}: {run.reason}"
        table.add_row(
            escape(name),
            escape(state),
            {"unfinished": "continue", "failed": "try again"}.get(run.state, "start") if starts else "stay",
            "" if run.stage_mb is None else f"{run.stage_mb:.1f}",
            "" if not run.buffer_mb else f"{run.buffer_mb:.{1 if run.buffer_mb >= 0.05 else 3}f}",
            "" if run.model_mb is None else f"{run.model_mb:.1f}",
            "" if peak is None else f"{peak:.0f}",
            "" if minutes is None else f"{minutes:.1f}",
        )
    if not known:
        table.caption = (
            f"{_ESTIMATES}; peak memory and time are known once a run of the method has finished beside these"
        )
        return table
    table.caption = f"{_ESTIMATES}; peak memory and time are those of finished runs of the same method and strategy, or method"
    if total:
        table.caption += f"; together about {total:.1f} minutes of those known"
    return table


_ESTIMATES = (
    "images are those of the largest stage with its buffer's, which a GPU holds up to gpu.image_memory_mb; a buffer is what is "
    "kept of images, by the size of one where they are compressed; a model is its "
    "networks' weights, with its bank where settings alone tell its size; the rest is left out"
)


def _finished_beside(runs: Sequence[SweepRun]) -> list[tuple[dict[str, str], Mapping[str, Any]]]:
    """All finished runs in the folders of these: the settings in their names, and their summaries."""
    found: list[tuple[dict[str, str], Mapping[str, Any]]] = []
    for folder in {run.directory.path.parent for run in runs}:
        for path in sorted(folder.iterdir()) if folder.is_dir() else []:
            summary = RunDirectory(path).summary()
            if summary is not None and summary["status"] == "complete":
                found.append((_settings_named(path.name), summary))
    return found


def _expected(
    run: SweepRun, known: Sequence[tuple[dict[str, str], Mapping[str, Any]]]
) -> tuple[float | None, float | None]:
    """Peak MB and minutes to expect of a run: means over the finished runs that are most like it.

    Args:
        known: settings and summary of each finished run.

    Returns:
        None for both where no run of the same method is finished.
    """
    wanted = _settings_named(run.directory.path.name)
    alike = [
        (sum(settings.get(key) == value for key, value in wanted.items()), summary)
        for settings, summary in known
        if settings.get("method") == wanted.get("method")
    ]
    best = [summary for shared, summary in alike if shared == max(shared for shared, _ in alike)]
    if not best:
        return None, None
    seconds = mean(summary["time"]["train_s"] + summary["time"]["eval_s"] for summary in best)
    return mean(summary["memory"]["peak_mb"] for summary in best), seconds / 60


def _settings_named(name: str) -> dict[str, str]:
    """The settings in the name of a run's directory: key -> value."""
    return dict(setting.partition("=")[::2] for setting in name.split(","))


def by_reason(failed: Sequence[tuple[str, SweepRun]]) -> list[tuple[str, str]]:
    """Which runs failed and why, those together that have one reason, with the log of the first that a job has written.

    Args:
        failed: each with its name.
    """
    alike: dict[str, list[tuple[str, SweepRun]]] = {}
    for name, run in failed:
        alike.setdefault(str(run.reason), []).append((name, run))
    found = []
    for reason, some in alike.items():
        names = "; ".join(name for name, _ in some[:_NAMED])
        names += f" and {len(some) - _NAMED} more" if len(some) > _NAMED else ""
        who = names if len(some) == 1 else f"{len(some)} runs ({names})"
        logs = [job["log"] for _, run in some if (job := run.directory.job())]
        whose = "log of the first" if len(some) > 1 else "log"
        found.append((who, f"{reason}; {whose}: {logs[0]}" if logs else reason))
    return found


_NAMED = 3  # runs that a line names


def sweep_table(runs: Sequence[SweepRun], width: int, told: Sequence[SweepRun] = ()) -> Table:
    """The results of a sweep: a row for each run, from its directory's summary.

    Args:
        runs: all of the sweep.
        width: columns of the terminal; in a narrow one what matters least is left out.
        told: those of which it was just said why they failed.
    """
    titles = [
        *(METRICS[metric].title for metric in SHOWN),
        *("F1 forgotten", "kept MB", "peak MB", "train s", "eval s", "ms/image"),
    ]
    rows: list[tuple[str, dict[str, str]]] = []
    notes: list[str] = []
    incomplete: list[tuple[str, SweepRun]] = []
    measured: set[str] = set()
    for name, run in zip(map(escape, distinct(runs)), runs, strict=True):
        summary = run.directory.summary()
        if summary is None or summary["status"] != "complete":
            state = "not begun" if summary is None else summary["status"]
            rows.append((f"{name} [red]{state}", {}))
            if run not in told:
                reason = str((summary or {}).get("reason", run.reason or state))
                incomplete.append((name, replace(run, reason=reason)))
            continue
        measured.update(summary["final"])
        if "not_recorded" in summary:
            notes.append(f"{name}: {escape(summary['not_recorded'])}")
        forgotten, memory, time = summary["average_forgetting_pct"], summary["memory"], summary["time"]
        cells = [
            *[number(summary["final"][metric]) for metric in SHOWN],
            "-" if forgotten is None else f"{number(forgotten, 1)} %",
            f"{memory['additional_mb']:.1f}",
            f"{memory['peak_mb']:.0f}",
            f"{time['train_s']:.1f}",
            f"{time['eval_s']:.1f}",
            f"{time['inference_ms_per_image']:.1f}",
        ]
        rows.append((name, dict(zip(titles, cells, strict=True))))

    def needed(between: str) -> int:
        """Columns of the terminal that the titles need, with `between` between the words of each."""
        columns = [
            [*title.replace(" ", between).split("\n"), *(cells.get(title, "") for _, cells in rows)]
            for title in titles
        ]
        return _NAME + 4 + sum(3 + max(map(len, column)) for column in columns)

    between = " " if needed(" ") <= width else "\n"
    for title in _DISPENSABLE:
        if needed(between) > width:
            titles.remove(title)
    table = Table(title="mean over tasks after the last stage", title_justify="left")
    table.add_column("run", overflow="fold")
    for title in titles:
        table.add_column(title.replace(" ", between), justify="right", no_wrap=True)
    for name, shown in rows:
        table.add_row(name, *[shown.get(title, "") for title in titles])
    failures = [f"[red]{who}[/]: {escape(reason)}" for who, reason in by_reason(incomplete)]
    further = further_measured(measured, "see each run's metrics.csv, or the page that clbench report makes")
    table.caption = "\n".join(filter(None, [further, *failures, *notes]))
    return table


_NAME = 20  # columns of a run's name, at least
# Columns that a narrow terminal goes without, the first one first.
_DISPENSABLE = ("eval s", "train s", "peak MB", "pixel AP", "ms/image", "image AUROC")
