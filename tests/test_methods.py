"""PatchCore and PaDiM against direct transcriptions of their equations."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from scipy.ndimage import gaussian_filter
from torch.nn import functional as F

from clbench.backbones import Backbone
from clbench.data.images import Images, identities
from clbench.feature_store import FeatureStore
from clbench.methods.base import Detector
from clbench.methods.maps import to_image_size
from clbench.methods.nearest import nearest
from clbench.methods.padim import PaDiM, lower_square
from clbench.methods.patchcore import PatchCore


@pytest.fixture(scope="module")
def backbone() -> Backbone:
    return Backbone("resnet18", pretrained=False, arguments={"channels": [8, 16, 32, 64]}, seed=3)


def images(count: int, seed: int, size: int = 48) -> torch.Tensor:
    random = torch.Generator().manual_seed(seed)
    base = torch.randint(0, 200, (1, 3, size // 8, size // 8), generator=random).float()
    noise = 25 * torch.randn(count, 3, size, size, generator=random)
    return (F.interpolate(base, size=(size, size), mode="bilinear") + 25 + noise).clamp(0, 255).byte()


def learn(detector, *tasks: torch.Tensor):
    for index, task in enumerate(tasks):
        detector.start_task(index, task, task[:0])
        for part in task.split(4):
            detector.training_step(part)
        detector.finish_task(task)
    return detector.eval()


def embeddings(detector: PaDiM, task: torch.Tensor) -> np.ndarray:
    return detector.embedding(task).double().permute(2, 0, 1).numpy()  # [N, P, D]


def gaussians(x: np.ndarray, epsilon: float) -> tuple[np.ndarray, np.ndarray]:
    """Eq. (1), position by position."""
    mean = x.mean(0)
    covariance = np.stack([np.cov(x[:, p], rowvar=False) for p in range(x.shape[1])])
    return mean, covariance + epsilon * np.eye(x.shape[2])


def mahalanobis(x: np.ndarray, mean: np.ndarray, covariance: np.ndarray) -> np.ndarray:
    """Eq. (2): [N, P]."""
    difference = x - mean
    return np.sqrt(np.einsum("npi,pij,npj->np", difference, np.linalg.inv(covariance), difference))


def padim_map(detector: PaDiM, grid: np.ndarray, size: int) -> np.ndarray:
    side = math.isqrt(grid.shape[1])
    tensor = torch.from_numpy(grid).view(-1, 1, side, side)
    upsampled = F.interpolate(tensor, size=(size, size), mode="bilinear")[:, 0].numpy()
    return np.stack([gaussian_filter(one, detector.sigma) for one in upsampled])


@pytest.mark.parametrize("update", ["average", "pooled", "per_task"])
def test_padim_is_its_equations(backbone: Backbone, update: str) -> None:
    tasks = [images(9, 0), images(14, 1), images(7, 2)]
    detector = PaDiM(backbone, layers=[1, 2, 3], features=20, update=update, epsilon=0.01)
    learn(detector, *tasks)
    xs = [embeddings(detector, task) for task in tasks]
    test = images(5, 1)
    x = embeddings(detector, test)
    if update == "average":  # Algorithm 1, as written
        M, S = 0.0, 0.0
        for i, task in enumerate(xs):
            M_i, S_i = gaussians(task, 0.01)
            M = M * (i / (i + 1)) + M_i / (i + 1)
            S = S * (i / (i + 1)) + S_i / (i + 1)
        expected = mahalanobis(x, M, S)
    elif update == "pooled":  # the Gaussian of all images at once
        expected = mahalanobis(x, *gaussians(np.concatenate(xs), 0.01))
    else:
        each = np.stack([mahalanobis(x, *gaussians(task, 0.01)) for task in xs])
        expected = each[each.mean(2).argmin(0), np.arange(len(x))]
    expected = padim_map(detector, expected, 48)
    prediction = detector(test)
    np.testing.assert_allclose(prediction.maps.numpy(), expected, rtol=2e-3)
    np.testing.assert_allclose(prediction.scores.numpy(), expected.max((1, 2)), rtol=2e-3)


def test_patchcore_is_its_equations(backbone: Backbone) -> None:
    tasks = [images(6, 0), images(6, 1)]
    detector = learn(PatchCore(backbone, layers=[2, 3], memory_size=60, neighbours=3), *tasks)
    assert detector.bank_sizes.tolist() == [30, 30]
    test = images(4, 1)
    prediction = detector(test)
    patches = detector.patches(test).double().numpy()
    banks = [bank.double().numpy() for bank in detector.bank.split([30, 30])]
    for index, patch in enumerate(patches.reshape(4, -1, patches.shape[-1])):
        distances = [np.linalg.norm(patch[:, None] - bank, axis=2) for bank in banks]
        task = int(np.argmin([each.min(1).mean() for each in distances]))  # supplement, 1.2.4
        near = distances[task].min(1)
        where = int(near.argmax())
        matched = banks[task][distances[task][where].argmin()]
        around = np.argsort(np.linalg.norm(banks[task] - matched, axis=1))[:3]
        exponentials = np.exp(distances[task][where][around])
        score = (1 - np.exp(near[where]) / exponentials.sum()) * near[where]  # Roth et al., 2022, eq. 7
        assert float(prediction.scores[index]) == pytest.approx(score, rel=1e-3)
        side = math.isqrt(len(near))
        grid = torch.from_numpy(near).view(1, 1, side, side)
        upsampled = F.interpolate(grid, size=(48, 48), mode="bilinear")[0, 0].numpy()
        np.testing.assert_allclose(prediction.maps[index].numpy(), gaussian_filter(upsampled, 4), rtol=1e-3)


def test_patchcore_shares_its_memory_evenly_and_truncates_old_banks(backbone: Backbone) -> None:
    detector = PatchCore(backbone, layers=[2, 3], memory_size=90)
    learn(detector, images(6, 0))
    first = detector.bank.clone()
    assert len(first) == 90
    for task, share in ((1, 45), (2, 30)):
        detector.start_task(task, images(6, task), images(0, task))
        detector.training_step(images(6, task))
        detector.finish_task(images(0, task))
        assert detector.bank_sizes.tolist() == [share] * (task + 1)
        assert torch.equal(detector.bank[:share], first[:share])


def test_patchcore_judges_an_image_by_the_bank_of_its_own_task(backbone: Backbone) -> None:
    tasks = [images(8, seed) for seed in range(3)]
    detector = learn(PatchCore(backbone, layers=[2, 3], memory_size=300), *tasks)
    own = learn(PatchCore(backbone, layers=[2, 3], memory_size=300), tasks[1])
    own.bank, own.bank_sizes = detector.bank[100:200], torch.tensor([100])
    test = images(3, 1)
    assert torch.allclose(detector(test).maps, own(test).maps)


def test_nearest_neighbours_of_several_banks() -> None:
    random = torch.Generator().manual_seed(0)
    queries, bank = (torch.randn(count, 19, generator=random) for count in (70, 50))
    distances, rows = nearest(queries, bank, [20, 1, 29])
    expected = torch.cdist(queries.double(), bank.double())
    begin = 0
    for index, size in enumerate([20, 1, 29]):
        values, found = expected[:, begin : begin + size].min(1)
        assert torch.equal(rows[index], found + begin)
        torch.testing.assert_close(distances[index].double(), values, rtol=1e-4, atol=1e-4)
        begin += size


@pytest.mark.parametrize(("grid", "size"), [((7, 7), (56, 56)), ((5, 9), (40, 31))])
def test_maps_are_upsampled_bilinearly_then_smoothed(grid: tuple, size: tuple) -> None:
    values = torch.rand(2, *grid, generator=torch.Generator().manual_seed(0))
    upsampled = F.interpolate(values[:, None], size=size, mode="bilinear")[:, 0].numpy()
    expected = np.stack([gaussian_filter(one, 4.0) for one in upsampled])
    np.testing.assert_allclose(to_image_size(values, size, 4.0).numpy(), expected, atol=1e-5)


def test_features_do_not_depend_on_the_batch(backbone: Backbone) -> None:
    pyramid = backbone.pyramid([1, 2, 3])
    pyramid.store.paused = True
    batch = images(21, 0)
    together = pyramid(batch)
    for index in (0, 15, 20):
        for level, alone in zip(together, pyramid(batch[index : index + 1]), strict=True):
            assert torch.equal(level[index], alone[0])


@pytest.mark.parametrize(("memory", "disk"), [(10**9, 0), (200_000, 10**9), (200_000, 100_000), (0, 0)])
def test_the_network_sees_an_image_once_within_the_budget(memory: int, disk: int) -> None:
    backbone = Backbone("resnet18", pretrained=False, arguments={"channels": [8, 16, 32, 64]})
    pyramid = backbone.pyramid([2, 3])
    pyramid.store = FeatureStore(memory, disk)
    seen = []
    pyramid.network.register_forward_hook(lambda module, given, result: seen.append(len(given[0])))
    batch = images(30, 0)
    first = pyramid(batch)
    again = pyramid(batch.flip(0))
    for one, two in zip(first, again, strict=True):
        assert torch.equal(one, two.flip(0))
    size = sum(level[0].numel() * 4 for level in first)
    kept = min(30, memory // size + disk // size)
    assert pyramid.store.memory_used <= memory and pyramid.store.disk_used <= disk
    assert sum(seen) == 16 * (2 + math.ceil((30 - kept) / 16))


def test_features_of_training_images_make_room_for_the_next_stage(backbone: Backbone) -> None:
    pyramid = backbone.pyramid([2, 3])
    size = sum(level[0].numel() * 4 for level in pyramid(images(1, 9)))
    for memory, disk in ((12 * size, 0), (0, 12 * size), (5 * size, 7 * size)):
        store = pyramid.store = FeatureStore(memory, disk)
        test = images(4, 0)
        before = pyramid(test)
        for stage in (1, 2, 3):
            train = images(8, stage)
            store.learning = True
            first = pyramid(train)
            for one, two in zip(first, pyramid(train), strict=True):
                assert torch.equal(one, two)
            assert store.memory_used + store.disk_used == 12 * size
            store.release(keep=Images.of(train[:2]))
            assert all(store.get(key) for key in identities(train[:2]))
            assert not any(store.get(key) for key in identities(train[2:]))
            kept = [store.get(key) is not None for key in identities(test)]
            assert store.memory_used + store.disk_used == (2 + sum(kept)) * size
            # Stage 1 has room for all; later ones take that of test images in memory, the last ones first.
            assert kept == sorted(kept, reverse=True) and (all(kept) or stage > 1)
        store.learning = False
        for one, two in zip(before, pyramid(test), strict=True):
            assert torch.equal(one, two)


def test_patches_of_a_task_beyond_the_memory_limit_go_to_disk() -> None:
    settings = {"pretrained": False, "arguments": {"channels": [8, 16, 32, 64]}}
    ample, tight = (
        learn(PatchCore(Backbone("resnet18", **settings, feature_memory_mb=mb), layers=[2, 3]), images(30, 0))
        for mb in (2000, 0)
    )
    assert torch.equal(ample.bank, tight.bank)


def test_footprints_of_the_paper() -> None:
    """With random Wide ResNet-50-2 weights at the paper's sizes (supplement, 1.1.5 and 1.2.6)."""
    backbone = Backbone("wide_resnet50_2", pretrained=False)
    pyramid = backbone.pyramid([1, 2, 3])
    executed = sum(parameter.numel() for parameter in pyramid.network.parameters())
    assert pyramid.whole_parameters * 4 / 1e6 == pytest.approx(275.6, rel=0.002)
    assert executed / 1e6 == pytest.approx(24.8, abs=0.1)
    assert sum(pyramid.channels) == 1792
    levels = pyramid(torch.zeros(1, 3, 224, 224, dtype=torch.uint8))
    assert levels[0].shape[-2:] == (56, 56)
    padim = PaDiM(backbone, layers=[1, 2, 3])
    size = padim.mean.shape[-1]
    assert 3136 * (size * size + size) * 4 / 1e6 == pytest.approx(1541.0, abs=0.1)


