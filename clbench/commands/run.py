"""clbench run: train.py, from any folder."""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path


def arguments(parser: argparse.ArgumentParser) -> None:
    """None of its own: all are Hydra's."""


def main(words: list[str]) -> int:
    """Start train.py with these words, and give its exit status."""
    script = Path(__file__).parents[2] / "train.py"
    if not script.is_file():
        print(
            f"error: {script} is not there: clbench run needs the project's folder, with conf/; "
            "install it from there with pip install --editable .",
            file=sys.stderr,
        )
        return 1
    try:
        return subprocess.run([sys.executable, str(script), *words], check=False).returncode
    except KeyboardInterrupt:  # train.py has had it too, and has saved
        return 130
