"""What a run keeps between tasks as streams grow: which bytes grow with the number of tasks, and which do not."""

import re
from collections.abc import Sequence

import torch
from rich.table import Table

from benchmarks.running import composed
from clbench import assembly
from clbench.strategies.base import Strategy
from clbench.testing.small import images

AT = (1, 10, 100, 1000)  # tasks learned
_SIDE, _COUNT = 32, 2  # pixels of an image, and images of a task
_SMALL = ("backbone.checkpoint=null", "backbone.feature_memory_mb=0", "backbone.feature_disk_mb=0")
_CNN = (*_SMALL, "backbone.arguments.channels=[8,8,16,32]")
_VIT = (*_SMALL, "backbone.arguments.embed_dim=24", "backbone.arguments.depth=6")
_STEPS = ("method.epochs=1", "method.batch_size=2", "method.held_out=0")
_STFPM = ("method=stfpm", *_CNN, *_STEPS, "method.patience=null")
# The rows of the table: method and strategy -> settings. Where a method's strategies all keep the same, one of them stands for it.
ROWS: dict[str, Sequence[str]] = {
    "PatchCore, native": ("method=patchcore", *_CNN, "method.memory_size=1000"),
    "PaDiM, native (`average`, `pooled`)": ("method=padim", *_CNN),
    "PaDiM, native (`per_task`)": ("method=padim", *_CNN, "method.update=per_task"),
    "CFA, replay": ("method=cfa", *_CNN, "method.epochs=1", "method.held_out=0", "replay.size=8"),
    "AnomalyDINO, native": ("method=anomalydino", *_CNN, "method.memory_size=1000"),
    "CADIC, native": ("method=cadic", *_CNN, "method.memory_size=100"),
    "DINOSaur, native": ("method=dinosaur", *_CNN, "method.smallest=1"),
    "DINOSaur, native, `memory_mb=2`": ("method=dinosaur", *_CNN, "method.memory_mb=2"),
    "UCAD, native": ("method=ucad", *_VIT, "method.epochs=1", "method.held_out=0", "method.batch_size=2"),
    "STFPM, finetune": (*_STFPM, "strategy=finetune"),
    "STFPM, replay of 8": (*_STFPM, "strategy=replay", "replay.size=8"),
    "STFPM, replay of 8, `reservoir`": (
        *_STFPM,
        "strategy=replay",
        "replay.size=8",
        "replay.selection=reservoir",
    ),
    # The penalty of a thousand tasks is added up: with a greater weight the training diverges.
    **{
        f"STFPM, `{name}`": (
            *_STFPM,
            f"strategy={name}",
            "strategy.weight=0.00001",
            "method.learning_rate=0.01",
        )
        for name in ("ewc", "si", "mas")
    },
    "STFPM, `agem` of 8": (*_STFPM, "strategy=agem", "replay.size=8"),
    "STFPM, `lwf`": (*_STFPM, "strategy=lwf"),
    "STFPM, `derpp` of 8": (*_STFPM, "strategy=derpp", "replay.size=8"),
    "STFPM, `single`": (*_STFPM, "strategy=single"),
}


def table(checkpoint: str | None = None, root: str | None = None) -> Table:
    """Bytes of all that a strategy keeps after 1, 10, 100 and 1,000 tiny tasks, and the tensors that have grown since 100."""
    shown = Table(
        title=f"Kept after so many tasks of {_COUNT} images of {_SIDE} x {_SIDE} pixels, kB",
        title_justify="left",
    )
    shown.add_column("method and strategy")
    for tasks in AT:
        shown.add_column(f"{tasks:,}", justify="right")
    shown.add_column("bytes a task", justify="right")
    shown.add_column("what grows")
    for name, settings in ROWS.items():
        found = kept_after(settings, AT)
        before, after = (found[tasks] for tasks in AT[-2:])
        grown = {
            part: size - before.get(part, 0) for part, size in after.items() if size != before.get(part, 0)
        }
        a_task = sum(grown.values()) / (AT[-1] - AT[-2])
        sizes = (f"{sum(found[tasks].values()) / 1000:.1f}" for tasks in AT)
        shown.add_row(
            name, *sizes, f"{a_task:.0f}" if grown else "none", ", ".join(f"`{part}`" for part in grown)
        )
    return shown


def kept_after(settings: Sequence[str], counts: Sequence[int]) -> dict[int, dict[str, int]]:
    """What is kept after so many tasks: tasks -> bytes by name of the tensor, without the numbers of tasks in it."""
    config = composed(*settings, "dataset.resize=null", "gpu.device=cpu", "gpu.threads=1")
    detector = assembly.place(assembly.build_detector(config), config.gpu, torch.device("cpu"))
    strategy = assembly.build_strategy(config, detector)
    found: dict[int, dict[str, int]] = {}
    for task in range(max(counts)):
        strategy.learn(task, images(_COUNT, task, _SIDE))
        strategy.detector.release(strategy.stored_images())
        if task + 1 in counts:
            found[task + 1] = _bytes(strategy)
            if task + 1 == counts[-2] and found[task + 1] == found[counts[-3]]:
                return {**found, counts[-1]: found[task + 1]}  # what has not grown until then does not
    return found


def _bytes(strategy: Strategy) -> dict[str, int]:
    """Bytes of a strategy's state, which is what checkpoints hold of it, by name."""
    found: dict[str, int] = {}
    for name, tensor in strategy.state().items():
        part = re.sub(r"(?<=\.)\d+\.", "*.", name).removeprefix("detector.").removeprefix("kept.")
        part = re.sub(r"^detectors\.\*\..*", "detectors.*", part)
        found[part] = found.get(part, 0) + tensor.nbytes
    return found
