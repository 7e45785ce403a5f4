"""Decoding: the pixels of an image file, whole, or an error that says whether it is damaged or of a kind not read."""

import io
import re
import stat
import struct
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
from PIL import Image, TiffImagePlugin

from clbench.data.memory import free_memory
from clbench.errors import UserError

FORMATS = ("PNG", "JPEG", "BMP", "TIFF", "WEBP", "PPM")  # Pillow's names; the last is of PGM and PBM too

# The limit is by memory, and ours; OpenCV's are lifted in clbench/__init__.py, as it looks when it is imported.
Image.MAX_IMAGE_PIXELS = None

LARGE = 64_000_000  # pixels: such files are decoded one at a time, and JPEG at the size that is needed
_LIBPNG_SIDE = 1_000_000  # pixels: libpng's own limit, which OpenCV leaves as it is

_WHITE_IS_ZERO = 0  # TIFF tag 262, photometric interpretation
_SEPARATE_PLANES = 2  # TIFF tag 284, planar configuration
_FLOAT = 3  # TIFF tag 339, sample format
_COMPRESSIONS = (
    1,
    2,
    3,
    4,
    5,
    7,
    8,
    32773,
    32946,
)  # TIFF tag 259: those that every build of both decoders has
_COMPRESSION_NAMES = {
    6: "old-style JPEG",
    32809: "ThunderScan",
    34661: "JBIG",
    34676: "SGI LogLuv",
    34677: "SGI LogLuv",
    34712: "JPEG 2000",
    34887: "LERC",
    34925: "LZMA",
    50000: "ZSTD",
    50001: "WebP",
    50002: "JPEG XL",
    52546: "JPEG XL",
}
_LOSSY_COMPRESSIONS = (6, 7)
_TURNED = 5  # EXIF orientations from this on exchange width and height

_OTHER_KINDS = (  # where in a file, what is there, and what it then is
    (0, rb"\0\0\0\x0cjP  |\xff\x4f\xff\x51", "JPEG 2000"),
    (0, rb"\0\0\0\x0cJXL |\xff\x0a", "JPEG XL"),
    (4, rb"ftypavi[fs]", "AVIF"),
    (4, rb"ftyp(he|mif1|msf1)", "HEIC"),
    (4, rb"ftyp", "a video"),
    (0, rb"GIF8", "GIF"),
    (0, rb"8BPS", "Photoshop's"),
    (0, rb"\x76\x2f\x31\x01", "OpenEXR"),
    (0, rb"#\?R", "Radiance HDR"),
    (0, rb"P7\s", "PAM"),
    (0, rb"%PDF", "PDF"),
    (0, rb"\x93NUMPY", "a NumPy array"),
    (128, rb"DICM", "DICOM"),
    (0, rb"\x28\0\0\0", "a BMP without the header of its file"),
    (0, rb"\s*<(\?xml|svg)", "SVG"),
    (0, rb"(?i)\s*<(!doctype html|html)", "a web page"),
    (0, rb"version https://git-lfs", "a pointer of Git LFS"),
)
_OTHER_WAYS_OUT = {
    "a web page": "download the image itself",
    "a pointer of Git LFS": "fetch what it points to with `git lfs pull`",
}
_JPEG_KINDS = {3: "lossless", 5: "hierarchical", 6: "hierarchical", 7: "hierarchical", 11: "lossless"}
_JPEG_KINDS |= {9: "arithmetically coded", 10: "arithmetically coded"}

# What Pillow raises for damaged tags.
_DAMAGE = (ArithmeticError, LookupError, OSError, SyntaxError, TypeError, ValueError, struct.error)

_one_at_a_time = threading.Lock()


@dataclass(frozen=True)
class Decoded:
    """The pixels of an image file.

    Attributes:
        pixels: uint8 or uint16 [H, W, 3] BGR, with the EXIF orientation applied; grey is three equal channels,
            and alpha is dropped.
        size: size (H, W) of the file's image: that of `pixels`, unless these were decoded smaller.
        lossy: whether the file's format changes values, as JPEG does.
        alpha: whether there is an alpha channel that is not the same everywhere; False unless it was asked for.
        white_stated: whether the file itself says which value is white, as PGM and PPM do: the largest of its type here.
    """

    pixels: np.ndarray
    size: tuple[int, int]
    lossy: bool
    alpha: bool
    white_stated: bool = False


