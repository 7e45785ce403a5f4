"""Every method and strategy of the package passes the contracts that it ships, and each defect fails one of them."""

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from clbench.backbones import Backbone, unit
from clbench.methods.anomalydino import AnomalyDINO
from clbench.methods.base import Detector, Prediction, kept_state
from clbench.methods.cadic import CADIC
from clbench.methods.cfa import CFA
from clbench.methods.dinomaly import Dinomaly
from clbench.methods.dinosaur import DINOSaur
from clbench.methods.draem import DRAEM
from clbench.methods.efficientad import EfficientAD
from clbench.methods.fastflow import FastFlow
from clbench.methods.padim import PaDiM
from clbench.methods.patchcore import PatchCore
from clbench.methods.stfpm import STFPM
from clbench.methods.ucad import UCAD
from clbench.strategies.base import Strategy, copy_of
from clbench.strategies.finetune import Finetune
from clbench.strategies.joint import Joint
from clbench.strategies.native import Native
from clbench.strategies.replay import Replay
from clbench.strategies.single import Single
from clbench.testing import DetectorContract, SmallDetector, StrategyContract
from clbench.testing.detectors import BuildDetector
from clbench.testing.strategies import BuildStrategy
from clbench.training import Batch, split


def backbone() -> Backbone:
    return Backbone("resnet18", pretrained=False, arguments={"channels": [16, 16, 32, 64]})


def transformer() -> Backbone:
    arguments = {"patch_size": 8, "embed_dim": 24, "depth": 3, "num_heads": 2, "dynamic_img_size": True}
    return Backbone("vit_tiny_patch16_224", pretrained=False, arguments=arguments)


class TestSmallDetector(DetectorContract):
    @pytest.fixture
    def build(self) -> BuildDetector:
        return SmallDetector


class TestPatchCore(DetectorContract):
    exports = False  # tests/test_export.py does, to ONNX too

    @pytest.fixture
    def build(self) -> BuildDetector:
        return lambda: PatchCore(backbone(), layers=[2, 3], memory_size=60)


class TestAnomalyDINO(DetectorContract):
    @pytest.fixture
    def build(self) -> BuildDetector:
        return lambda: AnomalyDINO(transformer(), layers=[0, 1], memory_size=60, rotations=2)


class TestDINOSaur(DetectorContract):
    exports = False  # tests/test_export.py does, to ONNX too

    @pytest.fixture
    def build(self) -> BuildDetector:
        return lambda: DINOSaur(transformer(), layers=[1], smallest=3, radius=1)


class TestCADIC(DetectorContract):
    @pytest.fixture
    def build(self) -> BuildDetector:
        return lambda: CADIC(transformer(), layers=[1], memory_size=60)


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


class TestDinomaly(DetectorContract):
    @pytest.fixture
    def build(self) -> BuildDetector:
        return lambda: Dinomaly(
            transformer(),
            groups=[[0, 1], [2]],
            steps=4,
            batch_size=3,
            warm_up=2,
            mining_steps=8,
            mining_restart=False,
            map_side=24,
        )


