"""Rows of a comparison: the runs of a method and strategy over seeds, and their quantities."""

from __future__ import annotations

import csv
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from clbench.metrics import continual
from clbench.metrics.names import METRICS
from clbench.report import titles
from clbench.report.reading import FoundRun
from clbench.report.settings import Flags

PAPER = Path(__file__).with_name("paper-results.csv")  # what its authors published: see paper-results.md


@dataclass(frozen=True)
class Quantity:
    """A column of the comparison.

    Attributes:
        digits: decimals that are printed.
        better: which end is good.
        about: a word for the reader who points at the title.
    """

    key: str
    title: str
    digits: int
    better: Literal["higher", "lower"]
    about: str


_LAST = "mean over categories after the last stage"
QUANTITIES = (
    Quantity("image_auroc", "image AUROC", 3, "higher", _LAST),
    Quantity("image_f1", "image F1", 3, "higher", f"best over thresholds, {_LAST}"),
    Quantity("pixel_auroc", "pixel AUROC", 3, "higher", _LAST),
    Quantity("pixel_f1", "pixel F1", 3, "higher", f"best over thresholds, {_LAST}"),
    Quantity("pixel_ap", "pixel AP", 3, "higher", _LAST),
    Quantity("aupro", "AU-PRO", 3, "higher", f"up to a false positive rate of 0.3, {_LAST}"),
    Quantity("training_time_min", "training, min", 2, "lower", "minutes of training, over all stages"),
    Quantity(
        "architecture_mb", "networks, MB", 1, "lower", "weights, whole, as the paper counts them; 10⁶ bytes"
    ),
    Quantity(
        "additional_mb",
        "kept, MB",
        1,
        "lower",
        "banks, statistics, stored images and stored weights; 10⁶ bytes",
    ),
    Quantity(
        "relative_gap_pct",
        "gap to joint",
        2,
        "lower",
        "pixel F1 of the joint run of the same method, settings and seed, minus this one's; in points; "
        "where that seed has no joint run, from the mean of those that have",
    ),
    Quantity(
        "average_forgetting_pct",
        "forgotten, %",
        2,
        "lower",
        "mean over the categories learned before the last stage of the share of the just learned pixel F1 "
        "that is lost at the end",
    ),
)


def quantities_of(runs: Iterable[FoundRun]) -> tuple[Quantity, ...]:
    """The columns for these runs: the usual ones, and behind them each further metric that any of them has."""
    there = {metric for run in runs for metric in run.further}
    further = [
        Quantity(name, metric.title, 3, metric.better, f"{metric.about}; {_LAST}")
        for name, metric in METRICS.items()
        if name in there
    ]
    return (*QUANTITIES, *further)


@dataclass(frozen=True)
class Spread:
    """Values over seeds: their mean, and their sample deviation where there are two or more."""

    mean: float | None
    deviation: float | None = None
    count: int = 0

    @staticmethod
    def of(values: Iterable[float | None]) -> Spread:
        """The spread of the values that are not None."""
        defined = [value for value in values if value is not None]
        if not defined:
            return Spread(None)
        deviation = statistics.stdev(defined) if len(defined) > 1 else None
        return Spread(statistics.fmean(defined), deviation, len(defined))


@dataclass(frozen=True)
class Variant:
    """What the runs of a row share.

    Attributes:
        changed: settings of the method that are not its benchmark's, `key=value`.
        given: settings that the method had to be given, `key=value`.
        strategy_changed: settings of the strategy that are not its benchmark's, `key=value`.
    """

    method: str
    strategy: str
    replay_size: int | None
    changed: tuple[str, ...] = ()
    given: tuple[str, ...] = ()
    strategy_changed: tuple[str, ...] = ()

    @staticmethod
    def of(run: FoundRun) -> Variant:
        """The variant that a run is of."""
        about, found = run.summary, run.departures
        changed, given, strategy_changed = (
            tuple(f"{key}={value}" for key, value in part.items())
            for part in (found.changed, found.given, found.strategy_changed)
        )
        return Variant(
            about["method"], about["strategy"], about["replay_size"], changed, given, strategy_changed
        )

    @property
    def learner(self) -> tuple[Any, ...]:
        """The method with its settings, whatever the strategy: what a joint run and others have in common."""
        return self.method, self.changed, self.given

    @property
    def way(self) -> tuple[Any, ...]:
        """The strategy with its buffer and settings, whatever the method."""
        return self.strategy, self.replay_size, self.strategy_changed

    @property
    def method_title(self) -> str:
        """The method, with what it was changed in."""
        return titles.method_title(self.method, self.changed)

    @property
    def strategy_title(self) -> str:
        """The strategy, with its buffer and what it was changed in."""
        return titles.strategy_title(*self.way)

    @property
    def title(self) -> str:
        """The method and the strategy, each with what it was changed in."""
        return f"{self.method_title}, {self.strategy_title}"

    @property
    def order(self) -> tuple[Any, ...]:
        """Key to sort rows by: methods as the paper lists them, then strategies."""
        return (*titles.rank(titles.METHODS, self.method), *self.learner[1:], *self.strategy_order)

    @property
    def strategy_order(self) -> tuple[Any, ...]:
        """Key to sort strategies by: as the paper lists them, then by name, then by size of the buffer."""
        place = titles.rank(titles.STRATEGIES, self.strategy)
        return (*place, self.replay_size or 0, self.strategy_changed)


