"""Procedural pictures: noise, and the ten products of the synthetic stream.

Lengths are fractions of the picture's side S.
"""

from collections.abc import Callable

import cv2
import numpy as np

Array = np.ndarray


def noise(random: np.random.Generator, size: int, scale: float, stretch: float = 1.0) -> Array:
    """Smooth noise, float32 [S, S], with mean 0 and deviation 1.

    Args:
        random: what the noise is drawn from.
        size: S, pixels of a side.
        scale: width of features; their height is `stretch` times that.
    """
    columns = max(2, round(1 / scale) + 2)
    rows = max(2, round(1 / (scale * stretch)) + 2)
    coarse = random.standard_normal((rows, columns)).astype(np.float32)
    field = cv2.resize(coarse, (size, size), interpolation=cv2.INTER_CUBIC)
    return (field - field.mean()) / (field.std() + 1e-6)


def fractal(random: np.random.Generator, size: int, scale: float, octaves: int = 4) -> Array:
    """Noise [S, S] with mean 0 and deviation 1: `octaves` added, each half as wide as the last, and weaker.

    The arguments are those of `noise`; `scale` is the width of the widest features.
    """
    field = sum(0.55**octave * noise(random, size, scale / 2**octave) for octave in range(octaves))
    return np.asarray((field - np.mean(field)) / np.std(field), dtype=np.float32)


def grid(size: int, angle: float = 0.0, shift: tuple[float, float] = (0.0, 0.0)) -> tuple[Array, Array]:
    """Coordinates x, y of a picture's pixels, each [S, S].

    Args:
        size: S, pixels of a side.
        angle: what the axes are turned by, in radians.
        shift: where the origin is, (x, y) from the picture's middle.
    """
    line = (np.arange(size, dtype=np.float32) + 0.5) / size - 0.5
    x, y = np.meshgrid(line - shift[0], line - shift[1])
    cos, sin = np.float32(np.cos(angle)), np.float32(np.sin(angle))
    return cos * x + sin * y, cos * y - sin * x


def edge(distance: Array, width: float = 0.006) -> Array:
    """Signed distances [S, S] from an outline -> 1 inside, where they are negative, and 0 outside.

    It falls from 1 to 0 within `width` of the outline.
    """
    return np.clip(0.5 - distance / (2 * width), 0, 1).astype(np.float32)


def blend(below: Array, above: Array, alpha: Array) -> Array:
    """A picture [S, S, 3]: `above` where alpha [S, S] is 1, else `below`; `above` may be a colour [3]."""
    return below + (above - below) * alpha[..., None]


def colour(*values: float) -> Array:
    """Red, green and blue, about 0 to 1, as an array [3]."""
    return np.array(values, dtype=np.float32)


def shaded(base: Array, light: Array) -> Array:
    """A picture [S, S, 3]: `base`, a colour [3] or picture [S, S, 3], times a brightness `light` [S, S]."""
    return base * light[..., None]


# (random, size S) -> a product's picture [S, S, 3], about 0 to 1, and a map [S, S], 1 where defects may be.
Product = Callable[[np.random.Generator, int], tuple[Array, Array]]


def fabric(random: np.random.Generator, size: int) -> tuple[Array, Array]:
    """A plain weave of blue and grey threads, see `Product`; it fills the picture."""
    x, y = grid(size, random.normal(0, 0.02), tuple(random.uniform(-0.1, 0.1, 2)))
    bend = 0.003 * noise(random, size, 0.3)
    warp = np.sin(2 * np.pi * 22 * (x + bend))
    weft = np.sin(2 * np.pi * 22 * (y + bend))
    over = np.sign(np.sin(np.pi * 22 * (x + bend)) * np.sin(np.pi * 22 * (y + bend)))
    light = 0.62 + 0.16 * np.where(over > 0, warp * warp, weft * weft) + 0.03 * noise(random, size, 0.01)
    threads = np.where((over > 0)[..., None], colour(0.35, 0.5, 0.72), colour(0.62, 0.68, 0.75))
    return shaded(threads, light + 0.03 * fractal(random, size, 0.3)), np.ones_like(x)


def wood(random: np.random.Generator, size: int) -> tuple[Array, Array]:
    """A plank with rings and fibres, see `Product`; it fills the picture."""
    x, _y = grid(size, random.normal(0, 0.03), (random.uniform(-0.3, 0.3), 0))
    rings = x + 0.035 * noise(random, size, 0.25, 3) + 0.004 * noise(random, size, 0.05, 6)
    grain = 0.5 + 0.5 * np.sin(2 * np.pi * 9 * rings + 2 * np.sin(2 * np.pi * 2.3 * rings))
    fibres = noise(random, size, 0.008, 12)
    light = 0.9 + 0.035 * fibres + 0.03 * fractal(random, size, 0.5)
    bright = np.broadcast_to(colour(0.78, 0.56, 0.34), (size, size, 3))
    return shaded(blend(bright, colour(0.52, 0.32, 0.17), grain**2), light), np.ones_like(x)


