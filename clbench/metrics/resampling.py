"""Metrics of resampled test images, from what each image contributes.

A resample gives every image a weight: how often it was drawn. Counts of an image's pixels by bins of the score are
enough for all pixel metrics of any resample: weights @ counts.
"""

from collections.abc import Mapping
from dataclasses import dataclass, fields

import cv2
import numpy as np

from clbench.metrics.names import USUAL

# Bins of scores: equal shares of the anomalous pixels; equal shares of the normal ones, among which AU-PRO's area lies;
# and shares of the normal ones that shrink by the same factor towards the top, where precision is decided.
_ANOMALOUS, _NORMAL, _TAIL = 320, 64, 256
_LEAST_SHARE = 1e-6  # of the normal pixels, in the highest bin of the tail
_CHUNK = 128  # resamples at a time
_LIMIT = 0.3  # false-positive rate that AU-PRO is integrated to


@dataclass(frozen=True)
class Evidence:
    """What each of the N test images of a category contributes to its metrics.

    Image metrics follow exactly. Pixel metrics blur within 0.001 where 10,000 pixels are anomalous, and 0.003 where 1,000
    are: there are up to 640 bins.

    Bins are of the score, the highest first. Images whose defect was not outlined count in image metrics alone: they
    have no pixels here.

    Attributes:
        scores: image scores, float64 [N].
        labels: bool [N], True where the image is defective.
        normal, anomalous: numbers of pixels by bin, unsigned integers [N, B].
        overlap: the sum over an image's defect regions of the share of the region in the bin, float32 [N, B].
        regions: numbers of defect regions, unsigned integers [N].
        tied: bool [B], True where all scores of a bin are the same: a tie, and not a stretch of the curve.
        images: digest of which images these are: evidence of the same ones can be paired.
        exact: the seven metrics of them all, float64 [7], NaN where one is undefined: what bins blur, and what metrics.csv
            has where it is of the same predictions.
    """

    scores: np.ndarray
    labels: np.ndarray
    normal: np.ndarray
    anomalous: np.ndarray
    overlap: np.ndarray
    regions: np.ndarray
    tied: np.ndarray
    images: str
    exact: np.ndarray

    @staticmethod
    def of(
        scores: np.ndarray,
        labels: np.ndarray,
        maps: np.ndarray,
        masks: np.ndarray,
        unknown: list[int],
        images: str,
        values: Mapping[str, float | None],
    ) -> "Evidence":
        """The evidence of a category's predictions.

        Args:
            scores: [N].
            labels: bool [N].
            maps: float32 [N, H, W].
            masks: bool [N, H, W].
            unknown: indices of the images whose masks mean nothing.
            images: digest of which images these are.
            values: the seven metrics, None where one is undefined.
        """
        known = np.setdiff1d(np.arange(len(maps)), unknown)
        of_known = (maps[known], masks[known]) if len(known) < len(maps) else (maps, masks)  # a copy, or none
        edges, tied = _bins(*of_known)
        count = len(edges)
        normal, anomalous = np.zeros((2, len(maps), count), np.int64)
        overlap, regions = np.zeros((len(maps), count), np.float32), np.zeros(len(maps), np.int64)
        for index in known:
            bins = count - np.searchsorted(edges, maps[index].ravel(), side="right")
            mask = masks[index].ravel() != 0
            normal[index] = np.bincount(bins[~mask], minlength=count)
            if mask.any():
                found, label = cv2.connectedComponents(masks[index].astype(np.uint8), connectivity=8)
                region, place = label.ravel()[mask], bins[mask]
                anomalous[index] = np.bincount(place, minlength=count)
                share = 1 / np.bincount(region, minlength=found)[region]
                overlap[index], regions[index] = np.bincount(place, share, count), found - 1
        return Evidence(
            scores.astype(np.float64),
            labels.astype(bool),
            _small(normal),
            _small(anomalous),
            overlap,
            _small(regions),
            tied,
            images,
            np.array([np.nan if values[name] is None else values[name] for name in USUAL], np.float64),
        )

    def arrays(self) -> dict[str, np.ndarray]:
        """It as arrays that a file without pickles can hold: name -> array."""
        return {field.name: np.asarray(getattr(self, field.name)) for field in fields(self)}

    @staticmethod
    def from_arrays(arrays: Mapping[str, np.ndarray]) -> "Evidence":
        """What `arrays` gave.

        Raises:
            KeyError, ValueError: they are none of an evidence.
        """
        found = {field.name: arrays[field.name] for field in fields(Evidence) if field.name != "images"}
        bins = found["normal"].shape[1:]
        alike = {found[name].shape for name in ("normal", "anomalous", "overlap")}
        if len(bins) != 1 or len(alike) != 1 or found["tied"].shape != bins:
            raise ValueError("counts by bin differ in shape")
        kinds = {"labels": "b", "tied": "b", "scores": "f", "overlap": "f", "exact": "f"}
        if any(array.dtype.kind not in kinds.get(name, "u") for name, array in found.items()):
            raise ValueError("arrays are of other types")
        if not np.isfinite(found["scores"]).all() or not np.isfinite(found["overlap"]).all():
            raise ValueError("a score is not finite")
        int(str(arrays["images"]), 16)  # a digest
        if found["exact"].shape != (len(USUAL),):
            raise ValueError("there are not seven metrics")
        if {found[name].shape for name in ("scores", "labels", "regions")} != {found["normal"].shape[:1]}:
            raise ValueError("counts and scores are of other numbers of images")
        return Evidence(**found, images=str(arrays["images"]))


