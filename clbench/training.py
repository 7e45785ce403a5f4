"""The one training loop: steps over a task's images, epoch by epoch, stopped early on normal ones held out."""

import itertools
import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

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
        """What `place` was given last for this stage, or None."""
        ...

    def due(self, epoch_ended: bool) -> bool:
        """Whether it is time for `place`."""
        ...

    def place(self, stage: int, tensors: dict[str, Tensor], data: dict[str, Any]) -> None:
        """Keep a training that is under way; may raise, to end the run there."""
        ...


def train(
    detector: Detector,
    stage: int,
    images: Tensor,
    stored: Sequence[tuple[Tensor, Tensor]],
    seed: int,
    bookmark: Bookmark | None = None,
    on_epoch: Callable[[int, int, float], None] = lambda stage, epoch, loss: None,
) -> None:
    """Teach a detector a stage, from the start of its task, or from where it was left, to the end.

    All randomness inside a step comes from torch's own generators, seeded anew before every step and every
    validation from what it is for: so a continued training is the training.

    Args:
        stage: 0-based.
        images: of the stage, uint8 [N, 3, H, W].
        stored: images of each earlier task: some that it was learned from, as many of which are replayed with
            every batch as it has, and some that were held out of it and stay so.
        bookmark: of a training that may be left and continued; methods that only collect begin anew.
        on_epoch: called with stage, epoch (0-based) and the mean loss of each; again, where one is continued.

    Raises:
        Diverged: the loss became infinite or not a number.
    """
    current, validation = split(images, detector.held_out, seed, stage)
    past = [learned for learned, _ in stored if len(learned)]
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
            descent = Descent(detector, optimizer, stage, seed, bookmark, on_epoch)
            if left is not None:
                descent.restore(*left)
            descent.run(current, past, unseen)
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
    """Minimises a detector's loss, for `epochs` or until `patience` epochs have not bettered the best.

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
    ):
        self.detector, self.optimizer = detector, optimizer
        self.stage, self.seed, self.bookmark, self.on_epoch = stage, seed, bookmark, on_epoch
        device = detector.device.type
        self.autocast = torch.autocast(device, detector.precision, enabled=detector.precision is not None)
        self.scaler = torch.amp.GradScaler(device, enabled=detector.precision == torch.float16)
        self.rates = [group["lr"] for group in optimizer.param_groups]
        self.epoch, self.step = 0, 0  # the next one's
        self.losses = torch.empty(0)  # of the epoch's steps
        self.best: Mapping[str, Tensor] | None = None
        self.best_loss, self.since = math.inf, 0  # and epochs since then

    def run(self, current: Tensor, past: Sequence[Tensor], unseen: Tensor) -> None:
        """Train on current and past images, stop early on the unseen ones."""
        detector = self.detector
        steps = math.ceil(len(current) / detector.batch_size)
        images = torch.cat([current, *past]) if past else current
        counts = [len(part) for part in (current, *past)]
        stops_early = detector.patience is not None and len(unseen) > 0
        while self.epoch < detector.epochs:
            if stops_early and self.since >= (detector.patience or 0):
                break
            self._epoch(images, counts, steps)
            if stops_early:
                self._validate(unseen)
            self.on_epoch(self.stage, self.epoch, float(self.losses.mean()))
            self.epoch, self.step = self.epoch + 1, 0
            self._keep(epoch_ended=True)
        if self.best is not None:
            detector.restore(self.best)
        if not all(bool(parameter.isfinite().all()) for parameter in self._parameters()):
            raise Diverged(
                f"weights became no numbers in the last step of epoch {self.epoch}: {calmer(self.detector)}"
            )

    def _epoch(self, images: Tensor, counts: Sequence[int], steps: int) -> None:
        """The steps of an epoch, from the next one on."""
        detector = self.detector
        detector.train()
        if self.step == 0:
            self.losses = torch.full((steps,), math.nan, device=images.device)
        looked = time.perf_counter()
        batches = _batches(counts, detector.batch_size, self.stage, self.epoch, self.seed)[self.step :]
        # All of an epoch's rows go to the device together: a copy in every step would wait for the device.
        rows = torch.cat([*batches, torch.empty(0, dtype=torch.int64)]).to(images.device)
        for batch in rows.split([len(part) for part in batches]):
            self._step(images[batch], steps)
            self._keep(epoch_ended=False)
            if self.step == steps or time.perf_counter() - looked > _LOOK_S:
                self._check()
                note = f"epoch {self.epoch + 1}/{detector.epochs}, loss {self.losses[: self.step].mean():.4g}"
                detector.progress("learning", self.epoch * steps + self.step, detector.epochs * steps, note)
                looked = time.perf_counter()

    def _step(self, batch: Tensor, steps: int) -> None:
        done = (self.epoch * steps + self.step) / (self.detector.epochs * steps)
        for group, rate in zip(self.optimizer.param_groups, self.rates, strict=True):
            group["lr"] = rate * self.detector.learning_rate_factor(done)
        torch.manual_seed(seed_for(self.seed, "step", self.stage, self.epoch, self.step))
        try:
            with self.autocast:
                loss = self.detector.training_step(batch)
        except ValueError as error:
            if "more than 1 value per channel" not in str(error):
                raise
            raise UserError(
                f"a batch of {len(batch)} image, {batch.shape[-1]}x{batch.shape[-2]} pixels, leaves one position in the "
                "deepest level, which batch normalisation cannot learn from: give a larger dataset.resize, or a "
                "method.batch_size that leaves no single image over"
            ) from error
        assert loss is not None
        self.optimizer.zero_grad(set_to_none=True)
        self.scaler.scale(loss).backward()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.losses[self.step] = loss.detach()
        self.step += 1

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
        """All that a step depends on beside the images: tensors, and plain data."""
        tensors = {f"detector.{name}": tensor for name, tensor in kept_state(self.detector).items()}
        tensors |= {f"best.{name}": tensor for name, tensor in (self.best or {}).items()}
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
        }
        return {**tensors, "losses": self.losses}, data

    def restore(self, tensors: Mapping[str, Tensor], data: Mapping[str, Any]) -> None:
        """Go on from what `state` gave."""
        parts: dict[str, dict[str, Tensor]] = {"detector": {}, "best": {}, "optimizer": {}}
        for name, tensor in tensors.items():
            owner, _, rest = name.partition(".")
            if owner in parts:
                parts[owner][rest] = tensor
        self.detector.restore(parts["detector"])
        self.best = parts["best"] or None
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
