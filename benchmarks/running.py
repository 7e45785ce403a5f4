"""Whole runs from Python, timed by phase: what train.py does, in a temporary directory."""

import tempfile
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch

from clbench import experiment
from clbench.assembly import assemble
from clbench.config import Config, check, sources
from clbench.interruption import Interruption
from clbench.recording.recorder import Recorder
from clbench.recording.run_directory import RunDirectory
from clbench.terminal import Display


class Stopwatch(Display):
    """A display that shows no lines, and knows how many seconds each phase took.

    What passes between two reports belongs to the phase of the later one: phases report what is done.
    """

    def __init__(self, run: str):
        super().__init__(run)
        self.seconds: dict[str, float] = defaultdict(float)
        self._last = time.perf_counter()

    def spent(self, phase: str) -> None:
        """Everything since the last report was spent on this."""
        now = time.perf_counter()
        self.seconds[phase] += now - self._last
        self._last = now

    def progress(self, phase: str, done: int, total: int, note: str = "") -> None:
        super().progress(phase, done, total, note)
        self.spent(phase)

    def heading(self, text: str) -> None:
        super().heading(text)
        self.spent("metrics" if "evaluating" in self.seconds else "start")

    def line(self, text: str) -> None:
        self.spent("metrics")

    def table(self, table: Any) -> None:
        self.spent("measuring inference time")


def composed(*overrides: str) -> Config:
    """The checked settings of a command line."""
    return check(sources.composed(*overrides))


def run(*overrides: str) -> tuple[dict[str, Any], dict[str, float]]:
    """A run's summary, and seconds by phase; `backbone` is the part of the others spent in the network."""
    with tempfile.TemporaryDirectory() as folder:
        return run_in(Path(folder), *overrides)


def run_in(folder: Path, *overrides: str) -> tuple[dict[str, Any], dict[str, float]]:
    """As `run`, the run's directory being given."""
    config = composed(*overrides)
    inside = [0.0]
    with Stopwatch(",".join(overrides)) as display:
        made = assemble(config, display.progress)
        for pyramid in made.strategy.detector.pyramids():
            _time(pyramid.network, inside)
        display.spent("start")
        summary = experiment.run(made, RunDirectory(folder), display, Interruption(), Recorder())
    return summary, {**display.seconds, "backbone": inside[0]}


def _time(network: torch.nn.Module, total: list[float]) -> None:
    """Add the seconds of every forward pass of a network to total[0]."""
    begin = [0.0]

    def before(*_: Any) -> None:
        begin[0] = time.perf_counter()

    def after(*_: Any) -> None:
        total[0] += time.perf_counter() - begin[0]

    network.register_forward_pre_hook(before)
    network.register_forward_hook(after)
