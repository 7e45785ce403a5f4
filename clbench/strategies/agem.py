"""A-GEM: averaged gradient episodic memory (Chaudhry et al., 2019)."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from clbench.strategies.replay import Replay


class AGEM(Replay):
    """A step on new images may not raise, to first order, the loss of a batch of stored ones.

    In each step g is the gradient of the loss of the new images, and r that of as many replayed ones, from a forward and a
    backward pass of their own. Where their product is below 0, over all weights that both losses depend on, g is replaced by
    g - (g . r / r . r) r (Chaudhry et al., 2019, equation 11); clipping comes after. Replayed images teach nothing
    otherwise, and the losses that are reported are those of the new ones. What an optimizer remembers of earlier gradients,
    as Adam and momentum do, may still make a step against r.

    The first task has no stored images, and is learned as in fine-tuning. Beside the buffer nothing is kept; within a step
    there is one more gradient, 4 bytes for each trained weight. Batch normalisation sees both batches apart.
    """

    @torch.no_grad()
    def combine(self, gradients: Mapping[str, Tensor], replayed: Mapping[str, Tensor]) -> None:
        both = [(gradient, replayed[name]) for name, gradient in gradients.items() if name in replayed]
        product = _product(both)
        square = _product([(reference, reference) for _, reference in both])
        # A number that is not finite in either stays one in the result: even 0 times it is none.
        share = torch.where(product < 0, product / square.clamp_min(torch.finfo(square.dtype).tiny), 0)
        for gradient, reference in both:
            gradient.addcmul_(reference, share, value=-1)


def _product(pairs: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    """The scalar product of two lists of tensors, given as pairs; a scalar on their device."""
    return torch.stack([(one * other).sum() for one, other in pairs]).sum()
