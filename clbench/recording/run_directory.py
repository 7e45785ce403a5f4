"""The directory of a run, and every file that is written into it.

A file is replaced as a whole, or appended to.
"""

import hashlib
import io
import json
import os
import shutil
import socket
import sys
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import lru_cache
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import numpy as np
import yaml

from clbench.config.differences import differences
from clbench.errors import UserError, described, first_line, in_one_line
from clbench.locks import open_lock, take_lock
from clbench.recording.files import append_whole, cannot_write, write_whole
from clbench.recording.journal import Journal
from clbench.recording.metrics_file import HEADER, MetricRow, as_text

State = Literal["finished", "failed", "unfinished", "missing"]

_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # ten times as fast, where PyYAML has it


# What every summary.json holds at least, and what those of a status do: key -> type, or of what a list is.
_Kind = type | list[type]
_SUMMARY: dict[str, _Kind] = {"status": str, "tasks": [str]}
_OF_STATUS: dict[str, dict[str, _Kind]] = {
    "complete": {"final": dict, "memory": dict, "time": dict},
    "failed": {"reason": str},
}


class RunDirectory:
    """The folder of a run, outputs/<experiment>/<run>.

    It holds config.yaml, journal.jsonl, metrics.csv, summary.json, thresholds.json, checkpoint/, evidence/, maps/
    and wandb/; job.json where a job of a cluster was submitted; and parent.json where it goes on from another run.

    Args:
        path: the folder, which need not exist.
    """

    def __init__(self, path: Path | str):
        self.path = Path(path)
        self._completed = False  # whether this object has written that the run is complete

    def summary(self) -> dict[str, Any] | None:
        """What summary.json holds; None where the run has not begun, or the file is damaged.

        Raises:
            UserError: the file may not be read.
        """
        text = self._read("summary.json")
        if text is None:
            return None
        with suppress(json.JSONDecodeError, RecursionError):
            found = json.loads(text)
            if isinstance(found, dict) and all(_fits(found.get(key), kind) for key, kind in _SUMMARY.items()):
                more = _OF_STATUS.get(found["status"], {})
                return found if all(_fits(found.get(key), kind) for key, kind in more.items()) else None
        return None

    def config(self) -> dict[str, Any] | None:
        """What config.yaml holds; None where there is none.

        It is the resolved config that the run was begun with, `departures` from its benchmark, and `made_by`:
        versions and device. Runs of earlier versions have no `departures`.

        Raises:
            UserError: the file is damaged or may not be read.
        """
        text = self._read("config.yaml")
        if text is None:
            return None
        try:
            stored = yaml.load(text, Loader=_LOADER)
        except yaml.YAMLError:
            stored = None
        if not isinstance(stored, dict):
            raise UserError(
                f"{self.path / 'config.yaml'} is damaged: remove {self.path} to run this anew, "
                "or take another experiment=NAME"
            )
        return stored

    def _read(self, name: str) -> str | None:
        """The text of a file of the directory; None where there is none.

        Raises:
            UserError: it may not be read.
        """
        content = self._read_bytes(name)
        return None if content is None else content.decode(errors="replace")

    def _read_bytes(self, name: str) -> bytes | None:
        """The content of a file of the directory; None where there is none.

        Raises:
            UserError: it may not be read.
        """
        try:
            return (self.path / name).read_bytes()
        except (FileNotFoundError, NotADirectoryError):
            return None
        except OSError as error:
            raise UserError(
                f"{self.path / name} cannot be read ({error.strerror}): "
                "get the right to, or take another experiment=NAME"
            ) from error

    def _read_json(self, name: str) -> dict[str, Any] | None:
        """What a JSON file of the directory holds; None where it is missing or damaged.

        Raises:
            UserError: it may not be read.
        """
        text = self._read(name)
        with suppress(json.JSONDecodeError, RecursionError):
            return json.loads(text) if text is not None else None
        return None

    def finished(self, config: Mapping[str, Any]) -> bool:
        """Whether the run of this config is complete and its results are still there.

        Args:
            config: the run's config as plain data.

        Raises:
            UserError: the directory holds a run of another config, or an unfinished run of another version of
                clbench, and `overwrite` is not set; or a file is damaged or may not be read.
        """
        stored = self.config()
        if config["overwrite"]:
            return False
        if stored is None:
            if any(self.path.glob("checkpoint/*.json")):
                raise UserError(
                    f"{self.path} holds what a run has learned, and no config.yaml that says which run: put that back, "
                    "take another experiment=NAME, or overwrite=true"
                )
            return False
        made_by = stored.pop("made_by", None)
        stored.pop("departures", None)
        if changed := differences(stored, config):
            raise UserError(
                f"{self.path} holds a run of another config ({'; '.join(changed)}): "
                "take another experiment=NAME, or overwrite=true"
            )
        summary = self.summary()
        if summary is not None and self.complete(summary):
            return True
        ours, theirs = version("clbench"), made_by.get("clbench") if isinstance(made_by, dict) else None
        if theirs != ours:
            raise UserError(
                f"{self.path} holds an unfinished run of clbench {theirs}, and this is {ours}: finish it with that "
                "version, take another experiment=NAME, or overwrite=true"
            )
        return False

    def complete(self, summary: Mapping[str, Any]) -> bool:
        """Whether this summary is of a complete run whose metrics.csv and config.yaml are still here, as it wrote them.

        Raises:
            UserError: metrics.csv may not be read.
        """
        if summary["status"] != "complete" or not (self.path / "config.yaml").is_file():
            return False
        written = self.metrics_digest()
        return written is not None and written == summary.get("metrics_sha256", written)

    def metrics_digest(self) -> str | None:
        """SHA-256 of metrics.csv, in hexadecimal; None where there is none.

        Raises:
            UserError: it may not be read.
        """
        content = self._read_bytes("metrics.csv")
        return None if content is None else hashlib.sha256(content).hexdigest()

    def state(self, config: Mapping[str, Any]) -> tuple[State, str | None]:
        """How far the run of a config is, and the reason where it failed; None where it did not.

        Args:
            config: the run's config as plain data.

        Raises:
            UserError: as `finished`.
        """
        if self.finished(config):
            return "finished", None
        summary = None if config["overwrite"] else self.summary()
        if summary is None:
            return "missing", None
        failed = summary["status"] == "failed"
        return ("failed", summary["reason"]) if failed else ("unfinished", None)

    def create(self) -> None:
        """Make the folder where it is missing.

        Raises:
            UserError: it cannot be made.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise cannot_write(self.path, error) from error

    def clear(self) -> None:
        """Remove the files of an earlier run.

        In an order in which what is left, when this process is killed, is an unfinished run that says of which config.

        Raises:
            UserError: a file that results depend on cannot be removed.
        """
        try:
            (self.path / "summary.json").unlink(missing_ok=True)
            if (self.path / "checkpoint").exists():
                shutil.rmtree(self.path / "checkpoint")
            for name in ("journal.jsonl", "metrics.csv", "thresholds.json", "config.yaml"):
                (self.path / name).unlink(missing_ok=True)
        except OSError as error:
            raise cannot_write(self.path, error) from error
        for name in ("maps", "wandb", "evidence"):
            shutil.rmtree(self.path / name, ignore_errors=True)

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Inside, this process alone works in the directory, as far as its disk has locks to tell by.

        Raises:
            UserError: another process holds it, or the directory cannot be written.
        """
        self.create()
        try:
            file = open_lock(self.path / "run.lock")
        except OSError as error:
            raise cannot_write(self.path, error) from error
        try:
            whose, reason = take_lock(file, wait=False)
            if whose == "another's":
                file.seek(0)
                raise UserError(
                    f"{self.path} is in use by {file.read().decode(errors='replace').strip() or 'another process'}: "
                    "wait for it, or give this run another experiment=NAME (--output of clbench learn and forget)"
                )
            if whose == "none":
                _warn_of_no_locks(self.path.parent, reason)
            with suppress(OSError):  # on a full disk the lock holds too, but does not say who has it
                file.truncate(0)
                file.write(f"process {os.getpid()} on {socket.gethostname()}".encode())
            yield
        finally:
            with suppress(OSError):
                file.close()

    @contextmanager
    def reporting(self, identity: Mapping[str, Any]) -> Iterator[Callable[[Mapping[str, Any]], None]]:
        """Inside, the run's status is in summary.json: `failed` after an exception.

        Gives a function that is called with the whole identity of the run once that is known, and writes it,
        with its status `running`. A run that was complete before the exception came stays so: what came is
        printed in a line.

        Args:
            identity: what is known of the run before; used where there is no summary.json yet.

        Raises:
            Exception: whatever is raised inside a run that is not complete, after it was written down.
        """
        about = self.summary() or dict(identity)

        def begin(identity: Mapping[str, Any]) -> None:
            about.clear()
            about.update(identity)
            self.write_summary(about)

        try:
            with _exits_as_errors():
                yield begin
        except Exception as error:
            if self._completed:
                print(f"warning: {self.path} is complete; after that: {first_line(error)}", file=sys.stderr)
                return
            reason = in_one_line(error) or described(error)
            with suppress(UserError):  # where nothing can be written, the error itself matters more
                self.write_summary({**about, "status": "failed", "reason": reason})
            raise

    def parent(self) -> dict[str, Any] | None:
        """What parent.json holds of the run that this one goes on from; None where it goes on from none.

        Raises:
            UserError: the file may not be read.
        """
        return self._read_json("parent.json")

    def write_parent(self, about: Mapping[str, Any]) -> None:
        """Write parent.json: `run`, the directory of the run that this one goes on from, and `metrics_sha256`, its digest.

        Raises:
            UserError: the disk is full or may not be written.
        """
        self._write_json("parent.json", about)

    def job(self) -> dict[str, Any] | None:
        """The cluster job that was last submitted for this run: its `id` and `log`.

        None where there was none.

        Raises:
            UserError: the file may not be read.
        """
        return self._read_json("job.json")

    def write_job(self, job: Mapping[str, Any]) -> None:
        """Write job.json: `id` and `log` of the cluster job of this run.

        Raises:
            UserError: the disk is full or may not be written.
        """
        self._write_json("job.json", job)

    def thresholds(self) -> dict[str, Any] | None:
        """What thresholds.json holds, see `clbench.thresholds`; None where it is missing or damaged.

        Raises:
            UserError: the file may not be read.
        """
        return self._read_json("thresholds.json")

    def write_thresholds(self, thresholds: Mapping[str, Any]) -> None:
        """Write thresholds.json: what `clbench.thresholds.calibrate` gave.

        Raises:
            UserError: the disk is full or may not be written.
        """
        self._write_json("thresholds.json", thresholds)

    def evidence(self, category: str) -> dict[str, np.ndarray] | None:
        """The arrays that `write_evidence` wrote; None where they are missing or damaged.

        Raises:
            UserError: the file may not be read.
        """
        content = self._read_bytes(f"evidence/{category}.npz")
        if content is None:
            return None
        try:
            with np.load(io.BytesIO(content), allow_pickle=False) as arrays:
                return {name: arrays[name] for name in arrays.files}
        except (OSError, EOFError, ValueError, KeyError, zipfile.BadZipFile, zlib.error):
            return None

    def write_evidence(self, category: str, arrays: Mapping[str, np.ndarray]) -> None:
        """Write evidence/<category>.npz: what each test image contributes to the category's final metrics.

        Args:
            arrays: name -> array, see `clbench.metrics.resampling.Evidence`.

        Raises:
            UserError: the disk is full or may not be written.
        """
        content = io.BytesIO()
        np.savez_compressed(content, **arrays)  # type: ignore[arg-type]
        path = self.path / "evidence" / f"{category}.npz"
        write_whole(path, lambda part: part.write_bytes(content.getbuffer()))

    def write_config(
        self, config: Mapping[str, Any], departures: Mapping[str, Any], made_by: Mapping[str, Any]
    ) -> None:
        """Write config.yaml.

        Args:
            config: the run's config as plain data.
            departures: flat key -> the benchmark's value, for each setting in which the run differs from it.
            made_by: what `clbench.recording.provenance.made_by` gave.

        Raises:
            UserError: the disk is full or may not be written.
        """
        beside = {"departures": dict(departures), "made_by": dict(made_by)}
        text = yaml.safe_dump({**config, **beside}, sort_keys=False, allow_unicode=True)
        self._write("config.yaml", text)

    def write_summary(self, summary: Mapping[str, Any]) -> None:
        """Write summary.json.

        Raises:
            UserError: the disk is full or may not be written.
        """
        self._write("summary.json", json.dumps(summary, indent=2) + "\n")
        self._completed = summary["status"] == "complete"

    def journal(self) -> Journal:
        """Open journal.jsonl: losses and metrics at full precision, for a process that continues the run.

        Raises:
            UserError: the file cannot be read or written, or a line that is not the last is damaged.
        """
        return Journal(self.path / "journal.jsonl")

    def write_metrics(self, rows: Iterable[MetricRow]) -> None:
        """Write metrics.csv with these rows alone.

        Raises:
            UserError: the disk is full or may not be written.
        """
        self._write("metrics.csv", HEADER + as_text(rows))

    def append_metrics(self, rows: Iterable[MetricRow]) -> None:
        """Append rows to metrics.csv.

        Raises:
            UserError: the disk is full or may not be written.
        """
        path = self.path / "metrics.csv"
        try:
            with open(path, "ab", buffering=0) as file:
                append_whole(file, as_text(rows).encode())
        except OSError as error:
            raise cannot_write(path, error) from error

    def _write_json(self, name: str, values: Mapping[str, Any]) -> None:
        """Replace a JSON file of the directory, one line.

        Raises:
            UserError: the disk is full or may not be written.
        """
        self._write(name, json.dumps(dict(values)) + "\n")

    def _write(self, name: str, text: str) -> None:
        """Replace a file of the directory.

        Raises:
            UserError: the disk is full or may not be written.
        """
        write_whole(self.path / name, lambda path: path.write_text(text, encoding="utf-8"))


@lru_cache  # once for all runs of an experiment
def _warn_of_no_locks(folder: Path, reason: str) -> None:
    print(
        f"warning: the disk of {folder} has no locks ({reason}): two processes in one run directory would not notice each "
        "other",
        file=sys.stderr,
    )


@contextmanager
def _exits_as_errors() -> Iterator[None]:
    """Inside, sys.exit ends a run and not its process: a method, a strategy or a library may call it.

    Raises:
        UserError: in place of SystemExit.
    """
    try:
        yield
    except SystemExit as ended:
        raise UserError(
            f"something in this run called sys.exit({ended.code!r}): have it raise an error in place of that"
        ) from ended


def _fits(value: object, kind: _Kind) -> bool:
    """Whether a value is of a type, or a list of values that are."""
    if isinstance(kind, list):
        return isinstance(value, list) and all(isinstance(each, kind[0]) for each in value)
    return isinstance(value, kind)
