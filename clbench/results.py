"""R by stage, category and metric: the evaluations of a run, and means, forgetting and transfer."""

import math
from collections.abc import Iterator, Mapping, Sequence
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
        self._tasks = ["+".join(task) for task in tasks]
        self.task_of = [index for index, task in enumerate(tasks) for _ in task]
        stage_of = {task: stage for stage, learning in enumerate(stages) for task in learning}
        self.learned = [stage_of[task] for task in self.task_of]
        self._evaluated = np.zeros((len(stages), len(self.categories)), dtype=bool)
        # Of each stage with an evaluation, float64 [metrics, categories]. NaN: undefined, or not evaluated.
        self._R: dict[int, np.ndarray] = {}
        self._nothing = np.full((len(self.metrics), len(self.categories)), np.nan)
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
        if stage not in self._R:
            self._R[stage] = self._nothing.copy()
        self._evaluated[stage, category] = True
        found = map(values.get, self.metrics)  # a journal of an earlier version may lack one
        self._R[stage][:, category] = [np.nan if value is None else value for value in found]

    def evaluated(self, stage: int, category: int) -> bool:
        """Whether a category was evaluated after a stage."""
        return bool(self._evaluated[stage, category])

    def evaluations(self) -> Iterator[tuple[int, int]]:
        """The stage and the category of each evaluation, ascending."""
        for stage in sorted(self._R):
            for category in np.flatnonzero(self._evaluated[stage]).tolist():
                yield stage, category

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
        return dict(zip(self.metrics, _plain(self._R[stage][:, category]), strict=True))

    def matrix(self, metric: str) -> Matrix:
        """R of one metric, [stage][category]; None where it is undefined or was not evaluated."""
        return self._rows({stage: values[self.metrics.index(metric)] for stage, values in self._R.items()})

    def _rows(self, found: Mapping[int, np.ndarray]) -> Matrix:
        """Rows of R by stage, float64 [categories], as plain data. Stages without evaluations share one row."""
        nothing: list[float | None] = [None] * len(self.categories)
        return [_plain(found[stage]) if stage in found else nothing for stage in range(len(self._evaluated))]

    def seen(self, stage: int) -> list[int]:
        """The indices of the categories learned up to a stage, this one included."""
        return [category for category, learned in enumerate(self.learned) if learned <= stage]

    def mean_seen(self, metric: str, stage: int) -> float | None:
        """A metric's mean over the categories learned up to a stage; None where it is defined for none."""
        if stage not in self._R:
            return None
        return continual.mean(_plain(self._row(metric, stage)[self.seen(stage)]))

    def _row(self, metric: str, stage: int) -> np.ndarray:
        """A metric of each category after a stage, float64 [categories]; NaN where it is undefined or was not evaluated."""
        return self._R.get(stage, self._nothing)[self.metrics.index(metric)]

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
            metric: continual.mean(_plain(best[metric] - self._upwards(metric, stage)))
            for metric in self.metrics
        }
        return found

    def _upwards(self, metric: str, stage: int) -> np.ndarray:
        """As `_row`, with the sign that makes greater values better."""
        known, row = METRICS.get(metric), self._row(metric, stage)
        return -row if known is not None and known.better == "lower" else row

    def _best_before(self, stage: int) -> dict[str, np.ndarray]:
        """Metric -> float64 [categories]: the best value of each, see `_upwards`, since the stage that learned it.

        The stage itself does not count. NaN where a category was not learned before it.
        """
        if stage < self._best_until:
            self._best, self._best_until = self._none_yet(), 0
        for earlier in filter(self._R.__contains__, range(self._best_until, stage)):
            seen = self.seen(earlier)
            for metric in self.metrics:
                values = self._upwards(metric, earlier)[seen]
                self._best[metric][seen] = np.fmax(self._best[metric][seen], values)
        self._best_until = stage
        return self._best

    def _none_yet(self) -> dict[str, np.ndarray]:
        """Best values before any stage: metric -> float64 [categories], all NaN."""
        return {metric: np.full(len(self.categories), np.nan) for metric in self.metrics}

    def just_learned(self, metric: str) -> list[float | None]:
        """Each category's value after the stage that learned it."""
        found = (self._row(metric, stage)[category] for category, stage in enumerate(self.learned))
        return _plain(np.fromiter(found, float, len(self.learned)))

    def summary(self, tasks: Sequence[str] | None = None) -> dict[str, Any]:
        """The means of R in summary.json: final values, forgetting and transfer, each over the categories.

        Args:
            tasks: names of the tasks; None where they are called after their categories.
        """
        names = self._tasks if tasks is None else tasks
        R = {metric: self.matrix(metric) for metric in self.metrics}
        upwards = {
            metric: self._rows({stage: self._upwards(metric, stage) for stage in self._R})
            for metric in self.metrics
        }
        last = len(R["pixel_f1"]) - 1
        chosen = {
            name: {names[task]: count for task, count in enumerate(counts) if count}
            for category, name in enumerate(self.categories)
            if (counts := self.chosen(last, category)) is not None
        }
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
            # For how many test images of each category the model of each task was chosen, after the last stage; without zeros.
            **({"routing": chosen} if "routing_accuracy" in self.metrics else {}),
        }


def _plain(entries: np.ndarray) -> list[float | None]:
    """Entries of R, float64 [N], as plain data: None for NaN."""
    return [None if math.isnan(value) else value for value in entries.tolist()]
