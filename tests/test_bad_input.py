"""Each mistake gets one line that names the thing, the value and the way out, and leaves nothing behind."""

import json
import resource
import shutil
from pathlib import Path

import cv2
import numpy as np
import pytest
from conftest import Train, run_directories

MISTAKES = [
    (["metod=padim"], "metod", "nearest: method"),
    (["method=patchcor"], "method=patchcor", "nearest: patchcore"),
    (["method.memorysize=10"], "method.memorysize", "nearest: method.memory_size"),
    (["+method.memorysize=10"], "method.memorysize", "nearest: method.memory_size"),
    (["replay.sise=10"], "replay.sise", "nearest: replay.size"),
    (["+colour=red"], "colour", "there are: "),
    (["replay.size=abc"], "replay.size=abc", "valid integer"),
    (["replay.size=0"], "replay.size=0", "greater than 0"),
    (["replay.size=-3"], "replay.size=-3", "greater than 0"),
    (["replay.size=19"], "replay.size=19", "all of 18 training images"),
    (["method.memory_size=0"], "method.memory_size=0", "greater than 0"),
    (["method.memory_size=many"], "method.memory_size=many", "valid integer"),
    (["method.epsilon=2"], "method.epsilon=2", "less than 1"),
    (["method=padim", "method.update=best"], "method.update=best", "'average', 'pooled' or 'per_task'"),
    (["strategy=native", "replay.size=10"], "strategy=native with replay.size=10", "strategy=replay"),
    (["strategy=joint", "replay.size=10"], "strategy=joint with replay.size=10", "strategy=replay"),
    (["strategy=replay"], "strategy=replay", "give replay.size"),
    (["gpu.precision=fp64"], "gpu.precision=fp64", "'fp32', 'tf32', 'bf16' or 'fp16'"),
    (["gpu=cpu", "gpu.precision=fp16"], "gpu.precision=fp16", "bf16"),
    (["gpu=auto", "gpu.precision=fp16"], "gpu.precision=fp16", "bf16"),
    (["gpu.device=tpu"], "gpu.device=tpu", "cpu|cuda"),
    (["gpu.device=cuda:7"], "gpu.device=cuda:7", "gpu=cpu"),
    (["evaluate=some"], "evaluate=some", "give seen, all, last, or every:N"),
    (["evaluate=every:0"], "evaluate=every:0", "with N of 1 or more"),
    (["evaluation_memory_mb=-1"], "evaluation_memory_mb=-1", "greater than or equal to 0"),
    (["seed=1,"], "seed=1,", "a list is seed=a,b"),
    (["-m", "method=cfa,stfpm", "method.epochs=1,"], "method.epochs=1,", "a list is method.epochs=a,b"),
    (["seed"], "seed", "write seed=..."),
    (["replay=100"], "replay=100", "there are: images_100, images_300, images_40, none"),
    (["+seed=1"], "+seed=1", "write seed=1"),
    (["~seed"], "seed", "cannot be taken away"),
    (["hydra/launcher=slrum"], "hydra/launcher=slrum", "nearest: slurm"),
    (["seed=x"], "seed=x", "valid integer"),
    (["dataset.resize=32", "dataset.crop=40"], "dataset.crop=40", "at most 32"),
    (["dataset.resize=null", "dataset.crop=64"], "dataset.crop=64", "48x48"),
    (["dataset.resize=0"], "dataset.resize=0", "greater than 0"),
    (["task_order.tasks=[brick,clot]"], "'clot'", "found: brick, cloth, plate"),
    (["task_order.tasks=[brick,brick]"], "'brick' twice", "once"),
    (["task_order.tasks=[[],brick]"], "task_order.tasks", "empty task"),
    (["dataset.root=/nowhere"], "/nowhere", "dataset.root"),
    (["dataset.root=???"], "dataset.root", "give dataset.root="),
    (["backbone.name=resnet19"], "backbone.name=resnet19", "nearest: resnet18"),
    (["backbone.checkpoint=/nowhere/w.safetensors"], "/nowhere/w.safetensors", "does not exist"),
    (["method.layers=[2,9]"], "method.layers=[2, 9]", "5 levels"),
    (["method.layers=[]"], "method.layers=[]", "at least one level"),
    (["method.layers=[2,2]"], "method.layers=[2, 2]", "each once"),
    (["method.layers=[3,2]"], "method.layers=[3, 2]", "ascending"),
    (["method.sigma=1e6"], "method.sigma=1000000.0", "less than or equal to 100"),
    (["task_order.tasks=[]"], "task_order.tasks", "at least one category"),
    (["method.trained_normalisation=true"], "method.trained_normalisation", "method=fastflow"),
    (["experiment=a/b"], "experiment=a/b", "letters, digits"),
    (["experiment=.."], "experiment=..", "letters, digits"),
    (["method=stfpm", "strategy=native"], "strategy=native with method=stfpm", "strategy=replay"),
    (["method=stfpm", "replay.size=6"], "method.batch_size=8", "give at most 5"),
    (
        ["method=draem", "replay.size=6", "method.textures=/nowhere"],
        "method.textures=/nowhere",
        "leave it out",
    ),
    (["method=draem", "replay.size=6", "method.textures=conf"], "method.textures=/", "/conf holds no image"),
    (
        ["method=efficientad", "replay.size=6", "method.penalty_images=/nowhere"],
        "penalty_images",
        "leave it out",
    ),
    (["method=efficientad", "replay.size=6", "method.teacher=/nowhere"], "method.teacher=/nowhere", "give a"),
    (["method=efficientad", "replay.size=6", "method.teacher=null"], "method.teacher", "clbench distil"),
    (["method=efficientad", "replay.size=6", "method.width=128"], "method.width=128", "[32, 3, 4, 4]"),
    (["method=efficientad", "replay.size=6", "dataset.resize=24"], "24x24", "dataset.resize"),
    (["method=draem", "replay.size=6", "dataset.resize=16"], "16x16", "32 or more"),
    (["method=draem", "replay.size=6", "method.similarity=inf"], "method.similarity=inf", "finite"),
    (
        ["method=draem", "replay.size=6", "method.texture_count=2", "method.reconstructive_width=4"]
        + ["method.discriminative_width=4", "dataset.resize=32", "method.batch_size=5"],
        "a batch of 1 image, 32x32 pixels",
        "method.batch_size",
    ),
    (["method=cfa", "replay.size=6", "method.attracted=142"], "method.attracted=142", "have 144"),
    (
        ["method=fastflow", "replay.size=6", "backbone=timm", "backbone.name=deit_tiny_patch16_224"]
        + ["backbone.pretrained=false", "backbone.arguments={}", "method.layers=[7]"],
        "backbone.name=deit_tiny_patch16_224 takes no images of 48x48",
        "backbone.arguments.img_size",
    ),
    (["method=fastflow", "replay.size=6", "backbone.arguments.channels=[8,15,32,64]"], "15", "even numbers"),
]


