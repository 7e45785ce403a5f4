"""The name of a run's directory."""

import re
from collections.abc import Iterable

from clbench import digests
from clbench.config.differences import in_results

_LONGEST = 200  # bytes; file systems take 255, and files are written beside under longer names
_NO_MORE = "metrics.further=[]"  # what conf/ gives, unless a choice in it gives more
_FIRST = (
    "method",
    "strategy",
    "replay",
    "replay.size",
    "replay.budget_mb",
    "replay.storage",
    "backbone",
    "dataset",
    "task_order",
    "seed",
)


def _order(override: str) -> tuple[int, str]:
    """What overrides are sorted by: choices come first, as the name may be cut at its end."""
    key = override.partition("=")[0].lstrip("+")
    return (_FIRST.index(key) if key in _FIRST else len(_FIRST)), override.lstrip("+")


def run_name(overrides: Iterable[str]) -> str:
    """The name of a run's directory, made of its overrides: the same command finds the same directory.

    Overrides that change no results are left out, and so is one that asks for no further metrics where none are chosen. A
    value that is long, or cannot stand in a file name, is shortened and ends in a hash of the whole.
    """
    words = []
    given = sorted(overrides, key=_order)
    may_have_more = any(override.lstrip("+").startswith(("metrics=", "benchmark=")) for override in given)
    for override in given:
        key, _, value = override.partition("=")
        if not in_results(override) or (override == _NO_MORE and not may_have_more):
            continue
        readable = re.sub(r"[^\w.+\-]+", "-", value.rstrip("/").rsplit("/", 1)[-1]).strip("-")[:40]
        if readable != value:
            readable += f"~{digests.of_text(value)[:6]}"
        words.append(f"{key.lstrip('+')}={readable}")
    name = ",".join(words) or "default"
    if len(name.encode(errors="surrogateescape")) <= _LONGEST:
        return name
    begin = name.encode(errors="surrogateescape")[: _LONGEST - 10].decode(errors="ignore")
    return f"{begin}~{digests.of_text(name)[:8]}"
