"""The figures of a group, as Vega-Lite: interactive in the page, and SVG and PNG beside it.

Every chart's data have `method` and `strategy`, and every chart has the parameters `methods` and `strategies`: the
names that are shown, or null for all, which the page sets. Text takes its colour from the page (`currentColor`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import altair as alt

from clbench.report.comparison import CONTINUAL, METHODS, Group, Row
from clbench.report.tables import curve, matrix, task_forgetting

# Told apart by colour-blind readers, on white and on black: after Okabe & Ito (2008) and Tol (2021).
_METHOD_COLOURS = dict(
    zip(
        METHODS,
        ["#3d7fbf", "#e0662f", "#2f9e6e", "#c9a227", "#56b4e9", "#b0559e", "#8a8a8a", "#9c6b4a", "#7a6fd0"],
        strict=True,
    )
)
_HOW_COLOURS = {"native": "#3d7fbf", "finetune": "#e0662f", "joint": "#2f9e6e", "single": "#b0559e"}
_REPLAY_COLOURS = ("#c9a227", "#56b4e9", "#8a8a8a", "#9c6b4a", "#7a6fd0")
_HOW_DASHES = {"native": [1, 0], "finetune": [2, 3], "joint": [10, 4], "single": [8, 3, 2, 3]}
_REPLAY_DASHES = ([5, 2], [4, 4], [7, 2, 1, 2], [3, 1], [12, 2])
_HOW_SHAPES = {"native": "circle", "finetune": "triangle-down", "joint": "diamond", "single": "cross"}
_REPLAY_SHAPES = ("square", "triangle-up", "triangle-right", "triangle-left", "stroke")
_FILTER = (
    "(methods === null || indexof(methods, datum.method) >= 0)"
    " && (strategies === null || indexof(strategies, datum.strategy) >= 0)"
)


@dataclass(frozen=True)
class Figure:
    """Args:
    name: of its files.
    about: how to read it, and which runs it holds.
    """

    name: str
    title: str
    about: str
    chart: Any

    def spec(self) -> dict[str, Any]:
        """Vega-Lite, as plain data."""
        return self.chart.to_dict()

    def svg(self) -> str:
        """The figure by itself, on white."""
        import vl_convert

        spec = self.spec()
        spec["config"] = {**spec["config"], "background": "white"}
        return vl_convert.vegalite_to_svg(spec)


def png(svg: str) -> bytes:
    """A figure's picture, at twice the size of its SVG."""
    import vl_convert

    return vl_convert.svg_to_png(svg, scale=2)


def figures(group: Group) -> list[Figure]:
    """All that a group has runs for."""
    rows = group.own
    if not rows:
        return []
    makers: Sequence[Callable[[Group, list[Row]], Figure | None]] = (
        _over_stages,
        _against_memory,
        _matrices,
        _forgetting,
        _time,
    )
    return [figure for make in makers if (figure := make(group, rows)) is not None]


def _holds(rows: Sequence[Row]) -> str:
    """Which runs a figure holds."""
    runs = sum(len(row.runs) for row in rows)
    seeds = sorted({seed for row in rows for seed in row.seeds})
    shown = (
        ", ".join(map(str, seeds)) if len(seeds) <= 6 else f"{seeds[0]} to {seeds[-1]}, {len(seeds)} in all"
    )
    return f"{runs} finished runs of {len(rows)} rows of the table; seed{'s' * (len(seeds) > 1)} {shown}"


def _about(row: Row) -> dict[str, Any]:
    v = row.variant
    return {
        "method": v.method,
        "strategy": v.strategy,
        "title": v.method_title,
        "how": v.how,
        "seeds": len(row.runs),
    }


def _finished(chart: Any) -> Any:
    """A chart with the page's filter, its colours and its type."""
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


def _ways(group: Group) -> dict[str, tuple[str, list[int], str]]:
    """Colour, dashes and mark of each strategy and buffer."""
    ways: dict[str, tuple[str, list[int], str]] = {}
    replays = 0
    for how in group.hows:
        if how in _HOW_COLOURS:
            ways[how] = (_HOW_COLOURS[how], _HOW_DASHES[how], _HOW_SHAPES[how])
        else:
            index, replays = replays % len(_REPLAY_COLOURS), replays + 1
            ways[how] = (_REPLAY_COLOURS[index], list(_REPLAY_DASHES[index]), _REPLAY_SHAPES[index])
    return ways


