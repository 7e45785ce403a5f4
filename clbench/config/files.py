"""Digests of the files and folders that settings name, to notice those that changed under a run. Imports no torch."""

from collections.abc import Iterable, Iterator, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

from clbench import digests
from clbench.config import classes
from clbench.config.schema import Config
from clbench.data.listing import LeftOut, images_in


def file_digests(config: Config) -> dict[str, str]:
    """The digests of what all settings of method, backbone and strategy name that are paths, see `digests_at`.

    Raises:
        UserError: a class cannot be imported, or a folder cannot be listed.
    """
    kinds = {
        "method": classes.class_of(config.method.target),
        "strategy": classes.class_of(config.strategy.target),
    }
    if classes.takes(config, "method", "backbone"):
        kinds["backbone"] = classes.class_of(classes.BACKBONE)
    return digests_at(config, classes.path_settings(kinds))


def digests_at(config: Config, keys: Iterable[str]) -> dict[str, str]:
    """The digests of the files and folders that these settings name.

    Args:
        keys: flat keys, such as `backbone.checkpoint`.

    Returns:
        Flat key -> SHA-256, in hexadecimal: of a file's content, or of the names and contents of a folder's images. What
        is not there, or is the package's own, is left out.

    Raises:
        UserError: a folder cannot be listed.
    """
    found = {}
    for key in keys:
        node, _, name = key.partition(".")
        if digest := _digest(getattr(config, node).settings.get(name)):
            found[key] = digest
    return found


def changed_files(before: Mapping[str, str], now: Mapping[str, str]) -> str | None:
    """Which files or folders are others now, in words; None where none is. What is not there any more is not compared."""
    changed = [key for key, digest in before.items() if now.get(key, digest) != digest]
    return f"what {' and '.join(changed)} names changed" if changed else None


def _digest(value: Any) -> str | None:
    """The digest of a path, or of a list of paths; None where there is nothing."""
    paths = [Path(each) for each in (value if isinstance(value, list) else [value]) if isinstance(each, str)]
    parts = [_of_file(*_identity(file)) for path in paths for file in _files(path)]
    return digests.of_text(" ".join(parts)) if parts else None


def _files(path: Path) -> Iterator[Path]:
    if path.is_dir():
        yield from images_in(path, LeftOut())
    elif path.is_file():
        yield path


def _identity(file: Path) -> tuple[Path, int, int, int]:
    """A file, its size, and two times of its last change."""
    status = file.stat()
    return file, status.st_size, status.st_mtime_ns, status.st_ctime_ns


@lru_cache(maxsize=100_000)
def _of_file(file: Path, *identity: int) -> str:
    """A file's name and the SHA-256 of its content; the identity says until when that holds."""
    return f"{file.name!a} {digests.of_file(file)}"
