"""Archives from elsewhere: files and folders come out of them, and only into the folder they are meant for.

`zipfile` and `tarfile` (with its `data` filter) do the writing. Both would make a path that leads out of the folder
harmless without a word, and take links; an archive of images that holds either is refused here as a whole.
"""

import errno
import lzma
import os
import shutil
import stat
import tarfile
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import IO

from clbench.data.acquire.checksums import BadArchive
from clbench.data.acquire.disk import check_room, way_out
from clbench.data.acquire.download import BytesProgress
from clbench.errors import UserError

_NAMES = {  # what the file system has against an archive's names
    errno.EEXIST: "which conflicts with another name in it",
    errno.EISDIR: "which conflicts with another name in it",
    errno.ENOTDIR: "which conflicts with another name in it",
    errno.ENAMETOOLONG: "a name too long for this disk",
}


def unpack(archive: Path, folder: Path, progress: BytesProgress) -> None:
    """Unpack a tar (also gzip, bzip2, xz) or a zip; the folder appears when it is whole.

    Raises:
        BadArchive: it holds a link, a device or a path that leads out of the folder, or is damaged or no archive.
        UserError: the disk is full, or something else is in the way.
    """
    part = folder.with_name(f".{folder.name}.unpacking")
    shutil.rmtree(part, ignore_errors=True)  # of a process that was killed
    total = archive.stat().st_size
    # At the least: pictures are compressed already.
    check_room(archive.parent, total, f"unpacking {archive.name}")
    try:
        part.mkdir(parents=True)
        with open(archive, "rb") as raw:
            extract = _unzip if zipfile.is_zipfile(raw) else _untar
            raw.seek(0)
            for _ in extract(raw, part, archive):
                progress(raw.tell(), total)
        if not any(part.iterdir()):
            raise BadArchive(f"{archive} is empty")
        part.rename(folder)
    except (tarfile.TarError, zipfile.BadZipFile, EOFError, lzma.LZMAError, zlib.error) as error:
        reason = str(error).partition("\n")[0].rstrip(":")
        raise BadArchive(f"{archive} is damaged, or no tar or zip ({reason})") from error
    except RuntimeError as error:  # encrypted, or compressed in a way that is not known here
        raise UserError(f"{archive} cannot be unpacked ({error}): unpack it by hand to {folder}") from error
    except OSError as error:
        if error.errno is None:  # gzip's and bzip2's way to say that data are damaged
            raise BadArchive(f"{archive} is damaged ({error})") from error
        if error.errno in _NAMES and error.filename2 is None:
            name = os.path.relpath(error.filename, part)
            raise UserError(
                f"{archive} holds '{name}', {_NAMES[error.errno]}: remove it, and give another copy as --url, or "
                f"unpack it by hand to {folder}"
            ) from error
        raise UserError(
            f"{archive} cannot be unpacked to {folder} ({error.strerror}): {way_out(error)}"
        ) from error
    finally:
        shutil.rmtree(part, ignore_errors=True)


def _unzip(raw: IO[bytes], part: Path, archive: Path) -> Iterator[None]:
    """Extract one member at a time."""
    with zipfile.ZipFile(raw) as zipped:
        members = zipped.infolist()
        check_room(part, sum(member.file_size for member in members), f"unpacking {archive.name}")
        for member in members:
            kind = stat.S_IFMT(member.external_attr >> 16)  # 0 where it was made on no Unix
            member.filename = _safe(archive, member.filename, kind in (0, stat.S_IFREG, stat.S_IFDIR))
            zipped.extract(member, part)
            yield


def _untar(raw: IO[bytes], part: Path, archive: Path) -> Iterator[None]:
    """Extract one member at a time."""
    if not hasattr(tarfile, "data_filter"):
        raise RuntimeError("this Python has no safe tarfile: 3.10.12, 3.11.4 or a later one has")
    with tarfile.open(fileobj=raw, mode="r:*") as tar:
        for member in tar:
            member.name = _safe(archive, member.name, member.isreg() or member.isdir())
            check_room(part, member.size, f"'{member.name}' of {archive.name}")
            tar.extract(member, part, filter="data")
            yield


def _safe(archive: Path, name: str, plain: bool) -> str:
    """A member's name, with slashes for the backslashes that some programs write.

    Args:
        plain: whether it is a file or a folder.

    Raises:
        BadArchive: it is neither, or its name leads out of the folder.
    """
    path = PurePosixPath(name.replace("\\", "/"))
    if path.is_absolute() or ".." in path.parts or ":" in name.partition("/")[0] or "\0" in name:
        raise BadArchive(f"{archive} holds '{name}', which leads out of its folder: do not trust it")
    if not plain:
        raise BadArchive(f"{archive} holds '{name}', a link or device: do not trust it")
    return name.replace("\\", "/")
