"""Every method and strategy of the package passes the contracts that it ships."""

from pathlib import Path

import pytest

from clbench.backbones import Backbone
from clbench.methods.base import Detector
from clbench.methods.cfa import CFA
from clbench.methods.draem import DRAEM
from clbench.methods.efficientad import EfficientAD
from clbench.methods.fastflow import FastFlow
from clbench.methods.padim import PaDiM
from clbench.methods.patchcore import PatchCore
from clbench.methods.stfpm import STFPM
from clbench.strategies.finetune import Finetune
from clbench.strategies.joint import Joint
from clbench.strategies.native import Native
from clbench.strategies.replay import Replay
from clbench.strategies.single import Single
from clbench.testing import DetectorContract, SmallDetector, StrategyContract
from clbench.testing.detectors import BuildDetector
from clbench.testing.strategies import BuildStrategy


def backbone() -> Backbone:
    return Backbone("resnet18", pretrained=False, arguments={"channels": [16, 16, 32, 64]})


class TestSmallDetector(DetectorContract):
    @pytest.fixture
    def build(self) -> BuildDetector:
        return SmallDetector


class TestPatchCore(DetectorContract):
    @pytest.fixture
    def build(self) -> BuildDetector:
        return lambda: PatchCore(backbone(), layers=[2, 3], memory_size=60)


class TestPaDiM(DetectorContract):
    @pytest.fixture(params=["average", "pooled", "per_task"])
    def build(self, request: pytest.FixtureRequest) -> BuildDetector:
        return lambda: PaDiM(backbone(), layers=[1, 2], features=20, update=request.param)


class TestCFA(DetectorContract):
    @pytest.fixture
    def build(self) -> BuildDetector:
        return lambda: CFA(backbone(), layers=[1, 2, 3], epochs=2, batch_size=3)


class TestSTFPM(DetectorContract):
    @pytest.fixture
    def build(self) -> BuildDetector:
        return lambda: STFPM(backbone(), layers=[1, 2, 3], epochs=3, batch_size=3, held_out=0.2, patience=1)


class TestEfficientAD(DetectorContract):
    @pytest.fixture
    def build(self, tmp_path: Path) -> BuildDetector:
        return lambda: EfficientAD(
            teacher="random", width=8, penalty_count=3, epochs=2, batch_size=2, cache=str(tmp_path)
        )


class TestDRAEM(DetectorContract):
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
