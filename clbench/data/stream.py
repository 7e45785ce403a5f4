"""The stream: tasks in their order, and their images."""

import unicodedata
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from clbench.config.schema import BY_RESULTS
from clbench.data import cache
from clbench.data import defects as outlined
from clbench.data import doubts as doubtful
from clbench.data.images import ImageSet
from clbench.data.protocols import protocol_of
from clbench.data.samples import Dataset, Geometry
from clbench.data.tiles import Tiling
from clbench.data.unchanged import SPLITS, Fingerprints
from clbench.errors import UserError
from clbench.randomness import generator

# Names that results are filed under beside those of categories, in tables and in Weights & Biases.
_TAKEN = ("mean", "forgetting", "maps", "training", "final", "R")
_LONGEST = 200  # bytes of a name; file systems take 255, of which files that are named after it need some


@dataclass(frozen=True)
class Category:
    """A kind of product: what metrics are measured for.

    Attributes:
        name: its name in the dataset.
        test: the images that it is evaluated on.
        fingerprints: of its training images and of its test images, and of their defects where they were asked for;
            empty where they are not known.
        peak: the largest value of its 16-bit images; None where it has none.
        nearly_all: the names of the test images whose masks mark nearly all of them.
    """

    name: str
    test: ImageSet
    fingerprints: list[str] = field(default_factory=list)
    peak: int | None = None
    nearly_all: list[str] = field(default_factory=list)


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


def fingerprints(tasks: Sequence[Task]) -> Fingerprints:
    """The fingerprints of all categories, in the order of the stream; see `clbench.data.unchanged`."""
    return {category.name: category.fingerprints for task in tasks for category in task.categories}


def order(dataset: Dataset, kind: str, tasks: list | None, seed: int) -> list[list[str]]:
    """The names of the categories of each task, in the stream's order.

    Args:
        kind: looked at where `tasks` is None: `random`, or else alphabetical. Where results decided on `tasks`, how:
            they must be all categories of the dataset then.
        tasks: names of categories, and lists of names of those that arrive together; None for each category
            of the dataset as a task of its own.
        seed: of a random order.

    Raises:
        UserError: the list is empty, has an empty task, names a category twice or one that the dataset does not have,
            or lacks one that it must have; or a category's name cannot be used.
    """
    grouped = _grouped(dataset, kind, tasks, seed)
    for name in (name for group in grouped for name in group):
        if problem := name_problem(name):
            raise UserError(problem)
    tasks_called = ["+".join(group) for group in grouped]
    for name in tasks_called:
        if tasks_called.count(name) > 1:
            raise UserError(
                f"two tasks would be called '{name}', after their categories: rename the folder of a category with a +"
            )
    return grouped


def name_problem(name: str) -> str | None:
    """Why a category cannot be called so, and what to do; None where it can.

    Files, keys and columns of tables are named after categories.
    """
    reason = None
    if name in _TAKEN or name.startswith("percentile_"):
        reason = "has a name that results need for themselves"
    elif any(unicodedata.category(sign) in ("Cc", "Cs", "Zl", "Zp") for sign in name):
        reason = "has a name with signs that are no text in UTF-8"
    elif "/" in name or name in ("", ".", ".."):
        reason = "has a name that no folder can have"
    elif len(name.encode()) > _LONGEST:
        reason = f"has a name of {len(name.encode())} bytes, and files with longer ones are named after it"
        name = f"{name[:20]}..."
    shown = name.encode("unicode_escape").decode("ascii") if reason and not name.isprintable() else name
    return reason and f"the category '{shown}' {reason}; rename its folder"


def _grouped(dataset: Dataset, kind: str, tasks: list | None, seed: int) -> list[list[str]]:
    """As `order`, whatever the categories are called."""
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
    if kind in BY_RESULTS and set(named) != set(dataset.categories):
        other = ", ".join(sorted(set(named) ^ set(dataset.categories)))
        raise UserError(
            f"task_order={kind} goes by a run of other categories than dataset={dataset.name} has ({other}): give the "
            "task_order.run of one on the same, or these with dataset.categories=[...]"
        )
    if missing := [f"'{name}'" for name in named if name not in dataset.categories]:
        protocol = protocol_of(None, grouped)
        lists = f"the protocol task_order={protocol} has" if protocol else "task_order.tasks names"
        raise UserError(
            f"{lists} {', '.join(missing)}, which dataset={dataset.name} does not have; "
            f"found: {', '.join(dataset.categories)}"
        )
    return grouped


