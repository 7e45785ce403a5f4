"""What every detector is: images in, anomaly maps and image scores out."""

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import Annotated, Any, NamedTuple, Protocol

import torch
from annotated_types import Ge, Lt
from torch import Tensor, nn
from torch.nn import functional as F
from typing_extensions import Self

from clbench.backbones import FeaturePyramid
from clbench.data.images import Images
from clbench.errors import UserError
from clbench.feature_store import FeatureStore
from clbench.recollection import Recollection

Share = Annotated[float, Ge(0), Lt(1)]  # a share of a whole, less than all of it


class Progress(Protocol):
    """Called as a phase goes on: `done` of `total` steps, and a note on how it goes."""

    def __call__(self, phase: str, done: int, total: int, note: str = "") -> None: ...


def silent(phase: str, done: int, total: int, note: str = "") -> None:
    """A `Progress` that does nothing."""


class _MapsAndScores(NamedTuple):
    maps: Tensor
    scores: Tensor


class Prediction(_MapsAndScores):
    """Anomaly maps float32 [B, H, W] and image scores float32 [B]; higher is more anomalous: a pair.

    Attributes:
        chosen: where a detector keeps a model for each stage and chooses one for an image, which one, in the order in
            which they were learned: int64 [B]. Not a part of the pair.
    """

    chosen: Tensor | None

    def __new__(cls, maps: Tensor, scores: Tensor, chosen: Tensor | None = None) -> Self:
        found = super().__new__(cls, maps, scores)
        found.chosen = chosen
        return found

    def each(self, of: Callable[[Tensor], Tensor]) -> "Prediction":
        """The prediction that a function makes of each of its tensors."""
        return Prediction(of(self.maps), of(self.scores), None if self.chosen is None else of(self.chosen))


