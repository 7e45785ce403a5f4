"""The runs of a sweep: where each stands, which are to be launched, and their tables. Imports no torch."""

import hashlib
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from statistics import mean
from typing import Any, Literal

from omegaconf import DictConfig
from rich.markup import escape
from rich.table import Table

from clbench.config import in_results, run_name
from clbench.recording.run_directory import RunDirectory, State
from clbench.terminal import SHOWN, TITLES, number

Only = Literal["failed", "missing"]


@dataclass
class Run:
    """A run of a sweep.

    Attributes:
        overrides: that make it.
        reason: of its failure, where it failed.
    """

    overrides: list[str]
    directory: RunDirectory
    state: State
    reason: str | None = None


def chosen(runs: Sequence[Run], only: Only | None) -> list[Run]:
    """The runs to launch: all that are not finished, those that `failed`, or those that are `missing`."""
    kinds: dict[str | None, tuple[State, ...]] = {
        None: ("failed", "unfinished", "missing"),
        "failed": ("failed",),
        "missing": ("unfinished", "missing"),
    }
    return [run for run in runs if run.state in kinds[only]]


def suited(runs: Sequence[list[str]], method: str, settings: Callable[[str], set[str]]) -> list[list[str]]:
    """The overrides of each run without those settings that its method does not have and another run's has.

    Args:
        method: of a run whose overrides name none.
        settings: gives the names of a method's.
    """
    own = [next((t.partition("=")[2] for t in texts if t.startswith("method=")), method) for texts in runs]
    named = [[re.match(r"\+*method\.(\w+)", text) for text in texts] for texts in runs]
    if len(set(own)) == 1 or not any(map(any, named)):
        return list(runs)
    has = {choice: settings(choice) for choice in set(own)}
    anyone = set().union(*has.values())
    return [
        [
            text
            for text, match in zip(texts, matches, strict=True)
            if match is None or match[1] in has[choice] or match[1] not in anyone
        ]
        for texts, matches, choice in zip(runs, named, own, strict=True)
    ]


def finished_unchanged(config: DictConfig, overrides: Sequence[str]) -> Run | None:
    """The finished run of these overrides, known by what it was composed from: far faster than composing it.

    Args:
        config: of the sweep, with what its runs share.

    Returns:
        None where it is not finished, or where only composing it could tell.
    """
    if config.overwrite or not _folder_is_shared(config, overrides):
        return None
    directory = RunDirectory(Path(config.hydra.sweep.dir) / run_name(list(overrides)))
    summary = directory.summary()
    if summary is None or not directory.complete(summary):
        return None
    if summary.get("composed_from") != composed_from(config.hydra, overrides):
        return None
    return Run(list(overrides), directory, "finished")


def composed_from(hydra: Any, overrides: Sequence[str]) -> str:
    """A digest of all that a run's config is composed from: conf/, and the overrides that change results."""
    (folder,) = (source.path for source in hydra.runtime.config_sources if source.provider == "main")
    named = sorted(text for text in overrides if in_results(text))
    return hashlib.sha256("\n".join([_folder_digest(folder), *named]).encode()).hexdigest()


@lru_cache
def _folder_digest(folder: str) -> str:
    digest = hashlib.sha256()
    for path, folders, files in os.walk(folder, followlinks=True):
        folders.sort()
        for name in sorted(files):
            file = Path(path) / name
            digest.update(str(file.relative_to(folder)).encode() + b"\0" + file.read_bytes() + b"\0")
    return digest.hexdigest()


def _folder_is_shared(config: DictConfig, overrides: Sequence[str]) -> bool:
    """Whether a run lies where its sweep's own config says."""
    given = dict(text.partition("=")[::2] for text in overrides)
    places = {"experiment": config.experiment, "outputs": config.outputs}
    return all(given.get(key, value) == value for key, value in places.items())


def plan_table(runs: Sequence[Run], wanted: Sequence[Run]) -> Table:
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


def _finished_beside(runs: Sequence[Run]) -> list[tuple[dict[str, str], Mapping[str, Any]]]:
    """Finished runs of the same experiments: the parts of their names, and their summaries."""
    found: list[tuple[dict[str, str], Mapping[str, Any]]] = []
    for folder in {run.directory.path.parent for run in runs}:
        for path in sorted(folder.iterdir()) if folder.is_dir() else []:
            summary = RunDirectory(path).summary()
            if summary is not None and summary["status"] == "complete":
                found.append((_parts(path.name), summary))
    return found


def _expected(
    run: Run, known: Sequence[tuple[dict[str, str], Mapping[str, Any]]]
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


def distinct(runs: Sequence[Run]) -> list[str]:
    """What each run's overrides do not share with the others', for tables."""
    given = [[text.lstrip("+") for text in run.overrides] for run in runs]
    shared = set(given[0]).intersection(*given[1:])
    return [
        ", ".join(text for text in texts if text not in shared) or run.directory.path.name
        for texts, run in zip(given, runs, strict=True)
    ]


def sweep_table(runs: Sequence[Run], width: int) -> Table:
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
