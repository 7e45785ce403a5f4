"""Time, energy and memory that a run took, over all processes that worked on it."""

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch

from clbench import footprint
from clbench.energy import Meter


class Spent:
    """Seconds and joules of training and evaluation, and the peak of memory in MB, over all processes of a run.

    Args:
        device: the device whose memory and energy are measured.

    Attributes:
        meter: of energy.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self.seconds = {"train_s": 0.0, "eval_s": 0.0}
        self.meter = Meter(device)
        # None where a process of the run could not measure it.
        self._joules: dict[str, float] | None = (
            {"train_j": 0.0, "eval_j": 0.0} if self.meter.available else None
        )
        self.peak_mb = 0.0
        self._under_way: tuple[str, float, float] | None = None  # the name, when it began, and joules then

    @contextmanager
    def on(self, name: str) -> Iterator[None]:
        """Inside, time counts as `train_s` or `eval_s`."""
        self._under_way = name, time.perf_counter(), self.meter.joules()
        try:
            yield
            self.seconds, self._joules = self._now()
        finally:
            self._under_way = None

    def _now(self) -> tuple[dict[str, float], dict[str, float] | None]:
        """Seconds and joules, with those of what is under way."""
        seconds, joules = dict(self.seconds), None if self._joules is None else dict(self._joules)
        if self._under_way:
            name, begin, before = self._under_way
            seconds[name] += time.perf_counter() - begin
            if joules is not None:
                joules[f"{name[:-1]}j"] += self.meter.joules() - before
        return seconds, joules

    def so_far(self) -> dict[str, float]:
        """What was spent until now: seconds under `train_s` and `eval_s`, MB under `peak_mb`.

        Joules under `train_j` and `eval_j`, where all processes of the run could measure them.
        """
        self.peak_mb = max(self.peak_mb, footprint.peak(self.device) / footprint.MB)
        seconds, joules = self._now()
        return {**seconds, **(joules or {}), "peak_mb": self.peak_mb}

    def restore(self, spent: Mapping[str, float]) -> None:
        """Continue from what `so_far` gave; of several, the one that was given last in the run counts."""
        if sum(spent[name] for name in self.seconds) >= sum(self.seconds.values()):
            self.seconds = {name: spent[name] for name in self.seconds}
            if self._joules is not None:
                self._joules = {name: spent[name] for name in self._joules} if "train_j" in spent else None
        self.peak_mb = max(self.peak_mb, spent["peak_mb"])
