"""Titles, order and drawing of methods and strategies: all that the report knows of them by name.

A name that is not listed here is its own title, comes after those that are, and gets a colour, dashes and a
mark that these leave free.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from itertools import cycle

METHODS = {  # the paper's in its order, then others
    "patchcore": "PatchCore",
    "padim": "PaDiM",
    "cfa": "CFA",
    "stfpm": "STFPM",
    "efficientad": "EfficientAD",
    "draem": "DRAEM",
    "fastflow": "FastFlow",
    "fastflow_deit": "FastFlow DeiT",
    "fastflow_cait": "FastFlow CaiT",
    "rd4ad": "RD4AD",
    "simplenet": "SimpleNet",
    "supersimplenet": "SuperSimpleNet",
    "dinomaly": "Dinomaly",
    "anomalydino": "AnomalyDINO",
    "dinosaur": "DINOSaur",
    "cadic": "CADIC",
    "ucad": "UCAD",
}
STRATEGIES = ("native", "replay", "finetune", "joint", "single")

# Told apart by colour-blind readers, on white and on black: after Okabe & Ito (2008) and Tol (2021).
_COLOURS = (
    "#3d7fbf",
    "#e0662f",
    "#2f9e6e",
    "#c9a227",
    "#56b4e9",
    "#b0559e",
    "#8a8a8a",
    "#9c6b4a",
    "#7a6fd0",
)


@dataclass(frozen=True)
class Style:
    """How a strategy is drawn.

    Attributes:
        colour: `#rrggbb`.
        dash: lengths of a line's strokes and gaps by turns, in pixels.
        shape: a point's mark, by Vega-Lite's name.
    """

    colour: str
    dash: tuple[int, ...]
    shape: str


_STYLES = {
    "native": Style("#3d7fbf", (1, 0), "circle"),
    "finetune": Style("#e0662f", (2, 3), "triangle-down"),
    "joint": Style("#2f9e6e", (10, 4), "diamond"),
    "single": Style("#b0559e", (8, 3, 2, 3), "cross"),
}
_FREE_COLOURS = ("#c9a227", "#56b4e9", "#8a8a8a", "#9c6b4a", "#7a6fd0")
_FREE_DASHES = ((5, 2), (4, 4), (7, 2, 1, 2), (3, 1), (12, 2))
_FREE_SHAPES = ("square", "triangle-up", "triangle-right", "triangle-left", "stroke")


def rank(known: Iterable[str], name: str) -> tuple[int, str]:
    """Key to sort names by: the known ones in their order, then the others by name."""
    names = list(known)
    return (names.index(name) if name in names else len(names)), name


def method_title(name: str, changes: Sequence[str] = ()) -> str:
    """A method with the settings that it was changed in: `PaDiM, features=7`."""
    return ", ".join((METHODS.get(name, name), *changes))


def strategy_title(name: str, replay_size: int | None, changes: Sequence[str] = ()) -> str:
    """A strategy with its buffer's images and its changed settings: `replay 300`, `ewc, weight=10`."""
    return ", ".join((name if replay_size is None else f"{name} {replay_size}", *changes))


def method_colours(names: Collection[str]) -> dict[str, str]:
    """The colour `#rrggbb` of each method: the first known ones have their own, others take free ones in turn."""
    own = dict(zip(METHODS, _COLOURS, strict=False))
    colours = {name: own[name] for name in names if name in own}
    free = [colour for colour in _COLOURS if colour not in colours.values()] or _COLOURS
    unknown = sorted(set(names) - set(own))
    return {**colours, **dict(zip(unknown, cycle(free), strict=False))}


def strategy_styles(titles: Iterable[str]) -> dict[str, Style]:
    """The style of each strategy, by its title: a known one has its own, others take free ones in turn.

    The first 25 others differ: their colours, dashes and marks are paired anew every five.
    """
    styles: dict[str, Style] = {}
    others = 0
    for title in titles:
        if title in _STYLES:
            styles[title] = _STYLES[title]
        else:
            turn, place = divmod(others, len(_FREE_COLOURS))
            other = (turn + place) % len(_FREE_COLOURS)
            styles[title] = Style(_FREE_COLOURS[place], _FREE_DASHES[other], _FREE_SHAPES[other])
            others += 1
    return styles
