"""The one training loop: steps over a stage's images, epoch by epoch, until a held-out loss stops falling."""

import itertools
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from clbench.data.images import Images, part_of
from clbench.errors import UserError
from clbench.methods.base import Detector, kept_state
from clbench.out_of_memory import free_on_gpu
from clbench.randomness import generator, seed_for

_LOOK_S = 0.5  # seconds between two looks at the loss, each of which waits for the device


class Diverged(UserError):
    """The loss, a weight or an anomaly map is not finite."""


def advice_on_divergence(detector: Detector, hooks: "Hooks") -> str:
    """What to try where a detector diverged, as the end of an error message."""
    precision = ["set gpu.precision=fp32"] if detector.precision else []
    return ", or ".join(["lower method.learning_rate", *hooks.ways_out(), *precision])


class Bookmark(Protocol):
    """Where the state of a stage that is being learned is kept, so that another process can continue it."""

    def find(self, stage: int) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """What `place` was last given for this stage, name -> tensor and plain data.

        None where there is nothing.
        """
        ...

    def due(self, epoch_ended: bool) -> bool:
        """Whether `place` should be called now.

        Args:
            epoch_ended: whether an epoch has just ended, where less is to be saved than within one.
        """
        ...

    def place(self, stage: int, tensors: dict[str, Tensor], data: dict[str, Any]) -> None:
        """Keep the state of a stage that is being learned.

        Args:
            stage: 0-based.
            tensors: name -> tensor.
            data: what JSON can hold.

        Raises:
            Stopped: the run is to end here; what was given is kept.
        """
        ...


@dataclass(frozen=True)
class Batch:
    """The images of one training step, and where each comes from.

    Attributes:
        images: uint8 [B, 3, H, W], on the detector's device: images of this stage, then replayed ones.
        stages: int64 [B], on the CPU: the stage that each image was first learned in.
        rows: int64 [B], on the CPU: the index of each image among those of this stage that are learned from,
            or, where it is replayed, among the stored images of its stage.
        stage: the stage being learned, 0-based.
        outputs: for `Hooks.penalty`, the detector's outputs of the images that the method's loss is of, [B, ...] with
            gradients, where its training step computed them, see `Detector.note`; else none.
    """

    images: Tensor
    stages: Tensor
    rows: Tensor
    stage: int
    outputs: Sequence[Tensor] = ()

    @property
    def replayed(self) -> Tensor:
        """Whether each image is replayed, bool [B], on the CPU."""
        return self.stages != self.stage

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def new(self) -> "Batch":
        """The images of this stage."""
        return self.some(slice(0, int((~self.replayed).sum())))

    @property
    def past(self) -> "Batch":
        """The replayed images."""
        return self.some(slice(int((~self.replayed).sum()), None))

    def some(self, rows: slice) -> "Batch":
        """Some of the images, and their outputs where there are those of all: nothing is copied."""
        outputs = [output[rows] for output in self.outputs if len(output) == len(self)]
        images = part_of(self.images, rows)
        return Batch(images, self.stages[rows], self.rows[rows], self.stage, outputs)