class TestUCAD(DetectorContract):
    @pytest.fixture
    def build(self) -> BuildDetector:
        return lambda: UCAD(
            transformer(), block=1, key_size=5, memory_size=6, segment_count=3, epochs=2, batch_size=3
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


class TestReplayBesideEarlyStopping(StrategyContract):
    def detector(self) -> Detector:
        return STFPM(backbone(), layers=[1, 2], epochs=2, batch_size=3, held_out=0.2, patience=1)

    @pytest.fixture
    def build(self) -> BuildStrategy:
        return lambda detector: Replay(detector, replay_size=7)


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


class Distilling(Strategy):
    """Keeps the weights after each task, and makes the teacher of the next of them, for as long as it learns."""

    def begin_stage(self, stage: int, images: Tensor) -> None:
        self.teacher = copy_of(self.detector)
        self.teacher.restore({**kept_state(self.detector), **self.memory})

    def penalty(self, detector: Detector, batch: Batch) -> Tensor:
        with torch.no_grad():
            (taught,) = self.teacher.outputs(batch.images)
        return F.mse_loss(detector.outputs(batch.images)[0], taught)

    def end_stage(self, stage: int, images: Tensor) -> None:
        self.memory = {name: tensor.clone() for name, tensor in kept_state(self.detector).items()}
        del self.teacher


class TestDistilling(StrategyContract):
    @pytest.fixture
    def build(self) -> BuildStrategy:
        return Distilling


class Means(Detector):
    """Collects: the mean picture of each task; an image is judged by its distance to the nearest."""

    native = True
    pictures: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("pictures", torch.empty(0))

    def forget(self) -> None:
        self.pictures = self.pictures[:0]

    def start_task(self, task: int, images: Tensor, stored: Tensor) -> None:
        self.sum, self.count = torch.zeros_like(unit(images[0])), 0

    def training_step(self, images: Tensor) -> None:
        self.sum += unit(images).sum(0)
        self.count += len(images)

    def finish_task(self, images: Tensor) -> None:
        self.pictures = torch.cat([self.pictures, self.sum[None] / self.count])
        del self.sum

    def forward(self, images: Tensor) -> Prediction:
        distances = (unit(images)[:, None] - self.pictures).square().mean(2)
        maps = distances.gather(
            1, distances.mean((2, 3)).argmin(1)[:, None, None, None].expand_as(distances)
        )[:, 0]
        return Prediction(maps, maps.amax((1, 2)))


class TestMeans(DetectorContract):
    @pytest.fixture
    def build(self) -> BuildDetector:
        return Means


Defect = TypeVar("Defect", bound=type)

# Classes with a defect, each with the name of the test that it fails, and words of the failure.
DEFECTS: list[tuple[type[Detector] | type[Strategy], str, str]] = []


def fails(test: str, words: str) -> Callable[[Defect], Defect]:
    """Put a class into the table of defects."""

    def add(defect: Defect) -> Defect:
        DEFECTS.append((defect, test, words))
        return defect

    return add


def scaled(prediction: Prediction, factor: float | Tensor) -> Prediction:
    return Prediction(prediction.maps * factor, prediction.scores * factor)


JUDGING = "test_no_test_image_influences_what_is_learned_or_predicted"


@fails(JUDGING, "predicted after judging other images .*: maps differs")
class LargestSoFar(SmallDetector):
    top = 0.0

    def forward(self, images: Tensor) -> Prediction:
        found = super().forward(images)
        self.top = max(self.top, float(found.maps.max()))
        return scaled(found, 1 / self.top)


@fails(JUDGING, "predicted after judging other images .*: maps differs")
class FirstBatchIsTheScale(SmallDetector):
    top: float | None = None

    def forward(self, images: Tensor) -> Prediction:
        found = super().forward(images)
        self.top = self.top or float(found.maps.max())
        return scaled(found, 1 / self.top)


@fails(JUDGING, "predicted after judging other images .*: scores differs")
class LearnsWhileItJudges(Means):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Tensor] = []

    def forward(self, images: Tensor) -> Prediction:
        maps, scores = super().forward(images)
        self.seen.append(unit(images).mean())
        return Prediction(maps, scores - torch.stack(self.seen).mean() if len(self.seen) > 2 else scores)


@fails(JUDGING, "judged other images .* before: maps differs")
class StrategyWithTheLargestSoFar(Strategy):
    top = 0.0

    def predict(self, images: Tensor, task: int) -> Prediction:
        found = super().predict(images, task)
        self.top = max(self.top, float(found.maps.max()))
        return Prediction(found.maps / self.top, found.scores)


@fails(JUDGING, "judged other images .* before: scores differs")
class CountsWhatItPredicts(Strategy):
    count = 0

    def predict(self, images: Tensor, task: int) -> Prediction:
        maps, scores = super().predict(images, task)
        self.count += len(images)
        return Prediction(maps, scores + self.count)


BESIDE = "test_an_image_is_judged_the_same_alone_and_beside_others"


@fails(BESIDE, "scores of a batch of 2 images")
class ScoresByTheLargestBeside(SmallDetector):
    def forward(self, images: Tensor) -> Prediction:
        maps, scores = super().forward(images)
        return Prediction(maps, scores / scores.max())


@fails(BESIDE, "maps of a batch of 2 images")
class FirstOfABatch(SmallDetector):
    def forward(self, images: Tensor) -> Prediction:
        maps, scores = super().forward(images)
        first = torch.arange(len(images))[:, None, None] == 0
        return Prediction(torch.where(first, maps * len(images), maps), scores)


@fails(BESIDE, "maps of a batch of 2 images")
class NormalisedByTheBatch(SmallDetector):
    def forward(self, images: Tensor) -> Prediction:
        maps, scores = super().forward(images)
        return Prediction(maps - maps.mean(), scores)


