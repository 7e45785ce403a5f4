"""clbench predict --watch: each image answered once, whenever it comes and however often it is started."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
from conftest import ROOT, Train, clbench, run_directories
from pretend_runs import METHODS

from clbench.commands import watch
from clbench.commands.watch import Watch
from clbench.errors import UserError
from clbench.loading import TrainedDetector, load
from clbench.recording.journal import Journal

RATES = (0.01, 0.01)


@pytest.fixture
def run(train: Train, tmp_path: Path) -> Path:
    small = ["method=patchcore", *METHODS["patchcore"], "task_order.tasks=[brick]", "method.held_out=0.2"]
    assert train(*small).returncode == 0
    (found,) = run_directories(tmp_path)
    return found


@pytest.fixture
def detector(run: Path) -> TrainedDetector:
    return load(run)


def start(detector: TrainedDetector, tmp_path: Path) -> Watch:
    (tmp_path / "camera").mkdir(exist_ok=True)
    return Watch(detector, tmp_path / "camera", tmp_path / "answers", RATES, 4)


def looked(watching: Watch, times: int = 2) -> int:
    return sum(watching.look() for _ in range(times))


def answers(tmp_path: Path) -> list[dict]:
    return answers_in(tmp_path / "answers/answers.jsonl")


def answers_in(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_each_image_is_answered_once_and_a_restart_repeats_none(
    detector: TrainedDetector, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    good, bad = folder / "brick/test/good/000.png", folder / "brick/test/blot/000.png"
    watching, camera = start(detector, tmp_path), tmp_path / "camera"
    shutil.copyfile(good, camera / "a.png")
    assert [watching.look() for _ in range(3)] == [0, 1, 0]
    (camera / "day").mkdir()
    content = bad.read_bytes()
    (camera / "day/b.png").write_bytes(content[: len(content) // 2])
    assert looked(watching, 3) == 0  # half of it: it may be on its way
    (camera / "day/b.png").write_bytes(content)
    (camera / "notes.txt").write_text("no image", encoding="utf-8")
    assert looked(watching, 3) == 1
    (camera / "c.png").write_bytes(content[:100])
    monkeypatch.setattr(watch, "_PATIENCE_S", -1.0)
    assert looked(watching, 3) == 1  # it will never be whole
    shutil.copyfile(bad, camera / "a.png")
    os.utime(camera / "a.png", ns=(0, 10**18))
    assert looked(watching) == 1  # another image of the same name
    given = answers(tmp_path)
    assert [each["image"] for each in given] == ["a.png", "day/b.png", "c.png", "a.png"]
    assert "truncated" in given[2]["error"] or "cannot" in given[2]["error"]
    found = {one.path.name: one for one in detector.predict(camera / "day")}["b.png"]
    assert given[1]["score"] == pytest.approx(found.score, rel=1e-5) and given[1]["anomalous_pixels"] == int(
        found.mask.sum()
    )
    watching._lock.close()
    again = start(detector, tmp_path)
    assert looked(again, 3) == 0
    shutil.copyfile(good, camera / "d.png")
    assert looked(again) == 1
    for file in camera.glob("*.png"):
        file.unlink()
    looked(again)
    assert len(again.folder._answered) == 1  # only what is there is remembered
    same = Watch(detector, camera, camera, RATES, 4)  # answers beside the images
    (camera / "masks").mkdir()
    for place in ("e.png", "masks/e.png"):  # the latter is of an earlier prediction
        shutil.copyfile(good, camera / place)
    assert looked(same) == 2 and {each["image"] for each in answers_in(camera / "answers.jsonl")} == {
        "day/b.png",
        "e.png",
    }


def test_time_counts_from_when_a_file_came_whatever_its_clock_says(tmp_path: Path) -> None:
    watched = watch.Folder(tmp_path, [])
    for name, written in (("moved", 10**18), ("ahead", 4 * 10**18)):
        (tmp_path / f"{name}.png").write_bytes(b"an image")
        os.utime(tmp_path / f"{name}.png", ns=(written, written))
    assert not watched.ready()
    time.sleep(0.02)
    assert len(watched.ready()) == 2
    for path in tmp_path.iterdir():
        assert 0.02 <= watched.waiting_s(path) < 5


def test_a_name_that_is_no_text_is_answered_and_read_again(tmp_path: Path) -> None:
    entry = {"image": "a\\b\udcff.png", "file": [1, 2]}
    journal = Journal(tmp_path / "answers.jsonl")
    journal.append(entry)
    assert Journal(tmp_path / "answers.jsonl").entries[0]["image"] == entry["image"]
    assert answers_in(tmp_path / "answers.jsonl")[0]["image"] == entry["image"]


def test_what_ends_it_is_one_line(detector: TrainedDetector, run: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="file cannot be written"):
        Watch(detector, tmp_path, tmp_path / "file", RATES, 4)
    watching = start(detector, tmp_path)
    with pytest.raises(UserError, match="another process answers into"):
        start(detector, tmp_path)
    (tmp_path / "camera").rmdir()
    with pytest.raises(UserError, match="camera is gone"):
        watching.look()
    found = clbench("predict", str(run), str(tmp_path / "camera"), "--watch")
    assert found.returncode == 1 and "give one folder that is there" in found.stderr


def test_a_process_that_is_killed_and_one_after_it_answer_all(
    run: Path, folder: Path, tmp_path: Path
) -> None:
    camera, output = tmp_path / "camera", tmp_path / "answers"
    camera.mkdir()
    command = [sys.executable, "-m", "clbench.cli", "predict", str(run), str(camera), "--watch"]
    content = (folder / "brick/test/blot/000.png").read_bytes()
    printed: list[str] = []
    for round_, ending in enumerate((signal.SIGKILL, signal.SIGTERM)):
        process = subprocess.Popen(
            [*command, "--output", str(output)],
            cwd=ROOT,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        for number in range(10):
            part = camera / f"{round_}{number}.png"
            part.write_bytes(content[: len(content) // 2])
            if number % 2:
                time.sleep(0.02)
            part.write_bytes(content)
        begin = time.monotonic()
        while not output.is_dir() or len(answers(tmp_path)) < 10 * (round_ + 1):
            assert time.monotonic() - begin < 60 and process.poll() is None
            time.sleep(0.1)
        process.send_signal(ending)
        out, errors = process.communicate(timeout=30)
        printed += out.splitlines()
    assert process.returncode == 0 and "20 answers so far" in errors
    assert set(Counter(each["image"] for each in answers(tmp_path)).values()) == {1}
    assert len(printed) == len({json.loads(line)["image"] for line in printed}) == 20
