"""Dinomaly: sizes as published, worked examples, and the encoder sees each image once."""

import math

import hydra
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from clbench.backbones import Backbone
from clbench.config import composing
from clbench.errors import UserError
from clbench.methods.dinomaly import Dinomaly, LinearAttention, loose_distance
from clbench.methods.stable_adamw import StableAdamW
from clbench.training import train

SMALL = {"patch_size": 8, "embed_dim": 32, "depth": 5, "num_heads": 2, "dynamic_img_size": True}
IMAGES = torch.randint(0, 256, (4, 3, 40, 48), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def detector(**settings: object) -> Dinomaly:
    backbone = Backbone("vit_tiny_patch16_224", pretrained=False, arguments=SMALL, batch_size=4)
    given = {"groups": [[1, 2], [3]], "steps": 4, "batch_size": 2, "warm_up": 1, "map_side": 32}
    return Dinomaly(backbone, **{**given, **settings})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("size", "groups", "trained", "millions"),
    [
        ("small", [[2, 3, 4, 5], [6, 7, 8, 9]], 15_377_280, 37.4),
        ("base", [[2, 3, 4, 5], [6, 7, 8, 9]], 61_425_408, 148.0),
        ("large", [[4, 6, 8, 10], [12, 14, 16, 18]], 109_163_520, 413.5),
    ],
)
def test_it_has_as_many_parameters_as_the_paper_says(
    size: str, groups: list[list[int]], trained: int, millions: float
) -> None:
    with torch.device("meta"):
        made = Dinomaly(Backbone(f"vit_{size}_patch14_reg4_dinov2", pretrained=False), groups=groups)
    found = sum(
        parameter.numel() for part in (made.bottleneck, made.decoder) for parameter in part.parameters()
    )
    assert found == trained
    assert round((found + made.encoder.whole_parameters) / 1e6, 1) == millions


def test_the_encoder_sees_each_image_once_in_a_training() -> None:
    learner = detector(steps=6)
    seen: list[int] = []
    learner.encoder.network.register_forward_hook(lambda _, images, __: seen.append(len(images[0])))
    train(learner, 0, IMAGES, (), seed=0)
    assert sum(seen) == len(IMAGES)


# Equations


def test_linear_attention_is_a_mean_of_values_weighted_by_pairs() -> None:
    torch.manual_seed(0)
    attention = LinearAttention(8, heads=2)
    tokens = torch.randn(2, 5, 8)
    queries, keys, values = (
        part.view(2, 5, 2, 4).transpose(1, 2) for part in attention.inward(tokens).chunk(3, 2)
    )
    weights = (F.elu(queries) + 1) @ (F.elu(keys) + 1).mT  # [B, heads, N, N]
    mean = (weights / weights.sum(3, keepdim=True)) @ values
    wanted = attention.outward(mean.transpose(1, 2).reshape(2, 5, 8))
    torch.testing.assert_close(attention(tokens), wanted)


@pytest.mark.parametrize("easy", [0.0, 0.45, 0.9])
def test_gradients_of_easy_points_are_a_tenth_and_the_loss_is_the_same(easy: float) -> None:
    random = torch.Generator().manual_seed(0)
    wanted = torch.randn(3, 10, 6, generator=random)
    learned = torch.randn(3, 10, 6, generator=random).requires_grad_()
    plain = (1 - F.cosine_similarity(wanted.flatten(1), learned.flatten(1))).mean()
    (whole,) = torch.autograd.grad(plain, learned)
    loss = loose_distance(wanted, learned, easy)
    (damped,) = torch.autograd.grad(loss, learned)
    assert torch.equal(loss, plain)
    distances = 1 - F.cosine_similarity(wanted, learned, dim=2)
    number = 30 - int(30 * (1 - easy))
    smallest = distances.flatten().argsort()[:number]
    factor = torch.ones(30)
    factor[smallest] = 0.1
    torch.testing.assert_close(damped, whole * factor.view(3, 10, 1))


def test_schedules_are_those_of_the_originals_code() -> None:
    learner = detector(steps=10_000, warm_up=100)
    steps = (0, 1, 99, 100, 5050, 9999)
    wanted = [0, 1 / 99, 1, 1, 0.1 + 0.45 * (1 + math.cos(math.pi / 2)), 0.1]
    found = [learner.learning_rate_factor(step / 10_000) for step in steps]
    assert found == pytest.approx(wanted, abs=1e-6)
    for step, share in ((0, 0.0), (500, 0.45), (1000, 0.9), (9999, 0.9)):
        learner.done = step / 10_000
        assert learner.easy_share() == pytest.approx(share)


@pytest.mark.parametrize(("restart", "share"), [(True, 0.0), (False, 0.36)])
def test_mining_begins_anew_with_a_task_or_goes_on(restart: bool, share: float) -> None:
    learner = detector(mining_steps=10, mining_restart=restart)
    train(learner, 0, IMAGES, (), seed=0)
    learner.prepare(IMAGES)
    learner.done = 0.0
    assert learner.easy_share() == pytest.approx(share)  # 4 steps of 10, times 0.9


