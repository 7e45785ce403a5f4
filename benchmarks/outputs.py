"""A training step of LwF, DER and DER++ beside one of replay and of fine-tuning, and what each keeps."""

import math
import time
from typing import Any

import torch
from rich.table import Table

from benchmarks.running import composed
from benchmarks.steps import side_of
from clbench import assembly

METHODS = ("cfa", "stfpm", "efficientad", "draem", "fastflow", "rd4ad", "simplenet", "dinomaly")
STEPS = 3  # of an epoch, at least; the second is timed
STORED = 40
BUFFER = f"replay.size={STORED}"
STRATEGIES = {
    "finetune": ("strategy=finetune",),
    "replay": ("strategy=replay", BUFFER),
    "lwf": ("strategy=lwf",),
    "lwf, outputs computed twice": ("strategy=lwf",),
    "lwf, with a buffer": ("strategy=lwf", BUFFER),
    "der": ("strategy=der", BUFFER),
    "der, recomputed": ("strategy=der", "strategy.outputs=recompute", BUFFER),
    "derpp": ("strategy=derpp", BUFFER),
}


def table(checkpoint: str | None = None, root: str | None = None) -> Table:
    """Milliseconds of a step of the second stage, how many times fine-tuning's that is, and megabytes kept after it.

    On the CPU they are of its time, which other programs beside change little.
    """
    on_gpu = torch.cuda.is_available()
    name = torch.cuda.get_device_name() if on_gpu else f"CPU, {torch.get_num_threads()} threads"
    size = "paper" if on_gpu else "demo"
    shown = Table(
        "method", "strategy", "ms a step", "of finetune", "kept, MB", title=f"{size}'s sizes, {name}"
    )
    for method in METHODS:
        plain = None
        for strategy, settings in STRATEGIES.items():
            seconds, kept = _measure(method, size, "twice" not in strategy, *settings)
            plain = plain or seconds
            cells = f"{1000 * seconds:.1f}", f"{seconds / plain:.2f}", f"{kept / 1e6:.3f}"
            shown.add_row(method, strategy, *cells, end_section=strategy == "derpp")
    return shown


def _measure(method: str, size: str, notes: bool, *settings: str) -> tuple[float, int]:
    """Seconds of a step, and bytes that the strategy keeps.

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

    def on_epoch(stage: int, epoch: int, loss: float) -> None:
        if where.type == "cuda":
            torch.cuda.synchronize(where)
        ended.append(time.perf_counter() if where.type == "cuda" else time.process_time())

    strategy.learn(0, images[count:])
    strategy.on_epoch = on_epoch
    strategy.learn(1, images[:count])
    return (ended[1] - ended[0]) / math.ceil(count / detector.batch_size), sum(
        tensor.nbytes for tensor in strategy.kept().values()
    )
