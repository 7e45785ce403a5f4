"""From distances on a feature grid to an anomaly map at image size."""

import math
from collections.abc import Sequence
from typing import Annotated

import torch
from annotated_types import Ge, Le
from torch import Tensor
from torch.nn import functional as F

from clbench.methods.tables import table
from clbench.precision import single_precision

Sigma = Annotated[float, Ge(0), Le(100)]  # standard deviation of a map's Gaussian smoothing, in pixels


def to_image_size(grid: Tensor, size: Sequence[int], sigma: float, *, align_corners: bool = False) -> Tensor:
    """Grid [B, h, w] -> maps [B, H, W] of `size` (H, W): upsampled bilinearly, then smoothed by a Gaussian.

    The Gaussian's standard deviation is `sigma` pixels. Both operations are linear and separable, so together
    they are one matrix for each side. They are geometry, and so in single precision.

    Args:
        align_corners: whether the middles of the outermost cells come to lie on the middles of the outermost pixels, or
            cells' borders on pixels' borders.
    """
    with single_precision(grid.device):
        rows, columns = (
            table(resampling, source, target, sigma, align_corners, device=grid.device).to(grid.dtype)
            for source, target in zip(grid.shape[1:], size, strict=True)
        )
        return rows @ grid @ columns.T


def resampling(source: int, target: int, sigma: float = 0.0, align_corners: bool = False) -> Tensor:
    """The matrix [target, source] that resamples a side bilinearly, then blurs it with mirrored borders."""
    upsampled = F.interpolate(
        torch.eye(source)[None], size=target, mode="linear", align_corners=align_corners
    )[0].T
    if sigma == 0:
        return upsampled.contiguous()
    radius = math.ceil(4 * sigma)
    offsets = torch.arange(-radius, radius + 1)
    weights = torch.exp(-(offsets**2) / (2 * sigma**2))
    mirrored = (torch.arange(target)[:, None] + offsets) % (2 * target)
    mirrored = torch.minimum(mirrored, 2 * target - 1 - mirrored)
    blur = torch.zeros(target, target).scatter_add_(1, mirrored, (weights / weights.sum()).expand(target, -1))
    return (blur @ upsampled).contiguous()
