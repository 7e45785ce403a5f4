"""What run directories of earlier versions do not store: a strategy's flags, and a run's departures."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

from clbench.config import flat
from clbench.errors import UserError


@lru_cache
def imported_strategy(target: str) -> Any:
    """The class that `strategy._target_` of a config names, to read a strategy's flags from.

    Returns:
        The class; the base class, which is a continual strategy, where it cannot be imported or is no
        strategy.
    """
    from clbench.strategies.base import Strategy  # imports torch, which a report needs for nothing else

    module, _, name = target.rpartition(".")
    try:
        found = getattr(importlib.import_module(module), name)
    except Exception:  # noqa: BLE001  # whatever a user's module does, the report of other runs goes on
        return Strategy
    return found if isinstance(found, type) and issubclass(found, Strategy) else Strategy


def composed_departures(config: Mapping[str, Any]) -> dict[str, Any] | None:
    """What later versions store under `departures` in config.yaml, found by composing conf/ as it is now.

    Args:
        config: what config.yaml holds.

    Returns:
        Flat key -> what the benchmark gives the method there, `absent` where it has no such key; None where conf/ has
        no such benchmark, method or dataset.
    """
    usual = _usual(str(config["benchmark"]), str(config["method"]["name"]), str(config["dataset"]["name"]))
    if usual is None:
        return None
    values = _with_seeds_named(dict(flat(config)))
    return {
        key: usual.get(key, "absent") for key, value in values.items() if value != usual.get(key, "absent")
    }


def _with_seeds_named(values: Mapping[str, Any]) -> dict[str, Any]:
    """Flat settings, with a word in place of each part's seed that is the run's seed."""
    return {
        key: "the run's" if key.endswith(".seed") and value == values["seed"] else value
        for key, value in values.items()
    }


@lru_cache
def _usual(benchmark: str, method: str, dataset: str) -> dict[str, Any] | None:
    """What conf/ composes for a benchmark, method and dataset: flat key -> value; None where it cannot."""
    from hydra.errors import HydraException

    from clbench.config import sources
    from clbench.config.checking import resolved

    choices = f"benchmark={benchmark}", f"method={method}", f"dataset={dataset}"
    try:
        plain = resolved(sources.composed(*choices, local=False), allow_missing=True)
    except (HydraException, UserError):
        return None
    return _with_seeds_named(dict(flat(plain)))
