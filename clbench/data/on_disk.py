"""What all datasets share that are folders of files."""

import difflib
from abc import abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from clbench.data.files import SUFFIXES, FileSample, file_identity
from clbench.data.samples import GOOD, Dataset, Sample, Split
from clbench.errors import UserError
from clbench.paths import Place, absolute

Gap = Callable[[UserError], None]


def refuse(gap: UserError) -> None:
    """Raise a gap, an image or mask that is missing: a run needs a whole dataset.

    Raises:
        UserError: always.
    """
    raise gap


@dataclass(frozen=True)
class Entry:
    """An image of a dataset and the masks of its defect: without any, it is good or was not outlined."""

    image: Path
    kind: str = GOOD
    masks: tuple[Path, ...] = ()


class OnDisk(Dataset):
    """Categories under a root folder, all listed at once: a gap is found before training, not after hours.

    A layout is a subclass: it says which categories there are (`find`) and which images they have
    (`entries`), and calls `self.gap` for each image or mask that is missing.

    Args:
        root: the folder that the layout begins at.
        categories: those to use, in this order; None takes all that are found, sorted.
        gap: called for each image or mask that is missing; if it returns, the image is left out. The default
            raises.

    Raises:
        UserError: the root or a category is missing or incomplete, or cannot be listed.
    """

    def __init__(self, root: Place, categories: list[str] | None = None, gap: Gap = refuse) -> None:
        self.root = Path(absolute(root, "dataset.root"))
        self.gap = gap
        try:
            found = self._found(whole=categories is None)
            self.categories = found if categories is None else list(categories)
            self._check_categories(found)
            self._entries = {
                (category, split): self._listed(category, split)
                for category in self.categories
                for split in ("train", "test")
            }
        except OSError as error:
            raise UserError(
                f"dataset.root={self.root} cannot be listed: {error.strerror}: {error.filename}; "
                "set dataset.root=... to a folder you may read"
            ) from error

    @classmethod
    @abstractmethod
    def recognises(cls, root: Path) -> bool:
        """Whether a folder looks like the root of this layout."""

    @abstractmethod
    def find(self, whole: bool) -> list[str]:
        """The categories in the root folder, sorted. The folder exists.

        Args:
            whole: whether all categories are wanted; then a folder like an incomplete category is a gap.

        Raises:
            UserError: there is none.
        """

    @abstractmethod
    def entries(self, category: str, split: Split) -> Iterator[Entry]:
        """The images of a category in a fixed order; calls `self.gap` for what is missing."""

    def samples(self, category: str, split: Split) -> list[Sample]:
        if category not in self.categories:
            raise unknown_category("dataset.categories", category, self.categories)
        given = map(self._sample, self._entries[category, split])
        return [sample for sample in given if sample is not None]

    def images_by_stem(self, folder: Path) -> dict[str, Path]:
        """The image files of a folder, sorted: stem -> file. Hidden files and other files are ignored.

        Calls `self.gap` where two files share a stem, and takes the first of them.
        """
        images: dict[str, Path] = {}
        for path in sorted(folder.iterdir()) if folder.is_dir() else []:
            if path.name.startswith(".") or path.suffix.lower() not in SUFFIXES:
                continue
            if path.stem in images:
                where = f"{images[path.stem]} and {path.name}"
                self.gap(UserError(f"{where} share a stem: remove or rename one of them"))
            images.setdefault(path.stem, path)
        return images

    def nothing(self, category: str, split: Split) -> UserError:
        """The error for a split without a single image."""
        return UserError(f"dataset.root={self.root}: '{category}' has no images to {split} on: add some")

    def _found(self, whole: bool) -> list[str]:
        if not self.root.is_dir():
            problem = "is not a folder" if self.root.exists() else "does not exist"
            raise UserError(
                f"dataset.root={self.root} {problem}: set dataset.root=... to the folder of categories"
            )
        return self.find(whole)

    def _check_categories(self, found: list[str]) -> None:
        if not self.categories:
            raise UserError(f"dataset.categories=[] names none: give some of {', '.join(found)}, or null")
        for category in self.categories:
            if category not in found:
                raise unknown_category(f"dataset.root={self.root}", category, found)
            if self.categories.count(category) > 1:
                raise UserError(f"dataset.categories names '{category}' more than once: name it once")

    def _listed(self, category: str, split: Split) -> list[Entry]:
        listed = list(self.entries(category, split))
        if not listed:
            self.gap(self.nothing(category, split))
        return listed

    def _sample(self, entry: Entry) -> FileSample | None:
        """An entry as a sample; None, after a call of `gap`, where a file cannot be found."""
        try:
            identity = " mask ".join(map(file_identity, (entry.image, *entry.masks)))
        except UserError as error:  # a link that leads nowhere
            self.gap(error)
            return None
        return FileSample(
            name=str(entry.image).removeprefix(f"{self.root}/"),
            kind=entry.kind,
            identity=identity,
            image=entry.image,
            masks=entry.masks,
        )


def folders(parent: Path) -> list[Path]:
    """The folders in `parent` that are not hidden, sorted; none where there is no `parent`."""
    if not parent.is_dir():
        return []
    return sorted(path for path in parent.iterdir() if not path.name.startswith(".") and path.is_dir())


def unknown_category(where: str, category: str, found: list[str]) -> UserError:
    """The error for a category that is not among those found, with the nearest of them.

    Args:
        where: what was searched, to begin the message.
    """
    nearest = difflib.get_close_matches(category, found, n=1)
    hint = f" (nearest: '{nearest[0]}')" if nearest else ""
    return UserError(f"{where} has no category '{category}'{hint}; found: {', '.join(found)}")
