"""Small streams on disk, and the command line as a user runs it."""

import io
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import cv2
import numpy as np
import pytest

ROOT = Path(__file__).parent.parent
os.environ.setdefault("OMP_NUM_THREADS", "1")  # the tests that run beside one another share the cores


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three categories in the MVTec layout: 48 x 48 pixels, 6 training and 4 test images each."""
    root = tmp_path_factory.mktemp("stream")
    for index, name in enumerate(("brick", "cloth", "plate")):
        make_category(root / name, np.random.default_rng(index))
    return root


def make_category(path: Path, random: np.random.Generator, train: int = 6) -> None:
    """Coloured noise of a category's own pattern; a defect is a bright blot."""
    pattern = cv2.resize(random.integers(40, 200, (6, 6, 3), dtype=np.uint8), (48, 48))

    def image() -> np.ndarray:
        return np.clip(pattern + random.normal(0, 6, pattern.shape), 0, 255).astype(np.uint8)

    for kind in ("train/good", "test/good", "test/blot", "ground_truth/blot"):
        (path / kind).mkdir(parents=True)
    for number in range(train):
        cv2.imwrite(str(path / f"train/good/{number:03d}.png"), image())
    for number in range(2):
        cv2.imwrite(str(path / f"test/good/{number:03d}.png"), image())
        mask = np.zeros((48, 48), np.uint8)
        cv2.circle(mask, tuple(random.integers(12, 36, 2).tolist()), 5, 255, -1)
        blotted = image()
        blotted[mask > 0] = 250
        cv2.imwrite(str(path / f"test/blot/{number:03d}.png"), blotted)
        cv2.imwrite(str(path / f"ground_truth/blot/{number:03d}_mask.png"), mask)


Train = Callable[..., subprocess.CompletedProcess]


@pytest.fixture
def train(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Train:
    """train.py on the small stream with random weights, its outputs and cache in a folder of the test.

    It runs within this process, which saves the seconds that a process of its own takes to start.
    """
    from clbench import evaluation
    from clbench.commands.run import main

    monkeypatch.setattr(
        evaluation, "_TIMED_IMAGES", evaluation.BATCH_SIZE
    )  # a fifth of a small run is timing

    def run(*overrides: str) -> subprocess.CompletedProcess:
        monkeypatch.chdir(ROOT)
        return within(main, command(folder, tmp_path, *overrides)[2:])

    return run


@pytest.fixture
def process(folder: Path, tmp_path: Path) -> Train:
    """What `train` does, in a process of its own, as a user starts it."""

    def run(*overrides: str, environment: dict[str, str] | None = None) -> subprocess.CompletedProcess:
        return subprocess.run(
            command(folder, tmp_path, *overrides),
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
            env={**os.environ, **(environment or {})},
        )

    return run


def command(folder: Path, outputs: Path, *overrides: str) -> list[str]:
    """The command line of a small run; later overrides win."""
    given = tuple(text.partition("=")[0] for text in overrides if "=" in text)
    defaults = (
        "dataset=mvtec",
        f"dataset.root={folder}",
        "dataset.resize=48",
        "dataset.crop=null",
        "backbone.checkpoint=null",
        "backbone.arguments.channels=[16,16,32,64]",
        f"outputs={outputs}/outputs",
        f"cache={outputs}/cache",
    )
    kept = [text for text in defaults if not text.startswith(given)]
    flags = [text for text in overrides if text.startswith("-")]
    return [sys.executable, "train.py", *flags, *kept, *(text for text in overrides if text not in flags)]


def clbench(*words: str) -> subprocess.CompletedProcess:
    """The command-line tool, within this process."""
    from clbench.cli import main

    return within(main, words)


def within(main: Callable[[list[str]], int], words: Sequence[str]) -> subprocess.CompletedProcess:
    """A command within this process: its exit status, and what it printed."""
    out, errors = (
        io.TextIOWrapper(io.BytesIO(), encoding="utf-8", errors="backslashreplace", write_through=True)
        for _ in range(2)
    )
    with redirect_stdout(out), redirect_stderr(errors):
        try:
            status = main(list(words))
        except SystemExit as ended:  # argparse's
            status = ended.code if isinstance(ended.code, int) else 1
    printed = [stream.buffer.getvalue().decode() for stream in (out, errors)]  # type: ignore[attr-defined]
    return subprocess.CompletedProcess(list(words), status, *printed)


def run_directories(outputs: Path, experiment: str = "default") -> list[Path]:
    return sorted(
        path
        for path in (outputs / "outputs" / experiment).iterdir()
        if path.is_dir() and not path.name.startswith(".")
    )
