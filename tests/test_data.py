"""Files, folders and the cache: what is read, and what is refused."""

import errno
import fcntl
import os
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from PIL import Image

from clbench.data.cache import contents_of, load_cached
from clbench.data.doubts import doubts, nearly_all
from clbench.data.files import read_image, read_mask
from clbench.data.images import ImageSet
from clbench.data.mvtec import MVTec
from clbench.data.samples import GOOD, Geometry, Sample
from clbench.errors import UserError

REPOSITORY = Path(__file__).parent.parent
LOSSLESS = ["png", "bmp", "tiff", "webp"]
FORMATS = [*LOSSLESS, "jpg"]
WHOLE = Geometry(resize=None)


def noise(*shape: int, dtype: type = np.uint8, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, np.iinfo(dtype).max, shape, dtype, endpoint=True)


def write(path: Path, rgb: np.ndarray) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".webp":
        Image.fromarray(rgb).save(path, lossless=True)
    else:
        assert cv2.imwrite(str(path), rgb[..., ::-1] if rgb.ndim == 3 else rgb)
    return path


def write_mask(path: Path, height: int = 40, width: int = 40) -> Path:
    mask = np.zeros((height, width), np.uint8)
    mask[10:20, 5:15] = 255
    return write(path, mask)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Two categories, each with 3 training images, 2 good and 2 defect test images."""
    root = tmp_path / "data"
    for seed, category in enumerate(["cable", "bottle"]):
        for i in range(3):
            write(root / category / "train" / "good" / f"{i:03}.png", noise(40, 40, 3, seed=10 * seed + i))
        for i in range(2):
            write(root / category / "test" / "good" / f"{i:03}.png", noise(40, 40, 3, seed=10 * seed + i + 3))
            write(root / category / "test" / "cut" / f"{i:03}.png", noise(40, 40, 3, seed=10 * seed + i + 5))
            write_mask(root / category / "ground_truth" / "cut" / f"{i:03}_mask.png")
    return root


# Files


@pytest.mark.parametrize("suffix", LOSSLESS)
def test_lossless_files_give_their_rgb_pixels(tmp_path: Path, suffix: str) -> None:
    rgb = noise(30, 50, 3)
    np.testing.assert_array_equal(read_image(write(tmp_path / f"a.{suffix}", rgb)), rgb)


def test_a_jpeg_is_close_to_its_pixels_and_in_rgb_order(tmp_path: Path) -> None:
    rgb = np.full((16, 16, 3), (200, 100, 20), np.uint8)
    assert np.abs(read_image(write(tmp_path / "a.jpg", rgb)).astype(int) - rgb).max() <= 3


@pytest.mark.parametrize("suffix", ["png", "bmp", "tiff"])
def test_grey_becomes_three_equal_channels(tmp_path: Path, suffix: str) -> None:
    grey = noise(30, 50)
    image = read_image(write(tmp_path / f"a.{suffix}", grey))
    for channel in range(3):
        np.testing.assert_array_equal(image[..., channel], grey)


@pytest.mark.parametrize("suffix", ["png", "tiff"])
@pytest.mark.parametrize("shape", [(30, 50), (30, 50, 3)])
def test_16_bits_are_scaled_by_the_full_range(tmp_path: Path, suffix: str, shape: tuple[int, ...]) -> None:
    deep = noise(*shape, dtype=np.uint16)
    deep.flat[:3] = 0, 65535, 257 * 77
    expected = np.rint(deep / 257).astype(np.uint8)
    expected = expected if expected.ndim == 3 else np.repeat(expected[..., None], 3, axis=2)
    np.testing.assert_array_equal(
        WHOLE.eight_bits(read_image(write(tmp_path / f"a.{suffix}", deep))), expected
    )


def test_alpha_is_dropped(tmp_path: Path) -> None:
    rgba = noise(20, 30, 4)
    Image.fromarray(rgba).save(tmp_path / "a.png")
    np.testing.assert_array_equal(read_image(tmp_path / "a.png"), rgba[..., :3])


@pytest.mark.parametrize("format", ["PNG", "TIFF", "JPEG"])
def test_exif_orientation_is_applied(tmp_path: Path, format: str) -> None:
    upright = np.zeros((16, 32, 3), np.uint8)
    upright[:, :16] = 255
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: rotate by 90 degrees clockwise to see it upright
    Image.fromarray(upright).save(tmp_path / "a", format, exif=exif)
    np.testing.assert_array_equal(read_image(tmp_path / "a"), np.rot90(upright, -1))


@pytest.mark.parametrize("suffix", FORMATS)
@pytest.mark.parametrize("kept", [0.0, 0.01, 0.3, 0.6, 0.9, 0.99, -1])
def test_a_truncated_file_is_refused(tmp_path: Path, suffix: str, kept: float) -> None:
    path = write(tmp_path / f"a.{suffix}", noise(120, 160, 3))
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * kept)] if kept >= 0 else data[:-1])
    with pytest.raises(UserError, match=rf"a\.{suffix} is (truncated|empty).*copy it again"):
        read_image(path)


@pytest.mark.parametrize("depth", [np.uint8, np.uint16])
def test_a_truncated_tiff_whose_directory_comes_first_is_refused(tmp_path: Path, depth: type) -> None:
    path = tmp_path / "a.tiff"
    Image.fromarray(noise(120, 160, dtype=depth)).save(path, compression=None)
    assert read_image(path).shape == (120, 160, 3)
    data = path.read_bytes()
    for kept in (0.3, 0.6, 0.9, 0.99):
        path.write_bytes(data[: int(len(data) * kept)])
        with pytest.raises(UserError, match="truncated"):
            read_image(path)


def test_a_flipped_bit_in_a_png_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "a.png", noise(120, 160, 3))
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(UserError, match="corrupt"):
        read_image(path)


def test_what_has_no_8_bit_range_is_refused(tmp_path: Path) -> None:
    Image.fromarray(noise(20, 20).astype(np.float32)).save(tmp_path / "float.tiff")
    with pytest.raises(UserError, match="float.tiff has float pixels: convert it to 8- or 16-bit"):
        read_image(tmp_path / "float.tiff")
    cv2.imwrite(str(tmp_path / "rgb.tiff"), noise(20, 20, 3).astype(np.float32))
    with pytest.raises(UserError, match="rgb.tiff .*8 or 16 bits"):
        read_image(tmp_path / "rgb.tiff")
    Image.fromarray(noise(20, 20).astype(np.int32)).save(tmp_path / "int.tiff")
    with pytest.raises(UserError, match="int.tiff has signed or 32-bit pixels"):
        read_image(tmp_path / "int.tiff")


def test_16_bit_white_is_zero_is_refused_since_opencv_does_not_invert_it(tmp_path: Path) -> None:
    path = tmp_path / "a.tiff"
    Image.fromarray(noise(20, 20, dtype=np.uint16)).save(path, tiffinfo={262: 0}, compression=None)
    with pytest.raises(UserError, match="white-is-zero"):
        read_image(path)


def test_a_file_that_is_no_image_or_not_there_is_refused(tmp_path: Path) -> None:
    (tmp_path / "text.png").write_text("hello")
    with pytest.raises(UserError, match="text.png .*not a PNG, JPEG"):
        read_image(tmp_path / "text.png")
    with pytest.raises(UserError, match="nothing.png: No such file"):
        read_image(tmp_path / "nothing.png")
    with pytest.raises(UserError, match="Is a directory"):
        read_image(tmp_path)
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "link.png").symlink_to("pipe.png")
    for name in ("pipe.png", "link.png"):
        with pytest.raises(UserError, match=rf"{name} is .*no image \(a pipe, socket or device\): copy it"):
            read_image(tmp_path / name)


@pytest.mark.parametrize("value", [1, 255, 65535])
def test_any_positive_mask_value_is_defect(tmp_path: Path, value: int) -> None:
    mask = np.zeros((20, 30), np.uint16 if value > 255 else np.uint8)
    mask[3, 4] = value
    expected = mask > 0
    np.testing.assert_array_equal(read_mask(write(tmp_path / "a.png", mask)), expected)
    deep = mask.astype(np.uint16)  # 1 of 65535 is defect too
    np.testing.assert_array_equal(read_mask(write(tmp_path / "b.tiff", deep)), expected)


def test_a_mask_in_one_colour_or_one_bit_is_read(tmp_path: Path) -> None:
    rgb = np.zeros((20, 30, 3), np.uint8)
    rgb[5, 6, 2] = 1
    np.testing.assert_array_equal(read_mask(write(tmp_path / "a.png", rgb)), rgb.any(axis=2))
    Image.fromarray(rgb.any(axis=2)).save(tmp_path / "bit.png")
    np.testing.assert_array_equal(read_mask(tmp_path / "bit.png"), rgb.any(axis=2))


def test_a_mask_that_marks_nothing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="empty.png marks no pixel"):
        read_mask(write(tmp_path / "empty.png", np.zeros((20, 20), np.uint8)))


# Geometry


def test_shrinking_averages_and_enlarging_interpolates() -> None:
    image = noise(40, 40, 3)
    blocks = image.reshape(20, 2, 20, 2, 3).mean(axis=(1, 3))
    assert np.abs(Geometry(20).image(image) - blocks).max() <= 0.5
    ramp = np.repeat(np.arange(0, 200, 20, dtype=np.uint8)[None, :, None], 10, axis=0)
    steps = np.diff(Geometry(40).image(ramp)[0].astype(int).ravel())
    assert steps.min() >= 0 and steps.max() <= 5  # a straight line of 20 per 4 pixels, not steps of 20


def test_a_side_that_shrinks_is_averaged_even_where_the_other_grows() -> None:
    stripes = np.zeros((4, 64, 3), np.uint8)
    stripes[:, ::2] = 200
    np.testing.assert_array_equal(Geometry(16).image(stripes), np.full((16, 16, 3), 100))


def test_masks_take_the_nearest_pixel_and_stay_boolean() -> None:
    mask = noise(12, 18) > 127
    enlarged = Geometry(36).mask(mask)
    assert enlarged.dtype == bool
    np.testing.assert_array_equal(enlarged, mask.repeat(3, axis=0).repeat(2, axis=1))


def test_the_crop_is_central_and_the_same_for_image_and_mask() -> None:
    image = noise(256, 256, 3)
    geometry = Geometry(256, 224)
    np.testing.assert_array_equal(geometry.image(image), image[16:240, 16:240])
    np.testing.assert_array_equal(geometry.mask(image[..., 0] > 9), image[16:240, 16:240, 0] > 9)


def test_without_resize_the_file_keeps_its_size() -> None:
    image = noise(50, 70, 3)
    assert WHOLE.image(image) is image
    assert Geometry(None, 40).image(image).shape == (40, 40, 3)
    with pytest.raises(UserError, match="dataset.crop=60 is larger than an image of 70x50"):
        Geometry(None, 60).image(image)


@pytest.mark.parametrize(
    ("resize", "crop", "message"),
    [
        (256, 300, "dataset.crop=300 is larger than dataset.resize=256"),
        (0, None, "dataset.resize=0"),
        (256, -1, "dataset.crop=-1"),
    ],
)
def test_an_impossible_geometry_is_refused(resize: int, crop: int | None, message: str) -> None:
    with pytest.raises(UserError, match=message):
        Geometry(resize, crop)


# MVTec


def test_categories_and_samples_come_sorted_with_their_masks(root: Path) -> None:
    (root / ".hidden" / "train" / "good").mkdir(parents=True)
    (root / "notes").mkdir()
    (root / "bottle" / "train" / "good" / "readme.txt").write_text("not an image")
    (root / "bottle" / "train" / "good" / ".DS_Store.png").write_text("hidden")
    dataset = MVTec(root=str(root))
    assert dataset.categories == ["bottle", "cable"]
    assert [s.name for s in dataset.samples("bottle", "train")] == [
        f"bottle/train/good/00{i}.png" for i in range(3)
    ]
    test = dataset.samples("bottle", "test")
    assert [(s.name, s.kind) for s in test] == [
        ("bottle/test/cut/000.png", "cut"),
        ("bottle/test/cut/001.png", "cut"),
        ("bottle/test/good/000.png", GOOD),
        ("bottle/test/good/001.png", GOOD),
    ]
    image, mask = test[0].read()
    np.testing.assert_array_equal(image, noise(40, 40, 3, seed=15))
    assert mask is not None and mask.sum() == 100 and mask[10:20, 5:15].all()
    assert test[2].read()[1] is None


def test_categories_keep_the_order_asked_for(root: Path) -> None:
    assert MVTec(root=str(root), categories=["cable", "bottle"]).categories == ["cable", "bottle"]


def test_a_mask_may_have_the_plain_stem_and_another_format(root: Path) -> None:
    masks = root / "cable" / "ground_truth" / "cut"
    (masks / "000_mask.png").unlink()
    write_mask(masks / "000.bmp")
    sample = MVTec(root=str(root)).samples("cable", "test")[0]
    mask = sample.read()[1]
    assert mask is not None and mask.sum() == 100


def test_the_identity_changes_with_image_and_mask(root: Path) -> None:
    dataset = MVTec(root=str(root))
    before = [s.identity for s in dataset.samples("cable", "test")]
    assert before == [s.identity for s in dataset.samples("cable", "test")]
    os.utime(root / "cable" / "test" / "cut" / "000.png", ns=(0, 1))
    os.utime(root / "cable" / "ground_truth" / "cut" / "001_mask.png", ns=(0, 1))
    after = [s.identity for s in dataset.samples("cable", "test")]
    assert [a != b for a, b in zip(after, before, strict=True)] == [True, True, False, False]


def test_a_wrong_root_says_what_to_set(root: Path) -> None:
    with pytest.raises(UserError, match="nowhere does not exist: set dataset.root="):
        MVTec(root=str(root / "nowhere"))
    (root / "file").write_text("")
    with pytest.raises(UserError, match="file is not a folder: set dataset.root="):
        MVTec(root=str(root / "file"))
    with pytest.raises(UserError, match=f"it is a category itself: set dataset.root={root}$"):
        MVTec(root=str(root / "bottle"))
    with pytest.raises(UserError, match="has no category.*found: data; set dataset.root="):
        MVTec(root=str(root.parent))


def test_an_unknown_category_names_the_nearest_and_the_list(root: Path) -> None:
    message = rf"dataset.root={root} has no category 'botle' \(nearest: 'bottle'\); found: bottle, cable"
    with pytest.raises(UserError, match=message):
        MVTec(root=str(root), categories=["botle"])
    with pytest.raises(UserError, match="no category 'cable'.*found: bottle"):
        MVTec(root=str(root), categories=["bottle"]).samples("cable", "train")
    with pytest.raises(UserError, match="'cable' more than once"):
        MVTec(root=str(root), categories=["cable", "cable"])
    with pytest.raises(UserError, match=r"categories=\[\]"):
        MVTec(root=str(root), categories=[])


def test_incomplete_categories_are_refused_at_once(root: Path) -> None:
    (root / "cable" / "ground_truth" / "cut" / "001_mask.png").unlink()
    with pytest.raises(UserError, match="cut/001.png has no mask: expected .*ground_truth/cut/001_mask.png"):
        MVTec(root=str(root))
    for path in root.glob("cable/test/*/*"):
        path.unlink()
    with pytest.raises(UserError, match="cable/test has no images"):
        MVTec(root=str(root))
    for path in root.glob("bottle/train/good/*"):
        path.unlink()
    with pytest.raises(UserError, match="bottle/train/good has no images"):
        MVTec(root=str(root))


def test_a_link_that_leads_nowhere_is_a_gap(root: Path) -> None:
    mask = root / "cable" / "ground_truth" / "cut" / "000_mask.png"
    mask.unlink()
    mask.symlink_to("nowhere")
    with pytest.raises(UserError, match="cut/000_mask.png: No such file"):
        MVTec(root=str(root)).samples("cable", "test")
    gaps: list[UserError] = []
    names = [sample.name for sample in MVTec(root=str(root), gap=gaps.append).samples("cable", "test")]
    assert len(gaps) == 1 and names == [
        f"cable/test/{name}.png" for name in ("cut/001", "good/000", "good/001")
    ]


@pytest.mark.parametrize("folder", ["train/good", "test/cut", "ground_truth/cut"])
def test_two_files_of_one_stem_are_refused(root: Path, folder: str) -> None:
    path = min((root / "cable" / folder).iterdir())
    path.with_suffix(".BMP").write_bytes(b"")
    with pytest.raises(UserError, match=f"{path.stem}.* and {path.name} share a stem"):
        MVTec(root=str(root))


def test_a_mask_of_another_size_is_refused(root: Path) -> None:
    write_mask(root / "cable" / "ground_truth" / "cut" / "000_mask.png", 40, 41)
    with pytest.raises(UserError, match="000_mask.png is 41x40 but its image is 40x40"):
        MVTec(root=str(root)).samples("cable", "test")[0].read()


def test_the_dataset_needs_no_torch() -> None:
    code = "import sys, clbench.data.mvtec; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, check=True)


# Cache


def samples_of(root: Path, split: str = "test") -> list[Sample]:
    return MVTec(root=str(root)).samples("cable", split)  # type: ignore[arg-type]


def cached(directory: Path) -> list[Path]:
    return sorted(directory.glob("*.npy"))


def leftovers(directory: Path) -> list[Path]:
    return [path for path in directory.iterdir() if path.suffix == ".part"]


def assert_equal(actual: ImageSet, expected: ImageSet) -> None:
    assert torch.equal(actual.images, expected.images) and torch.equal(actual.masks, expected.masks)
    assert (actual.kinds, actual.names) == (expected.kinds, expected.names)


def test_the_cache_holds_what_the_files_hold(root: Path, tmp_path: Path) -> None:
    samples = samples_of(root)
    geometry = Geometry(30, 20)
    images = load_cached(samples, geometry, tmp_path / "a" / "cache")
    assert images.images.dtype == torch.uint8 and images.images.shape == (4, 3, 20, 20)
    assert images.masks.dtype == torch.bool and images.masks.shape == (4, 20, 20)
    assert images.kinds == ["cut", "cut", GOOD, GOOD] and images.labels.tolist() == [True, True, False, False]
    for i, sample in enumerate(samples):
        image, mask = sample.read()
        np.testing.assert_array_equal(images.images[i].permute(1, 2, 0), geometry.image(image))
        np.testing.assert_array_equal(
            images.masks[i], np.zeros((20, 20), bool) if mask is None else geometry.mask(mask)
        )


def test_images_are_decoded_once(root: Path, tmp_path: Path) -> None:
    decoded: list[int] = []
    first = load_cached(samples_of(root), WHOLE, tmp_path / "cache", decoded.append)
    assert sum(decoded) == 4
    assert_equal(load_cached(samples_of(root), WHOLE, tmp_path / "cache", decoded.append), first)
    assert sum(decoded) == 4


def test_a_changed_file_or_geometry_is_decoded_anew(root: Path, tmp_path: Path) -> None:
    load_cached(samples_of(root, "train"), WHOLE, tmp_path / "cache")
    changed = noise(40, 40, 3, seed=99)
    write(root / "cable" / "train" / "good" / "001.png", changed)
    images = load_cached(samples_of(root, "train"), WHOLE, tmp_path / "cache").images
    np.testing.assert_array_equal(images[1].permute(1, 2, 0), changed)
    assert load_cached(samples_of(root, "train"), Geometry(16), tmp_path / "cache").images.shape[-1] == 16


def test_writing_to_the_tensors_does_not_reach_the_cache(root: Path, tmp_path: Path) -> None:
    first = load_cached(samples_of(root), WHOLE, tmp_path / "cache")
    expected = first.images.clone()
    first.images.zero_()
    assert torch.equal(load_cached(samples_of(root), WHOLE, tmp_path / "cache").images, expected)


@pytest.mark.parametrize("which", [0, 1])
@pytest.mark.parametrize(
    "damage", ["truncated", "one byte short", "longer", "empty", "garbage", "header", "gone"]
)
def test_a_damaged_cache_file_is_rebuilt(root: Path, tmp_path: Path, which: int, damage: str) -> None:
    directory = tmp_path / "cache"
    expected = load_cached(samples_of(root), WHOLE, directory)
    expected = ImageSet(expected.images.clone(), expected.masks.clone(), expected.kinds, expected.names)
    path = cached(directory)[which]
    data = path.read_bytes()
    path.unlink()
    bad = {
        "truncated": data[:1000],
        "one byte short": data[:-1],
        "longer": data + b"x",
        "empty": b"",
        "garbage": b"\x80\x04" + data[2:],
        "header": data.replace(b"}", b" ", 1),
    }
    if damage in bad:
        path.write_bytes(bad[damage])
    decoded: list[int] = []
    assert_equal(load_cached(samples_of(root), WHOLE, directory, decoded.append), expected)
    assert sum(decoded) == 4 and cached(directory)[which].read_bytes() == data


def test_images_of_different_sizes_need_a_resize(root: Path, tmp_path: Path) -> None:
    write(root / "cable" / "train" / "good" / "002.png", noise(40, 44, 3))
    with pytest.raises(
        UserError, match=r"good/000.png is 40x40 but .*good/002.png is 44x40.*dataset.resize="
    ):
        load_cached(samples_of(root, "train"), WHOLE, tmp_path / "cache")
    assert not cached(tmp_path / "cache") and not leftovers(tmp_path / "cache")
    assert len(load_cached(samples_of(root, "train"), Geometry(32), tmp_path / "cache")) == 3


def test_an_unreadable_image_leaves_nothing_in_the_cache(root: Path, tmp_path: Path) -> None:
    (root / "cable" / "train" / "good" / "001.png").write_bytes(b"broken")
    with pytest.raises(UserError, match="001.png is truncated, corrupt or no image"):
        load_cached(samples_of(root, "train"), WHOLE, tmp_path / "cache")
    assert not cached(tmp_path / "cache") and not leftovers(tmp_path / "cache")


def test_sets_are_joined_in_order(root: Path, tmp_path: Path) -> None:
    train = load_cached(samples_of(root, "train"), WHOLE, tmp_path / "cache")
    test = load_cached(samples_of(root, "test"), WHOLE, tmp_path / "cache")
    both = ImageSet.concatenate([train, test])
    assert (
        len(both) == 7 and both.names == train.names + test.names and both.kinds == train.kinds + test.kinds
    )
    assert torch.equal(both.images[3:], test.images) and torch.equal(both.masks[:3], train.masks)
    assert ImageSet.concatenate([train]) is train
    small = load_cached(samples_of(root, "test"), Geometry(8), tmp_path / "cache")
    with pytest.raises(UserError, match=r"40x40 but .* is 8x8.*dataset.resize="):
        ImageSet.concatenate([train, small])


def test_a_fingerprint_changes_with_any_pixel_of_any_image_or_mask(tmp_path: Path) -> None:
    @dataclass
    class InMemory(Sample):
        number: int
        image: np.ndarray
        mask: np.ndarray
        kind = GOOD

        def __post_init__(self) -> None:
            self.name = f"{self.number:03d}"
            self.identity = f"{self.number} {self.image.tobytes().hex()} {self.mask.tobytes().hex()}"

        def read(self) -> tuple[np.ndarray, np.ndarray]:
            return self.image, self.mask

    def samples() -> list[Sample]:
        return [InMemory(i, np.full((2, 3, 3), i, np.uint8), np.zeros((2, 3), bool)) for i in range(20)]

    def fingerprint(given: list[Sample]) -> str:
        return contents_of(given, WHOLE, tmp_path).fingerprint(given)

    seen = {fingerprint(samples()), fingerprint(samples())}
    for number in range(20):
        for part in ("image", "mask"):
            changed = samples()
            array = getattr(changed[number], part).copy()
            array[1, 2] = 255
            changed[number] = InMemory(
                number, **{"image": changed[number].image, "mask": changed[number].mask, part: array}
            )  # type: ignore[attr-defined]
            seen.add(fingerprint(changed))
    assert len(seen) == 41
    fewer = samples()[:-1]
    renamed = samples()
    renamed[3].name = "other"
    assert len(seen | {fingerprint(fewer), fingerprint(renamed)}) == 43


def rewritten(path: Path, image: np.ndarray) -> None:
    """Replace a file as restoring an archive does: another content of the same size, at the same time of change."""
    before = path.stat()
    write(path, image)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert (path.stat().st_size, path.stat().st_mtime_ns) == (before.st_size, before.st_mtime_ns)


def replaced(path: Path, image: np.ndarray) -> None:
    """As `rewritten`, but by another file that is moved to its place."""
    before = path.stat()
    other = write(path.with_name(f"other{path.suffix}"), image)
    os.utime(other, ns=(before.st_atime_ns, before.st_mtime_ns))
    other.replace(path)


@pytest.mark.parametrize("restore", [rewritten, replaced])
@pytest.mark.parametrize("new", [True, False])
def test_the_cache_never_serves_other_images(
    tmp_path: Path, restore: Callable[[Path, np.ndarray], None], new: bool
) -> None:
    """Of the same path, size and time of change; whether the files are from just now or were there for long."""
    root = tmp_path / "data"
    paths = [root / "cable" / "train" / "good" / f"{number}.bmp" for number in range(3)]
    for path in [*paths, root / "cable" / "test" / "good" / "0.bmp"]:
        write(path, noise(8, 8, 3))
    if not new:
        for path in paths:
            os.utime(path, (0, 0))
        time.sleep(2.1)  # the longest step of a file system's clock
    before = load_cached(samples_of(root, "train"), WHOLE, tmp_path / "cache")
    changed = noise(8, 8, 3, seed=1)
    restore(paths[1], changed)
    images = load_cached(samples_of(root, "train"), WHOLE, tmp_path / "cache")
    np.testing.assert_array_equal(images.images[1].permute(1, 2, 0), changed)
    assert images.contents != before.contents
    restore(paths[1], noise(8, 8, 3))
    back = load_cached(samples_of(root, "train"), WHOLE, tmp_path / "cache")
    assert back.contents == before.contents and torch.equal(back.images, before.images)


def test_a_moved_dataset_is_not_decoded_again(root: Path, tmp_path: Path) -> None:
    decoded: list[int] = []
    first = load_cached(samples_of(root), WHOLE, tmp_path / "cache", decoded.append)
    moved = Path(shutil.copytree(root, tmp_path / "elsewhere"))
    again = load_cached(samples_of(moved), WHOLE, tmp_path / "cache", decoded.append)
    assert sum(decoded) == 4 and again.contents == first.contents
    assert torch.equal(again.images, first.images)


def test_a_pipe_among_images_is_refused_and_not_waited_for(root: Path, tmp_path: Path) -> None:
    pipe = root / "cable" / "train" / "good" / "001.png"
    pipe.unlink()
    os.mkfifo(pipe)
    with pytest.raises(UserError, match=r"001.png is .*a pipe, socket or device"):
        load_cached(samples_of(root, "train"), WHOLE, tmp_path / "cache")


def test_a_file_that_changes_while_it_is_read_is_refused(root: Path, tmp_path: Path) -> None:
    samples = samples_of(root, "train")
    write(root / "cable" / "train" / "good" / "001.png", noise(40, 40, 3, seed=99))
    with pytest.raises(UserError, match=r"001.png or its mask changed while it was read: start again"):
        load_cached(samples, WHOLE, tmp_path / "cache")
    assert len(load_cached(samples_of(root, "train"), WHOLE, tmp_path / "cache")) == 3


@pytest.mark.parametrize("bits", [10, 12, 14, 15, 16])
def test_white_of_a_camera_with_fewer_bits_is_white(tmp_path: Path, bits: int) -> None:
    scene = np.linspace(0, 1, 48).reshape(4, 4, 3)
    root = tmp_path / "data" / "cable"
    write(root / "train" / "good" / "0.png", np.rint(scene * (2**bits - 1)).astype(np.uint16))
    write(root / "test" / "good" / "0.png", np.rint(scene * 255).astype(np.uint8))
    samples = samples_of(root.parent, "train")
    found = load_cached(samples, Geometry(None, bit_depth=bits), tmp_path / "cache")
    assert found.contents and found.contents.peak == 2**bits - 1
    np.testing.assert_allclose(found.images[0].permute(1, 2, 0), scene * 255, atol=0.63)  # rounded twice
    assert contents_of(samples_of(root.parent, "test"), WHOLE, tmp_path / "cache").peak is None
    with pytest.raises(UserError, match=rf"0.png: dataset.bit_depth={bits - 1} ends at .*at least {bits}"):
        load_cached(samples, Geometry(None, bit_depth=bits - 1), tmp_path / "cache")


@pytest.mark.parametrize(
    ("peak", "bit_depth", "said"),
    [
        (1023, None, "dataset.bit_depth=10"),
        (700, None, "dataset.bit_depth=10"),
        (4095, None, "dataset.bit_depth=12"),
        (16383, None, "dataset.bit_depth=14"),
        (200, None, "dataset.bit_depth=8"),
        (16384, None, None),
        (65535, None, None),
        (4095, 12, None),
        (None, None, None),
    ],
)
def test_images_that_leave_their_range_empty_are_told_of(
    peak: int | None, bit_depth: int | None, said: str | None
) -> None:
    lines = doubts({"a": None, "b": peak}, {}, bit_depth)
    assert len(lines) == (said is not None)
    assert said is None or (lines[0].startswith("b: the largest value") and lines[0].endswith(f"set {said}"))


def test_one_category_of_the_full_range_silences_no_other() -> None:
    (line,) = doubts({"a": 65000, "b": 4000, "c": 3000, "d": None}, {}, None)
    assert line.startswith("b, c: the largest value of the 16-bit images is 4000 of 65535")


@pytest.mark.parametrize(
    ("inset", "value", "said"), [(0, 1, True), (2, 1, True), (8, 1, False), (0, 0, False)]
)
def test_masks_that_mark_nearly_all_are_doubtful(inset: int, value: int, said: bool) -> None:
    mask = np.full((40, 40), not value, bool)
    mask[inset : 40 - inset, inset : 40 - inset] = value
    assert nearly_all(mask) == said


def test_white_of_a_file_that_states_it_is_white_whatever_the_bit_depth(tmp_path: Path) -> None:
    pixels = np.linspace(0, 4095, 12).round().astype(">u2").reshape(3, 4)
    (tmp_path / "a.pgm").write_bytes(b"P5 4 3 4095\n" + pixels.tobytes())
    for bits in (None, 12):
        found = Geometry(None, bit_depth=bits).image(read_image(tmp_path / "a.pgm"))
        np.testing.assert_allclose(found[..., 0], pixels / 4095 * 255, atol=0.6)


def test_decoding_holds_few_images_at_a_time(tmp_path: Path) -> None:
    alive, most = 0, 0

    class Counted(Sample):
        kind = GOOD

        def __init__(self, i: int) -> None:
            self.name = self.identity = str(i)

        def read(self) -> tuple[np.ndarray, None]:
            nonlocal alive, most
            alive += 1
            most = max(most, alive)
            return np.full((8, 8, 3), int(self.name), np.uint8), None

    def written(decoded: int) -> None:
        nonlocal alive
        alive -= decoded
        time.sleep(0.001)  # a disk slower than the decoder

    images = load_cached([Counted(i) for i in range(200)], WHOLE, tmp_path, written)
    assert images.images[:, 0, 0, 0].tolist() == list(range(200))
    assert most <= 2 * min(8, os.cpu_count() or 1) + 2


# Each child process draws its images slowly, so that others meet it in the middle.
CHILD = """
import sys, time
from pathlib import Path
import numpy as np
from clbench.data.cache import load_cached
from clbench.data.samples import Geometry, Sample

