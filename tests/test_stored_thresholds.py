"""Thresholds set when a task was learned, the metrics at them, and which model is chosen for an image."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import Train, run_directories
from processes import whole_and_killed
from test_predict import normal, task

from clbench.decisions import Judge, Learned, check_enough, pixels_together
from clbench.errors import UserError
from clbench.metrics.names import RATES
from clbench.metrics.stored import Decisions, image_decisions, pixel_decisions
from clbench.strategies.base import Strategy
from clbench.strategies.finetune import Finetune
from clbench.strategies.joint import Joint
from clbench.testing.small import SmallDetector
from clbench.thresholds import Moments, Tail, Thresholds, fewest, rank


def thresholds(values: np.ndarray, side: int = 4) -> Thresholds:
    """Those that normal images whose pixels all have one value each would set."""
    scores = torch.from_numpy(values).float()
    image, pixel, moments = Tail(len(scores)), Tail(len(scores) * side**2), Moments()
    image.add(scores)
    pixel.add(scores.repeat_interleave(side**2))
    moments.add(scores.repeat_interleave(side**2))
    return Thresholds(
        ["a"],
        True,
        len(scores),
        pixel.count,
        pixel.thresholds(),
        image.thresholds(),
        moments.mean,
        moments.deviation,
    )


def test_segf1_is_that_of_mvtec_ad_2_s_worked_example() -> None:
    moments = Moments()
    for part in ([1.0, 2.0], [2.0, 3.0]):  # in batches, as maps come
        moments.add(torch.tensor(part))
    assert moments.mean == 2 and moments.deviation == pytest.approx(0.70711, abs=1e-5)
    wide = np.full(1, moments.mean + 3 * moments.deviation)
    assert wide[0] == pytest.approx(4.12132, abs=1e-5)
    maps, masks = np.array([[[5, 4.5, 4, 1]]]), np.array([[[True, False, True, False]]])
    found = pixel_decisions(maps, masks, np.array([False]), Decisions(wide, wide, wide))
    assert found == {"pixel_f1_stored": 0.5, "segf1": 0.5, "pixel_fpr": None, "pixel_fpr_deviation": None}


def test_each_image_is_judged_by_its_own_thresholds() -> None:
    maps, masks = np.zeros((3, 2, 2)), np.zeros((3, 2, 2), bool)
    masks[2, 0] = True
    maps[0, 0, 0], maps[1], maps[2, 0, 0] = 3, 3, 3
    limits = np.array([2.0, 5.0, 2.0])
    found = pixel_decisions(maps, masks, np.array([True, True, False]), Decisions(limits, limits, limits))
    assert found["pixel_fpr"] == 1 / 8  # of both normal images' eight pixels
    assert found["pixel_fpr_deviation"] == pytest.approx(0.25 / math.sqrt(2))  # of 1/4 and 0
    assert found["pixel_f1_stored"] == found["segf1"] == 2 * 1 / (2 * 1 + 1 + 1)
    scores, defective = np.array([1.0, 6.0, 1.0]), np.array([False, False, True])
    assert image_decisions(scores, defective, limits) == {"image_f1_stored": 0.0, "image_fpr": 0.5}
    alone = image_decisions(scores[:2], defective[:2], limits[:2])
    assert alone == {"image_f1_stored": None, "image_fpr": 0.5}
    assert image_decisions(scores[2:], defective[2:], limits[2:])["image_fpr"] is None


@pytest.mark.parametrize("seed", range(8))
def test_thresholds_of_several_tasks_together_hold_the_rate_asked_for(seed: int) -> None:
    random = np.random.default_rng(seed)
    parts = [
        random.normal(random.uniform(0, 3), random.uniform(0.2, 2), random.integers(19, 400))
        for _ in range(4)
    ]
    learned = [Learned(thresholds(part), part.astype(np.float32).tolist()) for part in parts]
    scores = np.sort(np.concatenate(parts).astype(np.float32))[::-1]
    for rate in (0.01, 0.05, 0.2):
        found = Judge(learned, (rate, rate)).together(3)
        # Of images, all scores are known: the threshold is that of all of them, of whichever task.
        rank = max(math.floor(rate * (len(scores) + 1) + 1e-9), 1)
        assert found.image.tolist() == [float(scores[rank - 1])] * 3
        # Of pixels, thresholds are: a task's share above a value is at most that of its next lower one.
        values = sorted({value for each in learned for value in each.thresholds.pixel})

        def share(value: float) -> float:
            shares = [
                min(
                    (r for r, limit in zip(RATES, each.thresholds.pixel, strict=True) if limit <= value),
                    default=1.0,
                )
                for each in learned
            ]
            return float(np.average(shares, weights=[each.thresholds.pixels for each in learned]))

        enough = [value for value in values if share(value) <= rate + 1e-12]
        assert (
            found.pixel[0]
            == pixels_together([each.thresholds for each in learned], rate)
            == (enough or values[-1:])[0]
        )
        if enough:
            assert float((scores > found.pixel[0]).mean()) <= rate


def test_thresholds_are_of_the_model_that_was_chosen_or_known_or_of_all() -> None:
    parts = [np.linspace(0, high, 200) for high in (1.0, 2.0, 4.0)]
    judge = Judge([Learned(thresholds(part), part.tolist()) for part in parts], (0.01, 0.05))
    chosen = judge.by_model(torch.tensor([2, 0, 0, 1]), 4)
    for kind, rate in (("pixel", 0.01), ("image", 0.05)):
        own = [thresholds(part).at(rate, rate)[kind == "image"] for part in parts]
        assert getattr(chosen, kind).tolist() == [own[2], own[0], own[0], own[1]]
    known = judge.by_model(1, 3)
    assert known.image.tolist() == [thresholds(parts[1]).at(0.01, 0.05)[1]] * 3
    every = np.concatenate(parts).astype(np.float32).astype(float)
    assert judge.together(2).wide[0] == pytest.approx(every.mean() + 3 * every.std(), rel=1e-6)


def test_too_few_held_out_images_are_refused_with_what_would_be_enough() -> None:
    stream = [task("a", normal(40, 0)), task("b", normal(30, 1))]

    def problem(
        held_out: float,
        *metrics: str,
        rate: float = 0.05,
        pixel_rate: float = 0.01,
        kind: type[Strategy] = Finetune,
    ) -> str:
        try:
            check_enough(kind(SmallDetector(held_out=held_out)), stream, metrics, (pixel_rate, rate))
        except UserError as error:
            return str(error)
        return ""

    said = problem(0.1, "aupro", "aupimo", "image_fpr", "pixel_fpr")
    assert said == (
        "image_fpr needs 19 held-out images of each task for metrics.image_rate=0.05, and method.held_out=0.1 holds 3 of "
        "the 30 of 'b' out: give method.held_out=0.64 or 'metrics.further=[aupimo,pixel_fpr]'"
    )
    assert (
        problem(0.63, "image_fpr") == "" == problem(0.64, "image_fpr")
    )  # 19 of 30 either way: shares round up
    assert problem(0.6, "image_fpr") != "" and problem(0.15, "image_f1_stored", rate=0.2) == ""
    assert problem(0.27, "image_fpr", kind=Joint) == "" != problem(0.25, "image_fpr", kind=Joint)
    assert problem(0.1, "pixel_fpr", pixel_rate=1e-5) == (
        "metrics.pixel_rate=1e-05 needs 99,999 held-out pixels of each task, and method.held_out=0.1 holds 1,728 out: give "
        "metrics.pixel_rate=0.0006, or hold out more"
    )
    assert problem(0.0, "aupimo") == "" == problem(0.01, "segf1")
    assert problem(0.0, "segf1", "pixel_fpr") == (
        "segf1, pixel_fpr need 1 held-out image of each task, and method.held_out=0 holds 0 of the 30 of 'b' out: give "
        "method.held_out=0.04"
    )
    assert problem(0.5, "image_fpr", rate=0.01).endswith(
        "give metrics.image_rate=0.07 or 'metrics.further=[]'"
    )


def test_the_fewest_that_set_a_threshold_are_those_with_a_rank() -> None:
    for rate in RATES:
        assert rank(rate, fewest(rate)) >= 1 and (fewest(rate) == 0 or rank(rate, fewest(rate) - 1) == 0), (
            rate
        )


def test_a_killed_run_goes_on_with_the_thresholds_of_its_tasks(
    folder: Path, train: Train, tmp_path: Path
) -> None:
    setting = (
        "method=patchcore",
        "metrics=stored",
        "metrics.image_rate=0.2",
        "method.held_out=0.6",
        "strategy=native",
    )
    one, other = whole_and_killed(train, folder, tmp_path, *setting)
    about, again = (json.loads((each / "summary.json").read_text()) for each in (one, other))
    assert about["routing"] == again["routing"] and about["stored_thresholds"] == again["stored_thresholds"]
    for rests in about["stored_thresholds"].values():
        assert rests["set_on_images"] == {"just_learned": 4, "final": 4} and rests["normal_test_images"] == 2
        assert all(deviation >= 0 for deviation in rests["pixel_fpr_deviation"].values())
    # The smallest run with routing: each of 4 test images of each category was judged by one of 3 models.
    assert [sum(counts.values()) for counts in about["routing"].values()] == [4, 4, 4]
    right = [counts.get(category, 0) for category, counts in about["routing"].items()]
    assert about["final"]["routing_accuracy"] == pytest.approx(sum(right) / 12)
    for metric in ("image_fpr", "pixel_fpr", "segf1", "image_f1_stored", "pixel_f1_stored"):
        assert 0 <= about["final"][metric] <= 1
    journal = (one / "journal.jsonl").read_text().splitlines()
    assert sum('"kind": "thresholds"' in line or '"kind":"thresholds"' in line for line in journal) == 3


def test_models_are_chosen_only_where_one_a_stage_is_kept(folder: Path, train: Train, tmp_path: Path) -> None:
    assert train("-m", "method=padim", "strategy=native,finetune", "method.update=per_task").returncode == 0
    summaries = [json.loads((path / "summary.json").read_text()) for path in run_directories(tmp_path)]
    found = {about["strategy"]: about for about in summaries}
    assert "routing_accuracy" in found["native"]["final"] and "routing" in found["native"]
    assert "routing_accuracy" not in found["finetune"]["final"] and "routing" not in found["finetune"]
    assert math.isfinite(found["native"]["final"]["routing_accuracy"])
