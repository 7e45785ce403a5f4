"""The figures of a group, as Vega-Lite: interactive in the page, and SVG and PNG beside it.

Every chart's data have `method` and `strategy`, and every chart has the parameters `methods` and
`strategies`: the names that are shown, or null for all, which the page sets. Text takes its colour from the
page (`currentColor`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import altair as alt
import numpy as np

from clbench.errors import counted
from clbench.metrics.names import METRICS
from clbench.metrics.percentiles import MANY, PERCENTILES, percentiles
from clbench.report import uncertainty
from clbench.report.comparison import Group
from clbench.report.deployed import chosen_shares, routes
from clbench.report.rows import Row
from clbench.report.tables import category_forgetting, curve, matrix
from clbench.report.titles import method_colours, strategy_styles

_MOST_POINTS = 200  # of a row's curve
_BAND = ("lowest", "low", "middle", "high", "highest")  # fields that hold each of PERCENTILES
_FILTER = (
    "(methods === null || indexof(methods, datum.method) >= 0)"
    " && (strategies === null || indexof(strategies, datum.strategy) >= 0)"
)
_TIPS = {
    "title": alt.Tooltip("title:N", title="method"),
    "strategy_title": alt.Tooltip("strategy_title:N", title="strategy"),
    "row": alt.Tooltip("row:N", title="row"),
    "learned": alt.Tooltip("stage:Q", title="tasks learned"),
    "stage": alt.Tooltip("stage:O", title="after stage"),
    "category": alt.Tooltip("category:N"),
    "f1": alt.Tooltip("f1:Q", title="pixel F1", format=".3f"),
    "auroc": alt.Tooltip("auroc:Q", title="pixel AUROC", format=".3f"),
    "deviation": alt.Tooltip("deviation:Q", title="deviation", format=".3f"),
    "mb": alt.Tooltip("mb:Q", title="kept, MB", format=".1f"),
    "just": alt.Tooltip("just:Q", title="just learned", format=".3f"),
    "final": alt.Tooltip("final:Q", title="final", format=".3f"),
    "lost": alt.Tooltip("lost:Q", title="forgotten, %", format=".1f"),
    "rank": alt.Tooltip("rank:Q", title="mean rank", format=".2f"),
    "phase": alt.Tooltip("phase:N"),
    "minutes": alt.Tooltip("minutes:Q", format=".2f"),
    "seeds": alt.Tooltip("seeds:Q"),
}


@dataclass(frozen=True)
class Figure:
    """A chart with its words.

    Attributes:
        name: of its files, without the ending.
        about: how to read it, and which runs it holds.
        chart: Altair's, complete.
    """

    name: str
    title: str
    about: str
    chart: Any

    def spec(self) -> dict[str, Any]:
        """The chart in Vega-Lite, as plain data."""
        return self.chart.to_dict()

    def svg(self) -> str:
        """The text of an SVG: the chart by itself, on white."""
        import vl_convert

        spec = self.spec()
        spec["config"] = {**spec["config"], "background": "white"}
        return vl_convert.vegalite_to_svg(spec)


def png(svg: str) -> bytes:
    """The bytes of a PNG, at twice the size of the SVG that it is made from."""
    import vl_convert

    return vl_convert.svg_to_png(svg, scale=2)


def figures(group: Group) -> list[Figure]:
    """The figures that a group has enough finished runs for."""
    rows = group.found
    if not rows:
        return []
    makers: Sequence[Callable[[Group, list[Row]], Figure | None]] = (
        _over_stages,
        _against_memory,
        _matrix_charts,
        _forgetting,
        _rank_charts,
        _routing_charts,
        _time,
    )
    return [figure for make in makers if (figure := make(group, rows)) is not None]


def _holds(rows: Sequence[Row]) -> str:
    """A sentence on which runs a figure holds: how many, of how many rows, and their seeds."""
    runs = sum(len(row.runs) for row in rows)
    seeds = sorted({seed for row in rows for seed in row.seeds})
    shown = (
        ", ".join(map(str, seeds)) if len(seeds) <= 6 else f"{seeds[0]} to {seeds[-1]}, {len(seeds)} in all"
    )
    held = f"{counted(runs, 'finished run')} of {counted(len(rows), 'row')} of the table"
    return f"{held}; {'seed' if len(seeds) == 1 else 'seeds'} {shown}"


def _about(row: Row) -> dict[str, Any]:
    """The fields that every entry of a chart's data has: what row it belongs to."""
    variant = row.variant
    return {
        "method": variant.method,
        "strategy": variant.strategy,
        "title": variant.method_title,
        "strategy_title": variant.strategy_title,
        "row": variant.title,
        "joint": row.flags.joint,
        "continual": row.flags.continual,
        "seeds": len(row.runs),
    }


