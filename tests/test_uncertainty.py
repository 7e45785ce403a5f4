"""Rows that differ by noise alone are level, rows that differ are not: with known truth, and in the report."""

import csv
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.stats import binom
from test_published import visa
from test_report import browser, make, only_group  # noqa: F401

from clbench.metrics import curves
from clbench.metrics.names import USUAL
from clbench.metrics.resampling import Evidence
from clbench.recording.run_directory import RunDirectory
from clbench.report import page, published, tables
from clbench.report.comparison import grouped
from clbench.report.figures import figures
from clbench.report.reading import read
from clbench.report.uncertainty import critical_difference, ranks, resampled, spread_of_pairs

GOOD, DEFECTIVE, SIDE = 30, 30, 4


def predictions(
    images: np.random.Generator, detector: np.random.Generator, signal: float
) -> tuple[np.ndarray, ...]:
    """What a detector says of test images, some of which are harder than others: scores, labels, maps, masks.

    Args:
        images: draws the images; detectors that are given it in the same state see the same ones.
        detector: draws the detector's own noise.
        signal: how far defects stand out: what makes a detector good.
    """
    count = GOOD + DEFECTIVE
    labels = np.arange(count) >= GOOD
    masks = np.zeros((count, SIDE, SIDE), bool)
    masks[GOOD:, :2, : SIDE - 1] = True
    hard = images.normal(size=(count, 1, 1))
    maps = hard + signal * masks + detector.normal(size=(count, SIDE, SIDE))
    scores = hard[:, 0, 0] + signal * labels + detector.normal(size=count)
    return scores, labels, (np.round(3 * maps) / 3).astype(np.float32), masks


def exact(
    scores: np.ndarray, labels: np.ndarray, maps: np.ndarray, masks: np.ndarray
) -> dict[str, float | None]:
    return {**curves.image_metrics(scores, labels), **curves.pixel_metrics(maps, masks)}


def evidence(seed: int, detector: int, signal: float) -> Evidence:
    given = predictions(np.random.default_rng(seed), np.random.default_rng([seed, detector]), signal)
    return Evidence.of(*given, [], f"{seed:064x}", exact(*given))


def level(seed: int, *rows: list[float]) -> dict[str, list[bool]]:
    """Whether rows of two categories are level with the best of them, by metric; a row is its detectors' signals, one a seed."""
    draws: dict[str, list[np.ndarray]] = {name: [] for name in USUAL}
    values: dict[str, list[float]] = {name: [] for name in USUAL}
    for row, signals in enumerate(rows):
        of_categories = {
            str(category): [
                evidence(2 * seed + category, 10 * row + number, signal)
                for number, signal in enumerate(signals)
            ]
            for category in range(2)
        }
        resamples = resampled(of_categories, count=200)
        every = [one.exact for of_seeds in of_categories.values() for one in of_seeds]
        for place, name in enumerate(USUAL):
            draws[name].append(resamples[name])
            values[name].append(float(np.mean([one[place] for one in every])))
    found = {}
    for name in USUAL:
        deviations, quantile = spread_of_pairs(np.array(draws[name]))
        best = int(np.argmax(values[name]))
        off = np.array(values[name])[best] - np.array(values[name])
        found[name] = list(off <= quantile * deviations[best])
    return found


@pytest.mark.parametrize(("rows", "count"), [(2, 120), (6, 60)])
def test_rows_that_differ_by_noise_alone_are_all_level_in_about_95_of_100_simulations(
    rows: int, count: int
) -> None:
    found = [level(seed, [1.0, 1.0], *[[1.0]] * (rows - 1)) for seed in range(count)]
    least, most = binom.ppf([0.0005, 0.9995], count, 0.95)
    for name in ("image_auroc", "pixel_auroc", "pixel_ap", "aupro"):
        # Of some dozens of images intervals hold a little less than they say.
        assert least - 2 <= sum(all(one[name]) for one in found) <= most, name


def test_rows_that_differ_are_not_level() -> None:
    found = [level(seed, [0.5], [3.0], [2.9]) for seed in range(20)]
    for name in ("image_auroc", "pixel_auroc", "pixel_ap", "pixel_f1", "aupro"):
        assert sum(one[name][0] for one in found) <= 1, name
        assert sum(all(one[name][1:]) for one in found) >= 12, name


