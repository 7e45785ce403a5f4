"""From a checked config to everything that a run is made of: its device, strategy, tasks and recorder."""

import dataclasses
import os
import warnings
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from clbench import boundaries, decisions, evaluation, footprint, precision, thresholds
from clbench.backbones import Backbone
from clbench.config import Config, takes, wandb_mode
from clbench.config.classes import BUFFER, arguments, class_of_kind
from clbench.config.files import file_digests
from clbench.config.schema import Gpu
from clbench.cores import usable_cores
from clbench.data import blurred, stream
from clbench.data.drift import Drift
from clbench.data.images import Images
from clbench.data.products import Products
from clbench.data.samples import Dataset
from clbench.data.stream import Task
from clbench.data.tiles import Tiling
from clbench.errors import UserError, counted
from clbench.methods.base import Detector, Progress
from clbench.metrics.names import USUAL, need
from clbench.out_of_memory import memory_named
from clbench.recording.recorder import Recorder, Surviving
from clbench.strategies.base import Strategy
from clbench.strategies.selection import mean_features
from clbench.strategies.storage import storage_of

# Settings that need less memory where they are lower, the most effective first: of networks, and of features kept.
_OF_NETWORKS = (
    "method.width",
    "method.reconstructive_width",
    "method.discriminative_width",
    "method.hidden_ratio",
    "dataset.tile",
    "dataset.resize",
)
_OPEN = ("apache-2.0", "mit", "bsd-3-clause", "bsd-2-clause")  # licences of weights, as timm names them
OF_FEATURES = ("method.feature_memory_mb", "backbone.feature_memory_mb")


@dataclass(frozen=True)
class Assembly:
    """Everything that a run is made of.

    Attributes:
        config: the checked config.
        device: what the detector is on.
        strategy: the strategy with its detector, which have learned nothing yet.
        tasks: the stream, in its order.
        identity: what summary.json says of the run before it has results.
        notes: a line for each thing about the images that is doubtful, or that was left out, and for weights that not
            everybody may use.
        metrics: names of the metrics of each evaluation.
    """

    config: Config
    device: torch.device
    strategy: Strategy
    tasks: list[Task]
    identity: dict[str, Any]
    notes: list[str]

    @property
    def metrics(self) -> tuple[str, ...]:
        return (*USUAL, *self.config.metrics.further, *["routing_accuracy"] * self.strategy.routes)


def assemble(config: Config, progress: Progress) -> Assembly:
    """Build everything that a run is made of.

    Folders are looked for first, then networks are built, then images are read: errors come early.

    Args:
        progress: told while images are read.

    Raises:
        UserError: a device, folder, category, image or network that the config names is not there, they do
            not fit together, or memory is not enough.
    """
    device = select_device(config.gpu)
    footprint.reset_peak(device)
    dataset = build_dataset(config)
    read = reader(config, dataset)
    with memory_for("building the detector", config, device, *_OF_NETWORKS):
        detector = place(build_detector(config), config.gpu, device)
    with memory_for("reading the images", config, torch.device("cpu"), "dataset.resize"):
        tasks = read(progress)
    evaluation.check_room(tasks)
    strategy = build_strategy(config, detector)
    about: dict[str, Any] = {}
    if config.stream.kind == "blurred":
        with memory_for("looking for boundaries", config, device, "backbone.batch_size", *_OF_NETWORKS):
            tasks, about = without_tasks(config, tasks, detector, progress)
    with memory_for("trying an image", config, device, "backbone.batch_size", *_OF_NETWORKS):
        strategy.check(tasks)
    thresholds.check_room(strategy, tasks)
    notes = [
        *dataset.notes,
        *_alarms(about),
        *stream.doubts(tasks, config.dataset.bit_depth),
        *licences(detector),
    ]
    assembly = Assembly(config, device, strategy, tasks, {**identity(config, tasks), **about}, notes)
    rates = config.metrics.pixel_rate, config.metrics.image_rate
    decisions.check_enough(strategy, tasks, assembly.metrics, rates)
    return assembly


