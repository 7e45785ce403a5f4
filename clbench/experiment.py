"""The protocol: for each task, learn; then for each category, evaluate; record; checkpoint."""

from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import torch

from clbench import evaluation, footprint, thresholds
from clbench.assembly import Assembly
from clbench.data.stream import Task
from clbench.errors import UserError
from clbench.footprint import memory_named
from clbench.interruption import Interruption
from clbench.methods.base import check_frozen, frozen_digest
from clbench.metrics.curves import METRICS
from clbench.recording import heat_maps
from clbench.recording.checkpoint import Checkpoints
from clbench.recording.recorder import Recorder
from clbench.recording.run_directory import Row, RunDirectory
from clbench.results import Results, Values
from clbench.spent import Spent
from clbench.terminal import Display, number, run_table
from clbench.training import Diverged


def run(
    assembly: Assembly,
    directory: RunDirectory,
    display: Display,
    interruption: Interruption,
    recorder: Recorder,
) -> dict[str, Any]:
    """Learn the stream and evaluate it after every stage, from where the run was left if it was begun.

    Args:
        assembly: everything that the run is made of.
        directory: where it is kept.
        interruption: looked for wherever the run can be left.
        recorder: told of everything found.

    Returns:
        The summary.

    Raises:
        Stopped: a signal asked for it; the same run continues from here.
        UserError: the run was begun with other images or frozen weights; or its loss became no number.
    """
    course = Course(assembly, directory, display, interruption, recorder)
    for stage in course.remaining():
        course.learn(stage)
        for category in course.to_evaluate(stage):
            course.evaluate(stage, category)
        course.record(stage)
    return course.finish()


