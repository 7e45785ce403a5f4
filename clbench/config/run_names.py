"""The name of a run's directory."""

import hashlib
import re
from collections.abc import Iterable

from clbench.config.differences import in_results

_FIRST = ("method", "strategy", "replay", "replay.size", "backbone", "dataset", "task_order", "seed")


def _order(override: str) -> tuple[int, str]:
    """Choices first, as the name may be cut."""
    key = override.partition("=")[0].lstrip("+")
    return (_FIRST.index(key) if key in _FIRST else len(_FIRST)), override.lstrip("+")


def run_name(overrides: Iterable[str]) -> str:
    """The run directory's name: what was overridden, so that the same command finds the same directory.

    Values that cannot stand in a file's name, or are long, are cut and end in a hash of the whole.
    """
    parts = []
    for override in sorted(overrides, key=_order):
        key, _, value = override.partition("=")
        if not in_results(override):
            continue
        readable = re.sub(r"[^\w.+\-]+", "-", value.rstrip("/").rsplit("/", 1)[-1]).strip("-")[:40]
        if readable != value:
            readable += f"~{hashlib.sha256(value.encode()).hexdigest()[:6]}"
        parts.append(f"{key.lstrip('+')}={readable}")
    name = ",".join(parts) or "default"
    return name if len(name) <= 200 else f"{name[:190]}~{hashlib.sha256(name.encode()).hexdigest()[:8]}"
