"""What gpu.precision switches, what stays in single precision, and the gradient scale of float16."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from conftest import Train, run_directories
from torch import Tensor
from torch.overrides import TorchFunctionMode

from clbench import assembly, evaluation, precision
from clbench.backbones import Backbone, FeaturePyramid
from clbench.config import check
from clbench.config.sources import composed
from clbench.loading import load
from clbench.methods.base import Detector, Prediction
from clbench.methods.cfa import CFA
from clbench.methods.draem import DRAEM
from clbench.methods.efficientad import EfficientAD
from clbench.methods.fastflow import FastFlow
from clbench.methods.maps import to_image_size
from clbench.methods.padim import PaDiM
from clbench.methods.stfpm import STFPM
from clbench.strategies.finetune import Finetune
from clbench.testing.small import SmallDetector
from clbench.training import Descent, train

MIXED = {"fp32": None, "tf32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


@pytest.fixture
def flags() -> Iterator[Callable[[], tuple[bool, bool]]]:
    """Whether matrix products and convolutions are in TF32 on a GPU, by both of the names that torch has for it."""
    cuda: Any = torch.backends.cuda.matmul
    cudnn: Any = torch.backends.cudnn

    def found() -> tuple[bool, bool]:
        known = cuda.allow_tf32, cudnn.allow_tf32  # raises where the two names say different things
        if hasattr(cudnn, "conv"):
            assert known == (cuda.fp32_precision == "tf32", cudnn.conv.fp32_precision == "tf32")
        return known

    yield found
    precision.use_tf32(False)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in for torch.cuda, with one GPU."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)


@pytest.mark.parametrize("name", MIXED)
def test_tf32_is_switched_by_the_precision_alone(name: str, gpu: None, flags: Callable[[], Any]) -> None:
    for before in (True, False):
        precision.use_tf32(before)
        settings = check(composed("gpu=cuda", f"gpu.precision={name}")).gpu
        assert assembly.select_device(settings) == torch.device("cuda", 0)
        assert flags() == (name == "tf32",) * 2
        with precision.single_precision(torch.device("cpu")):
            assert flags() == (False, False)
        assert flags() == (name == "tf32",) * 2


def test_what_ends_in_an_error_leaves_the_precision_as_it_was(flags: Callable[[], Any]) -> None:
    precision.use_tf32(True)
    with pytest.raises(ValueError), precision.single_precision(torch.device("cpu")):
        raise ValueError
    assert flags() == (True, True)


@pytest.mark.parametrize("method", ["patchcore", "efficientad", "stfpm", "draem"])
@pytest.mark.parametrize("name", ["fp32", "tf32", "bf16"])
def test_every_network_follows_the_run(method: str, name: str) -> None:
    detector = assembly.build_detector(
        check(composed(f"method={method}", "gpu=cpu", f"gpu.precision={name}"))
    )
    frozen = [module for module in detector.modules() if isinstance(module, FeaturePyramid)]
    assert bool(frozen) == (method != "draem")
    assert {detector.precision, *(pyramid.dtype for pyramid in frozen)} == {MIXED[name]}


def images(count: int, seed: int) -> Tensor:
    random = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, 3, 64, 64), generator=random, dtype=torch.uint8)


def backbone() -> Backbone:
    return Backbone("resnet18", pretrained=False, arguments={"channels": [16, 16, 32, 64]})


def builders(cache: Path) -> dict[str, Callable[[], Detector]]:
    return {
        "padim": lambda: PaDiM(backbone(), layers=[1, 2]),
        "cfa": lambda: CFA(backbone(), layers=[1, 2], epochs=1),
        "stfpm": lambda: STFPM(backbone(), layers=[1, 2], epochs=1, batch_size=4),
        "fastflow": lambda: FastFlow(backbone(), layers=[1], steps=2, epochs=1, batch_size=4),
        "draem": lambda: DRAEM(
            texture_count=3,
            reconstructive_width=4,
            discriminative_width=4,
            epochs=1,
            batch_size=4,
            cache=str(cache),
        ),
        "efficientad": lambda: EfficientAD(
            teacher="random", width=8, penalty_count=3, epochs=1, batch_size=4, cache=str(cache)
        ),
    }


class Products(TorchFunctionMode):
    """Notes the matrix products and convolutions outside of networks that are not in single precision."""

    NAMES = (
        "matmul",
        "bmm",
        "baddbmm_",
        "addmm",
        "mm",
        "solve_triangular",
        "grid_sample",
        "affine_grid",
        "einsum",
    )

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[str] = set()
        self.rounded: set[str] = set()

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(function, "__name__", "")
        if name in self.NAMES or name in {f"__r{each}__" for each in self.NAMES} | {
            f"linalg_{each}" for each in self.NAMES
        }:
            self.seen.add(name)
            if torch.is_autocast_enabled("cpu") or torch.backends.cuda.matmul.allow_tf32:
                self.rounded.add(name)
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("method", ["padim", "cfa", "stfpm", "fastflow", "draem", "efficientad"])
def test_geometry_statistics_and_distances_are_in_single_precision(
    method: str, tmp_path: Path, flags: Callable[[], Any]
) -> None:
    """CFA's search for neighbours is a function of its own, and tested with it."""
    detector = builders(tmp_path)[method]()
    detector.precision = torch.bfloat16
    precision.use_tf32(True)
    with Products() as products:
        train(detector, 0, images(6, 0), [], seed=0)
        with torch.no_grad():
            maps, scores = detector.eval().predict(images(2, 1))
    assert maps.dtype == scores.dtype == torch.float32
    assert products.rounded <= ({"addmm"} if method == "cfa" else set())
    assert products.seen or method in ("stfpm", "fastflow", "efficientad")


