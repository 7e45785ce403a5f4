"""RD4AD, SimpleNet and SuperSimpleNet: the contract, published counts, worked numbers, and what they refuse."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from clbench import footprint
from clbench.backbones import Backbone
from clbench.errors import UserError
from clbench.methods.base import Detector
from clbench.methods.rd4ad import RD4AD, Block, distance
from clbench.methods.simplenet import Discriminator, SimpleNet
from clbench.methods.simulated import perlin
from clbench.methods.supersimplenet import SuperSimpleNet, focal, truncated
from clbench.strategies.finetune import Finetune
from clbench.testing import DetectorContract
from clbench.testing.detectors import BuildDetector
from clbench.testing.small import images


def backbone(name: str = "resnet18", **arguments: Any) -> Backbone:
    narrow = {"channels": [8, 16, 32, 64]} if name == "resnet18" else {}
    return Backbone(name, pretrained=False, arguments=arguments or narrow)


class TestRD4AD(DetectorContract):
    sizes = (32, 64)

    @pytest.fixture
    def build(self) -> BuildDetector:
        return lambda: RD4AD(backbone(), epochs=2, batch_size=3)


class TestSimpleNet(DetectorContract):
    @pytest.fixture
    def build(self) -> BuildDetector:
        return lambda: SimpleNet(backbone(), layers=[2, 3], hidden=16, epochs=2, batch_size=3)


class TestSuperSimpleNet(DetectorContract):
    sizes = (32, 48)

    @pytest.fixture
    def build(self) -> BuildDetector:
        return lambda: SuperSimpleNet(backbone(), layers=[2, 3], hidden=16, epochs=2, batch_size=3)


def trained(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters() if parameter.requires_grad)


def test_parameter_counts_of_the_originals() -> None:
    with torch.device("meta"):
        wide, narrow = (
            Backbone(name, pretrained=False) for name in ("wide_resnet50_2.tv_in1k", "resnet18.tv_in1k")
        )
        published, copies, small = RD4AD(wide), RD4AD(wide, embedding_width=512), RD4AD(narrow)
        assert [trained(one.embedding) for one in (published, copies, small)] == [
            58885120,
            30829568,
            11680000,
        ]
        assert [trained(one.decoder) for one in (published, copies, small)] == [24917504, 24917504, 3703168]
        assert sum(p.numel() for p in published.encoder.parameters()) == 24862528
        assert trained(SimpleNet(wide, layers=[2, 3])) == 3937792
        assert trained(SuperSimpleNet(wide, layers=[2, 3])) == 8856835


def test_footprints_of_the_originals_are_the_networks_and_nothing_besides() -> None:
    """MB of Wide ResNet-50-2 whole, of what is trained, and of its running statistics."""
    with torch.device("meta"):
        wide = Backbone("wide_resnet50_2.tv_in1k", pretrained=False)
        expected = {
            RD4AD(wide): 335.2,
            SimpleNet(wide, layers=[2, 3]): 15.8,
            SuperSimpleNet(wide, layers=[2, 3]): 35.4,
        }
        for detector, trained_mb in expected.items():
            counted = footprint.measure(Finetune(detector))
            assert counted["architecture_mb"] == pytest.approx(275.5 + trained_mb, abs=0.3)
            assert counted["additional_mb"] == 0


# RD4AD


def test_the_decoder_has_the_encoder_s_numbers_of_blocks_in_its_own_order() -> None:
    with torch.device("meta"):
        detector = RD4AD(Backbone("wide_resnet50_2.tv_in1k", pretrained=False))
    inner = [[block.body[0].out_channels for block in stage] for stage in detector.decoder.stages]
    assert inner == [[512] * 3, [256] * 4, [128] * 6]
    levels = [
        torch.rand(1, channels, side, side, device="meta")
        for channels, side in ((256, 24), (512, 12), (1024, 6))
    ]
    assert detector.embedding(levels).shape == (1, 2048, 3, 3)
    assert [made.shape for made in detector.reconstructed(levels)] == [level.shape for level in levels]


def test_a_block_is_its_layers_and_transposed_convolutions_begin_as_pytorch_s() -> None:
    torch.manual_seed(0)
    block = Block(4, 3, 2, 2).eval()
    x = torch.randn(2, 4, 3, 3)
    first, raised, last = (block.body[n] for n in (0, 3, 6))
    assert isinstance(raised, nn.ConvTranspose2d) and raised.kernel_size == raised.stride == (2, 2)
    scale = (1 + 1e-5) ** -0.5  # normalisation that has seen nothing
    inside = F.relu(F.conv2d(x, first.weight) * scale)
    inside = F.relu(F.conv_transpose2d(inside, raised.weight, stride=2) * scale)
    shortcut = F.conv_transpose2d(x, block.shortcut[0].weight, stride=2) * scale
    torch.testing.assert_close(block(x), F.relu(F.conv2d(inside, last.weight) * scale + shortcut))
    detector = RD4AD(backbone())
    for module in detector.decoder.modules():
        if isinstance(module, nn.ConvTranspose2d):  # uniform up to 1 / sqrt(fan-in), which PyTorch counts so
            assert float(module.weight.detach().abs().max()) <= (module.out_channels * 4) ** -0.5
        if isinstance(module, nn.BatchNorm2d):
            assert bool((module.weight == 1).all())


def test_rd4ad_s_loss_compares_whole_levels_or_positions() -> None:
    """Two positions of two channels: (3, 4) against (3, 4), and (1, 0) against (0, 1)."""
    seen = torch.tensor([[3.0, 1.0], [4.0, 0.0]]).view(1, 2, 1, 2)
    made = torch.tensor([[3.0, 0.0], [4.0, 1.0]]).view(1, 2, 1, 2)
    assert distance(seen, made, (1, 2, 3)).item() == pytest.approx(1 - 25 / 26)
    assert distance(seen, made, (1,)).flatten().tolist() == pytest.approx([0, 1])
    for loss, dims in (("flattened", (1, 2, 3)), ("positions", (1,))):
        detector = RD4AD(backbone(), loss=loss).eval()
        given = images(2, 0, 32)
        levels = detector.encoder(given)
        expected = sum(
            distance(*pair, dims).mean() for pair in zip(levels, detector.outputs(given), strict=True)
        )
        assert detector.training_step(given).item() == pytest.approx(expected.item(), rel=1e-6)


def test_rd4ad_s_map_is_the_sum_of_levels_raised_corner_to_corner() -> None:
    detector = RD4AD(backbone(), sigma=0.0).eval()
    given = images(2, 0, 64)
    with torch.no_grad():
        pairs = zip(detector.encoder(given), detector.outputs(given), strict=True)
        levels = [1 - F.cosine_similarity(seen, made)[:, None] for seen, made in pairs]
        maps, scores = detector(given)
    raised = [F.interpolate(level, (64, 64), mode="bilinear", align_corners=True)[:, 0] for level in levels]
    torch.testing.assert_close(maps, sum(raised), rtol=1e-4, atol=1e-5)
    assert torch.equal(scores, maps.amax((1, 2)))


# SimpleNet and SuperSimpleNet


def test_simplenet_s_features_are_means_of_consecutive_values_of_a_neighbourhood() -> None:
    detector = SimpleNet(backbone(), layers=[2, 3])
    given = images(1, 0)
    fine, coarse = detector.pyramid(given)
    found = detector.features(given)
    assert found.shape == (1, 48, 6, 6)
    row, column = 2, 3
    values = fine[0, :, row - 1 : row + 2, column - 1 : column + 2].flatten()
    torch.testing.assert_close(found[0, :24, row, column], values.view(24, 6).mean(1))
    values = F.pad(coarse, (1, 1, 1, 1)).unfold(2, 3, 1).unfold(3, 3, 1)  # [1, 32, 3, 3, 3, 3]
    values = values.permute(0, 1, 4, 5, 2, 3).flatten(1, 3)  # by channel, row, column
    values = F.interpolate(values, (6, 6), mode="bilinear")
    torch.testing.assert_close(found[0, 24:], values[0].view(24, 12, 6, 6).mean(1))


@pytest.mark.parametrize("layers", [[1, 2, 3], [3]])
def test_simplenet_takes_any_number_of_levels(layers: list[int]) -> None:
    detector = SimpleNet(backbone(channels=[8, 17, 32, 64]), layers=layers, hidden=4)
    assert detector.features(images(1, 0)).shape[1] == detector.adaptor.in_channels
    assert detector.training_step(images(2, 0)).isfinite()


def test_noise_that_bf16_would_round_away_reaches_the_discriminator() -> None:
    layer = Discriminator(3, 4)
    features = torch.randint(4, 8, (2, 3, 8, 8)).float()  # bf16 has no numbers within 0.015 of these
    seen: list[Tensor] = []
    layer[1].register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(layer[0](features), layer[0](features + 0.007))
        layer(features), layer(features + 0.007)
    assert not torch.equal(*seen)


def test_focal_and_truncated_losses_of_worked_examples() -> None:
    logit = torch.tensor([0.8]).logit()
    assert focal(logit, torch.ones(1)).item() == pytest.approx(3.570e-4, rel=1e-3)
    assert focal(logit, torch.zeros(1)).item() == pytest.approx(0.65923, rel=1e-4)
    assert focal(torch.tensor([300.0]), torch.zeros(1)).item() == pytest.approx(
        300
    )  # finite where a sigmoid is 1
    maps = torch.tensor([-2.0, 0.5, 2.0, -0.5]).view(1, 1, 2, 2)
    masks = torch.tensor([0.0, 0.0, 1.0, 1.0]).view(1, 1, 2, 2)
    assert truncated(maps, masks).item() == pytest.approx((0 + 1) / 2 + (0 + 1) / 2)
    assert truncated(maps, torch.zeros_like(masks)).item() == pytest.approx((0 + 1 + 2.5 + 0) / 4)
    assert truncated(maps, torch.ones_like(masks)).item() == pytest.approx((2.5 + 0 + 0 + 1) / 4)


def test_simplenet_s_loss_is_a_hinge_on_either_side() -> None:
    detector = SimpleNet(backbone(), layers=[2, 3], hidden=8)
    features, noise = torch.randn(2, 48, 3, 3), torch.randn(2, 48, 3, 3)
    adapted = detector.adaptor(features)
    scores = -detector.discriminator(
        torch.cat([adapted, adapted + noise])
    )  # as the paper has it: high where normal
    expected = F.relu(0.5 - scores[:2]).mean() + F.relu(0.5 + scores[2:]).mean()
    torch.testing.assert_close(detector.loss(features, noise), expected)


@pytest.mark.parametrize("adapted", [True, False])
@pytest.mark.parametrize("stop", [True, False])
def test_which_parts_of_supersimplenet_the_classification_teaches(adapted: bool, stop: bool) -> None:
    detector = SuperSimpleNet(backbone(), layers=[2, 3], adapt_cls_features=adapted, stop_grad=stop)
    _, scores = detector.outputs(images(2, 0, 32))
    scores.square().sum().backward()
    assert (detector.adaptor.weight.grad is None) == (stop and not adapted)
    assert (detector.heads.segmentation[0].weight.grad is None) == stop
    assert detector.heads.classification[0].weight.grad is not None


def test_noise_is_where_masks_are_and_half_of_them_are_empty() -> None:
    detector = SuperSimpleNet(backbone(), layers=[2, 3])
    seen: dict[str, Tensor] = {}
    detector.heads.register_forward_pre_hook(lambda _, given: seen.update(zip("sc", given, strict=True)))
    features, noise = torch.randn(2, 48, 4, 4), torch.randn(4, 48, 4, 4)
    masks = torch.zeros(4, 1, 4, 4)
    masks[1, 0, 2, 3] = masks[2, 0, 0] = 1
    detector.loss(features, noise, masks)
    changed = (seen["s"] - detector.adaptor(features).repeat(2, 1, 1, 1)).abs().amax(1) > 1e-3
    assert torch.equal(changed, masks[:, 0] > 0) and seen["s"] is seen["c"]
    torch.manual_seed(0)
    drawn = detector.masks(torch.zeros(1, 1, 40, 64), 400)
    assert drawn.shape == (400, 1, 40, 64) and set(drawn.unique().tolist()) == {0, 1}
    assert 0.4 < float(drawn.amax((1, 2, 3)).mean()) < 0.55
    torch.manual_seed(0)
    noise = F.interpolate(perlin(400, 64, 64, drawn.device, turned=False)[:, None], (40, 64), mode="bilinear")
    filled = drawn.amax((1, 2, 3)) > 0
    assert torch.equal(drawn[filled], (noise > 0.2).float()[filled])


@pytest.mark.parametrize("kind", [SimpleNet, SuperSimpleNet])
def test_the_adaptor_has_its_own_rate_and_decay(kind: type[SimpleNet]) -> None:
    heads, adaptor = kind(backbone(), layers=[2, 3]).optimizer().param_groups
    assert (heads["lr"], heads["weight_decay"]) == (2e-4, 1e-5)
    assert (adaptor["lr"], adaptor["weight_decay"]) == (1e-4, 0.01)
    assert [tensor.shape[0] for tensor in adaptor["params"]] == [48, 48]


def test_supersimplenet_s_rate_falls_twice() -> None:
    factors = [SuperSimpleNet.learning_rate_factor(None, done) for done in (0, 0.79, 0.8, 0.89, 0.9, 0.99)]
    assert factors == [1, 1, 0.4, 0.4, 0.16, 0.16]


@pytest.mark.parametrize(
    "build",
    [
        lambda: RD4AD(backbone()),
        lambda: SuperSimpleNet(backbone(), layers=[2, 3], hidden=64, learning_rate=2e-3, noise=0.5),
        lambda: SimpleNet(backbone(), layers=[2, 3], hidden=64, learning_rate=2e-3, noise=0.5),
    ],
    ids=["rd4ad", "supersimplenet", "simplenet"],
)
def test_four_images_are_learned_by_heart(build: Callable[[], Detector]) -> None:
    torch.manual_seed(0)
    detector, given = build().train(), images(4, 0, 32)
    optimizer = detector.optimizer()
    losses = []
    for _ in range(50):
        optimizer.zero_grad()
        loss = detector.training_step(given)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert sum(losses[-5:]) / 5 < 0.25 * losses[0]


# What is refused


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: RD4AD(backbone("mobilenetv2_100")), "mobilenetv2_100, with its backbone.arguments, is none: take backbone=resnet18"),
        (lambda: RD4AD(backbone("convnext_atto")), "is none: take"),
        (lambda: RD4AD(backbone("resnext50_32x4d")), "is none: take"),
        (lambda: RD4AD(backbone("resnet18", output_stride=8)), "is none: take"),
        (lambda: RD4AD(backbone(), embedding_width=512), "embedding_width=512 is the width of bottleneck blocks"),
        (lambda: RD4AD(backbone()).check(images(1, 0, 48)), "none of 48x48: give a dataset.resize (and dataset.crop) that is a multiple of 32, as 64"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused_with_the_way_out(call: Callable[[], object], said: str) -> None:
    with (
        torch.device("meta") if "check" not in said else torch.device("cpu"),
        pytest.raises(UserError) as refused,
    ):
        call()
    assert said in str(refused.value) and "\n" not in str(refused.value)


@pytest.mark.parametrize("method", [RD4AD, SimpleNet, SuperSimpleNet])
def test_a_frozen_backbone_keeps_its_weights(method: type[Detector]) -> None:
    """Each once gave its own first weights to the pretrained network too."""
    backbone = Backbone("resnet18", pretrained=False)
    layers = {} if method is RD4AD else {"layers": [2, 3]}
    (pyramid,) = method(backbone, **layers).pyramids()
    wanted = backbone.pyramid(layers.get("layers", [1, 2, 3])).state_dict()
    found = pyramid.state_dict()
    assert all(torch.equal(found[name], tensor) for name, tensor in wanted.items())
