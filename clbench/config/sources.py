"""Where configs are and how they are composed: conf/ and sweeps/ of a wheel or a checkout, and --config-dir.

Imports no torch.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import hydra
from hydra.core.global_hydra import GlobalHydra

from clbench.config.differences import in_results

if TYPE_CHECKING:
    from omegaconf import DictConfig

_PACKAGE = Path(__file__).parents[1]
USUAL = "usual"  # the config without local.yaml


def conf() -> Path:
    """The folder of configs: clbench/conf of an installed wheel, conf/ of a checkout and an editable install."""
    installed = _PACKAGE / "conf"
    return installed if installed.is_dir() else _PACKAGE.parent / "conf"


def sweeps() -> Path:
    """The folder of ready-made sweeps: in a wheel within its conf/, where Hydra finds them, else sweeps/ beside it."""
    within = conf() / "sweep"
    return within if within.is_dir() else conf().parent / "sweeps"


@contextmanager
def composing() -> Iterator[None]:
    """Inside, `hydra.compose` composes from conf/, even in a Hydra app that runs already."""
    from clbench.config.resolvers import register  # here, as it imports this module

    register()
    with app_put_aside(), hydra.initialize_config_dir(str(conf()), version_base="1.3"):
        yield


@contextmanager
def app_put_aside() -> Iterator[None]:
    """Inside, Hydra can be initialized anew; afterwards the app that was running is there again."""
    running = GlobalHydra.instance().hydra
    GlobalHydra.instance().clear()
    try:
        yield
    finally:
        GlobalHydra.instance().hydra = running


def search_path(config_dir: str | Path | None) -> list[str]:
    """The override that makes Hydra look for configs in a user's own folder too, as a list.

    Empty where None is given.
    """
    return [] if config_dir is None else [f"hydra.searchpath=[file://{Path(config_dir).absolute()}]"]


def file_with(content: bytes, config_dir: str | Path | None) -> Path | None:
    """The file of configs, ours and a user's own, that holds these bytes; None where none does."""
    folders = [conf(), sweeps(), *([Path(config_dir)] if config_dir else [])]
    files = (file for folder in folders for file in sorted(folder.rglob("*.y*ml")))
    return next((file for file in files if file.is_file() and content in file.read_bytes()), None)


def composed(*overrides: str, config_dir: str | Path | None = None, local: bool = True) -> DictConfig:
    """What the overrides of a command line compose to, unchecked.

    Args:
        config_dir: a user's own folder of configs, as --config-dir names it.
        local: whether local.yaml, this machine's own settings, counts.

    Raises:
        HydraException: they cannot be composed.
    """
    with composing():
        return hydra.compose("config" if local else USUAL, [*search_path(config_dir), *overrides])


def composed_from(hydra_config: Any, overrides: Sequence[str]) -> str:
    """SHA-256 of everything that a run's config is composed from: all files of configs, and its overrides.

    Args:
        hydra_config: the `hydra` node of a composed config.
        overrides: the run's; those that change no results do not count.
    """
    folders = [source.path for source in hydra_config.runtime.config_sources if source.schema == "file"]
    files = [_folder_digest(str(folder)) for folder in (*folders, sweeps())]
    named = sorted(text for text in overrides if in_results(text))
    return hashlib.sha256("\n".join([*files, *named]).encode()).hexdigest()


def read_again() -> None:
    """Forget the digests of files: a process that runs a second command may find other configs."""
    _folder_digest.cache_clear()


@lru_cache
def _folder_digest(folder: str) -> str:
    """SHA-256 of the names and contents of all YAML files in a folder and those inside it."""
    digest = hashlib.sha256()
    for path, folders, files in os.walk(folder, followlinks=True):
        folders.sort()
        for name in sorted(files):
            if name.endswith((".yaml", ".yml")):
                file = Path(path) / name
                digest.update(str(file.relative_to(folder)).encode() + b"\0" + file.read_bytes() + b"\0")
    return digest.hexdigest()
