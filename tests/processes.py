"""Processes that begin with everything imported, so that a test can start and kill many of them."""

import gc
import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path
from random import Random

from conftest import Train, command, run_directories

ROOT = Path(__file__).parent.parent
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(
    ["clbench.commands.run", "clbench.experiment", "clbench.loading", "timm", "sklearn.random_projection"]
)


def nowhere() -> int:
    """A file that takes everything."""
    return os.open(os.devnull, os.O_WRONLY)


def start(words: Sequence[str], output: Callable[[], int] = nowhere) -> BaseProcess:
    """train.py with these words, in a process of its own.

    Args:
        output: opens what it prints into, in that process.
    """
    process = CONTEXT.Process(target=_run, args=(list(words), list(sys.path), output))
    process.start()
    return process


def _run(words: list[str], path: list[str], output: Callable[[], int]) -> None:
    from clbench.commands.run import main

    gc.freeze()  # what was imported need not be looked through for garbage
    sys.path[:] = path
    os.chdir(ROOT)
    opened = output()
    for stream in (1, 2):
        os.dup2(opened, stream)
    sys.exit(main(words))


def kill_when(ready: Callable[[], bool], words: Sequence[str], wait_s: float = 0.0) -> bool:
    """Start train.py, kill it (SIGKILL) so many seconds after something is ready; whether it was killed, not over."""
    process = start(words)
    while process.is_alive() and not ready():
        time.sleep(0.002)
    time.sleep(wait_s)
    process.kill()
    process.join()
    assert process.exitcode in (0, -9), process.exitcode
    return process.exitcode == -9


def whole_and_killed(train: Train, folder: Path, outputs: Path, *setting: str) -> tuple[Path, Path]:
    """Directories of two runs of a setting with the same metrics.csv: one of a piece, one killed after two stages and continued.

    Args:
        train, folder: the fixtures.
        outputs: the test's own folder.
    """
    assert train("experiment=whole", *setting).returncode == 0
    words = command(folder, outputs, "experiment=killed", *setting)[2:]
    saved = "outputs/killed/*/checkpoint/stage-0001.json"
    assert kill_when(lambda: bool(list(outputs.glob(saved))), words)
    assert train("experiment=killed", *setting).returncode == 0
    (one,), (other,) = run_directories(outputs, "whole"), run_directories(outputs, "killed")
    assert (one / "metrics.csv").read_bytes() == (other / "metrics.csv").read_bytes()
    return one, other


def kill_again_and_again(words: Sequence[str], experiment: Path, random: Random, times: int = 4) -> int:
    """Kill train.py each time that it has come further, and then let it end; how often it was killed.

    Args:
        experiment: the folder of its run directory.
    """

    def found() -> tuple[int, int, int]:
        """How far the run is: bytes of the journal, and checkpoints."""
        journals = sum(path.stat().st_size for path in experiment.glob("*/journal.jsonl"))
        names = [path.name for path in experiment.glob("*/checkpoint/*.json")]
        return journals, len(names), hash(tuple(sorted(names)))

    kills = 0
    for _ in range(times):
        before = found()
        if not kill_when(lambda: found() != before, words, random.uniform(0, 0.05)):  # noqa: B023
            return kills
        kills += 1
    process = start(words)
    process.join()
    assert process.exitcode == 0
    return kills
