"""A report of 2,000 finished runs: their directories read, grouped, and made into a page."""

import json
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml
from hydra.utils import get_class
from omegaconf import OmegaConf
from rich.table import Table

from clbench.config import check, sources
from clbench.metrics import continual
from clbench.metrics.names import USUAL
from clbench.randomness import generator
from clbench.recording.run_directory import RunDirectory
from clbench.report import page
from clbench.report.comparison import grouped
from clbench.report.reading import read

_TASKS = [f"task_{number}" for number in range(10)]
_WAYS = (("finetune", None), ("joint", None), ("single", None), ("replay", 40), ("replay", 100))
_METHODS = ("patchcore", "padim", "cfa", "stfpm")
_SEEDS = 100


def table(checkpoint: str | None = None, root: str | None = None) -> Table:
    """Seconds of reading and grouping 2,000 run directories, and of writing the whole report."""
    built = Table(
        title=f"a report of {len(_METHODS) * len(_WAYS) * _SEEDS} finished runs", title_justify="left"
    )
    for title in ("", "s", "s of CPU", "MB"):
        built.add_column(title, justify="right" if title else "left")
    with tempfile.TemporaryDirectory() as folder:
        experiment = Path(folder) / "made"
        for name, config, strategy, size, seed in _settings():
            make_run(experiment / name, config, strategy, size, seed)
        begin, cpu = time.perf_counter(), time.process_time()
        runs = read([experiment])
        grouped(runs)
        seconds = (f"{time.perf_counter() - begin:.1f}", f"{time.process_time() - cpu:.1f}")
        built.add_row("directories read and grouped", *seconds, "")
        begin, cpu = time.perf_counter(), time.process_time()
        report = page.write_page(runs, experiment / "report", "made")
        seconds = (f"{time.perf_counter() - begin:.1f}", f"{time.process_time() - cpu:.1f}")
        built.add_row("tables, figures and the page", *seconds, f"{report.page.stat().st_size / 1e6:.1f}")
        assert sum(len(row.runs) for group in report.groups for row in group.found) == len(runs)
    return built


def _settings() -> Iterator[tuple[str, dict[str, Any], str, int | None, int]]:
    for method in _METHODS:
        for strategy, size in _WAYS:
            given = [f"method={method}", f"strategy={strategy}", *([f"replay.size={size}"] if size else [])]
            composed = sources.composed(*given)
            for seed in range(_SEEDS):
                OmegaConf.update(composed, "seed", seed)
                yield ",".join([*given, f"seed={seed}"]), check(composed).plain(), strategy, size, seed


def make_run(path: Path, config: dict[str, Any], strategy: str, size: int | None, seed: int) -> None:
    """Write a finished run's directory, as train.py would leave it; its results are drawn."""
    directory = RunDirectory(path)
    directory.create()
    draw = generator(seed, "a made run")
    flags = get_class(config["strategy"]["_target_"])
    stages = 1 if flags.joint else len(_TASKS)
    R = {m: [[None] * len(_TASKS) for _ in range(stages)] for m in USUAL}
    lines = ["stage,task_index,task,category,metric,value"]
    for stage in range(stages):
        for task, name in enumerate(_TASKS):
            if task > stage and not flags.joint:
                continue
            for metric in USUAL:
                value = float(draw.initial_seed() * (stage + task + 1) % 997) / 997
                R[metric][stage][task] = value
                lines.append(f"{stage},{task},{name},{name},{metric},{value:.6f}")
    (path / "metrics.csv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    made_by = {"device": "cpu (made)", "git_revision": "made"}
    stored = yaml.safe_dump({**config, "departures": {}, "made_by": made_by}, sort_keys=False)
    (path / "config.yaml").write_text(stored, encoding="utf-8")
    summary = {
        "status": "complete",
        "method": config["method"]["name"],
        "strategy": strategy,
        "strategy_flags": {name: getattr(flags, name) for name in ("joint", "continual", "needs_gradients")},
        "replay_size": size,
        "backbone": "resnet18",
        "dataset": config["dataset"]["name"],
        "tasks": _TASKS,
        "categories": [[name] for name in _TASKS],
        "seed": seed,
        "final": {metric: continual.final_mean(R[metric]) for metric in USUAL},
        "memory": {"architecture_mb": 26.8, "executed_mb": 8.6, "additional_mb": 34.6, "peak_mb": 900.0},
        "time": {"train_s": 60.0, "eval_s": 30.0, "inference_ms_per_image": 10.0},
    }
    directory.write_summary(json.loads(json.dumps(summary)))
