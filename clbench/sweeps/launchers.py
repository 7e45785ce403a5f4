"""Launchers: hydra/launcher=sequential, local, slurm and slurm_cpu. Imports no torch."""

from __future__ import annotations

import os
import time
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol, runtime_checkable

from hydra.core.singleton import Singleton
from hydra.core.utils import JobReturn, JobStatus, run_job
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from hydra_plugins.hydra_joblib_launcher.joblib_launcher import JoblibLauncher
from hydra_plugins.hydra_submitit_launcher.submitit_launcher import SlurmLauncher
from omegaconf import DictConfig, open_dict

from clbench.config import register, run_name
from clbench.cores import usable_cores
from clbench.errors import UserError, counted
from clbench.paths import expanded
from clbench.recording.run_directory import RunDirectory
from clbench.sweeps import cluster, gpus
from clbench.sweeps.runs import SweepRun

_POLL_S = 2.0  # seconds between the first two looks at the queue
_SLOWEST_S = 30.0  # seconds between two looks, at most
_USUAL = 2  # runs at a time on a machine without GPUs
_THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
_KILLED = "its process was killed, for its memory perhaps; the same command continues it"


@runtime_checkable
class Starts(Protocol):
    """A launcher that starts runs whose settings were composed already."""

    def start(self, runs: Sequence[SweepRun], first: int) -> Sequence[JobReturn]:
        """Run all of these runs.

        Args:
            runs: the runs.
            first: number of the first of them in the sweep, 0-based.

        Returns:
            How each ended.

        Raises:
            UserError: none of them can be started.
        """
        ...


class SequentialLauncher(Launcher):
    """One run after the other, in this process."""

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        """Take what Hydra gives before any run."""
        self.hydra_context, self.task_function, self.config = hydra_context, task_function, config

    def start(self, runs: Sequence[SweepRun], first: int) -> Sequence[JobReturn]:
        """Run all of these runs, see `Starts`."""
        returned = []
        for number, run in enumerate(runs, first):
            config, run.config = run.config, None
            returned.append(self._run(config, number))
        return returned

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        """Compose and run every list of overrides, for other sweepers than `RunSweeper`."""
        loader = self.hydra_context.config_loader
        return [
            self._run(loader.load_sweep_config(self.config, list(overrides)), initial_job_idx + index)
            for index, overrides in enumerate(job_overrides)
        ]

    def _run(self, config: DictConfig | None, number: int) -> JobReturn:
        """Run a composed config as the run with this number of the sweep."""
        assert config is not None
        with open_dict(config):
            config.hydra.job.id = config.hydra.job.num = number
        job = run_job(
            hydra_context=self.hydra_context,
            task_function=self.task_function,
            config=config,
            job_dir_key="hydra.sweep.dir",
            job_subdir_key="hydra.sweep.subdir",
        )
        if job.status is not JobStatus.COMPLETED:
            _forget_frames(job._return_value)
        return job


def _forget_frames(error: BaseException) -> None:
    """Let go of all variables of the functions that an exception passed through: a run's tensors are among them.

    Its lines can still be printed.
    """
    known: set[int] = set()
    waiting: list[BaseException | None] = [error]
    while waiting:
        if (one := waiting.pop()) is None or id(one) in known:
            continue
        known.add(id(one))
        traceback.clear_frames(one.__traceback__)
        waiting += [one.__cause__, one.__context__]


