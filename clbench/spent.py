"""Time and memory that a run took, over all processes that worked on it."""

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch

from clbench import footprint


class Spent:
    """Seconds of training and evaluation, and the peak of memory in MB, over all processes of a run.

    Args:
        device: the device whose memory is measured.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self.seconds = {"train_s": 0.0, "eval_s": 0.0}
        self.peak_mb = 0.0
        self._under_way: tuple[str, float] | None = None  # the name, and when it began

    @contextmanager
    def on(self, name: str) -> Iterator[None]:
        """Inside, time counts as `train_s` or `eval_s`."""
        begin = time.perf_counter()
        self._under_way = name, begin
        try:
            yield
        finally:
            self._under_way = None
        self.seconds[name] += time.perf_counter() - begin

    def so_far(self) -> dict[str, float]:
        """What was spent until now: seconds under `train_s` and `eval_s`, MB under `peak_mb`."""
        self.peak_mb = max(self.peak_mb, footprint.peak(self.device) / footprint.MB)
        seconds = dict(self.seconds)
        if self._under_way:
            name, begin = self._under_way
            seconds[name] += time.perf_counter() - begin
        return {**seconds, "peak_mb": self.peak_mb}

    def restore(self, spent: Mapping[str, float]) -> None:
        """Continue from what `so_far` gave; of several, the one that was given last in the run counts."""
        if sum(spent[name] for name in self.seconds) >= sum(self.seconds.values()):
            self.seconds = {name: spent[name] for name in self.seconds}
        self.peak_mb = max(self.peak_mb, spent["peak_mb"])
