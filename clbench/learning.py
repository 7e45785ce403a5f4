"""A finished run that goes on, into a run directory of its own: it learns another product, or forgets one."""

import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any

from clbench import assembly, digests, experiment
from clbench.config.schema import Config
from clbench.config.using import for_use
from clbench.data.images import ImageSet
from clbench.data.products import Product
from clbench.data.samples import Dataset
from clbench.data.stream import name_problem
from clbench.data.unchanged import SPLITS
from clbench.errors import UserError, counted
from clbench.interruption import Interruption
from clbench.paths import expanded
from clbench.recording.checkpoint import Checkpoints
from clbench.recording.files import copy_whole, write_whole
from clbench.recording.journal import Journal, entries_of
from clbench.recording.run_directory import RunDirectory

_LONGEST = 200  # bytes of a run directory's name, as for other runs


def learn(
    run_directory: Path | str,
    folder: Path | str,
    *,
    name: str | None = None,
    output: Path | str | None = None,
    without_images: bool = False,
    gpu: Mapping[str, Any] | None = None,
    replace: Mapping[str, str | Path] | None = None,
) -> Path:
    """Have a finished run learn another product, and evaluate all whose images are there.

    What the run has learned, measured and kept is taken over, images that it stores for replay among it; the run itself is
    left as it is. A learning that was stopped is continued by the same call. The results are those of a run that had the
    product as its last task from the beginning, but for products whose test images are not there any more: what was measured
    of them stays, and they are not measured again.

    Args:
        run_directory: `outputs/<experiment>/<run>`, of a run that is complete.
        folder: the product's images, see `clbench.data.products.Product`.
        name: the product's; the folder's name where None is given.
        output: the directory of the run that goes on; beside the first and named after it where None is given.
        without_images: whether to leave out the images of all products that the run knows, also those that are there.
        gpu: settings of the `gpu` group to use in place of the run's.
        replace: where files that the run was trained with are now: flat key of the setting -> path.

    Returns:
        The directory of the run that goes on.

    Raises:
        UserError: the run is not complete, of another version of clbench, knows the product or cannot go on; images differ
            in size or are not those that it has learned; the output directory holds something else; or as for a run.
        Stopped: a signal asked for it; the same call continues.
    """
    parent = RunDirectory(expanded(run_directory))
    product = expanded(folder).absolute()
    if not product.is_dir():
        raise UserError(f"{product} is no folder: give the folder of the new product's images")
    called = name if name is not None else product.name
    summary = _summary_of(parent)
    config = _config_of(parent, gpu or {}, replace or {})
    _check_new(parent, config, summary, called)
    Product(called, product)  # before anything is written
    child = RunDirectory(expanded(output) if output is not None else _beside(parent.path, f"+{called}"))

    def begin() -> Config:
        _take_over(parent, child, summary)
        return _with_product(config, summary, called, product, without_images)

    def check(begun: Config) -> None:
        newest = list(begun.dataset.added.items())[-1:]
        if newest != [(called, str(product))]:
            what = " of ".join(newest[0]) if newest else "no product"
            raise UserError(f"{child.path} holds a run that learned {what}: give another --output")

    return _go_on(parent, child, summary, begin, check, gpu or {}, replace or {})


