"""A detector of boundaries: where a stream's images begin to look different, by frozen features alone.

A test of two windows: the mean feature of the newest images is compared with that of all images since the last boundary. The
distance of the two means is divided by what it is expected to be of images of one kind, which their own spread and their
numbers tell. Only the first images of the stream say how large that grows where nothing changes: they are divided at random
many times, and the threshold is above all that is found then. Neither labels of tasks nor test images are looked at, and of the
training images none before it arrives.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from clbench.randomness import generator

_DIVISIONS = 200  # at random, of the first images


@dataclass(frozen=True)
class Windows:
    """Settings of the detector.

    Args:
        newest: images of the window that is compared with those before.
        first: images at the beginning of the stream that the threshold is set on: of one task.
        factor: how many times the largest distance among these the threshold is.
    """

    newest: int = 6
    first: int = 24
    factor: float = 1.5


def found(features: Tensor, windows: Windows, seed: int) -> list[int]:
    """The places at which a boundary is seen: the numbers of the images that had arrived by then.

    Args:
        features: of a stream's training images as they arrive, float32 [N, D].
        windows: settings.
        seed: of the divisions that the threshold is set by.
    """
    if len(features) < windows.first:
        return []
    features = features.double() - features[0].double()  # so that sums over a long stream lose nothing
    threshold = windows.factor * _largest(features[: windows.first], windows.newest, seed)
    sums = F.pad(features.cumsum(0), (0, 0, 1, 0))  # of the images before each place
    squares = F.pad(features.square().sum(1).cumsum(0), (1, 0))
    boundaries: list[int] = []
    begin = 0
    for now in range(windows.first, len(features) + 1):
        middle = now - windows.newest
        count = middle - begin
        if count < 2 * windows.newest:
            continue
        mean = (sums[middle] - sums[begin]) / count
        spread = squares[middle] - squares[begin] - count * mean.square().sum()
        newest = (sums[now] - sums[middle]) / windows.newest
        if _apart(mean, newest, spread, count, windows.newest) > threshold:
            boundaries.append(now)
            begin = now
    return boundaries


def distance(before: Tensor, newest: Tensor) -> float:
    """How far two windows' means are apart, in units of what is expected where both are of one kind: about 1 then.

    Args:
        before, newest: features, float64 [N, D] and [M, D].
    """
    mean = before.mean(0)
    return _apart(mean, newest.mean(0), (before - mean).square().sum(), len(before), len(newest))


def _apart(before: Tensor, newest: Tensor, spread: Tensor, count: int, newer: int) -> float:
    """As `distance`, of the windows' means, float64 [D] both, and their numbers of images.

    Args:
        spread: sum of squared distances of the images before to their mean, a scalar.
    """
    expected = spread / (count - 1) * (1 / count + 1 / newer)
    return math.sqrt(float((newest - before).square().sum() / expected.clamp(min=1e-30)))


def _largest(first: Tensor, newest: int, seed: int) -> float:
    """The largest distance among random divisions of the first images, float64 [N, D], into two windows."""
    random = generator(seed, "boundaries")
    orders = (torch.randperm(len(first), generator=random) for _ in range(_DIVISIONS))
    return max(distance(first[order[newest:]], first[order[:newest]]) for order in orders)


@dataclass(frozen=True)
class Alarms:
    """How the boundaries that were found compare with those that there are.

    Attributes:
        delays: images from the middle of each transition that was found until it was; less than 0 in its first half.
        missed: transitions that were not found.
        false: boundaries that were found where there is none, or again.
    """

    delays: list[int]
    missed: int
    false: int


def compared(boundaries: Sequence[int], true: Sequence[int], width: int, late: int) -> Alarms:
    """Count which boundaries were found; each counts once.

    Args:
        boundaries: as `found` gives them.
        true: the middles of transitions.
        width: of a transition, in images.
        late: how many images after the end of a transition it is still found.
    """
    left, delays = list(boundaries), []
    for middle in true:
        near = [at for at in left if middle - width / 2 <= at <= middle + width / 2 + late]
        if near:
            left.remove(near[0])
            delays.append(near[0] - middle)
    return Alarms(delays, len(true) - len(delays), len(left))
