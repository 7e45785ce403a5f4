"""Runs of clbench on the pretend device, each in a process of its own, which has the device to its end.

    python tests/pretend_runs.py METHOD [KEY=VALUE ...]

prints what a run, and each phase of it, asked of the device, line by line; with --json, as `Watch.plain` gives it.
"""

import argparse
import gc
import json
import os
import signal
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from pretend_device import NAME, current_phase, install, phase, watch, why_not
from typing_extensions import Self

Phases = dict[str, Any]  # what `Watch.plain` gives

KINDS = ("launch", "wait", "blocking copy", "refusal")
ROOT = Path(__file__).parent.parent
METHODS = {  # the smallest that still go through all of their code
    "patchcore": ["method.memory_size=60"],
    "anomalydino": ["method.memory_size=60", "method.rotations=2"],
    "dinosaur": ["method.smallest=3", "method.radius=1"],
    "cadic": ["method.memory_size=60"],
    "padim": ["method.features=12"],
    "cfa": ["method.epochs=2", "method.batch_size=3"],
    "stfpm": ["method.epochs=2", "method.batch_size=3"],
    "fastflow": ["method.epochs=2", "method.batch_size=3", "method.steps=2", "method.trained_normalisation=true"],
    "draem": [
        "method.epochs=2", "method.batch_size=3", "method.texture_count=4", "method.reconstructive_width=4",
        "method.discriminative_width=4", "method.rotated_share=0.5",
    ],
    "efficientad": [
        "method.epochs=2", "method.batch_size=3", "method.width=8", "method.teacher=random", "method.penalty_count=2",
        "dataset.resize=64",
    ],
    "rd4ad": ["method.epochs=2", "method.batch_size=3", "dataset.resize=32"],
    "supersimplenet": ["method.epochs=2", "method.batch_size=3", "method.layers=[2]", "method.hidden=8"],
    "simplenet": ["method.epochs=2", "method.batch_size=3", "method.hidden=8"],
    "dinomaly": [
        "method.groups=[[0],[1,2]]", "method.steps=8", "method.batch_size=3", "method.warm_up=2", "method.mining_steps=9",
        "method.map_side=24", "method.mining_restart=false",
    ],
    "ucad": [
        "method.block=1", "method.key_size=5", "method.memory_size=6", "method.epochs=2", "method.batch_size=3",
        "method.segment_count=3",
    ],
}  # fmt: skip
NO_BACKBONE = ("draem", "efficientad")
TOKENS = ("dinomaly", "ucad")  # methods of a transformer's


def words(method: str, folder: Path, stream: Path, *overrides: str) -> list[str]:
    """A command line of two small tasks; later overrides win.

    Args:
        folder: where outputs and the cache go.
        stream: categories brick and cloth in the MVTec layout.
    """
    narrow = ["backbone.checkpoint=null", "backbone.batch_size=4"]
    if method in TOKENS:
        narrow += [
            "backbone.arguments.embed_dim=32",
            "backbone.arguments.depth=3",
            "backbone.arguments.num_heads=2",
        ]
    else:
        narrow += ["backbone.arguments.channels=[16,16,32,64]"]
    given = [
        "dataset=mvtec", f"dataset.root={stream}", "dataset.resize=48", "dataset.crop=null",
        "task_order.tasks=[brick,cloth]", f"outputs={folder}/outputs", f"cache={folder}/cache",
        *([] if method in NO_BACKBONE else narrow), *METHODS[method], *overrides,
    ]  # fmt: skip
    return [f"method={method}", *{text.partition("=")[0]: text for text in given}.values()]


def count(phases: Phases, name: str, kind: str, within: str = "", besides: tuple[str, ...] = ()) -> float:
    """Events of a kind a call of a phase.

    Args:
        within: what their innermost line begins with.
        besides: what it does not begin with.
    """
    if name not in phases:
        return 0.0
    numbers = (
        number
        for event, _, place, number in phases[name]["events"]
        if event == kind and place.startswith(within) and not (besides and place.startswith(besides))
    )
    return sum(numbers) / phases[name]["calls"]


