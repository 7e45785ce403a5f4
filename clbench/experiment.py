"""The protocol: for each stage, learn; then for each task, evaluate; record; checkpoint."""

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch

from clbench import evaluation, footprint, heat_maps
from clbench.data.stream import Task
from clbench.errors import UserError
from clbench.interruption import Interruption
from clbench.metrics import continual
from clbench.metrics.curves import METRICS
from clbench.recording.checkpoint import Checkpoints
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
    interruption: Interruption,
    *,
    evaluate: str,
    maps: bool,
    checkpoint_s: float,
) -> dict[str, Any]:
    """Learn the stream and evaluate it after every stage, from where the run was left if it was begun.

    Args:
        identity: what summary.json says of the run before its results.
        interruption: looked for wherever the run can be left.
        evaluate: `seen` tasks after each stage, or `all`.
        maps: write heat maps after the stage that learns a task, and after the last.
        checkpoint_s: seconds between two checkpoints of a training under way.

    Returns:
        The summary.

    Raises:
        Stopped: a signal asked for it; the same run continues from here.
    """
    stages = strategy.stages(len(tasks))
    learned = [stage for task in range(len(tasks)) for stage in range(len(stages)) if task in stages[stage]]
    rows: list[Row] = []
    spent = Spent(device)

    progress = interruption.watching(display.progress)
    checkpoints = Checkpoints(
        directory.path / "checkpoint",
        str(device),
        every_s=checkpoint_s,
        urgent=interruption.urgent,
        saved=interruption.saved,
        beside=lambda: {"spent": spent.so_far()},
    )
    strategy.bookmark, strategy.detector.progress = checkpoints, progress
    first, last_learned = 0, -1
    if saved := checkpoints.load_stage():
        last_learned, tensors, data = saved
        strategy.restore(tensors)
        rows = [tuple(row) for row in data["rows"]]
        spent.restore(data["spent"])
        first = last_learned
    if begun := checkpoints.peek(last_learned + 1):
        spent.restore(begun["spent"])
    if saved or begun:
        where = f"in stage {last_learned + 2}" if begun else f"after stage {last_learned + 1}"
        display.line(f"continuing {where} of {len(stages)}")

    for stage in range(first, len(stages)):
        names = "+".join(tasks[task].name for task in stages[stage])
        title = f"task {stage + 1}/{len(stages)} {names}" if len(stages) > 1 else "all tasks"
        display.heading(title)
        if stage > last_learned:
            with spent.on("train_s"), memory_named(f"learning {names}", "method.batch_size"):
                train = [tasks[task].train.images for task in stages[stage]]
                try:
                    strategy.learn(stage, (torch.cat(train) if len(train) > 1 else train[0]).to(device))
                except Diverged as error:
                    raise UserError(f"{title}: {error}") from error
                strategy.detector.release(strategy.stored_images())
            checkpoints.save_stage(stage, strategy.state(), {"rows": rows})

        for index, task in enumerate(tasks):
            done = any(row[:2] == (stage, index) for row in rows)
            if done or (learned[index] > stage and evaluate == "seen"):
                continue
            with spent.on("eval_s"), memory_named(f"evaluating {task.name}", "backbone.batch_size"):
                if stage > 0 and strategy.unchanged(stage, learned[index]) and not maps:
                    result = {m: v for s, i, _, m, v in rows if (s, i) == (stage - 1, index)}
                else:
                    display.heading(f"{title}, {task.name}")
                    prediction = evaluation.predict(strategy, task.test, index, device, progress)
                    result = evaluation.measure(prediction, task.test)
                    if maps and stage in (learned[index], len(stages) - 1):
                        heat_maps.write(prediction, task.test, directory.path / "maps" / task.name, stage)
            rows += [(stage, index, task.name, metric, result[metric]) for metric in METRICS]
            checkpoints.update_stage(stage, {"rows": rows})
        display.line(f"{title}: {_means(rows, learned, stage)}")
        directory.write_metrics(rows)

    display.heading("the trained detector")
    inference = evaluation.inference_time(strategy, tasks[-1], len(tasks) - 1, device, progress)
    matrices = {metric: _matrix(rows, metric, len(stages), len(tasks)) for metric in METRICS}
    time_and_peak = spent.so_far()
    peak_mb = time_and_peak.pop("peak_mb")
    summary = {
        **identity,
        "status": "complete",
        "final": {metric: continual.final_mean(matrices[metric]) for metric in METRICS},
        "average_forgetting_pct": continual.average_forgetting_pct(matrices["pixel_f1"], learned),
        "forgetting": {metric: continual.forgetting(matrices[metric], learned) for metric in METRICS},
        "backward_transfer": {m: continual.backward_transfer(matrices[m], learned) for m in METRICS},
        "forward_transfer": {m: continual.forward_transfer(matrices[m], learned) for m in METRICS},
        "memory": {**footprint.measure(strategy), "peak_mb": peak_mb},
        "time": {**time_and_peak, "inference_ms_per_image": inference},
    }
    directory.write_summary(summary)
    just_learned = {m: [R[learned[task]][task] for task in range(len(tasks))] for m, R in matrices.items()}
    display.table(run_table(summary, just_learned, {metric: R[-1] for metric, R in matrices.items()}))
    return summary


