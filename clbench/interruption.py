"""Being asked to stop. Signals become a wish, which long work looks for where it can be left without a loss."""

import signal
import sys
import threading
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import Any

from typing_extensions import Self

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR2)


class Stopped(BaseException):
    """A run was left because a signal asked for it; what it had is saved.

    Not an Exception: nobody who isolates failures is to take it for one.
    """

    def __init__(self, number: int):
        super().__init__(f"interrupted by {signal.Signals(number).name}")
        self.number = number

    def hand_on(self) -> None:
        """Send the signal again, to whatever handled it before: submitit's requeueing, or the system."""
        sys.stdout.flush()
        signal.raise_signal(self.number)


class Interruption:
    """Inside, SIGINT, SIGTERM and SIGUSR2 wait until the work can be left; a second Ctrl-C does not.

    Where something else handles SIGTERM already, as submitit does, which waits for what follows it, it only
    asks to save: on a cluster it comes before a job is preempted, and a job that ended then would not be
    started again.
    """

    def __init__(self) -> None:
        self._stop: int | None = None  # the signal that asked
        self._save = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            # What is ignored already, as Ctrl-C in a script's background, stays ignored.
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
        """Whether to save now."""
        return self._save or self._stop is not None

    def saved(self) -> None:
        """All is saved: go on, or stop.

        Raises:
            Stopped: a signal asked for it.
        """
        self._save = False
        self.check()

    def watching(self, progress: Callable[..., None]) -> Callable[..., None]:
        """A progress that also is a place where the work can be left."""

        def checked(*report: Any) -> None:
            progress(*report)
            self.check()

        return checked

    def check(self) -> None:
        """Stop here, where that was asked for.

        Raises:
            Stopped: a signal asked for it.
        """
        if self._stop is not None:
            raise Stopped(self._stop)
