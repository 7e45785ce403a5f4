"""Groups of runs that compare, and in each a row a method and strategy, over seeds."""

from __future__ import annotations

import csv
import statistics
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from clbench.metrics import continual
from clbench.report.reading import Run

METHODS = {
    "patchcore": "PatchCore",
    "padim": "PaDiM",
    "cfa": "CFA",
    "stfpm": "STFPM",
    "efficientad": "EfficientAD",
    "draem": "DRAEM",
    "fastflow": "FastFlow",
    "fastflow_deit": "FastFlow DeiT",
    "fastflow_cait": "FastFlow CaiT",
}
STRATEGIES = ("native", "replay", "finetune", "joint", "single")
CONTINUAL = ("native", "replay", "finetune")  # learn task by task, and are not told the task at test time
_GEOMETRY = ("dataset.resize", "dataset.crop")  # see _size

PAPER = Path(__file__).with_name("paper-results.csv")  # what its authors published: see paper-results.md
PAPER_TASKS = [
    "hazelnut",
    "bottle",
    "cable",
    "capsule",
    "metal_nut",
    "pill",
    "toothbrush",
    "transistor",
    "zipper",
    "screw",
]


@dataclass(frozen=True)
class Quantity:
    """A column of the comparison.

    Attributes:
        better: which end is good.
        about: for the reader who points at it.
    """

    key: str
    title: str
    digits: int
    better: Literal["higher", "lower"]
    about: str


QUANTITIES = (
    Quantity("image_auroc", "image AUROC", 3, "higher", "mean over tasks after the last stage"),
    Quantity(
        "image_f1", "image F1", 3, "higher", "best over thresholds, mean over tasks after the last stage"
    ),
    Quantity("pixel_auroc", "pixel AUROC", 3, "higher", "mean over tasks after the last stage"),
    Quantity(
        "pixel_f1", "pixel F1", 3, "higher", "best over thresholds, mean over tasks after the last stage"
    ),
    Quantity("pixel_ap", "pixel AP", 3, "higher", "mean over tasks after the last stage"),
    Quantity("aupro", "AU-PRO", 3, "higher", "up to a false positive rate of 0.3, mean over tasks"),
    Quantity("training_time_min", "training, min", 2, "lower", "minutes of training, over all stages"),
    Quantity(
        "architecture_mb", "networks, MB", 1, "lower", "weights, whole, as the paper counts them; 10⁶ bytes"
    ),
    Quantity("additional_mb", "kept, MB", 1, "lower", "banks, statistics and stored images; 10⁶ bytes"),
    Quantity(
        "relative_gap_pct",
        "gap to joint",
        2,
        "lower",
        "pixel F1 of the joint run of the same method, settings and seed, minus this one's; in points; where that "
        "seed has no joint run, from the mean of those that have",
    ),
    Quantity(
        "average_forgetting_pct",
        "forgotten, %",
        2,
        "lower",
        "mean over all tasks but the last of the share of the just learned pixel F1 that is lost at the end",
    ),
)


@dataclass(frozen=True)
class Spread:
    """Values over seeds: their mean, and their sample deviation where there are two or more."""

    mean: float | None
    deviation: float | None = None
    count: int = 0

    @staticmethod
    def of(values: Iterable[float | None]) -> Spread:
        defined = [value for value in values if value is not None]
        if not defined:
            return Spread(None)
        deviation = statistics.stdev(defined) if len(defined) > 1 else None
        return Spread(statistics.fmean(defined), deviation, len(defined))


@dataclass(frozen=True)
class Variant:
    """What a row of a comparison is of.

    Attributes:
        changed: settings of the method that are not its benchmark's, `key=value`.
        given: settings that it had to be given, `key=value`.
    """

    method: str
    strategy: str
    replay_size: int | None
    changed: tuple[str, ...] = ()
    given: tuple[str, ...] = ()

    @property
    def learner(self) -> tuple[Any, ...]:
        """All but how it met the stream."""
        return self.method, self.changed, self.given

    @property
    def method_title(self) -> str:
        """The method, with what it was changed in."""
        return ", ".join((METHODS.get(self.method, self.method), *self.changed))

    @property
    def how(self) -> str:
        """The strategy, with its buffer."""
        return self.strategy if self.replay_size is None else f"{self.strategy} {self.replay_size}"

    @property
    def order(self) -> tuple[Any, ...]:
        """Methods as the paper lists them, then strategies."""
        return (_place(METHODS, self.method), *self.learner, *self.how_order)

    @property
    def how_order(self) -> tuple[Any, ...]:
        return (_place(STRATEGIES, self.strategy), self.strategy, self.replay_size or 0)


