"""clbench export: a trained detector as a file for other runtimes, checked against itself."""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from clbench.commands import trained
from clbench.errors import UserError
from clbench.paths import expanded

if TYPE_CHECKING:
    from clbench.loading import TrainedDetector


def arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments to its parser."""
    trained.add_arguments(parser)
    parser.add_argument("--output", type=expanded, metavar="FOLDER", help="(RUN/export)")
    parser.add_argument(
        "--formats",
        nargs="+",
        choices=["onnx", "torch"],
        default=["onnx", "torch"],
        help="model.onnx, for ONNX Runtime and others; model.pt2, of torch.export (both)",
    )
    parser.add_argument(
        "--input",
        choices=["uint8", "float32"],
        default="uint8",
        help="what images are given as: 0 to 255, or 0 to 1 (uint8)",
    )


def main(options: argparse.Namespace) -> int:
    """Write a run's detector as a graph in each format asked for. Returns 0.

    Raises:
        UserError: the run has no detector or no known image size, ONNX's packages are missing, memory is not enough, or
            a file cannot be written or differs from the detector; then nothing is kept.
    """
    import torch

    from clbench import exporting
    from clbench.backbones import unit
    from clbench.loading import load
    from clbench.out_of_memory import memory_named
    from clbench.recording.files import cannot_write, write_whole
    from clbench.terminal import Display

    if "onnx" in options.formats:
        exporting.require_onnx()
    output = options.output or options.run / "export"
    detector = load(**trained.given(options), device="cpu", gpu={"precision": "fp32"})
    if detector.image_size is None:
        raise UserError(
            f"{options.run} kept its files' size and has no thresholds.json that says which: a graph is of one "
            "size, so repeat the run's command, or train with dataset.resize=..."
        )
    height, width = detector.image_size
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise cannot_write(output, error) from error
    images = exporting.pictures(height, width)
    images = images if options.input == "uint8" else unit(images)
    less = "give one of the --formats at a time, or export where more memory is free"
    with memory_named(f"exporting {options.run}", less, detector.device), Display("export") as display:
        display.heading(options.run.name)
        steps = 1 + len(options.formats)
        display.progress("tracing", 0, steps)
        with torch.no_grad(), detector.detector.uncached():
            ours = detector.detector(images)
        program, any_number = exporting.trace(detector.detector, images)
        found = {}
        with tempfile.TemporaryDirectory(prefix=".clbench-", dir=output) as folder:
            for step, name in enumerate(options.formats):
                display.progress(f"writing {name}", 1 + step, steps)
                if name == "onnx":
                    runtime = exporting.write_onnx(program, Path(folder) / "model.onnx")
                else:
                    runtime = exporting.write_torch(program, Path(folder) / "model.pt2")
                found[name] = exporting.difference(ours, runtime, images, any_number)
                _check_difference(name, found[name], exporting.TOLERANCE)
            about = _about(options, detector, [None if any_number else 1, 3, height, width])
            text = json.dumps({**about, "difference": found}, indent=2) + "\n"
            write_whole(Path(folder) / "model.json", lambda part: part.write_text(text, encoding="utf-8"))
            for file in sorted(Path(folder).iterdir()):
                file.replace(output / file.name)
        batch = "any number of" if any_number else "one"
        what = "images" if detector.tiling is None else "tiles"
        display.line(f"{output}: takes {batch} {options.input} RGB {what} of {width}x{height} at a time")
        for name, relative in found.items():
            runtime_name = {"onnx": "model.onnx in ONNX Runtime", "torch": "model.pt2"}[name]
            display.line(f"{runtime_name} agrees with the detector to {relative:.1e} of the maps' range")
        display.line("model.json says how images are prepared, and which thresholds go with which rate")
    return 0


def _check_difference(name: str, difference: float, tolerance: float) -> None:
    """Check that what was written in a format agrees with the detector.

    Raises:
        UserError: it differs by more than the tolerance.
    """
    if not difference <= tolerance:
        raise UserError(
            f"what was written for {name} differs from the detector by {difference:.1e} of the maps' range, more than "
            f"{tolerance:g}, and is not kept: please report it"
        )


def _about(options: argparse.Namespace, detector: TrainedDetector, shape: list[int | None]) -> dict[str, Any]:
    """What model.json says of the graph: how images are prepared, and which thresholds go with which rate.

    Where images are cut, the graph takes tiles, and thresholds are of whole images: of their maps, put together, and of the
    highest score of their tiles.

    Args:
        shape: shape of the images that the graph takes; None where any number fits.
    """
    geometry = detector.geometry
    return {
        "run": str(options.run.absolute()),
        "task": options.task,
        "input": {
            "images": shape,
            "type": options.input,
            "resize": geometry.resize,
            "crop": geometry.crop,
            "tile": detector.tiling and detector.tiling.side,
            "overlap": detector.tiling and detector.tiling.overlap,
        },
        "thresholds": detector.thresholds and detector.thresholds.by_rate(),
    }
