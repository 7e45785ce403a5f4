"""The protocol: for each stage, learn; then for each task, evaluate; record; checkpoint."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal

import torch

from clbench import evaluation, footprint, thresholds
from clbench.data.stream import Task
from clbench.errors import UserError
from clbench.footprint import memory_named
from clbench.interruption import Interruption
from clbench.methods.base import check_frozen, frozen_digest
from clbench.metrics import continual
from clbench.metrics.curves import METRICS
from clbench.recording import heat_maps
from clbench.recording.checkpoint import Checkpoints
from clbench.recording.recorder import Recorder
from clbench.recording.run_directory import RunDirectory
from clbench.spent import Spent
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
    recorder: Recorder,
    *,
    evaluate: str,
    maps: bool | Literal["few"],
    checkpoint_s: float,
) -> dict[str, Any]:
    """Learn the stream and evaluate it after every stage, from where the run was left if it was begun.

    Args:
        identity: what summary.json says of the run before its results.
        interruption: looked for wherever the run can be left.
        recorder: told of everything found.
        evaluate: `seen` tasks after each stage, or `all`.
        maps: write heat maps: `few` test images of each task after every stage that changes them; or, beside these,
            all after the stage that learns a task, and after the last.
        checkpoint_s: seconds between two checkpoints of a training under way.

    Returns:
        The summary.

    Raises:
        Stopped: a signal asked for it; the same run continues from here.
        UserError: the run was begun with other images; or its loss became no number.
    """
    stages = strategy.stages(len(tasks))
    learned = [stage for task in range(len(tasks)) for stage in range(len(stages)) if task in stages[stage]]
    rows: list[Row] = []
    stream = {task.name: task.fingerprint() for task in tasks}
    frozen = frozen_digest(strategy.detector)
    losses: list[tuple[int, int, float]] = []  # stage, epoch, mean loss
    spent = Spent(device)

    def on_epoch(stage: int, epoch: int, loss: float) -> None:
        losses.append((stage, epoch, loss))
        recorder.epoch(stage, stage * strategy.detector.epochs + epoch, loss)

    progress = interruption.watching(display.progress)
    checkpoints = Checkpoints(
        directory.path / "checkpoint",
        str(device),
        every_s=checkpoint_s,
        urgent=interruption.urgent,
        saved=interruption.saved,
        beside=lambda: {"stream": stream, "frozen": frozen, "spent": spent.so_far(), "losses": losses},
    )
    strategy.bookmark, strategy.detector.progress = checkpoints, progress
    strategy.on_epoch = on_epoch
    first, last_learned, data = 0, -1, None
    if saved := checkpoints.load_stage():
        last_learned, tensors, data = saved
        strategy.restore(tensors)
        rows = [tuple(row) for row in data["rows"]]
        first = last_learned
    begun = checkpoints.peek(last_learned + 1)
    if left := begun or data:
        _check_stream(left["stream"], stream, directory)
        check_frozen(left.get("frozen"), frozen, directory.path)
        spent.restore(left["spent"])
        for what in left["losses"]:  # a killed process may have had yet to tell
            on_epoch(*what)
        where = f"in stage {last_learned + 2}" if begun else f"after stage {last_learned + 1}"
        display.line(f"continuing {where} of {len(stages)}")

    for stage in range(first, len(stages)):
        names = "+".join(tasks[task].name for task in stages[stage])
        together = len(stages) < len(tasks)
        title = "all tasks" if together else f"task {stage + 1}/{len(stages)} {names}"
        display.heading(title)
        if stage > last_learned:
            with spent.on("train_s"), memory_named(f"learning {names}", "method.batch_size"):
                train = [tasks[task].train.images for task in stages[stage]]
                with _titled(title):
                    strategy.learn(stage, (torch.cat(train) if len(train) > 1 else train[0]).to(device))
                strategy.detector.release(strategy.stored_images())
            checkpoints.save_stage(stage, strategy.state(), {"rows": rows})

        for index, task in enumerate(tasks):
            done = any(row[:2] == (stage, index) for row in rows)
            if done or (learned[index] > stage and evaluate == "seen"):
                continue
            with spent.on("eval_s"), memory_named(f"evaluating {task.name}", "backbone.batch_size"):
                if stage > 0 and strategy.unchanged(stage, learned[index]) and maps is not True:
                    result = {m: v for s, i, _, m, v in rows if (s, i) == (stage - 1, index)}
                else:
                    display.heading(f"{title}, {task.name}")
                    with _titled(f"{title}, {task.name}"):
                        prediction = evaluation.predict(strategy, task.test, index, device, progress)
                    result = evaluation.measure(prediction, task.test)
                    recorder.pictures(stage, task.name, heat_maps.few(prediction.maps, task.test))
                    pictures = directory.path / "maps" / task.name
                    if maps:
                        heat_maps.write_few(prediction.maps, task.test, pictures / "few", stage)
                    if maps is True and stage in (learned[index], len(stages) - 1):
                        heat_maps.write(prediction.maps, task.test, pictures, stage)
            rows += [(stage, index, task.name, metric, result[metric]) for metric in METRICS]
            checkpoints.update_stage(stage, {"rows": rows})
        directory.write_metrics(rows)
        for earlier in range(stage) if stage == first else []:  # what a killed process had yet to tell
            recorder.stage(earlier, _results(rows, learned, earlier))
        results = _results(rows, learned, stage)
        recorder.stage(stage, results)
        seen = sum(at <= stage for at in learned)
        display.line(f"{title}: {_in_words(results['mean'])} over {seen} seen")

    display.heading("the trained detector")
    inference = evaluation.inference_time(strategy, tasks[-1], len(tasks) - 1, device, progress)
    matrices = {metric: _matrix(rows, metric, len(stages), len(tasks)) for metric in METRICS}
    time_and_peak = spent.so_far()
    peak_mb = time_and_peak.pop("peak_mb")
    with memory_named("setting thresholds", "backbone.batch_size"):
        directory.write_thresholds(thresholds.calibrate(strategy, tasks, device, progress))
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
    said = recorder.finish(summary, matrices)
    directory.write_summary(summary)
    just_learned = {m: [R[learned[task]][task] for task in range(len(tasks))] for m, R in matrices.items()}
    display.table(run_table(summary, just_learned, {metric: R[-1] for metric, R in matrices.items()}))
    if said:
        display.line(said)
    return summary


def _check_stream(before: Mapping[str, str], now: Mapping[str, str], directory: RunDirectory) -> None:
    """Whether a run that is continued has the tasks that it was begun with.

    Raises:
        UserError: it has others.
    """
    if list(before.items()) == list(now.items()):
        return
    changed = [
        *(f"'{name}' joined" for name in now if name not in before),
        *(f"'{name}' is gone" for name in before if name not in now),
        *(f"the images of '{name}' changed" for name in now if before.get(name, now[name]) != now[name]),
    ]
    raise UserError(
        f"{directory.path} was begun with other images ({', '.join(changed) or 'in another order'}): put them back, "
        "take another experiment=NAME, or overwrite=true"
    )


@contextmanager
def _titled(title: str) -> Iterator[None]:
    """Inside, a training that diverged is an error that says where."""
    try:
        yield
    except Diverged as error:
        raise UserError(f"{title}: {error}") from error


def _results(rows: list[Row], learned: list[int], stage: int) -> dict[str, dict[str, float | None]]:
    """A stage's results: task, `mean` over the tasks seen, or `forgetting` -> metric -> value."""
    results: dict[str, dict[str, float | None]] = {}
    for at, _, task, metric, value in rows:
        if at == stage:
            results.setdefault(task, {})[metric] = value
    R = {metric: _matrix(rows, metric, stage + 1, len(learned)) for metric in METRICS}
    seen = [index for index, at in enumerate(learned) if at <= stage]
    results["mean"] = {m: continual.final_mean([[R[m][stage][index] for index in seen]]) for m in METRICS}
    results["forgetting"] = {m: continual.forgetting(R[m], learned) for m in METRICS}
    return results


def _in_words(means: Mapping[str, float | None]) -> str:
    return (
        f"image AUROC {number(means['image_auroc'])}, pixel AUROC {number(means['pixel_auroc'])}, "
        f"pixel F1 {number(means['pixel_f1'])}, AU-PRO {number(means['aupro'])}"
    )


def _matrix(rows: list[Row], metric: str, stages: int, tasks: int) -> list[list[float | None]]:
    """R of one metric: [stage][task]."""
    R: list[list[float | None]] = [[None] * tasks for _ in range(stages)]
    for stage, index, _, name, value in rows:
        if name == metric and stage < stages:
            R[stage][index] = value
    return R
