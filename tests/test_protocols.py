"""The field's protocols, and orders by the results of a finished run: which categories are learned when, and evaluated."""

import csv
import json
import shutil
from itertools import chain
from pathlib import Path

import cv2
import numpy as np
import pytest
import yaml
from conftest import Train, run_directories

from clbench import assembly, load
from clbench.commands.run import main
from clbench.config import Config, check, composed
from clbench.config.by_results import order_changed, tasks_by_results, with_order
from clbench.config.schema import TaskOrder
from clbench.config.words import readable
from clbench.data import stream
from clbench.data.protocols import protocol_of, protocols
from clbench.data.samples import Dataset
from clbench.data.visa import SPLIT
from clbench.errors import UserError
from clbench.recording.run_directory import RunDirectory
from clbench.report.settings import read_departures
from clbench.results import Results

MVTEC = (
    *("bottle", "cable", "capsule", "carpet", "grid", "hazelnut", "leather", "metal_nut", "pill", "screw", "tile"),
    *("toothbrush", "transistor", "wood", "zipper"),
)  # fmt: skip
VISA = (
    *("candle", "capsules", "cashew", "chewinggum", "fryum", "macaroni1", "macaroni2", "pcb1", "pcb2", "pcb3", "pcb4"),
    "pipe_fryum",
)  # fmt: skip
# What each task learns, as the authors' lists have it.
LISTS = {
    "mvtec_1x15": [
        ["bottle"], ["cable"], ["capsule"], ["carpet"], ["grid"], ["hazelnut"], ["leather"], ["metal_nut"], ["pill"],
        ["screw"], ["tile"], ["toothbrush"], ["transistor"], ["wood"], ["zipper"],
    ],
    "mvtec_14_1": [
        ["bottle", "cable", "capsule", "carpet", "grid", "hazelnut", "leather", "metal_nut", "pill", "screw", "tile",
         "toothbrush", "transistor", "wood"],
        ["zipper"],
    ],
    "mvtec_10_5": [
        ["bottle", "cable", "capsule", "carpet", "grid", "hazelnut", "leather", "metal_nut", "pill", "screw"],
        ["tile", "toothbrush", "transistor", "wood", "zipper"],
    ],
    "mvtec_3x5": [
        ["bottle", "cable", "capsule"], ["carpet", "grid", "hazelnut"], ["leather", "metal_nut", "pill"],
        ["screw", "tile", "toothbrush"], ["transistor", "wood", "zipper"],
    ],
    "mvtec_10_1": [
        ["bottle", "cable", "capsule", "carpet", "grid", "hazelnut", "leather", "metal_nut", "pill", "screw"],
        ["tile"], ["toothbrush"], ["transistor"], ["wood"], ["zipper"],
    ],
    "visa_1x12": [
        ["candle"], ["capsules"], ["cashew"], ["chewinggum"], ["fryum"], ["macaroni1"], ["macaroni2"], ["pcb1"],
        ["pcb2"], ["pcb3"], ["pcb4"], ["pipe_fryum"],
    ],
    "visa_11_1": [
        ["candle", "capsules", "cashew", "chewinggum", "fryum", "macaroni1", "macaroni2", "pcb1", "pcb2", "pcb3",
         "pcb4"],
        ["pipe_fryum"],
    ],
    "visa_8_4": [
        ["candle", "capsules", "cashew", "chewinggum", "fryum", "macaroni1", "macaroni2", "pcb1"],
        ["pcb2", "pcb3", "pcb4", "pipe_fryum"],
    ],
    "visa_8_1": [
        ["candle", "capsules", "cashew", "chewinggum", "fryum", "macaroni1", "macaroni2", "pcb1"],
        ["pcb2"], ["pcb3"], ["pcb4"], ["pipe_fryum"],
    ],
}  # fmt: skip
TRAIN, SIDE = 2, 32  # training images of a category, pixels
SMALL = (f"dataset.resize={SIDE}", "dataset.crop=null")


