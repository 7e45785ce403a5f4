"""DER: stored images come with the outputs that were learned for them (Buzzega et al., 2020)."""

import itertools
from collections.abc import Sequence
from typing import Any, Literal

import torch
from pydantic import NonNegativeFloat
from torch import Tensor
from torch.nn import functional as F

from clbench.data.images import Images, sent
from clbench.errors import UserError
from clbench.methods.base import Detector
from clbench.strategies.replay import Replay
from clbench.strategies.teacher import (
    evaluating,
    has_teacher,
    keep_teacher,
    lay_out_teacher,
    learner_outputs,
    taught_outputs,
)
from clbench.training import Batch, with_prefix

Form = Literal["full", "half", "pooled", "recompute"]
_SIDE = 4  # positions of a map that are pooled, along each side
_LARGEST = torch.finfo(torch.float16).max


class DER(Replay):
    """`alpha` times the distance of replayed images' outputs from their stored ones is added to the loss of new images.

    The method's own loss is of new images alone. Outputs are stored when a stage ends, of the images that go into the
    buffer, in evaluation mode: the original stores them as images pass by, so that most are of a model that has hardly
    learned, and a method that is trained for many epochs would store bad ones again and again.

    Args:
        detector, seed: as for `Strategy`.
        alpha: weight of the distance, see `Detector.distance`.
        outputs: how they are stored: `full`, float32; `half`, float16; `pooled`, float16 means of 4 x 4 positions of maps,
            with which such means are compared; `recompute`: not at all. Then the weights after the stage before are kept,
            and compute them in every step: those of all earlier stages' images by that one model.
        replay: settings of the buffer, as for `Replay`.

    Raises:
        UserError: bytes of images are limited, and outputs would be stored beside them.
    """

    needs_outputs = True
    learns_replayed = False

    def __init__(
        self,
        detector: Detector,
        *,
        seed: int = 0,
        alpha: NonNegativeFloat = 0.5,
        outputs: Form = "full",
        **replay: Any,
    ):
        super().__init__(detector, seed=seed, **replay)
        self.alpha, self.form = alpha, outputs
        budget = replay.get("replay_budget_mb")
        if budget is not None and outputs != "recompute":
            raise UserError(
                f"replay.budget_mb={budget:g} is of images, and strategy.outputs={outputs} keeps outputs beside them, which "
                "would not count: give replay.size, or take strategy.outputs=recompute"
            )

    def begin_stage(self, stage: int, images: Images) -> None:
        super().begin_stage(stage, images)
        lay_out_teacher(self.memory, self.detector)

    def penalty(self, detector: Detector, batch: Batch) -> Tensor | None:
        drawn = batch.past
        drawn = drawn.some(slice(0, len(drawn) // self.draws))
        if not len(drawn):
            return None
        found = compared(learner_outputs(detector, drawn, as_learning=bool(batch.outputs)), self.form)
        return self.alpha * detector.distance(found, self._wanted(detector, drawn, found))

    def _wanted(self, detector: Detector, batch: Batch, found: Sequence[Tensor]) -> list[Tensor]:
        """The outputs of a batch of replayed images that are to be met, [B, ...] each.

        Args:
            found: what they are now.

        Raises:
            UserError: the stored ones are of other shapes.
        """
        if self.form == "recompute":
            return taught_outputs(self.memory, detector, batch.images)
        stages = batch.stages.tolist()
        stored = {stage: _of_stage(self.memory, stage) for stage in set(stages)}
        shapes = [tuple(output.shape[1:]) for output in found]
        for stage, outputs in stored.items():
            there = [tuple(output.shape[1:]) for output in outputs]
            if there != shapes:
                raise UserError(
                    f"the outputs that were stored of stage {stage} have the shapes {there}, and the method now gives "
                    f"{shapes}: put back the strategy.outputs, dataset.resize and settings of the method that the run was "
                    "begun with, or begin it anew with overwrite=true"
                )
        places = list(zip(stages, batch.rows.tolist(), strict=True))
        return [
            sent(torch.stack([stored[stage][index][row] for stage, row in places]), output.device)
            for index, output in enumerate(found)
        ]

    def end_stage(self, stage: int, images: Images) -> None:
        super().end_stage(stage, images)
        if self.form == "recompute":
            keep_teacher(self.memory, self.detector)

    @torch.no_grad()
    def keep(self, rows: Sequence[Tensor]) -> None:
        if self.form == "recompute":
            return
        *earlier, _ = rows
        for stage, stay in enumerate(earlier):
            for index, output in enumerate(_of_stage(self.memory, stage)):
                if len(stay):
                    self.memory[_name(stage, index)] = output[stay]
                else:
                    del self.memory[_name(stage, index)]
        assert self.buffer is not None
        self._store(len(earlier), self.buffer.shares[-1][0])

    def _store(self, stage: int, images: Tensor | Images) -> None:
        """Store the outputs of a stage's images, uint8 [M, 3, H, W], as they are now."""
        detector, done = self.detector, 0
        with evaluating(detector), detector.learning(), detector.mixed():
            for part in Images.of(images).on(detector.device).split(detector.batch_size):
                for index, output in enumerate(stored_as(detector.outputs(part), self.form)):
                    if done == 0:
                        shape = (len(images), *output.shape[1:])
                        self.memory[_name(stage, index)] = torch.empty(shape, dtype=output.dtype)
                    self.memory[_name(stage, index)][done : done + len(part)] = output
                done += len(part)
                detector.progress("outputs", done, len(images))

    def restore_kept(self, tensors: dict[str, Tensor]) -> None:
        super().restore_kept(tensors)
        stored = with_prefix(self.memory, _PREFIX).values()
        wanted = {"full": torch.float32, "half": torch.float16, "pooled": torch.float16}.get(self.form)
        taught = has_teacher(self.memory) and self.form != "recompute"
        if taught or any(tensor.dtype != wanted for tensor in stored):
            raise UserError(
                f"strategy.outputs={self.form}, and outputs were stored in another way: put back the strategy.outputs "
                "that the run was begun with, or begin it anew with overwrite=true"
            )


def compared(outputs: Sequence[Tensor], form: Form) -> list[Tensor]:
    """Outputs [B, ...] in the shapes that they are stored and compared in."""
    return [pooled(output) for output in outputs] if form == "pooled" else list(outputs)


def stored_as(outputs: Sequence[Tensor], form: Form) -> list[Tensor]:
    """Outputs [B, ...] as they are stored: in float16 the largest finite number stands for larger ones."""
    outputs = compared(outputs, form)
    if form == "full":
        return outputs
    return [output.clamp(-_LARGEST, _LARGEST).half() for output in outputs]


def pooled(output: Tensor) -> Tensor:
    """Maps [B, C, h, w] -> the means of 4 x 4 positions each, fewer at the end, [B, C, h / 4, w / 4] rounded up.

    What is no map stays as it is.
    """
    return F.avg_pool2d(output, _SIDE, ceil_mode=True) if output.dim() == 4 else output


_PREFIX = "outputs."


def _name(stage: int, index: int) -> str:
    return f"{_PREFIX}{stage}.{index}"


def _of_stage(memory: dict[str, Tensor], stage: int) -> list[Tensor]:
    """The stored outputs of a stage's images, in their order."""
    names = itertools.takewhile(memory.__contains__, (_name(stage, index) for index in itertools.count()))
    return [memory[name] for name in names]
