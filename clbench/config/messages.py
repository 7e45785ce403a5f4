"""Messages for settings that are wrong."""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Iterable, Mapping
from typing import Any

from omegaconf.errors import InterpolationKeyError
from pydantic import BaseModel, ValidationError

from clbench.errors import UserError, first_line


class UnknownSetting(UserError):
    """A setting that does not exist.

    Args:
        key: its flat key, such as `method.memorysize`.
        known: flat keys that exist; the nearest of them is suggested.
    """

    def __init__(self, key: str, known: Iterable[str]):
        super().__init__(f"there is no setting {key}; {_hint(key, list(known))}")
        self.key = key


def _hint(key: str, known: list[str]) -> str:
    """The end of a message on an unknown key: the nearest key that exists, or else all of them."""
    close = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
    if close:
        return f"nearest: {close[0]}"
    first = sorted({name for name in known if "." not in name})
    if first:
        return f"there are: {', '.join(first)}, and what is in them"
    return (
        f"there are: {', '.join(sorted(known))}"
        if known
        else f"{key.partition('.')[0]} has none of its own here"
    )


def invalid(error: ValidationError, values: Mapping[str, Any], schema: type[BaseModel]) -> UserError:
    """The error to show for values that the schema refused, in one line.

    Args:
        error: what pydantic raised.
        values: the values that were refused.
        schema: the schema that refused them.
    """
    first = error.errors()[0]
    path = [str(name) for name in first["loc"]]
    if first["type"] == "extra_forbidden":
        level: Any = values
        for name in path[:-1]:
            level = level[name]
        known = schema.model_fields if len(path) == 1 else level
        beside = [".".join([*path[:-1], name]) for name in known if name != path[-1]]
        return UnknownSetting(".".join(path), beside)
    # A type within a union, such as `str`, and an index of a list are in the path too.
    key = ".".join(name for name in path if name.isidentifier() and name not in ("str", "list"))
    if first["type"] == "missing":
        return UserError(f"{key} has no value: give {key}=...")
    return UserError(f"{key}={first['input']}: {reason(first)}")


def no_such_key(error: InterpolationKeyError) -> str:
    """The message for `${NAME}` in a config where there is no such setting."""
    name = re.match(r"Interpolation key '(\w+)'", str(error))
    if name and name[1] in os.environ:
        return (
            f"{first_line(error)}: ${{{name[1]}}} refers to a setting; the environment variable is written "
            f"${name[1]} or ${{oc.env:{name[1]}}}"
        )
    return f"{first_line(error)}: others refer to it, so that it cannot be taken away or left out"


def reason(error: Mapping[str, Any]) -> str:
    """Why pydantic refused a value, as the end of a sentence.

    Args:
        error: one of `ValidationError.errors()`.
    """
    message = str(error["msg"]).removeprefix("Value error, ")
    return message[0].lower() + message[1:]
