"""The sweeper behind `python train.py` and `clbench run`. Imports no torch until a run is checked."""

from __future__ import annotations

import functools
import itertools
import json
import math
import sys
import traceback
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.core.plugins import Plugins
from hydra.core.utils import JobReturn, JobStatus
from hydra.errors import HydraException
from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig

from clbench.config import Config, check, check_sweep
from clbench.config.by_results import with_order
from clbench.config.classes import buffer_arguments, class_of, own_arguments
from clbench.config.differences import settings_digest
from clbench.config.explanations import setting_of_other_choices
from clbench.config.messages import UnknownSetting
from clbench.config.words import readable
from clbench.errors import UserError, described, first_line, in_one_line
from clbench.recording.run_directory import RunDirectory
from clbench.sweeps.images import FinishedImages
from clbench.sweeps.launchers import SequentialLauncher, Starts
from clbench.sweeps.runs import SweepRun, distinct, each_once, finished_unchanged, suited, to_launch
from clbench.sweeps.tables import by_reason, plan_table, sweep_table
from clbench.terminal import Display

_MOST_RUNS = 100_000  # of a sweep: each is composed and kept in memory; range(0,inf) would never end


class RunSweeper(Sweeper):
    """Checks every run before the first starts, leaves finished ones out, and shows one table at the end.

    Args:
        max_batch_size: number of runs that the launcher is given at a time, at most; None for all at once.
        params: Hydra's own: setting -> values of the sweep.
        grids: those of a ready-made sweep (sweeps/): setting -> values, each; all combinations of a grid's
            values are run. Settings of the command line take the place of a grid's.
        unknown: what else a config gives, which is refused.

    Raises:
        UserError: a setting is unknown, or `grids` is no list of grids.
    """

    def __init__(
        self,
        max_batch_size: int | None = None,
        params: Mapping[str, str] | None = None,
        grids: Sequence[Mapping[str, Any]] = (),
        **unknown: Any,
    ) -> None:
        super().__init__()
        for key in unknown:
            known = ("grids", "max_batch_size", "params")
            raise UnknownSetting(f"hydra.sweeper.{key}", [f"hydra.sweeper.{name}" for name in known])
        if not isinstance(grids, Sequence) or not all(isinstance(grid, Mapping) for grid in grids):
            raise UserError(
                f"hydra.sweeper.grids={grids} is no list of grids: begin each with a dash, as "
                "grids: [{method: 'patchcore,padim'}]"
            )
        self.max_batch_size = max_batch_size
        self.params = dict(params or {})
        self.grids = [dict(grid) for grid in grids] or [{}]
        self._megabytes: dict[str, float | None] = {}  # what was asked, as JSON -> its answer

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        """Take what Hydra gives before `sweep`."""
        self._config = config
        self._loader = hydra_context.config_loader
        self._launcher = Plugins.instance().instantiate_launcher(
            hydra_context=hydra_context, task_function=task_function, config=config
        )

    def sweep(self, arguments: list[str]) -> None:
        """Expand the command line to runs and launch those that are not finished.

        Args:
            arguments: the overrides of the command line.

        Raises:
            SystemExit: something is wrong with a run's settings (status 2), or a run failed (status 1).
        """
        try:
            check_sweep(self._config, arguments)
            runs = self.runs(arguments)
            wanted = to_launch(runs, self._config.only)
            if self._config.dry_run:
                Display("sweep").table(plan_table(runs, wanted))
                return
            RunDirectory(runs[0].directory.path.parent).create()
            if self._config.overwrite:  # once, here: a job of a cluster that is started again continues
                for run in wanted:
                    with run.directory.lock():
                        run.directory.clear()
        except UserError as error:
            print(f"error: {error}", file=sys.stderr)
            sys.exit(2)
        display = Display("sweep")
        named = list(zip(distinct(runs), runs, strict=True))
        for run in runs:
            if run.state == "finished":
                display.line(f"finished already, skipped: {run.directory.path}")
        before = [(name, run) for name, run in named if run.state == "failed" and run in wanted]
        for who, reason in by_reason(before):
            display.line(f"failed before, tried again: {who}: {reason}")
        if self._config.only and not wanted:
            states = Counter(run.state for run in runs)
            counts = ", ".join(f"{count} {state}" for state, count in states.items())
            display.line(f"only={self._config.only}: nothing to start; {counts}")
            return
        try:
            failed = self._launch(wanted, runs[0].directory.path.parent, display)
        except UserError as error:  # the launcher's: there is no cluster, or it rejects the jobs
            print(f"error: {error}", file=sys.stderr)
            sys.exit(1)
        for who, reason in by_reason([(name, run) for name, run in named if run in failed]):
            print(f"error: {who}: {reason}" if len(runs) > 1 else f"error: {reason}", file=sys.stderr)
        if len(runs) > 1:
            with display.showing():
                display.table(sweep_table(runs, display.console.width, told=failed))
        if not failed or len(runs) > 1:
            folders = dict.fromkeys(str(run.directory.path.parent) for run in runs)
            display.line(f"results: {runs[0].directory.path if len(runs) == 1 else ', '.join(folders)}")
        if failed:
            sys.exit(1)

    def runs(self, arguments: list[str]) -> list[SweepRun]:
        """The runs that a command line asks for, each once, with how far each is.

        Args:
            arguments: its overrides.

        Raises:
            UserError: the settings of one are wrong, its directory cannot be read, it is finished and its images
                have changed since, or no run is asked for.
        """
        parser = OverridesParser.create(config_loader=self._loader)
        given: list[list[str]] = []
        for grid in self.grids:
            for key, value in grid.items():
                if key in self._config.hydra.runtime.choices and not isinstance(value, str):
                    raise UserError(
                        f"{key}: {value} in a grid is no choice: write the names with commas in one text, as {key}: a,b"
                    )
            settings = {**self.params, **grid}.items()
            texts = [*(f"{key}={'null' if value is None else value}" for key, value in settings), *arguments]
            given += combinations(parser.parse_overrides([readable(text) for text in texts]))
        settings_of = functools.cache(self._settings_of)
        images = FinishedImages(self._config.cache, Display("sweep").line)
        found: dict[Path, SweepRun] = {}
        for overrides in suited(given, self._config.hydra.runtime.choices, settings_of):
            try:
                run = finished_unchanged(self._config, overrides) or self._composed(overrides)
            except UnknownSetting as error:
                raise setting_of_other_choices(error, self._loader.get_group_options, settings_of) from error
            except UserError as error:  # which of the runs it is
                shared = set.intersection(*map(set, given))
                if own := [text for text in overrides if text not in shared]:
                    raise UserError(f"{' '.join(own)}: {error}") from error
                raise
            if run.state == "finished" and run.directory.path not in found:
                images.check(run.directory)
            found.setdefault(run.directory.path, run)
        if not found:
            raise UserError(f"{' '.join(arguments)} asks for no run: a list in it is empty")
        if len(self.grids) == 1:  # whose runs all differ
            return list(found.values())
        runs = []
        for run, others in each_once(list(found.values())):
            runs.append(run)
            for other in others:
                Display("sweep").line(
                    f"run once: {other.directory.path.name} has the settings of {run.directory.path.name}"
                )
        return runs

    def _composed(self, overrides: list[str]) -> SweepRun:
        """The run of these overrides, after composing and checking its config.

        Raises:
            UserError: its settings are wrong, or its directory cannot be read or holds another run.
        """
        composed = self._loader.load_sweep_config(self._config, overrides)
        directory = RunDirectory(Path(composed.hydra.sweep.dir) / composed.hydra.sweep.subdir)
        config = with_order(check(composed), directory)
        state, reason = directory.state(config.plain())
        in_this_process = isinstance(self._launcher, SequentialLauncher) and state != "finished"
        return SweepRun(
            overrides,
            directory,
            state,
            reason,
            settings=settings_digest(config.plain()),
            gpu=config.gpu,
            stage_mb=self._stage_mb(config) if config.dry_run else None,
            buffer_mb=self._buffer_mb(config) if config.dry_run else None,
            model_mb=self._model_mb(config) if config.dry_run else None,
            config=composed if in_this_process else None,
        )

    def _stage_mb(self, config: Config) -> float | None:
        """Images of a run's largest stage, 10^6 bytes; None where they are not there."""
        from clbench.assembly import stage_bytes

        return self._asked_once(stage_bytes, config, _parts_of_buffer(config), Exception)

    def _buffer_mb(self, config: Config) -> float | None:
        """What a run's buffer takes, 10^6 bytes; None where its images are not there, or networks whose features it keeps."""
        from clbench.assembly import buffer_bytes

        return self._asked_once(buffer_bytes, config, _parts_of_buffer(config), Exception)

    def _model_mb(self, config: Config) -> float | None:
        """What a model of a run takes, 10^6 bytes; None where its class cannot be made without weights."""
        from clbench.assembly import model_bytes

        return self._asked_once(model_bytes, config, ("method", "backbone", "strategy", "replay"), Exception)

    def _asked_once(
        self,
        asked: Callable[[Config], float],
        config: Config,
        parts: Sequence[str],
        unknown: type[Exception],
    ) -> float | None:
        """Bytes by a function of some parts of a config, in 10^6; runs that share these parts are asked for once.

        Args:
            unknown: what the function raises where they are not known, which gives None.
        """
        plain = config.plain()
        question = json.dumps([asked.__name__, *(plain[name] for name in parts)])
        if question not in self._megabytes:
            self._megabytes[question] = None
            with suppress(unknown):
                self._megabytes[question] = asked(config) / 1e6
        return self._megabytes[question]

    def _settings_of(self, group: str, choice: str) -> set[str]:
        """The settings of a group's choice: those in its file, and its class's constructor arguments.

        Those of a strategy's buffer are called as on the command line, such as `replay.size`.

        Raises:
            UserError: the class cannot be imported.
        """
        node = self._loader.load_sweep_config(self._config, [f"{group}={choice}"])[group]
        if "_target_" not in node:
            return set(map(str, node))
        target = class_of(node._target_)
        buffer = buffer_arguments(target) if group == "strategy" else {}
        return {*map(str, node), *own_arguments(group, target), *(f"replay.{name}" for name in buffer)}

    def _launch(self, pending: list[SweepRun], folder: Path, display: Display) -> list[SweepRun]:
        """Launch these runs; the traceback of what is no fault of a setting or a file is printed, once for all runs.

        Args:
            folder: where the directories of the runs are.

        Returns:
            Those that failed, each with its reason.

        Raises:
            UserError: none could be launched.
        """
        self._config.hydra.sweep.dir = str(folder)
        failed = []
        for run in pending:
            try:
                run.directory.create()  # Hydra's own error would end all runs
            except UserError as error:
                failed.append(run)
                run.reason = str(error)
        pending = [run for run in pending if run not in failed]
        jobs = self._jobs(pending, display)
        printed = set()
        for run, job in zip(pending, jobs, strict=True):
            if job.status == JobStatus.COMPLETED:
                continue
            failed.append(run)
            run.reason = in_one_line(job._return_value) or described(job._return_value)
            if in_one_line(job._return_value) is None and run.reason not in printed:
                traceback.print_exception(job._return_value)
                printed.add(run.reason)
        return failed

    def _jobs(self, pending: list[SweepRun], display: Display) -> list[JobReturn]:
        """How each of these runs ended: launched in batches, or one after the other with a line for each."""
        alone = isinstance(self._launcher, SequentialLauncher)
        size = 1 if alone else self.max_batch_size or max(1, len(pending))
        jobs: list[JobReturn] = []
        names = distinct(pending) if pending else []
        for first in range(0, len(pending), size):
            if alone and len(pending) > 1:
                display.line(f"run {first + 1} of {len(pending)}: {names[first]}")
            batch = pending[first : first + size]
            if isinstance(self._launcher, Starts):
                jobs += self._launcher.start(batch, first)
            else:
                jobs += self._launcher.launch([run.overrides for run in batch], initial_job_idx=first)
        return jobs


