"""clbench distil: a teacher for EfficientAD, distilled from a pretrained backbone on any folder of images."""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from clbench.commands.numbers import whole
from clbench.errors import UserError, counted
from clbench.paths import absolute, expanded

if TYPE_CHECKING:
    from clbench.methods.base import Progress


def arguments(parser: argparse.ArgumentParser) -> None:
    """Which network to imitate, on which images, and for how long."""
    parser.add_argument("--backbone", required=True, help="a timm model, e.g. wide_resnet101_2")
    parser.add_argument(
        "--checkpoint", help="its weights, where timm cannot download them; or package:small.safetensors"
    )
    parser.add_argument(
        "--channels", type=whole(1), nargs="+", help="of a narrow ResNet's levels: 48 96 192 384 for ours"
    )
    parser.add_argument(
        "--layers", type=whole(0), nargs="+", default=[2, 3], help="levels to imitate, ascending (2 3)"
    )
    parser.add_argument("--images", type=absolute, help="folder of any images; left out: procedural textures")
    parser.add_argument("--count", type=whole(1), default=20_000, help="images of it, at most (20000)")
    parser.add_argument(
        "--size", type=whole(1), default=256, help="pixels a side (256); the backbone sees twice as many"
    )
    parser.add_argument(
        "--img-size", type=whole(1), metavar="PIXELS", help="that a transformer is made for: twice --size"
    )
    parser.add_argument(
        "--width", type=whole(1), default=256, help="channels of the first layer (256, the medium size)"
    )
    parser.add_argument("--steps", type=whole(1), default=60_000, help="(60000)")
    parser.add_argument("--batch-size", type=whole(1), default=16, help="images a step (16)")
    parser.add_argument("--learning-rate", type=float, default=1e-4, help="of Adam (0.0001)")
    parser.add_argument(
        "--precision", choices=["fp32", "tf32", "bf16"], default="fp32", help="of networks (fp32)"
    )
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:1 (auto)")
    parser.add_argument("--seed", type=int, default=0, help="of first weights and the order of images (0)")
    parser.add_argument(
        "--output", type=expanded, required=True, metavar="FILE", help=".safetensors, for method.teacher="
    )


def main(options: argparse.Namespace) -> int:
    """Distil, write the weights and say how much of the features' variance they explain.

    Raises:
        UserError: the backbone, images, device or output cannot be had, or memory is not enough.
    """
    output: Path = options.output
    if output.suffix != ".safetensors":
        raise UserError(f"--output={output}: its name must end in .safetensors, to be read as a teacher")
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--output={output} cannot be written ({error.strerror}): give another") from error

    import torch
    from safetensors.torch import save_file

    from clbench.backbones import Backbone
    from clbench.data.pictures import Pictures
    from clbench.methods.distillation import distil
    from clbench.out_of_memory import memory_named
    from clbench.precision import mixed, use_tf32
    from clbench.terminal import Display

    device = _device(options.device)
    less = "lower --batch-size, then --size, --width and --count, or take a smaller --backbone"
    with (
        memory_named("distilling", less, torch.device(device)),
        tempfile.TemporaryDirectory(prefix="clbench-") as cache,
    ):
        pictures = Pictures(options.images, options.count, "--images", options.seed, cache)
        found = pictures.look_up()  # before weights, which may take minutes to download
        arguments = {"channels": options.channels, "img_size": options.img_size}
        backbone = Backbone(
            options.backbone,
            checkpoint=options.checkpoint,
            arguments={name: value for name, value in arguments.items() if value},
            batch_size=options.batch_size,
        )
        use_tf32(options.precision == "tf32")
        pyramid = backbone.pyramid(options.layers).to(device)
        pyramid.dtype = mixed(options.precision)
        seen = torch.zeros(1, 3, 2 * options.size, 2 * options.size, dtype=torch.uint8, device=device)
        pyramid.check(seen, "give another --size", "--img-size ")
        left_out = f"; left out of {options.images}: {pictures.left_out}" if str(pictures.left_out) else ""
        print(f"reading {counted(len(found), 'image')}{left_out}", flush=True)
        loaded = pictures.load(options.size, options.size).to(device)
        with Display("distillation") as display:
            network, explained = distil(
                pyramid,
                loaded,
                width=options.width,
                steps=options.steps,
                batch_size=options.batch_size,
                learning_rate=options.learning_rate,
                precision=mixed(options.precision),
                seed=options.seed,
                progress=display.progress if sys.stdout.isatty() else _lines(),
            )
    save_file({name: tensor.contiguous().cpu() for name, tensor in network.state_dict().items()}, output)
    print(f"{output}: {100 * explained:.0f} % of the features' variance explained")
    if explained <= 0:
        print(
            "which is no better than their mean: give more --steps, or another --learning-rate",
            file=sys.stderr,
        )
    return 0


def _device(name: str) -> str:
    """The device to distil on; `auto` is the first GPU where there is one, else the CPU.

    Raises:
        UserError: there is no such device here.
    """
    import torch

    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(1, device=name)
    except (RuntimeError, AssertionError) as error:  # torch without CUDA asserts
        raise UserError(f"--device={name} is not to be had here: give cpu, or leave it out") from error
    return name


def _lines() -> Progress:
    """A progress that prints a line for every twentieth of the work, where output is no terminal."""
    printed = 0  # twentieths

    def progress(phase: str, done: int, total: int, note: str = "") -> None:
        nonlocal printed
        if 20 * done // total > printed:
            printed = 20 * done // total
            print(f"{phase}: {done} of {counted(total, 'step')}, {note}", flush=True)

    return progress