class Slow(Sample):
    kind = "good"
    def __init__(self, i):
        self.name = self.identity = str(i)
    def read(self):
        time.sleep(0.03)
        return np.full((64, 64, 3), int(self.name), np.uint8), None

print("ready", flush=True)
sys.stdin.readline()
decoded = []
def progress(n):
    decoded.append(n)
    print("decoded", flush=True)
images = load_cached([Slow(i) for i in range(40)], Geometry(None), Path(sys.argv[1]), progress)
assert images.images[:, 0, 0, 0].tolist() == list(range(40))
print("total", sum(decoded), flush=True)
"""


def child(directory: Path) -> subprocess.Popen:
    process = subprocess.Popen(
        [sys.executable, "-c", CHILD, str(directory)],
        cwd=REPOSITORY,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    return process


def await_ready(*processes: subprocess.Popen) -> None:
    for process in processes:
        assert process.stdout and process.stdout.readline() == "ready\n"


def start(process: subprocess.Popen) -> None:
    assert process.stdin
    process.stdin.write("\n")
    process.stdin.flush()


def total(process: subprocess.Popen) -> int:
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 0
    return int(out.split()[-1])


def test_of_two_processes_one_decodes_and_the_other_waits(tmp_path: Path) -> None:
    racers = [child(tmp_path), child(tmp_path)]
    await_ready(*racers)
    for racer in racers:
        start(racer)
    assert sorted(total(racer) for racer in racers) == [0, 40]
    assert len(cached(tmp_path)) == 2 and not leftovers(tmp_path)


def test_a_process_killed_while_writing_leaves_nothing_that_is_trusted(tmp_path: Path) -> None:
    victim, heir = child(tmp_path), child(tmp_path)
    await_ready(victim, heir)
    start(victim)
    assert victim.stdout and victim.stdout.readline() == "decoded\n"
    start(heir)  # waits for the lock of a process that is about to die
    victim.send_signal(signal.SIGKILL)
    victim.wait()
    assert total(heir) == 40
    assert len(cached(tmp_path)) == 2


def test_part_files_of_a_killed_process_are_removed_when_old(root: Path, tmp_path: Path) -> None:
    directory = tmp_path / "cache"
    load_cached(samples_of(root), WHOLE, directory)
    images, masks = cached(directory)
    old, fresh = directory / f"{images.name}.1.part", directory / f"{images.name}.2.part"
    for part in (old, fresh):
        part.write_bytes(b"half")
    os.utime(old, (0, 0))
    masks.unlink()
    load_cached(samples_of(root), WHOLE, directory)
    assert leftovers(directory) == [fresh]  # another machine may still be writing it


def test_without_locks_it_decodes_itself(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unsupported(file: object, operation: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", unsupported)
    assert len(load_cached(samples_of(root), WHOLE, tmp_path / "cache")) == 4


def test_a_full_disk_names_the_cache_and_is_cleaned_up(root: Path, tmp_path: Path) -> None:
    """A file size limit breaks off the write in the middle, as a full disk does."""
    directory = tmp_path / "cache"
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limits[1]))
    try:
        with pytest.raises(UserError, match=rf"cache={directory} cannot be used .*set cache=\.\.\."):
            load_cached(samples_of(root), WHOLE, directory)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert not cached(directory) and not leftovers(directory)


def test_a_full_file_system_names_the_cache_and_is_cleaned_up(root: Path, tmp_path: Path) -> None:
    directory = tmp_path / "small"
    directory.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=16k", "tmpfs", str(directory)]
    if os.geteuid() != 0 or subprocess.run(mount, check=False, capture_output=True).returncode != 0:
        pytest.skip("mounting a small disk needs root")
    try:
        with pytest.raises(UserError, match=r"cannot be used \(No space left on device\).*set cache=\.\.\."):
            load_cached(samples_of(root), WHOLE, directory)
        assert not cached(directory) and not leftovers(directory)
    finally:
        subprocess.run(["umount", str(directory)], check=True)


def test_a_cache_that_cannot_be_a_folder_is_refused(root: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cache=.*file.* cannot be used .*set cache=\.\.\."):
        load_cached(samples_of(root), WHOLE, tmp_path / "file")
    with pytest.raises(UserError, match=r"cache=/proc/nothing cannot be used"):
        load_cached(samples_of(root), WHOLE, Path("/proc/nothing"))


def test_a_cache_without_write_permission_is_refused_unless_it_has_the_images(root: Path) -> None:
    # As another user, since nothing is forbidden to root; in a folder of its own, since pytest's are private.
    with tempfile.TemporaryDirectory() as folder:
        base = Path(folder)
        base.chmod(0o755)
        data, directory = shutil.copytree(root, base / "data"), base / "cache"
        directory.mkdir()
        code = f"""
import os
from pathlib import Path
import clbench.data.images  # which another user may not be able to import
from clbench.data.cache import load_cached
from clbench.data.mvtec import MVTec
from clbench.data.samples import Geometry
if os.geteuid() == 0:
    os.setgroups([])
    os.setgid(65534)
    os.setuid(65534)
load_cached(MVTec(root={str(data)!r}).samples("cable", "test"), Geometry(None), Path({str(directory)!r}))
"""
        command = [sys.executable, "-c", code]
        directory.chmod(0o555)
        refused = subprocess.run(command, cwd=REPOSITORY, check=False, capture_output=True, text=True)
        assert f"cache={directory} cannot be used (Permission denied)" in refused.stderr
        directory.chmod(0o755)
        load_cached(samples_of(data), WHOLE, directory)
        directory.chmod(0o555)
        subprocess.run(command, cwd=REPOSITORY, check=True)
        directory.chmod(0o755)  # so that it can be removed
