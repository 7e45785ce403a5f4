"""What every detector is: images in, anomaly maps and image scores out."""

import hashlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import Annotated, NamedTuple, Protocol

import torch
from annotated_types import Ge, Lt
from torch import Tensor, nn

from clbench.backbones import FeaturePyramid
from clbench.errors import UserError
from clbench.feature_store import FeatureStore

Share = Annotated[float, Ge(0), Lt(1)]  # of a whole that is never all of it


class Progress(Protocol):
    """How far a phase is, and a word on how it goes."""

    def __call__(self, phase: str, done: int, total: int, note: str = "") -> None: ...


def silent(phase: str, done: int, total: int, note: str = "") -> None:
    """Progress that nobody watches."""


class Prediction(NamedTuple):
    """Anomaly maps float32 [B, H, W] and image scores float32 [B]; higher is more anomalous."""

    maps: Tensor
    scores: Tensor


class Detector(nn.Module):
    """A method's model. It learns a task by `prepare`, `start_task`, `training_step`s and `finish_task`.
    A training that is continued goes through `prepare` again, and not through `start_task`.

    What it keeps between tasks (banks, statistics) are buffers registered on the detector itself; networks
    are its submodules. So `state_dict` is the whole detector, and the footprint counts itself.

    Attributes:
        native: whether the method updates what it keeps task by task, which is what `strategy=native` needs.
        rebuilt_by_replay: whether replay makes banks and statistics anew from current and stored images, or
            leaves them to the method's own update.
        epochs: passes over a task's images; 1 for methods that only collect.
        step_budget: optimizer steps of a task, in place of epochs; None where epochs count.
        batch_size: images of a training step, and as many replayed ones.
        held_out: share of a task's normal images that no step sees, for early stopping and thresholds.
        patience: epochs without a better loss on the held-out images before training stops; None for never.
        gradient_clip: largest norm of all gradients together; None to leave them as they are.
        precision: of mixed-precision training; None for single precision.
        progress: called with (phase, done, total) during long phases.
    """

    native = False
    rebuilt_by_replay = True
    epochs = 1
    step_budget: int | None = None
    gradient_clip: float | None = None
    batch_size = 16
    held_out = 0.0
    patience: int | None = None
    precision: torch.dtype | None = None

    def __init__(self) -> None:
        super().__init__()
        self.progress: Progress = silent

    @property
    def device(self) -> torch.device:
        """Where it is: the CPU, while it has neither parameters nor buffers."""
        tensors = chain(self.parameters(), self.buffers())
        return next((tensor.device for tensor in tensors), torch.device("cpu"))

    def forget(self) -> None:
        """Drop banks and statistics of earlier tasks, so that the next task replaces them."""

    def prepare(self, images: Tensor) -> None:
        """Load what steps need beside images like these, uint8 [N, 3, H, W], and give weights that depend on
        their size that size; what is loaded is no part of the state."""

    def start_task(self, task: int, images: Tensor, stored: Tensor) -> None:
        """Begin a task with its images and stored ones of earlier tasks, both uint8 [N, 3, H, W]."""

    def training_step(self, images: Tensor) -> Tensor | None:
        """Images uint8 [B, 3, H, W] -> the loss, or None from methods that only collect."""
        raise NotImplementedError

    def optimizer(self) -> torch.optim.Optimizer | None:
        """A fresh one for a task; None for methods that only collect."""
        return None

    @classmethod
    def has_gradients(cls) -> bool:
        """Whether it is trained by an optimizer, or only collects."""
        return cls.optimizer is not Detector.optimizer

    def learning_rate_factor(self, done: float) -> float:
        """What the optimizer's learning rates are multiplied with when this share of the steps is done."""
        return 1.0

    def validation_loss(self, images: Tensor) -> Tensor:
        """Held-out images uint8 [B, 3, H, W] -> the loss that early stopping watches."""
        loss = self.training_step(images)
        assert loss is not None
        return loss

    def outputs(self, images: Tensor) -> list[Tensor]:
        """Images uint8 [B, 3, H, W] -> the trained outputs, with gradients, that distillation and replay of stored
        outputs compare: float tensors [B, ...], always as many and in the same order; none where nothing is trained."""
        return []

    def finish_task(self, images: Tensor) -> None:
        """Consolidate what the task's steps left; normal images [N, 3, H, W], held out where some are."""

    def forward(self, images: Tensor) -> Prediction:
        """Images, uint8 or float in [0, 1], [B, 3, H, W] -> maps [B, H, W] and scores [B], no task given."""
        raise NotImplementedError

    def lay_out(self) -> None:
        """Bring weights into the memory layout that is fastest: channels last, where convolutions are trained."""
        if self.optimizer() is not None and not any(map(_overruns, self.modules())):
            self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # absent from torch's stubs

    def for_export(self) -> None:
        """Bring what was learned into the form that a traced `forward` takes; nothing more is learned after it."""

    def check(self, images: Tensor) -> None:
        """Try an image, uint8 [1, 3, H, W], before anything is learned.

        Raises:
            UserError: a network takes no images of this size.
        """
        for module in self.modules():
            if isinstance(module, FeaturePyramid):
                module.check(images)

    def stores(self) -> list[FeatureStore]:
        """The feature stores of its frozen networks."""
        return [module.store for module in self.modules() if isinstance(module, FeaturePyramid)]

    @contextmanager
    def uncached(self) -> Iterator[None]:
        """Inside, frozen networks see every image anew: for measuring time."""
        for store in self.stores():
            store.paused = True
        try:
            yield
        finally:
            for store in self.stores():
                store.paused = False

    @contextmanager
    def learning(self) -> Iterator[None]:
        """Inside, the images that frozen networks see are training images: see `release`."""
        for store in self.stores():
            store.learning = True
        try:
            yield
        finally:
            for store in self.stores():
                store.learning = False

    def release(self, keep: Tensor | None) -> None:
        """Let go of the features of training images, but for those that will be learned again."""
        for store in self.stores():
            store.release(keep)

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Take over what `kept_state` of another detector gave; what it keeps may have other sizes here."""
        for name, tensor in state.items():
            owner_name, _, leaf = name.rpartition(".")
            owner = self.get_submodule(owner_name)
            if leaf in owner._buffers:
                device = next((b.device for b in self.buffers() if b is not None), tensor.device)
                owner._buffers[leaf] = tensor.to(device)
                continue
            parameter = owner.get_parameter(leaf)
            if parameter.shape == tensor.shape:
                with torch.no_grad():
                    parameter.copy_(tensor)
            else:
                setattr(owner, leaf, nn.Parameter(tensor.to(parameter.device, copy=True)))


def frozen_digest(detector: Detector) -> str:
    """Of the weights of frozen networks, which no checkpoint holds: to know whether they are still the same."""
    digest = hashlib.sha256()
    for pyramid in (module for module in detector.modules() if isinstance(module, FeaturePyramid)):
        for tensor in pyramid.state_dict().values():
            digest.update(tensor.detach().cpu().contiguous().numpy().data)
    return digest.hexdigest()


def check_frozen(before: str | None, now: str, run: Path) -> None:
    """Whether a run that is continued or used has the frozen networks that it was begun with.

    Args:
        before, now: what `frozen_digest` gave; None from a run that did not keep it yet.

    Raises:
        UserError: it has others.
    """
    if before not in (None, now):
        raise UserError(
            f"{run} was begun with other weights of its frozen network (backbone.checkpoint, method.teacher, or what "
            "timm downloads): put them back, take another experiment=NAME, or overwrite=true"
        )


def kept_state(detector: Detector) -> dict[str, Tensor]:
    """A detector's state but for frozen networks, which the config brings back."""
    frozen = tuple(
        f"{name}." for name, module in detector.named_modules() if isinstance(module, FeaturePyramid)
    )
    return {name: tensor for name, tensor in detector.state_dict().items() if not name.startswith(frozen)}


def _overruns(module: nn.Module) -> bool:
    """Whether its gradient, channels last, is written beyond its memory on a CPU (oneDNN, issue 6035)."""
    return (
        isinstance(module, nn.Conv2d)
        and module.in_channels < 16
        and set(module.kernel_size) == {1}
        and set(module.stride) != {1}
    )
