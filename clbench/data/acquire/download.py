"""Large files over HTTP, that go on where they broke off, and are what they should be."""

import errno
import hashlib
import json
import shutil
import string
import time
from collections.abc import Callable
from http.client import HTTPException, InvalidURL
from pathlib import Path
from typing import Any
from urllib.error import HTTPError, URLError
from urllib.parse import quote, urlsplit, urlunsplit
from urllib.request import Request, urlopen

from clbench.errors import UserError

Progress = Callable[[int, int | None], None]  # bytes done, of how many where that is known

_TIMEOUT_S = 30.0  # without a single byte
_TRIES = 5  # in a row that bring nothing new; and so often is a file begun again
_PAUSE_S = 2.0  # before the second, twice that before the third, ...
_BLOCK = 1 << 20


class BadArchive(UserError):
    """An archive that is not what it should be; whoever knows where it comes from adds the way out."""


class _Changed(Exception):
    """What was begun is of no use any more: the server has another file, or answers another range."""


def fetch(url: str, path: Path, progress: Progress) -> None:
    """Download a file, which has its name once it is whole; until then it is `<name>.part`, and goes on from there.

    Raises:
        UserError: it is not to be had, or the disk is full; says what to do.
    """
    part, about = _beside(path, ".part"), _beside(path, ".part.json")
    furthest, failures, restarts = _size(part), 0, 0
    while True:
        try:
            _go_on(url, part, about, progress)
            break
        except _Changed:
            part.unlink(missing_ok=True)
            about.unlink(missing_ok=True)
            restarts += 1  # for what comes after one counts as new
            furthest, reason = 0, "is another file, or another part of it, each time"
        except HTTPError as error:
            reason = f"answers {error.code} {_first_line(error.reason)}"
            if error.code < 500 and error.code not in (408, 429):
                raise UserError(f"{url} {reason}: {_by_hand(path)}") from error
        except (OSError, HTTPException) as error:
            cause = error.reason if isinstance(error, URLError) else error
            reason = f"cannot be downloaded ({_first_line(cause) or type(cause).__name__})"
        failures = 0 if _size(part) > furthest else failures + 1
        furthest = max(furthest, _size(part))
        if _TRIES in (failures, restarts):
            kept = f"repeat the command to go on from {in_words(furthest)}, or " if furthest else ""
            raise UserError(f"{url} {reason}: {kept}{_by_hand(path)}")
        time.sleep(_PAUSE_S * failures)
    part.replace(path)
    about.unlink(missing_ok=True)


def address(url: str) -> str:
    """The URL as it is asked for: its host in IDNA, and quoted what is not ASCII.

    Raises:
        UserError: it is none of a file on the web.
    """
    try:
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.port == 0:
            raise ValueError("it lacks http://, https:// or a host")
        host = parts.netloc.encode("idna").decode()
        return quote(urlunsplit(parts._replace(netloc=host)), safe=string.punctuation)
    except ValueError as error:
        raise UserError(
            f"--url={url} is no address to download from ({error}): give one that begins with https://"
        ) from error


def checksum(path: Path, progress: Progress) -> str:
    """The SHA-256 checksum of a file."""
    total, done, digest = _size(path), 0, hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(_BLOCK):
            digest.update(block)
            done += len(block)
            progress(done, total)
    return digest.hexdigest()


def verify(path: Path, found: str, sha256: str | None) -> str:
    """Compare a file's checksum with its own, or where none is published, with that of an earlier download.

    Returns:
        What was compared, in words.

    Raises:
        BadArchive: it is another file.
    """
    expected = sha256 or pinned(path)
    if expected is None:
        return f"no checksum is published: that of this first download will be kept in {_pin(path)}"
    whose = "expected" if sha256 else f"in {_pin(path)}"
    if found != expected.lower():
        raise BadArchive(
            f"{path} has the SHA-256 checksum {found}, but {expected} is {whose}: it was damaged, or is another file, "
            f"to be trusted with --sha256={found}"
        )
    return f"its SHA-256 checksum is as {whose}"


def pin(path: Path, found: str) -> None:
    """Keep the checksum of a download that was sound, for the next one."""
    _pin(path).write_text(f"{found}  {path.name}\n")


def pinned(path: Path) -> str | None:
    """The checksum that was kept of an earlier download; None where there was none."""
    words = _pin(path).read_text().split() if _pin(path).is_file() else []
    return words[0] if words else None


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


def way_out(error: OSError) -> str:
    """What to do about what the file system refuses."""
    full = error.errno in (errno.ENOSPC, errno.EDQUOT)
    return f"{'free space there' if full else 'mend that'}, or give another --root"


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
        response = urlopen(Request(address(url), headers=headers), timeout=_TIMEOUT_S)
    except HTTPError as error:
        if error.code == 416 and have:  # there is nothing after what is here already
            whole = error.headers.get("Content-Range", "").endswith(f"/{have}")
            if whole and known["total"] in (have, None):
                return
            raise _Changed from error
        raise
    except (ValueError, InvalidURL) as error:  # of what it is redirected to
        raise UserError(f"{url} leads to no address ({error}): {_by_hand(part)}") from error
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
            # What is there: a connection that stalls keeps what came.
            while (total is None or have <= total) and (block := response.read1(_BLOCK)):
                try:
                    file.write(block)
                    file.flush()
                except OSError as error:
                    raise _disk(part, error) from error
                have += len(block)
                progress(have, total)
    if total is not None and have > total:
        raise _Changed
    if total is not None and have < total:
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


def _first_line(told: object) -> str:
    return str(told).strip().partition("\n")[0].rstrip(".")


def _disk(path: Path, error: OSError) -> UserError:
    return UserError(f"cannot write {path} ({error.strerror}): {way_out(error)}")


def _pin(path: Path) -> Path:
    return _beside(path, ".sha256")


def _beside(path: Path, suffix: str) -> Path:
    return path.with_name(path.name + suffix)


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0
