"""Thresholds set on normal training images, and what clbench predict makes of files."""

import argparse
import csv
import json
import math
import shutil
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from conftest import Train, clbench, make_category, run_directories
from processes import whole_and_killed
from torch import Tensor
from torch.nn import functional as F

from clbench import thresholds
from clbench.backbones import Backbone
from clbench.commands import predict
from clbench.data.files import find_images
from clbench.data.images import ImageSet
from clbench.data.samples import Geometry
from clbench.data.stream import Task
from clbench.errors import UserError
from clbench.loading import load
from clbench.methods.base import Detector, Prediction, silent
from clbench.methods.padim import PaDiM
from clbench.methods.patchcore import PatchCore
from clbench.strategies.base import Strategy
from clbench.strategies.joint import Joint
from clbench.strategies.native import Native
from clbench.strategies.single import Single
from clbench.thresholds import RATES, Stored, Tail, Thresholds
from clbench.training import split

CPU = torch.device("cpu")


# Thresholds


@pytest.mark.parametrize("count", [1, 3, 9, 10, 100, 12_345])
def test_a_threshold_is_the_value_that_a_new_one_exceeds_no_more_often_than_the_rate(count: int) -> None:
    values = torch.randperm(count, generator=torch.Generator().manual_seed(count)).float()
    tail = Tail(count)
    for part in values.split(97):
        tail.add(part)
    ranked = values.sort(descending=True).values
    for rate, found in zip(RATES, tail.thresholds(), strict=True):
        enough = [k for k in range(1, count + 1) if k / (count + 1) <= rate + 1e-12]
        assert found == ranked[max(enough, default=1) - 1]
        assert (values > found).sum() <= rate * count + 1e-9


def test_a_tail_holds_no_more_than_the_largest_rate_needs() -> None:
    tail = Tail(100_000)
    for part in torch.randn(100_000, generator=torch.Generator().manual_seed(0)).split(1000):
        tail.add(part)
        assert len(tail._kept) + sum(len(one) for one in tail._added) <= 2 * 20_001 + 1000


def test_a_rate_between_two_that_are_kept_takes_the_lower_one_and_one_outside_is_refused() -> None:
    found = Thresholds(["a"], True, 9, 9, [-rate for rate in RATES], [-2 * rate for rate in RATES])
    assert found.at(0.01, 0.2) == (-0.01, -0.4)
    assert found.at(0.0199, 0.15) == (-0.01, -0.2)
    assert found.finest == 0.1
    for rate in (0.000001, 0.5, math.nan):
        with pytest.raises(UserError, match="is out of range"):
            found.at(rate, 0.01)


class Brightness(Detector):
    """An image's own red channel is its map: what its values are is known."""

    def __init__(self, held_out: float = 0.0):
        super().__init__()
        self.held_out = held_out
        self.seen: list[Tensor] = []

    def forward(self, images: Tensor) -> Prediction:
        self.seen.append(images)
        maps = images[:, 0].float()
        return Prediction(maps, maps.amax((1, 2)))


def normal(count: int, seed: int, side: int = 24) -> Tensor:
    """Noise around each image's own level."""
    random = torch.Generator().manual_seed(seed)
    level = 60 + 60 * torch.rand(count, 3, 1, 1, generator=random)
    return (level + 20 * torch.randn(count, 3, side, side, generator=random)).clamp(0, 255).byte()


def task(name: str, images: Tensor) -> Task:
    count = len(images)
    known = ImageSet(
        images, torch.zeros(count, *images.shape[2:], dtype=torch.bool), ["good"] * count, [""] * count
    )
    return Task(name, known, known)


def test_false_positive_rates_on_new_normal_images_are_those_chosen() -> None:
    stream = [task("a", normal(1000, 0)), task("b", normal(1000, 1))]
    stored = thresholds.calibrate(Native(Brightness(held_out=0.5)), stream, CPU, silent)
    found = thresholds.for_task(Stored(**stored), "b")
    assert found.held_out and found.images == 1000 and found.pixels == 1000 * 24 * 24
    new = Brightness()(normal(4000, 2))
    for rate in (0.01, 0.05, 0.2):
        pixel, image = found.at(rate, rate)
        # Both the images that thresholds were set on and the new ones are samples: their variances add up.
        deviation = math.sqrt(rate * (1 - rate) * (1 / 1000 + 1 / 4000))
        assert abs(float((new.scores > image).float().mean()) - rate) < 4 * deviation
        # Pixels of an image go together, so that it counts no more than its images.
        shares = (new.maps > pixel).float().mean((1, 2))
        deviation = float(shares.std()) * math.sqrt(1 / 1000 + 1 / 4000)
        assert abs(float(shares.mean()) - rate) < 4 * deviation


