"""Bytes that checkpoints write over ten tasks, against writing all that is kept at every stage."""

import tempfile
from pathlib import Path

import torch
from rich.table import Table

from benchmarks.running import composed
from clbench import assembly
from clbench.recording import checkpoint
from clbench.recording.checkpoint import Checkpoints

TASKS = 10
_CASES = (
    ("padim", "strategy=native", "method.update=average"),
    ("padim", "strategy=native", "method.update=per_task"),
    ("padim", "strategy=single"),
    ("patchcore", "strategy=native", "method.memory_size=10000"),
    ("stfpm", "strategy=single", "method.epochs=1"),
    ("stfpm", "strategy=replay", "replay.size=100", "method.epochs=1"),
)


def table(weights: str | None = None, root: str | None = None) -> Table:
    """MB written by each method and strategy, and the ratio to what all stages' states take."""
    shown = Table(
        title=f"Checkpoints of {TASKS} tasks of 16 random images of 64 x 64 pixels", title_justify="left"
    )
    for title in (
        "method",
        "settings",
        "kept at the end, MB",
        "all at every stage, MB",
        "written, MB",
        "share",
    ):
        shown.add_column(title, justify="right" if "MB" in title or title == "share" else "left")
    for method, *settings in _CASES:
        kept, everything, written = _written(method, *settings)
        shown.add_row(
            method,
            " ".join(settings),
            *(f"{size / 1e6:,.0f}" for size in (kept, everything, written)),
            f"{written / everything:.2f}",
        )
    return shown


def _written(method: str, *settings: str) -> tuple[int, int, int]:
    """Bytes kept after the last task, of the states after each task together, and written."""
    config = composed("backbone=resnet18", "backbone.pretrained=false", f"method={method}", *settings)
    detector = assembly.build_detector(config)
    strategy = assembly.build_strategy(config, detector)
    sizes: list[int] = []
    write_whole = checkpoint.write_whole

    def counting(path: Path, write: object) -> None:
        write_whole(path, write)  # type: ignore[arg-type]
        sizes.append(path.stat().st_size)

    everything = 0
    with tempfile.TemporaryDirectory() as folder:
        checkpoints = Checkpoints(Path(folder))
        checkpoint.write_whole = counting  # type: ignore[assignment]
        try:
            for stage in range(TASKS):
                random = torch.Generator().manual_seed(stage)
                strategy.learn(
                    stage, torch.randint(0, 256, (16, 3, 64, 64), dtype=torch.uint8, generator=random)
                )
                state = strategy.state()
                checkpoints.save_stage(stage, state, {})
                kept = sum(tensor.numel() * tensor.element_size() for tensor in state.values())
                everything += kept
        finally:
            checkpoint.write_whole = write_whole
    return kept, everything, sum(sizes)
