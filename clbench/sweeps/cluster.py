"""What SLURM says of jobs. Imports no torch."""

import os
import re
import shutil
import subprocess

from clbench.errors import UserError

_WAITING = {"PENDING", "CONFIGURING", "REQUEUED", "REQUEUE_HOLD", "SPECIAL_EXIT", "SUSPENDED", "STOPPED"}
_OVER = {"BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "NODE_FAIL", "OUT_OF_MEMORY", "TIMEOUT"}


def check_there() -> None:
    """Whether jobs can be submitted from here.

    Raises:
        UserError: they cannot.
    """
    if shutil.which("sbatch") is None:
        raise UserError(
            "hydra/launcher=slurm: there is no SLURM here (no sbatch): start this on a login node of the "
            "cluster, or take hydra/launcher=local, or leave it out"
        )


def queue() -> dict[str, str]:
    """The user's jobs that are not over: id, `12` or `12_3` -> `queued` or `running`.

    Raises:
        UserError: SLURM does not answer.
    """
    jobs = {}
    for line in _ask("squeue", "--me", "--noheader", "--array", "--format=%i %T").splitlines():
        job, _, state = line.partition(" ")
        if state not in _OVER:
            jobs[job] = "queued" if state in _WAITING else "running"
    return jobs


def outcome(job: str) -> str:
    """How a job that is over ended, for people: SLURM's state, or that it does not know."""
    try:
        lines = _ask("sacct", "--noheader", "--allocations", "--parsable2", "--format=State", "--jobs", job)
    except UserError:
        lines = ""
    return lines.splitlines()[0] if lines.strip() else "state unknown"


def rename_job(name: str) -> None:
    """Give this job a name that says what runs; where that may not be, it keeps the one it has."""
    job = os.environ["SLURM_JOB_ID"]
    if "SLURM_ARRAY_JOB_ID" in os.environ:  # of whose jobs one has the array's own number
        job = f"{os.environ['SLURM_ARRAY_JOB_ID']}_{os.environ['SLURM_ARRAY_TASK_ID']}"
    subprocess.run(
        ["scontrol", "update", f"JobId={job}", f"JobName={name}"],
        capture_output=True,
        check=False,
    )


def rejected(error: Exception) -> UserError:
    """One line for a submission that SLURM did not take."""
    text = str(getattr(error, "stderr", None) or error)
    said = re.findall(r"sbatch: (?:error: )?(.+)", text)
    reason = "; ".join(said) or text.strip().splitlines()[-1]
    return UserError(
        f"SLURM did not take the job: {reason}: set hydra.launcher.partition, .account, .timeout_min, .mem_gb, "
        ".cpus_per_task and .gpus_per_node to what the cluster has (sinfo shows it)"
    )


def _ask(*command: str) -> str:
    """A SLURM command's answer.

    Raises:
        UserError: there is none.
    """
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout
    except FileNotFoundError as error:
        raise UserError(f"there is no {command[0]} here: SLURM's commands are not installed") from error
    except subprocess.TimeoutExpired as error:
        raise UserError(f"{command[0]} does not answer: is the cluster's controller up?") from error
    except subprocess.CalledProcessError as error:
        said = " ".join(error.stderr.split())
        raise UserError(
            f"{command[0]} failed ({said}): is this a machine of the cluster, and its controller up?"
        ) from error
