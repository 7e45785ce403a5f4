"""Patch features from the levels of a pyramid (Roth et al., 2022, section 3.1)."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F


def neighbourhood_patches(levels: Sequence[Tensor]) -> Tensor:
    """Levels [B, C_l, h_l, w_l] -> patch features [B, h, w, sum of C_l].

    Each level is averaged over 3x3 neighbours and brought to the grid of the first, (h, w).
    """
    levels = [F.avg_pool2d(level, 3, 1, 1) for level in levels]
    grid = levels[0].shape[-2:]
    levels = [
        level if level.shape[-2:] == grid else F.interpolate(level, grid, mode="bilinear") for level in levels
    ]
    return torch.cat(levels, 1).permute(0, 2, 3, 1)


def tokens(outputs: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """What `Backbone.tokens` gives -> patch features [B, h, w, D], and one vector for each image [B, d].

    A transformer has both: its levels side by side, and its class token. Any other network's patches are
    `neighbourhood_patches`, and the vector is the mean of its last level.
    """
    *levels, last = outputs
    if last.dim() == 2:
        return torch.cat(levels, 1).permute(0, 2, 3, 1), last
    return neighbourhood_patches(outputs), last.mean((2, 3))