def _tooltip(*names: str) -> list[alt.Tooltip]:
    return [_TIPS[name] for name in names]


def _finished(chart: Any) -> Any:
    """The chart with the parameters that the page filters by, and the page's colours and fonts."""
    return (
        chart.add_params(alt.param(name="methods", value=None), alt.param(name="strategies", value=None))
        .configure(background="transparent", font="system-ui, sans-serif")
        .configure_view(stroke=None)
        .configure_axis(
            labelColor="currentColor",
            titleColor="currentColor",
            domainColor="currentColor",
            tickColor="currentColor",
            gridColor="currentColor",
            gridOpacity=0.12,
            domainOpacity=0.4,
            tickOpacity=0.4,
            titleFontWeight="normal",
            labelFontSize=11,
            titleFontSize=12,
            labelLimit=220,
        )
        .configure_legend(
            labelColor="currentColor",
            titleColor="currentColor",
            titleFontWeight="normal",
            labelFontSize=12,
            symbolSize=90,
        )
        .configure_header(
            labelColor="currentColor", titleColor="currentColor", labelFontSize=13, labelFontWeight=600
        )
        .configure_title(color="currentColor")
    )


def _by_strategy(group: Group, channel: Any, part: Literal["colour", "dash", "shape"], **legend: Any) -> Any:
    """A channel (colour, dashes or mark) that tells a group's strategies apart."""
    styles = strategy_styles(group.strategy_titles)
    scale = alt.Scale(domain=list(styles), range=[getattr(style, part) for style in styles.values()])
    return channel(
        "strategy_title:N",
        scale=scale,
        title="strategy",
        sort=list(styles),
        legend=alt.Legend(symbolOpacity=1, **legend),
    )


def _by_row(rows: Sequence[Row]) -> alt.Y:
    """An axis with the rows of the table, in their order."""
    axis = alt.Axis(domain=False, ticks=False)
    return alt.Y("row:N", title=None, sort=[row.title for row in rows], axis=axis)


def _by_category(group: Group, **axis: Any) -> alt.X:
    """An axis with the group's categories, in their order."""
    plain = alt.Axis(domain=False, ticks=False, **axis)
    return alt.X("category:N", title=None, sort=list(group.categories), axis=plain)


def _method_titles(rows: Sequence[Row]) -> list[str]:
    return list(dict.fromkeys(row.variant.method_title for row in rows))


def _over_stages(group: Group, rows: list[Row]) -> Figure | None:
    data = [entry for row in rows for entry in _curve_entries(row)]
    if not data:
        return None
    picked = alt.selection_point(name="picked", fields=["strategy_title"], bind="legend")
    faint = alt.condition(picked, alt.value(1.0), alt.value(0.12))
    x = _tasks_learned(group)
    y = alt.Y(
        "f1:Q", title="pixel F1, mean over tasks seen", scale=_from_nothing(entry["high"] for entry in data)
    )
    tooltip = _tooltip("title", "strategy_title", "learned", "f1", "deviation", "seeds")
    colour = _by_strategy(group, alt.Color, "colour")
    dash = _by_strategy(group, alt.StrokeDash, "dash")
    shape = _by_strategy(group, alt.Shape, "shape")
    arriving = alt.Chart().transform_filter("!datum.joint")
    band = arriving.mark_area(opacity=0.14).encode(x=x, y="low:Q", y2="high:Q", color=colour)
    line = arriving.mark_line(strokeWidth=2).encode(x=x, y=y, color=colour, strokeDash=dash, opacity=faint)
    points = arriving.mark_point(filled=True, size=48, opacity=1).encode(
        x=x, y=y, color=colour, shape=shape, opacity=faint, tooltip=tooltip
    )
    joint = alt.Chart().transform_filter("datum.joint").mark_rule(strokeWidth=2)
    level = joint.encode(y=y, color=colour, strokeDash=dash, opacity=faint, tooltip=tooltip)
    panels = alt.Facet("title:N", title=None, sort=_method_titles(rows))
    chart = (
        alt.layer(band, level, line, points.add_params(picked))
        .properties(width=250, height=200)
        .facet(panels, columns=4, data=alt.Data(values=data))
        .transform_filter(_FILTER)
        .resolve_axis(x="independent")  # or empty places of the last row would have one
    )
    return Figure(
        "stages",
        "Pixel F1 while tasks arrive",
        "A panel a method. Joint training, which has all images at once, is the level line; the band is the "
        f"deviation over seeds. A click on the legend picks a strategy. {_holds(rows)}.",
        _finished(chart),
    )


