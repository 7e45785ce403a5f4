"""Which runs compare: what each was set to, apart from what its benchmark and method choose by themselves."""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

from clbench.config import NOT_IN_RESULTS, flat

_CONF = Path(__file__).parents[2] / "conf"
_OF_A_ROW = ("method.name", "method.protocol", "strategy", "replay", "seed", "made_by", "benchmark")
REQUIRED = "???"  # what OmegaConf writes where a value must be given


def departures(config: Mapping[str, Any]) -> tuple[dict[str, str], dict[str, str]]:
    """The settings of a run that are not what its benchmark gives its method.

    Method, strategy, replay size and seed are not among them: they are what a report compares. A seed of a part
    that is the run's own seed is none of its own.

    Returns:
        what sets the run apart: runs in which this differs do not compare;
        what it had to be given, as weights that cannot be downloaded: it belongs to the method.
    """
    own = _plain(config)
    default = _default(
        str(config["benchmark"]), str(config["method"]["name"]), str(config["dataset"]["name"])
    )
    apart: dict[str, str] = {}
    given: dict[str, str] = {}
    for key in sorted({*own, *default}):
        value, usual = own.get(key, "absent"), default.get(key, "absent")
        if value == usual:
            continue
        required = usual == REQUIRED and key.startswith("method.")
        weights = (
            key == "backbone.checkpoint" and usual == "None" and default.get("backbone.pretrained") == "True"
        )
        (given if required or weights else apart)[key] = value
    return apart, given


def _plain(config: Mapping[str, Any]) -> dict[str, str]:
    seed = config["seed"]
    return {
        key: "the run's" if key.endswith(".seed") and value == seed else _words(value)
        for key, value in flat(config)
        if key.split(".")[0] not in NOT_IN_RESULTS
        and not any(key == name or key.startswith(f"{name}.") for name in _OF_A_ROW)
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