def metal(random: np.random.Generator, size: int) -> tuple[Array, Array]:
    """A brushed sheet, see `Product`; it fills the picture."""
    x, _y = grid(size, random.normal(0, 0.05))
    streaks = noise(random, size, 0.9, 0.006) * 0.05 + noise(random, size, 0.3, 0.012) * 0.04
    glint = 0.08 * np.cos(2 * np.pi * (0.6 * x + random.uniform(-0.15, 0.15)))
    light = 0.62 + glint + streaks + 0.015 * noise(random, size, 0.01)
    return shaded(colour(0.96, 0.98, 1.0), light), np.ones_like(x)


def tiles(random: np.random.Generator, size: int) -> tuple[Array, Array]:
    """Glazed tiles in rows with grout between them, see `Product`; they fill the picture."""
    x, y = grid(size, random.normal(0, 0.015), tuple(random.uniform(-0.12, 0.12, 2)))
    row = np.floor(y * 4)
    shifted = x * 3 + 0.5 * (row % 2)
    u, v = shifted - np.floor(shifted) - 0.5, y * 4 - row - 0.5
    glazed = edge(np.maximum(np.abs(u) - 0.47, np.abs(v) - 0.46), 0.02)
    number = (np.floor(shifted) * 7 + row * 13).astype(int) % 64
    tint = 1 + 0.05 * random.standard_normal(64).astype(np.float32)[number]
    glaze = shaded(colour(0.3, 0.55, 0.52), tint + 0.05 * fractal(random, size, 0.15) - 0.12 * (u + v))
    grout = shaded(colour(0.72, 0.7, 0.66), 1 + 0.06 * noise(random, size, 0.01))
    return blend(grout, glaze, glazed), np.ones_like(x)


def leather(random: np.random.Generator, size: int) -> tuple[Array, Array]:
    """Pebbled leather with creases, see `Product`; it fills the picture."""
    pebbles = np.abs(noise(random, size, 0.022)) + 0.6 * np.abs(noise(random, size, 0.035))
    creases = np.clip(1 - 2.2 * pebbles, 0, 1)
    relief = cv2.GaussianBlur(creases, (0, 0), size / 250)
    slope = cv2.Sobel(relief, cv2.CV_32F, 1, 1)
    light = 0.85 - 0.35 * relief + 1.2 * slope + 0.03 * fractal(random, size, 0.4)
    return shaded(colour(0.56, 0.3, 0.2), light), np.ones((size, size), np.float32)


def _backdrop(random: np.random.Generator, size: int, base: Array) -> Array:
    x, y = grid(size)
    fall = 1 - 0.12 * (x + y) - 0.25 * (x * x + y * y)
    return shaded(base, fall + 0.012 * noise(random, size, 0.02))


def washer(random: np.random.Generator, size: int) -> tuple[Array, Array]:
    """A turned brass ring at any angle, see `Product`."""
    x, y = grid(size, random.uniform(0, 2 * np.pi), tuple(random.normal(0, 0.012, 2)))
    radius, angle = np.hypot(x, y), np.arctan2(y, x)
    body = edge(np.maximum(radius - 0.38, 0.17 - radius))
    bevel = np.exp(-(((radius - 0.36) / 0.012) ** 2)) - np.exp(-(((radius - 0.19) / 0.012) ** 2))
    turned = 0.06 * np.sin(2 * np.pi * 55 * radius) + 0.12 * np.cos(2 * angle + random.uniform(0, 0.3))
    light = 0.62 + turned + 0.2 * bevel * np.cos(angle - 0.8) + 0.03 * noise(random, size, 0.012)
    backdrop = _backdrop(random, size, colour(0.13, 0.14, 0.17))
    return blend(backdrop, shaded(colour(0.95, 0.85, 0.62), light), body), body


def capsule(random: np.random.Generator, size: int) -> tuple[Array, Array]:
    """A two-coloured capsule with an imprint, see `Product`."""
    x, y = grid(size, random.normal(0, 0.06), tuple(random.normal(0, 0.012, 2)))
    distance = np.hypot(np.maximum(np.abs(x) - 0.2, 0), y) - 0.17
    body = edge(distance)
    across = np.clip(y / 0.17, -1, 1)
    roundness = np.sqrt(np.clip(1 - (across + 0.25) ** 2 / 1.6, 0, 1))
    light = 0.55 + 0.5 * roundness + 0.02 * noise(random, size, 0.015)
    gloss = np.exp(-(((y + 0.09) / 0.02) ** 2)) * edge(np.abs(x) - 0.2, 0.03) * 0.35
    halves = np.where((x < 0)[..., None], colour(0.75, 0.16, 0.14), colour(0.93, 0.85, 0.62))
    seam = np.exp(-((x / 0.006) ** 2)) * 0.25
    picture = shaded(halves, light - seam) + gloss[..., None]
    for k in range(4):  # an imprint on the light half
        height = 0.05 if k % 2 else 0.03
        bar = edge(np.maximum(np.abs(x - 0.07 - 0.045 * k) - 0.008, np.abs(y) - height), 0.005)
        picture = blend(picture, colour(0.3, 0.25, 0.25), 0.8 * bar)
    shadow = 1 - 0.25 * edge(distance - 0.02, 0.05)
    return blend(shaded(_backdrop(random, size, colour(0.8, 0.82, 0.84)), shadow), picture, body), body


