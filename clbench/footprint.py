"""Bytes kept, counted from live tensors. MB are 10^6 bytes, as in the paper."""

import resource
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn

from clbench.backbones import FeaturePyramid, Student
from clbench.errors import UserError
from clbench.methods.base import kept_state
from clbench.strategies.base import Strategy

MB = 10**6


def measure(strategy: Strategy) -> dict[str, float]:
    """The footprint of what a strategy keeps, in MB.

    Returns:
        architecture_mb: weights of all networks, whole, as the paper counts them; the running statistics of
            normalisation layers that are trained are a part of them;
        executed_mb: the part of them that runs;
        additional_mb: what is kept beside networks: the detector's buffers (banks, statistics), wherever in it they are
            registered, and the strategy's own tensors (stored images, copies of weights).
    """
    detector = strategy.detector
    pyramids = [module for module in detector.modules() if isinstance(module, FeaturePyramid)]
    students = [module for module in detector.modules() if isinstance(module, Student)]
    running = {
        f"{name}.{leaf}" if name else leaf
        for name, module in detector.named_modules()
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d)
        for leaf in module._buffers
    }
    trained = {name for name, _ in detector.named_parameters()} | running
    states = strategy.detectors()
    one = kept_state(detector)
    networks = _bytes(tensor for name, tensor in one.items() if name in trained)
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
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def reset_peak(device: torch.device) -> None:
    """Count the peak from here on."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        pass  # elsewhere than on Linux the peak is that of the process so far


def peak(device: torch.device) -> int:
    """Peak bytes since `reset_peak`: allocated on the GPU, or resident in this process (libraries and mapped images included)."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(1024 * int(line.split()[1]) for line in lines if line.startswith("VmHWM:"))
    except (OSError, StopIteration):
        return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


@contextmanager
def memory_named(phase: str, setting: str) -> Iterator[None]:
    """Inside, a GPU that runs out of memory is an error that names the phase and the setting to lower.

    Raises:
        UserError: it did.
    """
    try:
        yield
    except torch.cuda.OutOfMemoryError as error:
        free, total = torch.cuda.mem_get_info() if torch.cuda.is_available() else (0, 0)
        raise UserError(
            f"the GPU's memory was not enough for {phase} ({free / 1e6:,.0f} of {total / 1e6:,.0f} MB free): lower "
            f"{setting}, then backbone.feature_memory_mb, or take gpu.precision=bf16; what was finished is kept"
        ) from error
