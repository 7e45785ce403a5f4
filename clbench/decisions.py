"""The thresholds that a user would judge test images by: those that were set when tasks were learned."""

import bisect
import math
import operator
from collections.abc import Sequence
from typing import Literal

import numpy as np
from torch import Tensor

from clbench.data.stream import Task
from clbench.errors import UserError
from clbench.metrics.names import FURTHER, METRICS
from clbench.metrics.stored import Decisions
from clbench.strategies.base import Strategy
from clbench.thresholds import RATES, Moments, Thresholds
from clbench.training import held_out


def by_stage(
    learned: Sequence[Thresholds], models: Tensor | int | None, images: int, rates: tuple[float, float]
) -> Decisions:
    """The thresholds that a user would judge test images by: those that were set when tasks were learned.

    Args:
        learned: of each stage so far, as set when it was learned.
        models: the stage whose model judged each image, int64 [N], or all of them; None where one model has learned all
            stages: then thresholds are those of all stages together.
        images: N.
        rates: false-positive rates of pixels and of images.
    """
    if models is None:
        one = [
            [together(learned, "pixel", rates[0])],
            [together(learned, "image", rates[1])],
            [_wide(learned)],
        ]
        return Decisions(*(np.repeat(np.array(value), images) for value in one))
    chosen = np.broadcast_to(np.asarray(models), images)
    pixel, image = zip(*(each.at(*rates) for each in learned), strict=True)
    wide = [_wide([each]) for each in learned]
    return Decisions(*(np.array(values)[chosen] for values in (pixel, image, wide)))


def together(learned: Sequence[Thresholds], kind: Literal["pixel", "image"], rate: float) -> float:
    """The lowest stored threshold that at most a share `rate` of all normal pixels or images is above.

    A stage's share above a value is known where that is one of its thresholds, and in between is at most the share at
    the next lower one. Stages count by the number of pixels or images that theirs were set on. Where even the highest
    is exceeded too often, it is the highest.
    """
    counts = [each.pixels if kind == "pixel" else each.images for each in learned]
    tables = [each.pixel if kind == "pixel" else each.image for each in learned]

    def exceeded(value: float) -> float:
        shares = [_share_above(table, count, value) for table, count in zip(tables, counts, strict=True)]
        return sum(map(operator.mul, shares, counts)) / sum(counts)

    values = sorted({value for table in tables for value in table})
    first = bisect.bisect_left(values, -rate - 1e-12, key=lambda value: -exceeded(value))
    return values[min(first, len(values) - 1)]


def _share_above(table: list[float], count: int, value: float) -> float:
    """What share of new normal values is above one, at most, by the thresholds for `RATES` that so many have set."""
    lower = bisect.bisect_left(
        table, -value, key=operator.neg
    )  # the first of the thresholds that is not above it
    return 1.0 if lower == len(table) else max(RATES[lower], 1 / (count + 1))


def _wide(learned: Sequence[Thresholds]) -> float:
    """Mean + 3 deviations of the maps of all that these were set on."""
    moments = Moments()
    for each in learned:
        assert each.mean is not None and each.deviation is not None
        moments.merge(Moments(each.pixels, each.mean, each.deviation**2 * each.pixels))
    return moments.mean + 3 * moments.deviation


def check_enough(
    strategy: Strategy, tasks: Sequence[Task], metrics: Sequence[str], image_rate: float
) -> None:
    """Check that enough normal images are held out of each stage for the metrics at stored thresholds.

    Args:
        metrics: names of those that are measured.
        image_rate: the false-positive rate of images that they are measured at.

    Raises:
        UserError: there are too few.
    """
    stored = [metric for metric in metrics if METRICS[metric].needs == "thresholds"]
    if not stored:
        return
    of_images = [metric for metric in stored if metric.startswith("image_")]
    fewest = math.ceil(1 / image_rate - 1 - 1e-9) if of_images else 1
    share = strategy.detector.held_out
    stages = strategy.stages(len(tasks))
    counts = [sum(len(tasks[task].train) for task in stage) for stage in stages]
    count, stage = min(zip(counts, stages, strict=True))
    held = held_out(count, share)
    if held >= fewest:
        return
    name = "+".join(tasks[task].name for task in stage)
    ways = [f"method.held_out={math.ceil(100 * fewest / count - 1e-9) / 100:g}"] if fewest < count else []
    if held:
        others = [metric for metric in metrics if metric in FURTHER and metric not in of_images]
        ways += [f"metrics.image_rate={math.ceil(1000 / (held + 1)) / 1000:g}"]
        ways += [f"'metrics.further=[{','.join(others)}]'"]
    raise UserError(
        f"{', '.join(of_images or stored)} need{'s' * (len(of_images or stored) == 1)} {fewest} held-out image"
        f"{'s' * (fewest != 1)} of each task"
        + (f" for metrics.image_rate={image_rate:g}" if of_images else "")
        + f", and method.held_out={share:g} holds {held} of the {count} of '{name}' out: give "
        f"{' or '.join(ways) or 'more images'}"
    )
