"""Facts about farthest-first coresets."""

import numpy as np
import pytest
import torch

from clbench.methods.coreset import farthest_first, projection


def plain_greedy(points: torch.Tensor, count: int, start: int) -> list[int]:
    """One center at a time, every distance by differences in float64."""
    x = points.double().numpy()
    chosen = [start]
    nearest = ((x - x[start]) ** 2).sum(1)
    while len(chosen) < count:
        chosen.append(int(nearest.argmax()))
        nearest = np.minimum(nearest, ((x - x[chosen[-1]]) ** 2).sum(1))
    return chosen


def clustered(count: int, size: int, seed: int) -> torch.Tensor:
    random = torch.Generator().manual_seed(seed)
    centers = 3 * torch.randn(12, size, generator=random)
    return centers[torch.arange(count) % 12] + torch.randn(count, size, generator=random)


@pytest.mark.parametrize("pool", [2, 7, 64, 5000])
@pytest.mark.parametrize("seed", [0, 1])
def test_pooled_search_chooses_what_the_plain_greedy_loop_chooses(pool: int, seed: int) -> None:
    points = clustered(2000, 24, seed)
    assert farthest_first(points, 300, start=17, pool=pool).tolist() == plain_greedy(points, 300, 17)


def test_truncating_a_coreset_equals_selecting_from_it_again() -> None:
    points = clustered(3000, 16, 0)
    coreset = points[farthest_first(points, 500, start=3)]
    again = farthest_first(coreset, 120, start=0)
    assert again.tolist() == list(range(120))


def test_every_point_is_chosen_once_when_all_are_wanted() -> None:
    points = clustered(700, 8, 0)
    points[100:200] = points[0]  # duplicates are no reason to choose one of them twice
    assert sorted(farthest_first(points, 900, pool=32).tolist()) == list(range(700))


def test_projection_keeps_distances_within_epsilon() -> None:
    points = clustered(400, 1536, 0)
    plane = projection(1536, len(points), 0.9, torch.Generator().manual_seed(0))
    assert plane.shape[1] == int(np.ceil(4 * np.log(400) / (0.9**2 / 2 - 0.9**3 / 3)))
    ratio = torch.pdist(points @ plane).square() / torch.pdist(points).square()
    assert 0.1 < ratio.min() and ratio.max() < 1.9
    assert ratio.mean() == pytest.approx(1, abs=0.05)


@pytest.mark.parametrize("epsilon", [0.3, 0.5, 0.9, 0.99])
@pytest.mark.parametrize("points", [1, 2, 3, 10, 784, 9408, 94_080, 10**7])
def test_the_projection_is_as_large_as_the_bound_and_not_one_less(points: int, epsilon: float) -> None:
    bound = 4 * np.log(max(points, 2)) / (epsilon**2 / 2 - epsilon**3 / 3)
    size = projection(3000, points, epsilon, torch.Generator().manual_seed(0)).shape[1]
    assert bound <= size < bound + 1


def test_projection_never_enlarges() -> None:
    assert projection(20, 100_000, 0.9, torch.Generator().manual_seed(0)).shape == (20, 20)
