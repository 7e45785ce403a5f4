"""What is submitted to SLURM, by its commands as scripts: a cluster's own limits, kept by whatever asks for jobs."""

import json
import os
import re
import stat
from pathlib import Path

import pytest
from conftest import Train, run_directories

from clbench.sweeps import cluster

# Takes a script as sbatch does: refuses an array with an index that is not below MaxArraySize, else notes it.
SBATCH = """
import os, re, sys
folder, limit = os.environ["FAKE_SLURM"], int(os.environ["FAKE_LIMIT"])
text = open(sys.argv[-1]).read()
last = re.search(r"--array=0-(\\d+)%", text)
if last and int(last[1]) >= limit:
    sys.exit("sbatch: error: Batch job submission failed: Invalid job array specification")
number = 100 + len(os.listdir(folder))
open(f"{folder}/{number}", "w").write(text)
print(f"Submitted batch job {number}")
"""
SCONTROL = """
import os, sys
if os.environ.get("FAKE_SILENT"):
    sys.exit("slurm_load_ctl_conf error: Unable to contact slurm controller")
print(f"Configuration data\\nMaxArraySize            = {os.environ['FAKE_LIMIT']}\\nMaxJobCount  = 10000")
"""


@pytest.fixture
def submitted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with what was submitted, a file for each job number; SLURM's commands are on the path."""
    tools, scripts = tmp_path / "tools", tmp_path / "submitted"
    tools.mkdir()
    scripts.mkdir()
    for name, code in {"sbatch": SBATCH, "scontrol": SCONTROL, "squeue": "", "sacct": "", "srun": ""}.items():
        (tools / name).write_text(f"#!/usr/bin/env python3\n{code}")
        (tools / name).chmod((tools / name).stat().st_mode | stat.S_IEXEC)
    monkeypatch.setenv("PATH", f"{tools}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("FAKE_SLURM", str(scripts))
    return scripts


def options(script: Path) -> dict[str, str]:
    """The options of sbatch that a script has."""
    return dict(re.findall(r"^#SBATCH --([\w-]+)=(.*)$", script.read_text(encoding="utf-8"), re.MULTILINE))


@pytest.mark.parametrize(
    ("limit", "parallel", "arrays"),
    [
        pytest.param("1001", 32, ["0-8%9"], marks=pytest.mark.long),
        ("4", 4, ["0-2%2", "0-2%1", "0-2%1"]),
        pytest.param("5", 1, ["0-4%1", "0-3%1"], marks=pytest.mark.long),
    ],
)
def test_a_sweep_is_submitted_in_arrays_that_the_cluster_takes(
    limit: str,
    parallel: int,
    arrays: list[str],
    train: Train,
    submitted: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("FAKE_LIMIT", limit)
    seeds = ",".join(map(str, range(9)))
    given = (f"seed={seeds}", "hydra/launcher=slurm_cpu", f"hydra.launcher.array_parallelism={parallel}")
    result = train("-m", "method=padim", *given)
    assert result.returncode == 1  # the jobs are gone from the queue at once, and their runs not begun
    scripts = sorted(submitted.iterdir())
    assert [options(script)["array"] for script in scripts] == arrays
    waits = [options(script).get("dependency") for script in scripts]
    assert waits == ([None, "afterany:100"] if parallel == 1 else [None] * len(arrays))
    sizes = [int(re.split("[-%]", text)[1]) + 1 for text in arrays]
    expected = [f"{100 + number}_{index}" for number, size in enumerate(sizes) for index in range(size)]
    jobs = {path.name: json.loads((path / "job.json").read_text()) for path in run_directories(tmp_path)}
    found = [jobs[name] for name in sorted(jobs, key=lambda name: int(re.search(r"seed=(\d+)", name)[1]))]  # type: ignore[index]
    assert [job["id"] for job in found] == expected
    assert all(Path(job["log"]).name.startswith(job["id"]) for job in found)
    if len(arrays) > 1:
        assert f"submitted 9 jobs in {len(arrays)} arrays, 100_0 to {expected[-1]}" in result.stdout


def test_where_slurm_does_not_tell_its_limit_its_refusal_says_what_to_give(
    train: Train, submitted: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAKE_LIMIT", "2")
    monkeypatch.setenv("FAKE_SILENT", "1")
    sweep = ("-m", "method=padim", "seed=0,1,2", "hydra/launcher=slurm_cpu")
    refused = train(*sweep)
    assert refused.returncode == 1 and "Traceback" not in refused.stderr
    assert "Invalid job array specification" in refused.stderr
    assert "give that number as hydra.sweeper.max_batch_size" in refused.stderr
    assert not list(submitted.iterdir())
    train(*sweep, "hydra.sweeper.max_batch_size=2")
    assert [options(script).get("array") for script in sorted(submitted.iterdir())] == ["0-1%2", None]


@pytest.mark.parametrize(
    ("said", "limit"),
    [
        ("MaxArraySize            = 1001\n", 1001),
        ("MaxArraySize = 0\n", 1),
        ("MaxArraySize = 1001\nSchedulerParameters     = bf_interval=1,max_array_tasks=50\n", 50),
        ("MaxJobCount = 10\n", None),
    ],
)
def test_the_limit_of_arrays_is_read_from_what_slurm_says(
    said: str, limit: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cluster, "_ask", lambda *command: said)
    assert cluster.array_limit() == limit


def test_arrays_hold_every_job_once_and_keep_both_limits() -> None:
    for jobs in (1, 2, 7, 9, 100, 1001):
        for limit in (None, 1, 3, 4, 50, 1001):
            for parallel in (1, 2, 3, 32):
                arrays = cluster.arrays(jobs, limit, parallel)
                sizes = [size for size, _, _ in arrays]
                assert sum(sizes) == jobs and max(sizes) - min(sizes) <= 1 and max(sizes) <= (limit or jobs)
                # At worst, every array is full until it ends: those that wait for none run side by side.
                shares = {number: share for number, (_, share, after) in enumerate(arrays) if after is None}
                assert sum(shares.values()) == parallel and min(shares.values()) >= 1
                for number, (_, share, after) in enumerate(arrays):
                    if (
                        after is not None
                    ):  # it takes the place of the one that it waits for, and has its share
                        assert after < number and arrays[after][1] == share
                waited = [after for _, _, after in arrays if after is not None]
                assert len(waited) == len(set(waited))
