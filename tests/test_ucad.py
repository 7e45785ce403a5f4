"""UCAD: worked examples, what it keeps of a task, and which networks it refuses."""

import pytest
import timm
import torch
from torch import Tensor

from clbench.backbones import Backbone
from clbench.errors import UserError
from clbench.methods.coreset import farthest_first
from clbench.methods.ucad import UCAD, attention, clusters, contrast, nearest_squared
from clbench.training import train

SMALL = {"patch_size": 8, "embed_dim": 32, "depth": 3, "num_heads": 2, "dynamic_img_size": True}


def images(count: int, seed: int = 0) -> Tensor:
    random = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, 3, 32, 40), dtype=torch.uint8, generator=random)


def detector(**settings: object) -> UCAD:
    backbone = Backbone("vit_tiny_patch16_224", pretrained=False, arguments=SMALL, batch_size=4)
    given = {"block": 1, "key_size": 7, "memory_size": 9, "segment_count": 3, "epochs": 2, "batch_size": 2}
    return UCAD(backbone, **{**given, **settings})  # type: ignore[arg-type]


def test_prompts_of_the_papers_network_have_half_of_its_numbers_as_half_of_its_blocks_are_run() -> None:
    with torch.device("meta"):
        made = UCAD(backbone := Backbone("vit_base_patch16_224.orig_in21k", pretrained=False))
        whole = timm.create_model("vit_base_patch16_224.orig_in21k", pretrained=False)
    every_block = 2 * len(whole.blocks) * whole.embed_dim
    assert (made.prompt.numel(), every_block) == (9_216, 18_432)
    assert [parameter.shape for parameter in made.parameters() if parameter.requires_grad] == [(6, 2, 768)]
    assert backbone._normalisation(whole).mean.flatten().tolist() == [0.5, 0.5, 0.5]


# Equations


def test_attention_with_a_prefix_is_plain_attention_with_a_key_and_a_value_more() -> None:
    torch.manual_seed(0)
    layer = timm.layers.Attention(8, num_heads=2, qkv_bias=True)
    tokens, pairs = torch.randn(3, 5, 8), torch.randn(3, 2, 8)
    queries, keys, values = (part.view(3, 5, 2, 4) for part in layer.qkv(tokens).chunk(3, 2))
    keys = torch.cat([pairs[:, :1].view(3, 1, 2, 4), keys], 1)
    values = torch.cat([pairs[:, 1:].view(3, 1, 2, 4), values], 1)
    weights = (torch.einsum("bqhc,bkhc->bhqk", queries, keys) / 2).softmax(3)
    wanted = layer.proj(torch.einsum("bhqk,bkhc->bqhc", weights, values).flatten(2))
    torch.testing.assert_close(attention(layer, tokens, pairs), wanted)


@torch.no_grad()
def test_a_prompt_whose_keys_draw_no_attention_changes_nothing() -> None:
    judge, shown = detector(), images(2)
    prompts = torch.randn(2, 2, 2, 32, generator=torch.Generator().manual_seed(0))
    plain = judge.encoder.compute(shown)[0][:, 1:]
    assert not torch.allclose(judge.prompted(shown, prompts), plain, atol=1e-3)
    for block in judge.encoder.network.model.blocks:  # type: ignore[union-attr]
        rows = [15, 31]  # the last number of both heads' queries becomes 1
        block.attn.qkv.weight[rows], block.attn.qkv.bias[rows] = 0, 1
        prompts[:, :, 0, rows] = -1e4
    torch.testing.assert_close(judge.prompted(shown, prompts), judge.encoder.compute(shown)[0][:, 1:])


def test_the_loss_of_two_pairs_of_equal_patches() -> None:
    features = torch.tensor([[[1.0, 0], [1, 0], [0, 1], [0, 1]]])
    loss = contrast(features, torch.tensor([[1, 1, 2, 2]]))
    assert float(loss) == pytest.approx((8 * -2 + 8 * 1) / 16)


def test_clusters_are_the_groups_that_points_lie_in() -> None:
    random = torch.Generator().manual_seed(0)
    centers = 10 * torch.randn(2, 3, 4, generator=random)
    owners = torch.randint(3, (2, 30), generator=random)
    points = torch.stack([c[o] for c, o in zip(centers, owners, strict=True)])
    found = clusters(points + 0.1 * torch.randn(2, 30, 4, generator=random), 3)
    for labels, of in zip(found, owners, strict=True):
        assert torch.equal(labels[:, None] == labels, of[:, None] == of)
    assert clusters(points[:, :2], 5).max() < 2


@pytest.mark.parametrize("segments", ["tokens", "colours"])
def test_segments_of_an_image_of_two_halves_are_its_halves(segments: str) -> None:
    halves = torch.zeros(1, 3, 32, 40, dtype=torch.uint8)
    halves[..., 16:] = 255
    learner = detector(segments=segments, segment_count=2)
    labels = clusters(learner._segmented(halves), 2).view(4, 5)
    left = torch.arange(5) < 2
    assert torch.equal(labels == labels[0, 0], left.expand(4, 5))


# What is kept, and how images are judged


@torch.no_grad()
def test_an_image_is_judged_by_the_task_whose_key_is_nearest() -> None:
    judge = detector()
    for task in range(2):
        with torch.enable_grad():
            train(judge, task, images(4, seed=task) // (1 + 2 * task), (), seed=0)
    assert judge.keys.shape == (2, 7, 32)
    assert judge.knowledge.shape == (2, 9, 32)
    shown = torch.cat([images(2, seed=0), images(2, seed=1) // 3])
    found = judge(shown)
    plain = judge.plain(shown)
    sums = torch.stack([torch.cdist(plain, key.expand(4, -1, -1)).amin(2).sum(1) for key in judge.keys], 1)
    assert torch.equal(found.chosen, sums.argmin(1))
    assert found.chosen.tolist() == [0, 0, 1, 1]
    patches = judge.prompted(shown, judge.prompts[found.chosen])
    squared = torch.cdist(patches, judge.knowledge[found.chosen]).amin(2).square()
    torch.testing.assert_close(found.scores, squared.amax(1), rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(
        nearest_squared(patches, judge.knowledge[found.chosen]), squared, rtol=1e-3, atol=1e-4
    )


@torch.no_grad()
def test_memories_are_coresets_of_all_patches_that_were_learned_replayed_ones_too() -> None:
    learner = detector(key_size=40)
    new, old = images(3), images(2, seed=1)
    with torch.enable_grad():
        train(learner, 0, new, [(old, old[:0])], seed=0)
    patches = learner.plain(torch.cat([new, old])).flatten(0, 1)  # 100: fewer numbers than are projected to
    assert all((patches - row).square().sum(1).min() < 1e-8 for row in learner.keys[0])
    every = detector(key_size=130)
    with torch.enable_grad():
        train(every, 0, new, [(old, old[:0])], seed=0)
    assert len(every.keys[0].unique(dim=0)) == 100
    assert len(farthest_first(patches, 130)) == 100


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("resnet18", "resnet18 is no vision transformer"),
        ("vit_small_patch16_dinov3", "or attention of another kind .*rotary .* backbone=vit_base_patch16"),
    ],
)
def test_networks_that_take_no_prefix_are_refused(name: str, message: str) -> None:
    with torch.device("meta"), pytest.raises(UserError, match=message):
        UCAD(Backbone(name, pretrained=False), block=1)
