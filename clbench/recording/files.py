"""Files that appear under their names only when they are whole."""

import errno
import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from clbench.errors import UserError


def write_whole(path: Path, write: Callable[[Path], object]) -> None:
    """A file that appears under its name only when it is complete and on the disk: beside, flushed, renamed.

    Raises:
        UserError: the disk is full or may not be written.
    """
    part = path.with_name(f".{path.name}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(part)
        with open(part, "rb") as file:
            os.fsync(file.fileno())
        part.replace(path)
    except OSError as error:
        raise cannot_write(path, error) from error
    finally:
        with suppress(OSError):
            part.unlink(missing_ok=True)


def cannot_write(path: Path, error: OSError) -> UserError:
    """What to say where the system refuses to write a file."""
    way = "write elsewhere (outputs=... of a run, --output of a command)"
    if error.errno in (None, errno.ENOSPC, errno.EDQUOT, errno.EFBIG):  # libraries say none
        way = f"free space there, or {way}"
    if error.errno == errno.ENAMETOOLONG:
        way = "give a shorter name (experiment=... of a run, --output of a command)"
    return UserError(
        f"{path} cannot be written ({error.strerror or error}): {way}; what was finished is kept"
    )
