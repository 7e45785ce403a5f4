"""The protocol: for each task, learn; then for each category, evaluate; record; checkpoint."""

import itertools
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch

from clbench import evaluation, footprint, thresholds
from clbench.assembly import Assembly
from clbench.data.stream import fingerprints
from clbench.errors import UserError
from clbench.footprint import memory_named
from clbench.interruption import Interruption
from clbench.methods.base import check_frozen, frozen_digest
from clbench.metrics.curves import METRICS
from clbench.recording import heat_maps
from clbench.recording.checkpoint import Checkpoints
from clbench.recording.recorder import Recorder
from clbench.recording.run_directory import MetricRow, RunDirectory
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
    """Learn the stream and evaluate it after every stage, or do what an earlier process left of that.

    Args:
        assembly: everything that the run is made of.
        directory: where results, checkpoints and maps go.
        display: the bar and the lines on the terminal.
        interruption: asked wherever the run can stop and be continued.
        recorder: told of every loss, heat map and result.

    Returns:
        What summary.json holds.

    Raises:
        Stopped: a signal asked for it; the same command continues from here.
        UserError: the run was begun with other images or other frozen weights, its journal lacks results, the
            loss, a weight or a map is not finite, the GPU's memory is not enough, or a file cannot be
            written.
    """
    course = Course(assembly, directory, display, interruption, recorder)
    for stage in course.remaining():
        course.learn(stage)
        for category in course.to_evaluate(stage):
            course.evaluate(stage, category)
        course.record(stage)
    return course.finish()


