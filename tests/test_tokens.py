"""Tokens of frozen networks: the same as timm's own, kept like any other features, and refused where there are none."""

import pytest
import timm
import torch
from torch.nn import functional as F

from clbench.backbones import Backbone
from clbench.errors import UserError
from clbench.methods.patches import neighbourhood_patches, tokens

SMALL = {"patch_size": 14, "embed_dim": 24, "depth": 4, "num_heads": 2, "dynamic_img_size": True}
IMAGES = torch.randint(0, 256, (2, 3, 42, 56), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def backbone(**settings: object) -> Backbone:
    return Backbone(
        "vit_small_patch14_reg4_dinov2", pretrained=False, arguments={**SMALL, "img_size": 70}, **settings
    )


def whole_of(pyramid: torch.nn.Module) -> torch.nn.Module:
    """timm's whole network with a pyramid's weights."""
    whole = timm.create_model("vit_small_patch14_reg4_dinov2", pretrained=False, img_size=70, **SMALL)
    found = whole.load_state_dict(pyramid.network.model.state_dict(), strict=False)
    assert not found.unexpected_keys
    return whole.eval()


@torch.no_grad()
def test_tokens_are_the_networks_own_after_its_last_normalisation() -> None:
    pyramid = backbone().tokens([1, 3])
    whole = whole_of(pyramid)
    wanted = whole.forward_intermediates(
        pyramid.normalisation(IMAGES),
        indices=[1, 3],
        norm=True,
        return_prefix_tokens=True,
        intermediates_only=True,
    )
    for _ in range(2):  # computed, then kept
        patches, image = tokens(pyramid(IMAGES))
        assert patches.shape == (2, 3, 4, 48)
        torch.testing.assert_close(patches[..., 24:].permute(0, 3, 1, 2), wanted[1][0])
        torch.testing.assert_close(image, wanted[1][1][:, 0])


@torch.no_grad()
def test_groups_of_blocks_are_means_of_raw_tokens_with_class_token_and_registers() -> None:
    pyramid = backbone().blocks([[0, 1], [2]], "method.groups=...")
    wanted = whole_of(pyramid).forward_intermediates(
        pyramid.normalisation(IMAGES),
        indices=[0, 1, 2],
        return_prefix_tokens=True,
        output_fmt="NLC",
        intermediates_only=True,
    )
    raw = [torch.cat((prefix, patches), 1) for patches, prefix in wanted]
    first, second = pyramid(IMAGES)
    assert first.shape == (2, 5 + 12, 24)
    torch.testing.assert_close(first, (raw[0] + raw[1]) / 2)
    torch.testing.assert_close(second, raw[2])


@torch.no_grad()
def test_position_embeddings_are_resized_as_dinov2_does_and_not_at_their_own_size() -> None:
    plain, antialiased = backbone(antialias=False).tokens([0]), backbone().tokens([0])
    native = IMAGES[:, :, :, :42].repeat(1, 1, 2, 2)[:, :, :70, :70]
    assert torch.equal(plain(native)[0], antialiased(native)[0])
    assert not torch.allclose(plain(IMAGES)[0], antialiased(IMAGES)[0], atol=1e-3)
    whole = whole_of(plain)
    grid = whole.pos_embed.reshape(1, 5, 5, 24).permute(0, 3, 1, 2)
    position = F.interpolate(grid, scale_factor=(3.1 / 5, 4.1 / 5), mode="bicubic")
    assert position.shape[-2:] == (3, 4)
    patches = whole.patch_embed(plain.normalisation(IMAGES)).flatten(1, 2) + position.flatten(2).transpose(
        1, 2
    )
    prefix = torch.cat((whole.cls_token, whole.reg_token), 1).expand(2, -1, -1)
    wanted = whole.norm(whole.blocks[0](torch.cat((prefix, patches), 1)))
    torch.testing.assert_close(plain(IMAGES)[1], wanted[:, 0])


@torch.no_grad()
def test_other_networks_give_neighbourhoods_and_the_mean_of_their_last_level() -> None:
    pyramid = Backbone("resnet18", pretrained=False).tokens([2, 3])
    levels = pyramid(IMAGES)
    patches, image = tokens(levels)
    assert torch.equal(patches, neighbourhood_patches(levels))
    torch.testing.assert_close(image, levels[1].mean((2, 3)))


@pytest.mark.parametrize(
    ("of", "message"),
    [
        (
            lambda: Backbone("resnet18", pretrained=False).blocks([[1]], "method.block=1"),
            "resnet18 is no vision transformer",
        ),
        (
            lambda: backbone().blocks([[1], [4]], "method.groups=[[1],[4]]"),
            r"method.groups=\[\[1\],\[4\]\] .* has 4 blocks",
        ),
        (lambda: backbone().tokens([4]), "it has 4 blocks"),
        (
            lambda: backbone().tokens([1]).check(IMAGES[:, :, :40]),
            "patches of 14x14 pixels, and 56x40 .* 28 or 42",
        ),
    ],
    ids=["no transformer", "a block", "a level", "sides"],
)
def test_what_a_network_has_not_is_refused_with_the_way_out(of: object, message: str) -> None:
    with pytest.raises(UserError, match=message):
        of()  # type: ignore[operator]


def test_the_licence_of_weights_is_known_and_random_weights_have_none() -> None:
    assert Backbone("vit_small_patch16_dinov3.lvd1689m", pretrained=True)._licence() == "dinov3-license"
    assert Backbone("vit_small_patch16_dinov3.lvd1689m", pretrained=False)._licence() is None