@pytest.mark.parametrize("strategy", [Native, Joint, Single])
def test_thresholds_are_set_on_exactly_the_images_held_out(strategy: type[Strategy]) -> None:
    stream = [task("a", normal(11, 0)), task("b", normal(7, 1))]
    detector = Brightness(held_out=0.2)
    learner = strategy(detector, seed=5)
    if isinstance(learner, Single):
        learner._learned = [{}, {}]
    stored = thresholds.calibrate(learner, stream, CPU, silent)
    parts = (
        [[one.train.images for one in stream]] if strategy is Joint else [[t.train.images] for t in stream]
    )
    expected = [split(torch.cat(images), 0.2, 5, stage)[1] for stage, images in enumerate(parts)]
    assert torch.equal(torch.cat(detector.seen), torch.cat(expected))
    models = [(model["tasks"], model["images"], model["held_out"]) for model in stored["models"]]
    if strategy is Single:
        assert models == [(["a"], 3, True), (["b"], 2, True)]
        assert thresholds.for_task(Stored(**stored), "b").image[-1] == float(expected[1][:, 0].max())
    else:
        assert models == [(["a", "b"], sum(map(len, expected)), True)]
    with pytest.raises(UserError, match="none for task 'c'; give one of a, b"):
        thresholds.for_task(Stored(**stored), "c")


def test_without_held_out_images_some_that_were_learned_from_are_taken_and_it_is_said() -> None:
    detector = Brightness()
    stored = thresholds.calibrate(
        Native(detector), [task("a", normal(300, 0)), task("b", normal(8, 1))], CPU, silent
    )
    (model,) = stored["models"]
    assert not model["held_out"] and model["images"] == 50 + 8
    assert len({tuple(image.flatten().tolist()) for image in torch.cat(detector.seen)}) == 58


@pytest.mark.parametrize("method", [PatchCore, PaDiM])
def test_memory_banks_hold_nothing_of_what_is_held_out(method: type[Detector]) -> None:
    def learned(images: Tensor, held_out: float) -> dict[str, Tensor]:
        backbone = Backbone("resnet18", pretrained=False, arguments={"channels": [8, 8, 16, 16]})
        detector = method(backbone, layers=[1, 2], held_out=held_out)  # type: ignore[call-arg]
        strategy = Native(detector, seed=3)
        strategy.learn(0, images)
        return {name: buffer.clone() for name, buffer in detector.named_buffers(recurse=False)}

    images = normal(10, 0, side=32)
    kept, held = split(images, 0.3, 3, 0)
    assert (len(kept), len(held)) == (7, 3)
    found, expected = learned(images, 0.3), learned(kept, 0.0)
    assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in found)


def test_a_run_killed_and_continued_ends_in_the_same_thresholds(
    folder: Path, train: Train, tmp_path: Path
) -> None:
    setting = ("method=patchcore", "method.held_out=0.3", "strategy=native")
    one, other = whole_and_killed(train, folder, tmp_path, *setting)
    assert (one / "thresholds.json").read_bytes() == (other / "thresholds.json").read_bytes()


# Maps back on files


@pytest.mark.parametrize(("resize", "crop"), [(32, None), (32, 20), (None, 24), (None, None)])
def test_a_map_goes_back_to_where_the_image_had_it(resize: int | None, crop: int | None) -> None:
    size = (60, 48)
    rows, columns = np.mgrid[: size[0], : size[1]].astype(np.float32)
    ramp = 3 * rows + columns  # linear: resizing and interpolating keep it
    geometry = Geometry(resize, crop)
    back = geometry.restore(geometry.image(ramp), size)
    assert back.shape == size and back.dtype == np.float32
    share = [1.0, 1.0] if crop is None else [crop / (resize or side) for side in size]
    known = np.isfinite(back)
    assert known.sum() == math.prod(round(side * part) for side, part in zip(size, share, strict=True))
    middle = known.copy()
    middle[known] = True
    eroded = cv2.erode(np.pad(middle, 1).astype(np.uint8), np.ones((5, 5)))[1:-1, 1:-1].astype(bool)
    np.testing.assert_allclose(back[eroded], ramp[eroded], atol=0.6)


def test_maps_upsampled_are_those_of_an_interpolation() -> None:
    grid = np.random.default_rng(0).random((8, 8), dtype=np.float32)
    expected = F.interpolate(torch.from_numpy(grid)[None, None], (31, 19), mode="bilinear")[0, 0].numpy()
    np.testing.assert_allclose(Geometry(8).restore(grid, (31, 19)), expected, atol=1e-6)


# Files


