"""Sending runs to a server of Weights & Biases, by processes of `wandb beta sync`.

A fragment is a folder that wandb writes in the run directory, `wandb/offline-run-<time>-<id>`, with one `.wandb` file.
wandb puts an empty file `.wandb.synced` beside it when all of it is sent. Sending a fragment twice does no harm: a
server gets the same values at the same steps of the same run.
"""

import http.client
import os
import subprocess
import sys
import tempfile
import threading
import urllib.error
import urllib.request
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from clbench.errors import UserError, counted

_PATIENCE = 1.5  # s that a server has to answer; one that takes longer is not waited for

# Not yet a stable part of wandb's command line. `--live`, and the marker of what is sent, are there from 0.24.1 on.
_SYNC = ("-m", "wandb", "beta", "sync")

# Lets others go first and asks Linux to end this process with the one that started it (PR_SET_PDEATHSIG, SIGTERM),
# then becomes another.
_END_WITH_PARENT = (
    "import ctypes, os, sys; sys.platform == 'linux' and (os.nice(10), ctypes.CDLL(None).prctl(1, 15)); "
    "os.execv(sys.executable, [sys.executable, *sys.argv[1:]])"
)


def own_folders(folder: Path) -> dict[str, str]:
    """The environment in which wandb writes into a folder alone, and reads the user's own settings.

    The settings, in the home folder, may name a server. Where there are none, they are looked for in the folder too.
    """
    inside = {
        "WANDB_DATA_DIR": str(folder),  # whose artifacts/staging has the files of tables until they are sent
        "WANDB_CACHE_DIR": str(folder / "cache"),
        "WANDB_ARTIFACT_DIR": str(folder / "artifacts"),
    }
    with suppress(OSError, RuntimeError):  # a home folder that there is not, or that may not be read
        if (Path(os.environ.get("WANDB_CONFIG_DIR", "~/.config/wandb")).expanduser() / "settings").is_file():
            return inside
    return {**inside, "WANDB_CONFIG_DIR": str(folder / "config")}


def fragments(folder: Path) -> list[Path]:
    """The fragments in the folder `wandb` of a run directory, oldest first."""
    return sorted(folder.glob("offline-run-*"))


def sent(fragment: Path) -> bool:
    """Whether wandb has sent all of a fragment, and nothing was written into it since."""
    return all(_sent(file) for file in fragment.glob("*.wandb"))


def _sent(file: Path) -> bool:
    marker = file.with_suffix(".wandb.synced")
    return marker.exists() and marker.stat().st_mtime >= file.stat().st_mtime


def send_live(fragment: Path) -> subprocess.Popen:
    """Start a process that sends a fragment while it is being written, and does not outlive this one."""
    with open(fragment / "sending.log", "w", encoding="utf-8") as log:
        return subprocess.Popen(
            [sys.executable, "-c", _END_WITH_PARENT, *_SYNC, "--live", str(fragment)],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            env={**os.environ, **own_folders(fragment.parent), "WANDB_DIR": str(fragment)},
        )


def answers(address: str) -> bool:
    """Whether the server at an address answers within 1.5 s, and with anything but a server error (5xx)."""
    answered = False

    def ask() -> None:
        nonlocal answered
        try:
            urllib.request.urlopen(address, timeout=_PATIENCE).close()
        except urllib.error.HTTPError as error:
            answered = error.code < 500
        except (OSError, ValueError, http.client.HTTPException):
            return
        else:
            answered = True

    asking = threading.Thread(target=ask, daemon=True)  # a name may take longer to look up than any timeout
    asking.start()
    asking.join(_PATIENCE)
    return answered


def sync(folders: Sequence[Path]) -> None:
    """Send what is not sent yet of runs.

    Args:
        folders: run directories, or folders of run directories at any depth.

    Raises:
        UserError: there are no runs of W&B there, or not all could be sent.
    """
    files = sorted({file for folder in folders for file in folder.rglob("wandb/offline-run-*/*.wandb")})
    if not files:
        raise UserError(f"{', '.join(map(str, folders))}: no runs of W&B there; give outputs/EXPERIMENT")
    for file in files:
        if not _sent(file):
            # A marker that is older than the file would make wandb skip it.
            file.with_suffix(".wandb.synced").unlink(missing_ok=True)
    print("sending; a server that cannot be reached is tried again until Ctrl-C", flush=True)
    with tempfile.TemporaryDirectory() as logs:
        environment = {**os.environ, **own_folders(Path(logs)), "WANDB_DIR": logs}
        folders = list(dict.fromkeys(file.parent.parent for file in files))
        subprocess.call([sys.executable, *_SYNC, *map(str, folders)], env=environment)
        unsent = [file for file in files if not _sent(file)]
        # One file that wandb cannot read keeps it from sending any other: what is left is sent one by one.
        for file in unsent if len(files) > 1 else []:
            subprocess.call([sys.executable, *_SYNC, str(file)], env=environment)
    if unsent := [file for file in unsent if not _sent(file)]:
        raise UserError(
            f"{len(unsent)} of {counted(len(files), 'run')} could not all be sent, {unsent[0].parent.parent.parent} for one: "
            "see above what W&B says; a run that was killed can be sent when it is continued"
        )
