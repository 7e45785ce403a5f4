"""The runs of a sweep: their overrides, how far each is, and which are to be launched. Imports no torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from omegaconf import DictConfig

from clbench.config.differences import settings_digest
from clbench.config.run_names import run_name
from clbench.config.schema import Gpu
from clbench.config.sources import composed_from
from clbench.recording.run_directory import RunDirectory, State

Only = Literal["failed", "missing"]


@dataclass
class SweepRun:
    """A run of a sweep.

    Attributes:
        overrides: what its config is composed from, such as `seed=1`.
        directory: where it is kept.
        state: how far it is.
        reason: why it failed; None where it did not.
        stage_mb: images of its largest stage, 10^6 bytes; None where nobody asked, or they are not there.
        buffer_mb: what its buffer takes when it is full, 10^6 bytes; None where nobody asked, or it is not known.
        model_mb: what a model of it takes, 10^6 bytes; None where nobody asked, or it is not known.
        config: what the overrides compose to, 0.2 MB, until it is started; None where another process composes it, or
            where the run is known to be finished.
        settings: digest of its settings, see `settings_digest`; None where it is known to be finished.
        gpu: on which device it is to run; None where the run is known to be finished.
    """

    overrides: list[str]
    directory: RunDirectory
    state: State
    reason: str | None = None
    stage_mb: float | None = None
    buffer_mb: float | None = None
    model_mb: float | None = None
    config: DictConfig | None = None
    settings: str | None = None
    gpu: Gpu | None = None


def to_launch(runs: Sequence[SweepRun], only: Only | None) -> list[SweepRun]:
    """The runs to launch: all that are not finished, those that `failed`, or those that are `missing`."""
    kinds: dict[str | None, tuple[State, ...]] = {
        None: ("failed", "unfinished", "missing"),
        "failed": ("failed",),
        "missing": ("unfinished", "missing"),
    }
    return [run for run in runs if run.state in kinds[only]]


def suited(
    runs: Sequence[list[str]], usual: Mapping[str, str], settings_of: Callable[[str, str], set[str]]
) -> list[list[str]]:
    """The overrides of each run, without settings that its choice lacks and another run's choice has.

    Args:
        runs: the overrides of each run.
        usual: group -> its choice in runs whose overrides name none.
        settings_of: group and choice -> the names of its settings.
    """
    for group in ("method", "strategy", "dataset", "task_order"):
        if not any(_setting(text, group) for overrides in runs for text in overrides):
            continue
        choices = [_choice(overrides, group, usual[group]) for overrides in runs]
        if len(set(choices)) == 1:
            continue
        settings = {choice: settings_of(group, choice) for choice in set(choices)}
        every = set().union(*settings.values())
        runs = [
            [text for text in overrides if _setting(text, group) not in every - settings[choice]]
            for overrides, choice in zip(runs, choices, strict=True)
        ]
    return list(runs)


def _choice(overrides: Sequence[str], group: str, usual: str) -> str:
    """The choice of a group that overrides name; `usual` where they name none."""
    return next((text.partition("=")[2] for text in overrides if text.startswith(f"{group}=")), usual)


def _setting(override: str, group: str) -> str | None:
    """The name of the setting that an override changes in a group's node.

    None where it changes something else.
    """
    node, _, name = override.lstrip("+").partition("=")[0].partition(".")
    return name.partition(".")[0] if node == group else None


def each_once(runs: Sequence[SweepRun]) -> list[tuple[SweepRun, list[SweepRun]]]:
    """The runs of a sweep, those of one experiment and the same settings once: the first, and the others.

    Several grids may ask for one run in different words, as with `seed=0` and without, which is the default.

    Raises:
        UserError: a run's config.yaml may not be read.
    """
    found: dict[tuple[Path, str], list[SweepRun]] = {}
    for run in runs:
        settings = run.settings
        if settings is None:
            config = run.directory.config()
            settings = settings_digest(config) if config else run.directory.path.name
        found.setdefault((run.directory.path.parent, settings), []).append(run)
    return [(first, others) for first, *others in found.values()]


def finished_unchanged(config: DictConfig, overrides: Sequence[str]) -> SweepRun | None:
    """The run of these overrides, if it is finished and all files that it was composed from are as they were.

    Comparing a digest of these files is far faster than composing the run's config again.

    Args:
        config: the sweep's own composed config.

    Returns:
        None where it is not finished, or where its config must be composed to tell.

    Raises:
        UserError: the run's summary.json may not be read.
    """
    if config.overwrite or not _folder_is_shared(config, overrides):
        return None
    directory = RunDirectory(Path(config.hydra.sweep.dir) / run_name(list(overrides)))
    summary = directory.summary()
    if summary is None or not directory.complete(summary):
        return None
    if summary.get("composed_from") != composed_from(config.hydra, overrides):
        return None
    return SweepRun(list(overrides), directory, "finished")


def _folder_is_shared(config: DictConfig, overrides: Sequence[str]) -> bool:
    """Whether the directory of a run is in the folder that the sweep's own config names."""
    given = dict(text.partition("=")[::2] for text in overrides)
    places = {"experiment": config.experiment, "outputs": config.outputs}
    return all(given.get(key, value) == value for key, value in places.items())


def distinct(runs: Sequence[SweepRun]) -> list[str]:
    """A name for each run in tables: those of its overrides that not all runs share."""
    given = [[text.lstrip("+") for text in run.overrides] for run in runs]
    shared = set(given[0]).intersection(*given[1:])
    return [
        ", ".join(text for text in texts if text not in shared) or run.directory.path.name
        for texts, run in zip(given, runs, strict=True)
    ]
