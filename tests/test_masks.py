"""What a mask marks, whatever it was saved as: held against the drawing that it was made from."""

from pathlib import Path

import cv2
import numpy as np
import pytest
from conftest import Train, clbench, make_category
from PIL import Image

from clbench.data.files import read_mask
from clbench.data.mvtec import MVTec
from clbench.errors import UserError

SIDES = (64, 256, 1024)


def scratch(side: int, seed: int = 0, value: int = 255, width: int = 1, line: int = cv2.LINE_8) -> np.ndarray:
    """A thin defect, uint8 [S, S]."""
    mask = np.zeros((side, side), np.uint8)
    points = np.random.default_rng(seed).integers(6, side - 6, (4, 1, 2)).astype(np.int32)
    return cv2.polylines(mask, [points], False, value, width, line)


def blot(side: int, seed: int = 0, value: int = 255) -> np.ndarray:
    """A round defect, uint8 [S, S]."""
    x, y, radius = np.random.default_rng(seed).integers((side // 4, side // 4, side // 16), side // 2)
    return cv2.circle(np.zeros((side, side), np.uint8), (int(x), int(y)), int(radius) // 3 + 3, value, -1)


def as_png(mask: np.ndarray, path: Path) -> Path:
    assert cv2.imwrite(str(path), mask)
    return path


def as_jpeg(mask: np.ndarray, path: Path, quality: int = 75) -> Path:
    assert cv2.imwrite(str(path.with_suffix(".jpg")), mask, [cv2.IMWRITE_JPEG_QUALITY, quality])
    return path.with_suffix(".jpg")


def as_png_of_a_jpeg(mask: np.ndarray, path: Path, quality: int = 75) -> Path:
    return as_png(cv2.imread(str(as_jpeg(mask, path, quality)), cv2.IMREAD_GRAYSCALE), path)


def as_webp(mask: np.ndarray, path: Path, quality: int = 75) -> Path:
    Image.fromarray(mask).save(path.with_suffix(".webp"), quality=quality)
    return path.with_suffix(".webp")


def regions(mask: np.ndarray) -> int:
    return cv2.connectedComponents(mask.astype(np.uint8))[0] - 1


def off_by_more_than_a_pixel(mask: np.ndarray, truth: np.ndarray) -> int:
    """How many pixels are marked more than a pixel from the truth, or are not marked although the truth is."""
    wide = np.ones((3, 3), np.uint8)
    near, found = (cv2.dilate(each.astype(np.uint8), wide) > 0 for each in (truth, mask))
    return int((mask & ~near).sum() + (truth & ~found).sum())


# Lossy formats


@pytest.mark.parametrize("save", [as_jpeg, as_png_of_a_jpeg, as_webp])
@pytest.mark.parametrize("quality", [60, 75, 95, 100])
def test_a_lossy_mask_is_the_lossless_one(tmp_path: Path, save, quality: int) -> None:
    for side in SIDES:
        for truth in (scratch(side) > 0, blot(side) > 0, (scratch(side, 1) > 0) | (blot(side, 1) > 0)):
            mask = read_mask(save(255 * truth.astype(np.uint8), tmp_path / "a.png", quality))
            assert regions(mask) == regions(truth)
            np.testing.assert_array_equal(mask, truth)


def test_a_mask_in_colour_is_lossy_in_its_colours_too(tmp_path: Path) -> None:
    truth = blot(256) > 0
    Image.fromarray(truth[..., None] * np.array((255, 30, 0), np.uint8)).save(tmp_path / "a.jpg", quality=90)
    mask = read_mask(tmp_path / "a.jpg")
    assert off_by_more_than_a_pixel(mask, truth) == 0 and (mask ^ truth).sum() < 0.02 * truth.sum()


# Smooth edges


@pytest.mark.parametrize("side", SIDES)
def test_smooth_edges_are_where_they_were_drawn(tmp_path: Path, side: int) -> None:
    path = tmp_path / "a.png"
    for width in (1, 3):
        smooth = scratch(side, width=width, line=cv2.LINE_AA)
        assert len(np.unique(smooth)) > 16
        mask = read_mask(as_png(smooth, path))
        assert off_by_more_than_a_pixel(mask, scratch(side, width=width) > 0) == 0
        assert mask.sum() < 0.85 * np.count_nonzero(smooth)  # where every positive value marked, it grew
    blurred = read_mask(as_png(cv2.GaussianBlur(blot(side), (0, 0), 1), path))
    assert off_by_more_than_a_pixel(blurred, blot(side) > 0) == 0
    deep = cv2.GaussianBlur(blot(side).astype(np.uint16) * 257, (0, 0), 1)
    np.testing.assert_array_equal(read_mask(as_png(deep, path)), blurred)


@pytest.mark.parametrize("factor", [2, 3, 4, 8])
def test_a_mask_enlarged_with_smooth_edges_is_the_one_enlarged_without(tmp_path: Path, factor: int) -> None:
    for small in (blot(64), cv2.rectangle(np.zeros((64, 64), np.uint8), (20, 30), (33, 50), 255, -1)):
        large = cv2.resize(small, None, fx=factor, fy=factor, interpolation=cv2.INTER_LINEAR)
        truth = small.repeat(factor, 0).repeat(factor, 1) > 0
        mask = read_mask(as_png(large, tmp_path / "a.png"))
        assert off_by_more_than_a_pixel(mask, truth) <= (
            0 if factor < 8 else 0.01 * truth.sum()
        )  # round corners


# Few values


def labelled(*parts: np.ndarray) -> np.ndarray:
    """Several drawings with a value each, the later ones on top."""
    mask = np.zeros_like(parts[0])
    for part in parts:
        mask[part > 0] = part[part > 0]
    return mask


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("kind", ["scratches", "blots", "faint beside bright", "many", "16 bits", "outline"])
def test_every_label_marks(tmp_path: Path, side: int, kind: str) -> None:
    step = side // 16
    grid = np.kron(np.arange(1, 257).reshape(16, 16) * np.eye(16, dtype=int), np.ones((step, step), int))
    masks = {
        "scratches": labelled(*(scratch(side, value, value) for value in (1, 2, 3))),
        "blots": labelled(*(blot(side, value, value) for value in (9, 5, 2, 1))),
        "faint beside bright": labelled(scratch(side, 0, 1), blot(side, 1)),
        "many": (grid // 17 + (grid > 0)).astype(np.uint8),
        "16 bits": labelled(scratch(side, 0, 1), blot(side, 1)).astype(np.uint16) * 257 // 200,
        "outline": labelled(blot(side, 0, 1), cv2.erode(blot(side, 0, 5), np.ones((3, 3)))),
    }
    mask = masks[kind]
    np.testing.assert_array_equal(read_mask(as_png(mask, tmp_path / "a.png")), mask > 0)


def test_masks_of_published_datasets_are_read_as_before(tmp_path: Path) -> None:
    """MVTec LOCO's 0 and 253 to 255, VisA's labels of kinds, 0/1, 0/128/255, colours, one bit, a palette."""
    at = scratch(64)
    for mask in (
        np.where(at > 0, 253 + np.arange(64) % 3, 0).astype(np.uint8),
        labelled(scratch(64, 0, 3), scratch(64, 1, 7)),
        at // 255,
        labelled(blot(64, 0, 128), scratch(64, 1)),
        np.dstack([0 * at, scratch(64, 1, 128), at]),
    ):
        expected = mask.max(axis=2) > 0 if mask.ndim == 3 else mask > 0
        np.testing.assert_array_equal(read_mask(as_png(mask, tmp_path / "a.png")), expected)
    palette = Image.fromarray(labelled(scratch(64, 0, 1), scratch(64, 1, 2)), "P")
    palette.putpalette([0, 0, 0, 0, 0, 60, 128, 0, 0])
    palette.save(tmp_path / "palette.png")
    Image.fromarray(np.asarray(palette) > 0).save(tmp_path / "bit.png")
    for name in ("palette.png", "bit.png"):
        np.testing.assert_array_equal(read_mask(tmp_path / name), np.asarray(palette) > 0)
    overlay = np.dstack(
        [at, 0 * at, 0 * at, at // 2]
    )  # half transparent red on nothing: the colour tells too
    Image.fromarray(overlay).save(tmp_path / "overlay.png")
    np.testing.assert_array_equal(read_mask(tmp_path / "overlay.png"), at > 0)


# What cannot be told


def heat_map(side: int) -> np.ndarray:
    y, x = np.mgrid[:side, :side] - side / 2
    return (255 * np.exp(-(x**2 + y**2) / (2 * (side / 8) ** 2))).astype(np.uint8)


def photograph(side: int) -> np.ndarray:
    random = np.random.default_rng(0)
    scene = cv2.resize(random.uniform(50, 200, (5, 5)), (side, side), interpolation=cv2.INTER_CUBIC)
    return np.clip(scene + random.normal(0, 5, scene.shape), 0, 255).astype(np.uint8)


@pytest.mark.parametrize("save", [as_png, as_jpeg])
@pytest.mark.parametrize("side", SIDES)
def test_grey_levels_in_no_order_are_refused(tmp_path: Path, save, side: int) -> None:
    gradient = np.tile(np.linspace(0, 255, side).astype(np.uint8), (side, 1))
    noise = np.random.default_rng(0).integers(0, 256, (side, side), dtype=np.uint8)
    for mask in (heat_map(side), photograph(side), gradient, noise):
        with pytest.raises(
            UserError, match=r"mask \S*/a\.\w+ has grey levels that are neither .*save it as PNG"
        ):
            read_mask(save(mask, tmp_path / "a.png"))


@pytest.mark.parametrize("side", SIDES)
def test_labels_in_a_lossy_file_are_refused(tmp_path: Path, side: int) -> None:
    for mask in (
        labelled(*(blot(side, value, value) for value in (85, 170, 255))),
        labelled(scratch(side, 0, 90, 2), blot(side, 3)),
    ):
        with pytest.raises(UserError, match=r"a.jpg has grey levels that are neither"):
            read_mask(as_jpeg(mask, tmp_path / "a.png"))
    with pytest.raises(UserError, match=r"a.jpg has values from 0 to \d+ in a lossy format.*save it as PNG"):
        read_mask(as_jpeg(labelled(blot(side, 0, 1), blot(side, 1, 9)), tmp_path / "a.png", 90))


def test_a_meaning_in_alpha_alone_is_refused(tmp_path: Path) -> None:
    mask, white = blot(64), np.full((64, 64), 255, np.uint8)
    palette = Image.fromarray(mask // 255, "P")
    palette.putpalette([0, 0, 0, 0, 0, 0])
    for image, how in (
        (Image.fromarray(np.dstack([white, white, white, mask])), {}),
        (Image.fromarray(np.dstack([white, mask]), "LA"), {}),
        (Image.fromarray(np.dstack([0 * mask] * 3 + [255 - mask])), {}),
        (palette, {"transparency": 0}),
    ):
        image.save(tmp_path / "a.png", **how)
        with pytest.raises(UserError, match="a.png has a meaning in its alpha channel alone.*without alpha"):
            read_mask(tmp_path / "a.png")


def test_of_a_few_pixels_every_positive_one_marks(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 9, (16, 16), dtype=np.uint8) * 28
    np.testing.assert_array_equal(read_mask(as_png(noise, tmp_path / "a.png")), noise > 0)


def test_a_mask_without_black_is_refused_unless_it_is_white_all_over(tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match="a.png has no black, the lowest of its values is 1: give the background 0"
    ):
        read_mask(as_png(1 + blot(64) // 255, tmp_path / "a.png"))
    assert read_mask(as_png(np.full((9, 9), 255, np.uint8), tmp_path / "a.png")).all()


# Runs and checks


def test_a_run_and_a_check_say_the_same_of_a_mask(train: Train, tmp_path: Path) -> None:
    root = tmp_path / "data"
    make_category(root / "brick", np.random.default_rng(0))
    exact = [sample.read()[1] for sample in MVTec(str(root)).samples("brick", "test")]
    for path in (root / "brick/ground_truth/blot").iterdir():
        as_jpeg(cv2.imread(str(path), cv2.IMREAD_GRAYSCALE), path, 60)
        path.unlink()
    lossy = [sample.read()[1] for sample in MVTec(str(root)).samples("brick", "test")]
    for one, other in zip(exact, lossy, strict=True):
        np.testing.assert_array_equal(one, other)
    assert clbench("data", "check", str(root)).returncode == 0

    heat = as_jpeg(heat_map(48), root / "brick/ground_truth/blot/001_mask.png")
    with pytest.raises(UserError) as error:
        read_mask(heat)
    checked, run = clbench("data", "check", str(root)), train(f"dataset.root={root}")
    assert checked.returncode == 1 and f"wrong: {error.value}\n" in checked.stdout
    assert run.returncode != 0 and run.stderr == f"error: {error.value}\n"
