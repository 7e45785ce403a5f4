"""The classes that a config names: importing them, and checking settings against their constructors.

Imports no torch.
"""

from __future__ import annotations

import difflib
import inspect
import json
import math
import sys
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from importlib import import_module
from importlib.util import find_spec
from pkgutil import iter_modules
from typing import TYPE_CHECKING, Any, Literal, get_type_hints

from pydantic import ConfigDict, PydanticUserError, TypeAdapter, ValidationError

from clbench.config.messages import UnknownSetting, refused, shown
from clbench.errors import UserError, described, first_line
from clbench.paths import path_mark

if TYPE_CHECKING:
    from clbench.config.schema import Config

BACKBONE = "clbench.backbones.Backbone"

# Arguments of constructors that are given when a run is assembled, not by the config.
FROM_THE_RUN: dict[str, tuple[str, ...]] = {
    "method": ("backbone", "seed", "cache"),
    "strategy": ("detector", "seed"),
    "dataset": (),
    "backbone": (),
}
BUFFER = "replay_"  # what names of constructor arguments begin with that are settings of the `replay` group


@dataclass(frozen=True)
class Argument:
    """An argument of a constructor.

    Attributes:
        annotation: its type with what `Annotated` says beside it, such as a range; Any where there is none.
        type: its type alone.
        required: whether it must be given.
        kind: how it may be given, by position or by name.
    """

    annotation: Any
    type: Any
    required: bool
    kind: Any


def class_of(target: str) -> type:
    """The class of a dotted path.

    Raises:
        UserError: it cannot be imported, or is no class.
    """
    try:
        found = _located(target)
    except UserError:
        raise
    except (Exception, SystemExit) as error:  # whatever a user's own file does while it is imported
        script = '; what a script does goes under if __name__ == "__main__"'
        raise UserError(
            f"_target_={target} cannot be imported (importing its module raises {described(error)}): mend the "
            f"module, or install what it imports{script if isinstance(error, SystemExit) else ''}"
        ) from error
    if not isinstance(found, type):
        raise UserError(
            f"_target_={target} cannot be imported as a class, it is a {type(found).__name__}: give MODULE.CLASS"
        )
    return found


def _located(target: str) -> Any:
    """What a dotted path names: a module, or what is in one.

    Raises:
        UserError: it is not there.
        Exception, SystemExit: whatever is raised while its modules are imported.
    """
    first, *parts = target.split(".")
    if not all((first, *parts)):
        raise UserError(f"_target_={target} is no dotted path: give MODULE.CLASS, such as {BACKBONE}")
    if first not in sys.modules and find_spec(first) is None:
        raise UserError(
            f"_target_={target} cannot be imported (there is no module {first}): put the folder that holds {first} "
            "on PYTHONPATH, or pip install its package"
        )
    found, path = import_module(first), first
    for part in parts:
        folders = getattr(found, "__path__", None)  # of a package, whose modules may not be imported yet
        if folders and not hasattr(found, part) and find_spec(f"{path}.{part}"):
            import_module(f"{path}.{part}")
        if not hasattr(found, part):
            names = [*vars(found), *(module.name for module in iter_modules(folders or ()))]
            close = difflib.get_close_matches(part, names, n=1, cutoff=0.5)
            way_out = f"nearest: {close[0]}" if close else f"install the version of {first} that has it"
            raise UserError(f"_target_={target} cannot be imported ({path} has no {part}): {way_out}")
        found, path = getattr(found, part), f"{path}.{part}"
    return found


def class_of_kind(node: str, target: str, kind: type) -> type:
    """The class of a dotted path, which must be a subclass of `kind`.

    Args:
        node: name of the config's node, for errors.
        target: the dotted path.

    Raises:
        UserError: it cannot be imported, or is no such class.
    """
    found = class_of(target)
    if not issubclass(found, kind):
        raise UserError(
            f"{node}._target_={target} is not a {kind.__module__}.{kind.__name__}: give a class that inherits from it"
        )
    return found


