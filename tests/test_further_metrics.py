"""Metrics beside the seven: worked examples, direct versions of AUPIMO and AU-sPRO, and MVTec LOCO's saturation areas."""

import json
import re
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from conftest import ROOT
from scipy import ndimage

from clbench.config import check, composed
from clbench.data import defects as outlined
from clbench.data import stream, unchanged
from clbench.data.defects import CONFIG, Saturation, load_defects
from clbench.data.images import ImageSet
from clbench.data.mvtec_loco import MVTecLOCO
from clbench.data.samples import GOOD, Defect, Geometry
from clbench.errors import UserError
from clbench.evaluation import metrics_of
from clbench.methods.base import Prediction
from clbench.metrics import curves
from clbench.metrics.curves import image_metrics, pixel_metrics
from clbench.metrics.names import METRICS, USUAL
from clbench.metrics.pimo import aupimo
from clbench.results import Results

# AUPIMO


@pytest.fixture(scope="module")
def decades() -> tuple[np.ndarray, np.ndarray]:
    """Three images of 1000 x 1000 alike: 10^6, 10^5, ..., 1 pixels score 1, 2, ..., 7 or more. The first is normal, all of
    the second is anomalous, and of the third the 10^5 highest pixels are."""
    score = np.ones(10**6, np.float32)
    for level in range(2, 8):
        score[: 10 ** (7 - level)] = level
    masks = np.zeros((3, 1000, 1000), bool)
    masks[1], masks[2, :100] = True, True
    return np.stack([score.reshape(1000, 1000)] * 3), masks


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [(0.1, 1, [0.55, 1]), (1e-3, 1e-1, [0.03025, 0.3025]), (1e-5, 1e-4, [5.5e-5, 5.5e-4])],
)
def test_aupimo_of_the_reference_s_example(
    decades: tuple[np.ndarray, np.ndarray], low: float, high: float, expected: list[float]
) -> None:
    found = aupimo(*decades, np.array([False, True, True]), low, high, least=2)
    assert found == pytest.approx(expected, abs=1e-12)


def steps(counts: dict[float, int], size: int, rest: float = 0.0) -> np.ndarray:
    """An image of one row: so many pixels of each score, and the rest of another."""
    scores = np.repeat(np.array(list(counts), np.float32), list(counts.values()))
    return np.append(scores, np.full(size - len(scores), rest, np.float32))[None]


def test_aupimo_worked_out_by_hand_at_the_published_rates() -> None:
    """F = 1e-5, 2e-5, 5e-5 and 1e-4, where T is 0.2, 0.4, 0.5 and 0.6."""
    normal, defective = (
        steps({9: 1, 8: 1, 7: 3, 6: 5}, 10**5),
        steps({9: 2, 8: 2, 7: 1, 6: 1}, 10**5, rest=-1),
    )
    maps, masks = np.stack([normal, defective]), np.zeros((2, 1, 10**5), bool)
    masks[1, 0, :10] = True
    found = aupimo(maps, masks, np.array([False, True]), least=4)
    assert found is not None and found.tolist() == pytest.approx([0.434949], abs=1e-6)
    assert aupimo(maps, masks, np.array([False, True]), least=5) is None
    assert aupimo(maps, masks, np.array([False, True])) is None  # four pixels' rates are no curve
    fewer = maps[..., :-1], masks[..., :-1]
    assert aupimo(*fewer, np.array([False, True]), least=2) is None  # one of 99,999 is above 1e-5
    assert aupimo(maps, masks, np.array([True, True]), least=1) is None
    assert aupimo(np.ones_like(maps), masks, np.array([False, True]), least=1) is None  # F jumps to 1


def direct_aupimo(maps, masks, defective, low, high):
    normal = maps[~defective].ravel()
    thresholds = np.unique(normal)[::-1]
    rates = np.array([np.mean(normal >= threshold) for threshold in thresholds])
    areas = []
    for score, mask in zip(maps[defective], masks[defective], strict=True):
        overlap = [np.mean(score[mask] >= threshold) for threshold in thresholds]
        inside = (rates > low) & (rates < high)
        x = np.log([low, *rates[inside], high])
        areas.append(np.trapezoid(np.interp(x, np.log(rates), overlap), x) / np.log(high / low))
    return areas


