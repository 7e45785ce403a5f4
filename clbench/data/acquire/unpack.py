"""Archives from elsewhere: files and folders come out of them, and only into the folder they are meant for."""

import errno
import lzma
import os
import shutil
import stat
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO

from clbench.data.acquire.download import BadArchive, Progress, in_words, room, way_out
from clbench.errors import UserError

_NAMES = {  # what the file system has against an archive's names
    errno.EEXIST: "which conflicts with another name in it",
    errno.EISDIR: "which conflicts with another name in it",
    errno.ENOTDIR: "which conflicts with another name in it",
    errno.ENAMETOOLONG: "a name too long for this disk",
}


@dataclass(frozen=True)
class _Member:
    name: str
    kind: str  # file, folder, or what it should not be
    size: int  # bytes
    open: Callable[[], IO[bytes]]


def unpack(archive: Path, folder: Path, progress: Progress) -> None:
    """Unpack a tar (also gzip, bzip2, xz) or a zip; the folder appears when it is whole.

    Nothing but files and folders is taken, and nothing of an archive that holds anything else, or a path that
    leads out of the folder.

    Raises:
        BadArchive: it holds what it should not, or is damaged or no archive.
        UserError: the disk is full, or something else is in the way.
    """
    part = folder.with_name(f".{folder.name}.unpacking")
    shutil.rmtree(part, ignore_errors=True)  # of a process that was killed
    total = archive.stat().st_size
    try:
        room(
            archive.parent, total, f"unpacking {archive.name}"
        )  # at the least: pictures are compressed already
        part.mkdir(parents=True)
        with open(archive, "rb") as raw:
            for member in _members(raw, archive):
                _write(member, part, archive)
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


def _members(raw: IO[bytes], archive: Path) -> Iterator[_Member]:
    if zipfile.is_zipfile(raw):
        raw.seek(0)
        with zipfile.ZipFile(raw) as zipped:
            listed = zipped.infolist()
            room(archive.parent, sum(info.file_size for info in listed), f"unpacking {archive.name}")
            for info in listed:
                mode = stat.S_IFMT(info.external_attr >> 16)
                kind = "file" if mode in (0, stat.S_IFREG) else "link or device"
                if info.is_dir() or mode == stat.S_IFDIR:
                    kind = "folder"
                yield _Member(info.filename, kind, info.file_size, lambda info=info: zipped.open(info))  # type: ignore[misc]
        return
    raw.seek(0)
    with tarfile.open(fileobj=raw, mode="r:*") as tar:
        for entry in tar:
            kind = "file" if entry.isreg() else "folder" if entry.isdir() else "link or device"
            yield _Member(entry.name, kind, entry.size, lambda entry=entry: tar.extractfile(entry))  # type: ignore[misc,arg-type]


def _write(member: _Member, folder: Path, archive: Path) -> None:
    path = PurePosixPath(member.name.replace("\\", "/"))
    if (
        path.is_absolute()
        or ".." in path.parts
        or ":" in member.name.partition("/")[0]
        or "\0" in member.name
    ):
        raise BadArchive(f"{archive} holds '{member.name}', which leads out of its folder: do not trust it")
    if member.kind not in ("file", "folder"):
        raise BadArchive(f"{archive} holds '{member.name}', a {member.kind}: do not trust it")
    target = folder / path
    if member.kind == "folder":
        target.mkdir(parents=True, exist_ok=True)
        return
    if member.size > shutil.disk_usage(folder).free:
        raise UserError(
            f"{archive} does not fit: '{member.name}' alone takes {in_words(member.size)}; free space, or give "
            "another --root"
        )
    target.parent.mkdir(parents=True, exist_ok=True)
    with member.open() as source, open(target, "wb") as file:
        shutil.copyfileobj(source, file, 1 << 20)
    if target.stat().st_size != member.size:
        raise BadArchive(f"{archive} is damaged: '{member.name}' ends too early")