def _place(known: Iterable[str], name: str) -> int:
    names = list(known)
    return names.index(name) if name in names else len(names)


@dataclass
class Row:
    """A variant's runs, one a seed, or what was published of it.

    Attributes:
        values: quantity -> its spread over seeds.
    """

    variant: Variant
    runs: list[Run]
    values: dict[str, Spread]
    published: bool = False

    @property
    def title(self) -> str:
        return f"{self.variant.method_title}, {self.variant.how}" + (", published" if self.published else "")

    @property
    def seeds(self) -> list[int]:
        return sorted(run.summary["seed"] for run in self.runs)


@dataclass
class Group:
    """Runs that differ in method and its settings, strategy, replay size and seed, and in nothing else.

    Attributes:
        apart: settings that are not what the benchmark gives the method.
    """

    benchmark: str
    dataset: str
    tasks: tuple[str, ...]
    apart: dict[str, str]
    runs: list[Run] = field(default_factory=list)  # unfinished ones too
    number: int = 0
    differs_in: list[str] = field(default_factory=list)  # from the other groups of the report

    @cached_property
    def rows(self) -> list[Row]:
        """A row a variant with finished runs, and beside it the published one where its setting is the paper's."""
        found: dict[Variant, list[Run]] = defaultdict(list)
        for run in self.runs:
            if run.state == "finished":
                found[variant(run)].append(run)
        joint = {
            of.learner: {run.summary["seed"]: run.summary["final"]["pixel_f1"] for run in runs}
            for of, runs in found.items()
            if of.strategy == "joint"
        }
        rows = [
            Row(
                of,
                runs,
                _values(runs, {} if of.strategy == "joint" else joint.get(of.learner, {})),
            )
            for of, runs in sorted(found.items(), key=lambda one: one[0].order)
        ]
        return [beside for row in rows for beside in (row, *self._published(row))]

    @property
    def own(self) -> list[Row]:
        """The rows that runs were found of."""
        return [row for row in self.rows if not row.published]

    @property
    def hows(self) -> list[str]:
        """Its strategies, with their buffers, in order."""
        return list(
            dict.fromkeys(v.how for v in sorted((r.variant for r in self.own), key=lambda v: v.how_order))
        )

    def _published(self, row: Row) -> list[Row]:
        """Beside a row in the paper's setting: its benchmark and tasks, wherever the images are."""
        free = ("dataset.root", "evaluate")
        changed = [key for run in row.runs for key in run.departures.apart if not key.startswith(free)]
        if self.benchmark != "paper" or list(self.tasks) != PAPER_TASKS or changed or row.variant.changed:
            return []
        bare = Variant(row.variant.method, row.variant.strategy, row.variant.replay_size)
        return [Row(row.variant, [], values, published=True) for of, values in published() if of == bare]

    @property
    def title(self) -> str:
        tasks = f"{len(self.tasks)} task" + ("s" if len(self.tasks) != 1 else "")
        sizes = {_size(run) for run in self.runs}
        size = f", {sizes.pop()} pixels" if len(sizes) == 1 else ""
        return f"{self.dataset}, {tasks}{size}, benchmark={self.benchmark}"

    @property
    def notes(self) -> list[str]:
        """What a reader must know before comparing its rows."""
        notes = []
        for what, of in (
            ("image size", _size),
            ("backbone", _backbone),
        ):
            if said := _by_method(self.runs, of):
                notes.append(f"{what} is each method's own: {said}")
        if any(row.published for row in self.rows):
            notes.append("where a row's setting is the paper's, what its authors published stands below it")
        finished = [run for run in self.runs if run.state == "finished"]
        devices = {run.device for run in finished}
        revisions = {str((run.config.get("made_by") or {}).get("git_revision"))[:12] for run in finished}
        if len(devices) > 1:
            notes.append(f"times were taken on {', '.join(sorted(devices))}, and do not compare")
        if len(revisions) > 1:
            notes.append(
                f"runs were made by {len(revisions)} versions of the code: {', '.join(sorted(revisions))}"
            )
        given = sorted(
            {f"{METHODS.get(v.method, v.method)} {text}" for v in map(variant, self.runs) for text in v.given}
        )
        if given:
            notes.append(f"given from files: {', '.join(given)}")
        joint = {row.variant.learner for row in self.own if row.variant.strategy == "joint"}
        without = {row.variant.method_title for row in self.own if row.variant.learner not in joint}
        if without and self.own:
            notes.append(
                f"no finished joint run, so no gap to it: {'; '.join(sorted(without))} (strategy=joint makes it)"
            )
        return notes

    @property
    def absent(self) -> list[str]:
        """Runs that others of the group let expect, and that are not there: a guess, and said as one."""
        there: dict[Variant, set[int]] = defaultdict(set)
        for run in self.runs:
            there[variant(run)].add(run.summary["seed"])
        seeds = set().union(*there.values())
        said = [
            f"{METHODS.get(of.method, of.method)}, {of.how}: seed {', '.join(map(str, sorted(seeds - own)))}"
            for of, own in sorted(there.items(), key=lambda one: one[0].order)
            if seeds - own
        ]
        native = {of.method for of in there if of.strategy == "native"}
        for method in sorted({of.method for of in there}, key=lambda name: (_place(METHODS, name), name)):
            own_ways = {(of.strategy, of.replay_size) for of in there if of.method == method}
            for of in sorted(
                {Variant("", v.strategy, v.replay_size) for v in there}, key=lambda v: v.how_order
            ):
                # Few methods have an update of their own, and who has one is seldom also replayed.
                expected = method in native if of.strategy == "native" else True
                expected = expected and not (of.strategy == "replay" and method in native)
                if expected and (of.strategy, of.replay_size) not in own_ways:
                    said.append(f"{METHODS.get(method, method)}, {of.how}: no run")
        return said


