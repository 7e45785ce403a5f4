"""Simulated anomalies: textures laid over normal images where Perlin noise says so (Zavrtanik et al., 2021).

Whole batches at once on the images' device; all draws come from torch's own generators.
"""

import math

import torch
from torch import Tensor
from torch.nn import functional as F

_FINEST = 6  # Perlin cells along a side: 2^0 to 2^5
_THRESHOLD = 0.5
_OPACITY = 0.8  # of the normal image through an anomaly, at most
_AUGMENTATIONS = 3  # of a texture at a time


def simulate(images: Tensor, textures: Tensor) -> tuple[Tensor, Tensor]:
    """Half of the images [B, 3, H, W], float in [0, 1], with an anomaly each, and the others as they are.

    Args:
        textures: as many, of the same size and range; augmented before they are laid over.

    Returns:
        Images [B, 3, H, W] and masks [B, 1, H, W] of 0 and 1.
    """
    batch, _, height, width = images.shape
    masks = (perlin(batch, height, width, images.device) > _THRESHOLD)[:, None].float()
    masks = masks * (torch.rand(batch, 1, 1, 1, device=images.device) > 0.5)
    through = _OPACITY * torch.rand(batch, 1, 1, 1, device=images.device)
    anomalous = through * images + (1 - through) * augment(textures)
    return torch.lerp(images, anomalous, masks), masks


def perlin(batch: int, height: int, width: int, device: torch.device) -> Tensor:
    """Perlin noise [B, H, W], each with its own numbers of cells along x and y, turned by up to 90 degrees.

    The noise is read off at turned coordinates, so that a turn leaves no empty corners.
    """
    cells = 2.0 ** torch.randint(_FINEST, (batch, 2, 1, 1), device=device)
    angle = math.pi * (torch.rand(batch, 1, 1, device=device) - 0.5)
    y = (torch.arange(height, device=device) / height - 0.5)[:, None].expand(height, width)
    x = (torch.arange(width, device=device) / width - 0.5).expand(height, width)
    # The unit square, however it is turned, lies within 1.5 of its middle's distance to a side.
    x, y = (
        cells[:, axis] * (turned + 0.75)
        for axis, turned in enumerate((angle.cos() * x + angle.sin() * y, angle.cos() * y - angle.sin() * x))
    )
    lattice = math.ceil(1.5 * 2 ** (_FINEST - 1)) + 2
    direction = 2 * math.pi * torch.rand(batch, lattice * lattice, device=device)
    left, top = x.floor(), y.floor()
    x, y = x - left, y - top
    corner = (top * lattice + left).long().flatten(1)

    def slope(down: int, right: int) -> Tensor:
        """The corner's gradient times the way from it."""
        turn = direction.gather(1, corner + down * lattice + right).view_as(x)
        return turn.cos() * (x - right) + turn.sin() * (y - down)

    across, along = _fade(x), _fade(y)
    upper = torch.lerp(slope(0, 0), slope(0, 1), across)
    lower = torch.lerp(slope(1, 0), slope(1, 1), across)
    return math.sqrt(2) * torch.lerp(upper, lower, along)


def _fade(t: Tensor) -> Tensor:
    """6 t^5 - 15 t^4 + 10 t^3: flat at 0 and 1."""
    return t * t * t * (t * (6 * t - 15) + 10)


def augment(textures: Tensor) -> Tensor:
    """Textures [B, 3, H, W] in [0, 1], each changed in three of eight ways."""
    batch, device = len(textures), textures.device

    def draw(low: float, high: float, channels: int = 1) -> Tensor:
        return low + (high - low) * torch.rand(batch, channels, 1, 1, device=device)

    changes = [
        lambda t: rotated(t, draw(-45, 45)),
        lambda t: t.clamp_min(0) ** draw(0.5, 2.0),  # gamma
        lambda t: (t * draw(0.8, 1.2) + draw(-30 / 255, 30 / 255)).clamp(0, 1),  # brightness
        lambda t: (t + draw(-50 / 255, 50 / 255, 3)).clamp(0, 1),  # tint
        lambda t: torch.where(t > draw(32 / 255, 128 / 255), 1 - t, t),  # solarise
        lambda t: (t * 15).round() / 15,  # posterise to four bits
        lambda t: 1 - t,
        _stretched,
    ]
    chosen = torch.rand(batch, len(changes), device=device).argsort(1).argsort(1) < _AUGMENTATIONS
    for index, change in enumerate(changes):
        textures = torch.where(chosen[:, index, None, None, None], change(textures), textures)
    return textures


def rotated(images: Tensor, degrees: Tensor) -> Tensor:
    """Images [B, 3, H, W] turned about their middle by angles [B, 1, 1, 1], mirrored beyond their borders."""
    angle = torch.deg2rad(degrees.flatten())
    ratio = images.shape[-2] / images.shape[-1]
    zero = torch.zeros_like(angle)
    affine = torch.stack(
        [angle.cos(), -angle.sin() * ratio, zero, angle.sin() / ratio, angle.cos(), zero], 1
    ).view(-1, 2, 3)
    where = F.affine_grid(affine, list(images.shape), align_corners=False)
    return F.grid_sample(images, where, padding_mode="reflection", align_corners=False)


def _stretched(images: Tensor) -> Tensor:
    """Each channel's values brought to the whole range."""
    low, high = images.amin((2, 3), keepdim=True), images.amax((2, 3), keepdim=True)
    return (images - low) / (high - low).clamp_min(1e-6)