def test_files_are_found_once_in_folders_and_patterns_and_not_in_what_was_written(tmp_path: Path) -> None:
    for name in ("a/1.png", "a/b/2.JPG", "a/.hidden/3.png", "a/notes.txt", "a/out/4.png", "c/5.bmp"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()

    def names(*given: str) -> list[str]:
        found = find_images([tmp_path / each for each in given], without=[tmp_path / "a/out"])
        return [path.relative_to(tmp_path).as_posix() for path in found]

    assert names("a") == ["a/1.png", "a/b/2.JPG"]
    assert names("a/notes.txt", "*/*.bmp", "c", "a/1.png") == ["a/notes.txt", "c/5.bmp", "a/1.png"]
    assert names("[ac]") == ["a/1.png", "a/b/2.JPG", "c/5.bmp"]
    assert names("missing.png") == ["missing.png"]
    with pytest.raises(UserError, match=r"no\*\.png matches no file"):
        names("no*.png")


@pytest.mark.parametrize("output", [".", "photos", "photos/masks/.."])
def test_predictions_may_be_written_around_and_beside_the_images(
    output: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("photos/1.png", "photos/day/2.png", f"{output}/overlays/1.png", f"{output}/masks/1.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    found: list[Path] = []
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(predict, "_load", lambda options: options)
    monkeypatch.setattr(predict, "_predict", lambda options, detector, files, *_: found.extend(files))
    parser = argparse.ArgumentParser()
    predict.arguments(parser)
    given = parser.parse_args(["RUN", "photos", "--output", output])
    given.device = "cpu"
    predict.main(given)
    assert found == [tmp_path / "photos/1.png", tmp_path / "photos/day/2.png"]


def test_two_files_that_would_be_written_to_one_are_named() -> None:
    with pytest.raises(UserError, match=r"/p/1\.jpg and /p/1\.jpg\.png would both be written as 1\.jpg\.png"):
        predict._pictures([Path("/p/1.jpg"), Path("/p/1.jpg.png")], Path("/p"))
    assert predict._pictures([Path("/p/1.jpg"), Path("/p/1.png")], Path("/p")) == {
        Path("/p/1.jpg"): "1.jpg.png",
        Path("/p/1.png"): "1.png",
    }


def test_predict_writes_what_it_finds_and_names_what_it_cannot_read(train: Train, tmp_path: Path) -> None:
    make_category(tmp_path / "stream/brick", np.random.default_rng(0), train=40)
    done = train(
        f"dataset.root={tmp_path}/stream", "dataset.crop=40", "method.held_out=0.5", "strategy=native"
    )
    assert done.returncode == 0, done.stderr
    (run,) = run_directories(tmp_path)
    given = tmp_path / "given"
    shutil.copytree(tmp_path / "stream/brick/test", given)
    large = cv2.resize(cv2.imread(str(given / "blot/000.png")), (120, 96), interpolation=cv2.INTER_CUBIC)
    cv2.imwrite(str(given / "blot/000.jpg"), large)
    (given / "good/corrupt.png").write_bytes((given / "good/000.png").read_bytes()[:200])
    (given / "good/notes.txt").write_text("ignored")
    (tmp_path / "named.txt").write_text("no image")

    output = tmp_path / "found"
    words = ("predict", str(run), str(given), str(tmp_path / "named.txt"), "--output", str(output))
    done = clbench(*words, "--batch-size", "3", "--false-positive-rate", "0.02")
    assert done.returncode == 1
    assert "given/good/corrupt.png" in done.stderr and "named.txt" in done.stderr
    assert "notes.txt" not in done.stderr and "passed over: 2 of 7 files" in done.stderr
    assert "set on 20 normal training images held out of learning" in done.stdout
    assert "20 images cannot tell an image rate below 4.8 %" in done.stdout

    with open(output / "scores.csv", encoding="utf-8") as file:
        rows = {row["image"]: row for row in csv.DictReader(file)}
    results = json.loads((output / "scores.json").read_text())
    assert list(rows) == [row["image"] for row in results["images"]]
    assert sorted(rows) == [
        "given/blot/000.jpg",
        "given/blot/000.png",
        "given/blot/001.png",
        "given/good/000.png",
        "given/good/001.png",
    ]
    assert len(results["unreadable"]) == 2
    for name, row in rows.items():
        picture = name if name.endswith(".png") else f"{name}.png"
        mask = cv2.imread(str(output / "masks" / picture), cv2.IMREAD_UNCHANGED)
        overlay = cv2.imread(str(output / "overlays" / picture))
        original = cv2.imread(str(tmp_path / name))
        assert mask.shape == original.shape[:2] and overlay.shape == original.shape
        assert set(np.unique(mask)) <= {0, 255} and (mask > 0).sum() == int(row["anomalous_pixels"])
        side = (mask.shape[1] * 4 // 48) - 1  # outside of the crop nothing is known
        assert not mask[:, :side].any() and np.array_equal(overlay[:, :side], original[:, :side])
        assert float(row["score"]) == pytest.approx(
            next(r["score"] for r in results["images"] if r["image"] == name)
        )
        assert row["anomalous"] == str(int(float(row["score"]) > results["image_threshold"]))
        if "blot" in name:
            assert row["anomalous"] == "1" and mask.any()
    truth = (
        cv2.imread(str(tmp_path / "stream/brick/ground_truth/blot/001_mask.png"), cv2.IMREAD_UNCHANGED) > 0
    )
    found = cv2.imread(str(output / "masks/given/blot/001.png"), cv2.IMREAD_UNCHANGED) > 0
    assert found[truth].mean() > 0.9 > found[~truth].mean()  # maps of so few pixels are smooth

    again = clbench(*words)
    assert again.returncode == 1 and "holds predictions" in again.stderr

    # The same from Python.
    import clbench as package

    detector = package.load(run)
    for one in detector.predict(given / "blot", false_positive_rate=0.02):
        row = rows[f"given/blot/{one.path.name}"]
        assert one.score == pytest.approx(float(row["score"]), rel=1e-5)
        assert int(one.mask.sum()) == int(row["anomalous_pixels"]) and one.anomalous
    with pytest.raises(UserError, match="corrupt"):
        list(detector.predict([given / "good"]))


def test_a_detector_that_learned_from_all_says_so_and_single_asks_for_a_task(
    folder: Path, train: Train, tmp_path: Path
) -> None:
    assert train("method=padim", "strategy=single").returncode == 0
    (run,) = run_directories(tmp_path)
    image = str(folder / "cloth/test/good/000.png")
    done = clbench("predict", str(run), image, "--output", str(tmp_path / "found"))
    assert done.returncode == 1 and "has a model for each of brick, cloth, plate" in done.stderr
    done = clbench(
        "predict", str(run), image, "--output", str(tmp_path / "found"), "--task", "cloth", "--only-scores"
    )
    assert done.returncode == 0, done.stderr
    assert "method.held_out=0.1" in done.stdout and "that the detector learned from" in done.stdout
    assert sorted(path.name for path in (tmp_path / "found").iterdir()) == ["scores.csv", "scores.json"]
    (run / "thresholds.json").unlink()
    done = clbench("predict", str(run), image, "--output", str(tmp_path / "other"), "--task", "cloth")
    assert done.returncode == 1 and "has no thresholds.json" in done.stderr


def test_predictions_stay_in_their_folder_whatever_the_paths(tmp_path: Path) -> None:
    """With `..` in a path, names would lead out of the output folder, onto the images themselves."""
    (tmp_path / "photos").mkdir()
    (tmp_path / "a" / "photos").mkdir(parents=True)
    one, other = tmp_path / "photos" / "n.png", tmp_path / "a" / "photos" / "n.png"
    for path in (one, other):
        cv2.imwrite(str(path), np.zeros((8, 8, 3), np.uint8))
    roundabout = tmp_path / "a" / ".." / "photos"
    files = find_images([other, roundabout, one])
    assert files == [other, one]
    given = [str(other), str(roundabout)]
    names = predict._pictures(files, predict._common(given, files))
    assert sorted(names.values()) == ["a/photos/n.png", "photos/n.png"]
    with pytest.raises(UserError, match="matches no file"):
        find_images([str(tmp_path / "*.foo")])


def test_a_finished_run_is_not_used_without_what_it_learned_last(train: Train, tmp_path: Path) -> None:
    assert train("method=padim").returncode == 0
    (directory,) = run_directories(tmp_path)
    last = directory / "checkpoint" / "stage-0002.safetensors"
    content = bytearray(last.read_bytes())
    content[-5] ^= 1
    last.write_bytes(content)
    with pytest.raises(
        UserError, match="in the last of its 3 stages is missing or damaged.*goes on from stage 2"
    ):
        load(directory)
    (directory / "summary.json").unlink()
    assert train("method=padim").returncode == 0
    load(directory)


@pytest.mark.parametrize("word", ["typo", "typo/*.png", ""])
def test_images_that_are_not_there_are_said_before_a_run_is_loaded(word: str, tmp_path: Path) -> None:
    refused = clbench("predict", str(tmp_path), word, "--output", str(tmp_path / "found"))
    assert refused.returncode == 1 and refused.stderr.count("\n") == 1
    assert "error: " in refused.stderr and "holds no trained" not in refused.stderr
    assert not (tmp_path / "found").exists()
