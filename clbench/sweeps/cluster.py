"""SLURM's commands: the queue, how jobs ended, and why one was rejected. Imports no torch."""

import os
import re
import shutil
import subprocess

from clbench.errors import UserError

_WAITING = {"PENDING", "CONFIGURING", "REQUEUED", "REQUEUE_HOLD", "SPECIAL_EXIT", "SUSPENDED", "STOPPED"}
_OVER = {"BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "NODE_FAIL", "OUT_OF_MEMORY", "TIMEOUT"}


def check_there() -> None:
    """Check that jobs can be submitted from this machine.

    Raises:
        UserError: they cannot.
    """
    if shutil.which("sbatch") is None:
        raise UserError(
            "hydra/launcher=slurm: there is no SLURM here (no sbatch): start this on a login node of the "
            "cluster, or take hydra/launcher=local, or leave it out"
        )


def queue() -> dict[str, str]:
    """The user's jobs that have not ended: id, `12` or `12_3` -> `queued` or `running`.

    Raises:
        UserError: SLURM does not answer.
    """
    jobs = {}
    for line in _ask("squeue", "--me", "--noheader", "--array", "--format=%i %T").splitlines():
        job, _, state = line.partition(" ")
        if state not in _OVER:
            jobs[job] = "queued" if state in _WAITING else "running"
    return jobs


def array_limit() -> int | None:
    """Number of jobs that the cluster takes as one array; None where SLURM does not tell."""
    try:
        config = _ask("scontrol", "show", "config")
    except UserError:
        return None
    limits = re.findall(r"^MaxArraySize\s*=\s*(\d+)|[\s=,]max_array_tasks=(\d+)", config, re.MULTILINE)
    # Indices begin at 0 and must be below MaxArraySize; where that is 0, only jobs without an array are taken.
    return max(1, min(int(size or tasks) for size, tasks in limits)) if limits else None


def partitions() -> list[str]:
    """The names of the partitions that jobs can be sent to; the one that is taken where none is named ends in `*`.

    Raises:
        UserError: SLURM does not answer.
    """
    lines = (line.split() for line in _ask("sinfo", "--noheader", "--format=%P %a").splitlines())
    return list(dict.fromkeys(name for name, state in lines if state == "up"))


def arrays(jobs: int, limit: int | None, parallel: int) -> list[tuple[int, int, int | None]]:
    """How jobs are submitted as arrays of about the same size, none larger than the cluster takes.

    Together no more jobs run at a time than are allowed to.

    Args:
        jobs: number of jobs, at least 1.
        limit: number of jobs that the cluster takes as one array; None for any.
        parallel: number of jobs that may run at a time.

    Returns:
        For each array: the number of its jobs, how many of them may run at a time, and the number of an array before
        it that must have ended first; None where it need not wait.
    """
    parallel = max(1, parallel)
    count = -(-jobs // (limit or jobs))
    lanes = min(count, parallel)  # as many arrays at a time, each with its share of what may run
    sizes = [jobs // count + (index < jobs % count) for index in range(count)]
    shares = [parallel // lanes + (lane < parallel % lanes) for lane in range(lanes)]
    return [
        (size, shares[index % lanes], index - lanes if index >= lanes else None)
        for index, size in enumerate(sizes)
    ]


def outcome(job: str) -> str:
    """How a job ended: SLURM's state, such as `TIMEOUT`; `state unknown` where SLURM does not tell."""
    try:
        lines = _ask("sacct", "--noheader", "--allocations", "--parsable2", "--format=State", "--jobs", job)
    except UserError:
        lines = ""
    return lines.splitlines()[0] if lines.strip() else "state unknown"


def rename_job(name: str) -> None:
    """Rename the SLURM job that this process runs in. Where SLURM refuses, the job keeps its name."""
    job = os.environ["SLURM_JOB_ID"]
    if "SLURM_ARRAY_JOB_ID" in os.environ:  # SLURM_JOB_ID of one of its jobs is the number of the whole array
        job = f"{os.environ['SLURM_ARRAY_JOB_ID']}_{os.environ['SLURM_ARRAY_TASK_ID']}"
    subprocess.run(
        ["scontrol", "update", f"JobId={job}", f"JobName={name}"],
        capture_output=True,
        check=False,
    )


def rejected(error: Exception) -> UserError:
    """The error to show for a job that SLURM did not take, in one line.

    Args:
        error: what submitit raised.
    """
    text = str(getattr(error, "stderr", None) or error)
    messages = re.findall(r"sbatch: (?:error: )?(.+)", text)
    reason = "; ".join(messages) or text.strip().splitlines()[-1]
    if "job array" in reason:
        return UserError(
            f"SLURM did not take the jobs as an array: {reason}: it takes fewer at a time (MaxArraySize, which "
            "scontrol show config does not tell here); give that number as hydra.sweeper.max_batch_size"
        )
    return UserError(
        f"SLURM did not take the job: {reason}: set hydra.launcher.partition, .account, .timeout_min, .mem_gb, "
        ".cpus_per_task and .gpus_per_node to what the cluster has (sinfo shows it)"
    )


def _ask(*command: str) -> str:
    """The output of a SLURM command.

    Raises:
        UserError: the command is not installed, fails, or takes longer than a minute.
    """
    try:
        return subprocess.run(
            command, capture_output=True, encoding="utf-8", errors="replace", check=True, timeout=60
        ).stdout
    except FileNotFoundError as error:
        raise UserError(f"there is no {command[0]} here: SLURM's commands are not installed") from error
    except subprocess.TimeoutExpired as error:
        raise UserError(f"{command[0]} does not answer: is the cluster's controller up?") from error
    except subprocess.CalledProcessError as error:
        message = " ".join(error.stderr.split())
        raise UserError(
            f"{command[0]} failed ({message}): is this a machine of the cluster, and its controller up?"
        ) from error
