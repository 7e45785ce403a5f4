"""What is shown on the terminal while runs go on, and a table of the results when one is finished."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from types import TracebackType
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from typing_extensions import Self

from clbench.errors import first_line
from clbench.metrics.names import METRICS, USUAL
from clbench.metrics.percentiles import MANY, PERCENTILES, percentiles

if TYPE_CHECKING:
    from clbench.results import Results

SHOWN = ("image_auroc", "pixel_auroc", "pixel_ap", "pixel_f1", "aupro")

_BAR = 24  # columns of the bar
_BESIDE = _BAR + 22  # columns that the bar, the count and the remaining time take
_SHORTEST = 16  # columns of a heading, at least


def console() -> Console:
    """The console of standard output: as wide as the terminal, and 200 columns where output is no terminal.

    A file or a pipe has no width, and a table folded to 80 columns cannot be read.
    """
    return Console(width=None if sys.stdout.isatty() else 200)


class Display:
    """A bar that shows what is happening now, and lines that stay.

    Only the lines where output is no terminal. What cannot be shown ends nothing: see `showing`.

    Args:
        run: the run's name, which begins every line where several runs share the output.
        alone: whether the output is this run's alone.
    """

    def __init__(self, run: str, *, alone: bool = True):
        self.console = console()
        self._prefix = "" if alone else f"{run}: "
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=_BAR),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            console=self.console,
            transient=True,
            disable=not (alone and self.console.is_terminal),
        )
        self._row = self._bar.add_task("starting", total=None)
        self._heading = ""
        self._phase = ""
        self._failed = False

    @contextmanager
    def showing(self) -> Iterator[None]:
        """Inside, something is made to be shown: where that fails, all else goes on, and the first time a line says so."""
        try:
            yield
        except Exception as error:  # noqa: BLE001
            if not self._failed:
                reason = f"{type(error).__name__}: {first_line(error)}"
                print(f"warning: {self._prefix}not all can be shown ({reason})", file=sys.stderr)
            self._failed = True

    def __enter__(self) -> Self:
        with self.showing():
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self.showing():
            self._bar.stop()

    def heading(self, text: str) -> None:
        """What the following phases belong to: `task 3/10 cable`."""
        self._heading, self._phase = text, ""
        with self.showing():
            self._bar.update(self._row, description=self._described(""))

    def progress(self, phase: str, done: int, total: int, note: str = "") -> None:
        """Show how far a phase is: `done` of `total`, with a note on how it goes."""
        with self.showing():
            if phase != self._phase:
                self._phase = phase
                self._bar.reset(self._row, total=total)
            description = self._described(f": {phase}" + (f" ({note})" if note else ""))
            self._bar.update(self._row, completed=done, total=total, description=description)

    def _described(self, phase: str) -> str:
        """The heading and the phase in one line; the heading is cut to the room that the terminal has."""
        room = max(_SHORTEST, self.console.width - len(phase) - _BESIDE)
        heading = self._heading if len(self._heading) <= room else f"{self._heading[: room - 1]}…"
        return escape(heading + phase)

    def line(self, text: str) -> None:
        """Print a line that stays."""
        with self.showing():
            self.console.print(f"{self._prefix}{text}", markup=False, highlight=False, soft_wrap=True)

    def table(self, table: Table) -> None:
        """Print a table that stays."""
        with self.showing():
            if self._prefix:  # a title is folded to the table's width, and names of runs can be long
                self.line(str(table.title))
                table.title = None
            caption, table.caption = table.caption, None  # which would be folded to the table's width too
            self.console.print(table)
            if caption:
                self.console.print(caption, highlight=False, soft_wrap=True)


def number(value: float | None, digits: int = 3) -> str:
    """A metric as text with so many digits after the point; `undefined` for None."""
    return "undefined" if value is None else f"{round(value, digits) + 0.0:.{digits}f}"  # not -0.0


def further_measured(metrics: Iterable[str], where: str) -> str:
    """A line that names the metrics beyond those that every run has, and says where they are; empty where there are none."""
    there = set(metrics).difference(USUAL)
    names = [metric.title for name, metric in METRICS.items() if name in there]
    return f"also measured: {', '.join(names)} ({where})" if names else ""


def run_table(summary: Mapping[str, Any], results: Results) -> Table:
    """A finished run: a row for each category, with metrics just learned and after the last stage; percentiles of many.

    Args:
        summary: what summary.json holds.
        results: the run's evaluations.
    """
    alone = all(len(categories) == 1 for categories in summary["categories"])
    table = Table(
        title=f"{summary['method']}, {summary['strategy']}: just learned → final", title_justify="left"
    )
    table.add_column("task" if alone else "category")
    for metric in SHOWN:
        table.add_column(METRICS[metric].title, justify="right")
    table.add_column("F1 forgotten", justify="right")
    just_learned = {metric: results.just_learned(metric) for metric in SHOWN}
    final = {metric: list(results.matrix(metric)[-1]) for metric in SHOWN}
    lost = [
        None if not before or after is None else 100 * (before - after) / before
        for before, after in zip(just_learned["pixel_f1"], final["pixel_f1"], strict=True)
    ]
    names = results.categories
    if len(names) > MANY:
        names = [f"{name} of {len(names):,}" for name in PERCENTILES]
        just_learned, final = (
            {metric: list(percentiles(each[metric]).values()) for metric in SHOWN}
            for each in (just_learned, final)
        )
        lost = list(percentiles(lost).values())
    for index, name in enumerate(names):
        cells = [
            f"{number(just_learned[metric][index])} → {number(final[metric][index])}" for metric in SHOWN
        ]
        share = lost[index]
        table.add_row(escape(name), *cells, "" if share is None else f"{number(share, 1)} %")
    table.add_section()
    forgotten = summary["average_forgetting_pct"]
    table.add_row(
        "mean",
        *[number(summary["final"][metric]) for metric in SHOWN],
        "" if forgotten is None else f"{number(forgotten, 1)} %",
        style="bold",
    )
    memory, time = summary["memory"], summary["time"]
    table.caption = (
        f"memory: networks {memory['architecture_mb']:.1f} MB ({memory['executed_mb']:.1f} run), "
        f"kept {memory['additional_mb']:.1f} MB, peak {memory['peak_mb']:.0f} MB · time: training "
        f"{time['train_s']:.1f} s, evaluation {time['eval_s']:.1f} s, "
        f"{time['inference_ms_per_image']:.1f} ms an image"
    )
    if line := further_measured(results.metrics, "see metrics.csv, or the page that clbench report makes"):
        table.caption += f"\n{line}"
    return table
