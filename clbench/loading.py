"""The detector that a run has trained, for use elsewhere."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from pydantic import TypeAdapter, ValidationError
from torch import Tensor

from clbench import assembly, thresholds
from clbench.config.checking import strategy_of
from clbench.config.messages import reason
from clbench.config.using import for_use
from clbench.data.files import find_images, read_image_at
from clbench.data.samples import Geometry
from clbench.data.tiles import Tiling
from clbench.errors import UserError, counted, first_line
from clbench.evaluation import BATCH_SIZE
from clbench.methods.base import Detector, Prediction, check_frozen, frozen_digest
from clbench.mosaics import whole
from clbench.out_of_memory import is_out_of_memory, memory_named
from clbench.paths import expanded
from clbench.recording.checkpoint import Checkpoints
from clbench.recording.run_directory import RunDirectory
from clbench.thresholds import Thresholds


@dataclass(frozen=True)
class Found:
    """What a detector found in an image file.

    Args:
        path: the file.
        score: score of the image; higher is more anomalous.
        anomalous: whether the score is above the image threshold; None where the run has no thresholds.
        size: size of the image, (H, W) in pixels.
        grid: the anomaly map at the run's size, float32 [h, w].
        geometry: how images are brought to the run's size.
        threshold: threshold of maps; None where the run has no thresholds.
    """

    path: Path
    score: float
    anomalous: bool | None
    size: tuple[int, int]
    grid: np.ndarray
    geometry: Geometry
    threshold: float | None

    @property
    def map(self) -> np.ndarray:
        """The anomaly map at the image's own size, float32 [H, W]; NaN outside of the run's center crop."""
        return self.geometry.restore(self.grid, self.size)

    @property
    def mask(self) -> np.ndarray:
        """Where the map is above the pixel threshold, bool [H, W].

        Raises:
            UserError: the run has no thresholds.
        """
        if self.threshold is None:
            raise UserError(_NO_THRESHOLDS)
        return self.map > self.threshold


_NO_THRESHOLDS = (
    "the run has no thresholds (thresholds.json), which are set when it ends: repeat its command, "
    "with overwrite=true where it was finished by an older clbench"
)


class TrainedDetector:
    """A trained detector: call it on images of the run's size, or let it `predict` files of any size.

    One that cuts images into tiles takes images of any size that has room for one.

    Attributes:
        detector: the detector itself, in evaluation mode.
        geometry: how images are brought to the run's size.
        image_size: the size that the detector takes, (H, W) in pixels; None where images kept their own size and the run
            was made by an older clbench.
        thresholds: thresholds of maps and scores; None where the run has not ended.
        device: where the detector is.
        peak: the largest value of the 16-bit files that were predicted; None where there were none.
        run: the directory of the run that trained it.
        tiling: how it cuts images into tiles of `image_size`; None where it takes them as they are.
    """

    def __init__(
        self,
        detector: Detector,
        geometry: Geometry,
        image_size: tuple[int, int] | None,
        thresholds: Thresholds | None,
        run: Path | None = None,
        tiling: Tiling | None = None,
    ):
        self.run = run
        self.tiling = tiling
        self.detector = detector
        self.geometry = geometry
        self.image_size = image_size
        self.thresholds = thresholds
        self.device = detector.device
        self.peak: int | None = None

    @torch.no_grad()
    def __call__(self, images: Tensor, batch_size: int = BATCH_SIZE) -> Prediction:
        """Images of the run's size [B, 3, H, W], uint8 or in [0, 1] -> maps [B, H, W] and scores [B].

        Args:
            batch_size: tiles predicted at a time, where images are cut.

        Raises:
            UserError: images are smaller than a tile, or memory is not enough.
        """
        fewer = "predict fewer at a time (--batch-size, or batch_size in Python)"
        on_cpu = f"{fewer}, or on the CPU (--device cpu)"
        phase = f"predicting {counted(len(images), 'image')}"
        with memory_named(phase, on_cpu, self.device, way_out_on_host=fewer), self.detector.uncached():
            if self.tiling is None:
                return self.detector.predict(images.to(self.device))
            size = images.shape[-2:]
            self._check_room(size, "an image")
            tiles = self.tiling.cut(images).split(batch_size)
            found = (self.detector.predict(tile.to(self.device)) for tile in tiles)
            return _together(list(whole(found, self.tiling, [(size[0], size[1])] * len(images))))

    def learn(
        self,
        folder: Path | str,
        *,
        name: str | None = None,
        output: Path | str | None = None,
        without_images: bool = False,
    ) -> "TrainedDetector":
        """Have the run learn another product, see `clbench.learning.learn`; gives the detector of the run that goes on.

        This one stays as it is.

        Raises:
            UserError: as `clbench.learning.learn`.
        """
        from clbench.learning import learn  # it loads what runs need

        assert self.run is not None
        kept = {"name": name, "output": output, "without_images": without_images}
        gone_on = learn(self.run, folder, gpu={"device": str(self.device)}, **kept)  # type: ignore[arg-type]
        return load(gone_on, task=name or Path(folder).name, device=str(self.device))

    def predict(
        self,
        images: str | Path | Iterable[str | Path],
        *,
        false_positive_rate: float = 0.01,
        image_false_positive_rate: float | None = None,
        batch_size: int = BATCH_SIZE,
        unreadable: Callable[[Path, UserError], None] | None = None,
    ) -> Iterator[Found]:
        """Predict image files of any size, a batch at a time.

        Args:
            images: files, folders (with those inside them) and patterns such as `parts/*.png`.
            false_positive_rate: share of normal pixels that masks may mark.
            image_false_positive_rate: share of normal images that may be called anomalous; None for the same
                rate.
            batch_size: number of images predicted at a time; of tiles, where images are cut, one image after the other.
            unreadable: called with each file that is no image or has the wrong size, and its error; the file
                is then passed over. None: the error is raised.

        Yields:
            What was found in each image, in order.

        Raises:
            UserError: a file cannot be read, or a rate is out of range.
        """
        pixel = image = None
        if image_false_positive_rate is None:
            image_false_positive_rate = false_positive_rate
        if self.thresholds is not None:
            pixel, image = self.thresholds.at(false_positive_rate, image_false_positive_rate)
        given = [images] if isinstance(images, str | Path) else list(images)
        paths = find_images(given)
        together = batch_size if self.tiling is None else 1
        batches = [paths[begin : begin + together] for begin in range(0, len(paths), together)]
        with ThreadPoolExecutor(min(8, batch_size)) as pool:
            ahead = [pool.submit(self._read, path) for path in batches[0]] if batches else []
            for number, batch in enumerate(batches):
                reading = ahead
                following = batches[number + 1] if number + 1 < len(batches) else []
                ahead = [pool.submit(self._read, path) for path in following]
                read = []
                for path, future in zip(batch, reading, strict=True):
                    try:
                        whole, own_size, peak = future.result()
                        read.append((path, whole, own_size))
                        self.peak = max(
                            (each for each in (self.peak, peak) if each is not None), default=None
                        )
                    except UserError as error:
                        if unreadable is None:
                            pool.shutdown(cancel_futures=True)
                            raise
                        unreadable(path, error)
                if not read:
                    continue
                stacked = np.stack([pixels for _, pixels, _ in read]) if len(read) > 1 else read[0][1][None]
                maps, scores = self(torch.from_numpy(stacked), batch_size)
                grids = maps.cpu().numpy()
                for (path, _, size), grid, score in zip(read, grids, scores.tolist(), strict=True):
                    anomalous = None if image is None else score > image
                    yield Found(path, score, anomalous, size, grid, self.geometry, pixel)

    def _check_room(self, size: Sequence[int], name: str) -> None:
        """Check that an image of a size (H, W) has room for a tile, where images are cut.

        Raises:
            UserError: it has not; `name` is the image's.
        """
        if self.tiling is not None and min(size) < self.tiling.side:
            raise UserError(
                f"{name} is {size[1]}x{size[0]}, and the run judges tiles of {self.tiling.side} pixels (dataset.tile): give it "
                "larger images"
            )

    def _read(self, path: Path) -> tuple[np.ndarray, tuple[int, int], int | None]:
        """An image at the run's size, uint8 [3, h, w], its own size (H, W), and its largest value if it has 16 bits.

        Raises:
            UserError: it cannot be read, or cannot be brought to the run's size.
        """
        picture, (height, width) = read_image_at(path, self.geometry)
        peak = int(picture.max()) if picture.dtype == np.uint16 else None
        try:
            pixels = self.geometry.image(picture)
        except UserError as error:
            raise UserError(f"image file {path}: {error}") from error
        if self.tiling is not None:
            self._check_room(pixels.shape[:2], f"image file {path}")
        elif self.image_size not in (None, pixels.shape[:2]):
            wanted = f"{self.image_size[1]}x{self.image_size[0]}"  # type: ignore[index]
            raise UserError(
                f"image file {path} is {width}x{height}, and the run learned from images of {wanted}: "
                "bring it to that size, or train with dataset.resize=..."
            )
        return np.ascontiguousarray(pixels.transpose(2, 0, 1)), (height, width), peak


def load(
    run_directory: Path | str,
    *,
    task: str | None = None,
    device: str = "auto",
    gpu: dict[str, Any] | None = None,
    replace: Mapping[str, str | Path] | None = None,
) -> TrainedDetector:
    """The detector that a run has trained so far.

    Args:
        run_directory: `outputs/<experiment>/<run>`.
        task: name of the task, or of one of its categories, whose model is wanted where there is a model for
            each task (`strategy=single`); None otherwise.
        device: `auto`, `cpu`, `cuda` or `cuda:1`.
        gpu: settings of the `gpu` group to use in place of the run's, such as `precision`.
        replace: where files that the run was trained with are now: flat key of the setting, such as
            `backbone.checkpoint`, -> path.

    Raises:
        UserError: the directory holds no trained run, a file in it is damaged or of another version of clbench, a
            class of the user's own cannot be imported, a file of weights is not there or holds others than the run
            was begun with, `replace` names what is no path of the run, the task is not one of its tasks, or the device
            is not there.
    """
    directory = RunDirectory(expanded(run_directory))
    stored, summary = directory.config(), directory.summary()
    if stored is None or summary is None:
        raise _nothing_trained(directory)
    config = for_use(stored, gpu or {}, replace or {})
    stream = _read_as(_Stream, summary, directory.path / "summary.json")
    found = directory.thresholds()
    limits = None if found is None else _read_as(thresholds.Stored, found, directory.path / "thresholds.json")
    # The device is chosen as if for fp32 in place of fp16: one trained in fp16 also runs on a CPU, slowly.
    chosen_for = "fp32" if config.gpu.precision == "fp16" else config.gpu.precision
    settings = config.gpu.model_copy(update={"device": device, "precision": chosen_for})
    chosen = assembly.select_device(settings)
    elsewhere = "use it where more memory is free"
    on_cpu = f"{elsewhere}, or on the CPU (--device cpu, or device='cpu' in Python)"
    with memory_named(f"loading {directory.path}", on_cpu, chosen, way_out_on_host=elsewhere):
        kind, index = strategy_of(config), stream.index(task)
        index = 0 if index is None and not kind.task_known else index  # one model for all tasks
        saved = Checkpoints(directory.path / "checkpoint", str(chosen)).load_stage(
            lambda name: index is None or kind.predicts_with(name, index)
        )
        if saved is None:
            raise _nothing_trained(directory, running=summary["status"] == "running")
        detector = assembly.place(assembly.build_detector(config), config.gpu, chosen)
        strategy = assembly.build_strategy(config, detector)
        stage, tensors, data = saved
        check_frozen(data.get("frozen"), frozen_digest(detector), directory.path)
        try:
            strategy.restore_detector(tensors)
        except (AttributeError, LookupError, RuntimeError) as error:
            if is_out_of_memory(error, chosen):
                raise
            raise UserError(
                f"what {directory.path} has learned does not fit {config.method.target} as it is now "
                f"({first_line(error)}): use the version of it that the run was made with"
            ) from error
    stages = strategy.stages(len(stream.tasks))
    if summary["status"] == "complete" and stage < len(stages) - 1:
        raise UserError(
            f"{directory.path} is finished, and what it has learned in the last of its "
            f"{counted(len(stages), 'stage')} is missing or damaged: copy its checkpoint/ again; or remove summary.json and "
            f"repeat the run's command, which goes on from stage {stage + 1}"
        )
    learned = stages[: stage + 1]
    tasks = [stream.tasks[number] for numbers in learned for number in numbers]
    if not strategy.task_known and task is None:
        task = tasks[0]
    for name, categories in zip(tasks, stream.categories, strict=False):
        task = name if task in categories else task  # a category stands for the task that it arrived in
    if task is None or task not in tasks:
        which = "no task is given" if task is None else f"task '{task}' is not one of this run's"
        raise UserError(
            f"{which}: {directory.path} has a model for each of {', '.join(tasks)}; name one (--task, or "
            "task=... in Python)"
            if strategy.task_known
            else f"{which}: {directory.path} has learned {', '.join(tasks)}; leave it out, as one model judges all"
        )
    geometry = config.dataset.geometry()
    side = config.dataset.tile or geometry.crop or geometry.resize
    return TrainedDetector(
        strategy.detector_for(tasks.index(task)).eval(),
        geometry,
        (limits and limits.image_size) or ((side, side) if side else None),
        None if limits is None else thresholds.for_task(limits, task),
        directory.path,
        assembly.tiling(config),
    )


def _together(found: list[Prediction]) -> Prediction:
    """The predictions of several images of one size as one; that of a single one as it is."""
    if len(found) == 1:
        return found[0]
    maps, scores = (torch.cat(parts) for parts in zip(*found, strict=True))
    chosen = [each.chosen for each in found if each.chosen is not None]
    return Prediction(maps, scores, torch.cat(chosen) if chosen else None)


@dataclass(frozen=True)
class _Stream:
    """What a detector is loaded by of a summary.json.

    Args:
        tasks: names of the tasks.
        categories: names of each task's categories; none in run directories of earlier versions.
    """

    tasks: list[str]
    categories: list[list[str]] = field(default_factory=list)

    def index(self, task: str | None) -> int | None:
        """The index of the task that is called so, or has a category that is; None where none is."""
        for index, name in enumerate(self.tasks):
            if task == name or task in (self.categories[index] if self.categories else ()):
                return index
        return None


_Kind = TypeVar("_Kind")


def _read_as(kind: type[_Kind], values: Any, file: Path) -> _Kind:
    """What a file of a run directory holds, as an object of a class.

    Raises:
        UserError: it holds something else.
    """
    try:
        return TypeAdapter(kind).validate_python(values)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise UserError(
            f"{file} is damaged ({f'{where}: ' if where else ''}{reason(first)}): copy it again; or remove summary.json "
            "and repeat the run's command, which goes on from its checkpoints and writes it anew"
        ) from error


def _nothing_trained(directory: RunDirectory, running: bool = False) -> UserError:
    """The error for a directory without a run that has learned something, or with one whose first stage is `running`."""
    if running:
        return UserError(
            f"{directory.path} has not ended, and has learned no stage yet or what it has learned is damaged: wait until "
            "one is learned where the run is going on, or else repeat its command, which goes on from its checkpoints"
        )
    return UserError(
        f"{directory.path} holds no trained detector (config.yaml, summary.json and checkpoint/): "
        "give the directory of a run, outputs/<experiment>/<run>"
    )
