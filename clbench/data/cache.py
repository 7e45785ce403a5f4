"""Images at the run's size, decoded once per machine and memory-mapped by every job of a sweep.

They are kept under a key of their content, so that the same images are decoded once, wherever their files are, and others
are never taken for them. A file is read once for that: the list of files as the system describes them (path, size, times of
change) is kept with the content that they had. Beside decoded images is what was found while decoding: their digest, and
what is doubtful about them. Imports no torch before `load_cached`.
"""

import hashlib
import json
import os
import time
import tokenize
import uuid
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, contextmanager, suppress
from dataclasses import asdict, astuple, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, TypeVar

import numpy as np

from clbench.data.doubts import nearly_all
from clbench.data.samples import Geometry, Sample, different_sizes
from clbench.errors import UserError
from clbench.locks import open_lock, take_lock

if TYPE_CHECKING:
    from clbench.data.images import ImageSet

_FORMAT = 2  # raise it when the same samples and geometry would be stored differently
_BYTES_AHEAD = 1 << 28  # of images at the run's size that are decoded before they are asked for, at most
_ABANDONED_S = 3600  # seconds: a part file not written to for so long belongs to a killed process

THREADS = min(8, os.cpu_count() or 1)

Result = TypeVar("Result")
# Image uint8 [H, W, 3]; mask bool [H, W], or None without; largest value of a 16-bit image, None of others.
AtSize = tuple[np.ndarray, np.ndarray | None, int | None]


def ignore(decoded: int) -> None:
    """A `progress` of `load_cached` that does nothing."""


@dataclass(frozen=True)
class Contents:
    """What samples hold at the run's size, found while they were decoded.

    Attributes:
        digest: SHA-256 of all pixels and masks and of their shape, in hexadecimal.
        peak: the largest value of the 16-bit images among them; None where there are none.
        nearly_all: indices of the masks that mark nearly all pixels.
    """

    digest: str
    peak: int | None
    nearly_all: list[int]

    def fingerprint(self, samples: Sequence[Sample]) -> str:
        """A text that changes where an image joins, leaves or changes, and not where a dataset is moved.

        Args:
            samples: those that these are the contents of.
        """
        about = [[sample.name, sample.kind, sample.outlined] for sample in samples]
        return _digest([about, self.digest])[:16]


def load_cached(
    samples: list[Sample], geometry: Geometry, directory: Path, progress: Callable[[int], None] = ignore
) -> "ImageSet":
    """The samples at the run's size, mapped from the cache; decoded first if no job has done so.

    The tensors may be written to: changes stay in this process (copy on write).

    Args:
        samples: at least one.
        geometry: what images and masks are brought to.
        directory: folder of the cache, shared by all jobs of the machine or cluster; created if missing.
        progress: called with 1 for each newly decoded image.

    Raises:
        UserError: a sample is unreadable, sizes differ, or the directory cannot be written.
    """
    import torch

    from clbench.data.images import ImageSet

    def mapped(key: str) -> tuple[Contents, np.ndarray, np.ndarray] | None:
        contents, arrays = _read_contents(directory, key), _open(directory, key, len(samples))
        return (contents, *arrays) if contents and arrays else None

    contents, images, masks = _found(mapped, samples, geometry, directory, progress)
    return ImageSet(
        images=torch.from_numpy(images),
        masks=torch.from_numpy(masks),
        kinds=[sample.kind for sample in samples],
        names=[sample.name for sample in samples],
        unknown=[number for number, sample in enumerate(samples) if not sample.outlined],
        contents=contents,
    )


def contents_of(samples: list[Sample], geometry: Geometry, directory: Path) -> Contents:
    """What samples hold, as it was found when they were decoded; they are decoded where no job has done so.

    Args:
        samples, geometry, directory: as for `load_cached`.

    Raises:
        UserError: as `load_cached`.
    """
    return _found(lambda key: _read_contents(directory, key), samples, geometry, directory, ignore)


