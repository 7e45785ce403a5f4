"""Image and pixel metrics of one test set, each family from one sort of its scores."""

from collections.abc import Iterator, Sequence

import cv2
import numpy as np

from clbench.data.samples import Defect
from clbench.metrics.names import FURTHER, USUAL

# Sorted keys are read this many at a time: temporaries stay in the cache, and memory stays at the keys.
CHUNK = 1 << 16
REGION_BITS = np.uint64(32)
REGION_MASK = np.uint64(0xFFFFFFFF)
# Further metrics that are areas up to a false-positive rate: name -> that rate.
OVERLAPS = {"aupro_5": 0.05}
SATURATED = {name: int(name.removeprefix("auspro_")) / 100 for name in FURTHER if name.startswith("auspro_")}


def image_metrics(scores: np.ndarray, labels: np.ndarray) -> dict[str, float | None]:
    """AUROC, average precision and best F1 of image scores.

    AUROC and average precision are scikit-learn's definitions; F1 is the maximum over all thresholds.

    Args:
        scores: anomaly scores [N], higher is more anomalous.
        labels: bool [N], True where the image is defective.

    Returns:
        image_auroc, image_ap, image_f1 in [0, 1]; None unless there are both good and defective images.

    Raises:
        ValueError: shapes differ, or a score is not finite.
    """
    _check_scores("scores [N]", scores, labels)
    defective = labels != 0
    if defective.all() or not defective.any():
        return dict.fromkeys(USUAL[:3])
    # Ranks instead of the bits of the score, so that float64 scores keep their order.
    _, rank = np.unique(scores, return_inverse=True)
    keys = ((rank.max() - rank).astype(np.uint64) << REGION_BITS) | defective.astype(np.uint64)
    keys.sort()
    auroc, ap, f1, _ = _measure(keys, np.array([0, np.count_nonzero(defective)]), 1.0)
    return dict(zip(USUAL[:3], (auroc, ap, f1), strict=True))


def pixel_metrics(
    maps: np.ndarray,
    masks: np.ndarray,
    limit: float = 0.3,
    further: Sequence[str] = (),
    defects: Sequence[Defect] = (),
) -> dict[str, float | None]:
    """AUROC, average precision, best F1 and AU-PRO over all pixels of a test set.

    AU-PRO is the area under the per-region overlap over the false-positive rate (Bergmann et al., IJCV
    2021), exact: every distinct score is a threshold. Regions are 8-connected; the false-positive rate
    counts the normal pixels of all images, good ones included.

    AU-sPRO is the area under the saturated per-region overlap (Bergmann et al., IJCV 2022): a region is a
    defect, of which as many pixels as its saturation area count as all. The false-positive rate counts the
    pixels outside every defect.

    Memory beyond the arguments: 8 bytes a pixel (the sort keys, sorted in place), about 40 bytes for
    each pixel of one image while the keys are made, then about 8 MB; for AU-sPRO, up to 140 bytes for each
    pixel of a defect instead.

    Args:
        maps: float32 [N, H, W], higher is more anomalous.
        masks: bool [N, H, W], True where a pixel is anomalous.
        limit: false-positive rate in (0, 1] to which AU-PRO is integrated; the area is divided by it.
        further: names of further metrics, of `OVERLAPS` and `SATURATED`.
        defects: for those of `SATURATED`, each defect by itself, the images being those of the maps.

    Returns:
        pixel_auroc, pixel_ap, pixel_f1, aupro and the further ones in [0, 1]; None unless there are both
        normal and anomalous pixels. AU-sPRO is None without defects, too.

    Raises:
        ValueError: shapes differ, maps are wider than float32 or not finite, or the limit is not in (0, 1].
    """
    _check_scores("maps [N, H, W]", maps, masks)
    if not np.can_cast(maps.dtype, np.float32):
        raise ValueError(f"maps are {maps.dtype}, which float32 cannot hold exactly; pass float32 maps")
    if not 0 < limit <= 1:
        raise ValueError(f"limit={limit} is no false-positive rate; choose one in (0, 1], such as 0.3")
    overlaps = [name for name in further if name in OVERLAPS]
    names = (*USUAL[3:], *overlaps)
    saturated = [name for name in further if name in SATURATED]
    anomalous = np.count_nonzero(masks)
    if anomalous in (0, masks.size):
        return dict.fromkeys((*names, *saturated))
    keys, areas = _pixel_keys(maps, masks)
    keys.sort()
    limits = limit, *(OVERLAPS[name] for name in overlaps)
    found: dict[str, float | None] = dict(zip(names, _measure(keys, areas, *limits), strict=True))
    if not saturated or not defects:
        return found | dict.fromkeys(saturated)
    x, y = _saturated_curve(keys, maps, masks, defects)
    return found | {
        name: float(_area_to(SATURATED[name] * x[-1], x, y) / x[-1] / SATURATED[name]) for name in saturated
    }