@torch.no_grad()
@pytest.mark.parametrize("sigma", [0.0, 4.0])
def test_maps_and_scores_are_those_of_plain_operations(sigma: float) -> None:
    judge = detector(sigma=sigma, top=0.05).eval()
    wanted, learned = judge.groups_of(IMAGES)
    levels = []
    for pair in zip(wanted, learned, strict=True):
        grid = (1 - F.cosine_similarity(*pair, dim=2)).view(4, 1, 5, 6)
        levels.append(F.interpolate(grid, (40, 48), mode="bilinear", align_corners=True))
    scored = F.interpolate(torch.stack(levels).mean(0), (32, 32), mode="bilinear")
    if sigma:
        along = torch.exp(-(torch.arange(-2.0, 3.0) ** 2) / (2 * sigma**2))
        kernel = along[:, None] * along
        scored = F.conv2d(scored, (kernel / kernel.sum())[None, None], padding=2)
    found = judge(IMAGES)
    torch.testing.assert_close(found.maps, F.interpolate(scored, (40, 48), mode="bilinear")[:, 0])
    largest = scored.flatten(1).sort(descending=True).values[:, :51]
    torch.testing.assert_close(found.scores, largest.mean(1))


@torch.no_grad()
def test_decoded_blocks_stand_for_the_encoders_in_reverse_and_recentred_patches_go_alone() -> None:
    for recentred in (False, True):
        judge = detector(recentred=recentred).eval()
        one, other = judge.encoder(IMAGES)  # blocks 1 and 2, and block 3
        if recentred:
            one, other = one[:, 1:] - one[:, :1], other[:, 1:] - other[:, :1]
        tokens = judge.bottleneck((2 * one + other) / 3)
        outputs = [tokens := block(tokens) for block in judge.decoder]
        before = 0 if recentred else 1
        found = [output.flatten(2).mT for output in judge.outputs(IMAGES)]
        torch.testing.assert_close(found[0], (outputs[2] + outputs[1])[:, before:] / 2)
        torch.testing.assert_close(found[1], outputs[0][:, before:])


# StableAdamW


def test_the_optimizer_takes_the_steps_worked_out_by_hand() -> None:
    weight = nn.Parameter(torch.ones(1, dtype=torch.float64))
    optimizer = StableAdamW([weight], 2e-3, epsilon=1e-10, weight_decay=1e-4)
    for gradient, wanted in ((0.5, 0.9979998), (0.0, 0.99666015)):
        weight.grad = torch.full((1,), gradient, dtype=torch.float64)
        optimizer.step()
        assert weight.item() == pytest.approx(wanted, abs=6e-9)


def test_the_optimizer_shortens_steps_after_a_jump_of_gradients() -> None:
    start = torch.tensor([1.0, 2.0])
    weight = nn.Parameter(start.clone())
    optimizer = StableAdamW([weight], 0.1, epsilon=0.0)
    mean, square = torch.zeros(2), torch.zeros(2)
    wanted = start.clone()
    for step, gradient in enumerate((torch.tensor([0.01, -0.02]), torch.tensor([1.0, 3.0])), 1):
        weight.grad = gradient.clone()
        optimizer.step()
        mean, square = 0.9 * mean + 0.1 * gradient, 0.999 * square + 0.001 * gradient**2
        divisor = (square / (1 - 0.999**step)).sqrt()
        shortened = max(1.0, float((gradient / divisor).square().mean().sqrt()))
        wanted -= 0.1 / ((1 - 0.9**step) * shortened) * mean / divisor
        torch.testing.assert_close(weight.detach(), wanted)
    assert shortened > 1.4


def test_a_step_that_overflowed_changes_nothing() -> None:
    def taken(optimizer: StableAdamW, gradient: float, overflowed: float | None) -> Tensor:
        weight.grad = torch.full((3,), gradient)
        if overflowed is not None:
            optimizer.found_inf, optimizer.grad_scale = torch.tensor(overflowed), torch.tensor(8.0)  # type: ignore[attr-defined]
        optimizer.step()
        return weight.detach().clone()

    weight = nn.Parameter(torch.ones(3))
    plain = [taken(one := StableAdamW([weight], 0.1, weight_decay=0.1), g, None) for g in (0.5,)]
    plain.append(taken(one, -0.25, None))
    weight = nn.Parameter(torch.ones(3))
    scaled = StableAdamW([weight], 0.1, weight_decay=0.1)
    assert torch.equal(taken(scaled, math.inf, 1.0), torch.ones(3))
    first = taken(scaled, 8 * 0.5, 0.0)
    assert torch.equal(taken(scaled, math.nan, 1.0), first)
    torch.testing.assert_close([first, taken(scaled, 8 * -0.25, 0.0)], plain)


# What is chosen and refused


def test_the_demo_gives_methods_of_tokens_a_transformer_and_others_the_small_network() -> None:
    with composing():
        found = {
            words: hydra.compose("usual", list(words)).backbone.name
            for words in (("method=dinomaly",), ("method=stfpm",), ("method=dinomaly", "backbone=resnet18"))
        }
    assert list(found.values()) == ["vit_tiny_patch16_224", "resnet18", "resnet18"]


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("resnet18", {}, "resnet18 is no vision transformer"),
        ("convmixer_768_32", {}, "no attention whose heads"),
        ("vit_base_patch16_gap_224", {"recentred": True}, "recentred=true takes the class token"),
    ],
)
def test_networks_that_cannot_be_decoded_are_refused(
    name: str, settings: dict[str, bool], message: str
) -> None:
    arguments = {"depth": 2, "embed_dim": 32} if name.startswith("vit") else {}
    with pytest.raises(UserError, match=message):
        Dinomaly(Backbone(name, pretrained=False, arguments=arguments), groups=[[0], [1]], **settings)  # type: ignore[arg-type]
