"""Whether images are still those that a run was made with. Imports no torch."""

from collections.abc import Iterable, Mapping
from pathlib import Path

from clbench.data.cache import contents_of
from clbench.data.defects import fingerprint
from clbench.data.samples import Dataset, Geometry, Split

SPLITS: tuple[Split, Split] = ("train", "test")

# A category's name -> the fingerprints of its training images, of its test images, and of their defects where asked for.
Fingerprints = dict[str, list[str]]


def fingerprints(
    dataset: Dataset, categories: Iterable[str], geometry: Geometry, directory: Path, defects: bool = False
) -> Fingerprints:
    """The fingerprints of a dataset's images as they are now, in the order of the categories.

    Images whose files are as they were when they were decoded are not read.

    Args:
        geometry: what images are brought to.
        directory: folder of the cache of decoded images.
        defects: whether each defect was asked for by itself.

    Raises:
        UserError: a category is unknown or incomplete, a file is unreadable, or the cache cannot be written.
    """
    found: Fingerprints = {}
    for category in categories:
        given = [dataset.samples(category, split) for split in SPLITS]
        found[category] = [
            contents_of(samples, geometry, directory).fingerprint(samples) for samples in given
        ]
        if defects:
            found[category].append(fingerprint(dataset.defects(category, geometry, directory)))
    return found


def changes(before: Mapping[str, list[str]], now: Mapping[str, list[str]]) -> str | None:
    """What is different about the images now, in words; None where nothing is.

    Args:
        before, now: fingerprints, in the order of the stream.
    """
    if list(before.items()) == list(now.items()):
        return None
    changed = [
        *(f"'{name}' joined" for name in now if name not in before),
        *(f"'{name}' is gone" for name in before if name not in now),
    ]
    for name in before:
        parts = ("training images", "test images", "defects or saturation areas")
        for part, old, new in zip(parts, before[name], now.get(name, before[name]), strict=False):
            if old != new:
                changed.append(f"{part} of '{name}' changed")
    return ", ".join(changed) or "in another order"
