"""clbench doctor: what this machine has for a run, on one screen, and what stands in a run's way."""

from __future__ import annotations

import argparse
import os
import platform
import shutil
import sys
import tempfile
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import suppress
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple
from urllib.error import URLError

from clbench.errors import UserError, counted, described, first_line

_WAIT_S = 5.0  # for the hub of weights to answer
_LITTLE = 1e9  # bytes of a disk or of memory with which a run hardly begins
_EXPORT = ("onnx", "onnxscript", "onnxruntime")


class Finding(NamedTuple):
    """What was found out about one thing.

    Attributes:
        state: `ok`; `note`, where a run does without; `problem`, where it would fail.
        about: the thing.
        text: what is so, and the way out where something is wrong.
    """

    state: str
    about: str
    text: str


def arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments to its parser."""
    parser.add_argument("--offline", action="store_true", help="do not ask the hub that weights come from")


def main(options: argparse.Namespace) -> int:
    """Print what was found, a line each; 1 where a run would fail, else 0."""
    from rich.console import Console
    from rich.table import Table

    marks = {"ok": "[green]✓[/]", "note": "[yellow]·[/]", "problem": "[red]✗[/]"}
    shown = Table(box=None, show_header=False, pad_edge=False)
    found = list(findings(options.offline))
    for state, about, text in found:
        shown.add_row(marks[state], about, text)
    Console(file=sys.stdout, highlight=False).print(shown)
    problems = sum(one.state == "problem" for one in found)
    print(f"{counted(problems, 'problem')}" if problems else "nothing stands in the way of a run")
    return 1 if problems else 0


def findings(offline: bool = False) -> Iterator[Finding]:
    """What was found, in the order that people read it.

    Args:
        offline: whether to leave the hub of weights alone.
    """
    checks: list[tuple[str, Callable[[], Iterator[Finding]]]] = [
        ("versions", _versions),
        ("device", _device),
        ("memory", _memory),
        ("folders", _folders),
        ("SLURM", _slurm),
        ("W&B", _wandb),
        ("weights", lambda: _weights(offline)),
        ("export", _export),
    ]
    for about, check in checks:
        try:
            yield from check()
        except (UserError, OSError, RuntimeError, ValueError) as error:  # which do not hide the others
            yield Finding("problem", about, str(error) if isinstance(error, UserError) else described(error))


def _versions() -> Iterator[Finding]:
    import torch

    yield Finding(
        "ok",
        "clbench",
        f"{version('clbench')}, Python {platform.python_version()}, PyTorch {torch.__version__}",
    )


def _device() -> Iterator[Finding]:
    import torch

    from clbench.cores import usable_cores

    cores = usable_cores()
    yield Finding("ok", "CPU", f"{counted(cores, 'core')} for this process, of {os.cpu_count()}")
    for index in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(index)
        text = f"{torch.cuda.get_device_name(index)}: {_gb(free)} of {_gb(total)} free"
        yield Finding("ok" if free > _LITTLE else "problem", f"GPU {index}", text)
    if torch.cuda.device_count():
        return
    if Path("/dev/nvidia0").exists() or shutil.which("nvidia-smi"):
        why = (
            "has no CUDA: install one with it"
            if torch.version.cuda is None
            else "sees none: look at its driver"
        )
        yield Finding(
            "problem", "GPU", f"this machine seems to have one, and PyTorch {torch.__version__} {why}"
        )
    else:
        yield Finding("note", "GPU", "none: runs compute on the CPU")


def _memory() -> Iterator[Finding]:
    from clbench.data.memory import free_memory

    free = free_memory()
    if free is None:
        yield Finding("note", "memory", "this system does not say how much is free")
    elif free < _LITTLE:
        yield Finding(
            "problem", "memory", f"{_gb(free)} free, which is hardly enough: end what else runs here"
        )
    else:
        yield Finding("ok", "memory", f"{_gb(free)} free")


def _folders() -> Iterator[Finding]:
    from clbench.config import composed
    from clbench.paths import expanded

    settings = composed()
    for name in ("outputs", "cache"):
        try:
            yield _folder(name, expanded(settings[name], name), f"{name}=FOLDER")
        except UserError as error:
            yield Finding("problem", name, str(error))
    yield _folder("temporary files", Path(tempfile.gettempdir()), "TMPDIR=FOLDER before the command")


def _folder(about: str, path: Path, elsewhere: str) -> Finding:
    """Whether files can be written into a folder, or where it is to be made; and whether they can be locked there."""
    from clbench.locks import open_lock, take_lock

    there = path.absolute()
    while not there.exists():
        there = there.parent
    where = f"{path.absolute()}" if there == path.absolute() else f"{path.absolute()} (to be made in {there})"
    owned = ""
    with suppress(OSError, KeyError):
        if there.stat().st_uid not in (os.getuid(), 0):
            owned = f", which belongs to {there.owner()}"
    free = shutil.disk_usage(there).free
    try:
        with tempfile.NamedTemporaryFile(dir=there, prefix=".clbench-doctor-") as file:
            file.write(bytes(4096))
            file.flush()
            os.fsync(file.fileno())
            with open_lock(Path(file.name)) as lock:
                locks, reason = take_lock(lock, wait=False)
    except OSError as error:
        text = f"{where}{owned} cannot be written ({error.strerror}): get the right to, or free space, or {elsewhere}"
        return Finding("problem", about, text)
    if free < _LITTLE:
        return Finding("problem", about, f"{where}: {_gb(free)} free: free space, or {elsewhere}")
    if locks == "none":
        return Finding(
            "note",
            about,
            f"{where}: no locks ({reason}), so that two processes in one run would not notice each other",
        )
    return Finding("ok", about, f"{where}{owned}: {_gb(free)} free")


def _slurm() -> Iterator[Finding]:
    from clbench.sweeps import cluster

    if shutil.which("sbatch") is None:
        yield Finding("note", "SLURM", "none here: hydra/launcher=local runs sweeps on this machine")
        return
    try:
        jobs, limit, partitions = cluster.queue(), cluster.array_limit(), cluster.partitions()
    except UserError as error:  # runs on this machine do without
        yield Finding("note", "SLURM", f"no sweep can be sent there: {error}")
        return
    arrays = "" if limit is None else f", arrays of up to {limit:,}"
    if not partitions:
        yield Finding("note", "SLURM", "it answers, and has no partition that jobs could be sent to")
        return
    yield Finding(
        "ok", "SLURM", f"partitions {', '.join(partitions)}{arrays}; {counted(len(jobs), 'job')} of yours"
    )


def _wandb() -> Iterator[Finding]:
    from clbench.config import composed, wandb_mode

    mode, reason = wandb_mode(dict(composed().wandb))
    yield Finding("note" if mode == "offline" else "ok", "W&B", reason or f"wandb={mode}")


def _weights(offline: bool) -> Iterator[Finding]:
    from huggingface_hub import constants, scan_cache_dir

    kept = "none downloaded so far"
    with suppress(Exception):  # a cache that is not there, or damaged
        found = scan_cache_dir()
        if found.repos:
            kept = f"{counted(len(found.repos), 'model')} downloaded, {_gb(found.size_on_disk)}"
    if offline:
        yield Finding("note", "weights", f"{kept}; the hub was not asked")
        return
    request = urllib.request.Request(constants.ENDPOINT, method="HEAD")
    try:
        urllib.request.urlopen(request, timeout=_WAIT_S).close()
    except (OSError, URLError, ValueError) as error:
        if getattr(error, "code", None) is None:  # it did not answer at all
            way = "bring files here and give backbone.checkpoint=FILE, or take backbone=small"
            reason = first_line(getattr(error, "reason", error))
            yield Finding(
                "note", "weights", f"{kept}; {constants.ENDPOINT} cannot be reached ({reason}): {way}"
            )
            return
    yield Finding("ok", "weights", f"{kept}; {constants.ENDPOINT} answers")


def _export() -> Iterator[Finding]:
    missing = [name for name in _EXPORT if find_spec(name) is None]
    if missing:
        yield Finding(
            "note", "export", f"no {', '.join(missing)}: pip install 'clbench[export]' for ONNX files"
        )
    else:
        yield Finding("ok", "export", f"ONNX Runtime {version('onnxruntime')}")


def _gb(size: float) -> str:
    """Bytes in GB, of 10^9."""
    return f"{size / 1e9:,.1f} GB"