def forget(
    run_directory: Path | str,
    task: str,
    *,
    output: Path | str | None = None,
    gpu: Mapping[str, Any] | None = None,
    replace: Mapping[str, str | Path] | None = None,
) -> Path:
    """Have a finished run forget one task: its model goes, and the others are evaluated and given thresholds again.

    That is possible where the task has a model of its own: a bank among others that one is chosen from, or a detector under
    `strategy=single`. Results lose the task, and the stage that learned it; the last stage's are measured anew. Room that the
    task's bank had is for products to come: those that are there do not grow again. The run itself is left as it is.

    Args:
        run_directory: `outputs/<experiment>/<run>`, of a run that is complete.
        task: the name of one of its tasks.
        output: the directory of the run that goes on; beside the first and named after it where None is given.
        gpu, replace: as for `learn`.

    Returns:
        The directory of the run that goes on.

    Raises:
        UserError: the run is not complete, of another version of clbench, has no such task, that one alone, or no model of it
            alone; or as `learn`.
        Stopped: a signal asked for it; the same call continues.
    """
    parent = RunDirectory(expanded(run_directory))
    summary = _summary_of(parent)
    config = _config_of(parent, gpu or {}, replace or {})
    names = summary["tasks"]
    if task not in names:
        raise UserError(f"{parent.path} has no task '{task}': give one of {', '.join(names)}")
    if len(names) == 1:
        raise UserError(f"'{task}' is all that {parent.path} has learned: remove the run in place of that")
    child = RunDirectory(expanded(output) if output is not None else _beside(parent.path, f"-{task}"))
    dropped = names.index(task)
    gone = summary["categories"][dropped]

    def begin() -> Config:
        kept = [group for group in summary["categories"] if group != gone]
        smaller = _with_tasks(_without_images(config, summary), kept)
        if len(smaller.dataset.absent) == sum(map(len, kept)):
            raise UserError(
                f"of what {parent.path} keeps ({', '.join(smaller.dataset.absent)}) there are no images to set thresholds on: "
                "put those of one back where they were, and give the command again"
            )
        strategy = assembly.build_strategy(config, assembly.build_detector(config))
        saved = Checkpoints(parent.path / "checkpoint").load_stage()
        if saved is None or saved[0] != len(names) - 1:
            raise _lost(parent, len(names))
        _, tensors, data = saved
        strategy.restore(tensors)
        strategy.drop(dropped)
        data["stream"] = {name: found for name, found in data["stream"].items() if name not in gone}
        entries = [
            {**entry, "stage": entry["stage"] - (entry["stage"] > dropped)}
            for entry in entries_of(parent.path / "journal.jsonl")
            if entry["stage"] != dropped and entry.get("category") not in gone
        ]
        last = len(names) - 2
        Journal(child.path / "journal.jsonl").rewrite(
            entry for entry in entries if entry["kind"] != "evaluation" or entry["stage"] != last
        )
        _copy(parent, child, "thresholds.json")
        Checkpoints(child.path / "checkpoint").save_stage(last, strategy.state(), data)
        return smaller

    def check(begun: Config) -> None:
        if any(name in begun.task_order.listed for name in gone):
            raise UserError(
                f"{child.path} holds a run that has not forgotten '{task}': give another --output"
            )

    return _go_on(parent, child, summary, begin, check, gpu or {}, replace or {})


def _go_on(
    parent: RunDirectory,
    child: RunDirectory,
    summary: Mapping[str, Any],
    begin: Callable[[], Config],
    check: Callable[[Config], None],
    gpu: Mapping[str, Any],
    replace: Mapping[str, str | Path],
) -> Path:
    """Do the run that goes on from another, or what is left of it; gives its directory.

    A process that is killed before parent.json is written, which says that all was taken over, leaves nothing that counts.

    Args:
        summary: the other run's.
        begin: takes over what that one has, and gives the config of the run that goes on.
        check: checks the config of one that was begun.

    Raises:
        UserError: the directory holds another run, or the run that it goes on from has changed since; or as `learn`.
    """
    about: dict[str, Any] = {
        "run": str(parent.path.absolute()),
        "metrics_sha256": summary.get("metrics_sha256"),
    }
    _check_free(child)
    with child.lock(), Interruption() as interruption:
        found, stored = child.parent(), child.config()
        if found is not None and os.path.realpath(str(found.get("run"))) != os.path.realpath(about["run"]):
            raise UserError(
                f"{child.path} goes on from another run, {found.get('run')}: give another --output"
            )
        if found is not None and found.get("metrics_sha256") != about["metrics_sha256"]:
            raise UserError(
                f"{parent.path} has changed since {child.path} went on from it: remove the latter, or give another --output"
            )
        if found is None or stored is None:
            child.clear()  # what a process that was killed has left
            config = begin()
            child.write_parent(about)
        else:
            config = for_use(stored, gpu, replace)
            check(config)
            if child.finished(config.plain()):
                return child.path
        departures = (parent.config() or {}).get("departures", {})
        more = {"parent": about["run"]}
        experiment.run_in(child, config, interruption, alone=True, more=more, departures=departures)
    return child.path