def decode(path: Path, least: int | None = None, look_at_alpha: bool = False) -> Decoded:
    """Decode the first image of a file.

    Args:
        path: the file, whatever its suffix.
        least: pixels of a side that the image will be shrunk to: a large JPEG may be decoded at a half, a quarter
            or an eighth of its size, at which each side still has twice as many. None for the whole.
        look_at_alpha: whether to look at the values of an alpha channel.

    Raises:
        UserError: the file is missing, no regular file, truncated, corrupt, larger than the memory, of a kind or
            compression that is not read, or has pixels that cannot be read for certain (float, 32-bit, and two
            kinds of 16-bit TIFF).
    """
    data = file_bytes(path)
    try:
        image = Image.open(io.BytesIO(data), formats=FORMATS)
    except Exception as error:  # Pillow's decoders fail with whatever the damage leads them to
        raise _not_opened(path, data, error) from error
    header = _Header.of(path, image, data)
    reduction = header.reduction(least)
    with _room(path, header, reduction):
        alpha = _check_whole(path, data, image, header, look_at_alpha)
        size = None if reduction == 1 else _upright_size(image, header)
        # OpenCV stretches a white below 255 to all 8 bits in some files and not in others.
        stretched = np.asarray(image.convert("RGB"))[..., ::-1].copy() if header.white < 255 else None
        image.close()  # frees its pixels
        pixels = _pixels(path, data, header, reduction) if stretched is None else stretched
    size = size or (pixels.shape[0], pixels.shape[1])
    return Decoded(pixels, size, header.lossy, alpha, header.format == "PPM")


