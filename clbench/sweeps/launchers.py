"""Launchers: hydra/launcher=sequential, local, slurm and slurm_cpu. Imports no torch."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from hydra.core.singleton import Singleton
from hydra.core.utils import JobReturn, JobStatus, run_job
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from hydra_plugins.hydra_joblib_launcher.joblib_launcher import JoblibLauncher
from hydra_plugins.hydra_submitit_launcher.submitit_launcher import SlurmLauncher
from omegaconf import DictConfig, open_dict

from clbench.config import register, run_name
from clbench.errors import UserError
from clbench.recording.run_directory import RunDirectory
from clbench.sweeps import cluster
from clbench.sweeps.runs import SweepRun

_POLL_S = 2.0  # seconds between two looks at the queue, at first; then up to
_SLOWEST_S = 30.0


@runtime_checkable
class Starts(Protocol):
    """A launcher that starts runs whose settings were composed already."""

    def start(self, runs: Sequence[SweepRun], first: int) -> Sequence[JobReturn]:
        """Run all, and tell how each ended.

        Args:
            first: number of the first of them in the sweep, from 0.

        Raises:
            UserError: none of them can be started.
        """
        ...


class SequentialLauncher(Launcher):
    """One run after the other, in this process."""

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        """What Hydra hands over before runs."""
        self.hydra_context, self.task_function, self.config = hydra_context, task_function, config

    def start(self, runs: Sequence[SweepRun], first: int) -> Sequence[JobReturn]:
        """Run what was composed, see `Starts`."""
        returned = []
        for number, run in enumerate(runs, first):
            config, run.config = run.config, None
            returned.append(self._run(config, number))
        return returned

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        """Compose and run, for another sweeper than ours."""
        loader = self.hydra_context.config_loader
        return [
            self._run(loader.load_sweep_config(self.config, list(overrides)), initial_job_idx + index)
            for index, overrides in enumerate(job_overrides)
        ]

    def _run(self, config: DictConfig | None, number: int) -> JobReturn:
        assert config is not None
        with open_dict(config):
            config.hydra.job.id = config.hydra.job.num = number
        return run_job(
            hydra_context=self.hydra_context,
            task_function=self.task_function,
            config=config,
            job_dir_key="hydra.sweep.dir",
            job_subdir_key="hydra.sweep.subdir",
        )


class LocalLauncher(JoblibLauncher):
    """Several runs at a time on this machine, each in a process of its own with its share of the cores.

    Where one of the processes is killed, for its memory perhaps, joblib ends all of them. So what was begun and not
    finished goes on alone, a run at a time: the one that is killed again has failed, and the rest is run.
    """

    def start(self, runs: Sequence[SweepRun], first: int) -> Sequence[JobReturn]:
        """Run all, and tell how each ended, see `Starts`."""
        from joblib.externals.loky.process_executor import TerminatedWorkerError

        directories = [run.directory for run in runs]
        results: dict[int, JobReturn] = {}
        suspects: set[int] = set()
        several = self.joblib["n_jobs"]
        # joblib runs a single job at a time in this very process, which would then be the one that is killed.
        self.joblib["n_jobs"] = several if several == -1 else max(2, several)
        begun = time.time()
        while len(results) < len(runs):
            rest = [index for index in range(len(runs)) if index not in results]
            alone = [index for index in rest if index in suspects][:1] or (rest[:1] if several == 1 else [])
            turn = alone or rest
            try:
                returned = self.launch([runs[index].overrides for index in turn], first)
            except TerminatedWorkerError:
                for index in turn:
                    if (result := _written_since(begun, directories[index])) is not None:
                        results[index] = result
                    elif alone:
                        reason = (
                            "its process was killed, for its memory perhaps; the same command continues it"
                        )
                        results[index] = failure(directories[index], reason)
                if not alone:
                    left = [index for index in turn if index not in results]
                    entered = {index for index in left if (directories[index].path / "run.lock").exists()}
                    suspects |= entered or set(left)
            else:
                results |= dict(zip(turn, returned, strict=True))
        return [results[index] for index in range(len(runs))]


def _written_since(begun: float, directory: RunDirectory) -> JobReturn | None:
    """How a run ended, if it did after this time."""
    summary = directory.summary()
    if summary is None or (directory.path / "summary.json").stat().st_mtime < begun:
        return None
    if directory.complete(summary):
        return JobReturn(status=JobStatus.COMPLETED)
    return failure(directory, summary["reason"]) if summary["status"] == "failed" else None


def failure(directory: RunDirectory, reason: str) -> JobReturn:
    """A run that failed."""
    result = JobReturn(status=JobStatus.FAILED)
    result.return_value = UserError(f"{directory.path}: {reason}")
    return result


class ClusterLauncher(SlurmLauncher):
    """Fills a SLURM cluster, and finds again what an earlier process submitted.

    A run's job is written into its directory, so that the same command, started anew, waits for the job in
    place of submitting a second one. How a run ended is read from its directory too; nothing is unpickled.
    """

    def __call__(
        self,
        sweep_overrides: list[str],
        job_dir_key: str,
        job_num: int,
        job_id: str,
        singleton_state: dict[type, Singleton],
    ) -> JobReturn:
        """In the job: run, and let the job fail where the run does, so that sacct says so."""
        register()
        os.environ.setdefault("OMP_NUM_THREADS", os.environ.get("SLURM_CPUS_PER_TASK", "1"))
        cluster.rename_job(run_name(sweep_overrides))
        result = super().__call__(sweep_overrides, job_dir_key, job_num, job_id, singleton_state)
        _ = result.return_value  # raises what the run raised
        return JobReturn(status=result.status)

    def start(self, runs: Sequence[SweepRun], first: int) -> Sequence[JobReturn]:
        """Submit what has no job yet, wait for all, and tell how each ended, see `Starts`.

        Raises:
            UserError: there is no SLURM here, or it does not take the jobs.
        """
        from clbench.terminal import Display

        cluster.check_there()
        there = cluster.queue()
        display = Display("sweep")
        new = []
        for run in runs:
            job = run.directory.job() or {}
            if job.get("id") in there:
                display.line(f"has a job already: {run.directory.path}: {job['id']}")
            else:
                new.append(run)
        if new:
            self._submit(new, first, display)
        directories = [run.directory for run in runs]
        with display:
            self._wait(directories, display)
        return [self._ended(directory) for directory in directories]

    def _submit(self, runs: Sequence[SweepRun], first: int, display: Any) -> None:
        """Submit a job for each run, and write it into the run's directory."""
        import submitit
        from submitit.core.utils import FailedJobError

        parameters = dict(self.params)
        folder = Path(parameters.pop("submitit_folder")).absolute()
        timeouts = parameters.pop("max_num_timeout")
        executor = submitit.AutoExecutor(folder, cluster="slurm", slurm_max_num_timeout=timeouts)
        executor.update_parameters(**{f"slurm_{name}": value for name, value in parameters.items()})
        tasks = [
            (list(run.overrides), "hydra.sweep.dir", index, f"job_id_for_{index}", Singleton.get_state())
            for index, run in enumerate(runs, first)
        ]
        try:
            submitted = executor.map_array(self, *zip(*tasks, strict=True))
        except FailedJobError as error:
            raise cluster.rejected(error) from error
        for job, run in zip(submitted, runs, strict=True):
            run.directory.create()
            run.directory.write_job({"id": job.job_id, "log": str(job.paths.stdout)})
        display.line(
            f"submitted {len(submitted)} jobs, {submitted[0].job_id} to {submitted[-1].job_id}; they go on without "
            "this process, and the same command finds them again"
        )

    def _wait(self, directories: Sequence[RunDirectory], display: Any) -> None:
        """Until no run's job is in the queue any more."""
        pause = _POLL_S
        while True:
            there = cluster.queue()
            states = [there.get((directory.job() or {}).get("id", "")) for directory in directories]
            over = states.count(None)
            running, queued = states.count("running"), states.count("queued")
            display.progress("jobs", over, len(states), f"{running} running, {queued} queued")
            if over == len(states):
                return
            time.sleep(pause)
            pause = min(pause * 1.2, _SLOWEST_S)

    def _ended(self, directory: RunDirectory) -> JobReturn:
        summary, job = directory.summary(), directory.job() or {}
        if summary is not None and directory.complete(summary):
            return JobReturn(status=JobStatus.COMPLETED)
        if summary is not None and summary["status"] == "failed":
            reason = summary["reason"]
        else:
            reason = f"the job ended before the run did ({cluster.outcome(job['id'])})"
        return failure(directory, f"{reason}; log: {job['log']}")