@pytest.mark.parametrize("values", [7, 40, 10**6])
@pytest.mark.parametrize("seed", range(4))
def test_aupimo_equals_a_loop_over_every_threshold(values: int, seed: int) -> None:
    draw = np.random.default_rng(seed)
    maps = (draw.integers(0, values, (6, 9, 11)) - values // 2).astype(np.float32)
    masks = draw.random(maps.shape) < 0.3
    defective = draw.permutation(np.array([False, True] * 3))
    masks[~defective] = False
    low, high = (0.2, 0.9) if values == 7 else (0.03, 0.37)
    found = aupimo(maps, masks, defective, low, high, least=2)
    assert found == pytest.approx(direct_aupimo(maps, masks, defective, low, high), abs=1e-12)


# AU-sPRO


@pytest.mark.parametrize(
    ("threshold", "relative", "pixels", "enlargement", "expected"),
    [
        (0.3, True, 100, 1.0, 30),
        (0.29, True, 100, 1.0, 28),  # cut, as 0.29 * 100 is a little less than 29
        (1.0, True, 77, 0.1, 77),
        (40, False, 25, 1.0, 25),
        (40, False, 100, 1.0, 40),
        (40, False, 20, 0.25, 10),  # at half the side
        (0.01, True, 5, 1.0, 1),
    ],
)
def test_saturation_areas(
    threshold: float, relative: bool, pixels: int, enlargement: float, expected: int
) -> None:
    entry = Saturation(
        defect_name="x", pixel_value=1, saturation_threshold=threshold, relative_saturation=relative
    )
    assert entry.area(pixels, enlargement) == expected


@pytest.mark.parametrize(
    ("pixels", "saturation", "found", "expected"), [(100, 30, 12, 0.4), (100, 30, 45, 1), (25, 25, 10, 0.4)]
)
def test_overlap_of_a_defect_is_saturated(pixels: int, saturation: int, found: int, expected: float) -> None:
    """With `found` of its pixels above all normal ones, and the others below, the curve is level at the overlap."""
    maps, masks = steps({9: found}, 1000, rest=1)[None], np.zeros((1, 1, 1000), bool)
    masks[..., :pixels] = True
    maps[..., pixels:] = 2
    defects = [Defect(0, np.arange(pixels, dtype=np.int32), saturation)]
    area = pixel_metrics(maps, masks, further=["auspro_30"], defects=defects)["auspro_30"]
    assert area == pytest.approx(expected, abs=1e-12)


def test_auspro_worked_out_by_hand() -> None:
    """Corners at (0.02, 0.5) and (0.10, 0.8): 0.6125 at the limit of 0.05, which makes 0.43375."""
    defect, normal = steps({9: 5, 8: 3}, 10, rest=-1), steps({9: 2, 8: 8}, 100)
    maps, masks = np.hstack([defect, normal])[None], np.zeros((1, 1, 110), bool)
    masks[..., :10] = True
    defects = [Defect(0, np.arange(10, dtype=np.int32), 10)]
    found = pixel_metrics(maps, masks, further=["auspro_5", "aupro_5"], defects=defects)
    assert found["auspro_5"] == pytest.approx(0.43375, abs=1e-12) == found["aupro_5"]


def direct_auspro(maps, masks, defects, limit):
    normal = maps[masks == 0]
    x, y = [0.0], [0.0]
    for threshold in np.unique(maps)[::-1]:
        x.append(np.mean(normal >= threshold))
        overlaps = [
            min(np.count_nonzero(maps[each.image].ravel()[each.pixels] >= threshold) / each.saturation, 1)
            for each in defects
        ]
        y.append(np.mean(overlaps))
    inside = np.array(x) <= limit
    last = np.count_nonzero(inside) - 1
    x, y = np.array(x), np.array(y)
    at_limit = y[last]
    if not inside.all():
        at_limit += (y[last + 1] - y[last]) * (limit - x[last]) / (x[last + 1] - x[last])
    return np.trapezoid(np.append(y[inside], at_limit), np.append(x[inside], limit)) / limit


@pytest.mark.parametrize("values", [5, 60, 10**6])
@pytest.mark.parametrize("seed", range(4))
def test_auspro_equals_a_loop_over_every_threshold(values: int, seed: int) -> None:
    draw = np.random.default_rng(seed)
    maps = (draw.integers(0, values, (4, 8, 9)) - values // 2).astype(np.float32)
    defects = []
    for image in (1, 1, 2, 3, 3):  # those of one image overlap
        pixels = np.sort(draw.permutation(72)[: draw.integers(2, 25)]).astype(np.int32)
        defects.append(Defect(image, pixels, int(draw.integers(1, len(pixels) + 1))))
    masks = np.zeros(maps.shape, bool)
    for defect in defects:
        masks[defect.image].ravel()[defect.pixels] = True
    found = pixel_metrics(maps, masks, further=list(curves.SATURATED), defects=defects)
    assert tuple(found) == (*USUAL[3:], *curves.SATURATED)
    for name, limit in curves.SATURATED.items():
        assert found[name] == pytest.approx(direct_auspro(maps, masks, defects, limit), abs=1e-12), name


@pytest.mark.parametrize("chunk", [5, curves.CHUNK])
def test_areas_to_other_rates_are_those_of_the_same_curve(
    chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(curves, "CHUNK", chunk)
    draw = np.random.default_rng(0)
    maps, masks = draw.integers(0, 30, (3, 12, 12)).astype(np.float32), draw.random((3, 12, 12)) < 0.1
    regions = []
    for image, mask in enumerate(masks):
        label, count = ndimage.label(mask, structure=np.ones((3, 3)))
        regions += [(image, np.flatnonzero(label == k).astype(np.int32)) for k in range(1, count + 1)]
    whole = [Defect(image, pixels, len(pixels)) for image, pixels in regions]
    found = pixel_metrics(maps, masks, further=["aupro_5", "auspro_5", "auspro_30"], defects=whole)
    usual = pixel_metrics(maps, masks)
    assert {name: found[name] for name in usual} == usual
    assert found["aupro_5"] == pixel_metrics(maps, masks, limit=0.05)["aupro"]
    # Without saturation, and with regions as defects, it is AU-PRO.
    assert found["auspro_5"] == pytest.approx(found["aupro_5"], abs=1e-12)
    assert found["auspro_30"] == pytest.approx(found["aupro"], abs=1e-12)


# What an evaluation gives


def test_an_evaluation_measures_what_is_asked_for_and_leaves_out_defects_that_nobody_outlined() -> None:
    draw = torch.Generator().manual_seed(0)
    maps, kinds = torch.rand((6, 350, 350), generator=draw), [GOOD, "cut", "cut", GOOD, "dent", GOOD]
    masks = torch.zeros(maps.shape, dtype=torch.bool)
    masks[2, :40, :40] = masks[4, 9:60, 7:50] = True
    places = {at: np.flatnonzero(masks[at].numpy()).astype(np.int32) for at in (2, 4)}
    images = ImageSet(
        images=torch.zeros(6, 3, 350, 350, dtype=torch.uint8),
        masks=masks,
        kinds=kinds,
        names=kinds,
        unknown=[1],
        defects=[Defect(at, pixels, 90) for at, pixels in places.items()],
    )
    maps[masks] += torch.rand(int(masks.sum()), generator=draw) / 100
    prediction, further = Prediction(maps, maps.amax((1, 2))), ["aupro_5", "aupimo", "auspro_5"]
    found, kept = metrics_of(prediction, images, further), [0, 2, 3, 4, 5]
    assert tuple(found) == (*USUAL, "aupro_5", "auspro_5", "aupimo")
    known = maps[kept].numpy(), masks[kept].numpy()
    each_image = aupimo(*known, np.array([False, True, False, True, False]))
    assert each_image is not None and len(each_image) == 2 and 0 < found["aupimo"] == each_image.mean() < 1
    defects = [Defect(1, places[2], 90), Defect(3, places[4], 90)]
    expected = pixel_metrics(*known, further=further, defects=defects)
    assert {name: found[name] for name in expected} == expected
    assert tuple(metrics_of(prediction, images)) == USUAL


# Averages


def test_categories_are_measured_one_by_one_and_count_alike() -> None:
    """One scale of scores a category: pooled, the images of two would have an AUROC of 0.75."""
    scores, labels = np.array([0.1, 0.9, 10, 11]), np.array([False, True, False, True])
    each = [image_metrics(scores[part], labels[part])["image_auroc"] for part in (slice(0, 2), slice(2, 4))]
    assert each == [1, 1] and image_metrics(scores, labels)["image_auroc"] == 0.75
    results = Results([["a", "b", "c"], ["d"]], [[0], [1]])
    for category, value in enumerate((0.9, 0.9, 0.6, 0.4)):
        results.add(1, category, dict.fromkeys(USUAL, value))
    assert results.summary()["final"]["aupro"] == pytest.approx(0.7)  # over two tasks it would be 0.6


@pytest.mark.parametrize(("before", "forgotten", "relative"), [(0.8, 0.075, 9.92), (0.95, 0.1, 9.92)])
def test_summaries_of_the_worked_stream(before: float, forgotten: float, relative: float) -> None:
    results = Results([["a"], ["b"], ["c"]], [[0], [1], [2]])
    for stage, row in enumerate([[0.9], [before, 0.7], [0.85, 0.6, 0.95]]):
        for category, value in enumerate(row):
            results.add(stage, category, dict.fromkeys(USUAL, value))
    summary = results.summary()
    assert summary["final"]["pixel_f1"] == pytest.approx(0.8)
    assert summary["forgetting"]["pixel_f1"] == pytest.approx(forgotten)
    assert summary["backward_transfer"]["pixel_f1"] == pytest.approx(-0.075)
    assert summary["average_forgetting_pct"] == pytest.approx(relative, abs=0.005)


# MVTec LOCO AD

ENTRIES = [
    {"defect_name": "missing", "pixel_value": 221, "saturation_threshold": 300, "relative_saturation": False},
    {"defect_name": "scratch", "pixel_value": 250, "saturation_threshold": 0.5, "relative_saturation": True},
]


@pytest.fixture
def loco(tmp_path: Path) -> Path:
    """A category of images of 80 x 40 pixels: a good one, one with two overlapping defects, and one with a tiny one."""
    folder = tmp_path / "loco" / "pins"

    def write(name: str, pixels: np.ndarray) -> None:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        assert cv2.imwrite(str(folder / name), pixels)

    def mask(value: int, rows: slice, columns: slice) -> np.ndarray:
        pixels = np.zeros((40, 80), np.uint8)
        pixels[rows, columns] = value
        return pixels

    draw = np.random.default_rng(0)
    for name in (
        "train/good/000",
        "test/good/000",
        "test/logical_anomalies/000",
        "test/structural_anomalies/000",
    ):
        write(f"{name}.png", draw.integers(0, 255, (40, 80, 3), dtype=np.uint8))
    write("ground_truth/logical_anomalies/000/000.png", mask(221, slice(0, 20), slice(0, 40)))
    write("ground_truth/logical_anomalies/000/001.png", mask(250, slice(10, 30), slice(20, 60)))
    write("ground_truth/structural_anomalies/000/000.png", mask(250, slice(0, 1), slice(0, 1)))
    (folder / CONFIG).write_text(json.dumps(ENTRIES))
    return folder


def test_each_defect_of_mvtec_loco_has_its_pixels_and_saturation_area(loco: Path, tmp_path: Path) -> None:
    dataset = MVTecLOCO(str(loco.parent))
    first, second, tiny = dataset.defects("pins", Geometry(None), tmp_path)
    assert [each.image for each in (first, second, tiny)] == [1, 1, 2]
    assert [len(each.pixels) for each in (first, second, tiny)] == [800, 800, 1]
    assert [each.saturation for each in (first, second, tiny)] == [300, 400, 1]
    assert set(first.pixels) & set(second.pixels) == {
        80 * y + x for y in range(10, 20) for x in range(20, 40)
    }
    # Half as wide, as high as before: 300 pixels of the file are 150, and half of 400 pixels is 200.
    first, second, *_ = dataset.defects("pins", Geometry(40), tmp_path)
    assert [(len(each.pixels), each.saturation) for each in (first, second)] == [(400, 150), (400, 200)]
    assert len(dataset.defects("pins", Geometry(10), tmp_path)) == 2  # nothing is left of the tiny one
    first, second = dataset.defects("pins", Geometry(40, 20), tmp_path)  # a crop takes a part of the first
    assert [(len(each.pixels), each.saturation) for each in (first, second)] == [(100, 100), (400, 200)]


def test_a_stream_reads_defects_only_where_they_are_asked_for(loco: Path, tmp_path: Path) -> None:
    dataset, given = MVTecLOCO(str(loco.parent)), ([["pins"]], Geometry(40), tmp_path / "cache")
    [task] = stream.load_tasks(dataset, *given, lambda *_: None, defects=True)
    [category] = task.categories
    assert [defect.image for defect in category.test.defects] == [1, 1]
    merged = torch.zeros(category.test.masks[1].numel(), dtype=torch.bool)
    for defect in category.test.defects[:2]:
        merged[torch.from_numpy(defect.pixels)] = True
    assert torch.equal(merged.view_as(category.test.masks[1]), category.test.masks[1])
    again = unchanged.fingerprints(dataset, ["pins"], *given[1:], defects=True)
    assert again == {"pins": category.fingerprints} and len(category.fingerprints) == 3
    (loco / CONFIG).write_text(json.dumps([ENTRIES[0], {**ENTRIES[1], "saturation_threshold": 0.25}]))
    now = unchanged.fingerprints(dataset, ["pins"], *given[1:], defects=True)
    assert unchanged.changes(again, now) == "defects or saturation areas of 'pins' changed"
    (loco / CONFIG).unlink()
    [task] = stream.load_tasks(dataset, *given, lambda *_: None)
    assert task.categories[0].test.defects == [] and task.categories[0].fingerprints == again["pins"][:2]


def test_masks_are_decoded_once(loco: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dataset = MVTecLOCO(str(loco.parent))
    samples = dataset.samples("pins", "test")
    monkeypatch.setattr("clbench.data.files._CLOCK_NS", 0)  # the files are as old as they need to be
    given = samples, loco / CONFIG, Geometry(None), tmp_path / "cache"
    before = load_defects(*given)
    monkeypatch.setattr(outlined, "_at_size", lambda *_, **__: pytest.fail("decoded again"))
    assert outlined.fingerprint(load_defects(*given)) == outlined.fingerprint(before)
    [stored] = (tmp_path / "cache").glob("*.outlines.npz")
    stored.write_bytes(stored.read_bytes()[:-100])
    monkeypatch.undo()
    assert outlined.fingerprint(load_defects(*given)) == outlined.fingerprint(before)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, r"defects_config.json cannot be read \(No such file.*leave auspro_\* out"),
        ("[{", "defects_config.json is no list of saturation areas .*Invalid JSON"),
        ("{}", "is no list of saturation areas .*valid array"),
        (json.dumps([ENTRIES[0] | {"pixel_value": "221"}]), r"\(0.pixel_value: .*valid integer"),
        (json.dumps([ENTRIES[1] | {"saturation_threshold": 40}]), "a share of 40 is more than all"),
        (
            json.dumps([ENTRIES[0] | {"saturation_threshold": 0.5}]),
            "0.5 is no whole number of pixels, and no share",
        ),
        (json.dumps([*ENTRIES, ENTRIES[1] | {"pixel_value": 221}]), "value 221 to 'missing' and 'scratch'"),
        (
            json.dumps(ENTRIES[:1]),
            r"mask .*000/001.png has the value 250, which .* does not list; it lists 221: ",
        ),
    ],
)
def test_damaged_saturation_areas_are_told_in_one_line(
    loco: Path, tmp_path: Path, text: str | None, message: str
) -> None:
    (loco / CONFIG).unlink()
    if text is not None:
        (loco / CONFIG).write_text(text)
    with pytest.raises(UserError, match=message) as caught:
        MVTecLOCO(str(loco.parent)).defects("pins", Geometry(None), tmp_path)
    assert "\n" not in str(caught.value)


def test_a_mask_of_two_defects_is_told(loco: Path, tmp_path: Path) -> None:
    path = loco / "ground_truth/logical_anomalies/000/000.png"
    pixels = cv2.imread(str(path), cv2.IMREAD_GRAYSCALE)
    pixels[5:9, 70:75] = 250
    cv2.imwrite(str(path), pixels)
    with pytest.raises(
        UserError, match=r"000/000.png marks with 2 values, 221 to 250, where one defect has one"
    ):
        MVTecLOCO(str(loco.parent)).defects("pins", Geometry(None), tmp_path)


def test_saturated_overlap_is_refused_where_a_dataset_has_no_saturation_areas() -> None:
    with pytest.raises(
        UserError, match=r"metrics.further=\[auspro_5,auspro_30\] needs .* dataset=synthetic does not"
    ):
        check(composed("metrics=loco"))
    given = check(composed("metrics=loco", "dataset=mvtec_loco", "dataset.root=/data"))
    assert given.metrics.further == ["auspro_5", "auspro_30"]


def test_every_metric_has_a_heading_to_link_to() -> None:
    headings = re.findall(
        r"^### (\w+)$", (ROOT / "docs" / "metrics.md").read_text(encoding="utf-8"), re.MULTILINE
    )
    summaries = Results([["a"]], [[0]]).summary()
    assert sorted(headings) == sorted([*METRICS, *summaries, "time", "energy", "operations"])
