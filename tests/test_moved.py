"""A trained detector is used elsewhere: without what only learning needs, and with its files in other places."""

import json
import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import yaml
from conftest import ROOT, Train, clbench, run_directories
from safetensors.torch import save_file

import clbench as package
from clbench.backbones import Backbone
from clbench.errors import UserError
from clbench.methods.efficientad import patch_description_network

NETWORK = {"channels": [16, 16, 32, 64]}  # what `train` gives
ONE = ("task_order.tasks=[brick]", "gpu=cpu")
PADIM = ("method=padim", "method.features=20", "strategy=finetune", "method.held_out=0.34", *ONE)
IMAGE = torch.arange(3 * 48 * 48).view(1, 3, 48, 48).remainder(251).byte()


def write_weights(path: Path, seed: int = 0) -> Path:
    """Weights of the network that `train` takes features from, random by seed."""
    network = Backbone("resnet18", pretrained=False, arguments=NETWORK, seed=seed).pyramid([0, 1, 2, 3, 4])
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(network.network.state_dict(), path)
    return path


def the_run(tmp_path: Path, experiment: str = "default") -> Path:
    (directory,) = run_directories(tmp_path, experiment)
    return directory


def stored(run: Path) -> dict:
    return yaml.safe_load((run / "config.yaml").read_text())


def left_unfinished(run: Path) -> None:
    summary = json.loads((run / "summary.json").read_text())
    (run / "summary.json").write_text(json.dumps({**summary, "status": "running"}))


SMALL_DRAEM = ("method.reconstructive_width=4", "method.discriminative_width=4", "method.texture_count=2")
SMALL_EFFICIENTAD = ("method.width=8", "method.penalty_count=2", "method.teacher=random")


@pytest.mark.parametrize(
    ("setting", "small"),
    [
        ("method.textures", ("method=draem", "method.batch_size=2", *SMALL_DRAEM)),
        ("method.penalty_images", ("method=efficientad", *SMALL_EFFICIENTAD)),
    ],
    ids=["textures", "penalty images"],
)
def test_pictures_that_only_learning_needs_may_be_gone_afterwards(
    setting: str, small: tuple[str, ...], folder: Path, train: Train, tmp_path: Path
) -> None:
    pictures = shutil.copytree(folder / "cloth" / "train" / "good", tmp_path / "pictures")
    given = (
        *small,
        *ONE,
        "method.epochs=1",
        "strategy=finetune",
        "method.held_out=0.34",
        f"{setting}={pictures}",
    )
    assert train(*given).returncode == 0
    run = the_run(tmp_path)
    before = package.load(run)(IMAGE)
    shutil.rmtree(pictures)
    after = package.load(run)(IMAGE)
    assert torch.equal(before.maps, after.maps) and torch.equal(before.scores, after.scores)
    image = str(folder / "brick" / "test" / "good" / "000.png")
    done = clbench("predict", str(run), image, "--output", str(tmp_path / "found"), "--only-scores")
    assert done.returncode == 0, done.stderr
    left_unfinished(run)
    refused = train(*given)
    assert refused.returncode == 2 and refused.stderr.count("\n") == 1
    assert f"{setting}={pictures}: it is no folder" in refused.stderr


