"""The classes that a config names: importing them, and checking settings against their constructors.

Imports no torch.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Any, Literal, get_type_hints

from pydantic import TypeAdapter, ValidationError

from clbench.config.messages import UnknownSetting, reason
from clbench.errors import UserError
from clbench.paths import path_mark

if TYPE_CHECKING:
    from clbench.config.schema import Config

BACKBONE = "clbench.backbones.Backbone"

# Arguments of constructors that are given when a run is assembled, not by the config.
FROM_THE_RUN: dict[str, tuple[str, ...]] = {
    "method": ("backbone", "seed", "cache"),
    "strategy": ("detector", "seed"),
    "dataset": (),
    "backbone": ("precision", "compile"),
}
BUFFER = "replay_"  # what names of constructor arguments begin with that are settings of the `replay` group


@dataclass(frozen=True)
class Argument:
    """An argument of a constructor: its annotation, and whether it must be given."""

    annotation: Any
    required: bool


def class_of(target: str) -> type:
    """The class of a dotted path.

    Raises:
        UserError: it cannot be imported, or is no class.
    """
    try:
        found = _located(target)
        if not isinstance(found, type):
            raise TypeError("it is no class")
        return found
    except Exception as error:  # also whatever a user's own file raises while it is imported
        message = " ".join(str(error).split()) or type(error).__name__
        package = target.partition(".")[0]
        way_out = f"put the folder that holds {package} on PYTHONPATH, or pip install its package"
        if isinstance(error, AttributeError | TypeError):  # the module is there
            way_out = f"name a class that is there, or install the version of {package} that has it"
        raise UserError(f"_target_={target} cannot be imported ({message}): {way_out}") from error


def _located(target: str) -> Any:
    """What a dotted path names: something of a module, or within a class there.

    Hydra's own function for it logs errors, line by line, beside raising them.

    Raises:
        Exception: it is not there, or whatever its module raises while it is imported.
    """
    module, _, name = target.rpartition(".")
    names = [name]
    while True:
        try:
            found: Any = import_module(module)
            break
        except ModuleNotFoundError as error:
            above, _, name = module.rpartition(".")
            if not above or not f"{module}.".startswith(
                f"{error.name}."
            ):  # the latter: what it imports is missing
                raise
            module, names = above, [name, *names]
    for name in names:
        found = getattr(found, name)
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


def constructor(target: type) -> dict[str, Argument]:
    """The arguments of a class's constructor: name -> argument.

    A constructor with `**settings` hands them to that of its parent, whose arguments count too.

    Raises:
        UserError: an annotation names something that is not there.
    """
    found: dict[str, Argument] = {}
    for parent in target.__mro__[:-1]:
        if "__init__" not in vars(parent):
            continue
        function = vars(parent)["__init__"]
        try:
            hints = get_type_hints(function, include_extras=True)
        except NameError as error:
            raise UserError(
                f"{parent.__module__}.{parent.__qualname__}: an annotation of __init__ cannot be read ({error}): "
                "import what it names, outside of TYPE_CHECKING"
            ) from error
        parameters = list(inspect.signature(function).parameters.values())[1:]
        for parameter in parameters:
            if parameter.kind not in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL):
                argument = Argument(
                    hints.get(parameter.name, Any), parameter.default is inspect.Parameter.empty
                )
                found.setdefault(parameter.name, argument)
        if not any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
            break
    return found


def takes(config: Config, node: Literal["method", "strategy", "dataset"], name: str) -> bool:
    """Whether the constructor of a node's class has an argument of this name.

    Raises:
        UserError: the class cannot be imported.
    """
    return name in constructor(class_of(getattr(config, node).target))


def own_arguments(node: str, target: type) -> dict[str, Argument]:
    """The arguments of a class's constructor that the config's node gives: name -> argument.

    Raises:
        UserError: an annotation of the constructor names something that is not there.
    """
    return {
        name: argument
        for name, argument in constructor(target).items()
        if name not in FROM_THE_RUN[node] and not (node == "strategy" and name.startswith(BUFFER))
    }


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
        UserError: it is of the wrong type, out of range, or no finite number.
    """
    try:
        checked = TypeAdapter(argument.annotation).validate_python(value, strict=True)
    except ValidationError as error:
        raise UserError(f"{key}={value}: {reason(error.errors()[0])}") from error
    if isinstance(value, float) and not math.isfinite(value):
        raise UserError(f"{key}={value}: give a finite number")
    return value if path_mark(argument.annotation) is None else checked
