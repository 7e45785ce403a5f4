"""From config.yaml to the Config of a trained detector, on any machine. Imports no torch until one is asked for."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from clbench.config import classes
from clbench.config.checking import checked_buffer, detector_of, strategy_of
from clbench.config.classes import Argument, check_value
from clbench.config.messages import invalid
from clbench.config.schema import Config
from clbench.errors import UserError
from clbench.paths import PATH, path_mark


def for_use(stored: Mapping[str, Any], gpu: Mapping[str, Any], replace: Mapping[str, str | Path]) -> Config:
    """The config that a trained detector is made from.

    Files that it is made of must be there; what only learning needs, such as a folder of pictures, need not.

    Args:
        stored: what config.yaml holds.
        gpu: settings of the `gpu` group to use in place of the run's.
        replace: flat key of a path -> where it is now.

    Raises:
        UserError: it is no config of this version of clbench, a class cannot be imported, a setting does not suit its
            class, a file is not there, or `replace` names what is no path of the run.
    """
    config = Config.stored(stored)
    try:
        config = config.changed("gpu", **gpu)
    except ValidationError as error:
        plain = config.plain()
        raise invalid(error, {**plain, "gpu": {**plain["gpu"], **gpu}}, Config) from error
    kinds = {
        "method": detector_of(config),
        "backbone": classes.class_of(classes.BACKBONE),
        "strategy": strategy_of(config),
    }
    plain = config.plain()
    for key, path in _known(replace, kinds).items():
        node, name = key.split(".")
        plain[node][name] = str(path)
    config = Config.of(plain)

    def check(key: str, value: Any, argument: Argument) -> Any:
        mark = path_mark(argument.annotation)
        if mark == PATH and key not in replace:
            return value
        try:
            return check_value(key, value, argument)
        except UserError as error:
            if mark is None or key in replace:
                raise
            raise UserError(
                f"{error}; where it lies elsewhere now, say so with --replace {key}=PATH (in Python "
                f"replace={{'{key}': PATH}})"
            ) from error

    for node, kind in kinds.items():
        plain[node] |= classes.check_settings(node, kind, getattr(config, node).settings, check=check)
    return Config.of(plain).changed("replay", **checked_buffer(config))


def _known(replace: Mapping[str, str | Path], kinds: Mapping[str, type]) -> Mapping[str, str | Path]:
    """The replacements, each of a setting of these classes that is a path.

    Args:
        kinds: node of the config -> its class.

    Raises:
        UserError: one is of something else.
    """
    paths = classes.path_settings(kinds)
    for key in replace:
        if key not in paths:
            raise UserError(
                f"--replace {key}: that is no file or folder of this run's detector; there are: {', '.join(paths)}"
            )
    return replace
