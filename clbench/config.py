"""The typed schema of conf/, the checks of a composed config, and its resolvers. Imports no torch."""

import difflib
import hashlib
import inspect
import math
import os
import re
from collections.abc import Mapping
from contextlib import suppress
from netrc import NetrcParseError, netrc
from pathlib import Path
from typing import Annotated, Any, Literal, get_type_hints
from urllib.parse import urlparse

import hydra.utils
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import InterpolationKeyError, MissingMandatoryValue, OmegaConfBaseException
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, PositiveInt, TypeAdapter, ValidationError

from clbench.data.samples import Geometry
from clbench.errors import UserError

# Settings that change where results go or how a run is watched, but not what they are.
NOT_IN_RESULTS = (
    "experiment",
    "outputs",
    "cache",
    "maps",
    "overwrite",
    "only",
    "dry_run",
    "checkpoint_s",
    "sweep",
    "wandb",
    "hydra",
)

# Keys beside `_target_` that are not for the constructor.
_NOT_ARGUMENTS = {
    "method": ("name", "protocol"),
    "dataset": ("name", "resize", "crop"),
    "strategy": ("name",),
    "backbone": (),
}


def _folder_name(name: str) -> str:
    if not re.fullmatch(r"[\w.\-]+", name) or not name.strip("."):
        raise ValueError("it names a folder: give letters, digits, and . _ - between them")
    return name


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class _Open(BaseModel):
    """A node whose further keys are the arguments of its `_target_`, checked against its signature."""

    model_config = ConfigDict(extra="allow", strict=True)


class Protocol(_Strict):
    strategy: str
    resize: PositiveInt
    crop: PositiveInt | None
    replay_size: PositiveInt | None


class Method(_Open):
    name: str
    protocol: Protocol


class DatasetNode(_Open):
    name: str
    resize: PositiveInt | None
    crop: PositiveInt | None


class Replay(_Strict):
    size: PositiveInt | None


class TaskOrder(_Strict):
    kind: Literal["listed", "alphabetical", "random"]
    tasks: list[str | list[str]] | None


class Gpu(_Strict):
    device: Annotated[str, Field(pattern=r"^(auto|cpu|cuda(:\d+)?)$")]
    precision: Literal["fp32", "bf16", "fp16"]
    deterministic: bool
    compile: bool
    threads: PositiveInt | None


class Wandb(_Strict):
    mode: Literal["auto", "online", "offline", "disabled"]
    project: Annotated[str, Field(pattern=r"^[^/\\#?%:]{1,128}$")]
    entity: Annotated[str, Field(pattern=r"^[\w.\-]+$")] | None
    tags: list[Annotated[str, Field(min_length=1, max_length=64)]]
    notes: str | None


class Sweep(_Strict):
    """What a sweep's runs share, and is no part of their results."""

    outputs: Annotated[str, Field(min_length=1)]
    maps: bool | Literal["few"]
    overwrite: bool
    only: Literal["failed", "missing"] | None
    dry_run: bool
    checkpoint_s: Annotated[float, Field(ge=0, strict=False, allow_inf_nan=False)]


class Schema(Sweep):
    """Every key of a composed config."""

    method: Method
    backbone: _Open
    strategy: _Open
    replay: Replay
    dataset: DatasetNode
    task_order: TaskOrder
    gpu: Gpu
    wandb: Wandb
    benchmark: str
    experiment: Annotated[str, AfterValidator(_folder_name)]
    cache: Annotated[str, Field(min_length=1)]
    seed: Annotated[int, Field(ge=0)]
    evaluate: Literal["seen", "all"]


def check(config: DictConfig) -> dict[str, Any]:
    """The resolved config as plain values, once it is known to make sense.

    Raises:
        UserError: an unknown key, a value of the wrong type or out of range, or a combination that makes
            no sense.
    """
    config = OmegaConf.masked_copy(config, [str(key) for key in config if key != "hydra"])
    try:
        plain = OmegaConf.to_container(config, resolve=True, throw_on_missing=True)
    except MissingMandatoryValue as error:
        raise UserError(f"{error.full_key} has no value: give {error.full_key}=...") from error
    except InterpolationKeyError as error:
        raise UserError(
            f"{_first_line(error)}: a setting that others refer to cannot be taken away"
        ) from error
    except OmegaConfBaseException as error:
        raise UserError(_first_line(error)) from error
    assert isinstance(plain, dict)
    values: dict[str, Any] = {str(key): value for key, value in plain.items()}
    try:
        Schema.model_validate(values)
    except ValidationError as error:
        raise _invalid(error, values) from error
    _check_arguments("method", values["method"])
    _check_arguments("dataset", values["dataset"])
    _check_arguments("backbone", {**values["backbone"], "_target_": "clbench.backbones.Backbone"})
    Geometry(values["dataset"]["resize"], values["dataset"]["crop"])
    if values["strategy"]["name"] == "replay" and values["replay"]["size"] is None:
        values["replay"]["size"] = values["method"]["protocol"]["replay_size"]
    _check_combinations(values)
    return values