def weights(labels: np.ndarray, count: int, seed: int) -> np.ndarray:
    """How often each image is drawn in each of `count` resamples, float32 [count, N].

    Good and defective images are drawn apart, with replacement, as many as there are of each.

    Args:
        labels: bool [N], True where the image is defective.
    """
    draw = np.random.default_rng(seed)
    drawn = np.zeros((count, len(labels)), np.float32)
    for kind in (False, True):
        members = np.flatnonzero(labels == kind)
        if members.size:
            drawn[:, members] = draw.multinomial(members.size, np.full(members.size, 1 / members.size), count)
    return drawn


def metrics(evidence: Evidence, weights: np.ndarray) -> dict[str, np.ndarray]:
    """The seven metrics of resamples: name -> float64 [R]; NaN where one is undefined.

    Args:
        weights: how often each image was drawn, [R, N]; ones give the metrics of the test set itself, within what
            bins blur.
    """
    parts = [_metrics(evidence, weights[begin : begin + _CHUNK]) for begin in range(0, len(weights), _CHUNK)]
    return {name: np.concatenate([part[name] for part in parts]) for name in USUAL}


def _metrics(evidence: Evidence, weights: np.ndarray) -> dict[str, np.ndarray]:
    """What `metrics` gives, of so few resamples that temporaries stay in the cache."""
    order = np.argsort(-evidence.scores, kind="stable")
    ends = np.flatnonzero(np.append(np.diff(evidence.scores[order]) != 0, True))
    chosen, defective = weights[:, order].astype(np.float64), evidence.labels[order]
    hits = np.cumsum(chosen * defective, axis=1)[:, ends]
    misses = np.cumsum(chosen * ~defective, axis=1)[:, ends]
    with np.errstate(divide="ignore", invalid="ignore"):
        image = _auroc_ap_f1(hits, misses, np.ones(ends.size, bool))
        hits = np.cumsum(_times(weights, evidence.anomalous), axis=1)
        misses = np.cumsum(_times(weights, evidence.normal), axis=1)
        pixel = _auroc_ap_f1(hits, misses, evidence.tied)
        overlap = np.cumsum(_times(weights, evidence.overlap), axis=1) / (weights @ evidence.regions)[:, None]
        rate = misses / misses[:, -1:]
        aupro = np.where(hits[:, -1] * misses[:, -1] > 0, _area(rate, overlap, _LIMIT) / _LIMIT, np.nan)
    return dict(zip(USUAL, (*image, *pixel, aupro), strict=True))


