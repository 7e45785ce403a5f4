"""Joint training: one stage with the images of all tasks; the upper bound for a single model."""

from clbench.strategies.base import Strategy


class Joint(Strategy):
    """One stage, which sees the images of all tasks."""

    joint = True
    continual = False
    why_no_buffer = "joint training has all images at once"
