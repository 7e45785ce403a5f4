"""What Weights & Biases is told, as a server of it gets it; and what a broken network costs: nothing."""

import asyncio
import errno
import http.server
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest
import wandb
from conftest import ROOT, Train, clbench, command, run_directories
from processes import CONTEXT
from wandb.proto import wandb_internal_pb2
from wandb_server import Server, serving
from wandb_server import records as fragment_records

from clbench.commands.run import main
from clbench.config import wandb_mode
from clbench.errors import UserError
from clbench.interruption import Stopped
from clbench.metrics.names import USUAL
from clbench.recording import dashboard
from clbench.recording import wandb as recording
from clbench.recording.completing import complete
from clbench.recording.recorder import Recorder, Surviving
from clbench.recording.run_directory import RunDirectory
from clbench.recording.sending import answers, sync
from clbench.recording.wandb import WandbRun

SMALL = ("method=stfpm", "strategy=finetune", "method.epochs=3", "method.batch_size=2")
KEY = "0123456789abcdef0123456789abcdef01234567"
TASKS = ("brick", "cloth", "plate")


def fragments(directory: Path) -> list[Path]:
    return sorted(directory.glob("wandb/offline-run-*/*.wandb"))


def receive(directory: Path) -> Server:
    """A server that is sent all of a run directory, or of a folder of them; they stay as they were."""
    with serving() as server, tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        copy = shutil.copytree(directory, Path(folder) / directory.name, symlinks=True)
        for marker in copy.rglob("*.synced"):
            marker.unlink()
        patch.setenv("WANDB_BASE_URL", server.address)
        patch.setenv("WANDB_API_KEY", KEY)
        complete([copy])
        sync([copy])
        return server


def logged(directory: Path) -> list[dict[str, Any]]:
    """The history that a server gets of a run, in the order of its lines."""
    (lines,) = receive(directory).history.values()
    return lines


def check_everything_once(directory: Path, epochs: int = 9, pictures: bool = True) -> None:
    """One id, and every key of metrics.csv and of training, once per stage and task or epoch, at rising steps."""
    values = logged(directory)
    steps = [entry["_step"] for entry in values]
    assert steps == list(range(len(values)))
    counts = Counter(
        (key, entry.get("stage", entry.get("epoch")))
        for entry in values
        for key in entry
        if not key.startswith("_") and key not in ("stage", "epoch")
    )
    assert set(counts.values()) == {1}, [key for key, count in counts.items() if count > 1]
    for stage in range(3):
        for task in TASKS[: stage + 1]:
            assert ((f"maps/{task}", stage) in counts) == pictures
            assert {(f"{task}/{metric}", stage) for metric in USUAL} <= set(counts)
        assert {(f"mean/{metric}", stage) for metric in USUAL} <= set(counts)
        if stage:
            assert {(f"forgetting/{metric}", stage) for metric in USUAL} <= set(counts)
    assert {("training/loss", epoch) for epoch in range(epochs)} <= set(counts)
    assert {(f"R/{metric}", None) for metric in USUAL} <= set(counts)
    rows = [line.split(",") for line in (directory / "metrics.csv").read_text().splitlines()[1:]]
    found = {
        (entry["stage"], key): value
        for entry in values
        for key, value in entry.items()
        if "stage" in entry and "/" in key
    }
    for stage, _, task, *_, metric, value in rows:
        assert f"{found[int(stage), f'{task}/{metric}']:.6f}" == value


# Whole runs of train.py.


