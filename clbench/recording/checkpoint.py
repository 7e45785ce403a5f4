"""Checkpoints: tensors in safetensors, plain data in JSON beside them. No pickles.

There are two kinds in a run's `checkpoint/`: `stage-<stage>`, the state after a stage was learned, and
`learning-<stage>-<number>`, the state of a stage that is being learned. The newest two of each kind stay.
"""

import json
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from clbench import digests
from clbench.recording.files import write_whole

_KEPT = 2  # checkpoints of a kind: if the newest is damaged, the one before is used
_SHARE = 0.05  # share of a run's time, at most, that checkpoints at the ends of epochs take

Saved = tuple[dict[str, Tensor], dict[str, Any]]  # name -> tensor, and plain data


class Checkpoints:
    """The checkpoints of a run.

    One counts only if its JSON, which is written last, is whole and agrees with its tensors.

    Args:
        directory: the folder `checkpoint/`.
        device: where tensors are loaded to, as torch names it.
        every_s: seconds between two checkpoints of a stage that is being learned.
        urgent: tells whether a checkpoint is wanted at once.
        saved: called after each checkpoint of a stage that is being learned; may raise, to end the run there.
        beside: gives plain data that goes into every checkpoint.
    """

    def __init__(
        self,
        directory: Path,
        device: str = "cpu",
        *,
        every_s: float = 300.0,
        urgent: Callable[[], bool] = lambda: False,
        saved: Callable[[], None] = lambda: None,
        beside: Callable[[], dict[str, Any]] = dict,
    ):
        self.directory = directory
        self.device = device
        self.every_s = every_s
        self.urgent, self.saved = urgent, saved
        self.beside = beside
        self._saved_at = time.perf_counter()
        self._saving_took = 0.0

    def save_stage(self, stage: int, tensors: dict[str, Tensor], data: dict[str, Any]) -> None:
        """Save the state after a stage, and remove the checkpoints that led to it.

        Args:
            stage: 0-based.
            tensors: name -> tensor.
            data: what JSON can hold.

        Raises:
            UserError: the disk is full or may not be written.
        """
        self._save(f"stage-{stage:04d}", tensors, data)
        for path in self._newest_first("stage")[_KEPT:] + self._newest_first("learning"):
            self._remove(path.stem)
        self._saved_at = time.perf_counter()

    def load_stage(self) -> tuple[int, dict[str, Tensor], dict[str, Any]] | None:
        """The newest undamaged checkpoint of a learned stage: stage, tensors and data; None without one."""
        for path in self._newest_first("stage"):
            if (saved := self._load(path.stem)) is not None:
                return int(path.stem.rpartition("-")[2]), *saved
        return None

    # The methods of clbench.training.Bookmark, and `peek`:

    def due(self, epoch_ended: bool) -> bool:
        """Whether to save now: if urgent, `every_s` after the last time, or at an epoch's end if cheap."""
        waited = time.perf_counter() - self._saved_at
        cheap = epoch_ended and waited >= self._saving_took / _SHARE
        return self.urgent() or waited >= self.every_s or cheap

    def place(self, stage: int, tensors: dict[str, Tensor], data: dict[str, Any]) -> None:
        """Save the state of a stage that is being learned.

        Raises:
            UserError: the disk is full or may not be written.
            Stopped: what `saved` raises, where the run is to end here.
        """
        begin = time.perf_counter()
        before = self._newest_first(f"learning-{stage:04d}")
        number = int(before[0].stem.rpartition("-")[2]) + 1 if before else 0
        name = f"learning-{stage:04d}-{number:06d}"
        self._save(name, tensors, data)
        kept = {name, *(path.stem for path in before[: _KEPT - 1])}
        for path in self._newest_first("learning"):
            if path.stem not in kept:
                self._remove(path.stem)
        self._saved_at = time.perf_counter()
        self._saving_took = self._saved_at - begin
        self.saved()

    def find(self, stage: int) -> Saved | None:
        """Tensors and data of the newest undamaged checkpoint of a stage being learned; None without one."""
        for path in self._newest_first(f"learning-{stage:04d}"):
            if (saved := self._load(path.stem)) is not None:
                return saved
        return None

    def peek(self, stage: int) -> dict[str, Any] | None:
        """The data that `find` would give; the tensors' file is checked, but no tensor is loaded."""
        for path in self._newest_first(f"learning-{stage:04d}"):
            if (data := self._checked_data(path.stem)) is not None:
                return data
        return None

    def _save(self, name: str, tensors: dict[str, Tensor], data: dict[str, Any]) -> None:
        """Write a checkpoint's two files.

        Raises:
            UserError: the disk is full or may not be written.
        """
        written: dict[str, Tensor] = {}
        storages: set[int] = set()
        for key, tensor in tensors.items():
            contiguous = tensor.detach().contiguous()
            shared = contiguous.untyped_storage().data_ptr() in storages  # which safetensors refuses
            written[key] = contiguous.clone() if shared else contiguous
            storages.add(written[key].untyped_storage().data_ptr())
        digest = ""

        def write(path: Path) -> None:
            nonlocal digest
            try:
                save_file(written, path)
            except SafetensorError as error:
                raise OSError(str(error)) from error
            digest = digests.of_file(path)

        write_whole(self._path(name, "safetensors"), write)
        # safetensors keeps neither order nor devices.
        devices = {key: tensor.device.type for key, tensor in written.items()}
        text = json.dumps({"tensors": digest, "devices": devices, **self.beside(), **data})
        content = f"{digests.of_text(text)}\n{text}\n"
        write_whole(self._path(name, "json"), lambda path: path.write_text(content, encoding="utf-8"))

    def _load(self, name: str) -> Saved | None:
        """The tensors and data of a checkpoint; None where it is damaged."""
        if (data := self._checked_data(name)) is None:
            return None
        devices = data.pop("devices", None)
        with safe_open(self._path(name, "safetensors"), framework="pt", device=self.device) as file:
            if devices is None:  # in earlier versions
                return {key: file.get_tensor(key) for key in file.keys()}, data  # noqa: SIM118
            # What was kept on the CPU beside a GPU comes back there.
            tensors = {key: file.get_tensor(key) for key in devices}
        return {key: found.cpu() if devices[key] == "cpu" else found for key, found in tensors.items()}, data

    def _checked_data(self, name: str) -> dict[str, Any] | None:
        """The data of a checkpoint; None where one of its two files is damaged."""
        try:
            digest, text, _ = self._path(name, "json").read_text(encoding="utf-8").split("\n")
            if digests.of_text(text) != digest:
                return None
            data = json.loads(text)
            return data if digests.of_file(self._path(name, "safetensors")) == data.pop("tensors") else None
        except (OSError, ValueError):
            return None

    def _path(self, name: str, kind: str) -> Path:
        """One of the two files of a checkpoint: `json` or `safetensors`."""
        return self.directory / f"{name}.{kind}"

    def _newest_first(self, prefix: str) -> list[Path]:
        """The JSON files of the checkpoints whose names begin with `prefix`."""
        return sorted(self.directory.glob(f"{prefix}-*.json"), reverse=True)

    def _remove(self, name: str) -> None:
        """Remove a checkpoint; where the system refuses, it stays."""
        for kind in ("json", "safetensors"):
            with suppress(OSError):
                self._path(name, kind).unlink(missing_ok=True)
