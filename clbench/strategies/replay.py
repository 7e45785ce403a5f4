"""Replay: stored images of earlier tasks are learned again with each new one."""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Annotated, Any

import cv2
import torch
from annotated_types import Ge, Le
from pydantic import PositiveFloat, PositiveInt
from torch import Tensor

from clbench.data.images import Images
from clbench.data.stream import Task
from clbench.errors import UserError
from clbench.methods.base import Detector
from clbench.randomness import generator
from clbench.strategies.base import Strategy
from clbench.strategies.buffer import MB, PREFIX, Buffer
from clbench.strategies.selection import BY_FEATURES, Selection, by_features
from clbench.strategies.storage import CODECS, SCALE, Kind, storage_of
from clbench.training import split


class Replay(Strategy):
    """Each stage sees the images of its tasks and of the buffer; banks and statistics are rebuilt from both.

    Exception: detectors with `rebuilt_by_replay = False` keep theirs and update them, as CFA its centroids
    (supplement, Algorithm 3).

    Args:
        detector, seed: as for `Strategy`.
        replay_size: number of images in the buffer, see `Buffer`; None where bytes count, or for no buffer. Without one this
            is fine-tuning, in all that detectors do: for strategies that extend this one, say `needs_buffer = False`, and
            keep tensors of their own in `memory`.
        replay_budget_mb: in place of it, 10^6 bytes that the buffer takes at most.
        replay_selection: which images are kept: `random`, with equal shares for tasks; `reservoir`, with equal chances for
            images; or by pooled features of the detector's frozen networks, with equal shares, `herding` or `kcenter`.
        replay_storage: how they are kept: `raw`, `jpeg`, `webp`, `small` or `latent`, see `clbench.strategies.storage`.
        replay_quality: of `jpeg` and `webp`; None for 75.
        replay_scale: what `small` divides sides by; None for 2.
        replay_symmetric: whether half of a stage's own images, drawn for each stage, are learned as the storage would give them
            back, so that what it does to an image says nothing of its age. Beside the batch this takes their bytes as stored,
            while the stage is learned.
    """

    has_buffer = True

    def __init__(
        self,
        detector: Detector,
        *,
        seed: int = 0,
        replay_size: PositiveInt | None = None,
        replay_budget_mb: PositiveFloat | None = None,
        replay_selection: Selection = "random",
        replay_storage: Kind = "raw",
        replay_quality: Annotated[int, Ge(1), Le(100)] | None = None,
        replay_scale: Annotated[int, Ge(2)] | None = None,
        replay_symmetric: bool = False,
    ):
        super().__init__(detector, seed=seed)
        self.symmetric = replay_symmetric
        self.buffer: Buffer | None = None
        if replay_size is not None or replay_budget_mb is not None:
            self.buffer = Buffer(
                replay_size,
                seed,
                budget=None if replay_budget_mb is None else round(replay_budget_mb * MB),
                selection=replay_selection,
                order=partial(by_features, replay_selection, detector),
                storage=storage_of(replay_storage, replay_quality, replay_scale, lambda: detector),
            )

    @classmethod
    def check_buffer(
        cls, given: Mapping[str, Any], detector: type[Detector], has_backbone: bool, side: int | None
    ) -> None:
        settings = {name: value for name, value in given.items() if value is not None}
        storage, selection = settings.get("storage", "raw"), settings.get("selection", "random")
        chosen = f"replay.storage={storage}"
        sizes = [f"replay.{name}={settings[name]}" for name in ("size", "budget_mb") if name in settings]
        if len(sizes) == 2:
            raise UserError(
                f"{' with '.join(sizes)}: the one counts images, the other bytes; give one of them"
            )
        if not sizes and settings:
            name, value = next(iter(settings.items()))
            raise UserError(
                f"replay.{name}={value} is of a buffer, and there is none: give replay.size or replay.budget_mb too"
            )
        for name, kinds in (("quality", tuple(CODECS)), ("scale", ("small",))):
            if name in settings and storage not in kinds:
                raise UserError(
                    f"replay.{name}={settings[name]} with {chosen}, which has none: leave it out, or take "
                    f"replay.storage={' or '.join(kinds)}"
                )
        if storage in CODECS and not cv2.haveImageWriter(f"image{CODECS[storage]}"):
            others = [kind for kind, ending in CODECS.items() if cv2.haveImageWriter(f"image{ending}")]
            raise UserError(
                f"{chosen}: OpenCV {cv2.__version__} was built without {storage.upper()} here: take "
                f"replay.storage={' or '.join([*others, 'small', 'raw'])}, or pip install opencv-python"
            )
        if storage == "latent" and not detector.needs_only_features:
            raise UserError(
                f"{chosen} keeps features of a frozen backbone, and {detector.__name__} learns from more of an image: take "
                "replay.storage=raw, jpeg, webp or small, or another method"
            )
        if storage in ("raw", "latent") and settings.get("symmetric"):
            raise UserError(
                f"replay.symmetric=true with {chosen}, which changes no image: leave it out, or take replay.storage=jpeg, "
                "webp or small"
            )
        if selection in BY_FEATURES and not has_backbone:
            raise UserError(
                f"replay.selection={selection} goes by features of a frozen backbone, and {detector.__name__} has none: take "
                "replay.selection=random or reservoir, or another method"
            )
        cls._check_pixels(settings, storage, side)

    @staticmethod
    def _check_pixels(settings: Mapping[str, Any], storage: str, side: int | None) -> None:
        """Check the settings that the size of images decides on, where it is known.

        Args:
            settings: of the buffer, by their keys in the group `replay`, without those that are null.
            storage: how images are kept.
            side: of images, in pixels; None where it is not known yet.

        Raises:
            UserError: sides are divided by more than they have, or there is no room for one image.
        """
        if side is None or storage not in ("raw", "small"):
            return
        scale = settings.get("scale", SCALE) if storage == "small" else 1
        if scale > side:
            raise UserError(f"replay.scale={scale} leaves no pixel of images of {side}x{side}: give less")
        image = 3 * (side // scale) ** 2
        budget = settings.get("budget_mb")
        if budget is not None and round(budget * MB) < image:
            raise UserError(
                f"replay.budget_mb={budget} has no room for an image, which takes {image:,} bytes with "
                f"replay.storage={storage}: give more, or a storage that takes less"
            )

    def check(self, tasks: Sequence[Task]) -> None:
        super().check(tasks)
        if self.buffer:
            first = [tasks[stage[0]].train.pieces for stage in self.stages(len(tasks))]
            there = next(images for images in first if len(images))  # others were learned in an earlier run
            shown = [(images if len(images) else there)[:1] for images in first]
            self.buffer.check([image.to(self.detector.device) for image in shown])

    def begin_stage(self, stage: int, images: Images) -> None:
        if self.buffer:
            self.buffer.begin(images)
        if self.buffer is None or self.detector.rebuilt_by_replay:
            self.detector.forget()

    def shown(self, stage: int, images: Images) -> Images:
        if not (self.buffer and self.symmetric):
            return images
        drawn = torch.rand(len(images), generator=generator(self.seed, "symmetric", stage)) < 0.5
        own, others = drawn.nonzero().flatten(), (~drawn).nonzero().flatten()
        passed = self.buffer.storage.passed(images.some(own).on(torch.device("cpu")))
        if passed is None:
            return images
        together = Images.concatenate([images.some(others), passed.on(images.device)])
        found = together.some(torch.cat([others, own]).argsort())
        found.parents = images.parents
        return found

    def replayed(self) -> Sequence[tuple[Tensor | Images, Tensor | Images]]:
        return self.buffer.shares if self.buffer else ()

    def end_stage(self, stage: int, images: Images) -> None:
        if self.buffer:
            learned, held_out = split(images, self.detector.held_out, self.seed, stage)
            self.keep([rows for rows, _ in self.buffer.add(stage, learned, held_out)])

    def keep(self, rows: Sequence[Tensor]) -> None:
        """Called after the buffer has changed, for what is kept beside an image and goes with it.

        Args:
            rows: for each stage, which of the images that are replayed stay, int64, in the order in which they are stored from
                now on: of those that were stored so far, or for the last one that could be.
        """

    def kept(self) -> dict[str, Tensor]:
        return {**self.memory, **(self.buffer.tensors() if self.buffer else {})}

    def restore_kept(self, tensors: dict[str, Tensor]) -> None:
        self.memory = {name: tensor for name, tensor in tensors.items() if not name.startswith(PREFIX)}
        if self.buffer:
            self.buffer.restore(tensors)
