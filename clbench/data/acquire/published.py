"""The datasets that `clbench data` knows: licence, where to get them, checksum, how many images."""

import difflib
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from importlib import import_module
from pathlib import Path

from omegaconf import OmegaConf

from clbench.data.on_disk import OnDisk, folders
from clbench.errors import UserError

Counts = tuple[int, int, int]  # training images, good and defective test images


@dataclass(frozen=True)
class Published:
    """An entry of published.yaml, whose head says what each field is."""

    name: str
    title: str
    reader: str
    licence: str
    page: str
    how: str = ""
    url: str | None = None
    archive: str | None = None
    bytes: int | None = None
    sha256: str | None = None
    counts: dict[str, list[int]] = field(default_factory=dict)
    totals: list[int] | None = None

    @property
    def layout(self) -> type[OnDisk]:
        """The class that reads its folder."""
        module, _, name = self.reader.rpartition(".")
        return getattr(import_module(module), name)

    @property
    def total(self) -> Counts:
        """Images of all categories together."""
        train, good, defective = self.totals or map(sum, zip(*self.counts.values(), strict=True))
        return train, good, defective


@cache
def datasets() -> dict[str, Published]:
    """All entries by name, the most particular layout first: a folder is of the first one that recognises it."""
    entries = OmegaConf.to_container(OmegaConf.load(Path(__file__).with_name("published.yaml")))
    assert isinstance(entries, dict)
    return {str(name): Published(name=str(name), **entry) for name, entry in entries.items()}


def named(name: str) -> Published:
    """The entry of a dataset.

    Raises:
        UserError: there is none; the message names the nearest.
    """
    known = datasets()
    if name not in known:
        nearest = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
        hint = f"nearest: {nearest[0]}; " if nearest else ""
        raise UserError(f"there is no dataset '{name}'; {hint}there are: {', '.join(known)}")
    return known[name]


def recognise(root: Path) -> tuple[Published, Path] | None:
    """The first dataset that a folder holds, and its root; None where it holds none that is known."""
    return next(recognise_all(root), None)


def recognise_all(root: Path) -> Iterator[tuple[Published, Path]]:
    """The datasets that a folder holds, and their roots: this folder, or those at most two deeper.

    Archives often unpack to a folder of their own.
    """
    level = [root]
    for _ in range(3):
        known = []
        for folder in level:
            if entry := layout_of(folder):
                known.append(folder)
                yield entry, folder
        level = [inside for folder in level if folder not in known for inside in folders(folder)]


def layout_of(folder: Path) -> Published | None:
    """The dataset whose root a folder looks like; None where it looks like none."""
    return next((entry for entry in datasets().values() if entry.layout.recognises(folder)), None)