@pytest.mark.parametrize(("overrides", "named", "way_out"), MISTAKES, ids=lambda value: str(value)[:40])
def test_a_mistake_on_the_command_line(
    train: Train, tmp_path: Path, overrides: list[str], named: str, way_out: str
) -> None:
    result = train(*overrides)
    assert_refused(result, named, way_out)
    assert "task 1/" not in result.stdout  # before any training
    for left in tmp_path.glob("outputs/*/*/summary.json"):
        about = json.loads(left.read_text())
        assert about["status"] == "failed" and named in about["reason"]
        assert "Exception" not in about["reason"]


def assert_refused(result, *words: str) -> None:
    assert result.returncode in (1, 2)
    errors = [line for line in result.stderr.splitlines() if line.strip()]
    assert len(errors) == 1 and errors[0].startswith("error: "), result.stderr
    for word in words:
        assert word in errors[0]


@pytest.fixture
def copy(folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(folder, tmp_path / "copy"))


def test_a_category_without_good_training_images(copy: Path, train: Train) -> None:
    (copy / "cloth/train/good").rename(copy / "cloth/train/god")
    assert_refused(train(f"dataset.root={copy}"), "cloth", "dataset.categories=[brick,plate]")
    assert train(f"dataset.root={copy}", "dataset.categories=[brick,plate]").returncode == 0


