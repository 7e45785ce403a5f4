"""Memory that is not enough, in every phase and of every kind: one line that names phase, place and way out."""

import errno
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Train, clbench, run_directories
from torch import nn

from clbench import assembly, backbones, evaluation, exporting, footprint, loading, thresholds
from clbench.config import check
from clbench.config.sources import composed
from clbench.data import stream
from clbench.errors import UserError
from clbench.methods import distillation
from clbench.methods.padim import PaDiM
from clbench.out_of_memory import is_out_of_memory, memory_named
from clbench.recording import checkpoint
from clbench.strategies.base import Strategy

CUDA = torch.device("cuda", 1)
ON_GPU = [
    torch.cuda.OutOfMemoryError(
        "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 1 has a total capacity of ..."
    ),
    RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported"),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
    RuntimeError("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED"),
    RuntimeError("cusolver error: CUSOLVER_STATUS_ALLOC_FAILED, when calling `cusolverDnCreate(handle)`"),
]
WHERE_LITTLE_IS_FREE = [
    RuntimeError("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR"),
    RuntimeError("cuDNN error: CUDNN_STATUS_NOT_INITIALIZED"),
    RuntimeError("CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate(handle)`"),
    RuntimeError("GET was unable to find an engine to execute this computation"),
]
NEVER = [
    RuntimeError("cuDNN error: CUDNN_STATUS_NOT_SUPPORTED"),
    RuntimeError("CUDA error: an illegal memory access was encountered"),
    RuntimeError("mat1 and mat2 shapes cannot be multiplied (2x3 and 2x3)"),
    OSError(errno.ENOSPC, "No space left on device"),
    ValueError("out of memory"),
]


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> dict[int, int]:
    """A stand-in for torch.cuda with two GPUs of 80 GB: index -> bytes that are free, to be set."""
    free = {0: 70 * 10**9, 1: 10**9}

    def mem_get_info(device: Any = None) -> tuple[int, int]:
        return free[torch.device(device).index], 80 * 10**9

    monkeypatch.setattr(torch.cuda, "mem_get_info", mem_get_info)
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 30 * 10**9 + torch.device(device).index)
    return free


@pytest.mark.parametrize("error", ON_GPU, ids=str)
def test_what_is_free_on_the_device_in_use_is_named(error: Exception, gpus: dict[int, int]) -> None:
    with pytest.raises(UserError) as raised, memory_named("learning bottle", "lower method.batch_size", CUDA):
        raise error
    assert str(raised.value) == (
        "the GPU's memory was not enough for learning bottle (1,000 of 80,000 MB of cuda:1 free, 30,000 held by this "
        "process): lower method.batch_size"
    )
    assert raised.value.__cause__ is error


@pytest.mark.parametrize("error", WHERE_LITTLE_IS_FREE, ids=str)
def test_errors_of_many_causes_are_memory_s_where_little_is_free(
    error: Exception, gpus: dict[int, int]
) -> None:
    with pytest.raises(type(error)), memory_named("timing", "lower it", CUDA):
        raise error
    gpus[1] = 400 * 10**6
    with (
        pytest.raises(UserError, match="400 of 80,000 MB of cuda:1 free"),
        memory_named("timing", "lower it", CUDA),
    ):
        raise error
    assert not is_out_of_memory(error, torch.device("cuda", 0)) and not is_out_of_memory(
        error, torch.device("cpu")
    )


@pytest.mark.parametrize("error", NEVER, ids=str)
def test_other_errors_pass(error: Exception, gpus: dict[int, int]) -> None:
    gpus[1] = 0
    with pytest.raises(type(error)) as raised, memory_named("timing", "lower it", CUDA):
        raise error
    assert raised.value is error


