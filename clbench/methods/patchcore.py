"""PatchCore: distance to the nearest of the memorised normal patches (Roth et al., 2022)."""

import tempfile
import weakref
from typing import Annotated

import torch
from annotated_types import Gt, Lt
from pydantic import PositiveInt
from torch import Tensor

from clbench.backbones import Backbone, Layers
from clbench.data.images import Images
from clbench.errors import UserError
from clbench.feature_store import on_disk
from clbench.methods.base import Detector, Prediction, Share
from clbench.methods.coreset import farthest_first, projection
from clbench.methods.maps import Sigma, to_image_size
from clbench.methods.nearest import Search
from clbench.methods.patches import neighbourhood_patches
from clbench.precision import single_precision
from clbench.randomness import generator

_PROJECTED = 65_536  # patches at a time


class PatchCore(Detector):
    """One coreset of patches per task, in a memory of fixed size (supplement, section 1.2 and Algorithm 2).

    Projections and distances are in single precision whatever the backbone's is.

    Args:
        backbone: where patch features come from.
        layers: levels of its pyramid; all are brought to the grid of the first.
        memory_size: number of patches kept in all; each task's share is memory_size / number of tasks.
        epsilon: relative error that the random projection for selecting coresets may make in distances.
        neighbours: number of memorised patches, b of Roth et al., eq. 7, that weight an image score.
        sigma: standard deviation of the map's Gaussian smoothing, in pixels.
        held_out: share of the normal images that are not memorised; thresholds are set on them.
        seed: seed of the projection and of each coreset's first patch.

    Buffers:
        bank: the tasks' coresets one after the other, float32 [sum of bank_sizes, D].
        bank_sizes: number of patches of each task's coreset, int64 [tasks].
    """

    native = True
    chooses = True

    bank: Tensor
    bank_sizes: Tensor

    def __init__(
        self,
        backbone: Backbone,
        *,
        layers: Layers,
        memory_size: PositiveInt = 30_000,
        epsilon: Annotated[float, Gt(0), Lt(1)] = 0.9,
        neighbours: PositiveInt = 3,
        sigma: Sigma = 4.0,
        held_out: Share = 0.0,
        seed: int = 0,
    ):
        super().__init__()
        self.pyramid = backbone.pyramid(layers)
        self.memory_size = memory_size
        self.epsilon = epsilon
        self.neighbours = neighbours
        self.sigma = sigma
        self.held_out = held_out
        self.seed = seed
        self._search = Search()
        self.register_buffer("bank", torch.empty(0, sum(self.pyramid.channels)))
        self.register_buffer("bank_sizes", torch.empty(0, dtype=torch.int64))

        # bank_sizes, its version, and what it holds
        self._read: tuple[weakref.ref[Tensor], int, list[int]] | None = None

    def forget(self) -> None:
        self.bank, self.bank_sizes = self.bank[:0], self.bank_sizes[:0]

    def start_task(self, task: int, images: Images, stored: Images) -> None:
        self._task = task
        self._expected = len(images) + len(stored)
        self._patches = torch.empty(0)
        self._filled = 0

    def training_step(self, images: Tensor) -> None:
        """Collect the patches of images [B, 3, H, W]."""
        patches = self.patches(images).flatten(0, 2)
        if not self._filled:  # one block for the whole task: appending would need twice the memory
            self._patches = self._block(self._expected * len(patches) // len(images), patches)
        self._patches[self._filled : self._filled + len(patches)] = patches
        self._filled += len(patches)

    def _block(self, rows: int, like: Tensor) -> Tensor:
        """Room for so many patches like these [.., D]: float32 [rows, D], on their device, or on disk.

        On disk where they are more than backbone.feature_memory_mb, or than half of what a GPU had free.

        Raises:
            UserError: the disk has no room either.
        """
        store = self.pyramid.store
        limit = store.memory_limit
        needed = 4 * rows * like.shape[1]
        if needed <= limit:
            return like.new_empty(rows, like.shape[1])
        try:
            return on_disk(rows * like.shape[1]).view(rows, -1)
        except OSError as error:
            allowed, remedy = f"backbone.feature_memory_mb={limit // 10**6}", "raise the one"
            if store.by_gpu:
                allowed, remedy = f"half of what the GPU had free ({limit // 10**6:,} MB)", "free more of it"
            raise UserError(
                f"the {rows:,} patches of this task take {needed / 1e6:,.0f} MB: more than {allowed} and than "
                f"{tempfile.gettempdir()} has room for; {remedy}, or set TMPDIR to a folder with more room"
            ) from error

    def finish_task(self, images: Images) -> None:
        """Select the task's coreset, and cut those of earlier tasks (supplement, Algorithm 2).

        Every task, old or new, then has memory_size / tasks patches. The images, [N, 3, H, W], are not looked
        at: steps have seen what is learned from.
        """
        patches = self._patches[: self._filled]
        share = max(self.memory_size // (len(self.bank_sizes) + 1), 1)
        count = min(share, len(patches))
        random = generator(self.seed, "coreset", self._task)
        start = int(torch.randint(len(patches), (1,), generator=random))
        plane = projection(patches.shape[1], len(patches), self.epsilon, random).to(self.bank)
        with single_precision(plane.device):
            projected = torch.cat([part.to(plane.device) @ plane for part in patches.split(_PROJECTED)])
        chosen = farthest_first(
            projected, count, start, progress=lambda done: self.progress("coreset", done, count)
        )
        # Farthest-first order is nested: the coreset of an old coreset is its beginning.
        kept = [old[:share] for old in self.bank.split(self._sizes())]
        self.bank = torch.cat([*kept, patches[chosen.to(patches.device)].to(self.bank)])
        self.bank_sizes = torch.tensor([len(part) for part in (*kept, chosen)], device=self.bank.device)
        del self._patches

    def for_export(self) -> None:
        """Read `bank_sizes` now: tracing sees the shape of a buffer, and not its values."""
        self._sizes()

    def forward(self, images: Tensor) -> Prediction:
        """Images [B, 3, H, W] -> maps [B, H, W] and scores [B] (supplement, section 1.2.4).

        A map is the distance of every patch to the nearest in the selected coreset, smoothed at image size; a
        score is the largest such distance, weighted by Roth et al., 2022, eq. 7.
        """
        sizes = self._sizes()
        patches = self.patches(images)
        batch, height, width, size = patches.shape
        # The task is unknown: take the coreset that the image is nearest to on average.
        selected, chosen, rows = self._search.closest_bank(patches.flatten(1, 2), self.bank, sizes)
        each = torch.arange(batch, device=patches.device)
        maps = to_image_size(chosen.view(batch, height, width), images.shape[-2:], self.sigma)
        highest, where = chosen.max(1)
        farthest, matched = patches.view(batch, -1, size)[each, where], self.bank[rows[each, where]]
        weights = torch.stack(
            [self._weight(bank, farthest, matched, highest) for bank in self.bank.split(sizes)]
        )
        return Prediction(maps, highest * weights[selected, each], selected)

    def _sizes(self) -> list[int]:
        """What `bank_sizes` holds. The device is asked, and waited for, only where it has changed."""
        sizes = self.bank_sizes
        if torch.compiler.is_compiling():
            assert self._read is not None
        elif self._read is None or self._read[0]() is not sizes or self._read[1] != sizes._version:
            self._read = weakref.ref(sizes), sizes._version, sizes.tolist()
        return self._read[2]

    def _weight(self, bank: Tensor, farthest: Tensor, matched: Tensor, highest: Tensor) -> Tensor:
        """Weights [B] of image scores (Roth et al., 2022, eq. 7).

        Args:
            bank: one coreset, float32 [M, D]; weights of images that another was selected for mean nothing.
            farthest: each image's patch with the largest distance to its selected coreset, float32 [B, D].
            matched: the memorised patch that is nearest to it, float32 [B, D].
            highest: the distance between these two, float32 [B].
        """
        count = min(self.neighbours, len(bank))
        if count < 2:
            return torch.ones_like(farthest[:, 0])
        norms = torch.linalg.vector_norm(bank, dim=1).square()
        with single_precision(bank.device):
            around = torch.addmm(norms, matched, bank.T, alpha=-2).topk(count, largest=False)
        to_test = (bank[around.indices] - farthest[:, None]).square().sum(2).sqrt()
        # 1 - exp(highest) / sum(exp(to_test)), in a form that cannot overflow.
        return 1 - (highest - to_test.logsumexp(1)).exp()

    def patches(self, images: Tensor) -> Tensor:
        """Images [B, 3, H, W] -> patch features, float32 [B, h, w, D]."""
        return neighbourhood_patches(self.pyramid(images))
