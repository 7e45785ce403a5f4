"""clbench predict: scores, decisions, masks and heat maps of image files by a trained detector."""

from __future__ import annotations

import argparse
import csv
import io
import json
import math
import os
import sys
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

from clbench.commands import trained
from clbench.errors import UserError, counted
from clbench.paths import absolute, expanded

if TYPE_CHECKING:
    from clbench.loading import Found, TrainedDetector

_THREADS = min(8, os.cpu_count() or 1)
_PICTURES = ("overlays", "masks")  # folders of them in the output
_PIXELS_AHEAD = 1 << 25  # of maps whose pictures are still to be written, at most


def arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments to its parser."""
    trained.add_arguments(parser)
    parser.add_argument(
        "images", nargs="+", metavar="IMAGES", help="files, folders with those in them, or 'patterns*.png'"
    )
    parser.add_argument(
        "--output", type=expanded, default=Path("predictions"), metavar="FOLDER", help="(./predictions)"
    )
    parser.add_argument(
        "--false-positive-rate",
        type=float,
        default=0.01,
        metavar="RATE",
        help="share of normal pixels that masks may mark (0.01)",
    )
    parser.add_argument(
        "--image-false-positive-rate",
        type=float,
        metavar="RATE",
        help="share of normal images that may be called anomalous (the same)",
    )
    parser.add_argument("--only-scores", action="store_true", help="write no overlays and masks")
    parser.add_argument(
        "--overwrite", action="store_true", help="replace what FOLDER holds of an earlier one"
    )
    parser.add_argument(
        "--watch",
        action="store_true",
        help="judge what comes into a folder until it is stopped: a line of JSON for each image, and no pictures",
    )
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:1 (auto)")
    parser.add_argument(
        "--batch-size", type=int, default=16, metavar="N", help="images, or tiles of one, at a time (16)"
    )


def main(options: argparse.Namespace) -> int:
    """Predict images and write tables and pictures of what was found.

    Returns:
        0, or 1 where a file was passed over, since it could not be read or has the wrong size.

    Raises:
        UserError: an option is out of range, the output folder holds predictions, there is no image, the run
            has no detector or no thresholds of use, a file cannot be written, or memory is not enough.
    """
    if options.image_false_positive_rate is None:
        options.image_false_positive_rate = options.false_positive_rate
    if options.batch_size < 1:
        raise UserError(f"--batch-size {options.batch_size} is no number of images: give at least 1")
    if options.watch:
        return _watch(options)
    scores = options.output / "scores.csv"
    if scores.exists() and not options.overwrite:
        raise UserError(
            f"{options.output} holds predictions: give another --output FOLDER, or --overwrite to replace them"
        )

    from clbench.data.files import find_images
    from clbench.data.listing import LeftOut

    left_out = LeftOut()
    files = find_images(options.images, own_folders(options.output, options.images), left_out)
    if not files:
        more = f" (left out: {left_out})" if str(left_out) else ""
        raise UserError(f"{' '.join(options.images)} holds no image{more}: name files, folders or patterns")
    if not any(map(os.path.lexists, files)):
        raise UserError(f"{' '.join(map(str, options.images))}: there is nothing of that name")
    if str(left_out):
        print(f"left out of the folders given: {left_out}", flush=True)
    folder = _common(options.images, files)
    pictures = {} if options.only_scores else _pictures(files, folder)
    detector = _load(options)
    if scores.exists():
        _remove_pictures(options.output)
    from clbench.out_of_memory import memory_named

    with memory_named(f"predicting {counted(len(files), 'image')}", "lower --batch-size", detector.device):
        return _predict(options, detector, files, folder, pictures)


def _watch(options: argparse.Namespace) -> int:
    """Judge what comes into a folder, until it is stopped.

    Raises:
        UserError: not one folder is given; or as `_load` and `clbench.commands.watch.watch`.
    """
    from clbench.commands.watch import watch
    from clbench.out_of_memory import memory_named

    folder = expanded(options.images[0])
    if len(options.images) > 1 or not folder.is_dir():
        raise UserError(f"--watch {' '.join(map(str, options.images))}: give one folder that is there")
    detector = _load(options)
    rates = options.false_positive_rate, options.image_false_positive_rate
    if detector.thresholds is not None and detector.thresholds.doubt:
        print(detector.thresholds.doubt, file=sys.stderr, flush=True)
    with memory_named(
        f"predicting {counted(options.batch_size, 'image')}", "lower --batch-size", detector.device
    ):
        watch(detector, folder, options.output, rates, options.batch_size)
    return 0


def _load(options: argparse.Namespace) -> TrainedDetector:
    """The run's detector, with thresholds that decide something.

    Raises:
        UserError: the run has no detector, or no thresholds of use.
    """
    from clbench.loading import load

    detector = load(**trained.given(options), device=options.device)
    if detector.thresholds is None:
        raise UserError(
            f"{options.run} has no thresholds.json, which is written when a run ends: repeat its command, with "
            "overwrite=true where it was finished by an older clbench"
        )
    pixel, _ = detector.thresholds.at(options.false_positive_rate, options.image_false_positive_rate)
    if detector.thresholds.pixel[0] == detector.thresholds.pixel[-1]:
        raise UserError(
            f"{options.run} knows its training images by heart (all of their pixels are at {pixel:g}), so that they set "
            "no threshold: train with method.held_out=0.1; clbench.load in Python gives scores and maps without"
        )
    return detector


def _predict(
    options: argparse.Namespace,
    detector: TrainedDetector,
    files: Sequence[Path],
    folder: Path,
    pictures: Mapping[Path, str],
) -> int:
    """Predict files, write what was found, and say so; 1 where a file was passed over, else 0.

    Args:
        folder: what names of images are relative to.
        pictures: the name of each file's pictures; empty where none are written.
    """
    from clbench.data.doubts import doubts
    from clbench.terminal import Display

    assert detector.thresholds is not None
    rate, image_rate = options.false_positive_rate, options.image_false_positive_rate
    pixel, image = detector.thresholds.at(rate, image_rate)
    rows: list[dict[str, Any]] = []
    unreadable: list[dict[str, str]] = []

    def pass_over(path: Path, error: UserError) -> None:
        unreadable.append({"image": _name(path, folder), "reason": str(error)})
        print(f"passed over: {error}", file=sys.stderr)

    with Display("predict") as display:
        display.heading(options.run.name)
        found = detector.predict(
            files,
            false_positive_rate=rate,
            image_false_positive_rate=image_rate,
            batch_size=options.batch_size,
            unreadable=pass_over,
        )
        try:
            for row in _written(found, detector, folder, options.output, pictures):
                rows.append(row)
                display.progress("predicting", len(rows) + len(unreadable), len(files))
        finally:  # the tables also of a command that was interrupted
            if rows or unreadable:
                about = {
                    "run": str(options.run.absolute()),
                    "task": options.task,
                    "folder": str(folder),
                    "false_positive_rate": rate,
                    "image_false_positive_rate": image_rate,
                    "pixel_threshold": pixel,
                    "image_threshold": image,
                    "thresholds_held_out": detector.thresholds.held_out,
                }
                _write_tables(options.output, {**about, "images": rows, "unreadable": unreadable})
        anomalous = sum(row["anomalous"] for row in rows)
        what = "scores" if options.only_scores else "scores, overlays and masks"
        display.line(f"anomalous: {anomalous} of {counted(len(rows), 'image')}; {what} in {options.output}")
        for doubt in doubts({"these images": detector.peak}, {}, detector.geometry.bit_depth):
            display.line(f"note: {doubt}, and train so")
        for line in _threshold_lines(detector, rate, image_rate, pixel, image):
            display.line(line)
    if unreadable:
        print(f"error: passed over: {len(unreadable)} of {counted(len(files), 'file')}", file=sys.stderr)
    return 1 if unreadable else 0


def _threshold_lines(
    detector: TrainedDetector, rate: float, image_rate: float, pixel: float, image: float
) -> Iterator[str]:
    """Lines that say which thresholds the decisions are by, and what these were set on.

    Args:
        rate, image_rate: false-positive rates of pixels and of images.
        pixel, image: the thresholds for these rates.
    """
    thresholds = detector.thresholds
    assert thresholds is not None
    yield (
        f"thresholds: {pixel:.6g} for pixels and {image:.6g} for images, for false-positive rates of {100 * rate:g} % "
        f"and {100 * image_rate:g} %; set on {counted(thresholds.images, 'normal training image')} "
        + ("held out of learning" if thresholds.held_out else "that the detector learned from")
    )
    if not thresholds.held_out:
        yield (
            "WARNING: a detector is too sure of images that it learned from, one that memorises them most of all: on "
            "new images these thresholds are too low, and normal ones may be called anomalous. Scores and maps stand; "
            "for thresholds that hold, train with method.held_out=0.1, which keeps a tenth out of learning"
        )
    if thresholds.doubt:
        yield thresholds.doubt
    if image_rate < thresholds.finest:
        yield (
            f"{counted(thresholds.images, 'image')} cannot tell an image rate below {100 * thresholds.finest:.2g} %: the "
            "threshold is their highest score, and so good for that rate"
        )


def own_folders(output: Path, given: Iterable[Path | str]) -> list[Path]:
    """The folders in which no image is looked for: the output, or where it holds what is given its pictures' alone."""
    whole = Path(absolute(output))
    paths = [Path(absolute(path)) for path in given if str(path)]
    holds = any(path == whole or whole in path.parents for path in paths)
    return [output / kind for kind in _PICTURES] if holds else [output]