def test_a_prediction_in_half_precision_is_one_of_networks_in_half_precision(tmp_path: Path) -> None:
    """Of trained networks too, which the frozen ones' type says nothing of."""
    kinds: set[torch.dtype] = set()
    for method, build in builders(tmp_path).items():
        detector = build()
        train(detector, 0, images(6, 0), [], seed=0)
        kinds.clear()
        for module in detector.modules():
            if isinstance(module, torch.nn.Conv2d | torch.nn.Linear) and module.weight.requires_grad:
                module.register_forward_hook(lambda _, __, found: kinds.add(found.dtype))
        detector.eval().precision = torch.bfloat16
        with torch.no_grad():
            half = detector.predict(images(2, 1))
            detector.precision = None
            whole = detector.predict(images(2, 1))
        assert kinds == (set() if method == "padim" else {torch.bfloat16, torch.float32}), method
        assert half.maps.dtype == half.scores.dtype == torch.float32
        assert torch.equal(half.maps, whole.maps) == (method == "padim")
        spread = float(whole.maps.max() - whole.maps.min())
        assert float((half.maps - whole.maps).square().mean().sqrt()) < 0.05 * spread, method


# The gradient scale of float16


def scales(monkeypatch: pytest.MonkeyPatch, every: int = 2) -> list[float]:
    """The gradient scale at the beginning of each training to come, which doubles after `every` steps."""
    seen: list[float] = []
    scaler = torch.amp.GradScaler

    class Fast(scaler):  # type: ignore[misc, valid-type]
        def __init__(self, *arguments: Any, **named: Any):
            super().__init__(*arguments, **named, init_scale=8.0, growth_interval=every)

    run = Descent.run

    def noted(self: Descent, *arguments: Any) -> None:
        seen.append(self.scaler.get_scale())
        run(self, *arguments)

    monkeypatch.setattr(torch.amp, "GradScaler", Fast)
    monkeypatch.setattr(Descent, "run", noted)
    return seen