def gear(random: np.random.Generator, size: int) -> tuple[Array, Array]:
    """A wheel of 18 teeth with five holes around its bore, at any angle, see `Product`."""
    x, y = grid(size, random.uniform(0, 2 * np.pi), tuple(random.normal(0, 0.01, 2)))
    radius, angle = np.hypot(x, y), np.arctan2(y, x)
    teeth = 0.355 + 0.045 * np.clip(3 * np.cos(18 * angle), -1, 1)
    turns = np.arange(5) * 2 * np.pi / 5
    centres = [(0.21 * np.cos(turn), 0.21 * np.sin(turn)) for turn in turns]
    holes = np.minimum.reduce([np.hypot(x - cx, y - cy) - 0.06 for cx, cy in centres])
    body = edge(np.maximum.reduce([radius - teeth, 0.08 - radius, -holes]))
    ring = 0.08 * np.sign(np.sin(2 * np.pi * 6 * radius))
    light = 0.5 + ring * 0.6 + 0.03 * fractal(random, size, 0.06) + 0.1 * (0.5 - y)
    shadow = 1 - 0.3 * edge(radius - teeth - 0.01, 0.04)
    below = shaded(_backdrop(random, size, colour(0.62, 0.55, 0.44)), shadow)
    return blend(below, shaded(colour(0.66, 0.7, 0.76), light), body), body


def circuit(random: np.random.Generator, size: int) -> tuple[Array, Array]:
    """A circuit board, always of the same layout, see `Product`."""
    x, y = grid(size, random.normal(0, 0.012), tuple(random.normal(0, 0.01, 2)))
    board = shaded(colour(0.07, 0.34, 0.2), 0.95 + 0.04 * fractal(random, size, 0.1))
    layout = np.random.default_rng(7)  # the same board in every image
    for _ in range(16):
        a, b = layout.uniform(-0.42, 0.42, 2)
        length = layout.uniform(0.12, 0.4)
        u, v = (x, y) if layout.random() < 0.5 else (y, x)
        trace = edge(np.maximum(np.abs(u - a) - length / 2, np.abs(v - b) - 0.008), 0.004)
        copper = shaded(colour(0.62, 0.7, 0.34), 0.9 + 0.05 * noise(random, size, 0.02))
        board = blend(board, copper, 0.85 * trace)
        for end in (a - length / 2, a + length / 2):
            pad = edge(np.hypot(u - end, v - b) - 0.02, 0.004)
            board = blend(board, colour(0.85, 0.75, 0.45), pad)
            board = blend(board, colour(0.1, 0.1, 0.1), edge(np.hypot(u - end, v - b) - 0.008, 0.004))
    for cx, cy, w, h in ((-0.2, -0.2, 0.13, 0.09), (0.2, 0.14, 0.1, 0.13), (0.23, -0.25, 0.06, 0.06)):
        row = edge(np.maximum(np.abs(x - cx) - w - 0.025, np.abs(y - cy) - h + 0.01), 0.004)
        board = blend(board, colour(0.75, 0.76, 0.78), row * (np.sin(2 * np.pi * 24 * (y - cy)) > 0))
        chip = edge(np.maximum(np.abs(x - cx) - w, np.abs(y - cy) - h), 0.004)
        board = blend(board, shaded(colour(0.12, 0.12, 0.13), 1 + 0.1 * noise(random, size, 0.01)), chip)
    return board, edge(np.maximum(np.abs(x), np.abs(y)) - 0.47)


def bottle_top(random: np.random.Generator, size: int) -> tuple[Array, Array]:
    """The mouth of a green bottle from above, at any angle, see `Product`."""
    x, y = grid(size, random.uniform(0, 2 * np.pi), tuple(random.normal(0, 0.012, 2)))
    radius, angle = np.hypot(x, y), np.arctan2(y, x)
    body = edge(radius - 0.4)
    rim = np.exp(-(((radius - 0.33) / 0.02) ** 2)) + 0.7 * np.exp(-(((radius - 0.24) / 0.015) ** 2))
    light = 0.28 + 0.45 * rim * (0.8 + 0.2 * np.cos(3 * angle)) + 0.05 * fractal(random, size, 0.12)
    glass = shaded(colour(0.5, 0.75, 0.42), light)
    mouth = edge(radius - 0.21, 0.01)
    glass = blend(glass, shaded(colour(0.1, 0.13, 0.08), 1 + 0.1 * noise(random, size, 0.1)), mouth)
    return blend(_backdrop(random, size, colour(0.93, 0.93, 0.94)), glass, body), body


PRODUCTS: dict[str, Product] = {
    "bottle_top": bottle_top,
    "capsule": capsule,
    "circuit": circuit,
    "fabric": fabric,
    "gear": gear,
    "leather": leather,
    "metal": metal,
    "tiles": tiles,
    "washer": washer,
    "wood": wood,
}
