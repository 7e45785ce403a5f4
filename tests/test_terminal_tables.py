"""Tables on the terminal say which further metrics were measured and where they are, and only where there are any."""

import io
import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from test_published import with_metric
from test_report import make, only_group

from clbench.metrics.names import USUAL
from clbench.recording.run_directory import RunDirectory
from clbench.report import tables
from clbench.results import Results
from clbench.sweeps.runs import SweepRun
from clbench.sweeps.tables import sweep_table
from clbench.terminal import run_table


def summary(*metrics: str) -> dict[str, Any]:
    return {
        "status": "complete",
        "tasks": ["cap"],
        "categories": [["cap"]],
        "method": "padim",
        "strategy": "native",
        "final": dict.fromkeys(metrics, 0.5),
        "average_forgetting_pct": None,
        "memory": {"architecture_mb": 1.0, "executed_mb": 1.0, "additional_mb": 1.0, "peak_mb": 1.0},
        "time": {"train_s": 1.0, "eval_s": 1.0, "inference_ms_per_image": 1.0},
    }


@pytest.mark.parametrize(("further", "named"), [((), ""), (("segf1", "aupimo"), "AUPIMO, SegF1")])
def test_a_run_and_a_sweep_name_them(further: tuple[str, ...], named: str, tmp_path: Path) -> None:
    metrics = (*USUAL, *further)
    results = Results([["cap"]], [[0]], metrics)
    results.add(0, 0, dict.fromkeys(metrics, 0.5))
    directory = RunDirectory(tmp_path / "run")
    directory.create()
    (directory.path / "summary.json").write_text(json.dumps(summary(*metrics)))
    of_run = run_table(summary(*metrics), results).caption
    of_sweep = sweep_table([SweepRun(["seed=0"], directory, "finished")], 200).caption
    for caption in map(str, (of_run, of_sweep)):
        assert ("also measured: " in caption) == bool(named)
        assert f"also measured: {named} (see " in caption or not named
        assert "metrics.csv" in caption or not named


def test_a_report_names_them_where_the_terminal_has_no_room_for_columns(tmp_path: Path) -> None:
    with_metric(make(tmp_path / "more", "method=padim", "strategy=native"), "aupimo", 0.125)
    make(tmp_path / "usual", "method=padim", "strategy=native")

    def shown(folder: str, width: int) -> str:
        console = Console(width=width, record=True, file=io.StringIO())
        console.print(tables.for_terminal(only_group(tmp_path / folder), console))
        return console.export_text()

    assert "0.125" in (wide := shown("more", 240)) and "also" not in wide
    assert "also measured: AUPIMO (see the page" in (narrow := shown("more", 110)) and "0.125" not in narrow
    assert "also" not in shown("usual", 110)
