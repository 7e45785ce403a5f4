"""Downloads of many gigabytes over HTTP, which go on where they broke off.

That is all this module is for. pooch 1.9 deletes a download that breaks and begins again at the first byte, and
`urllib.request.urlretrieve` does the same; `requests` (2.34, over urllib3) loses what came of a block when a
connection stalls. So the request for the rest is written here, over the standard library, and nothing else is.
"""

import json
import string
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.client import HTTPException, HTTPResponse, InvalidURL
from pathlib import Path
from typing import Any
from urllib.error import HTTPError, URLError
from urllib.parse import quote, urlsplit, urlunsplit
from urllib.request import Request, urlopen

from rich.filesize import decimal

from clbench.data.acquire.disk import check_room, way_out
from clbench.errors import UserError

BytesProgress = Callable[[int, int | None], None]  # bytes done, of how many where that is known

_TIMEOUT_S = 30.0  # without a single byte
_TRIES = 5  # in a row that bring nothing new; and so often is a file begun again
_PAUSE_S = 2.0  # before the second, twice that before the third, ...
_BLOCK = 1 << 20  # bytes read at a time, at most


class _Changed(Exception):
    """The part that is here cannot be continued: the server has another file, or answers another range."""


def fetch(url: str, path: Path, progress: BytesProgress) -> None:
    """Download a file. Until it is whole it is `<name>.part`, and the same call continues from there.

    Raises:
        UserError: it cannot be downloaded, or the disk is full; says what to do.
    """
    part, note = beside(path, ".part"), beside(path, ".part.json")
    furthest, failures, restarts = _size_so_far(part), 0, 0
    while True:
        try:
            _append(url, part, note, progress)
            break
        except _Changed:
            part.unlink(missing_ok=True)
            note.unlink(missing_ok=True)
            restarts += 1
            furthest, reason = 0, "is another file, or another part of it, each time"
        except HTTPError as error:
            reason = f"answers {error.code} {_headline(error.reason)}"
            if error.code < 500 and error.code not in (408, 429):
                raise UserError(f"{url} {reason}: {_by_hand(path)}") from error
        except (OSError, HTTPException) as error:
            cause = error.reason if isinstance(error, URLError) else error
            reason = f"cannot be downloaded ({_headline(cause) or type(cause).__name__})"
        failures = 0 if _size_so_far(part) > furthest else failures + 1
        furthest = max(furthest, _size_so_far(part))
        if _TRIES in (failures, restarts):
            kept = f"repeat the command to go on from {decimal(furthest)}, or " if furthest else ""
            raise UserError(f"{url} {reason}: {kept}{_by_hand(path)}")
        time.sleep(_PAUSE_S * failures)
    part.replace(path)
    note.unlink(missing_ok=True)


def address(url: str) -> str:
    """The URL as it is sent: its host in IDNA, and percent signs for what is not ASCII.

    Raises:
        UserError: it is not the URL of a file on the web.
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


def beside(path: Path, suffix: str) -> Path:
    """The file in the same folder whose name has `suffix` appended."""
    return path.with_name(path.name + suffix)


def _append(url: str, part: Path, note: Path, progress: BytesProgress) -> None:
    """Append to the part what it lacks, or write it anew; the note says which file the part is of.

    Raises:
        OSError, HTTPException: the connection broke; what came is kept.
        _Changed: the part has to be begun again.
        UserError: the disk is full, or the answer is a web page.
    """
    noted = _read_note(note)
    have = _size_so_far(part) if noted.get("url") == url else 0
    response = _request(url, part, noted, have)
    if response is None:
        return
    with response:
        if response.headers.get_content_type() == "text/html":
            raise UserError(
                f"{url} is a web page, not an archive; the link may be out of date: {_by_hand(part)}"
            )
        if response.status == 206:
            begin, _, size = response.headers.get("Content-Range", "").removeprefix("bytes ").partition("/")
            total = int(size) if size.isdigit() else None
            if begin.partition("-")[0] != str(have) or total != noted.get("total"):
                raise _Changed
        else:
            have = 0
            length = response.headers.get("Content-Length", "")
            total = int(length) if length.isdigit() else None
        if total is not None:
            check_room(part.parent, total - have, "the archive")
        etag, modified = response.headers.get("ETag", ""), response.headers.get("Last-Modified")
        validator = modified if etag.startswith("W/") else etag or modified  # If-Range takes no weak ETag
        with _writing(part):
            if not have:
                part.write_bytes(b"")
            note.write_text(
                json.dumps({"url": url, "validator": validator, "total": total}), encoding="utf-8"
            )
        with open(part, "ab") as file:
            # read1 gives what is there, so that a connection that stalls keeps what came.
            while (total is None or have <= total) and (block := response.read1(_BLOCK)):
                with _writing(part):
                    file.write(block)
                    file.flush()
                have += len(block)
                progress(have, total)
    if total is not None and have > total:
        raise _Changed
    if total is not None and have < total:
        raise ConnectionError(f"it ended after {have:,} of {total:,} bytes")


def _request(url: str, part: Path, noted: dict[str, Any], have: int) -> HTTPResponse | None:
    """The answer to a request for what comes after `have` bytes; None where the server says that nothing does.

    Raises:
        OSError, HTTPException: there is no connection.
        _Changed: the server's file is not the one that the note is of.
        UserError: it is redirected to what is no address.
    """
    headers = {"User-Agent": "clbench", "Accept-Encoding": "identity"}
    if have:
        headers["Range"] = f"bytes={have}-"
        if noted["validator"]:
            headers["If-Range"] = noted["validator"]
    try:
        return urlopen(Request(address(url), headers=headers), timeout=_TIMEOUT_S)
    except HTTPError as error:
        if error.code != 416 or not have:
            raise
        whole = error.headers.get("Content-Range", "").endswith(f"/{have}")
        if whole and noted["total"] in (have, None):
            return None
        raise _Changed from error
    except (ValueError, InvalidURL) as error:
        raise UserError(f"{url} leads to no address ({error}): {_by_hand(part)}") from error


def _read_note(note: Path) -> dict[str, Any]:
    """What was noted of a file that was begun; nothing where the note is missing or damaged."""
    try:
        noted = json.loads(note.read_text(encoding="utf-8"))
        return noted if {"url", "validator", "total"} <= noted.keys() else {}
    except (OSError, ValueError, AttributeError):
        return {}


def _by_hand(path: Path) -> str:
    return (
        f"download it by hand to {path.with_name(path.name.removesuffix('.part'))} and repeat the command, "
        "or give the address of another copy as --url"
    )


def _headline(told: object) -> str:
    """The first line of what a server or the system says, without its full stop."""
    return str(told).strip().partition("\n")[0].rstrip(".")


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    """What the disk refuses inside is no broken connection, and a person must change it."""
    try:
        yield
    except OSError as error:
        raise UserError(f"cannot write {path} ({error.strerror}): {way_out(error)}") from error


def _size_so_far(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0
