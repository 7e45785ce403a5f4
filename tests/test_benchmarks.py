"""The benchmarks: that each one can be begun."""

import importlib

from benchmarks.__main__ import NAMES


def test_every_benchmark_that_can_be_named_has_a_table() -> None:
    assert all(callable(importlib.import_module(f"benchmarks.{name}").table) for name in NAMES)
