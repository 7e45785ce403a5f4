"""The arguments of commands that use a trained detector: which run, whose model, and where its files are now."""

import argparse
from collections.abc import Sequence
from typing import Any

from clbench.errors import UserError
from clbench.paths import expanded


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments to a command's parser."""
    parser.add_argument(
        "run", metavar="RUN", type=expanded, help="a run's directory, outputs/<experiment>/<run>"
    )
    parser.add_argument("--task", help="whose model, under strategy=single, which has one for each")
    add_replacements(parser)


def add_replacements(parser: argparse.ArgumentParser) -> None:
    """Add the argument that says where files of a run are now."""
    parser.add_argument(
        "--replace",
        action="append",
        default=[],
        metavar="KEY=PATH",
        help="where a file that the run was trained with is now, such as backbone.checkpoint=FILE; once for each",
    )


def given(options: argparse.Namespace) -> dict[str, Any]:
    """What the arguments say, as `clbench.load` takes it.

    Raises:
        UserError: a replacement is not written as KEY=PATH.
    """
    return {"run_directory": options.run, "task": options.task, "replace": replacements(options.replace)}


def replacements(words: Sequence[str]) -> dict[str, str]:
    """Flat key -> path, of words that are written as KEY=PATH.

    Raises:
        UserError: one is not.
    """
    pairs = [word.partition("=") for word in words]
    for word, (key, _, path) in zip(words, pairs, strict=True):
        if not key or not path:
            raise UserError(f"--replace {word}: give KEY=PATH, e.g. --replace backbone.checkpoint=FILE")
    return {key: path for key, _, path in pairs}
