"""The commands of docs/line.md, one after the other, as somebody who reads the page types them."""

import csv
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import cv2
import pytest
from conftest import ROOT, clbench
from typing_extensions import Self

SMALLER = {  # so that they take seconds: fewer and smaller pictures, and a smaller memory
    "data synthetic parts": "data synthetic parts --size 64 --train 8 --test-good 2 --test-defect 3",
    "experiment=line": "experiment=line dataset.resize=64 dataset.crop=null method.memory_size=200",
    "doctor": "doctor --offline",
}


def commands() -> list[str]:
    page = (ROOT / "docs/line.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```console\n(.*?)```", page, re.DOTALL)
    return [line.removeprefix("$ ") for block in blocks for line in block.splitlines()]


def test_the_page_s_commands_do_what_it_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given = commands()
    assert len(given) == 12
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CLBENCH_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("WANDB_MODE", "disabled")
    monkeypatch.setattr("clbench.commands.watch.Interruption", OnceAnswered)
    run = ""
    for command in given:
        if command == "RUN=$(ls -d outputs/line/method=*)":
            (found,) = (tmp_path / "outputs/line").glob("method=*")
            run = str(found.relative_to(tmp_path))
            continue
        words = command.removeprefix("clbench ")
        for long, short in SMALLER.items():
            words = words.replace(long, short)
        if "--watch" in command:
            (tmp_path / "camera").mkdir()
            shutil.copyfile(next((tmp_path / "parts/gear/test/good").iterdir()), tmp_path / "camera/0001.png")
        done = clbench(*shlex.split(words.replace("$RUN", shlex.quote(run))))
        assert done.returncode == 0, f"{command}: {done.stderr[-3000:]}"
        warned = (
            "WARNING: no image of bottle_top, circuit, gear was there to set" in done.stdout + done.stderr
        )
        assert warned == ("--without-images" in words or "--watch" in words)
        assert not words.startswith("report") or "finished: 4 of 4 runs" in done.stdout
    without_clbench(tmp_path)
    for path in (
        "found/scores.csv",
        "outputs/line/tuesday/summary.json",
        "answers/answers.jsonl",
        "line/model.onnx",
    ):
        assert (tmp_path / path).stat().st_size > 0, path


def without_clbench(folder: Path) -> None:
    """The page's script, where nothing but NumPy and ONNX Runtime can be imported, decides as `clbench predict` does."""
    page = (ROOT / "docs/line.md").read_text(encoding="utf-8")
    (script,) = re.findall(r"```python\n(# judge\.py.*?)```", page, re.DOTALL)
    absent = "import sys\nfor name in ('torch', 'cv2', 'PIL', 'timm', 'clbench', 'scipy'):\n    sys.modules[name] = None\n"
    (folder / "judge.py").write_text(absent + script, encoding="utf-8")
    images = sorted((folder / "parts/gear/test").glob("*/*.png"))
    as_ppm = []
    for number, image in enumerate(images):
        as_ppm.append(f"{number}.ppm")
        cv2.imwrite(str(folder / as_ppm[-1]), cv2.imread(str(image)))
    command = [sys.executable, "-I", "judge.py", "line", *as_ppm]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True)
    run = "outputs/line/tuesday"
    assert clbench("predict", run, *map(str, images), "--output", "judged", "--only-scores").returncode == 0
    with (folder / "judged/scores.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == len(images) == 5
    for row, line in zip(rows, done.stdout.splitlines(), strict=True):
        _, score, decision, marked = line.split()
        assert float(score) == pytest.approx(float(row["score"]), rel=1e-3)
        assert (decision == "anomalous") == (row["anomalous"] == "1")
        assert abs(int(marked) - int(row["anomalous_pixels"])) <= 2  # where a value is at the threshold


class OnceAnswered:
    """As `Interruption`: somebody presses Ctrl-C when the camera's image was answered."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def urgent(self) -> bool:
        answers = Path("answers/answers.jsonl")
        return answers.is_file() and answers.stat().st_size > 0
