"""The trained methods side by side with anomalib, in an environment of its own.

    python3 -m venv ENV && ENV/bin/pip install anomalib
    python -m benchmarks.side_by_side --python ENV/bin/python --root MVTEC --checkpoint resnet18.safetensors \
        --methods stfpm,cfa --categories bottle,pill --epochs 10

Both learn one category at a time from the same pixels, with the same backbone weights and pictures, for the same
epochs, without early stopping, in single precision unless said otherwise; maps of both go through the same metrics.
With several --seeds, metrics are means and sample deviations. --narrow divides the widths of DRAEM's and EfficientAD's
networks, on both sides, for what a CPU cannot do at full size. With --steps, an epoch ends after so many steps and
nothing is said of quality: for times alone. Both compute on a GPU where there is one; --device cpu leaves it alone. The
method `simulation` is DRAEM's data side: batches of 8 images of 256
pixels to anomalous ones and their masks.
"""

import argparse
import json
import subprocess
import tempfile
import time
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import cv2
import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from benchmarks.running import composed
from clbench import assembly, evaluation
from clbench.config import Config
from clbench.data.pictures import Pictures
from clbench.data.stream import Task
from clbench.energy import Meter
from clbench.methods.base import Prediction
from clbench.methods.simulated import simulate
from clbench.metrics.names import METRICS
from clbench.terminal import SHOWN

WORKER = Path(__file__).parent / "anomalib_worker.py"
SIZES = {"cfa": 224}
BATCHES = {
    "stfpm": 8,
    "cfa": 4,
    "fastflow": 32,
    "draem": 4,
    "efficientad": 1,
    "rd4ad": 16,
    "supersimplenet": 32,
}
PICTURES = 200
SIMULATED = 20  # batches, for their mean time


