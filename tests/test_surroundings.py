"""Locales, homes, locks and standard streams that are not as usual: a run ends as an undisturbed one does."""

import codecs
import csv
import errno
import fcntl
import importlib.metadata
import io
import json
import os
import pty
import shlex
import shutil
import struct
import subprocess
import sys
import termios
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, clbench, command, make_category, run_directories, within
from processes import start

from clbench import streams
from clbench.commands.run import main
from clbench.locks import open_lock, take_lock
from clbench.recording import provenance
from clbench.recording.journal import Journal
from clbench.recording.run_directory import RunDirectory
from clbench.terminal import Display

NAMES = ("plate", "болт", "螺丝")
ASCII = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
NO_HOME = {"HOME": "/proc/nothing"}


@pytest.fixture(scope="module")
def stream(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three categories with names in three scripts."""
    root = tmp_path_factory.mktemp("named")
    for seed, name in enumerate(NAMES):
        make_category(root / name, np.random.default_rng(seed))
    return root


@pytest.fixture(scope="module")
def undisturbed(stream: Path, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """metrics.csv of the run of this stream, in a usual process."""
    outputs = tmp_path_factory.mktemp("undisturbed")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        assert within(main, words(stream, outputs)).returncode == 0
    (directory,) = run_directories(outputs)
    return (directory / "metrics.csv").read_bytes()


def words(stream: Path, outputs: Path, *overrides: str) -> list[str]:
    return command(stream, outputs, "method=padim", *overrides)[2:]


def check(outputs: Path, undisturbed: bytes) -> Path:
    """The run directory, after a look at its status and its metrics."""
    (directory,) = run_directories(outputs)
    about = json.loads((directory / "summary.json").read_bytes())
    assert about["status"] == "complete" and "not_recorded" not in about
    assert (directory / "metrics.csv").read_bytes() == undisturbed
    return directory


def in_shell(line: str, environment: dict[str, str] | None = None) -> subprocess.CompletedProcess:
    return subprocess.run(
        ["bash", "-c", line],
        cwd=ROOT,
        capture_output=True,
        check=False,
        timeout=300,
        env={**os.environ, **(environment or {})},
    )


# Locales


@pytest.mark.long
def test_names_of_any_script_in_a_locale_of_ascii_without_a_home(
    stream: Path, undisturbed: bytes, tmp_path: Path
) -> None:
    line = shlex.join([sys.executable, "train.py", *words(stream, tmp_path, "maps=few", "wandb=offline")])
    result = in_shell(line, {**ASCII, **NO_HOME})
    assert result.returncode == 0, result.stderr
    assert result.stdout.isascii() and b"task 2/3 ????:" in result.stdout
    directory = check(tmp_path, undisturbed)
    assert {path.name for path in (directory / "maps").iterdir()} == set(NAMES)
    evaluated = {
        entry.get("category") for entry in Journal(directory / "journal.jsonl").entries if "values" in entry
    }
    assert evaluated == set(NAMES)
    # Each of the 7 tables of R is in the run directory, with the file that wandb makes of it first.
    assert len(list(directory.glob("wandb/artifacts/staging/*"))) == 2 * 7
    (fragment,) = directory.glob("wandb/offline-run-*/*.wandb")
    assert all(f"{name}/pixel_f1".encode() in fragment.read_bytes() for name in NAMES)

    report = clbench("report", str(directory.parent))
    assert report.returncode == 0, report.stderr
    for name in ("index.html", "tables/forgetting.csv"):
        text = (directory.parent / "report" / name).read_text(encoding="utf-8")
        assert all(category in text for category in NAMES), name

    images = shutil.copytree(stream / "болт" / "test", tmp_path / "фото")
    line = shlex.join(
        [
            sys.executable,
            "-m",
            "clbench.cli",
            "predict",
            str(directory),
            str(images),
            f"--output={tmp_path}/scores",
        ]
    )
    result = in_shell(line, {**ASCII, **NO_HOME})
    assert result.returncode == 0, result.stderr
    with open(tmp_path / "scores" / "scores.csv", encoding="utf-8") as file:
        assert len(list(csv.DictReader(file))) == 4


def test_a_locale_of_latin_letters_and_a_disk_without_locks(
    stream: Path, undisturbed: bytes, tmp_path: Path
) -> None:
    locales = tmp_path / "locales"
    locales.mkdir()
    made = ["localedef", "-i", "en_US", "-f", "ISO-8859-1", str(locales / "en_US.ISO-8859-1")]
    if shutil.which("localedef") is None or subprocess.run(made, check=False, capture_output=True).returncode:
        pytest.skip("no such locale can be made here")
    latin = {"LOCPATH": str(locales), "LC_ALL": "en_US.ISO-8859-1"}
    line = shlex.join([sys.executable, "train.py", *words(stream, tmp_path)])
    result = in_shell(line, {**latin, **without_locks(tmp_path, "ENOLCK")})
    assert result.returncode == 0, result.stderr
    assert b"task 3/3 ??:" in result.stdout and "·".encode("latin-1") + b" time: " in result.stdout
    assert result.stderr.count(b"has no locks (No locks available)") == 1
    check(tmp_path, undisturbed)


# Locks


def without_locks(folder: Path, answer: str) -> dict[str, str]:
    """The environment of a process in which flock answers with this error."""
    if (compiler := shutil.which("cc")) is None:
        pytest.skip("no compiler is here")
    source, library = folder / "flock.c", folder / "flock.so"
    source.write_text(
        f"#include <errno.h>\nint flock(int file, int how) {{ errno = {answer}; return -1; }}\n"
    )
    subprocess.run([compiler, "-shared", "-fPIC", str(source), "-o", str(library)], check=True)
    return {"LD_PRELOAD": str(library)}


@pytest.mark.parametrize("answer", ["ENOSYS", "EOPNOTSUPP", "EINVAL"])
def test_a_disk_without_locks_is_said_once_and_used(answer: str, tmp_path: Path, monkeypatch, capsys) -> None:
    def refuse(file: object, operation: int) -> None:
        raise OSError(getattr(errno, answer), os.strerror(getattr(errno, answer)))

    monkeypatch.setattr(fcntl, "flock", refuse)
    for name in ("one", "two"):
        with RunDirectory(tmp_path / name).lock():
            pass
    (line,) = capsys.readouterr().err.splitlines()
    assert line == (
        f"warning: the disk of {tmp_path} has no locks ({os.strerror(getattr(errno, answer))}): two processes in one "
        "run directory would not notice each other"
    )


@pytest.mark.parametrize("answer", [errno.EAGAIN, errno.EACCES])
def test_only_a_lock_that_another_has_is_waited_for(answer: int, tmp_path: Path, monkeypatch) -> None:
    def refuse(file: object, operation: int) -> None:
        raise OSError(answer, os.strerror(answer))

    monkeypatch.setattr(fcntl, "flock", refuse)
    with open_lock(tmp_path / "lock") as file:
        assert take_lock(file, wait=False) == ("another's", "")


def test_a_lock_file_that_may_only_be_read_is_locked(tmp_path: Path, monkeypatch) -> None:
    """As one is that another user made, in a cache that a group shares."""
    (tmp_path / "lock").write_bytes(b"")
    opened = io.open

    def refuse(path: object, mode: str, **how: object) -> object:
        if mode != "rb":
            raise PermissionError(errno.EACCES, "Permission denied")
        return opened(path, mode, **how)  # type: ignore[call-overload]

    monkeypatch.setattr("builtins.open", refuse)
    with open_lock(tmp_path / "lock") as file, open_lock(tmp_path / "lock") as other:
        assert take_lock(file, wait=False)[0] == "ours"
        assert take_lock(other, wait=False)[0] == "another's"
    with pytest.raises(PermissionError):
        open_lock(tmp_path / "none")


# Standard streams


def test_closed_streams(stream: Path, undisturbed: bytes, tmp_path: Path) -> None:
    """A file that is opened then gets the number of a closed stream, and must not be printed into."""
    given = shlex.join([sys.executable, "train.py", *words(stream, tmp_path, "wandb=offline")])
    result = in_shell(f"{given} <&- >&- 2>&-", without_locks(tmp_path, "ENOSYS"))
    assert result.returncode == 0
    directory = check(tmp_path, undisturbed)
    assert not [path for path in directory.rglob("*") if path.is_file() and b"task 1/3" in path.read_bytes()]


def full() -> int:
    return os.open("/dev/full", os.O_WRONLY)


def without_a_reader() -> int:
    reading, writing = os.pipe()
    os.close(reading)
    return writing


def terminal(columns: int) -> int:
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 10, columns, 0, 0))
    if os.fork() == 0:  # reads what is shown, until nobody can show anything any more
        os.close(theirs)
        try:
            while os.read(ours, 65536):
                pass
        finally:
            os._exit(0)
    os.close(ours)
    return theirs


@pytest.mark.parametrize("output", [full, without_a_reader, partial(terminal, 20), partial(terminal, 1)])
def test_what_cannot_be_shown(
    output: Callable[[], int], stream: Path, undisturbed: bytes, tmp_path: Path
) -> None:
    process = start(words(stream, tmp_path), output=output)
    process.join(120)
    assert process.exitcode == 0
    check(tmp_path, undisturbed)


def test_a_full_disk_is_said_where_the_output_is_what_was_asked_for() -> None:
    line = f"{sys.executable} -m clbench.cli data list"
    result = in_shell(f"{line} > /dev/full")
    assert (result.returncode, result.stderr.count(b"\n")) == (1, 1)
    assert b"standard output cannot be written (No space left on device)" in result.stderr
    result = in_shell(f"set -o pipefail; {line} | true")
    assert (result.returncode, result.stderr) == (0, b"")


@pytest.mark.parametrize(
    ("encoding", "text", "shown"),
    [
        ("ascii", "1 → 2, болт", b"1 ? 2, ????"),
        ("latin-1", "1 → 2, grün · 螺", b"1 ? 2, gr\xfcn \xb7 ?"),
        ("utf-8", "caf\udce9 → 螺", b"caf\xe9 \xe2\x86\x92 \xe8\x9e\xba"),
        ("cp932", "болт, grün", "болт, gr?n".encode("cp932")),
    ],
)
def test_characters_that_an_encoding_lacks_are_replaced(encoding: str, text: str, shown: bytes) -> None:
    assert codecs.encode(text, encoding, streams.REPLACED) == shown


def test_a_display_that_fails_says_so_once(capsys, monkeypatch) -> None:
    display = Display("run")

    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("no such terminal\nmore")

    monkeypatch.setattr(display.console, "print", fail)
    monkeypatch.setattr(display._bar, "update", fail)
    with display:
        display.heading("task 1/3")
        display.progress("learning", 1, 2)
        display.line("text")
    assert capsys.readouterr().err == "warning: not all can be shown (RuntimeError: no such terminal)\n"


def test_what_goes_wrong_after_a_run_is_complete_does_not_fail_it(train, tmp_path: Path, monkeypatch) -> None:
    def fail(*_: object) -> None:
        raise ZeroDivisionError("in a table")

    monkeypatch.setattr("clbench.experiment.run_table", fail)
    result = train()
    assert result.returncode == 0 and "Traceback" not in result.stderr
    assert "not all can be shown (ZeroDivisionError: in a table)" in result.stderr
    (directory,) = run_directories(tmp_path)
    assert json.loads((directory / "summary.json").read_bytes())["status"] == "complete"


def test_an_exception_after_the_summary_leaves_a_run_complete(tmp_path: Path, capsys) -> None:
    directory = RunDirectory(tmp_path)
    with directory.reporting({"status": "running"}):
        directory.write_summary({"status": "complete", "tasks": [], "final": {}, "memory": {}, "time": {}})
        raise ValueError("of something\nelse")
    assert (directory.summary() or {})["status"] == "complete"
    assert capsys.readouterr().err == f"warning: {tmp_path} is complete; after that: of something\n"
    with pytest.raises(ValueError), directory.reporting({}) as report:
        report({"status": "running", "tasks": []})
        raise ValueError("before it")
    assert (directory.summary() or {})["status"] == "failed"


def test_a_library_under_another_name_stops_no_run(monkeypatch: pytest.MonkeyPatch) -> None:
    def version(name: str) -> str:
        if name == "opencv-python":  # where opencv-python-headless alone is installed
            raise importlib.metadata.PackageNotFoundError(name)
        return "1.0"

    monkeypatch.setattr(provenance, "version", version)
    made = provenance.made_by(torch.device("cpu"))
    assert made["opencv-python"] is None and made["torch"] == "1.0"
