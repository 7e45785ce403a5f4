"""Journals: files of one JSON object a line, each line with its own checksum, that are only appended to."""

import json
import os
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from clbench.errors import UserError
from clbench.recording.files import append_whole, cannot_write, write_whole

_CHECK = ', "check": "'


class Journal:
    """A journal that is open: its entries, and a file that further ones are appended to.

    A process that is killed may leave the last line cut off; it is removed when the file is opened again.
    Lines reach the system at once, and the disk with `flush`.

    Args:
        path: the file; it is made where it is missing.
        lose_damaged: whether a damaged line and all after it are removed too, in place of an error.

    Attributes:
        entries: what the file held when it was opened, or was last given by `rewrite`.
        count: the number of entries that it holds now.

    Raises:
        UserError: the file cannot be read or written, or a line that is not the last is damaged.
    """

    def __init__(self, path: Path, *, lose_damaged: bool = False):
        self.path = path
        self.entries, whole = _read_entries(path, lose_damaged)
        self.count = len(self.entries)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = open(path, "ab", buffering=0)  # noqa: SIM115
            self._file.truncate(whole)
        except OSError as error:
            raise cannot_write(path, error) from error

    def append(self, entry: dict[str, Any]) -> None:
        """Add an entry, which JSON can hold.

        Raises:
            UserError: the disk is full or may not be written.
        """
        try:
            append_whole(self._file, _line_of(entry))
        except OSError as error:
            raise cannot_write(self.path, error) from error
        self.count += 1

    def flush(self) -> None:
        """Wait until all entries are on the disk."""
        os.fsync(self._file.fileno())

    def rewrite(self, entries: Iterable[dict[str, Any]]) -> None:
        """Replace the file's content by these entries.

        Raises:
            UserError: the disk is full or may not be written.
        """
        self.entries = list(entries)
        self.count = len(self.entries)
        self._file.close()
        content = b"".join(map(_line_of, self.entries))
        write_whole(self.path, lambda path: path.write_bytes(content))
        self._file = open(self.path, "ab", buffering=0)  # noqa: SIM115

    def close(self) -> None:
        """Close the file; nothing can be appended after it."""
        self._file.close()


def entries_of(path: Path) -> list[dict[str, Any]]:
    """The entries of a journal's file, which stays as it is; none where there is no file.

    Raises:
        UserError: the file cannot be read, or a line that is not the last is damaged.
    """
    return _read_entries(path, lose_damaged=False)[0]


def _line_of(entry: dict[str, Any]) -> bytes:
    """The line of an entry: its JSON, with a checksum of it as the last key.

    What is no text in the name of a file is escaped as JSON does, `\\udcff`.
    """
    body = json.dumps(entry, ensure_ascii=False)[:-1].encode(errors="backslashreplace")
    return body + f'{_CHECK}{zlib.crc32(body):08x}"}}\n'.encode()


def _read_entries(path: Path, lose_damaged: bool) -> tuple[list[dict[str, Any]], int]:
    """The entries of a journal, and how many bytes they take; what follows is to be removed.

    Raises:
        UserError: the file cannot be read, or a line before the last is damaged and `lose_damaged` unset.
    """
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return [], 0
    except OSError as error:
        raise UserError(
            f"{path} cannot be read ({error.strerror}): get the right to, or take another experiment=NAME"
        ) from error
    entries: list[dict[str, Any]] = []
    whole = 0
    for number, line in enumerate(content.splitlines(keepends=True), 1):
        entry = _entry_of(line)
        if entry is None:
            if lose_damaged or whole + len(line) == len(content):  # the last one is cut off
                break
            raise UserError(
                f"{path} is damaged in line {number}: remove {path.parent} to run this anew, or take another "
                "experiment=NAME"
            )
        entries.append(entry)
        whole += len(line)
    return entries, whole


def _entry_of(line: bytes) -> dict[str, Any] | None:
    """The entry of a line; None where it is cut off or damaged."""
    text = line.decode(errors="replace")
    body, separator, checksum = text.rpartition(_CHECK)
    if not separator or checksum != f'{zlib.crc32(body.encode()):08x}"}}\n':
        return None
    return json.loads(body + "}")
