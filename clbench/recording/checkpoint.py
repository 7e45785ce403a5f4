"""Checkpoints: tensors in safetensors, plain data in JSON beside them. No pickles.

There are two kinds in a run's `checkpoint/`: `stage-<stage>`, the state after a stage was learned, and
`learning-<stage>-<number>`, the state of a stage that is being learned. The newest two of each kind stay.

What did not change is not written again. Tensors are written in parts of 16 MB or more: several small ones, a large one, or
a row of one whose rows are as large. Each is a file in `checkpoint/parts/`, named by its content, that goes when no
checkpoint has it any more. What a run says of itself in every checkpoint, as its stream, is such a part too.
"""

import json
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from clbench import digests
from clbench.recording.files import copy_whole, write_whole

_KEPT = 2  # checkpoints of a kind: if the newest is damaged, the one before is used
_SHARE = 0.05  # share of a run's time, at most, that checkpoints at the ends of epochs take

_LARGE = 16 * 10**6  # bytes of a part, at least
_ABOUT = "about"  # of a checkpoint's data, the digest of the part with what is the same in all; and its tensor's name

Saved = tuple[dict[str, Tensor], dict[str, Any]]  # name -> tensor, and plain data


class Checkpoints:
    """The checkpoints of a run.

    One counts only if its JSON, which is written last, is whole and agrees with its tensors in all their files.

    Args:
        directory: the folder `checkpoint/`.
        device: where tensors are loaded to, as torch names it.
        every_s: seconds between two checkpoints of a stage that is being learned.
        urgent: tells whether a checkpoint is wanted at once.
        saved: called after each checkpoint of a stage that is being learned; may raise, to end the run there.
        beside: gives plain data that goes into every checkpoint.
        about: plain data that is in every checkpoint, and is written once.
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
        about: Mapping[str, Any] | None = None,
    ):
        self.directory = directory
        self.device = device
        self.every_s = every_s
        self.urgent, self.saved = urgent, saved
        self.beside = beside
        self._about = None if about is None else {_ABOUT: _as_tensor(about)}
        self._whole: set[str] = set()  # files of parts that this process has written or read, and not removed
        self._digests: Any = (
            WeakTensorKeyDictionary()
        )  # tensor -> its version and its sum then, and its digest
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
        self._remove_parts()
        self._saved_at = time.perf_counter()

    def load_stage(
        self, wanted: Callable[[str], bool] = lambda name: True
    ) -> tuple[int, dict[str, Tensor], dict[str, Any]] | None:
        """The newest undamaged checkpoint of a learned stage: stage, tensors and data; None without one.

        A run that goes on beside it may remove checkpoints while they are read: those that came since are tried then.

        Args:
            wanted: tells of a tensor's name whether it is to be loaded. Parts of which none is are not read.
        """
        tried: list[Path] = []
        while (found := self._newest_first("stage")) != tried:
            for path in found:
                if (saved := self._load(path.stem, wanted)) is not None:
                    return int(path.stem.rpartition("-")[2]), *saved
            tried = found
        return None

    def copy_newest(self, directory: Path) -> int | None:
        """Copy the newest undamaged checkpoint of a learned stage to another folder; gives its stage, or None without one.

        Files are linked where the disk can, and take no room then: none is ever changed.

        Raises:
            UserError: the disk is full or may not be written.
        """
        for path in self._newest_first("stage"):
            if (data := self._checked_data(path.stem)) is None:
                continue
            there = [self._path(path.stem, "safetensors"), *map(self._part, data.get("parts", [])), path]
            for file in there:  # the one that makes it count comes last
                copy_whole(file, directory / file.relative_to(self.directory))
            return int(path.stem.rpartition("-")[2])
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
        self._remove_parts()
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
        parts, rest = _in_parts(tensors)
        named = [self._write_part(part) for part in parts]
        of_all = {} if self._about is None else {_ABOUT: self._write_part(self._about)}
        _write_tensors(self._path(name, "safetensors"), rest)
        about = {
            "tensors": digests.of_file(self._path(name, "safetensors")),
            "parts": [*of_all.values(), *named],
            **of_all,
            # safetensors keeps neither order nor devices.
            "devices": {key: tensor.device.type for key, tensor in tensors.items()},
        }
        text = json.dumps({**about, **self.beside(), **data})
        content = f"{digests.of_text(text)}\n{text}\n"
        write_whole(self._path(name, "json"), lambda path: path.write_text(content, encoding="utf-8"))

    def _write_part(self, part: dict[str, Tensor]) -> str:
        """Write a part unless there is its file; gives the digest that this is named by.

        Raises:
            UserError: the disk is full or may not be written.
        """
        digest = _digest_of_all({name: self._digest(tensor) for name, tensor in part.items()})
        if not self._is_whole(digest):
            _write_tensors(self._part(digest), part)
            self._whole.add(digest)
        return digest

    def _digest(self, tensor: Tensor) -> str:
        """A tensor's digest, which is computed once for as long as it stays the same.

        What is changed through `.data` or NumPy, of which a tensor's version does not know, changes the sum of its bytes.
        """
        state = tensor._version, _sum_of(tensor)
        known = self._digests.get(tensor)
        if known is None or known[0] != state:
            self._digests[tensor] = known = state, _digest_of(tensor)
        return known[1]

    def _is_whole(self, digest: str, wanted: Callable[[str], bool] = lambda name: True) -> bool:
        """Whether the file of a part is there with that part in it; each process reads it once.

        A file of which no tensor is `wanted` need only be there.
        """
        if digest not in self._whole or not self._part(digest).exists():
            self._whole.discard(digest)
            with suppress(OSError, SafetensorError), safe_open(self._part(digest), framework="pt") as file:
                if not any(wanted(_whole_name(key)) for key in file.keys()):  # noqa: SIM118
                    return True
                found = {name: _digest_of(file.get_tensor(name)) for name in file.keys()}  # noqa: SIM118
                if _digest_of_all(found) == digest:
                    self._whole.add(digest)
        return digest in self._whole

    def _load(self, name: str, wanted: Callable[[str], bool] = lambda name: True) -> Saved | None:
        """The tensors and data of a checkpoint; None where it is damaged, or another process has just removed it."""
        if (data := self._checked_data(name, wanted)) is None:
            return None
        found: dict[str, Tensor] = {}
        try:
            for path in [self._path(name, "safetensors"), *map(self._part, data.pop("parts", []))]:
                with safe_open(path, framework="pt") as file:
                    keys = [key for key in file.keys() if wanted(_whole_name(key))]  # noqa: SIM118
                    found |= {key: file.get_tensor(key) for key in keys}
        except FileNotFoundError:
            return None
        # Earlier versions did not keep devices. What was kept on the CPU beside a GPU comes back there, and never was on it.
        devices = data.pop("devices", None) or dict.fromkeys(found, self.device)
        return {
            key: _put_together(key, found).to("cpu" if device == "cpu" else self.device)
            for key, device in devices.items()
            if wanted(key)
        }, data

    def _checked_data(
        self, name: str, wanted: Callable[[str], bool] = lambda name: True
    ) -> dict[str, Any] | None:
        """The data of a checkpoint; None where one of its files is damaged, of those that hold what is wanted."""
        try:
            digest, text, _ = self._path(name, "json").read_text(encoding="utf-8").split("\n")
            if digests.of_text(text) != digest:
                return None
            data = json.loads(text)
            if digests.of_file(self._path(name, "safetensors")) != data.pop("tensors"):
                return None
            digest = data.pop(_ABOUT, None)
            if not all(self._is_whole(part, wanted) for part in data.get("parts", []) if part != digest):
                return None
            if digest is not None:
                if not self._is_whole(digest):
                    return None
                with safe_open(self._part(digest), framework="pt") as file:
                    data = {**_from_tensor(file.get_tensor(_ABOUT)), **data}
            return data
        except (OSError, ValueError, SafetensorError):
            return None

    def _path(self, name: str, kind: str) -> Path:
        """One of the two files of a checkpoint: `json` or `safetensors`."""
        return self.directory / f"{name}.{kind}"

    def _part(self, digest: str) -> Path:
        """The file of a part."""
        return self.directory / "parts" / f"{digest[:32]}.safetensors"

    def _newest_first(self, prefix: str) -> list[Path]:
        """The JSON files of the checkpoints whose names begin with `prefix`."""
        return sorted(self.directory.glob(f"{prefix}-*.json"), reverse=True)

    def _remove(self, name: str) -> None:
        """Remove a checkpoint; where the system refuses, it stays."""
        for kind in ("json", "safetensors"):
            with suppress(OSError):
                self._path(name, kind).unlink(missing_ok=True)

    def _remove_parts(self) -> None:
        """Remove the parts that no checkpoint has; none, where a checkpoint cannot be read now."""
        named: set[str] = set()
        try:
            for path in self.directory.glob("*.json"):
                with suppress(
                    ValueError, LookupError, AttributeError
                ):  # it is damaged, and counts for nothing
                    named.update(json.loads(path.read_text(encoding="utf-8").split("\n")[1])["parts"])
        except OSError:
            return
        self._whole &= named
        for path in set((self.directory / "parts").glob("*")) - set(map(self._part, named)):
            with suppress(OSError):
                path.unlink()


def _in_parts(tensors: Mapping[str, Tensor]) -> tuple[list[dict[str, Tensor]], dict[str, Tensor]]:
    """Tensors in their order, in parts of `_LARGE` bytes or more, and the rest of them.

    Of a tensor with rows that large, each row is a part, called as the tensor with its number behind.
    """
    parts: list[dict[str, Tensor]] = []
    rest: dict[str, Tensor] = {}
    size = 0
    for name, tensor in tensors.items():
        if tensor.dim() > 1 and _size(tensor) >= _LARGE * len(tensor) > 0:
            rows = tensor.split(1) if len(tensor) > 1 else (tensor,)
            parts += [{f"{name}[{row}]": each} for row, each in enumerate(rows)]
            continue
        rest[name] = tensor
        size += _size(tensor)
        if size >= _LARGE:
            parts.append(rest)
            rest, size = {}, 0
    return parts, rest


def _whole_name(key: str) -> str:
    """The name of the tensor that a part holds under this key, all of it or a row."""
    name, bracket, row = key.rpartition("[")
    return name if bracket and row[:-1].isdigit() and row.endswith("]") else key


def _put_together(name: str, found: dict[str, Tensor]) -> Tensor:
    """The tensor of a name, taken out of what files have of it: itself, or its rows."""
    if name in found:
        return found.pop(name)
    count = 1
    while f"{name}[{count}]" in found:
        count += 1
    if count == 1:
        return found.pop(f"{name}[0]")
    first = found[f"{name}[0]"]
    whole = first.new_empty(count, *first.shape[1:])
    for row in range(count):
        whole[row : row + 1] = found.pop(f"{name}[{row}]")
    return whole


def _write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write a file of tensors.

    Raises:
        UserError: the disk is full or may not be written.
    """
    written: dict[str, Tensor] = {}
    storages: set[int] = set()
    for name, tensor in tensors.items():
        contiguous = tensor.detach().contiguous()
        shared = contiguous.untyped_storage().data_ptr() in storages  # which safetensors refuses
        written[name] = contiguous.clone() if shared else contiguous
        storages.add(written[name].untyped_storage().data_ptr())

    def write(beside: Path) -> None:
        try:
            save_file(written, beside)
        except SafetensorError as error:
            raise OSError(str(error)) from error

    write_whole(path, write)


