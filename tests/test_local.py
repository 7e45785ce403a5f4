"""Runs in several processes of this machine: how many at a time, with which cores, and each with a GPU of its own."""

import itertools
import json
import os
from pathlib import Path

import pytest
import torch
from conftest import Train, run_directories

from clbench.config.schema import Gpu
from clbench.cores import usable_cores
from clbench.data import memory
from clbench.recording.run_directory import RunDirectory
from clbench.sweeps import gpus, launchers
from clbench.sweeps.launchers import LocalLauncher
from clbench.sweeps.runs import SweepRun

WATCHED = """
import json, os, signal, time
from pathlib import Path
from clbench.strategies.finetune import Finetune

class Watched(Finetune):
    def begin_stage(self, stage, images):
        Path(os.environ["WATCHED"], f"process-{os.getpid()}").touch()
        given_up = time.time() + 60
        while len(list(Path(os.environ["WATCHED"]).glob("process-*"))) < 2 and time.time() < given_up:
            time.sleep(0.02)  # a process that starts late would leave all runs to the other
        self.begun = time.time()
        if stage == 1 and self.seed == 1:
            try:
                Path(os.environ["WATCHED"], "killed").touch(exist_ok=False)
            except FileExistsError:
                return
            os.kill(os.getpid(), signal.SIGKILL)

    def end_stage(self, stage, images):
        time.sleep(0.3)
        seen = {"gpu": os.environ.get("CUDA_VISIBLE_DEVICES"), "process": os.getpid(), "threads": os.environ["OMP_NUM_THREADS"]}
        times = {"begun": self.begun, "ended": time.time()}
        Path(os.environ["WATCHED"], f"{self.seed}-{stage}.json").write_text(json.dumps({**seen, **times}))
"""


def quota(groups: Path, **files: str) -> None:
    """Write files of a control group."""
    groups.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (groups / name.replace("__", ".")).write_text(text)