def check_sweep(config: DictConfig, arguments: list[str]) -> None:
    """Whether the settings of a sweep itself make sense, which its finished runs are not composed to see.

    Raises:
        UserError: one does not.
    """
    values = {name: config[name] for name in Sweep.model_fields}
    try:
        Sweep.model_validate(values)
    except ValidationError as error:
        raise _invalid(error, values) from error
    for text in arguments:
        key, _, value = text.partition("=")
        if key in ("outputs", "only", "dry_run", "overwrite") and "," in value:
            raise UserError(f"{text}: it is the whole sweep's, and has one value")


def arguments(config: Mapping[str, Any], node: str) -> dict[str, Any]:
    """A node's `_target_` and what its constructor takes."""
    return {key: value for key, value in config[node].items() if key not in _NOT_ARGUMENTS[node]}


def takes(config: Mapping[str, Any], node: str, name: str) -> bool:
    """Whether the constructor of a node's class has an argument of this name."""
    return name in inspect.signature(hydra.utils.get_class(config[node]["_target_"])).parameters


def _check_combinations(config: dict[str, Any]) -> None:
    method, strategy, size = config["method"]["name"], config["strategy"]["name"], config["replay"]["size"]
    if strategy == "replay" and size is None:
        raise UserError("strategy=replay needs a buffer: give replay.size, e.g. replay.size=300")
    if strategy != "replay" and size is not None:
        reason = {
            "native": f"{method}'s own update keeps statistics and no images",
            "finetune": "fine-tuning keeps nothing of earlier tasks",
            "joint": "joint training has all images at once",
            "single": "each task has a model of its own",
        }.get(strategy, "it has no buffer")
        raise UserError(
            f"strategy={strategy} with replay.size={size} makes no sense: {reason}; "
            "take strategy=replay, or leave replay.size out"
        )
    target: Any = hydra.utils.get_class(config["method"]["_target_"])
    if strategy == "native" and not target.native:
        raise UserError(
            f"strategy=native with method={method} makes no sense: it keeps nothing that it could update task by "
            "task; take strategy=replay, finetune, joint or single"
        )
    wandb_mode(config["wandb"])
    if config["gpu"]["device"] == "cpu" and config["gpu"]["precision"] == "fp16":
        raise UserError("gpu.precision=fp16 is for GPUs: on gpu.device=cpu take bf16 or fp32")
    order = config["task_order"]
    if order["tasks"] == [] or (order["kind"] == "listed" and not order["tasks"]):
        raise UserError("task_order.tasks is empty: list at least one category")


def wandb_mode(settings: Mapping[str, Any]) -> tuple[str, str | None]:
    """`online`, `offline` or `disabled`, and a word on why where `auto` had to choose.

    Raises:
        UserError: online, and no key; or a server's address that is none, or holds a password.
    """
    chosen = settings["mode"]
    if chosen in ("auto", "online"):
        _check_address(os.environ.get("WANDB_BASE_URL"))
    if chosen == "auto":
        asked = os.environ.get("WANDB_MODE")
        if asked in ("online", "offline", "disabled"):
            chosen = asked
        elif wandb_key():
            return "online", "wandb=auto is online: a key is configured"
        else:
            return "offline", "wandb=auto is offline: no key is configured (WANDB_API_KEY, or wandb login)"
    if chosen == "online" and not wandb_key():
        raise UserError(
            "wandb=online needs a key: set WANDB_API_KEY or run wandb login; or take wandb=offline"
        )
    return chosen, None


def _check_address(address: str | None) -> None:
    if address is None:
        return
    try:
        parts = urlparse(address)
        usable = parts.scheme in ("http", "https") and bool(parts.hostname)
    except ValueError:
        usable = False
    if not usable:
        raise UserError(f"WANDB_BASE_URL={address} is no address of a server: give https://HOST, or unset it")
    if parts.password:
        raise UserError(
            "WANDB_BASE_URL holds a password, which would end in logs: give the address without it, and the key "
            "in WANDB_API_KEY"
        )


