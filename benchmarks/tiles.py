"""Large images in tiles: maps against those of the whole, a defect that shrinking loses, and the memory of predictions."""

import contextlib
import io
import re
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import cv2
import numpy as np
import torch
from rich.console import Group
from rich.table import Table

from clbench.backbones import Backbone
from clbench.commands.run import main as train
from clbench.data.files import read_mask
from clbench.data.samples import Geometry
from clbench.data.tiles import Tiling
from clbench.loading import TrainedDetector, load
from clbench.methods.base import Detector
from clbench.methods.patchcore import PatchCore
from clbench.methods.stfpm import STFPM
from clbench.recording.run_directory import RunDirectory
from clbench.strategies.finetune import Finetune

SIDE = 2048  # pixels of the images that runs learn and judge
DEFECT = 10  # pixels, of the defect's length
SIZES = ((512, 512), (2048, 2048), (6000, 8000))  # height and width of images that are predicted
# Half of what a position of a ResNet-18's levels sees, in pixels, and what patches, interpolation and smoothing add.
METHODS = {"STFPM": ([1, 2], 49 + 8), "PatchCore": ([2], 49 + 8 + 8 + 16)}


def table(checkpoint: str | None = None, root: str | None = None) -> Group:
    """Differences of maps; metrics of shrunk images and of tiles; and megabytes and seconds of `clbench predict` by size."""
    with tempfile.TemporaryDirectory() as folder:
        return Group(_differences(), *_defects_and_memory(Path(folder)))