@dataclass(frozen=True)
class _Header:
    """What a file says of its image before anything is decoded.

    Attributes:
        format: one of `FORMATS`, or MPO, a JPEG with more images behind the first.
        width, height: in pixels, as stored.
        bits: of a channel.
        white: the largest value that there can be.
        lossy: as in `Decoded`.
        progressive: whether a JPEG is decoded in passes over all of it, which are kept in memory.
        bytes_to_check: bytes a pixel that Pillow needs.
    """

    format: str
    width: int
    height: int
    bits: int
    white: int
    lossy: bool
    progressive: bool
    bytes_to_check: int

    @staticmethod
    def of(path: Path, image: Image.Image, data: bytes) -> "_Header":
        """The header of a file that Pillow has opened.

        Raises:
            UserError: the file has a compression or pixels that are not read.
        """
        tags = dict(getattr(image, "tag_v2", {}))
        if image.mode == "F" or (image.mode == "I" and image.format != "PPM"):
            raise _unsupported(path, "float pixels" if image.mode == "F" else "signed or 32-bit pixels")
        _check_tiff(path, tags)
        bits = max(_as_tuple(tags.get(258, 8)))
        if image.format == "PNG":
            bits = data[24]
        white = _white_of_pnm(data) if image.format == "PPM" else 2 ** max(bits, 8) - 1
        bits = 16 if white > 255 else 8
        return _Header(
            format=str(image.format),
            width=image.width,
            height=image.height,
            bits=bits,
            white=white,
            lossy=image.format in ("JPEG", "MPO")
            or tags.get(259) in _LOSSY_COMPRESSIONS
            or (image.format == "WEBP" and b"VP8 " in _webp_chunks(data)),
            progressive=bool(image.info.get("progressive")),
            bytes_to_check=1 if image.mode in ("1", "L", "P") else 4,
        )

    @property
    def jpeg(self) -> bool:
        return self.format in ("JPEG", "MPO")

    @property
    def large(self) -> bool:
        return self.width * self.height >= LARGE

    def reduction(self, least: int | None) -> int:
        """By what the sides are divided when the image is decoded for `least` pixels a side: 1, 2, 4 or 8."""
        if least is None or not (self.large and self.jpeg):
            return 1
        return next((by for by in (8, 4, 2) if min(self.width, self.height) // by >= 2 * least), 1)

    def bytes_needed(self, reduction: int) -> int:
        """The most bytes that are needed at a time: for the check that the file is whole, then for the pixels."""
        pixels = self.width * self.height
        decoded = 3 * (self.bits // 8) * pixels // reduction**2
        if not self.jpeg:
            return max(decoded, self.bytes_to_check * pixels)
        checked = self.bytes_to_check * pixels // (64 if self.large else 1)
        return max(decoded, checked) + (6 * pixels if self.progressive else 0)


def file_bytes(path: Path) -> bytes:
    """The file's bytes.

    Raises:
        UserError: it cannot be read, or is empty or no regular file.
    """
    try:
        if stat.S_IFMT(path.stat().st_mode) not in (stat.S_IFREG, stat.S_IFDIR):  # a pipe is waited for
            raise _broken(path, "a pipe, socket or device")
        data = path.read_bytes()
    except OSError as error:
        raise UserError(f"cannot read image file {path}: {error.strerror}") from error
    if not data:
        raise UserError(f"image file {path} is empty: copy it again from its source")
    return data


@contextmanager
def _room(path: Path, header: _Header, reduction: int) -> Iterator[None]:
    """Inside, there is memory for an image; large ones wait for one another.

    Raises:
        UserError: there is not enough.
    """
    if not header.large:
        yield
        return
    with _one_at_a_time:
        needed, free = header.bytes_needed(reduction), free_memory()
        if free is not None and needed > free:
            raise UserError(
                f"image file {path} is {header.width}x{header.height} pixels, which takes {needed / 1e9:.2g} GB to "
                f"read, and {free / 1e9:.2g} GB of memory are free here: cut it into parts or make it smaller, or "
                "take a machine with more memory"
            )
        yield


def _check_whole(path: Path, data: bytes, image: Image.Image, header: _Header, look_at_alpha: bool) -> bool:
    """Refuse a file that OpenCV would decode partly without an error; Pillow notices what is missing.

    Returns:
        Whether it has an alpha channel that varies; False where nobody asks.

    Raises:
        UserError: it is not whole.
    """
    if header.large and header.jpeg:  # all of the file is read, and an eighth of each side is kept
        image.draft(image.mode, (image.width // 8, image.height // 8))
    try:
        image.load()
        if not look_at_alpha:
            return False
        if "transparency" in image.info:
            image = image.convert("RGBA")
        if "A" not in image.getbands():
            return False
        lowest, highest = image.getchannel("A").getextrema()
        return lowest != highest
    except MemoryError as error:
        raise _no_memory(path, header) from error
    except Exception as error:  # whatever the damage leads to
        if header.jpeg and (kind := _rare_jpeg(data)):
            raise _not_read(path, f"{kind} JPEG") from error
        raise _broken(path, error) from error


def _pixels(path: Path, data: bytes, header: _Header, reduction: int) -> np.ndarray:
    """Pixels of a file that is whole, uint8 or uint16 [H, W, 3] BGR.

    Raises:
        UserError: OpenCV cannot decode it.
    """
    # BGR on purpose: OpenCV 5.0's IMREAD_COLOR_RGB returns noise for 16-bit RGB TIFF.
    flags = {
        1: cv2.IMREAD_COLOR | cv2.IMREAD_ANYDEPTH,
        2: cv2.IMREAD_REDUCED_COLOR_2,
        4: cv2.IMREAD_REDUCED_COLOR_4,
        8: cv2.IMREAD_REDUCED_COLOR_8,
    }[reduction]
    if header.format == "PPM":
        data += b"\n"  # without which OpenCV does not find the last of numbers written as text
    try:
        pixels = cv2.imdecode(np.frombuffer(data, np.uint8), flags)
    except cv2.error as error:
        if error.code == cv2.Error.StsNoMem:
            raise _no_memory(path, header) from error
        if "CV_IO_MAX_IMAGE" in str(error):  # somebody imported cv2 before clbench, or set a limit
            raise UserError(
                f"image file {path} is {header.width}x{header.height} pixels, more than OpenCV is allowed to read: "
                "set OPENCV_IO_MAX_IMAGE_PIXELS, _WIDTH and _HEIGHT higher in the environment"
            ) from error
        raise _broken(path, "OpenCV cannot decode it") from error
    if pixels is None:
        if header.format == "PNG" and max(header.width, header.height) > _LIBPNG_SIDE:
            raise UserError(
                f"image file {path} is {header.width}x{header.height} pixels, and PNG is read up to {_LIBPNG_SIDE} a "
                "side: save it as TIFF, or cut it into parts"
            )
        raise _broken(path, "OpenCV cannot decode it")
    if pixels.dtype not in (np.uint8, np.uint16):
        raise _unsupported(path, f"{pixels.dtype} pixels")
    if header.format == "PPM" and 255 < header.white < 65535:  # which OpenCV passes over
        pixels = np.rint(pixels * (65535 / header.white)).clip(0, 65535).astype(np.uint16)
    return pixels


def _upright_size(image: Image.Image, header: _Header) -> tuple[int, int]:
    """Size (H, W) of a JPEG with the EXIF orientation applied."""
    try:
        turned = image.getexif().get(0x0112, 1) >= _TURNED
    except _DAMAGE:  # which OpenCV passes over too
        turned = False
    return (header.width, header.height) if turned else (header.height, header.width)


def _check_tiff(path: Path, tags: dict) -> None:
    """Check that a TIFF is of a kind that both decoders read.

    Args:
        tags: its tags; none where the file is no TIFF.

    Raises:
        UserError: it is not.
    """
    compression = tags.get(259, 1)
    if compression not in _COMPRESSIONS:
        named = _COMPRESSION_NAMES.get(compression, f"number {compression}")
        raise UserError(
            f"image file {path} is a TIFF with {named} compression, which is not read: save it with LZW or "
            "Deflate compression, or as PNG"
        )
    if max(_as_tuple(tags.get(258, 8))) > 8:
        # OpenCV 5.0 mixes up separate planes, and does not invert white-is-zero.
        if tags.get(284) == _SEPARATE_PLANES:
            raise _unsupported(path, "16-bit separate colour planes")
        if tags.get(262) == _WHITE_IS_ZERO:
            raise _unsupported(path, "16-bit white-is-zero pixels")


def _not_opened(path: Path, data: bytes, error: Exception) -> UserError:
    """The error for a file that Pillow cannot open: another kind of file, or a damaged one."""
    if kind := next((name for at, what, name in _OTHER_KINDS if re.match(what, data[at : at + 64])), None):
        return _not_read(path, kind)
    if kind := _rare_jpeg(data):
        return _not_read(path, f"{kind} JPEG")
    tags = _tiff_tags(data)
    try:
        _check_tiff(path, tags)
    except UserError as limit:
        return limit
    bits, float_ = max(_as_tuple(tags.get(258, 8))), _FLOAT in _as_tuple(tags.get(339, 1))
    if float_ or bits > 16:
        return _unsupported(path, f"{bits}-bit {'float ' if float_ else ''}channels, not 8 or 16 bits")
    if isinstance(error, Image.UnidentifiedImageError):
        return _broken(path, "not a PNG, JPEG, BMP, TIFF, WebP or PNM with 8 or 16 bits per channel")
    return _broken(path, error)


def _tiff_tags(data: bytes) -> dict:
    """The tags of a TIFF's first image; none where they cannot be read."""
    if data[:4] not in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"):
        return {}
    try:
        tags = TiffImagePlugin.ImageFileDirectory_v2(data[: 16 if b"+" in data[:4] else 8])
        file = io.BytesIO(data)
        file.seek(tags.next)
        tags.load(file)
        return dict(tags)
    except _DAMAGE:
        return {}


def _rare_jpeg(data: bytes) -> str | None:
    """What kind of JPEG a file is, where that is one that many decoders do not read; None for others."""
    at = 2
    while data[:2] == b"\xff\xd8" and at + 5 <= len(data) and data[at] == 0xFF:
        marker, length = data[at + 1], struct.unpack_from(">H", data, at + 2)[0]
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):  # start of a frame
            return _JPEG_KINDS.get(marker & 15) or (f"{data[at + 4]}-bit" if data[at + 4] != 8 else None)
        at += 2 + length
    return None


def _webp_chunks(data: bytes) -> list[bytes]:
    """The names of the chunks of a WebP file."""
    names, at = [], 12
    while at + 8 <= len(data):
        names.append(data[at : at + 4])
        length = int.from_bytes(data[at + 4 : at + 8], "little")
        at += 24 if names[-1] == b"ANMF" else 8 + length + length % 2  # the first frame's own chunks follow
    return names


def _white_of_pnm(data: bytes) -> int:
    """The largest value that a PGM, PPM or PBM file says it has."""
    comments = re.sub(rb"#[^\r\n]*", b"", data[:4096])
    found = re.match(rb"P[2356]\s+\d+\s+\d+\s+(\d+)\s", comments)
    return int(found[1]) if found else 255


def _as_tuple(value: int | tuple[int, ...]) -> tuple[int, ...]:
    return value if isinstance(value, tuple) else (value,)


def _broken(path: Path, reason: object) -> UserError:
    return UserError(
        f"image file {path} is truncated, corrupt or no image ({reason}): copy it again from its source"
    )


def _unsupported(path: Path, what: str) -> UserError:
    return UserError(f"image file {path} has {what}: convert it to 8- or 16-bit unsigned grey or RGB")


def _not_read(path: Path, kind: str) -> UserError:
    return UserError(
        f"image file {path} is {kind}, which is not read: {_OTHER_WAYS_OUT.get(kind, 'convert it to PNG')}"
    )


def _no_memory(path: Path, header: _Header) -> UserError:
    return UserError(
        f"image file {path} is {header.width}x{header.height} pixels, for which the memory was not enough: cut it "
        "into parts or make it smaller, or take a machine with more memory"
    )
