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
    NonNegativeInt,
    PositiveInt,
    PrivateAttr,
    ValidationError,
)

from clbench.data.samples import Geometry
from clbench.errors import UserError
from clbench.metrics.names import FURTHER, IMAGE_RATE, PIXEL_RATE, RATES, USUAL
from clbench.paths import PATH

BY_RESULTS = ("easy_to_hard", "hard_to_easy")  # kinds of order that the results of a finished run decide on
BESIDE_SETTINGS = ("departures", "made_by")  # keys of config.yaml that are no settings
# Settings of earlier versions, which config.yaml of their runs may hold: flat key -> why there are none any more.
GONE = {
    "gpu.compile": "a frozen network sees an image once, and compiling it took longer than that saved; leave it out"
}


def _folder_name(name: str) -> str:
    """The name, which must be one that a folder can have anywhere.

    Raises:
        ValueError: it is not.
    """
    if not re.fullmatch(r"[\w.\-]+", name) or not name.strip("."):
        raise ValueError("it names a folder: give letters, digits, and . _ - between them")
    return name


def _when(evaluate: str) -> str:
    """After which stages a run evaluates, and which tasks.

    Raises:
        ValueError: it is none of those that there are.
    """
    if not re.fullmatch("seen|all|last|every:[1-9][0-9]*", evaluate):
        raise ValueError(
            "give seen, all, last, or every:N for every N-th stage and the last, with N of 1 or more"
        )
    return evaluate


def _further(names: list[str]) -> list[str]:
    """Names of further metrics, each once, in the order of `FURTHER`.

    Raises:
        ValueError: one is not known.
    """
    for name in names:
        if name in USUAL:
            raise ValueError(f"every run has {name}: leave it out")
        if name not in FURTHER:
            raise ValueError(f"'{name}' is no metric: give some of {', '.join(FURTHER)}")
    return [name for name in FURTHER if name in names]


def _stored_rate(rate: float) -> float:
    """A false-positive rate that thresholds are stored for.

    Raises:
        ValueError: they are not.
    """
    if rate not in RATES:
        raise ValueError(
            "thresholds are stored for 0.00001, 0.00002, ..., 0.09, 0.1 and 0.2, a digit each: give one of them"
        )
    return rate


Rate = Annotated[float, Field(strict=False, allow_inf_nan=False), AfterValidator(_stored_rate)]


class Closed(BaseModel):
    """A node that has these keys and no others."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class Node(BaseModel):
    """A node whose further keys are settings: arguments of a class's constructor, checked against it."""

    model_config = ConfigDict(extra="allow", strict=True, frozen=True)

    @property
    def settings(self) -> dict[str, Any]:
        """A copy of the further keys: name -> value, as the class's constructor is given them."""
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
    """The detector: `target` is the dotted path of its class."""

    name: str
    target: str = Field(alias="_target_")
    protocol: Protocol


class DatasetNode(Node):
    """The dataset: `target` is the dotted path of its class.

    Attributes:
        resize: pixels that both sides of an image are brought to; None keeps the files' size.
        crop: pixels of both sides that are cut out of the center; None for no crop.
        bit_depth: how many bits of 16-bit images the camera has filled; None for all.
        tile: pixels of both sides of the tiles that images are then cut into; None for no tiles.
        overlap: pixels that neighbouring tiles share at least; None for an eighth of the tile, rounded down.
        added: products that were learned later, by `clbench learn`: name -> folder.
        absent: categories whose images were not there any more then: name -> the fingerprints of its images, see
            `clbench.data.unchanged`.
    """

    name: str
    target: str = Field(alias="_target_")
    added: dict[str, Annotated[str, PATH]] = Field(default_factory=dict)
    absent: dict[str, list[str]] = Field(default_factory=dict)
    resize: PositiveInt | None
    crop: PositiveInt | None
    bit_depth: Annotated[int, Field(ge=8, le=16)] | None = None
    tile: PositiveInt | None = None
    overlap: NonNegativeInt | None = None

    def geometry(self) -> Geometry:
        """What images are brought to.

        Raises:
            UserError: a size makes no sense.
        """
        return Geometry(self.resize, self.crop, self.bit_depth)

    @property
    def shared(self) -> int:
        """Pixels that neighbouring tiles share at least, where there are tiles."""
        return (self.tile or 0) // 8 if self.overlap is None else self.overlap


