"""Procedural textures: pictures of endlessly many surfaces, for training without a dataset of pictures."""

import torch
from torch import Tensor


def texture(recipe: int, variant: int, size: int) -> Tensor:
    """A picture of a surface, float32 [3, S, S] in [0, 1].

    Args:
        recipe: number of the surface; it fixes the statistics, not the pixels.
        variant: number of the picture of this surface.
        size: S, pixels of a side.
    """
    style = torch.Generator().manual_seed(recipe)
    random = torch.Generator().manual_seed(1_000_003 * (recipe + 1) + variant)

    def between(low: float, high: float) -> float:
        return low + (high - low) * float(torch.rand((), generator=style))

    line = torch.linspace(-0.5, 0.5, size)
    y, x = torch.meshgrid(line, line, indexing="ij")
    phase = 6.3 * torch.rand(4, generator=random)
    angle, frequency = between(0, 3.14), 2 ** between(2.5, 5.5)
    u = x * torch.tensor(angle).cos() + y * torch.tensor(angle).sin()
    v = y * torch.tensor(angle).cos() - x * torch.tensor(angle).sin()
    bend = between(0, 0.03) * spectral(random, size, 2.0, 1.0, 0.0)
    kind = recipe % 8
    if kind == 0:  # clouds and grain of some power law and direction
        field = spectral(random, size, between(0.3, 2.2), between(1, 6), angle)
    elif kind == 1:  # stripes
        wave = torch.sin(frequency * 6.3 * (u + bend) + phase[0])
        field = wave.sign() * wave.abs() ** between(0.2, 1.5)
    elif kind == 2:  # woven or tiled
        aspect = between(0.5, 2)
        across = torch.sin(6.3 * frequency * (u + bend) + phase[0])
        wave = across * torch.sin(6.3 * frequency * aspect * v + phase[1])
        field = wave.sign() * wave.abs() ** between(0.1, 1)
    elif kind == 3:  # cells
        count = int(between(30, 300))
        first, second = cells(random, count, x, y)
        field = (second - first) * count**0.5 if between(0, 1) < 0.5 else first * count**0.5
    elif kind == 4:  # spots
        count = int(between(40, 400))
        first, _ = cells(random, count, x, y)
        field = torch.sigmoid((between(0.2, 0.5) / count**0.5 - first) * 150)
    elif kind == 5:  # broken marks along a direction
        band = spectral(random, size, between(0.5, 1.0), between(4, 10), angle)
        field = torch.sigmoid(between(3, 8) * (band - between(0.3, 1)))
    elif kind == 6:  # ridges and creases
        field = -spectral(random, size, between(1, 1.8), between(1, 3), angle).abs()
    else:  # rings
        centre = torch.rand(2, generator=random) - 0.5
        field = torch.sin(6.3 * frequency * (torch.hypot(x - centre[0], y - centre[1]) + bend))
    field = (field - field.mean()) / (field.std() + 1e-6)
    fine = between(0, 0.6) * spectral(random, size, between(0, 1), 1.0, 0.0)
    mix = torch.sigmoid(between(0.7, 2) * field + fine)
    colourful = between(0, 0.8) ** 2

    def colour() -> Tensor:
        grey = torch.full((3, 1, 1), between(0.05, 0.95))
        return torch.lerp(grey, torch.rand(3, 1, 1, generator=style), colourful)

    dark, bright = colour(), colour()
    return (dark + (bright - dark) * mix).clamp(0, 1)


def spectral(random: torch.Generator, size: int, slope: float, stretch: float, angle: float) -> Tensor:
    """Noise, float32 [S, S], mean 0 and deviation 1, whose spectrum falls with frequency by a power law.

    Args:
        random: what the noise is drawn from.
        size: S, pixels of a side.
        slope: exponent of the power law: amplitudes fall with frequency to the power of -slope.
        stretch: factor that features are longer by in one direction, and narrower across it.
        angle: that direction, in radians from the x axis.
    """
    fy, fx = torch.fft.fftfreq(size)[:, None], torch.fft.rfftfreq(size)[None]
    turn = torch.tensor(angle)
    along, across = fx * turn.cos() + fy * turn.sin(), fy * turn.cos() - fx * turn.sin()
    radius = torch.hypot(along * stretch, across / stretch) + 1 / size
    white = torch.fft.rfft2(torch.randn(size, size, generator=random))
    field = torch.fft.irfft2(white * radius**-slope, s=(size, size))
    return (field - field.mean()) / field.std()


def cells(random: torch.Generator, count: int, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Distances of the positions x, y [S, S] to the nearest and second nearest of `count` random points.

    Points are drawn from -0.5 to 0.5. Both results are float32 [S, S].
    """
    points = torch.rand(count, 2, generator=random) - 0.5
    distances = torch.cdist(torch.stack([x, y], -1).view(-1, 2), points)
    nearest = distances.topk(2, largest=False).values.view(len(x), len(x), 2)
    return nearest[..., 0], nearest[..., 1]
