"""How much memory is free here: on the machine, in the container or job, and for the process."""

import os
import resource
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

_GROUPS = Path("/sys/fs/cgroup")
_OWN_GROUPS = Path("/proc/self/cgroup")
# Of versions 2 and 1 of control groups: the limit, what is used, and what of that are files that can be dropped.
_FILES = (
    ("memory.max", "memory.current", "inactive_file"),
    ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
)


def free_memory() -> int | None:
    """Bytes that can be allocated without swapping; None where the system does not say."""
    return min(_limits(), default=None)


def _limits() -> Iterator[int]:
    """What is free by each of the limits that there are, in bytes."""
    with suppress(OSError, StopIteration, ValueError):
        lines = Path("/proc/meminfo").read_text(encoding="utf-8").splitlines()
        yield next(1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable:"))
    for group in control_groups("memory"):
        yield from _free_in(group)
    limit, _ = resource.getrlimit(resource.RLIMIT_AS)  # `ulimit -v`
    if limit != resource.RLIM_INFINITY:
        with suppress(OSError, ValueError):
            used = int(Path("/proc/self/statm").read_text(encoding="utf-8").split()[0]) * os.sysconf(
                "SC_PAGE_SIZE"
            )
            yield max(0, limit - used)


def control_groups(controller: str) -> Iterator[Path]:
    """The folders of the control groups, of version 1 or 2, that limit this process: its own and those that hold it.

    A container may show its own group as the uppermost. There are none where the system has no such groups.

    Args:
        controller: what they limit, `memory` or `cpu`.
    """
    with suppress(OSError, ValueError):
        for line in _OWN_GROUPS.read_text(encoding="utf-8").splitlines():
            _, controllers, name = line.split(":", 2)
            if controllers == "" or controller in controllers.split(","):
                group = _GROUPS / controllers / name.strip("/")
                yield from (level for level in (group, *group.parents) if level.is_relative_to(_GROUPS))


def _free_in(group: Path) -> Iterator[int]:
    """What a control group may still allocate, in bytes; nothing where it has no limit."""
    for limit, used, cached in _FILES:
        with suppress(OSError, ValueError):  # "max" where there is no limit
            free = int((group / limit).read_text()) - int((group / used).read_text())
            stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
            yield max(0, free + int(stat.get(cached, 0)))
