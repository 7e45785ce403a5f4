"""What Weights & Biases is told, read back from what it was written; and what a broken network costs: nothing."""

import http.server
import json
import os
import signal
import socket
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from random import Random
from typing import Any

import pytest
from conftest import ROOT, Train, command, run_directories

from clbench.config import wandb_mode
from clbench.metrics.curves import METRICS
from clbench.recording import dashboard
from clbench.recording.wandb import _answers, _records, history

SMALL = ("method=stfpm", "strategy=finetune", "method.epochs=3", "method.batch_size=2")
KEY = "0123456789abcdef0123456789abcdef01234567"
TASKS = ("brick", "cloth", "plate")


def fragments(directory: Path) -> list[Path]:
    return sorted(directory.glob("wandb/offline-run-*/*.wandb"))


def logged(directory: Path) -> list[dict[str, Any]]:
    return [values for path in fragments(directory) for values in history(path)]


def check_everything_once(directory: Path, epochs: int = 9) -> None:
    """One id, and every key of metrics.csv and of training, once per stage and task or epoch, at rising steps."""
    assert len({path.name for path in fragments(directory)}) == 1
    values = logged(directory)
    steps = [entry["_step"] for entry in values]
    assert steps == sorted(set(steps))
    counts = Counter(
        (key, entry.get("stage", entry.get("epoch")))
        for entry in values
        for key in entry
        if not key.startswith("_") and key not in ("stage", "epoch")
    )
    assert set(counts.values()) == {1}, [key for key, count in counts.items() if count > 1]
    for stage in range(3):
        for task in TASKS[: stage + 1]:
            assert (f"maps/{task}", stage) in counts
            assert {(f"{task}/{metric}", stage) for metric in METRICS} <= set(counts)
        assert {(f"mean/{metric}", stage) for metric in METRICS} <= set(counts)
        if stage:
            assert {(f"forgetting/{metric}", stage) for metric in METRICS} <= set(counts)
    assert {("training/loss", epoch) for epoch in range(epochs)} <= set(counts)
    assert {(f"R/{metric}", None) for metric in METRICS} <= set(counts)
    rows = [line.split(",") for line in (directory / "metrics.csv").read_text().splitlines()[1:]]
    found = {
        (entry["stage"], key): value
        for entry in values
        for key, value in entry.items()
        if "stage" in entry and "/" in key
    }
    for stage, _, task, metric, value in rows:
        assert f"{found[int(stage), f'{task}/{metric}']:.6f}" == value


def test_everything_is_logged_once_under_an_id_that_stays(train: Train, tmp_path: Path) -> None:
    result = train(*SMALL, "wandb=offline")
    assert result.returncode == 0, result.stderr
    (directory,) = run_directories(tmp_path)
    (fragment,) = fragments(directory)
    identity = json.loads((directory / "wandb" / "id.json").read_text())["id"]
    assert fragment.name == f"run-{identity}.wandb"
    assert f"W&B run {identity} is written, and not sent" in result.stdout
    assert "clbench.recording.wandb sync" in result.stdout
    check_everything_once(directory)
    pictures = list(fragment.parent.glob("files/media/images/maps/*.png"))
    assert len(pictures) == 2 * (1 + 2 + 3)
    assert not (directory / "wandb" / "pictures").exists()
    assert train(*SMALL, "wandb=offline").stdout.count("finished already") == 1
    assert fragments(directory) == [fragment]
    # Written over, it is another run.
    assert train(*SMALL, "wandb=offline", "overwrite=true").returncode == 0
    (anew,) = fragments(directory)
    assert anew.name != fragment.name
    check_everything_once(directory)


def test_what_a_killed_job_had_told_and_wandb_not_yet_written_is_told_again(
    folder: Path, tmp_path: Path
) -> None:
    """SLURM kills a job with all of its processes, wandb's too, which writes some seconds late."""
    words = command(folder, tmp_path, *SMALL, "wandb=offline", "checkpoint_s=0", "method.epochs=20")
    process = subprocess.Popen(words, cwd=ROOT, stdout=subprocess.DEVNULL, start_new_session=True)
    while not any(
        [*path.glob("checkpoint/learning-0001*.json")] for path in run_directories_or_none(tmp_path)
    ):
        assert process.poll() is None
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait(60)
    (directory,) = run_directories(tmp_path)
    assert not logged(directory)
    assert subprocess.run(words, cwd=ROOT, stdout=subprocess.DEVNULL, check=False).returncode == 0
    check_everything_once(directory, epochs=0)
    losses = {entry["epoch"] for entry in logged(directory) if "training/loss" in entry}
    assert {0, 20, 40} <= losses


def summary_keys(directory: Path) -> set[str]:
    """Keys of the summary that was written last."""
    from wandb.proto import wandb_internal_pb2

    keys = set()
    for path in fragments(directory):
        for content in _records(path.read_bytes()):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(content)
            keys |= {item.key or item.nested_key[0] for item in record.summary.update}
    return keys


def shown(node: Any) -> Iterator[str]:
    """Every key that a panel of a view's specification shows."""
    if isinstance(node, dict):
        for name, value in node.items():
            if name in ("metrics", "mediaKeys"):
                yield from value
            elif name in ("xAxis", "yAxis", "tableName", "table_name") and isinstance(value, str):
                yield value
            else:
                yield from shown(value)
    elif isinstance(node, list):
        for value in node:
            yield from shown(value)


