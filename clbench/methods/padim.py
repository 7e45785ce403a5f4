"""PaDiM: a Gaussian of patch features at every position (Defard et al., 2021)."""

import itertools
import math
from collections.abc import Mapping
from typing import Any, Literal

import torch
from pydantic import PositiveFloat, PositiveInt
from torch import Tensor
from torch.nn import functional as F

from clbench.backbones import Backbone, Layers
from clbench.data.images import Images
from clbench.methods.banks import Numbers, without
from clbench.methods.base import Detector, Prediction, Share
from clbench.methods.maps import Sigma, to_image_size
from clbench.precision import single_precision
from clbench.randomness import generator

_CPU_BYTES = 8 * 2**20  # worked on at a time on a CPU: they stay near the cache
_GPU_BYTES = 512 * 2**20
_STRIPS = 4  # that the columns of a triangle are computed in


class PaDiM(Detector):
    """A Gaussian at each position, averaged over tasks (supplement, section 1.1 and Algorithm 1).

    Sums, covariances and distances are in single or double precision whatever the backbone's is.

    Args:
        backbone: where patch features come from.
        layers: levels of its pyramid; all are brought to the grid of the first.
        features: number D of channels that are kept, chosen at random; all, where the levels have fewer.
        epsilon: what is added to the diagonal of each covariance, eq. (1).
        update: how a task's Gaussians are combined with those of earlier tasks under `strategy=native`.
            `average` is Algorithm 1. Beyond the paper: `pooled` gives the Gaussian of all images seen
            (scatter within and between tasks, Chan et al., 1979); `per_task` keeps one map of Gaussians
            per task, and judges an image by the one it is nearest to on average.
        sigma: standard deviation of the map's Gaussian smoothing, in pixels.
        held_out: share of the normal images that the Gaussians are not estimated from; thresholds are set on
            them.
        seed: seed of the choice of channels.

    Buffers, with K = 1, or the number of tasks under `per_task`, and P positions:
        mean: float32 [K, P, D].
        factor: float32 [K, P, D, D], the lower Cholesky factor L of each covariance L L^T.
        counts: int64 [tasks], number of images of each task seen.
    """

    native = True
    needs_only_features = True

    mean: Tensor
    factor: Tensor
    counts: Tensor

    def __init__(
        self,
        backbone: Backbone,
        *,
        layers: Layers,
        features: PositiveInt = 350,
        epsilon: PositiveFloat = 0.01,
        update: Literal["average", "pooled", "per_task"] = "average",
        sigma: Sigma = 4.0,
        held_out: Share = 0.0,
        seed: int = 0,
    ):
        super().__init__()
        self.pyramid = backbone.pyramid(layers)
        self.epsilon = epsilon
        self.update = update
        self.chooses = update == "per_task"
        self.sigma = sigma
        self.held_out = held_out
        available = sum(self.pyramid.channels)
        order = torch.randperm(available, generator=generator(seed, "padim channels"), device="cpu")
        bounds = [0]
        for channels in self.pyramid.channels:
            bounds.append(bounds[-1] + channels)
        kept = order[:features].sort().values
        for level, (low, high) in enumerate(itertools.pairwise(bounds)):
            chosen = kept[(kept >= low) & (kept < high)] - low
            self.register_buffer(f"channels_{level}", chosen, persistent=False)
        size = len(kept)
        self.register_buffer("mean", torch.empty(0, 0, size))
        self.register_buffer("factor", torch.empty(0, 0, size, size))
        self.register_buffer("counts", torch.empty(0, dtype=torch.int64))
        self._numbers = Numbers()

    @classmethod
    def why_no_tiles(cls, settings: Mapping[str, Any]) -> str:
        return "it has a Gaussian for each place of an image"

    def forget(self) -> None:
        self.mean, self.factor, self.counts = self.mean[:0], self.factor[:0], self.counts[:0]

    def drop(self, task: int) -> None:
        self.mean, self.factor, self.counts = (
            without(kept, task) for kept in (self.mean, self.factor, self.counts)
        )

    def start_task(self, task: int, images: Images, stored: Images) -> None:
        self._count = 0

    def training_step(self, images: Tensor) -> None:
        """Add images [B, 3, H, W] to the sums that mean and covariance are computed from."""
        embedding = self.embedding(images)
        if not self._count:
            # Sums are of differences to a first guess of the mean: squares of raw features would cancel.
            self._origin = embedding.mean(2)
            self._sum = torch.zeros_like(self._origin)
            self._squares = self._sum.new_zeros(*self._origin.shape, self._origin.shape[1])
        difference = embedding - self._origin[:, :, None]
        self._sum += difference.sum(2)
        with single_precision(images.device):
            self._squares.baddbmm_(difference, difference.transpose(1, 2))
        self._count += embedding.shape[2]

    def finish_task(self, images: Images) -> None:
        """Compute the task's Gaussians, eq. (1), merge them with those kept, and factor the covariances.

        The images, [N, 3, H, W], are not looked at: steps have seen what is learned from.
        """
        count = self._count
        shift = self._sum / count
        mean = self._origin + shift
        covariance = self._squares
        merge = len(self.counts) > 0 and self.update != "per_task"
        merged_mean = self._merged_mean(mean, count) if merge else mean
        step = _positions(mean.device, 8 * mean.shape[1] ** 2)
        for begin in range(0, len(mean), step):
            rows = slice(begin, begin + step)
            self.progress("Gaussians", min(begin + step, len(mean)), len(mean))
            chunk = covariance[rows].double()  # eq. (1), with the sample's N - 1
            chunk -= count * shift[rows, :, None].double() * shift[rows, None].double()
            chunk /= max(count - 1, 1)
            chunk.diagonal(dim1=1, dim2=2).add_(self.epsilon)
            if merge:
                chunk = self._merged_covariance(rows, mean[rows], chunk, count)
            covariance[rows] = torch.linalg.cholesky(chunk).float()
        factor = covariance[None]
        if self.update == "per_task" and len(self.counts):
            numbers = self._numbers.of(self.mean, len(self.mean))
            self.mean = torch.cat([self.mean, merged_mean[None]])
            self.factor = torch.cat([self.factor, factor])
            self._numbers.one_more(self.mean, numbers)
        else:
            self.mean, self.factor = merged_mean[None], factor
        self.counts = torch.cat([self.counts, self.counts.new_tensor([count])])
        del self._origin, self._sum, self._squares

    def _weight(self, count: int) -> float:
        """Weight of a new task of `count` images: 1 / tasks in Algorithm 1, its share of all when pooled."""
        if self.update == "pooled":
            return count / (int(self.counts.sum()) + count)
        return 1 / (len(self.counts) + 1)

    def _merged_mean(self, mean: Tensor, count: int) -> Tensor:
        """Means [P, D] of the kept Gaussians and the new ones together."""
        return torch.lerp(self.mean[0], mean, self._weight(count))

    def _merged_covariance(self, rows: slice, mean: Tensor, covariance: Tensor, count: int) -> Tensor:
        """Covariances float64 [p, D, D] of the kept Gaussians at positions `rows` and the new ones together.

        Above the diagonal stand numbers without meaning, which Cholesky's method does not read.
        """
        kept = lower_square(self.factor[0, rows].double())
        if self.update == "average":
            return torch.lerp(kept, covariance, self._weight(count))
        seen = int(self.counts.sum())
        total = seen + count
        identity = self.epsilon * torch.eye(kept.shape[-1], dtype=kept.dtype, device=kept.device)
        between = (mean - self.mean[0, rows]).double()
        scatter = (kept - identity) * (seen - 1) + (covariance - identity) * max(count - 1, 0)
        scatter += (seen * count / total) * between[:, :, None] * between[:, None]
        return scatter / (total - 1) + identity

    def for_export(self) -> None:
        """Replace the Cholesky factors by their inverses: no runtime solves triangular systems."""
        identity = torch.eye(self.factor.shape[-1], dtype=torch.float64, device=self.factor.device)
        for chunk in self.factor.flatten(0, 1).split(_positions(identity.device, identity.numel() * 8)):
            chunk.copy_(torch.linalg.solve_triangular(chunk.double(), identity, upper=False))

    def forward(self, images: Tensor) -> Prediction:
        """Images [B, 3, H, W] -> maps [B, H, W], and scores [B], their maxima (supplement, section 1.1.3).

        A map is the Mahalanobis distance of every position, eq. (2), smoothed at image size.
        """
        embedding = self.embedding(images)
        with single_precision(images.device):
            nearest, distances = self._nearest(images, embedding)
        batch = images.shape[0]  # not len(), which would fix it where it is traced
        maps = to_image_size(distances.view(batch, *self._grid), images.shape[-2:], self.sigma)
        return Prediction(maps, maps.amax((1, 2)), nearest if self.chooses else None)

    def _nearest(self, images: Tensor, embedding: Tensor) -> tuple[Tensor, Tensor]:
        """Which Gaussians each image is nearest to on average, int64 [B], and its distances from them [B, P].

        Gaussians of a task do not change under `per_task`: images that are evaluated again are held against new ones alone.

        Args:
            images: [B, 3, H, W].
            embedding: theirs, [P, D, B].
        """
        distance = _by_inverse if torch.compiler.is_compiling() else mahalanobis
        recollection = self.recollection if self.chooses else None
        numbers = self._numbers.of(self.mean, len(self.mean)) if recollection else ()
        kept = recollection.get(images, numbers) if recollection else None
        done = len(kept.by) if kept else 0
        tasks, averages, found = ([before] for before in kept.tensors) if kept else ([], [], [])
        for task, (mean, factor) in enumerate(zip(self.mean[done:], self.factor[done:], strict=True), done):
            found.append(distance(embedding, mean, factor).mT)
            averages.append(found[-1].mean(1))
            tasks.append(torch.full_like(averages[-1], task, dtype=torch.int64))
        least = torch.stack(averages).argmin(0)
        each = torch.arange(images.shape[0], device=images.device)
        nearest, average, distances = (torch.stack(some)[least, each] for some in (tasks, averages, found))
        if recollection:
            recollection.put(images, numbers, nearest, average, distances)
        return nearest, distances

    def embedding(self, images: Tensor) -> Tensor:
        """Images [B, 3, H, W] -> chosen channels at each position of the first level's grid, [P, D, B]."""
        levels = [
            level[:, self.get_buffer(f"channels_{number}")]
            for number, level in enumerate(self.pyramid(images))
        ]
        self._grid = levels[0].shape[-2:]
        chosen = [level for level in levels if level.shape[1]]  # none of a level's channels may be chosen
        return torch.cat([self._aligned(level) for level in chosen], 1)

    def _aligned(self, level: Tensor) -> Tensor:
        """A level [B, C, h_l, w_l] at the positions of the first, [P, C, B].

        By nearest neighbours: the method copies a deep feature to all positions that it covers.
        """
        features = level.permute(2, 3, 1, 0).flatten(0, 1).contiguous()
        height, width = level.shape[-2:]
        if level.shape[-2:] == self._grid:
            return features
        cells = torch.arange(height * width, dtype=torch.float32, device=level.device).view(
            1, 1, height, width
        )
        covering = F.interpolate(cells, self._grid, mode="nearest").flatten().long()
        return features.index_select(0, covering)