class StrategyNode(Node):
    """The strategy: `target` is the dotted path of its class."""

    name: str
    target: str = Field(alias="_target_")


class BackboneNode(Node):
    """The backbone: its settings are everything that `clbench.backbones.Backbone` takes, its name too."""


class ReplayNode(Node):
    """The buffer: `size` is the number of images in all; None where there is no buffer.

    Further keys are arguments of the strategy's constructor, whose names there begin with `replay_`.
    """

    size: PositiveInt | None


class TaskOrder(Closed):
    """The order of the stream, see `clbench.data.stream.order`.

    Attributes:
        kind: where `tasks` is None: `random`, or else alphabetical; or by the results of a finished run, of which
            config.yaml has the list as `tasks`, see `clbench.config.by_results`.
        tasks: categories, and lists of those that arrive together; None for all categories of the dataset.
        run: directory of the run whose results decide.
        metric: which of its metrics decides.
        sizes: how many categories each task has, where results decide; None for one each.
    """

    kind: Literal["listed", "alphabetical", "random", "easy_to_hard", "hard_to_easy"]
    tasks: list[str | list[str]] | None
    run: str | None = None
    metric: str | None = None
    sizes: list[PositiveInt] | None = None

    @property
    def listed(self) -> list[str]:
        """The categories of all tasks that are listed, in their order."""
        groups = ([task] if isinstance(task, str) else task for task in self.tasks or [])
        return [name for group in groups for name in group]

    @property
    def by_results(self) -> bool:
        """Whether the results of a finished run decide on the order."""
        return self.kind in BY_RESULTS


class Stream(Closed):
    """How the images of the tasks arrive.

    Attributes:
        kind: `tasks`, one task after the other, each a stage; or `blurred`, in one sequence, see `clbench.data.blurred`, of
            which stages learn parts. What follows is of that.
        stages: where parts end: `fixed`, after every `length` images; `detected`, where `clbench.boundaries` sees another
            task begin; `tasks`, in the middle of each transition, which only who made the stream can know.
        length: images of a `fixed` part.
        longest: images of a `detected` part at most; None for no bound.
        transition: images over which a task gives way to the next.
        light, blur, geometry: what the end of the stream differs in from its beginning, see `clbench.data.drift`.
    """

    kind: Literal["tasks", "blurred"] = "tasks"
    stages: Literal["fixed", "detected", "tasks"] = "fixed"
    length: PositiveInt | None = None
    longest: PositiveInt | None = None
    transition: NonNegativeInt = 0
    light: Annotated[float, Field(ge=0, le=0.9, strict=False, allow_inf_nan=False)] = 0.0
    blur: Annotated[float, Field(ge=0, le=16, strict=False, allow_inf_nan=False)] = 0.0
    geometry: Annotated[float, Field(ge=-45, le=45, strict=False, allow_inf_nan=False)] = 0.0


class Metrics(Closed):
    """What is measured beside the seven usual metrics, which every run has: they cost one sort, and reports compare them.

    Attributes:
        further: names of further metrics, see `clbench.metrics.names`.
        pixel_rate, image_rate: false-positive rates of the thresholds that metrics at stored thresholds use.
    """

    further: Annotated[list[str], AfterValidator(_further)] = Field(default_factory=list)
    pixel_rate: Rate = PIXEL_RATE
    image_rate: Rate = IMAGE_RATE


