"""The stream: tasks in their order, and their images."""

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from clbench.data import cache
from clbench.data.images import ImageSet
from clbench.data.samples import Dataset, Geometry
from clbench.errors import UserError
from clbench.randomness import generator

_TAKEN = ("mean", "forgetting", "maps")  # what results are filed under beside categories
_LOOKED_AT = 16  # images of a set, at most, whose pixels tell whether it is the same


@dataclass(frozen=True)
class Category:
    """One product: what metrics are of."""

    name: str
    test: ImageSet


@dataclass(frozen=True)
class Task:
    """Categories that arrive together.

    Attributes:
        name: the categories' names, joined by `+`.
        train: the normal images of all its categories, which are learned from together.
        categories: each with the test set that it is evaluated on.
    """

    name: str
    train: ImageSet
    categories: tuple[Category, ...]

    def fingerprint(self) -> str:
        """A digest that is the same wherever the files lie, and another where images joined, left or changed: of names,
        kinds and sizes of all, and pixels and masks of some."""
        digest = hashlib.sha256()
        for images in (self.train, *(category.test for category in self.categories)):
            digest.update(json.dumps([images.names, images.kinds, images.images.shape]).encode())
            step = -(-len(images) // _LOOKED_AT)
            for tensor in (images.images[::step], images.masks[::step]):
                digest.update(tensor.contiguous().numpy().data)
        return digest.hexdigest()[:16]


def order(dataset: Dataset, kind: str, tasks: list | None, seed: int) -> list[list[str]]:
    """The categories of each task.

    Args:
        kind: `listed`, `alphabetical` or `random` (by seed).
        tasks: for `listed`: categories, or lists of categories that arrive together.

    Raises:
        UserError: the list names a category twice, or one that the dataset does not have; a category has a name that
            results need for themselves.
    """
    grouped = _grouped(dataset, kind, tasks, seed)
    for name in (name for group in grouped for name in group):
        if name in _TAKEN:
            raise UserError(
                f"the category '{name}' has a name that results need for themselves; rename its folder"
            )
    return grouped


def _grouped(dataset: Dataset, kind: str, tasks: list | None, seed: int) -> list[list[str]]:
    if tasks is None:
        names = sorted(dataset.categories)
        if kind == "random":
            random = generator(seed, "task order")
            names = [names[index] for index in torch.randperm(len(names), generator=random).tolist()]
        return [[name] for name in names]
    grouped = [[task] if isinstance(task, str) else list(task) for task in tasks]
    named = [name for group in grouped for name in group]
    if not named or not all(grouped):
        raise UserError(f"task_order.tasks={tasks} has an empty task: name at least one category in each")
    for name in named:
        if named.count(name) > 1:
            raise UserError(f"task_order.tasks names '{name}' twice: a category arrives once")
        if name not in dataset.categories:
            raise UserError(
                f"task_order.tasks names '{name}', which dataset={dataset.name} does not have; "
                f"found: {', '.join(dataset.categories)}"
            )
    return grouped


def load(
    dataset: Dataset,
    categories: list[list[str]],
    geometry: Geometry,
    directory: Path,
    progress: Callable[[str, int, int], None],
) -> list[Task]:
    """Load the tasks of a stream, reading every image once: no bad file is found after training.

    Args:
        categories: the names of each task's.
        directory: of the decoded-image cache.
        progress: called with the phase, images read and images in all.

    Raises:
        UserError: a file is unreadable, or images differ in size.
    """
    found = {
        (name, split): dataset.samples(name, split)
        for group in categories
        for name in group
        for split in ("train", "test")
    }
    total = sum(len(samples) for samples in found.values())
    done = 0

    def advance(images: int) -> None:
        nonlocal done
        done += images
        progress("reading images", done, total)

    sets = {key: cache.load(samples, geometry, directory, advance) for key, samples in found.items()}
    first = next(iter(sets.values()))
    for images in sets.values():
        ImageSet.same_size(first, images)
    return [
        Task(
            name="+".join(group),
            train=ImageSet.concatenate([sets[name, "train"] for name in group]),
            categories=tuple(Category(name, sets[name, "test"]) for name in group),
        )
        for group in categories
    ]
