"""A camera's folder: how soon images are answered that another process drops, some of them half-written for a moment."""

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from rich.table import Table

from clbench.commands.run import main as train

IMAGES = 1000
EVERY_S = 0.05  # between two images
DROP = """
import sys, time, pathlib
source, camera, count, every = pathlib.Path(sys.argv[1]), pathlib.Path(sys.argv[2]), int(sys.argv[3]), float(sys.argv[4])
contents = [file.read_bytes() for file in sorted(source.rglob("*.png"))]
for number in range(count):
    content, file = contents[number % len(contents)], camera / f"{number:05d}.png"
    if number % 10 == 0:  # half of it, and the rest a while later
        file.write_bytes(content[: len(content) // 2])
        time.sleep(0.1)
    file.write_bytes(content)
    time.sleep(every)
"""


def table(checkpoint: str | None = None, root: str | None = None) -> Table:
    """Milliseconds from the last write of a file to its answer, and the memory of the process on its way."""
    shown = Table(
        "images",
        "answered once",
        "median, ms",
        "99 %, ms",
        "memory after 100",
        "at the end",
        title="predict --watch",
    )
    with tempfile.TemporaryDirectory() as folder:
        given = ["method=patchcore", "task_order.tasks=[circuit]", "method.held_out=0.2", "wandb=disabled"]
        assert train([*given, f"outputs={folder}/outputs", f"cache={folder}/cache"]) == 0
        (run,) = Path(folder, "outputs/default").glob("method=*")
        subprocess.run(
            [sys.executable, "-m", "clbench.cli", "data", "synthetic", f"{folder}/parts", "--size", "160"],
            check=True,
        )
        camera, output = Path(folder, "camera"), Path(folder, "answers")
        camera.mkdir()
        command = [
            sys.executable,
            "-m",
            "clbench.cli",
            "predict",
            str(run),
            str(camera),
            "--output",
            str(output),
            "--watch",
        ]
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while not (output / "answers.jsonl").is_file():
            time.sleep(0.1)
        dropping = subprocess.Popen(
            [
                sys.executable,
                "-c",
                DROP,
                f"{folder}/parts/circuit/test",
                str(camera),
                str(IMAGES),
                str(EVERY_S),
            ]
        )
        early = 0
        while (count := _answers(output)) < IMAGES:
            early = early or (_memory(process.pid) if count >= 100 else 0)
            time.sleep(0.2)
        late = _memory(process.pid)
        dropping.wait()
        process.send_signal(signal.SIGTERM)
        process.wait()
        lines = [
            json.loads(line) for line in (output / "answers.jsonl").read_text(encoding="utf-8").splitlines()
        ]
    names = [line["image"] for line in lines]
    once = len(names) == len(set(names)) == IMAGES and not any("error" in line for line in lines)
    half, most = np.percentile([line["latency_ms"] for line in lines], [50, 99])
    shown.add_row(
        f"{IMAGES:,}",
        str(once),
        f"{half:.0f}",
        f"{most:.0f}",
        f"{early / 1e6:.0f} MB",
        f"{late / 1e6:.0f} MB",
    )
    return shown


def _answers(output: Path) -> int:
    with (output / "answers.jsonl").open("rb") as file:
        return sum(1 for _ in file)


def _memory(process: int) -> int:
    """Bytes of memory that a process has now."""
    pages = int(Path(f"/proc/{process}/statm").read_text(encoding="utf-8").split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")