def main() -> None:
    """Print a table of the methods and categories asked for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--python", required=True, help="of the environment that has anomalib")
    parser.add_argument("--root", required=True, help="a folder of categories in the MVTec AD layout")
    parser.add_argument("--checkpoint", required=True, help="weights of timm's resnet18, .safetensors")
    parser.add_argument("--teacher", help="a distilled teacher for efficientad, of width 256 / NARROW")
    parser.add_argument("--methods", default=",".join(BATCHES))
    parser.add_argument("--categories", default="bottle")
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--steps", type=int, help="of an epoch, at most")
    parser.add_argument("--size", type=int, help="pixels along a side, in place of the methods' own")
    parser.add_argument(
        "--narrow", type=int, default=1, help="what draem's and efficientad's widths are divided by"
    )
    parser.add_argument("--learning-rate", type=float, help="of both sides, in place of the methods' own")
    parser.add_argument("--precision", default="fp32", help="of our training: fp32 or bf16")
    parser.add_argument("--their-precision", default="32-true", help="of anomalib's: 32-true or bf16-mixed")
    parser.add_argument("--seeds", default="0", help="of weights and order, on both sides: 0,1,2 gives means")
    parser.add_argument("--device", choices=("cpu", "cuda"), default=None, help="of both sides")
    given = parser.parse_args()
    given.device = given.device or ("cuda" if torch.cuda.is_available() else "cpu")
    where = torch.cuda.get_device_name() if given.device == "cuda" else "CPU"
    table = Table(
        title=f"ours / anomalib, {where}: {given.epochs} epochs"
        + (f" of {given.steps} steps" if given.steps else "")
        + (f", {given.size} pixels" if given.size else ""),
        title_justify="left",
    )
    metrics = [] if given.steps else SHOWN
    titles = (*(METRICS[metric].title for metric in metrics), "s an epoch", "steps a second", "ms an image")
    for title in ("method", "category", *titles):
        table.add_column(title)
    for method in given.methods.split(","):
        if method == "simulation":
            table.add_row("simulation", "", *[""] * (len(metrics) + 2), _simulation(given.python))
            Console(width=150).print(table)
            continue
        for category in given.categories.split(","):
            with tempfile.TemporaryDirectory() as folder:
                table.add_row(method, category, *_row(given, method, category, Path(folder), metrics))
            Console(width=150).print(table)


def _row(
    given: argparse.Namespace, method: str, category: str, folder: Path, metrics: list[str]
) -> list[str]:
    config = _settings(given, method, category, 0)
    task = assembly.reader(config, assembly.build_dataset(config))(lambda *_: None)[0]
    _write(task, folder / "images" / category)
    _write_pictures(task.train.images.shape[-1], folder / "pictures" / "all")
    seeds = [int(seed) for seed in given.seeds.split(",")]
    ours = [_ours(_settings(given, method, category, seed), task, given.steps) for seed in seeds]
    theirs = [_theirs(given, method, category, seed, task, folder / str(seed)) for seed in seeds]
    cells = [f"{_spread(ours, name)} / {_spread(theirs, name)}" for name in metrics]
    for name, digits in (("epoch", 1), ("rate", 2), ("image", 1)):
        mine, other = (mean(found[name] for found in side) for side in (ours, theirs))
        ratio = mine / other if name == "rate" else other / mine
        cells.append(f"{mine:.{digits}f} / {other:.{digits}f} ({ratio:.1f} times)")
    return cells


def _spread(found: list[dict[str, Any]], name: str) -> str:
    values = [each[name] for each in found]
    return f"{mean(values):.3f}" + (f" ± {stdev(values):.3f}" if len(values) > 1 else "")


def _simulation(python: str) -> str:
    """Milliseconds an image of simulating anomalies, as a cell."""
    with tempfile.TemporaryDirectory() as folder:
        _write_pictures(256, Path(folder) / "pictures")
        textures = Pictures(None, PICTURES, "", 0, folder).load(256, 256)
        images = torch.rand(8, 3, 256, 256)
        seconds = []
        for _ in range(SIMULATED + 1):
            begin = time.perf_counter()
            simulate(images, textures)
            seconds.append(time.perf_counter() - begin)
        ours = 1000 * sum(seconds[1:]) / SIMULATED / len(images)
        settings = {"method": "simulation", "pictures": f"{folder}/pictures", "batches": SIMULATED}
        theirs = float(_work(python, settings))
    return f"{ours:.1f} / {theirs:.1f} ({theirs / ours:.1f} times)"


def _settings(given: argparse.Namespace, method: str, category: str, seed: int) -> Config:
    overrides = [
        f"method={method}",
        f"seed={seed}",
        f"gpu.precision={given.precision}",
        f"gpu.device={given.device}",
        "benchmark=paper",
        "backbone=resnet18",
        f"backbone.checkpoint={given.checkpoint}",
        f"dataset.root={given.root}",
        "task_order=alphabetical",
        f"dataset.categories=[{category}]",
        f"dataset.crop={'null' if given.size else SIZES.get(method, 'null')}",
        *([f"dataset.resize={given.size}"] if given.size else []),
        "strategy=joint",  # of one task
        f"method.epochs={given.epochs}",
    ]
    if method in ("stfpm", "efficientad"):  # as many steps on both sides
        overrides += ["method.patience=null", "method.held_out=0"]
    rate = given.learning_rate
    if method == "stfpm":
        # Our loss is the mean over a batch, theirs the sum: the same steps, and the same decay of 0.001.
        rate = (rate or 0.4) * BATCHES[method]
        overrides += [f"method.weight_decay={0.001 / BATCHES[method]}"]
    if method == "efficientad":
        overrides += [f"method.teacher={given.teacher or 'random'}", f"method.penalty_count={PICTURES}"]
        overrides += [f"method.width={256 // given.narrow}"]
    if method == "fastflow":
        overrides += ["method.trained_normalisation=true"]  # as theirs
    if method == "rd4ad":
        overrides += ["method.beta2=0.99"]  # as theirs
    if method == "supersimplenet":
        overrides += ["method.align_corners=false", "method.adapt_cls_features=false"]  # as theirs
    if method == "draem":
        overrides += [
            f"method.texture_count={PICTURES}",
            f"method.reconstructive_width={128 // given.narrow}",
            f"method.discriminative_width={64 // given.narrow}",
        ]
    if rate:
        overrides += [f"method.learning_rate={rate}"]
    if rate and method == "supersimplenet":
        overrides += [f"method.adaptor_learning_rate={rate}"]
    return composed(*overrides)


def _ours(settings: Config, task: Task, steps: int | None) -> dict[str, Any]:
    """Metrics, seconds an epoch, steps a second, and milliseconds an image."""
    device = assembly.select_device(settings.gpu)
    detector = assembly.place(assembly.build_detector(settings), settings.gpu, device)
    strategy = assembly.build_strategy(settings, detector)
    images = task.train.images[: steps * detector.batch_size if steps else None]
    begun: list[float] = []
    step = detector.training_step

    def timed(batch: torch.Tensor) -> torch.Tensor | None:
        begun.append(time.perf_counter())
        return step(batch)

    detector.training_step = timed  # type: ignore[method-assign]
    strategy.learn(0, images)
    # From the first step on, as the other side's epochs are counted.
    spent = time.perf_counter() - begun[0]
    prediction = evaluation.predict(strategy, task.categories[0].test, 0, device, lambda *_: None)
    return {
        **evaluation.metrics_of(prediction, task.categories[0].test),
        "epoch": spent / detector.epochs,
        "rate": len(begun) / spent,
        "image": evaluation.inference_cost(
            strategy, task.categories[0].test.images, 0, device, lambda *_: None, Meter(device)
        )["ms"],
    }


def _theirs(
    given: argparse.Namespace, method: str, category: str, seed: int, task: Task, folder: Path
) -> dict[str, Any]:
    folder.mkdir()
    settings = {
        "method": method,
        "device": given.device,
        "seed": seed,
        "precision": given.their_precision,
        "root": str(folder.parent / "images"),
        "category": category,
        "size": task.train.images.shape[-1],
        "batch_size": BATCHES[method],
        "workers": 8 if given.device == "cuda" else 0,
        "epochs": given.epochs,
        "steps": given.steps,
        "narrow": given.narrow,
        "learning_rate": given.learning_rate,
        "pictures": str(folder.parent / "pictures"),
        "checkpoint": str(Path(given.checkpoint).absolute()),
        "teacher": str(Path(given.teacher).absolute()) if given.teacher else None,
        "folder": str(folder / "anomalib"),
        "output": str(folder / "result.npz"),
    }
    _work(given.python, settings)
    found = np.load(folder / "result.npz")
    order = {Path(path).stem: row for row, path in enumerate(found["paths"])}
    rows = [order[f"{number:04d}"] for number in range(len(task.categories[0].test))]
    prediction = Prediction(torch.from_numpy(found["maps"][rows]), torch.from_numpy(found["scores"][rows]))
    return {
        **evaluation.metrics_of(prediction, task.categories[0].test),
        "epoch": float(found["epochs"].mean()),
        "rate": len(found["steps"]) / float(found["epochs"].sum()),
        "image": 1000 * float(found["image_seconds"]),
    }


def _work(python: str, settings: dict[str, Any]) -> str:
    """What the worker prints in the end."""
    result = subprocess.run(
        [python, str(WORKER), json.dumps(settings)], capture_output=True, text=True, check=False
    )
    if result.returncode:
        raise SystemExit(result.stderr)
    return result.stdout.strip().rpartition("\n")[2]


def _write(task: Task, folder: Path) -> None:
    """A task's images at run size, in the MVTec AD layout, each test image named by its number."""
    for name in ("train/good", "test/good", "test/defect", "ground_truth/defect"):
        (folder / name).mkdir(parents=True)
    for number, image in enumerate(task.train.images):
        _save(folder / f"train/good/{number:04d}.png", image)
    test = task.categories[0].test
    shown = zip(test.images, test.masks, test.labels.tolist(), strict=True)
    for number, (image, mask, bad) in enumerate(shown):
        _save(folder / f"test/{'defect' if bad else 'good'}/{number:04d}.png", image)
        if bad:
            cv2.imwrite(
                str(folder / f"ground_truth/defect/{number:04d}_mask.png"),
                255 * mask.numpy().astype(np.uint8),
            )


def _write_pictures(size: int, folder: Path) -> None:
    """Procedural textures for anomalies and penalties, the same as ours."""
    folder.mkdir(parents=True)
    with tempfile.TemporaryDirectory() as cache:
        for number, picture in enumerate(Pictures(None, PICTURES, "", 0, cache).load(size, size)):
            _save(folder / f"{number:04d}.png", picture)


def _save(path: Path, image: torch.Tensor) -> None:
    cv2.imwrite(str(path), cv2.cvtColor(image.permute(1, 2, 0).numpy(), cv2.COLOR_RGB2BGR))


if __name__ == "__main__":
    main()
