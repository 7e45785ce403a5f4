"""What users add: a strategy, a method and a benchmark of their own, in a folder that --config-dir names."""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from conftest import Train, run_directories

STRATEGY = """
from typing import Annotated
from pydantic import Field
from clbench.strategies.base import Strategy

class Elastic(Strategy):
    needs_gradients = True
    why_no_buffer = "it keeps weights and no images"

    def __init__(self, detector, *, weight: Annotated[float, Field(ge=0)] = 1.0, seed: int):
        super().__init__(detector, seed=seed)
        self.weight = weight


class Reservoir(Strategy):
    has_buffer = True

    def __init__(self, detector, *, replay_size: int, replay_draw: str = "uniform", **settings):
        super().__init__(detector, **settings)
"""
CONFIGS = {
    "strategy/elastic.yaml": "name: elastic\n_target_: own_strategies_of_a_test.Elastic\nweight: 1.0\n",
    "strategy/reservoir.yaml": "name: reservoir\n_target_: own_strategies_of_a_test.Reservoir\n",
    "strategy/nowhere.yaml": "name: nowhere\n_target_: nowhere_at_all.Strategy\n",
    "strategy/detector.yaml": "name: detector\n_target_: clbench.methods.stfpm.STFPM\n",
    "benchmark/mine.yaml": "# @package _global_\ndefaults:\n  - override /backbone: small\nbenchmark: mine\n",
    "benchmark/mine/stfpm.yaml": "defaults:\n  - demo/stfpm@_here_\nepochs: 2\nbatch_size: 3\n",
    "sweep/mine.yaml": "# @package _global_\ndefaults:\n  - override /benchmark: mine\nexperiment: swept\n"
    "hydra:\n  sweeper:\n    grids:\n      - method: stfpm\n        strategy: elastic,finetune\n",
}


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A user's folder of configs, their classes on the path."""
    for name, text in CONFIGS.items():
        (tmp_path / "own" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "own" / name).write_text(text)
    (tmp_path / "code").mkdir()
    (tmp_path / "code" / "own_strategies_of_a_test.py").write_text(STRATEGY)
    monkeypatch.syspath_prepend(tmp_path / "code")
    yield tmp_path / "own"
    sys.modules.pop("own_strategies_of_a_test", None)


REFUSED = [
    (["strategy=elastic", "strategy.weight=abc"], "strategy.weight=abc: input should be a valid number"),
    (
        ["strategy=elastic", "strategy.weight=-1"],
        "strategy.weight=-1: input should be greater than or equal to 0",
    ),
    (["strategy=elastic", "strategy.wieght=1"], "no setting strategy.wieght; nearest: strategy.weight"),
    (["strategy=elastic", "strategy.detector=1"], "no setting strategy.detector"),
    (
        ["strategy=finetune", "strategy.weight=1"],
        "strategy.weight is a setting of elastic, ",  # and of others, of the package
    ),
    (
        ["strategy=elastic", "replay.size=6"],
        "strategy=elastic with replay.size=6 makes no sense: it keeps weights",
    ),
    (["strategy=elastic", "method=patchcore"], "with method=patchcore makes no sense: the strategy works on"),
    (["strategy=reservoir", "method=patchcore"], "strategy=reservoir needs a buffer: give replay.size"),
    (
        ["strategy=reservoir", "replay.size=6", "+replay.darw=x"],
        "no setting replay.darw; nearest: replay.draw",
    ),
    (
        ["strategy=reservoir", "replay.size=6", "+replay.draw=1"],
        "replay.draw=1: input should be a valid string",
    ),
    (["strategy=nowhere"], "_target_=nowhere_at_all.Strategy cannot be imported"),
    (
        ["strategy=detector"],
        "strategy._target_=clbench.methods.stfpm.STFPM is not a clbench.strategies.base.Strategy",
    ),
    (["strategy=elastik"], "strategy=elastik does not exist; nearest: elastic"),
    (["strategy=elastic", "strategy._target_=os.system"], "_target_=os.system cannot be imported"),
]