@pytest.fixture(scope="module")
def finished(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The directory of a finished run that is not sent, and what the run said."""
    outputs = tmp_path_factory.mktemp("finished")
    words = command(folder, outputs, *SMALL, "wandb=offline")
    result = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    (directory,) = run_directories(outputs)
    return directory, result.stdout


def test_everything_is_logged_once_under_an_id_that_stays(finished: tuple[Path, str]) -> None:
    directory, said = finished
    (fragment,) = fragments(directory)
    identity = json.loads((directory / "wandb" / "id.json").read_text())["id"]
    assert fragment.name == f"run-{identity}.wandb"
    assert f"W&B run {identity} is written, and not sent" in said
    assert "clbench wandb sync" in said
    check_everything_once(directory)
    pictures = list(fragment.parent.glob("files/media/images/maps/*.png"))
    assert len(pictures) == 2 * (1 + 2 + 3)


def test_a_killed_run_is_told_whole_when_it_is_continued_and_sent_when_it_is_online(
    folder: Path, tmp_path: Path
) -> None:
    """SLURM kills a job with all of its processes, wandb's too, which writes some seconds late."""
    words = command(folder, tmp_path, *SMALL, "checkpoint_s=0", "method.epochs=6")
    process = subprocess.Popen(
        [*words, "wandb=offline"], cwd=ROOT, stdout=subprocess.DEVNULL, start_new_session=True
    )
    # Until the second training is under way.
    while not any(path.read_bytes().count(b"\n") > 10 for path in tmp_path.rglob("wandb/logged.jsonl")):
        assert process.poll() is None
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait(60)
    (directory,) = run_directories(tmp_path)
    assert "complete" not in (directory / "summary.json").read_text()
    with serving() as server:
        result = subprocess.run(
            [*words, "wandb=auto"],
            cwd=ROOT,
            capture_output=True,
            text=True,
            env={**os.environ, "WANDB_API_KEY": KEY, "WANDB_BASE_URL": server.address},
            check=False,
        )
        assert result.returncode == 0, result.stderr
        assert "wandb=auto is online: a key is configured" in result.stdout
        assert "sent" not in result.stdout
        ((identity, lines),) = server.history.items()
        assert identity == json.loads((directory / "wandb" / "id.json").read_text())["id"]
        assert server.config[identity]["seed"]["value"] == 0
        pictures = [name for name in server.files if name.startswith("media/images/maps/")]
        assert len(pictures) == 2 * (1 + 2 + 3)
        # wandb would tell its server of itself as the process ends, and wait for one that hangs.
        assert not [path for path in server.asked if "otel" in path]
    assert len(fragments(directory)) == 1
    assert plain(lines) == plain(logged(directory))
    check_everything_once(directory, epochs=0)
    assert {0, 6, 12} <= {line["epoch"] for line in lines if "training/loss" in line}


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


def test_every_panel_of_the_dashboard_shows_what_a_run_logs(finished: tuple[Path, str]) -> None:
    server = receive(finished[0])
    ((_, lines),) = server.history.items()
    keys = {key for values in [*lines, *server.summary.values()] for key in values}
    specification = dashboard.specification(dashboard.view("team", "clbench", "mine", list(TASKS)))
    panels = specification["spec"]["section"]["panelBankConfig"]["sections"]
    wanted = {key.removeprefix("summary:") for section in panels for key in shown(section["panels"])}
    assert {"mean/pixel_f1", "memory/additional_mb", "maps/plate", "training/loss"} <= wanted
    assert wanted <= keys, wanted - keys
    assert "R/pixel_f1" in json.dumps(panels) and "R/pixel_f1" in keys


# A recorder that is told of a small stream, in processes of its own that can be killed.

CATEGORIES = ("left", "right")
CONFIG = {"experiment": "mine", "seed": 0}
PICTURE = np.arange(48, dtype=np.uint8).reshape(4, 4, 3)


def settings(mode: str) -> dict[str, Any]:
    return {"mode": mode, "project": "clbench", "entity": None, "tags": ["tried"], "notes": None}


def tell(directory: Path, mode: str) -> str | None:
    """Tell all of a run of 2 stages and 2 categories, as a run does it that is continued after its last stage."""
    recorder = WandbRun(directory, settings(mode), CONFIG, CATEGORIES)
    assert recorder.wants_pictures
    for stage in range(2):
        for epoch in range(2):
            recorder.epoch(stage, 2 * stage + epoch, 1 / (3 + 2 * stage + epoch))
        for number, name in enumerate(CATEGORIES[: stage + 1]):
            recorder.pictures(stage, name, [PICTURE + 10 * stage + number])
        recorder.stage(stage, {"left": {"f1": 0.1 + stage}, "mean": {"f1": 1 / 7, "ap": None}})
    summary = {
        "tasks": ["left+right"],
        "categories": [["left", "right"]],
        "average_forgetting_pct": 1.5,
        **{group: {"f1": 0.5} for group in ("final", "forgetting", "memory", "time")},
    }
    return recorder.finish(summary, {"f1": [[0.1, None], [1.1, 0.2]]})


EXPECTED = [
    {"epoch": 0, "training/loss": 1 / 3, "training/stage": 0},
    {"epoch": 1, "training/loss": 1 / 4, "training/stage": 0},
    {"stage": 0, "maps/left": 1},
    {"stage": 0, "left/f1": 0.1, "mean/f1": 1 / 7},
    {"epoch": 2, "training/loss": 1 / 5, "training/stage": 1},
    {"epoch": 3, "training/loss": 1 / 6, "training/stage": 1},
    {"stage": 1, "maps/left": 1},
    {"stage": 1, "maps/right": 1},
    {"stage": 1, "left/f1": 1.1, "mean/f1": 1 / 7},
    {"R/f1": ["stage", "left", "right"]},
]


def plain(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Lines of history without times, the number of pictures in place of each list of them, and no more of tables."""

    def value(found: Any) -> Any:
        kind = found.get("_type") if isinstance(found, dict) else None
        if kind == "images/separated":
            return found["count"]
        return ["stage", *CATEGORIES][: found["ncols"]] if kind == "table-file" else found

    return [{key: value(found) for key, found in line.items() if not key.startswith("_")} for line in lines]


def apart(directory: Path, mode: str = "offline", before: Callable[[], object] | None = None) -> str | None:
    """Call `tell` in a process of its own, after `before`; returns what it said, or `killed`."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.setsid()
        try:
            if before is not None:
                before()
            os.write(writing, (tell(directory, mode) or "nothing").encode())
            os._exit(0)
        finally:  # where an exception came before
            traceback.print_exc()
            os._exit(1)
    os.close(writing)
    _, status = os.waitpid(child, 0)
    with open(reading, encoding="utf-8") as said:
        text = said.read()
    if os.WIFSIGNALED(status):
        return "killed"
    assert os.WEXITSTATUS(status) == 0
    return None if text == "nothing" else text


def die() -> None:
    """As a job does that SLURM kills: with wandb's process, which has most still to write."""
    os.killpg(0, signal.SIGKILL)


def in_any_order(lines: list[dict[str, Any]]) -> list[str]:
    return sorted(json.dumps(line, sort_keys=True) for line in lines)


def check_told(directory: Path) -> None:
    """A server gets all that was told, once, from the one fragment there is; and nothing waits."""
    assert len(fragments(directory)) == 1
    server = receive(directory)
    ((identity, lines),) = server.history.items()
    assert identity == json.loads((directory / "wandb" / "id.json").read_text())["id"]
    assert [line["_step"] for line in lines] == list(range(len(EXPECTED)))
    assert in_any_order(plain(lines)) == in_any_order(EXPECTED)
    summary = server.summary[identity]
    assert (summary["final/f1"], summary["average_forgetting_pct"]) == (0.5, 1.5)
    assert len([name for name in server.files if name.startswith("media/images/maps/")]) == 3


def test_a_recorder_that_is_told_of_a_run(tmp_path: Path) -> None:
    said = apart(tmp_path)
    assert said and "is written, and not sent: clbench wandb sync" in said
    check_told(tmp_path)
    assert plain(logged(tmp_path)) == EXPECTED


def before_step(number: int, dies: Callable[[WandbRun], object]) -> None:
    """Have the process die when it has written a line of the file, and wandb is not yet told of it."""
    tell_wandb = WandbRun._tell
    WandbRun._tell = lambda self, step, line: (dies if step == number else tell_wandb)(self, step, line)  # type: ignore


def _after_a_line_before_wandb() -> None:
    before_step(4, lambda *_: die())


def _pictures_wait_without_a_line() -> None:
    log = WandbRun._log
    WandbRun._log = lambda self, *what: die() if what[:2] == ("maps/right", 1) else log(self, *what)  # type: ignore


def _while_pictures_are_written() -> None:
    recording.write_picture = lambda *_: die()  # type: ignore[assignment]


def _after_wandb_finished() -> None:
    end = WandbRun._end
    WandbRun._end = lambda self, *what: (end(self, *what), die())  # type: ignore


@pytest.mark.parametrize(
    "killing",
    [
        _after_a_line_before_wandb,
        _pictures_wait_without_a_line,
        pytest.param(_while_pictures_are_written, marks=pytest.mark.long),
        pytest.param(_after_wandb_finished, marks=pytest.mark.long),
    ],
)
def test_killed_between_the_file_and_wandb(killing: Callable[[], None], tmp_path: Path) -> None:
    assert apart(tmp_path, before=killing) == "killed"
    assert apart(tmp_path) != "killed"
    check_told(tmp_path)


def test_a_run_of_before_there_was_our_own_file_is_told_whole(tmp_path: Path) -> None:
    """Its fragment and pictures are there; what was logged is told again by the run."""
    assert apart(tmp_path, before=_after_wandb_finished) == "killed"
    (tmp_path / "wandb" / "logged.jsonl").unlink()
    assert apart(tmp_path) != "killed"
    check_told(tmp_path)


def test_a_run_that_is_written_over_is_another_run(tmp_path: Path) -> None:
    identity = recording.run_id(tmp_path)
    assert recording.run_id(tmp_path) == identity
    RunDirectory(tmp_path).clear()
    assert recording.run_id(tmp_path) != identity


def kill_at(event: int) -> Callable[[], None]:
    """Dies before the given line of recording/wandb.py is executed, counted from now."""
    left = event

    def trace(frame: Any, what: str, _: object) -> Any:
        nonlocal left
        if not frame.f_code.co_filename.endswith("recording/wandb.py"):
            return None
        left -= what == "line"
        if left <= 0:
            die()
        return trace

    return lambda: sys.settrace(trace)


def test_a_run_that_is_killed_at_any_line_logs_everything_once(tmp_path: Path) -> None:
    seed = int(os.environ.get("CLBENCH_TEST_SEED", time.time()))
    print(f"moments drawn from CLBENCH_TEST_SEED={seed}")
    random = Random(seed)
    killed = 0
    for reach in range(110, 661, 110):  # 638 lines are executed where nothing is killed
        killed += apart(tmp_path, before=kill_at(random.randrange(reach - 110, reach))) == "killed"
    assert killed >= 4
    assert apart(tmp_path) != "killed"
    check_told(tmp_path)


@pytest.mark.long
def test_a_server_gets_the_same_again_of_a_run_that_was_killed_and_sent_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed offline and sent, killed online when it was sent, continued online to its end."""

    def written_then_killed(recorder: WandbRun, *_: object) -> None:
        recorder._run.finish()  # wandb writes some 15 s late otherwise
        if recorder._sender is not None:
            recorder._sender.wait(60)
        die()

    with serving() as server:
        monkeypatch.setenv("WANDB_API_KEY", KEY)
        monkeypatch.setenv("WANDB_BASE_URL", server.address)
        assert apart(tmp_path, "offline", lambda: before_step(4, written_then_killed)) == "killed"
        sync([tmp_path])
        (lines,) = server.history.values()
        assert plain(lines) == EXPECTED[:4]
        assert apart(tmp_path, "online", lambda: before_step(7, written_then_killed)) == "killed"
        assert plain(lines) == EXPECTED[:4] + EXPECTED[:7]
        assert apart(tmp_path, "online") is None
        assert plain(lines) == EXPECTED[:4] + EXPECTED[:7] + EXPECTED
        assert [line["_step"] for line in lines] == [*range(4), *range(7), *range(10)]
        # What is sent is not sent again; what was written since it was sent, is.
        asked = len(server.asked)
        sync([tmp_path])
        assert len(server.asked) == asked
        os.utime(fragments(tmp_path)[0])
        sync([tmp_path])
        assert len(server.asked) > asked
    check_told(tmp_path)


# Recorders that fail.


class Failing(Recorder):
    """Fails at one of the calls."""

    wants_pictures = True

    def __init__(self, call: str, error: BaseException):
        self.told: list[str] = []

        def fail(*_: object) -> None:
            self.told.append(call)
            raise error

        setattr(self, call, fail)
        if call == "__init__":
            fail()


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        wandb.errors.CommError("the server is gone\nand more"),
        SystemExit(3),
        asyncio.CancelledError(),
        UserError("wandb/id.json cannot be written"),
    ],
)
@pytest.mark.parametrize("call", ["__init__", "epoch", "pictures", "stage", "missing", "finish"])
def test_what_a_recorder_raises_is_said_once_and_ends_nothing(call: str, error: BaseException) -> None:
    said: list[str] = []
    recorder = Surviving(lambda: Failing(call, error), "W&B", "sync completes it", said.append)
    for _ in range(2):
        recorder.epoch(0, 0, 0.5)
        recorder.pictures(0, "left", [PICTURE])
        recorder.stage(0, {})
    if call == "missing":
        assert recorder.missing()
    assert recorder.finish({}, {}) is None
    assert len(said) == 1 and "\n" not in said[0] and recorder.missing() == said[0]
    assert str(error).partition("\n")[0] in said[0] and said[0].endswith("; sync completes it")
    assert not recorder.wants_pictures


@pytest.mark.parametrize("error", [KeyboardInterrupt(), Stopped(signal.SIGTERM)])
def test_what_stops_a_run_passes_through_its_recorder(error: BaseException) -> None:
    recorder = Surviving(lambda: Failing("stage", error), "W&B", "", print)
    with pytest.raises(type(error)):
        recorder.stage(0, {})
    assert recorder.missing() is None


@pytest.mark.parametrize("call", ["stage", "finish"])
def test_runs_whose_recorder_fails_are_complete_and_say_so(
    call: str, train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recording, "WandbRun", lambda *_: Failing(call, OSError("the disk is gone")))
    words = ("-m", "strategy=native,finetune", "wandb=offline", "task_order.tasks=[brick,cloth]")
    result = train(*words)
    assert result.returncode == 0 and "Traceback" not in result.stderr
    said = (
        "W&B failed, and has not all of this run (OSError: the disk is gone); clbench wandb sync completes it"
    )
    for directory in run_directories(tmp_path):
        about = json.loads((directory / "summary.json").read_bytes())
        assert (about["status"], about["not_recorded"]) == ("complete", said)
        each = len(about["final"])
        assert (directory / "metrics.csv").read_bytes().count(b"\n") == 1 + 3 * each and each >= len(USUAL)
    assert result.stdout.count("\nW&B failed") == 2
    again = train(*words).stdout
    assert again.count("finished already") == 2 and f"strategy=native: {said}" in again


def _killed_when_it_is_complete(words: list[str]) -> None:
    def die_at_the_end(recorder: WandbRun, *_: object) -> None:
        (directory,) = recorder.folder.parents[1].iterdir()
        assert json.loads((directory / "summary.json").read_bytes())["status"] == "complete"
        os.kill(os.getpid(), signal.SIGKILL)

    os.chdir(ROOT)
    WandbRun.finish = die_at_the_end  # type: ignore[method-assign,assignment]
    main(words)


@pytest.mark.long
def test_a_run_that_was_killed_after_its_summary_is_completed_where_it_was_moved_to(
    folder: Path, train: Train, tmp_path: Path
) -> None:
    words = command(folder, tmp_path, *SMALL, "wandb=offline")[2:]
    process = CONTEXT.Process(target=_killed_when_it_is_complete, args=(words,))
    process.start()
    process.join(120)
    assert process.exitcode == -signal.SIGKILL
    (directory,) = run_directories(tmp_path)
    before = json.loads((directory / "summary.json").read_bytes())
    assert (
        before.pop("not_recorded")
        == "W&B is not told of the end of this run; clbench wandb sync completes it"
    )
    assert "finished already" in train(*SMALL, "wandb=offline").stdout
    moved = directory.rename(tmp_path / "moved")
    send(moved)
    assert json.loads((moved / "summary.json").read_bytes()) == before
    check_everything_once(moved)
    # Had W&B failed at once, nothing would be there, and heat maps could not be made again.
    shutil.rmtree(moved / "wandb")
    (moved / "summary.json").write_text(json.dumps({**before, "not_recorded": "W&B failed"}))
    send(moved)
    after = json.loads((moved / "summary.json").read_bytes())
    assert "may lack heat maps" in after.pop("not_recorded") and after == before
    check_everything_once(moved, pictures=False)


def _whose_wandb_dies(words: list[str], step: int) -> None:
    """A run whose own process lives on, as where SLURM's scancel ends all of a job and the job takes a while to."""

    def end_wandb(recorder: WandbRun, *_: object) -> None:
        children = Path(f"/proc/self/task/{os.getpid()}/children").read_text(encoding="ascii").split()
        assert children
        for child in map(int, children):
            os.kill(child, signal.SIGKILL)
            with suppress(ChildProcessError):
                os.waitpid(child, 0)

    def after_its_death(recorder: WandbRun, *what: Any) -> None:
        end_wandb(recorder)
        end(recorder, *what)

    tell_wandb, end = WandbRun._tell, WandbRun._end

    def tell(recorder: WandbRun, number: int, line: Any) -> None:
        if number == step:
            end_wandb(recorder)
        tell_wandb(recorder, number, line)

    os.chdir(ROOT)
    WandbRun._tell = tell  # type: ignore[method-assign]
    if step < 0:
        WandbRun._end = after_its_death  # type: ignore[method-assign]
    main(words)


@pytest.mark.parametrize(
    "step",
    [
        pytest.param(0, id="first", marks=pytest.mark.long),
        pytest.param(5, id="middle"),
        pytest.param(-1, id="end", marks=pytest.mark.long),
    ],
)
def test_a_run_whose_wandb_dies_is_complete_and_lacks_nothing_after_sync(
    step: int, folder: Path, tmp_path: Path
) -> None:
    process = CONTEXT.Process(
        target=_whose_wandb_dies, args=(command(folder, tmp_path, *SMALL, "wandb=offline")[2:], step)
    )
    process.start()
    process.join(120)
    assert process.exitcode == 0
    (directory,) = run_directories(tmp_path)
    about = json.loads((directory / "summary.json").read_bytes())
    assert about["status"] == "complete"
    assert about["not_recorded"] == "W&B is not told of the end of this run; clbench wandb sync completes it"
    send(directory)
    assert "not_recorded" not in json.loads((directory / "summary.json").read_bytes())
    check_everything_once(directory)


@pytest.mark.long
def test_a_run_that_was_moved_is_sent_whole(train: Train, tmp_path: Path) -> None:
    """As to a machine that has a network: nothing is where it was when it was written."""
    assert train(*SMALL, "wandb=offline").returncode == 0
    (directory,) = run_directories(tmp_path)
    moved = directory.rename(tmp_path / "moved")
    send(moved)
    check_everything_once(moved)


def send(directory: Path) -> None:
    """Call clbench wandb sync without a home folder; all tables of R arrive."""
    with serving() as server:
        result = subprocess.run(
            [sys.executable, "-m", "clbench.cli", "wandb", "sync", str(directory)],
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=False,
            env={
                **os.environ,
                "WANDB_API_KEY": KEY,
                "WANDB_BASE_URL": server.address,
                "HOME": "/proc/nothing",
            },
        )
        assert result.returncode == 0, result.stderr
        assert {f"artifact/R/{metric}.table.json" for metric in USUAL} <= server.files


def test_runs_of_a_process_write_into_their_own_directories_alone(process: Train, tmp_path: Path) -> None:
    """Also after one that failed; with a full home folder, where one can be made; and with names that are too long."""
    home = tmp_path / "home"
    home.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=4k,nr_inodes=1", "tmpfs", str(home)]
    mounted = os.geteuid() == 0 and subprocess.run(mount, check=False, capture_output=True).returncode == 0
    experiment = "e" * 150
    try:
        result = process(
            *("-m", *SMALL, "method.epochs=1", "method.learning_rate=1e30,0.1,0.2", "wandb=offline"),
            *(f"experiment={experiment}", "task_order.tasks=[brick,cloth]"),
            environment={"HOME": str(home if mounted else home / "none")},
        )
        assert not list(home.iterdir())
    finally:
        if mounted:
            subprocess.run(["umount", str(home)], check=True)
    assert result.returncode == 1 and result.stderr.count("error:") == 1, result.stderr  # of 1e30
    names = []
    for directory in run_directories(tmp_path, experiment):
        summary = json.loads((directory / "summary.json").read_bytes())
        assert "not_recorded" not in summary
        staged_files = list(directory.glob("wandb/artifacts/staging/tmp*"))
        assert len(staged_files) == (14 if summary["status"] == "complete" else 0)
        assert list(directory.glob("wandb/cache/wandb/logs/core-debug-*"))
        (fragment,) = fragments(directory)
        identity = json.loads((directory / "wandb" / "id.json").read_bytes())["id"]
        assert fragment.stem == f"run-{identity}"
        records = [
            wandb_internal_pb2.Record.FromString(one) for one in fragment_records(fragment.read_bytes())
        ]
        (run,) = [record.run for record in records if record.HasField("run")]
        names.append(run.display_name)
        assert len(directory.name) > len(run.display_name) == len(run.run_group) == 128
        assert run.run_group.startswith("e" * 100)
    assert len(set(names)) == 3


def test_names_that_are_cut_stay_distinct() -> None:
    one, other = "n" * 128 + "1", "n" * 128 + "2"
    assert recording.cut_name("n" * 128) == "n" * 128
    cut = [recording.cut_name(one), recording.cut_name(other), recording.cut_name("\udce9" * 200)]
    assert [len(name) for name in cut] == [128] * 3 and len(set(cut)) == 3
    built = dashboard.specification(dashboard.view("team", "clbench", one, []))
    assert (
        json.dumps(built).count(cut[0]) >= 1
        and json.dumps(built["spec"]["section"]["runSets"]).count(one) == 0
    )


# Networks that fail.


@contextmanager
def answering(status: int) -> Iterator[str]:
    """The address of a server that has one answer to everything."""

    class Answering(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.send_error(status)

        do_GET = do_PUT = do_POST

        def log_message(self, *_: object) -> None: ...

    httpd = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Answering)
    threading.Thread(target=httpd.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{httpd.server_port}"
    httpd.shutdown()
    httpd.server_close()


@pytest.fixture(params=["refuses", "hangs", "answers errors"])
def broken(request: pytest.FixtureRequest) -> Iterator[str]:
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


def test_a_network_that_fails_loses_nothing(
    broken: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    monkeypatch.setenv("WANDB_BASE_URL", broken)
    begin = time.monotonic()
    said = apart(tmp_path, "online")
    assert time.monotonic() - begin < 8
    assert said and "is not all sent: clbench wandb sync" in said
    assert not answers(broken)
    for path in tmp_path.rglob("*"):
        assert not path.is_file() or KEY.encode() not in path.read_bytes(), path
    check_told(tmp_path)


def test_a_server_that_answers_is_told_from_one_that_does_not() -> None:
    with answering(404) as address:
        assert answers(address)
    assert not answers(address)
    assert not answers("no address")


# The commands and the mode.


def test_what_cannot_be_sent_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    with pytest.raises(UserError, match="no runs of W&B there; give outputs/EXPERIMENT"):
        sync([tmp_path])
    place = tmp_path / "run" / "wandb" / "offline-run-20260101_000000-x" / "run-x.wandb"
    place.parent.mkdir(parents=True)
    place.write_bytes(b"no such format")
    with serving() as server:
        monkeypatch.setenv("WANDB_BASE_URL", server.address)
        with pytest.raises(UserError, match=f"1 of 1 run could not all be sent, {tmp_path / 'run'} for one"):
            sync([tmp_path])


def test_the_commands(tmp_path: Path) -> None:
    keyless = {"WANDB_API_KEY": "", "NETRC": str(tmp_path / "none")}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in keyless.items():
            patch.setenv(name, value)
        refused = clbench("wandb", "sync", str(tmp_path))
        assert refused.returncode == 1 and "sending needs a key: set WANDB_API_KEY" in refused.stderr
    printed = clbench("wandb", "dashboard", "mine", "--entity=team", "--categories", "left", "--print")
    assert printed.returncode == 0, printed.stderr
    assert "maps/left" in printed.stdout and json.loads(printed.stdout)


@pytest.mark.parametrize("mode", ["online", "offline", "disabled"])
def test_auto_is_what_the_environment_asks_for(monkeypatch: pytest.MonkeyPatch, mode: str) -> None:
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    monkeypatch.setenv("WANDB_MODE", mode)
    assert wandb_mode({"mode": "auto"}) == (mode, None)
    assert wandb_mode({"mode": "offline"}) == ("offline", None)


def test_online_needs_a_key_and_auto_says_what_it_does_without(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    with pytest.raises(UserError, match="wandb=online needs a key: set WANDB_API_KEY"):
        wandb_mode({"mode": "online"})
    mode, why = wandb_mode({"mode": "auto"})
    assert mode == "offline" and why and "wandb=auto is offline: no key" in why
