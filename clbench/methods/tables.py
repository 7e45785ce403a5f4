"""Constant tensors that depend on sizes alone: coordinates, windows, matrices that resample."""

from collections.abc import Callable
from functools import lru_cache

import torch
from torch import Tensor


def table(make: Callable[..., Tensor], *sizes: float, device: torch.device) -> Tensor:
    """What `make` gives for these sizes, on this device; made on the CPU, in single precision, and kept.

    So a training step has no launches for it, and no copy to the device, which would wait for it. A graph that is traced
    has one of its own.
    """
    if torch.compiler.is_compiling():  # in single precision and without gradients already
        return make(*sizes).to(device)
    return _kept(make, *sizes, device=device)


@lru_cache(maxsize=32)
def _kept(make: Callable[..., Tensor], *sizes: float, device: torch.device) -> Tensor:
    with torch.inference_mode(False), torch.no_grad(), torch.autocast("cpu", enabled=False):
        return make(*sizes).to(device)
