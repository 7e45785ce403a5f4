"""How sure the differences between the rows of a group are, as far as their test images go.

Test images are drawn anew, with replacement, good and defective ones apart in each category; both rows of a difference
see the same draws. The mean over seeds, and over categories, is taken within a draw. What seeds or task orders change
is not in these intervals: the deviations over them say that.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from clbench.errors import UserError
from clbench.metrics import resampling
from clbench.metrics.names import USUAL
from clbench.metrics.percentiles import MANY
from clbench.metrics.resampling import Evidence
from clbench.recording.run_directory import RunDirectory
from clbench.report.reading import FoundRun
from clbench.report.rows import Row, Spread

RESAMPLES = 1000
CONFIDENCE = 0.95
_PRINTED = 1e-5  # metrics of evidence and of metrics.csv differ by less


@dataclass(frozen=True)
class Difference:
    """A row's value minus the best one, and the interval that leaves the differences of all rows in it with 95 %."""

    value: float
    low: float
    high: float

    @property
    def level(self) -> bool:
        """Whether the difference is within the noise of the test images."""
        return self.low <= 0 <= self.high


@dataclass
class Differences:
    """What sets the rows of a group apart from the best of each metric.

    Attributes:
        best: metric -> index of the row that the others are compared with.
        found: index of a row and metric -> its difference from the best.
        without: titles of the rows that have no evidence -> why.
    """

    best: dict[str, int] = field(default_factory=dict)
    found: dict[tuple[int, str], Difference] = field(default_factory=dict)
    without: dict[str, str] = field(default_factory=dict)


def differences(rows: Sequence[Row]) -> Differences:
    """Compare rows with the best of those that learn task by task; published ones are left out.

    The best was chosen by the same test images, and there may be many rows: intervals are so wide that with 95 % none of the
    differences between any two rows lies outside, as in Tukey's range test, by the draws of all rows together.
    """
    made = Differences()
    ours = [index for index, row in enumerate(rows) if not row.published]
    values: dict[int, dict[str, np.ndarray]] = {}
    images: dict[int, dict[str, set[str]]] = {}
    for index in ours if len(ours) > 1 else []:
        many = len(rows[index].runs[0].categories) > MANY
        evidence = (
            f"test images are drawn anew for up to {MANY} categories" if many else _evidence(rows[index])
        )
        if isinstance(evidence, str):
            made.without[rows[index].title] = evidence
        else:
            values[index] = resampled(evidence)
            images[index] = {name: {one.images for one in found} for name, found in evidence.items()}
    for metric in USUAL:
        means = {index: mean for index in ours if (mean := rows[index].value(metric).mean) is not None}
        continual = [index for index in means if rows[index].flags.continual]
        best = max(continual, key=means.__getitem__, default=None)
        if best is None or best not in values:
            continue
        made.best[metric] = best
        alike = [index for index in means if index in values and images[index] == images[best]]
        for index in means.keys() & values.keys() - set(alike):
            made.without[rows[index].title] = "they have other test images than the best row"
        deviations, quantile = spread_of_pairs(np.array([values[index][metric] for index in alike]))
        for place, index in enumerate(alike):
            if index != best:
                value = means[index] - means[best]
                off = quantile * float(deviations[place, alike.index(best)])
                made.found[index, metric] = Difference(value, value - off, value + off)
    return made


def spread_of_pairs(draws: np.ndarray) -> tuple[np.ndarray, float]:
    """How much the differences between rows vary over draws [K, R], and those of all pairs together.

    Returns:
        The standard deviation of each pair's difference, float64 [K, K], and how many deviations, at most, the difference of
        any pair is off its mean in 95 % of the draws.
    """
    centred = draws[:, ~np.isnan(draws).any(axis=0)]
    centred = centred - centred.mean(axis=1, keepdims=True) if centred.size else np.zeros((len(draws), 1))
    deviations = np.zeros((len(draws), len(draws)))
    farthest = np.zeros(centred.shape[1])
    for row in range(len(draws)):
        off = np.abs(centred - centred[row])
        deviations[row] = np.sqrt((off**2).mean(axis=1))
        differing = deviations[row] > 0
        if differing.any():
            farthest = np.maximum(farthest, (off[differing] / deviations[row][differing, None]).max(axis=0))
    return deviations, float(np.quantile(farthest, CONFIDENCE))