@lru_cache
def constructor(target: type) -> dict[str, Argument]:
    """The arguments of a class's constructor: name -> argument.

    A constructor with `**settings` hands them to that of its parent, whose arguments count too.

    Raises:
        UserError: an annotation cannot be read.
    """
    found: dict[str, Argument] = {}
    for parent in target.__mro__[:-1]:
        if "__init__" not in vars(parent):
            continue
        function = vars(parent)["__init__"]
        try:
            hints = get_type_hints(function, include_extras=True)
        except Exception as error:  # an annotation in quotes can be any expression
            raise UserError(
                f"{named(parent)}: an annotation of __init__ cannot be read ({described(error)}): mend it, and import "
                "what it names, outside of TYPE_CHECKING"
            ) from error
        bare = get_type_hints(function)
        parameters = list(inspect.signature(function).parameters.values())[1:]
        for parameter in parameters:
            if parameter.kind not in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL):
                annotation, plain = (known.get(parameter.name, Any) for known in (hints, bare))
                required = parameter.default is inspect.Parameter.empty
                found.setdefault(parameter.name, Argument(annotation, plain, required, parameter.kind))
        if not any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
            break
    return found


def named(kind: type) -> str:
    """The dotted path of a class."""
    return f"{kind.__module__}.{kind.__qualname__}"


def takes(config: Config, node: Literal["method", "strategy", "dataset"], name: str) -> bool:
    """Whether the constructor of a node's class has an argument of this name.

    Raises:
        UserError: the class cannot be imported.
    """
    return name in constructor(class_of(getattr(config, node).target))


def own_arguments(node: str, target: type) -> dict[str, Argument]:
    """The arguments of a class's constructor that the config's node gives: name -> argument.

    Raises:
        UserError: an annotation of the constructor cannot be read.
    """
    return {
        name: argument
        for name, argument in constructor(target).items()
        if name not in FROM_THE_RUN[node] and not (node == "strategy" and name.startswith(BUFFER))
    }


def path_settings(kinds: Mapping[str, type]) -> list[str]:
    """The flat keys of the settings that are paths, see `clbench.paths`.

    Args:
        kinds: node of the config -> its class.

    Raises:
        UserError: an annotation of a constructor cannot be read.
    """
    return [
        f"{node}.{name}"
        for node, kind in kinds.items()
        for name, argument in own_arguments(node, kind).items()
        if path_mark(argument.annotation) is not None
    ]


def buffer_arguments(strategy: type) -> dict[str, Argument]:
    """The arguments of a strategy's constructor that the group `replay` gives: its key there -> argument.

    Raises:
        UserError: an annotation of the constructor cannot be read.
    """
    return {
        name.removeprefix(BUFFER): argument
        for name, argument in constructor(strategy).items()
        if name.startswith(BUFFER)
    }


def check_constructor(node: str, target: type) -> None:
    """Check that a class's constructor can be called as it is when a run is assembled.

    Every argument is given by its name, but for a strategy's detector, which comes first.

    Raises:
        UserError: it cannot.
    """
    known = constructor(target)
    place = f"{node}._target_={named(target)}"
    for name, argument in known.items():
        if argument.kind is inspect.Parameter.POSITIONAL_ONLY and (node, name) != ("strategy", "detector"):
            raise UserError(
                f"{place}: {name} of __init__ is given by its name: take away the / that follows it"
            )
    if node == "strategy":
        needed = ("detector", "seed", *([f"{BUFFER}size"] if getattr(target, "has_buffer", False) else []))
        for name in needed:
            if name not in known or (
                name == "detector" and known[name].kind is inspect.Parameter.KEYWORD_ONLY
            ):
                raise UserError(
                    f"{place}: __init__ takes no {name}, which every run gives: begin it "
                    f"def __init__(self, {', '.join(needed).replace('detector, ', 'detector, *, ')}, ...), and hand "
                    "detector and seed to super().__init__"
                )
        if not getattr(target, "has_buffer", False):
            for name, argument in buffer_arguments(target).items():
                if argument.required:
                    raise UserError(
                        f"{place}: __init__ asks for {BUFFER}{name}: say has_buffer = True in the class, or give "
                        "the argument a default"
                    )