def test_every_panel_of_the_dashboard_shows_what_a_run_logs(train: Train, tmp_path: Path) -> None:
    assert train(*SMALL, "wandb=offline").returncode == 0
    (directory,) = run_directories(tmp_path)
    keys = {key for values in logged(directory) for key in values} | summary_keys(directory)
    specification = dashboard.specification(dashboard.view("team", "clbench", "mine", list(TASKS)))
    panels = specification["spec"]["section"]["panelBankConfig"]["sections"]
    wanted = {key.removeprefix("summary:") for section in panels for key in shown(section["panels"])}
    assert {"mean/pixel_f1", "memory/additional_mb", "maps/plate", "training/loss"} <= wanted
    assert wanted <= keys, wanted - keys
    assert "R/pixel_f1" in json.dumps(panels) and "R/pixel_f1" in keys


def test_a_run_that_is_killed_logs_everything_once(folder: Path, tmp_path: Path) -> None:
    random = Random(0)
    for kills in range(40):
        words = command(folder, tmp_path, *SMALL, "wandb=offline", "checkpoint_s=0")
        process = subprocess.Popen(words, cwd=ROOT, stdout=subprocess.DEVNULL)
        wanted = kills // 2 + 1  # let it come further every other time
        try:
            while process.poll() is None and kills < 6:
                process.wait(random.uniform(0.05, 0.3))
                break
        except subprocess.TimeoutExpired:
            pass
        while process.poll() is None and kills < 6:
            done = sum(len(logged(path)) for path in run_directories_or_none(tmp_path))
            if done >= 3 * wanted:
                os.kill(process.pid, signal.SIGKILL)
                break
        process.wait(120)
        if process.returncode == 0:
            break
    (directory,) = run_directories(tmp_path)
    assert kills >= 4
    check_everything_once(directory)


def run_directories_or_none(outputs: Path) -> list[Path]:
    return run_directories(outputs) if (outputs / "outputs" / "default").is_dir() else []


@contextmanager
def answering(status: int, asked: list[str] | None = None) -> Iterator[str]:
    """The address of a server that has one answer to everything, and notes the paths it is asked for."""

    class Answering(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            if asked is not None:
                asked.append(self.path)
            self.send_error(status)

        do_GET = do_PUT = do_POST

        def log_message(self, *_: object) -> None: ...

    httpd = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Answering)
    threading.Thread(target=httpd.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{httpd.server_port}"
    httpd.shutdown()
    httpd.server_close()


@pytest.fixture(params=["refuses", "hangs", "answers errors"])
def server(request: pytest.FixtureRequest) -> Iterator[str]:
    """The address of a server that is no help."""
    if request.param == "answers errors":
        with answering(500) as address:
            yield address
        return
    listening = socket.socket()
    listening.bind(("127.0.0.1", 0))
    address = f"http://127.0.0.1:{listening.getsockname()[1]}"
    if request.param == "hangs":
        listening.listen(50)  # accepted by the system, and never answered
        yield address
        listening.close()
        return
    listening.close()
    yield address


def test_a_network_that_fails_loses_nothing(server: str, train: Train, tmp_path: Path) -> None:
    environment = {"WANDB_API_KEY": KEY, "WANDB_BASE_URL": server}
    result = train(*SMALL, "wandb=auto", environment=environment)
    assert result.returncode == 0, result.stderr
    assert "wandb=auto is online: a key is configured" in result.stdout
    assert "is not all sent: python -m clbench.recording.wandb sync" in result.stdout
    (directory,) = run_directories(tmp_path)
    check_everything_once(directory)
    for path in directory.rglob("*"):
        assert not path.is_file() or KEY.encode() not in path.read_bytes(), path
    assert not _answers(server)


def test_wandb_does_not_tell_its_server_of_itself_which_a_run_would_wait_for(
    train: Train, tmp_path: Path
) -> None:
    asked: list[str] = []
    with answering(500, asked) as address:
        result = train(*SMALL, "wandb=online", environment={"WANDB_API_KEY": KEY, "WANDB_BASE_URL": address})
    assert result.returncode == 0, result.stderr
    assert asked  # whether it answers, at least
    assert not [path for path in asked if "otel" in path]


def test_a_server_that_answers_is_told_from_one_that_does_not() -> None:
    with answering(404) as address:
        assert _answers(address)
    assert not _answers(address)
    assert not _answers("no address")


@pytest.mark.parametrize("mode", ["online", "offline", "disabled"])
def test_auto_is_what_the_environment_asks_for(monkeypatch: pytest.MonkeyPatch, mode: str) -> None:
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    monkeypatch.setenv("WANDB_MODE", mode)
    assert wandb_mode({"mode": "auto"}) == (mode, None)
    assert wandb_mode({"mode": "offline"}) == ("offline", None)


def test_online_needs_a_key_and_auto_says_what_it_does_without(
    train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    alone = {"NETRC": str(tmp_path / "none")}
    refused = train(*SMALL, "wandb=online", environment=alone)
    assert refused.returncode == 2 and "wandb=online needs a key: set WANDB_API_KEY" in refused.stderr
    result = train(*SMALL, "wandb=auto", environment=alone)
    assert result.returncode == 0 and "wandb=auto is offline: no key" in result.stdout
