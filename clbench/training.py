"""The one training loop: steps over a task's images, epoch by epoch, stopped early on normal ones held out."""

import itertools
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from clbench.errors import UserError
from clbench.methods.base import Detector, kept_state
from clbench.randomness import generator, seed_for

_LOOK_S = 0.5  # seconds between two looks at the loss, each of which waits for the device


class Diverged(UserError):
    """The loss is no number any more."""


def calmer(detector: Detector) -> str:
    """What to do where numbers are none any more."""
    return "lower method.learning_rate" + (", or set gpu.precision=fp32" if detector.precision else "")


class Bookmark(Protocol):
    """Where trainings under way are kept, so that another process can go on with them."""

    def find(self, stage: int) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """The tensors and data that `place` was given last for this stage, or None."""
        ...

    def due(self, epoch_ended: bool) -> bool:
        """Whether it is time for `place`."""
        ...

    def place(self, stage: int, tensors: dict[str, Tensor], data: dict[str, Any]) -> None:
        """Keep a training that is under way; may raise, to end the run there."""
        ...


@dataclass(frozen=True)
class Batch:
    """The images of one training step, and where each comes from.

    Attributes:
        images: uint8 [B, 3, H, W], on the detector's device: images of this stage, then replayed ones.
        stages: int64 [B], on the CPU: the stage that each image was first learned in.
        rows: int64 [B], on the CPU: its number among the images of this stage that are learned from, or, of a
            replayed one, among the stored images of its stage.
        stage: the stage being learned.
    """

    images: Tensor
    stages: Tensor
    rows: Tensor
    stage: int

    @property
    def replayed(self) -> Tensor:
        """Which of the images are replayed, bool [B], on the CPU."""
        return self.stages != self.stage


class Hooks:
    """What a strategy does inside the training loop; this one does nothing. See `Strategy`, which is one."""

    def penalty(self, detector: Detector, batch: Batch) -> Tensor | None:
        """A scalar to add to the method's loss of a batch, or None. Called under the same autocast as the loss."""
        return None

    def after_backward(self, gradients: Mapping[str, Tensor]) -> None:
        """Look at, or change in place, the gradients of a step: parameter name -> gradient, before clipping."""

    def after_step(self) -> None:
        """Called once the optimizer has moved the weights."""

    def kept(self) -> dict[str, Tensor]:
        """The tensors that are kept from step to step and from stage to stage: name -> tensor."""
        return {}

    def restore_kept(self, tensors: dict[str, Tensor]) -> None:
        """Take over what `kept` gave in another process."""


def train(
    detector: Detector,
    stage: int,
    images: Tensor,
    stored: Sequence[tuple[Tensor, Tensor]],
    seed: int,
    bookmark: Bookmark | None = None,
    on_epoch: Callable[[int, int, float], None] = lambda stage, epoch, loss: None,
    hooks: Hooks | None = None,
) -> None:
    """Teach a detector a stage, from the start of its task, or from where it was left, to the end.

    All randomness inside a step comes from torch's own generators, seeded anew before every step and every
    validation from what it is for: so a continued training is the training.

    Args:
        stage: 0-based.
        images: the stage's, uint8 [N, 3, H, W].
        stored: for each earlier stage, two tensors uint8 [M, 3, H, W]: images that it was learned from, which are
            replayed, one with every current image; and images that were held out of it, and stay held out.
        bookmark: where a training is left and continued from; methods that only collect begin anew.
        on_epoch: called with stage, epoch (0-based) and the mean loss of each; again, where one is continued.
        hooks: the strategy's part in the loop, if it has one.

    Raises:
        Diverged: the loss, or a weight, became infinite or not a number.
    """
    current, validation = split(images, detector.held_out, seed, stage)
    parts = {stage: current, **{earlier: part for earlier, (part, _) in enumerate(stored) if len(part)}}
    past = [part for owner, part in parts.items() if owner != stage]
    unseen = torch.cat([validation, *(held for _, held in stored)])
    with detector.learning():
        detector.train()
        detector.prepare(current)
        left = bookmark.find(stage) if bookmark else None
        if left is None:
            with torch.no_grad():
                detector.start_task(stage, current, torch.cat(past) if past else current[:0])
        optimizer = detector.optimizer()
        if optimizer is None:
            _collect(detector, torch.cat([current, *past]) if past else current)
        else:
            descent = Descent(detector, optimizer, stage, seed, bookmark, on_epoch, hooks or Hooks())
            if left is not None:
                descent.restore(*left)
            descent.run(parts, unseen)
        detector.eval()
        with torch.no_grad():
            detector.finish_task(unseen if len(unseen) else current)


