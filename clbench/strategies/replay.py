"""Replay: stored images of earlier tasks are learned again with each new one."""

from collections.abc import Sequence

from pydantic import PositiveInt
from torch import Tensor

from clbench.data.images import Images
from clbench.methods.base import Detector
from clbench.strategies.base import Strategy
from clbench.strategies.buffer import PREFIX, Buffer
from clbench.training import split


class Replay(Strategy):
    """Each stage sees the images of its tasks and of the buffer; banks and statistics are rebuilt from both.

    Exception: detectors with `rebuilt_by_replay = False` keep theirs and update them, as CFA its centroids
    (supplement, Algorithm 3).

    Args:
        detector, seed: as for `Strategy`.
        replay_size: number of images in the buffer, see `Buffer`; None for no buffer, which is fine-tuning: for strategies
            that extend this one, say `needs_buffer = False`, and keep tensors of their own in `memory`.
    """

    has_buffer = True

    def __init__(self, detector: Detector, *, seed: int = 0, replay_size: PositiveInt | None = None):
        super().__init__(detector, seed=seed)
        self.buffer = Buffer(replay_size, seed) if replay_size is not None else None

    def begin_stage(self, stage: int, images: Images) -> None:
        if self.detector.rebuilt_by_replay:
            self.detector.forget()

    def replayed(self) -> Sequence[tuple[Tensor, Tensor]]:
        return self.buffer.shares if self.buffer else ()

    def end_stage(self, stage: int, images: Images) -> None:
        if self.buffer:
            learned, held_out = split(images, self.detector.held_out, self.seed, stage)
            self.keep([rows for rows, _ in self.buffer.add(stage, learned, held_out)])

    def keep(self, rows: Sequence[Tensor]) -> None:
        """Called after the buffer has changed, for what is kept beside an image and goes with it.

        Args:
            rows: for each stage, which of the images that are replayed stay, int64 and ascending: of those that were stored
                so far, or for the last one that could be.
        """

    def kept(self) -> dict[str, Tensor]:
        return {**self.memory, **(self.buffer.tensors() if self.buffer else {})}

    def restore_kept(self, tensors: dict[str, Tensor]) -> None:
        self.memory = {name: tensor for name, tensor in tensors.items() if not name.startswith(PREFIX)}
        if self.buffer:
            self.buffer.restore(tensors)
