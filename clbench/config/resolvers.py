"""What conf/ refers to besides its own files: functions in ${...}, open nodes, ready-made sweeps."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig, OmegaConf

from clbench.config import sources
from clbench.config.run_names import run_name
from clbench.errors import UserError
from clbench.paths import expanded


def if_given(value: Any, then: Any, otherwise: Any) -> Any:
    """`then` where `value` is given, `otherwise` where it is null."""
    return otherwise if value is None else then


def images_mb(count: int, resize: int | None, crop: int | None, tile: int | None = None) -> float:
    """10^6 bytes of so many images, as they are, of a run's size in pixels; of so many tiles where it cuts images.

    Raises:
        UserError: the size is that of the files, which is not known.
    """
    side = tile or crop or resize
    if side is None:
        raise UserError(
            f"dataset.resize=null: the bytes of {count} images are not known; give dataset.resize a number"
        )
    return count * 3 * side**2 / 10**6


def strategy_class(name: str) -> str:
    """The class of a strategy of this package: clbench/strategies/<name>.py holds <Name>."""
    return f"clbench.strategies.{name}.{name.title().replace('_', '')}"


def by_choice(choice: str, special: Mapping[str, str], otherwise: str) -> str:
    """What a table has for a choice, e.g. of a method; `otherwise` where it has nothing."""
    return str(special.get(choice, otherwise))


def gpus_of(device: str) -> int | None:
    """Number of GPUs that a job asks for, by `gpu.device`; None for none."""
    return None if device == "cpu" else 1


def expanded_path(setting: str, given: str) -> str:
    """The path that is given as a setting, with `~` and environment variables replaced.

    Raises:
        UserError: as `clbench.paths.expanded`.
    """
    return str(expanded(given, setting))


def register() -> None:
    """Register with Hydra everything that conf/ refers to. It may be called more than once.

    `open`, merged into a node before its choice, lets the command line give any setting there: a sweep's first config
    is composed with the group's default choice, which need not have a setting that the swept choices have. Whether
    a choice has the setting is checked with the run itself.
    """
    for resolver in (run_name, if_given, images_mb, strategy_class, by_choice, gpus_of, expanded_path):
        OmegaConf.register_new_resolver(resolver.__name__, resolver, replace=True)
    store = ConfigStore.instance()
    store.store(name="open", node=DictConfig({}, flags={"struct": False}))
    beside = [] if sources.sweeps().is_relative_to(sources.conf()) else sources.sweeps().glob("*.yaml")
    for file in beside:
        store.store(
            group="sweep", name=file.stem, node=_sweep(file, file.stat().st_mtime_ns), package="_global_"
        )


@cache
def _sweep(file: Path, changed: int) -> Any:
    """A sweep's settings, read once while its file is as it is; Hydra copies them."""
    return OmegaConf.load(file)