def load_tasks(
    dataset: Dataset,
    categories: list[list[str]],
    geometry: Geometry,
    directory: Path,
    progress: Callable[[str, int, int], None],
    defects: bool = False,
    absent: Mapping[str, list[str]] | None = None,
    tiling: Tiling | None = None,
) -> list[Task]:
    """The tasks of a stream. Every file is read now, so that a bad one is found before training.

    A split without samples has no images.

    Args:
        categories: names of the categories of each task, as `order` gives them.
        geometry: the size that images and masks are brought to.
        directory: folder of the cache of decoded images.
        progress: called with the phase, the number of images read, and of all.
        defects: whether test sets need each defect by itself; only where the dataset has `defects`.
        absent: the fingerprints of categories whose images are not there any more.
        tiling: how images are cut for detectors; None where they are not. Then images of one task alone need to be of one
            size.

    Raises:
        UserError: a file is unreadable, images differ in size or are smaller than a tile, or the cache cannot be written.
    """
    found = {
        (name, split): dataset.samples(name, split)
        for group in categories
        for name in group
        for split in SPLITS
    }
    # First, as it is quickly known whether they are all there.
    each_defect = {
        name: dataset.defects(name, geometry, directory)
        for name, split in found
        if defects and split == "test"
    }
    total = sum(len(samples) for samples in found.values())
    done = 0

    def advance(images: int) -> None:
        nonlocal done
        done += images
        progress("reading images", done, total)

    sets = {
        key: cache.load_cached(samples, geometry, directory, advance)
        for key, samples in found.items()
        if samples
    }
    first = next(iter(sets.values()))
    for images in sets.values():
        if tiling is None:
            first.same_size(images)
        else:
            tiling.check(images.masks.shape[1:], images.names[0])
    sets |= {key: ImageSet.none(first.masks.shape[1:]) for key in found if key not in sets}
    sets = {key: replace(images, tiling=tiling) for key, images in sets.items()}

    def category(name: str) -> Category:
        known = [sets[name, split].contents for split in SPLITS]
        of_images = [each.fingerprint(found[name, split]) for split, each in zip(SPLITS, known, strict=True)]
        outlines = each_defect.get(name, [])
        gone = (absent or {}).get(name)
        return Category(
            name,
            test=replace(sets[name, "test"], defects=outlines),
            fingerprints=gone or [*of_images, *([outlined.fingerprint(outlines)] if defects else [])],
            peak=max((each.peak for each in known if each.peak is not None), default=None),
            nearly_all=[sets[name, "test"].names[index] for index in known[1].nearly_all],
        )

    return [
        Task(
            name="+".join(group),
            train=ImageSet.concatenate([sets[name, "train"] for name in group]),
            categories=tuple(map(category, group)),
        )
        for group in categories
    ]


def first_image(dataset: Dataset, categories: list[list[str]], geometry: Geometry) -> torch.Tensor:
    """The stream's first training image at the run's size, uint8 [3, H, W], read for itself.

    Raises:
        UserError: it cannot be read.
    """
    image, _ = dataset.samples(categories[0][0], "train")[0].at(geometry).read()
    return torch.from_numpy(geometry.image(image)).permute(2, 0, 1)


def doubts(tasks: Sequence[Task], bit_depth: int | None) -> list[str]:
    """A line for each thing that is doubtful about the images of a stream.

    Args:
        bit_depth: the setting `dataset.bit_depth`.
    """
    categories = [category for task in tasks for category in task.categories]
    return doubtful.doubts(
        {category.name: category.peak for category in categories},
        {category.name: category.nearly_all for category in categories},
        bit_depth,
    )
