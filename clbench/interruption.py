"""Signals that ask a run to stop or to save: they wait until the run is where it can do so without a loss."""

import signal
import sys
import threading
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import Any

from typing_extensions import Self

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR2)


class Stopped(BaseException):
    """A run stopped because a signal asked for it; what it had is saved.

    It is no Exception, so that code which catches the failures of a run does not take it for one.

    Args:
        number: the signal's.
    """

    def __init__(self, number: int):
        super().__init__(f"interrupted by {signal.Signals(number).name}")
        self.number = number

    def hand_on(self) -> None:
        """Send the signal again, for what handled it before: submitit's requeueing, or the system."""
        sys.stdout.flush()
        signal.raise_signal(self.number)


class Interruption:
    """Inside, SIGINT, SIGTERM and SIGUSR2 wait until the run can stop; a second Ctrl-C stops it at once.

    Where another handler of SIGTERM is there already, as in a job of submitit, the signal only asks to save:
    a cluster sends it before it preempts a job, and would not start a job again that had ended by itself.
    """

    def __init__(self) -> None:
        self._stop: int | None = None  # the signal that asked to stop
        self._save = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            # A signal that is ignored already, as Ctrl-C in a script's background, stays ignored.
            heard = [number for number in _SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]
            self._before = {number: signal.signal(number, self._asked) for number in heard}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _asked(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self._stop == number:
            raise KeyboardInterrupt
        if number == signal.SIGTERM and callable(self._before[number]):
            self._save = True
        else:
            self._stop = number

    def urgent(self) -> bool:
        """Whether a signal has asked to save now."""
        return self._save or self._stop is not None

    def saved(self) -> None:
        """To be called once all is saved: the run goes on, or stops here.

        Raises:
            Stopped: a signal asked to stop.
        """
        self._save = False
        self.check()

    def watching(self, progress: Callable[..., None]) -> Callable[..., None]:
        """A progress function that calls `progress` and then `check`, so that the run can stop there.

        The function raises Stopped where a signal asked to stop.
        """

        def checked(*report: Any) -> None:
            progress(*report)
            self.check()

        return checked

    def check(self) -> None:
        """Stop the run here, if a signal asked to.

        Raises:
            Stopped: a signal asked to stop.
        """
        if self._stop is not None:
            raise Stopped(self._stop)
