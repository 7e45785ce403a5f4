"""What a user's command line, config or class is told: one line that names the thing, the value and the way out."""

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import pytest
import yaml
from conftest import ROOT, Train, clbench, run_directories, within
from hydra.core.override_parser.overrides_parser import OverridesParser
from pydantic import Field

from clbench.config.classes import Argument, arguments, check_constructor, check_value, constructor
from clbench.errors import UserError, described
from clbench.strategies.base import Strategy
from clbench.sweeps.sweeper import combinations

CODE = """
import enum
from pathlib import Path
from typing import Annotated, Literal
import torch
from pydantic import Field
from clbench.methods.padim import PaDiM
from clbench.strategies.replay import Replay

class Colour(enum.Enum):
    red = "r"
    blue = "b"

class Typed(PaDiM):
    def __init__(self, *, size: tuple[int, int] = (1, 1), place: Path | None = None, colour: Colour = Colour.red,
                 names: Annotated[set[str], Field(min_length=1)] = frozenset("x"), **settings):
        super().__init__(**settings)
        assert isinstance(size, tuple) and isinstance(colour, Colour)
        self.given = (size, place, colour, names)

class Attribute(PaDiM):
    def __init__(self, *, x: "torch.Nope" = 1, **settings):
        super().__init__(**settings)

class Syntax(PaDiM):
    def __init__(self, *, x: "1 +" = 1, **settings):
        super().__init__(**settings)

class Mode(Replay):
    def __init__(self, detector, *, replay_mode: Literal["a", "b"] = "a", **settings):
        super().__init__(detector, **settings)
"""
TOP = "# @package _global_\n"
METHOD = "protocol: {strategy: native, replay_size: null, resize: 48, crop: null}\nlayers: [1]\n"
CONFIGS = {
    **{
        f"method/{name}.yaml": f"name: {name}\n_target_: own_classes_of_a_test.{name.title()}\n{METHOD}"
        for name in ("typed", "attribute", "syntax")
    },
    "method/exits.yaml": f"name: exits\n_target_: own_script_of_a_test.X\n{METHOD}",
    "method/bare.yaml": "name: bare\n_target_: clbench.methods.padim.PaDiM\n",
    "method/misled.yaml": "name: misled\n_target_: clbench.methods.padim.PaDiM\n"
    + METHOD.replace("native", "nativ"),
    "method/empty.yaml": "",
    "method/listed.yaml": "- a\n- b\n",
    "method/broken.yaml": "a: [\n",
    "strategy/mode.yaml": "name: mode\n_target_: own_classes_of_a_test.Mode\n",
    "sweep/lists.yaml": TOP + "hydra: {sweeper: {grids: [{method: [cfa, padim]}]}}\n",
    "sweep/mapping.yaml": TOP + "hydra: {sweeper: {grids: {method: 'cfa,padim'}}}\n",
    "sweep/misspelt.yaml": TOP + "hydra: {sweeper: {grid: [{method: 'cfa,padim'}]}}\n",
    "sweep/headless.yaml": "experiment: x\n",
    "benchmark/headless.yaml": "seed: 3\n",
    "benchmark/renamed.yaml": TOP + "benchmark: other\n",
    "benchmark/mine.yaml": TOP + "benchmark: mine\n",
    "benchmark/mine/padim.yaml": "featurs: 2\n",
}


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A user's folder of configs with all that can be wrong in one, and their classes on the path."""
    for name, text in CONFIGS.items():
        (tmp_path / "own" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "own" / name).write_text(text)
    (tmp_path / "own/method/latin.yaml").write_bytes("name: été\n".encode("latin-1"))
    (tmp_path / "own/backbone").mkdir()
    (tmp_path / "own/backbone/wide.yaml").write_bytes("name: resnet18\n".encode("utf-16"))
    (tmp_path / "code").mkdir()
    (tmp_path / "code/own_classes_of_a_test.py").write_text(CODE)
    (tmp_path / "code/own_script_of_a_test.py").write_text("import sys\nsys.exit(3)\n")
    monkeypatch.syspath_prepend(tmp_path / "code")
    yield tmp_path / "own"
    sys.modules.pop("own_classes_of_a_test", None)


