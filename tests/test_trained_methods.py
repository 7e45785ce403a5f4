"""CFA, STFPM, FastFlow, DRAEM and EfficientAD against direct transcriptions of their equations."""

import colorsys
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageEnhance, ImageOps
from test_methods import images
from torch import Tensor
from torch.nn import functional as F

from clbench import footprint
from clbench.backbones import Backbone
from clbench.errors import UserError
from clbench.methods import draem, efficientad, simulated
from clbench.methods.base import Detector, kept_state
from clbench.methods.cfa import CFA
from clbench.methods.draem import DRAEM, Discriminative, Reconstructive
from clbench.methods.efficientad import Autoencoder, EfficientAD, patch_description_network
from clbench.methods.fastflow import FastFlow, Flow
from clbench.methods.maps import to_image_size
from clbench.methods.nearest import k_nearest
from clbench.methods.simulated import augment, perlin, simulate
from clbench.methods.stfpm import STFPM
from clbench.strategies.replay import Replay


@pytest.fixture(scope="module")
def backbone() -> Backbone:
    return Backbone("resnet18", pretrained=False, arguments={"channels": [8, 16, 32, 64]}, seed=3)


def none(like: Tensor) -> Tensor:
    return like[:0]


# CFA


def test_k_nearest_is_a_sorted_distance_matrix_and_so_is_its_gradient() -> None:
    random = torch.Generator().manual_seed(0)
    queries = torch.randn(70, 12, generator=random, requires_grad=True)
    bank = torch.randn(150, 12, generator=random)
    distances, rows = k_nearest(queries, bank, 6)
    weights = torch.randn(70, 6, generator=random)
    (distances * weights).sum().backward()
    copy = queries.detach().double().requires_grad_()
    whole = (copy[:, None] - bank.double()).square().sum(2)
    expected, order = whole.sort(1)
    (expected[:, :6] * weights).sum().backward()
    assert torch.equal(rows, order[:, :6])
    torch.testing.assert_close(distances, expected[:, :6].float(), rtol=1e-4, atol=1e-5)
    assert queries.grad is not None and copy.grad is not None
    torch.testing.assert_close(queries.grad, copy.grad.float(), rtol=1e-4, atol=1e-4)


def cfa_description(detector: CFA, task: Tensor) -> np.ndarray:
    """phi, as written: 3x3 means, the grid of the first level, coordinates from -1 to 1, a 1x1 convolution."""
    levels = [F.avg_pool2d(level, 3, 1, 1) for level in detector.pyramid(task)]
    grid = levels[0].shape[-1]
    levels = [F.interpolate(level, size=(grid, grid), mode="bilinear") for level in levels]
    line = torch.linspace(-1, 1, grid)
    x, y = line.expand(len(task), 1, grid, grid), line[:, None].expand(len(task), 1, grid, grid)
    weight = detector.descriptor.weight[:, :, None, None]
    return (
        F.conv2d(torch.cat([*levels, x, y], 1), weight, detector.descriptor.bias)
        .flatten(2)
        .mT.detach()
        .numpy()
    )


def test_cfa_is_its_equations(backbone: Backbone) -> None:
    tasks = [images(5, 0), images(7, 1), images(6, 2)]
    detector = CFA(backbone, layers=[1, 2, 3])
    C = np.float32(0)
    for i, task in enumerate(tasks):  # Algorithm 3, as written
        with torch.no_grad():
            detector.start_task(i, task, none(task))
        C = C * (i / (i + 1)) + cfa_description(detector, task).mean(0) / (i + 1)
    np.testing.assert_allclose(detector.centroids.numpy(), C, rtol=1e-3, atol=1e-5)

    with torch.no_grad():
        detector.radius.fill_(0.7)
        detector.descriptor.weight.mul_(1.5)  # so that patches are off their centroids
    batch = images(3, 4)
    phi = cfa_description(detector, batch)
    distance = np.sort(((phi[:, :, None] - C) ** 2).sum(3), 2)
    attraction = np.maximum(0, distance[..., :3] - 0.7**2).mean()
    repulsion = np.maximum(0, 0.7**2 - distance[..., 3:6] - 0.1).mean()
    loss = detector.training_step(batch)
    assert float(loss.detach()) == pytest.approx((attraction + repulsion) / 1e-3, rel=1e-3)
    loss.backward()
    assert detector.radius.grad is not None and detector.descriptor.weight.grad is not None

    nearest = np.sqrt(distance[..., :3])
    soft = np.exp(-nearest) / np.exp(-nearest).sum(2, keepdims=True)
    side = math.isqrt(phi.shape[1])
    grid = torch.from_numpy(soft[..., 0] * nearest[..., 0]).view(3, side, side)
    with torch.no_grad():
        prediction = detector(batch)
    torch.testing.assert_close(prediction.maps, to_image_size(grid, (48, 48), 4.0), rtol=1e-3, atol=1e-4)