def _remove_pictures(output: Path) -> None:
    """Remove the pictures of the predictions that are replaced, which scores.json names."""
    try:
        named = [
            str(row["image"])
            for row in json.loads((output / "scores.json").read_text(encoding="utf-8"))["images"]
        ]
    except (OSError, ValueError, KeyError, TypeError):
        return
    for name in named:
        for kind in _PICTURES:
            for picture in (name, f"{name}.png"):
                if ".." not in Path(name).parts and picture.lower().endswith(".png"):
                    (output / kind / picture).unlink(missing_ok=True)


def _common(given: list[str], files: list[Path]) -> Path:
    """The nearest folder that holds all folders given and all files: outputs have their paths below it."""
    paths = [Path(absolute(each)) for each in given]
    roots = [path for path in paths if path.is_dir()]
    others = [file.parent for file in files if not any(root in file.parents for root in roots)]
    return Path(os.path.commonpath([*roots, *others]))


def _name(path: Path, folder: Path) -> str:
    return path.relative_to(folder).as_posix()


def _pictures(files: list[Path], folder: Path) -> dict[Path, str]:
    """The name of the overlay and mask of each file.

    Raises:
        UserError: two files would have the same.
    """
    by_name: dict[str, Path] = {}
    for file in files:
        name = _name(file, folder)
        name = name if file.suffix.lower() == ".png" else f"{name}.png"
        if name in by_name:
            raise UserError(f"{by_name[name]} and {file} would both be written as {name}: rename one of them")
        by_name[name] = file
    return {file: name for name, file in by_name.items()}


