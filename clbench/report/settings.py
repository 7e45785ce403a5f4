"""What a run was set to: what its strategy can do, and what differs from what its benchmark gives."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from clbench.config import NOT_IN_RESULTS, flat
from clbench.report import earlier

# What a report compares by itself, or what says nothing of results.
_COMPARED = (
    "method.name",
    "method.protocol",
    "strategy.name",
    "strategy._target_",
    "replay.size",
    "seed",
    "benchmark",
    "made_by",
    "departures",
)
# How a run is computed, not what: figures differ by rounding at most.
COMPUTED = (
    "gpu.device",
    "gpu.threads",
    "gpu.compile",
    "gpu.deterministic",
    "backbone.batch_size",
    "backbone.feature_",
)
REQUIRED = "???"  # what OmegaConf writes where a value must be given


@dataclass(frozen=True)
class Flags:
    """What a run's strategy can do, see `clbench.strategies.base.Strategy`.

    Attributes:
        joint: one stage learns all tasks.
        continual: it learns task by task and is not told the task; the others are bounds to compare with.
        needs_gradients: it makes no sense for a detector without an optimizer.
    """

    joint: bool = False
    continual: bool = True
    needs_gradients: bool = False

    @staticmethod
    def of(summary: Mapping[str, Any], config: Mapping[str, Any]) -> Flags:
        """The flags that summary.json says, or, in run directories of earlier versions, those of the class.

        Raises:
            TypeError: `strategy_flags` in summary.json is no mapping of booleans.
        """
        names = [one.name for one in fields(Flags)]
        if "strategy_flags" not in summary:
            target = (config.get("strategy") or {}).get("_target_")
            known = earlier.imported_strategy(str(target)) if target else Flags
            return Flags(**{name: bool(getattr(known, name)) for name in names})
        stored = summary["strategy_flags"]
        if not (isinstance(stored, dict) and all(isinstance(value, bool) for value in stored.values())):
            raise TypeError("strategy_flags in summary.json")
        return Flags(**{name: stored[name] for name in names if name in stored})


@dataclass(frozen=True)
class Departures:
    """The settings of a run that are not what its benchmark gives its method and strategy, as words.

    Attributes:
        apart: what sets the run apart, as its images: runs in which this differs do not compare.
        changed: what the method was changed in, as its epochs: named in the run's row.
        strategy_changed: what the strategy was changed in, as the weight of a penalty: named in the run's
            row.
        given: what the method had to be given, as weights that cannot be downloaded.
        known: whether it is known what the benchmark gives; where not, every setting counts as a departure.
    """

    apart: dict[str, str] = field(default_factory=dict)
    changed: dict[str, str] = field(default_factory=dict)
    strategy_changed: dict[str, str] = field(default_factory=dict)
    given: dict[str, str] = field(default_factory=dict)
    known: bool = True


def read_departures(config: Mapping[str, Any]) -> Departures:
    """What a run was set to, apart from method, strategy, replay size and seed, which a report compares.

    It is read from `departures` in config.yaml, so that editing conf/ relabels no run.

    Raises:
        KeyError, TypeError, AttributeError: config.yaml is not a run's.
    """
    values = dict(flat({key: value for key, value in config.items() if key != "departures"}))
    usual = config["departures"] if "departures" in config else earlier.composed_departures(config)
    found = Departures(known=usual is not None)
    if usual is None:
        seeds = {key for key, value in values.items() if key.endswith(".seed") and value == config["seed"]}
        usual = dict.fromkeys(values.keys() - seeds, "absent")
    for key in sorted(usual.keys() & values.keys()):
        if _is_compared(key) and not _is_listed_order(key, usual, values):
            part, shown = _part(found, key, usual, values)
            part[shown] = in_words(values[key])
    return found


def _is_compared(key: str) -> bool:
    return (
        key.split(".")[0] not in NOT_IN_RESULTS
        and not key.startswith(COMPUTED)
        and not any(key == name or key.startswith(f"{name}.") for name in _COMPARED)
    )


def _is_listed_order(key: str, usual: Mapping[str, Any], values: Mapping[str, Any]) -> bool:
    """Whether a setting is of an order of tasks that somebody chose: reports compare the tasks themselves.

    That an order was drawn by seed, or decided by results, is said of a run whatever its tasks are.
    """
    if key == "task_order.kind":
        return {usual[key], values[key]} <= {"listed", "alphabetical"}
    return key.startswith("task_order.")


def _part(
    found: Departures, key: str, usual: Mapping[str, Any], values: Mapping[str, Any]
) -> tuple[dict[str, str], str]:
    """The part of a run's departures that a setting belongs to, and the name that it has there."""
    short = key.partition(".")[2]
    if key.startswith(("strategy.", "replay.")):
        return found.strategy_changed, key.removeprefix("strategy.")
    pretrained = usual.get("backbone.pretrained", values.get("backbone.pretrained"))
    weights = key == "backbone.checkpoint" and usual[key] is None and pretrained is True
    if weights or (key.startswith("method.") and usual[key] == REQUIRED):
        return found.given, key
    return (found.changed, short) if key.startswith(("method.", "gpu.precision")) else (found.apart, key)


def in_words(value: Any) -> str:
    """A value as the command line takes it: `[a,b]` for a list, `true`, `false` and `null`."""
    if isinstance(value, list):
        return f"[{','.join(map(in_words, value))}]"
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
