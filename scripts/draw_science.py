"""The figures of docs/science.md and docs/strategies.md, of the numbers in the tables of docs/measured.md and the latter.

python scripts/draw_science.py    # docs/science/*.svg
"""

import re
from pathlib import Path
from typing import Any

import altair as alt
import vl_convert

from clbench.report.titles import METHODS, method_colours

DOCS = Path(__file__).parent.parent / "docs"
_WIDTH = 560  # pixels of a figure's data
_FINETUNE, _REPLAY = "fine-tuning", "replay of 100 images"


def main() -> None:
    """Draw each figure by itself, on white."""
    page = (DOCS / "measured.md").read_text(encoding="utf-8")
    for name, chart in {
        "replay": replay(page),
        "equal_memory": equal_memory(page),
        "thresholds": thresholds(page),
        "same_bytes": same_bytes((DOCS / "strategies.md").read_text(encoding="utf-8")),
    }.items():
        chart = chart.configure(background="white", font="sans-serif", padding=12)
        chart = chart.configure_view(stroke=None).configure_axis(
            labelFontSize=13, titleFontSize=13, titleFontWeight="normal", gridOpacity=0.4
        )
        chart = chart.configure_legend(labelFontSize=13, titleFontSize=13, symbolSize=90, orient="top")
        chart = chart.configure_header(labelFontSize=14, labelFontWeight="bold", title=None)
        path = DOCS / "science" / f"{name}.svg"
        path.parent.mkdir(exist_ok=True)
        path.write_text(vl_convert.vegalite_to_svg(chart.to_dict()) + "\n", encoding="utf-8")


def rows(page: str, heading: str, *columns: str) -> list[dict[str, str]]:
    """The rows of the first table below a heading whose first columns are these: column -> text.

    An empty first cell stands for what the row above has there. A second column of the same name is `NAME (2)`.
    """
    section = page[re.search(rf"^#+ {re.escape(heading)}\n", page, re.MULTILINE).end() :]  # type: ignore[union-attr]
    lines = iter(section[section.index(f"| {' | '.join(columns)} |") :].splitlines())
    names: list[str] = []
    for name in _cells(next(lines)):
        names.append(f"{name} (2)" if name in names else name)
    next(lines)
    found: list[dict[str, str]] = []
    for line in lines:
        if not line.startswith("|"):
            break
        values = _cells(line)
        values[0] = values[0] or found[-1][names[0]]
        found.append(dict(zip(names, values, strict=True)))
    return found


def _cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip().strip("|").split("|")]


def replay(page: str) -> Any:
    """Pixel F1 of each method, fine-tuned and with replay."""
    table = rows(page, "Replay against fine-tuning, all seven", "method", "strategy")
    titles = {"finetune": _FINETUNE, "replay": _REPLAY}
    data = [
        {"method": row["method"], "strategy": titles[row["strategy"]], "f1": float(row["pixel F1"])}
        for row in table
    ]
    order = [row["method"] for row in table if row["strategy"] == "replay"]
    base = alt.Chart(alt.Data(values=data)).encode(
        y=alt.Y("method:N", sort=order, title=None),
        x=alt.X(
            "f1:Q",
            title="pixel F1 after five products",
            axis=alt.Axis(format=".1f", tickCount=7),
            scale=alt.Scale(domain=[0, 0.7]),
        ),
    )
    colours = alt.Scale(domain=[_FINETUNE, _REPLAY], range=["#e0662f", "#3d7fbf"])
    shapes = alt.Scale(domain=[_FINETUNE, _REPLAY], range=["triangle-down", "circle"])
    points = base.mark_point(filled=True, size=110, opacity=1).encode(
        color=alt.Color("strategy:N", scale=colours, title=None),
        shape=alt.Shape("strategy:N", scale=shapes, title=None),
    )
    lines = base.mark_line(color="#bbbbbb", strokeWidth=3).encode(detail="method:N")
    return (lines + points).properties(width=_WIDTH, height=alt.Step(32))


