"""How many CPU cores this process may use, and how its threads wait for one another. Imports no torch."""

import os
from collections.abc import Iterator
from contextlib import suppress

from clbench.data.memory import control_groups

# How often a thread of libgomp, which torch computes with, looks whether the others are ready before it sleeps. Its own
# 300,000 times are a millisecond, in which a thread that waits takes the core that the others need where processes share it.
SPINS = 1_000


def wait_briefly() -> None:
    """Have threads that wait leave their core to other processes soon, unless the environment says how they wait.

    To be called before torch is imported, here or in the processes that this one starts.
    """
    if not {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"} & os.environ.keys():
        os.environ["GOMP_SPINCOUNT"] = str(SPINS)


def usable_cores() -> int:
    """The cores that this process may run on, or those that its control groups give it the time of; at least 1.

    A container or a job of a cluster has a quota of time: 1.5 cores of time count as one.
    """
    affinity = getattr(os, "sched_getaffinity", None)  # Linux's
    allowed = len(affinity(0)) if affinity else os.cpu_count() or 1
    return max(1, int(min([allowed, *_quotas()])))


def _quotas() -> Iterator[float]:
    """The time that each of the process's control groups gives it, in cores; nothing of groups without a limit."""
    for group in control_groups("cpu"):
        with suppress(OSError, ValueError):  # version 2; "max" where there is no limit
            quota, period = (group / "cpu.max").read_text().split()
            yield int(quota) / int(period)
        with suppress(OSError, ValueError):  # version 1; -1 where there is no limit
            limit = int((group / "cpu.cfs_quota_us").read_text())
            if limit > 0:
                yield limit / int((group / "cpu.cfs_period_us").read_text())
