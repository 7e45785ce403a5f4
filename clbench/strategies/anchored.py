"""Anchored weights: what EWC, SI and MAS share, a quadratic penalty on moving weights that earlier tasks need."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal

import torch
from pydantic import NonNegativeFloat
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from clbench.data.images import Images
from clbench.data.stream import Task
from clbench.errors import UserError
from clbench.methods.base import Detector
from clbench.randomness import generator
from clbench.strategies.replay import Replay
from clbench.training import split, trained_by

_BEFORE_ONE = math.nextafter(1.0, 0.0)


class Anchored(Replay):
    """From the second stage on, weights are drawn back to anchors, each the more, the more important it is.

    The loss gets the penalty c * sum_i importance_i * (weight_i - anchor_i)^2 over all parameters that the optimizer trains,
    with c = `weight`, or half of it in EWC. Only its gradient is computed, in closed form and single precision, and added
    to that of the loss before gradients are clipped; the losses that are reported, and those that early stopping compares,
    are the method's own. Parameters that get no gradient in a step are not drawn. Kept are two numbers for each trained
    weight: 8 bytes. A step takes a copy of the trained weights besides.

    The running statistics of batch normalisation are no weights: no penalty keeps them from following the new images, see
    `freeze_norm`.

    Args:
        detector, seed: as for `Strategy`.
        weight: of the penalty.
        normalise: `mean` divides the importance of each stage by its mean over all trained weights, so that `weight` does not
            depend on the scale of the method's loss; `none` leaves it as it is, as in the papers, and then the weight that
            suits differs from one method to another by many orders of magnitude.
        freeze_norm: whether trained batch normalisation computes as in evaluation from the second stage on, by the
            running statistics of the first, which then stay; its factors and offsets are still trained.
        replay: settings of `Replay`, whose buffer is optional.

    Attributes:
        memory: `importance.NAME` and `anchor.NAME` of each trained parameter, both of its shape, once a stage is learned.
    """

    needs_buffer = False
    needs_lasting_weights = True
    gradient_factor = 2.0  # of weight * importance * (parameter - anchor): 2 for the derivative of a square

    def __init__(
        self,
        detector: Detector,
        *,
        seed: int = 0,
        weight: NonNegativeFloat = 1.0,
        normalise: Literal["none", "mean"] = "mean",
        freeze_norm: bool = False,
        **replay: Any,
    ):
        super().__init__(detector, seed=seed, **replay)
        self.weight, self.normalise, self.freeze_norm = weight, normalise, freeze_norm

    def check(self, tasks: Sequence[Task]) -> None:
        super().check(tasks)
        if self.freeze_norm and not any(self._normalisations(self.detector)):
            raise UserError(
                f"strategy.freeze_norm=true: {type(self.detector).__name__} trains no batch normalisation; leave it out"
            )

    def before_epoch(self, detector: Detector, stage: int) -> None:
        if not (self.freeze_norm and stage > 0):
            return
        for module in self._normalisations(detector):
            module.eval()

    @staticmethod
    def _normalisations(detector: Detector) -> Iterator[_BatchNorm]:
        """The layers of batch normalisation that are trained."""
        frozen = {id(module) for pyramid in detector.pyramids() for module in pyramid.modules()}
        for module in detector.modules():
            if isinstance(module, _BatchNorm) and id(module) not in frozen:
                yield module

    @torch.no_grad()
    def after_backward(self, gradients: Mapping[str, Tensor]) -> None:
        drawn = [name for name in gradients if self.kept_of("importance", name) is not None]
        if drawn:  # all parameters at once: a GPU would wait to be asked for each
            anchors = [self.memory[f"anchor.{name}"] for name in drawn]
            moved = torch._foreach_sub([self.detector.get_parameter(name) for name in drawn], anchors)
            importance = [self.memory[f"importance.{name}"] for name in drawn]
            factor = self.gradient_factor * self.weight
            torch._foreach_addcmul_([gradients[name] for name in drawn], importance, moved, factor)

    def ways_out(self) -> list[str]:
        drawn = self.weight > 0 and any(name.startswith("importance.") for name in self.memory)
        return ["lower strategy.weight"] if drawn else []

    def kept_of(self, kind: str, name: str) -> Tensor | None:
        """What `memory` has of a kind, "importance" for instance, for a parameter of this name.

        None where there is nothing, or the parameter had another shape then.
        """
        found = self.memory.get(f"{kind}.{name}")
        return None if found is None or found.shape != self.detector.get_parameter(name).shape else found

    def restore_kept(self, tensors: dict[str, Tensor]) -> None:
        super().restore_kept(tensors)
        device = self.detector.device
        self.memory = {name: tensor.to(device) for name, tensor in self.memory.items()}

    def trained(self) -> dict[str, Tensor]:
        """The parameters that the detector's optimizer trains now: name -> parameter."""
        return trained_by(self.detector, self.detector.optimizer())

    def estimated(
        self,
        stage: int,
        images: Images,
        count: int | None,
        value: Callable[[Tensor], Tensor],
        measure: Callable[[Tensor], Tensor],
    ) -> dict[str, Tensor]:
        """The mean, over single images that the stage learned from, of a measure of the gradient of a value.

        The detector is in evaluation mode, so that dropout is off and running statistics stay, and what is trained
        computes in single precision; noise of its own is drawn. It takes a forward and a backward pass for each image, and the gradient and
        the sum, two numbers for each trained weight, of memory.

        Args:
            stage: 0-based.
            images: the stage's, uint8 [N, 3, H, W].
            count: how many of those learned from are taken at most, at random; None for all.
            value: one image, uint8 [1, 3, H, W] -> a scalar.
            measure: of a gradient, element by element.

        Returns:
            Name of the trained parameter -> the mean, of its shape.
        """
        shown = self.shown(stage, images)  # as training saw them
        learned, _ = split(shown, self.detector.held_out, self.seed, stage)
        order = torch.randperm(len(learned), generator=generator(self.seed, "importance", stage))
        chosen = learned.some(order[:count].sort().values)
        trained = self.trained()
        sums = {name: torch.zeros_like(parameter) for name, parameter in trained.items()}
        self.detector.eval()
        self.detector.done = _BEFORE_ONE  # what follows a schedule stands as at the end of the training
        with self.detector.learning(), torch.enable_grad():
            for done, image in enumerate(chosen.split(1)):
                found = torch.autograd.grad(value(image), list(trained.values()), allow_unused=True)
                for total, gradient in zip(sums.values(), found, strict=True):
                    if gradient is not None:
                        total += measure(gradient)
                self.detector.progress("importance of weights", done + 1, len(chosen))
        return {name: total.div_(len(chosen)) for name, total in sums.items()}

    @torch.no_grad()
    def remember(self, importance: Mapping[str, Tensor], decay: float | None = 1.0) -> None:
        """Add the importance of weights for the stage that was learned, and move their anchors.

        Args:
            importance: name of the trained parameter -> float32, of its shape; it is taken over, and may be changed. None
                at all where half precision overflowed in each step, so that no weight moved.
            decay: what the importance for earlier stages is multiplied by, with the weights as the anchors of all. None:
                every stage has an anchor of its own; the sum of their penalties is, but for a constant, that of the
                summed importance around the mean of the anchors, weighted by importance.
        """
        if not importance:
            return
        if self.normalise == "mean":
            count = sum(part.numel() for part in importance.values())
            mean = torch.stack([part.sum() for part in importance.values()]).sum() / count
            for part in importance.values():
                part.div_(mean.clamp_min(torch.finfo(mean.dtype).tiny))
        for name, part in importance.items():
            weights = self.detector.get_parameter(name)
            before, anchor = self.kept_of("importance", name), weights.clone()
            if before is not None:
                if decay is None:
                    share = torch.where(part > 0, part / (part + before), 0)
                    anchor = torch.lerp(self.memory[f"anchor.{name}"], weights, share)
                    part.add_(before)
                else:
                    part.add_(before, alpha=decay)
            self.memory |= {f"importance.{name}": part, f"anchor.{name}": anchor}
