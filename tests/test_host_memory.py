"""Memory of this machine that is not enough beside a GPU, and which limit it was; with stand-ins for what CUDA says."""

import errno
from typing import Any

import pytest
import torch
from torch import Tensor

from clbench import assembly, evaluation, feature_store
from clbench.backbones import Backbone
from clbench.config import check
from clbench.config.sources import composed
from clbench.data import images as images_of
from clbench.data.images import sent
from clbench.errors import UserError
from clbench.methods import banks
from clbench.methods.base import Prediction
from clbench.methods.patchcore import PatchCore
from clbench.out_of_memory import memory_named

CUDA = torch.device("cuda", 0)
HOST_ALLOCATION = RuntimeError(
    "CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported"
)
CPU_ALLOCATION = RuntimeError(
    "[enforce fail at alloc_cpu.cpp:118] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes"
)


class OnGpu(Tensor):
    """A tensor that says that it is on a GPU."""

    @property
    def device(self) -> torch.device:
        return CUDA


def failing(*_: Any, **settings: Any) -> Any:
    raise HOST_ALLOCATION


def copy_there() -> None:
    sent(torch.zeros(4), CUDA)


def copy_back() -> None:
    evaluation._coming_back(Prediction(*(torch.zeros(2).as_subclass(OnGpu) for _ in range(2))))


@pytest.mark.parametrize("copy", [copy_there, copy_back])
def test_pinned_memory_is_this_machine_s(copy: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Tensor, "pin_memory", failing)
    monkeypatch.setattr(evaluation.torch, "empty", failing)
    named = r"^this machine's memory was not enough for timing \([\d,]+ MB free; pinned for a GPU's copies\): lower it$"
    with pytest.raises(UserError, match=named), memory_named("timing", "lower it", CUDA):
        copy()


def test_another_error_of_pinning_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(_: Tensor) -> Tensor:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(Tensor, "pin_memory", broken)
    with pytest.raises(RuntimeError, match="illegal memory access"):
        sent(torch.zeros(4), CUDA)


def test_no_more_than_a_limit_is_pinned(monkeypatch: pytest.MonkeyPatch) -> None:
    pinned: list[int] = []
    monkeypatch.setattr(images_of, "_PINNED", 16)
    monkeypatch.setattr(Tensor, "pin_memory", lambda tensor: pinned.append(tensor.nbytes) or tensor)
    monkeypatch.setattr(Tensor, "to", lambda tensor, *_, **__: tensor)
    for count in (3, 4, 5):
        sent(torch.zeros(count), CUDA)
    assert pinned == [12, 16]


def test_settings_of_the_gpu_are_left_out_where_this_machine_s_memory_is_short() -> None:
    config = check(composed("method=draem"))
    keys = "method.batch_size", "gpu.image_memory_mb", "dataset.resize"
    ways = {
        torch.cuda.OutOfMemoryError("CUDA out of memory."): (
            "lower method.batch_size, then gpu.image_memory_mb, then dataset.resize, or take gpu.precision=bf16"
        ),
        CPU_ALLOCATION: "lower method.batch_size, then dataset.resize",
    }
    for error, way_out in ways.items():
        with (
            pytest.raises(UserError, match=f": {way_out}; what"),
            assembly.memory_for("it", config, CUDA, *keys),
        ):
            raise error


@pytest.mark.parametrize(
    ("free", "named", "remedy"),
    [
        (1_000_000_000, "than backbone.feature_memory_mb=3 and", "raise the one, or set TMPDIR"),
        (4_000_000, r"than half of what the GPU had free \(2 MB\) and", "free more of it, or set TMPDIR"),
    ],
)
def test_the_limit_that_patches_are_beyond_is_named(
    free: int, named: str, remedy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_: int) -> Tensor:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(feature_store, "free_on_gpu", lambda device: free)
    monkeypatch.setattr(banks, "on_disk", full)
    backbone = Backbone(
        "resnet18", pretrained=False, arguments={"channels": [8, 8, 8, 8]}, feature_memory_mb=3
    )
    detector = PatchCore(backbone, layers=[1])
    detector.pyramid.store.put("image", [torch.zeros(1, 2, 2).as_subclass(OnGpu)])
    with pytest.raises(UserError, match=f"take 4 MB: more {named} than .* has room for; {remedy}"):
        detector._block(1_000_000, torch.zeros(1, 1))
