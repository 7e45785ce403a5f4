"""A training step under each continual strategy, beside one of fine-tuning; what ends a task, and the memory of both."""

import math
import time
from typing import Any, NamedTuple

import torch
from rich.table import Table

from benchmarks.running import composed
from benchmarks.steps import side_of
from clbench import assembly, footprint

METHODS = ("cfa", "stfpm", "efficientad", "draem", "fastflow", "rd4ad", "simplenet", "dinomaly")
STEPS = 3  # of an epoch, at least; the second is timed
STORED = 40
BUFFER = f"replay.size={STORED}"
STRATEGIES = {
    "finetune": ("strategy=finetune",),
    "replay": ("strategy=replay", BUFFER),
    "agem": ("strategy=agem", BUFFER),
    "ewc": ("strategy=ewc",),
    "si": ("strategy=si",),
    "mas": ("strategy=mas",),
    "ewc, with a buffer": ("strategy=ewc", BUFFER),
    "lwf": ("strategy=lwf",),
    "lwf, outputs computed twice": ("strategy=lwf",),
    "lwf, with a buffer": ("strategy=lwf", BUFFER),
    "der": ("strategy=der", BUFFER),
    "der, recomputed": ("strategy=der", "strategy.outputs=recompute", BUFFER),
    "derpp": ("strategy=derpp", BUFFER),
}


class Cost(NamedTuple):
    """What a strategy costs in the second of two tasks.

    Attributes:
        step: seconds of a training step.
        end: seconds from the last epoch to the end of the task, for each of its images.
        peak: bytes in use at most while the task is learned, above those before.
        kept: bytes that the strategy keeps after it.
    """

    step: float
    end: float
    peak: int
    kept: int


def table(checkpoint: str | None = None, root: str | None = None) -> Table:
    """Milliseconds of a step of the second task, how many times fine-tuning's that is, and what else a strategy costs.

    On the CPU they are of its time, which other programs beside change little, and the peak is of resident memory.
    """
    on_gpu = torch.cuda.is_available()
    name = torch.cuda.get_device_name() if on_gpu else f"CPU, {torch.get_num_threads()} threads"
    size = "paper" if on_gpu else "demo"
    shown = Table(
        "method",
        "strategy",
        "ms a step",
        "of finetune",
        "end of a task, ms an image",
        "peak, MB",
        "kept, MB",
        title=f"{size}'s sizes, {name}",
    )
    for method in METHODS:
        plain = None
        for strategy, settings in STRATEGIES.items():
            cost = _measure(method, size, "twice" not in strategy, *settings)
            plain = plain or cost.step
            shown.add_row(
                method,
                strategy,
                f"{1000 * cost.step:.1f}",
                f"{cost.step / plain:.2f}",
                f"{1000 * cost.end:.1f}",
                f"{cost.peak / 1e6:.0f}",
                f"{cost.kept / 1e6:.3f}",
                end_section=strategy == "derpp",
            )
    return shown


def _measure(method: str, size: str, notes: bool, *settings: str) -> Cost:
    """What a strategy costs.

    Args:
        size: the benchmark whose sizes are taken.
        notes: whether the strategy is given the outputs that steps compute.
    """
    overrides = [f"method={method}", f"benchmark={size}", "gpu.precision=fp32", *settings]
    if size == "paper":
        overrides += ["method.teacher=random", "method.penalty_count=20"] if method == "efficientad" else []
        overrides += ["method.texture_count=20"] if method == "draem" else []
        overrides += ["backbone.pretrained=false", "dataset.root=."]
    config = composed(*overrides, f"method.steps={2 * STEPS}" if method == "dinomaly" else "method.epochs=2")
    unwanted = {"patience": None, "held_out": 0.0}
    there = {name: value for name, value in unwanted.items() if name in config.method.settings}
    config = config.changed("method", **there)
    where = assembly.select_device(config.gpu)
    detector = assembly.place(assembly.build_detector(config), config.gpu, where)
    strategy: Any = assembly.build_strategy(config, detector)
    if not notes:
        detector.note = lambda outputs: None  # type: ignore[method-assign]
    side = side_of(config)
    count = max(STEPS * detector.batch_size, STORED // 2)
    images = torch.randint(256, (count + STORED // 2, 3, side, side), dtype=torch.uint8)
    ended: list[float] = []

    def now() -> float:
        if where.type != "cuda":
            return time.process_time()
        torch.cuda.synchronize(where)
        return time.perf_counter()

    strategy.learn(0, images[count:])
    strategy.on_epoch = lambda stage, epoch, loss: ended.append(now())
    footprint.reset_peak(where)
    before = footprint.peak(where)
    strategy.learn(1, images[:count])
    return Cost(
        step=(ended[1] - ended[0]) / math.ceil(count / detector.batch_size),
        end=(now() - ended[1]) / count,
        peak=footprint.peak(where) - before,
        kept=sum(tensor.nbytes for tensor in strategy.kept().values()),
    )