def use(kill_after: tuple[int, int] | None = None) -> None:
    """Have clbench, in this process, take the device for its GPU, and name the phases of a run.

    A trained method's `step` is one of the second stage, where there is replay, and not of its first epoch, in which
    frozen networks see images for the first time; the others are `early step`. A `batch` is a predicted one, and a
    `timed batch` one whose features are not looked up.

    Args:
        kill_after: a stage, 0-based, and a number of steps of it after which the process kills itself.
    """
    from clbench import assembly, evaluation, training
    from clbench.config.schema import Gpu
    from clbench.methods.anomalydino import AnomalyDINO
    from clbench.methods.cadic import CADIC
    from clbench.methods.dinosaur import DINOSaur
    from clbench.methods.padim import PaDiM
    from clbench.methods.patchcore import PatchCore
    from clbench.recording import checkpoint
    from clbench.strategies.base import Strategy

    install()
    on_cpu = assembly.select_device

    def select_device(gpu: Gpu) -> Any:
        chosen = on_cpu(gpu.model_copy(update={"device": "cpu", "precision": "fp32"}))
        return chosen if gpu.device == "cpu" else torch.device(NAME, 0)

    assembly.select_device = select_device
    opened = checkpoint.safe_open

    class Opened:
        """A file of tensors, as safetensors gives it; it knows no device of this name."""

        def __init__(self, path: Path, framework: str, device: str = "cpu"):
            self.file, self.device = opened(path, framework=framework, device="cpu"), device

        def __enter__(self) -> Self:
            return self

        def __exit__(self, *_: object) -> None:
            pass

        def keys(self) -> Any:
            return self.file.keys()

        def get_tensor(self, name: str) -> Any:
            return self.file.get_tensor(name).to(self.device)

    checkpoint.safe_open = Opened  # type: ignore[assignment, misc]
    steps: Counter[int] = Counter()
    stages: list[int] = []

    def stepped() -> None:
        steps[stages[-1]] += 1
        if (stages[-1], steps[stages[-1]]) == kill_after:
            os.kill(os.getpid(), signal.SIGKILL)

    def learn(before: Callable[..., Any], strategy: Any, stage: int, images: Any) -> None:
        stages.append(stage)
        before(strategy, stage, images)

    def step(before: Callable[..., Any], descent: Any, *given: Any) -> None:
        with phase("step" if descent.stage and descent.epoch else "early step"):
            before(descent, *given)
        stepped()

    def collected(before: Callable[..., Any], detector: Any, images: Any) -> None:
        before(detector, images)
        stepped()

    def batch(before: Callable[..., Any], *given: Any) -> Any:
        with phase("timed batch" if current_phase() == "timing" else "batch"):
            return before(*given)

    around(Strategy, "learn", learn)
    around(Strategy, "learn", named("stage"))
    around(training.Descent, "_epoch", named("epoch"))
    around(training.Descent, "_step", step)
    around(training.Descent, "_check", named("look at the loss"))
    around(training.Descent, "_validate", named("validation"))
    for kind in (PatchCore, AnomalyDINO, DINOSaur, CADIC, PaDiM):
        around(kind, "training_step", named("step"))
        around(kind, "training_step", collected)
    around(checkpoint.Checkpoints, "place", named("checkpoint"))
    around(checkpoint.Checkpoints, "save_stage", named("checkpoint"))
    around(evaluation, "predict", named("evaluation"))
    around(evaluation, "inference_cost", named("timing"))
    around(Strategy, "predict", batch)
    training._LOOK_S = float("inf")  # at the ends of epochs alone, so that counts are always the same
    evaluation._TIMED_IMAGES = evaluation.BATCH_SIZE  # more would tell no more


def named(name: str) -> Callable[..., Any]:
    """For `around`: what is called is this phase."""

    def inside(before: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        with phase(name):
            return before(*args, **kwargs)

    return inside


def around(owner: Any, attribute: str, outer: Callable[..., Any]) -> None:
    before = getattr(owner, attribute)
    setattr(owner, attribute, lambda *args, **kwargs: outer(before, *args, **kwargs))


def in_process(
    commands: Sequence[Sequence[str]],
    path: list[str],
    log: Path,
    found: Path,
    kill_after: tuple[int, int] | None,
) -> None:
    """In a process of its own: train.py or clbench with each of these words, one after the other.

    Args:
        commands: words; those that begin with a command of clbench's are for it.
        path: where Python looks for modules.
        log: a file that what is printed is added to.
        found: a file that is written at the end, with `Watch.plain` of each command.
        kill_after: as for `use`.
    """
    from clbench.cli import main as clbench
    from clbench.commands.run import main as train

    gc.freeze()  # what was imported need not be looked through for garbage
    sys.path[:] = path
    os.chdir(ROOT)
    opened = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(opened, stream)
    use(kill_after)
    results = []
    for command in commands:
        with watch() as asked:
            status = (clbench if command[0] in ("predict", "export") else train)(list(command))
        if status:
            sys.exit(status)
        results.append(asked.plain())
    found.write_text(json.dumps(results), encoding="utf-8")


def lines(phases: Phases) -> Iterable[str]:
    """What was asked of the device for people: a line for each phase, and each place that something was asked for in."""
    for name, one in phases.items():
        numbers = ", ".join(f"{count(phases, name, kind):.5g} {kind}" for kind in KINDS)
        yield f"{name}, {one['calls']} times: {numbers}"
        for kind, operation, place, number in one["events"]:
            yield f"    {number / one['calls']:8.2f} {kind:13} {operation:28} {place}"


def main() -> int:
    """One run; its exit status."""
    import numpy as np
    from conftest import make_category

    from clbench.commands.run import main as train

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--images", type=int, default=6, help="training images of each of the two tasks (6)")
    parser.add_argument("method", choices=METHODS)
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE")
    given = parser.parse_args()
    if reason := why_not():
        print(f"error: {reason}", file=sys.stderr)
        return 1
    use()
    with tempfile.TemporaryDirectory() as folder:
        stream = Path(folder, "stream")
        for index, name in enumerate(("brick", "cloth")):
            make_category(stream / name, np.random.default_rng(index), given.images)
        out = os.dup(1)
        os.dup2(2, 1)  # what the run prints
        with watch() as asked:
            status = train(words(given.method, Path(folder), stream, *given.overrides))
        os.dup2(out, 1)
    print(json.dumps(asked.plain()) if given.json else "\n".join(lines(asked.plain())))
    return status


if __name__ == "__main__":
    sys.exit(main())
