"""The settings in which a run departs from its benchmark.

They are stored with the run, as conf/ may change later.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import hydra
from hydra.core.global_hydra import GlobalHydra

from clbench.config.checking import buffer_size, resolved
from clbench.config.differences import NOT_IN_RESULTS, flat, same
from clbench.config.schema import Config
from clbench.config.sources import USUAL

ABSENT = "absent"  # the usual value of a setting that the benchmark does not have


def departures(config: Config, hydra_config: Any) -> dict[str, Any]:
    """The settings in which a run differs from what its benchmark gives the same method, dataset and strategy.

    Args:
        config: the run's.
        hydra_config: the `hydra` node of the run's composed config. The Hydra app that composed it must be
            running, as its configs are read again, those of --config-dir too.

    Returns:
        Flat key -> the benchmark's value: `ABSENT` where it has no such setting, ??? where one must be given.

    Raises:
        UserError: the benchmark's own settings cannot be resolved.
    """
    choices = hydra_config.runtime.choices
    names = {"method": config.method.name, "dataset": config.dataset.name, "strategy": config.strategy.name}
    overrides = (
        *(text for text in hydra_config.overrides.hydra if text.startswith("hydra.searchpath")),
        f"benchmark={choices['benchmark']}",
        *(f"{group}={_choice_named(group, name, choices)}" for group, name in names.items()),
        f"seed={config.seed}",
    )
    sources = tuple(f"{source.schema}://{source.path}" for source in hydra_config.runtime.config_sources)
    usual = _usual(overrides, sources)
    given = flat({key: value for key, value in config.plain().items() if key not in NOT_IN_RESULTS})
    return {
        key: usual.get(key, ABSENT)
        for key, value in given
        if key != "metrics.further" and not same(usual.get(key, ABSENT), value)  # more of them change none
    }


def _choice_named(group: str, name: str, choices: Mapping[str, str]) -> str:
    """The choice of a group that is called `name`; where there is none, the one that the run made.

    A file of conf/ may vary another, and has its `name`: the other one is what is usual then.
    """
    available = GlobalHydra.instance().config_loader().get_group_options(group)
    return name if name in available else choices[group]


@lru_cache
def _usual(overrides: tuple[str, ...], sources: tuple[str, ...]) -> dict[str, Any]:
    """What overrides compose to, without local.yaml: flat key -> value.

    Args:
        sources: where Hydra looks for configs; only a part of the key under which the result is remembered.
    """
    usual = dict(flat(resolved(hydra.compose(USUAL, list(overrides)), allow_missing=True)))
    protocol = usual.get("method.protocol.replay_size")
    usual["replay.size"] = buffer_size(usual["replay.size"], protocol, usual["strategy._target_"])
    return usual


def read_again() -> None:
    """Forget what was composed: a process that runs a second command may find other configs."""
    _usual.cache_clear()