def check_settings(
    node: str,
    target: type,
    settings: Mapping[str, Any],
    known_beside: Collection[str] = (),
    check: Callable[[str, Any, Argument], Any] | None = None,
) -> dict[str, Any]:
    """Check a node's settings against the constructor of the class that they are for.

    Args:
        node: its name, for errors.
        target: the class.
        settings: name -> value.
        known_beside: keys of the node that are not for the constructor, to suggest where a name is unknown.
        check: checks one value; None for `check_value`.

    Returns:
        The settings, with paths made absolute.

    Raises:
        UserError: an unknown name, a value of the wrong type or out of range, or one that is missing.
    """
    known = own_arguments(node, target)
    checked = {}
    for name, value in settings.items():
        if name not in known:
            raise UnknownSetting(f"{node}.{name}", [f"{node}.{key}" for key in (*known, *known_beside)])
        checked[name] = (check or check_value)(f"{node}.{name}", value, known[name])
    for name, argument in known.items():
        if argument.required and name not in settings:
            raise UserError(f"{node}.{name} has no value: give {node}.{name}=...")
    return checked


def check_value(key: str, value: Any, argument: Argument) -> Any:
    """Check a value against the annotation of the argument that it is for.

    Returns:
        The value; made absolute where it is a path, see `clbench.paths`.

    Raises:
        UserError: it is of the wrong type, out of range, or no finite number; or pydantic knows no such type.
    """
    if isinstance(value, float) and not math.isfinite(value):
        raise UserError(f"{key}={value}: give a finite number")
    try:
        checked = _as_annotated(value, argument.annotation)
    except ValidationError as error:
        raise refused(key, value, error) from error
    except Exception as error:  # the annotation's own, which a user's class may bring along
        raise UserError(
            f"{key}={shown(value)} cannot be held against its annotation {argument.annotation} "
            f"({first_line(error)}): mend the annotation"
        ) from error
    if path_mark(argument.annotation) is None:
        return value
    return _adapter(argument.annotation).dump_python(checked, mode="json")


def arguments(target: type, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings as a class's constructor takes them: a list as a tuple, a text as a Path, where annotated so.

    Args:
        target: the class.
        settings: name of the argument -> plain value, which was checked when the run was composed. It is not checked
            again: a folder that was there then need not be where a run is loaded.
    """
    known = constructor(target)
    return {
        name: _of_type(value, known[name]) if name in known else value for name, value in settings.items()
    }


def _of_type(value: Any, argument: Argument) -> Any:
    """A plain value as what its argument's annotation says; by its type alone where the value does not pass now."""
    for annotation in (argument.annotation, argument.type):
        with suppress(ValidationError):
            found = _as_annotated(value, annotation)
            # What Iterable[...] gives would be used up by one loop.
            return value if isinstance(found, Iterator) else found
    return value


def _as_annotated(value: Any, annotation: Any) -> Any:
    """A plain value as an annotation says, by the rules for JSON: no text for a number, but a list for a tuple.

    Raises:
        pydantic.ValidationError: it is of another type or out of range.
        Exception: there are no rules for the annotation.
    """
    return _adapter(annotation).validate_json(json.dumps(value), strict=True)


def _adapter(annotation: Any) -> TypeAdapter:
    """What holds values against an annotation.

    Raises:
        Exception: there are no rules for the annotation.
    """
    try:
        return TypeAdapter(annotation, config=ConfigDict(arbitrary_types_allowed=True))
    except PydanticUserError as error:
        if error.code != "type-adapter-config-unused":  # of a class that has a config of its own
            raise
        return TypeAdapter(annotation)
