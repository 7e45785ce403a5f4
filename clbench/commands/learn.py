"""clbench learn: a finished run goes on with another product."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

from clbench.commands import trained
from clbench.paths import expanded


def arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments to its parser."""
    parser.add_argument(
        "run", metavar="RUN", type=expanded, help="a finished run's directory, outputs/<experiment>/<run>"
    )
    parser.add_argument(
        "folder",
        metavar="FOLDER",
        type=expanded,
        help="the product's images: train/good, and test/<kind> and ground_truth/<kind> to evaluate it; or normal ones alone",
    )
    parser.add_argument("--name", help="the product's (the folder's)")
    parser.add_argument(
        "--output", type=expanded, metavar="FOLDER", help="the directory of the run that goes on (RUN+NAME)"
    )
    parser.add_argument(
        "--without-images",
        action="store_true",
        help="do not look for the images of products that the run knows: they are not evaluated again",
    )
    parser.add_argument("--device", help="auto, cpu, cuda or cuda:1 (the run's)")
    trained.add_replacements(parser)


def main(options: argparse.Namespace) -> int:
    """Learn the product, and say where the run that goes on is.

    Raises:
        UserError: as `clbench.learning.learn`.
    """
    from clbench.learning import learn

    own = {"name": options.name, "without_images": options.without_images}
    return go_on(lambda **given: learn(options.run, options.folder, **own, **given), options)


def go_on(call: Callable[..., Path], options: argparse.Namespace) -> int:
    """Have a run go on, and say where the run that does is; 0, or 1 where a signal stopped it.

    Args:
        call: does it; is given output, gpu and replace.
        options: the command's.

    Raises:
        UserError: what `call` raises.
    """
    from clbench.interruption import Stopped

    gpu = {"device": options.device} if options.device else {}
    try:
        found = call(output=options.output, gpu=gpu, replace=trained.replacements(options.replace))
    except Stopped as stopped:
        print(f"{stopped}: the same command continues here", flush=True)
        stopped.hand_on()
        return 1
    print(f"the run that goes on: {found}")
    return 0
