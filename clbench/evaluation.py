"""Anomaly maps of a category's test images, and what they are worth."""

import time
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from clbench.data.images import ImageSet
from clbench.methods.base import Prediction, Progress
from clbench.metrics.curves import image_metrics, pixel_metrics
from clbench.strategies.base import Strategy
from clbench.training import Diverged, calmer

BATCH_SIZE = 16
_TIMED_IMAGES = 32


def predict(
    strategy: Strategy, images: ImageSet, task: int, device: torch.device, progress: Progress
) -> Prediction:
    """Maps [N, H, W] and scores [N] of a category's test images, on the CPU.

    Args:
        task: the number of the task that the category arrived in.

    Raises:
        Diverged: one is no number.
    """
    count, done = len(images), 0
    maps, scores = torch.empty(images.masks.shape), torch.empty(count)
    for part in predictions(strategy, images.images, task, device):
        rows = slice(done, done + len(part.scores))
        maps[rows], scores[rows] = part
        done = rows.stop
        progress("evaluating", done, count)
    return Prediction(maps, scores)


@torch.no_grad()
def predictions(strategy: Strategy, images: Tensor, task: int, device: torch.device) -> Iterator[Prediction]:
    """Maps and scores of a task's images, uint8 [N, 3, H, W], batch by batch, on the CPU.

    Raises:
        Diverged: one is no number.
    """
    strategy.detector.eval()
    for part in images.split(BATCH_SIZE):
        maps, scores = (found.cpu() for found in strategy.predict(part.to(device), task))
        if not (maps.isfinite().all() and scores.isfinite().all()):
            raise Diverged(f"maps or scores became no numbers: {calmer(strategy.detector)}")
        yield Prediction(maps, scores)


def measure(prediction: Prediction, images: ImageSet) -> dict[str, float | None]:
    """The seven metrics of a category; None where one is undefined.

    Pixel metrics are over the images whose pixels are known, which good ones are.
    """
    scores, labels = prediction.scores.numpy(), images.labels.numpy()
    maps, masks = prediction.maps.numpy(), images.masks.numpy()
    if images.unknown:
        maps, masks = np.delete(maps, images.unknown, axis=0), np.delete(masks, images.unknown, axis=0)
    return {
        **image_metrics(scores.astype(np.float64), labels),
        **pixel_metrics(maps, masks),
    }


@torch.no_grad()
def inference_time(
    strategy: Strategy, images: Tensor, task: int, device: torch.device, progress: Progress
) -> float:
    """Milliseconds an image, from uint8 pixels to map and score, nothing remembered: the best of 3 passes.

    Args:
        images: some of a task's, uint8 [N, 3, H, W].
    """
    images = images[:_TIMED_IMAGES].to(device)
    # As many as fill whole batches: a batch costs the same when part of it is padding.
    images = images[torch.arange(_TIMED_IMAGES, device=device) % len(images)]
    passes = []
    strategy.detector.eval()
    with strategy.detector.uncached():
        for number in range(3):
            progress("timing", number, 3)
            begin = time.perf_counter()
            for part in images.split(BATCH_SIZE):
                strategy.predict(part, task).scores.cpu()
            passes.append(time.perf_counter() - begin)
    return 1000 * min(passes) / len(images)
