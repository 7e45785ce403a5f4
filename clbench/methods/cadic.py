"""CADIC: one coreset of fixed size for all tasks, updated image by image (Yang et al., 2025)."""

import math
from collections.abc import Sequence
from typing import Annotated

import torch
from annotated_types import Ge
from pydantic import PositiveInt
from torch import Tensor

from clbench.backbones import Backbone, Layers
from clbench.data.images import Images
from clbench.methods.banks import MemoryMb, capacity, check_room, farthest_patches, score_weights
from clbench.methods.base import Detector, Prediction, Share
from clbench.methods.maps import Sigma, to_image_size
from clbench.methods.nearest import Search
from clbench.methods.patches import tokens
from clbench.precision import single_precision

_ROWS = 1024  # entries whose distances to all are computed at a time


class CADIC(Detector):
    """Distance of each token to the nearest of one coreset, which needs no task and does not grow (eqs. 1 to 6).

    The first tokens fill the coreset as they come. After that the tokens of an image are candidates: as long as the one
    that is farthest from the coreset is farther than its two closest entries are from each other, it takes the place of
    the first of these two. So the smallest distance within the coreset never falls.

    No code of the authors was found. From reimplementations that call themselves partly inferred: the block, the number of
    entries, one image as the unit of an update, and the image score's weights. Ours: the network and image size, DINOv2's
    tokens after its last normalisation, blocks numbered from 0; the map's smoothing, which is PatchCore's; a budget of bytes
    (`memory_mb`). Under replay the coreset goes
    on too, and stored images are candidates again.

    Args:
        backbone: where tokens come from. Of a convolutional network: PatchCore's patches.
        layers: blocks whose tokens are taken, after the network's last normalisation.
        memory_size: K, number of tokens kept in all.
        memory_mb: 10^6 bytes of tokens kept in all, in place of memory_size; None: memory_size counts.
        batch_size: images whose tokens are candidates together. An update holds the distances of their tokens to all
            entries: 31 MB for 784 tokens and 10,000 entries.
        neighbours: number of memorised tokens, b of Roth et al., 2022, eq. 7, that weight an image score.
        sigma: standard deviation of the map's Gaussian smoothing, in pixels.
        held_out: share of the normal images that are not memorised; thresholds are set on them.

    Buffers:
        bank: the coreset, float32 [at most K, D].
    """

    native = True
    needs_only_features = True
    rebuilt_by_replay = False

    bank: Tensor

    def __init__(
        self,
        backbone: Backbone,
        *,
        layers: Layers,
        memory_size: Annotated[int, Ge(2)] = 2500,
        memory_mb: MemoryMb = None,
        batch_size: PositiveInt = 1,
        neighbours: PositiveInt = 3,
        sigma: Sigma = 4.0,
        held_out: Share = 0.0,
    ):
        super().__init__()
        self.pyramid = backbone.tokens(layers)
        width = sum(self.pyramid.channels)
        self.memory_mb, self.memory_size = memory_mb, capacity(memory_size, memory_mb, 4 * width)
        self.batch_size, self.neighbours, self.sigma = batch_size, neighbours, sigma
        self.held_out = held_out
        self._search = Search()
        self.register_buffer("bank", torch.empty(0, width))

    @property
    def bank_limit(self) -> int:
        return self.memory_size * self.bank.shape[1] * self.bank.element_size()

    def check_stages(self, counts: Sequence[int], kept: int) -> None:
        width = self.bank.shape[1]
        check_room(self.memory_mb, 4 * width, 2, f"tokens of {width} numbers")  # the closest two

    def forget(self) -> None:
        self.bank = self.bank[:0]

    def patches(self, images: Tensor) -> Tensor:
        """Images [B, 3, H, W] -> tokens, float32 [B, h, w, D]."""
        return tokens(self.pyramid(images))[0]

    def start_task(self, task: int, images: Images, stored: Images) -> None:
        # What is known of distances is computed anew, so that a task that is begun again ends in the same digits.
        self._coreset: Coreset | None = None

    def training_step(self, images: Tensor) -> None:
        """Update the coreset with the tokens of images [B, 3, H, W]."""
        candidates = self.patches(images).flatten(0, 2)
        room = self.memory_size - len(self.bank)
        if room > 0:
            self.bank = torch.cat([self.bank, candidates[:room]])
            candidates = candidates[room:]
        if len(candidates):
            if self._coreset is None:
                self._coreset = Coreset(self.bank.clone())
            self._coreset.update(candidates)
            self.bank = self._coreset.entries

    def finish_task(self, images: Images) -> None:
        """Drop what helped to update the coreset. The images, [N, 3, H, W], are not looked at."""
        self._coreset = None

    def forward(self, images: Tensor) -> Prediction:
        """Images [B, 3, H, W] -> maps [B, H, W], the smoothed distances, and scores [B].

        A score is the largest distance, weighted by Roth et al., 2022, eq. 7.
        """
        patches = self.patches(images)
        batch, height, width, size = patches.shape
        distances, rows = self._search(patches.flatten(0, 2), self.bank, [len(self.bank)])
        distances, rows = distances.view(batch, -1), rows.view(batch, -1)
        maps = to_image_size(distances.view(batch, height, width), images.shape[-2:], self.sigma)
        highest, farthest, matched = farthest_patches(
            patches.view(batch, -1, size), distances, rows, self.bank
        )
        return Prediction(
            maps, highest * score_weights(self.bank, farthest, matched, highest, self.neighbours)
        )


