"""Banks of foundation features: worked examples, and what they refuse."""

import cv2
import numpy as np
import pytest
import torch
from torch.nn import functional as F

from clbench.backbones import Backbone
from clbench.errors import UserError
from clbench.methods.anomalydino import AnomalyDINO, objects, rotated
from clbench.methods.banks import capacity
from clbench.methods.patchcore import PatchCore
from clbench.methods.patches import tokens
from clbench.training import train

VIT = {"patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 2, "img_size": 64}


def images(count: int, seed: int = 0) -> torch.Tensor:
    random = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, 3, 64, 64), dtype=torch.uint8, generator=random)


def vit() -> Backbone:
    return Backbone("vit_tiny_patch16_224", pretrained=False, arguments=VIT, batch_size=4)


@torch.no_grad()
def test_anomalydino_scores_the_mean_of_the_largest_cosine_distances() -> None:
    detector = AnomalyDINO(vit(), layers=[1], memory_size=40, top=0.04, sigma=1.0)
    train(detector, 0, images(4), (), seed=0)
    shown = images(3, seed=1)
    found = F.normalize(tokens(detector.pyramid(shown))[0], dim=3).flatten(1, 2)
    distances = (1 - found @ detector.bank.T).amin(2)  # all of them, 64 an image
    wanted = distances.topk(2, dim=1).values.mean(1)  # int(0.04 * 64)
    torch.testing.assert_close(detector(shown).scores, wanted, rtol=1e-4, atol=1e-6)
    assert torch.allclose(detector.bank.norm(dim=1), torch.ones(40))


def test_anomalydino_memorises_an_image_in_each_rotation() -> None:
    detector = AnomalyDINO(vit(), layers=[1], memory_size=10_000, rotations=4)
    train(detector, 0, images(3), (), seed=0)
    assert detector.bank_sizes.tolist() == [4 * 3 * 64]


@pytest.mark.parametrize("degrees", [45.0, 90.0, 200.0])
def test_rotations_are_opencvs_with_mirrored_borders(degrees: float) -> None:
    smooth = cv2.GaussianBlur(np.random.default_rng(0).random((40, 60, 3), np.float32), (0, 0), 2)
    around = cv2.getRotationMatrix2D(((60 - 1) / 2, (40 - 1) / 2), degrees, 1)
    wanted = cv2.warpAffine(smooth, around, (60, 40), borderMode=cv2.BORDER_REFLECT_101)
    found = rotated(torch.from_numpy(smooth).permute(2, 0, 1)[None], degrees)[0].permute(1, 2, 0)
    assert np.abs(found.numpy() - wanted).max() < 0.02  # OpenCV's positions have 5 bits


@pytest.mark.parametrize("size", [8, 200], ids=["more tokens than features", "fewer"])
def test_an_object_is_what_its_first_component_sets_apart(size: int) -> None:
    random = torch.Generator().manual_seed(0)
    patches = torch.randn(2, 10, 12, size, generator=random)
    direction = F.normalize(torch.randn(size, generator=random), dim=0)
    inside = torch.zeros(10, 12, dtype=torch.bool)
    inside[2:8, 2:9] = True
    patches[:, inside] += 60 * direction
    hole = patches.clone()
    hole[:, 4, 4] -= 60 * direction
    inside[4, 4] = False
    square = np.ones((3, 3), np.uint8)
    grown = cv2.dilate(inside.numpy().astype(np.uint8), square)
    wanted = torch.from_numpy(cv2.morphologyEx(grown, cv2.MORPH_CLOSE, square)).bool()
    assert not wanted.all()
    assert torch.equal(objects(hole), wanted.expand(2, -1, -1))


def test_an_object_does_not_depend_on_the_sign_of_an_eigenvector() -> None:
    two_sided = torch.zeros(6, 6, 4)
    two_sided[:, :3, 0], two_sided[:, 3:, 0] = 20.0, -20.5
    two_sided += 0.1 * torch.randn(6, 6, 4, generator=torch.Generator().manual_seed(0))
    assert torch.equal(objects(two_sided[None]), objects(-two_sided[None]))


def test_a_memory_in_megabytes_has_as_many_entries_as_fit() -> None:
    assert capacity(5, None, 1536) == 5
    assert capacity(5, 46.08, 1536) == 30_000
    detector = PatchCore(vit(), layers=[1], memory_mb=0.001)
    assert detector.memory_size == 10
    detector.check_stages([4] * 10, kept=10)
    with pytest.raises(
        UserError, match=r"memory_mb=0.001 has room for 10 patches .* wants 11 .* give 0.002 or more"
    ):
        detector.check_stages([4] * 11, kept=11)