class Detector(nn.Module):
    """A method's model: images in, anomaly maps and image scores out.

    It learns a task by `prepare`, `start_task`, one `training_step` for each batch, and `finish_task`. A
    process that continues within a task calls `prepare` again, but not `start_task`.

    The images of a task are `Images`: they are used as a tensor, and only rows that are asked for are on the device.

    What it keeps between tasks (banks, statistics) is registered as buffers, and networks are submodules:
    `state_dict` is the whole detector, and the footprint counts what is there.

    Attributes:
        native: whether the method has its own update of what it keeps, task by task; `strategy=native` needs
            it.
        chooses: whether its own update keeps a model for each stage and predictions say which was chosen.
        rebuilt_by_replay: whether replay drops banks and statistics and makes them from new and stored
            images; if not, the method's own update goes on.
        lasting_weights: whether a task goes on from the weights that the last one left; if not, each begins with new ones.
        needs_only_features: whether training looks at an image only through its `FeaturePyramid`s, which it gives the rows of
            images that it was given, unchanged: then frozen features can stand for a stored image
            (`replay.storage=latent`). What it takes from the image otherwise is at most its size.
        epochs: passes over a task's images; 1 for methods that only collect.
        step_budget: optimizer steps for a task, in place of `epochs`; None where `epochs` counts.
        batch_size: number of new images of a training step, which has as many replayed ones.
        held_out: share of a task's normal images that no step sees: early stopping and thresholds use them.
        patience: epochs without a lower loss on held-out images before training stops; None: it never stops
            early.
        gradient_clip: largest norm of all gradients together; larger ones are scaled down. None: they are
            left alone.
        precision: type of the networks' mixed precision; None for single precision. What small differences decide is
            computed inside `clbench.precision.single_precision`.
        gradient_scale: state of the scaler that float16 trains with, which goes on from task to task; empty at first.
        image_memory: bytes of a stage's images that may be on the device for its training, which takes them a batch at
            a time where they are more; None for half of what a GPU has free.
        size_setting: what the size of the images that it is given is set with, for errors.
        done: share of the task's steps that are done, in [0, 1): set before each, for what follows a schedule.
        progress: called with (phase, done, total, note) during long phases.
        recollection: where it may look up and put what it finds out about images that it will be asked for again; None, and
            so it is but where a run evaluates test images, for nowhere. Predictions are the same with and without.
    """

    native = False
    chooses = False
    rebuilt_by_replay = True
    lasting_weights = True
    needs_only_features = False
    epochs = 1
    step_budget: int | None = None
    gradient_clip: float | None = None
    batch_size = 16
    held_out = 0.0
    patience: int | None = None
    precision: torch.dtype | None = None
    image_memory: int | None = None
    gradient_scale: Mapping[str, Any] = {}
    size_setting = "dataset.resize (and dataset.crop)"
    done = 0.0
    recollection: Recollection | None = None
    _noted: list[Tensor] | None = None

    def __init__(self) -> None:
        super().__init__()
        self.progress: Progress = silent

    @property
    def device(self) -> torch.device:
        """The device of its parameters and buffers; the CPU where it has none yet."""
        tensors = chain(self.parameters(), self.buffers())
        return next((tensor.device for tensor in tensors), torch.device("cpu"))

    @classmethod
    def why_no_tiles(cls, settings: Mapping[str, Any]) -> str | None:
        """Why it cannot learn tiles of images, as the end of a sentence: what it learns of each place; None where it can.

        Args:
            settings: of the method, as its constructor is given them.
        """
        return None

    @property
    def bank_limit(self) -> int | None:
        """Bytes that its banks take at most, where its settings alone tell; None where images do, or there are none."""
        return None

    def forget(self) -> None:
        """Drop banks and statistics of earlier tasks, so that the next task replaces them."""

    def drop(self, task: int) -> None:
        """Drop the model of one task, 0-based in the order in which they were learned: of a detector that `chooses`."""
        raise NotImplementedError

    def prepare(self, images: Images) -> None:
        """Load what steps need besides images, and size the weights that depend on the image size.

        Called before every training, new or continued. What it loads is not part of the state.

        Args:
            images: images of the size to come, uint8 [N, 3, H, W].

        Raises:
            UserError: a file that the method needs cannot be read.
        """

    def start_task(self, task: int, images: Images, stored: Images) -> None:
        """Begin a task.

        Args:
            task: the stage, 0-based.
            images: the images to learn from, uint8 [N, 3, H, W].
            stored: images of earlier tasks that are replayed, uint8 [M, 3, H, W]; none without replay.
        """

    def training_step(self, images: Tensor) -> Tensor | None:
        """Images, uint8 [B, 3, H, W] -> the loss, a scalar; None from methods that only collect."""
        raise NotImplementedError

    def optimizer(self) -> torch.optim.Optimizer | None:
        """A new optimizer for a task; None for methods that only collect."""
        return None

    @classmethod
    def has_gradients(cls) -> bool:
        """Whether the method is trained by an optimizer; if not, it only collects."""
        return cls.optimizer is not Detector.optimizer

    def learning_rate_factor(self, done: float) -> float:
        """What learning rates are multiplied by when the share `done`, in [0, 1), of the steps is done."""
        return 1.0

    def validation_loss(self, images: Tensor) -> Tensor:
        """Held-out images, uint8 [B, 3, H, W] -> the loss, a scalar, that early stopping compares."""
        loss = self.training_step(images)
        assert loss is not None
        return loss

    def outputs(self, images: Tensor) -> list[Tensor]:
        """Images, uint8 [B, 3, H, W] -> the trained outputs, with gradients: float32 [B, ...], maps as [B, C, h, w].

        Strategies compare them with those of an earlier model, or with stored ones: there are always as many, in the
        same order and of the same shapes. They are those of images as they are given, without simulated anomalies or
        noise, and raw: of no fixed length, so that their norm can be differentiated. None of them where nothing is
        trained, or where a method does not give them.
        """
        return []

    @classmethod
    def gives_outputs(cls) -> bool:
        """Whether the method gives its trained outputs."""
        return cls.outputs is not Detector.outputs

    def distance(self, outputs: Sequence[Tensor], others: Sequence[Tensor]) -> Tensor:
        """How far `outputs` are from others of the same images, a scalar: 0 where they are equal.

        Here the mean squared difference of all numbers of each output, averaged over outputs; methods that compare by
        angles do so here too. It is computed in single precision.

        Args:
            outputs: what `outputs` gives, of maps also what they are at a coarser grid.
            others: those of an earlier model, or stored ones, in any precision.
        """
        pairs = zip(outputs, others, strict=True)
        return torch.stack([F.mse_loss(own.float(), other.float()) for own, other in pairs]).mean()

    def note(self, outputs: Sequence[Tensor]) -> None:
        """Called by a `training_step` that computes the outputs of its images for its loss: strategies need not again."""
        if self._noted is not None:
            self._noted[:] = outputs

    @contextmanager
    def noting(self) -> Iterator[list[Tensor]]:
        """Gives a list, which has the outputs that a training step inside notes; none where it notes none."""
        self._noted = noted = []  # type: list[Tensor]
        try:
            yield noted
        finally:
            self._noted = None

    def consolidate(self, images: Images, stored: Images) -> None:
        """Make what is kept of the images that were learned from, where that takes trained weights; before `finish_task`.

        Args:
            images, stored: as for `start_task`.
        """

    def finish_task(self, images: Images) -> None:
        """Turn what a task's steps collected or learned into what is kept.

        Args:
            images: normal images, uint8 [N, 3, H, W]: those held out, or those learned from where none were.
        """

    def forward(self, images: Tensor) -> Prediction:
        """Images [B, 3, H, W], uint8 or float in [0, 1] -> maps [B, H, W] and scores [B].

        No task is given.
        """
        raise NotImplementedError

    def compute_in(self, precision: torch.dtype | None) -> None:
        """Have its networks, trained and frozen, compute in a type of mixed precision; None for single precision."""
        self.precision = precision
        for pyramid in self.pyramids():
            pyramid.dtype = precision

    def mixed(self) -> torch.autocast:
        """Inside, networks compute in `precision`."""
        return torch.autocast(self.device.type, self.precision, enabled=self.precision is not None)

    def predict(self, images: Tensor) -> Prediction:
        """Images [B, 3, H, W], uint8 or float in [0, 1] -> maps [B, H, W] and scores [B], computed in `precision`."""
        with self.mixed():
            found = self(images)
        maps, scores = found
        return Prediction(maps.float(), scores.float(), getattr(found, "chosen", None))

    def lay_out(self) -> None:
        """Bring weights into the fastest memory layout: channels last, where convolutions are trained."""
        if self.optimizer() is not None and not any(map(_overruns, self.modules())):
            self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # absent from torch's stubs

    def for_export(self) -> None:
        """Bring what was learned into the form that a traced `forward` uses.

        Nothing can be learned after it.
        """

    def check(self, images: Tensor) -> None:
        """Try one image, uint8 [1, 3, H, W], before anything is learned.

        Raises:
            UserError: the detector takes no images of this size.
        """
        for pyramid in self.pyramids():
            pyramid.check(images, f"set {self.size_setting}")

    def check_stages(self, counts: Sequence[int], kept: int) -> None:
        """Check, before anything is learned, that what it keeps suits the stages.

        Args:
            counts: images that each stage learns from, without replayed ones.
            kept: how many stages' banks it has at a time at most.

        Raises:
            UserError: a memory is too small for so many, or a stage for what is made of it.
        """

    def pyramids(self) -> list[FeaturePyramid]:
        """Its frozen networks."""
        return [module for module in self.modules() if isinstance(module, FeaturePyramid)]

    def stores(self) -> list[FeatureStore]:
        """The feature stores of its frozen networks."""
        return [pyramid.store for pyramid in self.pyramids()]

    @contextmanager
    def uncached(self) -> Iterator[None]:
        """Inside, frozen networks compute every image anew: to measure time, or to keep nothing."""
        for store in self.stores():
            store.paused = True
        try:
            yield
        finally:
            for store in self.stores():
                store.paused = False

    @contextmanager
    def recalling(self, recollection: Recollection | None) -> Iterator[None]:
        """Inside, it may use what it has found out about images before, and keep there what it finds out."""
        self.recollection = recollection
        try:
            yield
        finally:
            self.recollection = None

    @contextmanager
    def learning(self) -> Iterator[None]:
        """Inside, images that frozen networks see are training images, whose features `release` drops."""
        for store in self.stores():
            store.learning = True
        try:
            yield
        finally:
            for store in self.stores():
                store.learning = False

    def release(self, keep: Images | None) -> None:
        """Drop the features of training images.

        Args:
            keep: images that will be learned again, uint8 [M, 3, H, W], whose features stay; or None.
        """
        for store in self.stores():
            store.release(keep)

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Take what `kept_state` gave, name -> tensor.

        Buffers and parameters take the sizes that they have there; a buffer that was registered while a task was
        learned is registered again. Submodules and parameters are those that the constructor makes.
        """
        for name, tensor in state.items():
            owner_name, _, leaf = name.rpartition(".")
            owner = self.get_submodule(owner_name)
            if leaf in owner._buffers or not hasattr(owner, leaf):
                owner._buffers[leaf] = tensor.to(self.device)
                continue
            parameter = owner.get_parameter(leaf)
            if parameter.shape == tensor.shape:
                with torch.no_grad():
                    parameter.copy_(tensor)
            else:
                setattr(owner, leaf, nn.Parameter(tensor.to(parameter.device, copy=True)))


def frozen_digest(detector: Detector) -> str:
    """SHA-256 of the weights of frozen networks, which no checkpoint has: to tell whether they changed."""
    digest = hashlib.sha256()
    for pyramid in detector.pyramids():
        for tensor in pyramid.state_dict().values():
            digest.update(tensor.detach().cpu().contiguous().numpy().data)
    return digest.hexdigest()


def check_frozen(before: str | None, now: str, run: Path) -> None:
    """Check that a run is continued or used with the frozen weights that it was begun with.

    Args:
        before: what `frozen_digest` gave when the run was begun; None for runs that did not store it.
        now: what it gives now.
        run: the run's directory, for the error.

    Raises:
        UserError: the weights differ.
    """
    if before not in (None, now):
        raise UserError(
            f"{run} was begun with other weights of its frozen network (backbone.checkpoint, method.teacher, or what "
            "timm downloads): put them back, name the right file where the detector is used (--replace KEY=FILE), take "
            "another experiment=NAME, or overwrite=true"
        )


def kept_state(detector: Detector) -> dict[str, Tensor]:
    """A detector's state without frozen networks, which are made from the config: name -> tensor."""
    frozen = tuple(
        f"{name}." for name, module in detector.named_modules() if isinstance(module, FeaturePyramid)
    )
    return {name: tensor for name, tensor in detector.state_dict().items() if not name.startswith(frozen)}


def trained_state(detector: Detector) -> dict[str, Tensor]:
    """What training changes: parameters, and running statistics of normalisation, without frozen networks: name -> tensor."""
    trained = {name for name, _ in detector.named_parameters()}
    kinds = nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d
    normalisation = {name for name, module in detector.named_modules() if isinstance(module, kinds)}
    return {
        name: tensor
        for name, tensor in kept_state(detector).items()
        if name in trained or name.rpartition(".")[0] in normalisation
    }


def _overruns(module: nn.Module) -> bool:
    """Whether oneDNN writes its gradient, channels last, beyond its memory (oneDNN issue 6035)."""
    return (
        isinstance(module, nn.Conv2d)
        and module.in_channels < 16
        and set(module.kernel_size) == {1}
        and set(module.stride) != {1}
    )
