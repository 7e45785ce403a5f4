"""Metrics at thresholds that were set without test images, each image judged by those of its own model."""

from typing import NamedTuple

import numpy as np


class Decisions(NamedTuple):
    """The thresholds that each of N test images is judged by, float64 [N]: what is above one is defective.

    Attributes:
        pixel: of maps, at the stored false-positive rate of pixels.
        image: of scores, at that of images.
        wide: mean + 3 deviations of the maps of normal images.
    """

    pixel: np.ndarray
    image: np.ndarray
    wide: np.ndarray


def image_decisions(
    scores: np.ndarray, defective: np.ndarray, thresholds: np.ndarray
) -> dict[str, float | None]:
    """F1 and false-positive rate of images.

    Args:
        scores: anomaly scores [N].
        defective: bool [N].
        thresholds: [N], of each image.

    Returns:
        image_f1_stored, None where no image is defective; image_fpr, None where all are.
    """
    called = scores > thresholds
    good = ~defective
    return {
        "image_f1_stored": _f1(called, defective),
        "image_fpr": float(called[good].mean()) if good.any() else None,
    }


def pixel_decisions(
    maps: np.ndarray, masks: np.ndarray, good: np.ndarray, decisions: Decisions
) -> dict[str, float | None]:
    """F1 of all pixels at both kinds of thresholds, and the false-positive rate of normal images' pixels.

    SegF1 is that of MVTec AD 2 (Heckler-Kram et al., 2025): pixels at or above mean + 3 deviations of the maps of normal
    images that were held out, pooled over the category's test images.

    Args:
        maps: [N, H, W].
        masks: bool [N, H, W].
        good: bool [N], normal images.
        decisions: each image's thresholds.

    Returns:
        pixel_f1_stored and segf1, None where no pixel is anomalous; pixel_fpr, None where no image is good; and
        pixel_fpr_deviation, the sample deviation of single images' rates, None where fewer than two are good: pixels of
        an image go together, so that a rate over n images is known to within deviation / sqrt(n).
    """
    called = maps > decisions.pixel[:, None, None]
    rates = called[good].mean((1, 2))
    return {
        "pixel_f1_stored": _f1(called, masks),
        "pixel_fpr": float(rates.mean()) if len(rates) else None,
        "pixel_fpr_deviation": float(rates.std(ddof=1)) if len(rates) > 1 else None,
        "segf1": _f1(maps >= decisions.wide[:, None, None], masks),
    }


def _f1(called: np.ndarray, defective: np.ndarray) -> float | None:
    """2 TP / (2 TP + FP + FN) of two bool arrays of one shape; None where nothing is defective."""
    positives = np.count_nonzero(defective)
    if not positives:
        return None
    return 2 * np.count_nonzero(called & defective) / (np.count_nonzero(called) + positives)