@torch.no_grad()
def _collect(detector: Detector, images: Tensor) -> None:
    """Show the detector every image once."""
    for begin in range(0, len(images), detector.batch_size):
        detector.training_step(images[begin : begin + detector.batch_size])
        detector.progress("learning", min(begin + detector.batch_size, len(images)), len(images))


class Descent:
    """Minimises a detector's loss for its `epochs` (or `step_budget`), or until `patience` epochs have not bettered the best.

    Its attributes are all that changes from step to step: what `state` gives and `restore` takes.
    """

    def __init__(
        self,
        detector: Detector,
        optimizer: torch.optim.Optimizer,
        stage: int,
        seed: int,
        bookmark: Bookmark | None,
        on_epoch: Callable[[int, int, float], None],
        hooks: Hooks,
    ):
        self.detector, self.optimizer, self.hooks = detector, optimizer, hooks
        self.stage, self.seed, self.bookmark, self.on_epoch = stage, seed, bookmark, on_epoch
        device = detector.device.type
        self.autocast = torch.autocast(device, detector.precision, enabled=detector.precision is not None)
        self.scaler = torch.amp.GradScaler(device, enabled=detector.precision == torch.float16)
        self.rates = [group["lr"] for group in optimizer.param_groups]
        names = {id(parameter): name for name, parameter in detector.named_parameters()}
        self.trained = {names[id(parameter)]: parameter for parameter in self._parameters()}
        self.watched = type(hooks).after_backward is not Hooks.after_backward
        self.kept_before = {name: (tensor, tensor._version) for name, tensor in hooks.kept().items()}
        self.epoch, self.step = 0, 0  # the next one's
        self.losses = torch.empty(0)  # of the epoch's steps
        self.best: Mapping[str, Tensor] | None = None
        self.best_loss, self.since = math.inf, 0  # and epochs since then

    def run(self, parts: Mapping[int, Tensor], unseen: Tensor) -> None:
        """Train on this stage's images and on replayed ones, and stop early on the unseen ones.

        Args:
            parts: stage -> uint8 [N, 3, H, W]; first the stage that is learned.
        """
        detector = self.detector
        images = torch.cat(list(parts.values())) if len(parts) > 1 else parts[self.stage]
        per_epoch = math.ceil(len(parts[self.stage]) / detector.batch_size)
        budget = detector.step_budget or detector.epochs * per_epoch
        stops_early = detector.patience is not None and len(unseen) > 0
        while self.epoch * per_epoch < budget:
            if stops_early and self.since >= (detector.patience or 0):
                break
            self._epoch(images, parts, per_epoch, budget)
            if stops_early:
                self._validate(unseen)
            self.on_epoch(self.stage, self.epoch, float(self.losses.mean()))
            self.epoch, self.step = self.epoch + 1, 0
            self._keep(epoch_ended=True)
        if self.best is not None:
            detector.restore(self.best)
        if not all(bool(parameter.isfinite().all()) for parameter in self.trained.values()):
            raise Diverged(
                f"weights became no numbers in the last step of epoch {self.epoch}: {calmer(self.detector)}"
            )

    def _epoch(self, images: Tensor, parts: Mapping[int, Tensor], per_epoch: int, budget: int) -> None:
        """The steps of an epoch, from the next one on, and no more than the budget has left."""
        detector = self.detector
        detector.train()
        before = self.epoch * per_epoch  # steps of the epochs before
        steps = min(per_epoch, budget - before)
        if self.step == 0:
            self.losses = torch.full((steps,), math.nan, device=images.device)
        looked = time.perf_counter()
        counts = [len(part) for part in parts.values()]
        batches = _batches(counts, detector.batch_size, self.stage, self.epoch, self.seed)[self.step : steps]
        rows = torch.cat([*batches, torch.empty(0, dtype=torch.int64)])
        starts = torch.tensor([0, *itertools.accumulate(counts)])
        part = torch.bucketize(rows, starts, right=True) - 1
        stages, own_rows = torch.tensor(list(parts))[part], rows - starts[part]
        # All of an epoch's rows go to the device together: a copy in every step would wait for the device.
        sizes = [len(batch) for batch in batches]
        columns = (values.split(sizes) for values in (rows.to(images.device), stages, own_rows))
        for chosen, *where in zip(*columns, strict=True):
            self._step(Batch(images[chosen], *where, self.stage), (before + self.step) / budget)
            self._keep(epoch_ended=False)
            if self.step == steps or time.perf_counter() - looked > _LOOK_S:
                self._check()
                epochs = math.ceil(budget / per_epoch)
                note = f"epoch {self.epoch + 1}/{epochs}, loss {self.losses[: self.step].mean():.4g}"
                detector.progress("learning", before + self.step, budget, note)
                looked = time.perf_counter()

    def _step(self, batch: Batch, done: float) -> None:
        """One step, when this share of all steps is done."""
        for group, rate in zip(self.optimizer.param_groups, self.rates, strict=True):
            group["lr"] = rate * self.detector.learning_rate_factor(done)
        torch.manual_seed(seed_for(self.seed, "step", self.stage, self.epoch, self.step))
        loss = self._loss(batch)
        self.optimizer.zero_grad(set_to_none=True)
        self.scaler.scale(loss).backward()
        if self.watched or self.detector.gradient_clip is not None:
            self.scaler.unscale_(self.optimizer)
            there = {name: p.grad for name, p in self.trained.items() if p.grad is not None}
            self.hooks.after_backward(there)
            if self.detector.gradient_clip is not None:
                nn.utils.clip_grad_norm_(self.trained.values(), self.detector.gradient_clip)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.hooks.after_step()
        self.losses[self.step] = loss.detach()
        self.step += 1

    def _loss(self, batch: Batch) -> Tensor:
        """The method's loss, and what the strategy adds to it.

        Raises:
            UserError: a batch of one image leaves batch normalisation a single position.
        """
        try:
            with self.autocast:
                loss = self.detector.training_step(batch.images)
                assert loss is not None
                penalty = self.hooks.penalty(self.detector, batch)
                return loss if penalty is None else loss + penalty
        except ValueError as error:
            if "more than 1 value per channel" not in str(error):
                raise
            images = batch.images
            raise UserError(
                f"a batch of {len(images)} image, {images.shape[-1]}x{images.shape[-2]} pixels, leaves one position in "
                "the deepest level, which batch normalisation cannot learn from: give a larger dataset.resize, or a "
                "method.batch_size that leaves no single image over"
            ) from error

    def _check(self) -> None:
        """Look at the epoch's losses so far.

        Raises:
            Diverged: one is no number.
        """
        bad = (~self.losses[: self.step].isfinite()).nonzero().flatten()
        if len(bad):
            step = int(bad[0])
            raise Diverged(
                f"the loss became {float(self.losses[step])} in epoch {self.epoch + 1}, step {step + 1}: "
                f"{calmer(self.detector)}"
            )

    @torch.no_grad()
    def _validate(self, unseen: Tensor) -> None:
        """The mean loss over the held-out images, under the same draws after every epoch; the best is kept."""
        detector = self.detector
        detector.eval()
        torch.manual_seed(seed_for(self.seed, "validation", self.stage))
        parts = unseen.split(detector.batch_size)
        total = sum(len(part) * detector.validation_loss(part).double() for part in parts)
        loss = float(total) / len(unseen)
        if loss < self.best_loss:
            self.best = {name: tensor.clone() for name, tensor in kept_state(detector).items()}
            self.best_loss, self.since = loss, 0
        else:
            self.since += 1

    def _keep(self, epoch_ended: bool) -> None:
        if self.bookmark and self.bookmark.due(epoch_ended):
            self._check()
            self.bookmark.place(self.stage, *self.state())

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """All that a step depends on beside the images: tensors by name, and plain data."""
        tensors = {f"detector.{name}": tensor for name, tensor in kept_state(self.detector).items()}
        tensors |= {f"best.{name}": tensor for name, tensor in (self.best or {}).items()}
        kept = self.hooks.kept()
        for name, tensor in kept.items():  # what the stage began with, it begins with again
            before, version = self.kept_before.get(name, (None, 0))
            if tensor is not before or tensor._version != version:
                tensors[f"kept.{name}"] = tensor
        for index, parameter in enumerate(self._parameters()):
            for name, value in self.optimizer.state[parameter].items():
                if value is not None:  # momentum, where there is none
                    tensors[f"optimizer.{index}.{name}"] = value
        data = {
            "epoch": self.epoch,
            "step": self.step,
            "best_loss": self.best_loss,
            "since": self.since,
            "scaler": self.scaler.state_dict(),
            "kept": list(kept),
        }
        return {**tensors, "losses": self.losses}, data

    def restore(self, tensors: Mapping[str, Tensor], data: Mapping[str, Any]) -> None:
        """Go on from what `state` gave."""
        parts: dict[str, dict[str, Tensor]] = {"detector": {}, "best": {}, "optimizer": {}, "kept": {}}
        for name, tensor in tensors.items():
            owner, _, rest = name.partition(".")
            if owner in parts:
                parts[owner][rest] = tensor
        self.detector.restore(parts["detector"])
        self.best = parts["best"] or None
        kept = {**self.hooks.kept(), **parts["kept"]}
        self.hooks.restore_kept({name: kept[name] for name in data["kept"]})
        parameters = self._parameters()
        for name, tensor in parts["optimizer"].items():
            index, _, key = name.partition(".")
            parameter = parameters[int(index)]
            # Fused optimizers go through memory as the parameter lies there, which may be channels last.
            same = tensor.shape == parameter.shape
            value = torch.empty_like(parameter, dtype=tensor.dtype).copy_(tensor) if same else tensor
            self.optimizer.state[parameter][key] = value
        self.losses = tensors["losses"]
        self.epoch, self.step = data["epoch"], data["step"]
        self.best_loss, self.since = data["best_loss"], data["since"]
        self.scaler.load_state_dict(data["scaler"])

    def _parameters(self) -> list[Tensor]:
        return [parameter for group in self.optimizer.param_groups for parameter in group["params"]]


