"""What predictions of test images say: their metrics, at stored thresholds too, and what these rest on."""

from typing import Any

import torch

from clbench import evaluation
from clbench.config.schema import Metrics
from clbench.decisions import Judge
from clbench.history import History
from clbench.methods.base import Prediction
from clbench.metrics.stored import Decisions
from clbench.results import Evaluation


class Measuring:
    """Measures a run's predictions of test images, and writes what its final metrics rest on into its directory.

    Args:
        history: the run's; images are judged by the thresholds in it.
        settings: what is measured.
    """

    def __init__(self, history: History, settings: Metrics):
        self._history, self._settings = history, settings
        self._strategy, self._results = history.strategy, history.results
        self._categories = [category for task in history.tasks for category in task.categories]
        self._last = len(history.stages) - 1
        self._judge: tuple[int, Judge] | None = None  # the stage after which it judges

    def evaluation(self, stage: int, category: int, prediction: Prediction) -> Evaluation:
        """What a category's prediction after a stage says; its evidence is written where it may be the final one.

        Args:
            stage, category: indices, 0-based.
            prediction: of all of the category's test images, on the CPU.

        Raises:
            UserError: a file cannot be written.
        """
        about, learned = self._categories[category], self._results.learned[category]
        decided = self._decisions(stage, learned, prediction) if self._history.thresholds else None
        values = evaluation.metrics_of(prediction, about.test, self._settings.further, decided)
        chosen = None
        if self._strategy.routes:
            assert prediction.chosen is not None
            counts = torch.bincount(prediction.chosen, minlength=stage + 1).tolist()
            values["routing_accuracy"] = counts[learned] / len(about.test) if learned <= stage else None
            chosen = counts if stage == self._last else None
        if stage == self._last or self._strategy.unchanged(self._last, learned):
            evidence = evaluation.evidence_of(prediction, about, values)
            self._history.directory.write_evidence(about.name, evidence.arrays())
        named = {metric: values[metric] for metric in self._results.metrics}
        return Evaluation(named, chosen, values.get("pixel_fpr_deviation"))

    def _decisions(self, stage: int, learned: int, prediction: Prediction) -> Decisions:
        """The thresholds that a user would have judged each image by after a stage.

        Those of the model that was chosen for it, or of its task where images come with theirs, or else of all stages.

        Args:
            learned: the stage that learns the images' category.
        """
        if self._judge is None or self._judge[0] != stage:  # one for all categories
            so_far = [self._history.thresholds[earlier] for earlier in range(stage + 1)]
            self._judge = stage, Judge(so_far, (self._settings.pixel_rate, self._settings.image_rate))
        judge, images = self._judge[1], len(prediction.scores)
        if self._strategy.task_known:
            return judge.by_model(min(learned, stage), images)
        if self._strategy.routes:
            assert prediction.chosen is not None
            return judge.by_model(prediction.chosen, images)
        return judge.together(images)

    def summary(self) -> dict[str, Any]:
        """What summary.json has of thresholds, where some were stored: what each category's rates at them rest on."""
        # One model is judged by the thresholds of all stages together.
        one_model = not (self._strategy.routes or self._strategy.task_known)
        images = {stage: found.thresholds.images for stage, found in self._history.thresholds.items()}
        about = {}
        for index, category in enumerate(self._categories if images else []):
            learned = self._results.learned[index]
            ends = {"just_learned": learned, "final": self._last}
            about[category.name] = {
                "set_on_images": {
                    when: sum(images[stage] for stage in range(until + 1)) if one_model else images[learned]
                    for when, until in ends.items()
                },
                "normal_test_images": int((~category.test.labels).sum()),
                "pixel_fpr_deviation": {
                    when: self._results.pixel_fpr_deviation(until, index) for when, until in ends.items()
                },
            }
        return {"stored_thresholds": about} if about else {}