def test_the_device_in_use_is_asked_where_none_is_named(
    gpus: dict[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    error = WHERE_LITTLE_IS_FREE[0]
    gpus[1] = 0
    assert not is_out_of_memory(error)  # CUDA is not initialised: it is the CPU's
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    for index in (0, 1):
        monkeypatch.setattr(torch.cuda, "current_device", lambda: index)  # noqa: B023
        assert is_out_of_memory(error) == (index == 1)


def test_the_most_that_a_gpu_held_is_that_of_the_device_in_use(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in for torch.cuda, with two GPUs."""
    held = {0: 5_000_000, 1: 7_000_000}
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: held[device.index])
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: held.update({device.index: 0}))
    assert footprint.peak(CUDA) == 7_000_000
    footprint.reset_peak(CUDA)
    assert held == {0: 5_000_000, 1: 0} and footprint.peak(CUDA) == 0


def test_a_gpu_that_answers_no_more_is_still_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(device: Any) -> tuple[int, int]:
        raise RuntimeError("CUDA error: unspecified launch failure")

    monkeypatch.setattr(torch.cuda, "mem_get_info", broken)
    named = "^the GPU's memory was not enough for timing: lower it$"
    with pytest.raises(UserError, match=named), memory_named("timing", "lower it", CUDA):
        raise ON_GPU[0]


@pytest.mark.parametrize("device", [torch.device("cpu"), CUDA])
@pytest.mark.parametrize("ask", [lambda: torch.empty(1 << 50), lambda: np.empty(1 << 50)])
def test_memory_of_the_machine_is_called_so(ask: Callable[[], Any], device: torch.device) -> None:
    """No stand-in: PyTorch's and NumPy's own errors, for more memory than there is."""
    named = r"^this machine's memory was not enough for reading \([\d,]+ MB free\): lower it$"
    with pytest.raises(UserError, match=named), memory_named("reading", "lower it", device):
        ask()


def test_settings_that_a_method_has_are_named() -> None:
    def said(device: torch.device, *overrides: str) -> str:
        config = check(composed(*overrides))
        keys = "method.batch_size", "backbone.batch_size", *assembly.OF_FEATURES, "dataset.resize"
        with pytest.raises(UserError) as raised, assembly.memory_for("timing", config, device, *keys):
            raise ON_GPU[0] if device == CUDA else MemoryError
        return str(raised.value).rpartition(": ")[2]

    cpu = torch.device("cpu")
    kept = "; what was finished is kept"
    assert said(cpu, "method=patchcore") == (
        "lower backbone.batch_size, then backbone.feature_memory_mb, then dataset.resize, or take a smaller backbone.name"
        + kept
    )
    draem = "lower method.batch_size, then dataset.resize"
    assert said(cpu, "method=draem") == draem + kept
    assert said(CUDA, "method=draem") == draem + ", or take gpu.precision=bf16" + kept
    assert said(CUDA, "method=draem", "gpu.precision=bf16") == draem + kept
    assert "method.batch_size, then method.feature_memory_mb" in said(cpu, "method=efficientad")


def too_much(*_: Any, **__: Any) -> Any:
    """Ask for more memory than there is."""
    return torch.empty(1 << 50)


PHASES = [
    (backbones.Backbone, "pyramid", "building the detector"),
    (backbones, "load_file", "building the detector"),
    (stream, "load_tasks", "reading the images"),
    (backbones.Normalisation, "forward", "trying an image"),
    (checkpoint.Checkpoints, "load_stage", "what an earlier process learned"),
    (Strategy, "learn", "learning brick+cloth+plate"),
    (PaDiM, "training_step", "learning brick+cloth+plate"),
    (Strategy, "state", "saving what was learned of brick+cloth+plate"),
    (evaluation, "predict", "evaluating brick"),
    (evaluation, "metrics_of", "evaluating brick"),
    (evaluation, "inference_cost", "timing"),
    (thresholds, "calibrate", "setting thresholds"),
]


@pytest.mark.parametrize(("owner", "name", "phase"), PHASES, ids=[f"{name}" for _, name, _ in PHASES])
def test_every_phase_of_a_run_is_named(
    owner: Any, name: str, phase: str, train: Train, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["method=padim", "strategy=joint"]
    if name == "load_file":
        words += [
            "backbone.checkpoint=package:small.safetensors",
            "backbone.arguments.channels=[48,96,192,384]",
        ]
    monkeypatch.setattr(owner, name, too_much, raising=False)
    failed = train(*words)
    assert failed.returncode == 1 and failed.stderr.count("\n") == 1, failed.stderr
    assert f"this machine's memory was not enough for {phase} (" in failed.stderr
    assert ": lower " in failed.stderr and "what was finished is kept" in failed.stderr


def test_every_phase_of_using_a_run_is_named(
    train: Train, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert train("method=padim", "task_order.tasks=[brick]").returncode == 0
    (run,) = run_directories(tmp_path)
    images = str(folder / "brick/test/blot")
    predict = ("predict", str(run), images, "--output", str(tmp_path / "predicted"))
    export = ("export", str(run), "--formats", "torch")

    def said(owner: Any, name: str, *words: str, value: Any = too_much) -> str:
        with monkeypatch.context() as patched:
            patched.setattr(owner, name, value)
            failed = clbench(*words)
        assert failed.returncode not in (0, None) and failed.stderr.count("\n") == 1, failed.stderr
        return failed.stderr

    assert "not enough for predicting 2 images" in (line := said(PaDiM, "forward", *predict))
    assert "--batch-size" in line and "--device cpu" not in line  # it is there already
    assert "not enough for predicting 2 images" in said(
        loading.Found, "map", *predict, value=property(too_much)
    )
    assert f"not enough for loading {run}" in (line := said(PaDiM, "restore", *predict))
    assert "use it where more memory is free" in line and "--device cpu" not in line
    assert f"not enough for exporting {run}" in said(PaDiM, "embedding", *export)
    assert f"not enough for exporting {run}" in said(PaDiM, "for_export", *export)
    assert f"not enough for exporting {run}" in said(torch.export, "export", *export)
    assert f"not enough for exporting {run}" in said(exporting, "write_torch", *export)


@pytest.mark.parametrize(
    ("owner", "name"), [(nn.Module, "to"), (backbones.Normalisation, "forward"), (distillation, "_targets")]
)
def test_distilling_is_named(
    owner: Any, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    from test_distil import distil

    monkeypatch.setattr(owner, name, too_much)
    assert distil(tmp_path / "teacher.safetensors", "--steps", "1") != 0
    errors = capsys.readouterr().err
    assert "this machine's memory was not enough for distilling (" in errors and "--batch-size" in errors
