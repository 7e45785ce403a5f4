"""Paths that a person gives: what stands for a home or a variable in them, in settings and in words of commands."""

import pwd
import shutil
from pathlib import Path
from typing import Annotated

import pytest
import yaml
from conftest import ROOT, Train, clbench, run_directories, within

from clbench.commands.run import main
from clbench.config import check, composed, differences
from clbench.config.words import readable
from clbench.errors import UserError
from clbench.paths import PATH, PATH_FOR_USE, File, Place, absolute, expanded, path_mark

ONE = ("method=padim", "method.features=20", "strategy=finetune", "task_order.tasks=[brick]")


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home folder of the test's own, and a variable of its own that names a folder in it."""
    home = tmp_path / "home"
    (home / "data").mkdir(parents=True)
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("OWN_DATA", str(home / "data"))
    monkeypatch.delenv("NOT_SET", raising=False)
    return home


def test_what_stands_for_a_home_or_a_variable_is_replaced(home: Path) -> None:
    for given, path in {
        "~": home,
        "~/x": home / "x",
        "$HOME/x": home / "x",
        "${OWN_DATA}": home / "data",
        "a/$OWN_DATA": Path(f"a/{home}/data"),
        "~root/x": Path(pwd.getpwnam("root").pw_dir) / "x",
        "a~b/c$": Path("a~b/c$"),
        "./~/x": Path("~/x"),
        "/a b/ü": Path("/a b/ü"),
    }.items():
        assert expanded(given) == path, given


