"""What all datasets share that are folders of files."""

import difflib
from abc import abstractmethod
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from pathlib import Path

from clbench.data.files import FileSample
from clbench.data.listing import LeftOut, folders, images_in
from clbench.data.samples import GOOD, Dataset, Sample, Split
from clbench.errors import UserError
from clbench.paths import Place, absolute

Gap = Callable[[UserError], None]


class NoRoot(UserError):
    """The folder of a dataset is not there."""


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
        self.left_out = LeftOut()
        try:
            found = self._found(whole=categories is None)
            self.categories = found if categories is None else list(categories)
            self._check_categories(found)
            self._entries = {
                (category, split): self._listed(category, split)
                for category in self.categories
                for split in ("train", "test")
            }
            self.notes = self._notes()
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

    def images_by_stem(self, folder: Path, without: Collection[Path] = ()) -> dict[str, Path]:
        """The image files of a folder and of those in it, sorted: path in the folder, less its suffix -> file.

        Calls `self.gap` where two files share a stem, and takes the first of them; and for a folder that cannot be listed.

        Args:
            folder: need not be there.
            without: folders in it that have another meaning.
        """
        images: dict[str, Path] = {}
        try:
            paths = images_in(folder, self.left_out, without) if folder.is_dir() else []
        except UserError as error:
            self.gap(error)
            return images
        for path in paths:
            stem = path.relative_to(folder).with_suffix("").as_posix()
            if stem in images:
                where = f"{images[stem]} and {path.name}"
                self.gap(UserError(f"{where} share a stem: remove or rename one of them"))
            images.setdefault(stem, path)
        return images

    def folders(self, parent: Path) -> list[Path]:
        """The folders in `parent`, as `clbench.data.listing.folders`; what is left out is told with the rest."""
        return folders(parent, self.left_out)

    def _notes(self) -> list[str]:
        """A line on the files that were left out of the folders that were read; none where there are none."""
        if not (left_out := str(self.left_out)):
            return []
        inside = [str(folder).removeprefix(f"{self.root}/") for folder in self.left_out.folders]
        more = f" and {len(inside) - 3} more" if len(inside) > 3 else ""
        return [f"left out of {self.root}: {left_out}; in {', '.join(inside[:3])}{more}"]

    def nothing(self, category: str, split: Split) -> UserError:
        """The error for a split without a single image."""
        return UserError(f"dataset.root={self.root}: '{category}' has no images to {split} on: add some")

    def _found(self, whole: bool) -> list[str]:
        if not self.root.is_dir():
            problem = "is not a folder" if self.root.exists() else "does not exist"
            raise NoRoot(
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
        name = str(entry.image).removeprefix(f"{self.root}/")
        try:
            return FileSample(name, entry.kind, entry.image, entry.masks)
        except UserError as error:  # a link that leads nowhere
            self.gap(error)
            return None


def unknown_category(where: str, category: str, found: list[str]) -> UserError:
    """The error for a category that is not among those found, with the nearest of them.

    Args:
        where: what was searched, to begin the message.
    """
    nearest = difflib.get_close_matches(category, found, n=1)
    hint = f" (nearest: '{nearest[0]}')" if nearest else ""
    return UserError(f"{where} has no category '{category}'{hint}; found: {', '.join(found)}")
