"""What it costs to notice every image and mask that changes: beside a run's time, at its first start and later ones."""

import hashlib
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from rich.table import Table

from benchmarks.running import run_in
from clbench.data import cache
from clbench.data.mvtec import MVTec
from clbench.data.samples import Geometry, Sample
from clbench.data.synthetic import Synthetic, write_folder

_SIDE = 160  # pixels, as in the demo
_RUN = ("method=padim", "strategy=native", "dataset=mvtec", f"dataset.resize={_SIDE}", "dataset.crop=null")


def table(checkpoint: str | None = None, root: str | None = None) -> Table:
    """Seconds that reading files for their content, digests of pixels and looking both up take, and a run's.

    The run is the demo's fastest, PaDiM on ten categories, from PNG files of 256 x 256 pixels; of a folder of categories
    where a root is given.
    """
    shown = Table(title="Noticing images that change: PaDiM's run of the demo", title_justify="left")
    for title in ("images", "files, MB", "read, s", "digests, s", "decoding, s", "looked up, s", "run, s"):
        shown.add_column(title, justify="right")
    shown.add_column("share, first", justify="right")
    shown.add_column("later", justify="right")
    with tempfile.TemporaryDirectory() as folder:
        stream = Path(root) if root else Path(folder) / "stream"
        if not root:
            write_folder(Synthetic(), stream)
            time.sleep(2.5)  # of files that are newer, no listing is kept
        dataset = MVTec(str(stream))
        given = [dataset.samples(name, split) for name in dataset.categories for split in ("train", "test")]
        geometry, kept = Geometry(_SIDE), Path(folder) / "cache"

        def each(work: Callable[[list[Sample]], object]) -> float:
            begin = time.perf_counter()
            for samples in given:
                work(samples)
            return time.perf_counter() - begin

        read = each(cache._content_of)
        decoding = each(lambda samples: cache.load_cached(samples, geometry, kept)) - read
        looked_up = each(lambda samples: cache.contents_of(samples, geometry, kept))
        arrays = [cache.load_cached(samples, geometry, kept) for samples in given]
        begin = time.perf_counter()
        for images in arrays:
            hashlib.sha256(images.images.numpy().data).update(images.masks.numpy().data)
        digests = time.perf_counter() - begin
        begin = time.perf_counter()
        run_in(Path(folder) / "run", *_RUN, f"dataset.root={stream}", f"cache={folder}/another")
        run = time.perf_counter() - begin
        size = sum(path.stat().st_size for samples in given for path in _files(samples))
        seconds = (read, digests, decoding, looked_up, run)
        shown.add_row(
            str(sum(map(len, given))),
            f"{size / 1e6:.0f}",
            *(f"{each:.2f}" for each in seconds),
            f"{100 * (read + digests) / run:.1f} %",
            f"{100 * looked_up / run:.1f} %",
        )
    return shown


def _files(samples: list[Sample]) -> list[Path]:
    """The image and mask files of samples."""
    return [path for sample in samples for path in (sample.image, *sample.masks)]  # type: ignore[attr-defined]
