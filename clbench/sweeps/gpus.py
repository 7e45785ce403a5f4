"""GPUs for runs in several processes of one machine: each process takes one, before CUDA looks for any."""

from __future__ import annotations

import itertools
import os
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from clbench.errors import UserError
from clbench.locks import open_lock, take_lock

VISIBLE = "CUDA_VISIBLE_DEVICES"

# The lock on this process's GPU, which cannot be changed once CUDA has started.
_held: list[BinaryIO] = []


def visible() -> list[str]:
    """The GPUs that torch sees here, by the names that CUDA_VISIBLE_DEVICES takes: numbers, or what it has already.

    Torch counts them, so that a torch without CUDA or a driver that is too old has none. It asks the driver's management
    library, and does not start CUDA, but where they are slices of one (MIG).
    """
    import torch

    count = torch.cuda.device_count()
    given = os.environ.get(VISIBLE)
    if given is None:
        return [str(index) for index in range(count)]
    named = [name.strip() for name in given.split(",")]
    # CUDA shows a process one slice of a GPU, however many it may have; each process is to get its own.
    slices = bool(count) and all(name.startswith("MIG-") for name in named)
    return named if slices else named[:count]


@dataclass(frozen=True)
class OnOneGpu:
    """A task of a sweep, for worker processes: each takes a GPU before its first run, and keeps it until it ends.

    No two processes of a user have the same GPU as long as there are no more of them than GPUs, also where a process
    was killed or replaced, or where two sweeps run at a time that name GPUs alike. Where there are more, each GPU is shared
    by as many.

    Args:
        task: what does a run; its composed config is the argument.
        gpus: what `visible` gave, at least one.
    """

    task: Callable[[Any], Any]
    gpus: Sequence[str]

    def __call__(self, composed: Any) -> Any:
        """Do a run, on the process's GPU."""
        if not _held:
            _held.append(self._take())
        return self.task(composed)

    def _take(self) -> BinaryIO:
        """Let this process see one GPU alone, one that the fewest others have; gives the lock that says so.

        Raises:
            UserError: the folder for temporary files cannot be written, or has no locks.
        """
        folder = Path(tempfile.gettempdir()) / f"clbench-gpus-{os.getuid()}"
        try:
            folder.mkdir(mode=0o700, exist_ok=True)
            for others in itertools.count():
                for gpu in self.gpus:
                    lock = open_lock(folder / f"{gpu.replace('/', '_')}.{others}")
                    whose, reason = take_lock(lock, wait=False)
                    if whose == "none":
                        raise OSError(reason)
                    if whose == "ours":
                        os.environ[VISIBLE] = gpu
                        return lock
                    lock.close()
        except OSError as error:
            raise UserError(
                f"{folder}, where runs note which GPU each has, has no locks ({error.strerror or error}): set TMPDIR to a "
                "folder of a local disk"
            ) from error
        raise AssertionError("there is always one more place")
