"""Whether the images, files and results that a finished run was made with are as they were. Imports no torch."""

import json
from collections.abc import Callable

from clbench.config import Config
from clbench.config.by_results import order_changed
from clbench.config.classes import arguments, class_of_kind
from clbench.config.files import changed_files, digests_at
from clbench.data.on_disk import NoRoot
from clbench.data.samples import Dataset
from clbench.data.unchanged import Fingerprints, changes, fingerprints
from clbench.errors import UserError
from clbench.metrics.names import need
from clbench.paths import expanded
from clbench.recording.run_directory import RunDirectory


class FinishedImages:
    """Compares finished runs with the images that there are; the images of one dataset are looked at once.

    Args:
        cache: folder of the cache of decoded images: the command's, as a run's own may be of another machine.
        say: is told where a dataset is not there any more, so that there is nothing to compare with.
    """

    def __init__(self, cache: str, say: Callable[[str], None]):
        self._cache = cache
        self._say = say
        self._now: dict[str, Fingerprints | None] = {}

    def check(self, directory: RunDirectory) -> None:
        """Check that the images of a finished run, and what its settings name, are those that it was made with.

        A run of an earlier version does not say which these were, and passes.

        Raises:
            UserError: they are not, or the dataset is incomplete.
        """
        summary, stored = directory.summary() or {}, directory.config()
        before: Fingerprints | None = summary.get("images")
        if not before or stored is None:
            return
        config, files = Config.stored(stored), summary.get("files", {})
        if order_changed(config):
            raise UserError(
                f"{directory.path} is finished, but the results in {config.task_order.run} give another order by now: "
                "take another experiment=NAME, or overwrite=true"
            )
        if changed := changed_files(files, digests_at(config, files)):
            raise UserError(
                f"{directory.path} is finished, but was made with other files ({changed}): put them back, take another "
                "experiment=NAME, or overwrite=true"
            )
        try:
            now = self._fingerprints(config, list(before))
        except UserError as error:
            raise UserError(
                f"{directory.path} is finished, but its images are not what they were: {error}; or take another "
                "experiment=NAME, or overwrite=true"
            ) from error
        if now is not None and (changed := changes(before, now)):
            raise UserError(
                f"{directory.path} is finished, but was made with other images ({changed}): put them back, take another "
                "experiment=NAME, or overwrite=true"
            )

    def _fingerprints(self, config: Config, before: list[str]) -> Fingerprints | None:
        """The fingerprints of a stream's images as they are now; None where its dataset is gone.

        Args:
            before: names of the categories that the run had, in their order.

        Raises:
            UserError: the dataset is incomplete, a file is unreadable, or the cache cannot be written.
        """
        tasks = None if config.task_order.by_results else config.task_order.tasks  # None: all that there are
        defects = need(config.metrics.further, "saturations")
        about = json.dumps([config.plain()["dataset"], tasks, before, defects])
        if about not in self._now:
            self._now[about] = None
            try:
                kind = class_of_kind("dataset", config.dataset.target, Dataset)
                dataset: Dataset = kind(**arguments(kind, config.dataset.settings))
            except NoRoot as error:
                self._say(f"images of finished runs cannot be compared with what they were: {error}")
                return None
            joined = [name for name in dataset.categories if name not in before] if tasks is None else []
            names = [*(name for name in before if name in dataset.categories), *joined]
            cache = expanded(self._cache, "cache")
            self._now[about] = fingerprints(dataset, names, config.dataset.geometry(), cache, defects)
        return self._now[about]