def _how(group: Group, channel: Any, part: int, **more: Any) -> Any:
    ways = _ways(group)
    scale = alt.Scale(domain=list(ways), range=[way[part] for way in ways.values()])
    return channel(
        "how:N", scale=scale, title="strategy", sort=list(ways), legend=alt.Legend(symbolOpacity=1, **more)
    )


def _titles(rows: Sequence[Row]) -> list[str]:
    return list(dict.fromkeys(row.variant.method_title for row in rows))


def _over_stages(group: Group, rows: list[Row]) -> Figure | None:
    data: list[dict[str, Any]] = []
    for row in rows:
        for stage, spread in enumerate(curve(row, "pixel_f1"), 1):
            if spread.mean is not None:
                about = {
                    **_about(row),
                    "stage": stage,
                    "f1": _short(spread.mean),
                    "bound": len(row.runs[0].tasks),
                }
                low, high = (spread.mean + sign * (spread.deviation or 0) for sign in (-1, 1))
                data.append(
                    {**about, "low": _short(low), "high": _short(high), "deviation": _short(spread.deviation)}
                )
    if not data:
        return None
    picked = alt.selection_point(name="picked", fields=["how"], bind="legend")
    faint = alt.condition(picked, alt.value(1.0), alt.value(0.12))
    stages = len(group.tasks)
    x = alt.X(
        "stage:Q",
        title="tasks learned",
        axis=alt.Axis(values=list(range(1, stages + 1)), labelOverlap=True, format="d", grid=False),
        scale=alt.Scale(domain=[1, max(stages, 2)], nice=False),
    )
    y = alt.Y(
        "f1:Q", title="pixel F1, mean over tasks seen", scale=_from_nothing(entry["high"] for entry in data)
    )
    tooltip = [
        alt.Tooltip("title:N", title="method"),
        alt.Tooltip("how:N", title="strategy"),
        alt.Tooltip("stage:Q", title="tasks learned"),
        alt.Tooltip("f1:Q", title="pixel F1", format=".3f"),
        alt.Tooltip("deviation:Q", title="deviation", format=".3f"),
        alt.Tooltip("seeds:Q"),
    ]
    base = alt.Chart().transform_filter("datum.strategy !== 'joint'")
    colour, dash = _how(group, alt.Color, 0), _how(group, alt.StrokeDash, 1)
    band = base.mark_area(opacity=0.14).encode(x=x, y="low:Q", y2="high:Q", color=colour)
    line = base.mark_line(strokeWidth=2).encode(x=x, y=y, color=colour, strokeDash=dash, opacity=faint)
    points = base.mark_point(filled=True, size=48, opacity=1).encode(
        x=x, y=y, color=colour, shape=_how(group, alt.Shape, 2), opacity=faint, tooltip=tooltip
    )
    joint = (
        alt.Chart()
        .transform_filter("datum.strategy === 'joint'")
        .mark_rule(strokeWidth=2)
        .encode(y=y, color=colour, strokeDash=dash, opacity=faint, tooltip=tooltip)
    )
    chart = (
        alt.layer(band, joint, line, points.add_params(picked))
        .properties(width=250, height=200)
        .facet(alt.Facet("title:N", title=None, sort=_titles(rows)), columns=4, data=alt.Data(values=data))
        .transform_filter(_FILTER)
        .resolve_axis(x="independent")  # or empty places of the last row would have one
    )
    return Figure(
        "stages",
        "Pixel F1 while tasks arrive",
        "A panel a method. Joint training, which has all images at once, is the level line; the band is the deviation "
        f"over seeds. A click on the legend picks a strategy. {_holds(rows)}.",
        _finished(chart),
    )


