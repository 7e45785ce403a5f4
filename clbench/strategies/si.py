"""SI: synaptic intelligence (Zenke et al., 2017)."""

from collections.abc import Mapping
from typing import Any

import torch
from pydantic import PositiveFloat
from torch import Tensor

from clbench.data.images import Images
from clbench.methods.base import Detector
from clbench.strategies.anchored import Anchored
from clbench.training import with_prefix


class SI(Anchored):
    """Weights whose change has lowered the loss of earlier tasks are drawn back to their values after the last task.

    The loss gets weight * sum_i importance_i * (weight_i - anchor_i)^2 (Zenke et al., 2017, equation 4). In each step
    path_i grows by -g_i * (change of the weight), with g the gradient of the loss without the penalty and before it is
    clipped, and the change that the optimizer really makes. After a task the importance grows by
    max(path_i, 0) / ((weight_i - anchor_i)^2 + damping) (equation 5; the paper does not cut off below 0). Where early stopping
    brings back the weights of an earlier epoch, the path is the one to them.

    Replayed images count as part of the task. While a task is learned 4 bytes more are kept for each trained weight, twice as
    many with early stopping, and within a step a copy of gradients and one of weights.

    Args:
        detector, seed: as for `Strategy`.
        damping: xi in equation 5, which keeps weights that hardly moved from counting without bound; 0.1 for MNIST in the
            paper, 1e-3 for CIFAR.
        settings: those of `Anchored`.

    Attributes:
        memory: while a task is learned also `path.NAME`, of the parameter's shape, `best.NAME`, what that was at the epoch
            with the lowest held-out loss, and from its first step on `anchor.NAME` in the first task.
    """

    def __init__(self, detector: Detector, *, seed: int = 0, damping: PositiveFloat = 1e-3, **settings: Any):
        super().__init__(detector, seed=seed, **settings)
        self.damping = damping
        self._before: dict[str, tuple[Tensor, Tensor]] = {}  # within a step: gradients, and weights before it

    @torch.no_grad()
    def after_backward(self, gradients: Mapping[str, Tensor]) -> None:
        weights = {name: self.detector.get_parameter(name) for name in gradients}
        for name, parameter in weights.items():
            if self.kept_of("anchor", name) is None:
                self.memory[f"anchor.{name}"] = parameter.clone()
            if self.kept_of("path", name) is None:
                self.memory[f"path.{name}"] = torch.zeros_like(parameter)
        if weights:  # all parameters at once, as in `Anchored`
            copies = (
                torch._foreach_mul(list(given), 1.0) for given in (gradients.values(), weights.values())
            )
            self._before = dict(zip(weights, zip(*copies, strict=True), strict=True))
        super().after_backward(gradients)

    @torch.no_grad()
    def after_step(self) -> None:
        if not self._before:
            return
        gradients, before = map(list, zip(*self._before.values(), strict=True))
        torch._foreach_sub_(before, [self.detector.get_parameter(name) for name in self._before])
        torch._foreach_addcmul_([self.memory[f"path.{name}"] for name in self._before], gradients, before)
        self._before = {}

    def at_best(self) -> None:
        self.memory |= {
            f"best.{name}": path.clone() for name, path in with_prefix(self.memory, "path.").items()
        }

    def end_stage(self, stage: int, images: Images) -> None:
        with torch.no_grad():
            found = {}
            for name in self.trained():
                path = self.memory.pop(f"path.{name}", None)
                path = self.memory.pop(f"best.{name}", path)
                if path is not None:
                    moved = self.detector.get_parameter(name) - self.memory[f"anchor.{name}"]
                    found[name] = path.clamp_min_(0).div_(moved.square_().add_(self.damping))
        self.remember(found)
        super().end_stage(stage, images)
