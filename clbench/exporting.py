"""A trained detector as a graph for other runtimes, ONNX and torch.export, each checked against the detector.

A graph takes the same path for all images. Where a detector works in blocks, keeps features or solves
triangular systems, its file has a second form of that code for graphs, chosen by
`torch.compiler.is_compiling()`.
"""

import importlib.util
import io
import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from clbench.data.textures import texture
from clbench.errors import UserError
from clbench.methods.base import Detector, Prediction
from clbench.out_of_memory import is_out_of_memory
from clbench.recording.files import cannot_write, write_whole

TOLERANCE = 1e-4  # largest difference of an export, relative to the range of the maps
_PICTURES = 5

Runtime = Callable[[Tensor], tuple[Tensor, Tensor]]


class Graph(nn.Module):
    """The module that is traced: a detector with plain tensors in and out."""

    def __init__(self, detector: Detector):
        super().__init__()
        self.detector = detector

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Images, uint8 or float in [0, 1], [B, 3, H, W] -> maps [B, H, W] and scores [B]."""
        maps, scores = self.detector(images)
        return maps, scores


def pictures(height: int, width: int) -> Tensor:
    """Procedural textures of this size to compare on, uint8 [5, 3, height, width]."""
    side = max(height, width)
    drawn = torch.stack([texture(number, 0, side) for number in range(_PICTURES)])
    return drawn[..., :height, :width].mul(255).byte()


@torch.no_grad()
def trace(detector: Detector, images: Tensor) -> tuple[ExportedProgram, bool]:
    """Trace a detector. It is of no other use afterwards.

    Args:
        images: at least 2, [B, 3, H, W], of the type and size that the graph is to take.

    Returns:
        The graph, and whether it takes any number of images at a time; if not, it takes one.

    Raises:
        UserError: the detector cannot be traced.
    """
    detector.compute_in(None)
    detector.eval().requires_grad_(False).for_export()
    graph = Graph(detector)
    with _quiet():
        try:
            return torch.export.export(graph, (images[:2],), dynamic_shapes=({0: Dim("batch")},)), True
        except (RuntimeError, ValueError, TypeError, AssertionError) as error:
            if is_out_of_memory(error):
                raise
            # The code of some networks fixes the number of images.
        try:
            return torch.export.export(graph, (images[:1],)), False
        except Exception as error:  # torch.export's own errors, and any that a traced network's code raises
            if is_out_of_memory(error):
                raise
            raise _impossible("torch.export", error) from error


def write_torch(program: ExportedProgram, path: Path) -> Runtime:
    """Write the graph `program` as a .pt2 file at `path`, and give a function that runs that file.

    Raises:
        UserError: the disk is full or may not be written.
    """
    content = io.BytesIO()  # torch's own writer does not say why a disk refused
    with _quiet():
        torch.export.save(program, content)
        write_whole(path, lambda part: part.write_bytes(content.getbuffer()))
        return torch.export.load(path).module()


def require_onnx() -> None:
    """Check that the packages that ONNX needs are installed.

    Raises:
        UserError: one is not.
    """
    for name in ("onnx", "onnxscript", "onnxruntime"):
        if importlib.util.find_spec(name) is None:
            raise UserError(f"ONNX needs {name}, which is not installed: pip install -e '.[export]'")


def write_onnx(program: ExportedProgram, path: Path, threads: int | None = None) -> Runtime:
    """Write the graph as an ONNX file, and give a function that runs that file in ONNX Runtime.

    Args:
        program: the graph, as `trace` gives it.
        path: the file; weights beyond 2 GB go into another one beside it.
        threads: number of ONNX Runtime's threads; None for as many as torch has.

    Raises:
        UserError: a package is missing, ONNX lacks an operation of the graph, or the disk is full or may not
            be written.
    """
    require_onnx()
    import onnxruntime

    try:
        with _quiet():
            written = torch.onnx.export(
                program,
                (),
                dynamo=True,
                verbose=False,
                input_names=["images"],
                output_names=["maps", "scores"],
            )
            assert written is not None
            written.save(str(path))
    except OSError as error:
        raise cannot_write(path, error) from error
    except Exception as error:
        if is_out_of_memory(error):
            raise
        raise _impossible("ONNX", error) from error
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads or torch.get_num_threads()
    options.log_severity_level = 3  # errors
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])

    def run(images: Tensor) -> tuple[Tensor, Tensor]:
        maps, scores = session.run(["maps", "scores"], {"images": images.numpy()})
        return torch.from_numpy(np.asarray(maps)), torch.from_numpy(np.asarray(scores))

    return run


@torch.no_grad()
def difference(ours: Prediction, theirs: Runtime, images: Tensor, any_number: bool) -> float:
    """The largest difference between a detector's maps and scores and those of a runtime, relative.

    It is relative to the range of the detector's maps, or to 1 % of their largest absolute value where that
    is more.

    Args:
        ours: the detector's prediction of the images.
        theirs: what runs the written file.
        images: [B, 3, H, W].
        any_number: whether the file takes any number of images at a time; if not, it takes one.
    """
    parts = [images[:1], images] if any_number else list(images.split(1))
    found = [theirs(part) for part in parts]
    if any_number:
        pairs = [(maps, scores, len(maps)) for maps, scores in found]
    else:
        pairs = [(torch.cat([m for m, _ in found]), torch.cat([s for _, s in found]), len(images))]
    largest = max(
        max(float((maps - ours.maps[:count]).abs().max()), float((scores - ours.scores[:count]).abs().max()))
        for maps, scores, count in pairs
    )
    # Where maps are nearly even, single precision resolves no small part of their range.
    low, high = float(ours.maps.min()), float(ours.maps.max())
    return largest / max(high - low, 0.01 * max(abs(low), abs(high)), 1e-12)


def _impossible(what: str, error: Exception) -> UserError:
    lines = [line.strip() for line in str(error.__cause__ or error).splitlines() if line.strip()]
    reason = lines[0] if lines else type(error).__name__
    return UserError(f"this detector cannot be written for {what}: {type(error).__name__}: {reason}")


@contextmanager
def _quiet() -> Iterator[None]:
    """Inside, warnings and log messages of the exporters are not shown."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "torch.export", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