def test_cfa_replaces_its_centroids_when_it_forgets(backbone: Backbone) -> None:
    detector = CFA(backbone, layers=[1, 2, 3])
    with torch.no_grad():
        detector.start_task(0, images(4, 0), none(images(1, 0)))
        detector.forget()
        detector.start_task(1, images(4, 1), none(images(1, 0)))
    np.testing.assert_allclose(
        detector.centroids.numpy(), cfa_description(detector, images(4, 1)).mean(0), rtol=1e-3, atol=1e-5
    )


# STFPM


def test_stfpm_is_its_equations(backbone: Backbone) -> None:
    detector = STFPM(backbone, layers=[1, 2, 3]).eval()
    batch = images(3, 0)
    with torch.no_grad():
        teacher, student = detector.teacher(batch), detector.student(batch)
        loss, prediction = detector.training_step(batch), detector(batch)
    expected, product = 0.0, np.ones((3, 48, 48), np.float32)
    for t, s in zip(teacher, student, strict=True):
        t, s = t.double().numpy(), s.double().numpy()
        t = t / np.sqrt((t**2).sum(1, keepdims=True))
        s = s / np.sqrt((s**2).sum(1, keepdims=True))
        level = 0.5 * ((t - s) ** 2).sum(1)
        expected += level.mean()
        product *= F.interpolate(torch.from_numpy(level)[:, None], (48, 48), mode="bilinear")[:, 0].numpy()
    assert float(loss) == pytest.approx(expected, rel=1e-4)
    np.testing.assert_allclose(prediction.maps.numpy(), product, rtol=1e-3)
    np.testing.assert_allclose(prediction.scores.numpy(), product.max((1, 2)), rtol=1e-3)


def test_the_student_of_a_random_teacher_is_another_network(backbone: Backbone) -> None:
    detector = STFPM(backbone, layers=[1, 2, 3])
    assert not torch.equal(detector.teacher.network.conv1.weight, detector.student.network.conv1.weight)


# FastFlow


@pytest.fixture(params=[False, True], ids=["couplings", "affine"])
def flow(request: pytest.FixtureRequest) -> Flow:
    flow = Flow(6, 4, 1.0, seed=1, affine=request.param).double()
    if flow.affine is not None:
        flow.affine.spread(torch.Size([6, 3, 4]))
    random = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in flow.parameters():
            parameter.add_(0.5 * torch.randn(parameter.shape, generator=random, dtype=torch.float64))
    return flow


