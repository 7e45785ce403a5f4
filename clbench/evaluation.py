"""Anomaly maps of test images, the metrics of these maps, and the time that they take."""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from clbench import digests
from clbench.data.images import Images, ImageSet
from clbench.data.memory import free_memory
from clbench.data.stream import Category, Task
from clbench.data.tiles import Tiling
from clbench.energy import Meter
from clbench.errors import UserError, counted
from clbench.methods.base import Prediction, Progress
from clbench.metrics.curves import image_metrics, pixel_metrics
from clbench.metrics.pimo import aupimo
from clbench.metrics.resampling import Evidence
from clbench.metrics.stored import Decisions, image_decisions, pixel_decisions
from clbench.mosaics import whole
from clbench.out_of_memory import pinning
from clbench.recollection import Recollection
from clbench.strategies.base import Strategy
from clbench.training import Diverged, advice_on_divergence

BATCH_SIZE = 16  # images predicted at a time
_TIMED_IMAGES = 32  # images of a timed pass
_BYTES_A_PIXEL = 13  # of maps, of what metrics sort, and of masks
_BYTES_OF_COPIES = 5  # a pixel more where some defects are not outlined: the other maps and masks are copied
_BYTES_OF_ONE = 16  # a pixel of one image, beside these: what the metrics sort is made of


def predict(
    strategy: Strategy,
    images: ImageSet,
    task: int,
    device: torch.device,
    progress: Progress,
    recollection: Recollection | None = None,
) -> Prediction:
    """Predict the test images of a category: maps float32 [N, H, W] and scores float32 [N], on the CPU.

    Args:
        images: the N images.
        task: index of the task that the category arrived in; only strategies with `task_known` use it.
        device: where the detector is.
        progress: told after every batch.
        recollection: what was found out about test images before, which the detector may use and add to.

    Raises:
        Diverged: a map or score is not finite.
    """
    count, done = len(images), 0
    maps, scores = torch.empty(images.masks.shape), torch.empty(count)
    chosen: list[Tensor] = []
    with strategy.detector.recalling(recollection):
        for batch in predictions(strategy, images.images, task, device, images.tiling):
            rows = slice(done, done + len(batch.scores))
            maps[rows], scores[rows] = batch
            if batch.chosen is not None:
                chosen.append(batch.chosen)
            done = rows.stop
            progress("evaluating", done, count)
    return Prediction(maps, scores, torch.cat(chosen) if chosen else None)


def predictions(
    strategy: Strategy,
    images: Tensor | Images,
    task: int,
    device: torch.device,
    tiling: Tiling | None = None,
) -> Iterator[Prediction]:
    """Images of a task, uint8 [N, 3, H, W] -> maps [B, H, W] and scores [B] batch by batch, on the CPU.

    Args:
        task: its index; only strategies with `task_known` use it.
        device: where the detector is.
        tiling: how images are cut for the detector: then there is one image at a time, whose tiles come in batches; None
            where they are not.

    Raises:
        Diverged: a map or score is not finite.
    """
    if tiling is None:
        return _by_batches(strategy, images, task, device)
    tiles = _by_batches(strategy, tiling.cut(images), task, device)
    return whole(tiles, tiling, Images.of(images).sizes)


@torch.no_grad()
def _by_batches(
    strategy: Strategy, images: Tensor | Images, task: int, device: torch.device
) -> Iterator[Prediction]:
    """As `predictions`, of what the detector takes as it is."""
    strategy.detector.eval()
    before: Callable[[], Prediction] | None = None
    for batch in Images.of(images).on(device).split(BATCH_SIZE):
        # A GPU begins with a batch before the one before has come back.
        coming = _coming_back(strategy.predict(batch, task))
        if before is not None:
            yield _finite(before(), strategy)
        before = coming
    if before is not None:
        yield _finite(before(), strategy)


def _coming_back(prediction: Prediction) -> Callable[[], Prediction]:
    """Begin to copy a prediction to the CPU; gives a function that waits for it, and gives it there."""
    if prediction.maps.device.type != "cuda":
        return lambda: prediction.each(Tensor.cpu)

    def copy(found: Tensor) -> Tensor:
        with pinning():
            there = torch.empty(found.shape, dtype=found.dtype, pin_memory=True)
        return there.copy_(found, non_blocking=True)

    copies = prediction.each(copy)
    done = torch.cuda.Event()
    done.record()

    def arrived() -> Prediction:
        done.synchronize()
        return copies

    return arrived


def _finite(prediction: Prediction, strategy: Strategy) -> Prediction:
    """The prediction.

    Raises:
        Diverged: a map or score is not finite.
    """
    if not all(bool(found.isfinite().all()) for found in prediction):
        raise Diverged(
            f"an anomaly map or score is not finite: {advice_on_divergence(strategy.detector, strategy)}"
        )
    return prediction


def check_room(tasks: Sequence[Task]) -> None:
    """Check, before anything is learned, that memory has room for the maps of a category's test images, and their metrics.

    Raises:
        UserError: it has not.
    """
    most = 0  # bytes that were found to be free
    for test, name in ((category.test, category.name) for task in tasks for category in task.categories):
        height, width = test.masks.shape[1:]
        each = _BYTES_A_PIXEL + (_BYTES_OF_COPIES if test.unknown else 0)
        needed = (each * len(test) + _BYTES_OF_ONE * (len(test) > 0)) * height * width
        if needed > most:
            what = f"{counted(len(test), 'map')} of {width}x{height} pixels and their metrics"
            check_free(f"evaluating '{name}'", needed, what, "fewer test images")
            most = needed


