"""Writing files so that they appear under their names only once they are complete."""

import errno
import os
import shutil
from collections.abc import Callable
from contextlib import suppress
from io import RawIOBase
from pathlib import Path

from clbench.errors import UserError


def write_whole(path: Path, write: Callable[[Path], object]) -> None:
    """Write a file that appears under its name only once it is complete and on the disk.

    It is written beside, flushed, and renamed.

    Args:
        path: the file; its folder is made where it is missing.
        write: writes the content to the path that it is given.

    Raises:
        UserError: the disk is full or may not be written.
    """
    beside = path.with_name(f".{path.name}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(beside)
        with open(beside, "rb") as file:
            os.fsync(file.fileno())
        beside.replace(path)
    except OSError as error:
        raise cannot_write(path, error) from error
    finally:
        with suppress(OSError):
            beside.unlink(missing_ok=True)


def copy_whole(path: Path, there: Path) -> None:
    """Copy a file that is never changed: it is linked, where the disk can, and takes no room then.

    Raises:
        UserError: the disk is full or may not be written.
    """

    def copy(beside: Path) -> None:
        try:
            beside.unlink(missing_ok=True)
            os.link(path, beside)
        except OSError:
            shutil.copyfile(path, beside)

    write_whole(there, copy)


def append_whole(file: RawIOBase, content: bytes) -> None:
    """Append to a file that is open without a buffer: all of the content, or none of it.

    Raises:
        OSError: the disk is full or may not be written; the file is as long as before.
    """
    begin = file.seek(0, os.SEEK_END)
    written = 0
    try:
        while written < len(content):
            written += file.write(content[written:]) or 0
    except OSError:
        file.truncate(begin)
        raise


def cannot_write(path: Path, error: OSError) -> UserError:
    """The error for a file that the system refuses to write, with the way out that fits the reason."""
    way = "write elsewhere (outputs=... of a run, --output of a command)"
    if error.errno in (None, errno.ENOSPC, errno.EDQUOT, errno.EFBIG):  # libraries raise it without a number
        way = f"free space there, or {way}"
    if error.errno == errno.ENAMETOOLONG:
        way = "give a shorter name (experiment=... of a run, --output of a command)"
    return UserError(
        f"{path} cannot be written ({error.strerror or error}): {way}; what was finished is kept"
    )
