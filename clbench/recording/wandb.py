"""A run in Weights & Biases: always written here first, and sent by a process of its own, for which nothing waits.

Each process that works on a run leaves a fragment in the run directory, `wandb/offline-run-<time>-<id>`. What the
fragments hold is read back before anything is logged, so that a run that is killed and continued logs everything
once, under one id. wandb writes some seconds late, and what it had yet to write goes with a killed job: so pictures,
which only the process that made them has, wait in `wandb/pictures` until the run is over.

    python -m clbench.recording.wandb sync DIR ...    send what is not sent yet, of runs or of whole experiments
"""

import argparse
import hashlib
import http.client
import json
import os
import shutil
import struct
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Hashable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from clbench.config import wandb_key
from clbench.errors import UserError
from clbench.metrics.continual import Matrix
from clbench.recording.recorder import Recorder
from clbench.recording.run_directory import write_whole

_GRACE, _LEAST_GRACE = 0.03, 10.0  # share of a run's time, and s, that its end may wait until all is sent
_PATIENCE = 1.5  # s until a server has answered, or is not waited for at all
_BLOCK, _HEADER = 32768, 7  # bytes; a .wandb file is a LevelDB log with a header of its own
_WHOLE, _LAST = 1, 4  # kinds of its pieces that end a record

# Lets others go first and asks Linux to end this process with the one that started it (PR_SET_PDEATHSIG, SIGTERM),
# then becomes another.
_END_WITH_PARENT = (
    "import ctypes, os, sys; sys.platform == 'linux' and (os.nice(10), ctypes.CDLL(None).prctl(1, 15)); "
    "os.execv(sys.executable, [sys.executable, *sys.argv[1:]])"
)


class WandbRun(Recorder):
    """A recorder that writes a run for Weights & Biases.

    Keys over `stage`: `<task>/<metric>`, `mean/<metric>`, `forgetting/<metric>`, `maps/<task>`; over `epoch`:
    `training/loss`; at the end, tables `R/<metric>`, and as summary `final/*`, `memory/*`, `time/*`.

    Args:
        directory: of the run, which has a config.yaml.
        settings: the `wandb` group, its mode `online` or `offline`.
        config: the run's, checked.
        tasks: names of the stream's.
    """

    def __init__(
        self, directory: Path, settings: Mapping[str, Any], config: Mapping[str, Any], tasks: Sequence[str]
    ):
        # wandb tells its server of itself as the process ends, and waits some 10 s for one that hangs.
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
        import wandb

        self._begun = time.perf_counter()
        self.folder = directory / "wandb"
        self._pictures = self.folder / "pictures"
        self.id = run_id(directory)
        self._logged, self._step = read_back(self.folder)
        self._run = wandb.init(
            mode="offline",
            dir=str(directory),
            id=self.id,
            name=directory.name,
            project=settings["project"],
            entity=settings["entity"],
            group=config["experiment"],
            tags=settings["tags"] or None,
            notes=settings["notes"],
            config=dict(config),
            resume="allow",
            settings=wandb.Settings(
                console="off",
                silent=True,
                disable_git=True,
                disable_code=True,
                x_disable_stats=True,
                x_disable_meta=True,
            ),
        )
        for over in ("stage", "epoch"):
            self._run.define_metric(over)
        for name in (*tasks, "mean", "forgetting", "maps"):
            self._run.define_metric(f"{name}/*", step_metric="stage", step_sync=False)
        self._run.define_metric("training/*", step_metric="epoch", step_sync=False)
        for waiting in sorted(self._pictures.glob("[0-9]*/*")):  # of a killed process
            self._log_pictures(int(waiting.parent.name), waiting.name)
        self._sender = _sender(Path(self._run.dir).parent) if settings["mode"] == "online" else None

    def epoch(self, stage: int, epoch: int, loss: float) -> None:
        self._log(("epoch", epoch), {"epoch": epoch, "training/loss": loss, "training/stage": stage})

    def pictures(self, stage: int, task: str, pictures: Sequence[np.ndarray]) -> None:
        from clbench.heat_maps import write_picture

        waiting = self._pictures / str(stage) / task
        if (f"maps/{task}", stage) in self._logged:
            return
        part = self._pictures / "part"
        shutil.rmtree(part, ignore_errors=True)
        for number, picture in enumerate(pictures):
            write_picture(part / f"{number}.png", picture)
        waiting.parent.mkdir(parents=True, exist_ok=True)
        part.rename(waiting)
        self._log_pictures(stage, task)

    def _log_pictures(self, stage: int, task: str) -> None:
        import wandb

        paths = sorted((self._pictures / str(stage) / task).glob("*.png"))
        images = [wandb.Image(str(path)) for path in paths]
        self._log((f"maps/{task}", stage), {"stage": stage, f"maps/{task}": images})

    def stage(self, stage: int, results: Mapping[str, Mapping[str, float | None]]) -> None:
        values = {
            f"{name}/{metric}": value
            for name, metrics in results.items()
            for metric, value in metrics.items()
            if value is not None
        }
        self._log(("stage", stage), {"stage": stage, **values})

    def finish(self, summary: Mapping[str, Any], matrices: Mapping[str, Matrix]) -> str | None:
        import wandb

        columns = ["stage", *summary["tasks"]]
        tables = {
            f"R/{metric}": wandb.Table(columns=columns, data=[[stage, *row] for stage, row in enumerate(R)])
            for metric, R in matrices.items()
        }
        self._log(("R",), tables)
        for group in ("final", "forgetting", "memory", "time"):
            self._run.summary.update({f"{group}/{key}": value for key, value in summary[group].items()})
        self._run.summary["average_forgetting_pct"] = summary["average_forgetting_pct"]
        self._run.finish()
        shutil.rmtree(self._pictures, ignore_errors=True)
        if self._sender is None:
            return f"W&B run {self.id} is written, and not sent: {_command(self.folder)} sends it"
        if self._sender.poll() is None and _answers(self._run.settings.base_url):
            with suppress(subprocess.TimeoutExpired):
                self._sender.wait(max(_LEAST_GRACE, _GRACE * (time.perf_counter() - self._begun)))
        if self._sender.poll() == 0:
            return None
        self._sender.terminate()
        return f"W&B run {self.id} is not all sent: {_command(self.folder)} sends the rest"

    def _log(self, what: Hashable, values: dict[str, Any]) -> None:
        """Log once, however often a run comes by here."""
        if what in self._logged:
            return
        self._run.log(values, step=self._step)
        self._logged.add(what)
        self._step += 1


