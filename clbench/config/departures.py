"""In what a run departs from its benchmark, found when the run is made: a later change of conf/ relabels nothing."""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import hydra
from hydra.core.global_hydra import GlobalHydra

from clbench.config.checking import resolved
from clbench.config.classes import class_of
from clbench.config.differences import NOT_IN_RESULTS, flat
from clbench.config.schema import Config

ABSENT = "absent"  # the usual value of a setting that the benchmark does not have


def departures(config: Config, hydra_config: Any) -> dict[str, Any]:
    """The settings in which a run differs from what its benchmark gives the same method, dataset and strategy.

    Args:
        hydra_config: the `hydra` node of the run's composed config. The app that composed it must be running: its
            configs, those of --config-dir too, say what is usual.

    Returns:
        Name in full -> the usual value: ABSENT where the benchmark has no such setting, ??? where it wants one given.
    """
    choices = hydra_config.runtime.choices
    names = {"method": config.method.name, "dataset": config.dataset.name, "strategy": config.strategy.name}
    overrides = (
        *(text for text in hydra_config.overrides.hydra if text.startswith("hydra.searchpath")),
        f"benchmark={choices['benchmark']}",
        *(f"{group}={_choice(group, name, choices)}" for group, name in names.items()),
        f"seed={config.seed}",
    )
    sources = tuple(f"{source.schema}://{source.path}" for source in hydra_config.runtime.config_sources)
    usual = _usual(overrides, sources)
    own = flat({key: value for key, value in config.plain().items() if key not in NOT_IN_RESULTS})
    return {key: usual.get(key, ABSENT) for key, value in own if value != usual.get(key, ABSENT)}


def _choice(group: str, name: str, choices: Mapping[str, str]) -> str:
    """The choice of a group that has a name, else the one that was made: variants have the name of what they vary."""
    there = GlobalHydra.instance().config_loader().get_group_options(group)
    return name if name in there else choices[group]


@lru_cache
def _usual(overrides: tuple[str, ...], sources: tuple[str, ...]) -> dict[str, Any]:
    """What these choices are composed to: name in full -> value.

    Args:
        sources: where the app looks for configs, so that another app's are not mistaken for them.
    """
    usual = dict(flat(resolved(hydra.compose("config", list(overrides)), allow_missing=True)))
    if usual["replay.size"] is None and getattr(class_of(usual["strategy._target_"]), "has_buffer", False):
        usual["replay.size"] = usual.get("method.protocol.replay_size")
    return usual


def read_again() -> None:
    """Forget what choices are composed to: a process that runs a second command may find other configs."""
    _usual.cache_clear()
