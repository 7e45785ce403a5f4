"""Tables that are the same in the page, in CSV, in Markdown and in LaTeX."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from rich.console import Console
from rich.markup import escape
from rich.table import Table as RichTable

from clbench.metrics import continual
from clbench.metrics.names import METRICS
from clbench.metrics.percentiles import MANY, PERCENTILES, percentiles
from clbench.report import titles
from clbench.report.comparison import Group
from clbench.report.reading import REPORTED, FoundRun
from clbench.report.rows import Mark, Quantity, Row, Spread
from clbench.report.uncertainty import RESAMPLES
from clbench.terminal import further_measured

NOTHING = "–"


@dataclass(frozen=True)
class Column:
    """A column of a table.

    Attributes:
        key: its name in CSV.
        title: its name for people.
        numbers: whether its values are numbers.
        about: a word for the reader who points at the title.
        wide: whether its values are sentences, which need several lines.
    """

    key: str
    title: str
    numbers: bool = False
    about: str = ""
    wide: bool = False


class Cell(NamedTuple):
    """What is printed, and the value behind it.

    Attributes:
        value: to sort by, and for CSV; None is no value.
        deviation: sample deviation over seeds; None where there is one seed.
        interval: both ends of the interval over test images; None where there is none.
    """

    text: str
    value: float | str | None
    deviation: float | None = None
    mark: Mark | None = None
    interval: tuple[float, float] | None = None


@dataclass
class Line:
    """A row of a table, and what the page filters it by: the names of its method and strategy."""

    cells: list[Cell]
    method: str = ""
    strategy: str = ""
    published: bool = False


@dataclass
class Table:
    """Columns and lines.

    Attributes:
        name: of its files, without the ending.
    """

    name: str
    caption: str
    columns: list[Column]
    lines: list[Line] = field(default_factory=list)


WHO = (Column("method", "method"), Column("strategy", "strategy"))


def spread_text(spread: Spread, digits: int) -> str:
    """`0.456 ± 0.012`; a deviation that is exactly nothing is not printed."""
    if spread.mean is None:
        return NOTHING
    text = f"{spread.mean:.{digits}f}"
    text = text[1:] if float(text) == 0 and text.startswith("-") else text
    return f"{text} ± {spread.deviation:.{digits}f}" if spread.deviation else text


def _spread(spread: Spread, digits: int, mark: Mark | None = None) -> Cell:
    return Cell(spread_text(spread, digits), spread.mean, spread.deviation, mark)


def words(text: str) -> Cell:
    """A cell that holds words."""
    return Cell(text, text)


def line(row: Row, *cells: Cell, given: str = "") -> Line:
    """A line that begins with the row's method and strategy."""
    variant = row.variant
    who = [words(variant.method_title + given), words(variant.strategy_title)]
    return Line([*who, *cells], variant.method, variant.strategy, row.published)


def comparison(group: Group) -> Table:
    """The paper's table: a row a method and strategy."""
    columns = [
        *WHO,
        Column("seeds", "seeds", numbers=True, about="runs that the means and deviations are over"),
        *(Column(q.key, q.title, numbers=True, about=q.about) for q in group.quantities),
    ]
    rows = group.rows
    marked = group.marks
    table = Table("comparison", f"{group.title}: means over seeds, ± their sample deviation", columns)
    for index, row in enumerate(rows):
        given = f" ({', '.join(row.variant.given)})" if len(_givens(rows, row)) > 1 else ""
        seeds = Cell("published" if row.published else str(len(row.runs)), len(row.runs) or None)
        cells = (_spread(row.value(q.key), q.digits, marked.get((index, q.key))) for q in group.quantities)
        table.lines.append(line(row, seeds, *cells, given=given))
    return table


def differences(group: Group) -> Table | None:
    """Each row's metrics minus the best row's, with intervals over test images; None where there is nothing to compare."""
    found, rows = group.differences, group.rows
    if not found.found:
        return None
    quantities = [quantity for quantity in group.quantities if quantity.key in found.best]
    columns = [
        *WHO,
        *(Column(q.key, q.title, numbers=True, about="this row minus the best one") for q in quantities),
    ]
    table = Table(
        "differences",
        f"{group.title}: minus the best row of each column, with the 95 % interval over {RESAMPLES} resamples of the test "
        "images",
        columns,
    )
    for index, row in enumerate(rows):
        if not row.published:
            table.lines.append(line(row, *(_difference(group, index, quantity) for quantity in quantities)))
    return table


