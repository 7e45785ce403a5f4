"""The runs of a sweep: what they are given, where each stands, which are launched. Imports no torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from omegaconf import DictConfig

from clbench.config.run_names import run_name
from clbench.config.sources import composed_from
from clbench.recording.run_directory import RunDirectory, State

Only = Literal["failed", "missing"]


@dataclass
class SweepRun:
    """A run of a sweep.

    Attributes:
        overrides: that make it.
        reason: of its failure, where it failed.
        config: what the overrides compose to, 0.2 MB, until it is started; None where another process composes it.
    """

    overrides: list[str]
    directory: RunDirectory
    state: State
    reason: str | None = None
    config: DictConfig | None = None


def chosen(runs: Sequence[SweepRun], only: Only | None) -> list[SweepRun]:
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
    """The overrides of each run without those settings that its choice does not have and another run's has.

    Args:
        usual: the choice of each group, for runs whose overrides name none.
        settings_of: gives the names of the settings of a group's choice.
    """
    for group in ("method", "strategy", "dataset"):
        choices = [_choice(overrides, group, usual[group]) for overrides in runs]
        given = any(_setting(text, group) for overrides in runs for text in overrides)
        if len(set(choices)) == 1 or not given:
            continue
        has = {choice: settings_of(group, choice) for choice in set(choices)}
        anyone = set().union(*has.values())
        runs = [
            [text for text in overrides if _setting(text, group) not in anyone - has[choice]]
            for overrides, choice in zip(runs, choices, strict=True)
        ]
    return list(runs)


def _choice(overrides: Sequence[str], group: str, usual: str) -> str:
    """A group's choice under these overrides."""
    return next((text.partition("=")[2] for text in overrides if text.startswith(f"{group}=")), usual)


def _setting(override: str, group: str) -> str | None:
    """The name of the setting of a group's node that an override gives a value; None for any other."""
    node, _, name = override.lstrip("+").partition("=")[0].partition(".")
    return name.partition(".")[0] if node == group else None


def finished_unchanged(config: DictConfig, overrides: Sequence[str]) -> SweepRun | None:
    """The finished run of these overrides, known by what it was composed from: far faster than composing it.

    Args:
        config: of the sweep, with what its runs share.

    Returns:
        None where it is not finished, or where only composing it could tell.
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
    """Whether a run lies where its sweep's own config says."""
    given = dict(text.partition("=")[::2] for text in overrides)
    places = {"experiment": config.experiment, "outputs": config.outputs}
    return all(given.get(key, value) == value for key, value in places.items())


def distinct(runs: Sequence[SweepRun]) -> list[str]:
    """What each run's overrides do not share with the others', for tables."""
    given = [[text.lstrip("+") for text in run.overrides] for run in runs]
    shared = set(given[0]).intersection(*given[1:])
    return [
        ", ".join(text for text in texts if text not in shared) or run.directory.path.name
        for texts, run in zip(given, runs, strict=True)
    ]
