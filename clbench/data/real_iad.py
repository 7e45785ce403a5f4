"""Real-IAD: thirty parts, each seen from five sides (Wang et al., CVPR 2024), in its published splits."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from clbench.data.on_disk import Entry, Gap, OnDisk, folders, refuse
from clbench.data.samples import GOOD, Split
from clbench.errors import UserError
from clbench.paths import Place

JSONS = "realiad_jsons"
View = Literal["C1", "C2", "C3", "C4", "C5"]


class RealIAD(OnDisk):
    """`realiad_<size>/<category>/` and `<split>/<category>.json`, which lists images with their class and mask.

    The JSON files may also lie in `<root>/realiad_jsons/<split>/`, where their archive unpacks them. As in
    the authors' own code, an image without a mask is good: it shows a side of a defective part from which the
    defect cannot be seen.

    Args:
        root: the folder that holds `realiad_1024` or another size, and `realiad_jsons`.
        size: size of the images on disk: 256, 512, 1024 or raw; None takes 1024, or the only one there is.
        split: the folder of JSON files: `realiad_jsons` (all views) or `realiad_jsons_sv` (single view). The
            folders `realiad_jsons_fuiad_*`, which mix defects among the training images, are refused.
        views: the cameras, C1 from above and C2 to C5 from the sides; None takes all.
        categories, gap: as in `OnDisk`.

    Raises:
        UserError: as `OnDisk`; or a JSON file is missing, is no such list, or lists defects to train on.
    """

    name = "real_iad"

    def __init__(
        self,
        root: Place,
        size: Literal[256, 512, 1024, "raw"] | None = None,
        split: str = JSONS,
        views: list[View] | None = None,
        categories: list[str] | None = None,
        gap: Gap = refuse,
    ) -> None:
        self._size, self._split, self._views = size, split, views
        self._lists: dict[str, dict[str, Any]] = {}
        super().__init__(root, categories, gap)

    @classmethod
    def recognises(cls, root: Path) -> bool:
        return (root / JSONS).is_dir()

    def find(self, whole: bool) -> list[str]:
        sizes = [f.name for f in folders(self.root) if f.name.startswith("realiad_") and JSONS not in f.name]
        wanted = f"realiad_{self._size or 1024}"
        if self._size is None and len(sizes) == 1:
            wanted = sizes[0]
        self._images = images = self.root / wanted
        if not images.is_dir():
            raise UserError(
                f"dataset.root={self.root} has no {wanted}; found: {', '.join(sizes) or 'none'}; "
                "set dataset.size=..., or dataset.root=... to the folder that holds it"
            )
        found = [folder.name for folder in folders(images)]
        if not found:
            raise UserError(f"{images} has no categories: unpack the archives of Real-IAD there")
        return found

    def entries(self, category: str, split: Split) -> Iterator[Entry]:
        listed = self._list(category)
        normal = listed["meta"]["normal_class"]
        folder = self._images / category
        for item in listed[split]:
            kind, named = item["anomaly_class"], item["image_path"]
            if self._views is not None and not any(f"_{view}_" in Path(named).name for view in self._views):
                continue
            good = kind == normal or item["mask_path"] is None
            if split == "train" and kind != normal:
                self.gap(
                    UserError(
                        f"dataset.split={self._split} trains on defects ({named} of {category} is '{kind}'), but "
                        f"here training images are good ones: take dataset.split={JSONS} or {JSONS}_sv"
                    )
                )
                return
            files = (folder / named,) if good else (folder / named, folder / item["mask_path"])
            missing = [path for path in files if not path.is_file()]
            for path in missing:
                lists = f"{self._split}/{category}.json lists"
                self.gap(UserError(f"{path} is missing, which {lists}: unpack it again"))
            if not missing:
                yield Entry(files[0], GOOD if good else kind, files[1:])

    def _list(self, category: str) -> dict[str, Any]:
        """What a category's JSON file holds, read once; without images where it is missing or damaged."""
        if category in self._lists:
            return self._lists[category]
        places = [self.root / part / f"{category}.json" for part in (self._split, f"{JSONS}/{self._split}")]
        path = next((place for place in places if place.is_file()), None)
        listed: dict[str, Any] = {"meta": {"normal_class": ""}, "train": [], "test": []}
        self._lists[category] = listed
        if path is None:
            self.gap(
                UserError(
                    f"{places[0]} does not exist: unpack realiad_jsons.zip in {self.root}, set dataset.split=..., "
                    f"or leave '{category}' out with dataset.categories=[...]"
                )
            )
            return listed
        try:
            listed = json.loads(path.read_text(encoding="utf-8"))
            str(listed["meta"]["normal_class"])
            for item in [*listed["train"], *listed["test"]]:
                str(item["anomaly_class"]), Path(item["image_path"]), Path(item["mask_path"] or "")
        except (ValueError, KeyError, TypeError) as error:
            self.gap(
                UserError(
                    f"{path} is no split of Real-IAD ({type(error).__name__}: {error}): copy it again from its "
                    "source"
                )
            )
            return self._lists[category]
        self._lists[category] = listed
        return listed
