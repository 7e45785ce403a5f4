"""From a composed config to a Config: resolved, typed, and known to make sense."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException
from pydantic import ValidationError

from clbench.config import classes
from clbench.config.differences import NOT_IN_RESULTS
from clbench.config.messages import UnknownSetting, invalid, shown, unresolved
from clbench.config.resolvers import strategy_class
from clbench.config.schema import Config, SweepSettings, TaskOrder
from clbench.config.wandb_access import wandb_mode
from clbench.data.samples import Dataset, Geometry
from clbench.errors import UserError
from clbench.metrics.names import METRICS, need
from clbench.paths import PATH, absolute, expanded


def check(composed: DictConfig) -> Config:
    """The typed config of what Hydra composed, after checking that it makes sense.

    Raises:
        UserError: a key is unknown, a value is missing, of the wrong type or out of range, a class cannot be
            imported, or settings do not go together.
    """
    _check_packages(composed)
    values = resolved(composed)
    try:
        config = Config.of(values)
    except ValidationError as error:
        raise invalid(error, values, Config) from error
    config = config.changed(
        "metrics", further=config.metrics.further
    )  # in one order, in which they are stored too
    config = with_protocol_buffer(_with_checked_settings(config))
    _check_buffer_given(config)
    config = config.changed("replay", **checked_buffer(config))
    _check_combinations(config)
    return config


def resolved(composed: DictConfig, allow_missing: bool = False) -> dict[str, Any]:
    """A composed config without its `hydra` node, as plain values with every interpolation resolved.

    Args:
        allow_missing: leave ??? where a value must still be given, in place of an error.

    Raises:
        UserError: a value is missing, or an interpolation names a key that is not there.
    """
    settings = OmegaConf.masked_copy(composed, [str(key) for key in composed if key != "hydra"])
    try:
        plain = OmegaConf.to_container(settings, resolve=True, throw_on_missing=not allow_missing)
    except MissingMandatoryValue as error:
        raise UserError(f"{error.full_key} has no value: give {error.full_key}=...") from error
    except OmegaConfBaseException as error:
        raise unresolved(error, OmegaConf.select(composed, "hydra.runtime.choices") or {}) from error
    assert isinstance(plain, dict)
    return {str(key): value for key, value in plain.items()}


def with_protocol_buffer(config: Config) -> Config:
    """The config with the buffer size of the method's protocol, where the strategy needs a buffer and no size is given.

    Raises:
        UserError: the strategy's class cannot be imported.
    """
    if config.replay.settings.get("budget_mb") is not None:
        return config
    size = buffer_size(config.replay.size, config.method.protocol.replay_size, config.strategy.target)
    return config if size == config.replay.size else config.changed("replay", size=size)


def buffer_size(given: int | None, protocol: int | None, strategy: str) -> int | None:
    """The size of a run's buffer, in images: the one given, or else the protocol's, where the strategy needs a buffer.

    Args:
        strategy: dotted path of the strategy's class.

    Raises:
        UserError: the class cannot be imported.
    """
    kind = classes.class_of(strategy)
    needed = getattr(kind, "has_buffer", False) and getattr(kind, "needs_buffer", False)
    return protocol if given is None and needed else given


# Hydra's settings of where runs go, which nobody may change: key -> value in conf/, and the way out.
_PLACES = {
    "sweep.dir": (
        "${expanded_path:outputs,${outputs}}/${experiment}",
        "give outputs=FOLDER and experiment=NAME",
    ),
    "sweep.subdir": ("${run_name:${hydra.overrides.task}}", "a run's settings name it; give experiment=NAME"),
    "run.dir": ("${hydra.sweep.dir}", "give outputs=FOLDER and experiment=NAME"),
    "job.chdir": (False, "runs stay in the folder that they are started in; give outputs=FOLDER"),
}


def check_sweep(composed: DictConfig, overrides: Sequence[str]) -> None:
    """Check the settings that all runs of a sweep share. Its finished runs are not checked one by one.

    Args:
        composed: the sweep's own composed config, with its `hydra` node.
        overrides: of the command line.

    Raises:
        UserError: one makes no sense.
    """
    for name, (usual, way_out) in _PLACES.items():
        group, _, key = name.partition(".")
        found = OmegaConf.to_container(composed.hydra[group], resolve=False)
        if isinstance(found, dict) and found[key] != usual:
            raise UserError(
                f"hydra.{name}={found[key]} would have results where nothing finds them: {way_out}"
            )
    _check_packages(composed)
    size = composed.hydra.sweeper.get("max_batch_size")
    if size is not None and (not isinstance(size, int) or size < 1):
        raise UserError(
            f"hydra.sweeper.max_batch_size={size}: give a number of runs, 1 or more, or null for all"
        )
    values = {name: composed[name] for name in SweepSettings.model_fields}
    try:
        SweepSettings.model_validate(values)
    except ValidationError as error:
        raise invalid(error, values, SweepSettings) from error
    expanded(composed.outputs, "outputs")
    for override in OverridesParser.create().parse_overrides(list(overrides)):
        key, text = override.key_or_group, override.input_line
        if override.is_delete() and not key.startswith("hydra"):
            raise UserError(f"{text} cannot be taken away: give {key}=... another value, null for none")
        root = re.split(r"[./@]", key, maxsplit=1)[0]
        if override.is_sweep_override() and root in NOT_IN_RESULTS and root != "experiment":
            raise UserError(f"{text}: runs that differ in it alone would be one run; give it one value")


def _check_packages(composed: DictConfig) -> None:
    """Check that the chosen benchmark and sweep say what is theirs at the top of the config, and their name.

    Raises:
        UserError: a file lacks the line that says so, or a benchmark calls itself otherwise.
    """
    choices = OmegaConf.select(composed, "hydra.runtime.choices") or {}  # none where Hydra did not compose it
    for group in ("benchmark", "sweep"):
        chosen = choices.get(group)
        found = OmegaConf.select(composed, group, throw_on_resolution_failure=False)
        if chosen and OmegaConf.is_config(found):
            raise UserError(
                f"{group}={chosen}: what its file says would be in the node {group}; begin the file with the line "
                f"'# @package _global_', or give a {group} whose file does"
            )
    chosen, found = choices.get("benchmark"), composed.get("benchmark")
    if chosen and found != chosen:
        raise UserError(
            f"benchmark={chosen}: its file says benchmark: {shown(found)}; write benchmark: {chosen} there"
        )


def strategy_of(config: Config) -> Any:
    """The strategy's class.

    Raises:
        UserError: it cannot be imported, or is no strategy.
    """
    from clbench.strategies.base import Strategy  # here, as it imports torch, which --help must not wait for

    try:
        return classes.class_of_kind("strategy", config.strategy.target, Strategy)
    except UserError as error:
        if config.strategy.target != strategy_class(config.method.protocol.strategy):
            raise
        raise UserError(
            f"method.protocol.strategy={config.method.protocol.strategy}, which strategy=auto stands for: {error}"
        ) from error


def detector_of(config: Config) -> Any:
    """The method's class.

    Raises:
        UserError: it cannot be imported, or is no detector.
    """
    from clbench.methods.base import Detector

    return classes.class_of_kind("method", config.method.target, Detector)


def _with_checked_settings(config: Config) -> Config:
    """The config with every path in it absolute, after checking each node's settings against its class.

    Raises:
        UserError: a class cannot be imported, or a setting is unknown, missing or of a wrong value.
    """
    plain = config.plain()

    def check(node: str, target: type, *beside: str) -> None:
        if node != "backbone":
            classes.check_constructor(node, target)
        plain[node] |= classes.check_settings(node, target, getattr(config, node).settings, beside)

    check("method", detector_of(config), "protocol")
    dataset = classes.class_of_kind("dataset", config.dataset.target, Dataset)
    check("dataset", dataset, *Geometry.__annotations__, "tile", "overlap")
    check("backbone", classes.class_of(classes.BACKBONE))
    check("strategy", strategy_of(config))
    config.dataset.geometry()
    for name, field in Config.model_fields.items():
        if PATH in field.metadata:
            plain[name] = absolute(plain[name], name)
    return Config.of(plain)


def _check_buffer_given(config: Config) -> None:
    """Check that a buffer is given where the strategy needs one, and only where it can have one.

    Raises:
        UserError: it is not so.
    """
    strategy, name, size = strategy_of(config), config.strategy.name, config.replay.size
    in_bytes = config.replay.settings.get("budget_mb") is not None
    if strategy.has_buffer and strategy.needs_buffer and size is None and not in_bytes:
        raise UserError(
            f"strategy={name} needs a buffer: give replay.size, e.g. replay.size=300, or replay.budget_mb"
        )
    if not strategy.has_buffer and size is not None:
        raise UserError(
            f"strategy={name} with replay.size={size} makes no sense: {strategy.why_no_buffer}; "
            "take strategy=replay, or leave replay.size out"
        )


def checked_buffer(config: Config) -> dict[str, Any]:
    """The further keys of the buffer, checked against the strategy's class, with paths made absolute.

    Raises:
        UserError: a key is unknown, has a wrong value, or is missing.
    """
    known = classes.buffer_arguments(strategy_of(config))
    checked = {}
    for key, value in config.replay.settings.items():
        if key not in known:
            raise UnknownSetting(f"replay.{key}", [f"replay.{name}" for name in {"size", *known}])
        checked[key] = classes.check_value(f"replay.{key}", value, known[key])
    for key, argument in known.items():
        if argument.required and key != "size" and key not in checked:
            raise UserError(f"replay.{key} has no value: give replay.{key}=...")
    return checked


def _check_combinations(config: Config) -> None:
    """Check which settings go together.

    Raises:
        UserError: two of them do not.
    """
    strategy, detector = strategy_of(config), detector_of(config)
    combination = f"strategy={config.strategy.name} with method={config.method.name} makes no sense"
    if strategy.needs_native_update and not detector.native:
        raise UserError(
            f"{combination}: it keeps nothing that it could update task by "
            "task; take strategy=replay, finetune, joint or single"
        )
    if strategy.needs_gradients and not detector.has_gradients():
        raise UserError(
            f"{combination}: the strategy works on the steps of an optimizer, and the method has none; "
            "take a method that is trained by gradients, or another strategy"
        )
    if strategy.needs_outputs and not detector.gives_outputs():
        raise UserError(
            f"{combination}: the strategy works on the outputs of the trained networks, and the method gives none "
            "(Detector.outputs); take another method or strategy"
        )
    if strategy.needs_lasting_weights and not detector.lasting_weights:
        raise UserError(
            f"{combination}: the strategy holds weights to what earlier tasks left, and the method begins each task with new "
            "ones; take another method, or strategy=replay or finetune"
        )
    if strategy.has_buffer:
        side = config.dataset.tile or config.dataset.crop or config.dataset.resize
        has_backbone = "backbone" in classes.constructor(detector)
        strategy.check_buffer(dict(config.replay), detector, has_backbone, side)
    _check_tiles(config)
    _check_saturations(config)
    wandb_mode(config.wandb.model_dump())
    if config.gpu.device == "cpu" and config.gpu.precision == "fp16":
        raise UserError("gpu.precision=fp16 is for GPUs: on gpu.device=cpu take bf16 or fp32")
    _check_order(config.task_order)
    _check_stream(config, detector)


def _check_tiles(config: Config) -> None:
    """Check that images can be cut into the tiles that are asked for, and that the method can learn them.

    Raises:
        UserError: they cannot, or it cannot.
    """
    dataset = config.dataset
    if dataset.tile is None:
        if dataset.overlap is not None:
            raise UserError(
                f"dataset.overlap={dataset.overlap} is of tiles, and there are none: give dataset.tile too, or leave it out"
            )
        return
    given = f"dataset.tile={dataset.tile}"
    if dataset.shared >= dataset.tile:
        raise UserError(
            f"dataset.overlap={dataset.overlap} is as large as {given}, so that no tile would come after the first: give less, "
            f"such as {dataset.tile // 8}"
        )
    if dataset.crop is not None:
        raise UserError(
            f"{given} with dataset.crop={dataset.crop} makes no sense, as tiles are cut from whole images: give "
            "dataset.crop=null too"
        )
    if dataset.resize is not None and dataset.tile >= dataset.resize:
        raise UserError(
            f"{given} cuts nothing out of images of dataset.resize={dataset.resize}: give dataset.resize=null, which leaves "
            "images as large as they are, or a larger one"
        )
    if reason := detector_of(config).why_no_tiles(config.method.settings):
        raise UserError(
            f"{given} with method={config.method.name} makes no sense: {reason}, and where in its image a tile lies is not known to "
            "it; take a method without places, such as patchcore, or dataset.tile=null"
        )


def _check_order(order: TaskOrder) -> None:
    """Check which settings of the order of tasks go together.

    Raises:
        UserError: two of them do not.
    """
    if order.tasks == [] or (order.kind == "listed" and not order.tasks):
        raise UserError("task_order.tasks is empty: list at least one category")
    if order.by_results and order.run is None:
        raise UserError(
            f"task_order={order.kind} goes by the results of a finished run of strategy=single or joint: give its "
            "directory, task_order.run=outputs/EXPERIMENT/RUN"
        )
    if order.by_results and order.tasks is not None:
        raise UserError(
            f"task_order={order.kind} with task_order.tasks={shown(order.tasks)} makes no sense: results decide on the "
            "list; leave out one of them"
        )
    for name in ("run", "metric", "sizes"):
        if not order.by_results and getattr(order, name) is not None:
            raise UnknownSetting(f"task_order.{name}", ["task_order.kind", "task_order.tasks"])


def _check_stream(config: Config, detector: Any) -> None:
    """Check which settings of a blurred stream go together.

    Raises:
        UserError: two of them do not.
    """
    stream = config.stream
    if stream.kind == "tasks":
        return
    if stream.stages == "fixed" and stream.length is None:
        raise UserError(
            "stream.stages=fixed needs the images of a stage: give stream.length, e.g. stream.length=40"
        )
    if stream.stages == "detected" and "backbone" not in classes.constructor(detector):
        raise UserError(
            f"stream.stages=detected goes by features of a frozen backbone, and {detector.__name__} has none: take "
            "stream.stages=fixed, or another method"
        )
    if config.dataset.tile is not None:
        raise UserError(
            f"stream=blurred with dataset.tile={config.dataset.tile}: a stream without tasks takes images as they are; give "
            "dataset.tile=null, or stream=tasks"
        )
    if stream.geometry and need(config.metrics.further, "saturations"):
        raise UserError(
            f"stream.geometry={stream.geometry:g} turns images, and the defects that metrics.further asks for by themselves "
            "are not turned: take stream.geometry=0, or leave these metrics out"
        )


def _check_saturations(config: Config) -> None:
    """Check that the dataset has saturation areas of defects where a metric needs them.

    Raises:
        UserError: it has none.
    """
    further = config.metrics.further
    dataset: type[Dataset] = classes.class_of_kind("dataset", config.dataset.target, Dataset)
    if need(further, "saturations") and dataset.defects is Dataset.defects:
        names = ",".join(name for name in further if METRICS[name].needs == "saturations")
        raise UserError(
            f"metrics.further=[{names}] needs the saturation area of each defect, which dataset={config.dataset.name} does "
            "not list: take dataset=mvtec_loco, or AU-PRO (aupro, which every run has, and aupro_5)"
        )