class Hooks:
    """What a strategy does inside the training loop. These methods do nothing; `Strategy` inherits them.

    Attributes:
        learns_replayed: whether the method's loss is of replayed images too; if not, of those of the stage alone, and
            replayed ones are for `penalty`.
        draws: how many times as many replayed images as new ones a batch has, drawn independently.
    """

    learns_replayed = True
    draws = 1

    def before_epoch(self, detector: Detector, stage: int) -> None:
        """Called before the steps of an epoch, with the detector in training mode; again in a process that continues
        within the epoch.

        Args:
            detector: which layers of it are in training mode may be changed.
            stage: the one being learned, 0-based.
        """

    def penalty(self, detector: Detector, batch: Batch) -> Tensor | None:
        """A scalar to add to the method's loss of a batch; None for nothing.

        Computed in the loss's precision.
        """
        return None

    def combine(self, gradients: Mapping[str, Tensor], replayed: Mapping[str, Tensor]) -> None:
        """Change in place the gradients of a step's own images, by those of the replayed ones.

        For a class that overrides it, the loss of a step is that of the stage's own images; the replayed images have a
        loss and a backward pass of their own before it. It is called where there are replayed images.

        Args:
            gradients, replayed: name of the parameter -> gradient. In float16 training all are multiplied by the same
                scale, and one that overflowed has to show in `gradients` as a number that is not finite: the scaler
                then passes the step over.
        """

    def after_backward(self, gradients: Mapping[str, Tensor]) -> None:
        """Read a step's gradients, name of the parameter -> gradient, or change them in place.

        Clipping comes after.
        """

    def after_step(self) -> None:
        """Called after the optimizer has changed the weights."""

    def at_best(self) -> None:
        """Called after an epoch whose held-out loss is the lowest so far: unless a later one is lower, its weights stay."""

    def ways_out(self) -> list[str]:
        """What else to try where the training diverged, such as "lower strategy.weight"."""
        return []

    def kept(self) -> dict[str, Tensor]:
        """The tensors that a strategy keeps, name -> tensor: checkpointed, and counted as its footprint.

        Within a stage, a checkpoint has those that are other tensors than when the stage began, or were changed in
        place; a change through `.data` is not seen.
        """
        return {}

    def restore_kept(self, tensors: dict[str, Tensor]) -> None:
        """Take what `kept` gave, in this process or in an earlier one."""


OF_GRADIENTS = ("after_backward", "after_step")  # hooks that are called where there is an optimizer,
OF_STEPS = ("penalty", "combine", *OF_GRADIENTS)  # and with those of its loss


def overrides(strategy: type[Hooks], names: Sequence[str], parent: type[Hooks] = Hooks) -> bool:
    """Whether a class has one of these hooks otherwise than its parent has."""
    return any(getattr(strategy, name) is not getattr(parent, name) for name in names)


def trained_by(detector: Detector, optimizer: torch.optim.Optimizer | None) -> dict[str, Tensor]:
    """The parameters that an optimizer trains, in its order: name in the detector -> parameter; none without one."""
    names = {id(parameter): name for name, parameter in detector.named_parameters()}
    groups = optimizer.param_groups if optimizer else []
    return {names[id(parameter)]: parameter for group in groups for parameter in group["params"]}


def train(
    detector: Detector,
    stage: int,
    images: Tensor | Images,
    stored: Sequence[tuple[Tensor | Images, Tensor | Images]],
    seed: int,
    bookmark: Bookmark | None = None,
    on_epoch: Callable[[int, int, float], None] = lambda stage, epoch, loss: None,
    hooks: Hooks | None = None,
) -> None:
    """Teach a detector a stage, from its beginning, or from where an earlier process left it, to its end.

    The share `detector.held_out` of the images is held out: no step sees them, and they stop the training
    early. Torch's own generators are seeded anew before every step and every validation, by the seed, the
    stage and the step: a training that is continued draws what it would have drawn.

    Args:
        detector: on its device.
        stage: 0-based.
        images: the stage's images, uint8 [N, 3, H, W]. With an optimizer, all that is learned from is copied to the
            device once, see `Images.copied`; else a batch at a time goes there.
        stored: for each earlier stage, twice images uint8 [M, 3, H, W]: those that it was learned from, which are
            replayed, one with every new image; and images that were held out of it, and stay held out.
        seed: the run's.
        bookmark: where the state is kept and looked for; None for nowhere. Methods that only collect begin
            anew.
        on_epoch: called after each epoch with the stage, the epoch (0-based) and its mean loss. A process
            that continues calls it again for epochs after the checkpoint.
        hooks: what the strategy does inside the loop; None for nothing.

    Raises:
        Diverged: the loss or a weight is not finite.
        Stopped: a signal asked for it; the bookmark has the state.
        UserError: a batch has one image, which batch normalisation cannot learn from, or a checkpoint cannot
            be written.
    """
    current, validation = split(images, detector.held_out, seed, stage)
    owners = [
        (stage, len(current)),
        *((earlier, len(some)) for earlier, (some, _) in enumerate(stored) if len(some)),
    ]
    learned = Images.concatenate([current, *(some for some, _ in stored)]).on(detector.device)
    unseen = Images.concatenate([validation, *(held for _, held in stored)]).on(detector.device)
    if detector.has_gradients():  # every epoch sees all of them
        learned = learned.copied(_image_memory(detector))
        unseen = unseen.copied(_image_memory(detector, learned.copied_bytes))
    current, past = learned.some(slice(len(current))), learned.some(slice(len(current), None))
    with detector.learning():
        detector.train()
        detector.prepare(current)
        saved = bookmark.find(stage) if bookmark else None
        if saved is None:
            with torch.no_grad():
                detector.start_task(stage, current, past)
        optimizer = detector.optimizer()
        if optimizer is None:
            _collect(detector, learned)
        else:
            descent = Descent(detector, optimizer, stage, seed, bookmark, on_epoch, hooks or Hooks())
            if saved is not None:
                descent.restore(*saved)
            descent.run(learned, owners, unseen)
        detector.eval()
        with torch.no_grad():
            detector.consolidate(current, past)
            detector.finish_task(unseen if len(unseen) else current)


