"""clbench predict --watch: the images that a camera drops into a folder, each judged once, soon after it is there."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from clbench.commands.predict import own_folders
from clbench.data.listing import LeftOut, images_in
from clbench.errors import UserError, counted
from clbench.interruption import Interruption
from clbench.locks import open_lock, take_lock
from clbench.recording.files import cannot_write
from clbench.recording.journal import Journal

if TYPE_CHECKING:
    from clbench.loading import TrainedDetector

_EVERY_S = 0.05  # seconds between two looks at the folder
_PATIENCE_S = 5.0  # seconds without a change after which a file that cannot be read is given up
_KEPT = 10_000  # latencies that percentiles are taken of: the newest

Stamp = tuple[int, int]  # a file's size in bytes, and when it was last changed, in nanoseconds


class Folder:
    """The images in a folder, and which of them are to be judged.

    A file is ready when it was the same at two looks; one that is replaced, or goes on growing, is another. Only files that
    are there are remembered.

    Args:
        path: the folder; images in folders in it count too.
        without: folders whose files do not count.
    """

    def __init__(self, path: Path, without: Collection[Path]):
        self.path, self.without = path, without
        self._seen: dict[Path, Stamp] = {}
        self._answered: dict[Path, Stamp] = {}
        self._came: dict[Path, float] = {}
        self._looked = time.time()  # when the folder was listed last

    def answered(self, path: Path, stamp: Stamp) -> None:
        """Take a file as answered for as long as it is this one."""
        self._answered[path] = stamp

    def waiting_s(self, path: Path) -> float:
        """Seconds since a file of the last look was written, or came here, or the folder was watched.

        Its time counts where it lies between the looks before and after it was found: one that was moved here was written
        long before, and a camera's clock may go wrong.
        """
        return time.time() - self._came[path]

    def ready(self) -> dict[Path, Stamp]:
        """The files that are whole, as far as can be told without reading them, and not answered; oldest first.

        Raises:
            UserError: the folder is gone or cannot be listed.
        """
        if not self.path.is_dir():
            raise UserError(
                f"{self.path} is gone: put it back and give the same command, which repeats no answer"
            )
        now: dict[Path, Stamp] = {}
        before, self._looked = self._looked, time.time()
        for file in images_in(self.path, LeftOut(), self.without):
            try:
                status = file.stat()
            except OSError:
                continue  # it went while the folder was listed
            now[file] = status.st_size, status.st_mtime_ns
        self._answered = {file: stamp for file, stamp in self._answered.items() if now.get(file) == stamp}
        same = {file: stamp for file, stamp in now.items() if self._seen.get(file) == stamp}
        self._came = {
            file: self._came[file] if file in same else min(max(stamp[1] / 1e9, before), time.time())
            for file, stamp in now.items()
        }
        self._seen = now
        waiting = ((stamp[1], file) for file, stamp in same.items() if file not in self._answered)
        return {file: same[file] for _, file in sorted(waiting)}


class Watch:
    """Judges what comes into a folder until it is stopped, and answers with a line of JSON for each image.

    Lines are printed, and written to `answers.jsonl` first: a process that goes on answers no file a second time.

    Args:
        detector: judges images.
        folder: the folder.
        output: the folder of `answers.jsonl`.
        rates: false-positive rates of pixels and of images.
        batch_size: images judged at a time, at most.

    Raises:
        UserError: another process watches into this output, or it cannot be written.
    """

    def __init__(
        self,
        detector: TrainedDetector,
        folder: Path,
        output: Path,
        rates: tuple[float, float],
        batch_size: int,
    ):
        try:
            output.mkdir(parents=True, exist_ok=True)
            self._lock = open_lock(output / "watch.lock")
        except OSError as error:
            raise cannot_write(output, error) from error
        if take_lock(self._lock, wait=False)[0] == "another's":
            raise UserError(f"another process answers into {output}: stop it, or give another --output")
        self.detector, self.folder = detector, Folder(folder, own_folders(output, [folder]))
        for pyramid in detector.detector.pyramids():
            pyramid.filled_up = (
                False  # one image takes a sixteenth of a batch's time; its last digits may differ
            )
        self.rates, self.batch_size = rates, batch_size
        self.latencies: list[float] = []
        self.journal = Journal(output / "answers.jsonl")
        entries, self.journal.entries = self.journal.entries, []
        for entry in entries:
            self.folder.answered(folder / entry["image"], tuple(entry["file"]))  # type: ignore[arg-type]

    def look(self) -> int:
        """Look at the folder once, and answer what is ready; gives how many images that were.

        Raises:
            UserError: the folder is gone, the disk is full, or memory is not enough.
        """
        ready = self.folder.ready()
        unreadable: dict[Path, str] = {}
        found = self.detector.predict(
            list(ready),
            false_positive_rate=self.rates[0],
            image_false_positive_rate=self.rates[1],
            batch_size=self.batch_size,
            unreadable=lambda path, error: unreadable.update({path: str(error)}),
        )
        answers = 0
        for one in found:
            about = {
                "score": one.score,
                "anomalous": bool(one.anomalous),
                "anomalous_pixels": int(one.mask.sum()),
            }
            answers += self._answer(one.path, ready[one.path], about)
        for path, reason in unreadable.items():
            if self.folder.waiting_s(path) > _PATIENCE_S:  # else it may be on its way
                answers += self._answer(path, ready[path], {"error": reason})
        return answers

    def _answer(self, path: Path, stamp: Stamp, about: dict[str, Any]) -> bool:
        """Write and print the answer for a file; False where it changed while it was judged, and is judged again."""
        try:
            status = path.stat()
            if (status.st_size, status.st_mtime_ns) != stamp:
                return False
        except OSError:
            pass  # it was taken away, and what it showed is known
        latency = 1000 * self.folder.waiting_s(path)
        name = path.relative_to(self.folder.path).as_posix()
        answer = {"image": name, **about, "latency_ms": round(latency, 1)}
        self.journal.append({**answer, "file": stamp})
        self.folder.answered(path, stamp)
        if "error" not in about:
            self.latencies = [*self.latencies[-_KEPT + 1 :], latency]
        print(json.dumps(answer, ensure_ascii=False), flush=True)
        return True


def watch(
    detector: TrainedDetector, folder: Path, output: Path, rates: tuple[float, float], batch_size: int
) -> None:
    """Answer what comes into a folder until SIGINT or SIGTERM, and then say how long answers took.

    Raises:
        UserError: as `Watch`, and as its `look`.
    """
    with Interruption() as interruption:
        watching = Watch(detector, folder.absolute(), output.absolute(), rates, batch_size)
        print(
            f"watching {folder}: Ctrl-C ends it; answers are in {output / 'answers.jsonl'}",
            file=sys.stderr,
            flush=True,
        )
        try:
            while not interruption.urgent():
                if not watching.look():
                    time.sleep(_EVERY_S)
        finally:
            print(_said(watching.latencies, watching.journal.count), file=sys.stderr, flush=True)


def _said(latencies: Iterable[float], count: int) -> str:
    """How many answers there are, and the median and 99th percentile of the newest ones' latencies in ms, for people."""
    ordered = sorted(latencies)
    if not ordered:
        return f"{counted(count, 'answer')} so far, none of them now"
    half, most = (ordered[min(int(share * len(ordered)), len(ordered) - 1)] for share in (0.5, 0.99))
    return (
        f"{counted(count, 'answer')} so far; of the last {len(ordered)}, half took {half:.0f} ms or less since the file "
        f"came, and 99 % {most:.0f} ms"
    )
