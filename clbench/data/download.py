"""Large files over HTTP, that go on where they broke off, and are what they should be."""

import hashlib
import json
import shutil
import time
from collections.abc import Callable
from http.client import HTTPException
from pathlib import Path
from typing import Any
from urllib.error import HTTPError, URLError
from urllib.parse import urlparse
from urllib.request import Request, urlopen

from clbench.errors import UserError

Progress = Callable[[int, int | None], None]  # bytes done, of how many where that is known

_TIMEOUT_S = 30.0  # without a single byte
_TRIES = 5  # in a row that bring nothing new
_PAUSE_S = 2.0  # before the second, twice that before the third, ...
_BLOCK = 1 << 20


class _Changed(Exception):
    """What was begun is of no use any more: the server has another file, or answers another range."""


def fetch(url: str, path: Path, progress: Progress) -> None:
    """Download a file, which has its name once it is whole; until then it is `<name>.part`, and goes on from there.

    Raises:
        UserError: it is not to be had, or the disk is full; says what to do.
    """
    if urlparse(url).scheme not in ("http", "https"):
        raise UserError(f"--url={url} is no address to download from: give one that begins with https://")
    part, about = _beside(path, ".part"), _beside(path, ".part.json")
    furthest, failures = _size(part), 0
    while True:
        try:
            _go_on(url, part, about, progress)
            break
        except _Changed:
            part.unlink(missing_ok=True)
            furthest, reason = 0, "is another file each time"
        except HTTPError as error:
            reason = f"answers {error.code} {error.reason}"
            if error.code < 500 and error.code not in (408, 429):
                raise UserError(f"{url} {reason}: {_by_hand(path)}") from error
        except (OSError, HTTPException) as error:
            cause = error.reason if isinstance(error, URLError) else error
            reason = f"cannot be downloaded ({cause or type(cause).__name__})"
        failures = 0 if _size(part) > furthest else failures + 1
        furthest = max(furthest, _size(part))
        if failures == _TRIES:
            kept = f"repeat the command to go on from {in_words(furthest)}, or " if furthest else ""
            raise UserError(f"{url} {reason}: {kept}{_by_hand(path)}")
        time.sleep(_PAUSE_S * failures)
    part.replace(path)
    about.unlink(missing_ok=True)


def verify(path: Path, sha256: str | None, progress: Progress) -> str:
    """Check a file against its checksum, or where none is published, against that of the first download.

    Returns:
        What was checked, in words.

    Raises:
        UserError: it is another file.
    """
    total, done, digest = _size(path), 0, hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(_BLOCK):
            digest.update(block)
            done += len(block)
            progress(done, total)
    found, pin = digest.hexdigest(), _beside(path, ".sha256")
    if sha256 is None and not pin.exists():
        pin.write_text(f"{found}  {path.name}\n")
        return f"no checksum is published: that of this first download is kept in {pin}"
    expected, whose = (sha256, "expected") if sha256 else (pin.read_text().split()[0], f"in {pin}")
    if found != expected.lower():
        raise UserError(
            f"{path.name} has the SHA-256 checksum {found}, but {expected} is {whose}: it was damaged, or is another "
            "file; download it again, or give --sha256 if you trust this one"
        )
    return f"its SHA-256 checksum is as {whose}"


def in_words(count: int) -> str:
    """Bytes for people."""
    if count < 1e5:
        return f"{count:,} bytes"
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"


def room(folder: Path, count: int, what: str) -> None:
    """Check that a disk takes so many bytes more.

    Raises:
        UserError: it does not.
    """
    free = shutil.disk_usage(folder).free
    if count > free:
        raise UserError(
            f"{what} needs {in_words(count)}, but {folder} has {in_words(free)} left: free some, or give another --root"
        )


def _go_on(url: str, part: Path, about: Path, progress: Progress) -> None:
    """Append to the part what it lacks, or write it anew.

    Raises:
        OSError, HTTPException: the connection broke, and what came is kept.
        _Changed: it has to be begun again.
        UserError: the disk is full, or it is a web page.
    """
    known = _read(about)
    have = _size(part) if known.get("url") == url else 0
    headers = {"User-Agent": "clbench", "Accept-Encoding": "identity"}
    if have:
        headers["Range"] = f"bytes={have}-"
        if known["validator"]:
            headers["If-Range"] = known["validator"]
    try:
        response = urlopen(Request(url, headers=headers), timeout=_TIMEOUT_S)
    except HTTPError as error:
        if error.code == 416 and have:  # there is nothing after what is here already
            if error.headers.get("Content-Range", "").endswith(f"/{have}"):
                return
            raise _Changed from error
        raise
    with response:
        if response.headers.get_content_type() == "text/html":
            raise UserError(
                f"{url} is a web page, not an archive; the link may be out of date: {_by_hand(part)}"
            )
        if response.status == 206 and not have:
            raise ConnectionError("it answers a part of the file to who asks for all of it")
        if response.status == 206:
            begin, _, size = response.headers.get("Content-Range", "").removeprefix("bytes ").partition("/")
            total = int(size) if size.isdigit() else None
            if begin.partition("-")[0] != str(have) or total != known["total"]:
                raise _Changed
        else:
            have = 0
            length = response.headers.get("Content-Length", "")
            total = int(length) if length.isdigit() else None
        if total is not None:
            room(part.parent, total - have, "the archive")
        etag = response.headers.get("ETag", "")
        validator = response.headers.get("Last-Modified") if etag.startswith("W/") else etag
        validator = validator or response.headers.get("Last-Modified")
        try:
            if not have:
                part.write_bytes(b"")
            about.write_text(json.dumps({"url": url, "validator": validator, "total": total}))
        except OSError as error:
            raise _disk(part, error) from error
        with open(part, "ab") as file:
            while block := response.read1(_BLOCK):  # what is there: a connection that stalls keeps what came
                try:
                    file.write(block)
                    file.flush()
                except OSError as error:
                    raise _disk(part, error) from error
                have += len(block)
                progress(have, total)
    if total is not None and have != total:
        raise ConnectionError(f"it ended after {have:,} of {total:,} bytes")


def _read(about: Path) -> dict[str, Any]:
    """What was noted of a file that was begun; nothing where the note is missing or damaged."""
    try:
        noted = json.loads(about.read_text())
        return noted if {"url", "validator", "total"} <= noted.keys() else {}
    except (OSError, ValueError, AttributeError):
        return {}


def _by_hand(path: Path) -> str:
    return (
        f"download it by hand to {path.with_name(path.name.removesuffix('.part'))} and repeat the command, "
        "or give the address of another copy as --url"
    )


def _disk(path: Path, error: OSError) -> UserError:
    return UserError(f"cannot write {path} ({error.strerror}): free space there, or give another --root")


def _beside(path: Path, suffix: str) -> Path:
    return path.with_name(path.name + suffix)


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0
