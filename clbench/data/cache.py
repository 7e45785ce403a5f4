"""Images at the run's size, decoded once per machine and memory-mapped by every job of a sweep."""

import hashlib
import json
import os
import time
import tokenize
import uuid
from collections import deque
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import astuple
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch

from clbench.data.images import ImageSet, different_sizes
from clbench.data.samples import Geometry, Sample
from clbench.errors import UserError
from clbench.locks import open_lock, take_lock

_FORMAT = 1  # raise it when the same samples and geometry would be stored differently
_ABANDONED_S = 3600  # seconds: a part file not written to for so long belongs to a killed process

Decoded = tuple[np.ndarray, np.ndarray | None]  # image uint8 [H, W, 3]; mask bool [H, W], or None without


def ignore(decoded: int) -> None:
    """A `progress` of `load_cached` that does nothing."""


def load_cached(
    samples: list[Sample], geometry: Geometry, directory: Path, progress: Callable[[int], None] = ignore
) -> ImageSet:
    """The samples at the run's size, mapped from the cache; decoded first if no job has done so.

    The tensors may be written to: changes stay in this process (copy on write).

    Args:
        samples: at least one.
        geometry: the size that images and masks are brought to.
        directory: folder of the cache, shared by all jobs of the machine or cluster; created if missing.
        progress: called with 1 for each newly decoded image.

    Raises:
        UserError: a sample is unreadable, sizes differ, or the directory cannot be written.
    """
    if not samples:
        raise ValueError("load_cached needs at least one sample")
    key = _key(samples, geometry)
    paths = directory / f"{key}.images.npy", directory / f"{key}.masks.npy"
    try:
        arrays = _open(paths, len(samples))
        if arrays is None:
            directory.mkdir(parents=True, exist_ok=True)
            with _lock(directory / f"{key}.lock"):
                arrays = _open(paths, len(samples))  # another job may have written it while this one waited
                if arrays is None:
                    _remove_abandoned(directory, key)
                    _write(samples, geometry, paths, progress)
                    arrays = _open(paths, len(samples))
    except OSError as error:  # samples raise UserError for their own files, so this is the cache's
        raise UserError(
            f"cache={directory} cannot be used ({error.strerror or error}): "
            "free space there, or set cache=... to a folder you may write to"
        ) from error
    if arrays is None:
        raise UserError(f"cache={directory} lost what was written: set cache=... to a folder on a local disk")
    images, masks = arrays
    return ImageSet(
        images=torch.from_numpy(images),
        masks=torch.from_numpy(masks),
        kinds=[sample.kind for sample in samples],
        names=[sample.name for sample in samples],
        unknown=[number for number, sample in enumerate(samples) if not sample.outlined],
    )


def _key(samples: list[Sample], geometry: Geometry) -> str:
    content = json.dumps([_FORMAT, astuple(geometry), [sample.identity for sample in samples]])
    return hashlib.sha256(content.encode()).hexdigest()[:32]


def _open(paths: tuple[Path, Path], count: int) -> tuple[np.ndarray, np.ndarray] | None:
    """The mapped images and masks, or None where a file is missing, truncated or not what it should be."""
    arrays = []
    for path, dtype, dimensions in zip(paths, (np.uint8, np.bool_), (4, 3), strict=True):
        try:
            array = np.lib.format.open_memmap(path, mode="c")  # never unpickles
        except (FileNotFoundError, ValueError, tokenize.TokenError):  # the last from a damaged header
            return None
        whole = path.stat().st_size == array.offset + array.nbytes
        if not whole or array.dtype != dtype or array.ndim != dimensions or len(array) != count:
            return None
        arrays.append(array)
    images, masks = arrays
    return (images, masks) if images.shape[2:] == masks.shape[1:] else None


def _write(
    samples: list[Sample], geometry: Geometry, paths: tuple[Path, Path], progress: Callable[[int], None]
) -> None:
    """Decode the samples straight into the two files; memory holds a few images at a time."""
    with (
        closing(_decoded(samples, geometry)) as decoded,
        _whole_file(paths[0]) as images,
        _whole_file(paths[1]) as masks,
    ):
        size: tuple[int, ...] | None = None
        for sample, (image, mask) in zip(samples, decoded, strict=True):
            if size is None:
                size = image.shape[:2]
                _write_header(images, np.dtype(np.uint8), (len(samples), 3, *size))
                _write_header(masks, np.dtype(np.bool_), (len(samples), *size))
            if image.shape[:2] != size:
                raise different_sizes(samples[0].name, size, sample.name, image.shape[:2])
            images.write(np.ascontiguousarray(image.transpose(2, 0, 1)).data)
            masks.write(np.ascontiguousarray(np.zeros(size, bool) if mask is None else mask).data)
            progress(1)


def _decoded(samples: list[Sample], geometry: Geometry) -> Generator[Decoded, None, None]:
    """The samples at the run's size in their order, decoded by a few threads a few images ahead."""

    def decode(sample: Sample) -> Decoded:
        image, mask = sample.read()
        return geometry.image(image), None if mask is None else geometry.mask(mask)

    threads = min(8, os.cpu_count() or 1)
    pending: deque[Future[Decoded]] = deque()
    with ThreadPoolExecutor(threads) as pool:
        try:
            for sample in samples:
                pending.append(pool.submit(decode, sample))
                if len(pending) > 2 * threads:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        finally:
            for future in pending:
                future.cancel()


def _write_header(file: BinaryIO, dtype: np.dtype, shape: tuple[int, ...]) -> None:
    header = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(file, header)


@contextmanager
def _whole_file(path: Path) -> Iterator[BinaryIO]:
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