def lower_square(lower: Tensor) -> Tensor:
    """L L^T of lower triangular L, both [P, D, D]; above the diagonal stand numbers without meaning.

    By some columns at a time, without what is above and without products with zeros: a third of the work.
    """
    square = torch.zeros_like(lower)
    step = math.ceil(lower.shape[1] / _STRIPS)
    for begin in range(0, lower.shape[1], step):
        end = begin + step
        square[:, begin:, begin:end] = lower[:, begin:, :end] @ lower[:, begin:end, :end].mT
    return square


def mahalanobis(embedding: Tensor, mean: Tensor, factor: Tensor) -> Tensor:
    """Distances [P, B] of embeddings [P, D, B] from Gaussians with means [P, D] and Cholesky factors [P, D, D].

    By triangular solves, which read half as much memory as products with inverse factors.
    """
    distances = embedding.new_empty(embedding.shape[0], embedding.shape[2])
    step = _positions(embedding.device, 4 * embedding[0].numel())
    for begin in range(0, len(embedding), step):
        rows = slice(begin, begin + step)
        difference = embedding[rows] - mean[rows, :, None]
        solved = torch.linalg.solve_triangular(factor[rows], difference, upper=False)
        torch.linalg.vector_norm(solved, dim=1, out=distances[rows])
    return distances


def _by_inverse(embedding: Tensor, mean: Tensor, inverse: Tensor) -> Tensor:
    """As `mahalanobis`, from the inverses [P, D, D] of the Cholesky factors."""
    return torch.linalg.vector_norm(inverse @ (embedding - mean[:, :, None]), dim=1)


def _positions(device: torch.device, size: int) -> int:
    """How many positions to work on at a time, where each takes `size` bytes."""
    return max(1, (_CPU_BYTES if device.type == "cpu" else _GPU_BYTES) // size)
