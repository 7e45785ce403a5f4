"""Room on a disk, and what to do where there is none."""

import errno
import shutil
from pathlib import Path

from clbench.errors import UserError


def size_in_words(count: int) -> str:
    """A number of bytes for people: bytes, MB (10^6) or GB (10^9)."""
    if count < 1e5:
        return f"{count:,} bytes"
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"


def check_room(folder: Path, count: int, purpose: str) -> None:
    """Check that the disk of a folder has `count` bytes left.

    Args:
        purpose: what needs them, the subject of the error message.

    Raises:
        UserError: it has fewer.
    """
    free = shutil.disk_usage(folder).free
    if count > free:
        raise UserError(
            f"{purpose} needs {size_in_words(count)}, but {folder} has {size_in_words(free)} left: free some, or give "
            "another --root"
        )


def way_out(error: OSError) -> str:
    """What a person can do about what the file system refused, the end of an error message."""
    full = error.errno in (errno.ENOSPC, errno.EDQUOT)
    return f"{'free space there' if full else 'mend that'}, or give another --root"
