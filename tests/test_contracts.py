"""Every method and strategy of the package passes the contracts that it ships."""

from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from torch import Tensor

from clbench.backbones import Backbone
from clbench.methods.base import Detector
from clbench.methods.cfa import CFA
from clbench.methods.draem import DRAEM
from clbench.methods.efficientad import EfficientAD
from clbench.methods.fastflow import FastFlow
from clbench.methods.padim import PaDiM
from clbench.methods.patchcore import PatchCore
from clbench.methods.stfpm import STFPM
from clbench.strategies.base import Strategy
from clbench.strategies.finetune import Finetune
from clbench.strategies.joint import Joint
from clbench.strategies.native import Native
from clbench.strategies.replay import Replay
from clbench.strategies.single import Single
from clbench.testing import DetectorContract, SmallDetector, StrategyContract
from clbench.testing.detectors import BuildDetector
from clbench.testing.strategies import BuildStrategy
from clbench.training import Batch


def backbone() -> Backbone:
    return Backbone("resnet18", pretrained=False, arguments={"channels": [16, 16, 32, 64]})


class TestSmallDetector(DetectorContract):
    @pytest.fixture
    def build(self) -> BuildDetector:
        return SmallDetector


class TestPatchCore(DetectorContract):
    exports = False  # tests/test_export.py does, to ONNX too

    @pytest.fixture
    def build(self) -> BuildDetector:
        return lambda: PatchCore(backbone(), layers=[2, 3], memory_size=60)


class TestPaDiM(DetectorContract):
    exports = False  # tests/test_export.py does, to ONNX too

    @pytest.fixture(params=["average", "pooled", "per_task"])
    def build(self, request: pytest.FixtureRequest) -> BuildDetector:
        return lambda: PaDiM(backbone(), layers=[1, 2], features=20, update=request.param)


class TestCFA(DetectorContract):
    exports = False  # tests/test_export.py does, to ONNX too

    @pytest.fixture
    def build(self) -> BuildDetector:
        return lambda: CFA(backbone(), layers=[1, 2, 3], epochs=2, batch_size=3)


class TestSTFPM(DetectorContract):
    exports = False  # tests/test_export.py does, to ONNX too

    @pytest.fixture
    def build(self) -> BuildDetector:
        return lambda: STFPM(backbone(), layers=[1, 2, 3], epochs=3, batch_size=3, held_out=0.2, patience=1)


class TestEfficientAD(DetectorContract):
    exports = False  # tests/test_export.py does, to ONNX too
    sizes = (40, 48)

    @pytest.fixture
    def build(self, tmp_path: Path) -> BuildDetector:
        return lambda: EfficientAD(
            teacher="random", width=8, penalty_count=3, epochs=2, batch_size=2, cache=str(tmp_path)
        )


class TestDRAEM(DetectorContract):
    exports = False  # tests/test_export.py does, to ONNX too
    sizes = (32, 48)

    @pytest.fixture
    def build(self, tmp_path: Path) -> BuildDetector:
        return lambda: DRAEM(
            reconstructive_width=4,
            discriminative_width=4,
            texture_count=3,
            epochs=2,
            batch_size=3,
            cache=str(tmp_path),
        )


class TestFastFlow(DetectorContract):
    exports = False  # tests/test_export.py does, to ONNX too

    @pytest.fixture(params=[False, True])
    def build(self, request: pytest.FixtureRequest) -> BuildDetector:
        return lambda: FastFlow(
            backbone(), layers=[1, 2], steps=2, trained_normalisation=request.param, epochs=2, batch_size=3
        )


class TestNative(StrategyContract):
    def detector(self) -> Detector:
        return PatchCore(backbone(), layers=[2, 3], memory_size=60)

    @pytest.fixture
    def build(self) -> BuildStrategy:
        return Native


class TestFinetune(StrategyContract):
    @pytest.fixture
    def build(self) -> BuildStrategy:
        return Finetune


class TestReplay(StrategyContract):
    @pytest.fixture(params=[7, 100])
    def build(self, request: pytest.FixtureRequest) -> BuildStrategy:
        return lambda detector: Replay(detector, replay_size=request.param)


