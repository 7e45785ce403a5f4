"""Single: a model of its own for each task, and the task of an image is known."""

from collections.abc import Mapping, Sequence

from torch import Tensor

from clbench.data.images import Images
from clbench.methods.base import Detector, kept_state
from clbench.strategies.base import Strategy, copy_of
from clbench.training import with_prefix


class Single(Strategy):
    """Each stage learns a new detector; only frozen networks are shared. On a GPU there is one detector at a time."""

    task_known = True
    continual = False
    why_no_buffer = "each task has a model of its own"

    def __init__(self, detector: Detector, *, seed: int = 0):
        super().__init__(detector, seed=seed)
        self._untrained = copy_of(detector)
        self._learned: list[Mapping[str, Tensor]] = []  # the state of each stage's detector, on the CPU
        self._loaded: int | None = None  # the stage whose state `self.detector` has now

    def begin_stage(self, stage: int, images: Images) -> None:
        progress = self.detector.progress
        self.detector = copy_of(self._untrained)
        self.detector.progress = progress

    def end_stage(self, stage: int, images: Images) -> None:
        state = kept_state(self.detector)
        self._learned.append({name: tensor.to("cpu", copy=True) for name, tensor in state.items()})
        self._loaded = stage

    def detector_for(self, task: int) -> Detector:
        model = min(task, len(self._learned) - 1)  # an unseen task has no model yet: the newest judges it
        if self._loaded != model:
            self.detector.restore(self._learned[model])
            self._loaded = model
        return self.detector

    def drop(self, stage: int) -> None:
        del self._learned[stage]
        self._loaded = None

    def unchanged(self, stage: int, learned: int) -> bool:
        return learned < stage

    def detectors(self) -> Sequence[Mapping[str, Tensor]]:
        return self._learned

    def detector_state(self) -> dict[str, Tensor]:
        return {
            f"detectors.{task}.{name}": tensor
            for task, state in enumerate(self._learned)
            for name, tensor in state.items()
        }

    @classmethod
    def predicts_with(cls, name: str, task: int) -> bool:
        return name.startswith(f"detectors.{task}.")

    def restore_detector(self, state: Mapping[str, Tensor]) -> None:
        found: dict[int, dict[str, Tensor]] = {}
        for name, tensor in with_prefix(state, "detectors.").items():
            task, _, own_name = name.partition(".")
            found.setdefault(int(task), {})[own_name] = tensor
        self._learned = [found.get(task, {}) for task in range(1 + max(found, default=-1))]
        self._loaded = None