class Course:
    """A run on its way through the stream: what `run` does, step by step.

    What was measured goes into a journal, which is appended to, and what was learned into checkpoints, which
    are replaced. A line of the journal counts once the checkpoint of its stage is there: a process that
    continues removes the other lines.

    Args:
        assembly, directory, display, interruption, recorder: as for `run`.

    Raises:
        UserError: the run was begun with other images or other frozen weights, its journal lacks results, or
            a file cannot be read or written.
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
        self.stream = fingerprints(self.tasks)
        self.frozen = frozen_digest(self.strategy.detector)
        self.progress = interruption.watching(display.progress)
        self.checkpoints = Checkpoints(
            directory.path / "checkpoint",
            str(assembly.device),
            every_s=assembly.config.checkpoint_s,
            urgent=interruption.urgent,
            saved=interruption.saved,
            beside=self._beside,
        )
        self.strategy.bookmark, self.strategy.detector.progress = self.checkpoints, self.progress
        self.strategy.on_epoch = self._on_epoch
        self.journal = directory.journal()
        self.epochs = [0] * (len(self.stages) + 1)  # of all stages before each
        self.last_learned = self._continue()
        self._write_metrics()

    def remaining(self) -> range:
        """The stages to go through, 0-based: the last learned one, which may lack evaluations, and on."""
        return range(max(self.last_learned, 0), len(self.stages))

    def learn(self, stage: int) -> None:
        """Learn a stage, unless an earlier process did, and save what was learned.

        Raises:
            Stopped: a signal asked for it.
            UserError: loss or weights are not finite, the GPU's memory is not enough, or a file cannot be
                written.
        """
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
        self.journal.flush()  # before the checkpoints go from which its lines could be made again
        self.checkpoints.save_stage(stage, self.strategy.state(), {})

    def to_evaluate(self, stage: int) -> list[int]:
        """The indices of the categories that are to be evaluated after a stage and were not yet."""
        every = self.assembly.config.evaluate == "all"
        wanted = range(len(self.categories)) if every else self.results.seen(stage)
        return [category for category in wanted if self.results.get(stage, category) is None]

    def evaluate(self, stage: int, category: int) -> None:
        """Evaluate a category after a stage, and keep the metrics.

        Where the strategy says that its predictions did not change, the last metrics are taken.

        Raises:
            Stopped: a signal asked for it.
            UserError: a map is not finite, the GPU's memory is not enough, or a file cannot be written.
        """
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
        """Predict a category's test images, write the heat maps that are asked for, and give the metrics."""
        test, name = self.categories[category].test, self.categories[category].name
        maps = self.assembly.config.maps
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
            heat_maps.write_all(prediction.maps, test, pictures, stage)
        return evaluation.metrics_of(prediction, test)

    def record(self, stage: int) -> None:
        """Give a stage's results to the recorder and show their means on the terminal."""
        results = self.results.after(stage)
        self.recorder.stage(stage, results)
        seen = len(self.results.seen(stage))
        self.display.line(f"{self._title(stage)}: {_sentence(results['mean'])} over {seen} seen")

    def finish(self) -> dict[str, Any]:
        """Time the trained detector, set its thresholds, and write and show the summary.

        Returns:
            What summary.json holds.

        Raises:
            Stopped: a signal asked for it.
            UserError: a map is not finite, the GPU's memory is not enough, or a file cannot be written.
        """
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
        self._write_metrics()  # so that all of it is on the disk before the run is complete
        message = self.recorder.finish(summary, {metric: self.results.matrix(metric) for metric in METRICS})
        self.directory.write_summary(summary)
        self.display.table(run_table(summary, self.results))
        if message:
            self.display.line(message)
        return summary

    def _continue(self) -> int:
        """Restore what an earlier process saved, and tell the recorder everything again: that one may have
        been killed before it did.

        Returns:
            The last stage that is learned, 0-based; -1 where none is.

        Raises:
            UserError: the run was begun with other images or other frozen weights, or its journal lacks
                results.
        """
        last, data = -1, None
        if saved := self.checkpoints.load_stage():
            last, tensors, data = saved
            self.strategy.restore(tensors)
        begun = self.checkpoints.peek(last + 1)
        if newest := begun or data:
            _check_stream(newest["stream"], self.stream, self.directory)
            check_frozen(newest.get("frozen"), self.frozen, self.directory.path)
            self.spent.restore(newest["spent"])
            where = f"in stage {last + 2}" if begun else f"after stage {last + 1}"
            self.display.line(f"continuing {where} of {len(self.stages)}")
        # The journal may know epochs of the stage after the last that came after its checkpoint.
        epochs = begun["epoch"] if begun else 0
        valid = [
            entry
            for entry in self.journal.entries
            if entry["stage"] <= last
            or (entry["stage"] == last + 1 and entry["kind"] == "epoch" and entry["epoch"] < epochs)
        ]
        if len(valid) != len(self.journal.entries):
            self.journal.rewrite(valid)
        self.journal.entries = []  # they may be many, and are taken now
        numbers = {name: number for number, name in enumerate(self.results.categories)}
        for entry in valid:
            if entry["kind"] == "epoch":
                self._tell_epoch(entry["stage"], entry["epoch"], entry["loss"])
            else:
                self.results.add(entry["stage"], numbers[entry["category"]], entry["values"])
                self.spent.restore(entry["spent"])
        for stage in range(last):
            if self.to_evaluate(stage):
                raise UserError(
                    f"{self.journal.path} lacks results of stage {stage + 1}, and what was learned then is gone: put it "
                    "back, take another experiment=NAME, or overwrite=true"
                )
            self.recorder.stage(stage, self.results.after(stage))
        return last

    def _beside(self) -> dict[str, Any]:
        """What every checkpoint holds beside its own data; what the journal holds by now is on the disk then."""
        self.journal.flush()
        return {"stream": self.stream, "frozen": self.frozen, "spent": self.spent.so_far()}

    def _write_metrics(self) -> None:
        """Write metrics.csv whole."""
        evaluations = itertools.product(range(len(self.stages)), range(len(self.categories)))
        rows = [row for stage, category in evaluations for row in self._rows(stage, category)]
        self.directory.write_metrics(rows)

    def _on_epoch(self, stage: int, epoch: int, loss: float) -> None:
        """Write an epoch's mean loss into the journal and tell the recorder."""
        self.journal.append({"kind": "epoch", "stage": stage, "epoch": epoch, "loss": loss})
        self._tell_epoch(stage, epoch, loss)

    def _tell_epoch(self, stage: int, epoch: int, loss: float) -> None:
        """Tell the recorder an epoch's mean loss, with the epoch counted over all stages."""
        self.epochs[stage + 1] = self.epochs[stage] + epoch + 1
        self.recorder.epoch(stage, self.epochs[stage] + epoch, loss)

    def _title(self, stage: int) -> str:
        """What a stage is called on the terminal and in errors."""
        if len(self.stages) < len(self.tasks):
            return "all tasks"
        return f"task {stage + 1}/{len(self.stages)} {self.tasks[stage].name}"

    def _rows(self, stage: int, category: int) -> list[MetricRow]:
        """The rows of metrics.csv for the evaluation of a category after a stage.

        None where there was none.
        """
        values = self.results.get(stage, category)
        task = self.results.task_of[category]
        where = (stage, task, self.tasks[task].name, self.results.categories[category])
        return [(*where, metric, value) for metric, value in (values or {}).items()]


def _check_stream(before: Mapping[str, str], now: Mapping[str, str], directory: RunDirectory) -> None:
    """Check that a run that is continued has the tasks and images that it was begun with.

    Args:
        before, now: task name -> fingerprint of its images, in the stream's order.

    Raises:
        UserError: it has others, or in another order.
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
    """Inside, a loss, weight or map that is not finite raises a UserError that begins with `title`.

    Raises:
        UserError: there was one.
    """
    try:
        yield
    except Diverged as error:
        raise UserError(f"{title}: {error}") from error


def _sentence(means: Mapping[str, float | None]) -> str:
    """The means of a stage for the terminal: metric -> value in [0, 1]; None where undefined."""
    return (
        f"image AUROC {number(means['image_auroc'])}, pixel AUROC {number(means['pixel_auroc'])}, "
        f"pixel F1 {number(means['pixel_f1'])}, AU-PRO {number(means['aupro'])}"
    )
