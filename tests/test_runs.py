"""Whole runs through the command line, as a user starts them."""

import csv
import json
import shutil
import signal
import subprocess
import time
from pathlib import Path
from random import Random

import pytest
import torch
import yaml
from conftest import ROOT, Train, command, run_directories
from conftest import clbench as clbench_command
from processes import kill_again_and_again

import clbench
from clbench.assembly import build_detector
from clbench.config import check, sources
from clbench.errors import UserError
from clbench.methods.efficientad import patch_description_network
from clbench.recording.run_directory import RunDirectory

METRICS = ["image_auroc", "image_ap", "image_f1", "pixel_auroc", "pixel_ap", "pixel_f1", "aupro"]


def rows(directory: Path) -> list[dict[str, str]]:
    with open(directory / "metrics.csv", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def summary(directory: Path) -> dict:
    return json.loads((directory / "summary.json").read_text())


def test_a_sweep_of_methods_and_replay_sizes(train: Train, tmp_path: Path) -> None:
    result = train("-m", "method=patchcore,padim", "replay.size=6,12")
    assert result.returncode == 0, result.stderr
    directories = run_directories(tmp_path)
    assert len(directories) == 4
    for directory in directories:
        about = summary(directory)
        assert about["status"] == "complete"
        assert about["strategy"] == "replay"
        assert f"method={about['method']}" in directory.name
        assert f"replay.size={about['replay_size']}" in directory.name
        assert set(about["final"]) == set(METRICS)
        assert about["energy"]["source"] and about["operations"]["inference_gflop_per_image"] > 0
        assert about["tasks"] == ["brick", "cloth", "plate"]
        assert about["memory"]["architecture_mb"] >= about["memory"]["executed_mb"] > 0
        stored = about["replay_size"] * 48 * 48 * 3 / 1e6
        assert about["memory"]["additional_mb"] > stored
        assert set(about["time"]) == {"train_s", "eval_s", "inference_ms_per_image"}
        table = rows(directory)
        assert list(table[0]) == ["stage", "task_index", "task", "category", "metric", "value"]
        assert len(table) == (1 + 2 + 3) * len(METRICS)
        made_by = yaml.safe_load((directory / "config.yaml").read_text())["made_by"]
        assert {"torch", "git_revision", "device"} <= set(made_by)
    assert len({(path / "metrics.csv").read_text() for path in directories}) == 4
    for run in ("method=patchcore, replay.size=12", "method=padim, replay.size=6"):
        assert run in result.stdout  # the table over the sweep, by what differs

    again = train("-m", "method=patchcore,padim", "replay.size=6,12")
    assert again.returncode == 0
    assert again.stdout.count("finished already, skipped") == 4
    assert "task 1/3" not in again.stdout


def test_every_strategy_with_both_methods(train: Train, tmp_path: Path) -> None:
    result = train("-m", "method=patchcore,padim", "strategy=native,single,finetune,joint")
    assert result.returncode == 0, result.stderr
    found = {(about["method"], about["strategy"]): about for about in map(summary, run_directories(tmp_path))}
    assert len(found) == 8
    assert all(about["status"] == "complete" for about in found.values())
    for (_, strategy), about in found.items():
        assert (about["average_forgetting_pct"] is None) == (strategy == "joint")
    for method in ("patchcore", "padim"):
        assert found[method, "single"]["average_forgetting_pct"] == 0
    single, native = found["padim", "single"], found["padim", "native"]
    assert single["memory"]["additional_mb"] == pytest.approx(3 * native["memory"]["additional_mb"], rel=1e-3)


TRAINED = ["cfa", "stfpm", "efficientad", "draem", "fastflow"]


@pytest.mark.long
def test_every_strategy_with_the_trained_methods(train: Train, tmp_path: Path) -> None:
    methods = f"method={','.join(TRAINED)}"
    small = ("method.epochs=1", "method.batch_size=2")
    narrow = ("method.reconstructive_width=4", "method.discriminative_width=4")  # DRAEM's, and no other's
    small += (*narrow, "method.texture_count=3", "method.penalty_count=3", "method.steps=2")
    small += ("task_order.tasks=[brick,cloth]",)
    result = train("-m", methods, "strategy=finetune,joint,single", *small)
    assert result.returncode == 0, result.stderr
    assert train("-m", methods, "replay.size=6", *small).returncode == 0
    assert train("method=cfa", "strategy=native", *small[:2]).returncode == 0
    for method in TRAINED[1:]:
        refused = train(f"method={method}", "strategy=native", *small[:2])
        assert refused.returncode == 2 and f"strategy=native with method={method}" in refused.stderr
    found = {(about["method"], about["strategy"]): about for about in map(summary, run_directories(tmp_path))}
    assert len(found) == 4 * len(TRAINED) + 1
    buffer = 6 * 48 * 48 * 3 / 1e6
    for (method, strategy), about in found.items():
        assert about["status"] == "complete"
        assert (about["average_forgetting_pct"] is None) == (strategy == "joint")
        kept = about["memory"]["additional_mb"] - found[method, "finetune"]["memory"]["additional_mb"]
        if strategy == "replay":
            assert kept == pytest.approx(buffer, abs=1e-6)
        networks = about["memory"]["architecture_mb"] - found[method, "joint"]["memory"]["architecture_mb"]
        assert (networks > 0) == (strategy == "single")  # a model a task
    for method in TRAINED:
        assert found[method, "single"]["average_forgetting_pct"] == 0


def test_the_paper_s_replay_is_what_auto_means_for_trained_methods(train: Train, tmp_path: Path) -> None:
    refused = train("method=stfpm", "method.batch_size=2")
    assert "replay.size=40 (the method's own, where none is given) is larger than all of 18" in refused.stderr
    paper = train("method=stfpm", "benchmark=paper", "backbone=small", "task_order=alphabetical")
    assert "replay.size=300" in paper.stderr


@pytest.mark.parametrize(
    ("method", "backbone", "resize", "crop"),
    [
        ("patchcore", "wide_resnet50_2", 256, 224),
        ("padim", "wide_resnet50_2", 256, 224),
        ("cfa", "wide_resnet50_2", 256, 224),
        ("stfpm", "resnet18", 256, None),
        ("fastflow", "wide_resnet50_2", 256, None),
        ("fastflow_deit", "deit_base_distilled_patch16_384", 384, None),
        ("fastflow_cait", "cait_m48_448", 448, None),
    ],
)
def test_the_paper_s_backbone_and_image_size_are_the_method_s(
    method: str, backbone: str, resize: int, crop: int | None
) -> None:
    paper = sources.composed(f"method={method}", "benchmark=paper")
    given = sources.composed(f"method={method}", "benchmark=paper", "backbone=mobilenetv2_100")
    demo = sources.composed(f"method={method}")
    assert paper.backbone.name == backbone
    assert (paper.dataset.resize, paper.dataset.crop) == (resize, crop)
    assert given.backbone.name == "mobilenetv2_100"
    assert demo.backbone.checkpoint == "package:small.safetensors"


@pytest.mark.parametrize(("width", "channels_last"), [(8, False), (16, True)])
def test_networks_whose_gradients_overrun_their_memory_channels_last_are_left_as_they_are(
    width: int, channels_last: bool
) -> None:
    narrow = ["backbone.checkpoint=null", f"backbone.arguments.channels=[{width},16,32,64]"]
    built = build_detector(check(sources.composed("method=stfpm", *narrow)))
    kernels = [
        parameter for parameter in built.parameters() if parameter.dim() == 4 and parameter[0, 0].numel() > 1
    ]
    assert all(kernel.is_contiguous(memory_format=torch.channels_last) == channels_last for kernel in kernels)


def test_a_list_of_lists_makes_tasks_of_several_categories(train: Train, tmp_path: Path) -> None:
    result = train("task_order.tasks=[plate,[brick,cloth]]", "evaluate=all", "maps=true")
    assert result.returncode == 0, result.stderr
    (directory,) = run_directories(tmp_path)
    about = summary(directory)
    assert about["tasks"] == ["plate", "brick+cloth"]
    assert about["categories"] == [["plate"], ["brick", "cloth"]]
    assert len(rows(directory)) == 2 * 3 * (len(METRICS) + 1)  # and routing
    assert {row["category"]: row["task"] for row in rows(directory)} == {
        "plate": "plate",
        "brick": "brick+cloth",
        "cloth": "brick+cloth",
    }
    assert about["forward_transfer"]["pixel_auroc"] is not None
    pictures = sorted(path.name for path in (directory / "maps" / "plate").glob("*.png"))
    assert len(pictures) == 2 * 4 and pictures[0] == "blot-000-stage-00.png"


@pytest.mark.parametrize(("strategy", "stages"), [("finetune", {0, 1, 2}), ("single", {0})])
def test_few_maps_are_small_pictures_after_every_stage_that_changes_them(
    strategy: str, stages: set[int], train: Train, tmp_path: Path
) -> None:
    assert train("maps=few", f"strategy={strategy}").returncode == 0
    (directory,) = run_directories(tmp_path)
    names = {path.name for path in (directory / "maps" / "brick" / "few").iterdir()}
    of_one = {"blot-000.jpg", "blot-000-mask.png", *(f"blot-000-stage-{stage:02d}.jpg" for stage in stages)}
    assert names == of_one | {name.replace("000", "001") for name in of_one}
    assert not list((directory / "maps" / "brick").glob("*.png"))


def test_random_order_is_a_function_of_the_seed(train: Train, tmp_path: Path) -> None:
    assert train("-m", "task_order=random", "seed=1,1,2,3,4,5").returncode == 0
    orders = [tuple(summary(directory)["tasks"]) for directory in run_directories(tmp_path)]
    assert len(orders) == 5 and len(set(orders)) > 1


@pytest.mark.parametrize(
    "setting",
    [
        ("method=patchcore", "replay.size=7"),
        pytest.param(
            ("method=cfa", "replay.size=7", "method.epochs=4", "method.batch_size=2"), marks=pytest.mark.long
        ),
        pytest.param(("method=padim", "strategy=single"), marks=pytest.mark.long),
        pytest.param(
            ("method=draem", "replay.size=7", "method.epochs=1", "method.batch_size=2"),
            marks=pytest.mark.long,
        ),
    ],
)
def test_killed_at_random_moments_and_continued_ends_in_the_same_metrics(
    setting: tuple[str, ...], folder: Path, train: Train, tmp_path: Path
) -> None:
    whole = train("experiment=whole", *setting)
    assert whole.returncode == 0, whole.stderr
    words = command(folder, tmp_path, "experiment=killed", "checkpoint_s=0", *setting)[2:]
    assert kill_again_and_again(words, tmp_path / "outputs" / "killed", Random(" ".join(setting))) >= 2
    (one,), (other,) = run_directories(tmp_path, "whole"), run_directories(tmp_path, "killed")
    assert (one / "metrics.csv").read_bytes() == (other / "metrics.csv").read_bytes()
    left_out = ("time", "memory")
    assert {k: v for k, v in summary(one).items() if k not in left_out} == {
        k: v for k, v in summary(other).items() if k not in left_out
    }


LONG = (
    "method=stfpm",
    "strategy=finetune",
    "method.epochs=3000",
    "method.batch_size=2",
    "method.patience=null",
)


@pytest.mark.parametrize(
    ("number", "status"),
    [(signal.SIGTERM, -signal.SIGTERM), pytest.param(signal.SIGINT, 130, marks=pytest.mark.long)],
)
def test_a_run_that_is_asked_to_stop_saves_and_says_so(
    number: signal.Signals, status: int, folder: Path, train: Train, tmp_path: Path
) -> None:
    # Where tests run in a script's background, Ctrl-C is ignored, and so it would be in what they start.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    process = subprocess.Popen(
        command(folder, tmp_path, *LONG), cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    signal.signal(signal.SIGINT, before)
    directory = tmp_path / "outputs" / "default"
    while not list(directory.glob("*/checkpoint/learning-0000-*.json")):  # the first epoch's
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(number)
    output, errors = process.communicate(timeout=60)
    assert process.returncode == status, errors
    assert f"interrupted by {number.name}: the same command continues here" in output
    assert "Traceback" not in errors
    (directory,) = run_directories(tmp_path)
    assert summary(directory)["status"] == "running"
    saved = max(directory.glob("checkpoint/learning-*.json"))
    epoch = json.loads(saved.read_text().split("\n")[1])["epoch"]
    assert 0 < epoch < 2999


def test_a_damaged_checkpoint_is_passed_over(train: Train, tmp_path: Path) -> None:
    assert train().returncode == 0
    (directory,) = run_directories(tmp_path)
    expected = (directory / "metrics.csv").read_bytes()
    last = directory / "checkpoint" / "stage-0002.safetensors"
    last.write_bytes(last.read_bytes()[:-100])
    (directory / "metrics.csv").unlink()
    (directory / "summary.json").unlink()
    result = train()
    assert result.returncode == 0, result.stderr
    assert "continuing after stage 2 of 3" in result.stdout
    assert (directory / "metrics.csv").read_bytes() == expected


@pytest.mark.parametrize("content", ["", "{}", '{"status": "comp'])
def test_a_damaged_summary_is_made_again(content: str, train: Train, tmp_path: Path) -> None:
    assert train().returncode == 0
    (directory,) = run_directories(tmp_path)
    expected = summary(directory)
    (directory / "summary.json").write_text(content)
    result = train()
    assert result.returncode == 0, result.stderr
    assert summary(directory)["final"] == expected["final"]


def test_lost_metrics_are_written_again(train: Train, tmp_path: Path) -> None:
    assert train().returncode == 0
    (directory,) = run_directories(tmp_path)
    expected = (directory / "metrics.csv").read_bytes()
    (directory / "metrics.csv").unlink()
    result = train()
    assert result.returncode == 0 and "continuing after stage 3 of 3" in result.stdout
    assert (directory / "metrics.csv").read_bytes() == expected


def compose_anew(directory: Path) -> None:
    """Have the next command compose a finished run, as after a change of conf/, and not know it at sight."""
    (directory / "summary.json").write_text(json.dumps({**summary(directory), "composed_from": "another"}))


@pytest.mark.parametrize("content", [b"", b"{a: [", b"\xff\xfe\x00"])
def test_a_damaged_config_is_named(content: bytes, train: Train, tmp_path: Path) -> None:
    assert train().returncode == 0
    (directory,) = run_directories(tmp_path)
    (directory / "config.yaml").write_bytes(content)
    compose_anew(directory)
    result = train()
    assert result.returncode == 2 and "Traceback" not in result.stderr
    assert f"{directory}/config.yaml is damaged: remove {directory}" in result.stderr


def test_a_run_is_not_continued_with_other_images(folder: Path, train: Train, tmp_path: Path) -> None:
    root = shutil.copytree(folder, tmp_path / "grows")
    given = (
        f"dataset.root={root}",
        "method.batch_size=2",
        "method=stfpm",
        "method.epochs=2",
        "strategy=finetune",
    )
    assert train(*given).returncode == 0
    (directory,) = run_directories(tmp_path)
    thresholds = (directory / "thresholds.json").read_bytes()

    def left_before_the_end() -> None:
        (directory / "summary.json").unlink()
        (directory / "thresholds.json").unlink()

    left_before_the_end()
    shutil.copytree(root / "brick", root / "apple")
    refused = train(*given)
    assert refused.returncode == 1 and "Traceback" not in refused.stderr
    assert "begun with other images ('apple' joined): put them back" in refused.stderr
    shutil.rmtree(root / "apple")
    good = root / "cloth" / "train" / "good"
    (good / "000.png").rename(good / "020.png")
    assert "training images of 'cloth' changed" in train(*given).stderr
    (good / "020.png").rename(good / "000.png")
    assert train(*given).returncode == 0
    assert (directory / "thresholds.json").read_bytes() == thresholds


def test_a_run_is_neither_continued_nor_used_with_other_frozen_weights(train: Train, tmp_path: Path) -> None:
    def teach(seed: int) -> None:
        torch.manual_seed(seed)
        torch.save(patch_description_network(16, 24).state_dict(), tmp_path / "teacher.pth")

    small = ("method=efficientad", "method.width=16", "method.epochs=1", "method.penalty_count=2")
    given = (*small, f"method.teacher={tmp_path}/teacher.pth", "strategy=finetune")
    teach(0)
    assert train(*given).returncode == 0
    (directory,) = run_directories(tmp_path)
    clbench.load(directory)
    teach(1)
    with pytest.raises(UserError, match="begun with other weights of its frozen network"):
        clbench.load(directory)
    (directory / "summary.json").unlink()
    refused = train(*given)
    assert refused.returncode == 1 and "other files (what method.teacher names changed)" in refused.stderr
    assert summary(directory)["reason"].startswith(str(directory))  # in the words of stderr


def test_a_lock_that_a_full_disk_has_no_room_to_sign_holds(tmp_path: Path) -> None:
    (tmp_path / "run.lock").symlink_to("/dev/full")
    with RunDirectory(tmp_path).lock():
        pass


def test_the_second_process_in_a_run_directory_stops(folder: Path, train: Train, tmp_path: Path) -> None:
    import fcntl

    assert train().returncode == 0
    (directory,) = run_directories(tmp_path)
    (directory / "summary.json").unlink()
    with open(directory / "run.lock", "a", encoding="utf-8") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        result = train()
    assert result.returncode == 1
    assert "is in use by process" in result.stderr and "Traceback" not in result.stderr
    assert train().returncode == 0


def test_another_config_in_the_same_directory_is_refused_until_told_to_overwrite(
    train: Train, tmp_path: Path
) -> None:
    assert train().returncode == 0
    (directory,) = run_directories(tmp_path)
    config = directory / "config.yaml"
    config.write_text(config.read_text().replace("memory_size: 30000", "memory_size: 20000"))
    compose_anew(directory)
    refused = train()
    assert refused.returncode == 2
    assert "method.memory_size: 20000 -> 30000" in refused.stderr
    assert train("overwrite=true").returncode == 0
    assert train().stdout.count("finished already") == 1


def test_help_lists_every_choice_and_imports_neither_torch_nor_wandb(process: Train) -> None:
    result = process("--help", environment={"PYTHONPROFILEIMPORTTIME": "1"})
    assert result.returncode == 0
    for choice in ("patchcore", "wide_resnet50_2", "finetune", "mvtec", "alphabetical", "paper", "cuda"):
        assert choice in result.stdout
    imported = {line.rpartition("|")[2].strip() for line in result.stderr.splitlines()}
    assert "hydra" in imported
    assert not imported & {"torch", "wandb", "timm"}


def test_a_loaded_detector_predicts_what_the_run_measured(folder: Path, train: Train, tmp_path: Path) -> None:
    import clbench
    from clbench.data import stream
    from clbench.data.mvtec import MVTec
    from clbench.data.samples import Geometry
    from clbench.metrics.curves import pixel_metrics

    assert train("-m", "method=padim", "strategy=native,single").returncode == 0
    native, single = run_directories(tmp_path)
    dataset = MVTec(str(folder))
    tasks = stream.load_tasks(
        dataset, [["brick"], ["plate"]], Geometry(48), tmp_path / "cache", lambda *given: None
    )
    for task in tasks:
        for directory in (native, single):
            detector = clbench.load(directory, task=task.name if directory == single else None)
            test = task.categories[0].test
            prediction = detector(test.images)
            assert prediction.maps.shape == (4, 48, 48) and prediction.scores.shape == (4,)
            measured = pixel_metrics(prediction.maps.numpy(), test.masks.numpy())
            last = {row["metric"]: row["value"] for row in rows(directory) if row["task"] == task.name}
            assert f"{measured['pixel_ap']:.6f}" == last["pixel_ap"]
    with pytest.raises(UserError, match="a model for each of brick, cloth, plate"):
        clbench.load(single)
    with pytest.raises(UserError, match="holds no trained detector"):
        clbench.load(tmp_path)


def test_a_config_that_is_loaded_cannot_name_what_is_no_detector(train: Train, tmp_path: Path) -> None:
    import clbench
    from clbench.errors import UserError

    assert train().returncode == 0
    (directory,) = run_directories(tmp_path)
    config = directory / "config.yaml"
    config.write_text(config.read_text().replace("clbench.methods.patchcore.PatchCore", "pathlib.Path"))
    with pytest.raises(UserError, match=r"method\._target_=pathlib\.Path is not a"):
        clbench.load(directory)


def test_test_images_influence_neither_weights_nor_thresholds(
    folder: Path, train: Train, tmp_path: Path
) -> None:
    """Other test images, of other defects, after which nothing but the metrics is another."""
    other = shutil.copytree(folder, tmp_path / "other" / folder.name)
    for image in other.glob("*/test/*/*.png"):
        shutil.copy(next((other / image.parts[-4] / "train" / "good").glob("*.png")), image)
    settings = (
        "method=stfpm",
        "replay.size=9",
        "method.epochs=4",
        "method.batch_size=2",
        "method.patience=1",
    )
    found = {}
    for root in (folder, other):
        assert train(*settings, f"dataset.root={root}", f"experiment=of_{root.parent.name}").returncode == 0
        (directory,) = run_directories(tmp_path, f"of_{root.parent.name}")
        names = sorted(path.name for path in directory.glob("checkpoint/*.safetensors"))
        kept = [(directory / "checkpoint" / name).read_bytes() for name in names]
        found[root] = (names, kept, (directory / "thresholds.json").read_bytes())
        found[root, "metrics"] = (directory / "metrics.csv").read_text()
    assert len(found[folder][1]) == 2 and found[folder] == found[other]
    assert found[folder, "metrics"] != found[other, "metrics"]


def test_what_was_learned_under_an_unknown_config_is_not_continued(train: Train, tmp_path: Path) -> None:
    assert train("method=padim").returncode == 0
    (directory,) = run_directories(tmp_path)
    (directory / "config.yaml").unlink()
    (directory / "summary.json").unlink()
    refused = train("method=padim")
    assert refused.returncode == 2 and refused.stderr.count("\n") == 1
    assert "holds what a run has learned, and no config.yaml that says which run" in refused.stderr
    assert train("method=padim", "overwrite=true").returncode == 0


def test_a_process_killed_while_it_clears_a_directory_leaves_a_run_that_says_which_it_is(
    train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert train("method=padim").returncode == 0
    (directory,) = run_directories(tmp_path)
    metrics = (directory / "metrics.csv").read_bytes()
    config = directory / "config.yaml"
    with monkeypatch.context() as patched:
        patched.setattr(
            shutil, "rmtree", lambda path, **given: (_ for _ in ()).throw(PermissionError(1, "no"))
        )
        with pytest.raises(UserError, match="cannot be written"):
            RunDirectory(directory).clear()
    assert config.is_file() and not (directory / "summary.json").exists()
    assert train("method=padim").returncode == 0  # goes on from what is there
    assert (directory / "metrics.csv").read_bytes() == metrics


@pytest.mark.parametrize(
    "change",
    [
        "a value",
        "gone",
        *(pytest.param(how, marks=pytest.mark.long) for how in ("cut off", "a row twice", "empty")),
    ],
)
def test_a_finished_run_whose_metrics_changed_writes_them_again(
    change: str, train: Train, tmp_path: Path
) -> None:
    assert train("method=padim").returncode == 0
    (directory,) = run_directories(tmp_path)
    path = directory / "metrics.csv"
    written = path.read_text()
    lines = written.splitlines(keepends=True)
    changed = {
        "cut off": written[:-20],
        "a value": written.replace("image_auroc,", "image_auroc,0"),
        "a row twice": written + lines[-1],
        "empty": "",
    }
    path.unlink() if change == "gone" else path.write_text(changed[change])
    assert "damaged" in clbench_command("report", str(directory.parent)).stdout
    again = train("method=padim")
    assert again.returncode == 0 and "finished already" not in again.stdout
    assert path.read_text() == written
    assert "finished already" in train("method=padim").stdout


@pytest.mark.parametrize(
    "content",
    [
        "[1]",
        '{"status": "complete"}',
        *(pytest.param(text, marks=pytest.mark.long) for text in ('{"status": "failed"}', '{"status": 3}')),
    ],
)
def test_a_summary_that_is_none_costs_no_other_run_anything(
    content: str, train: Train, tmp_path: Path
) -> None:
    assert train("-m", "method=padim", "seed=0,1").returncode == 0
    first, _ = run_directories(tmp_path)
    expected = (first / "metrics.csv").read_bytes()
    (first / "summary.json").write_text(content)
    planned = train("-m", "method=padim", "seed=0,1,2", "dry_run=true")
    assert planned.returncode == 0 and "3 runs: 1 finished, 2 would be started" in planned.stdout
    assert train("-m", "method=padim", "seed=0,1").returncode == 0
    assert (first / "metrics.csv").read_bytes() == expected
