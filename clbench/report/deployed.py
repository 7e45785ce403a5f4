"""What a user would have had of a run: how thresholds that were stored hold, and which models judged which images."""

from __future__ import annotations

import math

from clbench.report.comparison import Group
from clbench.report.rows import Row, Spread
from clbench.report.tables import (
    NOTHING,
    WHO,
    Cell,
    Column,
    Table,
    category_cells,
    category_columns,
    line,
    words,
)
from clbench.report.uncertainty import CONFIDENCE

_WHEN = {"just_learned": "just learned", "final": "final"}
_SET_ON = "held-out normal images; one model's thresholds are of those of all tasks so far"


def thresholds(group: Group) -> Table | None:
    """False-positive rates on normal test images at stored thresholds, just learned and final; None without any."""
    rows = [row for row in group.found if all("stored_thresholds" in run.summary for run in row.runs)]
    if not rows:
        return None
    columns = [
        *WHO,
        *category_columns(group),
        *(
            Column(f"set_on_{key}", f"set on, {when}", numbers=True, about=_SET_ON)
            for key, when in _WHEN.items()
        ),
        Column("normal_tests", "measured on", numbers=True, about="normal test images"),
    ]
    shown = [
        kind for kind in ("pixel_fpr", "image_fpr") if any(kind in run.R for row in rows for run in row.runs)
    ]
    for kind in shown:
        what = "pixels" if kind == "pixel_fpr" else "images"
        columns.append(
            Column(f"{kind}_asked", f"{what}, asked for", numbers=True, about="the rate of the threshold")
        )
        for key, when in _WHEN.items():
            about = f"share of normal {what} above it, and the interval for new test images, 95 %"
            columns.append(Column(f"{kind}_{key}", f"{what}, {when}", numbers=True, about=about))
    table = Table(
        "thresholds",
        f"{group.title}: false-positive rates at thresholds set when a task was learned",
        columns,
    )
    for row in rows:
        for category in row.runs[0].categories:
            rests = row.runs[0].summary["stored_thresholds"][category]
            cells = [*map(_count, rests["set_on_images"].values()), _count(rests["normal_test_images"])]
            for kind in shown:
                asked = row.runs[0].config["metrics"]["pixel_rate" if kind == "pixel_fpr" else "image_rate"]
                cells.append(Cell(f"{asked:g}", asked))
                cells += [_rate(row, category, kind, when) for when in _WHEN]
            table.lines.append(line(row, *category_cells(group, row, category), *cells))
    return table


def _count(value: int) -> Cell:
    return Cell(str(value), value)


def _rate(row: Row, category: str, kind: str, when: str) -> Cell:
    """A false-positive rate of a category, over seeds, with the interval that its test images leave.

    Seeds have the same test images: more seeds make no interval narrower.
    """
    rates, deviations = [], []
    for run in row.runs:
        column = run.categories.index(category)
        stage = run.learned[column] if when == "just_learned" else -1
        rates.append(run.R[kind][stage][column] if kind in run.R else None)
        deviations.append(run.summary["stored_thresholds"][category]["pixel_fpr_deviation"][when])
    rate, count = (
        Spread.of(rates).mean,
        row.runs[0].summary["stored_thresholds"][category]["normal_test_images"],
    )
    if rate is None:
        return words("undefined")
    found = proportion(rate, count) if kind == "image_fpr" else mean(rate, Spread.of(deviations).mean, count)
    low, high = ("?", "?") if found is None else (f"{found[0]:.3f}", f"{found[1]:.3f}")
    return Cell(f"{rate:.3f} [{low}, {high}]", rate, interval=found)


def proportion(rate: float, count: int) -> tuple[float, float]:
    """The exact interval of a probability, 95 %, of which `rate` was found in `count` trials (Clopper & Pearson, 1934)."""
    from scipy import stats  # takes a while, and most reports do without

    hits, tail = rate * count, (1 - CONFIDENCE) / 2
    low = float(stats.beta.ppf(tail, hits, count - hits + 1)) if hits > 0 else 0.0
    high = float(stats.beta.ppf(1 - tail, hits + 1, count - hits)) if hits < count else 1.0
    return low, high


def mean(value: float, deviation: float | None, count: int) -> tuple[float, float] | None:
    """The interval of a share's mean, 95 %, from `count` images that differ by a deviation (Student's).

    None where they do not differ or there is one: nothing is known then of images that would.
    """
    if not deviation or count < 2:
        return None
    from scipy import stats

    off = float(stats.t.ppf((1 + CONFIDENCE) / 2, count - 1)) * deviation / math.sqrt(count)
    return max(0.0, value - off), min(1.0, value + off)


def routing(group: Group) -> Table | None:
    """How often the model of an image's own task was chosen, and which others; None where nothing is chosen."""
    rows = [row for row in group.found if routes(row)]
    if not rows:
        return None
    columns = [
        *WHO,
        *category_columns(group),
        Column(
            "just_learned",
            "own, just learned",
            numbers=True,
            about="share of test images that it was chosen for",
        ),
        Column("final", "own, final", numbers=True, about="the same after the last stage"),
        Column(
            "others",
            "judged by the model of",
            about="other tasks' models that were chosen, after the last stage",
        ),
    ]
    table = Table("routing", f"{group.title}: which task's model judges an image", columns)
    for row in rows:
        for category in row.runs[0].categories:
            own: dict[str, list[float | None]] = {"just_learned": [], "final": []}
            for run in row.runs:
                column = run.categories.index(category)
                for when, stage in (("just_learned", run.learned[column]), ("final", -1)):
                    own[when].append(run.R["routing_accuracy"][stage][column])
            means = [Spread.of(values).mean for values in own.values()]
            cells = [Cell(NOTHING if mean is None else f"{mean:.3f}", mean) for mean in means]
            name = row.runs[0].tasks[row.runs[0].task_of[category]]
            shares = sorted(chosen_shares(row, category), key=lambda each: -each[1])
            others = ", ".join(f"{task} {share:.0%}" for task, share in shares if share and task != name)
            table.lines.append(line(row, *category_cells(group, row, category), *cells, words(others)))
    return table


def routes(row: Row) -> bool:
    """Whether all runs of a row chose models for images, and counted which after the last stage."""
    return all(
        run.summary.get("routing") and all(map(run.summary["routing"].get, run.categories))
        for run in row.runs
    )


def chosen_shares(row: Row, category: str) -> list[tuple[str, float]]:
    """The share of a category's test images that the model of each task was chosen for at the end, over seeds."""
    counts: dict[str, int] = {}
    for run in row.runs:
        found = run.summary["routing"][category]
        if isinstance(found, list):  # an earlier version counted all tasks, in their order
            found = dict(zip(run.tasks, found, strict=True))
        for task in run.tasks:
            counts[task] = counts.get(task, 0) + found.get(task, 0)
    total = sum(counts.values())
    return [(task, count / total) for task, count in counts.items()]
