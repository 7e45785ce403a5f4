"""The guide's examples, added as a user adds them: a folder of files, and nothing in the package touched."""

import csv
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, Train, command, run_directories
from processes import kill_when

from clbench.cli import main as clbench

GUIDE = ROOT / "docs" / "add-a-method.md"
SMALL = ("method.epochs=3", "method.batch_size=2", "method.held_out=0", "method.patience=null")


@pytest.fixture
def mine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The files of the guide, written where it says, and importable as with PYTHONPATH=mine."""
    text = GUIDE.read_text(encoding="utf-8")
    blocks = re.findall(r"```(?:python|yaml)\n((?:# @[^\n]*\n)?# (mine/\S+)\n.*?)```", text, re.DOTALL)
    assert len(blocks) >= 9
    for content, name in blocks:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content, encoding="utf-8")
    folder = tmp_path / "mine"
    monkeypatch.syspath_prepend(str(folder))
    for name in ("mean_picture", "stay_close", "first_images"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    return folder


def summary(directory: Path) -> dict:
    return json.loads((directory / "summary.json").read_text(encoding="utf-8"))


@pytest.mark.long
def test_the_guide_s_contract_tests_pass(mine: Path) -> None:
    words = [sys.executable, "-m", "pytest", "-q", "-n", "0", "-p", "no:cacheprovider", "test_mine.py"]
    paths = os.pathsep.join([str(mine), str(ROOT)])
    result = subprocess.run(
        words, cwd=mine, capture_output=True, text=True, check=False, env={**os.environ, "PYTHONPATH": paths}
    )
    assert result.returncode == 0, result.stdout[-3000:]
    assert re.search(r"\d\d passed", result.stdout)


@pytest.mark.long
def test_a_sweep_of_a_user_s_own_parts_is_run_counted_and_reported(
    mine: Path, train: Train, tmp_path: Path
) -> None:
    own = (f"--config-dir={mine}",)
    pull = train("-m", *own, "method=stfpm", "strategy=stay_close", "strategy.weight=0.01,1", *SMALL)
    assert pull.returncode == 0, pull.stderr
    stored = train("-m", *own, "method=stfpm", "strategy=first_images,replay", "replay.size=6", *SMALL)
    assert stored.returncode == 0, stored.stderr
    bank = train("-m", *own, "method=mean_picture", "strategy=native,finetune,joint")
    assert bank.returncode == 0, bank.stderr
    found = {directory.name: summary(directory) for directory in run_directories(tmp_path)}
    assert len(found) == 7 and all(about["status"] == "complete" for about in found.values())

    kept: dict[tuple[str, str], set[float]] = {}
    for about in found.values():
        kept.setdefault((about["method"], about["strategy"]), set()).add(about["memory"]["additional_mb"])

    # The footprint counts a strategy's copy of the weights, its stored images, and a bank in a submodule.
    (student,) = {a["memory"]["executed_mb"] for a in found.values() if a["strategy"] == "stay_close"}
    image = 48 * 48 * 3
    (copied,) = kept["stfpm", "stay_close"]
    assert 0.3 * student < copied < 0.6 * student  # of two networks, it keeps the student's weights once more
    assert kept["stfpm", "first_images"] == kept["stfpm", "replay"] == {6 * image / 1e6}
    assert kept["mean_picture", "native"] == {3 * 4 * image / 1e6}  # three pictures of four bytes a value
    assert kept["mean_picture", "finetune"] == {4 * image / 1e6}
    flags = {about["strategy"]: about["strategy_flags"] for about in found.values()}
    assert flags["stay_close"]["needs_gradients"] and flags["first_images"]["has_buffer"]

    assert clbench(["report", str(tmp_path / "outputs" / "default")]) == 0
    report = tmp_path / "outputs" / "default" / "report"
    with open(report / "tables" / "comparison.csv", encoding="utf-8") as file:
        lines = list(csv.DictReader(file))
    assert len(lines) == 7
    weighted = sorted(line["strategy"] for line in lines if line["strategy"].startswith("stay_close"))
    assert weighted == ["stay_close", "stay_close, weight=0.01"]  # two rows; 1 is what its config says
    drawn = {path.name: words(path) for path in report.glob("figures/group-1-*.svg")}
    assert {"stay_close", "first_images 6"} <= drawn["group-1-stages.svg"]
    continual = [line for line in lines if line["strategy"] != "joint"]
    continual.sort(key=lambda line: (float(line["additional_mb"]), -float(line["pixel_f1"])))
    front, best = set(), 0.0
    for line in continual:
        if float(line["pixel_f1"]) > best:
            front.add(f"{line['method']}, {line['strategy']}")
            best = float(line["pixel_f1"])
    names = {f"{line['method']}, {line['strategy']}" for line in lines}
    assert drawn["group-1-memory.svg"] & names == front  # the figure names those on its Pareto front


def words(figure: Path) -> set[str]:
    """The texts in an SVG."""
    return set(re.findall(r"<text[^>]*>([^<]*)</text>", figure.read_text(encoding="utf-8")))


@pytest.mark.parametrize(
    ("setting", "named", "way_out"),
    [
        (("strategy=stay_close", "strategy.weight=abc"), "strategy.weight=abc", "number"),
        (("strategy=stay_close", "strategy.weight=-1"), "strategy.weight=-1", "greater than or equal to 0"),
        (("strategy=stay_close", "strategy.wait=1"), "strategy.wait", "nearest: strategy.weight"),
        (("strategy=stay_close", "replay.size=6"), "replay.size=6", "it keeps no images"),
        (("strategy=first_images", "method=padim"), "strategy=first_images", "replay.size"),
        (("strategy=stay_close", "method=padim"), "strategy=stay_close", "gradients"),
        (("method=mean_picture", "method.sigma=-1"), "method.sigma=-1", "greater than or equal to 0"),
    ],
    ids=lambda value: str(value)[:50],
)
def test_wrong_values_are_refused_before_the_first_run(
    mine: Path, train: Train, tmp_path: Path, setting: tuple[str, ...], named: str, way_out: str
) -> None:
    method = () if any(text.startswith("method=") for text in setting) else ("method=stfpm",)
    result = train("-m", f"--config-dir={mine}", "seed=0,1", *method, *setting)
    (line,) = result.stderr.splitlines()
    assert result.returncode == 2 and line.startswith("error: ")
    assert named in line and way_out in line
    assert not (tmp_path / "outputs").exists()


@pytest.mark.parametrize("strategy", ["stay_close", pytest.param("first_images", marks=pytest.mark.long)])
def test_a_user_s_strategy_that_is_killed_and_continued_ends_in_the_same_metrics(
    strategy: str, mine: Path, folder: Path, tmp_path: Path, train: Train
) -> None:
    given = (
        f"--config-dir={mine}",
        "method=stfpm",
        f"strategy={strategy}",
        *SMALL[1:],
        "method.epochs=12",
    )
    given += ("replay.size=6",) if strategy == "first_images" else ()
    assert train("experiment=whole", *given).returncode == 0
    words = command(folder, tmp_path, "experiment=killed", "checkpoint_s=0", *given)[2:]
    checkpoints = tmp_path / "outputs" / "killed"
    for stage in (1, 2):  # in the middle of the second task and of the third

        def learning(stage: int = stage) -> bool:
            return bool(list(checkpoints.glob(f"*/checkpoint/learning-{stage:04d}-*.json")))

        assert kill_when(learning, words)
    continued = train("experiment=killed", "checkpoint_s=0", *given)
    assert continued.returncode == 0 and "continuing in stage 3 of 3" in continued.stdout
    (one,), (other,) = run_directories(tmp_path, "whole"), run_directories(tmp_path, "killed")
    assert (one / "metrics.csv").read_bytes() == (other / "metrics.csv").read_bytes()
    assert summary(one)["memory"]["additional_mb"] == summary(other)["memory"]["additional_mb"]


def test_a_user_s_benchmark_changes_single_methods(mine: Path, train: Train, tmp_path: Path) -> None:
    own = (f"--config-dir={mine}", "benchmark=quick", "dataset=synthetic", "dry_run=true")
    result = train("-m", *own, "method=stfpm,padim")
    assert result.returncode == 0, result.stderr
    from clbench.config import check, sources

    quick = check(sources.composed("benchmark=quick", "method=stfpm", config_dir=mine))
    assert quick.benchmark == "quick" and quick.method.settings["epochs"] == 2
    assert quick.task_order.tasks == ["circuit", ["gear", "leather"]]
    assert quick.dataset.settings["train"] == 12


def test_tasks_of_several_categories_have_the_results_of_single_ones(
    train: Train, folder: Path, tmp_path: Path
) -> None:
    """Joint training sees the same images however they are grouped, so R must be the same, category by category."""
    for method in ("patchcore", "padim"):
        for tasks in ("[brick,cloth,plate]", "[[brick,cloth],plate]", "[[brick,cloth,plate]]"):
            result = train(
                f"method={method}", "strategy=joint", f"task_order.tasks={tasks}", "experiment=grouped"
            )
            assert result.returncode == 0, result.stderr
    found: dict[str, list[dict[tuple[str, str], str]]] = {}
    for directory in run_directories(tmp_path, "grouped"):
        with open(directory / "metrics.csv", encoding="utf-8") as file:
            values = {(row["category"], row["metric"]): row["value"] for row in csv.DictReader(file)}
        found.setdefault(summary(directory)["method"], []).append(values)
        finals = [float(values[name, "pixel_f1"]) for name in ("brick", "cloth", "plate")]
        assert summary(directory)["final"]["pixel_f1"] == pytest.approx(sum(finals) / 3, abs=1e-6)
    for alone, some, together in found.values():
        assert alone == some == together and len(alone) == 3 * 7
