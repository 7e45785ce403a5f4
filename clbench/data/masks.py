"""What a mask marks: one rule for masks of every kind, from the levels of its pixels."""

import cv2
import numpy as np

# How dark and how bright a level of a mask can be said to be, as a share of the range of its levels.
_EDGE = 0.15  # from an end on, a level away from any edge is neither dark nor bright
_QUARTER = 0.25
_HALF = 0.5

_FEW = 16  # positive levels, at most, of masks whose labels may touch one another
_SPECK = 2  # pixels: what compression leaves near black comes in smaller specks, on average
_SPOT = 4  # pixels: what colours leave beside a point in a lossy format, at most
_SMALL = 32 * 32  # pixels: of fewer, it cannot be said that they have no order
_NEAR_BLACK = 1 / 32  # of the largest level
_FAINTEST = 1 / 8  # of white: a lossy file that is not brighter blurs its levels with its noise

_KERNEL = np.ones((3, 3), np.uint8)
_WIDE_KERNEL = np.ones((5, 5), np.uint8)


class Doubtful(ValueError):
    """It cannot be told what a mask marks; the message is the end of a sentence that begins with the mask."""


def marked(pixels: np.ndarray, lossy: bool, alpha: bool = False) -> np.ndarray:
    """Where a mask marks a defect.

    - Masks of few values (0 and 1, 0 and 255, labels of kinds or of single defects, one colour or several): every
      positive value marks. They are known by their levels: there is one, or none below the half of the largest, or
      those below it are regions of their own, beside background or one another.
    - Masks with values in between, from a lossy format, from drawing with smooth edges, or from resizing: the half
      of their range marks, to within a pixel of where the edge was drawn. Their levels below the half lie at edges,
      beside brighter ones.
    - A palette is read by its colours, as a person sees it.

    Args:
        pixels: uint8 or uint16 [H, W, 3], as stored.
        lossy: whether the file's format changes values, so that there is no exact one.
        alpha: whether there is an alpha channel that varies.

    Returns:
        bool [H, W]; all False where the mask is black.

    Raises:
        Doubtful: it cannot be told: many grey levels in no order, a meaning in the alpha channel alone, no black, or
            a lossy file that is too dark or has grey regions.
    """
    # Channels one after another: a maximum over an axis of three is slow.
    levels = np.maximum(np.maximum(pixels[..., 0], pixels[..., 1]), pixels[..., 2])
    lowest, highest = int(levels.min()), int(levels.max())
    if alpha and (lowest > 0 or highest == 0):
        raise Doubtful(
            "has a meaning in its alpha channel alone, which is not read: save it as white on black, without alpha"
        )
    if lowest == highest:
        return levels > 0
    if not lossy and _few_values(levels, highest):
        if lowest > 0:
            raise Doubtful(f"has no black, the lowest of its values is {lowest}: give the background 0")
        return levels > 0
    if lossy and highest - lowest < _FAINTEST * np.iinfo(levels.dtype).max:
        raise Doubtful(
            f"has values from {lowest} to {highest} in a lossy format, which does not keep them apart: save it as PNG, "
            "white on black"
        )
    if _in_no_order(levels, lowest, highest):
        if not lossy and levels.size < _SMALL:
            return levels > 0
        raise Doubtful(
            "has grey levels that are neither background nor defect nor the edge between them, as a heat map, a "
            "photograph or labels in a lossy format have: save it as PNG, white on black"
        )
    return levels >= (lowest + highest) / 2


def _few_values(levels: np.ndarray, highest: int) -> bool:
    """Whether each positive value, uint8 or uint16 [H, W], was chosen by the maker: a label, or white.

    Args:
        highest: the largest value.
    """
    counts = cv2.calcHist([levels], [0], None, [highest + 1], [0, highest + 1])
    positive = np.flatnonzero(counts.ravel()[1:]) + 1
    if len(positive) == 1 or 2 * positive[0] >= highest:
        return True
    dark = (levels > 0) & (levels < highest / 2)
    if 0 < positive[positive < highest / 2].max() <= _NEAR_BLACK * highest:
        regions, _ = cv2.connectedComponents(dark.astype(np.uint8))
        if np.count_nonzero(dark) < _SPECK * (regions - 1):
            return False
    if len(positive) == 2:  # an edge has more
        return True
    # The share of dark pixels that touch background and their own level alone.
    brighter = cv2.dilate(levels, _KERNEL) > levels
    background = levels == 0
    filled = np.where(background, np.iinfo(levels.dtype).max, levels)
    alone = dark & ~brighter & (cv2.erode(filled, _KERNEL) >= levels)
    share = np.count_nonzero(alone) / np.count_nonzero(dark)
    return bool(share >= (0.5 if len(positive) <= _FEW else 0.9))


def _in_no_order(levels: np.ndarray, lowest: int, highest: int) -> bool:
    """Whether a mask has more than bright regions, dark background and narrow edges between them."""
    share = (levels.astype(np.float32) - lowest) / (highest - lowest)
    bright = share >= _HALF
    size = np.count_nonzero(bright)
    between = (share >= _QUARTER) & (share < 1 - _QUARTER)
    if np.count_nonzero(between) > share.size / 4:
        return True
    # Neither dark nor bright, although all around are on the same side of the half.
    sides = bright.astype(np.uint8)
    away = (cv2.erode(sides, _WIDE_KERNEL) == 1) | (cv2.dilate(sides, _WIDE_KERNEL) == 0)
    grey = away & (share > _EDGE) & (share < 1 - _EDGE)
    if np.count_nonzero(grey) > size / 2:
        return True
    # Below the half, and flat or touching nothing brighter: a region of its own.
    flat = cv2.dilate(share, _KERNEL) - cv2.erode(share, _KERNEL) < 1 / 16
    faint = flat & (share > _EDGE) & ~bright
    _, regions, about, _ = cv2.connectedComponentsWithStats((share >= _QUARTER).astype(np.uint8))
    alone = about[:, cv2.CC_STAT_AREA] > _SPOT
    alone[regions[bright]] = False
    alone[0] = False  # all that is darker
    faint |= alone[regions]
    return bool(np.count_nonzero(faint) > size / 100)