def test_a_file_given_relative_to_one_folder_is_found_from_another_and_can_be_named_anew(
    folder: Path, train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = write_weights(tmp_path / "weights" / "w.safetensors")
    given = (*PADIM, f"backbone.checkpoint={os.path.relpath(file, ROOT)}")
    assert train(*given).returncode == 0
    run = the_run(tmp_path)
    assert (stored(run)["backbone"]["checkpoint"], stored(run)["dataset"]["root"]) == (str(file), str(folder))
    assert "finished already" in train(*given).stdout
    monkeypatch.chdir(tmp_path / "weights")
    before = package.load(run)(IMAGE).maps
    moved = file.rename(tmp_path / "moved.safetensors")

    image = str(folder / "brick" / "test" / "good" / "000.png")
    words = {
        "predict": (str(run), image, "--output", str(tmp_path / "found"), "--only-scores"),
        "export": (str(run), "--output", str(tmp_path / "exported"), "--formats", "torch"),
    }
    for command, rest in words.items():
        refused = clbench(command, *rest)
        assert refused.returncode == 1 and refused.stderr.count("\n") == 1
        assert f"backbone.checkpoint={file}: it does not exist" in refused.stderr
        assert "--replace backbone.checkpoint=PATH" in refused.stderr
        done = clbench(command, *rest, "--replace", "backbone.checkpoint=../moved.safetensors")
        assert done.returncode == 0, done.stderr
    assert torch.equal(package.load(run, replace={"backbone.checkpoint": moved})(IMAGE).maps, before)

    other = write_weights(tmp_path / "other.safetensors", seed=1)
    for replacement, said in (
        ({"backbone.checkpoint": other}, "begun with other weights of its frozen network"),
        ({"backbone.checkpoint": "nowhere.safetensors"}, "nowhere.safetensors: it does not exist"),
        (
            {"method.features": "30"},
            "--replace method.features: that is no file or folder .* are: backbone.checkpoint",
        ),
        ({"checkpoint": moved}, "there are: backbone.checkpoint$"),
        ({"backbone.checkpoint": "~nobody-here/w"}, "there is no user 'nobody-here'"),
    ):
        with pytest.raises(UserError, match=said) as error:
            package.load(run, replace=replacement)
        assert "\n" not in str(error.value)
    file.parent.mkdir(exist_ok=True)
    shutil.copy(other, file)  # other content under the name that the run knows
    with pytest.raises(UserError, match="begun with other weights of its frozen network"):
        package.load(run)
    assert clbench("predict", str(run), image, "--replace", "x").stderr.startswith(
        "error: --replace x: give KEY=PATH"
    )


def test_a_teacher_lies_elsewhere_and_weights_that_were_downloaded_are_given_as_a_file(
    train: Train, tmp_path: Path
) -> None:
    teacher = tmp_path / "teacher.pth"
    torch.save(patch_description_network(8, 12).state_dict(), teacher)
    small = (
        "method=efficientad",
        "method.width=8",
        "method.penalty_count=2",
        "method.epochs=1",
        "strategy=finetune",
    )
    assert train(*small, *ONE, f"method.teacher={teacher}").returncode == 0
    run = the_run(tmp_path)
    before = package.load(run)(IMAGE).maps
    moved = teacher.rename(tmp_path / "moved.pth")
    with pytest.raises(
        UserError, match=r"method.teacher=.*teacher\.pth: it does not exist.*--replace method\.teacher=PATH"
    ):
        package.load(run)
    assert torch.equal(package.load(run, replace={"method.teacher": moved})(IMAGE).maps, before)

    # A run on weights that the configuration names no file of: these are random, by the run's seed.
    assert train(*PADIM, "experiment=random").returncode == 0
    run = the_run(tmp_path, "random")
    same = Backbone("resnet18", pretrained=False, arguments=NETWORK).pyramid([0, 1, 2, 3])
    save_file(same.network.state_dict(), tmp_path / "same.safetensors")
    given = package.load(run, replace={"backbone.checkpoint": tmp_path / "same.safetensors"})
    assert torch.equal(given(IMAGE).maps, package.load(run)(IMAGE).maps)


OWN = """
from clbench.methods.padim import PaDiM
from clbench.paths import File, Place

class Own(PaDiM):
    def __init__(self, *, table: File, tables: list[File], notes: Place | None = None, words: str = "a", **settings):
        super().__init__(**settings)
        self.shift = float(open(table).read())
"""


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A user's own method and config, in a folder of configs."""
    (tmp_path / "code").mkdir()
    (tmp_path / "code" / "own_method_of_a_moved_run.py").write_text(OWN)
    (tmp_path / "own" / "method").mkdir(parents=True)
    (tmp_path / "own" / "method" / "own.yaml").write_text(
        "defaults: [padim, _self_]\nname: own\n_target_: own_method_of_a_moved_run.Own\n"
        "table: $OWN_TABLES/table.txt\ntables: []\nnotes: null\nwords: notes.txt\n"
    )
    monkeypatch.syspath_prepend(tmp_path / "code")
    yield tmp_path / "own"
    sys.modules.pop("own_method_of_a_moved_run", None)


def test_paths_of_a_user_s_own_method_are_known_by_their_annotations(
    own: Path, train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tables = tmp_path / "tables"
    tables.mkdir()
    (tables / "table.txt").write_text("1.5")
    monkeypatch.setenv("OWN_TABLES", str(tables))
    given = (
        f"--config-dir={own}",
        "method=own",
        *PADIM[1:],
        "method.notes=notes",
        "method.tables=[$OWN_TABLES/table.txt]",
    )
    assert train(*given).returncode == 0
    run = the_run(tmp_path)
    method = stored(run)["method"]
    assert method["table"] == str(tables / "table.txt") and method["tables"] == [str(tables / "table.txt")]
    assert method["notes"] == str(ROOT / "notes") and method["words"] == "notes.txt"
    assert {key for key in stored(run)["departures"] if key.startswith("method.")} == {
        "method.features",
        "method.held_out",
        "method.notes",
        "method.tables",
    }
    monkeypatch.delenv("OWN_TABLES")
    assert package.load(run).detector.shift == 1.5
    tables.rename(tmp_path / "elsewhere")
    with pytest.raises(
        UserError, match=r"method\.table=.*: there is no such file.*--replace method\.table=PATH"
    ):
        package.load(run)
    with pytest.raises(
        UserError,
        match="no file or folder of this run's detector; there are: method.table, method.tables, method.notes",
    ):
        package.load(run, replace={"method.words": "x"})
    sys.modules.pop("own_method_of_a_moved_run")
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path != str(tmp_path / "code")])
    refused = clbench("predict", str(run), str(tmp_path))
    assert "holds no image" in refused.stderr
    with pytest.raises(
        UserError,
        match="cannot be imported .*put the folder that holds own_method_of_a_moved_run on PYTHONPATH",
    ):
        package.load(run)


def test_a_run_of_an_earlier_version_kept_paths_as_they_were_typed_and_is_known(
    folder: Path, train: Train, tmp_path: Path
) -> None:
    file = write_weights(tmp_path / "w.safetensors")
    typed = {name: os.path.relpath(path, ROOT) for name, path in (("root", folder), ("checkpoint", file))}
    given = (*PADIM, f"dataset.root={typed['root']}", f"backbone.checkpoint={typed['checkpoint']}")
    assert train(*given).returncode == 0
    run = the_run(tmp_path)
    before = package.load(run)(IMAGE).maps
    config = stored(run)
    config["dataset"]["root"], config["backbone"]["checkpoint"] = typed["root"], typed["checkpoint"]
    config["outputs"], config["cache"] = "$NOWHERE/outputs", "~nobody-here/cache"
    (run / "config.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
    summary = json.loads((run / "summary.json").read_text())
    (run / "summary.json").write_text(json.dumps({**summary, "composed_from": "another version"}))
    assert "finished already" in train(*given).stdout
    assert torch.equal(package.load(run)(IMAGE).maps, before)  # from the folder that they were typed in
    config["dataset"]["root"] = str(tmp_path)
    (run / "config.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
    assert f"dataset.root: {tmp_path} -> {folder}" in train(*given).stderr