def _as_tensor(data: Mapping[str, Any]) -> Tensor:
    """Plain data as the bytes of its JSON, uint8 [length]."""
    return torch.frombuffer(bytearray(json.dumps(dict(data)).encode()), dtype=torch.uint8)


def _from_tensor(content: Tensor) -> dict[str, Any]:
    """The plain data that `_as_tensor` made a tensor of."""
    return json.loads(content.numpy().tobytes())


def _size(tensor: Tensor) -> int:
    """The bytes of a tensor."""
    return tensor.numel() * tensor.element_size()


def _sum_of(tensor: Tensor) -> int:
    """The sum of a tensor's bytes taken as integers, by eight where they can be: twenty times as quick as by four."""
    flat = tensor.detach().contiguous().reshape(-1)
    whole = _size(flat) % 8 == 0 and flat.storage_offset() * flat.element_size() % 8 == 0
    return int(flat.view(torch.int64 if whole else torch.uint8).sum(dtype=torch.int64))


def _digest_of(tensor: Tensor) -> str:
    """The digest of a tensor's type, shape and numbers."""
    numbers = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
    return digests.of_bytes(f"{tensor.dtype} {list(tensor.shape)}\n".encode(), numbers.data)


def _digest_of_all(tensors: Mapping[str, str]) -> str:
    """The digest of tensors: name -> the digest of each."""
    return digests.of_text(json.dumps(dict(sorted(tensors.items()))))
