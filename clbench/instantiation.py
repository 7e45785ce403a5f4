"""From a checked config to the objects it names."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch
from hydra.utils import get_class, instantiate

from clbench.backbones import Backbone
from clbench.config import Config, takes
from clbench.data import stream
from clbench.data.samples import Dataset, Geometry
from clbench.data.stream import Task
from clbench.errors import UserError
from clbench.methods.base import Detector, Progress
from clbench.strategies.base import Strategy

Kind = TypeVar("Kind")


def device(gpu: dict[str, Any]) -> torch.device:
    """The device to run on, with determinism and threads set as asked.

    Raises:
        UserError: there is no such device here.
    """
    name = gpu["device"]
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        chosen = torch.device(name)
    except RuntimeError as error:
        raise UserError(f"device '{name}' is none: give auto, cpu, cuda or cuda:1") from error
    if chosen.type == "cuda" and (chosen.index or 0) >= torch.cuda.device_count():
        raise UserError(
            f"gpu.device={name}: torch {torch.__version__} sees {torch.cuda.device_count()} GPUs here; "
            "take gpu=cpu, or a machine or a torch build with CUDA"
        )
    if chosen.type == "cpu" and gpu["precision"] == "fp16":
        raise UserError("gpu.precision=fp16 is for GPUs, and there is none: take gpu.precision=bf16 or fp32")
    if gpu["threads"]:
        torch.set_num_threads(gpu["threads"])
    if gpu["deterministic"]:  # older releases of torch refuse without it
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(gpu["deterministic"], warn_only=False)
    torch.backends.cudnn.deterministic = gpu["deterministic"]
    return chosen


def tasks(config: dict[str, Any], progress: Progress) -> list[Task]:
    """The stream's tasks, all images read once."""
    return reader(config)(progress)


def reader(config: dict[str, Any]) -> Callable[[Progress], list[Task]]:
    """What reads the stream's tasks, once folders and categories are found and no image is read yet."""
    node = Config.stored(config).dataset
    dataset: Dataset = instantiate({"_target_": node.target, **node.settings})
    order = config["task_order"]
    categories = stream.order(dataset, order["kind"], order["tasks"], config["seed"])
    geometry = Geometry(config["dataset"]["resize"], config["dataset"]["crop"])
    size = config["replay"]["size"]
    images = sum(len(dataset.samples(name, "train")) for group in categories for name in group)
    if size is not None and size > images:
        own = " (the method's own, where none is given)"
        raise UserError(
            f"replay.size={size}{own if size == config['method']['protocol']['replay_size'] else ''} is larger than all "
            f"{images} training images of the stream: "
            f"give at most {images}, or strategy=joint"
        )
    cache = Path(config["cache"]).expanduser()
    return lambda progress: stream.load(dataset, categories, geometry, cache, progress)


def detector(config: dict[str, Any]) -> Detector:
    """The method's detector on its backbone, fresh."""
    gpu = config["gpu"]
    typed = Config.stored(config)
    own = {name: config[name] for name in ("seed", "cache") if takes(typed, "method", name)}
    if takes(typed, "method", "backbone"):
        own["backbone"] = Backbone(**config["backbone"], precision=gpu["precision"], compile=gpu["compile"])
    built = _build(config, "method", Detector, **own)
    built.lay_out()
    built.precision = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}[gpu["precision"]]
    return built


def strategy(config: dict[str, Any], detector: Detector) -> Strategy:
    """The strategy that takes a detector through the stream."""
    own = {"seed": config["seed"], "replay_size": config["replay"]["size"]}
    return _build(config, "strategy", Strategy, detector, **own)


def _build(config: dict[str, Any], node: str, kind: type[Kind], *parts: Any, **own: Any) -> Kind:
    """What a node's `_target_` names, which must be of that kind: a config that is loaded cannot run code."""
    found = getattr(Config.stored(config), node)
    chosen = {"_target_": found.target, **found.settings}
    if not issubclass(get_class(chosen["_target_"]), kind):
        raise UserError(f"{node}._target_={chosen['_target_']} is not a {kind.__module__}.{kind.__name__}")
    return instantiate(chosen, *parts, **own, _convert_="all", _recursive_=False)