def test_a_flow_is_invertible_and_its_log_determinant_is_the_jacobians(flow: Flow) -> None:
    x = torch.randn(2, 6, 3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        z, log_determinant = flow(x)
        torch.testing.assert_close(flow.inverse(z), x, rtol=1e-8, atol=1e-8)
    for index in range(2):
        jacobian = torch.autograd.functional.jacobian(lambda one: flow(one[None])[0].flatten(), x[index])
        sign, expected = torch.linalg.slogdet(jacobian.reshape(72, 72))
        assert float(log_determinant[index]) == pytest.approx(float(expected), rel=1e-8)
        assert abs(float(sign)) == 1


def test_fastflow_is_its_equations(backbone: Backbone) -> None:
    detector = FastFlow(backbone, layers=[1, 2], steps=3)
    batch = images(4, 0)
    with torch.no_grad():
        loss, prediction = detector.training_step(batch), detector(batch)
        expected, maps = 0.0, []
        for level, one in zip(detector.pyramid(batch), detector.flows, strict=True):
            mean, variance = (
                level.mean((1, 2, 3), keepdim=True),
                level.var((1, 2, 3), correction=0, keepdim=True),
            )
            z, log_determinant = one((level - mean) / (variance + 1e-5).sqrt())
            gaussian = -0.5 * (z**2 + math.log(2 * math.pi)).flatten(1).sum(1)
            constant = 0.5 * math.log(2 * math.pi) * z[0].numel()
            expected += float(-(gaussian + log_determinant).mean()) - constant
            likelihood = torch.exp(-0.5 * (z**2).mean(1, keepdim=True))
            maps.append(F.interpolate(-likelihood, (48, 48), mode="bilinear")[:, 0])
    assert float(loss) == pytest.approx(expected, rel=1e-4)
    torch.testing.assert_close(prediction.maps, (maps[0] + maps[1]) / 2, rtol=1e-4, atol=1e-6)


def test_trained_normalisation_is_layer_normalisation_with_its_factors_in_the_likelihood(
    backbone: Backbone,
) -> None:
    detector = FastFlow(backbone, layers=[1, 2], steps=3, trained_normalisation=True)
    batch = images(4, 0)
    without = FastFlow(backbone, layers=[1, 2], steps=3)
    detector.prepare(batch)
    random = torch.Generator().manual_seed(0)
    with torch.no_grad():
        assert torch.equal(detector.training_step(batch), without.training_step(batch))  # 1 and 0 at first
        for flow in detector.flows:
            for parameter in flow.affine.parameters():
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=random))
        for level, flow, (z, log_determinant) in zip(
            detector.pyramid(batch), detector.flows, detector.transformed(batch), strict=True
        ):
            factor, offset = flow.affine.log_factor.exp(), flow.affine.offset
            assert factor.shape == level.shape[1:]
            expected, couplings = F.layer_norm(level, level.shape[1:], factor, offset), torch.zeros(4)
            for coupling in flow.couplings:
                scale = coupling.scale
                positions = expected.shape[2] * expected.shape[3]
                expected, log_scale = coupling(expected, scale)
                couplings = couplings + log_scale.sum((1, 2, 3)) + positions * scale.log().sum()
            torch.testing.assert_close(z, expected, rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(log_determinant, couplings + factor.log().sum())
    again = FastFlow(backbone, layers=[1, 2], steps=3, trained_normalisation=True)
    again.restore(kept_state(detector))  # which has sizes that a new one has not yet
    torch.testing.assert_close(again(batch).maps, detector(batch).maps)
    detector.flows[0].affine.offset.data.zero_()
    assert float(again.flows[0].affine.offset.abs().max()) > 0  # and shares no memory


def test_kernels_of_a_flow_alternate_between_3x3_and_1x1() -> None:
    kernels = [coupling.subnetwork[0].kernel_size for coupling in Flow(4, 4, 1.0, 0).couplings]
    assert kernels == [(3, 3), (1, 1), (3, 3), (1, 1)]


# DRAEM


def test_dissimilarity_is_one_minus_ssim_in_gaussian_windows() -> None:
    random = np.random.default_rng(0)
    one, other = random.random((2, 16, 15)), random.random((2, 16, 15))
    offsets = np.arange(11) - 5
    line = np.exp(-(offsets**2) / (2 * 1.5**2))
    window = np.outer(line, line) / np.outer(line, line).sum()
    values = []
    for x, y in zip(one, other, strict=True):
        for top in range(6):
            for left in range(5):
                a, b = x[top : top + 11, left : left + 11], y[top : top + 11, left : left + 11]
                ma, mb = (window * a).sum(), (window * b).sum()
                va, vb = (window * (a - ma) ** 2).sum(), (window * (b - mb) ** 2).sum()
                vab = (window * (a - ma) * (b - mb)).sum()
                structure = (2 * ma * mb + 0.01**2) * (2 * vab + 0.03**2)
                values.append(structure / ((ma**2 + mb**2 + 0.01**2) * (va + vb + 0.03**2)))
    computed = draem.dissimilarity(torch.from_numpy(one)[:, None], torch.from_numpy(other)[:, None])
    assert float(computed) == pytest.approx(1 - np.mean(values), rel=1e-6)


def test_focal_loss_is_its_equation() -> None:
    random = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(2, 2, 4, 5, generator=random, dtype=torch.float64)
    masks = (torch.rand(2, 1, 4, 5, generator=random) > 0.5).double()
    p = torch.softmax(logits, 1)
    p_t = torch.where(masks[:, 0] > 0, p[:, 1], p[:, 0])
    assert float(draem.focal(logits, masks)) == pytest.approx(float((-((1 - p_t) ** 2) * p_t.log()).mean()))


def test_mixed_precision_leaves_the_dissimilarity_of_even_images_alone() -> None:
    torch.manual_seed(0)
    one, other = (0.7 + 0.01 * torch.rand(2, 3, 32, 32) for _ in range(2))
    expected = float(draem.dissimilarity(one, other))
    with torch.autocast("cpu", torch.bfloat16):
        assert float(draem.dissimilarity(one, other)) == expected
    assert 0 < expected < 1


@pytest.mark.parametrize("turned", [True, False])
def test_perlin_noise_is_its_definition_turned_or_not(turned: bool) -> None:
    torch.manual_seed(7)
    field = perlin(5, 24, 20, torch.device("cpu"), turned).numpy()
    torch.manual_seed(7)  # the same draws
    cells = 2 ** torch.randint(6, (5, 1, 2)).numpy()[:, 0]
    angles = (math.pi if turned else 0) * (torch.rand(5).numpy() - 0.5)
    middle = 0.75 if turned else 0.5
    turns = 2 * math.pi * torch.rand(5, 50, 50).numpy()
    assert len(set(map(tuple, cells.tolist()))) > 1
    for image in range(5):
        for row in range(0, 24, 5):
            for column in range(0, 20, 3):
                v, u = row / 24 - 0.5, column / 20 - 0.5
                cos, sin = math.cos(angles[image]), math.sin(angles[image])
                x = cells[image, 0] * (cos * u + sin * v + middle)
                y = cells[image, 1] * (cos * v - sin * u + middle)
                left, top = math.floor(x), math.floor(y)
                total = 0.0
                for down in (0, 1):
                    for right in (0, 1):
                        turn = turns[image, top + down, left + right]
                        dx, dy = x - left - right, y - top - down
                        weights = [6 * d**5 - 15 * d**4 + 10 * d**3 for d in (1 - abs(dx), 1 - abs(dy))]
                        total += weights[0] * weights[1] * (math.cos(turn) * dx + math.sin(turn) * dy)
                assert field[image, row, column] == pytest.approx(math.sqrt(2) * total, abs=2e-4)


def test_simulated_anomalies_are_in_half_of_the_images_and_only_where_the_mask_is() -> None:
    torch.manual_seed(0)
    normal, textures = torch.rand(400, 3, 32, 32), torch.rand(400, 3, 32, 32)
    anomalous, masks = simulate(normal, textures)
    outside = (masks == 0).expand_as(normal)
    assert torch.equal(anomalous[outside], normal[outside])
    assert set(masks.unique().tolist()) == {0.0, 1.0}
    touched = masks.flatten(1).any(1)
    # Half get a mask at all; Perlin noise above 0.5 is found in nearly all of those.
    assert 0.3 < float(touched.float().mean()) <= 0.56
    # The noise exceeds 0.5 over about a tenth of the area.
    assert 0.03 < float(masks[touched].mean()) < 0.3
    assert not torch.equal(anomalous[~outside], normal[~outside])
    assert float(anomalous.min()) >= 0 and float(anomalous.max()) <= 1


def test_a_batch_of_which_no_image_gets_an_anomaly_stays_as_it_is() -> None:
    normal = torch.rand(1, 3, 16, 16)
    drawn = []
    for seed in range(6):
        torch.manual_seed(seed)
        anomalous, masks = simulate(normal, torch.rand(2, 3, 16, 16))
        assert masks.shape == (1, 1, 16, 16)
        drawn.append(torch.equal(anomalous, normal))
        assert drawn[-1] or masks.any()
    assert set(drawn) == {True, False}


def test_each_texture_is_changed_in_its_own_way_and_stays_an_image() -> None:
    torch.manual_seed(1)
    one = torch.rand(1, 3, 24, 24).expand(30, -1, -1, -1)
    changed = augment(one.clone())
    assert float(changed.min()) >= 0 and float(changed.max()) <= 1
    assert len({tuple(image.flatten()[:50].tolist()) for image in changed}) > 25


PICTURE = Image.fromarray((np.random.default_rng(0).beta(2, 5, (256, 256, 3)) * 200 + 20).astype(np.uint8))


def tensor(image: Image.Image) -> Tensor:
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].float() / 255