def _alarms(about: Mapping[str, Any]) -> list[str]:
    """Lines on the boundaries that were detected, where they were."""
    known = about.get("boundaries", {})
    if "found" not in known:
        return []
    there = counted(len(known["tasks"]), "transition")
    hits, others = len(known["delays"]), counted(known["false"], "boundary", "boundaries")
    notes = [f"stream.stages=detected: {hits} of {there} found, and {others} where there is none"]
    if mixed := known["first_of_others"]:
        notes.append(f"{_too_high(mixed)}; let a larger task come first, or take stream.stages=fixed")
    return notes


def _too_high(others: int) -> str:
    """Why boundaries are missed where so many of the images that the threshold is set on are not of the first task."""
    return (
        f"stream.stages=detected sets its threshold on the first {boundaries.Windows().first} images, which are to be of one "
        f"task, and {others} of them are not of the first: it is too high, and boundaries are missed"
    )


def licences(detector: Detector) -> list[str]:
    """A line for each frozen network whose weights are under another licence than the usual open-source ones."""
    return [
        f"{pyramid.name}: the licence of its weights is {pyramid.licence}"
        + ("" if pyramid.licence == "unknown" else ", which is not open source")
        + ": find out what it allows before you use them, or what is made with them"
        for pyramid in detector.pyramids()
        if pyramid.licence not in (None, *_OPEN)
    ]


def select_device(gpu: Gpu) -> torch.device:
    """The device to run on, with determinism, threads and TF32 set as asked.

    Raises:
        UserError: there is no such device here, or it cannot compute in the precision asked for.
    """
    name = gpu.device
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        chosen = torch.device(name)
    except RuntimeError as error:
        raise UserError(f"device '{name}' is none: give auto, cpu, cuda or cuda:1") from error
    if chosen.type == "cuda" and (chosen.index or 0) >= torch.cuda.device_count():
        raise UserError(
            f"gpu.device={name}: torch {torch.__version__} sees {counted(torch.cuda.device_count(), 'GPU')} here; "
            "take gpu=cpu, or a machine or a torch build with CUDA"
        )
    if chosen.type == "cpu" and gpu.precision == "fp16":
        raise UserError("gpu.precision=fp16 is for GPUs, and there is none: take gpu.precision=bf16 or fp32")
    torch.set_num_threads(gpu.threads or min(torch.get_num_threads(), usable_cores()))
    if gpu.deterministic:  # older releases of torch refuse without it
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(gpu.deterministic, warn_only=False)
    # cuDNN does not try which algorithm is fastest: it is no faster here, and takes all of a GPU's memory to try some in.
    torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = gpu.deterministic, False
    precision.use_tf32(gpu.precision == "tf32")
    if chosen.type == "cuda":
        chosen = torch.device("cuda", chosen.index or 0)
        torch.cuda.set_device(
            chosen
        )  # this initialises CUDA, and what asks for memory asks this one from now on
    return chosen


def memory_for(
    phase: str, config: Config, device: torch.device, *settings: str
) -> AbstractContextManager[None]:
    """Inside, memory that is not enough raises a UserError that names the phase and what to lower.

    Settings of the `gpu` group are named where it is a GPU's memory.

    Args:
        phase: what is being done, for the error.
        device: what is computed on.
        settings: flat keys of what to lower, the most effective first; those that the method has are named.
    """

    def way_out(on_gpu: bool) -> str:
        def known(key: str) -> bool:
            node, _, name = key.partition(".")
            if node == "gpu":
                return on_gpu
            if key == "dataset.tile":
                return config.dataset.tile is not None
            return node == "dataset" or takes(config, "method", name if node == "method" else node)

        ways = [f"lower {', then '.join(filter(known, settings))}"]
        if takes(config, "method", "backbone"):
            ways.append("take a smaller backbone.name")
        if on_gpu and precision.mixed(config.gpu.precision) is None:
            ways.append("take gpu.precision=bf16")
        return f"{', or '.join(ways)}; what was finished is kept"

    return memory_named(phase, way_out(device.type == "cuda"), device, way_out_on_host=way_out(on_gpu=False))


