"""MVTec LOCO AD: logical and structural anomalies (Bergmann et al., IJCV 2022)."""

from pathlib import Path

from clbench.data.defects import CONFIG, load_defects
from clbench.data.files import FileSample
from clbench.data.mvtec import MVTec
from clbench.data.on_disk import folders
from clbench.data.samples import Defect, Geometry

ANOMALY_FOLDERS = ("logical_anomalies", "structural_anomalies")


class MVTecLOCO(MVTec):
    """MVTec AD's layout with a folder of masks for each image: `ground_truth/<kind>/<stem>/000.png`, ...

    Each mask file is one anomaly, whose region has a pixel value that says its kind; they are merged into one
    mask of the image. `validation/good`, more normal images, is left out.

    The dataset's paper measures localisation by sPRO: a logical anomaly counts as found once a part of its
    region is, the saturation area of the category's `defects_config.json`, since a missing part may be anywhere
    in its compartment. `metrics=loco` asks for it (`clbench.metrics.curves.pixel_metrics`). AU-PRO, which is
    measured as for all datasets, asks for the whole region and is lower. Image metrics are the paper's.
    """

    name = "mvtec_loco"
    mask = "{stem}/000.png"

    @classmethod
    def recognises(cls, root: Path) -> bool:
        return super().recognises(root) and any(
            (folder / "test" / kind).is_dir() for folder in folders(root) for kind in ANOMALY_FOLDERS
        )

    def defects(self, category: str, geometry: Geometry, directory: Path) -> list[Defect]:
        samples = [sample for sample in self.samples(category, "test") if isinstance(sample, FileSample)]
        return load_defects(samples, self.root / category / CONFIG, geometry, directory)

    def masks(self, folder: Path) -> dict[str, tuple[Path, ...]]:
        files: dict[str, tuple[Path, ...]] = {}
        for stem, path in self.images_by_stem(folder).items():
            image = stem.rpartition("/")[0]
            files[image] = (*files.get(image, ()), path)
        return files
