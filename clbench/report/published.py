"""What others published under the field's protocols, beside the rows of a group: published.csv, as a table.

Nothing here is ranked: values were chosen by other rules, and forgetting is of several kinds, each with columns of
its own.
"""

from __future__ import annotations

import csv
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from decimal import Decimal
from functools import lru_cache
from pathlib import Path

from clbench.metrics import continual
from clbench.metrics.names import METRICS
from clbench.report.comparison import Group
from clbench.report.reading import FORGETTING_OF, FoundRun
from clbench.report.rows import Spread
from clbench.report.tables import NOTHING, Cell, Column, Line, Table, spread_text, words

PUBLISHED = Path(__file__).with_name("published.csv")  # values in percent; see docs/published.md

SELECTION = {  # whether test images chose what is published
    "test": "selected on test images",
    "unknown": "unknown",
    "none": "no test image",
}


@dataclass(frozen=True)
class Kind:
    """What a published value is.

    Attributes:
        metrics: those that it is published of.
        ours: the same of a run and a metric, in shares; None where it makes no sense here.
    """

    title: str
    about: str
    metrics: tuple[str, ...]
    ours: Callable[[FoundRun, str], float | None] | None = None


def _relative(run: FoundRun, metric: str) -> float | None:
    percent = continual.average_forgetting_pct(run.R[metric], run.learned)
    return None if percent is None else percent / 100


def _lost_since_learned(run: FoundRun, metric: str) -> float | None:
    transfer = continual.backward_transfer(run.R[metric], run.learned)
    return None if transfer is None else -transfer


# Names in the columns `value` and `forgetting` of published.csv.
KINDS: Mapping[str, Kind] = {
    "final": Kind(
        "",
        "mean over categories after the last stage",
        ("image_auroc", "pixel_auroc", "pixel_ap", "aupro"),
        lambda run, metric: run.summary["final"][metric],
    ),
    "stages": Kind(
        "mean over stages",
        "mean over the stages of the mean over the categories seen: not a final value",
        ("image_auroc", "pixel_auroc"),
        lambda run, metric: continual.mean(run.over_stages(metric)),
    ),
    "best_minus_final": Kind(
        "best − final",
        "forgetting: the best value since a category was learned minus the final one, mean over the categories learned "
        "before the last stage (FM); presumed for rows that were copied from source to source",
        FORGETTING_OF,
        lambda run, metric: continual.forgetting(run.R[metric], run.learned),
    ),
    "just_learned_minus_final": Kind(
        "just learned − final",
        "forgetting: the value when a category was learned minus the final one; what happened between does not count",
        FORGETTING_OF,
        _lost_since_learned,
    ),
    "relative": Kind(
        "relative loss",
        "forgetting: the share of the just learned value that is lost at the end; published with the best value of all "
        "earlier stages in the place of the just learned one, and never less than 0",
        ("pixel_f1",),
        _relative,
    ),
    "small_bank": Kind(
        "UCAD: large − small bank",
        "what UCAD calls forgetting: a bank of 1960 vectors against one of 196 for the same task; no later task plays a part",
        FORGETTING_OF,
    ),
    "gap_to_joint": Kind(
        "ReplayCAD: joint − replay",
        "what ReplayCAD calls forgetting: a detector trained on the real images of all categories against one trained on "
        "replayed ones; a gap to joint training",
        FORGETTING_OF,
    ),
    "unstated": Kind("formula unknown", "called forgetting, and not said by what formula", FORGETTING_OF),
}


@lru_cache
def rows() -> tuple[dict[str, str], ...]:
    """The lines of published.csv: column -> text."""
    with open(PUBLISHED, newline="", encoding="utf-8") as file:
        return tuple(csv.DictReader(file))


def note(group: Group) -> str | None:
    """That figures were published for the group's dataset under other protocols; None where there are none."""
    others = sorted({row["protocol"] for row in rows() if row["dataset"] == group.dataset})
    others = [name for name in others if name and name != group.protocol]
    if not others:
        return None
    return (
        f"figures that were published for {group.dataset} under other protocols ({', '.join(others)}) do not compare with "
        "these rows, and are not shown"
    )


def table(group: Group) -> Table | None:
    """The group's rows and those that others published under its protocol, ours first, a column each kind of value.

    None where the group has no protocol of the field, or nothing was published under it.
    """
    theirs = [row for row in rows() if group.protocol and row["protocol"] == group.protocol]
    if not theirs:
        return None
    found = [(name, metric) for name, kind in KINDS.items() for metric in kind.metrics]
    found = [(name, metric) for name, metric in found if any(_text(row, name, metric) for row in theirs)]
    columns = [
        Column("row", "row"),
        Column("selection", "chosen on", about="whether test images chose the values"),
        Column(
            "source_kind", "read in", about="where the values were read; second-hand: not by their authors"
        ),
        *(
            Column(
                f"{name}_{metric}",
                ", ".join(filter(None, (METRICS[metric].title, KINDS[name].title))),
                numbers=True,
                about=KINDS[name].about,
            )
            for name, metric in found
        ),
        Column("averaging", "mean over", about="what the means are over"),
        Column("source", "source", wide=True),
        Column("note", "what is known of it", wide=True),
    ]
    made = Table("published", f"{group.protocol}: rows of this report, and what others published", columns)
    for row in group.found:
        spreads = [_ours(row.runs, name, metric) for name, metric in found]
        cells = [Cell(spread_text(spread, 3), spread.mean, spread.deviation) for spread in spreads]
        begin = [words(row.variant.title), words(SELECTION["none"]), words("this report")]
        end = [words("categories"), words(NOTHING), words(NOTHING)]
        made.lines.append(Line([*begin, *cells, *end], row.variant.method, row.variant.strategy))
    for line in theirs:
        cells = [_published(_text(line, name, metric)) for name, metric in found]
        begin = [words(line["method"]), words(SELECTION[line["selection"]]), words(line["source_kind"])]
        end = [words(line["averaging"]), words(line["source"]), words(line["note"] or NOTHING)]
        made.lines.append(Line([*begin, *cells, *end], published=True))
    return made


def _text(row: Mapping[str, str], kind: str, metric: str) -> str:
    """The published value of a kind, in percent; empty where there is none."""
    if row["value"] == kind:
        return row[metric]
    return row[f"forgetting_{metric}"] if row["forgetting"] == kind else ""


def _ours(runs: list[FoundRun], kind: str, metric: str) -> Spread:
    ours = KINDS[kind].ours
    return Spread(None) if ours is None else Spread.of(ours(run, metric) for run in runs)


def _published(percent: str) -> Cell:
    """A published value as a share, with as many digits as were printed."""
    if not percent:
        return Cell(NOTHING, None)
    share = Decimal(percent).scaleb(-2)
    return Cell(f"{share:f}", float(share))
