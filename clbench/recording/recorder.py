"""Recorders: what is told of a run's losses, heat maps and results besides its directory."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import numpy as np

from clbench.errors import described, in_one_line
from clbench.interruption import Stopped
from clbench.metrics.continual import Matrix


class Recorder:
    """Is told everything that a run finds; this one does nothing with it.

    A process that continues a run tells it everything again from the beginning, pictures excepted.

    Attributes:
        wants_pictures: whether `pictures` is to be called; if not, none are drawn for it.
    """

    wants_pictures = False

    def epoch(self, stage: int, epoch: int, loss: float) -> None:
        """Called after an epoch with its mean loss.

        The stage is 0-based, and epochs are counted from 0 over all stages.
        """

    def pictures(self, stage: int, category: str, pictures: Sequence[np.ndarray]) -> None:
        """Called after a category was evaluated, with heat maps of a few test images, always the same ones.

        Args:
            stage: 0-based.
            category: its name.
            pictures: BGR, uint8 [H, W, 3] each.
        """

    def stage(self, stage: int, results: Mapping[str, Mapping[str, float | None]]) -> None:
        """Called after a stage, 0-based, with its results.

        Args:
            results: a category's name, `mean` or `forgetting` -> metric -> value; None where undefined.
        """

    def missing(self) -> str | None:
        """What it has not recorded of a run that has ended by now, for summary.json; None where it has all."""

    def finish(self, summary: Mapping[str, Any], matrices: Mapping[str, Matrix]) -> str | None:
        """Called at the end of the run, once summary.json says that it is complete.

        Args:
            summary: what summary.json holds.
            matrices: metric -> R, [stage][category].

        Returns:
            A line to show on the terminal; None for nothing.
        """


class Surviving(Recorder):
    """Tells another recorder everything until that one fails: then a line says so, and the run goes on without it.

    Args:
        build: makes the other recorder.
        name: what it records in, for people.
        way_out: how what it did not record can be recorded later, for people.
        say: shows a line.
    """

    def __init__(self, build: Callable[[], Recorder], name: str, way_out: str, say: Callable[[str], object]):
        self._name, self._way_out, self._say = name, way_out, say
        self._failure: str | None = None
        self._recorder = Recorder()
        with self._surviving():
            self._recorder = build()
        self.wants_pictures = self._recorder.wants_pictures

    def epoch(self, stage: int, epoch: int, loss: float) -> None:
        with self._surviving():
            self._recorder.epoch(stage, epoch, loss)

    def pictures(self, stage: int, category: str, pictures: Sequence[np.ndarray]) -> None:
        with self._surviving():
            self._recorder.pictures(stage, category, pictures)

    def stage(self, stage: int, results: Mapping[str, Mapping[str, float | None]]) -> None:
        with self._surviving():
            self._recorder.stage(stage, results)

    def missing(self) -> str | None:
        with self._surviving():
            if missing := self._recorder.missing():
                return f"{missing}; {self._way_out}"
        return self._failure

    def finish(self, summary: Mapping[str, Any], matrices: Mapping[str, Matrix]) -> str | None:
        with self._surviving():
            return self._recorder.finish(summary, matrices)
        return None

    def _surviving(self) -> AbstractContextManager[None]:
        """Inside, any exception of a recorder is its last; those that stop a run pass through."""
        return surviving(self._fail)

    def _fail(self, error: BaseException) -> None:
        self._recorder, self.wants_pictures = Recorder(), False
        reason = in_one_line(error) or described(error)
        self._failure = f"{self._name} failed, and has not all of this run ({reason}); {self._way_out}"
        self._say(self._failure)


@contextmanager
def surviving(failed: Callable[[BaseException], None]) -> Iterator[None]:
    """Inside, an exception ends what is inside, and nothing else; those that stop a run pass through.

    Libraries raise more than Exceptions: SystemExit and CancelledError are none.

    Args:
        failed: told the exception.
    """
    try:
        yield
    except (KeyboardInterrupt, Stopped):
        raise
    except BaseException as error:  # noqa: BLE001
        failed(error)
