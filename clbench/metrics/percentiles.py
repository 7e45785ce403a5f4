"""Percentiles over categories, which stand for these where they are too many to be read. Imports no torch."""

from collections.abc import Iterable, Sequence

import numpy as np

MANY = 60  # categories; of more, tables, figures and Weights & Biases show percentiles
_PICTURED = 12  # of many categories, at most
PERCENTILES = {
    "lowest": 0,
    "10 %": 10,
    "median": 50,
    "90 %": 90,
    "highest": 100,
}  # name -> percent that are lower


def some(names: Sequence[str]) -> list[str]:
    """The names of the categories that pictures are shown of: all, or a few of many, evenly spread."""
    return list(names[:: -(-len(names) // _PICTURED)] if len(names) > MANY else names)


def percentiles(values: Iterable[float | None]) -> dict[str, float | None]:
    """The value of each of `PERCENTILES` among those that are defined, linear in between; None where none is."""
    defined = [value for value in values if value is not None]
    if not defined:
        return dict.fromkeys(PERCENTILES)
    found = np.percentile(defined, list(PERCENTILES.values()))
    return dict(zip(PERCENTILES, found.tolist(), strict=True))
