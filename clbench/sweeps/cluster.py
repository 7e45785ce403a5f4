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