def _times(weights: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """weights [R, N] @ counts [N, B], float64 [R, B]."""
    return weights.astype(np.float64) @ counts.astype(np.float64)


def _auroc_ap_f1(
    hits: np.ndarray, misses: np.ndarray, tied: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """AUROC, average precision and best F1 of curves, each [R]; NaN where a class is missing.

    Args:
        hits, misses: true and false positives after each bin, [R, B].
        tied: bool [B], True where a bin is a tie. In the others both classes are taken to lie evenly.
    """
    positives, negatives = hits[:, -1], misses[:, -1]
    more_hits, more_misses = _steps(hits), _steps(misses)
    auroc = np.sum(more_misses * (hits - more_hits / 2), axis=1) / (positives * negatives)
    # Precision over a bin: the integral of (a + b s) / (c + d s) over s in [0, 1], in closed form.
    a, b = hits - more_hits, more_hits
    d = b + more_misses
    c = hits + misses - d
    even = np.where(c > 0, b / d + (a - b * c / d) / d * np.log1p(d / np.where(c > 0, c, 1)), b / d)
    precision = np.where(tied, hits / (hits + misses), even)
    ap = np.sum(np.where(b > 0, b * precision, 0), axis=1) / positives
    f1 = np.max(2 * hits / np.maximum(hits + misses + positives[:, None], 1), axis=1)
    defined = (positives > 0) & (negatives > 0)
    return tuple(np.where(defined, found, np.nan) for found in (auroc, ap, f1))  # type: ignore[return-value]


def _steps(totals: np.ndarray) -> np.ndarray:
    """What each bin adds to running totals, [R, B]."""
    return np.diff(totals, axis=1, prepend=0)


def _area(x: np.ndarray, y: np.ndarray, limit: float) -> np.ndarray:
    """Areas under curves through the origin and points [R, B], x ascending, up to x = limit: [R]."""
    width, height = _steps(x), _steps(y)
    begin = x - width
    inside = np.clip(
        (limit - begin) / np.where(width > 0, width, 1), 0, 1
    )  # the share of a step before the limit
    inside = np.where(width > 0, inside, 0)
    return np.sum(inside * width * (y - height + inside * height / 2), axis=1)


def _bins(maps: np.ndarray, masks: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The scores at which bins begin, float32 [B], ascending; and which bins are ties, bool [B], the highest bin first.

    Every bin begins with a score that is there, the lowest with the lowest of all: so all scores are in one.

    Args:
        maps: float32 [N, H, W].
        masks: bool [N, H, W].
    """
    anomalous, normal = maps[masks], maps[~masks]
    anomalous.sort()
    normal.sort()
    equal = [(anomalous, np.linspace(0, 1, _ANOMALOUS)), (normal, np.linspace(0, 1, _NORMAL))]
    tail = 1 - np.geomspace(_LEAST_SHARE, 1, _TAIL)
    found = [
        scores[np.minimum((shares * scores.size).astype(np.int64), scores.size - 1)]
        for scores, shares in (*equal, (normal, tail))
        if scores.size
    ]
    if not found:
        return np.zeros(1, np.float32), np.ones(1, bool)
    edges = np.unique(np.concatenate(found))
    first, last = (
        np.searchsorted(anomalous, edges, side) + np.searchsorted(normal, edges, side)
        for side in ("left", "right")
    )
    return edges, (last == np.append(first[1:], maps.size))[::-1]


def _small(counts: np.ndarray) -> np.ndarray:
    """The same counts in the smallest type that holds them."""
    return counts.astype(np.min_scalar_type(int(counts.max(initial=0))))
