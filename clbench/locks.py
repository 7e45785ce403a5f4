"""Locks between processes, on disks that have them and on those that do not."""

import errno
import fcntl
from pathlib import Path
from typing import BinaryIO, Literal

Lock = Literal["ours", "another's", "none"]

_HELD = (errno.EWOULDBLOCK, errno.EAGAIN, errno.EACCES)  # the last of flock over locks of another kind


def open_lock(path: Path) -> BinaryIO:
    """A lock's file, made where it is missing; one that belongs to somebody else is opened for reading alone.

    Raises:
        OSError: it is neither there to be read nor can be made.
    """
    try:
        return open(path, "a+b", buffering=0)
    except OSError:
        if not path.exists():
            raise
        return open(path, "rb", buffering=0)


def take_lock(file: BinaryIO, *, wait: bool) -> tuple[Lock, str]:
    """Lock a file for this process alone; the system releases the lock when the file is closed or the process dies.

    Args:
        file: an open file.
        wait: whether to wait while another process has it.

    Returns:
        Whose it is now, and why it is nobody's: `none` where the disk has no locks (some of NFS, Lustre and FUSE).
    """
    try:
        fcntl.flock(file, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if not wait and error.errno in _HELD:
            return "another's", ""
        return "none", error.strerror or str(error)
    return "ours", ""
