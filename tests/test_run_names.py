"""The same experiment has the same directory, and different ones have different directories."""

import pytest

from clbench.config import run_name


@pytest.mark.parametrize(
    ("others", "same"),
    [([], True), (["method=padim"], True), (["metrics=stored"], False), (["benchmark=mine"], False)],
)
def test_no_further_metrics_are_what_a_run_has_where_none_are_chosen(others: list[str], same: bool) -> None:
    assert (run_name([*others, "metrics.further=[]"]) == run_name(others)) == same
    assert run_name([*others, "metrics.further=[segf1]"]) != run_name(others)
