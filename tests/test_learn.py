"""clbench learn: a finished run that goes on, against the run that had all tasks from the beginning."""

import json
import os
import shutil
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from conftest import Train, clbench, run_directories
from pretend_runs import METHODS, TOKENS, around
from processes import CONTEXT
from test_pretend_device import USUAL

from clbench import assembly, learning
from clbench.config.using import for_use
from clbench.errors import UserError
from clbench.recording.metrics_file import MetricRow, rows_of
from clbench.recording.run_directory import RunDirectory

long = pytest.mark.long
PAIRS = [("patchcore", "native"), ("stfpm", "replay"), ("padim", "single")]
LONG = [
    *((method, usual) for method, usual in USUAL.items() if (method, usual) not in PAIRS),
    *(
        ("stfpm", strategy)
        for strategy in ("finetune", "single", "ewc", "si", "mas", "agem", "lwf", "der", "derpp")
    ),
    *(("patchcore", strategy) for strategy in ("finetune", "replay", "single")),
]


def settings(method: str, strategy: str) -> list[str]:
    found = [f"method={method}", f"strategy={strategy}", *METHODS[method]]
    if method in TOKENS:
        found += ["backbone.arguments={embed_dim:32,depth:3,num_heads:2}"]
    found += ["strategy.weight=0.0001"] if strategy == "mas" else []  # its outputs are large
    return found + (["replay.size=4"] if strategy in ("replay", "agem", "der", "derpp") else [])


def rows(directory: Path) -> list[MetricRow]:
    return list(rows_of((directory / "metrics.csv").read_text(encoding="utf-8")))


def learn(*words: object) -> str:
    """What the command prints, which succeeds."""
    found = clbench("learn", *map(str, words))
    assert found.returncode == 0, found.stderr
    return found.stdout


@pytest.fixture
def parent(train: Train, tmp_path: Path) -> Callable[..., Path]:
    """A finished run of two tasks, brick and cloth."""

    def build(*words: str) -> Path:
        assert train("task_order.tasks=[brick,cloth]", "experiment=two", *words).returncode == 0
        (found,) = run_directories(tmp_path, "two")
        return found

    return build


@pytest.mark.parametrize(
    ("method", "strategy"), [*PAIRS, *(pytest.param(*pair, marks=long) for pair in LONG)]
)
def test_two_tasks_and_one_later_are_three_tasks(
    method: str, strategy: str, folder: Path, train: Train, parent: Callable[..., Path], tmp_path: Path
) -> None:
    own = settings(method, strategy)
    assert train("task_order.tasks=[brick,cloth,plate]", "experiment=three", *own).returncode == 0
    (whole,) = run_directories(tmp_path, "three")
    before = parent(*own)
    untouched = {path: path.read_bytes() for path in before.rglob("*") if path.is_file()}
    learn(before, folder / "plate", "--output", tmp_path / "child")
    assert (tmp_path / "child/metrics.csv").read_bytes() == (whole / "metrics.csv").read_bytes()
    assert (tmp_path / "child/thresholds.json").read_bytes() == (whole / "thresholds.json").read_bytes()
    assert {path: path.read_bytes() for path in before.rglob("*") if path.is_file()} == untouched
    learn(before, folder / "plate", "--output", tmp_path / "alone", "--without-images")
    expected = [row for row in rows(whole) if row.stage < 2 or row.task == "plate" or strategy == "single"]
    assert rows(tmp_path / "alone") == expected


def _killed(words: Sequence[str], path: list[str], steps: int) -> None:
    from clbench import training
    from clbench.cli import main

    sys.path[:] = path
    taken = 0

    def step(before: Callable[..., None], *given: object) -> None:
        nonlocal taken
        before(*given)
        taken += 1
        if taken == steps:
            os.kill(os.getpid(), signal.SIGKILL)

    around(training.Descent, "_step", step)
    main(list(words))