def variant(run: Run) -> Variant:
    """What a run is of."""
    about, own = run.summary, run.departures
    changed, given = (
        tuple(f"{k}={_as_given(v)}" for k, v in part.items()) for part in (own.changed, own.given)
    )
    return Variant(about["method"], about["strategy"], about["replay_size"], changed, given)


def _as_given(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def grouped(runs: Sequence[Run]) -> list[Group]:
    """The groups of runs that compare, the largest first; damaged runs are in none.

    Of runs that are alike in everything, seed too, only the newest finished one counts: the others become `repeated`.
    """
    groups: dict[Any, Group] = {}
    for run in runs:
        if run.state == "damaged" or not run.summary or not run.config:  # without a config, nothing was begun
            continue
        try:
            apart = run.departures.apart
            drawn = run.config["task_order"]["kind"] == "random"
            benchmark = str(run.config["benchmark"])
            _size(run)
        except (KeyError, TypeError, AttributeError):
            run.state, run.reason = "damaged", "config.yaml does not read as a run's"
            continue
        tasks = tuple(sorted(run.tasks) if drawn else run.tasks)
        group = Group(benchmark, run.summary["dataset"], tasks, apart)
        groups.setdefault(_key(group, apart), group).runs.append(run)
    _join_fixed_seeds(groups)
    _join_same_geometry(groups)
    found = sorted(
        groups.values(), key=lambda group: (-len(group.runs), group.title, sorted(group.apart.items()))
    )
    for number, group in enumerate(found, 1):
        group.number = number
        _count_each_seed_once(group.runs)
    _say_what_differs(found)
    return found


def _key(group: Group, apart: Mapping[str, str]) -> tuple[Any, ...]:
    """Of the group that is like this one, but for what sets it apart."""
    return group.benchmark, group.dataset, group.tasks, tuple(apart.items())


def _join_fixed_seeds(groups: dict[Any, Group]) -> None:
    """Where a part's seed is fixed, as with `dataset.seed=0 seed=0,1,2`, the run whose own seed is the same joins in."""
    for group in list(groups.values()):
        fixed = {key: value for key, value in group.apart.items() if key.endswith(".seed")}
        others = {key: value for key, value in group.apart.items() if key not in fixed}
        key = _key(group, others)
        alike = groups.get(key) if fixed else None
        if alike and all({str(run.summary["seed"])} == set(fixed.values()) for run in alike.runs):
            group.runs += alike.runs
            del groups[key]


def _join_same_geometry(groups: dict[Any, Group]) -> None:
    """Where images of one size are given to all, as with `dataset.crop=null`, methods whose own size it is join in."""
    alike: dict[Any, list[Group]] = defaultdict(list)
    for group in groups.values():
        others = {key: value for key, value in group.apart.items() if key not in _GEOMETRY}
        sizes = {_size(run) for run in group.runs}
        if len(sizes) == 1:
            alike[_key(group, others), sizes.pop()].append(group)
    for same in alike.values():
        same.sort(key=lambda group: -len(group.apart))
        for joining in same[1:]:
            same[0].runs += joining.runs
            del groups[_key(joining, joining.apart)]


def _count_each_seed_once(runs: list[Run]) -> None:
    alike: dict[Any, list[Run]] = defaultdict(list)
    for run in runs:
        if run.state == "finished":
            alike[variant(run), run.summary["seed"]].append(run)
    for same in alike.values():
        newest = max(same, key=lambda run: (run.path / "summary.json").stat().st_mtime)
        for run in same:
            if run is not newest:
                run.state, run.reason = (
                    "repeated",
                    f"the same settings and seed as {newest.name}, which is newer",
                )


def _say_what_differs(groups: Sequence[Group]) -> None:
    """In each group's words: the settings that not all groups share."""
    settings = [
        {"benchmark": g.benchmark, "dataset": g.dataset, "tasks": ", ".join(g.tasks), **g.apart}
        for g in groups
    ]
    for key in sorted({key for one in settings for key in one}):
        values = [one.get(key) for one in settings]
        if len(set(values)) > 1:
            for group, value in zip(groups, values, strict=True):
                group.differs_in.append(f"{key}={value}" if value is not None else f"{key} as usual")


def _values(runs: Sequence[Run], joint: Mapping[int, float | None]) -> dict[str, Spread]:
    """Every quantity over seeds.

    Args:
        joint: final pixel F1 of the joint runs, by seed: the relative gap is measured from the same seed's, or from
            their mean where that seed has none.
    """
    mean = Spread.of(joint.values()).mean
    of: dict[str, Callable[[Run], float | None]] = {
        "training_time_min": lambda run: run.summary["time"]["train_s"] / 60,
        "architecture_mb": lambda run: run.summary["memory"]["architecture_mb"],
        "additional_mb": lambda run: run.summary["memory"]["additional_mb"],
        "average_forgetting_pct": lambda run: continual.average_forgetting_pct(
            run.R["pixel_f1"], run.learned
        ),
        "relative_gap_pct": lambda run: _gap(
            joint.get(run.summary["seed"], mean), run.summary["final"]["pixel_f1"]
        ),
    }
    return {
        quantity.key: Spread.of(
            of[quantity.key](run) if quantity.key in of else run.summary["final"][quantity.key]
            for run in runs
        )
        for quantity in QUANTITIES
    }


def _gap(joint: float | None, own: float | None) -> float | None:
    return None if joint is None or own is None else 100 * (joint - own)


def published() -> list[tuple[Variant, dict[str, Spread]]]:
    """The paper's rows."""
    with open(PAPER, newline="") as file:
        return [
            (
                Variant(
                    row["method"],
                    row["strategy"],
                    int(row["replay_images"]) if row["replay_images"] else None,
                ),
                {q.key: Spread(float(row[q.key]) if row[q.key] else None) for q in QUANTITIES},
            )
            for row in csv.DictReader(file)
        ]


def marks(rows: Sequence[Row]) -> dict[tuple[int, str], Literal["best", "worst"]]:
    """The best and worst of each quantity, as (row's index, quantity's key).

    Among the rows that learn task by task and are not told the task; joint, single and published ones are bounds to
    compare with. Values that print alike share a mark; where all do, there is none.
    """
    marked: dict[tuple[int, str], Literal["best", "worst"]] = {}
    for quantity in QUANTITIES:
        values = {
            index: round(mean, quantity.digits)
            for index, row in enumerate(rows)
            if not row.published and row.variant.strategy in CONTINUAL
            if (mean := row.values[quantity.key].mean) is not None
        }
        if len(set(values.values())) < 2:
            continue
        low, high = min(values.values()), max(values.values())
        best, worst = (high, low) if quantity.better == "higher" else (low, high)
        for index, value in values.items():
            if value in (best, worst):
                marked[index, quantity.key] = "best" if value == best else "worst"
    return marked


def _size(run: Run) -> str:
    resize, crop = run.config["dataset"]["resize"], run.config["dataset"]["crop"]
    return f"{resize or 'as in the files'}" + (f" cropped to {crop}" if crop else "")


def _backbone(run: Run) -> str:
    return str(run.summary.get("backbone") or "none")


def _by_method(runs: Sequence[Run], of: Callable[[Run], str]) -> str:
    """A setting's values and whose they are, where methods differ in it."""
    whose: dict[str, set[str]] = defaultdict(set)
    for run in runs:
        whose[of(run)].add(METHODS.get(run.summary["method"], run.summary["method"]))
    return (
        "; ".join(f"{value} ({', '.join(sorted(who))})" for value, who in whose.items())
        if len(whose) > 1
        else ""
    )
