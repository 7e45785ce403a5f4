"""Pixel-level visual anomaly detection in continual learning."""

import os
from typing import Any

# OpenCV looks when it is imported. Here the memory is the limit of an image, which clbench/data/decoding.py checks.
os.environ.setdefault("OPENCV_IO_MAX_IMAGE_PIXELS", str(2**50))
os.environ.setdefault("OPENCV_IO_MAX_IMAGE_WIDTH", str(2**31 - 1))
os.environ.setdefault("OPENCV_IO_MAX_IMAGE_HEIGHT", str(2**31 - 1))


def __getattr__(name: str) -> Any:
    """`clbench.load`, without importing torch before it is asked for."""
    if name == "load":
        from clbench.loading import load

        return load
    raise AttributeError(f"module 'clbench' has no attribute '{name}'")