def _difference(group: Group, index: int, quantity: Quantity) -> Cell:
    """What sets a row apart from the best one."""
    if group.differences.best[quantity.key] == index:
        return Cell("best", 0.0, mark="best")
    found = group.differences.found.get((index, quantity.key))
    if found is None:
        return Cell(NOTHING, None)
    value, low, high = (f"{number:+.{quantity.digits}f}" for number in (found.value, found.low, found.high))
    mark: Mark | None = "level" if found.level else None
    return Cell(f"{value} [{low}, {high}]", found.value, mark=mark, interval=(found.low, found.high))


def _givens(rows: Sequence[Row], row: Row) -> set[tuple[str, ...]]:
    """The different settings that rows of the same method were given from files."""
    return {other.variant.given for other in rows if other.variant.method == row.variant.method}


def category_columns(group: Group) -> list[Column]:
    """Columns for the task and, where tasks are of several categories, for the category."""
    columns = [Column("task", "task"), Column("category", "category")]
    return columns if group.shared_tasks else columns[:1]


def category_cells(group: Group, row: Row, category: str) -> list[Cell]:
    run = row.runs[0]
    task = words(run.tasks[run.task_of[category]])
    return [task, words(category)] if group.shared_tasks else [task]


def folded(table: Table) -> Table:
    """The table with percentiles in place of each row's categories, where these are too many to be read."""
    width = len(WHO)
    rows: dict[tuple[str, ...], list[Line]] = {}
    for each in table.lines:
        rows.setdefault(tuple(cell.text for cell in each.cells[:width]), []).append(each)
    most = max(map(len, rows.values()), default=0)
    if most <= MANY:
        return table
    caption = f"{table.caption}; percentiles over {most:,} lines each, which tables/{table.name}.csv has"
    made = Table(table.name, caption, [*WHO, Column("of", "of all"), *filter(_numbers, table.columns)])
    for lines in rows.values():
        found = [
            percentiles(value for each in lines if not isinstance(value := each.cells[place].value, str))
            for place, column in enumerate(table.columns)
            if column.numbers
        ]
        for name in PERCENTILES:
            cells = (spread_text(Spread(values[name]), 3) for values in found)
            numbers = (Cell(text, values[name]) for text, values in zip(cells, found, strict=True))
            made.lines.append(replace(lines[0], cells=[*lines[0].cells[:width], words(name), *numbers]))
    return made


def _numbers(column: Column) -> bool:
    return column.numbers


def forgetting_table(group: Group) -> Table:
    """Pixel F1 of every category, just learned and after the last stage, over seeds."""
    columns = [
        *WHO,
        *category_columns(group),
        Column("learned_at", "learned at stage", numbers=True),
        Column(
            "just_learned",
            "just learned",
            numbers=True,
            about="pixel F1 after the stage that learned the task",
        ),
        Column("final", "final", numbers=True, about="pixel F1 after the last stage"),
        Column("forgotten_pct", "forgotten, %", numbers=True, about="share of the just learned that is lost"),
    ]
    table = Table("forgetting", f"{group.title}: pixel F1 of each task", columns)
    for row in group.found:
        if row.flags.joint:
            continue
        for category in row.runs[0].categories:
            spreads = zip(category_forgetting(row, category), (0, 3, 3, 1), strict=True)
            cells = (_spread(spread, digits) for spread, digits in spreads)
            table.lines.append(line(row, *category_cells(group, row, category), *cells))
    return table


def category_forgetting(row: Row, category: str) -> tuple[Spread, Spread, Spread, Spread]:
    """What became of a category, over seeds.

    Returns:
        The stage that learned it, from 1; its pixel F1 then; at the end; and the percentage of it that is
        lost.
    """
    stages: list[float | None] = []
    befores: list[float | None] = []
    afters: list[float | None] = []
    for run in row.runs:
        column = run.categories.index(category)
        stage = run.learned[column]
        stages.append(stage + 1)
        befores.append(run.R["pixel_f1"][stage][column])
        afters.append(run.R["pixel_f1"][-1][column])
    lost = [
        100 * (before - after) / before
        for before, after in zip(befores, afters, strict=True)
        if before and after is not None
    ]
    return Spread.of(stages), Spread.of(befores), Spread.of(afters), Spread.of(lost)


def matrices(group: Group) -> Table:
    """R of every metric over seeds, an entry a line: for other programs."""
    columns = [
        *WHO,
        Column("metric", "metric"),
        Column("stage", "stage", numbers=True),
        *category_columns(group),
        Column("value", "value", numbers=True),
    ]
    table = Table(
        "r-matrices", f"{group.title}: each metric on each task's test set after each stage", columns
    )
    for row in group.found:
        for metric in group.metrics:
            for stage, category, spread in matrix(row, metric):
                where = [Cell(METRICS[metric].title, metric), Cell(str(stage + 1), stage + 1)]
                cells = [*where, *category_cells(group, row, category), _spread(spread, 3)]
                table.lines.append(line(row, *cells))
    return table


