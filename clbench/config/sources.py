"""Where configs are and how they are composed: conf/ and sweeps/ of a wheel or a checkout, and --config-dir.

Imports no torch.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import hydra
from hydra.core.global_hydra import GlobalHydra

from clbench import digests
from clbench.config.differences import in_results

if TYPE_CHECKING:
    from omegaconf import DictConfig

_PACKAGE = Path(__file__).parents[1]
USUAL = "usual"  # the config without local.yaml
# Ways to refer to an environment variable; each name is found, and others that are none.
_VARIABLES = re.compile(r"oc\.env:\s*(\w+)"), re.compile(r"\$\{?(\w+)")


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
    """SHA-256 of everything that a run's config is composed from.

    All files of configs, the name of the first of them, the run's overrides, the environment variables that these refer
    to, and the folder of this process, in which relative paths begin.

    Args:
        hydra_config: the `hydra` node of a composed config.
        overrides: the run's; those that change no results do not count.
    """
    folders = [*map(_folder, hydra_config.runtime.config_sources), str(sweeps())]
    files = [_folder_digest(folder) for folder in folders if folder]
    named = sorted(text for text in overrides if in_results(text))
    variables = {name for found in (*files, _Digest.of_texts(named)) for name in found.variables}
    environment = [f"{name}={os.environ.get(name)}" for name in sorted(variables)]
    where = [hydra_config.job.config_name, os.getcwd()]
    parts = [*where, *(found.digest for found in files), *named, *environment]
    return digests.of_text("\n".join(parts))


def read_again() -> None:
    """Forget the digests of files: a process that runs a second command may find other configs."""
    _folder_digest.cache_clear()


def _folder(source: Any) -> str | None:
    """The folder of a source of configs; None where it is none, as Hydra's store of configs in code."""
    if source.schema == "pkg":
        with suppress(ImportError, ValueError):
            found = find_spec(source.path)
            return next(iter(found.submodule_search_locations or ()), None) if found else None
    return str(source.path) if source.schema == "file" else None


class _Digest(NamedTuple):
    """Of texts: their SHA-256, and the names of environment variables that they may refer to."""

    digest: str
    variables: set[str]

    @classmethod
    def of_texts(cls, texts: Iterable[str]) -> _Digest:
        whole = "\0".join(texts)
        plain = whole.replace("\\", "")  # Hydra quotes signs of its grammar with it
        variables = {name for pattern in _VARIABLES for name in pattern.findall(plain)}
        if "~" in whole:
            variables.add("HOME")
        return cls(digests.of_text(whole), variables)


@lru_cache
def _folder_digest(folder: str) -> _Digest:
    """The digest of names and contents of all YAML files in a folder and those inside it, each folder once."""
    texts: list[str] = []
    seen: set[str] = set()
    for path, folders, files in os.walk(folder, followlinks=True):
        # Links may lead back here.
        folders[:] = sorted(
            name for name in folders if _new(os.path.realpath(os.path.join(path, name)), seen)
        )
        for name in sorted(files):
            if name.endswith((".yaml", ".yml")):
                file = Path(path) / name
                texts += [
                    str(file.relative_to(folder)),
                    file.read_text(encoding="utf-8", errors="surrogateescape"),
                ]
    return _Digest.of_texts(texts)


def _new(path: str, seen: set[str]) -> bool:
    """Whether a path is not among those seen yet; then it is added."""
    new = path not in seen
    seen.add(path)
    return new
