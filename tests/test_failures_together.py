"""Runs of a sweep that fail for one reason are told of in one line."""

from pathlib import Path

from clbench.recording.run_directory import RunDirectory
from clbench.sweeps.runs import SweepRun
from clbench.sweeps.tables import by_reason, sweep_table


def failed(folder: Path, seed: int, reason: str) -> SweepRun:
    run = SweepRun([f"seed={seed}"], RunDirectory(folder / f"seed={seed}"), "failed", reason)
    run.directory.create()
    return run


def test_each_reason_is_said_once_with_the_names_of_a_few_runs(tmp_path: Path) -> None:
    runs = [failed(tmp_path, seed, "no [disk]" if seed != 2 else "no GPU") for seed in range(6)]
    named = [(run.overrides[0], run) for run in runs]
    assert by_reason(named) == [
        ("5 runs (seed=0; seed=1; seed=3 and 2 more)", "no [disk]"),
        ("seed=2", "no GPU"),
    ]
    for run in runs[1:3]:
        run.directory.write_job({"id": "7", "log": f"log-{run.overrides[0]}"})
    assert [reason for _, reason in by_reason(named)] == [
        "no [disk]; log of the first: log-seed=1",
        "no GPU; log: log-seed=2",
    ]
    caption = str(sweep_table(runs, 200).caption)
    assert (
        caption.count("\n") == 1 and r"5 runs (seed=0; seed=1; seed=3 and 2 more)[/]: no \[disk]" in caption
    )
    assert sweep_table(runs, 200, told=runs).caption == ""
