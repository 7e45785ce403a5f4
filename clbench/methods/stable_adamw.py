"""StableAdamW: AdamW whose steps are shortened where gradients are large beside what is remembered of them.

Wortsman et al., 2023 ("Stable and low-precision training for large-scale vision-language models"), section 3.5, in the form
that Dinomaly takes: with AMSGrad's largest squares, and a root mean square over each whole tensor.
"""

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor


class StableAdamW(torch.optim.Optimizer):
    """One step for a tensor with gradient g, the t-th; all by element, but for r.

        weights <- weights * (1 - rate * weight_decay)
        mean    <- b1 * mean + (1 - b1) * g
        square  <- b2 * square + (1 - b2) * g^2
        largest <- max(largest, square)
        divisor  = sqrt(largest) / sqrt(1 - b2^t) + epsilon
        r        = max(1, root mean square of g / divisor)
        weights <- weights - rate / ((1 - b1^t) * r) * mean / divisor

    It never waits for the device: `GradScaler` leaves it to the step to change nothing where half precision overflowed.

    Args:
        parameters: what is trained.
        learning_rate: the rate.
        betas: b1 and b2, the shares of mean and square that stay, above 0.
        epsilon: added to divisors.
        weight_decay: of every tensor, biases and factors of normalisations too.
    """

    _step_supports_amp_scaling = True  # the name that GradScaler asks for

    def __init__(
        self,
        parameters: Iterable[Tensor],
        learning_rate: float,
        *,
        betas: tuple[float, float] = (0.9, 0.999),
        epsilon: float = 1e-8,
        weight_decay: float = 0.0,
    ):
        super().__init__(
            parameters,
            {"lr": learning_rate, "betas": betas, "epsilon": epsilon, "weight_decay": weight_decay},
        )

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        """Change the weights; those without a gradient stay as they are.

        Args:
            closure: not taken, as training computes the loss itself.
        """
        assert closure is None
        # Both are set by GradScaler: what gradients are to be divided by yet, and whether one is not finite.
        scale: Tensor | None = getattr(self, "grad_scale", None)
        overflowed: Tensor | None = getattr(self, "found_inf", None)
        for group in self.param_groups:
            weights = [parameter for parameter in group["params"] if parameter.grad is not None]
            gradients = [parameter.grad for parameter in weights]
            if not weights:
                continue
            if scale is not None:
                gradients = list(torch._foreach_div(gradients, scale))
            if overflowed is not None:
                gradients = [gradient.masked_fill(overflowed > 0, 0) for gradient in gradients]
            self._step(group, weights, gradients, 1.0 if overflowed is None else 1 - overflowed.squeeze())

    def _step(
        self, group: dict[str, Any], weights: list[Tensor], gradients: list[Tensor], taken: float | Tensor
    ) -> None:
        """The step for one group.

        Args:
            taken: 1, or 0 where it is to change nothing; gradients are 0 then.
        """
        for parameter in weights:
            if not self.state[parameter]:
                self.state[parameter] = {
                    "step": torch.zeros((), device=parameter.device),
                    **{name: torch.zeros_like(parameter) for name in ("mean", "square", "largest")},
                }
        steps, means, squares, largest = (
            [self.state[parameter][name] for parameter in weights]
            for name in ("step", "mean", "square", "largest")
        )
        rate, (b1, b2) = group["lr"], group["betas"]
        torch._foreach_mul_(weights, 1 - rate * group["weight_decay"] * taken)
        torch._foreach_add_(steps, [taken] * len(steps))  # type: ignore[list-item]  # a single tensor would be read
        torch._foreach_mul_(means, 1 - (1 - b1) * taken)
        torch._foreach_add_(means, gradients, alpha=1 - b1)
        torch._foreach_mul_(squares, 1 - (1 - b2) * taken)
        torch._foreach_addcmul_(squares, gradients, gradients, value=1 - b2)
        torch._foreach_maximum_(largest, squares)
        done = torch.stack(steps).clamp(min=1)  # none is, where the very first overflowed
        # 1 - b^t, without rounding b^t to single precision first
        first, second = (-torch.expm1(done * math.log(beta)) for beta in (b1, b2))
        divisors = torch._foreach_sqrt(largest)
        torch._foreach_div_(divisors, second.sqrt().unbind())
        torch._foreach_add_(divisors, group["epsilon"])
        sizes = torch._foreach_norm(torch._foreach_div(gradients, divisors))
        torch._foreach_div_(sizes, [math.sqrt(parameter.numel()) for parameter in weights])
        factors = rate * taken / (first * torch.stack(sizes).clamp(min=1))
        changes = torch._foreach_div(means, divisors)
        torch._foreach_mul_(changes, factors.unbind())
        torch._foreach_sub_(weights, changes)
