"""Banks of normal patches: a coreset for each task, in a memory of fixed size (supplement, Algorithm 2)."""

import itertools
import math
import tempfile
import weakref
from collections.abc import Sequence
from typing import Annotated

import torch
from annotated_types import Gt
from torch import Tensor

from clbench.backbones import FeaturePyramid
from clbench.data.images import Images
from clbench.errors import UserError
from clbench.feature_store import on_disk
from clbench.methods.base import Detector
from clbench.methods.coreset import farthest_first
from clbench.methods.nearest import Closest, Search
from clbench.precision import single_precision
from clbench.randomness import generator

MemoryMb = Annotated[float, Gt(0)] | None  # 10^6 bytes of what is memorised; None where entries are counted


def capacity(memory_size: int, memory_mb: float | None, entry: int) -> int:
    """How many entries a memory has.

    Args:
        memory_size: entries, where `memory_mb` is not given.
        memory_mb: 10^6 bytes for entries.
        entry: bytes of one.
    """
    return memory_size if memory_mb is None else int(memory_mb * 10**6 // entry)


class Numbers:
    """A number for each task of those that a detector keeps something of, in this process: whatever was made anew has another.

    What evaluation recalls holds for the tasks it was found by, see `Recollection`. A buffer that was replaced or changed
    without a word has new numbers.
    """

    _all = itertools.count()

    def __init__(self) -> None:
        # buffer, its version, and numbers
        self._known: tuple[weakref.ref[Tensor], int, tuple[int, ...]] | None = None

    def of(self, buffer: Tensor, tasks: int) -> tuple[int, ...]:
        """The numbers of the tasks whose parts a buffer has."""
        known = self._known
        if known is None or known[0]() is not buffer or known[1] != buffer._version:
            return self._set(buffer, tuple(next(self._all) for _ in range(tasks)))
        return known[2]

    def one_more(self, buffer: Tensor, before: tuple[int, ...]) -> None:
        """Take a buffer in place of the one that had these numbers: a task's part is new, the others are as they were."""
        self._set(buffer, (*before, next(self._all)))

    def _set(self, buffer: Tensor, numbers: tuple[int, ...]) -> tuple[int, ...]:
        self._known = weakref.ref(buffer), buffer._version, numbers
        return numbers


class Collecting(Detector):
    """A detector whose steps collect the patches of a task: `collected` in `finish_task`.

    A subclass has `pyramid` and gives `patches`.
    """

    pyramid: FeaturePyramid

    def patches(self, images: Tensor) -> Tensor:
        """Images [B, 3, H, W] -> patch features, float32 [B, h, w, D]."""
        raise NotImplementedError

    def memorised(self, images: Tensor) -> Tensor:
        """Images to learn from [B, 3, H, W] -> the patches that are collected of them, as many of each, float32 [rows, D]."""
        return self.patches(images).flatten(0, 2)

    def start_task(self, task: int, images: Images, stored: Images) -> None:
        self._task = task
        self._expected = len(images) + len(stored)
        self._patches = torch.empty(0)
        self._filled = 0

    def training_step(self, images: Tensor) -> None:
        """Collect the patches of images [B, 3, H, W]."""
        self._collect(self.memorised(images), len(images))

    def _collect(self, patches: Tensor, images: int) -> None:
        """Collect patches, float32 [rows, D], of so many images."""
        if not self._filled:  # one block for the whole task: appending would need twice the memory
            self._patches = self._block(self._expected * len(patches) // images, patches)
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

    def collected(self) -> Tensor:
        """The patches of all images that steps have seen, image by image: float32 [rows, D]. They go with the tensor."""
        patches = self._patches[: self._filled]
        del self._patches
        return patches


class TaskBanks(Collecting):
    """A detector with a bank for each task, of which it chooses one for an image.

    Args:
        entries: an empty tensor, float32 [0, ...], as the entries of a bank are.

    Buffers:
        bank: the tasks' banks one after the other, float32 [sum of bank_sizes, ...].
        bank_sizes: number of entries of each task's bank, int64 [tasks].
    """

    native = True
    chooses = True

    bank: Tensor
    bank_sizes: Tensor

    def __init__(self, entries: Tensor):
        super().__init__()
        self.register_buffer("bank", entries)
        self.register_buffer("bank_sizes", torch.empty(0, dtype=torch.int64))

        # bank_sizes, its version, and what it holds
        self._read: tuple[weakref.ref[Tensor], int, list[int]] | None = None
        self._numbers = Numbers()

    def forget(self) -> None:
        self.bank, self.bank_sizes = self.bank[:0], self.bank_sizes[:0]

    def drop(self, task: int) -> None:
        banks = self.banks()
        self.bank = torch.cat([*banks[:task], *banks[task + 1 :]])
        self.bank_sizes = without(self.bank_sizes, task)

    def banks(self) -> Sequence[Tensor]:
        """The tasks' banks, float32 [entries, ...] each."""
        return self.bank.split(self.sizes())

    def add_bank(self, new: Tensor, share: int | None) -> None:
        """Add a task's bank, float32 [entries, ...], and cut those of earlier tasks to their first `share` entries.

        None leaves them as they are.
        """
        parts = [*(old[:share] for old in self.banks()), new.to(self.bank)]
        numbers = self.numbers()
        self.bank = torch.cat(parts)
        self._numbers.one_more(self.bank, numbers)
        self.bank_sizes = torch.tensor([len(part) for part in parts], device=self.bank.device)

    def numbers(self) -> tuple[int, ...]:
        """A number for each bank, which cutting it does not change, see `Numbers`."""
        return self._numbers.of(self.bank, len(self.sizes()))

    def for_export(self) -> None:
        """Read `bank_sizes` now: tracing sees the shape of a buffer, and not its values."""
        self.sizes()

    def sizes(self) -> list[int]:
        """What `bank_sizes` holds. The device is asked, and waited for, only where it has changed."""
        sizes = self.bank_sizes
        if torch.compiler.is_compiling():
            assert self._read is not None
        elif self._read is None or self._read[0]() is not sizes or self._read[1] != sizes._version:
            self._read = weakref.ref(sizes), sizes._version, sizes.tolist()
        return self._read[2]


def without(rows: Tensor, row: int) -> Tensor:
    """Rows [N, ...] but one: [N - 1, ...]."""
    return torch.cat([rows[:row], rows[row + 1 :]])


class PatchBank(TaskBanks):
    """A detector that memorises patches: one coreset for each task, each with the same share of the memory.

    Args:
        width: D, numbers of a patch.
        memory_size: number of patches kept in all; each task's share is memory_size / number of tasks.
        memory_mb: 10^6 bytes of patches kept in all, in place of memory_size; None: memory_size counts.
        held_out: share of the normal images that are not memorised; thresholds are set on them.
        seed: of each coreset's first patch, and of what a subclass draws.

    Buffers: as `TaskBanks`; the entries of a bank are a coreset's patches, float32 [bank_sizes of the task, D].
    """

    def __init__(self, width: int, memory_size: int, memory_mb: float | None, held_out: float, seed: int):
        super().__init__(torch.empty(0, width))
        self.memory_mb, self.memory_size = memory_mb, capacity(memory_size, memory_mb, 4 * width)
        self.held_out = held_out
        self.seed = seed
        self._search = Search()

    @property
    def bank_limit(self) -> int:
        return self.memory_size * self.bank.shape[1] * self.bank.element_size()

    def check_stages(self, counts: Sequence[int], kept: int) -> None:
        width = self.bank.shape[1]
        check_room(self.memory_mb, 4 * width, kept, f"patches of {width} numbers")
        if self.memory_size < kept:
            raise UserError(
                f"method.memory_size={self.memory_size} has room for fewer patches than the stream has tasks, {kept}: give "
                f"at least {kept}"
            )

    def space(self, patches: Tensor, random: torch.Generator) -> Tensor:
        """Patches [N, D] -> points on the detector's device, float32 [N, d], whose distances coresets are chosen by."""
        return patches.to(self.bank.device)

    def finish_task(self, images: Images) -> None:
        """Select the task's coreset, and cut those of earlier tasks (supplement, Algorithm 2).

        Every task, old or new, then has memory_size / tasks patches. The images, [N, 3, H, W], are not looked
        at: steps have seen what is learned from.
        """
        patches = self.collected()
        share = max(self.memory_size // (len(self.bank_sizes) + 1), 1)
        count = min(share, len(patches))
        random = generator(self.seed, "coreset", self._task)
        start = int(torch.randint(len(patches), (1,), generator=random))
        chosen = farthest_first(
            self.space(patches, random),
            count,
            start,
            progress=lambda done: self.progress("coreset", done, count),
        )
        # Farthest-first order is nested: the coreset of an old coreset is its beginning.
        self.add_bank(patches[chosen.to(patches.device)], share)

    def nearest(self, images: Tensor, patches: Tensor) -> Closest:
        """The task that each image's patches are nearest to on average, and their distances to its coreset.

        Args:
            images: [B, 3, H, W].
            patches: theirs, float32 [B, h, w, D].
        """
        patches, recollection = patches.flatten(1, 2), self.recollection
        if recollection is None:
            return self._search.closest_bank(patches, self.bank, self.sizes())
        numbers, begins = self.numbers(), self.bank_sizes.cumsum(0) - self.bank_sizes
        before, kept = None, recollection.get(images, numbers)
        if kept is not None:
            selected, distances, places, least = kept.tensors
            before = Closest(selected, distances, places + begins[selected][:, None], least)
        found = self._search.closest_bank(patches, self.bank, self.sizes(), before)
        places = (found.rows - begins[found.selected][:, None]).to(torch.int32)
        recollection.put(images, numbers, found.selected, found.distances, places, found.least)
        return found


def check_room(memory_mb: float | None, entry: int, wanted: int, what: str) -> None:
    """Check that a memory of so many MB has room for at least so many entries.

    Args:
        entry: bytes of one.
        what: the entries, for the error.

    Raises:
        UserError: it has not.
    """
    if memory_mb is not None and (room := capacity(0, memory_mb, entry)) < wanted:
        raise UserError(
            f"method.memory_mb={memory_mb:g} has room for {room} {what}, and the stream wants {wanted} at least: "
            f"give {math.ceil(wanted * entry / 1000) / 1000:g} or more"
        )


def farthest_patches(
    patches: Tensor, distances: Tensor, rows: Tensor, bank: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Each image's patch with the largest distance to what is memorised.

    Args:
        patches: float32 [B, N, D].
        distances, rows: of each patch the distance to the nearest entry, and its row of `bank`, both [B, N].
        bank: entries, float32 [M, D].

    Returns:
        Its distance float32 [B], itself float32 [B, D], and the entry nearest to it, float32 [B, D].
    """
    highest, where = distances.max(1)
    each = torch.arange(patches.shape[0], device=patches.device)
    return highest, patches[each, where], bank[rows[each, where]]


def score_weights(
    bank: Tensor, farthest: Tensor, matched: Tensor, highest: Tensor, neighbours: int
) -> Tensor:
    """Weights [B] of image scores (Roth et al., 2022, eq. 7).

    Args:
        bank: one coreset, float32 [M, D]; weights of images that another was selected for mean nothing.
        farthest: each image's patch with the largest distance to its selected coreset, float32 [B, D].
        matched: the memorised patch that is nearest to it, float32 [B, D].
        highest: the distance between these two, float32 [B].
        neighbours: b, how many memorised patches around the matched one, itself among them, are looked at.
    """
    count = min(neighbours, len(bank))
    if count < 2:
        return torch.ones_like(farthest[:, 0])
    norms = torch.linalg.vector_norm(bank, dim=1).square()
    with single_precision(bank.device):
        around = torch.addmm(norms, matched, bank.T, alpha=-2).topk(count, largest=False)
    to_test = (bank[around.indices] - farthest[:, None]).square().sum(2).sqrt()
    # 1 - exp(highest) / sum(exp(to_test)), in a form that cannot overflow.
    return 1 - (highest - to_test.logsumexp(1)).exp()
