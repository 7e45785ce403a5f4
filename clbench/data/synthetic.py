"""The synthetic stream: ten procedural products with realistic defects, drawn on the fly.

`clbench data synthetic FOLDER` writes it to disk in the MVTec AD layout.
"""

import difflib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import cv2
import numpy as np
from annotated_types import Ge
from pydantic import NonNegativeInt, PositiveInt

from clbench.data.procedural import PRODUCTS, Array, blend, edge, fractal, grid, noise
from clbench.data.samples import GOOD, Dataset, Sample, Split
from clbench.errors import UserError
from clbench.randomness import seed_for

VERSION = 1  # raise it when the same arguments draw other pictures: the cache must not serve the old ones

VISIBLE = 10  # grey levels: a pixel that a defect changes by less is not in its mask
PLAIN = 25  # grey levels: the least mean change within a mask, so that a person sees the defect
LEAST_SIZE = 32  # pixels of a picture's side
LEAST_AREA, MOST_AREA = 0.004, 0.12  # share of the picture that a mask covers


@dataclass(frozen=True)
class Drawn(Sample):
    """A picture of the synthetic stream: its fields say which."""

    seed: int
    size: int
    category: str
    split: Split
    kind: str
    index: int

    @property
    def name(self) -> str:  # type: ignore[override]
        return f"{self.category}/{self.split}/{self.kind}/{self.index:03d}"

    @property
    def identity(self) -> str:  # type: ignore[override]
        return f"synthetic {VERSION} {self.seed} {self.size} {self.name}"

    def read(self) -> tuple[Array, Array | None]:
        picture, region, grain = self._product()
        twin = _to_pixels(picture, grain)
        if self.kind == GOOD:
            return twin, None
        for attempt in range(100):
            random = self._random("defect", attempt)
            image = _to_pixels(DEFECTS[self.kind](random, picture, region), grain)
            difference = np.abs(image.astype(np.int16) - twin).max(2)
            mask = difference >= VISIBLE
            if LEAST_AREA <= mask.mean() <= MOST_AREA and difference[mask].mean() >= PLAIN:
                return image, mask
        raise AssertionError(f"{self.name} shows no defect")  # never, says a test over many seeds

    def without_defect(self) -> Array:
        """The same picture without its defect, uint8 [S, S, 3] RGB."""
        picture, _, grain = self._product()
        return _to_pixels(picture, grain)

    def _product(self) -> tuple[Array, Array, Array]:
        random = self._random("product")
        picture, region = PRODUCTS[self.category](random, self.size)
        light = random.normal(1, 0.02) + 0.02 * noise(random, self.size, 0.8)
        tint = random.normal(1, 0.008, 3).astype(np.float32)
        grain = 0.008 * random.standard_normal(picture.shape).astype(np.float32)
        return (picture * light[..., None] * tint).astype(np.float32), region, grain

    def _random(self, *purpose: str | int) -> np.random.Generator:
        return np.random.default_rng(
            seed_for(self.seed, "synthetic", self.category, self.split, self.kind, self.index, *purpose)
        )


def _to_pixels(picture: Array, grain: Array) -> Array:
    return (255 * np.clip(picture + grain, 0, 1) + 0.5).astype(np.uint8)


def _spot(random: np.random.Generator, region: Array, margin: float = 0.08) -> tuple[float, float]:
    """A random place (x, y) on the product, in fractions of the side from the middle.

    It keeps a quarter of `margin` from the product's outline and 0.08 from the picture's border, where the
    product is large enough.
    """
    size = len(region)
    inner = cv2.erode((region > 0.5).astype(np.uint8), np.ones((max(1, round(margin * size / 2)),) * 2))
    border = max(1, round(0.08 * size))
    inner[:border] = inner[-border:] = inner[:, :border] = inner[:, -border:] = 0
    rows, columns = np.nonzero(inner if inner.any() else region > 0.5)
    pick = random.integers(len(rows))
    return columns[pick] / size - 0.5, rows[pick] / size - 0.5


def _blot(random: np.random.Generator, region: Array, low: float, high: float, rough: float = 0.35) -> Array:
    """An irregular patch at a random place on the region: alpha [S, S], with a radius of `low` to `high`."""
    size = len(region)
    x, y = grid(size, random.uniform(0, np.pi), _spot(random, region))
    radius = random.uniform(low, high)
    outline = 1 + rough * fractal(random, size, 0.12, 3)
    return edge(np.hypot(x, y * random.uniform(1, 1.8)) - radius * np.clip(outline, 0.3, 2), 0.008)


def _stroke(random: np.random.Generator, region: Array, length: float, width: float, wander: float) -> Array:
    """A curved stroke at a random place on the region: alpha [S, S]."""
    size = len(region)
    x, y = grid(size, random.uniform(0, np.pi), _spot(random, region))
    path = wander * np.sin(2 * np.pi * (x * random.uniform(1, 3) + random.random()))
    path = path + 0.006 * noise(random, size, 0.05)
    taper = np.clip(1 - np.abs(x) / (length / 2), 0, 1) ** 0.4
    return edge(np.abs(y - path) - width * taper, 0.004) * (np.abs(x) < length / 2)


