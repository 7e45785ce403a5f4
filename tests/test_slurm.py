"""Sweeps on a real SLURM, which `make test-slurm` starts and stops; without one these are skipped."""

import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random

import pytest
from conftest import ROOT, command, run_directories
from test_wandb import check_everything_once

pytestmark = pytest.mark.skipif(
    not os.environ.get("CLBENCH_TEST_SLURM"), reason="no test cluster: make test-slurm starts one"
)

KILLS = int(os.environ.get("CLBENCH_TEST_KILLS", "20"))
EPOCHS = 12 * KILLS  # of a run that has not ended when all kills are done
SLURM = ("hydra/launcher=slurm_cpu", "hydra.launcher.mem_gb=1", "hydra.launcher.signal_delay_s=5")


def ask(*words: str) -> str:
    return subprocess.run(words, capture_output=True, text=True, check=True, timeout=60).stdout


def jobs(states: str) -> list[str]:
    """Our jobs in these states, without those of `preempt`."""
    lines = ask("squeue", "--noheader", "--array", "--partition=main", f"--states={states}", "--format=%i")
    return lines.split()


@pytest.fixture(autouse=True)
def empty_queue() -> Iterator[None]:
    yield
    subprocess.run(["scancel", "--user=root", "--full"], check=False)
    while jobs("PENDING,RUNNING,COMPLETING"):
        time.sleep(0.2)


@pytest.fixture
def sweep(folder: Path, tmp_path: Path) -> Callable[..., subprocess.CompletedProcess]:
    def run(*overrides: str) -> subprocess.CompletedProcess:
        words = command(folder, tmp_path, "-m", *overrides)
        return subprocess.run(
            words,
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
            env={**os.environ, "OMP_NUM_THREADS": "1"},  # as slurm_cpu's jobs have
        )

    return run


def test_a_sweep_fills_the_cluster_and_its_logs_are_found_from_the_table(
    sweep: Callable, tmp_path: Path
) -> None:
    result = sweep("method=patchcore,padim", "replay.size=6,12", *SLURM)
    assert result.returncode == 0, result.stdout + result.stderr
    for directory in run_directories(tmp_path):
        assert json.loads((directory / "summary.json").read_text())["status"] == "complete"
        job = json.loads((directory / "job.json").read_text())
        assert "task 3/3 plate" in Path(job["log"]).read_text(encoding="utf-8")
        name = ask(
            "sacct", "--noheader", "--allocations", "--format=JobName%200", "--jobs", job["id"]
        ).strip()
        assert name == directory.name[:200]
    again = sweep("method=patchcore,padim", "replay.size=6,12", *SLURM)
    assert again.stdout.count("finished already, skipped") == 4 and "submitted" not in again.stdout


def test_a_sweep_larger_than_an_array_may_be_is_submitted_as_several(sweep: Callable, tmp_path: Path) -> None:
    """The test cluster takes arrays of 4 jobs."""
    small = ("method=padim", "method.features=20", "strategy=finetune", "task_order.tasks=[brick]")
    seeds = ",".join(map(str, range(9)))
    result = sweep(*small, f"seed={seeds}", *SLURM, "hydra.launcher.array_parallelism=2")
    assert result.returncode == 0, result.stdout + result.stderr
    assert "submitted 9 jobs in 3 arrays" in result.stdout
    ran: dict[str, list[str]] = {}
    for directory in run_directories(tmp_path):
        assert json.loads((directory / "summary.json").read_text())["status"] == "complete"
        job = json.loads((directory / "job.json").read_text())["id"]
        ran.setdefault(job.partition("_")[0], []).append(job)
        named = ask("sacct", "-nX", "--format=JobName%200", "--jobs", job).strip()
        assert named == directory.name[:200]
    assert sorted(map(len, ran.values())) == [3, 3, 3]
    times = ask("sacct", "-nXP", "--format=Start,End", "--jobs", ",".join(ran)).split()
    spans = [tuple(line.split("|")) for line in times]
    assert max(sum(begin <= moment < end for begin, end in spans) for moment, _ in spans) <= 2


def test_one_run_that_fails_leaves_the_others_and_shows_its_log(sweep: Callable, tmp_path: Path) -> None:
    settings = ("method=stfpm", "strategy=finetune", "method.batch_size=2", "method.epochs=2")
    result = sweep(*settings, "method.learning_rate=0.1,1e30", *SLURM)
    assert result.returncode == 1
    states = {}
    for path in run_directories(tmp_path):
        summary = json.loads((path / "summary.json").read_text())
        states[summary["status"]] = summary, json.loads((path / "job.json").read_text())
    assert set(states) == {"complete", "failed"}
    summary, job = states["failed"]
    assert "task 1/3 brick: the loss became" in summary["reason"]
    (line,) = (line for line in result.stderr.splitlines() if line.startswith("error: "))
    assert "task 1/3 brick: the loss became" in line and f"{job['id']}_0_log.out" in line
    assert ask("sacct", "-nX", "-o", "State", "-j", job["id"]).strip() == "FAILED"
    again = sweep(*settings, "method.learning_rate=0.1,1e30", *SLURM)
    assert "failed before, tried again" in again.stdout and "submitted 1 job," in again.stdout


