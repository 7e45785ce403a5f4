"""Groups of runs that compare with one another."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from clbench.data.protocols import protocol_of, protocols
from clbench.errors import counted
from clbench.metrics.names import METRICS
from clbench.report import titles, uncertainty
from clbench.report.reading import REPORTED, FoundRun
from clbench.report.rows import Mark, Quantity, Row, Variant, marks, published, quantities_of, rows_of

_GEOMETRY = ("dataset.resize", "dataset.crop")  # see _image_size

PAPER_TASKS = [name for task in protocols()["paper"].tasks for name in task]


@dataclass
class Group:
    """Runs that differ in method and strategy, their settings, replay size and seed, and in nothing else.

    Attributes:
        categories: what R's columns are of.
        pooled: whether the categories of a task were evaluated as one, see `FoundRun.pooled`.
        apart: settings that are not what the benchmark gives: key -> value.
        runs: finished and unfinished ones.
        number: its place in the report, from 1.
        differs_in: what sets it apart from the report's other groups, `key=value`.
    """

    benchmark: str
    dataset: str
    tasks: tuple[str, ...]
    categories: tuple[str, ...]
    pooled: bool
    apart: dict[str, str]
    runs: list[FoundRun] = field(default_factory=list)
    number: int = 0
    differs_in: list[str] = field(default_factory=list)

    def key(self, *without: str) -> tuple[Any, ...]:
        """A key that two groups share whose runs compare, were it not for the settings named in `without`."""
        apart = tuple((key, value) for key, value in self.apart.items() if key not in without)
        return self.benchmark, self.dataset, self.tasks, self.categories, self.pooled, apart

    @property
    def protocol(self) -> str | None:
        """The field's protocol that all of its runs follow, task by task; None where they follow none."""
        runs = self.finished
        names = {protocol_of(self.dataset, run.categories_by_task) for run in runs}
        return names.pop() if len(names) == 1 else None

    @cached_property
    def shared_tasks(self) -> bool:
        """Whether tasks are named otherwise than categories, as those are that bring several."""
        return self.categories != self.tasks

    @property
    def finished(self) -> list[FoundRun]:
        """Its runs that are complete and counted."""
        return [run for run in self.runs if run.state == "finished"]

    @cached_property
    def rows(self) -> list[Row]:
        """A row for each variant with finished runs; below it the published one, where there is one."""
        return [shown for row in rows_of(self.finished) for shown in (row, *self._published(row))]

    @cached_property
    def quantities(self) -> tuple[Quantity, ...]:
        """The columns of its comparison."""
        return quantities_of(self.finished)

    @cached_property
    def differences(self) -> uncertainty.Differences:
        """How its rows differ from the best ones, with intervals over test images."""
        return uncertainty.differences(self.rows)

    @property
    def marks(self) -> dict[tuple[int, str], Mark]:
        """The best, worst and level values: index of a row and quantity -> mark.

        A value is level where it is within noise of the best; it is not the worst then. Where all values print alike,
        there is no best.
        """
        found = marks(self.rows, self.quantities)
        with_best = {metric for (_, metric), mark in found.items() if mark == "best"}
        for (index, metric), difference in self.differences.found.items():
            other = self.rows[index].flags.continual and found.get((index, metric)) != "best"
            if other and difference.level and metric in with_best:
                found[index, metric] = "level"
        return found

    @property
    def metrics(self) -> list[str]:
        """The metrics that any of its runs has: first those that every run has."""
        return [*REPORTED, *(q.key for q in self.quantities if q.key in METRICS and q.key not in REPORTED)]

    @property
    def found(self) -> list[Row]:
        """The rows made from runs: all but the published ones."""
        return [row for row in self.rows if not row.published]

    @property
    def strategy_titles(self) -> list[str]:
        """Titles of its strategies, with their buffers and settings, in order."""
        variants = sorted((row.variant for row in self.found), key=lambda variant: variant.strategy_order)
        return list(dict.fromkeys(variant.strategy_title for variant in variants))

    def strategies(self, *, continual: bool) -> list[str]:
        """Names of its continual strategies, or of the others, which serve as bounds; in order."""
        names = {row.variant.strategy for row in self.found if row.flags.continual == continual}
        return sorted(names, key=lambda name: titles.rank(titles.STRATEGIES, name))

    def _published(self, row: Row) -> list[Row]:
        """The published row beside a row in the paper's setting: its benchmark and tasks."""
        free = ("dataset.root", "evaluate")
        apart = [key for run in row.runs for key in run.departures.apart if not key.startswith(free)]
        changed = apart or row.variant.changed or row.variant.strategy_changed
        if self.benchmark != "paper" or list(self.tasks) != PAPER_TASKS or changed:
            return []
        bare = Variant(row.variant.method, row.variant.strategy, row.variant.replay_size)
        return [other for other in published() if other.variant == bare]

    @property
    def title(self) -> str:
        """The dataset, the number of tasks, the image size where all share one, and the benchmark."""
        tasks = counted(len(self.tasks), "task")
        if len(self.categories) != len(self.tasks):
            tasks += f" of {counted(len(self.categories), 'category', 'categories')}"
        sizes = {_image_size(run) for run in self.runs}
        size = f", {sizes.pop()} pixels" if len(sizes) == 1 else ""
        return f"{self.dataset}, {tasks}{size}, benchmark={self.benchmark}"

    @property
    def notes(self) -> list[str]:
        """What a reader must know before comparing its rows."""
        return [*self._notes_on_settings(), *self._notes_on_runs()]

    def _notes_on_settings(self) -> Iterator[str]:
        for name, setting in (("image size", _image_size), ("backbone", _backbone)):
            if values := _by_method(self.runs, setting):
                yield f"{name} is each method's own: {values}"
        if self.pooled:
            yield (
                "made by an earlier version, which pooled the test images of a task's categories: values "
                "are of tasks, and do not compare with those of categories"
            )
        unknown = sorted({_method_title(run) for run in self.runs if not run.departures.known})
        if unknown:
            yield (
                f"what the benchmark gives {', '.join(unknown)} is not known, as the runs are of an earlier "
                "version and conf/ is not here or has no such choice: all their settings are named"
            )

    def _notes_on_runs(self) -> Iterator[str]:
        if any(row.published for row in self.rows):
            yield "where a row's setting is the paper's, what its authors published stands below it"
        if any(run.config["task_order"]["kind"] == "random" for run in self.finished):
            yield "each seed has a task order of its own: deviations are over both"
        if self.differences.without:
            why = "; ".join(f"{title}: {reason}" for title, reason in self.differences.without.items())
            yield f"rows without intervals over test images, which are marked level with none: {why}"
        mixed = [row.title for row in self.found if _on_other_images(row.runs)]
        if mixed:
            yield f"the seeds of a row were run on different images, which their means mix: {'; '.join(mixed)}"
        devices = {run.device for run in self.finished}
        if len(devices) > 1:
            yield f"times were taken on {', '.join(sorted(devices))}, and do not compare"
        made_by = [run.config.get("made_by") or {} for run in self.finished]
        revisions = sorted({str(made.get("git_revision"))[:12] for made in made_by})
        if len(revisions) > 1:
            yield f"runs were made by {len(revisions)} versions of the code: {', '.join(revisions)}"
        given = {
            f"{titles.method_title(variant.method)} {text}"
            for variant in map(Variant.of, self.runs)
            for text in variant.given
        }
        if given:
            yield f"given from files: {', '.join(sorted(given))}"
        joint = {row.variant.learner for row in self.found if row.flags.joint}
        without = {row.variant.method_title for row in self.found if row.variant.learner not in joint}
        if without:
            named = "; ".join(sorted(without))
            yield f"no finished joint run, so no gap to it: {named} (strategy=joint makes it)"

    @property
    def absent(self) -> list[str]:
        """Runs that the other runs suggest and that are not there, a line each: a guess."""
        there: dict[Variant, set[int]] = defaultdict(set)
        for run in self.runs:
            there[Variant.of(run)].add(run.seed)
        seeds = set().union(*there.values())
        missing = [
            f"{titles.method_title(variant.method)}, {variant.strategy_title}: seed "
            f"{', '.join(map(str, sorted(seeds - found)))}"
            for variant, found in sorted(there.items(), key=lambda item: item[0].order)
            if seeds - found
        ]
        return [*missing, *self._absent_strategies(there)]

    def _absent_strategies(self, there: Mapping[Variant, set[int]]) -> Iterator[str]:
        """Strategies that one method has runs of and another has not, a line each.

        Not every method can be expected to have them all. What is the paper's choice for a method of the
        group is expected of those whose choice it is, as few methods have an update of their own; and what
        needs gradients, of those that have a run of such a strategy.
        """
        choices = {run.summary["method"]: _paper_choice(run) for run in self.runs}
        gradients = {run.summary["strategy"] for run in self.runs if run.flags.needs_gradients}
        trained = {variant.method for variant in there if variant.strategy in gradients}
        ways = {variant.way: variant for variant in there}
        for method in sorted(choices, key=lambda name: titles.rank(titles.METHODS, name)):
            ran = {variant.way for variant in there if variant.method == method}
            for variant in sorted(ways.values(), key=lambda variant: variant.strategy_order):
                chosen_elsewhere = variant.strategy in set(choices.values()) - {choices[method]}
                beyond = variant.strategy in gradients and method not in trained
                if variant.way not in ran and not chosen_elsewhere and not beyond:
                    yield f"{titles.method_title(method)}, {variant.strategy_title}: no run"