# (random, picture [S, S, 3], region [S, S] that is 1 on the product) -> the picture [S, S, 3] with a defect.
Defect = Callable[[np.random.Generator, Array, Array], Array]


def scratch(random: np.random.Generator, picture: Array, region: Array) -> Array:
    """A bright or dark stroke, see `Defect`."""
    alpha = _stroke(random, region, random.uniform(0.15, 0.4), random.uniform(0.006, 0.011), 0.02) * region
    shift = random.choice([-1, 1]) * random.uniform(0.25, 0.45)
    return blend(picture, np.clip(picture.mean(2, keepdims=True) + shift, 0.02, 1), 0.75 * alpha)


def crack(random: np.random.Generator, picture: Array, region: Array) -> Array:
    """A dark, branching stroke, see `Defect`."""
    alpha = _stroke(random, region, random.uniform(0.2, 0.4), random.uniform(0.006, 0.01), 0.035)
    branch = _stroke(random, np.where(alpha > 0.3, 1, 0), 0.18, 0.007, 0.03)
    return blend(picture, 0.25 * picture, 0.9 * np.maximum(alpha, branch) * region)


def stain(random: np.random.Generator, picture: Array, region: Array) -> Array:
    """A brown, translucent patch, see `Defect`."""
    alpha = _blot(random, region, 0.035, 0.1, 0.45) * region
    tone = random.uniform(0, 0.5) * np.array([1, 0.8, 0.55], np.float32)
    return blend(picture, picture * 0.45 + 0.4 * tone, random.uniform(0.55, 0.9) * alpha)


def discolouration(random: np.random.Generator, picture: Array, region: Array) -> Array:
    """A blurred patch of another colour, see `Defect`."""
    alpha = cv2.GaussianBlur(_blot(random, region, 0.06, 0.12), (0, 0), len(region) / 90) * region
    shift = (random.choice([-1, 1], 3) * random.uniform(0.12, 0.3, 3)).astype(np.float32)
    return blend(picture, picture * (1 + shift) + 0.25 * shift, alpha)


def hole(random: np.random.Generator, picture: Array, region: Array) -> Array:
    """A small dark patch with a bright rim, see `Defect`."""
    alpha = _blot(random, region, 0.02, 0.045, 0.25) * region
    rim = np.clip(cv2.GaussianBlur(alpha, (0, 0), len(region) / 80) - alpha, 0, 1)
    depth = 0.06 + 0.04 * noise(random, len(region), 0.03)[..., None]
    return blend(picture * (1 + 0.5 * rim[..., None]), np.clip(depth, 0, 1), alpha)