def measured(path: Path, detector: int, signal: float, shift: int = 0) -> Path:
    """Give a run the metrics, and the evidence, of a detector on the test images of its categories."""
    table = list(csv.DictReader(io.StringIO((path / "metrics.csv").read_text())))
    categories = list(dict.fromkeys(row["category"] for row in table))
    found = {}
    for number, category in enumerate(categories):
        seed = number + shift
        given = predictions(np.random.default_rng(seed), np.random.default_rng([seed, detector]), signal)
        found[category] = exact(*given)
        made = Evidence.of(*given, [], f"{seed:064x}", found[category])
        RunDirectory(path).write_evidence(category, made.arrays())
    lines = [",".join(table[0])]
    for row in table:
        value = found[row["category"]][row["metric"]]
        lines.append(",".join([*list(row.values())[:-1], f"{value:.6f}"]))
    (path / "metrics.csv").write_text("\n".join(lines) + "\n")
    summary = json.loads((path / "summary.json").read_text())
    summary["final"] = {name: float(np.mean([one[name] for one in found.values()])) for name in USUAL}  # type: ignore[arg-type]
    (path / "summary.json").write_text(json.dumps(summary))
    return path


@pytest.fixture
def experiment(tmp_path: Path) -> Path:
    """CFA twice, by two seeds; STFPM, which differs from it by noise alone; PaDiM, which is worse; a joint bound."""
    for seed in (0, 1):
        measured(make(tmp_path, "method=cfa", "strategy=finetune", f"seed={seed}"), seed, 2.0)
    measured(make(tmp_path, "method=stfpm", "strategy=finetune"), 2, 1.97)
    measured(make(tmp_path, "method=padim", "strategy=finetune"), 3, 0.7)
    measured(make(tmp_path, "method=padim", "strategy=joint", R=[[0.5, 0.5, 0.5]]), 4, 5.0)
    return tmp_path


def test_the_report_marks_what_is_level_with_the_best(experiment: Path) -> None:
    group = only_group(experiment)
    table = tables.comparison(group)
    place = [column.key for column in table.columns].index("pixel_ap")
    marks = {f"{line.method} {line.strategy}": line.cells[place].mark for line in table.lines}
    assert sorted([marks["cfa finetune"] or "", marks["stfpm finetune"] or ""]) == ["best", "level"]
    assert (marks["padim finetune"], marks["padim joint"]) == ("worst", None)
    assert " ≈ |" in tables.as_markdown(table) and r" $\approx$" in tables.as_latex(table)

    shown = tables.differences(group)
    assert shown is not None
    lines = {
        (row["method"], row["strategy"]): row
        for row in csv.DictReader(io.StringIO(tables.as_csv([(1, shown)])))
    }
    bound, worst = lines["PaDiM", "joint"], lines["PaDiM", "finetune"]
    assert float(bound["pixel_ap_low"]) > 0 > float(worst["pixel_ap_high"])
    assert float(worst["pixel_ap_low"]) < float(worst["pixel_ap"]) < float(worst["pixel_ap_high"])
    best = next(row for row in lines.values() if row["pixel_ap"] == "0")
    assert best["pixel_ap_low"] == "" and best["method"] in ("CFA", "STFPM")
    # The same report again, of the same runs: the same intervals.
    assert tables.as_csv([(1, shown)]) == tables.as_csv([(1, tables.differences(only_group(experiment)))])  # type: ignore[list-item]


def test_ranks_and_critical_difference_are_those_of_the_paper(tmp_path: Path) -> None:
    # Demšar (2006): quantiles of table 5, and the example of four classifiers on 14 data sets.
    for count, quantile in enumerate((1.960, 2.343, 2.569, 2.728, 2.850, 2.949, 3.031, 3.102, 3.164), 2):
        expected = quantile * np.sqrt(count * (count + 1) / (6 * 14))
        assert critical_difference(count, 14) == pytest.approx(expected, abs=2e-3)
    assert critical_difference(4, 14) == pytest.approx(1.25, abs=5e-3)
    # By hand: the rows' ranks in the three categories are 1 1 1, 2 2.5 2 and 3 2.5 3.
    finals = {"cfa": [0.9, 0.8, 0.7], "stfpm": [0.8, 0.5, 0.6], "padim": [0.1, 0.5, 0.2]}
    for method, final in finals.items():
        make(tmp_path, f"method={method}", "strategy=finetune", R=[[0.5], [0.5, 0.5], final])
    make(tmp_path, "method=padim", "strategy=joint", R=[[1.0, 1.0, 1.0]])  # a bound, which has no rank
    group = only_group(tmp_path)
    found = ranks(group.rows, "pixel_ap")
    assert found is not None and found.categories == 3
    means = {row.variant.method: mean for row, mean in zip(found.rows, found.means, strict=True)}
    assert means == pytest.approx({"cfa": 1, "stfpm": 6.5 / 3, "padim": 8.5 / 3})
    # Friedman's statistic with its correction for ties: 12 / (N k (k + 1)) sum R^2 - 3 N (k + 1), over 1 - 6 / (N k (k^2 - 1)).
    statistic = (12 / 36 * (3**2 + 6.5**2 + 8.5**2) - 36) / (1 - 6 / 72)
    assert found.p == pytest.approx(np.exp(-statistic / 2))  # chi squared of two degrees of freedom
    drawn = next(figure for figure in figures(group) if figure.name == "ranks")
    assert f"critical difference {critical_difference(3, 3):.2f}" in drawn.about
    assert ranks(group.rows[:2], "pixel_ap") is None


