"""What a run spends beside learning and evaluating, as streams grow: it must grow with evaluations and no faster."""

import tempfile
import time
from pathlib import Path

import cv2
import numpy as np
from rich.table import Table

from benchmarks.running import run_in

TASKS = (20, 40, 80, 160)
_SIDE = 32  # pixels
TINY = (
    "backbone.checkpoint=null",
    "backbone.arguments.channels=[8,8,16,32]",
    "dataset=mvtec",
    f"dataset.resize={_SIDE}",
    "dataset.crop=null",
)


def table(checkpoint: str | None = None, root: str | None = None) -> Table:
    """Seconds of runs of 20 to 160 tasks of 8 tiny images each, and those spent on neither learning nor evaluating."""
    shown = Table(
        title="Growing streams: tasks of 8 images of 32 x 32 pixels, PatchCore", title_justify="left"
    )
    for title in (
        "tasks",
        "evaluations",
        "all, s",
        "learning, s",
        "evaluating, s",
        "the rest, s",
        "share",
        "ms an evaluation",
    ):
        shown.add_column(title, justify="right")
    with tempfile.TemporaryDirectory() as folder:
        stream = Path(folder) / "stream"
        for number in range(max(TASKS)):
            write_category(stream / f"product_{number:03d}", np.random.default_rng(number))
        for tasks in TASKS:
            names = ",".join(f"product_{number:03d}" for number in range(tasks))
            place = Path(folder) / str(tasks)
            overrides = (
                *("method=patchcore", "method.memory_size=400"),
                *TINY,
                f"dataset.root={stream}",
                f"task_order.tasks=[{names}]",
                f"cache={folder}/cache",
            )
            begin = time.perf_counter()
            summary = run_in(place, *overrides)[0]
            whole = time.perf_counter() - begin
            spent = summary["time"]
            evaluations = tasks * (tasks + 1) // 2
            rest = whole - spent["train_s"] - spent["eval_s"]
            shown.add_row(
                str(tasks),
                str(evaluations),
                *(f"{seconds:.1f}" for seconds in (whole, spent["train_s"], spent["eval_s"], rest)),
                f"{100 * rest / whole:.1f} %",
                f"{1000 * rest / evaluations:.2f}",
            )
    return shown


def write_category(folder: Path, random: np.random.Generator) -> None:
    """A category of 4 training images and 4 test images, 2 of them with a bright spot."""
    pattern = cv2.resize(random.integers(40, 200, (4, 4, 3), dtype=np.uint8), (_SIDE, _SIDE))

    def image() -> np.ndarray:
        return np.clip(pattern + random.normal(0, 6, pattern.shape), 0, 230).astype(np.uint8)

    def write(name: str, picture: np.ndarray) -> None:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        cv2.imwrite(str(path), picture)

    for number in range(4):
        write(f"train/good/{number}.png", image())
    for number in range(2):
        write(f"test/good/{number}.png", image())
        spot = np.zeros((_SIDE, _SIDE), np.uint8)
        cv2.circle(spot, tuple(random.integers(8, 24, 2).tolist()), 4, 255, -1)
        spotted = image()
        spotted[spot > 0] = 250
        write(f"test/spot/{number}.png", spotted)
        write(f"ground_truth/spot/{number}_mask.png", spot)