def matrix(row: Row, metric: str) -> list[tuple[int, str, Spread]]:
    """The entries of R that were evaluated, over seeds: stage from 0, category, value."""
    found: dict[tuple[int, str], list[float | None]] = {}
    for run in row.runs:
        R = run.R.get(metric, [])
        for stage in continual.evaluated(R):
            for category, value in zip(run.categories, R[stage], strict=True):
                found.setdefault((stage, category), []).append(value)
    entries = [(stage, category, Spread.of(values)) for (stage, category), values in found.items()]
    return [entry for entry in entries if entry[2].mean is not None]


def stages(group: Group) -> Table:
    """Every metric's mean over the categories seen after each stage, over seeds: for other programs."""
    columns = [*WHO, Column("stage", "stage", numbers=True)]
    columns += [Column(metric, METRICS[metric].title, numbers=True) for metric in group.metrics]
    table = Table("stages", f"{group.title}: means over the tasks seen after each stage", columns)
    for row in group.found:
        curves = zip(*(curve(row, metric) for metric in group.metrics), strict=True)
        for stage, spreads in enumerate(curves, 1):
            if all(spread.mean is None for spread in spreads):
                continue  # nothing was evaluated
            cells = (_spread(spread, 3) for spread in spreads)
            table.lines.append(line(row, Cell(str(stage), stage), *cells))
    return table


def curve(row: Row, metric: str) -> list[Spread]:
    """A metric's mean over the categories seen after each stage, over seeds."""
    return [Spread.of(values) for values in zip(*(run.over_stages(metric) for run in row.runs), strict=True)]


def run_list(runs: Sequence[FoundRun], groups: Sequence[Group]) -> Table:
    """Every run directory, whatever became of it."""
    columns = [
        Column("run", "run"),
        Column("state", "state"),
        Column("group", "group", numbers=True),
        *WHO,
        Column("seed", "seed", numbers=True),
        Column("pixel_f1", "pixel F1", numbers=True),
        Column("minutes", "minutes", numbers=True, about="training and evaluation"),
        Column("peak_mb", "peak, MB", numbers=True, about="the most that the process held"),
        Column("ms", "ms an image", numbers=True, about="of inference"),
        Column("reason", "why it is not counted"),
    ]
    table = Table("runs", "every run directory that was found", columns)
    numbers = {id(run): group.number for group in groups for run in group.runs}
    for run in runs:
        about, group_number = run.summary, numbers.get(id(run))
        method, strategy, seed = about.get("method", ""), about.get("strategy", ""), about.get("seed")
        cells = [
            words(run.name),
            words(run.state),
            Cell(str(group_number or NOTHING), group_number),
            words(titles.method_title(method)),
            words(titles.strategy_title(strategy, about.get("replay_size"))),
            Cell(NOTHING if seed is None else str(seed), seed),
            *_results(run),
            words(run.reason),
        ]
        table.lines.append(Line(cells, method, strategy))
    return table


def _results(run: FoundRun) -> list[Cell]:
    """Cells for pixel F1, minutes, peak MB and milliseconds an image; empty unless the run is complete."""
    values: list[float | None] = [None] * 4
    if run.state in ("finished", "repeated"):
        final, time, memory = run.summary["final"], run.summary["time"], run.summary["memory"]
        minutes = (time["train_s"] + time["eval_s"]) / 60
        values = [final["pixel_f1"], minutes, memory["peak_mb"], time["inference_ms_per_image"]]
    return [
        Cell(spread_text(Spread(value), digits), value)
        for value, digits in zip(values, (3, 2, 0, 1), strict=True)
    ]


def as_csv(tables: Sequence[tuple[int, Table]]) -> str:
    """Tables of a kind, each with its group's number; a deviation has a column of its own.

    A column that only some of the tables have, as the category, is empty in the others.
    """
    columns = _of_any([table.columns for _, table in tables])
    lines = [
        (group, dict(zip((column.key for column in table.columns), line.cells, strict=True)))
        for group, table in tables
        for line in table.lines
    ]
    deviates = {key for _, cells in lines for key, cell in cells.items() if cell.deviation is not None}
    spans = {key for _, cells in lines for key, cell in cells.items() if cell.interval is not None}
    header = ["group"] if any(group for group, _ in tables) else []
    for column in columns:
        header += [column.key, *([f"{column.key}_deviation"] if column.key in deviates else [])]
        header += [f"{column.key}_low", f"{column.key}_high"] if column.key in spans else []
    text = io.StringIO()
    writer = csv.DictWriter(text, header, lineterminator="\n", extrasaction="ignore")
    writer.writeheader()
    for group, cells in lines:
        values = {
            key: "published" if cell.text == "published" else _plain(cell.value)
            for key, cell in cells.items()
        }
        deviations = {f"{key}_deviation": _plain(cell.deviation) for key, cell in cells.items()}
        ends = {
            f"{key}_{end}": _plain(number)
            for key, cell in cells.items()
            for end, number in zip(("low", "high"), cell.interval or (), strict=False)
        }
        # The list of runs has a column of its own for the group.
        writer.writerow({**({"group": str(group)} if group else {}), **values, **deviations, **ends})
    return text.getvalue()