def test_a_killed_one_goes_on(
    folder: Path, train: Train, parent: Callable[..., Path], tmp_path: Path
) -> None:
    own = [*settings("stfpm", "replay"), "checkpoint_s=0"]
    before = parent(*own)
    words = ["learn", str(before), str(folder / "plate"), "--output", str(tmp_path / "child")]
    process = CONTEXT.Process(target=_killed, args=(words, list(sys.path), 3))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert "continuing in stage 3 of 3" in learn(*words[1:])
    learn(before, folder / "plate", "--output", tmp_path / "undisturbed")
    assert rows(tmp_path / "child") == rows(tmp_path / "undisturbed")
    assert "continuing" not in learn(*words[1:])  # it is finished


def test_a_product_of_normal_images_alone_is_learned_and_used(
    folder: Path, parent: Callable[..., Path], tmp_path: Path
) -> None:
    before = parent(*settings("patchcore", "native"))
    product = tmp_path / "lids"
    shutil.copytree(folder / "plate/train/good", product)
    printed = learn(before, product, "--name", "lid")
    child = Path(printed.rpartition("the run that goes on: ")[2].strip())
    assert child.parent == before.parent and child.name.endswith("+lid")
    summary = json.loads((child / "summary.json").read_text(encoding="utf-8"))
    assert summary["tasks"] == ["brick", "cloth", "lid"] and summary["parent"] == str(before)
    assert {row.task for row in rows(child) if row.stage == 2} == {"brick", "cloth"}
    config = for_use(RunDirectory(child).config() or {}, {}, {})
    without = learning._without_images(config, summary, there=[])
    assert set(without.dataset.absent) == {"brick", "cloth", "lid"}
    for known in (config, without):  # lid, which never had test images, is found again too
        found_again = learning._without_images(known, summary)
        assert not found_again.dataset.absent
        assert set(assembly.build_dataset(found_again).categories) >= {"brick", "cloth", "lid"}
    again = tmp_path / "grown"
    learn(child, folder / "plate", "--output", again)  # a product more, after that
    assert {row.stage for row in rows(again) if row.task == "plate"} == {3}
    found = clbench("predict", str(again), str(folder / "plate/test"), "--output", str(tmp_path / "found"))
    assert found.returncode == 0, found.stderr


def test_what_cannot_go_on_says_why(
    folder: Path, train: Train, parent: Callable[..., Path], tmp_path: Path
) -> None:
    before = parent(*settings("patchcore", "native"))
    assert (
        train("method=patchcore", "strategy=joint", "experiment=joint", "method.memory_size=60").returncode
        == 0
    )
    (joint,) = run_directories(tmp_path, "joint")
    empty, odd = tmp_path / "empty", tmp_path / "odd"
    (empty / "train/good").mkdir(parents=True)
    shutil.copytree(folder / "plate", odd)
    for image in (odd / "ground_truth/blot").iterdir():
        image.unlink()
    unfinished = tmp_path / "unfinished"
    shutil.copytree(before, unfinished)
    (unfinished / "summary.json").write_text(
        json.dumps({**json.loads((before / "summary.json").read_text(encoding="utf-8")), "status": "running"})
    )
    other = tmp_path / "other"
    shutil.copytree(before, other)
    text = (other / "config.yaml").read_text(encoding="utf-8")
    (other / "config.yaml").write_text(text.replace("clbench: ", "clbench: 0.0.1 #"), encoding="utf-8")
    plate, mine = folder / "plate", tmp_path / "mine"
    (mine / "maps").mkdir(parents=True)
    (mine / "maps/precious").touch()
    learn(before, plate, "--output", tmp_path / "child")
    lock = before / "run.lock"
    untouched = lock.read_bytes(), lock.stat().st_mtime_ns
    refused = [
        ((before, folder / "brick"), "has learned 'brick' already"),
        ((before, tmp_path / "nowhere"), "is no folder"),
        ((before, empty), "has no images"),
        ((before, odd), "has no mask"),
        ((before, plate, "--name", "mean"), "has a name that results need"),
        ((joint, plate), "has learned all products at once"),
        ((unfinished, plate), "is not complete (status: running)"),
        ((other, plate), "was made by clbench 0.0.1"),
        ((tmp_path, plate), "holds no run that can go on"),
        ((before, plate, "--output", joint), "holds a run already"),
        ((before, plate, "--output", before), "holds a run already"),
        ((before, plate, "--output", mine), "holds other files"),
        ((before, plate, "--output", tmp_path / "child", "--name", "lid"), "give another --output"),
    ]
    for words, said in refused:
        found = clbench("learn", *map(str, words))
        assert found.returncode == 1 and said in found.stderr and found.stderr.count("\n") == 1, found.stderr
    kept = (folder / "brick/train/good/000.png").read_bytes()
    shutil.copyfile(folder / "brick/train/good/001.png", folder / "brick/train/good/000.png")
    found = clbench("learn", str(before), str(plate), "--output", str(tmp_path / "changed"))
    (folder / "brick/train/good/000.png").write_bytes(kept)
    assert "training images of 'brick' changed" in found.stderr and "--without-images" in found.stderr
    linked = tmp_path / "linked"
    linked.symlink_to(before)  # the same run by another name
    assert "the run that goes on" in learn(linked, plate, "--output", tmp_path / "child")
    assert (mine / "maps/precious").exists() and len(list(mine.iterdir())) == 1
    assert (lock.read_bytes(), lock.stat().st_mtime_ns) == untouched
    (before / "metrics.csv").write_text(
        (before / "metrics.csv").read_text(encoding="utf-8") + "\n", encoding="utf-8"
    )
    summary = json.loads((before / "summary.json").read_text(encoding="utf-8"))
    del summary["metrics_sha256"]
    (before / "summary.json").write_text(json.dumps(summary), encoding="utf-8")
    found = clbench("learn", str(before), str(plate), "--output", str(tmp_path / "child"))
    assert "has changed since" in found.stderr