OWN_FOLDER = [
    (["method=attribute"], "own_classes_of_a_test.Attribute: an annotation of __init__ cannot be read (Attr"),
    (["method=syntax"], "an annotation of __init__ cannot be read (SyntaxError: "),
    (["method=padim", "method.foo=2"], "there is no setting method.foo; nearest: "),
    (["method=padim", "benchmark=mine"], "no setting method.featurs; nearest: method.features"),
    (["method=broken"], "a config cannot be read: while parsing a flow node"),
    (["method=latin"], "own/method/latin.yaml is not in UTF-8; save it as that"),
    (["backbone=wide"], "own/backbone/wide.yaml is not in UTF-8"),
    (["method=exits"], "(importing its module raises SystemExit: 3): mend the module"),
    (["method=typed", "method.size=[1,x]"], "method.size=[1, x]: x in it: input should be a valid integer"),
    (["method=typed", "method.colour=green"], "method.colour=green: input should be 'r' or 'b'"),
    (["strategy=mode", "replay.size=3", "replay.mode=z"], "replay.mode=z: input should be 'a' or 'b'"),
    (["strategy=mode", "replay.size=3", "replay.mod=a"], "no setting replay.mod; nearest: replay.mode"),
    (
        ["strategy=replay", "replay.size=3", "replay.mode=a"],
        "replay.mode is a setting of mode: give strategy=mode",
    ),
    (["method=misled"], "method.protocol.strategy=nativ, which strategy=auto stands for: "),
    (["sweep=mapping"], "hydra.sweeper.grids={'method': 'cfa,padim'} is no list of grids"),
    (["sweep=misspelt"], "no setting hydra.sweeper.grid; nearest: hydra.sweeper.grids"),
    (["method=listed"], "In 'method/listed': ConfigTypeError raised while composing config: Cannot merge"),
    (["sweep=lists"], "method: ['cfa', 'padim'] in a grid is no choice"),
    (
        ["sweep=headless"],
        "sweep=headless: what its file says would be in the node sweep; begin the file with",
    ),
    (["benchmark=headless"], "benchmark=headless: what its file says would be in the node benchmark"),
    (["benchmark=renamed"], "benchmark=renamed: its file says benchmark: other; write benchmark: renamed"),
    (
        ["method=bare"],
        "method.protocol.strategy, which strategy.name refers to: the file of method=bare must",
    ),
    (["method=empty"], "the file of method=empty must have it"),
]


def refused(result: Any, said: str) -> None:
    (line,) = result.stderr.splitlines()
    assert result.returncode == 2 and line.startswith("error: ") and said in line, result.stderr
    assert "task 1" not in result.stdout


@pytest.mark.parametrize(("overrides", "said"), OWN_FOLDER, ids=[" ".join(given) for given, _ in OWN_FOLDER])
def test_what_is_wrong_in_a_user_s_own_folder(
    own: Path, train: Train, overrides: list[str], said: str
) -> None:
    """All the other files of the folder are wrong too, and none of them is blamed."""
    refused(train(f"--config-dir={own}", *overrides), said)


COMMAND_LINE = [
    (["seed=range(0,3,0)"], "seed=range(0,3,0) cannot be listed (range() arg 3 must not be zero)"),
    (["benchmark=demo/cfa"], "benchmark=demo/cfa: what its file says would be in the node benchmark"),
    (
        ["hydra.launcher.n_jobs=two", "hydra/launcher=local"],
        "hydra.launcher.n_jobs=two: give a number of runs at a time",
    ),
    (
        ["hydra.launcher.n_jobs=2"],
        "hydra.launcher.n_jobs is a setting of joblib, local: give hydra/launcher=",
    ),
    (["hydra.sweeper.grids=[]"], "no setting hydra.sweeper.grids; nearest: hydra.sweeper.params"),
    (["seed=${nope}"], "there is no setting nope, which seed refers to: give another value"),
    (["outputs=${nope}"], "there is no setting nope, which outputs refers to"),
    (["seed=${method.nope}"], "the file of method=patchcore must have it"),
    (["seed=${oc.env:NOT_SET_BY_ANYBODY}"], "seed: KeyError raised while resolving interpolation: "),
    (["method="], "method= does not exist; there are: anomalydino, cadic, cfa"),
    (["maps=all"], "maps=all: input should be a valid boolean, or 'few'"),
    (["experiment=2024"], "experiment=2024: input should be a valid string; "),
    (["experiment=2024"], "quoted, for the shell too: experiment=\"'2024'\""),
    (
        ["dataset.categories=[brick,1e3]"],
        "dataset.categories=[brick, 1000.0]: 1000.0 in it: input should be a va",
    ),
    (["dataset.categories=[brick,null]"], "dataset.categories=[brick, null]: null in it: "),
    (["task_order.tasks=[[brick,2],cloth]"], "task_order.tasks=[[brick, 2], cloth]: 2 in it: "),
    (["experiment='a\nb'"], "experiment=a\\nb: it names a folder"),
    (["a\nb=1"], "there is no setting a\\nb; "),
]


@pytest.mark.parametrize(("overrides", "said"), COMMAND_LINE, ids=lambda value: str(value)[:40])
def test_what_is_wrong_on_the_command_line(train: Train, overrides: list[str], said: str) -> None:
    refused(train(*overrides), said)


