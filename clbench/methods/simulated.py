"""Simulated anomalies: textures laid over normal images where Perlin noise is high (Zavrtanik et al., 2021).

Whole batches are made at once on the images' device, and all draws come from torch's own generators. Which
images are changed is drawn on the CPU: so the device works on those alone, and nothing waits for it.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from clbench.backbones import unit
from clbench.methods.tables import table

_FINEST = 6  # so many numbers of Perlin cells along a side: 2^0 to 2^5
_LATTICE = math.ceil(1.5 * 2 ** (_FINEST - 1)) + 2  # corners along a side that turned coordinates reach
_THRESHOLD = 0.5  # where noise is above it, there is an anomaly
_OPACITY = 0.8  # largest share of the normal image that shows through an anomaly
_AUGMENTATIONS = 3  # changes of each texture


def simulate(images: Tensor, textures: Tensor) -> tuple[Tensor, Tensor]:
    """Lay an anomaly over each image with a chance of one half (supplement, section 1.6.1).

    Args:
        images: normal ones, float32 [B, 3, H, W] in [0, 1]; they stay as they are.
        textures: [T, 3, H, W], uint8 or float in [0, 1]; some are drawn, changed by `augment` and laid over.

    Returns:
        The images I_a, float32 [B, 3, H, W], and the anomalies' masks M_a, float32 [B, 1, H, W] of 0 and 1.
    """
    device, (height, width) = images.device, images.shape[-2:]
    masks = torch.zeros_like(images[:, :1])
    chosen = torch.rand(len(images)) < 0.5

    def with_anomaly(normal: Tensor) -> Tensor:
        mask = (perlin(len(normal), height, width, device) > _THRESHOLD)[:, None].to(normal.dtype)
        change_some(masks, chosen, lambda _: mask)
        drawn = torch.randint(len(textures), (len(normal),)).to(device, non_blocking=True)
        opacity = (1 - uniform(normal, 0, _OPACITY)) * mask
        return torch.lerp(normal, augment(unit(textures.index_select(0, drawn))), opacity)

    anomalous = images.clone()
    change_some(anomalous, chosen, with_anomaly)
    return anomalous, masks


def change_some(images: Tensor, chosen: Tensor, change: Callable[[Tensor], Tensor]) -> None:
    """Change some images in place.

    Args:
        images: [B, ...], of any type.
        chosen: which of them to change, bool [B] on the CPU.
        change: called once, with the K chosen images [K, ...]; gives as many.
    """
    if chosen.any():
        rows = chosen.nonzero().flatten().to(images.device, non_blocking=True)
        images.index_copy_(0, rows, change(images.index_select(0, rows)))


def perlin(batch: int, height: int, width: int, device: torch.device, turned: bool = True) -> Tensor:
    """Perlin noise, float32 [B, H, W], turned by up to 90 degrees either way, or with its cells along the sides.

    Each of the `batch` pictures has its own numbers of cells along x and y. The noise is read at turned
    coordinates, so that no corner stays empty. At (x, y) it is the mean of g_x (x - i) + g_y (y - j) over the
    four corners (i, j) of the cell, with faded weights: x times the mean of g_x, plus y times that of g_y,
    minus that of g_x i + g_y j. These three means are the channels of one bilinear look-up.
    """
    cells = 2.0 ** torch.randint(_FINEST, (batch, 1, 2), device=device)
    angle = (math.pi if turned else 0) * (torch.rand(batch, device=device) - 0.5)
    turn = 2 * math.pi * torch.rand(batch, _LATTICE, _LATTICE, device=device)
    # The unit square, however it is turned, lies within 0.75 of its middle along x and y; as it is, cells begin at its corner.
    cos, sin, middle = angle.cos(), angle.sin(), torch.full_like(angle, 0.75 if turned else 0.5)
    affine = torch.stack([cos, -sin, sin, cos, middle, middle], 1).view(batch, 3, 2) * cells
    where = (table(_straight, height, width, device=device) @ affine).view(batch, height, width, 2)

    slope_x, slope_y, corner = turn.cos(), turn.sin(), torch.arange(_LATTICE, device=device)
    corners = torch.stack([slope_x, slope_y, slope_x * corner + slope_y * corner[:, None]], 1)
    faded = _faded(where).mul_(2 / (_LATTICE - 1)).sub_(1)
    along_x, along_y, rest = F.grid_sample(corners, faded, align_corners=True).unbind(1)
    noise = torch.addcmul(-rest, along_x, where[..., 0]).addcmul_(along_y, where[..., 1])
    return noise.mul_(math.sqrt(2))


def _straight(height: int, width: int) -> Tensor:
    """x, y and 1 of every pixel, x and y from -0.5 up to 0.5: [height * width, 3]."""
    x = (torch.arange(width) / width - 0.5).expand(height, width)
    y = (torch.arange(height) / height - 0.5)[:, None].expand(height, width)
    return torch.stack([x, y, torch.ones_like(x)], 2).flatten(0, 1)


def _faded(t: Tensor) -> Tensor:
    """Coordinates t of any shape with their share f of a cell replaced by 6 f^5 - 15 f^4 + 10 f^3.

    This polynomial is flat at the corners f = 0 and f = 1.
    """
    f = t.frac()
    move = (f * 6).sub_(15).mul_(f).add_(10).mul_(f).mul_(f).sub_(1).mul_(f)  # the polynomial minus f
    return move.add_(t)


def augment(textures: Tensor) -> Tensor:
    """Textures, float32 [B, 3, H, W] in [0, 1], each changed in three of ten ways; also changed in place."""
    chosen = torch.rand(len(textures), len(_CHANGES)).argsort(1)[:, :_AUGMENTATIONS]
    for number, change in enumerate(_CHANGES):
        change_some(textures, (chosen == number).any(1), change)
    return textures


def rotated(images: Tensor, degrees: Tensor) -> Tensor:
    """Images [B, 3, H, W] turned about their middle by `degrees` [B, 1, 1, 1], mirrored beyond the border."""
    angle = torch.deg2rad(degrees.flatten())
    ratio = images.shape[-2] / images.shape[-1]
    zero = torch.zeros_like(angle)
    affine = torch.stack(
        [angle.cos(), -angle.sin() * ratio, zero, angle.sin() / ratio, angle.cos(), zero], 1
    ).view(-1, 2, 3)
    where = F.affine_grid(affine, list(images.shape), align_corners=False)
    return F.grid_sample(images, where, padding_mode="reflection", align_corners=False)


def uniform(images: Tensor, low: float, high: float, channels: int = 1) -> Tensor:
    """Random numbers between `low` and `high` for each of the images [B, ...]: [B, channels, 1, 1]."""
    return low + (high - low) * torch.rand(len(images), channels, 1, 1, device=images.device)


def sharpened(images: Tensor, factor: Tensor) -> Tensor:
    """Images [B, 3, H, W] in [0, 1], sharper by `factor` [B, 1, 1, 1]; their outermost pixels stay.

    With a factor of 0 they are smooth, with 1 as they were; a larger one extrapolates from smooth to sharp.
    """
    # The smooth copy: a pixel weighs five times as much as each of its eight neighbours.
    columns = images[..., :-2, :] + images[..., 1:-1, :] + images[..., 2:, :]
    smooth = images.clone()
    inside = smooth[..., 1:-1, 1:-1].mul_(4)
    inside.add_(columns[..., :-2]).add_(columns[..., 1:-1]).add_(columns[..., 2:]).div_(13)
    return torch.lerp(smooth, images, factor).clamp_(0, 1)


def equalised(images: Tensor) -> Tensor:
    """Images [B, 3, H, W] in [0, 1] with each channel's 256 levels spread: all are then about as frequent."""
    levels, counts = _levels(images)
    below = counts.cumsum(-1) - counts
    brightest = counts.gather(-1, levels.amax(-1, keepdim=True))
    most = levels.shape[-1] - brightest  # where a channel is of one level, it stays
    spread = torch.where(most > 0, below / most.clamp_min(1), torch.arange(256, device=images.device) / 255)
    return spread.to(images.dtype).gather(-1, levels).view_as(images)


