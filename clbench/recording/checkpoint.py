"""Checkpoints: tensors and plain data in one safetensors file per stage. No pickles."""

import json
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from clbench.recording.run_directory import write_whole

_KEPT = 2  # the one before is there when the last is damaged


def save(directory: Path, stage: int, tensors: dict[str, Tensor], data: dict[str, Any]) -> None:
    """Write the checkpoint of a finished stage, then remove all but the newest two."""
    contiguous = {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
    metadata = {"data": json.dumps(data)}

    def write(part: Path) -> None:
        try:
            save_file(contiguous, part, metadata)
        except SafetensorError as error:
            raise OSError(str(error)) from error

    write_whole(_path(directory, stage), write)
    for old in _newest_first(directory)[_KEPT:]:
        old.unlink()


def load(directory: Path, device: str = "cpu") -> tuple[int, dict[str, Tensor], dict[str, Any]] | None:
    """The newest readable checkpoint: the stage it finished, its tensors and its data; None where none is."""
    for path in _newest_first(directory):
        try:
            with safe_open(path, framework="pt", device=device) as file:
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
                return int(path.stem.removeprefix("stage-")), tensors, json.loads(file.metadata()["data"])
        except (SafetensorError, OSError, ValueError, KeyError):
            continue  # damaged; the one before is as good a place to continue from
    return None


def _path(directory: Path, stage: int) -> Path:
    return directory / f"stage-{stage:04d}.safetensors"


def _newest_first(directory: Path) -> list[Path]:
    return sorted(directory.glob("stage-*.safetensors"), reverse=True)