def _check_free(child: RunDirectory) -> None:
    """Check that a directory has nothing of anybody else in it: what another run or a person has there is not touched.

    A run that goes on has parent.json, or the lock that is the first of its files, and none of those that a run writes last.

    Raises:
        UserError: it has.
    """
    if not child.path.is_dir() or child.parent() is not None:
        return
    if any((child.path / name).exists() for name in ("config.yaml", "summary.json", "metrics.csv")):
        raise UserError(f"{child.path} holds a run already: give another --output")
    if not (child.path / "run.lock").exists() and any(child.path.iterdir()):
        raise UserError(f"{child.path} holds other files: give another --output, a folder of its own")


def _summary_of(parent: RunDirectory) -> dict[str, Any]:
    """The summary of a run that can go on.

    Raises:
        UserError: it is not complete.
    """
    summary = parent.summary()
    if summary is None or parent.config() is None:
        raise UserError(
            f"{parent.path} holds no run that can go on (config.yaml, summary.json and checkpoint/): give the directory of "
            "a finished run, outputs/<experiment>/<run>; an exported detector has learned all that it will"
        )
    if not parent.complete(summary):
        raise UserError(
            f"{parent.path} is not complete (status: {summary['status']}): wait for it, or repeat its command, and then "
            "learn the new product"
        )
    return summary


def _config_of(parent: RunDirectory, gpu: Mapping[str, Any], replace: Mapping[str, str | Path]) -> Config:
    """The config of a run that is to go on.

    Raises:
        UserError: another version of clbench made it, or it cannot be used here.
    """
    stored = parent.config() or {}
    ours, theirs = version("clbench"), (stored.get("made_by") or {}).get("clbench")
    if theirs != ours:
        raise UserError(
            f"{parent.path} was made by clbench {theirs}, and this is {ours}: go on with that version, or repeat the run "
            "with this one"
        )
    config = for_use(stored, gpu, replace)
    if config.stream.kind != "tasks":
        raise UserError(
            f"{parent.path} learned parts of a stream without tasks (stream={config.stream.kind}), and a product is one: "
            "give a run of stream=tasks"
        )
    return config


def _check_new(parent: RunDirectory, config: Config, summary: Mapping[str, Any], name: str) -> None:
    """Check that a run can learn a product of this name.

    Raises:
        UserError: its strategy cannot go on, it knows the product, or nothing can be called so.
    """
    if assembly.identity(config)["strategy_flags"]["joint"]:
        raise UserError(
            f"{parent.path} has learned all products at once (strategy={config.strategy.name}), and cannot go on: repeat "
            "its command with the new one among them"
        )
    if problem := name_problem(name):
        raise UserError(f"{problem}, or give it another name with --name")
    known = [category for categories in summary["categories"] for category in categories]
    if name in known or name in summary["tasks"]:
        raise UserError(
            f"{parent.path} has learned '{name}' already ({', '.join(known)}): give another product, or --name where it "
            "is another of the same name"
        )


def _with_product(
    config: Config, summary: Mapping[str, Any], name: str, folder: Path, without_images: bool
) -> Config:
    """The config with one more task, and without the images that are not there."""
    known = _without_images(config, summary, there=[] if without_images else None)
    grown = known.changed("dataset", added={**known.dataset.added, name: str(folder)})
    return _with_tasks(grown, [*summary["categories"], [name]])


