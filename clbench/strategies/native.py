"""Native: the method's own continual update of what it keeps (supplement, Algorithms 1 to 3)."""

from clbench.strategies.base import Strategy


class Native(Strategy):
    """Each stage sees the images of its task alone.

    Banks and statistics are merged with those of earlier tasks.
    """

    needs_native_update = True
    why_no_buffer = "a method's own update keeps statistics and no images"
