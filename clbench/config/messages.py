"""Messages for settings that are wrong."""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from omegaconf.errors import OmegaConfBaseException
from pydantic import BaseModel, ValidationError

from clbench.config.schema import GONE, Stream
from clbench.errors import UserError, described


class UnknownSetting(UserError):
    """A setting that does not exist.

    Args:
        key: its flat key, such as `method.memorysize`.
        known: flat keys that exist; the nearest of them is suggested.
    """

    def __init__(self, key: str, known: Iterable[str]):
        gone = GONE.get(key)
        super().__init__(
            f"there is no setting {key} any more: {gone}"
            if gone
            else f"there is no setting {key}; {_hint(key, list(known))}"
        )
        self.key = key


def _hint(key: str, known: list[str]) -> str:
    """The end of a message on an unknown key: what it belongs to, the nearest key that exists, or else all of them."""
    group, _, name = key.partition(".")
    if group == "stream" and name in Stream.model_fields:
        return "it belongs to streams without tasks: take stream=blurred"
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
    if first["type"] == "missing":
        key = ".".join(path)
        return UserError(f"{key} has no value: give {key}=...")
    return _refused(values, error.errors())


def refused(key: str, value: Any, error: ValidationError) -> UserError:
    """The error to show for the value of a setting that an annotation refused, in one line."""
    found = [{**one, "loc": (key, *one["loc"])} for one in error.errors()]
    return _refused({key: value}, found)


def _refused(values: Mapping[str, Any], errors: Sequence[Mapping[str, Any]]) -> UserError:
    """The error for the first setting that was refused, with all reasons where a union of types refused it.

    Of a list's entries and of the list itself, what is wrong with the entries is the reason.
    """
    path, value = _setting(errors[0]["loc"], values)
    key = ".".join(path)
    found = [error for error in errors if _setting(error["loc"], values)[0] == path]
    depth = max(_indices(error) for error in found)
    found = [error for error in found if _indices(error) == depth]
    reasons = list(dict.fromkeys(reason(error) for error in found))
    said = ", or ".join([reasons[0], *(text.removeprefix("input should be ") for text in reasons[1:])])
    entry = f"{shown(found[0]['input'])} in it: " if depth and isinstance(value, list) else ""
    text = any(error["type"] == "string_type" for error in found)
    if text and not isinstance(found[0]["input"], str | list | dict):
        quoted = f"'{shown(value)}'" if isinstance(value, int) else "[a,'...']" if entry else "'...'"
        said += f'; what reads as a number, a bool or null is quoted, for the shell too: {key}="{quoted}"'
    return UserError(f"{key}={shown(value)}: {entry}{said}")


def _setting(location: Sequence[Any], values: Mapping[str, Any]) -> tuple[list[str], Any]:
    """The names of a setting and of the nodes that it is in, and its value.

    Args:
        location: pydantic's, which goes on into lists and names the types of a union.
    """
    path: list[str] = []
    value: Any = values
    for name in location:
        if not isinstance(value, Mapping) or name not in value:
            break
        path.append(str(name))
        value = value[name]
    return path, value


def _indices(error: Mapping[str, Any]) -> int:
    """How many lists an error lies within."""
    return sum(isinstance(name, int) for name in error["loc"])


def shown(value: Any) -> str:
    """A value as a command line has it: null, true, [a, b]."""
    if isinstance(value, list):
        return f"[{', '.join(map(shown, value))}]"
    if isinstance(value, bool):
        return str(value).lower()
    return "null" if value is None else str(value)


def unresolved(error: OmegaConfBaseException, choices: Mapping[str, str]) -> UserError:
    """The error for a config in which a value cannot be resolved, in one line.

    Args:
        choices: group -> its choice.
    """
    missing = re.search(r"Interpolation key '(.*?)' not found", str(error))
    if missing is None:
        return UserError(f"{error.full_key}: {hydra_says(error)}" if error.full_key else hydra_says(error))
    key = missing[1]
    group = key.partition(".")[0]
    way_out = "give another value"
    if group in choices:
        way_out = f"the file of {group}={choices[group]} must have it"
    elif key in os.environ:
        way_out = f"the environment variable is written ${key} or ${{oc.env:{key}}}"
    return UserError(f"there is no setting {key}, which {error.full_key} refers to: {way_out}")


def hydra_says(error: BaseException) -> str:
    """All that Hydra says of an error and of its cause, in one line, without what it says of its own objects."""
    lines = [line.strip() for line in f"{error}\n{error.__cause__ or ''}".splitlines()]
    own = r"full_key\b|object_type\b|reference_type\b|To append"
    said = [line for line in dict.fromkeys(lines) if line and not re.match(own, line)]
    text = " ".join(line if line[-1] in ".:,;" else f"{line};" for line in said)
    return text.rstrip(";.:") or described(error)


def reason(error: Mapping[str, Any]) -> str:
    """Why pydantic refused a value, as the end of a sentence.

    Args:
        error: one of `ValidationError.errors()`.
    """
    if error["type"] == "needs_python_object":
        return "a config cannot hold what its annotation asks for; leave it out"
    message = str(error["msg"]).removeprefix("Value error, ").replace("valid array", "valid list")
    return message[0].lower() + message[1:]
