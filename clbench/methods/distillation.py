"""Distillation of EfficientAD's teacher from a pretrained backbone (Batzner et al., 2024, appendix A).

The teacher, a small network, learns to give for the patch around every position what the backbone's levels give
for the image at twice its size: averaged over 3 x 3 neighbours, brought to as many channels, and normalised.
`clbench distil` is the command.
"""

import time

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from clbench.backbones import FeaturePyramid, Normalisation, unit
from clbench.methods.base import Progress, silent
from clbench.methods.efficientad import patch_description_network
from clbench.methods.patches import neighbourhood_patches
from clbench.randomness import generator, seed_for

_GREY = 0.1  # share of images shown in grey
_STATISTICS = 200  # images that the targets' mean and deviation are taken from
_LOOK_S = 0.5  # seconds between two looks at the loss, each of which waits for the device


def distil(
    pyramid: FeaturePyramid,
    pictures: Tensor,
    *,
    width: int,
    steps: int,
    batch_size: int,
    learning_rate: float = 1e-4,
    precision: torch.dtype | None = None,
    seed: int = 0,
    progress: Progress = silent,
) -> tuple[nn.Module, float]:
    """Train a patch description network to imitate a pyramid's levels, by their mean squared difference.

    Args:
        pyramid: the frozen backbone's levels, on the device to train on.
        pictures: uint8 [N, 3, H, W], on the same device.
        width: channels of the network's first layer; it gives 3 * width / 2.
        steps: batches to learn from; the learning rate falls to a tenth for the last 5 %.
        batch_size: images a step, drawn with replacement.
        learning_rate: of Adam.
        precision: of the network's mixed precision; None for single precision.
        seed: of first weights and of which images a step sees.
        progress: told now and then of the steps done, and of the loss.

    Returns:
        The network, which takes images [B, 3, H, W] from `Normalisation` and gives [B, C, h, w] at stride 4; and
        the share of the levels' variance that it explains at the end: 1 is all, 0 no more than their mean does.
    """
    channels = 3 * width // 2
    device = pictures.device
    torch.manual_seed(seed_for(seed, "distillation weights"))
    network = patch_description_network(width, channels, padding=True).to(device)
    network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # absent from torch's stubs
    normalisation = Normalisation().to(device)
    optimizer = torch.optim.Adam(network.parameters(), learning_rate, weight_decay=1e-5, fused=True)
    sample = torch.randint(
        len(pictures), (_STATISTICS,), generator=generator(seed, "distillation statistics")
    )
    some = torch.cat([_targets(pyramid, unit(part), channels) for part in pictures[sample].split(batch_size)])
    mean, deviation = some.mean((0, 2, 3), keepdim=True), some.std((0, 2, 3), keepdim=True)
    del some
    error, looked = torch.ones((), device=device), time.perf_counter()
    for step in range(steps):
        images = _drawn(pictures, batch_size, generator(seed, "distillation", step))
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * (1.0 if step < 0.95 * steps else 0.1)
        targets = (_targets(pyramid, images, channels) - mean) / deviation
        with torch.autocast(device.type, precision, enabled=precision is not None):
            imitated = network(normalisation(images)).float()
        loss = F.mse_loss(F.interpolate(imitated, targets.shape[-2:], mode="bilinear"), targets)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        error = error.lerp(loss.detach(), max(0.02, 1 / (step + 1)))
        if step == steps - 1 or time.perf_counter() - looked > _LOOK_S:
            progress("distilling", step + 1, steps, f"loss {float(error):.3f}")
            looked = time.perf_counter()
    return network, 1 - float(error)


def _drawn(pictures: Tensor, count: int, random: torch.Generator) -> Tensor:
    """A batch of pictures uint8 [N, 3, H, W], some in grey: float32 [count, 3, H, W] in [0, 1]."""
    images = unit(pictures[torch.randint(len(pictures), (count,), generator=random)])
    if float(torch.rand((), generator=random)) < _GREY:
        images = images.mean(1, keepdim=True).expand_as(images)
    return images


def _targets(pyramid: FeaturePyramid, images: Tensor, channels: int) -> Tensor:
    """What the network is to give for images float32 [B, 3, H, W]: float32 [B, channels, h, w], stride 4."""
    larger = F.interpolate(images, scale_factor=2, mode="bilinear")
    patches = neighbourhood_patches(pyramid(larger))
    batch, height, width, _ = patches.shape
    pooled = F.adaptive_avg_pool1d(patches.flatten(1, 2), channels)
    return pooled.view(batch, height, width, channels).permute(0, 3, 1, 2)
