"""The measured figures that docs/measured.md quotes: make bench, or

    python -m benchmarks [NAME ...] [--checkpoint FILE] [--root FOLDER]

NAME: coreset, nearest, metrics, kernels, phases, steps, footprints, backbones, startup, sweeps, network, export,
reports, growth, streams, states, boundaries, digests, checkpoints, company, launches, precision, positions, cadic,
strategies, buffers, watch, evaluation, tiles; all of them where none is given.
Absolute times are this machine's; the ratios within a table are what carries over. A checkpoint (of timm's
resnet18) and a root (an MVTec AD layout) replace random weights and synthetic images where a table takes features
of images.
"""

import argparse
import importlib

from rich.console import Console

NAMES = (
    "coreset",
    "nearest",
    "metrics",
    "kernels",
    "phases",
    "steps",
    "footprints",
    "backbones",
    "startup",
    "sweeps",
    "network",
    "export",
    "reports",
    "growth",
    "streams",
    "states",
    "boundaries",
    "digests",
    "checkpoints",
    "company",
    "launches",
    "precision",
    "positions",
    "cadic",
    "strategies",
    "buffers",
    "watch",
    "evaluation",
    "tiles",
)


def main() -> None:
    """Print the tables asked for, each when it is measured."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="*", metavar="NAME")
    parser.add_argument("--checkpoint", help="weights of timm's resnet18, .safetensors or .pth")
    parser.add_argument("--root", help="a folder of categories in the MVTec AD layout")
    given = parser.parse_args()
    if unknown := [name for name in given.names if name not in NAMES]:
        parser.error(f"there is no {', '.join(unknown)}; there are {', '.join(NAMES)}")
    console = Console(width=120)
    for name in given.names or NAMES:
        console.print(f"measuring {name}", style="dim")
        table = importlib.import_module(f"benchmarks.{name}").table(given.checkpoint, given.root)
        console.print(table)
        console.print()


if __name__ == "__main__":
    main()