def _batches(counts: Sequence[int], size: int, stage: int, epoch: int, seed: int) -> list[Tensor]:
    """Rows of an epoch's batches: the current images in random order, and as many of the past tasks'.

    Args:
        counts: of the current images, and of each past task's, which lie one after the other.
    """
    current, *past = counts
    starts = list(itertools.accumulate(counts))
    batches = []
    order = torch.randperm(current, generator=generator(seed, "order", stage, epoch))
    for step, rows in enumerate(order.split(size)):
        random = generator(seed, "replay batch", stage, epoch, step)
        # Evenly over the past tasks: rounds of all of them, in an order of each batch's own.
        rounds = math.ceil(len(rows) / len(past)) if past else 0
        tasks = torch.randperm(len(past), generator=random).repeat(rounds)[: len(rows)].tolist()
        drawn = [starts[task] + int(torch.randint(past[task], (), generator=random)) for task in tasks]
        batches.append(torch.cat([rows, torch.tensor(drawn, dtype=torch.int64)]))
    return batches


def split(images: Tensor, share: float, seed: int, stage: int) -> tuple[Tensor, Tensor]:
    """A stage's images to learn from, and those held out: at least one of each, where there are two and a share."""
    learned, held = split_rows(len(images), share, seed, stage)
    if not len(held):
        return images, images[:0]
    return images[learned.to(images.device)], images[held.to(images.device)]


def split_rows(count: int, share: float, seed: int, stage: int) -> tuple[Tensor, Tensor]:
    """Which of a stage's images are learned from, and which are held out: both ascending."""
    size = held_out(count, share)
    order = torch.randperm(count, generator=generator(seed, "held out", stage))
    return order[size:].sort().values, order[:size].sort().values


def held_out(count: int, share: float) -> int:
    """How many of so many images are held out."""
    return min(math.ceil(share * count), count - 1)