def test_a_category_named_as_results_are(copy: Path, train: Train) -> None:
    (copy / "cloth").rename(copy / "mean")
    assert_refused(train(f"dataset.root={copy}"), "'mean'", "rename its folder")
    assert train(f"dataset.root={copy}", "task_order.tasks=[[mean,brick]]", "dry_run=true").returncode == 0


def test_empty_training_folder(copy: Path, train: Train) -> None:
    for image in (copy / "cloth/train/good").iterdir():
        image.unlink()
    assert_refused(train(f"dataset.root={copy}"), "cloth")


def test_truncated_image_is_found_before_training(copy: Path, train: Train) -> None:
    image = copy / "plate/test/blot/001.png"
    image.write_bytes(image.read_bytes()[:-400])
    result = train(f"dataset.root={copy}")
    assert_refused(result, "plate/test/blot/001.png")
    assert "task 1/" not in result.stdout


def test_masks_that_do_not_fit(copy: Path, train: Train) -> None:
    mask = copy / "brick/ground_truth/blot/000_mask.png"
    cv2.imwrite(str(mask), np.full((40, 48), 255, np.uint8))
    assert_refused(train(f"dataset.root={copy}"), "000_mask.png", "48x40")
    cv2.imwrite(str(mask), np.zeros((48, 48), np.uint8))
    assert_refused(train(f"dataset.root={copy}"), "000_mask.png", "marks no pixel")
    mask.unlink()
    assert_refused(train(f"dataset.root={copy}"), "000")


def test_weights_that_do_not_fit(train: Train, tmp_path: Path) -> None:
    import torch
    from safetensors.torch import save_file

    save_file({"conv1.weight": torch.zeros(3, 3)}, tmp_path / "w.safetensors")
    checkpoint = f"backbone.checkpoint={tmp_path}/w.safetensors"
    assert_refused(train(checkpoint), "w.safetensors", "does not fit", "tensors missing")
    (tmp_path / "w.safetensors").write_bytes(b"no tensors")
    assert_refused(train(checkpoint), "w.safetensors", "cannot be read")
    (tmp_path / "w.pth").write_text("no tensors")
    assert_refused(train(f"backbone.checkpoint={tmp_path}/w.pth"), "w.pth", "cannot be read")


def test_a_pickle_is_never_run(train: Train, tmp_path: Path) -> None:
    import torch

    class Harmful:
        def __reduce__(self):  # type: ignore[no-untyped-def]
            return (Path.touch, (tmp_path / "ran",))

    torch.save({"conv1.weight": Harmful()}, tmp_path / "w.pth")
    assert_refused(train(f"backbone.checkpoint={tmp_path}/w.pth"), "w.pth", "not unpickled")
    assert not (tmp_path / "ran").exists()


def test_offline_without_weights_says_which_file_to_put_where(process: Train) -> None:
    result = process(
        "backbone=resnet18",
        "backbone.checkpoint=null",
        "backbone.arguments={}",
        environment={"HF_HUB_OFFLINE": "1", "HF_HOME": "/nonexistent"},
    )
    assert_refused(result, "resnet18", "backbone.checkpoint=FILE", "backbone=small")


def test_outputs_that_cannot_be_written(train: Train, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert_refused(train(f"outputs={tmp_path}/file"), "file", "outputs=")


def test_a_full_disk_loses_nothing(train: Train, tmp_path: Path) -> None:
    """No file may grow beyond 200 kB: images and tables fit, checkpoints do not."""
    given = ("method=padim", "method.features=90")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, hard))
    try:
        full = train(*given)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert_refused(full, "stage-0000.safetensors", "File too large", "free space there")
    (directory,) = run_directories(tmp_path)
    assert not list(directory.rglob("*.part")) and not list(directory.rglob("stage-*.safetensors"))
    assert json.loads((directory / "summary.json").read_text())["status"] == "failed"
    again = train(*given)
    assert again.returncode == 0, again.stderr
    assert json.loads((directory / "summary.json").read_text())["status"] == "complete"


def test_one_bad_run_stops_a_sweep_before_the_first_starts(train: Train, tmp_path: Path) -> None:
    result = train("-m", "method=patchcore,padim", "method.memory_size=-1")
    assert_refused(result, "method.memory_size")
    assert not (tmp_path / "outputs").exists()
