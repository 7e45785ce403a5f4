"""What mixed precision changes in anomaly maps and metrics: each method, trained in it, judged in it and in fp32."""

import tempfile

import torch
from rich.table import Table

from clbench import evaluation
from clbench.assembly import Assembly, assemble
from clbench.config import check, sources
from clbench.methods.base import Prediction, silent
from clbench.results import Values

_METHODS = {
    "patchcore": (),
    "padim": (),
    "cfa": (),
    "stfpm": ("method.epochs=12",),
    "efficientad": ("method.epochs=4",),
    "draem": ("method.epochs=8",),
    "fastflow": (),
}
_TWO = "task_order.tasks=[bottle_top,circuit]"


def table(checkpoint: str | None = None, root: str | None = None) -> Table:
    """Differences of maps, as a share of their range, and of three metrics, the larger of two categories."""
    shown = Table(title="bf16 against fp32: the same detector, trained in bf16", title_justify="left")
    for title in ("", "map, root mean square", "map, largest", "image AUROC", "pixel AUROC", "pixel F1"):
        shown.add_column(title, justify="right" if title else "left")
    for method, shorter in _METHODS.items():
        with tempfile.TemporaryDirectory() as folder:
            words = (f"method={method}", "gpu.precision=bf16", _TWO, *shorter, f"cache={folder}")
            made = assemble(check(sources.composed(*words)), silent)
            for stage, (index,) in enumerate(made.strategy.stages(len(made.tasks))):
                made.strategy.learn(stage, made.tasks[index].train.images)
            half, whole = judged(made, torch.bfloat16), judged(made, None)
        span = max(float(maps.max() - maps.min()) for (maps, _), _ in whole)
        apart = [(one.maps - other.maps) / span for (one, _), (other, _) in zip(half, whole, strict=True)]
        values = [
            f"{max(float(each.square().mean().sqrt()) for each in apart):.4f}",
            f"{max(float(each.abs().max()) for each in apart):.3f}",
        ]
        for metric in ("image_auroc", "pixel_auroc", "pixel_f1"):
            pairs = [(one[metric], other[metric]) for (_, one), (_, other) in zip(half, whole, strict=True)]
            values.append(f"{max(abs((one or 0) - (other or 0)) for one, other in pairs):.4f}")
        shown.add_row(method, *values)
    return shown


def judged(made: Assembly, precision: torch.dtype | None) -> list[tuple[Prediction, Values]]:
    """What a trained detector finds in each task's first category, and its metrics, in a precision."""
    detector = made.strategy.detector
    detector.compute_in(precision)
    found = []
    with detector.uncached():
        for index, task in enumerate(made.tasks):
            test = task.categories[0].test
            prediction = evaluation.predict(made.strategy, test, index, made.device, silent)
            found.append((prediction, evaluation.metrics_of(prediction, test)))
    return found