def test_a_partition_that_is_not_there_and_a_job_too_large_are_said_in_one_line(sweep: Callable) -> None:
    for setting, reason in (
        ("hydra.launcher.partition=gold", "invalid partition specified: gold"),
        ("hydra.launcher.mem_gb=100000", "emory"),
    ):
        result = sweep("method=patchcore,padim", *SLURM, setting)
        assert result.returncode == 1 and "Traceback" not in result.stderr
        assert "SLURM did not take the job" in result.stderr and reason in result.stderr
        assert "hydra.launcher.partition" in result.stderr
    assert not jobs("PENDING,RUNNING")


def test_without_slurm_it_says_what_else_there_is(folder: Path, tmp_path: Path) -> None:
    tools = tmp_path / "tools"
    tools.mkdir()
    (tools / "git").symlink_to(shutil.which("git") or "/usr/bin/git")
    result = subprocess.run(
        command(folder, tmp_path, "-m", *SLURM),
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PATH": str(tools)},
    )
    assert result.returncode == 1 and "there is no SLURM here" in result.stderr
    assert "hydra/launcher=local" in result.stderr and "Traceback" not in result.stderr


def test_a_sweep_killed_many_times_ends_in_the_same_metrics(
    folder: Path, sweep: Callable, tmp_path: Path
) -> None:
    """SIGKILL, scancel, requeue, preemption, the time limit, and the death of the submitting process."""
    # PatchCore has no epochs: its own sweep, side by side with the gradient method's.
    long = (f"method.epochs={EPOCHS}", "method.patience=null", "method.batch_size=2")
    sweeps = [
        ("method=patchcore", "strategy=finetune,native", "seed=0,1"),
        ("method=stfpm", "strategy=finetune", "seed=0,1", *long),
    ]
    begin = time.monotonic()
    for settings in sweeps:
        assert sweep("experiment=whole", *settings, "hydra/launcher=local").returncode == 0
    seed = int(os.environ.get("CLBENCH_TEST_SEED", time.time()))
    print(f"moments drawn from CLBENCH_TEST_SEED={seed}")
    random = Random(seed)
    done: list[str] = []
    submitting: list[subprocess.Popen | None] = [None, None]

    def submit() -> None:
        for index, settings in enumerate(sweeps):
            if submitting[index] is None or submitting[index].poll() not in (None, 0):  # type: ignore[union-attr]
                words = command(
                    folder,
                    tmp_path,
                    "-m",
                    "experiment=killed",
                    "wandb=offline",
                    "checkpoint_s=0.5",
                    *settings,
                    *SLURM,
                )
                submitting[index] = subprocess.Popen(
                    words, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
                )

    def kill_process(job: str) -> None:
        for lock in (tmp_path / "outputs" / "killed").glob("*/run.lock"):
            held = (
                json.loads((lock.parent / "job.json").read_text())
                if (lock.parent / "job.json").is_file()
                else {}
            )
            if held.get("id") == job and lock.read_text().startswith("process "):
                os.kill(int(lock.read_text().split()[1]), signal.SIGKILL)

    def preempt(job: str) -> None:
        ask("sbatch", "--partition=urgent", "--exclusive", "--time=1", "--output=/dev/null", "--wrap=sleep 2")

    def submitter(job: str) -> None:
        alive = [process for process in submitting if process is not None and process.poll() is None]
        if alive:
            random.choice(alive).kill()

    acts: dict[str, Callable[[str], object]] = {
        "SIGKILL": kill_process,
        "scancel": lambda job: ask("scancel", job),
        "requeue": lambda job: ask("scontrol", "requeue", job),
        "preempt": preempt,
        "time limit": lambda job: ask("scontrol", "update", f"JobId={job}", "TimeLimit=00:00:01"),
        "submitter": submitter,
    }
    print(f"undisturbed, they take {time.monotonic() - begin:.0f} s")
    begin = time.monotonic()
    while time.monotonic() - begin < 900:
        submit()
        if all(process is not None and process.poll() == 0 for process in submitting):
            break
        time.sleep(random.uniform(1, 6))
        in_queue = jobs("PENDING,RUNNING")
        assert len(in_queue) == len(set(in_queue)) <= 6
        running = jobs("RUNNING")
        if running and len(done) < KILLS:
            name = random.choice(sorted(acts))
            try:
                acts[name](random.choice(running))
                done.append(name)
            except (subprocess.CalledProcessError, ProcessLookupError):
                pass  # it ended in between
    print(f"{len(done)} times in {time.monotonic() - begin:.0f} s: {', '.join(done)}")
    assert all(process is not None and process.returncode == 0 for process in submitting)
    whole, killed = run_directories(tmp_path, "whole"), run_directories(tmp_path, "killed")
    assert [path.name for path in whole] == [path.name for path in killed]
    for one, other in zip(whole, killed, strict=True):
        assert (one / "metrics.csv").read_bytes() == (other / "metrics.csv").read_bytes()
        check_everything_once(other, epochs=3 * EPOCHS if "stfpm" in other.name else 0)
    assert len(done) == KILLS, "the work was over before: give it more epochs"
