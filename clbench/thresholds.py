"""Where normal ends: thresholds of maps and scores, by the share of normal pixels and images that lie above them.

They are set on normal training images, never on test images: on those that were held out of learning where some
were (`method.held_out`), else on some that were learned from, which the detector finds more normal than new ones.
"""

import bisect
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from clbench import evaluation
from clbench.data.stream import Task
from clbench.errors import UserError
from clbench.methods.base import Progress
from clbench.randomness import generator
from clbench.strategies.base import Strategy
from clbench.training import split_rows

# 0.00001, 0.00002, ..., 0.1, 0.2
RATES = (*(digit / 10**places for places in (5, 4, 3, 2) for digit in range(1, 10)), 0.1, 0.2)

_LEARNED_FROM = 100  # images of a model, at most, where none was held out: more would say as little


@dataclass(frozen=True)
class Thresholds:
    """A model's thresholds: what is greater is anomalous.

    Args:
        tasks: whose images they are for.
        held_out: whether no step of learning saw the images that they were set on.
        images, pixels: how many of each they rest on.
        pixel, image: of maps and of image scores, one for each of RATES.
    """

    tasks: list[str]
    held_out: bool
    images: int
    pixels: int
    pixel: list[float]
    image: list[float]

    def at(self, rate: float, image_rate: float) -> tuple[float, float]:
        """The thresholds of pixels and images for these false-positive rates, or for the next lower ones kept.

        Raises:
            UserError: a rate is out of range.
        """
        return self.pixel[_place(rate)], self.image[_place(image_rate)]

    def by_rate(self) -> dict[str, Any]:
        """All of it as plain data: false-positive rate -> threshold, of pixels and of images."""
        rates = [f"{rate:.10f}".rstrip("0") for rate in RATES]
        return {
            **asdict(self),
            "pixel": dict(zip(rates, self.pixel, strict=True)),
            "image": dict(zip(rates, self.image, strict=True)),
        }

    @property
    def finest(self) -> float:
        """The lowest false-positive rate of images that so many can tell."""
        return 1 / (self.images + 1)


def _place(rate: float) -> int:
    if not RATES[0] <= rate <= RATES[-1]:
        raise UserError(
            f"a false-positive rate of {rate:g} is out of range: give {RATES[0]:.5f} to {RATES[-1]}"
        )
    return bisect.bisect_right(RATES, rate) - 1


class Tail:
    """The upper tail of so many values, added in parts: as much of it as the largest rate needs, and no more."""

    def __init__(self, count: int):
        self.count = count
        self._size = max(_rank(RATES[-1], count), 1)
        self._kept = torch.empty(0)
        self._parts: list[Tensor] = []
        self._least = -math.inf  # smaller ones are known to be outside

    def add(self, values: Tensor) -> None:
        values = values.flatten()
        self._parts.append(values[values > self._least])
        if sum(len(part) for part in self._parts) >= self._size:
            self._merge()

    def _merge(self) -> None:
        together = torch.cat([self._kept, *self._parts])
        self._kept = together.topk(min(self._size, len(together))).values
        self._parts = []
        if len(self._kept) == self._size:
            self._least = float(self._kept[-1])

    def thresholds(self) -> list[float]:
        """One for each of RATES.

        Of n values and a new one that could be any of the n + 1, the new one is above the k-th largest with a
        probability of at most k / (n + 1): so k is the largest for which that is no more than the rate. Where
        there is none, the values are too few for the rate, and the largest of them is all that they can say.
        """
        self._merge()
        return [float(self._kept[max(_rank(rate, self.count), 1) - 1]) for rate in RATES]


def _rank(rate: float, count: int) -> int:
    return math.floor(rate * (count + 1) + 1e-9)


def calibrate(
    strategy: Strategy, tasks: list[Task], device: torch.device, progress: Progress
) -> dict[str, Any]:
    """What thresholds.json holds: the run's image size, and the thresholds of every model of a trained strategy.

    Raises:
        Diverged: a map or score is no number.
    """
    stages = strategy.stages(len(tasks))
    models = [[stage] for stage in range(len(stages))] if strategy.task_known else [list(range(len(stages)))]
    found = []
    for model in models:
        sets, held_out = [], True
        for stage in model:
            images, held = _normal(strategy, tasks, stage, _LEARNED_FROM // len(model))
            sets.append((stages[stage][0], images))
            held_out = held_out and held
        count = sum(len(images) for _, images in sets)
        scores, pixels = Tail(count), Tail(count * math.prod(tasks[0].train.images.shape[-2:]))
        done = 0
        with strategy.detector.uncached():
            for task, images in sets:
                for part in evaluation.predictions(strategy, images, task, device):
                    pixels.add(part.maps)
                    scores.add(part.scores)
                    done += len(part.scores)
                    progress("setting thresholds", done, count)
        names = [tasks[task].name for stage in model for task in stages[stage]]
        found.append(
            {
                "tasks": names,
                "held_out": held_out,
                "images": count,
                "pixels": pixels.count,
                "pixel": pixels.thresholds(),
                "image": scores.thresholds(),
            }
        )
    size = list(tasks[0].train.images.shape[-2:])
    return {"image_size": size, "false_positive_rates": list(RATES), "models": found}


def _normal(strategy: Strategy, tasks: list[Task], stage: int, enough: int) -> tuple[Tensor, bool]:
    """Normal images of a stage, uint8 [N, 3, H, W], and whether they are those held out, or only some learned from."""
    sets = [tasks[task].train.images for task in strategy.stages(len(tasks))[stage]]
    images = torch.cat(sets) if len(sets) > 1 else sets[0]
    learned, held = split_rows(len(images), strategy.detector.held_out, strategy.seed, stage)
    if len(held):
        return images[held], True
    order = torch.randperm(len(learned), generator=generator(strategy.seed, "thresholds", stage))
    return images[order[: max(enough, 1)].sort().values], False


def for_task(stored: Mapping[str, Any], task: str) -> Thresholds:
    """The thresholds for images of a task.

    Args:
        stored: what thresholds.json holds.
        task: its name.

    Raises:
        UserError: no model has learned a task of this name.
    """
    for model in stored["models"]:
        if task in model["tasks"]:
            return Thresholds(**model)
    names = [name for model in stored["models"] for name in model["tasks"]]
    raise UserError(f"thresholds.json has none for task '{task}'; give one of {', '.join(names)}")
