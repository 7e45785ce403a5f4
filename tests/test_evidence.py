"""What each test image contributes is kept, and metrics of resamples follow from it."""

from pathlib import Path

import numpy as np
import pytest
from conftest import Train, run_directories

from clbench.metrics import curves
from clbench.metrics.names import USUAL
from clbench.metrics.resampling import Evidence, metrics, weights
from clbench.recording.run_directory import RunDirectory
from clbench.report.reading import read

SIDE = 96

NONE = dict.fromkeys(USUAL)  # the exact metrics, which these tests do not look at


def predictions(seed: int, shape: str, count: int = 30) -> tuple[np.ndarray, ...]:
    """Scores, labels, maps and masks of images of which a third is good; maps are noise that rises on defects."""
    draw = np.random.default_rng(seed)
    maps = draw.normal(size=(count, SIDE, SIDE)) + draw.normal(size=(count, 1, 1)) / 2
    masks, labels = np.zeros((count, SIDE, SIDE), bool), np.arange(count) >= count // 3
    for index in np.flatnonzero(labels):
        for _ in range(draw.integers(1, 4)):
            y, x, high, wide = *draw.integers(0, SIDE - 30, 2), *draw.integers(3, 30, 2)
            masks[index, y : y + high, x : x + wide] = True
        maps[index] += masks[index] * draw.gamma(2, 1)
    maps = {
        "normal": lambda: maps,
        "wide": lambda: np.exp(3 * maps),  # few scores far above the others
        "negative": lambda: -np.exp(-maps),
        "few values": lambda: np.round(2 * maps) / 2,
        "constant": lambda: np.zeros_like(maps),
    }[shape]().astype(np.float32)
    return maps.reshape(count, -1).max(axis=1).astype(np.float64), labels, maps, masks


def exact(
    scores: np.ndarray, labels: np.ndarray, maps: np.ndarray, masks: np.ndarray
) -> dict[str, float | None]:
    return {**curves.image_metrics(scores, labels), **curves.pixel_metrics(maps, masks)}


@pytest.mark.parametrize("shape", ["normal", "wide", "negative", "few values", "constant"])
def test_metrics_of_evidence_are_those_of_the_images_within_a_thousandth(shape: str) -> None:
    for seed in range(3):
        given = predictions(seed, shape)
        evidence = Evidence.of(*given, [], "7e5e", NONE)
        drawn = weights(given[1], 2, seed)
        found = metrics(evidence, np.concatenate([np.ones((1, len(given[0])), np.float32), drawn]))
        assert evidence.normal.shape[1] <= 640
        for number, one in enumerate([np.ones(len(given[0])), *drawn]):
            rows = np.repeat(
                np.arange(len(one)), one.astype(int)
            )  # the images of the resample, some several times
            for name, value in exact(*(part[rows] for part in given)).items():
                tolerance = 1e-12 if name.startswith("image") else 1e-3
                assert found[name][number] == pytest.approx(value, abs=tolerance), (name, number)


def test_images_without_an_outline_count_for_images_alone() -> None:
    scores, labels, maps, masks = predictions(0, "normal")
    maps[-1], masks[-1] = 1e6, True
    found = metrics(
        Evidence.of(scores, labels, maps, masks, [len(maps) - 1], "7e5e", NONE), np.ones((1, len(maps)))
    )
    expected = {**curves.image_metrics(scores, labels), **curves.pixel_metrics(maps[:-1], masks[:-1])}
    assert {name: found[name][0] for name in USUAL} == pytest.approx(expected, abs=1e-3)


@pytest.mark.parametrize("missing", ["good", "defective", "outlines", "images"])
def test_what_is_undefined_of_the_images_is_undefined_of_evidence(missing: str) -> None:
    scores, labels, maps, masks = predictions(0, "normal", 9)
    unknown: list[int] = []
    if missing == "good":
        labels, masks = np.ones_like(labels), np.ones_like(masks)
    elif missing == "defective":
        labels, masks = np.zeros_like(labels), np.zeros_like(masks)
    elif missing == "outlines":
        unknown = np.flatnonzero(labels).tolist()
    else:
        unknown = list(range(9))
    found = metrics(Evidence.of(scores, labels, maps, masks, unknown, "7e5e", NONE), np.ones((2, 9)))
    undefined = {name for name in USUAL if np.isnan(found[name]).all()}
    assert undefined == set(USUAL if missing in ("good", "defective") else USUAL[3:])


def test_resamples_draw_each_class_as_often_as_it_is_there() -> None:
    labels = np.arange(30) >= 20
    drawn = weights(labels, 500, 3)
    assert (drawn[:, :20].sum(axis=1) == 20).all() and (drawn[:, 20:].sum(axis=1) == 10).all()
    assert np.abs(drawn.mean(axis=0) - 1).max() < 5 / np.sqrt(500)
    assert (drawn == weights(labels, 500, 3)).all() and (drawn != weights(labels, 500, 4)).any()


@pytest.mark.parametrize("strategy", ["finetune", "single", "joint"])
def test_a_run_keeps_evidence_that_its_final_metrics_follow_from(
    strategy: str, train: Train, tmp_path: Path
) -> None:
    result = train("method=padim", f"strategy={strategy}")
    assert result.returncode == 0, result.stderr
    (path,) = run_directories(tmp_path)
    (run,) = read([path.parent])
    for column, category in enumerate(run.categories):
        assert (path / "evidence" / f"{category}.npz").stat().st_size < 1_000_000
        arrays = RunDirectory(path).evidence(category)
        assert arrays is not None
        evidence = Evidence.from_arrays(arrays)
        found = metrics(evidence, np.ones((1, len(evidence.scores))))
        for name in USUAL:
            assert found[name][0] == pytest.approx(run.R[name][-1][column], abs=1e-3), (category, name)
    RunDirectory(path).clear()
    assert not (path / "evidence").exists()


def test_damaged_evidence_is_none(tmp_path: Path) -> None:
    directory = RunDirectory(tmp_path)
    arrays = Evidence.of(*predictions(0, "normal", 6), [], "7e5e", NONE).arrays()
    directory.write_evidence("nut", arrays)
    file = tmp_path / "evidence" / "nut.npz"
    whole = file.read_bytes()
    assert directory.evidence("pin") is None
    for damaged in (b"", whole[:-30], whole[:100] + b"\xff" * 40 + whole[140:]):
        file.write_bytes(damaged)
        assert directory.evidence("nut") is None
    for name, wrong in (
        ("labels", np.zeros(6)),
        ("scores", np.full(6, np.nan)),
        ("images", np.array("no digest")),
    ):
        with pytest.raises(ValueError):
            Evidence.from_arrays({**arrays, name: wrong})
    with pytest.raises(ValueError, match="other numbers of images"):
        Evidence.from_arrays({**arrays, "scores": np.zeros(3)})
