"""Detectors as graphs in ONNX Runtime against themselves: time per image, and how far they agree."""

import tempfile
from pathlib import Path

import torch
from rich.table import Table

from benchmarks.images import training_images
from benchmarks.kernels import seconds
from benchmarks.running import composed
from clbench import assembly, exporting
from clbench.training import train

METHODS = ("patchcore", "padim", "cfa", "stfpm", "efficientad", "draem", "fastflow")
_SIZE = 160  # pixels, the demo's
_BATCH = 8


def table(checkpoint: str | None = None, root: str | None = None) -> Table:
    """Milliseconds an image of each, in batches of 8 and as many threads, and the largest difference of maps."""
    threads = torch.get_num_threads()
    shown = Table(
        "method",
        "ours, ms",
        "ONNX Runtime, ms",
        "ratio",
        "difference",
        title=f"Images of {_SIZE} pixels in batches of {_BATCH}, the demo's networks, {threads} threads",
    )
    images = training_images(root, 24 + _BATCH, _SIZE)
    batch = images[24:]
    for method in METHODS:
        overrides = [f"method={method}", "gpu=cpu"]
        overrides += [] if method in ("patchcore", "padim") else ["method.epochs=1"]
        settings = composed(*overrides)
        detector = assembly.build_detector(settings)
        train(detector, 0, images[:24], [], 0)
        detector.eval()
        with torch.no_grad(), detector.uncached(), tempfile.TemporaryDirectory() as folder:
            ours = detector(batch)
            own = seconds(lambda detector=detector: detector(batch))
            program, any_number = exporting.trace(detector, batch)
            runtime = exporting.write_onnx(program, Path(folder) / "model.onnx", threads)
            other = seconds(lambda runtime=runtime: runtime(batch))
            off = exporting.difference(ours, runtime, batch, any_number)
        own, other = (1000 * time / _BATCH for time in (own, other))
        shown.add_row(method, f"{own:.1f}", f"{other:.1f}", f"{own / other:.2f}", f"{off:.0e}")
    return shown