@fails(BESIDE, "scores of a batch of 6 images")
class NothingForSix(SmallDetector):
    def forward(self, images: Tensor) -> Prediction:
        maps, scores = super().forward(images)
        return Prediction(maps, scores * float("nan") if len(images) == 6 else scores)


EXPORT = "test_an_export_says_the_same"


@fails(EXPORT, "maps or scores of the export differ")
class OtherScoresWhereExported(SmallDetector):
    def forward(self, images: Tensor) -> Prediction:
        maps, scores = super().forward(images)
        return Prediction(maps, scores + 100 * torch.compiler.is_compiling())


@fails(EXPORT, "maps or scores of the export differ")
class OtherMapsWhereExported(SmallDetector):
    def forward(self, images: Tensor) -> Prediction:
        maps, scores = super().forward(images)
        return Prediction(maps * 1.01 if torch.compiler.is_compiling() else maps, scores)


STATE = "test_a_state_brings_a_detector_back"


@fails(STATE, "after another detector has learned: maps differs")
class KeptByTheClass(SmallDetector):
    brightness = torch.zeros(())

    def finish_task(self, images: Tensor) -> None:
        super().finish_task(images)
        type(self).brightness = unit(images).mean()

    def forward(self, images: Tensor) -> Prediction:
        return scaled(super().forward(images), self.brightness)


BRIGHTNESS: list[Tensor] = []


@fails(STATE, "after another detector has learned: scores differs")
class KeptByTheFile(SmallDetector):
    def finish_task(self, images: Tensor) -> None:
        super().finish_task(images)
        BRIGHTNESS[:] = [unit(images).mean()]

    def forward(self, images: Tensor) -> Prediction:
        maps, scores = super().forward(images)
        return Prediction(maps, scores + BRIGHTNESS[0])


@fails(STATE, "after another detector has learned: maps differs")
class KeptByADefault(SmallDetector):
    def finish_task(self, images: Tensor) -> None:
        super().finish_task(images)
        self.brightness(images)

    def brightness(self, images: Tensor | None = None, kept: list[Tensor] = []) -> Tensor:  # noqa: B006
        kept[:] = kept if images is None else [unit(images).mean()]
        return kept[0]

    def forward(self, images: Tensor) -> Prediction:
        return scaled(super().forward(images), self.brightness())


@fails("test_a_state_brings_it_back", "after another strategy has learned: maps differs")
class StrategyKeptByItsClass(Strategy):
    brightness = torch.zeros(())

    def end_stage(self, stage: int, images: Tensor) -> None:
        type(self).brightness = unit(images).mean()

    def predict(self, images: Tensor, task: int) -> Prediction:
        return scaled(super().predict(images, task), self.brightness)


HELD_OUT = "test_held_out_images_change_no_weights"


@fails(HELD_OUT, "other held-out images: encoder.weight differs")
class TrainsWhenItFinishes(SmallDetector):
    def finish_task(self, images: Tensor) -> None:
        super().finish_task(images)
        optimizer = torch.optim.SGD(self.parameters(), 0.1)
        with torch.enable_grad():
            self.training_step(images).backward()
        optimizer.step()


@fails(HELD_OUT, "other held-out images: decoder.bias differs")
class ShiftsWhenItFinishes(SmallDetector):
    def finish_task(self, images: Tensor) -> None:
        super().finish_task(images)
        self.decoder.bias += unit(images).mean((0, 2, 3))


@fails(HELD_OUT, "other held-out images: normalisation.running_mean differs")
class NormalisesWhenItFinishes(SmallDetector):
    def __init__(self) -> None:
        super().__init__()
        self.normalisation = nn.BatchNorm2d(3)

    def finish_task(self, images: Tensor) -> None:
        super().finish_task(images)
        self.normalisation.train()(unit(images))


IMAGES = "test_it_leaves_the_images_that_it_is_given_as_they_are"


@fails(IMAGES, "training_step changed its images")
class ErasesItsBatch(SmallDetector):
    def training_step(self, images: Tensor) -> Tensor:
        loss = super().training_step(images)
        images.zero_()
        return loss


@fails(IMAGES, "training_step changed its images")
class BrightensItsBatchByNumPy(SmallDetector):
    def training_step(self, images: Tensor) -> Tensor:
        images.numpy()[:] += 1
        return super().training_step(images)


@fails(IMAGES, "learning changed a task's images")
class ErasesWhatItCollected(Means):
    def training_step(self, images: Tensor) -> None:
        super().training_step(images)
        images.zero_()


@fails(IMAGES, "judging changed its images")
class ErasesWhatItJudged(SmallDetector):
    def forward(self, images: Tensor) -> Prediction:
        found = super().forward(images)
        images.zero_()
        return found


