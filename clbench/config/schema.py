"""Every key of a composed config, with its type. Imports no torch."""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    PositiveInt,
    PrivateAttr,
    ValidationError,
)

from clbench.errors import UserError

BESIDE_SETTINGS = ("departures", "made_by")  # what config.yaml holds beside the settings


def _folder_name(name: str) -> str:
    if not re.fullmatch(r"[\w.\-]+", name) or not name.strip("."):
        raise ValueError("it names a folder: give letters, digits, and . _ - between them")
    return name


class Closed(BaseModel):
    """A node that has these keys and no others."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class Node(BaseModel):
    """A node whose other keys are its class's settings: arguments of the constructor, checked against it."""

    model_config = ConfigDict(extra="allow", strict=True, frozen=True)

    @property
    def settings(self) -> dict[str, Any]:
        """What the class's constructor is given, a copy: name -> value."""
        return copy.deepcopy(self.model_extra or {})


class Protocol(Closed):
    """How the paper adapts a method.

    Attributes:
        strategy: name of the strategy that strategy=auto stands for.
        resize, crop: pixels, of both sides; None for no crop.
        replay_size: images of the buffer where replay is asked for and no size is given; None for none.
    """

    strategy: str
    resize: PositiveInt
    crop: PositiveInt | None
    replay_size: PositiveInt | None


class MethodNode(Node):
    """The detector: `target` is its class's dotted path."""

    name: str
    target: str = Field(alias="_target_")
    protocol: Protocol


class DatasetNode(Node):
    """The images, and the size in pixels that they are brought to: None keeps the files' size."""

    name: str
    target: str = Field(alias="_target_")
    resize: PositiveInt | None
    crop: PositiveInt | None


class StrategyNode(Node):
    """How the detector meets the stream: `target` is the strategy's class."""

    name: str
    target: str = Field(alias="_target_")


class BackboneNode(Node):
    """Everything that clbench.backbones.Backbone takes, its name too, is among the settings."""


class Replay(Node):
    """The buffer: images in all. Further keys are for the strategy's constructor, each after `replay_`."""

    size: PositiveInt | None


class TaskOrder(Closed):
    kind: Literal["listed", "alphabetical", "random"]
    tasks: list[str | list[str]] | None


class Gpu(Closed):
    """The device and how it computes; threads are of the CPU."""

    device: Annotated[str, Field(pattern=r"^(auto|cpu|cuda(:\d+)?)$")]
    precision: Literal["fp32", "bf16", "fp16"]
    deterministic: bool = False
    compile: bool = False
    threads: PositiveInt | None = None


class Wandb(Closed):
    mode: Literal["auto", "online", "offline", "disabled"]
    project: Annotated[str, Field(pattern=r"^[^/\\#?%:]{1,128}$")]
    entity: Annotated[str, Field(pattern=r"^[\w.\-]+$")] | None
    tags: list[Annotated[str, Field(min_length=1, max_length=64)]]
    notes: str | None


class SweepSettings(Closed):
    """What a sweep's runs share, and is no part of their results."""

    outputs: Annotated[str, Field(min_length=1)]
    maps: bool | Literal["few"]
    overwrite: bool
    only: Literal["failed", "missing"] | None
    dry_run: bool
    checkpoint_s: Annotated[float, Field(ge=0, strict=False, allow_inf_nan=False)]


class Config(SweepSettings):
    """A run's settings, each with its type; what everything takes from the moment they are checked."""

    method: MethodNode
    backbone: BackboneNode
    strategy: StrategyNode
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

    _plain: dict[str, Any] = PrivateAttr(default_factory=dict)

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> Config:
        """The config that plain values make, their types checked.

        Raises:
            pydantic.ValidationError: a key is unknown or missing, or a value is of another type or out of range.
        """
        config = cls.model_validate(dict(values))
        config._plain = copy.deepcopy(dict(values))
        return config

    @classmethod
    def stored(cls, values: Mapping[str, Any]) -> Config:
        """A run's config.yaml, trusted as it is written: its classes and combinations are not checked again.

        Raises:
            UserError: it is no config of this version.
        """
        try:
            return cls.of({key: value for key, value in values.items() if key not in BESIDE_SETTINGS})
        except ValidationError as error:
            first = error.errors()[0]
            raise UserError(
                f"config.yaml is not of this version of clbench ({'.'.join(map(str, first['loc']))}: "
                f"{first['msg']}): repeat the run's command with another experiment=NAME"
            ) from error

    def plain(self) -> dict[str, Any]:
        """The settings as plain values, in the order in which they were composed: what config.yaml holds."""
        return copy.deepcopy(self._plain)

    def changed(self, node: str, **values: Any) -> Config:
        """The same config but for these values of a node."""
        plain = self.plain()
        plain[node] = {**plain[node], **values}
        return Config.of(plain)