@contextmanager
def memory_named(phase: str, setting: str) -> Iterator[None]:
    """Inside, a GPU that runs out of memory is an error that names the phase and the setting to lower.

    Raises:
        UserError: it did.
    """
    try:
        yield
    except torch.cuda.OutOfMemoryError as error:
        free, total = torch.cuda.mem_get_info() if torch.cuda.is_available() else (0, 0)
        raise UserError(
            f"the GPU's memory was not enough for {phase} ({free / 1e6:,.0f} of {total / 1e6:,.0f} MB free): lower "
            f"{setting}, then backbone.feature_memory_mb, or take gpu.precision=bf16; what was finished is kept"
        ) from error


class Spent:
    """Seconds of training and evaluation and the peak of memory, over all processes that worked on a run."""

    def __init__(self, device: torch.device):
        self.device = device
        self.seconds = {"train_s": 0.0, "eval_s": 0.0}
        self.peak_mb = 0.0
        self._under_way: tuple[str, float] | None = None

    @contextmanager
    def on(self, what: str) -> Iterator[None]:
        """Inside, time is spent on this."""
        begin = time.perf_counter()
        self._under_way = what, begin
        try:
            yield
        finally:
            self._under_way = None
        self.seconds[what] += time.perf_counter() - begin

    def so_far(self) -> dict[str, float]:
        """What was spent up to now: `train_s`, `eval_s` and `peak_mb`."""
        self.peak_mb = max(self.peak_mb, footprint.peak(self.device) / footprint.MB)
        seconds = dict(self.seconds)
        if self._under_way:
            what, begin = self._under_way
            seconds[what] += time.perf_counter() - begin
        return {**seconds, "peak_mb": self.peak_mb}

    def restore(self, spent: Mapping[str, float]) -> None:
        """Go on from what `so_far` gave."""
        self.seconds = {what: spent[what] for what in self.seconds}
        self.peak_mb = spent["peak_mb"]


def _means(rows: list[Row], learned: list[int], stage: int) -> str:
    """A stage's means over the tasks seen, for people."""
    values = {
        metric: [v for s, task, _, m, v in rows if (s, m) == (stage, metric) and learned[task] <= stage]
        for metric in METRICS
    }
    means = {metric: continual.final_mean([values[metric]]) for metric in METRICS}
    return (
        f"image AUROC {number(means['image_auroc'])}, pixel AUROC {number(means['pixel_auroc'])}, "
        f"pixel F1 {number(means['pixel_f1'])}, AU-PRO {number(means['aupro'])} over "
        f"{len(values['pixel_f1'])} seen"
    )


def _matrix(rows: list[Row], metric: str, stages: int, tasks: int) -> list[list[float | None]]:
    """R of one metric: [stage][task]."""
    R: list[list[float | None]] = [[None] * tasks for _ in range(stages)]
    for stage, index, _, name, value in rows:
        if name == metric:
            R[stage][index] = value
    return R