class Coreset:
    """A coreset whose entries are replaced by candidates that are farther from it than its closest two are apart.

    The choice is that of the plain loop, which computes all distances again for each replacement: here one product has
    those of a set of candidates, and each entry knows its nearest other one. An entry whose nearest one was replaced is
    only as near to another or farther: it is looked at again when it is the next to be closest. So a replacement takes
    one product of the entries with a vector, or few.

    In single precision whatever gpu.precision is: small differences decide. On a GPU a replacement waits for the device.

    Args:
        entries: float32 [K, D], at least two; replaced in place.

    Attributes:
        entries: as given, or as replaced since.
    """

    def __init__(self, entries: Tensor):
        self.entries = entries
        self._norms = entries.square().sum(1)
        self._gaps = torch.empty_like(
            self._norms
        )  # squared distance to the nearest other, or what it is not below
        self._nearest = torch.empty(len(entries), dtype=torch.int64, device=entries.device)
        self._stale = torch.zeros(len(entries), dtype=torch.bool, device=entries.device)
        with single_precision(entries.device):
            for rows in torch.arange(len(entries), device=entries.device).split(_ROWS):
                self._look(rows)

    def update(self, candidates: Tensor, most: float = math.inf) -> int:
        """Replace entries by candidates, float32 [N, D], as long as that is due, and give how many were.

        Of equals, the first candidate is taken, and the first of the first closest pair is replaced.

        Args:
            most: how many are replaced at most.
        """
        with single_precision(self.entries.device):
            return self._update(candidates, most)

    def _update(self, candidates: Tensor, most: float) -> int:
        norms = candidates.square().sum(1)
        distances = _squared(candidates, norms, self.entries, self._norms)
        among = _squared(candidates, norms, candidates, norms)
        nearest, at = distances.min(1)
        replaced = 0
        while replaced < most:
            closest, farthest = self._gaps.argmin(), nearest.argmax()
            place, other, stale, taken, due = torch.stack(
                [
                    closest,
                    self._nearest[closest],
                    self._stale[closest].long(),
                    farthest,
                    (nearest[farthest] > self._gaps[closest]).long(),
                ]
            ).tolist()
            if not due:
                break
            if stale:
                self._look(torch.tensor([place], device=self.entries.device))
                continue
            place = min(place, other)
            # The candidate's distances to the entries are known, and so are all candidates' to it.
            self._replace(place, candidates[taken], norms[taken], distances[taken])
            distances[:, place] = among[:, taken]
            nearest[taken], at[taken] = -math.inf, -1  # a candidate no more
            nearer = among[:, taken] < nearest
            lost = (at == place).nonzero()[:, 0]
            nearest, at = torch.where(nearer, among[:, taken], nearest), at.masked_fill(nearer, place)
            nearest[lost], at[lost] = distances[lost].min(1)
            replaced += 1
        return replaced

    def _look(self, rows: Tensor) -> None:
        """Find the nearest other entry of some entries, int64 [R]."""
        squared = _squared(self.entries[rows], self._norms[rows], self.entries, self._norms)
        squared.scatter_(1, rows[:, None], math.inf)
        self._gaps[rows], self._nearest[rows] = squared.min(1)
        self._stale[rows] = False

    def _replace(self, place: int, entry: Tensor, norm: Tensor, squared: Tensor) -> None:
        """Put another entry [D] at a place, with its squared norm and squared distances to the entries that were, [K]."""
        self.entries[place], self._norms[place] = entry, norm
        squared = squared.clone()
        squared[place] = math.inf
        self._stale |= self._nearest == place
        nearer = squared < self._gaps
        self._gaps = torch.where(nearer, squared, self._gaps)
        self._nearest.masked_fill_(nearer, place)
        self._stale &= ~nearer
        self._gaps[place], self._nearest[place] = squared.min(0)
        self._stale[place] = False


def _squared(some: Tensor, norms: Tensor, others: Tensor, other_norms: Tensor) -> Tensor:
    """Squared Euclidean distances [S, O] of vectors [S, D] and [O, D] with these squared norms."""
    return torch.addmm(other_norms, some, others.T, alpha=-2).add_(norms[:, None]).clamp_(min=0)