@fails(IMAGES, "learning changed a task's images")
class StrategyThatDarkens(Strategy):
    def begin_stage(self, stage: int, images: Tensor) -> None:
        images[:].floor_divide_(2)


FORGETTING = "test_its_own_update_keeps_what_forgetting_drops"


@fails(FORGETTING, "native and finetune predict the same")
class ForgetsNothing(Means):
    def forget(self) -> None:
        pass


@fails(FORGETTING, "native and finetune predict the same")
class KeepsNothing(Means):
    def start_task(self, task: int, images: Tensor, stored: Tensor) -> None:
        super().start_task(task, images, stored)
        self.forget()


@fails(FORGETTING, "native and finetune predict the same")
class KeepsWhatItNeverUses(Means):
    def forward(self, images: Tensor) -> Prediction:
        maps = (unit(images) - self.pictures[-1]).square().mean(1)
        return Prediction(maps, maps.amax((1, 2)))


@fails(FORGETTING, r"learned after forget\(\) of another task: first differs")
class ForgetsAPart(Means):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("first", torch.empty(0))

    def finish_task(self, images: Tensor) -> None:
        super().finish_task(images)
        self.first = self.first if len(self.first) else self.pictures[:1].clone()


FOOTPRINT = "test_the_footprint_counts_every_byte_of_the_state"


@fails(FOOTPRINT, "bank keeps .* bytes in memory, as a part of a larger tensor")
class PartOfATask(SmallDetector):
    def finish_task(self, images: Tensor) -> None:
        super().finish_task(images)
        self.register_buffer("bank", images[:1])


@fails(FOOTPRINT, r"not counted: .* \[\(6, 3, 48, 48\)\]")
class KeepsNumPy(SmallDetector):
    def finish_task(self, images: Tensor) -> None:
        super().finish_task(images)
        self.normal = images.numpy().copy()


@fails(FOOTPRINT, r"not counted: .* \[\(3, 48, 48\)\]")
class LeavesItsSum(Means):
    def finish_task(self, images: Tensor) -> None:
        self.pictures = torch.cat([self.pictures, self.sum[None] / self.count])


@fails(FOOTPRINT, r"not counted: .* \[\(6, 3, 48, 48\)\]")
class KeepsAFunction(SmallDetector):
    def finish_task(self, images: Tensor) -> None:
        super().finish_task(images)
        learned = images.clone()
        self.mean = lambda: learned.float().mean()


KEPT = "test_the_footprint_counts_every_byte_that_it_keeps"


@fails(KEPT, "keeps .* bytes in memory, as a part of a larger tensor")
class PartsOfTasks(Strategy):
    def end_stage(self, stage: int, images: Tensor) -> None:
        self.memory[str(stage)] = images[:1]


@fails(KEPT, r"not counted: .* \[\(6, 3, 48, 48\)\]")
class HidesImages(Integrating):
    def end_stage(self, stage: int, images: Tensor) -> None:
        self.hidden = {"images": [images.clone()]}


@fails(KEPT, r"not counted: .* \[\(6, 3, 48, 48\)\]")
class HidesNumPy(Strategy):
    def end_stage(self, stage: int, images: Tensor) -> None:
        self.hidden = images.numpy().copy()


@fails(KEPT, r"not counted: .*\(41472,\)")
class HidesBytes(Strategy):
    def __init__(self, detector: Detector) -> None:
        super().__init__(detector)
        self.hidden: deque[bytes] = deque()

    def end_stage(self, stage: int, images: Tensor) -> None:
        self.hidden.append(images.numpy().tobytes())


@fails(KEPT, r"not counted: .*\(8, 3, 3, 3\)")
class HidesATeacher(Strategy):
    def end_stage(self, stage: int, images: Tensor) -> None:
        self.teacher = copy_of(self.detector)


FLAGS = "test_its_flags_say_what_it_does"


@fails(FLAGS, "needs_gradients=False and overrides")
class AddsToTheLoss(Strategy):
    needs_gradients = False

    def penalty(self, detector: Detector, batch: Batch) -> Tensor:
        return torch.stack([weights.square().sum() for weights in detector.parameters()]).sum()


@fails(FLAGS, "needs_gradients=False and overrides")
class ChangesGradients(Strategy):
    needs_gradients = False

    def after_backward(self, gradients: Mapping[str, Tensor]) -> None:
        for gradient in gradients.values():
            gradient *= 2


