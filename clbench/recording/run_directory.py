"""A run's directory: what was configured, measured and kept. Nothing in it is ever half-written."""

import csv
import fcntl
import io
import json
import os
import shutil
import socket
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import yaml

from clbench.config import differences
from clbench.errors import UserError, in_one_line
from clbench.recording.files import cannot_write, write_whole
from clbench.recording.journal import Journal

Row = tuple[int, int, str, str, str, float | None]  # stage, task's number, task, category, metric, value
State = Literal["finished", "failed", "unfinished", "missing"]

_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # ten times as fast, where PyYAML has it


class RunDirectory:
    """outputs/<experiment>/<run>: config.yaml, journal.jsonl, metrics.csv, summary.json, thresholds.json, checkpoint/,
    maps/, wandb/."""

    def __init__(self, path: Path | str):
        self.path = Path(path)

    def summary(self) -> dict[str, Any] | None:
        """summary.json, or None where the run has not begun, or where the file is damaged: it is made again."""
        text = self._read("summary.json")
        if text is None:
            return None
        with suppress(json.JSONDecodeError, RecursionError):
            found = json.loads(text)
            if isinstance(found, dict) and "status" in found:
                return found
        return None

    def config(self) -> dict[str, Any] | None:
        """The resolved config that the run was begun with, and under `made_by` by what; or None.

        Raises:
            UserError: it is damaged, so that nobody can tell which run this is.
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
        """A file's text, or None where there is none.

        Raises:
            UserError: it may not be read.
        """
        try:
            return (self.path / name).read_text(errors="replace")
        except (FileNotFoundError, NotADirectoryError):
            return None
        except OSError as error:
            raise UserError(
                f"{self.path / name} cannot be read ({error.strerror}): "
                "get the right to, or take another experiment=NAME"
            ) from error

    def _read_json(self, name: str) -> dict[str, Any] | None:
        """What a file holds, or None where there is none, or where it is damaged."""
        text = self._read(name)
        with suppress(json.JSONDecodeError, RecursionError):
            return json.loads(text) if text is not None else None
        return None

    def finished(self, config: Mapping[str, Any]) -> bool:
        """Whether this very run is complete, its results still there.

        Raises:
            UserError: the directory holds a run of another config, and `overwrite` is not set.
        """
        stored = self.config()
        if stored is None or config["overwrite"]:
            return False
        made_by = stored.pop("made_by", None) or {}
        stored.pop("departures", None)
        if changed := differences(stored, config):
            raise UserError(
                f"{self.path} holds a run of another config ({'; '.join(changed)}): "
                "take another experiment=NAME, or overwrite=true"
            )
        summary = self.summary()
        if summary is not None and self.complete(summary):
            return True
        ours, theirs = version("clbench"), made_by.get("clbench")
        if theirs != ours:
            raise UserError(
                f"{self.path} holds an unfinished run of clbench {theirs}, and this is {ours}: finish it with that "
                "version, take another experiment=NAME, or overwrite=true"
            )
        return False

    def complete(self, summary: Mapping[str, Any]) -> bool:
        """Whether a summary of this directory is of a run that is complete, its results still there."""
        there = all((self.path / name).is_file() for name in ("metrics.csv", "config.yaml"))
        return summary["status"] == "complete" and there

    def state(self, config: Mapping[str, Any]) -> tuple[State, str | None]:
        """Where the run of a config stands, and why it failed where it did.

        Raises:
            UserError: the directory holds a run of another config, and `overwrite` is not set.
        """
        if self.finished(config):
            return "finished", None
        summary = None if config["overwrite"] else self.summary()
        if summary is None:
            return "missing", None
        failed = summary["status"] == "failed"
        return ("failed", summary["reason"]) if failed else ("unfinished", None)

    def create(self) -> None:
        """Make the folder, where it is not there.

        Raises:
            UserError: it cannot be made.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise cannot_write(self.path, error) from error

    def clear(self) -> None:
        """Remove the results of an earlier run."""
        for name in ("summary.json", "config.yaml", "metrics.csv", "journal.jsonl", "thresholds.json"):
            (self.path / name).unlink(missing_ok=True)
        for name in ("checkpoint", "maps", "wandb"):
            shutil.rmtree(self.path / name, ignore_errors=True)

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Held by the one process that works here, and released by the system when it dies.

        Raises:
            UserError: another process holds it.
        """
        self.create()
        try:
            file = open(self.path / "run.lock", "a+b", buffering=0)  # noqa: SIM115
        except OSError as error:
            raise cannot_write(self.path, error) from error
        with file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                file.seek(0)
                raise UserError(
                    f"{self.path} is in use by {file.read().decode().strip() or 'another process'}: "
                    "wait for it, or give this run another experiment=NAME"
                ) from error
            with suppress(OSError):  # on a full disk the lock holds, only without a name
                file.truncate(0)
                file.write(f"process {os.getpid()} on {socket.gethostname()}".encode())
            yield

    @contextmanager
    def reporting(self, identity: Mapping[str, Any]) -> Iterator[Callable[[Mapping[str, Any]], None]]:
        """A run that reports to summary.json: `running` once it says all that it is, `failed` where it breaks.

        Args:
            identity: what is known of the run before.
        """
        about = self.summary() or dict(identity)

        def begin(identity: Mapping[str, Any]) -> None:
            about.clear()
            about.update(identity)
            self.write_summary(about)

        try:
            yield begin
        except Exception as error:
            reason = in_one_line(error) or f"{type(error).__name__}: {error}"
            with suppress(UserError):  # where nothing can be written, the error itself matters more
                self.write_summary({**about, "status": "failed", "reason": reason})
            raise

    def job(self) -> dict[str, Any] | None:
        """The cluster's job that was last submitted for this run: its `id` and `log`; None where none was."""
        return self._read_json("job.json")

    def write_job(self, job: Mapping[str, Any]) -> None:
        self._write("job.json", json.dumps(dict(job)) + "\n")

    def thresholds(self) -> dict[str, Any] | None:
        """What `clbench.thresholds.calibrate` gave at the end of the run; None where it is not there, or damaged."""
        return self._read_json("thresholds.json")

    def write_thresholds(self, thresholds: Mapping[str, Any]) -> None:
        self._write("thresholds.json", json.dumps(dict(thresholds)) + "\n")

    def write_config(
        self, config: Mapping[str, Any], departures: Mapping[str, Any], made_by: Mapping[str, Any]
    ) -> None:
        """config.yaml: the settings, what the benchmark has in place of those that differ, and what made the run."""
        beside = {"departures": dict(departures), "made_by": dict(made_by)}
        text = yaml.safe_dump({**config, **beside}, sort_keys=False, allow_unicode=True)
        self._write("config.yaml", text)

    def write_summary(self, summary: Mapping[str, Any]) -> None:
        self._write("summary.json", json.dumps(summary, indent=2) + "\n")

    def journal(self) -> Journal:
        """journal.jsonl: everything that the run finds, at full precision, for a process that continues it."""
        return Journal(self.path / "journal.jsonl")

    def write_metrics(self, rows: Sequence[Row]) -> None:
        """metrics.csv, for people and programs, with these rows and none else; None is written `undefined`."""
        header = "stage,task_index,task,category,metric,value\n"
        self._write("metrics.csv", header + _csv(rows))

    def append_metrics(self, rows: Sequence[Row]) -> None:
        """Further rows of metrics.csv.

        Raises:
            UserError: the disk is full or may not be written.
        """
        path = self.path / "metrics.csv"
        try:
            with open(path, "ab", buffering=0) as file:
                file.write(_csv(rows).encode())
        except OSError as error:
            raise cannot_write(path, error) from error

    def _write(self, name: str, text: str) -> None:
        write_whole(self.path / name, lambda part: part.write_text(text))


def _csv(rows: Sequence[Row]) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    for *what, value in rows:
        writer.writerow((*what, "undefined" if value is None else f"{value:.6f}"))
    return text.getvalue()
