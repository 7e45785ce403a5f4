"""Sound files that a decoder's limits would turn away: read, or called what they are; and damage stays damage."""

import io
import resource
import struct
import subprocess
import sys
import zlib
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import pytest
from conftest import ROOT, Train, clbench, make_category
from PIL import Image

from clbench.data import decoding
from clbench.data.decoding import decode
from clbench.data.files import FileSample, read_image, read_image_at, read_mask
from clbench.data.memory import free_memory
from clbench.data.samples import Geometry
from clbench.errors import UserError

RGB = np.random.default_rng(0).integers(0, 256, (48, 64, 3), dtype=np.uint8)
CONVERT = "which is not read: convert it to PNG"
COMPRESSION = "compression, which is not read: save it with LZW or Deflate compression, or as PNG"


def encoded(format: str, **options: object) -> bytes:
    file = io.BytesIO()
    Image.fromarray(RGB).save(file, format, **options)
    return file.getvalue()


def with_compression(code: int) -> bytes:
    """A TIFF that says that it has this compression."""
    data = bytearray(encoded("TIFF", compression=None))
    begin = struct.unpack_from("<I", data, 4)[0]
    for entry in range(begin + 2, begin + 2 + 12 * struct.unpack_from("<H", data, begin)[0], 12):
        if struct.unpack_from("<H", data, entry)[0] == 259:
            struct.pack_into("<H", data, entry + 8, code)
    return bytes(data)


def with_frame(marker: int, bits: int) -> bytes:
    """A JPEG that says that it has this kind of frame."""
    data = bytearray(encoded("JPEG"))
    at = data.index(b"\xff\xc0")
    data[at + 1], data[at + 4] = marker, bits
    return bytes(data)