def combinations(overrides: Sequence[Override]) -> list[list[str]]:
    """The overrides of each run: every combination of the values that overrides with lists give.

    Raises:
        UserError: an override asks for values that cannot be listed, or there are more than `_MOST_RUNS`.
    """
    values: dict[str, list[str]] = {}
    for override in overrides:
        key = override.get_key_element()
        if not override.is_sweep_override():
            values[key] = [f"{key}={override.get_value_element_as_str()}"]
        elif override.is_discrete_sweep():
            values[key] = [f"{key}={value}" for value in _listed(override)]
        else:
            raise UserError(
                f"{override.input_line}: a sweep takes lists, as {key}=a,b, range(...) and glob(...)"
            )
    if math.prod(map(len, values.values())) > _MOST_RUNS:
        lists = ", ".join(f"{len(texts)} values of {key}" for key, texts in values.items() if len(texts) > 1)
        raise UserError(f"{lists} are more than {_MOST_RUNS} runs: give fewer at a time")
    return [list(combination) for combination in itertools.product(*values.values())]


def _listed(override: Override) -> list[str]:
    """The values of an override that asks for several.

    Raises:
        UserError: they cannot be listed, or are more than `_MOST_RUNS`.
    """
    try:
        values = list(itertools.islice(override.sweep_string_iterator(), _MOST_RUNS + 1))
    except (ValueError, ArithmeticError, HydraException) as error:  # of range(): a step of 0, a bound of nan
        raise UserError(
            f"{override.input_line} cannot be listed ({first_line(error)}): "
            "give range(START,STOP,STEP) a step other than 0, or a list a,b"
        ) from error
    if len(values) > _MOST_RUNS:
        raise UserError(f"{override.input_line} has more than {_MOST_RUNS} values: give fewer at a time")
    return values


def _parts_of_buffer(config: Config) -> Sequence[str]:
    """The parts of a config that the images of a stage and of the buffer depend on."""
    stream = ("dataset", "task_order", "strategy", "replay", "seed")
    return (*stream, "method", "backbone") if config.replay.settings.get("storage") == "latent" else stream
