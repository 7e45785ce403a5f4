"""AnomalyDINO: cosine distance to the nearest of the memorised tokens of a foundation network (Damm et al., 2025)."""

from typing import Annotated

import torch
from annotated_types import Gt, Le
from pydantic import PositiveInt
from torch import Tensor
from torch.nn import functional as F

from clbench.backbones import Backbone, Layers, unit
from clbench.errors import UserError
from clbench.methods.banks import MemoryMb, PatchBank
from clbench.methods.base import Prediction, Share
from clbench.methods.maps import Sigma, to_image_size
from clbench.methods.patches import tokens
from clbench.methods.tables import table
from clbench.precision import single_precision

_OBJECT = 10.0  # a token's first principal component beyond which it is of the object
_IN_THE_MIDDLE = 0.35  # share of the image's middle that an object takes at least


class AnomalyDINO(PatchBank):
    """Distance of each token to the nearest memorised one, without training; one coreset per task.

    As in the original's full-shot setting, but for the coresets (it memorises all tokens of all images, here each task
    has its share of the memory, chosen farthest first among unit vectors), and for sizes: it keeps an image's aspect ratio
    and smooths at the image's own size, here both are those of the run. The task of an image is the one whose coreset
    its tokens are nearest to on average, as PatchCore's (supplement, section 1.2.4).

    Args:
        backbone: where tokens come from; DINOv2 of size S in the original. Of a convolutional network: PatchCore's patches.
        layers: blocks whose tokens are taken, after the network's last normalisation; the original takes the last.
        memory_size: number of tokens kept in all; each task's share is memory_size / number of tasks.
        memory_mb: 10^6 bytes of tokens kept in all, in place of memory_size; None: memory_size counts.
        top: share of an image's largest distances whose mean is its score (section 3.2 of Damm et al.).
        masking: whether tokens of the background of images that are judged get a distance of 0 (section 3.3). The
            original switches it on by category, which is knowledge about what is to come.
        rotations: how many times each image to learn from is memorised, turned by equal steps; the original takes 8 of few
            images, and 1 of many.
        sigma: standard deviation of the map's Gaussian smoothing, in pixels.
        held_out: share of the normal images that are not memorised; thresholds are set on them.
        seed: of each coreset's first token.

    Buffers: as `PatchBank`; entries have unit length.
    """

    def __init__(
        self,
        backbone: Backbone,
        *,
        layers: Layers,
        memory_size: PositiveInt = 30_000,
        memory_mb: MemoryMb = None,
        top: Annotated[float, Gt(0), Le(1)] = 0.01,
        masking: bool = False,
        rotations: PositiveInt = 1,
        sigma: Sigma = 4.0,
        held_out: Share = 0.0,
        seed: int = 0,
    ):
        pyramid = backbone.tokens(layers)
        super().__init__(sum(pyramid.channels), memory_size, memory_mb, held_out, seed)
        self.pyramid = pyramid
        self.top, self.masking, self.rotations, self.sigma = top, masking, rotations, sigma

    def patches(self, images: Tensor) -> Tensor:
        """Images [B, 3, H, W] -> tokens of unit length, float32 [B, h, w, D]."""
        return F.normalize(tokens(self.pyramid(images))[0], dim=3)

    def memorised(self, images: Tensor) -> Tensor:
        """Images [B, 3, H, W] -> the tokens of them and of their rotations, of unit length, float32 [rows, D]."""
        parts = [self.patches(images)]
        for turn in range(1, self.rotations):
            outputs = self.pyramid.compute(rotated(images, 360 * turn / self.rotations))
            parts.append(F.normalize(tokens(outputs)[0], dim=3))
        return torch.stack(parts, 1).flatten(0, 3)

    def for_export(self) -> None:
        if self.masking:
            raise UserError(
                "method.masking=true finds an object by principal components, which no exported graph computes: "
                "export a run with method.masking=false"
            )
        super().for_export()

    def forward(self, images: Tensor) -> Prediction:
        """Images [B, 3, H, W] -> maps [B, H, W], the smoothed cosine distances, and scores [B].

        A score is the mean of the largest distances, `top` of them all, rounded down to whole tokens, but one at least.
        """
        found = tokens(self.pyramid(images))[0]
        batch, height, width, _ = found.shape
        selected, distances, _, _ = self.nearest(images, F.normalize(found, dim=3))
        cosine = distances.square() / 2  # of unit vectors
        if self.masking:
            cosine = cosine * objects(found).flatten(1)
        count = max(int(self.top * height * width), 1)
        maps = to_image_size(cosine.view(batch, height, width), images.shape[-2:], self.sigma)
        return Prediction(maps, cosine.topk(count, dim=1).values.mean(1), selected)


def rotated(images: Tensor, degrees: float) -> Tensor:
    """Images [B, 3, H, W], turned about their middle; what comes in from outside is mirrored at the outermost pixels.

    Float32 in [0, 1], the same size, bilinear, counter-clockwise.
    """
    batch, _, height, width = images.shape
    # affine_grid's coordinates run from -1 to 1 over each side, whatever its length.
    across = (width - 1) / max(height - 1, 1)
    turn = table(_turn, degrees, across, device=images.device)
    grid = F.affine_grid(turn.expand(batch, 2, 3), [batch, 3, height, width], align_corners=True)
    return F.grid_sample(unit(images), grid, padding_mode="reflection", align_corners=True)


def _turn(degrees: float, across: float) -> Tensor:
    """The matrix [2, 3] that turns coordinates of an image `across` times as wide as high."""
    angle = torch.deg2rad(torch.tensor(degrees, dtype=torch.float64))
    sine, cosine = float(angle.sin()), float(angle.cos())
    return torch.tensor([[cosine, -sine / across, 0.0], [sine * across, cosine, 0.0]])


def objects(patches: Tensor) -> Tensor:
    """Tokens [B, h, w, D] -> whether each is of the object and not of the background, bool [B, h, w] (section 3.3).

    The object is where the first principal component of the image's tokens is above 10, its largest value being positive;
    or below -10 where the one side has at most 35 % of the image's middle. Then it is grown by one token, and holes are closed. In single precision.
    """
    with single_precision(patches.device):
        return _objects(patches)


def _objects(patches: Tensor) -> Tensor:
    batch, height, width, _ = patches.shape
    centred = patches.flatten(1, 2) - patches.mean((1, 2))[:, None]
    component = torch.linalg.eigh(centred.mT @ centred).eigenvectors[:, :, -1:]
    scores = (centred @ component)[..., 0]
    # An eigenvector has no sign of its own: the score furthest from 0 is positive.
    furthest = scores.gather(1, scores.abs().argmax(1, keepdim=True))
    scores = (scores * furthest.sign()).view(batch, height, width)
    middle = scores[:, int(height * 0.2) : int(height * 0.8), int(width * 0.2) : int(width * 0.8)]
    other_way = (middle > _OBJECT).float().mean((1, 2)) <= _IN_THE_MIDDLE
    found = torch.where(other_way[:, None, None], -scores, scores) > _OBJECT
    return _closed(_grown(found.float())) > 0


def _grown(mask: Tensor) -> Tensor:
    return F.max_pool2d(mask[:, None], 3, 1, 1)[:, 0]


def _closed(mask: Tensor) -> Tensor:
    return -_grown(-_grown(mask))
