"""The sweeper behind train.py. Hydra looks for plugins in this package, and takes them from nowhere else."""

import inspect
import sys
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hydra._internal.core_plugins.basic_launcher import BasicLauncher
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.utils import JobReturn, JobStatus
from hydra.utils import get_class

from clbench.config import check, check_sweep
from clbench.errors import UserError, in_one_line
from clbench.recording.run_directory import RunDirectory
from clbench.sweeping import Run, chosen, distinct, finished_unchanged, plan_table, suited, sweep_table
from clbench.terminal import Display


class RunSweeper(BasicSweeper):
    """Every run is checked before the first starts; finished ones are left out; one table ends the sweep.

    Args:
        max_batch_size, params: Hydra's.
        grids: of a ready-made sweep (sweeps/): each a setting -> values mapping, all of whose combinations
            are run. Settings of the command line take the place of a grid's.
    """

    def __init__(
        self,
        max_batch_size: int | None = None,
        params: dict[str, str] | None = None,
        grids: Sequence[Mapping[str, Any]] = (),
    ) -> None:
        super().__init__(max_batch_size, params)
        self.grids = [dict(grid) for grid in grids] or [{}]

    def sweep(self, arguments: list[str]) -> None:
        """Expand the command line to runs and launch those that are not finished.

        Raises:
            SystemExit: something is wrong with a run's settings (status 2), or a run failed (status 1).
        """
        try:
            assert self.config is not None
            check_sweep(self.config, arguments)
            runs = self.runs(arguments)
            wanted = chosen(runs, self.config.only)
            if self.config.dry_run:
                Display("sweep").table(plan_table(runs, wanted))
                return
            RunDirectory(runs[0].directory.path.parent).create()
            if self.config.overwrite:  # here, once: a job that is started again is to continue
                for run in wanted:
                    with run.directory.lock():
                        run.directory.clear()
        except UserError as error:
            print(f"error: {error}", file=sys.stderr)
            sys.exit(2)
        display = Display("sweep")
        for run in runs:
            if run.state == "finished":
                display.line(f"finished already, skipped: {run.directory.path}")
            elif run.state == "failed" and run in wanted:
                display.line(f"failed before, tried again: {run.directory.path}: {run.reason}")
        failed = self._launch(wanted, runs[0].directory.path.parent, display)
        if len(runs) > 1:
            display.table(sweep_table(runs, display.console.width))
        if not failed or len(runs) > 1:
            single = len(runs) == 1
            display.line(f"results: {runs[0].directory.path if single else runs[0].directory.path.parent}")
        if failed:
            sys.exit(1)

    def runs(self, arguments: list[str]) -> list[Run]:
        """The runs of a command line, each once, with where they stand.

        Raises:
            UserError: something is wrong with one's settings.
        """
        assert self.hydra_context is not None and self.config is not None
        loader = self.hydra_context.config_loader
        parser = OverridesParser.create(config_loader=loader)
        found: dict[Path, Run] = {}
        given: list[list[str]] = []
        for grid in self.grids:
            texts = [*(f"{key}={value}" for key, value in {**self.params, **grid}.items()), *arguments]
            given += self.split_arguments(parser.parse_overrides(texts), None)[0]

        def settings_of(method: str) -> set[str]:
            chosen = loader.load_sweep_config(self.config, [f"method={method}"]).method
            return {*chosen, *inspect.signature(get_class(chosen._target_)).parameters}

        for overrides in suited(given, self.config.hydra.runtime.choices["method"], settings_of):
            run = finished_unchanged(self.config, overrides)
            if run is None:
                config = loader.load_sweep_config(self.config, overrides)
                settings = check(config)
                directory = RunDirectory(Path(config.hydra.sweep.dir) / config.hydra.sweep.subdir)
                state, reason = directory.state(settings)
                run = Run(overrides, directory, state, reason)
            found.setdefault(run.directory.path, run)
        if not found:
            raise UserError(f"{' '.join(arguments)} asks for no run: a list in it is empty")
        return list(found.values())

    def _launch(self, pending: list[Run], folder: Path, display: Display) -> bool:
        """Run what is pending; print why a run failed, and keep it for the table; whether one did."""
        assert self.launcher is not None and self.config is not None
        self.config.hydra.sweep.dir = str(folder)
        try:
            jobs = self._jobs(pending, display) if pending else []
        except UserError as error:  # of the launcher: no cluster, a job that it rejects
            print(f"error: {error}", file=sys.stderr)
            return True
        failures = [
            (run, job) for run, job in zip(pending, jobs, strict=True) if job.status != JobStatus.COMPLETED
        ]
        for run, job in failures:
            message = in_one_line(job._return_value)
            if message is None:
                traceback.print_exception(job._return_value)
                message = str(job._return_value)
            run.reason = message
            name = (
                f"{run.directory.path.name}: "
                if len(pending) > 1 and str(run.directory.path) not in message
                else ""
            )
            print(f"error: {name}{message}", file=sys.stderr)
        return bool(failures)

    def _jobs(self, pending: list[Run], display: Display) -> Sequence[JobReturn]:
        """Launch what is pending, all at once where the launcher can, or one after the other, each announced."""
        assert self.launcher is not None
        if not isinstance(self.launcher, BasicLauncher) or len(pending) == 1:
            return self.launcher.launch([run.overrides for run in pending], initial_job_idx=0)
        jobs: list[JobReturn] = []
        for index, (run, name) in enumerate(zip(pending, distinct(pending), strict=True)):
            display.line(f"run {index + 1} of {len(pending)}: {name}")
            jobs += self.launcher.launch([run.overrides], initial_job_idx=index)
        return jobs
