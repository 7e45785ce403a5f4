"""The protocol: for each task, learn; then for each category, evaluate; record; checkpoint."""

from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from typing import Any

from clbench import evaluation, footprint, thresholds
from clbench.assembly import OF_FEATURES, Assembly, assemble, build_recorder, identity, memory_for
from clbench.config.schema import Config
from clbench.data.images import Images
from clbench.decisions import Learned
from clbench.errors import UserError
from clbench.history import History
from clbench.interruption import Interruption
from clbench.measuring import Measuring
from clbench.methods.base import silent
from clbench.recollection import Recollection
from clbench.recording import heat_maps
from clbench.recording.provenance import made_by
from clbench.recording.recorder import Recorder
from clbench.recording.run_directory import RunDirectory
from clbench.results import Evaluation
from clbench.strategies.base import ignore_epoch
from clbench.terminal import Display, number, run_table
from clbench.training import Diverged


def run_in(
    directory: RunDirectory,
    config: Config,
    interruption: Interruption,
    *,
    alone: bool,
    more: Mapping[str, Any],
    departures: Mapping[str, Any],
) -> None:
    """Do the run of a config, or what is left of it, in a directory that this process has locked; a failure is written there.

    Args:
        config: the run's.
        interruption: as for `run`.
        alone: whether no other run writes to this terminal.
        more: what the run's identity says beside what its config does.
        departures: the settings that its protocol has otherwise.

    Raises:
        Stopped: as `run`.
        UserError: as `run`, or images, weights or machine do not fit the config.
    """
    with (
        directory.reporting(identity(config)) as report,
        Display(directory.path.name, alone=alone) as display,
    ):
        display.heading(directory.path.name)
        made = assemble(config, interruption.watching(display.progress))
        made.identity.update(more)
        directory.write_config(config.plain(), departures, made_by(made.device))
        report(made.identity)
        run(made, directory, display, interruption, build_recorder(made, directory.path, display.line))


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
    try:
        for stage in course.remaining():
            course.learn(stage)
            for category in course.history.to_evaluate(stage):
                course.evaluate(stage, category)
            course.settle()
            course.record(stage)
        return course.finish()
    finally:
        course.let_go()