class LocalLauncher(JoblibLauncher):
    """Several runs at a time on this machine, each in a process of its own with a GPU of its own and its share of the cores.

    Where one of the processes is killed, for its memory perhaps, joblib ends all of them. Runs that were
    begun and not finished are then continued one at a time: one that is killed again has failed.

    Args:
        n_jobs: number of runs at a time, or, less than 0, joblib's: -1 for as many as there are cores. None: one on each GPU
            where a run may use GPUs and there are some; else as many as have `gpu.threads` cores each, or two.
        settings: further ones of joblib's `Parallel`.

    Raises:
        UserError: `n_jobs` is no such number.
    """

    def __init__(self, n_jobs: int | None = None, **settings: Any) -> None:
        if n_jobs == 0 or isinstance(n_jobs, bool) or not isinstance(n_jobs, int | None):
            raise UserError(
                f"hydra.launcher.n_jobs={n_jobs}: give a number of runs at a time, -1 for as many as there are cores, or null"
            )
        super().__init__(n_jobs=n_jobs, **settings)
        self.given = n_jobs

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        """Take what Hydra gives before any run."""
        super().setup(hydra_context=hydra_context, task_function=task_function, config=config)
        self.task = task_function

    def start(self, runs: Sequence[SweepRun], first: int) -> Sequence[JobReturn]:
        """Run all of these runs, see `Starts`.

        Raises:
            UserError: a run names a GPU by its number.
        """
        from joblib.externals.loky import get_reusable_executor
        from joblib.externals.loky.process_executor import TerminatedWorkerError

        directories = [run.directory for run in runs]
        results: dict[int, JobReturn] = {}
        suspects: set[int] = set()
        found = _gpus(runs)
        self.task_function = gpus.OnOneGpu(self.task, found) if found else self.task
        several = self._at_a_time(runs, found)
        # joblib runs a single job at a time in this very process, which would then be the one that is killed.
        self.joblib["n_jobs"] = max(2, several)
        begun = time.time()
        while len(results) < len(runs):
            rest = [index for index in range(len(runs)) if index not in results]
            alone = [index for index in rest if index in suspects][:1] or (rest[:1] if several == 1 else [])
            batch = alone or rest
            try:
                with _threads(max(1, usable_cores() // several)):
                    returned = self.launch([runs[index].overrides for index in batch], first)
            except TerminatedWorkerError:
                for index in batch:
                    if (result := _written_since(begun, directories[index])) is not None:
                        results[index] = result
                    elif alone:
                        results[index] = failure(_KILLED)
                if not alone:
                    unfinished = {index for index in batch if index not in results}
                    begun_ones = {i for i in unfinished if (directories[i].path / "run.lock").exists()}
                    suspects |= begun_ones or unfinished
            else:
                results |= dict(zip(batch, returned, strict=True))
            finally:
                if found:  # idle processes would hold their GPU, and some of its memory
                    get_reusable_executor().shutdown(wait=True)
        return [results[index] for index in range(len(runs))]

    def _at_a_time(self, runs: Sequence[SweepRun], found: Sequence[str]) -> int:
        """Number of runs at a time.

        Args:
            found: the GPUs that they are to use.
        """
        if self.given is not None:
            return self.given if self.given > 0 else max(1, usable_cores() + 1 + self.given)
        if found:
            return len(found)
        threads = max((run.gpu and run.gpu.threads) or 0 for run in runs)
        return max(1, usable_cores() // threads) if threads else _USUAL


def _gpus(runs: Sequence[SweepRun]) -> list[str]:
    """The GPUs that these runs are to use, as `gpus.visible` names them; none where no run may use one.

    Raises:
        UserError: a run names its GPU.
    """
    devices = {run.gpu.device for run in runs if run.gpu}
    for device in sorted(devices):
        if device.startswith("cuda:"):
            raise UserError(
                f"gpu.device={device} names one GPU, and hydra/launcher=local gives each process one, in turn: leave it out; "
                f"{gpus.VISIBLE}={device[5:]} before the command says which GPUs there are to give"
            )
    return gpus.visible() if devices - {"cpu"} else []


@contextmanager
def _threads(count: int) -> Iterator[None]:
    """Inside, processes that are started take so many threads, unless OMP_NUM_THREADS says otherwise."""
    added = [name for name in _THREADS if name not in os.environ]
    number = os.environ.get(_THREADS[0], str(count))
    os.environ.update(dict.fromkeys(added, number))
    try:
        yield
    finally:
        for name in added:
            del os.environ[name]


def _written_since(begun: float, directory: RunDirectory) -> JobReturn | None:
    """How a run ended; None where it has not ended since a time, in seconds since 1970."""
    summary = directory.summary()
    if summary is None or (directory.path / "summary.json").stat().st_mtime < begun:
        return None
    if directory.complete(summary):
        return JobReturn(status=JobStatus.COMPLETED)
    return failure(summary["reason"]) if summary["status"] == "failed" else None


def failure(reason: str) -> JobReturn:
    """What Hydra is told of a run that failed, with the reason for people."""
    result = JobReturn(status=JobStatus.FAILED)
    result.return_value = UserError(reason)
    return result


class ClusterLauncher(SlurmLauncher):
    """Submits every run as a job of SLURM, and waits for all of them.

    A run's job is noted in its directory: the same command, started anew, waits for that job in place of
    submitting a second one. How a run ended is read from its directory too; nothing is unpickled.
    """

    def __call__(
        self,
        sweep_overrides: list[str],
        job_dir_key: str,
        job_num: int,
        job_id: str,
        singleton_state: dict[type, Singleton],
    ) -> JobReturn:
        """Run one run, in its job; arguments are Hydra's.

        Raises:
            Exception: what the run raised, so that the job fails and sacct shows it.
        """
        register()
        os.environ.setdefault("OMP_NUM_THREADS", os.environ.get("SLURM_CPUS_PER_TASK", "1"))
        cluster.rename_job(run_name(sweep_overrides))
        result = super().__call__(sweep_overrides, job_dir_key, job_num, job_id, singleton_state)
        _ = result.return_value  # raises what the run raised
        return JobReturn(status=result.status)

    def start(self, runs: Sequence[SweepRun], first: int) -> Sequence[JobReturn]:
        """Submit the runs that have no job yet and wait for all, see `Starts`.

        Raises:
            UserError: there is no SLURM here, it does not answer, or it does not take the jobs.
        """
        from clbench.terminal import Display

        cluster.check_there()
        waiting = cluster.queue()
        display = Display("sweep")
        new = []
        for run in runs:
            job = run.directory.job() or {}
            if job.get("id") in waiting:
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
        """Submit a job for each run, in as many arrays as the cluster needs, and note it in the run's directory.

        Raises:
            UserError: SLURM does not take the jobs, or a directory cannot be written; jobs of earlier arrays go on.
        """
        import submitit

        parameters = dict(self.params)
        folder = expanded(parameters.pop("submitit_folder"), "hydra.launcher.submitit_folder").absolute()
        timeouts = parameters.pop("max_num_timeout")
        executor = submitit.AutoExecutor(folder, cluster="slurm", slurm_max_num_timeout=timeouts)
        executor.update_parameters(**{f"slurm_{name}": value for name, value in parameters.items()})
        limit = cluster.array_limit() if len(runs) > 1 else None
        arrays = cluster.arrays(len(runs), limit, parameters["array_parallelism"])
        submitted: list[list[Any]] = []  # the jobs of each array
        rest = list(enumerate(runs, first))
        for size, parallel, after in arrays:
            part, rest = rest[:size], rest[size:]
            executor.update_parameters(slurm_array_parallelism=parallel)
            if after is not None:
                ended = submitted[after][0].job_id.partition("_")[0]
                executor.update_parameters(slurm_dependency=f"afterany:{ended}")
            submitted.append(self._submit_array(executor, part))
        jobs = [job.job_id for array in submitted for job in array]
        several = f" in {len(arrays)} arrays" if len(arrays) > 1 else ""
        numbers = " to ".join(dict.fromkeys((jobs[0], jobs[-1])))
        display.line(
            f"submitted {counted(len(jobs), 'job')}{several}, {numbers}; they go on without this process, and the "
            "same command finds them again"
        )

    def _submit_array(self, executor: Any, part: Sequence[tuple[int, SweepRun]]) -> list[Any]:
        """Submit an array, and note each job in its run's directory.

        Args:
            executor: submitit's.
            part: number of each run in the sweep, and the run.

        Returns:
            submitit's jobs.

        Raises:
            UserError: SLURM does not take it, or a directory cannot be written.
        """
        from submitit.core.utils import FailedJobError

        tasks = [
            (list(run.overrides), "hydra.sweep.dir", index, f"job_id_for_{index}", Singleton.get_state())
            for index, run in part
        ]
        try:
            submitted = executor.map_array(self, *zip(*tasks, strict=True))
        except FailedJobError as error:
            raise cluster.rejected(error) from error
        for job, (_, run) in zip(submitted, part, strict=True):
            run.directory.create()
            run.directory.write_job({"id": job.job_id, "log": str(job.paths.stdout)})
        return submitted

    def _wait(self, directories: Sequence[RunDirectory], display: Any) -> None:
        """Wait until none of the runs' jobs is in the queue any more.

        Raises:
            UserError: SLURM does not answer.
        """
        pause = _POLL_S
        while True:
            queue = cluster.queue()
            states = [queue.get((directory.job() or {}).get("id", "")) for directory in directories]
            ended, running, queued = (states.count(state) for state in (None, "running", "queued"))
            display.progress("jobs", ended, len(states), f"{running} running, {queued} queued")
            if ended == len(states):
                return
            time.sleep(pause)
            pause = min(pause * 1.2, _SLOWEST_S)

    def _ended(self, directory: RunDirectory) -> JobReturn:
        """How the run of a job that has ended ended itself."""
        summary, job = directory.summary(), directory.job() or {}
        if summary is not None and directory.complete(summary):
            return JobReturn(status=JobStatus.COMPLETED)
        if summary is not None and summary["status"] == "failed":
            reason = summary["reason"]
        else:
            reason = f"the job ended before the run did ({cluster.outcome(job['id'])})"
        return failure(reason)