def _image_memory(detector: Detector, there: int = 0) -> float:
    """How many more bytes of images its device has room for, beside so many that are there."""
    if detector.image_memory is not None:
        return detector.image_memory - there
    return free_on_gpu(detector.device) / 2 if detector.device.type == "cuda" else math.inf


@torch.no_grad()
def _collect(detector: Detector, images: Images) -> None:
    """Show every image, uint8 [N, 3, H, W], to the detector once."""
    done = 0
    for batch in images.split(detector.batch_size):
        detector.training_step(batch)
        done += len(batch)
        detector.progress("learning", done, len(images))


class Descent:
    """Minimises a loss for `epochs` or `step_budget`, or until the held-out loss stops falling.

    Args:
        detector: on its device.
        optimizer: of the detector's parameters.
        stage, seed, bookmark, on_epoch, hooks: as for `train`.

    Attributes:
        epoch, step: the next ones, 0-based; the step within its epoch.
        losses: float32 [steps], of the current epoch; NaN where a step is yet to come.
        best: the detector's state with the lowest held-out loss, name -> tensor; None before the first
            validation.
        best_loss: that loss.
        since: epochs since then.
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
        self.scaler = torch.amp.GradScaler(device, enabled=detector.precision == torch.float16)
        if self.scaler.is_enabled() and detector.gradient_scale:
            self.scaler.load_state_dict(dict(detector.gradient_scale))
        self.rates = [group["lr"] for group in optimizer.param_groups]
        self.trained = trained_by(detector, optimizer)
        self.watched = overrides(type(hooks), OF_GRADIENTS)
        self.apart = overrides(type(hooks), ["combine"])
        self.kept_before = {name: (tensor, tensor._version) for name, tensor in hooks.kept().items()}
        self.epoch, self.step = 0, 0
        self.losses = torch.empty(0)
        self.best: Mapping[str, Tensor] | None = None
        self.best_loss, self.since = math.inf, 0

    def run(self, learned: Images, owners: Sequence[tuple[int, int]], unseen: Images) -> None:
        """Train from the current epoch and step to the end, and leave the best weights in the detector.

        Args:
            learned: images to learn from, uint8 [N, 3, H, W]: first those of the stage itself, then the replayed ones
                of each earlier stage.
            owners: which of them are whose, in their order: a stage, and how many are its own.
            unseen: held-out images for early stopping, uint8 [V, 3, H, W]; there may be none.

        Raises:
            Diverged: a loss or weight is not finite.
            Stopped, UserError: as `train`.
        """
        detector = self.detector
        per_epoch = math.ceil(owners[0][1] / detector.batch_size)
        budget = detector.step_budget or detector.epochs * per_epoch
        stops_early = detector.patience is not None and len(unseen) > 0
        while self.epoch * per_epoch < budget:
            if stops_early and self.since >= (detector.patience or 0):
                break
            self._epoch(learned, owners, per_epoch, budget)
            if stops_early:
                self._validate(unseen)
            self.on_epoch(self.stage, self.epoch, float(self.losses.mean()))
            self.epoch, self.step = self.epoch + 1, 0
            self._keep(epoch_ended=True)
        detector.gradient_scale = self.scaler.state_dict()
        if self.best is not None:
            detector.restore(self.best)
        finite = [parameter.isfinite().all() for parameter in self.trained.values()]
        if not bool(torch.stack(finite).all()):
            advice = advice_on_divergence(detector, self.hooks)
            raise Diverged(f"a weight is not finite after the last step of epoch {self.epoch}: {advice}")

    def _epoch(self, images: Images, owners: Sequence[tuple[int, int]], per_epoch: int, budget: int) -> None:
        """Take the steps of the current epoch, from `self.step` on.

        Args:
            images, owners: as for `run`.
            per_epoch: steps of a whole epoch.
            budget: steps of the whole training.
        """
        detector = self.detector
        detector.train()
        self.hooks.before_epoch(detector, self.stage)
        before = self.epoch * per_epoch  # steps of earlier epochs
        steps = min(per_epoch, budget - before)
        if self.step == 0:
            self.losses = torch.full((steps,), math.nan, device=images.device)
        looked = time.perf_counter()
        counts = [count for _, count in owners]
        draws = self.hooks.draws
        batches = _batches(counts, detector.batch_size, self.stage, self.epoch, self.seed, draws)
        batches = batches[self.step : steps]
        rows = torch.cat([*batches, torch.empty(0, dtype=torch.int64)])
        starts = torch.tensor([0, *itertools.accumulate(counts)])
        owner = torch.bucketize(rows, starts, right=True) - 1
        stages, own_rows = torch.tensor([stage for stage, _ in owners])[owner], rows - starts[owner]
        sizes = [len(batch) for batch in batches]
        columns = images.batches(batches), stages.split(sizes), own_rows.split(sizes)
        for shown, stages_of, rows_of in zip(*columns, strict=True):
            self._step(Batch(shown, stages_of, rows_of, self.stage), (before + self.step) / budget)
            self._keep(epoch_ended=False)
            if self.step == steps or time.perf_counter() - looked > _LOOK_S:
                self._check()
                epochs = math.ceil(budget / per_epoch)
                note = f"epoch {self.epoch + 1}/{epochs}, loss {self.losses[: self.step].mean():.4g}"
                detector.progress("learning", before + self.step, budget, note)
                looked = time.perf_counter()

    def _step(self, batch: Batch, done: float) -> None:
        """Take one step.

        Args:
            done: share of the training's steps that are done, in [0, 1).
        """
        self.detector.done = done
        for group, rate in zip(self.optimizer.param_groups, self.rates, strict=True):
            group["lr"] = rate * self.detector.learning_rate_factor(done)
        torch.manual_seed(seed_for(self.seed, "step", self.stage, self.epoch, self.step))
        replayed: dict[str, Tensor] = {}
        if self.apart:
            batch, past = batch.new, batch.past
            if len(past.images):
                replayed = self._gradients(self._loss(past))
        loss = self._loss(batch)
        gradients = self._gradients(loss)
        if replayed:
            self.hooks.combine(gradients, replayed)
        taken = True  # not where half precision overflowed: the scaler passes such a step over
        if self.watched or self.detector.gradient_clip is not None:
            self.scaler.unscale_(self.optimizer)
            if self.watched and self.scaler.is_enabled():
                taken = bool(
                    torch.stack([gradient.isfinite().all() for gradient in gradients.values()]).all()
                )
            if taken:
                self.hooks.after_backward(gradients)
            if self.detector.gradient_clip is not None:
                nn.utils.clip_grad_norm_(self.trained.values(), self.detector.gradient_clip)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        if taken:
            self.hooks.after_step()
        self.losses[self.step] = loss.detach()
        self.step += 1

    def _gradients(self, loss: Tensor) -> dict[str, Tensor]:
        """The gradients of a loss, times the scale of float16 training: name -> the parameter's new `grad`."""
        self.optimizer.zero_grad(set_to_none=True)
        self.scaler.scale(loss).backward()
        return {name: p.grad for name, p in self.trained.items() if p.grad is not None}

    def _loss(self, batch: Batch) -> Tensor:
        """The method's loss and the strategy's penalty together, a scalar.

        Raises:
            UserError: batch normalisation cannot learn from a batch of one image.
        """
        try:
            with self.detector.mixed():
                learned = batch if self.hooks.learns_replayed else batch.new
                with self.detector.noting() as outputs:
                    loss = self.detector.training_step(learned.images)
                assert loss is not None
                penalty = self.hooks.penalty(self.detector, replace(batch, outputs=outputs))
                return loss if penalty is None else loss + penalty
        except ValueError as error:
            if "more than 1 value per channel" not in str(error):
                raise
            images = batch.images
            raise UserError(
                f"a batch of {len(images)} image, {images.shape[-1]}x{images.shape[-2]} pixels, leaves one position in "
                "the deepest level, which batch normalisation cannot learn from: give a larger "
                f"{self.detector.size_setting}, or a method.batch_size that leaves no single image over"
            ) from error

    def _check(self) -> None:
        """Check the losses of the epoch so far; this waits for the device.

        Raises:
            Diverged: one is not finite.
        """
        bad = (~self.losses[: self.step].isfinite()).nonzero().flatten()
        if len(bad):
            step = int(bad[0])
            raise Diverged(
                f"the loss became {float(self.losses[step])} in epoch {self.epoch + 1}, step {step + 1}: "
                f"{advice_on_divergence(self.detector, self.hooks)}"
            )

    @torch.no_grad()
    def _validate(self, unseen: Images) -> None:
        """Compute the mean loss of held-out images, uint8 [V, 3, H, W]; keep the weights if it is lowest.

        The same random numbers are drawn after every epoch.
        """
        detector = self.detector
        detector.eval()
        torch.manual_seed(seed_for(self.seed, "validation", self.stage))
        batches = unseen.split(detector.batch_size)
        with detector.mixed():
            total = sum(len(batch) * detector.validation_loss(batch).double() for batch in batches)
        loss = float(total) / len(unseen)
        if loss < self.best_loss:
            self.best = {name: tensor.clone() for name, tensor in kept_state(detector).items()}
            self.best_loss, self.since = loss, 0
            self.hooks.at_best()
        else:
            self.since += 1

    def _keep(self, epoch_ended: bool) -> None:
        """Give the state to the bookmark where that is due."""
        if self.bookmark and self.bookmark.due(epoch_ended):
            self._check()
            self.bookmark.place(self.stage, *self.state())

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """All that later steps depend on besides the images: name -> tensor, and plain data for JSON."""
        tensors = {f"detector.{name}": tensor for name, tensor in kept_state(self.detector).items()}
        tensors |= {f"best.{name}": tensor for name, tensor in (self.best or {}).items()}
        kept = self.hooks.kept()
        for name, tensor in kept.items():  # the others are there again when a process begins the stage again
            before, version = self.kept_before.get(name, (None, 0))
            if tensor is not before or tensor._version != version:
                tensors[f"kept.{name}"] = tensor
        numbers: dict[str, Any] = {}
        for index, parameter in enumerate(self._parameters()):
            for name, value in self.optimizer.state[parameter].items():
                if isinstance(value, Tensor):
                    tensors[f"optimizer.{index}.{name}"] = value
                elif value is not None:  # SGD without momentum has an entry that is None
                    numbers[f"{index}.{name}"] = value
        data = {
            "optimizer": numbers,
            "groups": [
                {
                    name: value
                    for name, value in group.items()
                    if isinstance(value, int | float) and name != "lr"
                }
                for group in self.optimizer.param_groups
            ],
            "epoch": self.epoch,
            "step": self.step,
            "best_loss": self.best_loss,
            "since": self.since,
            "scaler": self.scaler.state_dict(),
            "kept": list(kept),
        }
        return {**tensors, "losses": self.losses}, data

    def restore(self, tensors: Mapping[str, Tensor], data: Mapping[str, Any]) -> None:
        """Continue from what `state` gave."""
        self.detector.restore(with_prefix(tensors, "detector."))
        self.best = with_prefix(tensors, "best.") or None
        kept = {**self.hooks.kept(), **with_prefix(tensors, "kept.")}
        self.hooks.restore_kept({name: kept[name] for name in data["kept"]})
        parameters = self._parameters()
        for name, tensor in with_prefix(tensors, "optimizer.").items():
            index, _, key = name.partition(".")
            parameter = parameters[int(index)]
            # Fused optimizers expect their state in the parameter's memory layout, which may be channels last.
            same = tensor.shape == parameter.shape
            value = torch.empty_like(parameter, dtype=tensor.dtype).copy_(tensor) if same else tensor
            self.optimizer.state[parameter][key] = value
        for name, number in data["optimizer"].items():
            index, _, key = name.partition(".")
            self.optimizer.state[parameters[int(index)]][key] = number
        for group, numbers in zip(self.optimizer.param_groups, data["groups"], strict=True):
            group.update(numbers)
        self.losses = tensors["losses"]
        self.epoch, self.step = data["epoch"], data["step"]
        self.best_loss, self.since = data["best_loss"], data["since"]
        self.scaler.load_state_dict(data["scaler"])

    def _parameters(self) -> list[Tensor]:
        """The parameters that the optimizer trains, in its order."""
        return [parameter for group in self.optimizer.param_groups for parameter in group["params"]]


