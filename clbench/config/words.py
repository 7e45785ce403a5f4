"""Words of the command line, as Hydra's grammar takes them. Imports no torch."""

import re
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException

# What is quoted already, or a part of a list or of a value that holds a ~.
_PART = re.compile(r"""('[^']*'|"[^"]*")|([^,\[\](){}'":\s]*~[^,\[\](){}'"\s]*)""")

_A_RUN = "task_order.run"  # the setting that is a run's directory


def readable(override: str) -> str:
    """An override with its paths in quotes where they hold signs that Hydra's grammar lacks.

    `dataset.root=~/a,~/b` becomes `dataset.root='~/a','~/b'`, and the name of a run's directory, which holds `=` and
    commas, is quoted as a whole. What can be read, or cannot be even so, stays as it is.
    """
    key, equals, value = override.partition("=")
    if _parses(override):
        return override
    if key == _A_RUN and not re.search("['\"]", value):
        quoted = f"{key}='{value}'"
    else:
        quoted = key + equals + _PART.sub(lambda part: part[1] or f"'{part[2]}'", value)
    return quoted if _parses(quoted) else override


def written(value: Any) -> str:
    """A setting's value as an override has it, so that it is read as the same: null, true, 1e-05, [a,'b c'], text."""
    if isinstance(value, list):
        return f"[{','.join(map(written, value))}]"
    if isinstance(value, dict):
        return f"{{{','.join(f'{key}:{written(each)}' for key, each in value.items())}}}"
    if not isinstance(value, str):
        return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
    if re.fullmatch(r"[\w./:@%+\-]+", value) and _read(value) == value:
        return value
    quoted = re.sub(r"(\\*)('|$)", lambda part: part[1] * 2 + ("\\'" if part[2] else ""), value)
    return f"'{quoted}'"


def _read(text: str) -> Any:
    """What a value is read as; None where it cannot be."""
    try:
        return OverridesParser.create().parse_override(f"key={text}").value()
    except HydraException:
        return None


def _parses(override: str) -> bool:
    try:
        OverridesParser.create().parse_override(override)
    except HydraException:
        return False
    return True