@pytest.mark.parametrize(
    ("ours", "pillows"),
    [
        (
            lambda t: simulated.sharpened(t, torch.tensor(0.0)),
            lambda p: ImageEnhance.Sharpness(p).enhance(0.0),
        ),
        (
            lambda t: simulated.sharpened(t, torch.tensor(2.5)),
            lambda p: ImageEnhance.Sharpness(p).enhance(2.5),
        ),
        (
            lambda t: simulated.sharpened(t, torch.tensor(0.6)),
            lambda p: ImageEnhance.Sharpness(p).enhance(0.6),
        ),
        (simulated.equalised, ImageOps.equalize),
        (lambda t: simulated.stretched(t, torch.zeros(1, 1, 1, 1)), ImageOps.autocontrast),
        (
            lambda t: simulated.stretched(t, torch.full((1, 1, 1, 1), 0.17)),
            lambda p: ImageOps.autocontrast(p, cutoff=17),
        ),
        (lambda t: simulated.solarised(t, torch.tensor(99 / 255)), lambda p: ImageOps.solarize(p, 99)),
        (lambda t: simulated.posterised(t, torch.tensor(3.0)), lambda p: ImageOps.posterize(p, 3)),
        (lambda t: simulated.posterised(t, torch.tensor(1.0)), lambda p: ImageOps.posterize(p, 1)),
        (lambda t: simulated.posterised(t, torch.tensor(8.0)), lambda p: ImageOps.posterize(p, 8)),
    ],
)
def test_textures_are_changed_as_pillow_changes_them(
    ours: Callable[[Tensor], Tensor], pillows: Callable[[Image.Image], Image.Image]
) -> None:
    torch.testing.assert_close(ours(tensor(PICTURE)), tensor(pillows(PICTURE)), rtol=0, atol=2.6 / 255)


