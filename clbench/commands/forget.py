"""clbench forget: a finished run goes on without one of its tasks."""

from __future__ import annotations

import argparse

from clbench.commands import trained
from clbench.commands.learn import go_on
from clbench.paths import expanded


def arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments to its parser."""
    parser.add_argument(
        "run", metavar="RUN", type=expanded, help="a finished run's directory, outputs/<experiment>/<run>"
    )
    parser.add_argument("task", metavar="TASK", help="the name of the task to forget")
    parser.add_argument(
        "--output", type=expanded, metavar="FOLDER", help="the directory of the run that goes on (RUN-TASK)"
    )
    parser.add_argument("--device", help="auto, cpu, cuda or cuda:1 (the run's)")
    trained.add_replacements(parser)


def main(options: argparse.Namespace) -> int:
    """Forget the task, and say where the run that goes on is.

    Raises:
        UserError: as `clbench.learning.forget`.
    """
    from clbench.learning import forget

    return go_on(lambda **given: forget(options.run, options.task, **given), options)
