"""Products that came after a stream was begun: each has a folder of its own. Imports no torch."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from clbench.data.defects import Defect
from clbench.data.mvtec import MVTec
from clbench.data.on_disk import Entry
from clbench.data.samples import Dataset, Geometry, Sample, Split
from clbench.errors import UserError


class Products(Dataset):
    """The categories of a dataset, those of them whose images are not there any more, and products that came later.

    Args:
        whole: the dataset that the stream began with; None where all of its categories are absent.
        absent: names of those that are not there: they have no samples.
        added: a product's name -> its folder, see `Product`; that of one that is absent is not looked for.

    Raises:
        UserError: as `Product`.
    """

    def __init__(self, whole: Dataset | None, absent: Sequence[str], added: Mapping[str, str]):
        self._whole, self._absent = whole, list(absent)
        self._products = {
            name: Product(name, Path(folder)) for name, folder in added.items() if name not in absent
        }
        elsewhere = {*self._absent, *self._products}
        there = [] if whole is None else [name for name in whole.categories if name not in elsewhere]
        self.name = "products" if whole is None else whole.name
        self.categories = [*self._absent, *there, *self._products]
        gone = [f"there are no images of {', '.join(absent)}: results of them stay as they were"]
        lists = [whole.notes if whole else (), *(each.notes for each in self._products.values())]
        self.notes = [*(note for notes in lists for note in notes), *(gone if absent else [])]

    def samples(self, category: str, split: Split) -> list[Sample]:
        if category in self._products:
            return self._products[category].samples(category, split)
        if category in self._absent or self._whole is None:
            return []
        return self._whole.samples(category, split)

    def defects(self, category: str, geometry: Geometry, directory: Path) -> list[Defect]:
        known = self._whole is not None and category in self._whole.categories
        return self._whole.defects(category, geometry, directory) if known and self._whole else []


class Product(MVTec):
    """One product, by its folder.

    The folder is laid out as a category of MVTec AD is, with `train/good`, `test/<kind>` and `ground_truth/<kind>`; without
    `test` the product is learned and not evaluated. Or it has normal images alone, in itself and in folders in it.

    Args:
        name: the product's.
        folder: its folder.

    Raises:
        UserError: there is no such folder, it has no normal image, or an image of a defect has no mask.
    """

    def __init__(self, name: str, folder: Path):
        if not folder.is_dir():
            raise UserError(f"the folder of '{name}', {folder}, is not there: put it back, or name another")
        self._name, self._folder = name, folder
        super().__init__(str(folder.parent), [name])

    def find(self, whole: bool) -> list[str]:
        return [self._name]

    def entries(self, category: str, split: Split) -> Iterator[Entry]:
        if any((self._folder / part).is_dir() for part in ("train", self.test)):
            yield from super().entries(self._folder.name, split)
        elif split == "train":
            yield from map(Entry, self.images_by_stem(self._folder).values())

    def nothing(self, category: str, split: Split) -> UserError:
        return super().nothing(self._folder.name, split)

    def _listed(self, category: str, split: Split) -> list[Entry]:
        return super()._listed(category, split) if split == "train" else list(self.entries(category, split))
