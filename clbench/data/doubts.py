"""What is doubtful about images and masks that can be read: it is said, by a run and by `clbench data check`."""

import numpy as np

_NEARLY_ALL = 0.9  # share of a mask's pixels
_FEW_BITS = 14  # of 16: the rest is a quarter of the grey levels, at most


def few_levels(peak: int | None, bit_depth: int | None) -> str | None:
    """A line on 16-bit images that leave most of their range empty; None where nothing is doubtful.

    Args:
        peak: the largest value of all 16-bit images of a set; None where it has none.
        bit_depth: the setting `dataset.bit_depth`.
    """
    if peak is None or bit_depth is not None or peak.bit_length() > _FEW_BITS:
        return None
    bits = max(8, peak.bit_length())
    return (
        f"the largest value of its 16-bit images is {peak} of 65535, which leaves {round(peak / 257) + 1} of 256 grey "
        f"levels: where the camera has {bits} bits, set dataset.bit_depth={bits}"
    )


def nearly_all(mask: np.ndarray) -> bool:
    """Whether a mask, bool [H, W], marks so much that it may be drawn the other way round."""
    return float(mask.mean()) > _NEARLY_ALL


def marks_nearly_all(name: str) -> str:
    """A line on an image whose mask marks nearly all of it."""
    return (
        f"the mask of {name} marks more than {_NEARLY_ALL:.0%} of the image: where defects are drawn dark on light, "
        "invert it"
    )