@fails(FLAGS, "needs_gradients=False and overrides")
class FollowsSteps(Strategy):
    needs_gradients = False

    def after_step(self) -> None:
        self.memory["weights"] = next(self.detector.parameters()).detach().clone()


TOLD = "test_it_predicts_without_being_told_the_task_unless_it_says_so"


@fails(TOLD, "as images of task 1: maps differs")
class LooksAtTheTask(Strategy):
    def predict(self, images: Tensor, task: int) -> Prediction:
        return scaled(super().predict(images, task), 1 + task)


@fails(TOLD, "as images of task 1: scores differs")
class ScoresByTheTask(Strategy):
    def predict(self, images: Tensor, task: int) -> Prediction:
        maps, scores = super().predict(images, task)
        return Prediction(maps, scores + task)


@fails(TOLD, "as images of task 1: maps differs")
class SecretModels(Strategy):
    def end_stage(self, stage: int, images: Tensor) -> None:
        for name, tensor in kept_state(self.detector).items():
            self.memory[f"{stage}.{name}"] = tensor.clone()

    def detector_for(self, task: int) -> Detector:
        prefix = f"{task}."
        state = {name[2:]: tensor for name, tensor in self.memory.items() if name.startswith(prefix)}
        self.detector.restore(state)
        return self.detector


LOADED = "test_a_loaded_run_predicts_the_same"


@fails(LOADED, "loaded for task 0: maps differs")
class PredictsOtherMaps(Strategy):
    def predict(self, images: Tensor, task: int) -> Prediction:
        maps, scores = super().predict(images, task)
        return Prediction(maps.square(), scores)


@fails(LOADED, "loaded for task 0: scores differs")
class ScoresByWhatItKeeps(Strategy):
    def end_stage(self, stage: int, images: Tensor) -> None:
        self.memory["brightness"] = unit(images).mean()

    def predict(self, images: Tensor, task: int) -> Prediction:
        maps, scores = super().predict(images, task)
        return Prediction(maps, scores - self.memory["brightness"])


@fails(LOADED, "loaded for task 1: maps differs")
class PredictsTwice(Strategy):
    def predict(self, images: Tensor, task: int) -> Prediction:
        other = super().predict(images.flip(3), task)
        maps, scores = super().predict(images, task)
        return Prediction((maps + other.maps.flip(2)) / 2, scores) if task == 1 else Prediction(maps, scores)


AGAIN = "test_images_that_were_held_out_stay_so_when_others_are_learned_again"


class KeepsImages(Strategy):
    has_buffer = True

    def replayed(self) -> Sequence[tuple[Tensor, Tensor]]:
        return [(images, images[:0]) for images in self.memory.values()]


@fails(AGAIN, "learned again that stage 0 did not learn from")
class LearnsWhatWasHeldOut(KeepsImages):
    def end_stage(self, stage: int, images: Tensor) -> None:
        self.memory[str(stage)] = images.clone()


@fails(AGAIN, "learned again that stage 0 did not learn from")
class LearnsAgainInAnotherOrder(KeepsImages):
    def end_stage(self, stage: int, images: Tensor) -> None:
        learned, _ = split(images, self.detector.held_out, self.seed, stage)
        self.memory = {str(stage): learned.clone(), **self.memory}


@fails(AGAIN, "held out that stage 0 did not hold out")
class HoldsOutWhatWasLearned(KeepsImages):
    def replayed(self) -> Sequence[tuple[Tensor, Tensor]]:
        return [(images[:0], images) for images in self.memory.values()]

    def end_stage(self, stage: int, images: Tensor) -> None:
        self.memory[str(stage)] = split(images, self.detector.held_out, self.seed, stage)[0].clone()


@fails("test_a_training_left_at_any_step_and_continued_is_the_training", "left at place 0: error differs")
class CountsTasks(SmallDetector):
    tasks = 0

    def finish_task(self, images: Tensor) -> None:
        self.tasks += 1  # is in no state, so a new process begins at nothing
        self.error = torch.tensor(float(self.tasks))


@pytest.mark.parametrize(
    ("defect", "test", "words"), DEFECTS, ids=[defect.__name__ for defect, *_ in DEFECTS]
)
def test_a_defect_fails_the_test_that_is_named_for_it(
    defect: type[Detector] | type[Strategy], test: str, words: str
) -> None:
    contract = DetectorContract() if issubclass(defect, Detector) else StrategyContract()
    with pytest.raises(AssertionError, match=words):
        getattr(contract, test)(defect)


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
