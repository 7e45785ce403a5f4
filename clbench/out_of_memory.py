"""Memory that is not enough, on a GPU or on this machine: one line with the phase, what is free, and the way out."""

import errno
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import torch

from clbench.data.memory import free_memory
from clbench.errors import UserError

# What messages say where memory could not be had: torch's own on the CPU, and cuBLAS, cuDNN (version 9: ALLOCATION_FAILED),
# cuSOLVER and CUDA itself, whose failures are plain RuntimeErrors.
_HOST = (
    "can't allocate memory",
    "Cannot allocate memory",
    "not enough memory",
    "bad_alloc",
    "bad allocation",
)
_DEVICE = ("out of memory", "STATUS_ALLOC_FAILED", "ALLOCATION_FAILED")
# What they say where it could not be had, or where something else is wrong.
_PERHAPS = (
    "CUDNN_STATUS_INTERNAL_ERROR",
    "CUDNN_STATUS_NOT_INITIALIZED",
    "CUDNN_STATUS_EXECUTION_FAILED",
    "CUBLAS_STATUS_NOT_INITIALIZED",
    "CUSOLVER_STATUS_INTERNAL_ERROR",
    "unable to find an engine to execute this computation",
    "no valid convolution algorithms available",
)
_SCARCE = (
    600e6  # free bytes below which the latter are for want of memory: cuDNN's kernels alone may take 500 MB
)


class PinnedMemoryError(MemoryError):
    """This machine's memory that is pinned, for copies to and from a GPU, could not be had."""


def is_out_of_memory(error: BaseException, device: torch.device | None = None) -> bool:
    """Whether an exception says that memory of this machine or of a GPU could not be had.

    Args:
        device: what was computed on; None for a GPU that is in use, or else the CPU.
    """
    if _of_host(error) or isinstance(error, torch.cuda.OutOfMemoryError):
        return True
    if not isinstance(error, RuntimeError):
        return False
    text = str(error)
    if any(words in text for words in _DEVICE):
        return True
    found = _free_on(device) if any(words in text for words in _PERHAPS) else None
    return found is not None and found[0] < _SCARCE


def free_on_gpu(device: torch.device) -> int:
    """Bytes of a GPU that are free, or that PyTorch keeps for its next tensors."""
    kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + kept


@contextmanager
def pinning() -> Iterator[None]:
    """Inside, only pinned memory is asked for, of which CUDA says what it says of a GPU's: that it is out of memory.

    Raises:
        PinnedMemoryError: there is not enough of it.
    """
    try:
        yield
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        raise PinnedMemoryError(str(error)) from error


@contextmanager
def memory_named(
    phase: str, way_out: str, device: torch.device, *, way_out_on_host: str | None = None
) -> Iterator[None]:
    """Inside, memory that is not enough raises a UserError.

    Args:
        phase: what is being done, for the error.
        way_out: what to do about it, for the error.
        device: what is computed on.
        way_out_on_host: what to do where it is this machine's memory; None for the same.

    Raises:
        UserError: memory was not enough.
    """
    try:
        yield
    except (RuntimeError, MemoryError, OSError) as error:
        if not is_out_of_memory(error, device):
            raise
        if device.type != "cuda" or _of_host(error):
            free = free_memory()
            found = [] if free is None else [f"{free / 1e6:,.0f} MB free"]
            found += ["pinned for a GPU's copies"] * isinstance(error, PinnedMemoryError)
            where = f" ({'; '.join(found)})" if found else ""
            remedy = way_out if way_out_on_host is None else way_out_on_host
            raise UserError(f"this machine's memory was not enough for {phase}{where}: {remedy}") from error
        where = "" if (memory := _free_on(device)) is None else f" ({_shown(*memory, device)})"
        raise UserError(f"the GPU's memory was not enough for {phase}{where}: {way_out}") from error


def _of_host(error: BaseException) -> bool:
    """Whether an exception says that memory of this machine could not be had."""
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    said = isinstance(error, RuntimeError) and any(words in str(error) for words in _HOST)
    return said or isinstance(error, MemoryError)


def _free_on(device: torch.device | None) -> tuple[int, int] | None:
    """Bytes of a GPU that are free, and all; None where it is none, or where CUDA is too broken to say."""
    if device is None and torch.cuda.is_initialized():
        device = torch.device("cuda", torch.cuda.current_device())
    if device is None or device.type != "cuda":
        return None
    with suppress(RuntimeError):
        return torch.cuda.mem_get_info(device)
    return None


def _shown(free: int, total: int, device: torch.device) -> str:
    """What is free on a GPU, of all, and what this process holds, for people."""
    held = torch.cuda.memory_reserved(device)
    return (
        f"{free / 1e6:,.0f} of {total / 1e6:,.0f} MB of {device} free, {held / 1e6:,.0f} held by this process"
    )
