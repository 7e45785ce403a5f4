"""Messages for command lines that Hydra refuses: one line, with the nearest name that exists."""

from __future__ import annotations

import difflib
import re
import traceback
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from typing import Any

import hydra
import yaml
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException, SearchPathException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from clbench.config.messages import UnknownSetting, hydra_says, unresolved
from clbench.config.sources import composing, file_with, search_path
from clbench.errors import UserError, in_one_line

# Nodes in which Hydra accepts any setting; those that do not exist are found when a run is checked.
OPEN = ("method.", "strategy.", "replay.", "dataset.", "backbone.", "task_order.")
_CONFIG_ERRORS = (HydraException, OmegaConfBaseException, yaml.YAMLError)  # what composing raises


def explain(error: Exception, overrides: Sequence[str], config_dir: str | None = None) -> UserError | None:
    """The error to show for what was raised while configs were composed, in one line; None where it is a bug.

    Args:
        error: what Hydra raised.
        overrides: of the command line.
        config_dir: a user's own folder of configs, as --config-dir names it.
    """
    if said := in_one_line(error):  # by what Hydra makes, such as the sweeper, of which it says no more
        return UserError(said)
    if isinstance(error, SearchPathException):
        return UserError(f"--config-dir={config_dir} is no folder: give the one that holds your configs")
    if isinstance(error, UnicodeDecodeError):
        file = file_with(error.object, config_dir)
        return (
            UserError(f"a config cannot be read: {file} is not in UTF-8; save it as that") if file else None
        )
    if isinstance(error, yaml.YAMLError):  # most likely in the user's own conf/local.yaml
        return UserError(f"a config cannot be read: {' '.join(str(error).split())}")
    if isinstance(error, OmegaConfBaseException):
        return unresolved(error, {})
    if not isinstance(error, HydraException) and not _raised_by_hydra(error):
        return None
    try:
        with composing():
            groups = _choices(search_path(config_dir))
            for override in overrides:
                if wrong := _wrong_choice(override, groups):
                    return wrong
            chosen = [f"{key}={value}" for key, value in _first_choices(overrides, groups)]
            composed = hydra.compose("config", [*search_path(config_dir), *chosen], return_hydra_config=True)
    except (*_CONFIG_ERRORS, UnicodeDecodeError):  # a config itself is wrong, and the first error says how
        return UserError(hydra_says(error))
    keys = [*_keys(OmegaConf.to_container(composed, resolve=False)), *groups]
    for override in overrides:
        wrong = _wrong_setting(override, keys)
        if isinstance(wrong, UnknownSetting):
            return setting_of_other_choices(wrong, groups.__getitem__, _launcher_settings)
        if wrong:
            return wrong
    return UserError(hydra_says(error))


def _launcher_settings(group: str, choice: str) -> set[str]:
    """The names of a launcher's settings.

    Args:
        group: hydra/launcher, the one group whose settings Hydra checks itself.

    Raises:
        HydraException: it cannot be composed.
    """
    with composing():
        composed = hydra.compose("config", [f"{group}={choice}"], return_hydra_config=True)
    return set(map(str, composed.hydra.launcher))


def _raised_by_hydra(error: Exception) -> bool:
    """Whether an exception is a ValueError with which Hydra itself refuses something, such as replay=100."""
    frames = list(traceback.walk_tb(error.__traceback__))
    return isinstance(error, ValueError) and frames[-1][0].f_globals["__name__"].startswith("hydra.")


def setting_of_other_choices(
    error: UnknownSetting,
    choices_of: Callable[[str], Iterable[str]],
    settings_of: Callable[[str, str], set[str]],
) -> UserError:
    """The error for an unknown setting, which names the choices of its group that have it, if some have.

    Args:
        error: what was raised for the setting.
        choices_of: group -> its choices.
        settings_of: group and choice -> the names of its settings; a strategy's have those of its buffer among
            them, as `replay.size`.
    """
    node = next((node for node in (*OPEN, "hydra.launcher.") if error.key.startswith(node)), None)
    if node is None:
        return error
    group, name = node[:-1].replace(".", "/"), error.key.removeprefix(node)
    if group == "replay":  # whose settings are those of the strategy's buffer
        group, name = "strategy", error.key
    having = []
    for choice in choices_of(group):
        with suppress(Exception):  # a choice that is broken in any way is not what was asked for
            if name in settings_of(group, choice):
                having.append(choice)
    if not having:
        return error
    return UserError(f"{error.key} is a setting of {', '.join(having)}: give {group}={having[0]} too")


def _choices(search: list[str]) -> dict[str, list[str]]:
    """The choices of every group of configs; Hydra must be initialized."""
    loader = GlobalHydra.instance().config_loader()
    names = [name for name in loader.list_groups("") if name != "hydra"] + ["hydra/launcher"]
    return {name: loader.get_group_options(name, config_name="config", overrides=search) for name in names}


def _first_choices(overrides: Sequence[str], groups: dict[str, list[str]]) -> list[tuple[str, str]]:
    """The groups that are chosen, each with its first choice."""
    pairs = [override.partition("=")[::2] for override in overrides]
    return [(key, values.split(",")[0]) for key, values in pairs if key in groups and values]


def _wrong_choice(override: str, groups: dict[str, list[str]]) -> UserError | None:
    """The error for an override that asks for a choice that does not exist; None where it does not."""
    key, given, values = override.partition("=")
    for value in values.split(",") if key in groups and given else []:
        if value not in groups[key]:
            nearest = difflib.get_close_matches(value, groups[key], n=1, cutoff=0.5)
            hint = f"nearest: {nearest[0]}; " if nearest else ""
            return UserError(f"{key}={value} does not exist; {hint}there are: {', '.join(groups[key])}")
    return None


def _wrong_setting(override: str, keys: Sequence[str]) -> UserError | None:
    """The error for an override whose setting does not exist, or whose syntax is wrong; else None."""
    key = re.split("[=@]", override, maxsplit=1)[0].lstrip("+~")
    if key not in keys and not key.startswith(OPEN):
        return UnknownSetting(key, keys)
    if override.startswith("~"):
        return UserError(f"{override} cannot be taken away: give {key}=... another value, null for none")
    if override.startswith("+") and not override.startswith("++"):
        return UserError(f"{override}: {key} is there already; write {override.lstrip('+')}")
    if "=" not in override:
        return UserError(f"{override} has no value: write {override}=...")
    try:
        OverridesParser.create().parse_override(override)
    except HydraException:
        return UserError(
            f"{override.lstrip('+')} cannot be read: a list is {key}=a,b or {key}=[a,b], and what holds other "
            f"signs is quoted for the shell too: '{key}=\"...\"'"
        )
    return None


def _keys(node: Any, prefix: str = "") -> list[str]:
    """The flat keys of a config's settings and nodes, each beginning with `prefix`."""
    names: list[str] = []
    for key, value in node.items() if isinstance(node, dict) else ():
        names += [f"{prefix}{key}", *_keys(value, f"{prefix}{key}.")]
    return names
