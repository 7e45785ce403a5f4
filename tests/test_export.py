"""What is exported says the same as the detector, in ONNX Runtime and in torch, for one image and for several."""

import copy
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import Train, clbench, run_directories
from torch import Tensor

from clbench import exporting
from clbench.backbones import Backbone
from clbench.errors import UserError
from clbench.methods.base import Detector, Prediction
from clbench.methods.cfa import CFA
from clbench.methods.dinosaur import DINOSaur
from clbench.methods.draem import DRAEM
from clbench.methods.efficientad import EfficientAD
from clbench.methods.fastflow import FastFlow
from clbench.methods.padim import PaDiM
from clbench.methods.patchcore import PatchCore
from clbench.methods.stfpm import STFPM
from clbench.training import train

onnxruntime = pytest.importorskip("onnxruntime")


def images(count: int, seed: int) -> Tensor:
    random = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, 3, 48, 48), generator=random, dtype=torch.uint8)


def resnet() -> Backbone:
    return Backbone("resnet18", pretrained=False, arguments={"channels": [16, 16, 32, 64]})


def transformer(name: str) -> Backbone:
    return Backbone(name, pretrained=False, arguments={"img_size": 48})


def flow(backbone: Backbone) -> FastFlow:
    return FastFlow(backbone, layers=[2], steps=2, hidden_ratio=0.16, epochs=1, batch_size=4)


METHODS: dict[str, Callable[[str], Detector]] = {
    "patchcore": lambda cache: PatchCore(resnet(), layers=[2, 3], memory_size=60),
    "patchcore of one neighbour": lambda cache: PatchCore(resnet(), layers=[2], memory_size=3, neighbours=1),
    "dinosaur": lambda cache: DINOSaur(resnet(), layers=[2, 3], smallest=3, radius=1),
    "padim": lambda cache: PaDiM(resnet(), layers=[1, 2, 3], features=30),
    "padim per task": lambda cache: PaDiM(resnet(), layers=[1, 2], features=20, update="per_task"),
    "cfa": lambda cache: CFA(resnet(), layers=[1, 2, 3], epochs=1),
    "stfpm": lambda cache: STFPM(resnet(), layers=[1, 2, 3], epochs=1),
    "efficientad": lambda cache: EfficientAD(
        teacher="random", width=8, penalty_count=3, epochs=1, batch_size=2, cache=cache
    ),
    "draem": lambda cache: DRAEM(
        reconstructive_width=8,
        discriminative_width=8,
        texture_count=3,
        epochs=3,
        learning_rate=0.01,
        cache=cache,
    ),
    "fastflow": lambda cache: FastFlow(resnet(), layers=[1, 2, 3], steps=2, epochs=1, batch_size=4),
    "fastflow on deit": lambda cache: flow(transformer("deit_tiny_distilled_patch16_224")),
    "fastflow on cait": lambda cache: flow(transformer("cait_xxs24_224")),
}


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tmp_path_factory.mktemp("cache"))


@pytest.mark.parametrize(
    "method",
    [
        pytest.param(name, marks=pytest.mark.long) if " " in name or name in ("dinosaur", "draem") else name
        for name in METHODS
    ],
)
def test_every_method_says_the_same_in_onnx_runtime_and_in_torch(
    method: str, cache: str, tmp_path: Path
) -> None:
    detector = METHODS[method](cache)
    for task in range(2 if detector.native else 1):
        train(detector, task, images(6, task), [], 0)
    test = images(5, 9)
    with torch.no_grad():
        maps, scores = detector.eval()(test)
    program, any_number = exporting.trace(detector, test)
    assert any_number
    spread = float(maps.max() - maps.min())
    for runtime in (
        exporting.write_onnx(program, tmp_path / "model.onnx"),
        exporting.write_torch(program, tmp_path / "model.pt2"),
    ):
        for count in (1, 2, 5):
            found_maps, found_scores = runtime(test[:count])
            assert found_maps.shape == (count, 48, 48) and found_scores.shape == (count,)
            assert float((found_maps - maps[:count]).abs().max()) <= 1e-4 * spread
            assert float((found_scores - scores[:count]).abs().max()) <= 1e-4 * spread
        assert exporting.difference(Prediction(maps, scores), runtime, test, any_number) <= 1e-4
        shifted = Prediction(maps + 2e-4 * spread, scores)
        assert exporting.difference(shifted, runtime, test, any_number) > exporting.TOLERANCE


class Counting(Detector):
    """Its maps are of each image by itself, and how often it is called is a number in its graph."""

    def forward(self, images: Tensor) -> Prediction:
        maps = torch.stack([image.float().mean(0) for image in images])
        return Prediction(maps, maps.amax((1, 2)))


def test_where_the_number_of_images_is_fixed_the_graph_takes_one(tmp_path: Path) -> None:
    test = images(3, 0)
    ours = Counting()(test)
    program, any_number = exporting.trace(Counting(), test)
    assert not any_number
    runtime = exporting.write_onnx(program, tmp_path / "model.onnx")
    assert exporting.difference(ours, runtime, test, any_number) <= exporting.TOLERANCE


class Deciding(Counting):
    """What it does depends on what it sees."""

    def forward(self, images: Tensor) -> Prediction:
        return super().forward(images if float(images.float().mean()) > 100 else 255 - images)


def test_what_cannot_be_traced_says_why_in_one_line() -> None:
    with pytest.raises(UserError, match="cannot be written for torch.export: ") as error:
        exporting.trace(Deciding(), images(2, 0))
    assert "\n" not in str(error.value)


def test_the_command_writes_checks_and_says_what_goes_with_the_graph(train: Train, tmp_path: Path) -> None:
    assert train("method=patchcore", "strategy=single", "method.held_out=0.2").returncode == 0
    (run,) = run_directories(tmp_path)
    done = clbench(
        "export", str(run), "--task", "cloth", "--input", "float32", "--output", str(tmp_path / "to")
    )
    assert done.returncode == 0, done.stderr
    assert "model.onnx in ONNX Runtime agrees with the detector to" in done.stdout
    assert sorted(file.name for file in (tmp_path / "to").iterdir()) == [
        "model.json",
        "model.onnx",
        "model.pt2",
    ]
    about = json.loads((tmp_path / "to/model.json").read_text())
    assert about["input"] == {
        "images": [None, 3, 48, 48],
        "type": "float32",
        "resize": 48,
        "crop": None,
        "tile": None,
        "overlap": None,
    }
    assert about["thresholds"]["tasks"] == ["cloth"] and about["thresholds"]["held_out"]
    import clbench as package

    trained = package.load(run, task="cloth")
    assert trained.thresholds is not None
    assert about["thresholds"]["pixel"]["0.01"] == trained.thresholds.at(0.01, 0.01)[0]
    session = onnxruntime.InferenceSession(str(tmp_path / "to/model.onnx"))
    test = images(2, 3)
    (scores,) = session.run(["scores"], {"images": (test.float() / 255).numpy()})
    torch.testing.assert_close(torch.from_numpy(scores), trained(test).scores, rtol=1e-3, atol=1e-4)


def test_missing_packages_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exporting.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install -e '\.\[export\]'"):
        exporting.require_onnx()


def test_a_detector_is_not_changed_by_another_ones_export(cache: str) -> None:
    """Tracing leaves no symbols in what detectors share, such as the matrices that maps are resampled with."""
    detector = METHODS["patchcore"](cache)
    train(detector, 0, images(6, 0), [], 0)
    other = copy.deepcopy(detector.eval())
    before = other(images(2, 1)).maps
    exporting.trace(detector, images(2, 1))
    assert torch.equal(other(images(2, 1)).maps, before)