@pytest.fixture(scope="module")
def roots(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """MVTec AD and VisA in miniature: all their categories, in the layouts and with the file names that they come in."""
    mvtec, visa = (tmp_path_factory.mktemp(name) for name in ("mvtec", "visa"))
    random = np.random.default_rng(0)

    def image(path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        assert cv2.imwrite(str(path), random.integers(0, 255, (SIDE, SIDE, 3), dtype=np.uint8))

    def mask(path: Path, value: int) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = np.zeros((SIDE, SIDE), np.uint8)
        pixels[4:12, 4:12] = value
        assert cv2.imwrite(str(path), pixels)

    for name in MVTEC:
        for number in range(TRAIN):
            image(mvtec / name / f"train/good/{number:03}.png")
        image(mvtec / name / "test/good/000.png")
        image(mvtec / name / "test/broken/000.png")
        mask(mvtec / name / "ground_truth/broken/000_mask.png", 255)
    rows = [("object", "split", "label", "image", "mask")]
    for name in VISA:
        data = f"{name}/Data"
        for number in range(TRAIN + 1):
            image(visa / data / f"Images/Normal/{number:04}.JPG")
            split = "train" if number else "test"
            rows.append((name, split, "normal", f"{data}/Images/Normal/{number:04}.JPG", ""))
        image(visa / data / "Images/Anomaly/000.JPG")
        mask(visa / data / "Masks/Anomaly/000.png", 1)
        rows.append(
            (name, "test", "anomaly", f"{data}/Images/Anomaly/000.JPG", f"{data}/Masks/Anomaly/000.png")
        )
    (visa / SPLIT).parent.mkdir()
    with open(visa / SPLIT, "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows(rows)
    return {"mvtec": mvtec, "visa": visa, "cache": tmp_path_factory.mktemp("cache")}


def config_of(task_order: str, root: Path, *overrides: str, dataset: str = "mvtec") -> tuple[Config, Dataset]:
    """The checked config of an order of tasks on a dataset, and that dataset."""
    given = (
        f"task_order={task_order}",
        f"dataset={dataset}",
        f"dataset.root={root}",
        "method=padim",
        "cache=c",
    )
    config = check(composed("benchmark=paper", "backbone=small", *given, *SMALL, *overrides))
    return config, assembly.build_dataset(config)


@pytest.mark.parametrize("name", LISTS)
def test_a_protocol_learns_and_evaluates_what_the_authors_lists_have(
    name: str, roots: dict[str, Path]
) -> None:
    config, dataset = config_of(name, roots[name.split("_")[0]], dataset=name.split("_")[0])
    groups = stream.order(dataset, config.task_order.kind, config.task_order.tasks, config.seed)
    assert groups == LISTS[name]
    assert sorted(chain(*groups)) == list(MVTEC if name.startswith("mvtec") else VISA)
    tasks = stream.load_tasks(dataset, groups, config.dataset.geometry(), roots["cache"], lambda *_: None)
    assert [len(task.train) for task in tasks] == [TRAIN * len(group) for group in LISTS[name]]
    results = Results(groups, [[task] for task in range(len(tasks))])
    seen: list[str] = []
    for stage, task in enumerate(tasks):  # all test images of all categories so far
        assert [category.name for category in task.categories] == LISTS[name][stage]
        assert [len(category.test) for category in task.categories] == [2] * len(task.categories)
        seen += LISTS[name][stage]
        assert [results.categories[index] for index in results.seen(stage)] == seen


def test_protocols_are_known_by_dataset_and_tasks_however_these_were_asked_for() -> None:
    assert protocols().keys() == {*LISTS, "paper"}
    for name, tasks in LISTS.items():
        dataset = name.split("_")[0]
        joined = ["+".join(reversed(task)) for task in tasks]
        assert protocol_of(dataset, tasks) == protocol_of(dataset, joined) == name
        assert protocol_of("btad", tasks) is None and protocol_of(None, tasks) == name
        assert protocol_of(dataset, tasks[::-1]) is None and protocol_of(dataset, tasks[:-1]) is None
    assert (
        protocol_of("mvtec", check(composed("benchmark=paper", "dataset.root=x")).task_order.tasks) == "paper"
    )
    assert protocol_of("mvtec", sorted(MVTEC)) == "mvtec_1x15"  # as task_order=alphabetical has it


def test_categories_that_a_protocol_lacks_are_all_named_with_the_protocol(
    roots: dict[str, Path], tmp_path: Path
) -> None:
    (tmp_path / "part").mkdir()
    for name in MVTEC[:11]:
        (tmp_path / "part" / name).symlink_to(roots["mvtec"] / name)
    for name, dataset, root, missing in (
        ("mvtec_10_5", "mvtec", tmp_path / "part", "'toothbrush', 'transistor', 'wood', 'zipper', which"),
        ("paper", "visa", roots["visa"], "'hazelnut', 'bottle', 'cable', 'capsule', 'metal_nut', 'pill', "),
        ("visa_8_1", "mvtec", roots["mvtec"], "'candle', 'capsules', 'cashew', 'chewinggum', 'fryum', "),
    ):
        config, found = config_of(name, root, dataset=dataset)
        with pytest.raises(UserError) as refused:
            assembly.reader(config, found)
        assert str(refused.value).startswith(f"the protocol task_order={name} has {missing}")
        assert f"which dataset={dataset} does not have; found: {', '.join(found.categories)}" in str(
            refused.value
        )


@pytest.mark.parametrize("name", ["mvtec_10_1", "visa_8_4"])
def test_a_run_goes_through_a_protocol(
    name: str, roots: dict[str, Path], train: Train, tmp_path: Path
) -> None:
    dataset = name.split("_")[0]
    given = (
        f"dataset={dataset}",
        f"dataset.root={roots[dataset]}",
        *SMALL,
        f"task_order={name}",
    )
    result = train(*given, "method=padim", "method.features=4", "strategy=finetune", "experiment=default")
    assert result.returncode == 0, result.stderr
    (directory,) = run_directories(tmp_path)
    summary = json.loads((directory / "summary.json").read_text())
    assert summary["status"] == "complete" and summary["categories"] == LISTS[name]
    assert protocol_of(summary["dataset"], summary["tasks"]) == name
    evaluated: dict[int, list[str]] = {}
    for row in csv.DictReader((directory / "metrics.csv").open()):
        if row["metric"] == "pixel_f1":
            evaluated.setdefault(int(row["stage"]), []).append(row["category"])
    assert evaluated == {stage: list(chain(*LISTS[name][: stage + 1])) for stage in range(len(LISTS[name]))}


# Orders by the results of a finished run.


def finished(
    path: Path,
    values: dict[str, float | None],
    dataset: str = "mvtec",
    strategy: str = "single",
    metric: str = "image_auroc",
) -> Path:
    """The directory of a finished run, whose results are worse before the last stage.

    Args:
        values: category -> a metric after the last stage; None where it is undefined.
    """
    directory = RunDirectory(path)
    directory.create()
    directory.write_config({}, {}, {})
    joint = strategy == "joint"
    names = list(values)
    rows = []
    for stage in [0] if joint else range(len(names)):
        last = joint or stage == len(names) - 1
        for task, name in enumerate(names if last else names[: stage + 1]):
            for measured, value in (("pixel_f1", 0.5), (metric, values[name] if last else 0.0)):
                rows.append((stage, task, name, name, measured, value))
    directory.write_metrics(rows)
    flags = {"joint": joint, "task_known": strategy == "single", "continual": strategy == "finetune"}
    about = {
        "tasks": names,
        "categories": [[name] for name in names],
        "strategy_flags": flags,
        "strategy": strategy,
    }
    more = {"status": "complete", "dataset": dataset, "metrics_sha256": directory.metrics_digest()}
    directory.write_summary({**about, **more, "final": {}, "memory": {}, "time": {}})
    return path


VALUES = {"brick": 0.8, "plate": 0.9, "cloth": 0.8}


def order_of(kind: str, run: Path, metric: str = "image_auroc", sizes: list[int] | None = None) -> TaskOrder:
    return TaskOrder(kind=kind, tasks=None, run=str(run), metric=metric, sizes=sizes)  # type: ignore[arg-type]


def test_categories_come_by_a_run_s_last_results_and_then_by_name(tmp_path: Path) -> None:
    for strategy in ("single", "joint"):
        run = finished(tmp_path / strategy, VALUES, strategy=strategy)
        for kind, metric, sizes, tasks in (
            ("easy_to_hard", "image_auroc", None, ["plate", "brick", "cloth"]),
            ("hard_to_easy", "image_auroc", None, ["brick", "cloth", "plate"]),
            ("easy_to_hard", "pixel_f1", None, ["brick", "cloth", "plate"]),  # all alike
            ("hard_to_easy", "image_auroc", [1, 2], [["brick"], ["cloth", "plate"]]),
        ):
            assert tasks_by_results(order_of(kind, run, metric, sizes), "mvtec") == tasks
    rates = finished(tmp_path / "rates", VALUES, metric="image_fpr")  # of which a low one is good
    assert tasks_by_results(order_of("easy_to_hard", rates, "image_fpr"), "mvtec")[-1] == "plate"


def damage(run: Path) -> None:
    (run / "metrics.csv").write_text((run / "metrics.csv").read_text().replace("0.9", "0.1"))


def unfinish(run: Path) -> None:
    (run / "summary.json").write_text((run / "summary.json").read_text().replace('"complete"', '"running"'))


def test_a_run_that_can_give_no_order_is_refused_with_the_reason(tmp_path: Path) -> None:
    run = finished(tmp_path / "run", VALUES)
    broken = {change: shutil.copytree(run, tmp_path / change.__name__) for change in (damage, unfinish)}
    for change, copy in broken.items():
        change(copy)
    (tmp_path / "empty").mkdir()
    (tmp_path / "torn").mkdir()
    (tmp_path / "torn" / "summary.json").write_text("{")
    bent = finished(tmp_path / "bent", VALUES)
    (bent / "metrics.csv").write_text("stage,category\n")
    summary = json.loads((bent / "summary.json").read_text())
    digest = RunDirectory(bent).metrics_digest()
    (bent / "summary.json").write_text(json.dumps({**summary, "metrics_sha256": digest}))
    earlier = shutil.copytree(run, tmp_path / "earlier")
    (earlier / "summary.json").write_text(
        json.dumps({**summary, "strategy_flags": None, "metrics_sha256": None})
    )
    for path, given, reason in (
        (tmp_path / "gone", {}, "gone does not exist: give the directory of a finished run"),
        (tmp_path / "empty", {}, "empty is no directory of a run that has begun"),
        (tmp_path / "torn", {}, "torn is damaged (summary.json)"),
        (broken[unfinish], {}, "is not finished (running): repeat its command first"),
        (broken[damage], {}, "is damaged (metrics.csv is not as the run wrote it"),
        (bent, {}, "is damaged (metrics.csv)"),
        (
            finished(tmp_path / "tuned", VALUES, strategy="finetune"),
            {},
            "strategy=finetune, whose results depend on",
        ),
        (finished(tmp_path / "btad", VALUES, dataset="btad"), {}, "is of dataset=btad, and this is mvtec"),
        (finished(tmp_path / "none", {**VALUES, "cloth": None}), {}, "image_auroc is undefined for cloth in"),
        (run, {"metric": "auroc"}, "metric=auroc was not measured in"),
        (run, {"sizes": [2, 2]}, "sizes=[2, 2] is of 4 categories"),
    ):
        with pytest.raises(UserError) as refused:
            tasks_by_results(order_of("easy_to_hard", path, **given), "mvtec")  # type: ignore[arg-type]
        assert reason in str(refused.value)


def test_a_run_of_other_categories_than_the_dataset_s_is_refused(folder: Path, tmp_path: Path) -> None:
    for values in ({**VALUES, "stone": 0.1}, {"brick": 0.1, "cloth": 0.2}):
        run = finished(tmp_path / str(len(values)), values)
        config, dataset = config_of("easy_to_hard", folder, f"task_order.run={run}")
        with pytest.raises(
            UserError, match=r"a run of other categories than dataset=mvtec has \((plate|stone)\)"
        ):
            assembly.reader(with_order(config, RunDirectory(tmp_path / "new")), dataset)


def test_settings_of_an_order_go_together(folder: Path) -> None:
    for words, reason in (
        (("easy_to_hard",), "task_order=easy_to_hard goes by the results of a finished run"),
        (
            ("easy_to_hard", "task_order.run=x", "task_order.tasks=[brick]"),
            "task_order.tasks=[brick] makes no sense",
        ),
        (("random", "task_order.run=x"), "there is no setting task_order.run"),
        (("easy_to_hard", "task_order.run=x", "task_order.sizes=[0]"), "task_order.sizes=[0]: 0 in it"),
    ):
        with pytest.raises(UserError) as refused:
            config_of(words[0], folder, *words[1:])
        assert reason in str(refused.value)
    assert readable("task_order.run=o/e/method=cfa,seed=1") == "task_order.run='o/e/method=cfa,seed=1'"
    assert readable("task_order.run='a=b','c=d'") == "task_order.run='a=b','c=d'"


def test_a_run_keeps_the_order_that_it_began_with(folder: Path, train: Train, tmp_path: Path) -> None:
    deciding = finished(tmp_path / "method=padim,seed=0", VALUES)
    given = ("method=padim", "method.features=4", "strategy=finetune", f"task_order.run={deciding}")
    assert "2 runs" in train("-m", *given, "task_order=easy_to_hard,alphabetical", "dry_run=true").stdout
    words = (*given, "task_order=easy_to_hard", "task_order.sizes=[1,2]")
    result = train(*words)
    assert result.returncode == 0, result.stderr
    (path,) = run_directories(tmp_path)
    directory, config = RunDirectory(path), Config.stored(yaml.safe_load((path / "config.yaml").read_text()))
    assert config.task_order.tasks == [["plate"], ["brick", "cloth"]]
    assert json.loads((path / "summary.json").read_text())["categories"] == config.task_order.tasks
    asked = config.changed("task_order", tasks=None)  # as the same command asks for it

    hidden = deciding.rename(tmp_path / "elsewhere")  # what decided is gone: the order is still known
    assert with_order(asked, directory).plain() == config.plain() and not order_changed(config)
    assert "finished already" in train(*words).stdout
    for other in (
        asked.changed("task_order", metric="image_ap"),
        Config.of({**asked.plain(), "overwrite": True}),
    ):
        with pytest.raises(UserError, match="does not exist"):
            with_order(other, directory)
    shutil.copytree(hidden, deciding)
    unfinish(deciding)  # it is there, but cannot say
    assert with_order(asked, directory).plain() == config.plain() and not order_changed(config)
    finished(deciding, {**VALUES, "cloth": 0.95})  # it says otherwise
    refused = train(*words)
    assert refused.returncode == 2 and "give another order by now" in refused.stderr
    with pytest.raises(UserError, match=r"task_order.tasks: .*'plate'.* -> .*'cloth'"):
        directory.finished(with_order(asked, directory).plain())
    shutil.rmtree(deciding)
    assert tuple(load(path).image_size) == (48, 48)


def test_a_report_compares_lists_of_tasks_and_not_how_they_came_about() -> None:
    usual = {"task_order.kind": "alphabetical", "task_order.tasks": None, "task_order.run": "absent"}
    common = {"method": {"name": "padim"}, "seed": 0, "departures": usual}
    for kind, tasks, apart in (
        ("listed", ["a", "b"], {}),
        ("easy_to_hard", ["a", "b"], {"task_order.kind": "easy_to_hard"}),
        ("random", None, {"task_order.kind": "random"}),
    ):
        order = {"kind": kind, "tasks": tasks, "run": "/x"}
        assert read_departures({**common, "task_order": order}).apart == apart


def test_the_order_study_is_four_kinds_of_order(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = finished(tmp_path / "a=b,c=d", VALUES)
    words = ["-m", "sweep=order_study", "method=padim", f"outputs={tmp_path}", f"cache={tmp_path}/cache"]
    words += ["dataset=mvtec", f"dataset.root={folder}"]
    assert main([*words, "dry_run=true", f"task_order.run={run}"]) == 0
    shown = capsys.readouterr().out
    assert "8 runs" in shown and all(
        kind in shown for kind in ("easy_to_hard", "hard_to_easy", "alphabetical")
    )
    assert main(words) == 2 and "give its directory, task_order.run=" in capsys.readouterr().err