class TestReplayOfHeldOutImages(TestReplay):
    def detector(self) -> Detector:
        return STFPM(backbone(), layers=[1, 2], epochs=2, batch_size=3, held_out=0.2, patience=1)


class TestJoint(StrategyContract):
    @pytest.fixture
    def build(self) -> BuildStrategy:
        return Joint


class TestSingle(StrategyContract):
    @pytest.fixture
    def build(self) -> BuildStrategy:
        return Single


class Integrating(Strategy):
    """Keeps tensors as SI does, changing them within a stage: one in place, one replaced, one that begins there."""

    def begin_stage(self, stage: int, images: Tensor) -> None:
        self.memory.setdefault("path", torch.zeros(()))
        self.memory.setdefault("norms", torch.zeros(0))

    def penalty(self, detector: Detector, batch: Batch) -> Tensor:
        return self.memory["path"] * next(detector.parameters()).square().sum()

    def after_backward(self, gradients: Mapping[str, Tensor]) -> None:
        self.norm = torch.stack([gradient.norm() for gradient in gradients.values()]).sum()[None]

    def after_step(self) -> None:
        self.memory["path"] += self.norm[0]
        self.memory["norms"] = torch.cat([self.memory["norms"], self.norm])
        self.memory[f"after {len(self.memory['norms'])}"] = self.norm.clone()
        del self.norm

    def end_stage(self, stage: int, images: Tensor) -> None:
        self.memory["drawn"] = torch.rand(3)  # torch's generators are seeded for it


class TestIntegrating(StrategyContract):
    @pytest.fixture
    def build(self) -> BuildStrategy:
        return Integrating


def test_a_strategy_that_hides_what_it_keeps_fails_its_contract() -> None:
    class Hiding(Integrating):
        def end_stage(self, stage: int, images: Tensor) -> None:
            self.hidden = {"images": [images.clone()]}

    with pytest.raises(AssertionError, match="held and not among kept"):
        StrategyContract().test_the_footprint_counts_every_byte_that_it_keeps(Hiding)


def test_a_detector_that_forgets_what_it_counted_fails_its_contract() -> None:
    class Counting(SmallDetector):
        tasks = 0

        def finish_task(self, images: Tensor) -> None:
            self.tasks += 1  # is in no state, so a new process begins at nothing
            self.error = torch.tensor(float(self.tasks))

    with pytest.raises(AssertionError, match="left at place 0: error differs"):
        DetectorContract().test_a_training_left_at_any_step_and_continued_is_the_training(Counting)


def test_a_buffer_registered_while_learning_comes_back() -> None:
    class Growing(SmallDetector):
        def finish_task(self, images: Tensor) -> None:
            super().finish_task(images)
            self.register_buffer(f"bank_{len(self._buffers)}", images.float().mean(0))

    DetectorContract().test_a_state_brings_a_detector_back(Growing)
    DetectorContract().test_the_footprint_counts_every_byte_of_the_state(Growing)


def test_what_overrides_a_hook_of_steps_needs_gradients_unless_it_says_otherwise_itself() -> None:
    class Mixed:
        def after_step(self) -> None: ...

    class ByMixing(Mixed, Strategy): ...

    class Distilled(Replay):
        def penalty(self, detector: Detector, batch: Batch) -> None: ...

    class Inheriting(Distilled): ...

    class WhereThereAreSome(Distilled):
        needs_gradients = False  # it replays, too

    class StillSo(WhereThereAreSome): ...

    class NotAnyMore(WhereThereAreSome):
        def after_backward(self, gradients: Mapping[str, Tensor]) -> None: ...

    assert all(kind.needs_gradients for kind in (ByMixing, Distilled, Inheriting, NotAnyMore, Integrating))
    assert not any(kind.needs_gradients for kind in (Strategy, Replay, Single, WhereThereAreSome, StillSo))
    StrategyContract().test_its_flags_say_what_it_does(lambda detector: StillSo(detector, replay_size=7))