class Course:
    """A run on its way through the stream.

    What it found is in a journal, which is appended to, and what it learned in checkpoints, which are replaced. A line
    of the journal counts once the checkpoint of its stage is there: a process that continues takes away the others.
    """

    def __init__(
        self,
        assembly: Assembly,
        directory: RunDirectory,
        display: Display,
        interruption: Interruption,
        recorder: Recorder,
    ):
        self.assembly, self.directory, self.display, self.recorder = assembly, directory, display, recorder
        self.strategy, self.tasks = assembly.strategy, assembly.tasks
        self.stages = self.strategy.stages(len(self.tasks))
        self.categories = [category for task in self.tasks for category in task.categories]
        self.results = Results([[c.name for c in task.categories] for task in self.tasks], self.stages)
        self.spent = Spent(assembly.device)
        with ThreadPoolExecutor() as pool:
            fingerprints = pool.map(Task.fingerprint, self.tasks)
        self.stream = {task.name: found for task, found in zip(self.tasks, fingerprints, strict=True)}
        self.frozen = frozen_digest(self.strategy.detector)
        self.progress = interruption.watching(display.progress)
        self.checkpoints = Checkpoints(
            directory.path / "checkpoint",
            str(assembly.device),
            every_s=assembly.config.checkpoint_s,
            urgent=interruption.urgent,
            saved=interruption.saved,
            beside=lambda: {"stream": self.stream, "frozen": self.frozen, "spent": self.spent.so_far()},
        )
        self.strategy.bookmark, self.strategy.detector.progress = self.checkpoints, self.progress
        self.strategy.on_epoch = self._on_epoch
        self.journal = directory.journal()
        self.last_learned = self._continue()
        directory.write_metrics(
            [
                row
                for stage in range(len(self.stages))
                for c in range(len(self.categories))
                for row in self._rows(stage, c)
            ]
        )

    def remaining(self) -> range:
        """The stages to go through; the last one learned may have evaluations left."""
        return range(max(self.last_learned, 0), len(self.stages))

    def learn(self, stage: int) -> None:
        """Learn a stage's tasks, unless it was learned before the run was left."""
        self.display.heading(self._title(stage))
        if stage <= self.last_learned:
            return
        train = [self.tasks[task].train.images for task in self.stages[stage]]
        names = "+".join(self.tasks[task].name for task in self.stages[stage])
        with self.spent.on("train_s"), memory_named(f"learning {names}", "method.batch_size"):
            with _titled(self._title(stage)):
                images = torch.cat(train) if len(train) > 1 else train[0]
                self.strategy.learn(stage, images.to(self.assembly.device))
            self.strategy.detector.release(self.strategy.stored_images())
        self.journal.flush()  # what the checkpoints before this one led to must not be lost with them
        self.checkpoints.save_stage(stage, self.strategy.state(), {})

    def to_evaluate(self, stage: int) -> list[int]:
        """The categories to evaluate after a stage that were not yet."""
        wanted = (
            range(len(self.categories))
            if self.assembly.config.evaluate == "all"
            else self.results.seen(stage)
        )
        return [category for category in wanted if self.results.get(stage, category) is None]

    def evaluate(self, stage: int, category: int) -> None:
        """Evaluate one category after a stage; where nothing that judges it changed, its results are those before."""
        name, learned = self.categories[category].name, self.results.learned[category]
        with self.spent.on("eval_s"), memory_named(f"evaluating {name}", "backbone.batch_size"):
            unchanged = stage > 0 and self.strategy.unchanged(stage, learned)
            values = self.results.get(stage - 1, category) if unchanged else None
            if values is None or self.assembly.config.maps is True:
                values = self._measure(stage, category)
        self.results.add(stage, category, values)
        entry = {"kind": "evaluation", "stage": stage, "category": name, "values": values}
        self.journal.append({**entry, "spent": self.spent.so_far()})
        self.directory.append_metrics(self._rows(stage, category))

    def _measure(self, stage: int, category: int) -> Values:
        test, name, maps = (
            self.categories[category].test,
            self.categories[category].name,
            self.assembly.config.maps,
        )
        title = f"{self._title(stage)}, {name}"
        self.display.heading(title)
        with _titled(title):
            task = self.results.task_of[category]
            prediction = evaluation.predict(self.strategy, test, task, self.assembly.device, self.progress)
        if self.recorder.wants_pictures:
            self.recorder.pictures(stage, name, heat_maps.few(prediction.maps, test))
        pictures = self.directory.path / "maps" / name
        if maps:
            heat_maps.write_few(prediction.maps, test, pictures / "few", stage)
        if maps is True and stage in (self.results.learned[category], len(self.stages) - 1):
            heat_maps.write(prediction.maps, test, pictures, stage)
        return evaluation.measure(prediction, test)

    def record(self, stage: int) -> None:
        """Tell what a stage came to."""
        results = self.results.after(stage)
        self.recorder.stage(stage, results)
        seen = len(self.results.seen(stage))
        self.display.line(f"{self._title(stage)}: {_in_words(results['mean'])} over {seen} seen")

    def finish(self) -> dict[str, Any]:
        """Time the trained detector, set its thresholds, and sum the run up."""
        self.display.heading("the trained detector")
        device, last = self.assembly.device, len(self.tasks) - 1
        images = self.tasks[-1].categories[0].test.images
        inference = evaluation.inference_time(self.strategy, images, last, device, self.progress)
        spent = self.spent.so_far()
        peak_mb = spent.pop("peak_mb")
        with memory_named("setting thresholds", "backbone.batch_size"):
            found = thresholds.calibrate(self.strategy, self.tasks, device, self.progress)
        self.directory.write_thresholds(found)
        summary = {
            **self.assembly.identity,
            "status": "complete",
            **self.results.summary(),
            "memory": {**footprint.measure(self.strategy), "peak_mb": peak_mb},
            "time": {**spent, "inference_ms_per_image": inference},
        }
        self.journal.flush()
        said = self.recorder.finish(summary, {metric: self.results.matrix(metric) for metric in METRICS})
        self.directory.write_summary(summary)
        self.display.table(run_table(summary, self.results))
        if said:
            self.display.line(said)
        return summary

    def _continue(self) -> int:
        """Take up what an earlier process left, and tell the recorder what that may not have told.

        Returns:
            The last stage that is learned; -1 where none is.

        Raises:
            UserError: the run was begun with other images or frozen weights, or its journal lacks results.
        """
        last, data = -1, None
        if saved := self.checkpoints.load_stage():
            last, tensors, data = saved
            self.strategy.restore(tensors)
        begun = self.checkpoints.peek(last + 1)
        if left := begun or data:
            _check_stream(left["stream"], self.stream, self.directory)
            check_frozen(left.get("frozen"), self.frozen, self.directory.path)
            self.spent.restore(left["spent"])
            where = f"in stage {last + 2}" if begun else f"after stage {last + 1}"
            self.display.line(f"continuing {where} of {len(self.stages)}")
        counts = [
            entry
            for entry in self.journal.entries
            if entry["stage"] <= last
            or (
                begun
                and entry["kind"] == "epoch"
                and entry["stage"] == last + 1
                and entry["epoch"] < begun["epoch"]
            )
        ]
        if len(counts) != len(self.journal.entries):
            self.journal.rewrite(counts)
        for entry in counts:
            self._take(entry)
        for stage in range(last):
            if self.to_evaluate(stage):
                raise UserError(
                    f"{self.journal.path} lacks results of stage {stage + 1}, and what was learned then is gone: put it "
                    "back, take another experiment=NAME, or overwrite=true"
                )
            self.recorder.stage(stage, self.results.after(stage))
        return last

    def _take(self, entry: Mapping[str, Any]) -> None:
        """Take an entry of an earlier process's journal."""
        if entry["kind"] == "epoch":
            self._tell_epoch(entry["stage"], entry["epoch"], entry["loss"])
            return
        self.results.add(entry["stage"], self.results.categories.index(entry["category"]), entry["values"])
        self.spent.restore(entry["spent"])

    def _on_epoch(self, stage: int, epoch: int, loss: float) -> None:
        self.journal.append({"kind": "epoch", "stage": stage, "epoch": epoch, "loss": loss})
        self._tell_epoch(stage, epoch, loss)

    def _tell_epoch(self, stage: int, epoch: int, loss: float) -> None:
        self.recorder.epoch(stage, stage * self.strategy.detector.epochs + epoch, loss)

    def _title(self, stage: int) -> str:
        if len(self.stages) < len(self.tasks):
            return "all tasks"
        return f"task {stage + 1}/{len(self.stages)} {self.tasks[stage].name}"

    def _rows(self, stage: int, category: int) -> list[Row]:
        """The rows of metrics.csv for an evaluation; none where there was none."""
        values = self.results.get(stage, category)
        task = self.results.task_of[category]
        where = (stage, task, self.tasks[task].name, self.results.categories[category])
        return [(*where, metric, value) for metric, value in (values or {}).items()]


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


def _in_words(means: Mapping[str, float | None]) -> str:
    return (
        f"image AUROC {number(means['image_auroc'])}, pixel AUROC {number(means['pixel_auroc'])}, "
        f"pixel F1 {number(means['pixel_f1'])}, AU-PRO {number(means['aupro'])}"
    )
