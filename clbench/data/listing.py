"""Listing images in folders: which files are images for everyone, and what was left out, and why."""

import os
from collections import Counter
from collections.abc import Collection
from enum import Enum
from pathlib import Path

from clbench.errors import UserError

# Those of the formats that both decoders read, in any letter case.
SUFFIXES = (
    *(".png", ".jpg", ".jpeg", ".jfif", ".jpe", ".bmp", ".dib", ".tif", ".tiff", ".webp"),
    *(".pgm", ".ppm", ".pnm", ".pbm"),
)
# Files and folders that systems put beside a person's own, in lower case.
_SERVICE = frozenset(
    {
        *("@eadir", "@tmp", "@recycle", "#recycle", "#snapshot", ".@__thumb", ".snapshot", ".zfs"),  # storage
        *("$recycle.bin", "recycler", "system volume information", "thumbs.db", "ehthumbs.db", "desktop.ini"),
        *("__macosx", ".ds_store", ".trashes", ".spotlight-v100", ".fseventsd", ".temporaryitems", "icon\r"),
        *(".appledouble", ".appledb", ".appledesktop", "network trash folder", "temporary items"),
        *("lost+found", ".ipynb_checkpoints"),
    }
)
_MAC_ATTRIBUTES = "._"  # begins the name of a file that a Mac puts beside each on a foreign disk

_NAMED = 5  # suffixes or names that are listed, at most


class Reason(Enum):
    """Why a file or folder is left out: in words, for one and for several."""

    HIDDEN = "hidden", "hidden"
    NO_IMAGE = "not an image", "not images"
    OF_A_SYSTEM = "of a storage system", "of a storage system"
    AGAIN = "folder that a link leads to again", "folders that links lead to again"
    NOWHERE = "link that leads nowhere", "links that lead nowhere"


class LeftOut:
    """What lists of images have left out, each file or folder once, and why."""

    def __init__(self) -> None:
        self._reasons: dict[Path, Reason] = {}

    def add(self, path: Path, reason: Reason) -> None:
        self._reasons.setdefault(path, reason)

    @property
    def folders(self) -> list[Path]:
        """The folders that something was left out of, sorted."""
        return sorted({path.parent for path in self._reasons})

    def __str__(self) -> str:
        """How many there are of each kind, such as `3 hidden, 2 not images (.heic, .txt)`; empty where there are none."""
        parts = []
        for reason in Reason:
            paths = [path for path, why in self._reasons.items() if why == reason]
            if paths:
                named = paths if reason != Reason.HIDDEN else []
                names = [path.suffix.lower() if reason == Reason.NO_IMAGE else path.name for path in named]
                parts.append(f"{len(paths)} {reason.value[len(paths) > 1]}{_examples(names)}")
        return ", ".join(parts)


def _examples(names: Collection[str]) -> str:
    """The most frequent names in brackets, printable and in one line."""
    ranked = sorted(Counter(name for name in names if name).items(), key=lambda pair: (-pair[1], pair[0]))
    shown = [
        "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in name)
        for name, _ in ranked[:_NAMED]
    ]
    more = ["..."] if len(ranked) > _NAMED else []
    return f" ({', '.join(shown + more)})" if shown else ""


def images_in(folder: Path, left_out: LeftOut, without: Collection[Path] = ()) -> list[Path]:
    """The image files of a folder and of the folders in it, sorted by their path in it.

    Links to files and folders are followed, unless they lead to a folder that holds this one; no folder is read twice, and
    a real one is read under its own name rather than that of a link. A link that leads nowhere and is named like an image
    is taken for one, for whoever reads it to tell.

    Args:
        folder: the folder; its own name may be any.
        left_out: told what is left out.
        without: folders in it that mean something else, and are not told.

    Raises:
        UserError: a folder cannot be listed.
    """
    found: list[Path] = []
    seen = {*map(str, Path(os.path.realpath(folder)).parents), *map(os.path.realpath, without)}
    waiting, linked = [folder], list[Path]()
    while waiting or linked:
        if not waiting:
            linked.sort(reverse=True)
            waiting.append(linked.pop())
        current = waiting.pop()
        real = os.path.realpath(current)
        if real in seen:
            if current not in without:
                left_out.add(current, Reason.AGAIN)
            continue
        seen.add(real)
        for entry in _listed(current):
            path = current / entry.name
            if reason := _no_business(entry.name):
                left_out.add(path, reason)
            elif _is_folder(entry):
                (linked if entry.is_symlink() else waiting).append(path)
            elif path.suffix.lower() in SUFFIXES:
                found.append(path)
            else:
                left_out.add(path, Reason.NO_IMAGE if os.path.exists(path) else Reason.NOWHERE)
    return sorted(found)


def folders(parent: Path, left_out: LeftOut | None = None) -> list[Path]:
    """The folders in `parent` but hidden ones and those of systems, sorted; none where there is no `parent`.

    Args:
        left_out: told which folders are left out.

    Raises:
        UserError: the folder cannot be listed.
    """
    found = []
    for entry in _listed(parent) if parent.is_dir() else []:
        if not _is_folder(entry):
            continue
        if (reason := _no_business(entry.name)) is None:
            found.append(parent / entry.name)
        elif left_out is not None:
            left_out.add(parent / entry.name, reason)
    return sorted(found)


def _listed(folder: Path) -> list[os.DirEntry[str]]:
    """Everything that a folder holds, in any order; which are folders is known without asking for each.

    Raises:
        UserError: it cannot be listed.
    """
    try:
        with os.scandir(folder) as entries:
            return list(entries)
    except OSError as error:
        raise UserError(
            f"folder {folder} cannot be listed ({error.strerror}): give yourself the right to read it, or move it away"
        ) from error


def _is_folder(entry: os.DirEntry[str]) -> bool:
    """Whether an entry is a folder, or a link to one."""
    try:
        return entry.is_dir()
    except OSError:  # a link in a circle, or to where one may not go
        return False


def _no_business(name: str) -> Reason | None:
    """Why a file or folder of this name is left out whatever it holds; None where it is not."""
    if name.lower() in _SERVICE or name.startswith(_MAC_ATTRIBUTES):
        return Reason.OF_A_SYSTEM
    return Reason.HIDDEN if name.startswith(".") else None
