"""Distil EfficientAD's teacher from a pretrained backbone, on any folder of images (Batzner et al., 2024, app. A).

    python -m clbench.methods.distillation --backbone wide_resnet101_2 --layers 2 3 \
        --images IMAGENET/train --output teacher.safetensors

The network learns to give, for the patch around every position, what the backbone's levels give for the
image at twice its size: averaged over 3x3 neighbours, brought to as many channels, and normalised.
"""

import argparse
import sys
import tempfile
import time
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

from clbench.backbones import Backbone, FeaturePyramid, Normalisation, unit
from clbench.data.pictures import Pictures
from clbench.errors import UserError
from clbench.methods.base import Progress, silent
from clbench.methods.efficientad import patch_description_network
from clbench.methods.patches import neighbourhood_patches
from clbench.randomness import generator, seed_for
from clbench.terminal import Display

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
    """A patch description network that imitates a pyramid, and the share of variance it explains at the end.

    Args:
        pictures: uint8 [N, 3, H, W], on the device to train on.
        width: channels of the network's first layer.
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
        random = generator(seed, "distillation", step)
        images = unit(pictures[torch.randint(len(pictures), (batch_size,), generator=random)])
        if float(torch.rand((), generator=random)) < _GREY:
            images = images.mean(1, keepdim=True).expand_as(images)
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


def _targets(pyramid: FeaturePyramid, images: Tensor, channels: int) -> Tensor:
    """What the backbone says of images [B, 3, H, W]: [B, C, h, w] at stride 4."""
    larger = F.interpolate(images, scale_factor=2, mode="bilinear")
    patches = neighbourhood_patches(pyramid(larger))
    batch, height, width, _ = patches.shape
    pooled = F.adaptive_avg_pool1d(patches.flatten(1, 2), channels)
    return pooled.view(batch, height, width, channels).permute(0, 3, 1, 2)


def _lines() -> Progress:
    """A line for every twentieth of the work, where nobody watches a bar."""
    said = 0

    def say(phase: str, done: int, total: int, note: str = "") -> None:
        nonlocal said
        if 20 * done // total > said:
            said = 20 * done // total
            print(f"{phase}: {done} of {total} steps, {note}", flush=True)

    return say


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text} is less than 1")
    return number


def main() -> None:
    """The command; see the module's text."""
    about, _, _ = (__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser(prog="python -m clbench.methods.distillation", description=about)
    parser.add_argument("--backbone", required=True, help="a timm model, e.g. wide_resnet101_2")
    parser.add_argument(
        "--checkpoint", help="its weights, where timm cannot download them; or package:small.safetensors"
    )
    parser.add_argument(
        "--channels", type=int, nargs="+", help="of a narrow ResNet's levels: 48 96 192 384 for ours"
    )
    parser.add_argument("--layers", type=int, nargs="+", default=[2, 3], help="levels to imitate (2 3)")
    parser.add_argument("--images", help="folder of any images; left out: procedural textures")
    parser.add_argument("--count", type=_positive, default=20_000, help="images of it, at most (20000)")
    parser.add_argument("--size", type=_positive, default=256, help="pixels (256)")
    parser.add_argument(
        "--width", type=_positive, default=256, help="channels of the first layer (256, the medium size)"
    )
    parser.add_argument("--steps", type=_positive, default=60_000)
    parser.add_argument("--batch-size", type=_positive, default=16)
    parser.add_argument("--learning-rate", type=float, default=1e-4)
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="fp32")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, required=True, help=".safetensors, for method.teacher=")
    given = parser.parse_args()
    if given.output.suffix != ".safetensors":
        parser.error(f"--output={given.output}: its name must end in .safetensors, to be read as a teacher")
    try:
        backbone = Backbone(
            given.backbone,
            checkpoint=given.checkpoint,
            arguments={"channels": given.channels} if given.channels else None,
            batch_size=given.batch_size,
            precision=given.precision,
        )
        pyramid = backbone.pyramid(given.layers).to(given.device)
        with tempfile.TemporaryDirectory(prefix="clbench-") as cache:
            pictures = Pictures(given.images, given.count, "--images", given.seed, cache)
            print(f"reading {len(pictures.samples)} images", flush=True)
            loaded = pictures.load(given.size, given.size).to(given.device)
            with Display("distillation") as display:
                network, explained = distil(
                    pyramid,
                    loaded,
                    width=given.width,
                    steps=given.steps,
                    batch_size=given.batch_size,
                    learning_rate=given.learning_rate,
                    precision=torch.bfloat16 if given.precision == "bf16" else None,
                    seed=given.seed,
                    progress=display.progress if sys.stdout.isatty() else _lines(),
                )
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    given.output.parent.mkdir(parents=True, exist_ok=True)
    save_file(
        {name: tensor.contiguous().cpu() for name, tensor in network.state_dict().items()}, given.output
    )
    print(f"{given.output}: {100 * explained:.0f} % of the features' variance explained")
    if explained <= 0:
        print(
            "which is no better than their mean: give more --steps, or another --learning-rate",
            file=sys.stderr,
        )


if __name__ == "__main__":
    main()
