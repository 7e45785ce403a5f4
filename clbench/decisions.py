"""The thresholds that a user would judge test images by: those that were set when tasks were learned."""

import bisect
import functools
import itertools
import math
import operator
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from torch import Tensor

from clbench.data.stream import Task
from clbench.errors import UserError, counted
from clbench.metrics.names import FURTHER, METRICS, RATES
from clbench.metrics.stored import Decisions
from clbench.strategies.base import Strategy
from clbench.thresholds import Moments, Thresholds, fewest, rank
from clbench.training import held_out


class Learned(NamedTuple):
    """What was measured on a stage's held-out images when it was learned: thresholds, and the images' scores."""

    thresholds: Thresholds
    scores: list[float]


class Judge:
    """Judges test images by the thresholds that were set when stages were learned.

    Args:
        learned: of each stage so far.
        rates: false-positive rates of pixels and of images.
    """

    def __init__(self, learned: Sequence[Learned], rates: tuple[float, float]):
        self._learned, self._rates = learned, rates

    def by_model(self, models: Tensor | int, images: int) -> Decisions:
        """The thresholds of the models that judged images.

        Args:
            models: the stage whose model judged each image, int64 [N], or all of them.
            images: N.
        """
        chosen = np.broadcast_to(np.asarray(models), images)
        pixel, image, wide = (np.empty(images) for _ in range(3))
        for stage in np.unique(chosen):
            of_stage, here = self._learned[stage].thresholds, chosen == stage
            pixel[here], image[here] = of_stage.at(*self._rates)
            wide[here] = _wide([of_stage])
        return Decisions(pixel, image, wide)

    def together(self, images: int) -> Decisions:
        """The thresholds of all stages together, for images that one model judges, as many as `images`."""
        return Decisions(*(np.full(images, value) for value in self._together))

    @functools.cached_property
    def _together(self) -> tuple[float, float, float]:
        learned = [each.thresholds for each in self._learned]
        scores = sorted(itertools.chain(*(each.scores for each in self._learned)), reverse=True)
        image = scores[max(rank(self._rates[1], len(scores)), 1) - 1]
        return pixels_together(learned, self._rates[0]), image, _wide(learned)


def pixels_together(learned: Sequence[Thresholds], rate: float) -> float:
    """The lowest stored threshold of pixels that at most a share `rate` of those of all stages is above.

    A stage's share above a value is known where that is one of its thresholds, and in between is at most the share at
    the next lower one. Where even the highest is exceeded too often, it is the highest.
    """
    total = sum(each.pixels for each in learned)

    def exceeded(value: float) -> float:
        return sum(_share_above(each.pixel, value) * each.pixels for each in learned) / total

    values = sorted({value for each in learned for value in each.pixel})
    first = bisect.bisect_left(values, -rate - 1e-12, key=lambda value: -exceeded(value))
    return values[min(first, len(values) - 1)]


def _share_above(table: list[float], value: float) -> float:
    """What share of values is above one, at most, by the thresholds for `RATES`."""
    lower = bisect.bisect_left(table, -value, key=operator.neg)  # the first threshold that is not above it
    return 1.0 if lower == len(table) else RATES[lower]


def _wide(learned: Sequence[Thresholds]) -> float:
    """Mean + 3 deviations of the maps of all that these were set on."""
    moments = Moments()
    for each in learned:
        assert each.mean is not None and each.deviation is not None
        moments.merge(Moments(each.pixels, each.mean, each.deviation**2 * each.pixels))
    return moments.mean + 3 * moments.deviation


def check_enough(
    strategy: Strategy, tasks: Sequence[Task], metrics: Sequence[str], rates: tuple[float, float]
) -> None:
    """Check that enough normal images are held out of each stage for the metrics at stored thresholds.

    Args:
        metrics: names of those that are measured.
        rates: the false-positive rates of pixels and of images that they are measured at.

    Raises:
        UserError: there are too few.
    """
    stored = [metric for metric in metrics if METRICS[metric].needs == "thresholds"]
    if not stored:
        return
    pixel_rate, image_rate = rates
    of_images = [metric for metric in stored if metric.startswith("image_")]
    enough = fewest(image_rate) if of_images else 1
    share = strategy.detector.held_out
    stages = [stage for stage in strategy.stages(len(tasks)) if all(len(tasks[task].train) for task in stage)]
    counts = [sum(len(tasks[task].train) for task in stage) for stage in stages]
    count, stage = min(zip(counts, stages, strict=True))
    held = held_out(count, share)
    pixels = held * math.prod(tasks[0].train.images.shape[-2:])
    if held and set(stored) & {"pixel_f1_stored", "pixel_fpr"} and not rank(pixel_rate, pixels):
        lowest = next(rate for rate in RATES if rank(rate, pixels))
        raise UserError(
            f"metrics.pixel_rate={pixel_rate:g} needs {fewest(pixel_rate):,} held-out pixels of each task, and "
            f"method.held_out={share:g} holds {pixels:,} out: give metrics.pixel_rate={lowest:g}, or hold out more"
        )
    if held >= enough:
        return
    name = "+".join(tasks[task].name for task in stage)
    ways = [f"method.held_out={math.ceil(100 * enough / count - 1e-9) / 100:g}"] if enough < count else []
    if held:
        others = [metric for metric in metrics if metric in FURTHER and metric not in of_images]
        ways += [f"metrics.image_rate={rate:g}" for rate in RATES if rank(rate, held)][:1]
        ways += [f"'metrics.further=[{','.join(others)}]'"]
    raise UserError(
        f"{', '.join(of_images or stored)} need{'s' * (len(of_images or stored) == 1)} "
        f"{counted(enough, 'held-out image')} of each task"
        + (f" for metrics.image_rate={image_rate:g}" if of_images else "")
        + f", and method.held_out={share:g} holds {held} of the {count} of '{name}' out: give "
        f"{' or '.join(ways) or 'more images'}"
    )
