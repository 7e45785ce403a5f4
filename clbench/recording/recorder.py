"""Recorders: what is told of a run's losses, heat maps and results besides its directory."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from clbench.metrics.continual import Matrix


class Recorder:
    """Is told everything that a run finds; this one does nothing with it.

    A process that continues a run tells it everything again from the beginning, pictures excepted.

    Attributes:
        wants_pictures: whether `pictures` is to be called; if not, none are drawn for it.
    """

    wants_pictures = False

    def epoch(self, stage: int, epoch: int, loss: float) -> None:
        """Called after an epoch with its mean loss.

        The stage is 0-based, and epochs are counted from 0 over all stages.
        """

    def pictures(self, stage: int, category: str, pictures: Sequence[np.ndarray]) -> None:
        """Called after a category was evaluated, with heat maps of a few test images, always the same ones.

        Args:
            stage: 0-based.
            category: its name.
            pictures: BGR, uint8 [H, W, 3] each.
        """

    def stage(self, stage: int, results: Mapping[str, Mapping[str, float | None]]) -> None:
        """Called after a stage, 0-based, with its results.

        Args:
            results: a category's name, `mean` or `forgetting` -> metric -> value; None where undefined.
        """

    def finish(self, summary: Mapping[str, Any], matrices: Mapping[str, Matrix]) -> str | None:
        """Called at the end of the run.

        Args:
            summary: what summary.json will hold.
            matrices: metric -> R, [stage][category].

        Returns:
            A line to show on the terminal; None for nothing.
        """
