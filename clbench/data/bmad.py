"""BMAD: six medical benchmarks, from brain MRI to histopathology (Bao et al., CVPR Workshops 2024)."""

from collections.abc import Collection, Iterator
from pathlib import Path

from clbench.data.on_disk import Entry, OnDisk, folders
from clbench.data.samples import GOOD, Split
from clbench.errors import UserError

UNGOOD = "ungood"
MASKS = ("label", "anomaly_mask")  # the authors' two names for the folder of masks


class BMAD(OnDisk):
    """`<category>/train/good` and `<category>/test/{good,Ungood}`, each with its images in it or in its `img`.

    Source: arXiv 2306.11876. The six subsets differ: `Ungood` is also spelt `ungood`, and a category may lie
    one folder deeper, as `Brain_AD/BraTS2021_slice`, which is `Brain` here. Where `test/Ungood` has a folder
    of masks (`label`; brain MRI, liver CT, RESC), each image needs a mask of the same name. Where it has none
    (chest X-ray, OCT2017, histopathology), the defects were not outlined: there are image metrics, and pixel
    metrics are undefined. `valid` (or `val`) is left out: it holds defects to tune on, and nothing is tuned.
    """

    name = "bmad"

    @classmethod
    def recognises(cls, root: Path) -> bool:
        return any(_inside(inner / "test", UNGOOD) for folder in folders(root) if (inner := _subset(folder)))

    def find(self, whole: bool) -> list[str]:
        self._subsets = {
            folder.name.removesuffix("_AD"): inner
            for folder in folders(self.root)
            if (inner := _subset(folder))
        }
        if not self._subsets:
            hint = f"it is a category itself: set dataset.root={self.root.parent}"
            if _inside(self.root / "train", GOOD) is None:
                names = ", ".join(folder.name for folder in folders(self.root)[:10]) or "no folders"
                hint = f"found: {names}; set dataset.root=... to the folder of categories"
            raise UserError(f"dataset.root={self.root} has no category, a folder with train/good; {hint}")
        return list(self._subsets)

    def entries(self, category: str, split: Split) -> Iterator[Entry]:
        folder = self._subsets[category] / split
        good = _inside(folder, GOOD)
        if good:
            yield from map(Entry, self._images(good).values())
        bad = _inside(folder, UNGOOD) if split == "test" else None
        if bad is None:
            return
        outlined = next((bad / name for name in MASKS if (bad / name).is_dir()), None)
        masks = self.images_by_stem(outlined) if outlined else {}
        for stem, image in self._images(bad, [bad / name for name in MASKS]).items():
            if not masks:
                yield Entry(image, UNGOOD)
            elif stem in masks:
                yield Entry(image, UNGOOD, (masks[stem],))
            else:
                expected = f"{outlined}/{stem}{image.suffix}"
                self.gap(UserError(f"defect image {image} has no mask: expected {expected}"))

    def _images(self, folder: Path, without: Collection[Path] = ()) -> dict[str, Path]:
        return self.images_by_stem(folder / "img" if (folder / "img").is_dir() else folder, without)


def _subset(folder: Path) -> Path | None:
    """The folder that holds a category's `train/good`: this one, or the only such one in it."""
    if _inside(folder / "train", GOOD):
        return folder
    inside = [inner for inner in folders(folder) if _inside(inner / "train", GOOD)]
    return inside[0] if len(inside) == 1 else None


def _inside(folder: Path, name: str) -> Path | None:
    """The folder of this name, in any case."""
    return next((inside for inside in folders(folder) if inside.name.lower() == name), None)
