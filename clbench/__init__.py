"""Pixel-level visual anomaly detection in continual learning."""

from typing import Any


def __getattr__(name: str) -> Any:
    """`clbench.load`, without importing torch before it is asked for."""
    if name == "load":
        from clbench.loading import load

        return load
    raise AttributeError(f"module 'clbench' has no attribute '{name}'")
