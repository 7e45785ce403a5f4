"""Words of the command line, as Hydra's grammar takes them. Imports no torch."""

import re

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


def _parses(override: str) -> bool:
    try:
        OverridesParser.create().parse_override(override)
    except HydraException:
        return False
    return True
