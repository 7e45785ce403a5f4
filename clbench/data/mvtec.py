"""The MVTec AD folder layout (Bergmann et al., 2019), with any category names."""

from collections.abc import Iterator
from pathlib import Path

from clbench.data.listing import SUFFIXES
from clbench.data.on_disk import Entry, OnDisk, folders
from clbench.data.samples import GOOD, Split
from clbench.errors import UserError


class MVTec(OnDisk):
    """`<root>/<category>/train/good`, `test/<kind>` and `ground_truth/<kind>/<stem>_mask.*` (or `<stem>.*`).

    Images may lie in folders inside these: those of a test image and of its mask have the same names.
    Datasets with nearly this layout subclass it and override the names of folders and masks below.

    Args:
        root: the folder that holds the category folders.
        categories: those to use, in this order; None takes every folder that has a `train/good`, sorted.

    Raises:
        UserError: the root or a category is missing or incomplete, an image has no mask, or two share a stem.
    """

    name = "mvtec"
    good = GOOD  # name of the folder of normal images, in train and test
    test = "test"
    truth = "ground_truth"  # folder of the masks
    mask = "{stem}_mask.png"  # a mask's name, in the error for one that is missing

    @classmethod
    def recognises(cls, root: Path) -> bool:
        return any(
            (folder / "train" / cls.good).is_dir() and (folder / cls.test).is_dir()
            for folder in folders(root)
        )

    def find(self, whole: bool) -> list[str]:
        inside = folders(self.root)
        found = [folder.name for folder in inside if (folder / "train" / self.good).is_dir()]
        if not found:
            if (self.root / "train" / self.good).is_dir():
                hint = f"it is a category itself: set dataset.root={self.root.parent}"
            else:
                names = ", ".join(folder.name for folder in inside[:10]) or "no folders"
                hint = f"found: {names}; set dataset.root=... to the folder of categories"
            raise UserError(
                f"dataset.root={self.root} has no category, a folder with train/{self.good}; {hint}"
            )
        for folder in inside if whole else []:
            if folder.name not in found and any((folder / part).is_dir() for part in ("train", self.test)):
                self.gap(
                    UserError(
                        f"{folder} looks like a category, but has no train/{self.good}: rename what is there, "
                        f"or leave it out with dataset.categories=[{','.join(found)}]"
                    )
                )
        return found

    def entries(self, category: str, split: Split) -> Iterator[Entry]:
        folder = self.root / category
        if split == "train":
            yield from map(Entry, self.images_by_stem(folder / "train" / self.good).values())
            return
        for kind in self.folders(folder / self.test):
            if kind == folder / self.truth:
                continue
            images = self.images_by_stem(kind)
            if kind.name == self.good:
                yield from map(Entry, images.values())
                continue
            masks = self.masks(folder / self.truth / kind.name) if images else {}
            for stem, image in images.items():
                found = masks.get(f"{stem}_mask") or masks.get(stem)
                if found:
                    yield Entry(image, kind.name, found)
                else:
                    expected = folder / self.truth / kind.name / self.mask.format(stem=stem)
                    self.gap(UserError(f"defect image {image} has no mask: expected {expected}"))

    def masks(self, folder: Path) -> dict[str, tuple[Path, ...]]:
        """The masks in the folder of a kind of defect: stem -> the files that make up one mask."""
        return {stem: (path,) for stem, path in self.images_by_stem(folder).items()}

    def nothing(self, category: str, split: Split) -> UserError:
        if split == "train":
            folder = self.root / category / "train" / self.good
            return UserError(f"{folder} has no images: put normal ones there ({' '.join(SUFFIXES)})")
        test = self.root / category / self.test
        return UserError(
            f"{test} has no images: put some into {test / self.good} and {test}/<kind of defect>"
        )