def _check_scores(layout: str, scores: np.ndarray, truth: np.ndarray) -> None:
    if scores.shape != truth.shape or scores.ndim != layout.count(",") + 1:
        raise ValueError(f"{layout} have shape {list(scores.shape)}, their ground truth {list(truth.shape)}")
    finite = np.isfinite(scores)
    if not finite.all():
        first = tuple(int(i) for i in np.unravel_index(finite.argmin(), finite.shape))
        raise ValueError(
            f"{layout}: {finite.size - np.count_nonzero(finite)} of {finite.size} values are not finite, "
            f"the first is {scores[first]} at {list(first)}; look for a training that diverged"
        )


def _pixel_keys(maps: np.ndarray, masks: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Sort keys uint64 [N * H * W], and the area in pixels of each region, int64 [regions + 1].

    High half: the score's bits, mapped so that a higher score is a smaller number. Low half: the pixel's
    region, 0 where normal, counted from 1 over the whole test set.
    """
    keys = np.empty(maps.shape, np.uint64)
    areas = [np.zeros(1, np.int64)]
    regions = 0
    for key, score, mask in zip(keys, maps, masks, strict=True):
        np.left_shift(_descending(score), REGION_BITS, out=key, dtype=np.uint64)
        if mask.any():
            count, label = cv2.connectedComponents((mask != 0).astype(np.uint8), connectivity=8)
            areas.append(np.bincount(label.ravel(), minlength=count)[1:])
            label[label > 0] += regions
            key |= label.astype(np.uint64)
            regions += count - 1
    return keys.ravel(), np.concatenate(areas)


def _descending(scores: np.ndarray) -> np.ndarray:
    """The bits of scores, uint32 of the same shape, mapped so that a higher score is a smaller number."""
    bits = (scores.astype(np.float32) + np.float32(0)).view(np.uint32)  # -0.0 + 0.0 is 0.0
    return np.where(bits >> 31, bits, bits ^ 0x7FFFFFFF)


def _measure(keys: np.ndarray, areas: np.ndarray, *limits: float) -> tuple[float, ...]:
    """AUROC, average precision, best F1, and AU-PRO to each of `limits`, of sorted keys with both classes."""
    positives = int(areas.sum())
    negatives = keys.size - positives
    auroc = ap = f1 = 0.0
    pros = [0.0] * len(limits)
    for tp, fp, pro in _curve(keys, areas):
        auroc += float(np.diff(fp) @ (tp[1:] + tp[:-1])) / 2
        ap += float(np.diff(tp) @ (tp[1:] / (tp[1:] + fp[1:])))
        f1 = max(f1, float((2 * tp / (tp + fp + positives)).max()))
        for number, limit in enumerate(limits):
            pros[number] += _area_to(limit * negatives, fp, pro)
    aupros = (area / negatives / limit for area, limit in zip(pros, limits, strict=True))
    return auroc / positives / negatives, ap / positives, f1, *aupros


def _curve(keys: np.ndarray, areas: np.ndarray) -> Iterator[np.ndarray]:
    """The curve's corners at the distinct scores, chunk by chunk: float64 [3, corners] each.

    Rows: true positives, false positives, and the per-region overlap, which is the mean over regions of
    TP_r / |r|: one cumulative sum in which a pixel of region r weighs 1 / (|r| * regions). A chunk opens
    with the last corner of the chunk before, the first chunk with the origin.
    """
    weight = np.zeros(areas.size)
    weight[1:] = 1 / (areas[1:] * (areas.size - 1))
    last = np.zeros((3, 1))
    seen = np.zeros((3, 1))  # sums over all earlier chunks: beyond `last` where a tie goes on
    for start in range(0, keys.size, CHUNK):
        chunk = keys[start : start + CHUNK + 1]  # one more, to see whether its last tie goes on
        ends = np.flatnonzero((chunk[1:] ^ chunk[:-1]) > REGION_MASK)
        if start + CHUNK >= keys.size:
            ends = np.append(ends, chunk.size - 1)
        region = (chunk[:CHUNK] & REGION_MASK).astype(np.uint32)
        hits = np.flatnonzero(region)
        # An anomalous pixel sorts last in its tie. Ties without one lie on a straight line at constant true
        # positives: of these keep what precedes a tie with one, perhaps in the next chunk.
        holds = region[ends] > 0
        ends = ends[holds | np.append(holds[1:], True)]
        tp = np.searchsorted(hits, ends, side="right")
        overlap = np.concatenate([[0.0], np.cumsum(weight[region[hits]])])
        last = np.concatenate([last, seen + (tp, ends + 1 - tp, overlap[tp])], axis=1)
        yield last
        last = last[:, -1:]
        seen = seen + np.array([[hits.size], [region.size - hits.size], [overlap[-1]]])


def _saturated_curve(
    keys: np.ndarray, maps: np.ndarray, masks: np.ndarray, defects: Sequence[Defect]
) -> tuple[np.ndarray, np.ndarray]:
    """False positives and the mean saturated overlap at the curve's corners, float64 [corners] each.

    The overlap of a defect is min(TP / s, 1), s its saturation area: its s highest pixels weigh 1 / s, the others
    nothing. So one cumulative sum over these pixels of all defects is the curve, which rises nowhere else. A pixel may lie
    in several defects.

    Args:
        keys: those of all pixels, sorted, see `_pixel_keys`.
        maps, masks, defects: as for `pixel_metrics`, at least one defect.
    """
    highest, weights = [], []
    for defect in defects:
        bits = _descending(maps[defect.image].ravel()[defect.pixels])
        highest.append(np.partition(bits, defect.saturation - 1)[: defect.saturation])
        weights.append(np.full(defect.saturation, 1 / defect.saturation / len(defects)))
    together = np.concatenate(highest)
    order = np.argsort(together)
    scores, last = np.unique(together[order], return_index=True)
    overlap = np.cumsum(np.concatenate(weights)[order])[np.append(last[1:], order.size) - 1]
    # False positives before a score, and with all that are tied at it.
    anomalous = np.sort(_descending(maps[masks != 0]))
    begins = scores.astype(np.uint64) << REGION_BITS
    before = np.searchsorted(keys, begins) - np.searchsorted(anomalous, scores)
    after = np.searchsorted(keys, begins | REGION_MASK, "right") - np.searchsorted(anomalous, scores, "right")
    x = np.stack([before, after], axis=1).ravel()
    y = np.stack([np.append(0.0, overlap[:-1]), overlap], axis=1).ravel()
    negatives = keys.size - anomalous.size
    return np.concatenate([[0], x, [negatives]]).astype(np.float64), np.concatenate([[0.0], y, [1.0]])


def _area_to(limit: float, x: np.ndarray, y: np.ndarray) -> float:
    """Trapezoid area under the points (x ascending) up to x = limit, interpolating linearly there."""
    inside = int(np.searchsorted(x, limit, side="right"))
    area = float(np.diff(x[:inside]) @ (y[1:inside] + y[: max(inside - 1, 0)])) / 2
    if 0 < inside < x.size:
        width = limit - x[inside - 1]
        slope = (y[inside] - y[inside - 1]) / (x[inside] - x[inside - 1])
        area += float(width * (y[inside - 1] + slope * width / 2))
    return area