@dataclass(frozen=True)
class Ranks:
    """How rows rank over categories, after Demšar (Statistical comparisons of classifiers over multiple data sets, 2006).

    Attributes:
        rows: the rows that are ranked.
        means: the mean rank of each over categories; 1 is the best, and rows that are alike share their ranks.
        categories: how many categories there are.
        p: of Friedman's test that all rows are alike.
        critical: two rows whose mean ranks differ by at least so much differ at the 5 % level, by Nemenyi's test.
    """

    rows: list[Row]
    means: list[float]
    categories: int
    p: float
    critical: float


def ranks(rows: Sequence[Row], metric: str) -> Ranks | None:
    """Rank the rows that learn task by task by a metric's final values, means over seeds, in each category.

    Categories in which it is undefined for a row are left out. None where there are fewer than three rows or two
    categories.
    """
    shown = [row for row in rows if not row.published and row.flags.continual]
    if len(shown) < 3:
        return None
    values = np.array([_finals(row, metric) for row in shown], float)
    values = values[:, ~np.isnan(values).any(axis=0)]
    if values.shape[1] < 2:
        return None
    from scipy import stats  # takes a while, and most reports of two rows do without

    ranked = stats.rankdata(-values, axis=0)
    alike = bool((ranked == ranked[0]).all())  # the test has no value then
    p = 1.0 if alike else float(stats.friedmanchisquare(*values).pvalue)
    return Ranks(shown, ranked.mean(axis=1).tolist(), values.shape[1], p, critical_difference(*values.shape))


def critical_difference(rows: int, categories: int) -> float:
    """Nemenyi's critical difference of mean ranks at the 5 % level."""
    from scipy import stats

    quantile = stats.studentized_range.ppf(CONFIDENCE, rows, np.inf) / math.sqrt(2)
    return float(quantile * math.sqrt(rows * (rows + 1) / (6 * categories)))


def _finals(row: Row, metric: str) -> list[float | None]:
    """A row's final values in each category, means over seeds, in the order of the categories' names."""
    found = []
    for category in sorted(row.runs[0].categories):
        final = (run.R[metric][-1][run.categories.index(category)] for run in row.runs)
        found.append(Spread.of(final).mean)
    return found


def resampled(evidence: Mapping[str, Sequence[Evidence]], count: int = RESAMPLES) -> dict[str, np.ndarray]:
    """The metrics of a row in each of `count` resamples of its test images: name -> float64 [count].

    The same test images give the same draws, whatever was found on them.

    Args:
        evidence: category -> that of each seed.
    """
    means: dict[str, list[np.ndarray]] = {name: [] for name in USUAL}
    for of_seeds in evidence.values():
        found = []
        for one in of_seeds:
            drawn = resampling.weights(one.labels, count, int(one.images[:16], 16))
            found.append(resampling.metrics(one, drawn))
        for name in USUAL:
            means[name].append(np.mean([one[name] for one in found], axis=0))
    return {name: _mean_of_defined(np.array(values)) for name, values in means.items()}


def _mean_of_defined(values: np.ndarray) -> np.ndarray:
    """Mean over categories [C, R] -> [R]; NaN where it is defined for none."""
    defined = ~np.isnan(values)
    count = defined.sum(axis=0)
    return np.where(count > 0, np.where(defined, values, 0).sum(axis=0) / np.maximum(count, 1), np.nan)


def _evidence(row: Row) -> dict[str, list[Evidence]] | str:
    """The evidence of a row's runs, category -> that of each seed; or why there is none, in words."""
    found: dict[str, list[Evidence]] = {}
    for run in row.runs:
        for column, category in enumerate(run.categories):
            one = _of_category(run, column, category)
            if isinstance(one, str):
                return one
            found.setdefault(category, []).append(one)
    return found


def _of_category(run: FoundRun, column: int, category: str) -> Evidence | str:
    """A run's evidence of a category, or why there is none."""
    try:
        arrays = RunDirectory(run.path).evidence(category)
        evidence = None if arrays is None else Evidence.from_arrays(arrays)
    except (UserError, KeyError, ValueError, TypeError):
        evidence = None
    if evidence is None:
        return "evidence/ is missing or damaged, or of an earlier version"
    for name, here in zip(USUAL, evidence.exact.tolist(), strict=True):
        written = run.R[name][-1][column]
        if (written is None) != math.isnan(here) or (written is not None and abs(written - here) > _PRINTED):
            return "evidence/ is not what metrics.csv was made of"
    return evidence
