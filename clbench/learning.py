"""A finished run that goes on learning: another product, with its own strategy, into a run directory of its own."""

from collections.abc import Mapping, Sequence
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any

from clbench import assembly, digests, experiment
from clbench.config.schema import Config
from clbench.config.using import for_use
from clbench.data.products import Product
from clbench.data.samples import Dataset
from clbench.data.stream import name_problem
from clbench.errors import UserError, counted
from clbench.interruption import Interruption
from clbench.paths import expanded
from clbench.recording.checkpoint import Checkpoints
from clbench.recording.files import copy_whole, write_whole
from clbench.recording.provenance import made_by
from clbench.recording.run_directory import RunDirectory
from clbench.terminal import Display

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
        run_directory: outputs/<experiment>/<run>, of a run that is complete.
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
    config = _config_of(parent, summary, called, gpu or {}, replace or {})
    Product(called, product)  # before anything is written
    child = RunDirectory(expanded(output) if output is not None else _beside(parent.path, called))
    with child.lock(), Interruption() as interruption:
        _begin(parent, child, summary)
        if (stored := child.config()) is None:
            config = _with_product(config, summary, called, product, without_images)
        else:
            config = _of_child(stored, config, called, product, gpu or {}, replace or {})
            if child.finished(config.plain()):
                return child.path
        with (
            child.reporting(assembly.identity(config)) as report,
            Display(child.path.name, alone=True) as display,
        ):
            display.heading(child.path.name)
            made = assembly.assemble(config, interruption.watching(display.progress))
            made.identity["parent"] = str(parent.path.absolute())
            departures = (parent.config() or {}).get("departures", {})
            child.write_config(config.plain(), departures, made_by(made.device))
            report(made.identity)
            recorder = assembly.build_recorder(made, child.path, display.line)
            experiment.run(made, child, display, interruption, recorder)
    return child.path


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


def _config_of(
    parent: RunDirectory,
    summary: Mapping[str, Any],
    name: str,
    gpu: Mapping[str, Any],
    replace: Mapping[str, str | Path],
) -> Config:
    """The config of a run that is to learn a product of this name.

    Raises:
        UserError: it knows the product, its strategy cannot go on, or another version of clbench made it.
    """
    stored = parent.config() or {}
    ours, theirs = version("clbench"), (stored.get("made_by") or {}).get("clbench")
    if theirs != ours:
        raise UserError(
            f"{parent.path} was made by clbench {theirs}, and this is {ours}: learn the new product with that version, or "
            "repeat the run with this one"
        )
    config = for_use(stored, gpu, replace)
    if assembly.identity(config)["strategy_flags"]["joint"]:
        raise UserError(
            f"{parent.path} has learned all products at once (strategy={config.strategy.name}), and cannot go on: repeat "
            "its command with the new one among them"
        )
    known = [category for categories in summary["categories"] for category in categories]
    if problem := name_problem(name):
        raise UserError(f"{problem}, or give it another name with --name")
    if name in known or name in summary["tasks"]:
        raise UserError(
            f"{parent.path} has learned '{name}' already ({', '.join(known)}): give another product, or --name where it "
            "is another of the same name"
        )
    return config


def _with_product(
    config: Config, summary: Mapping[str, Any], name: str, folder: Path, without_images: bool
) -> Config:
    """The config with one more task, and without the images that are not there."""
    groups = [list(group) for group in summary["categories"]]
    known = [category for group in groups for category in group]
    there = [] if without_images else _there(config, known)
    absent = {category: summary["images"].get(category, []) for category in known if category not in there}
    tasks = [group[0] if len(group) == 1 else group for group in [*groups, [name]]]
    order = config.changed("task_order", kind="listed", tasks=tasks, run=None, metric=None, sizes=None)
    added = {each: path for each, path in config.dataset.added.items() if each not in absent}
    return order.changed("dataset", added={**added, name: str(folder)}, absent=absent)


def _there(config: Config, categories: Sequence[str]) -> list[str]:
    """Those of a run's categories whose images are all there; one of which a part is missing is as good as gone."""

    def complete(dataset: Dataset, category: str) -> bool:
        with suppress(UserError):
            return all(dataset.samples(category, split) for split in ("train", "test"))
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


def _of_child(
    stored: Mapping[str, Any],
    config: Config,
    name: str,
    folder: Path,
    gpu: Mapping[str, Any],
    replace: Mapping[str, str | Path],
) -> Config:
    """The config of a learning that was begun.

    Raises:
        UserError: it was begun with another product.
    """
    begun = for_use(stored, gpu, replace)
    newest = list(begun.dataset.added.items())[-1:]
    if newest != [(name, str(folder))] or begun.method != config.method:
        what = " of ".join(map(str, newest[0])) if newest else "no product"
        raise UserError(f"the directory for '{name}' holds a run that learned {what}: give another --output")
    return begun


def _begin(parent: RunDirectory, child: RunDirectory, summary: Mapping[str, Any]) -> None:
    """Take over what a run has learned and measured, unless that was done.

    A process that is killed here leaves a directory without parent.json, which is written last: it is begun again.

    Raises:
        UserError: the directory holds another run, the run has changed since, or what it has learned is missing.
    """
    about = {"run": str(parent.path.absolute()), "metrics_sha256": summary.get("metrics_sha256")}
    found = child.parent()
    if found is not None and found.get("run") != about["run"]:
        raise UserError(f"{child.path} goes on from another run, {found.get('run')}: give another --output")
    if found is not None and found != about:
        raise UserError(
            f"{parent.path} has changed since {child.path} went on from it: remove the latter, or give another --output"
        )
    if found is not None:
        return
    if child.config() is not None:
        raise UserError(f"{child.path} holds a run already: give another --output")
    copied = Checkpoints(parent.path / "checkpoint").copy_newest(child.path / "checkpoint")
    stages = len(summary["tasks"])
    if copied != stages - 1:
        raise UserError(
            f"what {parent.path} has learned in the last of its {counted(stages, 'stage')} is missing or damaged: copy its "
            "checkpoint/ again"
        )
    for name in ("journal.jsonl", "thresholds.json"):
        if (parent.path / name).is_file():
            content = (parent.path / name).read_bytes()
            write_whole(child.path / name, lambda part, content=content: part.write_bytes(content))  # type: ignore[misc]
    if summary["strategy_flags"]["task_known"]:  # what final metrics of unchanged models rest on
        for path in sorted((parent.path / "evidence").glob("*.npz")):
            copy_whole(path, child.path / "evidence" / path.name)
    child.write_parent(about)


def _beside(parent: Path, name: str) -> Path:
    """The directory of a run that goes on, beside the one that it goes on from and named after it."""
    whole = f"{parent.name}+{name}"
    if len(whole.encode(errors="surrogateescape")) > _LONGEST:
        begin = parent.name.encode(errors="surrogateescape")[: _LONGEST - 60].decode(errors="ignore")
        whole = f"{begin}~{digests.of_text(whole)[:8]}+{name[:40]}"
    return parent.with_name(whole)