def _found(
    look: Callable[[str], Result | None],
    samples: list[Sample],
    geometry: Geometry,
    directory: Path,
    progress: Callable[[int], None],
) -> Result:
    """What `look` finds in the cache under the samples' key; they are decoded first where it finds nothing.

    Raises:
        UserError: as `load_cached`.
    """
    if not samples:
        raise ValueError("the cache needs at least one sample")
    listing = directory / f"{_digest([_FORMAT, [sample.identity for sample in samples]])}.listing"
    try:
        content = _read_listing(listing)
        found = look(_key(content, geometry)) if content else None
        if found is None:
            directory.mkdir(parents=True, exist_ok=True)
            # The first: only one job reads files to tell their content. The second: the same content elsewhere.
            with _lock(listing.with_suffix(".lock")):
                content = _read_listing(listing) or _list(samples, listing)
                key = _key(content, geometry)
                with _lock(directory / f"{key}.lock"):
                    found = look(key)  # another job may have written it while this one waited
                    if found is None:
                        _remove_abandoned(directory, key)
                        _write(samples, geometry, directory, key, progress)
                        found = look(key)
    except OSError as error:  # samples raise UserError for their own files, so this is the cache's
        found = look(
            _key(_content_of(samples), geometry)
        )  # one that may not be written to can have the images
        if found is None:
            raise UserError(
                f"cache={directory} cannot be used ({error.strerror or error}): "
                "free space there, or set cache=... to a folder you may write to"
            ) from error
    if found is None:
        raise UserError(f"cache={directory} lost what was written: set cache=... to a folder on a local disk")
    return found


def _digest(value: object) -> str:
    """SHA-256 of what JSON can hold, 32 hexadecimal digits of it."""
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:32]


def _key(content: str, geometry: Geometry) -> str:
    """The key of decoded images of this content."""
    return _digest([_FORMAT, astuple(geometry), content])


def _read_listing(path: Path) -> str | None:
    """The content that listed files have; None where they were not read yet."""
    with suppress(OSError, ValueError):
        return str(json.loads(path.read_text(encoding="utf-8"))["content"])
    return None


def _content_of(samples: Sequence[Sample]) -> str:
    """A digest of the content of all samples.

    Raises:
        UserError: a file is unreadable.
    """
    with ThreadPoolExecutor(THREADS) as pool:
        return _digest(list(pool.map(lambda sample: sample.content(), samples)))


def _list(samples: Sequence[Sample], path: Path) -> str:
    """A digest of the content of all samples; it is kept with the listing unless a file is quite new.

    Raises:
        UserError: a file is unreadable.
        OSError: the listing cannot be written.
    """
    content = _content_of(samples)
    if all(sample.settled() for sample in samples):
        with whole_file(path) as file:
            file.write(json.dumps({"content": content}).encode())
    return content


def _read_contents(directory: Path, key: str) -> Contents | None:
    """What was found when the images of this key were decoded; None where they were not."""
    with suppress(OSError, ValueError, TypeError):
        return Contents(**json.loads((directory / f"{key}.json").read_text(encoding="utf-8")))
    return None


def _paths(directory: Path, key: str) -> tuple[Path, Path]:
    """The files of decoded images and of their masks."""
    return directory / f"{key}.images.npy", directory / f"{key}.masks.npy"


def _open(directory: Path, key: str, count: int) -> tuple[np.ndarray, np.ndarray] | None:
    """The mapped images and masks, or None where a file is missing, truncated or not what it should be."""
    arrays = []
    for path, dtype, dimensions in zip(_paths(directory, key), (np.uint8, np.bool_), (4, 3), strict=True):
        try:
            array = np.lib.format.open_memmap(path, mode="c")  # never unpickles
        except (OSError, ValueError, tokenize.TokenError):  # the last from a damaged header
            return None
        whole = path.stat().st_size == array.offset + array.nbytes
        if not whole or array.dtype != dtype or array.ndim != dimensions or len(array) != count:
            return None
        arrays.append(array)
    images, masks = arrays
    return (images, masks) if images.shape[2:] == masks.shape[1:] else None


