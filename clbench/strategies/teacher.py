"""An earlier model as a teacher: of the detector that learns, its weights are other, and nothing else is kept."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from clbench.methods.base import Detector, trained_state
from clbench.training import Batch, with_prefix

_PREFIX = "teacher."  # of the names of its tensors


def keep_teacher(memory: dict[str, Tensor], detector: Detector) -> None:
    """Put copies of what the detector has learned into a strategy's memory: 4 bytes for each trained parameter, and running
    statistics of normalisation.
    """
    memory |= {
        f"{_PREFIX}{name}": tensor.detach().clone() for name, tensor in trained_state(detector).items()
    }


def lay_out_teacher(memory: dict[str, Tensor], detector: Detector) -> None:
    """Bring what was kept, and has maybe been read from a checkpoint, to the detector's device and memory layout."""
    for name, now in trained_state(detector).items():
        kept = memory.get(f"{_PREFIX}{name}")
        if kept is not None and (kept.device != now.device or kept.stride() != now.stride()):
            memory[f"{_PREFIX}{name}"] = torch.empty_like(now).copy_(kept)


def has_teacher(memory: Mapping[str, Tensor]) -> bool:
    """Whether a strategy's memory has the weights of an earlier model."""
    return any(name.startswith(_PREFIX) for name in memory)


@torch.no_grad()
def taught_outputs(memory: Mapping[str, Tensor], detector: Detector, images: Tensor) -> list[Tensor]:
    """Images, uint8 [B, 3, H, W] -> the outputs that the detector had with the weights in a strategy's memory.

    It computes them in evaluation mode, with these weights in place of its own: there is no second network, and frozen
    ones are shared. A frozen network is asked again for what its store does not have.
    """
    weights = {f"detector.{name}": tensor for name, tensor in with_prefix(memory, _PREFIX).items()}
    with evaluating(detector):
        return torch.func.functional_call(_Outputs(detector), weights, (images,))


def learner_outputs(detector: Detector, batch: Batch, as_learning: bool) -> list[Tensor]:
    """The outputs of a batch's images [B, ...] by the detector that learns, with gradients.

    Those that the training step computed, where it did. Else they are computed: in training mode where the method's loss
    is of outputs, so that its normalisation sees the images as the loss would. In evaluation mode where its loss is of
    something else, such as simulated anomalies: statistics of images without them are neither taken nor used then.

    Args:
        as_learning: whether the training step computes outputs.
    """
    if batch.outputs:
        return list(batch.outputs)
    if as_learning:
        return detector.outputs(batch.images)
    with evaluating(detector):
        return detector.outputs(batch.images)


@contextmanager
def evaluating(detector: Detector) -> Iterator[None]:
    """Inside, all of its modules are in evaluation mode."""
    learning = [module for module in detector.modules() if module.training]
    detector.eval()
    try:
        yield
    finally:
        for module in learning:
            module.training = True


class _Outputs(nn.Module):
    """A detector's outputs as a module's: what `functional_call` calls."""

    def __init__(self, detector: Detector):
        super().__init__()
        self.detector = detector

    def forward(self, images: Tensor) -> list[Tensor]:
        """Images, uint8 [B, 3, H, W] -> the detector's outputs."""
        return self.detector.outputs(images)
