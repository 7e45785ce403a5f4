"""VisA, the Visual Anomaly dataset (Zou et al., ECCV 2022), in its published layout and split."""

import csv
from collections.abc import Iterator
from pathlib import Path

from clbench.data.on_disk import Entry, OnDisk
from clbench.data.samples import GOOD, Split
from clbench.errors import UserError

SPLIT = Path("split_csv") / "1cls.csv"
COLUMNS = ("object", "split", "label", "image", "mask")


class VisA(OnDisk):
    """Images and masks as `split_csv/1cls.csv` lists them: nine in ten normal images are to train on.

    Rows are `object,split,label,image,mask`; the last two are paths in the root, as in
    `candle,test,anomaly,candle/Data/Images/Anomaly/000.JPG,candle/Data/Masks/Anomaly/000.png`.
    What the dataset's own prepare_data.py writes has the MVTec AD layout: read it with `dataset=mvtec`.
    """

    name = "visa"

    @classmethod
    def recognises(cls, root: Path) -> bool:
        return (root / SPLIT).is_file()

    def find(self, whole: bool) -> list[str]:
        path = self.root / SPLIT
        if not path.is_file():
            raise UserError(
                f"dataset.root={self.root} has no {SPLIT}, VisA's own split: set dataset.root=... to the folder "
                "that VisA_20220922.tar was unpacked in, or copy split_csv from "
                "https://github.com/amazon-science/spot-diff there; what prepare_data.py makes is dataset=mvtec"
            )
        try:
            with open(path, newline="", encoding="utf-8-sig") as file:
                table = csv.DictReader(file)
                missing = [column for column in COLUMNS if column not in (table.fieldnames or ())]
                if missing:
                    raise UserError(
                        f"{path} has no column {', '.join(missing)}: copy it again from its source"
                    )
                self._rows = []  # (line in the file, row)
                for line, row in enumerate(table, start=2):
                    if None in row or None in row.values():
                        self.gap(
                            UserError(f"{path}, line {line} is incomplete: copy it again from its source")
                        )
                    else:
                        self._rows.append((line, row))
        except (csv.Error, UnicodeDecodeError) as error:
            raise UserError(f"{path} is no CSV ({error}): copy it again from its source") from error
        found = sorted({row["object"] for _, row in self._rows})
        if not found:
            raise UserError(f"{path} lists no image: copy it again from its source")
        return found

    def entries(self, category: str, split: Split) -> Iterator[Entry]:
        for line, row in self._rows:
            if (row["object"], row["split"]) != (category, split):
                continue
            where = f"{self.root / SPLIT}, line {line}"
            normal = row["label"] == "normal"
            if not normal and (row["label"] != "anomaly" or split == "train"):
                self.gap(
                    UserError(f"{where}: label '{row['label']}' in {split}: copy it again from its source")
                )
                continue
            image = self._file(row["image"], where)
            mask = None if normal else self._file(row["mask"], where)
            if image and (normal or mask):
                yield Entry(image, GOOD if normal else "anomaly", (mask,) if mask else ())

    def _file(self, listed: str, where: str) -> Path | None:
        """The file that a row lists; None, after a call of `gap`, where it is missing."""
        path = self.root / listed
        if listed and path.is_file():
            return path
        self.gap(UserError(f"{where} lists '{listed}', which {self.root} does not have: unpack VisA again"))
        return None
