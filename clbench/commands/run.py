"""clbench run: one run, or with -m a sweep, in any folder; what train.py does."""

from __future__ import annotations

import os
import re
import sys
from argparse import Namespace
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from typing import Any

from hydra._internal.utils import _run_hydra, get_args_parser  # hydra.main, but with errors of our own
from hydra.core.hydra_config import HydraConfig
from hydra.core.plugins import Plugins
from omegaconf import DictConfig

from clbench.config import Config, check, departures, register, sources
from clbench.config.departures import read_again
from clbench.config.explanations import explain
from clbench.config.words import readable
from clbench.cores import wait_briefly
from clbench.errors import UserError
from clbench.paths import expanded
from clbench.streams import secure

_OWN_CONFIGS = (
    "put configs of your own into a folder, as method/NAME.yaml, and give --config-dir=FOLDER method=NAME"
)
_NOT_HERE = {  # flags of Hydra's: what helps in their place
    "config_path": _OWN_CONFIGS,
    "config_name": _OWN_CONFIGS,
    "experimental_rerun": "repeat the run's own command, which continues it",
}


def main(words: Sequence[str]) -> int:
    """Run what a command line asks for.

    Args:
        words: the command line: Hydra's flags and overrides, in any order.

    Returns:
        The exit status: 0; 1 where a run failed; 2 where the command line or a config makes no sense.

    Raises:
        Exception: what is no fault of the command line.
    """
    secure()
    wait_briefly()
    parser = get_args_parser()
    try:
        given = parser.parse_intermixed_args(list(words))
    except SystemExit as ended:
        return ended.code if isinstance(ended.code, int) else 1
    try:
        _check_words(given)
        with _fresh_hydra():
            _run_hydra(
                args=given,
                args_parser=parser,
                task_function=task,
                config_path=str(sources.conf()),
                config_name="config",
            )
    except SystemExit as ended:
        return ended.code if isinstance(ended.code, int) else 1
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except Exception as error:
        explained = explain(error, given.overrides, given.config_dir)
        if explained is None:
            raise
        print(f"error: {explained}", file=sys.stderr)
        return 2
    return 0


def _check_words(given: Namespace) -> None:
    """Check Hydra's flags, and the overrides that change how it runs; paths are written as Hydra takes them.

    Raises:
        UserError: flags exclude one another, mean nothing alone, or ask for what is not done here; or --config-dir names
            a user or variable that is not there.
    """
    given.overrides = [readable(text) for text in given.overrides]
    if given.config_dir is not None:
        given.config_dir = str(expanded(given.config_dir, "--config-dir"))
    for text in given.overrides:
        if text.lstrip("+~").startswith(("hydra.mode=", "hydra/sweeper=")):
            raise UserError(f"{text}: every run is checked as a sweep of one here; leave it out")
    for flag, way_out in _NOT_HERE.items():
        value = getattr(given, flag)
        if value is not None:
            raise UserError(f"--{flag.replace('_', '-')} {value} is not for clbench: {way_out}")
    if given.hydra_help:
        given.overrides = []  # Hydra would look for them among settings of its own
    if given.help or given.hydra_help:
        return
    asked = [flag for flag in ("run", "multirun", "cfg", "info", "shell_completion") if getattr(given, flag)]
    if len(asked) > 1:
        flags = " and ".join(f"--{flag.replace('_', '-')}" for flag in asked)
        raise UserError(f"{flags} exclude one another: give one of them")
    for flag in ("resolve", "package"):
        if getattr(given, flag) and not given.cfg:
            raise UserError(f"--{flag} says what --cfg prints: give --cfg job too, or leave --{flag} out")
    shells = [
        text for text in given.overrides if re.match(r"(install|uninstall|query)=(bash|fish|zsh)$", text)
    ]
    if given.shell_completion and (len(shells) != 1 or len(given.overrides) != 1):
        raise UserError(
            f"{' '.join(['-sc', *given.overrides])}: give one of install, uninstall or query, with a shell: "
            "-sc install=bash, fish or zsh"
        )
    if given.shell_completion and shells[0].startswith("query=") and "COMP_LINE" not in os.environ:
        raise UserError(f"-sc {shells[0]} is what a shell asks, with COMP_LINE set: give -sc install=bash")


def complete(words: Sequence[str]) -> int:
    """Answer a shell that completes the words of `clbench run`, which Hydra knows without the word `run`."""
    line = os.environ.get("COMP_LINE", "")
    os.environ["COMP_LINE"] = re.sub(r"^(\S+) +run( |$)", r"\1 ", line)
    return main(words)


@contextmanager
def _fresh_hydra() -> Iterator[None]:
    """Inside, Hydra knows this package's configs and plugins, and raises errors.

    Afterwards it is as it was.
    """
    sources.read_again()
    read_again()
    register()
    plugins = Plugins.instance()  # in an editable install it does not find those of hydra_plugins by itself
    for plugin in import_module("hydra_plugins.clbench_sweeps").PLUGINS:
        plugins.register(plugin)
    composed, full = HydraConfig.instance().cfg, os.environ.get("HYDRA_FULL_ERROR")
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra raises errors, which `main` prints in one line
    try:
        with sources.app_put_aside():
            yield
    finally:
        HydraConfig.instance().cfg = composed
        if full is None:
            del os.environ["HYDRA_FULL_ERROR"]
        else:
            os.environ["HYDRA_FULL_ERROR"] = full


def task(composed: DictConfig) -> None:
    """Check the config that Hydra composed, and do its run.

    Raises:
        UserError: as `check` and `run_one`.
    """
    secure()  # where a launcher gave the run a process of its own
    wait_briefly()
    run_one(check(composed), HydraConfig.get())


def run_one(config: Config, hydra_config: Any) -> None:
    """Do one run, or what is left of it, in the directory that Hydra gives it; nothing where it is finished.

    A signal that stopped the run is sent to this process again once all is saved.

    Args:
        config: the run's.
        hydra_config: the `hydra` node of the composed config.

    Raises:
        UserError: the directory holds another run or is in use, or images, weights or machine do not fit.
    """
    from clbench import experiment
    from clbench.config.by_results import with_order
    from clbench.interruption import Interruption, Stopped
    from clbench.recording.run_directory import RunDirectory

    directory = RunDirectory(hydra_config.runtime.output_dir)
    config = with_order(config, directory)
    alone = hydra_config.launcher._target_.endswith("SequentialLauncher")
    try:
        with directory.lock(), Interruption() as interruption:
            if directory.finished(config.plain()):
                return
            experiment.run_in(
                directory,
                config,
                interruption,
                alone=alone,
                more={"composed_from": sources.composed_from(hydra_config, hydra_config.overrides.task)},
                departures=departures(config, hydra_config),
            )
    except Stopped as stopped:
        again = "the same command without overwrite=true" if config.overwrite else "the same command"
        print(f"{'' if alone else directory.path.name + ': '}{stopped}: {again} continues here", flush=True)
        stopped.hand_on()
