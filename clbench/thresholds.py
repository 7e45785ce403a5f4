"""Thresholds of maps and scores by false-positive rate: the share of normal pixels and images above them.

They are set on normal training images, never on test images: on those held out of learning
(`method.held_out`), or else on some that were learned from, which a detector finds more normal than new ones.
"""

import bisect
import math
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from typing import Annotated, Any

import numpy as np
import torch
from annotated_types import Len
from pydantic import PositiveInt
from pydantic.dataclasses import dataclass as checked_dataclass
from torch import Tensor

from clbench import evaluation
from clbench.data.images import Images
from clbench.data.stream import Task
from clbench.errors import UserError, counted
from clbench.methods.base import Progress
from clbench.metrics.names import RATES
from clbench.randomness import generator
from clbench.strategies.base import Strategy
from clbench.training import held_out, split_rows

_LEARNED_FROM = 100  # images that a model's thresholds are set on, at most, where none was held out
_BYTES_A_PIXEL = 4 * 4 * RATES[-1]  # of the highest values: those kept, those added, and both merged
_BYTES_OF_ONE = 16  # a pixel of one image, beside these: its map, and what of it is added


@dataclass(frozen=True)
class Thresholds:
    """The thresholds of one model: greater values are anomalous.

    Args:
        tasks: names of the tasks whose images they are for.
        held_out: whether they were set on held-out images.
        images, pixels: numbers of images and pixels that they were set on.
        pixel, image: thresholds of maps and of image scores, one for each of `RATES`.
        mean, deviation: of the maps' pixels; None in files of earlier versions.
        without: names of those tasks of which no image was there, or stored, to set them on.
    """

    tasks: list[str]
    held_out: bool
    images: int
    pixels: int
    pixel: Annotated[list[float], Len(len(RATES), len(RATES))]
    image: Annotated[list[float], Len(len(RATES), len(RATES))]
    mean: float | None = None
    deviation: float | None = None
    without: list[str] = field(default_factory=list)

    @property
    def doubt(self) -> str | None:
        """A line that says for which products they may be too low; None where there are images of all."""
        if not self.without:
            return None
        return (
            f"WARNING: no image of {', '.join(self.without)} was there to set thresholds on: normal ones may be called "
            "anomalous. Where their images are, repeat clbench learn, and without --without-images"
        )

    def at(self, rate: float, image_rate: float) -> tuple[float, float]:
        """The thresholds of maps and of scores for these false-positive rates, or the next lower ones.

        Raises:
            UserError: a rate is lower than the lowest or higher than the highest of `RATES`.
        """
        return self.pixel[_rate_index(rate)], self.image[_rate_index(image_rate)]

    def by_rate(self) -> dict[str, Any]:
        """Everything as plain data, with thresholds as false-positive rate -> threshold."""
        rates = [f"{rate:.10f}".rstrip("0") for rate in RATES]
        return {
            **asdict(self),
            "pixel": dict(zip(rates, self.pixel, strict=True)),
            "image": dict(zip(rates, self.image, strict=True)),
        }

    @property
    def finest(self) -> float:
        """The lowest false-positive rate of images that a threshold set on so many images can hold, see `rank`."""
        return 1 / (self.images + 1)


def _rate_index(rate: float) -> int:
    """The index in `RATES` of a rate, or of the next lower one.

    Raises:
        UserError: the rate is out of range.
    """
    if not RATES[0] <= rate <= RATES[-1]:
        raise UserError(
            f"a false-positive rate of {rate:g} is out of range: give {RATES[0]:.5f} to {RATES[-1]}"
        )
    return bisect.bisect_right(RATES, rate) - 1


class Tail:
    """The largest of `count` values, added in batches: as many as the highest of `RATES` needs."""

    def __init__(self, count: int):
        self.count = count
        self._size = max(rank(RATES[-1], count), 1)
        self._kept = torch.empty(0)
        self._added: list[Tensor] = []
        self._least = -math.inf  # smaller values cannot be among the largest

    def add(self, values: Tensor) -> None:
        """Add values, float32 of any shape."""
        values = values.flatten()
        self._added.append(values[values > self._least])
        if sum(len(values) for values in self._added) >= self._size:
            self._merge()

    def _merge(self) -> None:
        """Keep the largest of what is kept and what was added since, in no order."""
        together = torch.cat([self._kept, *self._added]).numpy()
        self._added = []
        smaller = len(together) - self._size
        if smaller >= 0:  # by a topk, which sorts, it takes five times as long
            together.partition(smaller)
            self._least = float(together[smaller])
            together = together[smaller:].copy() if smaller else together
        self._kept = torch.from_numpy(together)

    def thresholds(self) -> list[float]:
        """A threshold for each of `RATES`.

        The rank of a new value among n old ones is uniform: it is above the k-th largest with a probability
        of at most k / (n + 1). So k is the largest for which that is at most the rate. Where even k = 1 is
        too many, n is too small for the rate, and the threshold is the largest value.
        """
        self._merge()
        largest = np.sort(self._kept.numpy())
        return [float(largest[-max(rank(rate, self.count), 1)]) for rate in RATES]


