"""Which runs compare: what each was set to, apart from what its benchmark and method choose by themselves."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from clbench.config import NOT_IN_RESULTS, flat

_CONF = Path(__file__).parents[2] / "conf"
_COMPARED = ("method.name", "method.protocol", "strategy", "replay", "seed", "made_by", "benchmark")
# How a run is computed, not what: figures differ by rounding at most.
_HOW = (
    "gpu.device",
    "gpu.threads",
    "gpu.compile",
    "gpu.deterministic",
    "backbone.batch_size",
    "backbone.feature_",
)
_OF_A_ROW = ("method.", "gpu.precision")
REQUIRED = "???"  # what OmegaConf writes where a value must be given


@dataclass(frozen=True)
class Departures:
    """The settings of a run that are not what its benchmark gives its method.

    Attributes:
        apart: what sets the run apart, as its images: runs in which this differs do not compare.
        changed: what the method was changed in, as its epochs: it is named in the run's row.
        given: what it had to be given, as weights that cannot be downloaded.
    """

    apart: dict[str, str]
    changed: dict[str, str]
    given: dict[str, str]


def departures(config: Mapping[str, Any]) -> Departures:
    """What a run was set to of its own, apart from method, strategy, replay size and seed, which a report compares.

    A seed of a part that is the run's own seed is none of its own.
    """
    own = _plain(config)
    default = _default(
        str(config["benchmark"]), str(config["method"]["name"]), str(config["dataset"]["name"])
    )
    found = Departures({}, {}, {})
    for key, value in sorted(own.items()):
        usual = default.get(key, "absent")
        if value == usual:
            continue
        required = usual == REQUIRED and key.startswith("method.")
        weights = (
            key == "backbone.checkpoint" and usual == "None" and default.get("backbone.pretrained") == "True"
        )
        if required or weights:
            found.given[key] = value
        elif key.startswith(_OF_A_ROW):
            found.changed[key.rpartition(".")[2]] = value
        else:
            found.apart[key] = value
    return found


def _plain(config: Mapping[str, Any]) -> dict[str, str]:
    seed = config["seed"]
    return {
        key: "the run's" if key.endswith(".seed") and value == seed else _words(value)
        for key, value in flat(config)
        if key.split(".")[0] not in NOT_IN_RESULTS
        and not key.startswith(_HOW)
        and not any(key == name or key.startswith(f"{name}.") for name in _COMPARED)
    }


def _words(value: Any) -> str:
    """A value as the command line takes it."""
    return f"[{','.join(map(_words, value))}]" if isinstance(value, list) else str(value)


@lru_cache
def _default(benchmark: str, method: str, dataset: str) -> dict[str, str]:
    """What a benchmark's run of a method is composed to; nothing where conf/ has no such choice."""
    from hydra import compose, initialize_config_dir
    from hydra.core.global_hydra import GlobalHydra
    from hydra.errors import HydraException
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    from clbench.config import register_resolvers

    register_resolvers()
    GlobalHydra.instance().clear()
    if not _CONF.is_dir():
        return {}
    try:
        with initialize_config_dir(str(_CONF), version_base="1.3"):
            composed = compose("config", [f"benchmark={benchmark}", f"method={method}", f"dataset={dataset}"])
        names = [str(key) for key in composed if key != "hydra"]
        plain = OmegaConf.to_container(OmegaConf.masked_copy(composed, names), resolve=True)
    except (HydraException, OmegaConfBaseException):
        return {}
    assert isinstance(plain, dict)
    return _plain({str(key): value for key, value in plain.items()})
