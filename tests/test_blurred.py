"""Streams without boundaries: which images arrive when, how they drift, and where a boundary is seen."""

from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import Train, make_category, run_directories

from clbench import boundaries
from clbench.assembly import assemble
from clbench.config import check, sources
from clbench.data import blurred
from clbench.data.drift import Drift
from clbench.data.images import ImageSet
from clbench.data.samples import GOOD
from clbench.data.stream import Category, Task
from clbench.errors import UserError
from clbench.methods.base import silent
from clbench.randomness import generator


def stream(*counts: int, size: int = 9) -> list[Task]:
    """Tasks of one category with so many training images, whose pixels are their number, and four test images."""
    tasks, number = [], 0
    for index, count in enumerate(counts):
        pixels = torch.arange(number, number + count, dtype=torch.uint8)
        number += count
        masks = torch.zeros(count, size, size, dtype=torch.bool)
        train = ImageSet(
            pixels[:, None, None, None].repeat(1, 3, size, size),
            masks,
            [GOOD] * count,
            [f"{n}" for n in pixels.tolist()],
        )
        tests = torch.zeros(4, size, size, dtype=torch.bool)
        tests[:, :2] = True
        test = ImageSet(
            torch.full((4, 3, size, size), 200, dtype=torch.uint8), tests, ["spot"] * 4, list("abcd")
        )
        tasks.append(Task(f"t{index}", train, (Category(f"t{index}", test),)))
    return tasks


def numbers(images: object) -> list[int]:
    return images[:][:, 0, 0, 0].tolist()  # type: ignore[index]


@pytest.mark.parametrize("width", [0, 10, 20])
def test_every_image_arrives_once_and_only_transitions_are_mixed(width: int) -> None:
    tasks = stream(20, 30, 25)
    arrived = blurred.arrivals(tasks, width, Drift(), seed=1)
    found = numbers(arrived.images)
    assert sorted(found) == list(range(75)) and arrived.boundaries == [20, 50]
    assert arrived.names == [str(number) for number in found]
    mixed = [
        place
        for place, (number, owner) in enumerate(zip(found, arrived.owners.tolist(), strict=True))
        if owner != (place >= 20) + (place >= 50)
    ]
    assert all(min(abs(place + 0.5 - middle) for middle in (20, 50)) <= width / 2 for place in mixed)
    assert bool(mixed) == (width > 0) and (found == list(range(75))) == (width == 0)
    assert numbers(blurred.arrivals(tasks, width, Drift(), seed=1).images) == found
    # Whatever is cut, parts have all images, and every category is in one of them.
    for ends in (blurred.every(20, 75), [*arrived.boundaries, 75], blurred.at_most(12, [40, 75])):
        made = blurred.parts(tasks, arrived, ends, Drift())
        assert [number for part in made for number in numbers(part.train.images)] == found
        assert [each.name for part in made for each in part.categories] == ["t0", "t1", "t2"]
    known = blurred.parts(tasks, arrived, [20, 50, 75], Drift())
    assert [[each.name for each in part.categories] for part in known] == [["t0"], ["t1"], ["t2"]]


def test_where_parts_end() -> None:
    assert blurred.every(20, 75) == [20, 40, 60, 75] and blurred.every(20, 68) == [20, 40, 68]
    assert blurred.every(20, 15) == [15] and blurred.every(20, 20) == [20]
    assert blurred.at_most(None, [40, 75]) == [40, 75] and blurred.at_most(12, [40, 50]) == [
        12,
        24,
        36,
        40,
        50,
    ]


