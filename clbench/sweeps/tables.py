"""Tables of a sweep: what it would do, and what it found. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import mean
from typing import Any

from rich.markup import escape
from rich.table import Table

from clbench.recording.run_directory import RunDirectory
from clbench.sweeps.runs import SweepRun, distinct
from clbench.terminal import SHOWN, TITLES, number


def plan_table(runs: Sequence[SweepRun], wanted: Sequence[SweepRun]) -> Table:
    """What a sweep would do: a row a run, with the memory and time of finished runs that are most like it."""
    table = Table(
        title=f"{_count(len(runs), 'run')}: {sum(run.state == 'finished' for run in runs)} finished, "
        f"{len(wanted)} would be started",
        title_justify="left",
    )
    for title in ("run", "state", "would", "peak MB", "minutes"):
        table.add_column(
            title, overflow="fold", justify="right" if title in ("peak MB", "minutes") else "left"
        )
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
            "" if peak is None else f"{peak:.0f}",
            "" if minutes is None else f"{minutes:.1f}",
        )
    table.caption = (
        f"peak memory and time are those of finished runs of the same method and strategy, or method; "
        f"together about {total:.0f} minutes of those known"
        if total
        else "peak memory and time are known once a run of the method has finished beside these"
    )
    return table


def _count(number: int, what: str) -> str:
    return f"{number} {what}" if number == 1 else f"{number} {what}s"


def _finished_beside(runs: Sequence[SweepRun]) -> list[tuple[dict[str, str], Mapping[str, Any]]]:
    """Finished runs of the same experiments: the parts of their names, and their summaries."""
    found: list[tuple[dict[str, str], Mapping[str, Any]]] = []
    for folder in {run.directory.path.parent for run in runs}:
        for path in sorted(folder.iterdir()) if folder.is_dir() else []:
            summary = RunDirectory(path).summary()
            if summary is not None and summary["status"] == "complete":
                found.append((_parts(path.name), summary))
    return found


def _expected(
    run: SweepRun, known: Sequence[tuple[dict[str, str], Mapping[str, Any]]]
) -> tuple[float | None, float | None]:
    """Peak MB and minutes of a run: means over the finished runs that share the most of its settings."""
    own = _parts(run.directory.path.name)
    alike = [
        (sum(parts.get(key) == value for key, value in own.items()), summary)
        for parts, summary in known
        if parts.get("method") == own.get("method")
    ]
    best = [summary for shared, summary in alike if shared == max(shared for shared, _ in alike)]
    if not best:
        return None, None
    seconds = mean(summary["time"]["train_s"] + summary["time"]["eval_s"] for summary in best)
    return mean(summary["memory"]["peak_mb"] for summary in best), seconds / 60


def _parts(name: str) -> dict[str, str]:
    return dict(part.partition("=")[::2] for part in name.split(","))


def sweep_table(runs: Sequence[SweepRun], width: int) -> Table:
    """A row a run, from its directory's summary, named by what it does not share with the others.

    Args:
        width: columns of the terminal; in a narrow one what matters least is left out.
    """
    titles = [
        *(TITLES[metric] for metric in SHOWN),
        *("F1 forgotten", "kept MB", "peak MB", "train s", "eval s", "ms/image"),
    ]
    rows: list[tuple[str, dict[str, str]]] = []
    unfinished: list[str] = []
    for name, run in zip(map(escape, distinct(runs)), runs, strict=True):
        directory, summary = run.directory, run.directory.summary()
        if summary is None or summary["status"] != "complete":
            state = "not begun" if summary is None else summary["status"]
            rows.append((f"{name} [red]{state}", {}))
            job = directory.job()
            said = [
                str((summary or {}).get("reason", run.reason or state)),
                *([f"log: {job['log']}"] if job else []),
            ]
            unfinished.append(f"[red]{name}[/]: {escape('; '.join(said))}")
            continue
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
        """Columns of the terminal for these titles, with this between their words."""
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
    table.caption = "\n".join(unfinished)
    return table


_NAME = 20  # columns of a run's name, at least
_DISPENSABLE = ("eval s", "train s", "peak MB", "pixel AP", "ms/image", "image AUROC")  # the first goes first