def tiling(config: Config) -> Tiling | None:
    """How images are cut into tiles; None where they are not."""
    return Tiling(config.dataset.tile, config.dataset.shared) if config.dataset.tile is not None else None


def build_dataset(config: Config) -> Dataset:
    """The dataset, whose folders are looked through.

    Raises:
        UserError: the class cannot be imported, or a folder or category is not there.
    """
    kind = class_of_kind("dataset", config.dataset.target, Dataset)
    added, absent, settings = config.dataset.added, config.dataset.absent, config.dataset.settings
    if absent:  # of those that the stream has, the rest is to be there
        names = [name for name in config.task_order.listed if name not in {**added, **absent}]
        chosen = {"categories": names} if takes(config, "dataset", "categories") else {}
        settings = {**settings, **chosen} if names else {}
    dataset: Dataset | None = None if absent and not settings else kind(**arguments(kind, settings))
    return Products(dataset, list(absent), added) if added or absent or dataset is None else dataset


def reader(config: Config, dataset: Dataset) -> Callable[[Progress], list[Task]]:
    """Find the stream's categories, and give a function that reads its tasks.

    The function takes a progress to tell, and raises what `clbench.data.stream.load_tasks` raises.

    Raises:
        UserError: a category is not there, or the buffer is larger than the stream.
    """
    order = config.task_order
    categories = stream.order(dataset, order.kind, order.tasks, config.seed)
    geometry = config.dataset.geometry()
    size, absent, cut = config.replay.size, config.dataset.absent, tiling(config)
    counts = {name: len(dataset.samples(name, "train")) for group in categories for name in group}
    images, what = sum(counts.values()), "training image"
    if cut is not None and size is not None and size > images and not absent:  # there are more tiles
        what = "tile"
        for name in counts:  # its images are of one size, which those of others need not be
            first = stream.first_image(dataset, [[name]], geometry)
            cut.check(first.shape[-2:], dataset.samples(name, "train")[0].name)
            counts[name] *= len(cut.corners(first.shape[-2:]))
        images = sum(counts.values())
    if size is not None and size > images and not absent:
        usual = (
            " (the method's own, where none is given)" if size == config.method.protocol.replay_size else ""
        )
        raise UserError(
            f"replay.size={size}{usual} is larger than all of {counted(images, what)} of the stream: "
            f"give at most {images}, or strategy=joint"
        )
    if config.stream.kind == "blurred":
        of_tasks = {
            "+".join(group): sum(len(dataset.samples(name, "train")) for name in group)
            for group in categories
        }
        blurred.check_transition(config.stream.transition, of_tasks)
    cache, defects = Path(config.cache), need(config.metrics.further, "saturations")
    return lambda progress: stream.load_tasks(
        dataset, categories, geometry, cache, progress, defects, absent, cut
    )


def without_tasks(
    config: Config, tasks: list[Task], detector: Detector, progress: Progress
) -> tuple[list[Task], dict[str, Any]]:
    """The parts of a blurred stream, as tasks, and what summary.json says of their boundaries.

    Args:
        tasks: the stream as it would be without transitions.
        detector: whose frozen networks boundaries are looked for by; it has learned nothing.
        progress: told while features are computed.

    Raises:
        UserError: a transition is wider than a task, or no boundary is found.
    """
    asked = config.stream
    drift = Drift(asked.light, asked.blur, asked.geometry)
    arrived = blurred.arrivals(tasks, asked.transition, drift, config.seed)
    about: dict[str, Any] = {"boundaries": {"tasks": arrived.boundaries}}
    if asked.stages == "tasks":
        ends = [*arrived.boundaries, len(arrived)]
    elif asked.stages == "fixed":
        assert asked.length is not None
        ends = blurred.every(asked.length, len(arrived))
    else:
        windows = boundaries.Windows()
        found = boundaries.found(mean_features(detector, arrived.images), windows, config.seed)
        detector.release(None)
        mixed = int((arrived.owners[: windows.first] != 0).sum())
        if not found and asked.longest is None and len(tasks) > 1:
            reason = f"; {_too_high(mixed)}" if mixed else ""
            raise UserError(
                f"stream.stages=detected finds no boundary in the {counted(len(arrived), 'image')} of the stream: give "
                f"stream.longest, the most images of a stage, or stream.stages=fixed{reason}"
            )
        alarms = boundaries.compared(found, arrived.boundaries, asked.transition, 2 * windows.newest)
        about["boundaries"] |= {"found": found, **dataclasses.asdict(alarms), "first_of_others": mixed}
        ends = blurred.at_most(asked.longest, [*found, len(arrived)])
    return blurred.parts(tasks, arrived, ends, drift), about


