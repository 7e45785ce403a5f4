"""clbench run: train.py, from any folder."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path


def arguments(parser: argparse.ArgumentParser) -> None:
    """None of its own: all are Hydra's."""


def main(words: list[str]) -> int:
    """Become train.py with these words; an exit status only where it is not there."""
    script = Path(__file__).parents[2] / "train.py"
    if not script.is_file():
        print(
            f"error: {script} is not there: clbench run needs the project's folder, with conf/; "
            "install it from there with pip install --editable .",
            file=sys.stderr,
        )
        return 1
    sys.stdout.flush()
    os.execv(sys.executable, [sys.executable, str(script), *words])  # so that signals are its own