def with_prefix(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors whose names begin with `prefix`, under names without it."""
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}


def _batches(
    counts: Sequence[int], size: int, stage: int, epoch: int, seed: int, draws: int = 1
) -> list[Tensor]:
    """Rows of the batches of an epoch, int64 [up to (1 + draws) * size] each: new images at random, then replayed ones.

    Args:
        counts: number of new images, then of the images of each past stage; rows count through all in this
            order.
        size: new images of a batch.
        draws: of replayed images, each of as many as there are new ones.
    """
    current, *past = counts
    starts = list(itertools.accumulate(counts))
    batches = []
    order = torch.randperm(current, generator=generator(seed, "order", stage, epoch))
    for step, rows in enumerate(order.split(size)):
        random = generator(seed, "replay batch", stage, epoch, step)
        # Past stages take turns, in an order that each batch draws anew: all are replayed equally often.
        rounds = math.ceil(len(rows) / len(past)) if past else 0
        drawn: list[int] = []
        for _ in range(draws):
            tasks = torch.randperm(len(past), generator=random).repeat(rounds)[: len(rows)].tolist()
            drawn += [starts[task] + int(torch.randint(past[task], (), generator=random)) for task in tasks]
        batches.append(torch.cat([rows, torch.tensor(drawn, dtype=torch.int64)]))
    return batches


def split(images: Tensor | Images, share: float, seed: int, stage: int) -> tuple[Images, Images]:
    """A stage's images, uint8 [N, 3, H, W], to learn from, and those held out; none is copied.

    At least one is learned from; of two or more at least one is held out where the share is not 0. Tiles of one image stay
    together.
    """
    images = Images.of(images)
    if images.parents is None:
        learned, held = split_rows(len(images), share, seed, stage)
        return images.some(learned), images.some(held)
    parents, owners = images.parents.unique(return_inverse=True)
    _, held = split_rows(len(parents), share, seed, stage)
    apart = torch.isin(owners, held)
    return images.some((~apart).nonzero().flatten()), images.some(apart.nonzero().flatten())


def split_rows(count: int, share: float, seed: int, stage: int) -> tuple[Tensor, Tensor]:
    """The indices of a stage's images to learn from, and of those held out, each int64 and ascending."""
    size = held_out(count, share)
    order = torch.randperm(count, generator=generator(seed, "held out", stage))
    return order[size:].sort().values, order[:size].sort().values


def held_out(count: int, share: float) -> int:
    """How many of `count` images are held out: the share, rounded up, but never all."""
    return min(math.ceil(share * count), count - 1)
