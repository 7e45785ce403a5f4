"""The one training loop: steps over a task's images, epoch by epoch, stopped early on normal ones held out."""

import math
import time
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from clbench.errors import UserError
from clbench.methods.base import Detector, kept_state
from clbench.randomness import generator, seed_for

_LOOK_S = 0.5  # seconds between two looks at the loss, each of which waits for the device


class Diverged(UserError):
    """The loss is no number any more."""


def train(detector: Detector, stage: int, images: Tensor, stored: Sequence[Tensor], seed: int) -> None:
    """Teach a detector a stage, from the start of its task to the end.

    All randomness inside a step comes from torch's own generators, seeded anew before every step and every
    validation from what it is for: so a continued training is the training.

    Args:
        stage: 0-based.
        images: of the stage, uint8 [N, 3, H, W].
        stored: images of each earlier task, from which as many are replayed with every batch as it has.

    Raises:
        Diverged: the loss became infinite or not a number.
    """
    share = detector.held_out
    (current, validation), *parts = (
        _split(part, share, generator(seed, "held out", stage, index))
        for index, part in enumerate((images, *(part for part in stored if len(part))))
    )
    past = [part for part, _ in parts]
    unseen = torch.cat([validation, *(part for _, part in parts)])
    with detector.learning():
        detector.train()
        with torch.no_grad():
            detector.start_task(stage, current, torch.cat(past) if past else current[:0])
        optimizer = detector.optimizer()
        if optimizer is None:
            _collect(detector, torch.cat([current, *past]) if past else current)
        else:
            _descend(detector, optimizer, stage, current, past, unseen, seed)
        detector.eval()
        with torch.no_grad():
            detector.finish_task(unseen if len(unseen) else current)


@torch.no_grad()
def _collect(detector: Detector, images: Tensor) -> None:
    """Show the detector every image once."""
    for begin in range(0, len(images), detector.batch_size):
        detector.training_step(images[begin : begin + detector.batch_size])
        detector.progress("learning", min(begin + detector.batch_size, len(images)), len(images))


def _descend(
    detector: Detector,
    optimizer: torch.optim.Optimizer,
    stage: int,
    current: Tensor,
    past: Sequence[Tensor],
    unseen: Tensor,
    seed: int,
) -> None:
    """Minimise the detector's loss, for `epochs` or until `patience` epochs have not bettered the best."""
    steps = math.ceil(len(current) / detector.batch_size)
    rates = [group["lr"] for group in optimizer.param_groups]
    autocast = torch.autocast(current.device.type, detector.precision, enabled=detector.precision is not None)
    scaler = torch.amp.GradScaler(current.device.type, enabled=detector.precision == torch.float16)
    best, best_loss, since = None, math.inf, 0
    for epoch in range(detector.epochs):
        detector.train()
        losses = torch.full((steps,), math.nan, device=current.device)
        looked = time.perf_counter()
        for step, batch in enumerate(_batches(current, past, detector.batch_size, stage, epoch, seed)):
            done = (epoch * steps + step) / (detector.epochs * steps)
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate * detector.learning_rate_factor(done)
            torch.manual_seed(seed_for(seed, "step", stage, epoch, step))
            with autocast:
                loss = detector.training_step(batch)
            assert loss is not None
            optimizer.zero_grad(set_to_none=True)
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            losses[step] = loss.detach()
            last = step == steps - 1
            if last or time.perf_counter() - looked > _LOOK_S:
                _check(losses[: step + 1], epoch)
                note = f"epoch {epoch + 1}/{detector.epochs}, loss {losses[: step + 1].mean():.4g}"
                detector.progress("learning", epoch * steps + step + 1, detector.epochs * steps, note)
                looked = time.perf_counter()
        if detector.patience is None or not len(unseen):
            continue
        validation_loss = _validate(detector, unseen, stage, seed)
        if validation_loss < best_loss:
            best = {name: tensor.clone() for name, tensor in kept_state(detector).items()}
            best_loss, since = validation_loss, 0
        else:
            since += 1
            if since >= detector.patience:
                break
    if best is not None:
        detector.restore(best)


def _batches(
    current: Tensor, past: Sequence[Tensor], size: int, stage: int, epoch: int, seed: int
) -> Iterator[Tensor]:
    """An epoch over the current images in random order, each batch with as many of the past tasks'."""
    order = torch.randperm(len(current), generator=generator(seed, "order", stage, epoch))
    for step, rows in enumerate(order.split(size)):
        batch = current[rows.to(current.device)]
        if past:
            random = generator(seed, "replay batch", stage, epoch, step)
            # Evenly over the past tasks: rounds of all of them, in an order of each batch's own.
            tasks = torch.randperm(len(past), generator=random).repeat(math.ceil(len(rows) / len(past)))
            drawn = [
                past[task][int(torch.randint(len(past[task]), (), generator=random))]
                for task in tasks[: len(rows)].tolist()
            ]
            batch = torch.cat([batch, torch.stack(drawn)])
        yield batch


@torch.no_grad()
def _validate(detector: Detector, unseen: Tensor, stage: int, seed: int) -> float:
    """The mean loss over the held-out images, under the same draws after every epoch."""
    detector.eval()
    torch.manual_seed(seed_for(seed, "validation", stage))
    total = sum(
        len(part) * detector.validation_loss(part).double() for part in unseen.split(detector.batch_size)
    )
    return float(total) / len(unseen)


def _split(images: Tensor, share: float, random: torch.Generator) -> tuple[Tensor, Tensor]:
    """Images to learn from and images held out: at least one of each, where there are two and a share."""
    count = held_out(len(images), share)
    if not count:
        return images, images[:0]
    order = torch.randperm(len(images), generator=random).to(images.device)
    return images[order[count:].sort().values], images[order[:count].sort().values]


def held_out(count: int, share: float) -> int:
    """How many of so many images are held out."""
    return min(math.ceil(share * count), count - 1)


def _check(losses: Tensor, epoch: int) -> None:
    bad = (~losses.isfinite()).nonzero().flatten()
    if len(bad):
        step = int(bad[0])
        raise Diverged(
            f"the loss became {float(losses[step])} in epoch {epoch + 1}, step {step + 1}: "
            "lower method.learning_rate, or set gpu.precision=fp32"
        )