def rank(rate: float, count: int) -> int:
    """The largest k with k / (count + 1) <= rate."""
    return math.floor(rate * (count + 1) + 1e-9)


def fewest(rate: float) -> int:
    """The smallest count for which `rank` is not 0: so many images, or pixels, can set a threshold for a rate."""
    return math.ceil((1 - 1e-9) / rate - 1)


def check_room(strategy: Strategy, tasks: Sequence[Task]) -> None:
    """Check, before anything is learned, that memory has room to set thresholds, which every run does when it ends.

    Of what is not there to be learned, a run that goes on knows the thresholds or has a few images stored.

    Raises:
        UserError: it has not.
    """
    learning, largest = strategy.stages(len(tasks)), 0
    most, images_of_most, name = 0, 0, ""  # of the model that takes the most: models come one after the other
    for model in _models(strategy, len(learning)):
        pixels, images, names = 0, 0, list[str]()
        for stage in model:
            learned = [tasks[task] for task in learning[stage] if len(tasks[task].train)]
            if not learned:
                continue
            count = sum(len(task.train) for task in learned)
            used = held_out(count, strategy.detector.held_out) or min(count, _enough(model))
            size = max(math.prod(task.train.images.shape[-2:]) for task in learned)
            pixels, images, largest = pixels + used * size, images + used, max(largest, size)
            names.append("+".join(task.name for task in learned))
        if pixels > most:
            most, images_of_most = pixels, images
            name = f"'{names[0]}'" if len(names) == 1 else f"all {len(names)} stages together"
    if most:
        evaluation.check_free(
            f"setting thresholds for {name}",
            _BYTES_A_PIXEL * most + _BYTES_OF_ONE * largest,
            f"the highest fifth of {most / 1e6:.2g} million pixels of {counted(images_of_most, 'normal image')}",
            "fewer images to set them on (method.held_out)",
        )


def _models(strategy: Strategy, stages: int) -> list[list[int]]:
    """The stages of each model that has thresholds of its own."""
    return [[stage] for stage in range(stages)] if strategy.task_known else [list(range(stages))]


