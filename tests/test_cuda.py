"""Runs on a GPU, where there is one: what test_pretend_device.py says of a device that is none, of CUDA itself.

    python -m pytest tests/test_cuda.py -n 8

Every run is in a process of its own, so that one can be killed.
"""

import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT, run_directories
from pretend_runs import METHODS, around, words
from processes import CONTEXT
from test_pretend_device import COLLECTING, IN_BATCH, PRECISIONS, USUAL

from clbench.recording.metrics_file import rows_of

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")


def run(commands: Sequence[Sequence[str]], folder: Path, kill_after: int | None = None) -> None:
    """train.py, or clbench, with each of these words, one after the other, in a process of their own.

    Args:
        folder: for what is printed.
        kill_after: steps of all of them after which it kills itself.
    """
    log = folder / "log.txt"
    process = CONTEXT.Process(target=_run, args=(commands, list(sys.path), log, kill_after))
    process.start()
    process.join()
    expected = 0 if kill_after is None else -signal.SIGKILL
    assert process.exitcode == expected, log.read_text(encoding="utf-8")[-5000:]


def _run(commands: Sequence[Sequence[str]], path: list[str], log: Path, kill_after: int | None) -> None:
    from clbench import training
    from clbench.cli import main as clbench
    from clbench.commands.run import main as train
    from clbench.methods.anomalydino import AnomalyDINO
    from clbench.methods.cadic import CADIC
    from clbench.methods.dinosaur import DINOSaur
    from clbench.methods.padim import PaDiM
    from clbench.methods.patchcore import PatchCore
    from clbench.strategies.base import Strategy

    sys.path[:] = path
    os.chdir(ROOT)
    opened = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(opened, stream)
    taken, warm = 0, False

    def stepped(before: Callable[..., Any], *given: Any) -> None:
        nonlocal taken
        before(*given)
        taken += 1
        if taken == kill_after:
            os.kill(os.getpid(), signal.SIGKILL)

    def step(before: Callable[..., Any], descent: Any, *given: Any) -> None:
        fp16 = descent.scaler.is_enabled()  # whose scale is looked at in each step
        with _waits_refused(taken > 0 and descent.epoch > 0 and not fp16):  # tables were copied
            before(descent, *given)

    def predicted(before: Callable[..., Any], strategy: Any, *given: Any) -> Any:
        nonlocal warm
        name = type(strategy.detector).__module__.rpartition(".")[2]
        with _waits_refused(warm and name not in IN_BATCH):
            warm = True  # tables were copied
            return before(strategy, *given)

    around(training.Descent, "_step", step)
    around(training.Descent, "_step", stepped)
    around(Strategy, "predict", predicted)
    for kind in (PatchCore, AnomalyDINO, CADIC, DINOSaur, PaDiM):
        around(kind, "training_step", stepped)
    for command in commands:
        if status := (clbench if command[0] in ("predict", "export") else train)(list(command)):
            sys.exit(status)


@contextmanager
def _waits_refused(asked: bool) -> Iterator[None]:
    """Inside, PyTorch raises where it would wait for the GPU."""
    torch.cuda.set_sync_debug_mode("error" if asked else "default")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("method", METHODS)
def test_a_killed_run_ends_in_the_same_results_and_no_step_waits(
    method: str, precision: str, folder: Path, tmp_path: Path
) -> None:
    own = ["gpu.device=cuda", f"gpu.precision={precision}", "gpu.deterministic=true"]
    own += [f"strategy={USUAL[method]}"] + (["replay.size=4"] if USUAL[method] == "replay" else [])
    whole = words(method, tmp_path / "whole", folder, *own)
    killed = words(method, tmp_path / "killed", folder, *own, "checkpoint_s=0")
    run([killed], tmp_path, kill_after=2 if method in COLLECTING else 7)
    run([killed, whole], tmp_path)
    (one,), (other,) = run_directories(tmp_path / "whole"), run_directories(tmp_path / "killed")
    assert (one / "metrics.csv").read_bytes() == (other / "metrics.csv").read_bytes()
    commands = [["predict", str(one), str(folder / "brick/test"), "--output", str(tmp_path / "predicted")]]
    if precision == "fp32":
        commands += [["export", str(one), "--formats", "torch", "--output", str(tmp_path / "export")]]
    run(commands, tmp_path)


@pytest.mark.parametrize("method", COLLECTING)
def test_a_bank_says_what_it_says_on_the_cpu(method: str, folder: Path, tmp_path: Path) -> None:
    found = {}
    for device in ("cpu", "cuda"):
        layers = ["method.masking=false"] if method == "anomalydino" else []
        run([words(method, tmp_path / device, folder, f"gpu.device={device}", *layers)], tmp_path)
        (directory,) = run_directories(tmp_path / device)
        rows = rows_of((directory / "metrics.csv").read_text(encoding="utf-8"))
        found[device] = [row.value for row in rows]
    assert found["cuda"] == pytest.approx(found["cpu"], abs=2e-3)
