"""DINOSaur: banks of tokens at each position, and a prototype of each task to choose among them (Weatherly & Lin, 2026)."""

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

import torch
from annotated_types import Gt, Le
from pydantic import NonNegativeInt, PositiveInt
from torch import Tensor
from torch.nn import functional as F

from clbench.backbones import Backbone, Layers
from clbench.data.images import Images
from clbench.errors import UserError
from clbench.methods.banks import MemoryMb, TaskBanks, capacity, check_room, without
from clbench.methods.base import Prediction, Share
from clbench.methods.coreset import farthest_first_at_each
from clbench.methods.maps import Sigma, to_image_size
from clbench.methods.patches import tokens
from clbench.precision import single_precision
from clbench.randomness import generator

_CPU_BYTES = 1 << 24  # of distances held at a time: about the caches' size
_GPU_BYTES = 1 << 29


class DINOSaur(TaskBanks):
    """Distance of each token to those memorised near its position, without training; a bank and a prototype per task.

    A task's bank is a greedy k-center of the tokens of its images at each position alone, and its prototype the mean of
    the images' vectors. An image belongs to the task whose prototype is nearest to its vector.

    Beyond the paper: a budget of bytes for all tasks (`memory_mb`), in which earlier tasks' banks are cut to their first
    entries, which are the k-centers of that size; other backbones, whose image vector is the mean of the last level where
    they have no class token; and `metric=cosine`. What the paper's text leaves open is as its authors' code has it: tokens
    after the network's last normalisation, not brought to unit length, and a score and a map without smoothing. Inferred: the
    first entry is drawn for each position on its own. Ours: a task of fewer images than `smallest` is refused, which that
    code would search for ever.

    Args:
        backbone: where tokens come from; DINOv3 of size S in the original.
        layers: blocks whose tokens are taken, after the network's last normalisation; the original takes the last.
        rho: share of a task's images that are memorised at each position, rounded down. The paper's default is 0.1, its
            code's 0.2.
        smallest: number of entries at each position that a task has at least.
        memory_mb: 10^6 bytes of all banks, in place of rho and smallest: each task's share is memory_mb / number of tasks.
            Prototypes, one vector a task, come on top. None: rho counts.
        radius: r of the square window of (2 r + 1)^2 positions in which the nearest entry of a token is looked for.
        metric: `euclidean`, or `cosine` distances, of tokens and of image vectors.
        sigma: standard deviation of the map's Gaussian smoothing, in pixels; 0, as in the original, for none.
        held_out: share of the normal images that are not memorised; thresholds are set on them.
        seed: of each k-center's first entry.

    Buffers: as `TaskBanks`, its entries [h, w, D], where entry m has the m-th chosen token of each position; and
        prototypes: float32 [tasks, d].
    """

    needs_only_features = True
    prototypes: Tensor

    def __init__(
        self,
        backbone: Backbone,
        *,
        layers: Layers,
        rho: Annotated[float, Gt(0), Le(1)] = 0.1,
        smallest: PositiveInt = 20,
        memory_mb: MemoryMb = None,
        radius: NonNegativeInt = 3,
        metric: Literal["euclidean", "cosine"] = "euclidean",
        sigma: Sigma = 0.0,
        held_out: Share = 0.0,
        seed: int = 0,
    ):
        pyramid = backbone.tokens(layers)
        super().__init__(torch.empty(0, 0, 0, sum(pyramid.channels)))
        self.register_buffer("prototypes", torch.empty(0, pyramid.channels[-1]))
        self.pyramid = pyramid
        self.rho, self.smallest, self.memory_mb = rho, smallest, memory_mb
        self.radius, self.metric, self.sigma = radius, metric, sigma
        self.held_out, self.seed = held_out, seed
        self._positions = 1  # of the images to come, once one was tried

    def check(self, images: Tensor) -> None:
        self._positions = self.pyramid.check(images)[0].shape[-2:].numel()

    @classmethod
    def why_no_tiles(cls, settings: Mapping[str, Any]) -> str:
        return "it has a bank for each place of an image"

    @property
    def bank_limit(self) -> int | None:
        return None if self.memory_mb is None else int(self.memory_mb * 10**6)

    def check_stages(self, counts: Sequence[int], kept: int) -> None:
        what = f"entries, each a token at {self._positions} positions"
        check_room(self.memory_mb, 4 * self._positions * self.bank.shape[3], kept, what)
        if self.memory_mb is None and min(counts) < self.smallest:
            raise UserError(
                f"method.smallest={self.smallest} entries at each position are wanted of every task, and stage "
                f"{counts.index(min(counts)) + 1} learns from {min(counts)} images: set method.smallest={min(counts)} "
                "or less, or method.memory_mb"
            )

    def forget(self) -> None:
        super().forget()
        self.prototypes = self.prototypes[:0]

    def drop(self, task: int) -> None:
        super().drop(task)
        self.prototypes = without(self.prototypes, task)

    def described(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Images [B, 3, H, W] -> tokens float32 [B, h, w, D], and one vector for each image [B, d]; by `metric`."""
        patches, vectors = tokens(self.pyramid(images))
        if self.metric == "cosine":
            return F.normalize(patches, dim=3), F.normalize(vectors, dim=1)
        return patches, vectors

    def start_task(self, task: int, images: Images, stored: Images) -> None:
        super().start_task(task, images, stored)
        self._sum = self.prototypes.new_zeros(self.prototypes.shape[1])
        self._grid = self.bank.shape[1:3]

    def training_step(self, images: Tensor) -> None:
        """Collect the tokens of images [B, 3, H, W], and add their vectors up."""
        patches, vectors = self.described(images)
        grid = patches.shape[1:3]
        self._check_grid(grid)
        self._grid = grid
        self._sum += vectors.sum(0)
        self._collect(patches.flatten(0, 2), len(images))

    def finish_task(self, images: Images) -> None:
        """Select the task's entries at each position, and, in a budget, cut those of earlier tasks.

        The images, [N, 3, H, W], are not looked at: steps have seen what is learned from.
        """
        positions = self._grid.numel()
        patches = self.collected()
        patches = patches.view(-1, positions, patches.shape[1]).transpose(0, 1)  # [positions, images, D]
        count = patches.shape[1]
        share = None
        if self.memory_mb is None:
            wanted = max(self.smallest, int(self.rho * count))
        else:
            room = capacity(0, self.memory_mb, 4 * patches[:, 0].numel())
            wanted = share = max(room // (len(self.bank_sizes) + 1), 1)
        starts = torch.randint(
            count, (positions,), generator=generator(self.seed, "position coresets", self._task)
        )
        device = self.bank.device
        chosen = farthest_first_at_each(
            patches, wanted, starts, lambda done: self.progress("coresets", done, positions)
        )
        entries = patches.gather(1, chosen[:, :, None].expand(-1, -1, patches.shape[2])).transpose(0, 1)
        if not len(self.bank_sizes):
            self.bank = self.bank.new_empty(0, *self._grid, patches.shape[2])
        self.add_bank(entries.unflatten(1, self._grid).to(device), share)
        prototype = self._sum / count
        if self.metric == "cosine":
            prototype = F.normalize(prototype, dim=0)
        self.prototypes = torch.cat([self.prototypes, prototype[None]])
        del self._sum

    def forward(self, images: Tensor) -> Prediction:
        """Images [B, 3, H, W] -> maps [B, H, W], the distances of tokens, and scores [B], the largest of them."""
        patches, vectors = self.described(images)
        self._check_grid(patches.shape[1:3])
        selected = (vectors[:, None] - self.prototypes).square().sum(2).argmin(1)
        with single_precision(images.device):
            distances = self._recalled(images, patches, selected)
        maps = to_image_size(distances, images.shape[-2:], self.sigma)
        return Prediction(maps, distances.amax((1, 2)), selected)

    def _recalled(self, images: Tensor, patches: Tensor, selected: Tensor) -> Tensor:
        """As `_distances`, of images [B, 3, H, W]: those of an earlier stage, where they were found by the same entries."""
        if self.recollection is None:
            return self._distances(patches, selected)
        numbers, sizes = self.numbers(), self.sizes()
        by = tuple((numbers[task], sizes[task]) for task in selected.tolist())
        if (kept := self.recollection.get(images, by)) is not None:
            return kept.tensors[0]
        distances = self._distances(patches, selected)
        self.recollection.put(images, by, distances)
        return distances

    def _distances(self, patches: Tensor, selected: Tensor) -> Tensor:
        """Tokens [B, h, w, D] and each image's task [B] -> distances to the task's bank [B, h, w], by `metric`."""
        if torch.compiler.is_compiling():  # a graph searches them all
            each = torch.stack([squared_in_windows(patches, bank, self.radius) for bank in self.banks()])
            squared = each[selected, torch.arange(patches.shape[0], device=patches.device)]
        else:
            squared = patches.new_empty(patches.shape[:3])
            choices, banks = selected.tolist(), self.banks()
            for task in sorted(set(choices)):
                rows = torch.tensor([row for row, choice in enumerate(choices) if choice == task])
                rows = rows.to(patches.device, non_blocking=True)
                squared[rows] = squared_in_windows(patches[rows], banks[task], self.radius)
        return squared / 2 if self.metric == "cosine" else squared.sqrt()

    def _check_grid(self, grid: torch.Size) -> None:
        """Check that images have the positions of those that were learned.

        Raises:
            UserError: they have others.
        """
        if len(self.bank_sizes) and self.bank.shape[1:3] != grid:
            height, width = self.bank.shape[1:3]
            raise UserError(
                f"the images have {grid[0]} x {grid[1]} positions, and those that were learned {height} x {width}, each "
                "with tokens of its own: give images of the same size"
            )


def squared_in_windows(patches: Tensor, bank: Tensor, radius: int) -> Tensor:
    """Squared distances of tokens to the nearest entry at a position in their window, float32 [B, h, w].

    By one product for each row of the window, in which a position's entries lie side by side; no entry is copied for it.
    Distances are then taken from differences, since a product rounds small ones away.

    Args:
        patches: tokens of images, float32 [B, h, w, D].
        bank: entries, float32 [M, h, w, D].
        radius: how far the window reaches from its middle, in positions; it is cut at the border.
    """
    batch, height, width, _ = patches.shape
    entries = len(bank)
    reach = min(radius, max(height, width) - 1)
    side, stride = 2 * reach + 1, width + 2 * reach
    # Positions row by row, with a border beside them, so that a window's row begins a fixed way behind its token's place.
    queries = F.pad(patches.permute(1, 2, 0, 3), (0, 0, 0, 0, 0, 2 * reach)).flatten(0, 1)
    border = (reach, reach, reach, reach + 1)
    kept = F.pad(bank.permute(1, 2, 0, 3), (0, 0, 0, 0, *border)).flatten(0, 1)
    norms = F.pad(bank.square().sum(3), border, value=torch.inf).permute(1, 2, 0).flatten(0, 1)
    windows = kept.unfold(0, side, 1).permute(0, 3, 1, 2).flatten(1, 2)
    norms = norms.unfold(0, side, 1).permute(0, 2, 1).flatten(1)[:, None]

    places = height * stride
    step = places
    if not torch.compiler.is_compiling():
        room = _CPU_BYTES if patches.device.type == "cpu" else _GPU_BYTES
        step = max(1, room // (4 * batch * side * entries))
    found = []
    for begin in range(0, places, step):
        some = queries[begin : begin + step]
        least = rows = None
        for shift in range(side):
            first = begin + shift * stride
            window = slice(first, first + len(some))
            products = torch.baddbmm(norms[window], some, windows[window].mT, alpha=-2)
            smallest, at = products.min(2)
            at = at + torch.arange(first, first + len(some), device=at.device)[:, None] * entries
            if least is None or rows is None:
                least, rows = smallest, at
            else:
                rows = torch.where(smallest < least, at, rows)
                least = torch.minimum(least, smallest)
        assert rows is not None
        found.append(rows)
    rows = torch.cat(found).unflatten(0, (height, stride))[:, :width].permute(2, 0, 1)
    return (patches - kept.flatten(0, 1)[rows]).square().sum(3)
