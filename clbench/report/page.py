"""The page of a report, and the tables and figures beside it."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from importlib import resources
from pathlib import Path
from typing import get_args

import jinja2

from clbench.errors import UserError
from clbench.metrics.names import METRICS
from clbench.recording.files import write_whole
from clbench.report import deployed, published, tables, titles
from clbench.report.comparison import Group, grouped
from clbench.report.figures import Figure, figures, png
from clbench.report.gallery import gallery
from clbench.report.reading import FoundRun, FoundState
from clbench.report.rows import quantities_of
from clbench.report.tables import Table

_MOST_FIGURES = 12  # groups that get figures: each group's take about three seconds
_MOST_PICTURES = 24_000_000  # bytes in the page
_LOCAL_TABLES = (
    tables.comparison,
    tables.differences,
    published.table,
    tables.forgetting_table,
    deployed.thresholds,
    deployed.routing,
)  # in the page; the others are files alone
_TABLES = tuple(
    f"{name}.{kind}"
    for name in (
        "runs",
        "comparison",
        "differences",
        "published",
        "forgetting",
        "thresholds",
        "routing",
        "stages",
        "r-matrices",
    )
    for kind in ("csv", "md", "tex")
)


@dataclass
class Report:
    """A report that was written.

    Attributes:
        page: path of the page.
        files: number of tables and figures beside it.
    """

    page: Path
    groups: list[Group]
    runs: list[FoundRun]
    files: int = 0


@dataclass
class _Section:
    """A group as the page shows it."""

    group: Group
    comparison: Table
    differences: Table | None
    published: Table | None
    forgetting: Table
    thresholds: Table | None
    routing: Table | None
    figures: list[Figure] = field(default_factory=list)


def write_page(runs: Sequence[FoundRun], folder: Path, title: str) -> Report:
    """Write the page, tables and figures of runs into a folder.

    Raises:
        UserError: the folder cannot be written.
    """
    groups = grouped(runs)
    report = Report(folder / "index.html", groups, list(runs))
    # An earlier report may have had other groups. What else lies there is not ours.
    for old in [*folder.glob("figures/group-[0-9]*-*.*"), *(folder / "tables" / name for name in _TABLES)]:
        if old.suffix in (".svg", ".png", ".csv", ".md", ".tex"):
            old.unlink(missing_ok=True)

    def text(name: str, content: str | bytes) -> None:
        data = content.encode() if isinstance(content, str) else content
        write_whole(folder / name, lambda part: part.write_bytes(data))
        report.files += 1

    with_runs = [group for group in groups if group.found]
    sections: list[_Section] = []
    for group in with_runs:
        section = _Section(
            group,
            tables.comparison(group),
            tables.differences(group),
            published.table(group),
            tables.forgetting_table(group),
            deployed.thresholds(group),
            deployed.routing(group),
        )
        if len(sections) < _MOST_FIGURES:
            section.figures = figures(group)
        sections.append(section)
    run_list = tables.run_list(runs, groups)
    text("tables/runs.csv", tables.as_csv([(0, run_list)]))
    makers: tuple[Callable[[Group], Table | None], ...] = (*_LOCAL_TABLES, tables.stages, tables.matrices)
    for make in makers:
        made = [(group.number, table) for group in with_runs if (table := make(group))]
        if not made:
            continue
        name = made[0][1].name
        text(f"tables/{name}.csv", tables.as_csv(made))
        if make in _LOCAL_TABLES:
            read = [(number, tables.folded(table)) for number, table in made]
            text(f"tables/{name}.md", "\n".join(f"## Group {n}\n\n{tables.as_markdown(t)}" for n, t in read))
            text(f"tables/{name}.tex", "\n".join(tables.as_latex(table) for _, table in read))
    for section in sections:
        for figure in section.figures:
            svg = figure.svg()
            text(f"figures/group-{section.group.number}-{figure.name}.svg", svg)
            text(f"figures/group-{section.group.number}-{figure.name}.png", png(svg))
    page = _page(report, sections, run_list, title)
    write_whole(report.page, lambda part: part.write_text(page, encoding="utf-8"))
    return report


def _page(report: Report, sections: Sequence[_Section], run_list: Table, title: str) -> str:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("clbench", "report"),
        autoescape=True,  # names of tasks and settings are a user's text
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters["folded"] = tables.folded
    drawn = [figure for section in sections for figure in section.figures]
    methods = {run.summary["method"] for run in report.runs if run.summary}
    strategies = {run.summary["strategy"] for run in report.runs if run.summary}
    counts = {state: sum(run.state == state for run in report.runs) for state in get_args(FoundState)}
    return environment.get_template("page.html.jinja").render(
        title=title,
        made=f"{datetime.now():%Y-%m-%d %H:%M}",
        version=importlib.metadata.version("clbench"),
        counts={state: count for state, count in counts.items() if count},
        runs=report.runs,
        groups=report.groups,
        sections=sections,
        words=_words(report.runs),
        kinds=published.KINDS,
        published_note=published.note,
        not_counted=[run for run in report.runs if run.state != "finished"],
        run_list=run_list,
        gallery=gallery([section.group for section in sections], _MOST_PICTURES),
        methods=[
            (name, titles.method_title(name))
            for name in sorted(methods, key=lambda name: titles.rank(titles.METHODS, name))
        ],
        strategies=sorted(strategies, key=lambda name: titles.rank(titles.STRATEGIES, name)),
        most_figures=_MOST_FIGURES,
        specs={f"figure-{s.group.number}-{f.name}": f.spec() for s in sections for f in s.figures},
        style=_file("page.css"),
        script=_file("page.js"),
        vega=_vega() if drawn else "",
    )


def _words(runs: Sequence[FoundRun]) -> dict[str, str]:
    """What the columns of the comparison mean: title -> about."""
    return {
        quantity.title: METRICS[quantity.key].about if quantity.key in METRICS else quantity.about
        for quantity in quantities_of(run for run in runs if run.state == "finished")
    }


def _file(name: str) -> str:
    return resources.files("clbench.report").joinpath(name).read_text(encoding="utf-8")


def _vega() -> str:
    """Vega, Vega-Lite and Vega-Embed in one script, so that the page asks no network for them."""
    import vl_convert

    return vl_convert.javascript_bundle("window.vegaEmbed = vegaEmbed;").replace("</script", "<\\/script")


def output_folder(folders: Sequence[Path], output: Path | None) -> Path:
    """The folder of a report: `output` where it is given, else report/ in the first of the folders.

    Raises:
        UserError: a file is in the way.
    """
    folder = output or folders[0] / "report"
    if folder.exists() and not folder.is_dir():
        raise UserError(f"--output {folder} is a file: give a folder, or a name that is free")
    return folder
