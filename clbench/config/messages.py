"""What is said of a setting that is wrong."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from typing import Any

from pydantic import BaseModel, ValidationError

from clbench.errors import UserError


class UnknownSetting(UserError):
    """A setting that is not there.

    Args:
        key: its name in full, `method.memorysize`.
        known: names in full that are there, of which the nearest is suggested.
    """

    def __init__(self, key: str, known: Iterable[str]):
        super().__init__(f"there is no setting {key}; {_hint(key, list(known))}")
        self.key = key


def _hint(key: str, known: list[str]) -> str:
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
    """One line for what the schema refused.

    Args:
        values: that were refused.
    """
    first = error.errors()[0]
    path = [str(part) for part in first["loc"]]
    if first["type"] == "extra_forbidden":
        level: Any = values
        for part in path[:-1]:
            level = level[part]
        known = schema.model_fields if len(path) == 1 else level
        return UnknownSetting(
            ".".join(path), [".".join([*path[:-1], key]) for key in known if key != path[-1]]
        )
    keys = ".".join(part for part in path if part.isidentifier() and part not in ("str", "list"))
    if first["type"] == "missing":
        return UserError(f"{keys} has no value: give {keys}=...")
    return UserError(f"{keys}={first['input']}: {reason(first)}")


def reason(error: Mapping[str, Any]) -> str:
    """Pydantic's reason, as the end of a sentence.

    Args:
        error: one of ValidationError.errors().
    """
    message = str(error["msg"]).removeprefix("Value error, ")
    return message[0].lower() + message[1:]