def _tasks_learned(group: Group) -> alt.X:
    """An axis with the number of tasks that were learned."""
    stages = len(group.tasks)
    ticks = list(range(1, stages + 1)) if stages <= MANY else alt.Undefined
    return alt.X(
        "stage:Q",
        title="tasks learned",
        axis=alt.Axis(values=ticks, labelOverlap=True, format="d", grid=False),
        scale=alt.Scale(domain=[1, max(stages, 2)], nice=False),
    )


def _thinned(entries: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """As many entries as a chart can show, evenly spread, the first and the last among them."""
    if len(entries) <= _MOST_POINTS:
        return entries
    step = (len(entries) - 1) / (_MOST_POINTS - 1)
    return [entries[round(step * place)] for place in range(_MOST_POINTS)]


def _curve_entries(row: Row) -> list[dict[str, Any]]:
    """A row's mean pixel F1 after each stage, with its deviation to both sides."""
    entries: list[dict[str, Any]] = []
    for stage, spread in enumerate(curve(row, "pixel_f1"), 1):
        if spread.mean is not None:
            values = {
                "f1": spread.mean,
                "low": spread.mean - (spread.deviation or 0),
                "high": spread.mean + (spread.deviation or 0),
                "deviation": spread.deviation,
            }
            entries.append({**_about(row), "stage": stage, **_all_short(values)})
    return _thinned(entries)


def _against_memory(group: Group, rows: list[Row]) -> Figure | None:
    shown = [row for row in rows if row.values["pixel_f1"].mean is not None]
    if not shown:
        return None
    kept = [row.values["additional_mb"].mean or 0.0 for row in shown]
    floor, low, high = _memory_range(kept)
    data = [
        {
            **_about(row),
            "mb": _short(mb),
            "at": max(mb, floor),
            "f1": _short(row.values["pixel_f1"].mean),
            "auroc": _short(row.values["pixel_auroc"].mean),
        }
        for row, mb in zip(shown, kept, strict=True)
    ]
    x = _memory_axis(floor, low, high)
    y = alt.Y(
        "f1:Q", title="pixel F1 after the last task", scale=_from_nothing(entry["f1"] for entry in data)
    )
    methods = {row.variant.method_title: row.variant.method for row in shown}
    colours = method_colours(methods.values())
    scale = alt.Scale(domain=list(methods), range=[colours[method] for method in methods.values()])
    base = alt.Chart(alt.Data(values=data)).transform_filter(_FILTER)
    points = base.mark_point(filled=True, size=120, opacity=0.95).encode(
        x=x,
        y=y,
        color=alt.Color("title:N", title="method", scale=scale),
        shape=_by_strategy(
            group, alt.Shape, "shape", symbolFillColor="currentColor", symbolStrokeColor="currentColor"
        ),
        tooltip=_tooltip("title", "strategy_title", "mb", "f1", "auroc", "seeds"),
    )
    steps, *names = _pareto_front(base, x, y, middle=math.sqrt(low * high))
    return Figure(
        "memory",
        "Quality against memory",
        "The dashed steps are the Pareto front: the best pixel F1 for what is kept, among the rows that "
        f"learn task by task and are not told the task. {_holds(shown)}.",
        _finished(alt.layer(steps, points, *names).properties(width=720, height=340)),
    )


def _memory_range(kept: Sequence[float]) -> tuple[float, float, float]:
    """Three places on a log scale of memory, in MB: where 0 is drawn, the lower end and the upper end.

    A log scale has no place for 0, which is drawn a decade below the least positive value.
    """
    positive = [mb for mb in kept if mb > 0]
    floor = 10.0 ** (math.floor(math.log10(min(positive))) - 1) if positive else 0.1
    low = floor if len(positive) < len(kept) else min(positive) / 1.6
    return floor, low, max([*positive, floor]) * 2.5


def _memory_axis(floor: float, low: float, high: float) -> alt.X:
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    steps = (1, 2, 5) if len(decades) <= 3 else (1,)
    ticks = [
        step * 10.0**decade for decade in decades for step in steps if low <= step * 10.0**decade <= high
    ]
    words = f"datum.value <= {floor} ? '0' : format(datum.value, '~f')"
    return alt.X(
        "at:Q",
        title="kept between tasks, MB (log scale)",
        scale=alt.Scale(type="log", domain=[low, high], nice=False),
        axis=alt.Axis(values=ticks, labelExpr=words, grid=False),
    )


def _pareto_front(base: alt.Chart, x: alt.X, y: alt.Y, middle: float) -> list[alt.Chart]:
    """The steps of the front, and the names of its points.

    Args:
        middle: of the axis of memory, in MB: a name to the right of it is written towards the left, where
            there is room.
    """
    front = (
        base.transform_filter("datum.continual")
        .transform_window(
            best="max(f1)",
            frame=[None, 0],
            sort=[alt.SortField("at", order="ascending"), alt.SortField("f1", order="descending")],
        )
        .transform_filter("datum.f1 >= datum.best")
    )
    steps = front.mark_line(
        interpolate="step-after", strokeWidth=1.5, strokeDash=[4, 3], color="#8a8a8a"
    ).encode(x=x, y=y, order="at:Q")
    sides: list[tuple[str, Literal["left", "right"], int]] = [("<=", "left", 9), (">", "right", -9)]
    names = [
        front.transform_filter(f"datum.at {there} {middle}")
        .transform_calculate(label="datum.title + ', ' + datum.strategy_title")
        .mark_text(align=align, dx=dx, dy=-10, fontSize=12, fontWeight=600, fill="currentColor")
        .encode(x=x, y=y, text="label:N")
        for there, align, dx in sides
    ]
    return [steps, *names]


def _matrix_charts(group: Group, rows: list[Row]) -> Figure | None:
    if max(len(group.categories), len(group.tasks)) > MANY:
        return _percentiles_over_stages(group, rows)
    data = [
        {**_about(row), "stage": stage + 1, "category": category, "f1": _short(spread.mean)}
        for row in rows
        for stage, category, spread in matrix(row, "pixel_f1")
    ]
    if not data:
        return None
    side = 30 if len(group.categories) > 6 else 38  # pixels of a cell
    highest = max(entry["f1"] for entry in data) or 1
    x = _by_category(group, labelAngle=-40)
    y = alt.Y("stage:O", title="after stage", axis=alt.Axis(domain=False, ticks=False))
    colour = alt.Color("f1:Q", title="pixel F1", scale=alt.Scale(scheme="cividis", domain=[0, highest]))
    tooltip = _tooltip("row", "stage", "category", "f1", "seeds")
    cells = alt.Chart().mark_rect(cornerRadius=2).encode(x=x, y=y, color=colour, tooltip=tooltip)
    dark = alt.condition(f"datum.f1 > {highest / 2}", alt.value("#111"), alt.value("#fff"))
    words = alt.Chart().mark_text(fontSize=10)
    words = words.encode(x=x, y=y, text=alt.Text("f1:Q", format=".2f"), color=dark)
    chart = (
        alt.layer(cells, words)
        .properties(width=alt.Step(side), height=alt.Step(side - 10))
        .facet(
            alt.Facet("row:N", title=None, sort=[row.title for row in rows]),
            columns=4 if len(group.categories) <= 6 else 3,
            data=alt.Data(values=data),
        )
        .transform_filter(_FILTER)
        .resolve_axis(x="independent")
    )
    column = "task" if group.categories == group.tasks else "category"
    return Figure(
        "r-matrices",
        f"Each {column} after each stage",
        f"R matrices of pixel F1, means over seeds: a row a stage, a column a {column}. Forgetting is a "
        f"column that darkens on its way down. {_holds(rows)}.",
        _finished(chart),
    )


def _percentiles_over_stages(group: Group, rows: list[Row]) -> Figure | None:
    data: list[dict[str, Any]] = []
    for row in rows:
        found: dict[int, list[float | None]] = {}
        for stage, _, spread in matrix(row, "pixel_f1"):
            found.setdefault(stage, []).append(spread.mean)
        entries = [
            {
                **_about(row),
                "stage": stage + 1,
                **_all_short(dict(zip(_BAND, percentiles(values).values(), strict=True))),
            }
            for stage, values in found.items()
        ]
        data += _thinned(entries)
    if not data:
        return None
    x = _tasks_learned(group)
    y = alt.Y("middle:Q", title="pixel F1", scale=_from_nothing(entry["highest"] for entry in data))
    tips = [
        alt.Tooltip(f"{key}:Q", title=name, format=".3f")
        for key, name in zip(_BAND, PERCENTILES, strict=True)
    ]
    base = alt.Chart()
    chart = (
        alt.layer(
            base.mark_area(opacity=0.1).encode(x=x, y="lowest:Q", y2="highest:Q"),
            base.mark_area(opacity=0.25).encode(x=x, y="low:Q", y2="high:Q"),
            base.mark_line(strokeWidth=2).encode(x=x, y=y),
            base.mark_point(filled=True, size=30, opacity=1).encode(
                x=x, y=y, tooltip=[*_tooltip("row", "learned"), *tips]
            ),
        )
        .properties(width=250, height=200)
        .facet(
            alt.Facet("row:N", title=None, sort=[row.title for row in rows]),
            columns=3,
            data=alt.Data(values=data),
        )
        .transform_filter(_FILTER)
        .resolve_axis(x="independent")
    )
    return Figure(
        "r-matrices",
        f"{len(group.categories):,} categories after each stage that was evaluated",
        "Pixel F1 over the categories that were evaluated: the median, where 80 % of them lie, and all of them. "
        f"tables/r-matrices.csv has each. {_holds(rows)}.",
        _finished(chart),
    )


def _routing_charts(group: Group, rows: list[Row]) -> Figure | None:
    if max(len(group.categories), len(group.tasks)) > MANY:
        return None  # the table has percentiles
    data = [
        {**_about(row), "category": category, "model": task, "share": _short(share)}
        for row in rows
        if routes(row)
        for category in row.runs[0].categories
        for task, share in chosen_shares(row, category)
    ]
    if not data:
        return None
    side = 30 if len(group.categories) > 6 else 38  # pixels of a cell
    tasks = alt.Scale(domain=list(dict.fromkeys(entry["model"] for entry in data)))
    x = alt.X(
        "model:N", title="judged by the model of", scale=tasks, axis=alt.Axis(labelAngle=-40, domain=False)
    )
    y = alt.Y(
        "category:N", title="image of", sort=list(group.categories), axis=alt.Axis(domain=False, ticks=False)
    )
    colour = alt.Color("share:Q", title="share", scale=alt.Scale(scheme="cividis", domain=[0, 1]))
    tooltip = [*_tooltip("row", "category"), alt.Tooltip("model:N"), alt.Tooltip("share:Q", format=".1%")]
    cells = alt.Chart().mark_rect(cornerRadius=2).encode(x=x, y=y, color=colour, tooltip=tooltip)
    dark = alt.condition("datum.share > 0.5", alt.value("#111"), alt.value("#fff"))
    shown = alt.Chart().mark_text(fontSize=10).transform_filter("datum.share > 0")
    shown = shown.encode(x=x, y=y, text=alt.Text("share:Q", format=".2f"), color=dark)
    chart = (
        alt.layer(cells, shown)
        .properties(width=alt.Step(side), height=alt.Step(side - 10))
        .facet(alt.Facet("row:N", title=None), columns=3, data=alt.Data(values=data))
        .transform_filter(_FILTER)
    )
    about = (
        "Shares of each category's test images that the model of each task was chosen for after the last stage, over seeds. "
        f"{_holds([row for row in rows if routes(row)])}."
    )
    return Figure("routing", "Which task's model judges an image", about, _finished(chart))


def _forgetting(group: Group, rows: list[Row]) -> Figure | None:
    arriving = [row for row in rows if not row.flags.joint]
    data = [entry for row in arriving for entry in _forgetting_entries(row)]
    if len(group.tasks) < 2 or not data:
        return None
    if len(group.categories) > MANY:
        return _shares_forgotten(group, arriving, data)
    x, y = _by_category(group, labelAngle=-30, orient="top"), _by_row(rows)
    base = alt.Chart(alt.Data(values=data)).transform_filter(_FILTER)
    diverging = alt.Scale(domain=[-100, 0, 100], range=["#2166ac", "#f1efe9", "#b35806"], clamp=True)
    cells = base.mark_rect(cornerRadius=2).encode(
        x=x,
        y=y,
        color=alt.Color("lost:Q", title="forgotten, %", scale=diverging),
        tooltip=_tooltip("row", "category", "just", "final", "lost", "seeds"),
    )
    words = base.mark_text(fontSize=11).encode(
        x=x,
        y=y,
        text=alt.Text("lost:Q", format=".0f"),
        color=alt.condition("abs(datum.lost) > 65", alt.value("#fff"), alt.value("#111")),
    )
    return Figure(
        "forgetting",
        "What is forgotten of each task",
        "Percent of the just learned pixel F1 that is lost at the end, means over seeds; less than zero: "
        f"later tasks helped. Joint runs forget nothing and are left out. {_holds(arriving)}.",
        _finished(alt.layer(cells, words).properties(width=alt.Step(62), height=alt.Step(26))),
    )


def _shares_forgotten(group: Group, rows: Sequence[Row], entries: Sequence[dict[str, Any]]) -> Figure:
    """What share of the categories lost at most so much, in place of a cell for each."""
    data: list[dict[str, Any]] = []
    for row in rows:
        lost = [entry["lost"] for entry in entries if entry["row"] == row.title]
        found = np.percentile(lost, range(0, 101, 2)).tolist() if lost else []
        data += [
            {**_about(row), "share": 2 * place, "lost": _short(value)} for place, value in enumerate(found)
        ]
    line = (
        alt.Chart(alt.Data(values=data))
        .transform_filter(_FILTER)
        .mark_line(strokeWidth=2)
        .encode(
            x=alt.X(
                "share:Q", title="% of the categories that lost at most so much", axis=alt.Axis(grid=False)
            ),
            y=alt.Y("lost:Q", title="forgotten, %", scale=alt.Scale(domain=[-100, 100], clamp=True)),
            color=alt.Color("row:N", title="row", sort=[row.title for row in rows]),
            tooltip=[*_tooltip("row", "lost"), alt.Tooltip("share:Q", title="% of the categories")],
        )
    )
    return Figure(
        "forgetting",
        f"What is forgotten of {len(group.categories):,} categories",
        "Percent of the just learned pixel F1 that is lost at the end, from the category that lost least to the one that "
        f"lost most; less than zero: later tasks helped. Joint runs forget nothing and are left out. {_holds(rows)}.",
        _finished(line.properties(width=520, height=220)),
    )


def _forgetting_entries(row: Row) -> list[dict[str, Any]]:
    """A row's pixel F1 of each category, just learned and at the end, and the percentage that is lost."""
    entries: list[dict[str, Any]] = []
    for category in row.runs[0].categories:
        _, just, final, lost = category_forgetting(row, category)
        if lost.mean is not None:
            values = {"just": just.mean, "final": final.mean, "lost": lost.mean}
            entries.append({**_about(row), "category": category, **_all_short(values)})
    return entries


def _rank_charts(group: Group, rows: list[Row]) -> Figure | None:
    found = {
        metric: ranks for metric in ("pixel_ap", "image_auroc") if (ranks := uncertainty.ranks(rows, metric))
    }
    if not found:
        return None
    data = [
        {
            **_about(row),
            "metric": METRICS[metric].title,
            **_all_short({"rank": mean, "low": mean - ranks.critical / 2, "high": mean + ranks.critical / 2}),
        }
        for metric, ranks in found.items()
        for row, mean in zip(ranks.rows, ranks.means, strict=True)
    ]
    count = max(len(ranks.rows) for ranks in found.values())
    scale = alt.Scale(
        domain=[min(1.0, *(entry["low"] for entry in data)), max(count, *(entry["high"] for entry in data))],
        nice=False,
    )
    x = alt.X(
        "rank:Q", title="mean rank over categories", scale=scale, axis=alt.Axis(tickMinStep=1, format="d")
    )
    by_rank = alt.EncodingSortField("rank", order="ascending")
    y = alt.Y("row:N", title=None, sort=by_rank, axis=alt.Axis(domain=False, ticks=False))
    colour = _by_strategy(group, alt.Color, "colour")
    bars = (
        alt.Chart()
        .mark_rule(strokeWidth=3, opacity=0.45)
        .encode(x=alt.X("low:Q", scale=scale), x2="high:Q", y=y, color=colour)
    )
    points = (
        alt.Chart()
        .mark_point(filled=True, size=90, opacity=1)
        .encode(
            x=x,
            y=y,
            color=colour,
            shape=_by_strategy(group, alt.Shape, "shape"),
            tooltip=_tooltip("row", "rank", "seeds"),
        )
    )
    chart = (
        alt.layer(bars, points)
        .properties(width=330, height=24 * count)
        .facet(
            alt.Facet("metric:N", title=None, sort=[METRICS[metric].title for metric in found]),
            columns=2,
            data=alt.Data(values=data),
        )
        .transform_filter(_FILTER)
        .resolve_scale(y="independent")
    )
    tests = "; ".join(
        f"{METRICS[metric].title}: Friedman's p = {ranks.p:.2g} over {ranks.categories} categories, critical difference "
        f"{ranks.critical:.2f}" + ("" if ranks.p < 0.05 else ", so that no difference is shown at all")
        for metric, ranks in found.items()
    )
    return Figure(
        "ranks",
        "Ranks over categories",
        "Mean ranks of the rows that learn task by task, 1 is the best; bars are as long as Nemenyi's critical difference: "
        f"rows whose bars do not overlap differ at the 5 % level (Demšar, 2006). {tests}. Ranks are among all rows, those "
        f"that are not shown too. {_holds(next(iter(found.values())).rows)}.",
        _finished(chart),
    )


def _time(group: Group, rows: list[Row]) -> Figure | None:
    phases = {"training": "train_s", "evaluation": "eval_s"}
    data = [
        {
            **_about(row),
            "phase": phase,
            "minutes": _short(sum(run.summary["time"][key] for run in row.runs) / len(row.runs) / 60),
            "place": place,
        }
        for row in rows
        for place, (phase, key) in enumerate(phases.items())
    ]
    colours = alt.Scale(domain=list(phases), range=["#3d7fbf", "#c9a227"])
    chart = (
        alt.Chart(alt.Data(values=data))
        .transform_filter(_FILTER)
        .mark_bar()
        .encode(
            x=alt.X("minutes:Q", title="minutes, mean over seeds"),
            y=_by_row(rows),
            color=alt.Color("phase:N", title=None, scale=colours),
            order="place:Q",
            tooltip=_tooltip("row", "phase", "minutes", "seeds"),
        )
        .properties(width=520, height=alt.Step(22))
    )
    machines = sorted({run.device for row in rows for run in row.runs})
    return Figure(
        "time",
        "Where time goes",
        f"Training and evaluation over all stages, on {', '.join(machines)}. {_holds(rows)}.",
        _finished(chart),
    )


def _from_nothing(values: Iterable[float]) -> Any:
    """A scale from 0 to above the highest value; fixed, so that the axis stays when the page hides rows."""
    return alt.Scale(domain=[0, 1.06 * max(values) or 1], nice=False)


def _short(value: float | None) -> float | None:
    """A number rounded to five digits, which costs the page few bytes."""
    return None if value is None else float(f"{value:.5g}")


def _all_short(values: Mapping[str, float | None]) -> dict[str, float | None]:
    return {key: _short(value) for key, value in values.items()}