def grouped(runs: Sequence[FoundRun]) -> list[Group]:
    """Sort runs into groups of runs that compare, the largest first; damaged runs are in none.

    Of runs that are alike in everything, seed too, only the newest finished one counts: the others become
    `repeated`.
    """
    groups: dict[Any, Group] = {}
    for run in runs:
        if run.state == "damaged" or not run.summary or not run.config:  # without a config, nothing was begun
            continue
        try:
            group = _group_of(run)
        except (KeyError, TypeError, AttributeError):
            run.state, run.reason = "damaged", "config.yaml does not read as a run's"
            continue
        groups.setdefault(group.key(), group).runs.append(run)
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


def _group_of(run: FoundRun) -> Group:
    """The group that a run belongs to, still without runs.

    Raises:
        KeyError, TypeError, AttributeError: its config.yaml is not a run's.
    """
    _image_size(run), _paper_choice(run)  # a group's title and notes ask for them
    drawn = run.config["task_order"]["kind"] == "random"
    tasks, categories = (tuple(sorted(names) if drawn else names) for names in (run.tasks, run.categories))
    return Group(
        str(run.config["benchmark"]),
        run.summary["dataset"],
        tasks,
        categories,
        run.pooled,
        run.departures.apart,
    )


def _join_fixed_seeds(groups: dict[Any, Group]) -> None:
    """Join groups that `dataset.seed=0 seed=0,1,2` makes: where a part's seed is fixed, the run with that
    very seed as its own departs in nothing, and yet belongs to the others."""
    for group in list(groups.values()):
        fixed = {key: value for key, value in group.apart.items() if key.endswith(".seed")}
        alike = groups.get(group.key(*fixed)) if fixed else None
        if alike and all({str(run.seed)} == set(fixed.values()) for run in alike.runs):
            group.runs += alike.runs
            del groups[alike.key()]


