"""AUPIMO: the overlap of each defective image at the false-positive rates that a user can bear (Bertoldo et al., BMVC 2024).

Normal images alone set the horizontal axis: F is the share of all their pixels with scores from a threshold on. The vertical
one is T_i, the share of the anomalous pixels of image i from it on. AUPIMO_i is the mean of T_i over ln F between two rates
far below those of AU-PRO. It is exact: every score of a normal pixel is a threshold. Only the highest pixels of normal images
matter, so that this is far cheaper than a sort of all.
"""

import math

import numpy as np

LOW, HIGH = 1e-5, 1e-4  # the published rates
LEAST = 30  # distinct rates between them, at least: with fewer, a curve is of a few pixels


def aupimo(
    maps: np.ndarray,
    masks: np.ndarray,
    defective: np.ndarray,
    low: float = LOW,
    high: float = HIGH,
    least: int = LEAST,
) -> np.ndarray | None:
    """AUPIMO of each defective image that has anomalous pixels, in their order: float64 [M] in [0, 1].

    T_i is taken to be linear in ln F between one threshold and the next.

    Memory beyond the arguments: some bytes for each pixel of one image.

    Args:
        maps: float32 [N, H, W], finite, higher is more anomalous.
        masks: bool [N, H, W], True where a pixel is anomalous.
        defective: bool [N], False where the image is normal.
        low, high: the false-positive rates, 0 < low < high <= 1.
        least: how many distinct rates there must be from `low` to `high`.

    Returns:
        None where it is undefined: there are no normal images, too few of their pixels, or so many of the highest are
        equal that the lowest rate is above `low` or fewer than `least` are between them.
    """
    thresholds, rates = _tail(maps, np.flatnonzero(~defective), high)
    if not len(rates) or rates[0] > low or np.count_nonzero((rates >= low) & (rates <= high)) < least:
        return None
    # The area is linear in T at the thresholds, and a pixel is in T at all thresholds that it reaches: it adds the sum of
    # their weights.
    reached = np.append(0.0, np.cumsum(_weights(np.log(rates), math.log(low), math.log(high))[::-1]))
    ascending = thresholds[::-1]
    outlined = [number for number in np.flatnonzero(defective) if masks[number].any()]
    return np.array(
        [
            reached[np.searchsorted(ascending, maps[number][masks[number] != 0], side="right")].mean()
            for number in outlined
        ]
    )


def _tail(maps: np.ndarray, normal: np.ndarray, high: float) -> tuple[np.ndarray, np.ndarray]:
    """The distinct scores of normal images from the highest on, and the false-positive rate at each, float64 [K].

    They end with the first whose rate is `high` or more.

    Args:
        maps: float32 [N, H, W].
        normal: indices of the normal images.
    """
    count = len(normal) * maps[0].size if len(maps) else 0
    wanted = min(math.ceil(high * count), count)
    highest = np.empty(0, maps.dtype)
    for number in normal:
        score = maps[number].ravel()
        if highest.size == wanted:
            score = score[score > highest[0]]
        highest = np.concatenate([highest, score])
        if highest.size >= wanted:  # the lowest of them comes first
            highest = np.partition(highest, highest.size - wanted)[highest.size - wanted :]
    distinct, counts = np.unique(highest, return_counts=True)
    found = np.cumsum(counts[::-1])
    if found.size:  # of the lowest there may be more
        found[-1] = sum(int(np.count_nonzero(maps[number] >= distinct[0])) for number in normal)
    return distinct[::-1], found / max(count, 1)


def _weights(x: np.ndarray, begin: float, end: float) -> np.ndarray:
    """Weights with which values at the points x, ascending, sum to their mean from `begin` to `end`: float64 [K].

    The values are linear in between; the points reach from `begin` or before to `end` or beyond.
    """
    left, right = np.clip(x[:-1], begin, end), np.clip(x[1:], begin, end)
    share = ((left + right) / 2 - x[:-1]) / np.diff(x)
    weights = np.zeros(x.size)
    weights[:-1] += (right - left) * (1 - share)
    weights[1:] += (right - left) * share
    return weights / (end - begin)