def _written(
    found: Iterator[Found],
    detector: TrainedDetector,
    folder: Path,
    output: Path,
    pictures: Mapping[Path, str],
) -> Iterator[dict[str, Any]]:
    """The rows of the tables in order, each once its pictures are written.

    A few threads write them, a few images ahead.
    """

    def write(one: Found) -> dict[str, Any]:
        heat = one.map
        assert one.threshold is not None and detector.thresholds is not None
        mask = heat > one.threshold
        if pictures:
            _write_pictures(one, heat, mask, output, pictures[one.path], detector.thresholds.pixel[-1])
        return {
            "image": _name(one.path, folder),
            "score": one.score,
            "anomalous": bool(one.anomalous),
            "anomalous_pixels": int(mask.sum()),
        }

    pending: deque[Future[dict[str, Any]]] = deque()
    with ThreadPoolExecutor(_THREADS) as pool:
        for one in found:
            pending.append(pool.submit(write, one))
            ahead = min(2 * _THREADS, _PIXELS_AHEAD // math.prod(one.size))
            del one  # its map goes when its pictures are written
            while len(pending) > ahead:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()


def _write_pictures(one: Found, heat: Any, mask: Any, output: Path, name: str, low: float) -> None:
    """Write the overlay and the mask of an image.

    Args:
        heat: the anomaly map, float32 [H, W].
        mask: where it is above the threshold, bool [H, W].
        name: name of both files.
        low: value at which the overlay's colours begin; their middle is the threshold.
    """
    import cv2
    import numpy as np

    from clbench.data.files import read_image
    from clbench.recording.files import write_whole
    from clbench.recording.heat_maps import overlay

    assert one.threshold is not None
    pixels = one.geometry.eight_bits(read_image(one.path))  # read again: images may be large
    picture = cv2.cvtColor(pixels, cv2.COLOR_RGB2BGR)
    high = low + 2 * (one.threshold - low)
    written = overlay(picture, mask, heat, low, high), 255 * mask.astype(np.uint8)
    for kind, pixels in zip(_PICTURES, written, strict=True):
        _, encoded = cv2.imencode(".png", pixels)
        data = encoded.tobytes()
        write_whole(output / kind / name, lambda part, data=data: part.write_bytes(data))  # type: ignore[misc]


def _write_tables(output: Path, results: dict[str, Any]) -> None:
    """Write all results to scores.json, and a row for each image to scores.csv."""
    from clbench.recording.files import write_whole

    text = io.StringIO()
    writer = csv.DictWriter(text, ("image", "score", "anomalous", "anomalous_pixels"), lineterminator="\n")
    writer.writeheader()
    writer.writerows({**row, "anomalous": int(row["anomalous"])} for row in results["images"])
    write_whole(output / "scores.csv", lambda part: _write_text(part, text.getvalue()))
    write_whole(output / "scores.json", lambda part: _write_text(part, json.dumps(results, indent=2) + "\n"))


def _write_text(part: Path, text: str) -> None:
    """Write UTF-8, but names of files as the bytes that they are, which on some systems are no UTF-8."""
    part.write_bytes(text.encode(errors="surrogateescape"))