def test_drift_is_nothing_at_first_and_all_at_the_end() -> None:
    image = np.zeros((21, 21, 3), np.uint8)
    image[5, 10] = 200
    for drift in (Drift(light=0.5), Drift(blur=2.0), Drift(geometry=90.0)):
        assert drift and np.array_equal(drift.image(image, 0.0), image)
    assert Drift(light=0.5).image(image, 1.0)[5, 10].tolist() == [100] * 3
    assert Drift(light=0.5).image(image, 0.5)[5, 10].tolist() == [150] * 3
    spread = Drift(blur=2.0).image(image, 1.0).astype(int)
    assert 0 < spread[5, 10, 0] < 200 and spread[5, 12, 0] > 0
    turned = Drift(geometry=90.0).image(image, 1.0)
    assert np.argwhere(turned[..., 0] > 100).tolist() == [[10, 5]]  # against the clock
    mask = image[..., 0] > 0
    assert np.array_equal(Drift(geometry=90.0).mask(mask, 1.0), turned[..., 0] > 100)
    assert not Drift()


def test_test_images_drift_as_the_training_images_of_their_task() -> None:
    tasks, drift = stream(10, 10), Drift(light=0.9)
    arrived = blurred.arrivals(tasks, 0, drift, seed=0)
    assert numbers(arrived.images)[-1] == round(19 * 0.1)
    first, second = blurred.parts(tasks, arrived, [10, 20], drift)
    light = [
        [round(200 * (1 - 0.9 * place / 19)) for place in np.linspace(*ends, 4)]
        for ends in ((0, 9), (10, 19))
    ]
    assert [numbers(part.categories[0].test.images) for part in (first, second)] == light
    assert torch.equal(first.categories[0].test.masks, tasks[0].categories[0].test.masks)


def features(*counts: int, apart: float = 3.0, seed: int = 0) -> torch.Tensor:
    """Features of tasks of so many images each, float32 [N, 16]: their means are `apart` times the deviation apart."""
    random = torch.Generator().manual_seed(seed)
    means = apart * torch.randn(len(counts), 16, generator=random)
    return torch.cat(
        [mean + torch.randn(count, 16, generator=random) for mean, count in zip(means, counts, strict=True)]
    )


def test_boundaries_are_seen_soon_and_nowhere_else() -> None:
    windows = boundaries.Windows()
    found = boundaries.found(features(40, 40, 40, 40), windows, seed=0)
    alarms = boundaries.compared(found, [40, 80, 120], 0, 2 * windows.newest)
    assert alarms.missed == alarms.false == 0 and all(0 < delay <= windows.newest for delay in alarms.delays)
    alarms_alone = [boundaries.found(features(200, seed=seed), windows, seed) for seed in range(10)]
    assert alarms_alone == [[]] * 10
    # What comes later changes nothing that was seen before.
    assert boundaries.found(features(40, 40, 40, 40)[:90], windows, seed=0) == [
        at for at in found if at <= 90
    ]


def test_a_boundary_is_where_the_distance_of_two_windows_is_large() -> None:
    """As the windows' own means and spread have it; a sum over all images before is not taken for each new one."""
    windows, stream_of = boundaries.Windows(), 50 + features(40, 40, 40)

    def distance(before: torch.Tensor, newest: torch.Tensor) -> float:
        expected = before.var(0).sum() * (1 / len(before) + 1 / len(newest))
        return float((before.mean(0) - newest.mean(0)).norm() / expected.sqrt())

    first = stream_of[:24].double()
    orders = [
        torch.randperm(24, generator=random) for random in [generator(0, "boundaries")] for _ in range(200)
    ]
    threshold = 1.5 * max(distance(first[order[6:]], first[order[:6]]) for order in orders)
    expected, begin = [], 0
    for now in range(24, 121):
        before, newest = stream_of[begin : now - 6].double(), stream_of[now - 6 : now].double()
        if len(before) >= 12 and distance(before, newest) > threshold:
            expected.append(now)
            begin = now
    assert boundaries.found(stream_of, windows, seed=0) == expected != []


def test_a_stream_too_short_for_a_threshold_or_without_spread_has_no_boundary() -> None:
    assert boundaries.found(features(6), boundaries.Windows(), seed=0) == []
    assert boundaries.found(torch.rand(1, 16).repeat(60, 1), boundaries.Windows(), seed=0) == []