def test_a_channel_of_one_level_is_neither_equalised_nor_stretched() -> None:
    one = torch.full((2, 3, 4, 4), 0.4)
    assert torch.equal(simulated.equalised(one), (one * 255).round() / 255)
    pixel = tensor(PICTURE)[:, :, :1, :1]
    assert torch.equal(simulated.equalised(pixel), pixel)
    assert torch.equal(simulated.stretched(one, torch.full((2, 1, 1, 1), 0.1)), one)


def test_hue_and_saturation_change_as_on_the_hue_circle() -> None:
    some = torch.rand(2, 3, 5, 6, generator=torch.Generator().manual_seed(0))
    some[0, :, 0, 0], some[0, :, 0, 1] = 0.0, 0.7  # black, and grey
    some[1, :, 0, :3] = torch.eye(3)  # red, green, blue
    turn, more = torch.tensor([0.19, -0.12]).view(2, 1, 1), torch.tensor([-0.1, 0.2]).view(2, 1, 1)
    found = simulated.recoloured(some, turn, more)
    for index in range(2):
        for pixel, one in zip(some[index].flatten(1).T.tolist(), found[index].flatten(1).T, strict=True):
            hue, saturation, value = colorsys.rgb_to_hsv(*pixel)
            saturation = min(max(saturation + float(more[index]), 0), 1)
            expected = colorsys.hsv_to_rgb((hue + float(turn[index])) % 1, saturation, value)
            torch.testing.assert_close(one, torch.tensor(expected), rtol=0, atol=1e-4)


def test_brightness_moves_the_luma_alone() -> None:
    one = tensor(PICTURE)
    luma = np.array(PICTURE.convert("YCbCr")).astype(float)
    luma[..., 0] = luma[..., 0] * 1.1 - 20
    changed = Image.fromarray(luma.clip(0, 255).round().astype(np.uint8), "YCbCr").convert("RGB")
    found = simulated.brightened(one, torch.tensor(1.1), torch.tensor(-20 / 255))
    torch.testing.assert_close(found, tensor(changed), rtol=0, atol=4 / 255)


