"""The typed config: what it holds, what it refuses to be changed in, and where its values come from."""

from pathlib import Path
from typing import Annotated

import pytest
import torch
import yaml
from conftest import ROOT
from hydra import compose
from omegaconf import OmegaConf
from pydantic import Field, ValidationError

from clbench import assembly, footprint
from clbench.config import Config, check, class_of, composed, composing, flat, takes
from clbench.config.classes import check_settings, constructor
from clbench.errors import UserError

METHODS = sorted(path.stem for path in (ROOT / "conf" / "method").glob("*.yaml"))


@pytest.fixture(scope="module")
def config() -> Config:
    return check(composed("method=cfa", "task_order.tasks=[leather,[gear,pill_like]]", "cache=c"))


def test_a_checked_config_is_typed_and_cannot_be_changed(config: Config) -> None:
    assert (config.method.name, config.method.target) == ("cfa", "clbench.methods.cfa.CFA")
    assert config.method.protocol.crop == 224 and config.task_order.tasks == [
        "leather",
        ["gear", "pill_like"],
    ]
    assert "name" not in config.method.settings and config.method.settings["epochs"] == 4
    assert config.backbone.settings["arguments"] == {"channels": [48, 96, 192, 384]}
    assert config.backbone.settings["name"] == "resnet18" and "resize" not in config.dataset.settings
    with pytest.raises(ValidationError):
        config.seed = 3  # type: ignore[misc]
    for changed in (config.method.settings, config.plain()["method"]):
        changed["epochs"] = 99
    assert config.method.settings["epochs"] == config.plain()["method"]["epochs"] == 4


def test_the_method_s_buffer_is_filled_in_for_every_strategy_that_has_one_and_for_no_other(
    config: Config,
) -> None:
    assert config.strategy.name == "replay" and config.replay.size == config.plain()["replay"]["size"] == 40
    given = check(composed("method=cfa", "replay.size=7"))
    assert given.replay.size == 7 and given.strategy.name == "replay"
    assert check(composed("method=cfa", "strategy=finetune")).replay.size is None


def test_a_stored_config_is_the_config_it_was(config: Config) -> None:
    stored = {**config.plain(), "departures": {"method.epochs": 30}, "made_by": {"clbench": "0.1.0"}}
    read = Config.stored(yaml.safe_load(yaml.safe_dump(stored, sort_keys=False)))
    assert read == config and read.plain() == config.plain()
    assert [key for key, _ in flat(read.plain())] == [key for key, _ in flat(config.plain())]
    del stored["method"]
    with pytest.raises(UserError, match=r"not of this version of clbench \(method: "):
        Config.stored(stored)


@pytest.mark.parametrize("method", METHODS)
def test_the_demo_changes_in_a_method_what_its_file_says_and_nothing_else(method: str) -> None:
    """What remains is the paper's, which the method's own file holds."""
    with composing():
        demo, paper = (
            compose("config", [f"method={method}", f"benchmark={name}"]) for name in ("demo", "paper")
        )
    before, after = (
        dict(flat(OmegaConf.to_container(config.method, resolve=True))) for config in (paper, demo)
    )
    file = ROOT / "conf" / "benchmark" / "demo" / f"{method}.yaml"
    said = yaml.safe_load(file.read_text()) if file.is_file() else {}
    if "defaults" in said:
        said = yaml.safe_load(file.with_name("fastflow.yaml").read_text())
    changed = {key: value for key, value in after.items() if before[key] != value}
    assert before.keys() == after.keys() and changed == dict(flat(said))
    own = yaml.safe_load((ROOT / "conf" / "method" / f"{method}.yaml").read_text())
    own.pop("defaults", None)
    assert dict(flat(own)).items() <= before.items()


class _Parent:
    def __init__(self, *, share: Annotated[float, Field(gt=0, lt=1)] = 0.5, count: int):
        pass


class _Child(_Parent):
    def __init__(self, detector: object, *, name: str | None = None, **settings: object):
        super().__init__(**settings)  # type: ignore[arg-type]


class _Closed(_Parent):
    def __init__(self, count: bool = True):
        super().__init__(count=count)


def test_settings_handed_on_to_a_parent_are_held_against_the_parent_s_annotations() -> None:
    assert list(constructor(_Child)) == ["detector", "name", "share", "count"]
    assert list(constructor(_Closed)) == ["count"] and constructor(_Closed)["count"].annotation is bool
    check_settings("strategy", _Child, {"count": 3, "share": 0.1})
    for settings, said in (
        ({"count": 3, "share": 2.0}, "strategy.share=2.0: input should be less than 1"),
        ({"count": 2.5}, "strategy.count=2.5"),
        ({"count": 3, "share": float("nan")}, "strategy.share=nan"),
        ({}, "strategy.count has no value: give strategy.count="),
        ({"count": 3, "shar": 0.1}, "no setting strategy.shar; nearest: strategy.share"),
        ({"count": 3, "seed": 1}, "no setting strategy.seed"),
    ):
        with pytest.raises(UserError) as refused:
            check_settings("strategy", _Child, settings)
        assert said in str(refused.value)


def test_a_class_that_cannot_be_imported_is_said_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture
) -> None:
    (tmp_path / "half_written_module.py").write_text("class Broken(:\n")
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "script_module.py").write_text("import sys\nsys.exit(3)\n")
    (tmp_path / "asserting_module.py").write_text("assert False\n")
    (tmp_path / "needing_module.py").write_text("import not_installed_at_all\n")
    for target, said in {
        "half_written_module.Broken": "SyntaxError: invalid syntax (half_written_module.py, line 1)): mend the module",
        "script_module.Broken": "SystemExit: 3",
        "asserting_module.Broken": "raises AssertionError): mend the module",
        "needing_module.Broken": "No module named 'not_installed_at_all'",
        "no_such_package.x.Y": "put the folder that holds no_such_package on PYTHONPATH",
        "clbench.methods.cfa.CFB": "clbench.methods.cfa has no CFB): nearest: CFA",
        "clbench.strategies.nativ.Nativ": "clbench.strategies has no nativ): nearest: native",
        "os.path": "it is a module: give MODULE.CLASS",
        "a..B": "is no dotted path",
    }.items():
        with pytest.raises(UserError, match="_target_=") as refused:
            class_of(target)
        assert "\n" not in str(refused.value) and said in str(refused.value)
        assert ("PYTHONPATH" in str(refused.value)) == (target == "no_such_package.x.Y")
    assert capfd.readouterr() == ("", "")


def test_what_a_class_takes_is_told_by_its_constructor(config: Config) -> None:
    assert takes(config, "method", "backbone") and takes(config, "dataset", "train")
    assert not takes(config, "method", "memory_size")


def test_a_gpu_is_chosen_before_anything_is_asked_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in for torch.cuda, with two GPUs, which refuses what CUDA refuses before it is initialised."""
    chosen: list[torch.device] = []

    def reset_peak(device: torch.device) -> None:
        assert chosen == [device], "CUDA is not initialised"

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", reset_peak)
    for name, index in (("cuda:1", 1), ("cuda", 0), ("auto", 0)):
        chosen.clear()
        device = assembly.select_device(check(composed(f"gpu.device={name}")).gpu)
        footprint.reset_peak(device)
        assert device == torch.device("cuda", index)
    with pytest.raises(UserError, match="sees 2 GPUs here"):
        assembly.select_device(check(composed("gpu.device=cuda:2")).gpu)