def check_free(phase: str, needed: float, what: str, way_out: str) -> None:
    """Check that so many bytes of memory are free.

    Args:
        phase: what needs them.
        what: what they are for.
        way_out: what to give in place of a smaller `dataset.resize`.

    Raises:
        UserError: they are not.
    """
    free = free_memory()
    if free is not None and needed > free:
        raise UserError(
            f"{phase} takes {needed / 1e9:.2g} GB, for {what}, and {free / 1e9:.2g} GB of memory are free here: give a "
            f"smaller dataset.resize, or {way_out}"
        )


def metrics_of(
    prediction: Prediction,
    images: ImageSet,
    further: Sequence[str] = (),
    decisions: Decisions | None = None,
) -> dict[str, float | None]:
    """The metrics of a category's predictions: name -> value in [0, 1]; None where one is undefined.

    The seven usual ones, further ones, and with decisions those at stored thresholds. Pixel metrics leave out images whose
    defect was not outlined.

    Args:
        prediction: maps [N, H, W] and scores [N], on the CPU.
        images: the N test images that they are of.
        further: names of metrics beside the seven; those that need thresholds are measured where there are decisions.
        decisions: the thresholds of each image.
    """
    scores, labels = prediction.scores.numpy().astype(np.float64), images.labels.numpy()
    maps, masks, defects = prediction.maps.numpy(), images.masks.numpy(), images.defects
    outlined = np.delete(np.arange(len(images)), images.unknown)
    if images.unknown:
        maps, masks = maps[outlined], masks[outlined]
        defects = [replace(each, image=int(np.searchsorted(outlined, each.image))) for each in defects]
    found = {**image_metrics(scores, labels), **pixel_metrics(maps, masks, further=further, defects=defects)}
    if "aupimo" in further:
        areas = aupimo(maps, masks, labels[outlined])
        found["aupimo"] = float(areas.mean()) if areas is not None and len(areas) else None
    if decisions is not None:
        found |= image_decisions(scores, labels, decisions.image)
        of_outlined = Decisions(*(each[outlined] for each in decisions))
        found |= pixel_decisions(maps, masks, ~labels[outlined], of_outlined)
    return found


def evidence_of(prediction: Prediction, category: Category, values: Mapping[str, float | None]) -> Evidence:
    """What each test image contributes to a category's metrics, for `clbench.metrics.resampling`.

    Args:
        prediction: maps [N, H, W] and scores [N] of its test images, on the CPU.
        values: the metrics that they have.
    """
    images = category.test
    known_by = category.fingerprints[1] if category.fingerprints else "\n".join(images.names)
    return Evidence.of(
        prediction.scores.numpy(),
        images.labels.numpy(),
        prediction.maps.numpy(),
        images.masks.numpy(),
        images.unknown,
        digests.of_text(known_by),
        values,
    )


@torch.no_grad()
def inference_cost(
    strategy: Strategy,
    images: Tensor | Images,
    task: int,
    device: torch.device,
    progress: Progress,
    meter: Meter,
) -> dict[str, float]:
    """What an image costs, from uint8 pixels on the device to map and score. Features are computed anew.

    Over 32 images, which are repeated where there are fewer. Where they are tiles, an image costs what all of its tiles do;
    that their maps are put together is not counted.

    Args:
        images: images of a task, uint8 [N, 3, H, W], or tiles of images of one size.
        task: its index; only strategies with `task_known` use it.
        device: where the detector is.
        progress: told before every pass; it may raise, to stop the run.
        meter: of energy.

    Returns:
        ms: milliseconds, of the best of 3 passes.
        j: joules, of all passes; not there where they are not measured.
        gflop: 10^9 floating-point operations of matrix products, convolutions and attention, as
            `torch.utils.flop_counter` counts them: a multiplication and an addition are two. Others, as triangular
            solves, are not counted.
    """
    parents = Images.of(images).parents
    each = 1 if parents is None else len(parents) // len(parents.unique())  # tiles of an image
    # Whole batches only: frozen networks fill up a batch that is not, which would count as time.
    images = Images.of(images).on(device)[torch.arange(_TIMED_IMAGES) % min(len(images), _TIMED_IMAGES)]
    passes = []
    strategy.detector.eval()
    with strategy.detector.uncached():
        first = images[:BATCH_SIZE]
        strategy.predict(first, task)  # makes what is made once for all images
        with FlopCounterMode(display=False) as counter:
            strategy.predict(first, task)
        before = meter.joules()
        for number in range(3):
            progress("timing", number, 3)
            begin = time.perf_counter()
            for batch in images.split(BATCH_SIZE):
                strategy.predict(batch, task).scores.cpu()
            passes.append(time.perf_counter() - begin)
        joules = each * (meter.joules() - before) / (3 * len(images))
    operations = each * counter.get_total_flops() / BATCH_SIZE
    return {
        "ms": each * 1000 * min(passes) / len(images),
        **({"j": joules} if meter.available else {}),
        "gflop": operations / 10**9,
    }