def _of_any(several: Sequence[Sequence[Column]]) -> list[Column]:
    """The columns of several tables, each once: one that the first lacks stands behind the one that it followed."""
    found: list[Column] = []
    for columns in several:
        place = 0
        for column in columns:
            keys = [other.key for other in found]
            if column.key not in keys:
                found.insert(place, column)
            place = (keys.index(column.key) if column.key in keys else place) + 1
    return found


def _plain(value: float | str | None) -> str:
    return "" if value is None else f"{value:.6g}" if isinstance(value, float) else str(value)


def as_markdown(table: Table) -> str:
    """A table of GitHub's Markdown; the best is bold, the worst in italics, and ≈ is level with the best."""
    rules = ["---:" if column.numbers else "---" for column in table.columns]
    rows = [[_markdown(column.title) for column in table.columns], rules]
    for line in table.lines:
        around = {"best": "**%s**", "level": "%s ≈", "worst": "*%s*", None: "%s"}
        rows.append([around[cell.mark].replace("%s", _markdown(cell.text)) for cell in line.cells])
    return f"{_markdown(table.caption)}\n\n" + "".join(f"| {' | '.join(row)} |\n" for row in rows)


def _markdown(text: str) -> str:
    return re.sub(r"([\\`*_\[\]<>|#~])", r"\\\1", " ".join(text.split()))


_LATEX = {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "±": r"$\pm$",
    "–": "--",
    "−": "$-$",
    "⁶": r"$^6$",
    **{sign: f"\\{sign}" for sign in "&%$#_{}"},
}


def as_latex(table: Table) -> str:
    r"""A `table` with booktabs; the best is bold, the worst underlined, and $\approx$ is level with the best."""
    lines = [
        "% \\usepackage{booktabs,graphicx}",
        r"\begin{table}",
        f"\\caption{{{latex(table.caption)}}}",
        r"\resizebox{\linewidth}{!}{%",
        rf"\begin{{tabular}}{{{''.join('r' if column.numbers else 'l' for column in table.columns)}}}",
        r"\toprule",
        " & ".join(latex(column.title) for column in table.columns) + r" \\",
        r"\midrule",
    ]
    around = {"best": r"\textbf{%s}", "level": r"%s $\approx$", "worst": r"\underline{%s}", None: "%s"}
    for line in table.lines:
        lines.append(" & ".join(around[cell.mark] % latex(cell.text) for cell in line.cells) + r" \\")
    return "\n".join([*lines, r"\bottomrule", r"\end{tabular}}", r"\end{table}"]) + "\n"


def latex(text: str) -> str:
    """A text with LaTeX's own signs escaped."""
    return "".join(_LATEX.get(sign, sign) for sign in " ".join(text.split()))


def for_terminal(group: Group, console: Console) -> RichTable:
    """The comparison, for people at a terminal: metrics beyond the usual ones have columns where there is room for them."""
    table = comparison(group)
    whole = _rich(group, table, table.columns)
    further = [metric for metric in group.metrics if metric not in REPORTED]
    if (
        not further
        or console.measure(whole, options=console.options.update(width=_ANY)).maximum <= console.width
    ):
        return whole
    built = _rich(group, table, [column for column in table.columns if column.key not in further])
    built.caption = further_measured(further, "see the page, or tables/comparison.csv beside it")
    return built


_ANY = 10_000  # columns, more than a table needs


def _rich(group: Group, table: Table, columns: Sequence[Column]) -> RichTable:
    """Some columns of a group's table, for a terminal."""
    title = escape(f"{group.number}. {table.caption}")
    built = RichTable(title=title, title_justify="left", caption_justify="left")
    for column in columns:
        built.add_column(column.title, justify="right" if column.numbers else "left")
    styles = {"best": "bold green", "level": "green", "worst": "yellow", None: ""}
    for line in table.lines:
        cells = [
            (escape(cell.text) + (" ≈" if cell.mark == "level" else ""), styles[cell.mark])
            for column, cell in zip(table.columns, line.cells, strict=True)
            if column in columns
        ]
        built.add_row(*(f"[{style}]{text}[/]" if style else text for text, style in cells))
    return built
