"""What every detector is: images in, anomaly maps and image scores out."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn

from clbench.backbones import FeaturePyramid

Progress = Callable[[str, int, int], None]


def silent(phase: str, done: int, total: int) -> None:
    """Progress that nobody watches."""


class Prediction(NamedTuple):
    """Anomaly maps float32 [B, H, W] and image scores float32 [B]; higher is more anomalous."""

    maps: Tensor
    scores: Tensor


class Detector(nn.Module):
    """A method's model. It learns a task by `start_task`, `training_step`s and `finish_task`.

    What it keeps between tasks (banks, statistics) are buffers registered on the detector itself; networks
    are its submodules. So `state_dict` is the whole detector, and the footprint counts itself.

    Attributes:
        epochs: passes over a task's images; 1 for methods that only collect.
        batch_size: images of a training step.
        progress: called with (phase, done, total) during long phases.
    """

    epochs = 1
    batch_size = 16

    def __init__(self) -> None:
        super().__init__()
        self.progress: Progress = silent

    def forget(self) -> None:
        """Drop banks and statistics of earlier tasks, so that the next task replaces them."""
        raise NotImplementedError

    def start_task(self, task: int, images: Tensor) -> None:
        """Prepare for a task from its images, uint8 [N, 3, H, W]."""

    def training_step(self, images: Tensor) -> Tensor | None:
        """Images uint8 [B, 3, H, W] -> the loss, or None from methods that only collect."""
        raise NotImplementedError

    def finish_task(self) -> None:
        """Consolidate what the task's steps collected."""

    def forward(self, images: Tensor) -> Prediction:
        """Images, uint8 or float in [0, 1], [B, 3, H, W] -> maps [B, H, W] and scores [B], no task given."""
        raise NotImplementedError

    @contextmanager
    def uncached(self) -> Iterator[None]:
        """Inside, frozen networks see every image anew: for measuring time."""
        stores = [module.store for module in self.modules() if isinstance(module, FeaturePyramid)]
        for store in stores:
            store.paused = True
        try:
            yield
        finally:
            for store in stores:
                store.paused = False

    def release(self, keep: Tensor | None) -> None:
        """Let go of the features of training images, but for those that will be learned again."""
        for module in self.modules():
            if isinstance(module, FeaturePyramid):
                module.store.release(keep)

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Take over what `kept_state` of another detector gave; buffers may have other sizes here."""
        for name, tensor in state.items():
            owner_name, _, leaf = name.rpartition(".")
            owner = self.get_submodule(owner_name)
            if leaf in owner._buffers:
                device = next((b.device for b in self.buffers() if b is not None), tensor.device)
                owner._buffers[leaf] = tensor.to(device)
            else:
                with torch.no_grad():
                    owner.get_parameter(leaf).copy_(tensor)