def wandb_key() -> bool:
    """Whether a key for Weights & Biases is configured."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    host = urlparse(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname
    with suppress(OSError, NetrcParseError):
        return netrc(os.environ.get("NETRC")).authenticators(host or "") is not None
    return False


def _check_arguments(node: str, config: dict[str, Any]) -> None:
    """Check a node's values against the signature of the class that they are for."""
    target = hydra.utils.get_class(config["_target_"])
    hints = get_type_hints(getattr(target, "__init__"), include_extras=True)  # noqa: B009
    # What has no default and is not set by the config comes from the run: the backbone, precision, ...
    known = [name for name in inspect.signature(target).parameters]
    for key, value in config.items():
        if key == "_target_" or key in _NOT_ARGUMENTS[node]:
            continue
        if key not in known:
            raise _unknown(f"{node}.{key}", [f"{node}.{name}" for name in known])
        try:
            TypeAdapter(hints.get(key, Any)).validate_python(value, strict=True)
        except ValidationError as error:
            raise UserError(f"{node}.{key}={value}: {_reason(error.errors()[0])}") from error
        if isinstance(value, float) and not math.isfinite(value):
            raise UserError(f"{node}.{key}={value}: give a finite number")


def _invalid(error: ValidationError, values: dict[str, Any]) -> UserError:
    first = error.errors()[0]
    path = [str(part) for part in first["loc"]]
    if first["type"] == "extra_forbidden":
        level: Any = values
        for part in path[:-1]:
            level = level[part]
        known = Schema.model_fields if len(path) == 1 else level
        return _unknown(".".join(path), [".".join([*path[:-1], key]) for key in known if key != path[-1]])
    keys = [part for part in path if part.isidentifier() and part not in ("str", "list")]
    return UserError(f"{'.'.join(keys)}={first['input']}: {_reason(first)}")


def _reason(error: Any) -> str:
    message = str(error["msg"]).removeprefix("Value error, ")
    return message[0].lower() + message[1:]


def _unknown(key: str, known: list[str]) -> UserError:
    close = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
    first = sorted({name for name in known if "." not in name})
    hint = f"nearest: {close[0]}" if close else f"there are: {', '.join(first)}, and what is in them"
    return UserError(f"there is no setting {key}; {hint}")


def for_every_choice(arguments: list[str]) -> list[str]:
    """The command line, with settings of a swept group made to suit all its choices.

    Hydra composes a sweep's first config with the group's default, which need not have a setting that all
    the swept choices have: with `method=cfa,stfpm`, `method.epochs=1` would be refused. A ready-made sweep has
    methods of its own.
    """
    swept = {key for key, _, value in (text.partition("=") for text in arguments) if "," in value}
    if any(text.startswith("sweep=") for text in arguments):
        swept.add("method")
    return [
        f"++{text}" if text.partition("=")[1] and text.partition(".")[0] in swept else text
        for text in arguments
    ]


def explain(error: Exception, arguments: list[str], folder: str) -> UserError:
    """One line for what Hydra found wrong with a command line, with the nearest that exists.

    Args:
        arguments: of the command line, flags too.
        folder: absolute, of the configs.
    """
    words = [text for text in arguments if not text.startswith("-")]
    GlobalHydra.instance().clear()
    with initialize_config_dir(folder, version_base="1.3"):
        loader = GlobalHydra.instance().config_loader()
        groups = {name: loader.get_group_options(name) for name in loader.list_groups("")}
        groups["hydra/launcher"] = loader.get_group_options("hydra/launcher")
        chosen = []
        for word in words:
            key, _, values = word.partition("=")
            if key not in groups or key == "hydra" or "=" not in word:
                continue
            for value in values.split(","):
                if value not in groups[key]:
                    nearest = difflib.get_close_matches(value, groups[key], n=1, cutoff=0.5)
                    hint = f"nearest: {nearest[0]}; " if nearest else ""
                    return UserError(
                        f"{key}={value} does not exist; {hint}there are: {', '.join(groups[key])}"
                    )
            chosen.append(f"{key}={values.split(',')[0]}")
        keys = [*_keys(OmegaConf.to_container(compose("config", chosen), resolve=False)), *groups]
    for word in words:
        key = re.split("[=@]", word, maxsplit=1)[0].lstrip("+~")
        if not key.startswith("hydra") and key not in keys:
            return _of_another_method(key, groups["method"], folder) or _unknown(key, keys)
        if word.startswith("~"):
            return UserError(f"{word} cannot be taken away: give {key}=... another value, null for none")
        if word.startswith("+") and not word.startswith("++"):
            return UserError(f"{word}: {key} is there already; write {word.lstrip('+')}")
        if "=" not in word:
            return UserError(f"{word} has no value: write {word}=...")
        try:
            OverridesParser.create().parse_override(word)
        except HydraException:
            return UserError(
                f"{word.lstrip('+')} cannot be read: a list is {key}=a,b or {key}=[a,b], and what holds other signs is quoted "
                f"for the shell too: '{key}=\"...\"'"
            )
    return UserError(_first_line(error))


