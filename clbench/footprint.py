"""Memory that a strategy keeps and a run uses, counted from live tensors.

MB are 10^6 bytes, as in the paper.
"""

import ctypes
import resource
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

import torch
from torch import Tensor, nn

from clbench.backbones import Student
from clbench.methods.base import trained_state
from clbench.strategies.base import Strategy

MB = 10**6


def measure(strategy: Strategy) -> dict[str, float]:
    """The footprint of a strategy, in MB.

    Returns:
        architecture_mb: weights of all networks, 4 bytes each, with the running statistics of normalisation
            layers that are trained. A network counts whole, as in the paper, even where only its first levels
            run.
        executed_mb: those that run.
        additional_mb: what is kept besides networks: the detector's buffers (banks, statistics), of its
            submodules too, and the strategy's own tensors (stored images, copies of weights).
    """
    detector = strategy.detector
    pyramids = detector.pyramids()
    students = [module for module in detector.modules() if isinstance(module, Student)]
    trained = trained_state(detector)
    states = strategy.detectors()
    networks = _bytes(trained.values())
    additional = sum(
        _bytes(tensor for name, tensor in state.items() if name not in trained) for state in states
    )
    frozen = sum(_bytes(pyramid.parameters()) for pyramid in pyramids)
    whole = sum(4 * pyramid.whole_parameters for pyramid in pyramids)
    # Where only the first levels of a network are run, the paper counts it whole.
    unused = sum(4 * student.whole_parameters - _bytes(student.parameters()) for student in students)
    models = max(len(states), 1)
    return {
        "architecture_mb": (whole + models * (networks + unused)) / MB,
        "executed_mb": (frozen + models * networks) / MB,
        "additional_mb": (additional + _bytes(strategy.kept().values())) / MB,
    }


def _bytes(tensors: Iterable[Tensor | nn.Parameter]) -> int:
    """The bytes that tensors take, all together."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def reset_peak(device: torch.device) -> None:
    """Measure `peak` from now on: on a GPU or on Linux, where what a run before this one has left is given back first.

    Elsewhere the peak is that of the process since its start.
    """
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        return
    with suppress(OSError, AttributeError):  # glibc's, which keeps freed memory
        ctypes.CDLL(None).malloc_trim(0)
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")
    except OSError:
        pass  # this is not Linux


def peak(device: torch.device) -> int:
    """The most bytes used at a time since `reset_peak`: allocated on the GPU, or resident in this process.

    A process counts with its libraries and with the images that are mapped into it.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
        return next(1024 * int(line.split()[1]) for line in lines if line.startswith("VmHWM:"))
    except (OSError, StopIteration):
        return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