def stage_bytes(config: Config) -> int:
    """Bytes of the images, or tiles, that the largest stage of a run learns from, with those of its buffer, at the run's size.

    They are on a GPU for its training, up to `gpu.image_memory_mb`.

    Raises:
        UserError: a folder or category is not there, or an image cannot be read.
        Exception: as `model_bytes`, where a buffer keeps features in so many bytes.
    """
    image, counts = _first_image(config)
    kind: Any = class_of_kind("strategy", config.strategy.target, Strategy)
    stored, _ = _buffer_of(config, image, sum(counts))
    return ((sum(counts) if kind.joint else max(counts)) + stored) * image.numel()


def buffer_bytes(config: Config) -> float:
    """Bytes that a run's buffer takes when it is full; 0 for none. An image of the stream's stands for what others take.

    Raises:
        UserError: a folder or category is not there, or an image cannot be read.
        Exception: as `model_bytes`, where a buffer keeps features.
    """
    image, counts = _first_image(config)
    return _buffer_of(config, image, sum(counts))[1]


def _first_image(config: Config) -> tuple[Tensor, list[int]]:
    """The stream's first training image, uint8 [3, H, W], and how many each of its tasks has; or its first tile, and how many."""
    dataset = build_dataset(config)
    order = config.task_order
    groups = stream.order(dataset, order.kind, order.tasks, config.seed)
    counts = [sum(len(dataset.samples(name, "train")) for name in group) for group in groups]
    image = stream.first_image(dataset, groups, config.dataset.geometry())
    if (cut := tiling(config)) is None:
        return image, counts
    cut.check(image.shape[-2:], "the first image")
    tiles = cut.cut(image[None])
    return tiles[0], [count * len(tiles) for count in counts]


