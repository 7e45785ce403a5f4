"""One table over experiments: a row for each variant and protocol, with the command that makes it."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import hydra
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException
from omegaconf import OmegaConf

from clbench import digests
from clbench.config import NOT_IN_RESULTS, differences, flat, sources
from clbench.config.checking import resolved
from clbench.config.departures import ABSENT
from clbench.config.differences import same
from clbench.config.schema import BY_RESULTS
from clbench.config.words import written
from clbench.errors import UserError
from clbench.metrics import continual
from clbench.metrics.names import METRICS
from clbench.recording.files import write_whole
from clbench.report.comparison import Group
from clbench.report.reading import FORGETTING_OF, REPORTED, FoundRun
from clbench.report.rows import Row, Spread
from clbench.report.settings import COMPUTED
from clbench.report.tables import (
    NOTHING,
    Cell,
    Column,
    Line,
    Table,
    as_csv,
    as_latex,
    as_markdown,
    latex,
    spread_text,
    words,
)

_DIGEST = 12  # hexadecimal digits that are shown


def table(groups: Sequence[Group]) -> Table:
    """The rows of all groups, by protocol: means over seeds with their sample deviations."""
    metrics = [
        *REPORTED,
        *(
            name
            for name in METRICS
            if name not in REPORTED and any(name in group.metrics for group in groups)
        ),
    ]
    measures = _measures(metrics)
    columns = [
        Column("protocol", "protocol"),
        Column("method", "method"),
        Column("strategy", "strategy"),
        Column("settings", "settings"),
        Column("seeds", "seeds", numbers=True),
        *(Column(key, title, numbers=True) for key, (title, _, _) in measures.items()),
        Column("config", "config"),
        Column("command", "command"),
    ]
    made = Table("leaderboard", "Means over seeds, ± their sample deviation", columns)
    for group in sorted(groups, key=lambda group: (group.protocol or "~", group.number)):
        for row in group.found:
            spreads = [
                (Spread.of(map(measure, row.runs)), digits) for _, digits, measure in measures.values()
            ]
            made.lines.append(
                Line(
                    [
                        words(group.protocol or group.title),
                        words(row.variant.method_title),
                        words(row.variant.strategy_title),
                        words(_settings(group, row)),
                        Cell(str(len(row.runs)), len(row.runs)),
                        *(
                            Cell(spread_text(spread, digits), spread.mean, spread.deviation)
                            for spread, digits in spreads
                        ),
                        words(config_digest(row.runs[0])),
                        words(command(row) or NOTHING),
                    ],
                    row.variant.method,
                    row.variant.strategy,
                )
            )
    return made


def write(groups: Sequence[Group], folder: Path) -> list[Path]:
    """Write leaderboard.csv, .md and .tex into a folder; in the last two, commands stand below the table.

    Returns:
        The paths of the files.

    Raises:
        UserError: a file cannot be written.
    """
    whole = table(groups)
    short = Table(
        whole.name, whole.caption, whole.columns[:-1], [Line(line.cells[:-1]) for line in whole.lines]
    )
    commands = {line.cells[-2].text: line.cells[-1].text for line in whole.lines}
    markdown = "\n".join(f"`{digest}`\n\n```sh\n{text}\n```\n" for digest, text in commands.items())
    listed = "\n".join(
        rf"\item[\texttt{{{digest}}}] \texttt{{{latex(text)}}}" for digest, text in commands.items()
    )
    texts = {
        "csv": as_csv([(0, whole)]),
        "md": f"{as_markdown(short)}\n{markdown}",
        "tex": f"{as_latex(short)}\n\\begin{{description}}\n{listed}\n\\end{{description}}\n",
    }
    paths = []
    for kind, text in texts.items():
        path = folder / f"leaderboard.{kind}"
        write_whole(path, lambda part, text=text: part.write_text(text, encoding="utf-8"))  # type: ignore[misc]
        paths.append(path)
    return paths


_Measure = tuple[str, int, Callable[[FoundRun], float | None]]  # title, digits, value of a run


def _measures(metrics: Sequence[str]) -> dict[str, _Measure]:
    """What is shown of each run: key -> its title, digits and value."""

    def final(metric: str) -> Callable[[FoundRun], float | None]:
        return lambda run: run.summary["final"].get(metric)

    def forgetting(metric: str) -> Callable[[FoundRun], float | None]:
        return lambda run: continual.forgetting(run.R[metric], run.learned)

    return {
        "kept_mb": ("kept, MB", 1, lambda run: run.summary["memory"]["additional_mb"]),
        "training_min": ("training, min", 2, lambda run: run.summary["time"]["train_s"] / 60),
        **{metric: (METRICS[metric].title, 3, final(metric)) for metric in metrics},
        **{
            f"fm_best_minus_final_{metric}": (
                f"FM of {METRICS[metric].title} (best since learned − final)",
                3,
                forgetting(metric),
            )
            for metric in FORGETTING_OF
        },
        "relative_forgetting_pixel_f1_pct": (
            "relative forgetting of pixel F1, % of just learned",
            2,
            lambda run: continual.average_forgetting_pct(run.R["pixel_f1"], run.learned),
        ),
    }


def _settings(group: Group, row: Row) -> str:
    """What sets a row apart from its benchmark's defaults, beside what method and strategy are titled with."""
    apart = {"benchmark": group.benchmark, **group.apart}
    shown = [
        f"{key}={value}" for key, value in apart.items() if key != "dataset.root"
    ]  # the command has the place
    # Groups of no protocol may be called alike.
    differing = [] if group.protocol else [text for text in group.differs_in if text not in shown]
    return ", ".join([*shown, *differing, *row.variant.given])