def _join_same_geometry(groups: dict[Any, Group]) -> None:
    """Join groups that `dataset.crop=null` makes: where all methods are given one image size, those whose
    own size it is depart in nothing, and yet belong to the others."""
    alike: dict[Any, list[Group]] = defaultdict(list)
    for group in groups.values():
        sizes = {_image_size(run) for run in group.runs}
        if len(sizes) == 1:
            alike[group.key(*_GEOMETRY), sizes.pop()].append(group)
    for same in alike.values():
        same.sort(key=lambda group: -len(group.apart))
        for joining in same[1:]:
            same[0].runs += joining.runs
            del groups[joining.key()]


def _count_each_seed_once(runs: Sequence[FoundRun]) -> None:
    """Of finished runs of the same variant and seed, mark all but the newest as repeated."""
    alike: dict[Any, list[FoundRun]] = defaultdict(list)
    for run in runs:
        if run.state == "finished":
            alike[Variant.of(run), run.seed].append(run)
    for same in alike.values():
        newest = max(same, key=lambda run: (run.path / "summary.json").stat().st_mtime)
        for run in same:
            if run is not newest:
                run.state = "repeated"
                run.reason = f"the same settings and seed as {newest.name}, which is newer"


def _say_what_differs(groups: Sequence[Group]) -> None:
    """Write into each group the settings that not all groups share."""
    settings = [
        {
            "benchmark": group.benchmark,
            "dataset": group.dataset,
            "tasks": ", ".join(group.tasks),
            **group.apart,
        }
        for group in groups
    ]
    for key in sorted({key for one in settings for key in one}):
        values = [one.get(key) for one in settings]
        if len(set(values)) > 1:
            for group, value in zip(groups, values, strict=True):
                group.differs_in.append(f"{key}={value}" if value is not None else f"{key} as usual")
    for group in groups:
        if group.pooled and not all(other.pooled for other in groups):
            group.differs_in.append("test images pooled by task")


def _paper_choice(run: FoundRun) -> str | None:
    """The strategy that the paper takes for a run's method; None where its config has none."""
    return (run.config["method"].get("protocol") or {}).get("strategy")


def _image_size(run: FoundRun) -> str:
    """What images are brought to, in pixels: `256 cropped to 224`."""
    about = run.config["dataset"]
    crop, tile = about["crop"], about.get("tile")
    cut = f" cropped to {crop}" if crop else f" in tiles of {tile}" if tile else ""
    return f"{about['resize'] or 'as in the files'}{cut}"


def _on_other_images(runs: Sequence[FoundRun]) -> bool:
    """Whether runs of one row have different images, though these are not drawn by seed."""
    found = [run.summary.get("images") for run in runs if "seed" not in run.config["dataset"]]
    return any(images != found[0] for images in found)


def _backbone(run: FoundRun) -> str:
    return str(run.summary.get("backbone") or "none")


def _method_title(run: FoundRun) -> str:
    return titles.method_title(run.summary["method"])


def _by_method(runs: Sequence[FoundRun], setting: Callable[[FoundRun], str]) -> str:
    """The values of a setting, each with its methods, where methods differ; else an empty string."""
    methods: dict[str, set[str]] = defaultdict(set)
    for run in runs:
        methods[setting(run)].add(_method_title(run))
    named = [f"{value} ({', '.join(sorted(names))})" for value, names in methods.items()]
    return "; ".join(named) if len(named) > 1 else ""
