"""Who is told what a run does, beside its directory."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from clbench.metrics.continual import Matrix


class Recorder:
    """Is told all that a run finds, as often as a continued run comes by; this one listens to nothing.

    Attributes:
        wants_pictures: whether `pictures` is to be called, for which they are drawn.
    """

    wants_pictures = False

    def epoch(self, stage: int, epoch: int, loss: float) -> None:
        """The mean loss of an epoch, counted from 0 over the whole run."""

    def pictures(self, stage: int, category: str, pictures: Sequence[np.ndarray]) -> None:
        """Heat maps of a few of a category's test images after a stage, always the same: BGR uint8 [H, W, 3]."""

    def stage(self, stage: int, results: Mapping[str, Mapping[str, float | None]]) -> None:
        """Results after a stage: name (a category, `mean` or `forgetting`) -> metric -> value."""

    def finish(self, summary: Mapping[str, Any], matrices: Mapping[str, Matrix]) -> str | None:
        """The summary, and R of each metric: [stage][category]. Gives what a person should know, if anything."""
