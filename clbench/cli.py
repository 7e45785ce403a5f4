"""The command line: `clbench COMMAND`. Imports only what the chosen command needs."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.metadata import version

from clbench import streams
from clbench.errors import UserError

COMMANDS = {
    "run": (
        "one run or a sweep: what train.py does",
        "clbench run -m method=patchcore,padim replay.size=100,300",
    ),
    "report": (
        "a page, tables and figures that compare the runs of experiments",
        "clbench report outputs/demo",
    ),
    "learn": (
        "a finished run learns another product, and a run of its own holds the result",
        "clbench learn outputs/default/RUN parts/lid",
    ),
    "forget": (
        "a finished run forgets a task that has a model of its own, and a run of its own holds the result",
        "clbench forget outputs/default/RUN lid",
    ),
    "predict": (
        "a trained detector on files: scores, decisions, masks and heat maps",
        "clbench predict outputs/default/RUN parts/bracket/test --false-positive-rate 0.001",
    ),
    "export": (
        "a trained detector as an ONNX and a torch.export file, checked against itself",
        "clbench export outputs/default/RUN --output bracket",
    ),
    "data": (
        "which datasets there are, how to get them, whether a folder of one is sound, and the synthetic one",
        "clbench data get visa --root data\n  clbench data check data/visa",
    ),
    "distil": (
        "a teacher for EfficientAD, distilled from a pretrained backbone on any images",
        "clbench distil --backbone wide_resnet101_2 --images IMAGENET/train --output teacher.safetensors",
    ),
    "doctor": (
        "what this machine has for a run, and what stands in its way",
        "clbench doctor",
    ),
    "wandb": (
        "send runs to Weights & Biases, or make a dashboard there",
        "clbench wandb sync outputs/demo\n  clbench wandb dashboard demo --entity TEAM",
    ),
}


def main(words: Sequence[str] | None = None) -> int:
    """Do what the words say, those of the command line where none are given, and give the exit status."""
    if words is None:  # a process of its own
        streams.begin()
    streams.secure()
    given = list(sys.argv[1:] if words is None else words)
    parser = argparse.ArgumentParser(
        prog="clbench",
        description="Visual anomaly detection, down to the pixel, for products that arrive one after another.",
        epilog="clbench COMMAND --help says more.",
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {version('clbench')}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, (purpose, example) in COMMANDS.items():
        command = commands.add_parser(
            name,
            help=purpose,
            description=purpose[0].upper() + purpose[1:] + ".",
            epilog=f"for example:\n  {example}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
            add_help=name != "run",
        )
        if given[:1] == [name] and name != "run":
            import_module(f"clbench.commands.{name}").arguments(command)
    if not given:
        parser.print_help()
        return 2
    try:
        if given[:1] == ["run"]:  # its words are Hydra's, flags and all
            return import_module("clbench.commands.run").main(given[1:])
        if given[0] in (
            "-sc",
            "--shell-completion",
        ):  # what a shell asks to complete the words of `clbench run`
            return import_module("clbench.commands.run").complete(given)
        options = parser.parse_args(given)
        status = import_module(f"clbench.commands.{options.command}").main(options)
        if error := streams.lost():
            raise UserError(
                f"standard output cannot be written ({error.strerror}), and what was printed is lost"
            )
        return status
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