def test_a_transformer_s_tokens_go_through_its_normalisation() -> None:
    backbone = Backbone("deit_tiny_patch16_224", pretrained=False)
    pyramid = backbone.pyramid([7])
    network: Any = pyramid.network
    norm = network.model.norm
    with torch.no_grad():
        norm.weight.fill_(3.0), norm.bias.fill_(0.5)
        (level,) = pyramid(torch.randint(0, 256, (2, 3, 224, 224), dtype=torch.uint8))
    assert pyramid.normalised and level.shape == (2, 192, 14, 14)
    torch.testing.assert_close(level.mean(1), torch.full((2, 14, 14), 0.5), rtol=0, atol=1e-4)
    torch.testing.assert_close(level.std(1, correction=0), torch.full((2, 14, 14), 3.0), rtol=0, atol=1e-2)


def test_a_detector_that_holds_nothing_is_on_the_cpu() -> None:
    assert Detector().device == torch.device("cpu")


def test_the_square_of_a_triangle_is_right_up_to_its_diagonal() -> None:
    random = torch.Generator().manual_seed(0)
    for size in (1, 3, 4, 10):
        lower = torch.randn(2, size, size, generator=random, dtype=torch.float64).tril()
        assert torch.allclose(lower_square(lower).tril(), (lower @ lower.mT).tril())
