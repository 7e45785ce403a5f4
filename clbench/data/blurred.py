"""A stream without boundaries: tasks give way to one another, and parts of it are learned one after the other.

All training images arrive once, in one sequence. Each is moved from its place in the order of tasks by up to half the
transition's width, to either side: so around a boundary, images of both tasks are mixed, the more evenly the nearer to it. What
stages learn are parts of this sequence, wherever they are cut. Test images stay with their category, which belongs to the part
by whose end three quarters of its task's training images have come: that part learned it in R.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from clbench.data.drift import Drift
from clbench.data.images import Images, ImageSet
from clbench.data.samples import GOOD
from clbench.data.stream import Category, Task
from clbench.errors import UserError, counted
from clbench.randomness import generator

_MOST = 0.75  # of a task's images that have come when it counts as learned


@dataclass(frozen=True)
class Arrivals:
    """The training images of a stream, in the order in which they arrive.

    Attributes:
        images: uint8 [N, 3, H, W], as they have drifted.
        names: of each, to show to people.
        owners: the index of the task that each is of, int64 [N].
        boundaries: for each task but the first, the place in the middle of the transition to it.
    """

    images: Images
    names: list[str]
    owners: Tensor
    boundaries: list[int]

    def __len__(self) -> int:
        return len(self.owners)


def check_transition(width: int, tasks: Mapping[str, int]) -> None:
    """Check that no task is shorter than the transitions between them: else three tasks would be mixed.

    Args:
        width: of a transition, in images.
        tasks: name -> number of training images.

    Raises:
        UserError: one is shorter.
    """
    name, count = min(tasks.items(), key=lambda task: task[1])
    if width > count:
        raise UserError(
            f"stream.transition={width} is wider than the {counted(count, 'training image')} of task '{name}': give at most "
            f"{count}"
        )


def arrivals(tasks: Sequence[Task], width: int, drift: Drift, seed: int) -> Arrivals:
    """Put the training images of all tasks in the order in which they arrive.

    Args:
        width: of a transition between two tasks, in images; 0 for none.
        drift: what happens to images on the way.
        seed: of their places.

    Raises:
        UserError: a task has fewer images than a transition.
    """
    counts = [len(task.train) for task in tasks]
    check_transition(width, {task.name: count for task, count in zip(tasks, counts, strict=True)})
    total = sum(counts)
    moved = width * (torch.rand(total, generator=generator(seed, "stream"), dtype=torch.float64) - 0.5)
    order = (torch.arange(total) + moved).argsort(stable=True)
    owners = torch.arange(len(tasks)).repeat_interleave(torch.tensor(counts))[order]
    names = [name for task in tasks for name in task.train.names]
    images = Images.concatenate([task.train.images for task in tasks]).some(order)
    ends = torch.tensor(counts).cumsum(0).tolist()
    places = _places(torch.arange(total), total)
    return Arrivals(drift.images(images, places), [names[row] for row in order.tolist()], owners, ends[:-1])


def parts(tasks: Sequence[Task], arrived: Arrivals, ends: Sequence[int], drift: Drift) -> list[Task]:
    """The stream as tasks that are its parts, called `part 1` and so on; some may have no category.

    Args:
        tasks: the stream as it would be without transitions.
        ends: where each part ends, ascending; the last one ends with the stream.
        drift: of test images, at places evenly spread over those of their task's training images.
    """
    of_part: list[list[Category]] = [[] for _ in ends]
    for number, task in enumerate(tasks):
        rows = (arrived.owners == number).nonzero().flatten()
        most = int(rows[max(round(_MOST * len(rows)), 1) - 1])
        part = next(index for index, end in enumerate(ends) if most < end)
        first, last = _places(rows[[0, -1]], len(arrived)).tolist()
        of_part[part] += [
            Category(
                each.name, drift.tests(each.test, first, last), each.fingerprints, each.peak, each.nearly_all
            )
            for each in task.categories
        ]
    begins = [0, *ends[:-1]]
    return [
        Task(f"part {number}", _part(arrived, begin, end), tuple(categories))
        for number, (begin, end, categories) in enumerate(zip(begins, ends, of_part, strict=True), 1)
    ]


def every(length: int, total: int) -> list[int]:
    """Where parts of so many images end in a stream of `total`; the last one is up to half as long again, or half as long."""
    ends = list(range(length, total, length))
    if ends and total - ends[-1] < length / 2:
        ends.pop()
    return [*ends, total]


def at_most(length: int | None, ends: Sequence[int]) -> list[int]:
    """Where parts end once those of more than so many images are cut; None for no bound."""
    if length is None:
        return list(ends)
    cut: list[int] = []
    for begin, end in zip([0, *ends], ends, strict=False):
        cut += [*range(begin + length, end, length), end]
    return cut


def _places(rows: Tensor, total: int) -> Tensor:
    """How far the stream has come with some of its images, float64 [M] from 0 to 1."""
    return rows.double() / max(total - 1, 1)


def _part(arrived: Arrivals, begin: int, end: int) -> ImageSet:
    """The normal images from one place of a stream to another."""
    images = arrived.images.some(slice(begin, end))
    masks = torch.zeros((end - begin, *images.shape[-2:]), dtype=torch.bool)
    return ImageSet(images, masks, [GOOD] * (end - begin), arrived.names[begin:end])
