"""Tables that are the same in the page, in CSV, in Markdown and in LaTeX."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from rich.markup import escape
from rich.table import Table as RichTable

from clbench.report.comparison import METHODS, QUANTITIES, Group, Row, Spread, marks
from clbench.report.reading import METRICS, Run
from clbench.terminal import TITLES

NOTHING = "–"


@dataclass(frozen=True)
class Column:
    """Args:
    about: said to who points at the title.
    """

    key: str
    title: str
    numbers: bool = False
    about: str = ""


@dataclass(frozen=True)
class Cell:
    """What is printed, and the value behind it.

    Args:
        value: to sort by, and for CSV; None is no value.
    """

    text: str
    value: float | str | None
    deviation: float | None = None
    mark: Literal["best", "worst"] | None = None


@dataclass
class Line:
    """A row, and what the page filters it by."""

    cells: list[Cell]
    method: str = ""
    strategy: str = ""
    published: bool = False


@dataclass
class Table:
    """Args:
    name: of its files.
    """

    name: str
    caption: str
    columns: list[Column]
    lines: list[Line] = field(default_factory=list)


def number(spread: Spread, digits: int) -> str:
    """`0.456 ± 0.012`; a deviation that is exactly nothing is not printed."""
    if spread.mean is None:
        return NOTHING
    text = f"{spread.mean:.{digits}f}"
    text = text[1:] if float(text) == 0 and text.startswith("-") else text
    return f"{text} ± {spread.deviation:.{digits}f}" if spread.deviation else text


def comparison(group: Group) -> Table:
    """The paper's table: a row a method and strategy."""
    columns = [
        Column("method", "method"),
        Column("strategy", "strategy"),
        Column("seeds", "seeds", numbers=True, about="runs that the means and deviations are over"),
        *(Column(q.key, q.title, numbers=True, about=q.about) for q in QUANTITIES),
    ]
    rows = group.rows
    marked = marks(rows)
    table = Table("comparison", f"{group.title}: means over seeds, ± their sample deviation", columns)
    for index, row in enumerate(rows):
        given = f" ({', '.join(row.variant.given)})" if len(_givens(rows, row)) > 1 else ""
        table.lines.append(
            Line(
                [
                    *_who(row, given),
                    Cell("published" if row.published else str(len(row.runs)), len(row.runs) or None),
                    *(
                        Cell(
                            number(row.values[q.key], q.digits),
                            row.values[q.key].mean,
                            row.values[q.key].deviation,
                            marked.get((index, q.key)),
                        )
                        for q in QUANTITIES
                    ),
                ],
                row.variant.method,
                row.variant.strategy,
                row.published,
            )
        )
    return table


def _givens(rows: Sequence[Row], row: Row) -> set[tuple[str, ...]]:
    return {other.variant.given for other in rows if other.variant.method == row.variant.method}


def _who(row: Row, given: str = "") -> list[Cell]:
    method, how = row.variant.method_title + given, row.variant.how
    return [Cell(method, method), Cell(how, how)]