def _against_memory(group: Group, rows: list[Row]) -> Figure | None:
    shown = [row for row in rows if row.values["pixel_f1"].mean is not None]
    kept = {id(row): row.values["additional_mb"].mean or 0.0 for row in shown}
    positive = [value for value in kept.values() if value > 0]
    if not shown:
        return None
    # A log scale has no place for nothing: it stands a decade below the least.
    floor = 10.0 ** (math.floor(math.log10(min(positive))) - 1) if positive else 0.1
    low = floor if len(positive) < len(shown) else min(positive) / 1.6
    high = max([*positive, floor]) * 2.5
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    few = len(decades) <= 3
    ticks = [f * 10.0**d for d in decades for f in ((1, 2, 5) if few else (1,)) if low <= f * 10.0**d <= high]
    data = [
        {
            **_about(row),
            "mb": _short(kept[id(row)]),
            "at": max(kept[id(row)], floor),
            "f1": _short(row.values["pixel_f1"].mean),
            "auroc": _short(row.values["pixel_auroc"].mean),
        }
        for row in shown
    ]
    x = alt.X(
        "at:Q",
        title="kept between tasks, MB (log scale)",
        scale=alt.Scale(type="log", domain=[low, high], nice=False),
        axis=alt.Axis(
            values=ticks, labelExpr=f"datum.value <= {floor} ? '0' : format(datum.value, '~f')", grid=False
        ),
    )
    y = alt.Y(
        "f1:Q", title="pixel F1 after the last task", scale=_from_nothing(entry["f1"] for entry in data)
    )
    methods = [row.variant.method for row in shown]
    names = _titles(shown)
    of = dict(zip((row.variant.method_title for row in shown), methods, strict=True))
    spare = "#9c6b4a"
    colour = alt.Color(
        "title:N",
        title="method",
        scale=alt.Scale(domain=names, range=[_METHOD_COLOURS.get(of[name], spare) for name in names]),
    )
    base = alt.Chart(alt.Data(values=data)).transform_filter(_FILTER)
    front = (
        base.transform_filter(f"indexof({list(CONTINUAL)}, datum.strategy) >= 0")
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
    # A name to the right of the middle is written towards the left, where there is room.
    middle = math.sqrt(low * high)
    sides: list[tuple[str, Literal["left", "right"], int]] = [("<=", "left", 9), (">", "right", -9)]
    names_on_front = [
        front.transform_filter(f"datum.at {there} {middle}")
        .transform_calculate(label="datum.title + ', ' + datum.how")
        .mark_text(align=align, dx=dx, dy=-10, fontSize=12, fontWeight=600, fill="currentColor")
        .encode(x=x, y=y, text="label:N")
        for there, align, dx in sides
    ]
    points = base.mark_point(filled=True, size=120, opacity=0.95).encode(
        x=x,
        y=y,
        color=colour,
        shape=_how(group, alt.Shape, 2, symbolFillColor="currentColor", symbolStrokeColor="currentColor"),
        tooltip=[
            alt.Tooltip("title:N", title="method"),
            alt.Tooltip("how:N", title="strategy"),
            alt.Tooltip("mb:Q", title="kept, MB", format=".1f"),
            alt.Tooltip("f1:Q", title="pixel F1", format=".3f"),
            alt.Tooltip("auroc:Q", title="pixel AUROC", format=".3f"),
            alt.Tooltip("seeds:Q"),
        ],
    )
    return Figure(
        "memory",
        "Quality against memory",
        "The dashed steps are the Pareto front: the best pixel F1 for what is kept, among the rows that learn task by "
        f"task and are not told the task. {_holds(shown)}.",
        _finished(alt.layer(steps, points, *names_on_front).properties(width=720, height=340)),
    )


def _matrices(group: Group, rows: list[Row]) -> Figure | None:
    data = [
        {
            **_about(row),
            "row": f"{row.variant.method_title}, {row.variant.how}",
            "stage": stage + 1,
            "task": task,
            "f1": _short(spread.mean),
        }
        for row in rows
        for stage, task, spread in matrix(row, "pixel_f1")
    ]
    if not data:
        return None
    side = 30 if len(group.tasks) > 6 else 38
    highest = max(entry["f1"] for entry in data) or 1
    x = alt.X(
        "task:N", title=None, sort=list(group.tasks), axis=alt.Axis(labelAngle=-40, domain=False, ticks=False)
    )
    y = alt.Y("stage:O", title="after stage", axis=alt.Axis(domain=False, ticks=False))
    cells = (
        alt.Chart()
        .mark_rect(cornerRadius=2)
        .encode(
            x=x,
            y=y,
            color=alt.Color("f1:Q", title="pixel F1", scale=alt.Scale(scheme="cividis", domain=[0, highest])),
            tooltip=[
                alt.Tooltip("row:N", title="row"),
                alt.Tooltip("stage:O", title="after stage"),
                alt.Tooltip("task:N"),
                alt.Tooltip("f1:Q", title="pixel F1", format=".3f"),
                alt.Tooltip("seeds:Q"),
            ],
        )
    )
    words = (
        alt.Chart()
        .mark_text(fontSize=10)
        .encode(
            x=x,
            y=y,
            text=alt.Text("f1:Q", format=".2f"),
            color=alt.condition(f"datum.f1 > {highest / 2}", alt.value("#111"), alt.value("#fff")),
        )
    )
    chart = (
        alt.layer(cells, words)
        .properties(width=alt.Step(side), height=alt.Step(side - 10))
        .facet(
            alt.Facet("row:N", title=None, sort=[f"{r.variant.method_title}, {r.variant.how}" for r in rows]),
            columns=4 if len(group.tasks) <= 6 else 3,
            data=alt.Data(values=data),
        )
        .transform_filter(_FILTER)
        .resolve_axis(x="independent")
    )
    return Figure(
        "r-matrices",
        "Each task after each stage",
        "R matrices of pixel F1, means over seeds: a row a stage, a column a task. Forgetting is a column that darkens "
        f"on its way down. {_holds(rows)}.",
        _finished(chart),
    )


def _forgetting(group: Group, rows: list[Row]) -> Figure | None:
    data: list[dict[str, Any]] = []
    for row in rows:
        if row.variant.strategy == "joint":
            continue
        for task in row.runs[0].tasks:
            _, just, final, lost = task_forgetting(row, task)
            if lost.mean is not None:
                about = {**_about(row), "row": f"{row.variant.method_title}, {row.variant.how}", "task": task}
                values = {"just": just.mean, "final": final.mean, "lost": lost.mean}
                data.append({**about, **{key: _short(value) for key, value in values.items()}})
    if len(group.tasks) < 2 or not data:
        return None
    x = alt.X(
        "task:N",
        title=None,
        sort=list(group.tasks),
        axis=alt.Axis(labelAngle=-30, orient="top", domain=False, ticks=False),
    )
    y = alt.Y(
        "row:N",
        title=None,
        sort=[f"{r.variant.method_title}, {r.variant.how}" for r in rows],
        axis=alt.Axis(domain=False, ticks=False),
    )
    base = alt.Chart(alt.Data(values=data)).transform_filter(_FILTER)
    cells = base.mark_rect(cornerRadius=2).encode(
        x=x,
        y=y,
        color=alt.Color(
            "lost:Q",
            title="forgotten, %",
            scale=alt.Scale(domain=[-100, 0, 100], range=["#2166ac", "#f1efe9", "#b35806"], clamp=True),
        ),
        tooltip=[
            alt.Tooltip("row:N", title="row"),
            alt.Tooltip("task:N"),
            alt.Tooltip("just:Q", title="just learned", format=".3f"),
            alt.Tooltip("final:Q", title="final", format=".3f"),
            alt.Tooltip("lost:Q", title="forgotten, %", format=".1f"),
            alt.Tooltip("seeds:Q"),
        ],
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
        "Percent of the just learned pixel F1 that is lost at the end, means over seeds; less than zero: later tasks "
        f"helped. Joint runs forget nothing and are left out. {_holds([r for r in rows if r.variant.strategy != 'joint'])}.",
        _finished(alt.layer(cells, words).properties(width=alt.Step(62), height=alt.Step(26))),
    )


def _time(group: Group, rows: list[Row]) -> Figure | None:
    phases = (("training", "train_s"), ("evaluation", "eval_s"))
    data = [
        {
            **_about(row),
            "row": f"{row.variant.method_title}, {row.variant.how}",
            "phase": phase,
            "minutes": _short(sum(run.summary["time"][key] for run in row.runs) / len(row.runs) / 60),
            "place": place,
        }
        for row in rows
        for place, (phase, key) in enumerate(phases)
    ]
    chart = (
        alt.Chart(alt.Data(values=data))
        .transform_filter(_FILTER)
        .mark_bar()
        .encode(
            x=alt.X("minutes:Q", title="minutes, mean over seeds"),
            y=alt.Y(
                "row:N",
                title=None,
                sort=[f"{r.variant.method_title}, {r.variant.how}" for r in rows],
                axis=alt.Axis(domain=False, ticks=False),
            ),
            color=alt.Color(
                "phase:N",
                title=None,
                scale=alt.Scale(domain=[p for p, _ in phases], range=["#3d7fbf", "#c9a227"]),
            ),
            order="place:Q",
            tooltip=[
                alt.Tooltip("row:N", title="row"),
                alt.Tooltip("phase:N"),
                alt.Tooltip("minutes:Q", format=".2f"),
                alt.Tooltip("seeds:Q"),
            ],
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
    """A scale from 0 to above the highest; fixed, so that what the page hides moves nothing."""
    return alt.Scale(domain=[0, 1.06 * max(values) or 1], nice=False)


def _short(value: float | None) -> float | None:
    """A number that costs the page few bytes."""
    return None if value is None else float(f"{value:.5g}")
