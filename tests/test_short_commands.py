"""The command of a leaderboard's row names the choices of conf/ that it is made of, and no place of a machine."""

from pathlib import Path

import pytest
from test_report import make, only_group

from clbench.report import leaderboard


@pytest.mark.parametrize(
    ("overrides", "shown"),
    [
        (
            [
                "dataset=mvtec",
                "dataset.root=/a/b",
                "task_order=mvtec_10_5",
                "metrics=all",
                "backbone=resnet18",
            ],
            "dataset=mvtec strategy=finetune dataset.root=FOLDER task_order=mvtec_10_5 metrics=all backbone=resnet18",
        ),
        (
            ["metrics=stored", "metrics.image_rate=0.2", "gpu.precision=bf16"],
            "dataset=synthetic strategy=finetune gpu.precision=bf16 metrics=stored metrics.image_rate=0.2",
        ),
        (["metrics.further=[segf1]"], "dataset=synthetic strategy=finetune 'metrics.further=[segf1]'"),
        (
            ["task_order=easy_to_hard", "task_order.run=/a/b/c", "task_order.sizes=[2,1]"],
            "dataset=synthetic strategy=finetune task_order=easy_to_hard task_order.run=RUN 'task_order.sizes=[2,1]'",
        ),
    ],
    ids=["choices", "a choice but for one setting", "no choice", "by results"],
)
def test_commands_are_short(overrides: list[str], shown: str, tmp_path: Path) -> None:
    for seed in (0, 1):
        make(tmp_path, "method=padim", "strategy=finetune", *overrides, f"seed={seed}")
    (row,) = only_group(tmp_path).rows
    assert leaderboard.command(row) == f"clbench run -m benchmark=demo method=padim {shown} seed=0,1"