def forgetting(group: Group) -> Table:
    """Pixel F1 of every task, just learned and after the last stage, over seeds."""
    columns = [
        Column("method", "method"),
        Column("strategy", "strategy"),
        Column("task", "task"),
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
    for row in group.own:
        if row.variant.strategy == "joint":
            continue
        for task in row.runs[0].tasks:
            at, just, final, lost = task_forgetting(row, task)
            table.lines.append(
                Line(
                    [
                        *_who(row),
                        Cell(task, task),
                        Cell(number(at, 0), at.mean, at.deviation),
                        *(
                            Cell(number(s, d), s.mean, s.deviation)
                            for s, d in ((just, 3), (final, 3), (lost, 1))
                        ),
                    ],
                    row.variant.method,
                    row.variant.strategy,
                )
            )
    return table


def task_forgetting(row: Row, task: str) -> tuple[Spread, Spread, Spread, Spread]:
    """Of a task, over seeds: the stage that learned it, from 1, its pixel F1 then and at the end, and percent lost."""
    stages: list[float | None] = []
    befores: list[float | None] = []
    afters: list[float | None] = []
    for run in row.runs:
        index = run.tasks.index(task)
        stages.append(run.learned[index] + 1)
        befores.append(run.R["pixel_f1"][run.learned[index]][index])
        afters.append(run.R["pixel_f1"][-1][index])
    lost = [
        100 * (before - after) / before
        for before, after in zip(befores, afters, strict=True)
        if before and after is not None
    ]
    return Spread.of(stages), Spread.of(befores), Spread.of(afters), Spread.of(lost)


def matrices(group: Group) -> Table:
    """R of every metric, over seeds: for other programs."""
    columns = [
        *(Column(key, key) for key in ("method", "strategy", "metric")),
        Column("stage", "stage", numbers=True),
        Column("task", "task"),
        Column("value", "value", numbers=True),
    ]
    table = Table(
        "r-matrices", f"{group.title}: each metric on each task's test set after each stage", columns
    )
    for row in group.own:
        for metric in METRICS:
            for stage, task, spread in matrix(row, metric):
                cells = [
                    *_who(row),
                    Cell(TITLES[metric], metric),
                    Cell(str(stage + 1), stage + 1),
                    Cell(task, task),
                ]
                cells.append(Cell(number(spread, 3), spread.mean, spread.deviation))
                table.lines.append(Line(cells, row.variant.method, row.variant.strategy))
    return table


def matrix(row: Row, metric: str) -> list[tuple[int, str, Spread]]:
    """The entries of R that were evaluated, over seeds: stage, task, value."""
    found: dict[tuple[int, str], list[float | None]] = {}
    for run in row.runs:
        for stage, values in enumerate(run.R[metric]):
            for task, value in zip(run.tasks, values, strict=True):
                found.setdefault((stage, task), []).append(value)
    entries = [(stage, task, Spread.of(values)) for (stage, task), values in found.items()]
    return [entry for entry in entries if entry[2].mean is not None]


def stages(group: Group) -> Table:
    """Every metric's mean over the tasks seen after each stage, over seeds: for other programs."""
    columns = [
        Column("method", "method"),
        Column("strategy", "strategy"),
        Column("stage", "stage", numbers=True),
    ]
    columns += [Column(metric, TITLES[metric], numbers=True) for metric in METRICS]
    table = Table("stages", f"{group.title}: means over the tasks seen after each stage", columns)
    for row in group.own:
        curves = {metric: curve(row, metric) for metric in METRICS}
        for stage in range(max(len(spreads) for spreads in curves.values())):
            spreads = [curves[metric][stage] for metric in METRICS]
            cells = [Cell(number(spread, 3), spread.mean, spread.deviation) for spread in spreads]
            who = [*_who(row), Cell(str(stage + 1), stage + 1)]
            table.lines.append(Line([*who, *cells], row.variant.method, row.variant.strategy))
    return table


def curve(row: Row, metric: str) -> list[Spread]:
    """A metric's mean over the tasks seen after each stage, over seeds."""
    return [Spread.of(values) for values in zip(*(run.over_stages(metric) for run in row.runs), strict=True)]


def run_list(runs: Sequence[Run], groups: Sequence[Group]) -> Table:
    """Every run directory, whatever became of it."""
    columns = [
        Column("run", "run"),
        Column("state", "state"),
        Column("group", "group", numbers=True),
        Column("method", "method"),
        Column("strategy", "strategy"),
        Column("seed", "seed", numbers=True),
        Column("pixel_f1", "pixel F1", numbers=True),
        Column("minutes", "minutes", numbers=True, about="training and evaluation"),
        Column("peak_mb", "peak, MB", numbers=True, about="the most that the process held"),
        Column("ms", "ms an image", numbers=True, about="of inference"),
        Column("reason", "why it is not counted"),
    ]
    table = Table("runs", "every run directory that was found", columns)
    of = {id(run): group.number for group in groups for run in group.runs}
    for run in runs:
        about = run.summary
        method, strategy, seed = about.get("method", ""), about.get("strategy", ""), about.get("seed")
        size = about.get("replay_size")
        how = strategy if size is None else f"{strategy} {size}"
        title = METHODS.get(method, method)
        done = run.state in ("finished", "repeated")
        f1 = about["final"]["pixel_f1"] if done else None
        minutes = (about["time"]["train_s"] + about["time"]["eval_s"]) / 60 if done else None
        peak = about["memory"]["peak_mb"] if done else None
        ms = about["time"]["inference_ms_per_image"] if done else None
        table.lines.append(
            Line(
                [
                    Cell(run.name, run.name),
                    Cell(run.state, run.state),
                    Cell(str(of.get(id(run), NOTHING)), of.get(id(run))),
                    Cell(title, title),
                    Cell(how, how),
                    Cell(NOTHING if seed is None else str(seed), seed),
                    *(Cell(number(Spread(v), d), v) for v, d in ((f1, 3), (minutes, 2), (peak, 0), (ms, 1))),
                    Cell(run.reason, run.reason),
                ],
                method,
                strategy,
            )
        )
    return table


def as_csv(tables: Sequence[tuple[int, Table]]) -> str:
    """Tables of the same columns, each with its group's number; a deviation has a column of its own."""
    first = tables[0][1]
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    deviates = {
        index
        for _, table in tables
        for line in table.lines
        for index, c in enumerate(line.cells)
        if c.deviation is not None
    }
    header = ["group"]
    for index, column in enumerate(first.columns):
        header += [column.key, f"{column.key}_deviation"] if index in deviates else [column.key]
    writer.writerow(header if any(number for number, _ in tables) else header[1:])
    for group, table in tables:
        for line in table.lines:
            row: list[str] = [str(group)] if group else []
            for index, cell in enumerate(line.cells):
                row.append(_plain(cell.value if cell.text != "published" else "published"))
                if index in deviates:
                    row.append(_plain(cell.deviation))
            writer.writerow(row)
    return text.getvalue()


def _plain(value: float | str | None) -> str:
    return "" if value is None else f"{value:.6g}" if isinstance(value, float) else str(value)


def as_markdown(table: Table) -> str:
    """A table of GitHub's Markdown; the best is bold, the worst in italics."""
    rules = ["---:" if column.numbers else "---" for column in table.columns]
    rows = [[_markdown(column.title) for column in table.columns], rules]
    for line in table.lines:
        around = [{"best": "**", "worst": "*", None: ""}[cell.mark] for cell in line.cells]
        rows.append([f"{a}{_markdown(c.text)}{a}" for a, c in zip(around, line.cells, strict=True)])
    return f"{_markdown(table.caption)}\n\n" + "".join(f"| {' | '.join(row)} |\n" for row in rows)


def _markdown(text: str) -> str:
    return re.sub(r"([\\`*_\[\]<>|#~])", r"\\\1", " ".join(text.split()))


_LATEX = {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "±": r"$\pm$",
    "–": "--",
    "⁶": r"$^6$",
    **{sign: f"\\{sign}" for sign in "&%$#_{}"},
}


def as_latex(table: Table) -> str:
    """A `table` with booktabs; the best is bold, the worst underlined."""
    lines = [
        "% \\usepackage{booktabs,graphicx}",
        r"\begin{table}",
        f"\\caption{{{_latex(table.caption)}}}",
        r"\resizebox{\linewidth}{!}{%",
        rf"\begin{{tabular}}{{{''.join('r' if column.numbers else 'l' for column in table.columns)}}}",
        r"\toprule",
        " & ".join(_latex(column.title) for column in table.columns) + r" \\",
        r"\midrule",
    ]
    around = {"best": r"\textbf{%s}", "worst": r"\underline{%s}", None: "%s"}
    for line in table.lines:
        lines.append(" & ".join(around[cell.mark] % _latex(cell.text) for cell in line.cells) + r" \\")
    return "\n".join([*lines, r"\bottomrule", r"\end{tabular}}", r"\end{table}"]) + "\n"


def _latex(text: str) -> str:
    return "".join(_LATEX.get(sign, sign) for sign in " ".join(text.split()))


def for_terminal(group: Group) -> RichTable:
    """The comparison, for people at a terminal."""
    table = comparison(group)
    built = RichTable(title=escape(f"{group.number}. {table.caption}"), title_justify="left")
    for column in table.columns:
        built.add_column(column.title, justify="right" if column.numbers else "left")
    styles = {"best": "bold green", "worst": "yellow", None: ""}
    for line in table.lines:
        cells = [escape(cell.text) for cell in line.cells]
        styled = [(cell, styles[c.mark]) for cell, c in zip(cells, line.cells, strict=True)]
        built.add_row(*(f"[{style}]{text}[/]" if style else text for text, style in styled))
    return built