def test_draem_is_its_equations(tmp_path: Path) -> None:
    detector = DRAEM(
        reconstructive_width=4, discriminative_width=4, texture_count=3, cache=str(tmp_path), similarity=0.5
    )
    batch = images(4, 0)
    detector.prepare(batch)
    torch.manual_seed(5)
    loss = detector.training_step(batch)
    torch.manual_seed(5)
    normal, anomalous, masks = detector.material(batch)
    repaired, logits = detector.parts(anomalous)
    expected = (repaired - normal).square().mean() + 0.5 * draem.dissimilarity(repaired, normal)
    assert float(loss.detach()) == pytest.approx(
        float((expected + draem.focal(logits, masks)).detach()), rel=1e-5
    )
    detector.eval()
    with torch.no_grad():
        prediction = detector(batch)
        odd = detector(batch[..., :45, :37])
    assert odd.maps.shape == (4, 45, 37)
    padded = np.pad(prediction.maps.numpy(), ((0, 0), (10, 10), (10, 10)))
    means = np.lib.stride_tricks.sliding_window_view(padded, (21, 21), axis=(1, 2)).mean((3, 4))
    np.testing.assert_allclose(prediction.scores.numpy(), means.max((1, 2)), rtol=1e-4)
    assert float(prediction.maps.min()) >= 0 and float(prediction.maps.max()) <= 1


@pytest.mark.parametrize("precision", [torch.bfloat16, torch.float16])
def test_draem_learns_from_the_same_material_in_every_precision(
    precision: torch.dtype, tmp_path: Path
) -> None:
    detector = DRAEM(reconstructive_width=4, discriminative_width=4, texture_count=3, cache=str(tmp_path))
    batch = images(4, 0)
    detector.prepare(batch)
    torch.manual_seed(5)
    expected = detector.material(batch)
    torch.manual_seed(5)
    with torch.autocast("cpu", precision):
        found = detector.material(batch)
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one, other)
    assert float(expected[2].mean()) > 0


# EfficientAD


@pytest.fixture
def efficient(tmp_path: Path) -> EfficientAD:
    return EfficientAD(teacher="random", width=16, penalty_count=3, batch_size=2, cache=str(tmp_path))


def test_hard_features_are_those_from_the_quantile_on() -> None:
    squares = torch.rand(3, 24, 30, 31, generator=torch.Generator().manual_seed(0))
    expected = squares[squares >= torch.quantile(squares.flatten(), 0.999)].mean()
    assert float(efficientad.hard_features(squares)) == pytest.approx(float(expected), rel=1e-6)


def test_quantiles_are_interpolated() -> None:
    values = torch.rand(2, 1001, generator=torch.Generator().manual_seed(0))
    for share in (0.9, 0.995):
        torch.testing.assert_close(efficientad.quantile(values, share), torch.quantile(values, share, dim=1))


def test_teacher_statistics_are_of_all_positions_of_current_and_stored_images(efficient: EfficientAD) -> None:
    current, stored = images(5, 0, 64), images(4, 1, 64)
    with torch.no_grad():
        efficient.start_task(0, current, stored)
        features = efficient.teacher(torch.cat([current, stored]))[0].double()
    mean, deviation = features.mean((0, 2, 3)), features.std((0, 2, 3), correction=0)
    torch.testing.assert_close(efficient.channel_mean.flatten(), mean.float())
    torch.testing.assert_close(efficient.channel_deviation.flatten(), deviation.float())


