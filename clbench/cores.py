"""How many CPU cores this process may use. Imports no torch."""

import os
from collections.abc import Iterator
from contextlib import suppress

from clbench.data.memory import control_groups


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