def test_what_is_said_to_be_quoted_is_taken(train: Train) -> None:
    """The words that the shell leaves of `experiment="'2024'"`."""
    result = train("experiment='2024'", "task_order.tasks=[brick,'1e3']", "dry_run=true")
    assert result.returncode == 0, result.stderr


def test_a_category_with_a_line_feed_is_named_in_one_line(train: Train) -> None:
    result = train("dataset.categories=['a\nb']")
    (line,) = result.stderr.splitlines()
    assert result.returncode == 1 and "has no category 'a\\nb'" in line


FLAGS = [
    (["-m", "--cfg", "job"], "--multirun and --cfg exclude one another"),
    (["--info", "config", "-m"], "--multirun and --info exclude one another"),
    (["--multirun", "--run"], "--run and --multirun exclude one another"),
    (["--resolve"], "--resolve says what --cfg prints: give --cfg job too"),
    (["-p", "method"], "--package says what --cfg prints"),
    (["-sc"], "-sc: give one of install, uninstall or query"),
    (["-sc", "foo"], "-sc foo: give one of install, uninstall or query"),
    (["-sc", "install=nosh"], "-sc install=bash, fish or zsh"),
    (["-sc", "query=bash"], "-sc query=bash is what a shell asks, with COMP_LINE set"),
    (
        ["--experimental-rerun", "/nonexistent"],
        "--experimental-rerun /nonexistent is not for clbench: repeat",
    ),
    (["--config-path", "X"], "--config-path X is not for clbench: put configs of your own into a folder"),
    (["-cp", "conf"], "--config-path conf is not for clbench"),
    (["-cn", "method/padim"], "--config-name method/padim is not for clbench"),
]


@pytest.mark.parametrize(("words", "said"), FLAGS, ids=[" ".join(words) for words, _ in FLAGS])
def test_flags_that_exclude_one_another_or_ask_for_what_is_not_done(
    monkeypatch: pytest.MonkeyPatch, words: list[str], said: str
) -> None:
    from clbench.commands.run import main

    monkeypatch.chdir(ROOT)
    monkeypatch.delenv("COMP_LINE", raising=False)
    refused(within(main, words), said)


def test_hydra_s_own_help_is_there_whatever_else_is_given(train: Train) -> None:
    result = train("--hydra-help")
    assert result.returncode == 0 and "== Flags ==" in result.stdout, result.stderr


def test_lists_that_cannot_be_listed_or_would_never_end() -> None:
    parse = OverridesParser.create().parse_override
    assert combinations([parse("a=range(0,6,3)"), parse("b=x,y")]) == [
        ["a=0", "b=x"],
        ["a=0", "b=y"],
        ["a=3", "b=x"],
        ["a=3", "b=y"],
    ]
    for text, said in (
        ("a=range(0,3,0)", "cannot be listed (range() arg 3"),
        ("a=range(0,3,0.0)", "cannot be listed (Invalid range values"),
        ("a=range(0,nan)", "cannot be listed"),
        ("a=range(0,1e400)", "a=range(0,1e400) has more than 100000 values"),
        ("a=shuffle(range(0,3,0))", "cannot be listed"),
    ):
        with pytest.raises(UserError, match="a=.*") as error:
            combinations([parse(text)])
        assert said in str(error.value)
    with pytest.raises(UserError, match="400 values of a, 400 values of b are more than 100000 runs"):
        combinations([parse("a=range(0,400)"), parse("b=range(0,400)")])


def test_values_arrive_as_what_annotations_say_and_configs_keep_plain_data(
    own: Path, train: Train, tmp_path: Path
) -> None:
    given = ("size=[3,4]", f"place={tmp_path}", "colour=b", "names=[p,q]", "features=4")
    result = train(
        f"--config-dir={own}",
        "method=typed",
        "task_order.tasks=[brick]",
        *(f"method.{text}" for text in given),
    )
    assert result.returncode == 0, result.stderr
    (directory,) = run_directories(tmp_path)
    stored = yaml.safe_load((directory / "config.yaml").read_text())["method"]
    assert (stored["size"], stored["place"], stored["colour"]) == ([3, 4], str(tmp_path), "b")
    assert stored["names"] == ["p", "q"]

    from own_classes_of_a_test import Colour

    from clbench.loading import load

    detector: Any = load(directory).detector
    assert detector.given == ((3, 4), tmp_path, Colour.blue, {"p", "q"})


class _Anything:
    def __init__(
        self,
        tensor: "_Opaque | None" = None,
        pair: tuple[int, str] = (1, "a"),
        table: dict[int, float] | None = None,
        share: Annotated[float, Field(lt=1)] = 0.5,
        free=None,  # type: ignore[no-untyped-def]
    ):
        pass


