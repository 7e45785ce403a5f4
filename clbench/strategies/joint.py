"""Joint training: all tasks at once; the upper bound for one model."""

from torch import Tensor

from clbench.strategies.base import Strategy


class Joint(Strategy):
    """One stage, which sees the images of all tasks."""

    def stages(self, tasks: int) -> list[list[int]]:
        return [list(range(tasks))]

    def learn(self, stage: int, images: Tensor) -> None:
        self.fit(self.detector, stage, images)
