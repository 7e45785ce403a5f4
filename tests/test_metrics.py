"""Pixel and image metrics against scikit-learn and a direct AU-PRO; continual summaries by hand."""

import tracemalloc

import numpy as np
import pytest
from scipy import ndimage
from sklearn.metrics import average_precision_score, precision_recall_curve, roc_auc_score

from clbench.metrics import continual, curves
from clbench.metrics.names import USUAL

# scikit-learn sums the scores to see whether they are finite, which overflows for extreme ones.
pytestmark = pytest.mark.filterwarnings("ignore:invalid value encountered in reduce:RuntimeWarning")

KINDS = {
    "distinct": lambda draw, shape: draw.permutation(np.prod(shape)).reshape(shape) / 7,
    "few values": lambda draw, shape: draw.integers(0, 4, shape),
    "negative": lambda draw, shape: -np.exp(draw.normal(size=shape)),
    "both signs, ties": lambda draw, shape: draw.integers(-3, 4, shape) / 2,
    "all equal": lambda draw, shape: np.full(shape, 0.25),
    "signed zeros": lambda draw, shape: draw.choice([-0.0, 0.0], shape),
    "extreme": lambda draw, shape: draw.choice([-3e38, -1e-45, 0, 1e-45, 1e-38, 3e38], shape),
}
CASES = [(kind, seed) for kind in KINDS for seed in range(4)]


@pytest.fixture(params=[1, 5, curves.CHUNK], ids=lambda size: f"chunk={size}")
def chunk(request, monkeypatch):
    """Small chunks put a chunk's border at every place of a tie."""
    monkeypatch.setattr(curves, "CHUNK", request.param)


def random_task(kind, seed):
    draw = np.random.default_rng(seed)
    maps = KINDS[kind](draw, (3, 9, 7)).astype(np.float32)
    masks = draw.random(maps.shape) < 0.2
    masks[0] = False  # a good image, whose pixels count as false positives
    return maps, masks


def direct_aupro(maps, masks, limit):
    """Every distinct score is a threshold; the overlap of every region is counted at each."""
    regions = []
    for image, mask in enumerate(masks):
        label, count = ndimage.label(mask, structure=np.ones((3, 3)))
        regions += [maps[image][label == k] for k in range(1, count + 1)]
    normal = maps[~masks]
    area, x, y = 0.0, 0.0, 0.0
    for threshold in np.unique(maps)[::-1]:
        next_x = np.mean(normal >= threshold)
        next_y = np.mean([np.mean(region >= threshold) for region in regions])
        if next_x > limit:
            at_limit = y + (next_y - y) * (limit - x) / (next_x - x)
            return (area + (limit - x) * (y + at_limit) / 2) / limit
        area += (next_x - x) * (y + next_y) / 2
        x, y = next_x, next_y
    return area / limit


def scikit_learn(scores, truth):
    precision, recall, _ = precision_recall_curve(truth, scores)
    f1 = 2 * precision * recall / np.maximum(precision + recall, 1e-12)
    return [roc_auc_score(truth, scores), average_precision_score(truth, scores), f1.max()]


@pytest.mark.parametrize(("kind", "seed"), CASES)
def test_pixel_curves_equal_scikit_learn(kind, seed, chunk):
    maps, masks = random_task(kind, seed)
    ours = curves.pixel_metrics(maps, masks)
    expected = scikit_learn(maps.ravel(), masks.ravel())
    assert [ours[name] for name in USUAL[3:6]] == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("limit", [0.05, 0.3, 1.0])
@pytest.mark.parametrize(("kind", "seed"), CASES)
def test_aupro_equals_a_loop_over_every_threshold(kind, seed, limit, chunk):
    maps, masks = random_task(kind, seed)
    expected = direct_aupro(maps, masks, limit)
    assert curves.pixel_metrics(maps, masks, limit)["aupro"] == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize(("kind", "seed"), CASES)
def test_image_metrics_equal_scikit_learn(kind, seed, dtype):
    draw = np.random.default_rng(seed)
    scores = KINDS[kind](draw, (30,)).astype(dtype)
    labels = np.arange(30) % 3 == 0
    ours = curves.image_metrics(scores, labels)
    assert tuple(ours) == USUAL[:3]
    assert list(ours.values()) == pytest.approx(scikit_learn(scores, labels), abs=1e-12)


def test_image_scores_closer_than_float32_keep_their_order():
    scores = np.array([1.0, 1.0 + 1e-12])
    assert curves.image_metrics(scores, np.array([False, True]))["image_auroc"] == 1


def test_diagonal_neighbours_are_one_region():
    masks = np.zeros((1, 4, 4), bool)
    masks[0, [0, 1], [0, 1]] = True
    masks[0, 3, 3] = True
    maps = np.zeros((1, 4, 4), np.float32)
    maps[0, 3, 3] = 1  # one of two regions found without a false positive: PRO 0.5, then a line to 1
    assert curves.pixel_metrics(maps, masks, limit=1.0)["aupro"] == pytest.approx(0.75)


def test_perfect_maps_score_one():
    masks = random_task("distinct", 0)[1]
    found = curves.pixel_metrics(masks.astype(np.float32) - 3, masks)
    assert tuple(found) == USUAL[3:]
    assert list(found.values()) == pytest.approx([1, 1, 1, 1])


@pytest.mark.parametrize("label", [False, True])
def test_metrics_of_one_class_are_undefined(label):
    images = curves.image_metrics(np.arange(4.0), np.full(4, label))
    pixels = curves.pixel_metrics(np.ones((2, 3, 3), np.float32), np.full((2, 3, 3), label))
    assert set(images.values()) == set(pixels.values()) == {None}
    assert (*images, *pixels) == USUAL


