"""Published figures stand beside the rows of the same protocol, and metrics beyond the usual ones have columns."""

import csv
import io
import json
from pathlib import Path
from typing import Any

import pytest
from test_report import make, only_group

from clbench.data.protocols import protocol_of
from clbench.report import page, published, tables
from clbench.report.comparison import grouped
from clbench.report.reading import read

VISA = [
    "candle",
    "capsules",
    "cashew",
    "chewinggum",
    "fryum",
    "macaroni1",
    "macaroni2",
    "pcb1",
    "pcb2",
    "pcb3",
    "pcb4",
    "pipe_fryum",
]
RISEN = [[0.5] * stage + [0.9] for stage in range(12)]  # every category falls from 0.9 to 0.5 at once


def visa(folder: Path, *overrides: str, **given: Any) -> Path:
    given = {"R": RISEN, "tasks": VISA, **given}
    return make(folder, "dataset=visa", "dataset.root=x", "method=padim", *overrides, **given)


def lines(table: tables.Table | None) -> list[dict[str, str]]:
    assert table is not None
    return list(csv.DictReader(io.StringIO(tables.as_csv([(1, table)]))))


def test_the_file_of_published_figures_is_whole() -> None:
    rows = published.rows()
    assert len(rows) == 79
    for row in rows:
        assert None not in row.values() and not row["note"].startswith("REJECTED"), row
        assert row["selection"] in published.SELECTION and row["source"] and row["method"], row
        assert row["source_kind"] in ("authors", "abstract", "second-hand"), row
        assert row["value"] in ("final", "stages") and row["forgetting"] in ("", *published.KINDS), row
        numbers = {
            key: float(row[key]) for key in row if row[key] and key.endswith(("auroc", "ap", "pro", "f1"))
        }
        assert numbers and all(-100 < number <= 100 for number in numbers.values()), row
        forgets = [key for key in numbers if key.startswith("forgetting_")]
        assert bool(forgets) == bool(row["forgetting"]), row
    # Every protocol that has rows is one that a run can have.
    named = {row["protocol"]: row["dataset"] for row in rows if row["protocol"]}
    assert set(named) == {
        *("paper", "mvtec_1x15", "mvtec_14_1", "mvtec_10_5", "mvtec_3x5", "mvtec_10_1"),
        *("visa_1x12", "visa_11_1", "visa_8_4", "visa_8_1"),
    }
    assert protocol_of("visa", [[name] for name in VISA]) == "visa_1x12"


def test_rows_of_the_same_protocol_stand_below_ours_each_kind_in_its_column(tmp_path: Path) -> None:
    visa(tmp_path, "strategy=native")
    group = only_group(tmp_path)
    assert group.protocol == "visa_1x12"
    ours, *theirs = lines(published.table(group))
    assert (ours["row"], ours["selection"], ours["source_kind"]) == (
        "PaDiM, native",
        "no test image",
        "this report",
    )
    # 11 categories lose 0.4 of 0.9; the last one stays at 0.9.
    assert float(ours["final_image_auroc"]) == pytest.approx((11 * 0.5 + 0.9) / 12, abs=1e-5)
    assert float(ours["best_minus_final_image_auroc"]) == pytest.approx(0.4, abs=1e-5)
    assert float(ours["just_learned_minus_final_image_auroc"]) == pytest.approx(0.4, abs=1e-5)
    assert ours["small_bank_pixel_ap"] == ours["gap_to_joint_pixel_ap"] == ""
    by_name = {row["row"]: row for row in theirs}
    ucad = by_name["UCAD"]
    assert (ucad["selection"], ucad["final_image_auroc"], ucad["final_pixel_ap"]) == (
        *("selected on test images", "0.874", "0.3"),
    )
    assert (ucad["small_bank_image_auroc"], ucad["best_minus_final_image_auroc"]) == ("0.039", "")
    assert by_name["ReplayCAD"]["gap_to_joint_pixel_ap"] == "0.05"
    assert by_name["CFA (fine-tuned)"]["selection"] == "unknown"
    # A row has forgetting of one kind alone, and rows of other protocols are not there.
    kinds = [name for name in published.KINDS if name not in ("final", "stages")]
    for row in theirs:
        assert sum(any(row[key] for key in row if key.startswith(kind)) for kind in kinds) <= 1
    assert len(theirs) == sum(row["protocol"] == "visa_1x12" for row in published.rows()) == 18
    cells = [line for line in published.table(group).lines if line.published]  # type: ignore[union-attr]
    assert not any(cell.mark for line in cells for cell in line.cells)
    assert "visa_8_4" in (published.note(group) or "") and "visa_1x12" not in (published.note(group) or "")


