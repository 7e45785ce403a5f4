"""The settings of a run: their schema, their checks, and the messages for settings that make no sense.

Imports no torch.
"""

from clbench.config.checking import check, check_sweep
from clbench.config.classes import class_of, takes
from clbench.config.departures import departures
from clbench.config.differences import NOT_IN_RESULTS, differences, flat, in_results
from clbench.config.resolvers import register
from clbench.config.run_names import run_name
from clbench.config.schema import Config
from clbench.config.sources import composed, composing
from clbench.config.wandb_access import wandb_key, wandb_mode

__all__ = [
    "NOT_IN_RESULTS",
    "Config",
    "check",
    "check_sweep",
    "class_of",
    "composed",
    "composing",
    "departures",
    "differences",
    "flat",
    "in_results",
    "register",
    "run_name",
    "takes",
    "wandb_key",
    "wandb_mode",
]