def test_metrics_of_nothing_are_undefined():
    assert set(curves.image_metrics(np.zeros(0), np.zeros(0, bool)).values()) == {None}
    nothing = np.zeros((0, 3, 3))
    assert set(curves.pixel_metrics(nothing.astype(np.float32), nothing.astype(bool)).values()) == {None}


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_scores_that_are_not_finite_are_refused_with_their_place(value):
    maps, masks = random_task("distinct", 0)
    maps[1, 2, 3] = maps[2, 0, 0] = value
    with pytest.raises(ValueError, match=r"2 of 189 .* at \[1, 2, 3\]"):
        curves.pixel_metrics(maps, masks)
    with pytest.raises(ValueError, match=r"1 of 2 .* at \[1\]"):
        curves.image_metrics(np.array([0.0, value]), np.array([False, True]))


def test_arguments_that_do_not_fit_are_refused():
    maps, masks = random_task("distinct", 0)
    with pytest.raises(ValueError, match="float64"):
        curves.pixel_metrics(maps.astype(np.float64), masks)
    with pytest.raises(ValueError, match="shape"):
        curves.pixel_metrics(maps, masks[:2])
    with pytest.raises(ValueError, match="shape"):
        curves.pixel_metrics(maps[0], masks[0])
    with pytest.raises(ValueError, match="limit=0"):
        curves.pixel_metrics(maps, masks, limit=0)


@pytest.mark.parametrize("anomalous", [0.02, 0.9])
def test_arguments_stay_as_they_are_and_memory_is_the_sort_keys(anomalous):
    draw = np.random.default_rng(0)
    maps = draw.normal(size=(40, 256, 256)).astype(np.float32)
    masks = draw.random(maps.shape) < anomalous
    before = maps.copy(), masks.copy()
    tracemalloc.start()
    curves.pixel_metrics(maps, masks)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 8 * maps.size + 10e6
    assert np.array_equal(maps, before[0]) and np.array_equal(masks, before[1])


# Three tasks learned in turn. Just learned: 0.8, 0.5, 0.9; final: 0.4, 0.6, 0.9.
TRIANGLE = [[0.8, None, None], [0.9, 0.5, None], [0.4, 0.6, 0.9]]
LEARNED = [0, 1, 2]


def test_summaries_of_a_run_worked_out_by_hand():
    assert continual.final_mean(TRIANGLE) == pytest.approx((0.4 + 0.6 + 0.9) / 3)
    assert continual.average_forgetting_pct(TRIANGLE, LEARNED) == pytest.approx((50 - 20) / 2)
    assert continual.forgetting(TRIANGLE, LEARNED) == pytest.approx(((0.9 - 0.4) + (0.5 - 0.6)) / 2)
    assert continual.backward_transfer(TRIANGLE, LEARNED) == pytest.approx((-0.4 + 0.1) / 2)
    assert continual.forward_transfer(TRIANGLE, LEARNED) is None


def test_rows_that_end_early_equal_rows_filled_with_none():
    ragged = [row[: stage + 1] for stage, row in enumerate(TRIANGLE)]
    assert continual.final_mean(ragged) == continual.final_mean(TRIANGLE)
    for summary in (
        continual.average_forgetting_pct,
        continual.forgetting,
        continual.backward_transfer,
        continual.forward_transfer,
    ):
        assert summary(ragged, LEARNED) == summary(TRIANGLE, LEARNED)


def test_unseen_tasks_count_for_forward_transfer_only():
    R = [[0.8, 0.3, 0.2], [0.9, 0.5, 0.1], [0.4, 0.6, 0.9]]
    assert continual.forward_transfer(R, LEARNED) == pytest.approx((0.3 + 0.2 + 0.1) / 3)
    R_high = [[0.8, 0.95, 0.2], *R[1:]]  # a value before learning is no best that was forgotten
    assert continual.forgetting(R_high, LEARNED) == continual.forgetting(TRIANGLE, LEARNED)
    for summary in (continual.average_forgetting_pct, continual.backward_transfer):
        assert summary(R, LEARNED) == summary(TRIANGLE, LEARNED)


def test_joint_run_has_a_final_mean_and_forgets_nothing_that_can_be_measured():
    R, learned = [[0.5, None, 0.7]], [0, 0, 0]
    assert continual.final_mean(R) == pytest.approx(0.6)
    assert continual.average_forgetting_pct(R, learned) is None
    assert continual.forgetting(R, learned) is None
    assert continual.backward_transfer(R, learned) is None
    assert continual.forward_transfer(R, learned) is None


def test_undefined_values_are_left_out():
    R = [[None, None, None], [0.9, 0.5, None], [0.4, 0.6, None]]
    assert continual.average_forgetting_pct(R, LEARNED) == pytest.approx(-20)
    assert continual.backward_transfer(R, LEARNED) == pytest.approx(0.1)
    assert continual.forgetting(R, LEARNED) == pytest.approx((0.5 - 0.1) / 2)
    assert continual.final_mean([[None, None]]) is None
    assert continual.final_mean([]) is None


def test_nothing_learned_is_nothing_to_lose_in_percent():
    R = [[0.0, None, None], [0.2, 0.5, None], [0.1, 0.25, 0.9]]
    assert continual.average_forgetting_pct(R, LEARNED) == pytest.approx(50)


def test_run_under_way_is_summarised_over_the_tasks_learned_so_far():
    assert continual.forgetting(TRIANGLE[:2], LEARNED) == pytest.approx(-0.1)
    assert continual.average_forgetting_pct(TRIANGLE[:2], LEARNED) == pytest.approx(-12.5)
    assert continual.forward_transfer(TRIANGLE[:1], LEARNED) is None