def equal_memory(page: str) -> Any:
    """Pixel F1 and AU-PRO of detectors, by the bytes that they are given."""
    table = rows(page, "Detectors of today in a stream of five products", "memory", "method")
    names = {title: name for name, title in METHODS.items()}
    methods = list(dict.fromkeys(row["method"] for row in table))
    own = method_colours([names[title] for title in methods])
    colours = alt.Scale(domain=methods, range=[own[names[title]] for title in methods])
    charts = []
    for metric in ("pixel F1", "AU-PRO"):
        data = [{"method": row["method"], "mb": row["memory"], "value": float(row[metric])} for row in table]
        values = [entry["value"] for entry in data]
        # Both axes are 0.1 wide, so that a difference that says little does not look like one that does.
        lowest = round((min(values) + max(values)) / 2, 2) - 0.05
        chart = alt.Chart(alt.Data(values=data), title=metric).encode(
            x=alt.X(
                "mb:N",
                sort=list(dict.fromkeys(row["memory"] for row in table)),
                title="memory",
                axis=alt.Axis(labelAngle=0),
            ),
            y=alt.Y("value:Q", title=None, scale=alt.Scale(domain=[lowest, lowest + 0.1], nice=False)),
            color=alt.Color("method:N", scale=colours, title=None),
            shape=alt.Shape("method:N", scale=alt.Scale(domain=methods), title=None),
        )
        both = chart.mark_line() + chart.mark_point(filled=True, size=90, opacity=1)
        charts.append(both.properties(width=_WIDTH / 2 - 20, height=230))
    return alt.hconcat(*charts)


def thresholds(page: str) -> Any:
    """Rates of normal pixels above a threshold, when it was set and four tasks later."""
    table = rows(page, "Thresholds that age, and which model judges", "category, normal test images")
    columns = {
        ("PatchCore", "just learned"): "PatchCore, pixels: just learned",
        ("PatchCore", "at the end"): "at the end",
        ("PaDiM", "just learned"): "PaDiM, pixels: just learned",
        ("PaDiM", "at the end"): "at the end (2)",
    }
    data = []
    for row in table:
        category = row["category, normal test images"].partition(",")[0]
        for (method, after), column in columns.items():
            rate, low, high = map(float, re.findall(r"[\d.]+", row[column]))
            about = {"method": method, "when": after, "category": category}
            data.append({**about, "rate": rate, "low": low, "high": high})
    when = ["just learned", "at the end"]
    colours = alt.Scale(domain=when, range=["#3d7fbf", "#e0662f"])
    source = alt.Data(values=data)
    base = alt.Chart(source).encode(
        y=alt.Y("category:N", sort=None, title=None),
        yOffset=alt.YOffset("when:N", sort=when),
        color=alt.Color("when:N", scale=colours, sort=when, title=None),
    )
    shares = alt.Axis(format="%", tickCount=4)
    bars = base.mark_rule(strokeWidth=2).encode(
        x=alt.X("low:Q", title="normal pixels that are marked", axis=shares), x2="high:Q"
    )
    points = base.mark_point(filled=True, size=80, opacity=1).encode(x="rate:Q")
    asked = alt.Chart(source).mark_rule(color="#777777", strokeDash=[4, 3]).encode(x=alt.datum(0.01))
    return (
        (asked + bars + points)
        .properties(width=_WIDTH / 2 - 20, height=alt.Step(20))
        .facet(column=alt.Column("method:N", sort=["PatchCore", "PaDiM"], title=None))
    )


def same_bytes(page: str) -> Any:
    """Pixel F1 of each method, by what the same bytes are spent on; without weights, which keep next to nothing."""
    table = rows(page, "The same bytes, spent in different ways", "method", "spent on")
    columns = {"the bytes of 100 images": "15 MB: pixel F1", "of 20 images": "3 MB: pixel F1"}
    data = [
        {
            "method": row["method"],
            "kept": row["spent on"],
            "budget": budget,
            "f1": float(row[column].split()[0]),
        }
        for row in table
        for budget, column in columns.items()
        if row[column] and not row["spent on"].startswith("weights")
    ]
    kept = list(dict.fromkeys(entry["kept"] for entry in data))
    colours = alt.Scale(domain=kept, range=["#222222", "#3d7fbf", "#39a37a", "#e0662f", "#9a5fb5"])
    shapes = alt.Scale(domain=kept, range=["circle", "square", "diamond", "triangle-down", "triangle-up"])
    return (
        alt.Chart(alt.Data(values=data))
        .mark_point(filled=True, size=120, opacity=0.9)
        .encode(
            y=alt.Y("method:N", sort=list(dict.fromkeys(row["method"] for row in table)), title=None),
            x=alt.X(
                "f1:Q",
                title="pixel F1",
                axis=alt.Axis(format=".2f", tickCount=5),
                scale=alt.Scale(domain=[0.38, 0.56]),
            ),
            color=alt.Color("kept:N", scale=colours, title=None),
            shape=alt.Shape("kept:N", scale=shapes, title=None),
        )
        .properties(width=_WIDTH / 2 - 20, height=alt.Step(36))
        .facet(column=alt.Column("budget:N", sort=list(columns), title=None))
    )


if __name__ == "__main__":
    main()