@dataclass
class Row:
    """A variant's runs, one a seed, or what was published of it.

    Attributes:
        values: quantity -> its spread over seeds.
    """

    variant: Variant
    runs: list[FoundRun]
    values: dict[str, Spread]
    published: bool = False

    @property
    def flags(self) -> Flags:
        """What the strategy of its runs can do; a published row has none."""
        return self.runs[0].flags

    @property
    def title(self) -> str:
        """The variant's title, marked where it is published."""
        return self.variant.title + (", published" if self.published else "")

    def value(self, quantity: str) -> Spread:
        """A quantity over seeds; without a mean where its runs do not have it."""
        return self.values.get(quantity, Spread(None))

    @property
    def seeds(self) -> list[int]:
        """The seeds of its runs, ascending."""
        return sorted(run.seed for run in self.runs)


def rows_of(runs: Iterable[FoundRun]) -> list[Row]:
    """Make a row for each variant among finished runs; rows are in order."""
    found: dict[Variant, list[FoundRun]] = {}
    for run in runs:
        found.setdefault(Variant.of(run), []).append(run)
    variants = sorted(found, key=lambda variant: variant.order)
    joint: dict[Any, dict[int, float | None]] = {}  # a learner's final pixel F1 by seed
    for variant in variants:
        if found[variant][0].flags.joint:
            joint.setdefault(variant.learner, {run.seed: _final_f1(run) for run in found[variant]})
    return [
        Row(
            variant,
            found[variant],
            _values(found[variant], {} if found[variant][0].flags.joint else joint.get(variant.learner, {})),
        )
        for variant in variants
    ]


def _final_f1(run: FoundRun) -> float | None:
    return run.summary["final"]["pixel_f1"]


def _values(runs: Sequence[FoundRun], joint: Mapping[int, float | None]) -> dict[str, Spread]:
    """Spreads over seeds: key of a quantity -> its spread.

    Args:
        joint: final pixel F1 of the joint runs, by seed: the relative gap is measured from the same seed's,
            or from their mean where that seed has none.
    """
    mean = Spread.of(joint.values()).mean

    def gap(run: FoundRun) -> float | None:
        bound, reached = joint.get(run.seed, mean), _final_f1(run)
        return None if bound is None or reached is None else 100 * (bound - reached)

    measures: dict[str, Callable[[FoundRun], float | None]] = {
        "training_time_min": lambda run: run.summary["time"]["train_s"] / 60,
        "architecture_mb": lambda run: run.summary["memory"]["architecture_mb"],
        "additional_mb": lambda run: run.summary["memory"]["additional_mb"],
        "average_forgetting_pct": lambda run: continual.average_forgetting_pct(
            run.R["pixel_f1"], run.learned
        ),
        "relative_gap_pct": gap,
    }
    return {
        q.key: Spread.of(
            measures[q.key](run) if q.key in measures else run.summary["final"].get(q.key) for run in runs
        )
        for q in quantities_of(runs)
    }


def published() -> list[Row]:
    """The rows that the paper's authors published."""
    with open(PAPER, newline="", encoding="utf-8") as file:
        return [
            Row(
                Variant(
                    row["method"],
                    row["strategy"],
                    int(row["replay_images"]) if row["replay_images"] else None,
                ),
                [],
                {q.key: Spread(float(row[q.key]) if row[q.key] else None) for q in QUANTITIES},
                published=True,
            )
            for row in csv.DictReader(file)
        ]


Mark = Literal["best", "level", "worst"]


def marks(rows: Sequence[Row], quantities: Sequence[Quantity] = QUANTITIES) -> dict[tuple[int, str], Mark]:
    """The best and worst of each quantity, as (row's index, quantity's key).

    Among the rows that learn task by task and are not told the task; other strategies are bounds to compare
    with, and published rows too. Values that print alike share a mark; where all do, there is none.
    """
    marked: dict[tuple[int, str], Mark] = {}
    for quantity in quantities:
        values = {
            index: round(mean, quantity.digits)
            for index, row in enumerate(rows)
            if not row.published and row.flags.continual
            if (mean := row.value(quantity.key).mean) is not None
        }
        if len(set(values.values())) < 2:
            continue
        low, high = min(values.values()), max(values.values())
        best, worst = (high, low) if quantity.better == "higher" else (low, high)
        for index, value in values.items():
            if value in (best, worst):
                marked[index, quantity.key] = "best" if value == best else "worst"
    return marked