def stretched(images: Tensor, cut: Tensor) -> Tensor:
    """Images [B, 3, H, W] in [0, 1] with each channel stretched to the whole range.

    The share `cut` [B, 1, 1, 1] of a channel's pixels at either end goes beyond the range and is clamped.
    """
    _, counts = _levels(images)
    darker, all_pixels = counts.cumsum(-1), images.shape[-2] * images.shape[-1]
    brighter = all_pixels - darker + counts
    most = (cut * all_pixels).floor().expand(-1, 3, -1, -1).flatten(0, 2)
    low = (darker <= most).sum(-1).view(-1, 3, 1, 1) / 255
    high = 1 - (brighter <= most).sum(-1).view(-1, 3, 1, 1) / 255
    found = high > low
    return torch.where(found, (images - low) / torch.where(found, high - low, 1), images).clamp_(0, 1)


def _levels(images: Tensor) -> tuple[Tensor, Tensor]:
    """Images [B, 3, H, W] in [0, 1] -> pixels' levels, int64 [3B, HW], and how many have each, [3B, 256]."""
    levels = (images * 255).add_(0.5).long().flatten(0, 1).flatten(1)
    counts = torch.zeros(len(levels), 256, dtype=torch.int64, device=images.device)
    return levels, counts.scatter_add_(1, levels, torch.ones_like(levels))