def test_a_variable_that_holds_a_home_is_a_home(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OWN_DATA", "~/data")
    assert expanded("$OWN_DATA/x") == home / "data" / "x"


def test_what_stands_for_nothing_is_named(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for given, said in {
        "$NOT_SET/x": "cache=$NOT_SET/x: the environment variable NOT_SET is not set",
        "a/${NOT_SET}": "cache=a/${NOT_SET}: the environment variable NOT_SET is not set",
        "~nobody-here/x": "cache=~nobody-here/x: there is no user 'nobody-here' here",
    }.items():
        with pytest.raises(UserError) as error:
            expanded(given, "cache")
        assert str(error.value).startswith(said)
    monkeypatch.setenv("HOME", "")  # with which ~/x would be /x
    with pytest.raises(UserError, match="^~/x: there is no home folder here"):
        expanded("~/x")


def test_what_is_really_called_so_is_taken_as_it_is_written(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(home)
    for name in ("~nobody-here", "$NOT_SET.png", "~"):
        (home / name).touch()
    assert expanded("~nobody-here") == home / "~nobody-here"
    assert expanded(expanded("$NOT_SET.png")) == home / "$NOT_SET.png"
    assert expanded("~") == home  # but never a home


def test_an_absolute_path_has_no_detours_but_those_that_links_make(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(home / "data")
    assert absolute("../data/../x") == str(home / "x")
    (home / "far" / "away").mkdir(parents=True)
    (home / "link").symlink_to("far/away")
    assert absolute("../link/../x") == f"{home}/data/../link/../x"  # which is far/x


def test_settings_are_paths_by_their_annotations() -> None:
    assert path_mark(Place) == path_mark(Place | None) == path_mark(list[Place]) == PATH
    assert path_mark(File) == path_mark(File | None) == path_mark(dict[str, list[File]]) == PATH_FOR_USE
    assert path_mark(str | None) is path_mark(Annotated[str, "of"]) is path_mark(int) is None


def test_every_path_of_a_config_is_kept_absolute(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(home)
    (home / "w.safetensors").touch()
    config = check(
        composed(
            *("benchmark=paper", "method=draem", "dataset.root=$OWN_DATA", "method.textures=data"),
            *("outputs=out", "cache='~/c'", "backbone.checkpoint='~/w.safetensors'"),
        )
    ).plain()
    assert (config["outputs"], config["cache"]) == (f"{home}/out", f"{home}/c")
    assert config["dataset"]["root"] == config["method"]["textures"] == f"{home}/data"
    assert config["backbone"]["checkpoint"] == f"{home}/w.safetensors"
    packaged = check(composed("method=patchcore")).plain()
    assert packaged["backbone"]["checkpoint"] == "package:small.safetensors"


def test_a_path_as_it_was_typed_is_the_one_that_is_kept(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(home)
    kept = {"dataset": {"root": f"{home}/data"}}
    for typed in ("data", "data/", "~/data", "$OWN_DATA", f"{home}/data/", "./data"):
        assert differences({"dataset": {"root": typed}}, kept) == []
    for other in ("dat", "$NOT_SET/data", "~/other", 3):
        (change,) = differences({"dataset": {"root": other}}, kept)
        assert change == f"dataset.root: {other} -> {home}/data"
    assert differences({"dataset": {"root": None}}, kept) == [f"dataset.root: null -> {home}/data"]


def test_hydra_is_given_what_it_can_read() -> None:
    for given, read in {
        "dataset.root=~/data": "dataset.root='~/data'",
        "dataset.root=~/a,~nobody/b": "dataset.root='~/a','~nobody/b'",
        "method.tables=[~/a,/b~c]": "method.tables=['~/a','/b~c']",
        "backbone.arguments={file: ~/a}": "backbone.arguments={file: '~/a'}",
        "outputs='~/a b'": "outputs='~/a b'",
        "~backbone.checkpoint": "~backbone.checkpoint",
        "outputs=/a/b": "outputs=/a/b",
        "outputs=~/a'": "outputs=~/a'",
    }.items():
        assert readable(given) == read


def test_a_run_takes_such_paths_from_the_command_line_and_from_files(
    folder: Path, home: Path, train: Train, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(folder / "brick", home / "data" / "brick")
    mine = home / "mine"
    mine.mkdir()
    (mine / "local.yaml").write_text("outputs: ~/from_a_file\ncache: $OWN_DATA/../cache\n")
    dataset = ("dataset=mvtec", "dataset.resize=48", "dataset.crop=null", "dataset.root=~/data")
    network = ("backbone.checkpoint=null", "backbone.arguments.channels=[16,16,32,64]")
    train("dry_run=true")  # which goes to the project's folder first

    def run(*words: str) -> str:
        done = within(main, [*dataset, *network, *ONE, *words])
        assert done.returncode == 0, done.stderr
        return done.stdout

    run("--config-dir=~/mine")
    (first,) = (home / "from_a_file" / "default").iterdir()
    stored = yaml.safe_load((first / "config.yaml").read_text())
    assert stored["outputs"] == f"{home}/from_a_file" and stored["cache"] == f"{home}/cache"
    assert stored["dataset"]["root"] == f"{home}/data" and (home / "cache").is_dir()
    assert "finished already" in run("--config-dir=$HOME/mine")
    run("outputs=$HOME/typed", "cache=~/cache")
    (second,) = (home / "typed" / "default").iterdir()
    assert second.name == first.name  # by what was typed, wherever it leads
    assert not list(ROOT.glob("~*")) and not list(ROOT.glob("$*"))

    # What leads elsewhere by now is another dataset, though it is typed as before.
    (home / "moved").mkdir()
    shutil.copytree(home / "data", home / "moved" / "data")
    monkeypatch.setenv("HOME", f"{home}/moved")
    refused = within(main, [*dataset, *network, *ONE, f"outputs={home}/typed", f"cache={home}/cache"])
    assert refused.returncode == 2 and f"dataset.root: {home}/data -> {home}/moved/data" in refused.stderr


def test_a_path_that_means_nothing_is_refused_before_anything_is_written(
    home: Path, train: Train, tmp_path: Path
) -> None:
    for override, said in (
        ("outputs=$NOT_SET/x", "outputs=$NOT_SET/x: the environment variable NOT_SET is not set"),
        ("outputs=~nobody-here/x", "outputs=~nobody-here/x: there is no user"),
        ("cache=$NOT_SET/x", "cache=$NOT_SET/x: the environment variable"),
        ("dataset.root=~nobody-here", "dataset.root=~nobody-here: there is no user"),
        ("backbone.checkpoint=$NOT_SET/w", "backbone.checkpoint=$NOT_SET/w: the environment variable"),
        ("--config-dir=$NOT_SET/mine", "--config-dir=$NOT_SET/mine: the environment variable"),
        ("outputs=${HOME}/x", "the environment variable is written $HOME or ${oc.env:HOME}"),
        ("dataset.root=${HOME}/x", "the environment variable is written $HOME or ${oc.env:HOME}"),
    ):
        refused = train(override)
        assert refused.returncode == 2 and refused.stderr.count("\n") == 1, refused.stderr
        assert said in refused.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["home"]


def test_commands_take_such_paths_too(folder: Path, home: Path, train: Train, tmp_path: Path) -> None:
    assert train(*ONE, "method.held_out=0.34").returncode == 0
    (run,) = run_directories(tmp_path)
    shutil.copytree(run.parent, home / "runs")
    shutil.copytree(folder / "brick" / "test", home / "data" / "test")
    done = clbench("predict", f"~/runs/{run.name}", "$OWN_DATA/test", "--output", "~/found", "--only-scores")
    assert done.returncode == 0, done.stderr
    assert (home / "found" / "scores.csv").is_file()
    assert clbench("report", "~/runs", "--output", "$OWN_DATA/report").returncode == 0
    assert (home / "data" / "report" / "index.html").is_file()
    small = ("--size", "32", "--train", "1", "--test-good", "1", "--test-defect", "1")
    assert clbench("data", "synthetic", "~/drawn", *small).returncode == 0
    assert clbench("data", "check", "~/drawn").returncode == 0
    for words in (
        ("report", "$NOT_SET"),
        ("predict", "~nobody-here/run", "x"),
        ("predict", str(run), "$NOT_SET/x"),
        ("export", str(run), "--output", "$NOT_SET"),
        ("data", "check", "~nobody-here"),
        ("wandb", "sync", "$NOT_SET"),
        ("distil", "--backbone", "resnet18", "--output", "$NOT_SET/t.safetensors"),
    ):
        refused = clbench(*words)
        assert refused.returncode == 1 and refused.stderr.count("\n") == 1, refused.stderr
        assert "is not set" in refused.stderr or "there is no user" in refused.stderr


def test_without_a_home_outputs_and_cache_are_enough(
    train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def nobody(number: int) -> pwd.struct_passwd:
        raise KeyError(f"getpwuid(): uid not found: {number}")

    monkeypatch.delenv("HOME")
    monkeypatch.setattr(pwd, "getpwuid", nobody)
    monkeypatch.delenv("CLBENCH_CACHE", raising=False)
    with pytest.raises(RuntimeError):
        Path.home()
    assert train(*ONE).returncode == 0
    monkeypatch.chdir(ROOT)
    refused = within(main, ["dry_run=true", f"outputs={tmp_path}/other"])
    assert refused.returncode == 2 and refused.stderr.count("\n") == 1
    assert refused.stderr.startswith("error: cache=~/.cache/clbench: there is no home folder here")