def empty_png(width: int, height: int) -> bytes:
    """A few bytes that say that they are a grey PNG of this size."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(b""))
        + chunk(b"IEND", b"")
    )


NOT_READ = {
    "zstd": (lambda: encoded("TIFF", compression="zstd"), f"a TIFF with ZSTD {COMPRESSION}"),
    "lzma": (lambda: encoded("TIFF", compression="lzma"), f"a TIFF with LZMA {COMPRESSION}"),
    "jpeg 2000": (lambda: with_compression(34712), f"a TIFF with JPEG 2000 {COMPRESSION}"),
    "lerc": (lambda: with_compression(34887), f"a TIFF with LERC {COMPRESSION}"),
    "webp": (lambda: with_compression(50001), f"a TIFF with WebP {COMPRESSION}"),
    "unknown": (lambda: with_compression(12345), f"a TIFF with number 12345 {COMPRESSION}"),
    "12 bits": (lambda: with_frame(0xC1, 12), f"12-bit JPEG, {CONVERT}"),
    "lossless": (lambda: with_frame(0xC3, 8), f"lossless JPEG, {CONVERT}"),
    "arithmetic": (lambda: with_frame(0xCA, 8), f"arithmetically coded JPEG, {CONVERT}"),
    "avif": (lambda: b"\0\0\0\x1cftypavif" + bytes(99), f"AVIF, {CONVERT}"),
    "heic": (lambda: b"\0\0\0\x18ftypheic" + bytes(99), f"HEIC, {CONVERT}"),
    "jpeg xl": (lambda: b"\xff\x0a" + bytes(99), f"JPEG XL, {CONVERT}"),
    "j2k": (lambda: encoded("JPEG2000"), f"JPEG 2000, {CONVERT}"),
    "gif": (lambda: encoded("GIF"), f"GIF, {CONVERT}"),
    "dicom": (lambda: bytes(128) + b"DICM", f"DICOM, {CONVERT}"),
    "lfs": (lambda: b"version https://git-lfs.github.com/spec/v1\n", "with `git lfs pull`"),
    "html": (lambda: b"\n<!DOCTYPE html><html>", "a web page, which is not read: download the image itself"),
}


@pytest.mark.parametrize("kind", NOT_READ)
def test_a_kind_that_is_not_read_is_called_what_it_is(tmp_path: Path, kind: str) -> None:
    make, said = NOT_READ[kind]
    (tmp_path / "a.png").write_bytes(make())
    with pytest.raises(UserError) as error:
        read_image(tmp_path / "a.png")
    assert said in str(error.value) and "truncated" not in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("compression", ["tiff_lzw", "tiff_adobe_deflate", "packbits", None])
def test_compressions_that_all_builds_have_are_read(tmp_path: Path, compression: str | None) -> None:
    (tmp_path / "a.tif").write_bytes(encoded("TIFF", compression=compression))
    np.testing.assert_array_equal(read_image(tmp_path / "a.tif"), RGB)


@pytest.mark.parametrize("format", ["PNG", "TIFF", "WEBP"])
def test_of_several_images_the_first_is_read(tmp_path: Path, format: str) -> None:
    options = {"lossless": True} if format == "WEBP" else {}
    more = [Image.fromarray(RGB[::-1]), Image.fromarray(255 - RGB)]
    (tmp_path / "a").write_bytes(encoded(format, save_all=True, append_images=more, **options))
    np.testing.assert_array_equal(read_image(tmp_path / "a"), RGB)


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (b"P5\n3 1\n255\n" + bytes([0, 7, 255]), [0, 7, 255]),
        (b"P5 # grey\n3 1\n3\n" + bytes([0, 1, 3]), [0, 85, 255]),
        (b"P2 3 1 15 0 5 15", [0, 85, 255]),
        (b"P5\n3 1\n4095\n" + struct.pack(">3H", 0, 273, 4095), [0, 17, 255]),
        (b"P5\n3 1\n65535\n" + struct.pack(">3H", 0, 273, 65535), [0, 1, 255]),
        (b"P4\n3 1\n" + bytes([0b01000000]), [255, 0, 255]),  # a bit that is set is black
        (b"P1\n3 1\n0 1 0\n", [255, 0, 255]),
    ],
)
def test_white_of_a_pgm_is_what_it_says(tmp_path: Path, data: bytes, expected: list[int]) -> None:
    (tmp_path / "a.pgm").write_bytes(data)
    assert read_image(tmp_path / "a.pgm")[0, :, 1].tolist() == expected


# Large images


def run(code: str, path: Path, **environment: str) -> subprocess.CompletedProcess:
    """Read an image file in a process that imports clbench before OpenCV, which looks up its limits then."""
    begin = "import pathlib, sys\nfrom clbench.data.files import read_image\npath = pathlib.Path(sys.argv[1])"
    return subprocess.run(
        [sys.executable, "-c", f"{begin}\n{code}", str(path)],
        env={"PYTHONPATH": str(ROOT), **environment},
        capture_output=True,
        text=True,
        check=False,
    )


def test_an_image_beyond_the_limits_of_the_libraries_is_read(tmp_path: Path) -> None:
    """180 million pixels: Pillow refuses that by itself. It was called truncated."""
    row = np.zeros((1, 1_200_000), np.uint8)  # wider than OpenCV reads by itself
    row[0, -3:] = 1, 2, 3
    (tmp_path / "wide.pgm").write_bytes(b"P5 1200000 151 255\n" + row.tobytes() * 151)
    done = run("image = read_image(path); print(image.shape, image[77, -4:, 0])", tmp_path / "wide.pgm")
    assert done.stdout == "(151, 1200000, 3) [0 1 2 3]\n", done.stderr
    Image.fromarray(row).save(tmp_path / "wide.png")
    done = run("read_image(path)", tmp_path / "wide.png")
    assert (
        "wide.png is 1200000x1 pixels, and PNG is read up to 1000000 a side: save it as TIFF" in done.stderr
    )


def test_limits_that_a_person_has_set_are_kept_and_named(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(encoded("PNG"))
    done = run("read_image(path)", tmp_path / "a.png", OPENCV_IO_MAX_IMAGE_PIXELS="100")
    assert (
        "is 64x48 pixels, more than OpenCV is allowed to read: set OPENCV_IO_MAX_IMAGE_PIXELS" in done.stderr
    )


def within_memory(size: int, call: Callable[[], object]) -> object:
    """What a call gives where the process may allocate so many bytes more."""
    used = int(Path("/proc/self/statm").read_text(encoding="utf-8").split()[0]) * resource.getpagesize()
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (used + size, hard))
    try:
        return call()
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def test_an_image_larger_than_the_memory_is_refused_by_its_header(tmp_path: Path) -> None:
    for width, height, size in (
        (100_000, 60_000, "18 GB"),
        (2_000_000, 1_000, "6 GB"),
        (20_000, 20_000, "1.2 GB"),
    ):
        (tmp_path / "a.png").write_bytes(empty_png(width, height))
        with pytest.raises(
            UserError, match=rf"a.png is {width}x{height} pixels, which takes {size} to read, and 0\.\d+ GB"
        ):
            within_memory(700_000_000, lambda: read_image(tmp_path / "a.png"))
    assert within_memory(500_000_000, free_memory) == pytest.approx(500_000_000, rel=0.1)


def test_a_small_file_that_claims_a_large_size_is_damaged(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(empty_png(9_000, 9_000))
    with pytest.raises(UserError, match="a.png is truncated"):
        read_image(tmp_path / "a.png")


@pytest.fixture
def large(monkeypatch: pytest.MonkeyPatch) -> None:
    """Files are large from 100,000 pixels on, not from 64 million."""
    monkeypatch.setattr(decoding, "LARGE", 100_000)


@pytest.mark.usefixtures("large")
def test_a_large_jpeg_is_decoded_at_the_size_that_is_needed(tmp_path: Path) -> None:
    y, x = np.mgrid[:960, :304]
    scene = np.dstack([x * 255 // 304, y * 255 // 960, 128 + 100 * np.sin(x / 50) * np.cos(y / 70)]).astype(
        np.uint8
    )
    exif = Image.Exif()
    exif[0x0112] = 6  # turned: 304 wide and 960 high is 960 wide and 304 high to whoever looks at it
    for name, options in (
        ("plain.jpg", {}),
        ("turned.jpg", {"exif": exif}),
        ("passes.jpg", {"progressive": True}),
    ):
        path = tmp_path / name
        Image.fromarray(scene).save(path, quality=95, **options)
        whole = read_image(path)
        for side, reduction in ((19, 8), (20, 4), (38, 4), (39, 2), (76, 2), (77, 1), (None, 1)):
            image, size = read_image_at(path, Geometry(side))
            assert size == whole.shape[:2]
            assert image.shape[:2] == tuple(-(-pixels // reduction) for pixels in size)
            assert (
                side is None
                or np.abs(Geometry(side).image(image).astype(int) - Geometry(side).image(whole)).max() <= 2
            )
        data = path.read_bytes()
        for kept in (0.3, 0.99):
            path.write_bytes(data[: int(kept * len(data))])
            with pytest.raises(UserError, match=f"{name} is truncated"):
                read_image_at(path, Geometry(19))


@pytest.mark.usefixtures("large")
def test_a_mask_fits_the_image_that_was_decoded_smaller(tmp_path: Path) -> None:
    image, mask = np.full((960, 300, 3), 90, np.uint8), np.zeros((960, 300), np.uint8)
    mask[480:, :150] = 255
    cv2.imwrite(str(tmp_path / "a.jpg"), image)
    cv2.imwrite(str(tmp_path / "a.png"), mask)
    geometry = Geometry(16)
    sample = FileSample("a", "scratch", tmp_path / "a.jpg", (tmp_path / "a.png",))
    read, defect = sample.at(geometry).read()
    assert read.shape == (120, 38, 3) and defect is not None
    expected = np.zeros((16, 16), bool)
    expected[8:, :8] = True
    np.testing.assert_array_equal(geometry.mask(defect), expected)
    assert sample.read()[0].shape == (960, 300, 3)
    cv2.imwrite(str(tmp_path / "a.png"), mask[-120:, :38])
    with pytest.raises(UserError, match="a.png is 38x120 but its image is 300x960"):
        FileSample("a", "scratch", tmp_path / "a.jpg", (tmp_path / "a.png",)).at(geometry).read()


def test_usual_images_are_decoded_whole(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(encoded("JPEG"))
    assert decode(tmp_path / "a.jpg", least=1).pixels.shape == (48, 64, 3)


# Runs and checks


def test_a_run_and_a_check_say_the_same_of_a_kind(train: Train, tmp_path: Path) -> None:
    root = tmp_path / "data"
    make_category(root / "brick", np.random.default_rng(0))
    path = root / "brick/train/good/003.png"
    path.write_bytes(encoded("TIFF", compression="zstd"))
    with pytest.raises(UserError, match="ZSTD") as error:
        read_image(path)
    checked, run = clbench("data", "check", str(root)), train(f"dataset.root={root}")
    assert checked.returncode == 1 and f"wrong: {error.value}\n" in checked.stdout
    assert run.returncode != 0 and run.stderr == f"error: {error.value}\n"
    mask = root / "brick/ground_truth/blot/000_mask.png"
    mask.write_bytes(b"\0\0\0\x18ftypheic")
    with pytest.raises(UserError, match="000_mask.png is HEIC, which is not read"):
        read_mask(mask)
