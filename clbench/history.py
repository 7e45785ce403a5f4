"""What a run has done so far, and where it stands written.

What was measured goes into a journal, which is appended to, and what was learned into checkpoints, which are
replaced. A line of the journal counts once the checkpoint of its stage is there: a process that continues removes
the other lines.
"""

from collections.abc import Iterable
from dataclasses import asdict
from typing import Any

from clbench.assembly import Assembly
from clbench.config.files import changed_files
from clbench.data.stream import fingerprints
from clbench.data.unchanged import changes
from clbench.decisions import Learned
from clbench.errors import UserError
from clbench.interruption import Interruption
from clbench.methods.base import check_frozen, frozen_digest
from clbench.metrics.names import need
from clbench.recording.checkpoint import Checkpoints
from clbench.recording.metrics_file import MetricRow
from clbench.recording.recorder import Recorder
from clbench.recording.run_directory import RunDirectory
from clbench.results import Evaluation, Results
from clbench.spent import Spent
from clbench.thresholds import Thresholds


class History:
    """The evaluations, epochs, time and memory of a run, over all processes that worked on it.

    Args:
        assembly: everything that the run is made of; its strategy is restored.
        directory: where journal, metrics.csv and checkpoints are.
        recorder: told of every epoch and of every stage that an earlier process recorded: that one may have been
            killed before it told.
        interruption: asked whether to save, and told when all is saved.

    Attributes:
        stages: the indices of the tasks that each stage learns.
        results: the evaluations.
        thresholds: those that were set when a stage was learned, by stage, where a metric needs them.
        spent: time and memory.
        checkpoints: what was learned.
        last_learned: the last stage that an earlier process learned, 0-based; -1 where none is.
        continued: where an earlier process stopped, to show to people; None where this one is the first.

    Raises:
        UserError: the run was begun with other images, files or frozen weights, its journal lacks results, or a
            file cannot be read or written.
    """

    def __init__(
        self, assembly: Assembly, directory: RunDirectory, recorder: Recorder, interruption: Interruption
    ):
        self.directory, self.recorder = directory, recorder
        self.strategy, self.tasks = assembly.strategy, assembly.tasks
        self.stages = self.strategy.stages(len(self.tasks))
        categories = [[category.name for category in task.categories] for task in self.tasks]
        self._has_images = [len(each.test) > 0 for task in self.tasks for each in task.categories]
        self.results = Results(categories, self.stages, assembly.metrics)
        self.spent = Spent(assembly.device)
        self._stream, self._files = fingerprints(self.tasks), assembly.identity["files"]
        self._frozen = frozen_digest(self.strategy.detector)
        self.checkpoints = Checkpoints(
            directory.path / "checkpoint",
            str(assembly.device),
            every_s=assembly.config.checkpoint_s,
            urgent=interruption.urgent,
            saved=interruption.saved,
            beside=self._beside,
            about={"stream": self._stream, "files": self._files, "frozen": self._frozen},
        )
        evaluate = assembly.config.evaluate
        self._all = evaluate == "all"
        step = evaluate.removeprefix("every:")
        self._step = int(step) if step.isdecimal() else len(self.stages) if evaluate == "last" else 1
        self.continued: str | None = None
        self._journal = directory.journal()
        self.thresholds: dict[int, Learned] = {}
        self._needs_thresholds = need(assembly.metrics, "thresholds")
        self._epochs = [0] * (len(self.stages) + 1)  # of all stages before each
        self.last_learned = self._restore()
        self._write_metrics()

    def evaluates(self, stage: int) -> bool:
        """Whether categories are evaluated after a stage."""
        return (stage + 1) % self._step == 0 or stage == len(self.stages) - 1

    def to_evaluate(self, stage: int) -> list[int]:
        """The indices of the categories that are to be evaluated after a stage and were not yet."""
        if not self.evaluates(stage):
            return []
        wanted = range(len(self.results.categories)) if self._all else self.results.seen(stage)
        lacking = (category for category in wanted if not self.results.evaluated(stage, category))
        return [category for category in lacking if self.has_images(category) or self.known(stage, category)]

    def has_images(self, category: int) -> bool:
        """Whether there are test images of a category; of a product that was learned in an earlier run there may be none."""
        return self._has_images[category]

    def known(self, stage: int, category: int) -> Evaluation | None:
        """What was measured of a category at the last evaluation before a stage, as no prediction has changed since; else None.

        Which models were chosen is not a part of it.
        """
        for earlier in range(stage - 1, -1, -1):
            if not self.strategy.unchanged(earlier + 1, self.results.learned[category]):
                return None
            if (values := self.results.get(earlier, category)) is not None:
                return Evaluation(
                    values, pixel_fpr_deviation=self.results.pixel_fpr_deviation(earlier, category)
                )
        return None

    def add_epoch(self, stage: int, epoch: int, loss: float) -> None:
        """Keep an epoch's mean loss; stage and epoch are 0-based.

        Raises:
            UserError: the disk is full or may not be written.
        """
        self._journal.append({"kind": "epoch", "stage": stage, "epoch": epoch, "loss": loss})
        self._tell_epoch(stage, epoch, loss)

    def add_learned(self, stage: int) -> None:
        """Keep what the strategy has learned by the end of a stage.

        Raises:
            UserError: the disk is full or may not be written.
        """
        self._journal.flush()  # before the checkpoints go from which its lines could be made again
        scale = dict(self.strategy.detector.gradient_scale)
        self.checkpoints.save_stage(stage, self.strategy.state(), {"gradient_scale": scale} if scale else {})

    def lacks_thresholds(self, stage: int) -> bool:
        """Whether thresholds are to be set for a stage that was learned, and were not yet."""
        return self._needs_thresholds and stage not in self.thresholds

    def add_thresholds(self, stage: int, found: Learned) -> None:
        """Keep the thresholds that were set when a stage was learned.

        Raises:
            UserError: the disk is full or may not be written.
        """
        self.thresholds[stage] = found
        about = {"thresholds": asdict(found.thresholds), "scores": found.scores}
        self._journal.append({"kind": "thresholds", "stage": stage, **about})

    def add_evaluation(self, stage: int, category: int, found: Evaluation) -> None:
        """Keep what was measured of a category after a stage.

        Raises:
            UserError: the disk is full or may not be written.
        """
        self.results.add(stage, category, *found)
        name = self.results.categories[category]
        entry: dict[str, Any] = {
            "kind": "evaluation",
            "stage": stage,
            "category": name,
            "values": found.values,
        }
        if found.chosen is not None:
            entry["chosen"] = found.chosen
        if found.pixel_fpr_deviation is not None:
            entry["pixel_fpr_deviation"] = found.pixel_fpr_deviation
        self._journal.append({**entry, "spent": self.spent.so_far()})
        self.directory.append_metrics(self._rows(stage, category))

    def close(self) -> None:
        """Write metrics.csv whole, and wait until all is on the disk.

        Raises:
            UserError: the disk is full or may not be written.
        """
        self._journal.flush()
        self._write_metrics()

    def _restore(self) -> int:
        """Restore what an earlier process saved, and tell the recorder everything again.

        Returns:
            The last stage that is learned, 0-based; -1 where none is.

        Raises:
            UserError: the run was begun with other images, files or frozen weights, or its journal lacks results.
        """
        last, data = -1, None
        if saved := self.checkpoints.load_stage():
            last, tensors, data = saved
            self.strategy.restore(tensors)
            self.strategy.detector.gradient_scale = data.get("gradient_scale", {})
        begun = self.checkpoints.peek(last + 1)
        if newest := begun or data:
            now = self._stream
            if self.directory.parent():  # what joined since is what the run is for
                now = {name: found for name, found in now.items() if name in newest["stream"]}
            if changed := changes(newest["stream"], now):
                way = "take another experiment=NAME, or overwrite=true"
                if self.directory.parent():
                    way = "or give another --output and --without-images"
                raise UserError(
                    f"{self.directory.path} was begun with other images ({changed}): put them back, {way}"
                )
            if changed := changed_files(newest.get("files", {}), self._files):
                raise UserError(
                    f"{self.directory.path} was begun with other files ({changed}): put them back, take another "
                    "experiment=NAME, or overwrite=true"
                )
            check_frozen(newest.get("frozen"), self._frozen, self.directory.path)
            self.spent.restore(newest["spent"])
            where = f"in stage {last + 2}" if begun else f"after stage {last + 1}"
            self.continued = f"{where} of {len(self.stages)}"
        try:
            self._take(self._valid_entries(last, begun["epoch"] if begun else 0))
        except (KeyError, TypeError, IndexError) as error:
            raise UserError(
                f"{self._journal.path} holds what no run of these categories has written ({type(error).__name__}: {error}): "
                "put it back, take another experiment=NAME, or overwrite=true"
            ) from error
        # Of a run that this one goes on from, some stage may have gone that counted for every:N: its journal has what it measured.
        inherited = self._step > 1 and self.directory.parent() is not None
        measured = {stage for stage, _ in self.results.evaluations()}
        for stage in range(last):
            if ((stage in measured or not inherited) and self.to_evaluate(stage)) or self.lacks_thresholds(
                stage
            ):
                raise UserError(
                    f"{self._journal.path} lacks results of stage {stage + 1}, and what was learned then is gone: put "
                    "it back, take another experiment=NAME, or overwrite=true"
                )
            if stage in measured or (self.evaluates(stage) and not inherited):
                self.recorder.stage(stage, self.results.after(stage))
        return last

    def _take(self, entries: Iterable[dict[str, Any]]) -> None:
        """Take over what an earlier process wrote into the journal, and tell the recorder its epochs.

        Raises:
            KeyError, TypeError, IndexError: an entry is of another run.
        """
        numbers = {name: number for number, name in enumerate(self.results.categories)}
        for entry in entries:
            if entry["kind"] == "epoch":
                self._tell_epoch(entry["stage"], entry["epoch"], entry["loss"])
            elif entry["kind"] == "thresholds":
                found = Learned(Thresholds(**entry["thresholds"]), entry["scores"])
                self.thresholds[entry["stage"]] = found
            elif entry["stage"] < len(self.stages) - 1 or set(self.results.metrics) <= set(entry["values"]):
                # (An earlier version measured fewer, which stay undefined, but for the last stage's: they are measured anew.)
                optional = entry.get("chosen"), entry.get("pixel_fpr_deviation")
                self.results.add(entry["stage"], numbers[entry["category"]], entry["values"], *optional)
                self.spent.restore(entry["spent"])

    def _valid_entries(self, last: int, epochs: int) -> list[dict[str, Any]]:
        """The journal's entries that checkpoints stand behind; the others are removed from the file.

        Args:
            last: the last stage with a checkpoint of its end, 0-based; -1 where none has.
            epochs: the number of epochs of the stage after it that a checkpoint holds.
        """
        entries, self._journal.entries = self._journal.entries, []  # they may be many, and are needed once
        valid = [
            entry
            for entry in entries
            if entry["stage"] <= last
            or (entry["stage"] == last + 1 and entry["kind"] == "epoch" and entry["epoch"] < epochs)
        ]
        if len(valid) != len(entries):
            self._journal.rewrite(valid)
        return valid

    def _beside(self) -> dict[str, Any]:
        """What a checkpoint holds beside its own data; what the journal holds by now is on the disk then."""
        self._journal.flush()
        return {"spent": self.spent.so_far()}

    def _tell_epoch(self, stage: int, epoch: int, loss: float) -> None:
        """Tell the recorder an epoch's mean loss, with the epoch counted over all stages."""
        self._epochs[stage + 1] = self._epochs[stage] + epoch + 1
        self.recorder.epoch(stage, self._epochs[stage] + epoch, loss)

    def _write_metrics(self) -> None:
        """Write metrics.csv whole."""
        self.directory.write_metrics(
            row for where in self.results.evaluations() for row in self._rows(*where)
        )

    def _rows(self, stage: int, category: int) -> list[MetricRow]:
        """The rows of metrics.csv for the evaluation of a category after a stage; none where there was none."""
        task = self.results.task_of[category]
        where = (stage, task, self.tasks[task].name, self.results.categories[category])
        values = self.results.get(stage, category) or {}
        return [MetricRow(*where, metric, value) for metric, value in values.items()]