def _of_another_method(key: str, methods: list[str], folder: str) -> UserError | None:
    """What to say of a setting that only other methods have."""
    node, _, name = key.partition(".")
    if node != "method":
        return None
    setting = re.compile(rf"^{re.escape(name)}:", re.MULTILINE)
    own = [method for method in methods if setting.search(Path(folder, node, f"{method}.yaml").read_text())]
    return UserError(f"{key} is a setting of {', '.join(own)}: give method={own[0]} too") if own else None


def _keys(node: Any, prefix: str = "") -> list[str]:
    if not isinstance(node, dict):
        return []
    return [
        name for key, value in node.items() for name in (f"{prefix}{key}", *_keys(value, f"{prefix}{key}."))
    ]


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0]


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """What differs between two checked configs and changes results, as `key: old -> new`."""
    before, after = (
        {key: value for key, value in flat(config) if key.split(".")[0] not in NOT_IN_RESULTS}
        for config in (old, new)
    )
    return [
        f"{key}: {before.get(key, 'absent')} -> {after.get(key, 'absent')}"
        for key in sorted({*before, *after})
        if before.get(key, "absent") != after.get(key, "absent")
    ]


def flat(node: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    """The values of a config, each under its whole key: `gpu.threads`."""
    pairs: list[tuple[str, Any]] = []
    for key, value in node.items():
        if isinstance(value, dict) and value:
            pairs += flat(value, f"{prefix}{key}.")
        else:
            pairs.append((f"{prefix}{key}", value))
    return pairs


def in_results(override: str) -> bool:
    """Whether an override can change what a run's results are."""
    return re.split(r"[.=/@]", override.lstrip("+~"), maxsplit=1)[0] not in NOT_IN_RESULTS


_FIRST = ("method", "strategy", "replay", "replay.size", "backbone", "dataset", "task_order", "seed")


def _order(override: str) -> tuple[int, str]:
    """Choices first, as the name may be cut."""
    key = override.partition("=")[0].lstrip("+")
    return (_FIRST.index(key) if key in _FIRST else len(_FIRST)), override.lstrip("+")


def run_name(overrides: ListConfig | list[str]) -> str:
    """The run directory's name: what was overridden, so that the same command finds the same directory.

    Values that cannot stand in a file's name, or are long, are cut and end in a hash of the whole.
    """
    parts = []
    for override in sorted(overrides, key=_order):
        key, _, value = override.partition("=")
        if not in_results(override):
            continue
        readable = re.sub(r"[^\w.+\-]+", "-", value.rstrip("/").rsplit("/", 1)[-1]).strip("-")[:40]
        if readable != value:
            readable += f"~{hashlib.sha256(value.encode()).hexdigest()[:6]}"
        parts.append(f"{key.lstrip('+')}={readable}")
    name = ",".join(parts) or "default"
    return name if len(name) <= 200 else f"{name[:190]}~{hashlib.sha256(name.encode()).hexdigest()[:8]}"


def strategy_for(paper: str, replay_size: int | None) -> str:
    """What strategy=auto means."""
    return paper if replay_size is None else "replay"


def scaled(benchmark: str, paper: Any, demo: Any) -> Any:
    """A method's setting: the paper's, but in the demo, which is to take minutes on two cores."""
    return demo if benchmark == "demo" else paper


def strategy_class(name: str) -> str:
    """A strategy's class: clbench/strategies/<name>.py holds <Name>."""
    return f"clbench.strategies.{name}.{name.title().replace('_', '')}"


def gpus_of(device: str) -> int | None:
    """GPUs that a job asks for."""
    return None if device == "cpu" else 1


def cpus_of(threads: int | None, default: int) -> int:
    """Cores that a job asks for."""
    return default if threads is None else threads


def register_resolvers() -> None:
    """Make the functions above usable in conf/."""
    for resolver in (run_name, scaled, strategy_for, strategy_class, gpus_of, cpus_of):
        OmegaConf.register_new_resolver(resolver.__name__, resolver, replace=True)