@pytest.mark.parametrize(
    "tasks", [VISA[:11], VISA[::-1], [VISA[:6], VISA[6:]]], ids=["fewer", "order", "2x6"]
)
def test_rows_of_another_protocol_are_not_shown_which_is_said(tasks: Any, tmp_path: Path) -> None:
    count = sum(1 if isinstance(task, str) else len(task) for task in tasks)
    visa(tmp_path, R=[[0.5] * count] * len(tasks), tasks=tasks)
    group = only_group(tmp_path)
    assert (group.protocol, published.table(group)) == (None, None)
    assert "visa_1x12" in (published.note(group) or "")


def test_the_page_of_another_protocol_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(page, "_MOST_FIGURES", 0)  # they take seconds
    visa(tmp_path, R=[[0.5] * 11] * 11, tasks=VISA[:11])
    assert page.write_page(read([tmp_path]), tmp_path / "report", "t").files
    assert not (tmp_path / "report" / "tables" / "published.csv").exists()
    assert "do not compare with these rows" in (tmp_path / "report" / "index.html").read_text()


def test_a_group_in_drawn_orders_follows_no_protocol(tmp_path: Path) -> None:
    visa(tmp_path, "task_order=random", tasks=VISA[::-1])
    (group,) = grouped(read([tmp_path]))
    assert (
        list(group.tasks) == VISA and group.protocol is None
    )  # a group of drawn orders names its tasks sorted


def with_metric(path: Path, metric: str, value: float) -> None:
    """Add a further metric to a run's metrics.csv and summary.json, the same after every stage."""
    table = (path / "metrics.csv").read_text().splitlines()
    more = [line.replace(",aupro,", f",{metric},") for line in table if ",aupro," in line]
    rows = [",".join([*line.split(",")[:-1], str(value)]) for line in more]
    (path / "metrics.csv").write_text("\n".join([*table, *rows]) + "\n")
    summary = json.loads((path / "summary.json").read_text())
    summary["final"][metric] = value
    (path / "summary.json").write_text(json.dumps(summary))


def test_a_metric_that_some_runs_have_is_a_column_and_empty_for_the_others(tmp_path: Path) -> None:
    for number, rate in enumerate((0.02, 0.05)):
        with_metric(make(tmp_path, "method=padim", "strategy=native", f"seed={number}"), "image_fpr", rate)
    with_metric(make(tmp_path, "method=padim", "strategy=finetune"), "image_fpr", 0.2)
    make(tmp_path, "method=cfa", "strategy=finetune")
    group = only_group(tmp_path)
    comparison = tables.comparison(group)
    column = next(column for column in comparison.columns if column.key == "image_fpr")
    assert column.title == "image FPR" and "share of normal test images" in column.about
    place = comparison.columns.index(column)
    found = {f"{line.method} {line.strategy}": line.cells[place] for line in comparison.lines}
    assert found["padim native"].text == "0.035 ± 0.021"
    assert (found["padim native"].mark, found["padim finetune"].mark) == ("best", "worst")  # less is better
    assert found["cfa finetune"].text == tables.NOTHING
    stages = {(row["method"], row["strategy"]): row["image_fpr"] for row in lines(tables.stages(group))}
    assert (float(stages["PaDiM", "finetune"]), stages["CFA", "finetune"]) == (0.2, "")
    assert {row["method"] for row in lines(tables.matrices(group)) if row["metric"] == "image_fpr"} == {
        "PaDiM"
    }


def test_tables_of_groups_with_other_metrics_share_a_file(tmp_path: Path) -> None:
    with_metric(make(tmp_path, "method=padim", "strategy=native"), "image_fpr", 0.02)
    with_metric(make(tmp_path, "method=padim", "strategy=native", "dataset.resize=32"), "aupimo", 0.3)
    groups = grouped(read([tmp_path]))
    text = tables.as_csv([(group.number, tables.comparison(group)) for group in groups])
    found = {(row["image_fpr"], row["aupimo"]) for row in csv.DictReader(io.StringIO(text))}
    assert found == {("0.02", ""), ("", "0.3")}
    header = text.splitlines()[0].split(",")
    assert header.index("aupro") < header.index("training_time_min") < header.index("image_fpr")