def thread(random: np.random.Generator, picture: Array, region: Array) -> Array:
    """A coloured thread on the product, with its shadow, see `Defect`."""
    alpha = _stroke(random, region, random.uniform(0.25, 0.45), random.uniform(0.007, 0.011), 0.05)
    hue = np.clip(random.uniform(0.1, 0.9) + random.uniform(-0.15, 0.15, 3), 0.02, 1).astype(np.float32)
    shadow = np.roll(alpha, len(alpha) // 80, axis=(0, 1))
    return blend(picture * (1 - 0.4 * shadow[..., None]), hue, 0.9 * alpha)


def contamination(random: np.random.Generator, picture: Array, region: Array) -> Array:
    """A cluster of dark or bright grains, see `Defect`."""
    size = len(region)
    alpha = np.zeros((size, size), np.float32)
    around = _blot(random, region, 0.06, 0.1)
    for _ in range(random.integers(3, 8)):
        alpha = np.maximum(alpha, _blot(random, np.where(around > 0.5, 1, 0), 0.008, 0.022, 0.3))
    grey, grain = random.choice([0.08, 0.9]), 0.15 * fractal(random, size, 0.03, 2)
    hue = grey + grain[..., None] * np.ones(3, np.float32)
    return blend(picture, np.clip(hue, 0, 1), 0.9 * alpha)


def deformation(random: np.random.Generator, picture: Array, region: Array) -> Array:
    """A dent or bulge that bends the pattern and changes its shading, see `Defect`."""
    size = len(region)
    x, y = grid(size, 0, _spot(random, region))
    radius = random.uniform(0.07, 0.13)
    pull = np.exp(-(x * x + y * y) / (2 * (radius / 2) ** 2)) * random.uniform(0.035, 0.06) * size
    angle = random.uniform(0, 2 * np.pi)
    rows, columns = np.mgrid[:size, :size].astype(np.float32)
    moved = (
        (columns + np.cos(angle) * pull).astype(np.float32),
        (rows + np.sin(angle) * pull).astype(np.float32),
    )
    bent = cv2.remap(picture, *moved, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REFLECT)
    slope = (np.cos(angle) * x + np.sin(angle) * y) / radius * pull / pull.max()
    return bent * (1 + 1.1 * slope)[..., None]  # a bulge has a lit and a dark side


def missing_part(random: np.random.Generator, picture: Array, region: Array) -> Array:
    """A piece broken off at the outline, with a bright fracture, see `Defect`: the backdrop shows instead."""
    outline = cv2.morphologyEx((region > 0.5).astype(np.uint8), cv2.MORPH_GRADIENT, np.ones((5, 5)))
    alpha = _blot(random, outline, 0.05, 0.1, 0.2)
    backdrop = np.median(picture[region < 0.05].reshape(-1, 3), axis=0) if (region < 0.05).any() else 0.1
    fracture = cv2.dilate(alpha, np.ones((3, 3)), iterations=max(1, len(region) // 100)) * region
    broken = blend(picture, 0.5 * picture + random.uniform(0.35, 0.45), fracture)
    return blend(broken, np.asarray(backdrop, np.float32), alpha * region)


DEFECTS: dict[str, Defect] = {
    "contamination": contamination,
    "crack": crack,
    "deformation": deformation,
    "discolouration": discolouration,
    "hole": hole,
    "missing_part": missing_part,
    "scratch": scratch,
    "stain": stain,
    "thread": thread,
}

KINDS = {
    "bottle_top": ("contamination", "crack", "missing_part"),
    "capsule": ("crack", "deformation", "discolouration", "scratch"),
    "circuit": ("contamination", "discolouration", "scratch", "thread"),
    "fabric": ("deformation", "hole", "stain", "thread"),
    "gear": ("contamination", "crack", "missing_part", "stain"),
    "leather": ("crack", "discolouration", "hole", "thread"),
    "metal": ("contamination", "deformation", "scratch", "stain"),
    "tiles": ("contamination", "crack", "hole", "stain"),
    "washer": ("crack", "deformation", "scratch", "stain"),
    "wood": ("contamination", "hole", "scratch", "stain"),
}


class Synthetic(Dataset):
    """Ten procedural categories, textures and objects, each with three or four kinds of defect.

    Args:
        seed: another seed draws other pictures of the same products.
        size: pixels of both sides.
        train: number of normal training images of each category.
        test_good, test_defect: numbers of test images of each category without and with a defect, whose kinds
            take turns.
        categories: those to use, in this order; None takes all ten, sorted.

    Raises:
        UserError: a category is unknown, or there are no test images.
    """

    name = "synthetic"

    def __init__(
        self,
        *,
        seed: int = 0,
        size: Annotated[int, Ge(LEAST_SIZE)] = 256,
        train: PositiveInt = 40,
        test_good: NonNegativeInt = 12,
        test_defect: NonNegativeInt = 20,
        categories: list[str] | None = None,
    ):
        self.categories = sorted(PRODUCTS) if categories is None else list(categories)
        for category in self.categories:
            self._check(category)
        if not test_good + test_defect:
            raise UserError("dataset.test_good=0 and dataset.test_defect=0 leave nothing to test on")
        self._seed, self._size = seed, size
        self._train, self._test_good, self._test_defect = train, test_good, test_defect

    def samples(self, category: str, split: Split) -> list[Sample]:
        self._check(category)
        good = self._train if split == "train" else self._test_good
        wanted = [(GOOD, index) for index in range(good)]
        if split == "test":
            kinds = KINDS[category]
            wanted += sorted((kinds[i % len(kinds)], i // len(kinds)) for i in range(self._test_defect))
        return [Drawn(self._seed, self._size, category, split, kind, index) for kind, index in wanted]

    @staticmethod
    def _check(category: str) -> None:
        if category not in PRODUCTS:
            nearest = difflib.get_close_matches(category, PRODUCTS, n=1, cutoff=0.5)
            hint = f"nearest: {nearest[0]}; " if nearest else ""
            raise UserError(
                f"dataset=synthetic has no category '{category}'; {hint}found: {', '.join(PRODUCTS)}"
            )


def write_folder(dataset: Synthetic, directory: Path) -> None:
    """Write a dataset's images and masks as PNG files into `directory`, in the MVTec AD layout.

    Raises:
        UserError: the directory holds something already, or cannot be written.
    """
    from rich.progress import track

    if directory.exists() and any(directory.iterdir()):
        raise UserError(f"{directory} is not empty: give a new directory")
    samples = [
        sample
        for name in dataset.categories
        for split in ("train", "test")
        for sample in dataset.samples(name, split)
    ]
    for sample in track(samples, "drawing"):
        assert isinstance(sample, Drawn)
        image, mask = sample.read()
        folder = directory / sample.category
        path = folder / sample.split / sample.kind / f"{sample.index:03d}.png"
        _save(path, cv2.cvtColor(image, cv2.COLOR_RGB2BGR))
        if mask is not None:
            path = folder / "ground_truth" / sample.kind / f"{sample.index:03d}_mask.png"
            _save(path, 255 * mask.astype(np.uint8))


def _save(path: Path, picture: Array) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(cv2.imencode(".png", picture)[1].tobytes())
