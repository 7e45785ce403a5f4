"""SHA-256 checksums of archives: the published one, or where there is none that of the first download."""

import hashlib
from pathlib import Path

from clbench.data.acquire.download import BytesProgress, beside
from clbench.errors import UserError

_BLOCK = 1 << 20  # bytes read at a time


class BadArchive(UserError):
    """An archive that is not what it should be; whoever knows where it comes from adds the way out."""


def checksum(path: Path, progress: BytesProgress) -> str:
    """The SHA-256 checksum of a file, 64 hexadecimal digits."""
    total, done, digest = path.stat().st_size, 0, hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(_BLOCK):
            digest.update(block)
            done += len(block)
            progress(done, total)
    return digest.hexdigest()


def verify(path: Path, found: str, sha256: str | None) -> str:
    """Compare a file's checksum with the published one or, where there is none, with an earlier download's.

    Args:
        found: the file's checksum.
        sha256: the published one; None where there is none.

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
            f"{path} has the SHA-256 checksum {found}, but {expected} is {whose}: it was damaged, or is another "
            f"file, to be trusted with --sha256={found}"
        )
    return f"its SHA-256 checksum is as {whose}"


def pin(path: Path, found: str) -> None:
    """Keep the checksum of a download that was sound in `<name>.sha256`, for the next download."""
    _pin(path).write_text(f"{found}  {path.name}\n", encoding="utf-8")


def pinned(path: Path) -> str | None:
    """The checksum that was kept of an earlier download; None where there was none."""
    words = _pin(path).read_text(encoding="utf-8").split() if _pin(path).is_file() else []
    return words[0] if words else None


def _pin(path: Path) -> Path:
    return beside(path, ".sha256")
