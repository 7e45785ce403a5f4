"""Paths that a person gives: `~` and environment variables in them, and the types of settings that are paths.

Imports no torch.
"""

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, get_args

from pydantic import AfterValidator

from clbench.errors import UserError

_VARIABLE = re.compile(r"\$(?:([A-Za-z_]\w*)|\{([A-Za-z_]\w*)\})", re.ASCII)


def expanded(given: str | Path, setting: str | None = None) -> Path:
    """The path that a person means, with `~`, `~user`, `$NAME` and `${NAME}` replaced.

    A file or folder that really is called `$NAME`, or `~name` where there is no such user, is meant as it is written.

    Args:
        setting: name of the setting that the path is the value of, for the error; None for a word of a command.

    Raises:
        UserError: a variable is not set, or there is no such user, or no home folder.
    """
    try:
        return _expanded(str(given))
    except ValueError as error:
        raise UserError(f"{'' if setting is None else f'{setting}='}{given}: {error}") from error


def absolute(given: str | Path, setting: str | None = None) -> str:
    """The absolute path that a person means, from the folder of this process on; see `expanded`.

    Raises:
        UserError: as `expanded`.
    """
    return absolute_of(expanded(given, setting))


def absolute_of(path: Path) -> str:
    """The absolute path, without `..` where that leads to the same place: it does not where a link is left by it."""
    whole = str(path.absolute())
    plain = os.path.normpath(whole)
    return plain if os.path.realpath(plain) == os.path.realpath(whole) else whole


def _expanded(text: str) -> Path:
    """As `expanded`.

    Raises:
        ValueError: as it raises a UserError; the message is the end of a sentence on the path.
    """
    home = text == "~" or text.startswith("~/")
    if "$" in text and not text.startswith("~") and os.path.lexists(text):  # as what was expanded before
        return Path(text).absolute()
    try:
        return Path(_with_home(_VARIABLE.sub(_value, text)))
    except ValueError:
        if os.path.lexists(text) and not home:
            return Path(text).absolute()  # so that nobody takes its first letter for a home folder's again
        raise


def _value(variable: re.Match[str]) -> str:
    name = variable[1] or variable[2]
    if not os.environ.get(name):
        raise ValueError(f"the environment variable {name} is not set: set it, or give the path without it")
    return os.environ[name]


def _with_home(text: str) -> str:
    user = text[1:].partition("/")[0]
    whole = os.path.expanduser(text)
    if text.startswith("~") and not user and (whole == text or os.environ.get("HOME") == ""):
        raise ValueError("there is no home folder here (HOME is not set): give a path without ~")
    if text.startswith("~") and whole == text:
        raise ValueError(f"there is no user '{user}' here: give a path without ~")
    return whole


@dataclass(frozen=True)
class PathMark:
    """Marks, within an annotation, that a setting is a path: it is kept absolute, and can be replaced.

    Attributes:
        for_use: whether a trained detector needs what is there, and not only learning.
    """

    for_use: bool


PATH, PATH_FOR_USE = PathMark(False), PathMark(True)


def path_mark(annotation: Any) -> PathMark | None:
    """The mark of an annotation, or of a part of it such as `File` in `File | None`; None where it is of no path."""
    marks = [part for part in getattr(annotation, "__metadata__", ()) if isinstance(part, PathMark)]
    marks += [mark for part in get_args(annotation) if (mark := path_mark(part)) is not None]
    return max(marks, key=lambda mark: mark.for_use, default=None)


def absolute_path(text: str) -> str:
    """The absolute path, for annotations of settings.

    Raises:
        ValueError: as `expanded` raises a UserError.
    """
    if not text:
        raise ValueError("it is empty: give a path")
    return absolute_of(_expanded(text))


def _file(path: str) -> str:
    if not Path(path).is_file():
        raise ValueError("there is no such file: give one")
    return path


# Types of settings, by which a config's paths are known; there are `clbench.backbones.Weights` and
# `clbench.data.pictures.Folder` beside them.
Place = Annotated[str, AfterValidator(absolute_path), PATH]  # need not be there when the config is checked
File = Annotated[
    str, AfterValidator(absolute_path), AfterValidator(_file), PATH_FOR_USE
]  # must be, also when the trained detector is used
