"""clbench run: one run, or with -m a sweep, in any folder; what train.py does."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from typing import Any

import yaml
from hydra._internal.utils import _run_hydra, get_args_parser  # hydra.main, but with errors of our own
from hydra.core.hydra_config import HydraConfig
from hydra.core.plugins import Plugins
from hydra.errors import HydraException
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from clbench.config import Config, check, departures, register, sources
from clbench.config.departures import read_again
from clbench.config.explanations import explain
from clbench.config.words import readable
from clbench.errors import UserError
from clbench.paths import expanded
from clbench.streams import secure


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
    parser = get_args_parser()
    try:
        given = parser.parse_intermixed_args(list(words))
        given.overrides = [readable(text) for text in given.overrides]
        if given.config_dir is not None:
            given.config_dir = str(expanded(given.config_dir, "--config-dir"))
        for text in given.overrides:
            if text.lstrip("+~").startswith(("hydra.mode=", "hydra/sweeper=")):
                return _refused(
                    UserError(f"{text}: every run is checked as a sweep of one here; leave it out")
                )
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
    except UserError as error:
        return _refused(error)
    except (HydraException, OmegaConfBaseException) as error:
        return _refused(explain(error, given.overrides, given.config_dir))
    except ValueError as error:
        # What Hydra says of replay=100, where a choice of a group is wanted and a number is given.
        if not str(error).startswith("Config group override"):
            raise
        return _refused(explain(error, given.overrides, given.config_dir))
    except yaml.YAMLError as error:  # most likely in the user's own conf/local.yaml
        return _refused(UserError(f"a config cannot be read: {' '.join(str(error).split())}"))
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    return 0


def complete(words: Sequence[str]) -> int:
    """Answer a shell that completes the words of `clbench run`, which Hydra knows without the word `run`."""
    line = os.environ.get("COMP_LINE", "")
    os.environ["COMP_LINE"] = re.sub(r"^(\S+) +run( |$)", r"\1 ", line)
    return main(words)


def _refused(error: UserError) -> int:
    """Print why a command line is refused, and give the exit status for it."""
    print(f"error: {error}", file=sys.stderr)
    return 2


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
    from clbench import assembly, experiment
    from clbench.interruption import Interruption, Stopped
    from clbench.recording.provenance import made_by
    from clbench.recording.run_directory import RunDirectory
    from clbench.terminal import Display

    directory = RunDirectory(hydra_config.runtime.output_dir)
    alone = hydra_config.launcher._target_.endswith("SequentialLauncher")
    try:
        with directory.lock(), Interruption() as interruption:
            if directory.finished(config.plain()):
                return
            with (
                directory.reporting(assembly.identity(config)) as report,
                Display(directory.path.name, alone=alone) as display,
            ):
                display.heading(directory.path.name)
                made = assembly.assemble(config, interruption.watching(display.progress))
                made.identity["composed_from"] = sources.composed_from(
                    hydra_config, hydra_config.overrides.task
                )
                directory.write_config(config.plain(), departures(config, hydra_config), made_by(made.device))
                report(made.identity)
                recorder = assembly.build_recorder(made, directory.path, display.line)
                experiment.run(made, directory, display, interruption, recorder)
    except Stopped as stopped:
        again = "the same command without overwrite=true" if config.overwrite else "the same command"
        print(f"{'' if alone else directory.path.name + ': '}{stopped}: {again} continues here", flush=True)
        stopped.hand_on()
