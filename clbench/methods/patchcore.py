"""PatchCore: distance to the nearest of the memorised normal patches (Roth et al., 2022)."""

from typing import Annotated

import torch
from annotated_types import Gt, Lt
from pydantic import PositiveInt
from torch import Tensor

from clbench.backbones import Backbone, Layers
from clbench.methods.banks import MemoryMb, PatchBank, farthest_patches, score_weights
from clbench.methods.base import Prediction, Share
from clbench.methods.coreset import projection
from clbench.methods.maps import Sigma, to_image_size
from clbench.methods.patches import neighbourhood_patches
from clbench.precision import single_precision

_PROJECTED = 65_536  # patches at a time


class PatchCore(PatchBank):
    """One coreset of patches per task, in a memory of fixed size (supplement, section 1.2 and Algorithm 2).

    Projections and distances are in single precision whatever the backbone's is.

    Args:
        backbone: where patch features come from.
        layers: levels of its pyramid; all are brought to the grid of the first.
        memory_size: number of patches kept in all; each task's share is memory_size / number of tasks.
        memory_mb: 10^6 bytes of patches kept in all, in place of memory_size; None: memory_size counts.
        epsilon: relative error that the random projection for selecting coresets may make in distances.
        neighbours: number of memorised patches, b of Roth et al., eq. 7, that weight an image score.
        sigma: standard deviation of the map's Gaussian smoothing, in pixels.
        held_out: share of the normal images that are not memorised; thresholds are set on them.
        seed: seed of the projection and of each coreset's first patch.

    Buffers: as `PatchBank`, which has Algorithm 2.
    """

    needs_only_features = True

    def __init__(
        self,
        backbone: Backbone,
        *,
        layers: Layers,
        memory_size: PositiveInt = 30_000,
        memory_mb: MemoryMb = None,
        epsilon: Annotated[float, Gt(0), Lt(1)] = 0.9,
        neighbours: PositiveInt = 3,
        sigma: Sigma = 4.0,
        held_out: Share = 0.0,
        seed: int = 0,
    ):
        pyramid = backbone.pyramid(layers)
        super().__init__(sum(pyramid.channels), memory_size, memory_mb, held_out, seed)
        self.pyramid = pyramid
        self.epsilon = epsilon
        self.neighbours = neighbours
        self.sigma = sigma

    def patches(self, images: Tensor) -> Tensor:
        return neighbourhood_patches(self.pyramid(images))

    def space(self, patches: Tensor, random: torch.Generator) -> Tensor:
        """Patches [N, D], projected at random onto as few numbers as `epsilon` allows (supplement, 1.2.6)."""
        plane = projection(patches.shape[1], len(patches), self.epsilon, random).to(self.bank)
        with single_precision(plane.device):
            return torch.cat([part.to(plane.device) @ plane for part in patches.split(_PROJECTED)])

    def forward(self, images: Tensor) -> Prediction:
        """Images [B, 3, H, W] -> maps [B, H, W] and scores [B] (supplement, section 1.2.4).

        A map is the distance of every patch to the nearest in the selected coreset, smoothed at image size; a
        score is the largest such distance, weighted by Roth et al., 2022, eq. 7.
        """
        patches = self.patches(images)
        batch, height, width, size = patches.shape
        # The task is unknown: take the coreset that the image is nearest to on average.
        selected, chosen, rows, _ = self.nearest(images, patches)
        maps = to_image_size(chosen.view(batch, height, width), images.shape[-2:], self.sigma)
        highest, farthest, matched = farthest_patches(patches.view(batch, -1, size), chosen, rows, self.bank)
        weights = torch.ones_like(highest)
        traced = torch.compiler.is_compiling()  # a graph weighs by all of them
        banks = self.banks()
        for index in range(len(banks)) if traced else sorted(set(selected.tolist())):
            weight = score_weights(banks[index], farthest, matched, highest, self.neighbours)
            weights = weight.where(selected == index, weights)
        return Prediction(maps, highest * weights, selected)