def run_id(directory: Path) -> str:
    """A run's id in Weights & Biases: the same for as long as its directory is, wherever it goes."""
    place = directory / "wandb" / "id.json"
    with suppress(OSError, ValueError, KeyError):
        return json.loads(place.read_text())["id"]
    made = hashlib.sha256(f"{directory.resolve()} {time.time_ns()}".encode()).hexdigest()[:16]
    write_whole(place, lambda part: part.write_text(json.dumps({"id": made}) + "\n"))
    return made


def read_back(folder: Path) -> tuple[set[Hashable], int]:
    """What the fragments in a run's wandb/ have logged, and the next step."""
    logged: set[Hashable] = set()
    step = 0
    for path in sorted(folder.glob("*run-*/*.wandb")):
        for values in history(path):
            step = max(step, int(values["_step"]) + 1)
            maps = next((key for key in values if key.startswith("maps/")), None)
            if maps is not None:
                logged.add((maps, values["stage"]))
            elif "epoch" in values:
                logged.add(("epoch", values["epoch"]))
            elif "stage" in values:
                logged.add(("stage", values["stage"]))
            else:
                logged.add(("R",))
    return logged, step


def history(path: Path) -> Iterator[dict[str, Any]]:
    """What was logged into a .wandb file, a dictionary a step, up to where it ends or was cut off."""
    from wandb.proto import wandb_internal_pb2

    for content in _records(path.read_bytes()):
        record = wandb_internal_pb2.Record()  # type: ignore[attr-defined]
        record.ParseFromString(content)
        if record.WhichOneof("record_type") == "history":
            values: dict[str, Any] = {}
            for item in record.history.item:
                name, *rest = [item.key] if item.key else item.nested_key
                value = json.loads(item.value_json)
                if rest:
                    values.setdefault(name, {})[".".join(rest)] = value
                else:
                    values[name] = value
            yield values


def _records(content: bytes) -> Iterator[bytes]:
    """The records of a LevelDB log: pieces of at most a block, each with checksum, length and kind before it."""
    position, record = _HEADER, b""
    while True:
        if _BLOCK - position % _BLOCK < _HEADER:
            position += _BLOCK - position % _BLOCK
        if position + _HEADER > len(content):
            return
        _, length, kind = struct.unpack_from("<IHB", content, position)
        position += _HEADER
        if kind == 0 or position + length > len(content):
            return  # room taken and not written yet, or cut off
        record += content[position : position + length]
        position += length
        if kind in (_WHOLE, _LAST):
            yield record
            record = b""


def _sender(fragment: Path) -> subprocess.Popen:
    """A process that sends a fragment while it is being written, and does not outlive this one."""
    words = ["-m", "wandb", "beta", "sync", "--live", "--yes", str(fragment)]
    with open(fragment / "sending.log", "w") as log:
        return subprocess.Popen(
            [sys.executable, "-c", _END_WITH_PARENT, *words],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            env={**os.environ, "WANDB_DIR": str(fragment)},
        )


def _answers(address: str) -> bool:
    """Whether a server soon says anything but an error of its own."""
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


def _command(folder: Path) -> str:
    return f"python -m clbench.recording.wandb sync {folder.parent}"


def sync(folders: Sequence[Path]) -> int:
    """Send what is not sent yet of runs or experiments; the exit status of wandb, which does it.

    Raises:
        UserError: there is nothing to send, or no key to send it with.
    """
    places = sorted({path for folder in folders for path in folder.rglob("wandb") if path.is_dir()})
    if not places:
        raise UserError(f"{', '.join(map(str, folders))}: no runs of W&B there; give outputs/EXPERIMENT")
    if not wandb_key():
        raise UserError("sending needs a key: set WANDB_API_KEY or run wandb login")
    print("sending; a server that cannot be reached is tried again until Ctrl-C", flush=True)
    words = [sys.executable, "-m", "wandb", "beta", "sync", "--yes", *map(str, places)]
    with tempfile.TemporaryDirectory() as folder:
        return subprocess.call(words, env={**os.environ, "WANDB_DIR": folder})


def main() -> None:
    """The command; see the module's text."""
    about, _, _ = (__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser(prog="python -m clbench.recording.wandb", description=about)
    commands = parser.add_subparsers(required=True)
    sending = commands.add_parser("sync", help="send what is not sent yet")
    sending.add_argument("folders", nargs="+", type=Path, help="of runs, or of whole experiments")
    try:
        sys.exit(sync(parser.parse_args().folders))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