@pytest.mark.parametrize(("seed", "grey"), [(3, True), (7, False)])  # how it shows the penalty image
def test_efficientad_is_its_equations(seed: int, grey: bool, efficient: EfficientAD) -> None:
    batch = images(2, 0, 64)
    efficient.eval()  # no dropout
    with torch.no_grad():
        efficient.prepare(batch)
        efficient.start_task(0, batch, none(batch))
        torch.manual_seed(seed)
        loss = efficient.training_step(batch)
        torch.manual_seed(seed)
        jittered = efficientad.jitter(batch / 255)
        larger = efficient.pictures.load(128, 128)[torch.randint(3, (1,))]
        penalty = larger[..., 32:96, 32:96] / 255
        if grey:
            penalty = penalty.mean(1, keepdim=True).repeat(1, 3, 1, 1)

        def normal(x: Tensor) -> Tensor:
            mean, deviation = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
            return (x - mean.view(1, 3, 1, 1)) / deviation.view(1, 3, 1, 1)

        def teacher(x: Tensor) -> Tensor:
            features = efficient.teacher.network.network(normal(x))
            return (features - efficient.channel_mean) / efficient.channel_deviation

        def student(x: Tensor) -> tuple[Tensor, Tensor]:
            both = efficient.student(normal(x))
            return both[:, :24], both[:, 24:]

        def coded(x: Tensor) -> Tensor:
            return efficient.autoencoder(normal(x), teacher(x).shape[-2:])

        squares = (teacher(batch / 255) - student(batch / 255)[0]) ** 2
        hard = squares[squares >= torch.quantile(squares.flatten(), 0.999)].mean()
        expected = (
            hard
            + (student(penalty)[0] ** 2).mean()
            + ((teacher(jittered) - coded(jittered)) ** 2).mean()
            + ((coded(jittered) - student(jittered)[1]) ** 2).mean()
        )
        assert float(loss) == pytest.approx(float(expected), rel=1e-4)

        efficient.finish_task(images(4, 2, 64))
        held = images(4, 2, 64) / 255
        maps = []
        for x in (held, batch / 255):
            local = ((teacher(x) - student(x)[0]) ** 2).mean(1)
            maps.append((local, ((coded(x) - student(x)[1]) ** 2).mean(1)))
        total = torch.zeros(2, 64, 64)
        for held_map, test_map in zip(*maps, strict=True):
            low, high = (torch.quantile(held_map.flatten(), q) for q in (0.9, 0.995))
            scaled = 0.1 * (F.pad(test_map, (4, 4, 4, 4)) - low) / (high - low)
            total += 0.5 * F.interpolate(scaled[:, None], (64, 64), mode="bilinear")[:, 0]
        prediction = efficient(batch)
    torch.testing.assert_close(prediction.maps, total, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(prediction.scores, total.amax((1, 2)), rtol=1e-3, atol=1e-4)


def test_jitter_keeps_images_and_changes_one_of_three_things() -> None:
    torch.manual_seed(0)
    one = 0.3 + 0.4 * torch.rand(1, 3, 8, 8)
    changed = efficientad.jitter(one.expand(60, -1, -1, -1))
    assert float(changed.min()) >= 0 and float(changed.max()) <= 1
    brightness = (changed / one).flatten(1).std(1) < 1e-5
    grey = (one * torch.tensor([0.299, 0.587, 0.114]).view(3, 1, 1)).sum(1)
    changed_grey = (changed * torch.tensor([0.299, 0.587, 0.114]).view(3, 1, 1)).sum(1)
    saturation = ((changed_grey - grey).abs().flatten(1).amax(1) < 1e-5) & ~brightness
    contrast = ~brightness & ~saturation
    assert all(8 <= int(kind.sum()) <= 35 for kind in (brightness, saturation, contrast))


@pytest.mark.parametrize("names", ["0.", "conv"])
def test_a_teacher_is_read_whatever_its_layers_are_called(names: str, tmp_path: Path) -> None:
    network, other = patch_description_network(16, 24), patch_description_network(16, 24)
    layers = [layer for layer in network if hasattr(layer, "weight")]
    state = {}
    for number, layer in enumerate(layers):
        prefix = f"conv{number + 1}" if names == "conv" else str(3 * number)
        state |= {f"{prefix}.weight": layer.weight.detach(), f"{prefix}.bias": layer.bias.detach()}
    torch.save(state, tmp_path / "teacher.pth")
    efficientad.load_teacher(other, str(tmp_path / "teacher.pth"), 16)
    for one, two in zip(network.parameters(), other.parameters(), strict=True):
        assert torch.equal(one, two)


def test_a_teacher_that_does_not_fit_is_refused_for_what_is_wrong_with_it(tmp_path: Path) -> None:
    network, path = patch_description_network(16, 24), tmp_path / "teacher.pth"

    def load(state: dict[str, Tensor]) -> None:
        torch.save(state, path)
        efficientad.load_teacher(network, str(path), 16)

    whole = network.state_dict()
    with pytest.raises(UserError, match="has 10 tensors.*has 12"):
        load(dict(list(whole.items())[:10]))
    with pytest.raises(UserError, match=r"method.width=16: its 0.weight is of shape \[32, 3, 4, 4\]"):
        load(patch_description_network(32, 48).state_dict())
    with pytest.raises(UserError, match="no numbers, in 0.weight"):
        load({**whole, "0.weight": whole["0.weight"] * torch.nan})


# All


def parameters(module: torch.nn.Module) -> float:
    return sum(parameter.numel() for parameter in module.parameters()) / 1e6


def test_parameter_counts_of_the_supplement() -> None:
    """Sections 1.3.4 to 1.8.3, in millions; CFA's 6.4 counts an unused second copy of its weights."""
    wide = Backbone("wide_resnet50_2", pretrained=False)
    cfa = CFA(wide, layers=[1, 2, 3])
    assert parameters(cfa.descriptor) == pytest.approx(6.4 / 2, abs=0.05)
    assert (cfa.pyramid.whole_parameters / 1e6 + parameters(cfa.descriptor)) * 4 == pytest.approx(
        288.4, abs=0.1
    )
    flows = FastFlow(wide, layers=[1, 2, 3]).flows
    assert parameters(flows) == pytest.approx(41.3, abs=0.05)
    assert cfa.pyramid.whole_parameters * 4 / 1e6 + 4 * parameters(flows) == pytest.approx(440.8, rel=0.002)
    stfpm = STFPM(Backbone("resnet18", pretrained=False), layers=[1, 2, 3])
    assert stfpm.student.whole_parameters / 1e6 == pytest.approx(11.7, abs=0.05)
    assert 8 * stfpm.student.whole_parameters / 1e6 == pytest.approx(93.6, rel=0.002)
    assert parameters(Reconstructive(128)) == pytest.approx(69.0, abs=0.05)
    assert parameters(Discriminative(64)) == pytest.approx(28.4, abs=0.05)
    assert parameters(patch_description_network(256, 384)) == pytest.approx(8.0, abs=0.05)
    assert parameters(patch_description_network(256, 768)) == pytest.approx(11.6, abs=0.05)
    assert parameters(Autoencoder(256, 384)) == pytest.approx(1.1, abs=0.05)


class Unlearning(Replay):
    """Replay's buffer, without the hours of learning at the paper's size."""

    def learn(self, stage: int, images: Tensor) -> None:
        self.begin_stage(stage, images)
        self.end_stage(stage, images)


@pytest.mark.parametrize(
    ("name", "size", "architecture", "additional"),
    [
        ("cfa", 224, 288.4, 22.5 + 45.2),
        ("stfpm", 256, 93.6, 59.0),
        ("efficientad", 256, 82.8, 59.0),
        ("draem", 256, 389.6, 59.0),
        ("fastflow", 256, 440.8, 59.0),
    ],
)
def test_footprints_of_the_supplement_with_300_images_replayed(
    name: str, size: int, architecture: float, additional: float
) -> None:
    """Sections 1.3 to 1.8, counted from live tensors after ten tasks of 40 images."""
    build: dict[str, Callable[[], Detector]] = {
        "cfa": lambda: CFA(Backbone("wide_resnet50_2", pretrained=False), layers=[1, 2, 3]),
        "stfpm": lambda: STFPM(Backbone("resnet18", pretrained=False), layers=[1, 2, 3]),
        "efficientad": lambda: EfficientAD(teacher="random", cache="unused"),
        "draem": lambda: DRAEM(cache="unused"),
        "fastflow": lambda: FastFlow(Backbone("wide_resnet50_2", pretrained=False), layers=[1, 2, 3]),
    }
    detector = build[name]()
    if isinstance(detector, CFA):  # its bank is as large as one image's features: 56 x 56 x 1,792
        detector.start_task(0, torch.zeros(1, 3, size, size, dtype=torch.uint8), torch.empty(0))
    strategy = Unlearning(detector, replay_size=300)
    for stage in range(10):
        strategy.learn(stage, torch.zeros(40, 3, size, size, dtype=torch.uint8))
    counted = footprint.measure(strategy)
    assert counted["architecture_mb"] == pytest.approx(architecture, rel=0.002)
    assert counted["additional_mb"] == pytest.approx(additional, abs=0.1)
