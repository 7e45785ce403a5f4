"""Pictures that runs wrote with maps=few: a test image, its mask, and the map after each stage."""

from __future__ import annotations

import base64
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from clbench.report.comparison import Group, Row
from clbench.report.reading import Run

_STAGE = re.compile(r"(.+)-stage-(\d+)\.jpg")


@dataclass
class Strip:
    """The maps of one row's run for one test image.

    Attributes:
        maps: a stage: the number of its picture, and the stage that drew it, which is an earlier one where nothing
            changed since; None before the task was learned.
    """

    row: Row
    seed: int
    maps: list[tuple[int, int] | None]


@dataclass
class Shown:
    """A test image, and what each row's run made of it."""

    task: str
    kind: str
    image: int
    mask: int
    strips: list[Strip] = field(default_factory=list)


@dataclass
class Gallery:
    """Attributes:
    pictures: data URIs, each once.
    left_out: maps that would have made the page larger than its bound.
    without: rows whose runs have no pictures.
    """

    pictures: list[str] = field(default_factory=list)
    shown: dict[int, list[Shown]] = field(default_factory=dict)  # of each group
    left_out: int = 0
    without: list[str] = field(default_factory=list)
    _numbers: dict[bytes, int] = field(default_factory=dict)
    bytes: int = 0

    def number(self, path: Path) -> int:
        """A picture's number; a picture that is there already is not held twice."""
        data = path.read_bytes()
        if data not in self._numbers:
            kind = "png" if path.suffix == ".png" else "jpeg"
            self._numbers[data] = len(self.pictures)
            self.pictures.append(f"data:image/{kind};base64,{base64.b64encode(data).decode()}")
            self.bytes += len(self.pictures[-1])
        return self._numbers[data]


def gallery(groups: Sequence[Group], bound: int) -> Gallery:
    """The pictures of one run a row, the first seed's that has some.

    Args:
        bound: bytes of all pictures in the page. The first image of every task comes before the second of any.
    """
    built = Gallery()
    waiting: list[tuple[int, int, int, Row, Run, str, str]] = []
    for group in groups:
        for place, row in enumerate(group.own):
            runs = sorted(row.runs, key=lambda run: run.summary["seed"])
            run = next((run for run in runs if (run.path / "maps").is_dir() and list(_few(run))), None)
            if run is None:
                built.without.append(f"{row.title} (group {group.number})" if len(groups) > 1 else row.title)
                continue
            for task in run.tasks:
                for order, name in enumerate(_names(run.path / "maps" / task / "few")):
                    waiting.append((order, group.number, place, row, run, task, name))
    of: dict[tuple[int, str, str, int], Shown] = {}
    for _, number, _, row, run, task, name in sorted(waiting, key=lambda one: one[:3]):
        folder = run.path / "maps" / task / "few"
        if built.bytes > bound:
            built.left_out += 1
            continue
        image, mask = folder / f"{name}.jpg", folder / f"{name}-mask.png"
        if not (image.is_file() and mask.is_file()):
            continue
        key = (number, task, name, built.number(image))
        if key not in of:
            kind = name.rpartition("-")[0]
            of[key] = Shown(task, kind, built.number(image), built.number(mask))
            built.shown.setdefault(number, []).append(of[key])
        of[key].strips.append(Strip(row, run.summary["seed"], _maps(built, folder, name, run.stages)))
    return built


def _few(run: Run) -> list[Path]:
    return [path for task in run.tasks if (path := run.path / "maps" / task / "few").is_dir()]


def _names(folder: Path) -> list[str]:
    return sorted({found[1] for path in folder.glob("*.jpg") if (found := _STAGE.fullmatch(path.name))})


def _maps(built: Gallery, folder: Path, name: str, stages: int) -> list[tuple[int, int] | None]:
    maps: list[tuple[int, int] | None] = []
    for stage in range(stages):
        path = folder / f"{name}-stage-{stage:02d}.jpg"
        maps.append((built.number(path), stage) if path.is_file() else maps[-1] if maps else None)
    return maps
