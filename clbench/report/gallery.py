"""Pictures that runs wrote with maps=few: a test image, its mask, and the map after each stage."""

from __future__ import annotations

import base64
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from clbench.report.comparison import Group
from clbench.report.reading import FoundRun
from clbench.report.rows import Row

_STAGE = re.compile(r"(.+)-stage-(\d+)\.jpg")


@dataclass
class Strip:
    """The maps of one row's run for one test image.

    Attributes:
        maps: for each stage: the number of its picture, and the stage that drew it, which is an earlier one
            where nothing changed since; None before the image's category was learned.
    """

    row: Row
    seed: int
    maps: list[tuple[int, int] | None]


@dataclass
class Shown:
    """A test image, and what each row's run made of it.

    Attributes:
        kind: `good`, or what the defect is.
        image, mask: numbers of their pictures.
    """

    category: str
    kind: str
    image: int
    mask: int
    strips: list[Strip] = field(default_factory=list)


@dataclass
class Gallery:
    """The pictures of a page.

    Attributes:
        pictures: data URIs, each once.
        shown: number of a group -> its test images.
        left_out: strips of maps that would have made the page larger than its bound.
        without: rows whose runs have no pictures.
        size: bytes of all pictures.
    """

    pictures: list[str] = field(default_factory=list)
    shown: dict[int, list[Shown]] = field(default_factory=dict)
    left_out: int = 0
    without: list[str] = field(default_factory=list)
    size: int = 0
    _numbers: dict[bytes, int] = field(default_factory=dict)

    def number(self, path: Path) -> int:
        """The number of a picture in `pictures`, where it is put unless it is there already."""
        data = path.read_bytes()
        if data not in self._numbers:
            kind = "png" if path.suffix == ".png" else "jpeg"
            self._numbers[data] = len(self.pictures)
            self.pictures.append(f"data:image/{kind};base64,{base64.b64encode(data).decode()}")
            self.size += len(self.pictures[-1])
        return self._numbers[data]


@dataclass(frozen=True)
class _Candidate:
    """A test image of a run that pictures were written of.

    Attributes:
        order: place among the images of its category, then of its group and row: what is shown first.
        folder: of the category's pictures.
        name: of its files, before their endings.
    """

    order: tuple[int, int, int]
    row: Row
    run: FoundRun
    category: str
    folder: Path
    name: str


def gallery(groups: Sequence[Group], bound: int) -> Gallery:
    """Collect the pictures of one run for each row: of the first seed that has some.

    Args:
        bound: bytes of all pictures in the page. The first image of every category comes before the second
            of any.
    """
    built = Gallery()
    candidates: list[_Candidate] = []
    for group in groups:
        for place, row in enumerate(group.found):
            found = _candidates(row, group.number, place)
            candidates += found
            if not found:
                built.without.append(f"{row.title} (group {group.number})" if len(groups) > 1 else row.title)
    shown: dict[tuple[int, str, str, int], Shown] = {}
    for one in sorted(candidates, key=lambda candidate: candidate.order):
        if built.size > bound:
            built.left_out += 1
            continue
        image, mask = one.folder / f"{one.name}.jpg", one.folder / f"{one.name}-mask.png"
        if not (image.is_file() and mask.is_file()):
            continue
        group_number = one.order[1]
        key = (group_number, one.category, one.name, built.number(image))
        if key not in shown:
            kind = one.name.rpartition("-")[0]
            shown[key] = Shown(one.category, kind, built.number(image), built.number(mask))
            built.shown.setdefault(group_number, []).append(shown[key])
        maps = _maps(built, one.folder, one.name, one.run.stages)
        shown[key].strips.append(Strip(one.row, one.run.seed, maps))
    return built


def _candidates(row: Row, group: int, place: int) -> list[_Candidate]:
    """The test images of the first of a row's runs, by seed, that wrote pictures; empty where none did."""
    for run in sorted(row.runs, key=lambda run: run.seed):
        if not (run.path / "maps").is_dir():
            continue
        folders = {category: run.path / "maps" / category / "few" for category in run.categories}
        found = [
            _Candidate((order, group, place), row, run, category, folder, name)
            for category, folder in folders.items()
            for order, name in enumerate(_names(folder))
        ]
        if found:
            return found
    return []


def _names(folder: Path) -> list[str]:
    return sorted({found[1] for path in folder.glob("*.jpg") if (found := _STAGE.fullmatch(path.name))})


def _maps(built: Gallery, folder: Path, name: str, stages: int) -> list[tuple[int, int] | None]:
    """For each stage, the picture's number and the stage that drew it, see `Strip.maps`."""
    maps: list[tuple[int, int] | None] = []
    for stage in range(stages):
        path = folder / f"{name}-stage-{stage:02d}.jpg"
        maps.append((built.number(path), stage) if path.is_file() else maps[-1] if maps else None)
    return maps