def test_alarms_are_counted() -> None:
    assert boundaries.compared([12, 30, 55, 58], [10, 50], 8, 6) == boundaries.Alarms([2, 5], 0, 2)
    assert boundaries.compared([], [10, 50], 8, 6) == boundaries.Alarms([], 2, 0)


@pytest.mark.parametrize(
    "given, words",
    [
        (["stream.transition=-1"], "stream.transition=-1"),
        (["stream.light=1.5"], "stream.light=1.5"),
        (["stream.blur=-2"], "stream.blur=-2"),
        (["stream.geometry=90"], "stream.geometry=90"),
        (["stream.length=0"], "stream.length=0"),
        (["stream.longest=0"], "stream.longest=0"),
        (["stream.length=null"], "give stream.length"),
        (["stream.stages=often"], "stream.stages=often"),
        (["stream.stages=detected", "method=draem"], "has none"),
        (["dataset.resize=null", "dataset.tile=64"], "stream=blurred with dataset.tile=64"),
        (["stream.geometry=5", "dataset=mvtec_loco", "dataset.root=.", "metrics=loco"], "turns images"),
    ],
)
def test_what_cannot_be_is_said_before_anything_is_read(given: list[str], words: str) -> None:
    with pytest.raises(UserError) as raised:
        check(sources.composed("stream=blurred", *given))
    assert words in str(raised.value) and "\n" not in str(raised.value)


def test_settings_of_a_stream_without_tasks_say_so(train: Train) -> None:
    for given in ("stream.length=4", "stream.light=0.4"):
        refused = train("method=patchcore", given)
        assert refused.returncode == 2 and "without tasks: take stream=blurred" in refused.stderr
    assert "nearest: stream.length" in train("stream=blurred", "stream.lenght=4").stderr


def test_a_transition_wider_than_a_task() -> None:
    with pytest.raises(
        UserError,
        match="stream.transition=21 is wider than the 20 training images of task 't0': give at most 20",
    ):
        blurred.arrivals(stream(20, 30), 21, Drift(), seed=0)


def test_a_run_without_tasks(train: Train, tmp_path: Path) -> None:
    """Three categories of six images, mixed; and boundaries that never come are said before anything is learned."""
    blur = ("stream=blurred", "stream.transition=4", "stream.light=0.2", "stream.geometry=3")
    refused = train("method=patchcore", *blur, "stream.stages=detected")
    assert refused.returncode == 1 and "finds no boundary in the 18 images" in refused.stderr
    assert "sets its threshold on the first 24 images" in refused.stderr
    done = train("method=cadic", *blur, "stream.length=4")
    assert done.returncode == 0, done.stderr
    (run,) = (path for path in run_directories(tmp_path) if "cadic" in path.name)
    rows = (run / "metrics.csv").read_text().splitlines()
    assert {line.split(",")[2] for line in rows[1:]} <= {f"part {number}" for number in range(1, 6)}
    last = [line for line in rows if line.startswith("3,") and ",pixel_f1," in line]
    assert len(last) == 3


@pytest.mark.parametrize(("counts", "others"), [((6, 6, 20), 18), ((24, 8), 0)])
def test_a_first_task_that_is_too_small_for_the_threshold_is_noted(
    tmp_path: Path, counts: tuple[int, ...], others: int
) -> None:
    for index, count in enumerate(counts):
        make_category(tmp_path / f"c{index}", np.random.default_rng(index), count)
    blur = ("stream=blurred", "stream.transition=0", "stream.stages=detected", "stream.longest=12")
    given = ("method=patchcore", "backbone.checkpoint=null", "dataset=mvtec", "dataset.resize=48")
    config = check(
        sources.composed(*given, *blur, f"dataset.root={tmp_path}", "dataset.crop=null", f"cache={tmp_path}")
    )
    made = assemble(config, silent)
    assert made.identity["boundaries"]["first_of_others"] == others
    (_, *notes) = [line for line in made.notes if "stream.stages=detected" in line]
    assert [f"and {others} of them are not of the first" in line for line in notes] == [True] * bool(others)