def _buffer_of(config: Config, image: Tensor, total: int) -> tuple[int, float]:
    """How many images a run's buffer holds when it is full, and their bytes.

    Args:
        image: uint8 [3, H, W], which stands for the others.
        total: images of the stream.
    """
    settings = config.replay.settings
    budget = settings.get("budget_mb")
    if config.replay.size is None and budget is None:
        return 0, 0.0
    kind = settings.get("storage", "raw")
    storage = storage_of(
        kind, settings.get("quality"), settings.get("scale"), partial(_without_weights, config)
    )
    storage.see(image[None])
    cost = int(storage.costs(Images.of(image[None])))
    if budget is not None:
        return min(int(budget * footprint.MB) // cost, total), min(budget * footprint.MB, float(total * cost))
    size = config.replay.size or 0
    return size, float(size * cost)


def build_detector(config: Config) -> Detector:
    """The method's detector on its backbone, on the CPU; it has learned nothing.

    Raises:
        UserError: the class cannot be imported, weights cannot be had or do not fit, or the backbone lacks a
            level that the method asks for.
    """
    gpu = config.gpu
    detector = _constructed(config)
    detector.lay_out()
    detector.image_memory = None if gpu.image_memory_mb is None else gpu.image_memory_mb * 10**6
    if config.dataset.tile is not None:
        detector.size_setting = "dataset.tile"
    detector.compute_in(precision.mixed(gpu.precision))
    return detector


def _constructed(config: Config, **of_backbone: Any) -> Detector:
    """A method's detector as its class makes it, with these settings of its backbone in place of the config's.

    Raises:
        UserError: as `build_detector`.
    """
    kind = class_of_kind("method", config.method.target, Detector)
    given: dict[str, Any] = {
        name: getattr(config, name) for name in ("seed", "cache") if takes(config, "method", name)
    }
    if takes(config, "method", "backbone"):
        given["backbone"] = Backbone(**{**arguments(Backbone, config.backbone.settings), **of_backbone})
    detector: Detector = kind(**arguments(kind, config.method.settings), **given)
    return detector


def model_bytes(config: Config) -> float:
    """Bytes of the networks that a model of a run executes, and of its bank where settings alone tell; no weights are needed.

    Raises:
        Exception: whatever a class of the user's own raises that cannot be made without numbers.
    """
    detector = _without_weights(config)
    networks = footprint.measure(build_strategy(config, detector))["executed_mb"] * footprint.MB
    return networks + (detector.bank_limit or 0)


def _without_weights(config: Config) -> Detector:
    """A method's detector whose weights have shapes alone, on the device `meta`.

    Raises:
        Exception: as `model_bytes`.
    """
    with warnings.catch_warnings(), torch.device("meta"):
        warnings.simplefilter("ignore")  # of weights from a file of the method's, which are left out
        return _constructed(config, pretrained=False, checkpoint=None)


def place(detector: Detector, gpu: Gpu, device: torch.device) -> Detector:
    """A detector on its device, with frozen networks laid out for it.

    Channels come last on a GPU whose tensor cores are used, which work on them so. On a CPU digits would change.
    """
    detector.to(device)
    if device.type == "cuda" and gpu.precision != "fp32":
        for pyramid in detector.pyramids():
            pyramid.network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return detector


def build_strategy(config: Config, detector: Detector) -> Strategy:
    """The strategy that takes a detector through the stream.

    Raises:
        UserError: the class cannot be imported, or is no strategy.
    """
    kind: Any = class_of_kind("strategy", config.strategy.target, Strategy)
    buffer = {f"{BUFFER}{name}": value for name, value in config.replay} if kind.has_buffer else {}
    return kind(detector, seed=config.seed, **arguments(kind, {**config.strategy.settings, **buffer}))


def identity(config: Config, tasks: list[Task] | None = None) -> dict[str, Any]:
    """The part of summary.json that is known before training.

    Args:
        tasks: the stream; None while it is not read, where what it says of them is empty.

    Raises:
        UserError: the strategy's or the method's class cannot be imported.
    """
    kind: Any = class_of_kind("strategy", config.strategy.target, Strategy)
    return {
        "status": "running",
        "method": config.method.name,
        "strategy": config.strategy.name,
        "strategy_flags": kind.flags(),
        "replay_size": config.replay.size,
        "backbone": config.backbone.settings["name"] if takes(config, "method", "backbone") else None,
        "dataset": config.dataset.name,
        "tasks": [task.name for task in tasks or []],
        "categories": [[category.name for category in task.categories] for task in tasks or []],
        "images": stream.fingerprints(tasks or []),
        "files": file_digests(config) if tasks else {},
        "seed": config.seed,
    }


def build_recorder(assembly: Assembly, directory: Path, say: Callable[[str], object]) -> Recorder:
    """The recorder that the config asks for; what goes wrong in it does not end the run.

    Args:
        directory: the run's, in which config.yaml is written already.
        say: shows a line: why `wandb=auto` chose as it did, and what goes wrong.

    Raises:
        UserError: W&B is to be online and there is no key, or its server's address is wrong.
    """
    config = assembly.config
    plain = config.plain()
    mode, reason = wandb_mode(plain["wandb"])
    if reason:
        say(reason)
    if mode == "disabled":
        return Recorder()
    from clbench.recording.wandb import WandbRun

    names = [category.name for task in assembly.tasks for category in task.categories]
    return Surviving(
        lambda: WandbRun(directory, {**plain["wandb"], "mode": mode}, plain, names),
        name="W&B",
        way_out="clbench wandb sync completes it",
        say=say,
    )
