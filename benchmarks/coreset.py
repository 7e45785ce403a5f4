"""A coreset of 3,000 from 94,080 x 384 (120 images of ResNet-18 at 224 pixels): pooled against plain greedy."""

import time
from collections.abc import Callable
from pathlib import Path

import torch
from rich.progress import track
from rich.table import Table
from torch import Tensor

from benchmarks.images import training_images
from clbench.backbones import Backbone
from clbench.methods.coreset import farthest_first
from clbench.methods.patchcore import PatchCore

CENTERS = 3000


def plain(points: Tensor) -> Tensor:
    """Greedy k-center as it is commonly written: all distances to one new center at a time."""
    nearest = torch.full((len(points),), torch.inf)
    chosen = [0]
    for _ in track(range(CENTERS - 1), "plain greedy", transient=True):
        nearest = torch.minimum(nearest, torch.linalg.vector_norm(points - points[chosen[-1]], dim=1))
        chosen.append(int(nearest.argmax()))
    return torch.tensor(chosen)


def by_products(points: Tensor) -> Tensor:
    """The same loop with each center's distances by one matrix-vector product."""
    norms = points.square().sum(1)
    nearest = torch.full((len(points),), torch.inf)
    chosen = [0]
    for _ in track(range(CENTERS - 1), "greedy by products", transient=True):
        center = points[chosen[-1]]
        nearest = torch.minimum(nearest, torch.addmv(norms, points, center, alpha=-2) + center @ center)
        chosen.append(int(nearest.argmax()))
    return torch.tensor(chosen)


def pooled(points: Tensor) -> Tensor:
    return farthest_first(points, CENTERS)


def patches(checkpoint: str | None, root: str | None, count: int = 120) -> Tensor:
    """PatchCore's patch features float32 [count * 784, 384] of training images."""
    backbone = Backbone("resnet18", pretrained=False, checkpoint=checkpoint, feature_memory_mb=0)
    detector = PatchCore(backbone, layers=[2, 3])
    images = training_images(root, count, 224)
    with torch.no_grad():
        return torch.cat([detector.patches(part).flatten(0, 2) for part in images.split(16)])


def timed(call: Callable[[Tensor], Tensor], points: Tensor) -> tuple[Tensor, float]:
    begin = time.perf_counter()
    result = call(points)
    return result, time.perf_counter() - begin


def table(checkpoint: str | None = None, root: str | None = None) -> Table:
    """Seconds of each way, its ratio to ours, and how many of its centers are ours too."""
    points = patches(checkpoint, root)
    farthest_first(points[:2000], 100)  # first calls load libraries
    ours, seconds = timed(pooled, points)
    of = "synthetic images, random weights" if checkpoint is None else Path(checkpoint).name
    shape = f"{len(points):,} x {points.shape[1]}"
    shown = Table(
        "way", "seconds", "ratio", "same centers", title=f"Coreset of {CENTERS:,} from {shape} ({of})"
    )
    for name, way in (("plain greedy", plain), ("greedy by products", by_products)):
        theirs, longer = timed(way, points)
        common = len(set(theirs.tolist()) & set(ours.tolist()))
        shown.add_row(name, f"{longer:.1f}", f"{longer / seconds:.1f}", f"{common:,} of {CENTERS:,}")
    shown.add_row("clbench, pooled farthest-first", f"{seconds:.2f}", "1.0", "")
    return shown
