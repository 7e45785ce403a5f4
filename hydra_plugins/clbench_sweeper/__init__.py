"""The sweeper behind train.py. Hydra looks for plugins in this package, and takes them from nowhere else."""

import sys
import traceback
from pathlib import Path

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.utils import JobStatus

from clbench.config import check
from clbench.errors import UserError
from clbench.recording.run_directory import RunDirectory


class RunSweeper(BasicSweeper):
    """Every run is checked before the first starts; finished ones are left out; one table ends the sweep."""

    def sweep(self, arguments: list[str]) -> None:
        """Expand the command line to runs and launch those that are not finished.

        Raises:
            SystemExit: something is wrong with a run's settings (status 2), or a run failed (status 1).
        """
        from clbench.terminal import Display, sweep_table

        try:
            runs = self._unfinished_and_finished(arguments)
            RunDirectory(runs[0][1].path.parent).create()
        except UserError as error:
            print(f"error: {error}", file=sys.stderr)
            sys.exit(2)
        display = Display("sweep")
        pending = [overrides for overrides, _, finished in runs if not finished]
        for _, directory, finished in runs:
            if finished:
                display.line(f"finished already, skipped: {directory.path}")
        failed = self._launch(pending, runs[0][1].path.parent) if pending else False
        if len(runs) > 1:
            display.table(sweep_table([(directory.path, directory.summary()) for _, directory, _ in runs]))
        if not failed or len(runs) > 1:
            display.line(f"results: {runs[0][1].path if len(runs) == 1 else runs[0][1].path.parent}")
        if failed:
            sys.exit(1)

    def _unfinished_and_finished(self, arguments: list[str]) -> list[tuple[list[str], RunDirectory, bool]]:
        """Each run's overrides, its directory, and whether it is finished."""
        assert self.hydra_context is not None and self.config is not None
        parser = OverridesParser.create(config_loader=self.hydra_context.config_loader)
        points = self.split_arguments(parser.parse_overrides(arguments), None)[0]
        runs: dict[Path, tuple[list[str], RunDirectory, bool]] = {}
        for overrides in points:
            config = self.hydra_context.config_loader.load_sweep_config(self.config, overrides)
            directory = RunDirectory(Path(config.hydra.sweep.dir) / config.hydra.sweep.subdir)
            settings = check(config)
            runs[directory.path] = (overrides, directory, directory.finished(settings))
        return list(runs.values())

    def _launch(self, pending: list[list[str]], folder: Path) -> bool:
        """Run what is pending; print why a run failed; whether one did."""
        assert self.launcher is not None and self.config is not None
        self.config.hydra.sweep.dir = str(folder)
        failed = False
        for job in self.launcher.launch(pending, initial_job_idx=0):
            if job.status == JobStatus.COMPLETED:
                continue
            failed = True
            message = _in_one_line(job._return_value)
            if message is None:
                traceback.print_exception(job._return_value)
                message = str(job._return_value)
            print(f"error: {message}", file=sys.stderr)
        return failed


def _in_one_line(error: BaseException) -> str | None:
    """What a person must change, or None where the error is nobody's but ours."""
    cause: BaseException | None = error
    while cause is not None:  # hydra.utils.instantiate wraps what a constructor raises
        if isinstance(cause, UserError):
            return str(cause)
        cause = cause.__cause__
    return None
