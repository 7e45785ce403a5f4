"""SHA-256 of texts, bytes and files, in hexadecimal."""

import hashlib
from pathlib import Path


def of_text(text: str) -> str:
    """The digest of a text, which may hold bytes of a file's name that are no text."""
    return hashlib.sha256(text.encode(errors="surrogateescape")).hexdigest()


def of_bytes(*pieces: bytes | memoryview) -> str:
    """The digest of bytes, one piece after the other."""
    digest = hashlib.sha256()
    for piece in pieces:
        digest.update(piece)
    return digest.hexdigest()


def of_file(path: Path) -> str:
    """The digest of a file's content, which is never held as a whole.

    Raises:
        OSError: it cannot be read.
    """
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()