def test_the_gradient_scale_goes_on_from_stage_to_stage(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = scales(monkeypatch)
    detector = STFPM(backbone(), layers=[1], epochs=1, batch_size=2, held_out=0.0)
    detector.precision = torch.float16
    for stage in range(3):
        train(detector, stage, images(4, stage), [], seed=0)
    assert seen == [8, 16, 32]


SMALL = (
    "method=stfpm",
    "strategy=finetune",
    "method.epochs=1",
    "method.batch_size=2",
    "method.held_out=0",
    "gpu=auto",
)


def test_a_continued_run_goes_on_with_its_gradient_scale(
    train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """float16 on the CPU, where a run does not take it: a stand-in for the choice of a device."""
    monkeypatch.setattr(assembly, "select_device", lambda gpu: torch.device("cpu"))
    seen = scales(monkeypatch, every=3)
    assert train(*SMALL, "gpu.precision=fp16", "experiment=whole").returncode == 0
    assert seen == [8, 16, 32]
    del seen[:]
    with monkeypatch.context() as stopping:
        step, after = Descent._step, [4]  # within the second stage

        def stopped(self: Descent, *arguments: Any) -> None:
            after[0] -= 1
            if after[0] < 0:
                raise KeyboardInterrupt
            step(self, *arguments)

        stopping.setattr(Descent, "_step", stopped)
        train(*SMALL, "gpu.precision=fp16", "experiment=parts")
    assert train(*SMALL, "gpu.precision=fp16", "experiment=parts").returncode == 0
    assert seen == [8, 16, 16, 32]
    (whole,), (parts,) = (run_directories(tmp_path, name) for name in ("whole", "parts"))
    assert (whole / "metrics.csv").read_bytes() == (parts / "metrics.csv").read_bytes()
    newest = max((parts / "checkpoint").glob("stage-*.json")).read_text().split("\n")[1]
    assert json.loads(newest)["gradient_scale"]["scale"] == 64


def test_a_run_of_an_earlier_version_without_a_gradient_scale_is_continued(
    train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from clbench.recording.checkpoint import Checkpoints

    monkeypatch.setattr(assembly, "select_device", lambda gpu: torch.device("cpu"))
    save, left = Checkpoints.save_stage, [2]

    def as_before(self: Checkpoints, stage: int, tensors: dict[str, Tensor], data: dict[str, Any]) -> None:
        save(self, stage, tensors, {name: value for name, value in data.items() if name != "gradient_scale"})
        left[0] -= 1
        if not left[0]:
            raise KeyboardInterrupt

    with monkeypatch.context() as earlier:
        earlier.setattr(Checkpoints, "save_stage", as_before)
        train(*SMALL, "gpu.precision=fp16")
    seen = scales(monkeypatch)
    assert train(*SMALL, "gpu.precision=fp16").returncode == 0
    assert seen == [8]


# What only GPUs do


@pytest.mark.parametrize("name", ["fp32", "tf32", "bf16"])
def test_frozen_networks_are_laid_out_for_tensor_cores(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in for a GPU: nothing is moved there."""
    config = check(composed("method=patchcore", "gpu=cuda", f"gpu.precision={name}"))
    for device in (torch.device("cpu"), torch.device("cuda", 0)):
        detector = assembly.build_detector(config)
        monkeypatch.setattr(detector, "to", lambda device: detector)  # noqa: B023
        assembly.place(detector, config.gpu, device)
        weights = [each for each in detector.parameters() if each.dim() == 4 and min(each.shape[1:3]) > 1]
        last = all(each.is_contiguous(memory_format=torch.channels_last) for each in weights)
        assert last == (device.type == "cuda" and name != "fp32")


def test_a_run_that_was_made_with_gpu_compile_is_read_and_known(train: Train, tmp_path: Path) -> None:
    assert train("method=padim").returncode == 0
    (run,) = run_directories(tmp_path)
    config = yaml.safe_load((run / "config.yaml").read_text())
    assert "compile" not in config["gpu"]
    config["gpu"]["compile"] = True
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    summary = json.loads((run / "summary.json").read_text())
    (run / "summary.json").write_text(json.dumps({**summary, "composed_from": None}))
    again = train("method=padim")
    assert again.returncode == 0 and "finished already" in again.stdout, again.stderr
    assert load(run, device="cpu").detector.precision is None
    refused = train("gpu.compile=true")
    assert refused.returncode == 2
    assert "there is no setting gpu.compile any more: a frozen network sees an image once" in refused.stderr


def test_predictions_come_back_from_a_gpu_while_the_next_batch_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a stand-in for CUDA's tensors, pinned memory and events, as there is no GPU here."""
    told: list[str] = []

    class OnGpu(Tensor):
        device = torch.device("cuda", 0)  # type: ignore[assignment]
        __torch_function__ = torch._C._disabled_torch_function_impl  # what is made from one is a plain tensor

    class Event:
        def record(self) -> None:
            told.append("recorded")

        def synchronize(self) -> None:
            told.append("waited")

    class Brightness(SmallDetector):
        def forward(self, images: Tensor) -> Prediction:
            told.append("ran")
            maps = images.float().mean(1)
            chosen = torch.arange(len(images))
            return Prediction(*(found.as_subclass(OnGpu) for found in (maps, maps.amax((1, 2)), chosen)))

        def predict(self, images: Tensor) -> Prediction:
            return self(images)

    def empty(*size: Any, pin_memory: bool = False, **settings: Any) -> Tensor:
        if pin_memory:
            told.append("pinned")
        return torch.zeros(*size, **settings)

    monkeypatch.setattr(evaluation.torch, "empty", empty)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    given = images(2 * evaluation.BATCH_SIZE, 1)
    found = list(evaluation.predictions(Finetune(Brightness()), given, 0, torch.device("cpu")))
    for batch, part in zip(found, given.split(evaluation.BATCH_SIZE), strict=True):
        assert type(batch.maps) is Tensor and torch.equal(batch.maps, part.float().mean(1))
        assert batch.chosen is not None and batch.chosen.tolist() == list(range(evaluation.BATCH_SIZE))
    started = ["ran", *["pinned"] * 3, "recorded"]
    assert told == [
        *started,
        *started,
        "waited",
        "waited",
    ]  # the second batch begins before the first is waited for


def test_tables_made_while_a_graph_is_traced_or_in_inference_mode_serve_later_calls() -> None:
    class Blur(torch.nn.Module):
        def forward(self, grids: Tensor) -> Tensor:
            return to_image_size(grids, (23, 29), 3.5)

    grids = torch.rand(2, 8, 8)
    torch.export.export(Blur(), (grids,))
    expected = Blur()(grids)  # a table of the trace would be of no tensor
    with torch.inference_mode():
        assert torch.equal(
            to_image_size(grids, (23, 31), 3.5)[..., 0], to_image_size(grids, (23, 31), 3.5)[..., 0]
        )
    to_image_size(grids.clone().requires_grad_(), (23, 31), 3.5).sum().backward()
    assert expected.isfinite().all()