def command(row: Row) -> str | None:
    """The command that makes a row's runs; None where none is known, as for choices that conf/ does not have.

    It is composed again, and gives the config that the first of them stored, or is not given. Where the dataset lies, and
    the run that an order of tasks goes by, are for the reader to say: `dataset.root=FOLDER`.
    """
    run, seeds = row.runs[0], row.seeds
    departures = run.config.get("departures")
    if departures is None:  # of an earlier version
        return None
    stored = {key: value for key, value in run.config.items() if key != "departures"}
    if (order := stored["task_order"])["kind"] in BY_RESULTS:  # which the list is found by
        stored["task_order"] = {**order, "tasks": None}
    config = dict(flat(stored))
    given = {
        "benchmark": config["benchmark"],
        **{part: config[f"{part}.name"] for part in ("method", "dataset", "strategy")},
    }
    for key, usual in departures.items():
        if key in config and key not in ("replay.size", "seed"):
            given[f"{'+' if usual == ABSENT else ''}{key}"] = config[key]
    for key in ("replay.size", "metrics.further"):
        if config.get(key):
            given[key] = config[key]
    words = {key: f"{key}={written(value)}" for key, value in given.items()}
    shorter = _with_choices(words, config)
    complete = _completed(shorter, stored) or _completed(words, stored)
    if complete is None:
        return None
    shown = [
        f"{key}={_ELSEWHERE[name]}" if (name := key.lstrip("+")) in _ELSEWHERE else word
        for key, word in complete.items()
    ]
    several = ["-m"] if len(seeds) > 1 else []
    return shlex.join(["clbench", "run", *several, *shown, f"seed={','.join(map(str, seeds))}"])


# Settings whose values are a place on the machine that a run was made on: key -> what a command says.
_ELSEWHERE = {"dataset.root": "FOLDER", "task_order.run": "RUN"}


def _with_choices(words: Mapping[str, str], config: Mapping[str, Any]) -> dict[str, str]:
    """Overrides with a choice of conf/ in the place of settings that it gives, where that is shorter.

    Args:
        words: key -> override.
        config: what they compose to: flat key -> value.
    """
    found = dict(words)
    for group in ("task_order", "metrics", "backbone"):
        prefix = f"{group}."
        spelled = {key: word for key, word in found.items() if key.lstrip("+").startswith(prefix)}
        wanted = {key: value for key, value in config.items() if key.startswith(prefix)}
        for choice, gives in _choices(group).items() if spelled else ():
            chosen = {group: f"{group}={choice}"}
            for key, value in wanted.items():
                follows = "${" in str(gives.get(key)) and key not in spelled  # as a seed follows the run's
                if not follows and (key not in gives or not same(gives[key], value)):
                    chosen[key] = f"{'' if key in gives else '+'}{key}={written(value)}"
            if sum(map(len, chosen.values())) < sum(map(len, spelled.values())):
                found = {key: word for key, word in found.items() if key not in spelled} | chosen
                spelled = chosen
    return found


@lru_cache
def _choices(group: str) -> dict[str, dict[str, Any]]:
    """What each choice of a group in conf/ gives: name -> flat key -> value."""
    with sources.composing():
        names = GlobalHydra.instance().config_loader().get_group_options(group)
        nodes = {name: hydra.compose(f"{group}/{name}") for name in names}
    return {
        name: dict(flat(OmegaConf.to_container(node, resolve=False)))  # type: ignore[arg-type]
        for name, node in nodes.items()
    }


def _completed(given: Mapping[str, str], stored: Mapping[str, Any]) -> dict[str, str] | None:
    """Overrides that compose to a run's config: those given, without settings that the run does not have."""
    for _ in range(2):
        try:
            found = resolved(sources.composed(*given.values(), f"seed={stored['seed']}", local=False))
        except (HydraException, UserError):
            return None
        if not differences(stored, found):
            return dict(given)
        there = {key for key, _ in flat(stored)}
        given = {**given, **{f"~{key}": f"~{key}" for key, _ in flat(found) if key not in there}}
    return None


def config_digest(run: FoundRun) -> str:
    """The digest of everything in a run's config that changes its results, but for the seed: of 12 digits.

    Images, and files that settings name, count by their content and not by where they lie.
    """
    config = {key: value for key, value in run.config.items() if key not in NOT_IN_RESULTS}
    files = run.summary.get("files") or {}
    settings = {
        key: files.get(key, value)
        for key, value in flat(config)
        if key not in ("seed", "dataset.root")
        and not (key.endswith(".seed") and value == run.seed)
        and not key.startswith(COMPUTED)
    }
    counted = {"settings": settings, "images": run.summary.get("images") or {}}
    return digests.of_text(json.dumps(counted, sort_keys=True))[:_DIGEST]