def recoloured(images: Tensor, turn: Tensor, more: Tensor) -> Tensor:
    """Images [B, 3, H, W] in [0, 1] with another hue and saturation.

    Args:
        turn: what the hue is turned by, as a share of the colour circle, [B, 1, 1].
        more: what is added to the saturation, [B, 1, 1].
    """
    red, green, blue = images.unbind(1)
    value = torch.maximum(red, green).maximum(blue)
    chroma = value - torch.minimum(red, green).minimum(blue)
    # Where the strongest of them is on the circle, in sixths from red on, and how far the others draw from there.
    is_red, is_green = value == red, value == green
    start = torch.where(is_red, 0.0, torch.where(is_green, 2.0, 4.0))
    drawn = torch.where(is_red, green - blue, torch.where(is_green, blue - red, red - green))
    hue = drawn.div_(chroma.clamp_min(1e-6)).add_(start).add_(6 * turn)
    strength = chroma.div_(value.clamp_min(1e-6)).add_(more).clamp_(0, 1).mul_(value)
    away = hue[:, None] + torch.arange(5.0, 0.0, -2.0, device=hue.device).view(3, 1, 1)  # 5, 3 and 1
    away = away.sub_((away / 6).floor_().mul_(6)).sub_(2).abs_().neg_().add_(2).clamp_(0, 1)
    return torch.addcmul(value[:, None], away, strength[:, None], value=-1)


def brightened(images: Tensor, factor: Tensor, more: Tensor) -> Tensor:
    """Images [B, 3, H, W] in [0, 1] with a luma of `factor` times the old one plus `more`, both [B, 1, 1, 1].

    Chroma stays as it is.
    """
    red, green, blue = images.split(1, 1)
    luma = (red * 0.299).add_(green, alpha=0.587).add_(blue, alpha=0.114)
    return (images + luma.mul_(factor - 1).add_(more)).clamp_(0, 1)


def solarised(images: Tensor, threshold: Tensor) -> Tensor:
    """Images [B, 3, H, W] in [0, 1], inverted where they are at or above `threshold` [B, 1, 1, 1]."""
    return torch.where(images >= threshold, 1 - images, images)


def posterised(images: Tensor, bits: Tensor) -> Tensor:
    """Images [B, 3, H, W] in [0, 1] with only the highest `bits` [B, 1, 1, 1] of their 256 levels, 1 to 8."""
    step = 2 ** (8 - bits)
    return (images * 255).round_().div_(step).floor_().mul_(step / 255)


_CHANGES: tuple[Callable[[Tensor], Tensor], ...] = (
    lambda t: rotated(t, uniform(t, -45, 45)),
    lambda t: t.clamp_min(0).log_().mul_(uniform(t, 0.5, 2.0, 3)).exp_(),  # gamma
    lambda t: brightened(t, uniform(t, 0.8, 1.2), uniform(t, -30 / 255, 30 / 255)),
    lambda t: recoloured(t, uniform(t, -50 / 255, 50 / 255)[:, 0], uniform(t, -50 / 255, 50 / 255)[:, 0]),
    lambda t: torch.where(uniform(t, 0, 1) < 0.5, solarised(t, uniform(t, 32 / 255, 128 / 255)), t),
    lambda t: posterised(t, uniform(t, 1, 9).floor()),
    lambda t: 1 - t,
    lambda t: sharpened(t, uniform(t, 0, 3)),
    lambda t: stretched(t, uniform(t, 0, 0.2)),
    equalised,
)
