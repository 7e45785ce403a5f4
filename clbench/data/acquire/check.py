"""Reading all of a dataset's folder, to list what it holds and everything that is wrong with it."""

from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from clbench import digests
from clbench.data.acquire.published import Counts, Published
from clbench.data.decoding import file_bytes
from clbench.data.doubts import doubts, nearly_all
from clbench.data.files import FileSample, read_image, read_mask_of
from clbench.data.samples import GOOD
from clbench.data.stream import name_problem
from clbench.errors import UserError

Size = tuple[int, int]  # height, width


@dataclass
class CategoryCheck:
    """How many images a category has, and of which sizes."""

    name: str
    train: int = 0  # normal images to train on
    good: int = 0  # normal test images
    defective: int = 0  # test images with a defect
    outlined: int = 0  # of those, the ones with a mask
    sizes: Counter[Size] = field(default_factory=Counter)
    peak: int | None = None  # the largest value of its 16-bit images
    nearly_all: list[str] = field(default_factory=list)  # images whose masks mark nearly all of them

    @property
    def counts(self) -> Counts:
        return self.train, self.good, self.defective


@dataclass
class DatasetCheck:
    """What was found, a line each: problems make a dataset unusable or its results doubtful, notes do not."""

    categories: list[CategoryCheck] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def check_files(dataset: Published, root: Path, progress: Callable[[int, int], None]) -> DatasetCheck:
    """Read every image and mask of a dataset.

    Args:
        dataset: whose layout the folder has, and whose published counts it is compared with.
        root: the folder.
        progress: called with the number of images read, and of how many.

    Raises:
        UserError: the root holds nothing that could be checked.
    """
    report = DatasetCheck()
    reader = dataset.layout(str(root), gap=lambda gap: report.problems.append(str(gap)))
    found: list[tuple[CategoryCheck, bool, FileSample]] = []
    for name in reader.categories:
        if problem := name_problem(name):
            report.problems.append(problem)
        category = CategoryCheck(name)
        report.categories.append(category)
        for split in ("train", "test"):
            for sample in reader.samples(name, split):
                assert isinstance(sample, FileSample)
                found.append((category, split == "train", sample))
    seen: dict[str, str] = {}  # content -> training image
    tested: list[tuple[str, str]] = []
    pool = ThreadPoolExecutor()
    try:
        read = pool.map(_read_sample, [sample for _, _, sample in found])
        for done, ((category, train, sample), image) in enumerate(zip(found, read, strict=True), start=1):
            category.train += train
            category.good += not train and sample.kind == GOOD
            category.defective += sample.kind != GOOD
            category.outlined += bool(sample.masks)
            report.problems += image.problems
            if image.size:
                category.sizes[image.size] += 1
            if image.peak is not None:
                category.peak = max(image.peak, category.peak or 0)
            if image.nearly_all:
                category.nearly_all.append(sample.name)
            if image.content and train:
                seen.setdefault(image.content, sample.name)
            elif image.content:
                tested.append((image.content, sample.name))
            progress(done, len(found))
    finally:  # Ctrl-C does not wait for a hundred thousand images
        pool.shutdown(cancel_futures=True)
    report.problems += [
        f"{root / name} is the same file as {root / seen[content]}: a test image must not be learned from; "
        "remove one of them"
        for content, name in tested
        if content in seen
    ]
    report.notes = [
        *reader.notes,
        *doubts(
            {category.name: category.peak for category in report.categories},
            {category.name: category.nearly_all for category in report.categories},
            bit_depth=None,
        ),
        *_without_masks(report.categories),
        *_against_published(dataset, report.categories),
    ]
    return report


@dataclass
class _ReadImage:
    """What was found in an image's file and in its masks.

    Attributes:
        size: the image's; None where it cannot be read.
        content: SHA-256 of its file, in hexadecimal; None where it cannot be read.
        peak: its largest value if it has 16 bits.
        nearly_all: whether its masks together mark nearly all of it.
        problems: what is wrong, a line each.
    """

    size: Size | None = None
    content: str | None = None
    peak: int | None = None
    nearly_all: bool = False
    problems: list[str] = field(default_factory=list)


def _read_sample(sample: FileSample) -> _ReadImage:
    """Read an image and its masks."""
    found = _ReadImage()
    try:
        pixels = read_image(sample.image)
        found.size = pixels.shape[0], pixels.shape[1]
        found.peak = int(pixels.max()) if pixels.dtype == np.uint16 else None
        found.content = digests.of_bytes(file_bytes(sample.image))
    except UserError as error:
        found.problems.append(str(error))
    merged = None
    for path in sample.masks:
        try:
            mask = read_mask_of(sample.image, path, found.size)
        except UserError as error:
            found.problems.append(str(error))
        else:
            merged = mask if merged is None or merged.shape != mask.shape else merged | mask
    found.nearly_all = merged is not None and nearly_all(merged)
    return found


def _without_masks(categories: list[CategoryCheck]) -> list[str]:
    """A note for each category that has defective images without a mask."""
    return [
        f"{category.name}: {category.defective - category.outlined} of {category.defective} defective images "
        "have no mask, as published: they count for image-level metrics, and pixel metrics are "
        + ("over the rest" if category.outlined else "undefined")
        for category in categories
        if category.outlined < category.defective
    ]


def _against_published(dataset: Published, categories: list[CategoryCheck]) -> list[str]:
    """Notes on how the counts differ from the published ones, where the categories are the published ones."""
    names = {category.name for category in categories}
    notes = [
        f"{category.name}: {_in_words(category.counts)}; published: {_in_words(published)}"
        for category in categories
        if category.counts != (published := tuple(dataset.counts.get(category.name, category.counts)))
    ]
    if dataset.counts and (own := sorted(names - set(dataset.counts))):
        return [*notes, f"not of {dataset.title}, and compared with nothing: {', '.join(own)}"]
    missing = [name for name in dataset.counts if name not in names]
    if missing:
        notes.append(f"not here, of {dataset.title}: {', '.join(missing)}")
    here = tuple(map(sum, zip(*(category.counts for category in categories), strict=True)))
    if notes or here != dataset.total:
        notes.append(f"{dataset.title} as published: {_in_words(dataset.total)}; here: {_in_words(here)}")
    else:
        notes.append(f"as many images as published of {dataset.title}: {_in_words(here)}")
    return notes


def _in_words(counts: tuple[int, ...]) -> str:
    train, good, defective = counts
    return f"{train:,} to train on, {good:,} good and {defective:,} defective to test on"
