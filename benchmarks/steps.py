"""A training step of each trained method, replay included: how fast, and how much of it is computing.

With a GPU at the paper's sizes, where computing is all that the GPU does; the rest of a step it waits. Without one at
the demo's, where computing is convolutions and matrix products.
"""

import os
import time

import torch
from rich.table import Table
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from benchmarks.running import composed
from clbench import assembly
from clbench.config import Config
from clbench.training import train

METHODS = (
    "cfa",
    "stfpm",
    "efficientad",
    "draem",
    "fastflow",
    "rd4ad",
    "simplenet",
    "supersimplenet",
    "dinomaly",
    "ucad",
)
STEPS = 8  # of an epoch: the first warms up, the second is timed, the third is profiled, which takes longer
COMPUTING = ("convolution", "slow_conv2d", "mm")  # within the names of torch's operators


def table(checkpoint: str | None = None, root: str | None = None) -> Table:
    """Steps a second and milliseconds of one in each precision, the share that is computing, and the peak of memory."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler says when it starts and stops
    on_gpu = torch.cuda.is_available()
    name = torch.cuda.get_device_name() if on_gpu else f"CPU, {torch.get_num_threads()} threads"
    shown = Table(
        "method",
        "batch",
        "pixels",
        "precision",
        "steps a second",
        "ms a step",
        "GPU works" if on_gpu else "in convolutions and products",
        "peak, MB",
        title=f"Training steps at the {'paper' if on_gpu else 'demo'}'s sizes, {name}",
    )
    for method in METHODS:
        for precision in ("fp32", "tf32", "bf16") if on_gpu else ("fp32",):
            settings = _settings(method, "paper" if on_gpu else "demo", precision)
            batch, side = settings.method.settings["batch_size"], side_of(settings)
            seconds, computing, peak = _measure(settings, batch, side)
            cells = (
                f"{batch} + {batch}",
                str(side),
                precision,
                f"{1 / seconds:.2f}",
                f"{1000 * seconds:.1f}",
            )
            shown.add_row(method, *cells, f"{computing:.0%}", f"{peak / 1e6:,.0f}" if peak else "")
    return shown


def _settings(method: str, benchmark: str, precision: str) -> Config:
    overrides = [f"method={method}", f"benchmark={benchmark}", f"gpu.precision={precision}"]
    if benchmark == "paper":  # noise and random weights take as long as images and trained ones
        overrides += ["method.teacher=random", "method.penalty_count=20"] if method == "efficientad" else []
        overrides += ["method.texture_count=20"] if method == "draem" else []
        overrides += ["backbone.pretrained=false", "dataset.root=."]
    settings = composed(*overrides, "method.steps=24" if method == "dinomaly" else "method.epochs=3")
    unwanted = {"patience": None, "held_out": 0.0}
    there = {name: value for name, value in unwanted.items() if name in settings.method.settings}
    return settings.changed("method", **there)


def side_of(settings: Config) -> int:
    size = settings.dataset.crop or settings.dataset.resize
    assert isinstance(size, int)
    return size


def _measure(settings: Config, batch: int, side: int) -> tuple[float, float, int]:
    """Seconds a step, the share of it that is computing, and the most bytes of a GPU that were taken at once."""
    where = assembly.select_device(settings.gpu)
    on_gpu = where.type == "cuda"
    detector = assembly.place(assembly.build_detector(settings), settings.gpu, where)
    current, past = torch.randint(256, (2, STEPS * batch, 3, side, side), dtype=torch.uint8, device=where)
    ended: list[float] = []
    recorded = profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])])
    if on_gpu:
        torch.cuda.reset_peak_memory_stats(where)

    def on_epoch(stage: int, epoch: int, loss: float) -> None:
        if on_gpu:
            torch.cuda.synchronize(where)
        ended.append(time.perf_counter())
        if epoch == 1:
            recorded.start()
        if epoch == 2:
            recorded.stop()

    train(detector, 1, current, [(past, past[:0])], 0, on_epoch=on_epoch)
    seconds = ended[1] - ended[0]
    events = recorded.key_averages()
    if on_gpu:
        kernels = sum(
            event.self_device_time_total for event in events if event.device_type == DeviceType.CUDA
        )
        peak = torch.cuda.max_memory_allocated(where)
        return seconds / STEPS, kernels / 1e6 / seconds, peak
    spent = {event.key: event.self_cpu_time_total for event in events}
    inside = sum(part for name, part in spent.items() if any(word in name for word in COMPUTING))
    return seconds / STEPS, inside / sum(spent.values()), 0
