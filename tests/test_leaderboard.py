"""The leaderboard has a row for each variant and protocol, and the command beside it makes that row's config."""

import csv
import io
import json
import shlex
from pathlib import Path

import pytest
from conftest import Train
from test_report import make, only_group

from clbench import cli
from clbench.config import check, differences, sources
from clbench.report import leaderboard
from clbench.report.comparison import grouped
from clbench.report.reading import read

FALLEN = [[0.8], [0.9, 0.8], [0.6, 0.4, 0.7]]  # best since learned: 0.9 and 0.8; just learned: 0.8 and 0.8


def rows(folder: Path) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO((folder / "leaderboard.csv").read_text())))


def test_a_row_has_what_an_appendix_needs(tmp_path: Path) -> None:
    for seed in (0, 1):
        make(tmp_path / "one", "method=padim", "strategy=native", f"seed={seed}", R=FALLEN)
    make(tmp_path / "two", "method=padim", "strategy=native", "dataset.resize=32")
    make(tmp_path / "two", "method=cfa", "strategy=finetune", status="failed")
    given = [
        "report",
        "--leaderboard",
        str(tmp_path / "one"),
        str(tmp_path / "two"),
        "--output",
        str(tmp_path / "out"),
    ]
    assert cli.main(given) == 0
    assert not (tmp_path / "out" / "index.html").exists()
    (first, second) = rows(tmp_path / "out")
    assert (first["seeds"], second["seeds"]) == ("2", "1")
    assert "dataset.resize=32" in second["settings"] and first["config"] != second["config"]
    assert float(first["pixel_ap"]) == pytest.approx(1.7 / 3, abs=1e-5)
    assert (float(first["pixel_ap_deviation"]), second["pixel_ap_deviation"]) == (0, "")
    # FM: (0.9 - 0.6 + 0.8 - 0.4) / 2. Relative: (0.2 / 0.8 + 0.4 / 0.8) / 2.
    assert float(first["fm_best_minus_final_image_auroc"]) == pytest.approx(0.35)
    assert float(first["relative_forgetting_pixel_f1_pct"]) == pytest.approx(37.5)
    assert (first["kept_mb"], first["training_min"]) == ("30", "1.5")
    assert first["command"].startswith("clbench run -m ") and first["command"].endswith(" seed=0,1")
    markdown, latex = ((tmp_path / "out" / f"leaderboard.{kind}").read_text() for kind in ("md", "tex"))
    assert first["command"] in markdown and "best since learned − final" in markdown
    assert r"\toprule" in latex and "dataset.resize=32" in latex and "best since learned $-$ final" in latex
    assert "_" not in latex.replace(r"\_", "")


@pytest.mark.parametrize(
    "overrides",
    [
        ["method=padim", "strategy=finetune"],
        ["method=patchcore", "strategy=native", "method.memory_size=60", "evaluate=all", "seed=3"],
        ["method=stfpm", "replay.size=20", "gpu.precision=bf16", "metrics.further=[aupimo,segf1]"],
        ["method=cfa", "benchmark=paper", "dataset.root=/it's a/folder,x", "strategy=replay"],
        ["method=padim", "backbone=resnet18", "task_order.tasks=[[cap,'nut pin'],pin]"],
        ["method=draem", "task_order=random", "strategy=finetune"],
    ],
    ids=["plain", "settings", "buffer", "paper", "another backbone", "random"],
)
def test_the_command_of_a_row_composes_to_its_config(overrides: list[str], tmp_path: Path) -> None:
    shown = [text.replace("/it's a/folder,x", r"'/it\'s a/folder,x'") for text in overrides]
    make(tmp_path, *shown, R=FALLEN, name="run")
    group = only_group(tmp_path)
    command = leaderboard.command(group.rows[0])
    assert command is not None
    program, run, *words = shlex.split(command)
    assert (program, run) == ("clbench", "run")
    assert "/it's" not in command
    words = [shown[2] if word == "dataset.root=FOLDER" else word for word in words]
    stored = {
        key: value for key, value in group.runs[0].config.items() if key not in ("made_by", "departures")
    }
    assert differences(stored, check(sources.composed(*words)).plain()) == []


def test_where_no_command_is_known_none_is_given(tmp_path: Path) -> None:
    make(tmp_path, "method=padim", "strategy=finetune", earlier=True)
    own = {"name": "mine", "_target_": "clbench.strategies.finetune.Finetune"}
    make(tmp_path, "method=cfa", "strategy=finetune", strategy=own, flags={"continual": True}, name="own")
    assert [leaderboard.command(row) for group in grouped(read([tmp_path])) for row in group.rows] == [
        None,
        None,
    ]


def test_the_digest_is_of_what_changes_results(tmp_path: Path) -> None:
    given = ("method=padim", "strategy=native", "dataset=mvtec")
    others = {
        "same": ["dataset.root=/a", "seed=0"],
        "seed": ["dataset.root=/a", "seed=1"],
        "place": ["dataset.root=/b", "seed=0", "gpu.threads=2"],
        "setting": ["dataset.root=/a", "seed=0", "method.features=7"],
    }
    digests = {
        name: leaderboard.config_digest(read([make(tmp_path / name, *given, *more).parent])[0])
        for name, more in others.items()
    }
    assert digests["same"] == digests["seed"] == digests["place"] != digests["setting"]
    path = make(tmp_path / "images", *given, *others["same"])
    summary = json.loads((path / "summary.json").read_text())
    (path / "summary.json").write_text(json.dumps({**summary, "images": {"cap": ["1", "2"]}}))
    assert leaderboard.config_digest(read([path.parent])[0]) != digests["same"]


def test_a_leaderboard_of_nothing_finished_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make(tmp_path, "method=padim", status="failed")
    assert cli.main(["report", "--leaderboard", str(tmp_path)]) == 1
    assert "no rows: finish some" in capsys.readouterr().err


def test_the_command_of_a_real_run_finds_that_run(train: Train, folder: Path, tmp_path: Path) -> None:
    assert train("method=padim", "strategy=finetune", "method.features=5", "replay.size=null").returncode == 0
    (group,) = grouped(read([tmp_path / "outputs" / "default"]))
    command = leaderboard.command(group.rows[0])
    assert command is not None
    words = [word.replace("FOLDER", str(folder)) for word in shlex.split(command)[2:]]
    config = check(sources.composed(*words)).plain()
    assert differences(group.runs[0].config, config) == [], command
