"""Joint training: all tasks at once; the upper bound for one model."""

from clbench.strategies.base import Strategy


class Joint(Strategy):
    """One stage, which sees the images of all tasks."""

    joint = True
    continual = False
    why_no_buffer = "joint training has all images at once"
