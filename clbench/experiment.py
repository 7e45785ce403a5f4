"""The protocol: for each stage, learn; then for each task, evaluate; record; checkpoint."""

import time
from collections.abc import Mapping
from typing import Any

import torch

from clbench import evaluation, footprint, heat_maps
from clbench.data.stream import Task
from clbench.errors import UserError
from clbench.metrics import continual
from clbench.metrics.curves import METRICS
from clbench.recording import checkpoint
from clbench.recording.run_directory import RunDirectory
from clbench.strategies.base import Strategy
from clbench.terminal import Display, number, run_table
from clbench.training import Diverged

Row = tuple[int, int, str, str, float | None]


def run(
    strategy: Strategy,
    tasks: list[Task],
    directory: RunDirectory,
    display: Display,
    device: torch.device,
    identity: Mapping[str, Any],
    *,
    evaluate: str,
    maps: bool,
) -> dict[str, Any]:
    """Learn the stream and evaluate it after every stage, from the last checkpoint on if there is one.

    Args:
        identity: what summary.json says of the run before its results.
        evaluate: `seen` tasks after each stage, or `all`.
        maps: write heat maps after the stage that learns a task, and after the last.

    Returns:
        The summary.
    """
    stages = strategy.stages(len(tasks))
    learned = [stage for task in range(len(tasks)) for stage in range(len(stages)) if task in stages[stage]]
    rows: list[Row] = []
    seconds = {"train_s": 0.0, "eval_s": 0.0}
    peak = 0.0
    strategy.detector.progress = display.progress
    first = 0
    if saved := checkpoint.load(directory.path / "checkpoint", str(device)):
        done, tensors, data = saved
        strategy.restore(tensors)
        rows, seconds, peak = [tuple(row) for row in data["rows"]], data["seconds"], data["peak_mb"]
        first = done + 1
        display.line(f"continuing after stage {done + 1} of {len(stages)}")

    for stage in range(first, len(stages)):
        names = "+".join(tasks[task].name for task in stages[stage])
        title = f"task {stage + 1}/{len(stages)} {names}" if len(stages) > 1 else "all tasks"
        display.heading(title)
        begin = time.perf_counter()
        train = [tasks[task].train.images for task in stages[stage]]
        try:
            strategy.learn(stage, (torch.cat(train) if len(train) > 1 else train[0]).to(device))
        except Diverged as error:
            raise UserError(f"{title}: {error}") from error
        strategy.detector.release(strategy.stored_images())
        seconds["train_s"] += time.perf_counter() - begin

        begin = time.perf_counter()
        results = {}
        for index, task in enumerate(tasks):
            if learned[index] > stage and evaluate == "seen":
                continue
            if stage > 0 and strategy.unchanged(stage, learned[index]) and not maps:
                results[index] = {m: v for s, i, _, m, v in rows if s == stage - 1 and i == index}
                continue
            display.heading(f"{title}, {task.name}")
            prediction = evaluation.predict(strategy, task.test, index, device, display.progress)
            results[index] = evaluation.measure(prediction, task.test)
            if maps and stage in (learned[index], len(stages) - 1):
                heat_maps.write(prediction, task.test, directory.path / "maps" / task.name, stage)
        seconds["eval_s"] += time.perf_counter() - begin

        rows += [
            (stage, index, tasks[index].name, metric, result[metric])
            for index, result in results.items()
            for metric in METRICS
        ]
        display.line(f"{title}: {_means(results, learned, stage)}")
        directory.write_metrics(rows)
        peak = max(peak, footprint.peak(device) / footprint.MB)
        data = {"rows": rows, "seconds": seconds, "peak_mb": peak}
        checkpoint.save(directory.path / "checkpoint", stage, strategy.state(), data)

    directory.write_metrics(rows)
    display.heading("the trained detector")
    inference = evaluation.inference_time(strategy, tasks[-1], len(tasks) - 1, device, display.progress)
    matrices = {metric: _matrix(rows, metric, len(stages), len(tasks)) for metric in METRICS}
    summary = {
        **identity,
        "status": "complete",
        "final": {metric: continual.final_mean(matrices[metric]) for metric in METRICS},
        "average_forgetting_pct": continual.average_forgetting_pct(matrices["pixel_f1"], learned),
        "forgetting": {metric: continual.forgetting(matrices[metric], learned) for metric in METRICS},
        "backward_transfer": {m: continual.backward_transfer(matrices[m], learned) for m in METRICS},
        "forward_transfer": {m: continual.forward_transfer(matrices[m], learned) for m in METRICS},
        "memory": {**footprint.measure(strategy, device), "peak_mb": peak},
        "time": {**seconds, "inference_ms_per_image": inference},
    }
    directory.write_summary(summary)
    just_learned = {m: [R[learned[task]][task] for task in range(len(tasks))] for m, R in matrices.items()}
    display.table(run_table(summary, just_learned, {metric: R[-1] for metric, R in matrices.items()}))
    return summary


def _means(results: Mapping[int, Mapping[str, float | None]], learned: list[int], stage: int) -> str:
    """A stage's means over the tasks seen, for people."""
    seen = [result for index, result in results.items() if learned[index] <= stage]
    means = {metric: continual.final_mean([[result[metric] for result in seen]]) for metric in METRICS}
    return (
        f"image AUROC {number(means['image_auroc'])}, pixel AUROC {number(means['pixel_auroc'])}, "
        f"pixel F1 {number(means['pixel_f1'])}, AU-PRO {number(means['aupro'])} over {len(seen)} seen"
    )


def _matrix(rows: list[Row], metric: str, stages: int, tasks: int) -> list[list[float | None]]:
    """R of one metric: [stage][task]."""
    R: list[list[float | None]] = [[None] * tasks for _ in range(stages)]
    for stage, index, _, name, value in rows:
        if name == metric:
            R[stage][index] = value
    return R
