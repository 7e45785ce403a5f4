"""What a run costs in time and memory, over all processes that worked on it."""

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch

from clbench import footprint


class Spent:
    """Seconds of training and evaluation and the peak of memory, over all processes that worked on a run."""

    def __init__(self, device: torch.device):
        self.device = device
        self.seconds = {"train_s": 0.0, "eval_s": 0.0}
        self.peak_mb = 0.0
        self._under_way: tuple[str, float] | None = None

    @contextmanager
    def on(self, what: str) -> Iterator[None]:
        """Inside, time is spent on this."""
        begin = time.perf_counter()
        self._under_way = what, begin
        try:
            yield
        finally:
            self._under_way = None
        self.seconds[what] += time.perf_counter() - begin

    def so_far(self) -> dict[str, float]:
        """What was spent up to now: `train_s`, `eval_s` and `peak_mb`."""
        self.peak_mb = max(self.peak_mb, footprint.peak(self.device) / footprint.MB)
        seconds = dict(self.seconds)
        if self._under_way:
            what, begin = self._under_way
            seconds[what] += time.perf_counter() - begin
        return {**seconds, "peak_mb": self.peak_mb}

    def restore(self, spent: Mapping[str, float]) -> None:
        """Go on from what `so_far` gave; where it is restored more than once, from what was given last in the run."""
        if sum(spent[what] for what in self.seconds) >= sum(self.seconds.values()):
            self.seconds = {what: spent[what] for what in self.seconds}
        self.peak_mb = max(self.peak_mb, spent["peak_mb"])