@pytest.fixture
def groups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A stand-in for the folder of control groups, and for a machine with eight cores."""
    monkeypatch.setattr(memory, "_GROUPS", tmp_path / "cgroup")
    monkeypatch.setattr(memory, "_OWN_GROUPS", tmp_path / "own")
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)), raising=False)
    (tmp_path / "own").write_text("5:cpu,cpuacct:/job\n3:memory:/other\n0::/service/job\n")
    return tmp_path / "cgroup"


def test_usable_cores_are_those_of_affinity_and_control_groups(groups: Path) -> None:
    assert usable_cores() == 8
    quota(groups / "service/job", cpu__max="max 100000\n")
    assert usable_cores() == 8
    quota(groups / "service", cpu__max="350000 100000\n")  # the group that holds the process's own
    assert usable_cores() == 3
    quota(groups / "cpu,cpuacct/job", cpu__cfs_quota_us="-1\n", cpu__cfs_period_us="100000\n")
    assert usable_cores() == 3
    quota(groups / "cpu,cpuacct/job", cpu__cfs_quota_us="50000\n")
    assert usable_cores() == 1  # half of the time of one
    quota(groups / "memory/other", cpu__cfs_quota_us="1000\n", cpu__cfs_period_us="100000\n")
    assert usable_cores() == 1


def test_how_many_runs_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launchers, "usable_cores", lambda: 8)

    def several(n_jobs: int | None, found: int, *threads: int | None) -> int:
        runs = [
            SweepRun(
                [], RunDirectory(tmp_path), "missing", gpu=Gpu(device="auto", precision="fp32", threads=each)
            )
            for each in threads or (None,)
        ]
        return LocalLauncher(n_jobs=n_jobs)._at_a_time(runs, [str(gpu) for gpu in range(found)])

    assert several(None, 0) == 2
    assert several(None, 3) == several(None, 3, 4) == 3
    assert several(None, 0, 2) == 4 and several(None, 0, 2, 3) == 2 and several(None, 0, 20) == 1
    assert several(5, 3) == 5 and several(-1, 3) == 8 and several(-2, 0) == 7


def test_gpus_are_named_as_the_user_named_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in for torch.cuda, which counts GPUs."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.delenv(gpus.VISIBLE, raising=False)
    assert gpus.visible() == ["0", "1"]
    monkeypatch.setenv(gpus.VISIBLE, "3,GPU-ab,-1,0")  # CUDA stops at the first that is none
    assert gpus.visible() == ["3", "GPU-ab"]
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert gpus.visible() == []


def test_a_gpu_is_named_by_the_launcher_alone(train: Train) -> None:
    refused = train("-m", "seed=0,1", "hydra/launcher=local", "gpu.device=cuda:1")
    assert refused.returncode == 1 and refused.stderr.count("\n") == 1
    assert "gpu.device=cuda:1 names one GPU" in refused.stderr and "CUDA_VISIBLE_DEVICES=1" in refused.stderr


def test_processes_of_a_local_sweep_have_a_gpu_each_and_one_that_is_killed_ends_no_other_run(
    train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture
) -> None:
    """A stand-in for torch.cuda counts two GPUs in the sweep's process; its workers see which they were given.

    One of them is killed on its way, and its run is continued.
    """
    (tmp_path / "watched.py").write_text(WATCHED)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("WATCHED", str(tmp_path))
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(gpus.tempfile, "tempdir", str(tmp_path))
    monkeypatch.setenv(gpus.VISIBLE, "GPU-a,GPU-b")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    set_here = (gpus.VISIBLE, *launchers._THREADS)  # libraries set others when they are first imported
    before = [os.environ.get(name) for name in set_here]
    result = train(
        "-m",
        "method=padim",
        "strategy._target_=watched.Watched",
        "seed=0,1,2",
        "hydra/launcher=local",
        "gpu=auto",
    )
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "killed").exists() and [os.environ.get(name) for name in set_here] == before
    printed = capfd.readouterr().out.splitlines()  # by the processes
    assert any("seed=1," in line and ": continuing after stage 1 of 3" in line for line in printed)
    directories = [RunDirectory(path) for path in run_directories(tmp_path)]
    assert [(run.summary() or {}).get("status") for run in directories] == ["complete"] * 3
    for run in directories:  # which of several runs a table is of
        assert any(line.startswith(f"{run.path.name}: ") and "just learned" in line for line in printed)
    seen = [json.loads(file.read_text()) for file in tmp_path.glob("*-*.json")]
    assert len(seen) == 9 and {each["gpu"] for each in seen} == {"GPU-a", "GPU-b"}
    for one, other in itertools.combinations(seen, 2):
        overlap = one["begun"] < other["ended"] and other["begun"] < one["ended"]
        assert one["process"] == other["process"] or not overlap or one["gpu"] != other["gpu"]
    by_process = {each["process"]: each["gpu"] for each in seen}
    assert all(by_process[each["process"]] == each["gpu"] for each in seen)  # for as long as it lives


def test_more_processes_than_gpus_share_them_evenly(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from joblib import Parallel, delayed

    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(gpus.tempfile, "tempdir", str(tmp_path))

    def task(barrier: Path) -> tuple[int, str]:
        (barrier / str(os.getpid())).touch()
        while len(list(barrier.iterdir())) < 4:  # so that each of the processes does one
            pass
        return os.getpid(), os.environ["CUDA_VISIBLE_DEVICES"]

    barrier = tmp_path / "barrier"
    barrier.mkdir()
    found = Parallel(n_jobs=4, batch_size=1, backend="loky")(
        delayed(gpus.OnOneGpu(task, ["0", "1"]))(barrier) for _ in range(4)
    )
    assert len({process for process, _ in found}) == 4
    assert sorted(gpu for _, gpu in found) == ["0", "0", "1", "1"]


def test_slices_of_a_gpu_are_all_given_out_although_cuda_shows_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a stand-in for torch's count."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    for given, expected in (
        ("MIG-a, MIG-b", ["MIG-a", "MIG-b"]),
        (" 3, 5", ["3"]),
        ("GPU-a,GPU-b", ["GPU-a"]),
    ):
        monkeypatch.setenv(gpus.VISIBLE, given)
        assert gpus.visible() == expected
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert gpus.visible() == []
