"""The MVTec AD folder layout (Bergmann et al., 2019), with any category names."""

import difflib
from pathlib import Path

from clbench.data.files import SUFFIXES, FileSample, file_identity
from clbench.data.samples import GOOD, Dataset, Sample, Split
from clbench.errors import UserError


class MVTec(Dataset):
    """`<root>/<category>/train/good`, `test/<kind>` and `ground_truth/<kind>/<stem>_mask.*` (or `<stem>.*`).

    All folders are listed at once, so that a gap is found before training and not after hours of it.

    Args:
        root: the folder that holds the category folders.
        categories: those to use, in this order; None takes every folder that has a `train/good`, sorted.

    Raises:
        UserError: the root or a category is missing or incomplete, an image has no mask, or two share a stem.
    """

    name = "mvtec"

    def __init__(self, root: str, categories: list[str] | None = None) -> None:
        self.root = Path(root).expanduser().absolute()
        try:
            found = self._find_categories()
            self.categories = found if categories is None else list(categories)
            if categories is None:
                self._check_left_out(found)
            self._check_categories(found)
            self._train = {category: self._list_train(category) for category in self.categories}
            self._test = {category: self._list_test(category) for category in self.categories}
        except OSError as error:
            raise UserError(
                f"dataset.root={self.root} cannot be listed: {error.strerror}: {error.filename}; "
                "set dataset.root=... to a folder you may read"
            ) from error

    def samples(self, category: str, split: Split) -> list[Sample]:
        if category not in self.categories:
            raise _unknown("dataset.categories", category, self.categories)
        files = self._train[category] if split == "train" else self._test[category]
        return [self._sample(image, mask) for image, mask in files]

    def _find_categories(self) -> list[str]:
        if not self.root.is_dir():
            problem = "is not a folder" if self.root.exists() else "does not exist"
            raise UserError(
                f"dataset.root={self.root} {problem}: set dataset.root=... to the folder of categories"
            )
        folders = _folders(self.root)
        categories = [folder.name for folder in folders if (folder / "train" / GOOD).is_dir()]
        if categories:
            return categories
        if (self.root / "train" / GOOD).is_dir():
            hint = f"it is a category itself: set dataset.root={self.root.parent}"
        else:
            names = ", ".join(folder.name for folder in folders[:10]) or "no folders"
            hint = f"found: {names}; set dataset.root=... to the folder of categories"
        raise UserError(f"dataset.root={self.root} has no category, a folder with train/{GOOD}; {hint}")

    def _check_left_out(self, found: list[str]) -> None:
        for folder in _folders(self.root):
            if folder.name not in found and any((folder / part).is_dir() for part in ("train", "test")):
                raise UserError(
                    f"{folder} looks like a category, but has no train/{GOOD}: rename what is there, "
                    f"or leave it out with dataset.categories=[{','.join(found)}]"
                )

    def _check_categories(self, found: list[str]) -> None:
        if not self.categories:
            raise UserError(f"dataset.categories=[] names none: give some of {', '.join(found)}, or null")
        for category in self.categories:
            if category not in found:
                raise _unknown(f"dataset.root={self.root}", category, found)
            if self.categories.count(category) > 1:
                raise UserError(f"dataset.categories names '{category}' more than once: name it once")

    def _list_train(self, category: str) -> list[tuple[Path, None]]:
        folder = self.root / category / "train" / GOOD
        images = _images_by_stem(folder)
        if not images:
            raise UserError(f"{folder} has no images: put normal ones there ({' '.join(SUFFIXES)})")
        return [(image, None) for image in images.values()]

    def _list_test(self, category: str) -> list[tuple[Path, Path | None]]:
        test = self.root / category / "test"
        files: list[tuple[Path, Path | None]] = []
        for kind in _folders(test):
            images = _images_by_stem(kind)
            if kind.name == GOOD:
                files += [(image, None) for image in images.values()]
            elif images:
                masks = _images_by_stem(self.root / category / "ground_truth" / kind.name)
                files += [(image, self._mask_of(stem, image, masks)) for stem, image in images.items()]
        if not files:
            raise UserError(f"{test} has no images: put some into {test / GOOD} and {test}/<kind of defect>")
        return files

    def _mask_of(self, stem: str, image: Path, masks: dict[str, Path]) -> Path:
        mask = masks.get(f"{stem}_mask") or masks.get(stem)
        if mask is None:
            category = image.parent.parent.parent
            expected = category / "ground_truth" / image.parent.name / f"{stem}_mask.png"
            raise UserError(f"defect image {image} has no mask: expected {expected}")
        return mask

    def _sample(self, image: Path, mask: Path | None) -> FileSample:
        return FileSample(
            name=str(image.relative_to(self.root)),
            kind=image.parent.name,
            identity=file_identity(image) + (f" mask {file_identity(mask)}" if mask else ""),
            image=image,
            mask=mask,
        )


def _folders(parent: Path) -> list[Path]:
    """The folders in `parent` that are not hidden, sorted; none where there is no `parent`."""
    if not parent.is_dir():
        return []
    return sorted(path for path in parent.iterdir() if not path.name.startswith(".") and path.is_dir())


def _images_by_stem(folder: Path) -> dict[str, Path]:
    """The image files of a folder by stem, sorted; what is hidden or no image is ignored."""
    images: dict[str, Path] = {}
    for path in sorted(folder.iterdir()) if folder.is_dir() else []:
        if path.name.startswith(".") or path.suffix.lower() not in SUFFIXES:
            continue
        if path.stem in images:
            raise UserError(f"{images[path.stem]} and {path.name} share a stem: remove or rename one of them")
        images[path.stem] = path
    return images


def _unknown(where: str, category: str, found: list[str]) -> UserError:
    nearest = difflib.get_close_matches(category, found, n=1)
    hint = f" (nearest: '{nearest[0]}')" if nearest else ""
    return UserError(f"{where} has no category '{category}'{hint}; found: {', '.join(found)}")
