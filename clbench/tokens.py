"""Tokens of vision transformers: patches of an image, and one vector for the whole of it."""

from collections.abc import Sequence
from types import MethodType
from typing import Any

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.nn import functional as F


class Transformer(nn.Module):
    """The first blocks of a vision transformer, giving their tokens.

    Args:
        model: timm's, with a square patch; blocks that are not asked for are cut off.
        groups: blocks, numbered from 0; of each group comes the mean over its blocks.
        normalised: whether tokens go through the network's last normalisation.
        prefix: whether tokens come as the network has them, class token and registers first; else patches come on
            their grid, and after all groups one vector for the image.

    Attributes:
        width: d, of a token.
        before: P, the number of tokens before the patches.
        depth: number of blocks that the whole network has.
    """

    def __init__(
        self, model: nn.Module, groups: Sequence[Sequence[int]], *, normalised: bool, prefix: bool = False
    ):
        super().__init__()
        self.groups = [list(group) for group in groups]
        self.blocks = sorted({block for group in groups for block in group})
        self.normalised, self.prefix = normalised, prefix
        network: Any = model  # timm's transformers share these names, and no class
        self.depth = len(network.blocks)
        network.prune_intermediate_layers(self.blocks, prune_norm=not normalised)
        self.width: int = network.num_features
        self.before: int = getattr(network, "num_prefix_tokens", 0)
        self.model = network

    def forward(self, images: Tensor) -> list[Tensor]:
        """Normalised images [B, 3, H, W] -> for each group [B, d, h, w], then [B, d]; with `prefix` only [B, P + N, d].

        The vector for the whole image is the class token of the last group; the mean of its patches where there is none.
        """
        also = {"return_prefix_tokens": True} if self.before else {}
        found = self.model.forward_intermediates(
            images,
            indices=self.blocks,
            norm=self.normalised,
            output_fmt="NLC",
            intermediates_only=True,
            **also,
        )
        tokens = [torch.cat((before, patches), 1) for patches, before in found] if self.before else found
        by_block = dict(zip(self.blocks, tokens, strict=True))
        means = [_mean([by_block[block] for block in group]) for group in self.groups]
        if self.prefix:
            return means
        patches = [mean[:, self.before :] for mean in means]
        has_class = getattr(self.model, "cls_token", None) is not None
        whole = means[-1][:, 0] if has_class else patches[-1].mean(1)
        grids = [
            part.transpose(1, 2).unflatten(2, self.grid(images.shape[-2:])).contiguous() for part in patches
        ]
        return [*grids, whole]

    def grid(self, size: Sequence[int]) -> tuple[int, int]:
        """Rows and columns of the patches of images of this size (H, W)."""
        height, width = self.model.patch_embed.dynamic_feat_size(tuple(size))
        return height, width


def _mean(tokens: Sequence[Tensor]) -> Tensor:
    return tokens[0] if len(tokens) == 1 else torch.stack(list(tokens)).mean(0)


def patch_side(network: nn.Module) -> int | None:
    """The side of a transformer's patches in pixels; None for other networks."""
    embedding = getattr(getattr(network, "model", network), "patch_embed", None)
    size = getattr(embedding, "patch_size", None)
    return max(size) if isinstance(size, tuple) else size


def embed_as_trained(model: nn.Module) -> None:
    """Have a network resize its position embedding as DINOv2's code does: bicubic, without antialiasing.

    That code scales by (grid + 0.1) / (grid it was trained with), and so are positions sampled here. timm resizes to the
    grid itself, with antialiasing. At the size that a network was trained with, nothing is resized.
    """
    if isinstance(model, VisionTransformer) and model.pos_embed is not None and model.dynamic_img_size:
        model._pos_embed = MethodType(_embedded, model)  # type: ignore[method-assign]  # of this network alone


def _embedded(model: VisionTransformer, patches: Tensor) -> Tensor:
    """Patches [B, h, w, d] -> tokens [B, P + h * w, d] with their position embedding."""
    batch, height, width, size = patches.shape
    grid = model.patch_embed.grid_size
    assert model.pos_embed is not None and grid is not None
    before, embedding = model.pos_embed.split(
        [model.pos_embed.shape[1] - grid[0] * grid[1], grid[0] * grid[1]], 1
    )
    if (height, width) != grid:
        square = embedding.unflatten(1, grid).permute(0, 3, 1, 2)
        scale = ((height + 0.1) / grid[0], (width + 0.1) / grid[1])
        resized = F.interpolate(square, scale_factor=scale, mode="bicubic")
        embedding = resized.flatten(2).transpose(1, 2)
    tokens = [
        token.expand(batch, -1, -1) for token in (model.cls_token, model.reg_token) if token is not None
    ]
    prefix = torch.cat(tokens, 1) if tokens else patches.new_empty(batch, 0, size)
    if before.shape[1]:  # the class token's own
        prefix = prefix + before
    return model.pos_drop(torch.cat((prefix, patches.flatten(1, 2) + embedding), 1))