class Course:
    """A run on its way through the stream: what `run` does, step by step.

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
        self.categories = [category for task in self.tasks for category in task.categories]
        self._watching = interruption.watching(display.progress)
        with self._memory("what an earlier process learned"):
            self.history = History(assembly, directory, recorder, interruption)
        self.stages, self.results = self.history.stages, self.history.results
        self.measuring = Measuring(self.history, assembly.config.metrics)
        self.spent = self.history.spent
        self.strategy.bookmark, self.strategy.on_epoch = self.history.checkpoints, self.history.add_epoch
        self.strategy.detector.progress = self.progress
        self._recollection = Recollection(assembly.config.evaluation_memory_mb * 10**6)
        self._thread = ThreadPoolExecutor(1)
        # Stage, category, and the evaluation that is still computed.
        self._to_come: tuple[int, int, Future[Evaluation]] | None = None
        for note in assembly.notes:
            display.line(f"note: {note}")
        if self.history.continued:
            display.line(f"continuing {self.history.continued}")

    def progress(self, phase: str, done: int, total: int, note: str = "") -> None:
        """A `Progress` that shows it, stops the run where that is asked for, and lets no counter of energy run round."""
        self._watching(phase, done, total, note)
        self.spent.meter.keep_up()

    def let_go(self) -> None:
        """End all calls back from the strategy, so that its tensors are freed as soon as the run is left."""
        self._thread.shutdown(cancel_futures=True)
        self.strategy.bookmark, self.strategy.on_epoch = None, ignore_epoch
        self.strategy.detector.progress = silent
        self.history.checkpoints.beside = dict

    def remaining(self) -> range:
        """The stages to go through, 0-based: the last learned one, which may lack evaluations, and on."""
        return range(max(self.history.last_learned, 0), len(self.stages))

    def learn(self, stage: int) -> None:
        """Learn a stage, unless an earlier process did, save what was learned, and set thresholds that are needed.

        Raises:
            Stopped: a signal asked for it.
            UserError: loss or weights are not finite, the GPU's memory is not enough, or a file cannot be
                written.
        """
        self.display.heading(self._title(stage))
        if stage > self.history.last_learned:
            self._learn(stage)
        if self.history.lacks_thresholds(stage):
            with self.spent.on("eval_s"), self._predicting("setting thresholds"), _titled(self._title(stage)):
                found = thresholds.of_stages(
                    self.strategy, self.tasks, [stage], self.assembly.device, self.progress
                )
            self.history.add_thresholds(stage, Learned(*found))

    def _learn(self, stage: int) -> None:
        """Learn a stage, and save what was learned."""
        train = [self.tasks[task].train.pieces for task in self.stages[stage]]
        names = "+".join(self.tasks[task].name for task in self.stages[stage])
        if not any(map(len, train)):
            raise UserError(
                f"{self.directory.path} has lost what was learned of {names}, and its images are not there: remove the "
                "directory and learn the new product again"
            )
        settings = "method.batch_size", "backbone.batch_size", "gpu.image_memory_mb"
        with self.spent.on("train_s"), self._memory(f"learning {names}", *settings):
            with _titled(self._title(stage)):
                self.strategy.learn(stage, Images.concatenate(train))
            self.strategy.detector.release(self.strategy.stored_images())
        with self._memory(f"saving what was learned of {names}"):
            self.history.add_learned(stage)

    def evaluate(self, stage: int, category: int) -> None:
        """Evaluate a category after a stage, and keep the metrics, or leave that to `settle`.

        Where the strategy says that its predictions did not change, the last metrics are taken.

        Raises:
            Stopped: a signal asked for it.
            UserError: a map is not finite, the GPU's memory is not enough, or a file cannot be written.
        """
        name = self.categories[category].name
        with self.spent.on("eval_s"), self._predicting(f"evaluating {name}"):
            known = self.history.known(stage, category)
            if known is None or (self.assembly.config.maps is True and self.history.has_images(category)):
                found = self._measured(stage, category)
            else:
                found = _there(known)
        self.settle()
        self._to_come = stage, category, found
        if found.done():
            self.settle()

    def settle(self) -> None:
        """Keep the metrics of the last category that was evaluated, once they are there.

        Raises:
            UserError: a file cannot be written.
        """
        if self._to_come is not None:
            stage, category, values = self._to_come
            self._to_come = None
            with self.spent.on("eval_s"), self._predicting(f"metrics of {self.categories[category].name}"):
                found = values.result()
            self.history.add_evaluation(stage, category, found)

    def _measured(self, stage: int, category: int) -> "Future[Evaluation]":
        """Predict a category's test images, and write the heat maps that are asked for; gives the metrics to come.

        Beside a GPU, a thread computes them while the next category is predicted.
        """
        test, name = self.categories[category].test, self.categories[category].name
        maps = self.assembly.config.maps
        title = f"{self._title(stage)}, {name}"
        self.display.heading(title)
        with _titled(title):
            task = self.results.task_of[category]
            prediction = evaluation.predict(
                self.strategy, test, task, self.assembly.device, self.progress, self._recollection
            )
        if self.recorder.wants_pictures:
            self.recorder.pictures(stage, name, heat_maps.few(prediction.maps, test))
        pictures = self.directory.path / "maps" / name
        if maps:
            heat_maps.write_few(prediction.maps, test, pictures / "few", stage)
        if maps is True and stage in (self.results.learned[category], len(self.stages) - 1):
            heat_maps.write_all(prediction.maps, test, pictures, stage)
        if self.assembly.device.type != "cpu":
            return self._thread.submit(self.measuring.evaluation, stage, category, prediction)
        return _there(self.measuring.evaluation(stage, category, prediction))

    def record(self, stage: int) -> None:
        """Give a stage's results, where it has some, to the recorder, and show their means on the terminal."""
        if not self.history.evaluates(stage):
            return
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
        newest = self.tasks[-1]
        tests = [category.test for category in newest.categories if len(category.test)]
        images = (tests[0] if tests else newest.train).pieces
        with self._predicting("timing"):
            cost = evaluation.inference_cost(
                self.strategy, images, last, device, self.progress, self.spent.meter
            )
        spent = self.spent.so_far()
        with self._predicting("setting thresholds"):
            earlier = self.directory.thresholds() if self.directory.parent() else None
            found = thresholds.calibrate(self.strategy, self.tasks, device, self.progress, earlier)
        self.directory.write_thresholds(found)
        self.history.close()  # so that all of it is on the disk before the run is complete
        summary = {
            **self.assembly.identity,
            "status": "complete",
            **self.results.summary([task.name for task in self.tasks]),
            **self.measuring.summary(),
            "metrics_sha256": self.directory.metrics_digest(),
            "memory": {**footprint.measure(self.strategy), "peak_mb": spent["peak_mb"]},
            "time": {
                "train_s": spent["train_s"],
                "eval_s": spent["eval_s"],
                "inference_ms_per_image": cost["ms"],
            },
            "energy": {"source": self.spent.meter.source, **_energy(spent, cost)},
            "operations": {"inference_gflop_per_image": cost["gflop"]},
        }
        written = self._write_summary(summary)
        message = self.recorder.finish(
            summary, {metric: self.results.matrix(metric) for metric in self.results.metrics}
        )
        if self.recorder.missing() != written.get("not_recorded"):
            written = self._write_summary(summary)
        with self.display.showing():
            self.display.table(run_table(summary, self.results))
        for line in (message, *(thresholds.Thresholds(**model).doubt for model in found["models"])):
            if line:
                self.display.line(line)
        return written

    def _write_summary(self, summary: dict[str, Any]) -> dict[str, Any]:
        """Write summary.json, with what the recorder has not recorded by now; gives what it holds.

        Raises:
            UserError: the disk is full or may not be written.
        """
        missing = self.recorder.missing()
        written = summary if missing is None else {**summary, "not_recorded": missing}
        self.directory.write_summary(written)
        return written

    def _memory(self, phase: str, *settings: str) -> AbstractContextManager[None]:
        """As `clbench.assembly.memory_for`, for this run: what is kept of images and their size come last."""
        ways = (*settings, *OF_FEATURES, "dataset.resize")
        return memory_for(phase, self.assembly.config, self.assembly.device, *ways)

    def _predicting(self, phase: str) -> AbstractContextManager[None]:
        """Inside, memory that is not enough for predictions raises a UserError that names the phase and the way out."""
        return self._memory(phase, "backbone.batch_size")

    def _title(self, stage: int) -> str:
        """What a stage is called on the terminal and in errors."""
        if len(self.stages) < len(self.tasks):
            return "all tasks"
        return f"task {stage + 1}/{len(self.stages)} {self.tasks[stage].name}"


def _there(known: Evaluation) -> Future[Evaluation]:
    """Metrics that need not be waited for."""
    found: Future[Evaluation] = Future()
    found.set_result(known)
    return found


def _energy(spent: Mapping[str, float], cost: Mapping[str, float]) -> dict[str, float]:
    """Joules of training, of evaluation and of an image; nothing where not all of them were measured."""
    if "train_j" not in spent or "j" not in cost:
        return {}
    return {
        "train_j": spent["train_j"],
        "eval_j": spent["eval_j"],
        "inference_j_per_image": cost["j"],
    }


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
