"""The sweeper behind train.py. Hydra looks for plugins in this package, and takes them from nowhere else."""

import sys
import traceback
from pathlib import Path

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.utils import JobStatus
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from clbench.config import check, explain
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
        display.line(f"results: {runs[0][1].path if len(runs) == 1 else runs[0][1].path.parent}")
        if failed:
            sys.exit(1)

    def _unfinished_and_finished(self, arguments: list[str]) -> list[tuple[list[str], RunDirectory, bool]]:
        """Each run's overrides, its directory, and whether it is finished."""
        assert self.hydra_context is not None
        parser = OverridesParser.create(config_loader=self.hydra_context.config_loader)
        try:
            points = self.split_arguments(parser.parse_overrides(arguments), None)[0]
        except HydraException as error:
            raise UserError(str(error).strip().splitlines()[0]) from error
        runs: dict[Path, tuple[list[str], RunDirectory, bool]] = {}
        for overrides in points:
            config = self._composed(overrides)
            directory = RunDirectory(Path(config.hydra.sweep.dir) / config.hydra.sweep.subdir)
            settings = check(config)
            runs[directory.path] = (overrides, directory, directory.finished(settings))
        return list(runs.values())

    def _composed(self, overrides: list[str]) -> DictConfig:
        assert self.hydra_context is not None and self.config is not None
        loader = self.hydra_context.config_loader
        try:
            return loader.load_sweep_config(self.config, overrides)
        except (HydraException, OmegaConfBaseException) as error:
            default = loader.load_sweep_config(self.config, [])
            groups = {
                group: loader.get_group_options(group) for group in loader.list_groups("") if group != "hydra"
            }
            with_groups = [text for text in overrides if text.partition("=")[0] in groups]
            try:
                default = loader.load_sweep_config(self.config, with_groups)
            except (HydraException, OmegaConfBaseException):
                pass  # one of the groups is what is wrong; the default's keys serve as well
            OmegaConf.set_struct(default, False)
            default.pop("hydra")
            raise explain(error, overrides, default, groups) from error

    def _launch(self, pending: list[list[str]], folder: Path) -> bool:
        """Run what is pending; print why a run failed; whether one did."""
        assert self.launcher is not None and self.config is not None
        self.config.hydra.sweep.dir = str(folder)
        failed = False
        for job in self.launcher.launch(pending, initial_job_idx=0):
            if job.status == JobStatus.COMPLETED:
                continue
            failed = True
            error = job._return_value
            if not isinstance(error, UserError | OSError):
                traceback.print_exception(error)
            print(f"error: {','.join(job.overrides or [])}: {error}", file=sys.stderr)
        return failed