def picture(
    random: np.random.Generator, height: int, width: int, scratched: bool = False
) -> tuple[np.ndarray, np.ndarray]:
    """A rough surface, uint8 [H, W, 3], and where it is scratched, bool [H, W]: a dark line of 10 x 2 pixels, or nothing.

    The surface has spots of every size, so that nothing of few pixels stands out by its brightness.
    """
    surface = np.full((height, width), 120, np.float32)
    for scale, strength in ((64, 8), (16, 8), (4, 8), (1, 4)):
        noise = random.standard_normal((height // scale + 2, width // scale + 2), dtype=np.float32)
        surface += strength * cv2.resize(noise, (width, height), interpolation=cv2.INTER_CUBIC)
    mask = np.zeros((height, width), np.uint8)
    if scratched:
        y, x = random.integers(DEFECT, height - DEFECT), random.integers(DEFECT, width - DEFECT)
        angle = random.uniform(0, np.pi)
        reach = np.array([np.cos(angle), np.sin(angle)]) * (DEFECT - 2) / 2
        ends = [tuple(np.rint((x, y) + sign * reach).astype(int).tolist()) for sign in (-1, 1)]
        cv2.line(mask, *ends, 1, 2)
        surface[mask > 0] -= 70
    grey = np.clip(surface, 0, 255).astype(np.uint8)
    return np.repeat(grey[:, :, None], 3, axis=2), mask > 0


def write_product(folder: Path, height: int, width: int, train: int, test: int) -> None:
    """A product of rough surfaces in the MVTec layout, `test` of them good and as many scratched."""
    random = np.random.default_rng(0)
    for name, count in (("train/good", train), ("test/good", test), ("test/scratch", test)):
        (folder / name).mkdir(parents=True)
        for number in range(count):
            image, mask = picture(random, height, width, name == "test/scratch")
            cv2.imwrite(str(folder / name / f"{number:03d}.bmp"), image)
            if mask.any():
                truth = folder / "ground_truth/scratch" / f"{number:03d}_mask.png"
                truth.parent.mkdir(parents=True, exist_ok=True)
                cv2.imwrite(str(truth), 255 * mask.astype(np.uint8))


def _differences() -> Table:
    shown = Table(
        "method", "tile", "overlap", "inside", "largest difference there", "and at tiles' borders",
        title=f"maps of a {SIDE}-pixel image in tiles, against its whole map; of the map's range", title_justify="left",
    )  # fmt: skip
    random = np.random.default_rng(1)
    image = (
        torch.from_numpy(picture(random, SIDE, SIDE, scratched=True)[0]).permute(2, 0, 1)[None].contiguous()
    )
    learned = torch.from_numpy(picture(random, 512, 1024)[0]).permute(2, 0, 1)[None].contiguous()
    for name, (layers, border) in METHODS.items():
        detector = _detector(name, layers)
        Finetune(detector).learn(0, Tiling(512, 0).cut(learned)[:])
        with torch.no_grad(), detector.eval().uncached():
            plain = detector(image).maps[0]
        for tile, overlap in ((512, 64), (512, 256)):
            tiling = Tiling(tile, overlap)
            found = TrainedDetector(detector, Geometry(None), (tile, tile), None, tiling=tiling)(image).maps[
                0
            ]
            off = (found - plain).abs() / (plain.max() - plain.min())
            side = _inside(tiling, border)
            inside = side[:, None] & side
            shown.add_row(
                name, str(tile), str(overlap), f"{100 * inside.float().mean():.0f} %",
                f"{off[inside].max():.1e}", f"{off[~inside].max():.1e}",
            )  # fmt: skip
    return shown


def _detector(name: str, layers: list[int]) -> Detector:
    backbone = Backbone(
        "resnet18", checkpoint="package:small.safetensors", arguments={"channels": [48, 96, 192, 384]}
    )
    if name == "STFPM":
        return STFPM(backbone, layers=layers, epochs=5, batch_size=2, held_out=0)
    return PatchCore(backbone, layers=layers, memory_size=2000)


def _inside(tiling: Tiling, border: int) -> torch.Tensor:
    """Which pixels of a side no tile has nearer to a border of its own than so many pixels, bool [SIDE]."""
    inside = torch.ones(SIDE, dtype=torch.bool)
    for start in tiling.starts(SIDE):
        end = start + tiling.side
        if start > 0:
            inside[start : start + border] = False
        if end < SIDE:
            inside[end - border : end] = False
    return inside


def _defects_and_memory(folder: Path) -> tuple[Table, Table]:
    shown = Table(
        "images", "image AUROC", "pixel AUROC", "AU-PRO", "highest on the scratch", "CPU s",
        title=f"scratches of {DEFECT} x 2 pixels on {SIDE}-pixel surfaces: PatchCore, 4 images learned, 10 judged",
        title_justify="left",
    )  # fmt: skip
    write_product(folder / "parts/surface", SIDE, SIDE, train=5, test=5)
    for words, given in {
        "shrunk to 256": ("dataset.resize=256",),
        "shrunk to 1024, tiles of 256": ("dataset.resize=1024", "dataset.tile=256"),
        f"as they are, {SIDE}, tiles of 256": ("dataset.resize=null", "dataset.tile=256"),
    }.items():
        begin = time.process_time()
        experiment = f"images-{len(shown.rows)}"
        with contextlib.redirect_stdout(io.StringIO()):
            status = train([
                "dataset=mvtec", f"dataset.root={folder}/parts", "dataset.crop=null", "method=patchcore",
                "method.memory_size=1000", "method.held_out=0.2", "backbone=small", "wandb=disabled", *given,
                f"outputs={folder}/outputs", f"cache={folder}/cache", f"experiment={experiment}",
            ])  # fmt: skip
        assert status == 0
        (run,) = (folder / "outputs" / experiment).glob("method=*")
        final = (RunDirectory(run).summary() or {})["final"]
        metrics = (f"{final[name]:.3f}" for name in ("image_auroc", "pixel_auroc", "aupro"))
        cpu_s = time.process_time() - begin
        shown.add_row(words, *metrics, pointed_at(run, folder / "parts/surface"), f"{cpu_s:.0f}")
    return shown, _memory(folder, run)


def pointed_at(run: Path, product: Path) -> str:
    """Of how many scratched images the highest point of the map is on the scratch, or within 4 pixels of it."""
    hits, images = 0, sorted((product / "test/scratch").iterdir())
    for found in load(run).predict(images):
        mask = read_mask(product / f"ground_truth/scratch/{found.path.stem}_mask.png")
        hits += bool(cv2.dilate(mask.astype(np.uint8), np.ones((9, 9), np.uint8)).flat[found.map.argmax()])
    return f"{hits} of {len(images)}"


def _memory(folder: Path, run: Path) -> Table:
    """What `clbench predict` takes for one image, with its overlay and mask."""
    shown = Table(
        "image", "tiles", "image, MB", "map, MB", "peak, MB", "beyond the first", "CPU s",
        title="clbench predict on one image in tiles of 256, overlays and masks written", title_justify="left",
    )  # fmt: skip
    first, before = 0.0, resource.getrusage(resource.RUSAGE_CHILDREN)
    spent = before.ru_utime + before.ru_stime
    for height, width in SIZES:
        file = folder / f"{width}.bmp"
        cv2.imwrite(str(file), picture(np.random.default_rng(2), height, width, scratched=True)[0])
        output = str(folder / f"found-{width}")
        words = [sys.executable, "-m", "clbench.cli", "predict", str(run), str(file), "--output", output]
        process = subprocess.Popen(words, stdout=subprocess.DEVNULL)
        peak = 0.0
        while (now := _most(process.pid)) is not None or process.poll() is None:
            peak = now or peak
            time.sleep(0.05)
        assert process.returncode == 0
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        seconds, spent = after.ru_utime + after.ru_stime - spent, after.ru_utime + after.ru_stime
        first = first or peak
        tiles = len(Tiling(256, 32).corners((height, width)))
        megabytes = (3 * height * width / 1e6, 4 * height * width / 1e6, peak, peak - first)
        shown.add_row(
            f"{width} x {height}", f"{tiles:,}", *(f"{each:,.0f}" for each in megabytes), f"{seconds:.0f}"
        )
    return shown


def _most(process: int) -> float | None:
    """The most memory that a process has had, 10^6 bytes; None where it has ended. What its parent had does not count."""
    status = Path(f"/proc/{process}/status").read_text(encoding="utf-8")
    found = re.search(r"VmHWM:\s+(\d+) kB", status)
    return int(found[1]) * 1024 / 1e6 if found else None