class _Opaque:
    """A class of which pydantic knows nothing."""


class _Faulty:
    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: Any) -> Any:
        raise RuntimeError("no schema")


def test_every_annotation_can_be_checked_and_says_in_one_line_what_it_refuses() -> None:
    known = constructor(_Anything)
    settings = {"tensor": None, "pair": [2, "b"], "table": {3: 1}, "share": 0, "free": {"x": [1]}, "more": 1}
    assert arguments(_Anything, settings) == {**settings, "pair": (2, "b")}
    assert isinstance(arguments(_Anything, {"share": 0})["share"], float)
    assert arguments(_Anything, {"share": 2.0})["share"] == 2.0  # a check that does not pass on this machine
    for name, value, said in (
        ("tensor", 1, "tensor=1: a config cannot hold what its annotation asks for; leave it out"),
        ("pair", [1], "pair=[1]: "),
        ("pair", ["1", "a"], "pair=[1, a]: 1 in it: input should be a valid integer"),
        ("table", {"x": 1.0}, "table.x=1.0: input should be a valid integer"),
        ("share", float("inf"), "share=inf: give a finite number"),
        ("share", True, "share=true: input should be a valid number"),
    ):
        with pytest.raises(UserError) as error:
            check_value(name, value, known[name])
        assert said in str(error.value) and "\n" not in str(error.value)
    faulty = Argument(_Faulty, _Faulty, False, known["pair"].kind)
    with pytest.raises(UserError, match="x=1 cannot be held against its annotation .*no schema"):
        check_value("x", 1, faulty)


class _NoSize(Strategy):
    has_buffer = True


class _NoSeed(Strategy):
    def __init__(self, detector: Any, *, weight: float = 1.0):
        super().__init__(detector)


class _NoDetector(Strategy):
    def __init__(self, *, seed: int = 0):
        pass


class _Named(Strategy):
    def __init__(self, *, detector: Any, seed: int = 0):
        super().__init__(detector, seed=seed)


class _Positional(Strategy):
    def __init__(self, detector: Any, weight: float = 1.0, /, *, seed: int = 0):
        super().__init__(detector, seed=seed)


class _NoBuffer(Strategy):
    def __init__(self, detector: Any, *, replay_size: int, seed: int = 0):
        super().__init__(detector, seed=seed)


class _Fine(Strategy):
    def __init__(self, detector: Any, /, *, weight: float = 1.0, **settings: Any):
        super().__init__(detector, **settings)


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        (_NoSize, "takes no replay_size"),
        (_NoSeed, "takes no seed"),
        (_NoDetector, "takes no detector"),
        (_Named, "takes no detector"),
        (_Positional, "weight of __init__ is given by its name"),
        (_NoBuffer, "asks for replay_size: say has_buffer = True"),
    ],
)
def test_a_constructor_that_no_run_could_call_is_refused(kind: type, said: str) -> None:
    with pytest.raises(UserError, match=f"strategy._target_=test_messages.{kind.__name__}: .*{said}"):
        check_constructor("strategy", kind)
    check_constructor("strategy", _Fine)


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (NotImplementedError(), "NotImplementedError"),
        (StopIteration(), "StopIteration"),
        (AssertionError(), "AssertionError"),
        (RuntimeError("two\n lines"), "RuntimeError: two lines"),
    ],
)
def test_an_exception_without_text_is_named(error: Exception, said: str) -> None:
    assert described(error) == said


def test_a_report_of_a_folder_without_runs_names_the_experiments_in_it(train: Train, tmp_path: Path) -> None:
    assert train("method=padim", "method.features=4", "task_order.tasks=[brick]").returncode == 0
    outputs = tmp_path / "outputs"
    (outputs / "conf").mkdir()
    (outputs / "conf" / "config.yaml").write_text("seed: 0\n")
    for folder, named in (
        (outputs, outputs / "default"),
        (ROOT, "give "),
        (tmp_path, "give outputs/EXPERIMENT"),
    ):
        result = clbench("report", str(folder))
        (line,) = result.stderr.splitlines()
        assert result.returncode == 1 and "holds no runs: give " in line and str(named) in line
        assert not (folder / "report").exists()
    assert clbench("report", str(outputs / "default")).returncode == 0


@pytest.mark.parametrize("images", ["/nowhere", str(ROOT / "conf"), str(ROOT / "README.md")])
def test_distilling_looks_for_its_images_before_it_downloads(tmp_path: Path, images: str) -> None:
    """The backbone is one that nobody has: its error would come second."""
    result = clbench(
        *("distil", "--backbone", "no_such_network", "--images", images, "--device", "cpu"),
        *("--output", str(tmp_path / "t.safetensors")),
    )
    assert result.returncode == 1 and f"--images={images}" in result.stderr and "network" not in result.stderr