class Gpu(Closed):
    """The device and how it computes.

    Attributes:
        device: `auto`, `cpu`, `cuda` or `cuda:1`.
        precision: what networks compute in, see `clbench.precision`.
        deterministic: whether torch must use deterministic algorithms alone.
        image_memory_mb: images of a stage that may be on a GPU for its training, 10^6 bytes; more are sent there a batch at
            a time. None for half of what is free.
        threads: number of threads of torch on the CPU; None for torch's own choice.
    """

    device: Annotated[str, Field(pattern=r"^(auto|cpu|cuda(:\d+)?)$")]
    precision: Literal["fp32", "tf32", "bf16", "fp16"]
    deterministic: bool = False
    image_memory_mb: NonNegativeInt | None = None
    threads: PositiveInt | None = None


class Wandb(Closed):
    """How the run is recorded in Weights & Biases."""

    mode: Literal["auto", "online", "offline", "disabled"]
    project: Annotated[str, Field(pattern=r"^[^/\\#?%:]{1,128}$")]
    entity: Annotated[str, Field(pattern=r"^[\w.\-]+$")] | None
    tags: list[Annotated[str, Field(min_length=1, max_length=64)]]
    notes: str | None


class SweepSettings(Closed):
    """The settings that all runs of a sweep share and that change no results."""

    outputs: Annotated[str, Field(min_length=1), PATH]
    maps: bool | Literal["few"]
    overwrite: bool
    only: Literal["failed", "missing"] | None
    dry_run: bool
    checkpoint_s: Annotated[float, Field(ge=0, strict=False, allow_inf_nan=False)]
    evaluation_memory_mb: NonNegativeInt = 1000  # runs of earlier versions have none


class Config(SweepSettings):
    """The settings of a run, each with its type."""

    method: MethodNode
    backbone: BackboneNode
    strategy: StrategyNode
    replay: ReplayNode
    dataset: DatasetNode
    task_order: TaskOrder
    stream: Stream = Field(default_factory=Stream)
    metrics: Metrics = Field(default_factory=Metrics)
    gpu: Gpu
    wandb: Wandb
    benchmark: str
    experiment: Annotated[str, AfterValidator(_folder_name)]
    cache: Annotated[str, Field(min_length=1), PATH]
    seed: Annotated[int, Field(ge=0)]
    evaluate: Annotated[str, AfterValidator(_when)]

    _plain: dict[str, Any] = PrivateAttr(default_factory=dict)

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> Config:
        """The config of plain values, after checking their types.

        Raises:
            pydantic.ValidationError: a key is unknown or missing, or a value is of another type or out of range.
        """
        config = cls.model_validate(dict(values))
        config._plain = copy.deepcopy(dict(values))
        return config

    @classmethod
    def stored(cls, values: Mapping[str, Any]) -> Config:
        """The config of what config.yaml holds. Types are checked, but not classes and combinations.

        Raises:
            UserError: it is not a config of this version of clbench.
        """
        try:
            kept = {key: value for key, value in values.items() if key not in BESIDE_SETTINGS}
            for key in GONE:
                node, name = key.split(".")
                if isinstance(settings := kept.get(node), dict):
                    kept[node] = {each: value for each, value in settings.items() if each != name}
            return cls.of(kept)
        except ValidationError as error:
            first = error.errors()[0]
            raise UserError(
                f"config.yaml is damaged, or not of this version of clbench ({'.'.join(map(str, first['loc']))}: "
                f"{first['msg']}): repeat the run's command with another experiment=NAME"
            ) from error

    def plain(self) -> dict[str, Any]:
        """What config.yaml holds: a copy of the settings as plain values, in the order of composition."""
        return copy.deepcopy(self._plain)

    def changed(self, node: str, **values: Any) -> Config:
        """A copy of the config with these values in one of its nodes.

        Raises:
            pydantic.ValidationError: one has a wrong type or is out of range.
        """
        plain = self.plain()
        plain[node] = {**plain[node], **values}
        return Config.of(plain)