@pytest.mark.parametrize(("overrides", "said"), REFUSED, ids=[" ".join(given) for given, _ in REFUSED])
def test_a_strategy_s_own_settings_are_checked_before_anything_starts(
    own: Path, train: Train, tmp_path: Path, overrides: list[str], said: str
) -> None:
    result = train(f"--config-dir={own}", "method=stfpm", *overrides)
    assert result.returncode == 2 and said in result.stderr and result.stderr.count("\n") == 1, result.stderr
    assert not (tmp_path / "outputs").exists()


def test_a_third_benchmark_and_a_sweep_of_it_are_found_and_departures_are_from_it(
    own: Path, train: Train, tmp_path: Path
) -> None:
    """The sweep's method is the benchmark's, but for what the command line says; it is stored with the run."""
    result = train(f"--config-dir={own}", "sweep=mine", "strategy.weight=3.0", "method.patience=1")
    assert result.returncode == 0, result.stderr
    stored = [
        yaml.safe_load((path / "config.yaml").read_text()) for path in run_directories(tmp_path, "swept")
    ]
    assert [config["strategy"]["name"] for config in stored] == ["elastic", "finetune"]
    for config in stored:
        assert config["benchmark"] == "mine"
        assert (config["method"]["epochs"], config["method"]["batch_size"]) == (2, 3)
        assert config["method"]["protocol"]["replay_size"] == 40  # as in the demo
        assert config["departures"]["method.patience"] == 10
        assert "method.epochs" not in config["departures"] and "seed" not in config["departures"]
        assert config["departures"]["dataset.root"] == "???"
    assert stored[0]["strategy"]["weight"] == 3.0 and stored[0]["departures"]["strategy.weight"] == 1.0
    assert "weight" not in stored[1]["strategy"] and "strategy.weight" not in stored[1]["departures"]


def test_finished_runs_are_composed_again_when_a_config_of_the_user_s_own_changed(
    own: Path, train: Train, tmp_path: Path
) -> None:
    given = (f"--config-dir={own}", "benchmark=mine", "method=stfpm", "strategy=finetune")
    assert train(*given).returncode == 0
    assert "finished already" in train(*given).stdout
    (own / "benchmark" / "mine" / "stfpm.yaml").write_text("epochs: 1\nbatch_size: 3\n")
    refused = train(*given)
    assert refused.returncode == 2 and "method.epochs: 2 -> 1" in refused.stderr


def test_what_this_machine_s_own_file_changes_is_a_departure(own: Path, train: Train, tmp_path: Path) -> None:
    (own / "local.yaml").write_text("method:\n  features: 7\ndataset:\n  root: /nowhere\n")
    given = (f"--config-dir={own}", "method=padim", "task_order.tasks=[brick]")
    result = train(*given)
    assert result.returncode == 0, result.stderr
    (directory,) = run_directories(tmp_path)
    stored = yaml.safe_load((directory / "config.yaml").read_text())
    assert stored["method"]["features"] == 7 and stored["departures"]["method.features"] == 350


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["~method.sigma"], "~method.sigma cannot be taken away: give method.sigma="),
        (["wandb=disabled,offline"], "wandb=disabled,offline: runs that differ in it alone would be one run"),
        (["maps=few,true"], "maps=few,true: runs that differ in it alone"),
        (["sweep=demo,task_orders"], "sweep=demo,task_orders: runs that differ in it alone"),
        (["outputs=a,b"], "outputs=a,b: runs that differ in it alone"),
        (["hydra/sweeper=basic"], "hydra/sweeper=basic: every run is checked"),
        (["++hydra.mode=RUN"], "++hydra.mode=RUN: every run is checked"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_what_would_be_passed_over_is_refused(
    train: Train, tmp_path: Path, overrides: list[str], said: str
) -> None:
    result = train("-m", *overrides)
    (line,) = result.stderr.splitlines()
    assert result.returncode == 2 and line.startswith("error: ") and said in line
    assert not (tmp_path / "outputs").exists()