@pytest.mark.parametrize(
    "own",
    [
        [*settings("padim", "native"), "method.update=per_task"],
        settings("padim", "single"),
        pytest.param(settings("patchcore", "native"), marks=long),
        pytest.param(settings("ucad", "native"), marks=long),
        pytest.param(settings("dinosaur", "native"), marks=long),
    ],
    ids=lambda own: "-".join(own[:2]),
)
def test_a_forgotten_task_leaves_the_others_as_they_are(
    own: list[str], folder: Path, train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for order, experiment in (("brick,cloth,plate", "three"), ("brick,plate", "never")):
        assert train(f"task_order.tasks=[{order}]", f"experiment={experiment}", *own).returncode == 0
    (whole,), (never,) = run_directories(tmp_path, "three"), run_directories(tmp_path, "never")
    untouched = {path: path.read_bytes() for path in whole.rglob("*") if path.is_file()}
    found = clbench("forget", str(whole), "cloth", "--output", str(tmp_path / "forgot"))
    assert found.returncode == 0, found.stderr
    assert {path: path.read_bytes() for path in whole.rglob("*") if path.is_file()} == untouched
    about = json.loads((tmp_path / "forgot/summary.json").read_text(encoding="utf-8"))
    assert about["tasks"] == ["brick", "plate"]
    last = [row for row in rows(tmp_path / "forgot") if row.stage == 1]
    assert {row.task for row in last} == {"brick", "plate"}
    if own[0] == "method=padim":  # whose models are of their tasks' images alone
        assert last == [row for row in rows(never) if row.stage == 1]
        thresholds = [
            json.loads((path / "thresholds.json").read_text()) for path in (tmp_path / "forgot", never)
        ]
        assert thresholds[0] == thresholds[1]
    again = clbench(
        "learn", str(tmp_path / "forgot"), str(folder / "cloth"), "--output", str(tmp_path / "again")
    )
    assert again.returncode == 0, again.stderr  # it may come back
    monkeypatch.setattr(learning, "_there", lambda *_: [])
    with pytest.raises(UserError, match=r"\(brick, plate\) there are no images to set thresholds on"):
        learning.forget(whole, "cloth", output=tmp_path / "nothing left")


def test_what_cannot_be_forgotten_says_why(parent: Callable[..., Path], tmp_path: Path) -> None:
    one_model = parent(*settings("stfpm", "replay"))
    for words, said in (
        ((one_model, "brick"), "no part of it is of one task alone"),
        ((one_model, "lid"), "has no task 'lid'"),
        ((tmp_path, "lid"), "holds no run that can go on"),
    ):
        found = clbench("forget", *map(str, words))
        assert found.returncode == 1 and said in found.stderr and found.stderr.count("\n") == 1, found.stderr
    assert not list(one_model.parent.glob("*-brick/summary.json"))