def _write(
    samples: list[Sample], geometry: Geometry, directory: Path, key: str, progress: Callable[[int], None]
) -> None:
    """Decode the samples straight into the cache; memory holds a few images at a time.

    Raises:
        UserError: a sample is unreadable, or sizes differ.
        OSError: the cache cannot be written.
    """
    peak: int | None = None
    marked: list[int] = []
    digests = hashlib.sha256(), hashlib.sha256()
    paths = _paths(directory, key)
    with (
        closing(_decoded(samples, geometry)) as decoded,
        whole_file(paths[0]) as images,
        whole_file(paths[1]) as masks,
    ):
        size: tuple[int, ...] | None = None
        for number, (sample, (image, mask, largest)) in enumerate(zip(samples, decoded, strict=True)):
            if size is None:
                size = image.shape[:2]
                _write_header(images, np.dtype(np.uint8), (len(samples), 3, *size))
                _write_header(masks, np.dtype(np.bool_), (len(samples), *size))
            if image.shape[:2] != size:
                raise different_sizes(samples[0].name, size, sample.name, image.shape[:2])
            if largest is not None:
                peak = max(largest, peak or 0)
            if mask is not None and nearly_all(mask):
                marked.append(number)
            pixels = np.ascontiguousarray(image.transpose(2, 0, 1)).data
            defect = np.ascontiguousarray(np.zeros(size, bool) if mask is None else mask).data
            for file, digest, data in ((images, digests[0], pixels), (masks, digests[1], defect)):
                file.write(data)
                digest.update(data)
            progress(1)
    of_all = hashlib.sha256(
        json.dumps([len(samples), size, *(each.hexdigest() for each in digests)]).encode()
    )
    with whole_file(directory / f"{key}.json") as file:
        file.write(json.dumps(asdict(Contents(of_all.hexdigest(), peak, marked))).encode())


def _decoded(samples: list[Sample], geometry: Geometry) -> Generator[AtSize, None, None]:
    """The samples at the run's size in their order, decoded by a few threads a few images ahead."""

    def decode(sample: Sample) -> AtSize:
        image, mask = sample.at(geometry).read()
        largest = int(image.max()) if image.dtype == np.uint16 else None
        try:
            return geometry.image(image), None if mask is None else geometry.mask(mask), largest
        except UserError as error:
            raise UserError(f"{sample.name}: {error}") from error

    pending: deque[Future[AtSize]] = deque()
    ahead = 1  # until the size of one is known
    with ThreadPoolExecutor(THREADS) as pool:
        try:
            for sample in samples:
                pending.append(pool.submit(decode, sample))
                while len(pending) > ahead:
                    found = pending.popleft().result()
                    ahead = max(1, min(2 * THREADS, _BYTES_AHEAD // found[0].nbytes))
                    yield found
                    del found
            while pending:
                yield pending.popleft().result()
        finally:
            for future in pending:
                future.cancel()


def _write_header(file: BinaryIO, dtype: np.dtype, shape: tuple[int, ...]) -> None:
    header = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(file, header)


@contextmanager
def whole_file(path: Path) -> Iterator[BinaryIO]:
    """A file that appears under its name only when it is complete and on the disk."""
    # Not `tempfile`, whose files only their owner may read: a cache is often shared by a group.
    part = path.with_name(f"{path.name}.{uuid.uuid4().hex}.part")
    try:
        with open(part, "xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        part.rename(path)
    finally:
        part.unlink(missing_ok=True)


@contextmanager
def _lock(path: Path) -> Iterator[None]:
    """Held by one process at a time.

    Where the disk has no locks, jobs may decode the same images, each into a file of its own: that is only slower.
    """
    with open_lock(path) as file:
        take_lock(file, wait=True)
        yield


def _remove_abandoned(directory: Path, key: str) -> None:
    """Remove part files of this key whose writer was killed.

    They are known by their age, since locks may not reach across machines.
    """
    for part in directory.glob(f"{key}.*.part"):
        try:
            if time.time() - part.stat().st_mtime > _ABANDONED_S:
                part.unlink()
        except FileNotFoundError:
            continue  # another machine removed it