def _enough(stages: Sequence[int]) -> int:
    """How many images of each of a model's stages thresholds are set on, at most, where none was held out."""
    return max(_LEARNED_FROM // len(stages), 1)


def calibrate(
    strategy: Strategy,
    tasks: list[Task],
    device: torch.device,
    progress: Progress,
    earlier: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Set the thresholds of each model of a trained strategy.

    A model of a task whose images are not there keeps those that it had.

    Args:
        tasks: the stream, in its order.
        device: where the detector is.
        progress: told after every batch.
        earlier: what thresholds.json of the run that this one goes on from holds; None where it goes on from none.

    Returns:
        What thresholds.json holds: the size (H, W) of the images that the detector takes, or of the tiles, the
        false-positive rates, and the thresholds of each model.

    Raises:
        Diverged: a map or score is not finite.
    """
    models = _models(strategy, len(strategy.stages(len(tasks))))
    kept = {tuple(model["tasks"]): model for model in (earlier or {}).get("models", [])}
    found = []
    for model in models:
        learned = [task for stage in model for task in strategy.stages(len(tasks))[stage]]
        if strategy.task_known and not any(len(tasks[task].train) for task in learned):
            found.append(kept[tuple(tasks[task].name for task in learned)])
        else:
            found.append(asdict(of_stages(strategy, tasks, model, device, progress)[0]))
    tiling = tasks[0].train.tiling
    size = [tiling.side] * 2 if tiling else list(tasks[0].train.images.shape[-2:])
    return {"image_size": size, "false_positive_rates": list(RATES), "models": found}


def of_stages(
    strategy: Strategy, tasks: list[Task], stages: Sequence[int], device: torch.device, progress: Progress
) -> tuple[Thresholds, list[float]]:
    """The thresholds of a model for images of what it learned in these stages, 0-based, as the model is now.

    With the image scores that they were set on. Of a stage whose images are not there, stored ones count, or none: tiles that
    are stored are no images, whose scores are the highest of many.

    Args:
        tasks, device, progress: as for `calibrate`.

    Raises:
        Diverged: a map or score is not finite.
    """
    learning = strategy.stages(len(tasks))
    sets, all_held, all_there = [], True, True
    without: list[str] = []
    for stage in stages:
        images, held = _normal(strategy, tasks, stage, _enough(stages))
        if not len(images):
            without += [tasks[task].name for task in learning[stage]]
            continue
        sets.append((learning[stage][0], images))
        all_held = all_held and held
        all_there = all_there and all(len(tasks[task].train) for task in learning[stage])
    if not strategy.task_known and sets:  # then batches may hold images of several tasks
        sets = [(sets[0][0], Images.concatenate([images for _, images in sets]))]
    count = sum(len(images) for _, images in sets)
    scores, pixels = Tail(count), Tail(sum(math.prod(size) for _, images in sets for size in images.sizes))
    moments, every = Moments(), list[float]()
    done = 0
    # Of stored images features may be all there is.
    with strategy.detector.uncached() if all_there else nullcontext():
        for task, images in sets:
            tiling = tasks[task].train.tiling
            for batch in evaluation.predictions(strategy, images, task, device, tiling):
                pixels.add(batch.maps)
                moments.add(batch.maps)
                scores.add(batch.scores)
                every += batch.scores.tolist()
                done += len(batch.scores)
                progress("setting thresholds", done, count)
    found = Thresholds(
        tasks=[tasks[task].name for stage in stages for task in learning[stage]],
        held_out=all_held,
        images=count,
        pixels=pixels.count,
        pixel=pixels.thresholds(),
        image=scores.thresholds(),
        mean=moments.mean,
        deviation=moments.deviation,
        without=without,
    )
    return found, every


class Moments:
    """Mean and deviation of values that are added in batches (Chan et al., 1979), in double precision."""

    def __init__(self, count: int = 0, mean: float = 0.0, squares: float = 0.0):
        self.count, self.mean = count, mean
        self._squares = squares  # the sum of squared differences to the mean

    def add(self, values: Tensor) -> None:
        """Add values, float32 of any shape; at least one."""
        mean = float(values.mean(dtype=torch.float64))
        apart = values.to(torch.float64, copy=True).sub_(mean)  # in place: a map may have many pixels
        squares = float(apart.square_().sum())
        self.merge(Moments(values.numel(), mean, squares))

    def merge(self, other: "Moments") -> None:
        """Add what was added to another."""
        count = self.count + other.count
        apart = other.mean - self.mean
        self._squares += other._squares + apart**2 * self.count * other.count / count
        self.mean += apart * other.count / count
        self.count = count

    @property
    def deviation(self) -> float:
        """Of the values as they are, divided by their number."""
        return math.sqrt(self._squares / self.count)


def _normal(strategy: Strategy, tasks: list[Task], stage: int, enough: int) -> tuple[Images, bool]:
    """Normal images of a stage, uint8 [N, 3, H, W], and whether they were held out.

    Args:
        enough: number of images, at most, where none was held out and they are some that were learned from.
    """
    images = Images.concatenate([tasks[task].train.images for task in strategy.stages(len(tasks))[stage]])
    if not len(images):
        if any(task.train.tiling for task in tasks):
            return images, False
        pair = next(iter(strategy.replayed()[stage : stage + 1]), (images, images))
        stored, unseen = map(Images.of, pair)
        return (unseen, True) if len(unseen) else (stored.some(slice(enough)), False)
    learned, held = split_rows(len(images), strategy.detector.held_out, strategy.seed, stage)
    if len(held):
        return images.some(held), True
    order = torch.randperm(len(learned), generator=generator(strategy.seed, "thresholds", stage))
    return images.some(order[:enough].sort().values), False


@checked_dataclass(frozen=True)
class Stored:
    """What thresholds.json holds.

    Args:
        models: the thresholds of each model.
        image_size: the size that the detector takes, (H, W) in pixels; None in files of earlier versions.
    """

    models: list[Thresholds]
    image_size: tuple[PositiveInt, PositiveInt] | None = None


def for_task(stored: Stored, task: str) -> Thresholds:
    """The thresholds for images of a task.

    Args:
        stored: what thresholds.json holds.
        task: its name.

    Raises:
        UserError: no model has learned a task of this name.
    """
    for model in stored.models:
        if task in model.tasks:
            return model
    names = [name for model in stored.models for name in model.tasks]
    raise UserError(f"thresholds.json has none for task '{task}'; give one of {', '.join(names)}")