@pytest.mark.parametrize("fault", ["missing", "damaged", "another evaluation", "other images"])
def test_a_row_without_evidence_is_marked_level_with_none_which_is_said(fault: str, experiment: Path) -> None:
    path = experiment / "method=stfpm,strategy=finetune"
    file = path / "evidence" / "nut.npz"
    said = "evidence/ is missing or damaged"
    if fault == "missing":
        file.unlink()
    elif fault == "damaged":
        file.write_bytes(file.read_bytes()[:-40])
    elif fault == "another evaluation":
        said = "is not what metrics.csv was made of"
        file.write_bytes(
            (experiment / "method=padim,strategy=finetune" / "evidence" / "nut.npz").read_bytes()
        )
    else:
        said = "other test images than the best"
        measured(path, 2, 1.0, shift=50)
    (group,) = grouped(read([experiment]))
    row = next(index for index, row in enumerate(group.rows) if row.variant.method == "stfpm")
    assert not any(index == row and mark == "level" for (index, _), mark in group.marks.items())
    assert not any(index == row for index, _ in group.differences.found)
    assert any("STFPM, finetune" in note and said in note for note in group.notes)


def test_where_all_rows_print_alike_none_is_marked(tmp_path: Path) -> None:
    for method in ("cfa", "stfpm", "padim"):
        measured(make(tmp_path, f"method={method}", "strategy=finetune"), 0, 2.0)
    group = only_group(tmp_path)
    assert all(found.level for found in group.differences.found.values()) and group.differences.found
    assert group.marks == {}


def test_the_page_has_level_marks_and_published_rows_without_any(
    browser: Any,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(page, "_MOST_FIGURES", 0)  # they take seconds
    for detector, (strategy, signal) in enumerate({"native": 2.0, "finetune": 1.97}.items()):
        measured(visa(tmp_path, f"strategy={strategy}"), detector, signal)
    report = page.write_page(read([tmp_path]), tmp_path / "report", "published")
    browser.get(report.page.as_uri())

    def find(selector: str) -> list[Any]:
        return browser.find_elements("css selector", selector)

    (mark, *_) = find("#group-1 > .table td.level .mark")
    assert (
        mark.is_displayed()
        and "the interval of their difference over test images holds 0" in mark.get_attribute("title")
    )
    rows = find("#published-1 + .table tr.published")
    assert len(rows) == sum(row["protocol"] == "visa_1x12" for row in published.rows())
    assert (
        not find("#published-1 + .table .mark") and "selected on test images" in rows[-2].text + rows[10].text
    )
    # Sorted by a kind of forgetting: rows that have none of this kind stay last.
    titles = [button.get_attribute("textContent") for button in find("#published-1 + .table th")]
    place = titles.index("image AUROC, UCAD: large − small bank")
    find("#published-1 + .table th button")[place].send_keys("\n")
    cells = [row.find_elements("css selector", "td") for row in find("#published-1 + .table tbody tr")]
    assert cells[0][0].text == "UCAD" and cells[0][place].text == "0.039" and cells[1][place].text == "–"
    find('a[href="#published-words"]')[0].send_keys("\n")
    assert browser.current_url.endswith("#published-words")
    words = find("#published-words")[0]
    assert words.is_displayed() and "no later task plays a part" in words.text
    assert [entry for entry in browser.get_log("browser") if entry["level"] != "INFO"] == []
