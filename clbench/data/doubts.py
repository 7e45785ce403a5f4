"""What is doubtful about images and masks that can be read: it is said, by a run and by `clbench data check`."""

from collections.abc import Mapping, Sequence

import numpy as np

_NEARLY_ALL = 0.9  # share of a mask's pixels
_ALL_BUT_FRAME = 0.6  # and where the outermost pixels are not marked
_FEW_BITS = 14  # of 16: the rest is a quarter of the grey levels, at most


def nearly_all(mask: np.ndarray) -> bool:
    """Whether a mask, bool [H, W], marks so much that it may be drawn the other way round, or mark the product."""
    share = float(mask.mean())
    frame = mask[0].any() or mask[-1].any() or mask[:, 0].any() or mask[:, -1].any()
    return share > _NEARLY_ALL or (share > _ALL_BUT_FRAME and not frame)


def doubts(
    peaks: Mapping[str, int | None], marked: Mapping[str, Sequence[str]], bit_depth: int | None
) -> list[str]:
    """A line for each thing that is doubtful about categories.

    Args:
        peaks: a category's name -> the largest value of its 16-bit images; None where it has none.
        marked: a category's name -> the names of its images whose masks mark nearly all of them.
        bit_depth: the setting `dataset.bit_depth`.
    """
    lines = []
    few: dict[int, dict[str, int]] = {}  # bits -> category -> peak
    for category, peak in peaks.items():
        if peak is not None and bit_depth is None and peak.bit_length() <= _FEW_BITS:
            few.setdefault(max(8, peak.bit_length()), {})[category] = peak
    for bits, found in few.items():
        peak = max(found.values())
        lines.append(
            f"{', '.join(found)}: the largest value of the 16-bit images is {peak} of 65535, which leaves "
            f"{round(peak / 257) + 1} of 256 grey levels: where the camera has {bits} bits, set dataset.bit_depth={bits}"
        )
    lines += [
        f"{category}: masks that mark nearly all of their image: {len(names)}, such as that of {names[0]}; "
        "where defects are drawn dark on light, invert them"
        for category, names in marked.items()
        if names
    ]
    return lines