def _without_images(config: Config, summary: Mapping[str, Any], there: Sequence[str] | None = None) -> Config:
    """The config of a run that goes on without the images that are not there.

    Args:
        there: the categories whose images are used; None for all of which they are there.
    """
    known = [category for group in summary["categories"] for category in group]
    there = _there(config, known, summary["images"]) if there is None else there
    absent = {category: summary["images"].get(category, []) for category in known if category not in there}
    return config.changed("dataset", absent=absent)


def _with_tasks(config: Config, groups: Sequence[Sequence[str]]) -> Config:
    """The config with these categories for tasks, and without what it has of others."""
    tasks = [group[0] if len(group) == 1 else list(group) for group in groups]
    kept = {name for group in groups for name in group}
    added, absent = (
        {name: value for name, value in each.items() if name in kept}
        for each in (config.dataset.added, config.dataset.absent)
    )
    order = config.changed("task_order", kind="listed", tasks=tasks, run=None, metric=None, sizes=None)
    return order.changed("dataset", added=added, absent=absent)


def _there(config: Config, categories: Sequence[str], images: Mapping[str, Sequence[str]]) -> list[str]:
    """Those of a run's categories whose images are all there; one of which a part is missing is as good as gone.

    Args:
        images: the fingerprints of each category's images, see `clbench.data.unchanged`: one may never have had test images.
    """
    nothing = ImageSet.none((1, 1)).contents.fingerprint([])

    def complete(dataset: Dataset, category: str) -> bool:
        had = dict(zip(SPLITS, images.get(category, []), strict=False))
        with suppress(UserError):
            return all(dataset.samples(category, split) or had.get(split) == nothing for split in SPLITS)
        return False

    found = []
    for category in categories:
        alone = config.changed("task_order", kind="listed", tasks=[category])
        others: dict[str, list[str]] = {
            each: [] for each in [*categories, *config.dataset.absent] if each != category
        }
        with suppress(UserError):
            added = {each: path for each, path in config.dataset.added.items() if each == category}
            if complete(
                assembly.build_dataset(alone.changed("dataset", added=added, absent=others)), category
            ):
                found.append(category)
    return found


def _take_over(parent: RunDirectory, child: RunDirectory, summary: Mapping[str, Any]) -> None:
    """Copy what a run has learned and measured.

    Raises:
        UserError: what it has learned is missing, or the disk is full.
    """
    stages = len(summary["tasks"])
    if Checkpoints(parent.path / "checkpoint").copy_newest(child.path / "checkpoint") != stages - 1:
        raise _lost(parent, stages)
    for name in ("journal.jsonl", "thresholds.json"):
        _copy(parent, child, name)
    if summary["strategy_flags"]["task_known"]:  # what final metrics of unchanged models rest on
        for path in sorted((parent.path / "evidence").glob("*.npz")):
            copy_whole(path, child.path / "evidence" / path.name)


def _copy(parent: RunDirectory, child: RunDirectory, name: str) -> None:
    """Copy a file of a run's directory, where it has it.

    Raises:
        UserError: the disk is full or may not be written.
    """
    if (parent.path / name).is_file():
        content = (parent.path / name).read_bytes()
        write_whole(child.path / name, lambda part: part.write_bytes(content))


def _lost(parent: RunDirectory, stages: int) -> UserError:
    """The error for a run of so many stages whose last checkpoint is not there."""
    return UserError(
        f"what {parent.path} has learned in the last of its {counted(stages, 'stage')} is missing or damaged: copy its "
        "checkpoint/ again"
    )


def _beside(parent: Path, what: str) -> Path:
    """The directory of a run that goes on, beside the one that it goes on from: its name, and what has changed."""
    whole = f"{parent.name}{what}"
    if len(whole.encode(errors="surrogateescape")) > _LONGEST:
        begin = parent.name.encode(errors="surrogateescape")[: _LONGEST - 60].decode(errors="ignore")
        whole = f"{begin}~{digests.of_text(whole)[:8]}{what[:40]}"
    return parent.with_name(whole)
