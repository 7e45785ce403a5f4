"""R by stage, category and metric: the evaluations of a run, and means, forgetting and transfer."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from clbench.metrics import continual
from clbench.metrics.continual import Matrix
from clbench.metrics.names import METRICS, USUAL

Values = dict[str, float | None]  # metric -> value; None where it is undefined


class Evaluation(NamedTuple):
    """What was measured of a category after a stage.

    Attributes:
        values: its metrics.
        chosen: for how many of its test images the model of each stage was chosen; None where none is, or before the last
            stage.
        pixel_fpr_deviation: of the pixels' false-positive rate, from one normal test image to another; None where it is
            not measured.
    """

    values: Values
    chosen: list[int] | None = None
    pixel_fpr_deviation: float | None = None


class Results:
    """The evaluations of a run, each a category's metrics after a stage.

    A task's value is the mean of its categories', and a stream's the mean over all categories: so tasks that bring
    several categories at once compare with tasks that bring one.

    Args:
        tasks: the categories of each task, in the order of the stream.
        stages: the indices of the tasks that each stage learns.
        metrics: names of those that each evaluation has, see `clbench.metrics.names`.

    Attributes:
        categories: the names of the categories of all tasks, in order: the columns of R.
        task_of: the index of each category's task.
        learned: the stage that learns each category, 0-based.
    """

    def __init__(
        self,
        tasks: Sequence[Sequence[str]],
        stages: Sequence[Sequence[int]],
        metrics: Sequence[str] = USUAL,
    ):
        self.metrics = tuple(metrics)
        self.categories = [name for task in tasks for name in task]
        self.task_of = [index for index, task in enumerate(tasks) for _ in task]
        stage_of = {task: stage for stage, learning in enumerate(stages) for task in learning}
        self.learned = [stage_of[task] for task in self.task_of]
        self._evaluated = np.zeros((len(stages), len(self.categories)), dtype=bool)
        # NaN: undefined, or not evaluated.
        self._R = {metric: np.full(self._evaluated.shape, np.nan) for metric in self.metrics}
        # By stage and category, where there are any.
        self._chosen: dict[tuple[int, int], list[int]] = {}
        self._deviations: dict[tuple[int, int], float] = {}
        # The best of each category before a stage.
        self._best, self._best_until = self._none_yet(), 0

    def add(
        self,
        stage: int,
        category: int,
        values: Values,
        chosen: list[int] | None = None,
        pixel_fpr_deviation: float | None = None,
    ) -> None:
        """Set what was measured of a category after a stage, see `Evaluation`; one that was evaluated before gets these."""
        if chosen is not None:
            self._chosen[stage, category] = chosen
        if pixel_fpr_deviation is not None:
            self._deviations[stage, category] = pixel_fpr_deviation
        self._evaluated[stage, category] = True
        for metric, R in self._R.items():
            value = values.get(metric)  # a journal of an earlier version may lack one
            R[stage, category] = np.nan if value is None else value

    def chosen(self, stage: int, category: int) -> list[int] | None:
        """How often the model of each stage was chosen for a category's test images after a stage; None where none is."""
        return self._chosen.get((stage, category))

    def pixel_fpr_deviation(self, stage: int, category: int) -> float | None:
        """See `Evaluation`."""
        return self._deviations.get((stage, category))

    def get(self, stage: int, category: int) -> Values | None:
        """The metrics of a category after a stage; None where it was not evaluated."""
        if not self._evaluated[stage, category]:
            return None
        return dict(
            zip(self._R, _plain(np.array([R[stage, category] for R in self._R.values()])), strict=True)
        )

    def matrix(self, metric: str) -> Matrix:
        """R of one metric, by stage and category; None where it is undefined or was not evaluated."""
        return [_plain(row) for row in self._R[metric]]

    def seen(self, stage: int) -> list[int]:
        """The indices of the categories learned up to a stage, this one included."""
        return [category for category, learned in enumerate(self.learned) if learned <= stage]

    def mean_seen(self, metric: str, stage: int) -> float | None:
        """A metric's mean over the categories learned up to a stage; None where it is defined for none."""
        return continual.mean(_plain(self._R[metric][stage, self.seen(stage)]))

    def after(self, stage: int) -> dict[str, Values]:
        """The results of a stage: name -> metric -> value.

        Names are those of the categories evaluated after it; `mean`, over the categories learned so far; and
        `forgetting`, what they have lost on average against their best of earlier stages, also where lower is better. The
        best values so far are remembered, so that asking stage after stage costs the same for each.
        """
        found: dict[str, Values] = {}
        for category in np.flatnonzero(self._evaluated[stage]).tolist():
            found[self.categories[category]] = self.get(stage, category) or {}
        found["mean"] = {metric: self.mean_seen(metric, stage) for metric in self.metrics}
        best = self._best_before(stage)
        found["forgetting"] = {
            metric: continual.mean(_plain(best[metric] - self._upwards(metric)[stage]))
            for metric in self.metrics
        }
        return found

    def _upwards(self, metric: str) -> np.ndarray:
        """R of a metric, float64 [stages, categories], with the sign that makes greater values better."""
        known = METRICS.get(metric)
        return -self._R[metric] if known is not None and known.better == "lower" else self._R[metric]

    def _best_before(self, stage: int) -> dict[str, np.ndarray]:
        """Metric -> float64 [categories]: the best value of each, see `_upwards`, since the stage that learned it.

        The stage itself does not count. NaN where a category was not learned before it.
        """
        if stage < self._best_until:
            self._best, self._best_until = self._none_yet(), 0
        for earlier in range(self._best_until, stage):
            seen = self.seen(earlier)
            for metric in self.metrics:
                values = self._upwards(metric)[earlier, seen]
                self._best[metric][seen] = np.fmax(self._best[metric][seen], values)
        self._best_until = stage
        return self._best

    def _none_yet(self) -> dict[str, np.ndarray]:
        """Best values before any stage: metric -> float64 [categories], all NaN."""
        return {metric: np.full(len(self.categories), np.nan) for metric in self.metrics}

    def just_learned(self, metric: str) -> list[float | None]:
        """Each category's value after the stage that learned it."""
        return _plain(self._R[metric][self.learned, range(len(self.learned))])

    def summary(self) -> dict[str, Any]:
        """The means of R in summary.json: final values, forgetting and transfer, each over the categories."""
        R = {metric: self.matrix(metric) for metric in self.metrics}
        upwards = {metric: list(map(_plain, self._upwards(metric))) for metric in self.metrics}
        last = len(R["pixel_f1"]) - 1
        chosen = {name: self.chosen(last, category) for category, name in enumerate(self.categories)}
        return {
            "final": {metric: continual.final_mean(R[metric]) for metric in self.metrics},
            "average_forgetting_pct": continual.average_forgetting_pct(R["pixel_f1"], self.learned),
            "forgetting": {
                metric: continual.forgetting(upwards[metric], self.learned) for metric in self.metrics
            },
            "backward_transfer": {
                m: continual.backward_transfer(upwards[m], self.learned) for m in self.metrics
            },
            "forward_transfer": {m: continual.forward_transfer(R[m], self.learned) for m in self.metrics},
            # For how many test images of each category the model of each task was chosen, after the last stage.
            **({"routing": chosen} if "routing_accuracy" in self.metrics else {}),
        }


def _plain(entries: np.ndarray) -> list[float | None]:
    """Entries of R, float64 [N], as plain data: None for NaN."""
    return [None if math.isnan(value) else value for value in entries.tolist()]
