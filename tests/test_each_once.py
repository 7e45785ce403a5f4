"""What several grids of a sweep ask for in different words is run once."""

from pathlib import Path

import pytest

from clbench.commands.run import main
from clbench.config import check, sources
from clbench.config.differences import settings_digest
from clbench.recording.run_directory import RunDirectory
from clbench.sweeps.runs import SweepRun, each_once


def test_a_sweep_whose_grids_are_given_one_order_has_no_run_twice(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [
        "-m",
        "sweep=order_study",
        "method=padim",
        "dataset=mvtec",
        f"dataset.root={folder}",
        "dry_run=true",
    ]
    assert main([*words, "task_order=alphabetical", f"outputs={tmp_path}", f"cache={tmp_path}/cache"]) == 0
    shown = capsys.readouterr().out
    assert "5 runs: 0 finished, 5 would be started" in shown
    assert shown.count("run once: ") == 1 and "seed=0,dataset" in shown


def test_a_finished_run_is_known_by_the_settings_that_it_stored(tmp_path: Path) -> None:
    plain = check(sources.composed("method=padim")).plain()
    runs = [SweepRun([name], RunDirectory(tmp_path / name), "finished") for name in ("a", "b", "c")]
    runs[0].directory.write_config({**plain, "checkpoint_s": 7.0}, {}, {})
    runs[1].directory.write_config({**plain, "seed": 1}, {}, {})
    runs.append(SweepRun(["d"], RunDirectory(tmp_path / "d"), "missing", settings=settings_digest(plain)))
    runs.append(
        SweepRun(["e"], RunDirectory(tmp_path / "other" / "e"), "missing", settings=settings_digest(plain))
    )
    assert [(run.overrides, [other.overrides for other in others]) for run, others in each_once(runs)] == [
        (["a"], [["d"]]),
        (["b"], []),
        (["c"], []),
        (["e"], []),
    ]
