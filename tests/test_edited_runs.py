"""Run directories that were edited, cut short or made by other code: one line says what does not fit."""

import copy
import importlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import Train, clbench, run_directories

import clbench as package
from clbench.errors import UserError

REMOVED = "..."
# File, flat key, value; what is said.
EDITS = [
    ("config.yaml", "method._target_", "nowhere_at_all.Method", "put the folder that holds nowhere_at_all on PYTHONPATH"),
    ("config.yaml", "method._target_", "clbench.methods.padim.Removed", "version of clbench that has it"),
    ("config.yaml", "strategy._target_", "pathlib.Path", r"strategy\._target_=pathlib\.Path is not a"),
    ("config.yaml", "method._target_", ["a"], r"method\._target_: Input should be a valid string"),
    ("config.yaml", "method.features", "many", r"method\.features=many: input should be a valid integer"),
    ("config.yaml", "method.layers", {"a": 1}, r"method\.layers"),
    ("config.yaml", "method.later", 1, r"there is no setting method\.later"),
    ("config.yaml", "method", REMOVED, r"\(method: Field required\)"),
    ("config.yaml", "backbone.name", REMOVED, r"backbone\.name has no value"),
    ("config.yaml", "backbone.checkpoint", "${oc.env:NOWHERE}/w", r"backbone\.checkpoint=\$\{oc\.env:NOWHERE\}/w"),
    ("config.yaml", "dataset.resize", "${method.protocol.resize}", r"\(dataset\.resize: Input should be a valid integer"),
    ("config.yaml", "replay.draw", "x", r"there is no setting replay\.draw"),
    ("config.yaml", "gpu.precision", "fp64", r"\(gpu\.precision: "),
    ("summary.json", "tasks", REMOVED, "holds no trained detector"),
    ("summary.json", "categories", [["brick"], 3], "holds no trained detector|summary.json is damaged"),
    ("thresholds.json", "models", REMOVED, r"thresholds\.json is damaged \(models: field required\)"),
    ("thresholds.json", "image_size", [48], r"thresholds\.json is damaged \(image_size\.1: "),
]  # fmt: skip


def edited(data: dict[str, Any], key: str, value: object) -> dict[str, Any]:
    changed = copy.deepcopy(data)
    *nodes, name = key.split(".")
    node = changed
    for each in nodes:
        node = node[each]
    if value == REMOVED:
        del node[name]
    else:
        node[name] = value
    return changed


def test_what_does_not_fit_in_a_run_directory_is_said_in_one_line(
    folder: Path, train: Train, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert (
        train("method=padim", "method.features=20", "strategy=finetune", "method.held_out=0.34").returncode
        == 0
    )
    (run,) = run_directories(tmp_path)
    image = str(folder / "brick" / "test" / "good" / "000.png")

    def refused(said: str, predicting: bool = False) -> None:
        with pytest.raises(UserError, match=said) as error:
            package.load(run)
        assert "\n" not in str(error.value)
        if predicting:
            shown = clbench("predict", str(run), image, "--output", str(tmp_path / "found"))
            assert shown.returncode == 1 and shown.stderr == f"error: {error.value}\n"
        assert capsys.readouterr() == ("", "")  # nor does a library log beside it

    readers: dict[str, Callable[[str], Any]] = {".yaml": yaml.safe_load, ".json": json.loads}
    for name, key, value, said in EDITS:
        file = run / name
        whole = file.read_text()
        file.write_text(json.dumps(edited(readers[file.suffix](whole), key, value)))  # which is YAML too
        refused(said, predicting=key.endswith(("method._target_", "tasks")))
        file.write_text(whole)
    for name, said in (
        ("config.yaml", r"config\.yaml is damaged, or not of this version of clbench \(outputs: "),
        ("summary.json", "holds no trained detector"),
    ):
        whole = (run / name).read_text()
        (run / name).write_text(whole[: whole.index(":") + 3])
        refused(said)
        (run / name).write_text(whole)
    with pytest.raises(UserError, match=r"gpu\.precision=fp64: "):
        package.load(run, gpu={"precision": "fp64"})
    assert package.load(run).thresholds is not None


LARGER = """
from clbench.methods.padim import PaDiM

class Changing(PaDiM):
    def __init__(self, **settings):
        super().__init__(**settings)
        self.{name} = __import__("torch").nn.Linear(2, 2)
"""


def test_a_class_that_changed_since_is_named(
    train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "code").mkdir()
    module = tmp_path / "code" / "changing_method_of_a_test.py"
    (tmp_path / "own" / "method").mkdir(parents=True)
    (tmp_path / "own" / "method" / "changing.yaml").write_text(
        "defaults: [padim, _self_]\nname: changing\n_target_: changing_method_of_a_test.Changing\n"
    )
    monkeypatch.syspath_prepend(tmp_path / "code")
    module.write_text(LARGER.format(name="first"))
    given = (f"--config-dir={tmp_path}/own", "method=changing", "method.features=20", "strategy=finetune")
    assert train(*given).returncode == 0
    (run,) = run_directories(tmp_path)
    import changing_method_of_a_test as changing

    module.write_text(LARGER.format(name="renamed"))
    importlib.reload(changing)  # as a new process would find it
    with pytest.raises(
        UserError, match=r"has learned does not fit changing_method_of_a_test\.Changing as it is now"
    ):
        package.load(run)
