"""What `gpu.precision` means, and what computes in single precision whatever it is.

`fp32` is IEEE single precision throughout. `tf32` lets a GPU's matrix products and convolutions round their factors to 10
bits of mantissa; on the CPU it is `fp32`. `bf16` and `fp16` are mixed precision: autocast, with weights in single precision.
Only networks follow it: geometry, noise, statistics and distances are computed inside `single_precision`.
"""

import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Literal

import torch

Precision = Literal["fp32", "tf32", "bf16", "fp16"]

_MIXED = {"bf16": torch.bfloat16, "fp16": torch.float16}
_matmul: Any = torch.backends.cuda.matmul
_cudnn: Any = torch.backends.cudnn
_NAMED = hasattr(_cudnn, "conv")  # torch 2.9 and newer name each operation's precision


def mixed(precision: str) -> torch.dtype | None:
    """The type of mixed precision; None for `fp32` and `tf32`, which have none."""
    return _MIXED.get(precision)


def use_tf32(used: bool) -> None:
    """Say whether a GPU's matrix products and convolutions are in TF32; PyTorch's own choice is convolutions alone."""
    with warnings.catch_warnings():  # torch 2.9 warns, once, of the names that older ones have
        warnings.simplefilter("ignore")
        _set(used, used)


def single_precision(device: torch.device) -> AbstractContextManager[None]:
    """Inside, neither autocast nor TF32: float32 is IEEE single precision. For what small differences decide.

    Tensors of half precision that come from outside are to be brought to float32 first. What is differentiated
    inside has gradients in the precision outside.

    Args:
        device: of the tensors.
    """
    # A traced graph is in single precision anyway.
    return nullcontext() if torch.compiler.is_compiling() else _single_precision(device)


@contextmanager
def _single_precision(device: torch.device) -> Iterator[None]:
    if _NAMED:
        before = _matmul.fp32_precision == "tf32", _cudnn.conv.fp32_precision == "tf32"
    else:
        before = _matmul.allow_tf32, _cudnn.allow_tf32
    if any(before):
        _set(False, False)
    try:
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        if any(before):
            _set(*before)


def _set(products: bool, convolutions: bool) -> None:
    """Say whether each is in TF32, by both names that torch has for it: it raises where one is read and they differ."""
    _matmul.allow_tf32, _cudnn.allow_tf32 = products, convolutions
    if _NAMED:
        _matmul.fp32_precision = "tf32" if products else "ieee"
        _cudnn.conv.fp32_precision = _cudnn.rnn.fp32_precision = "tf32" if convolutions else "ieee"
