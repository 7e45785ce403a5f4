"""The replay buffer: which images of earlier stages are kept, and how many."""

import bisect
import re
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from clbench.data.images import Images
from clbench.errors import UserError, counted
from clbench.randomness import generator
from clbench.strategies.selection import BY_FEATURES, Selection
from clbench.strategies.storage import Storage, Stored

MB = 10**6

Pair = tuple[Tensor, Tensor]  # for images that were learned from and for those held out


class Buffer:
    """Stored images of each stage seen, in as many images or bytes as it may have.

    Stages have equal shares, but for `reservoir`. A share that shrinks keeps a random part of itself under `random`; else it is
    kept in an order of which the beginning stays. Images that were held out of a stage's training are stored apart, in
    the proportion that they had, and stay held out when the others are replayed.

    Args:
        size: number of images in all, at most; None where `budget` counts.
        seed: seed of the choice.
        budget: bytes of all that is kept, at most; None where images count. As many images are kept as fit.
        selection: which images are kept. `reservoir` keeps each image seen with the same chance, so that stages share in
            proportion to their sizes: each image draws a number once, and those with the least stay, which is a reservoir
            (Vitter, 1985) for bytes too.
        order: images, uint8 [N, 3, H, W] -> the order in which they are chosen, int64 [N], for selection by features.
        storage: how images are kept.
    """

    def __init__(
        self,
        size: int | None,
        seed: int,
        *,
        budget: int | None = None,
        selection: Selection = "random",
        order: Callable[[Images], Tensor] | None = None,
        storage: Storage | None = None,
    ):
        if (size is None) == (budget is None):
            raise ValueError(f"size={size} and budget={budget}: give one of them")
        self.size, self.budget = size, budget
        self.seed = seed
        self.selection = selection
        self.storage = storage or Storage()
        self._order = order
        self._stored: list[tuple[Stored, Stored]] = []
        self._ready = False  # whether the storage knows what is stored now
        self._seen = torch.empty(0, len(_KINDS), dtype=torch.int64)  # images of each stage, for the reservoir
        # Stage of which nothing is left -> the least that an image of it drew.
        self._least: dict[int, float] = {}

    @property
    def _room(self) -> int:
        """The images, or the bytes, that there is room for in all."""
        found = self.size if self.budget is None else self.budget
        assert found is not None
        return found

    @property
    def shares(self) -> list[tuple[Tensor | Images, Tensor | Images]]:
        """For each stage, the images that it was learned from and those held out of it, both uint8 [M, 3, H, W], on the CPU.

        What the storage does not keep as it is comes as `Images` that are made when they are asked for. What learning from
        them takes beside is there until the next images are stored.
        """
        if not self._ready:
            self.storage.ready([share for pair in self._stored for share in pair if len(share)])
            self._ready = True
        return [(learned.images, held_out.images) for learned, held_out in self._stored]

    def begin(self, images: Images) -> None:
        """Take the size of images of a stage, uint8 [N, 3, H, W]."""
        self.storage.see(images)

    def check(self, images: Sequence[Tensor | Images]) -> None:
        """Check, before training, that there is room for an image of each stage; in a reservoir, for one of any.

        Args:
            images: one of each stage, uint8 [1, 3, H, W].

        Raises:
            UserError: there is not, or images are too small for the storage.
        """
        self.storage.see(images[0])
        shares = 1 if self.selection == "reservoir" else len(images)
        if self.budget is None:
            if self._room < shares:
                raise UserError(
                    f"replay.size={self.size} has no room for an image of each of {counted(shares, 'task')}, and the last would "
                    f"never be replayed: give {shares} or more, or take replay.selection=reservoir"
                )
            return
        fixed = self.storage.store(Images.of(images[0]).some(slice(0)).on(_CPU)).fixed + self._fixed(
            len(images)
        )
        image = fixed + max(int(self.storage.costs(Images.of(one).on(_CPU))) for one in images)
        if self.budget < shares * image:
            each = f" of each of {shares} tasks" if shares > 1 else ""
            raise UserError(
                f"replay.budget_mb={self.budget / MB:g} has no room for an image{each}, which takes {image:,} bytes with "
                f"{self.storage.name}: give {_rounded_up(shares * image)} or more, or a storage that takes less"
            )

    def add(self, stage: int, learned: Tensor | Images, held_out: Tensor | Images) -> list[Pair]:
        """Store images of a new stage, and cut the shares of the earlier ones.

        Args:
            stage: 0-based.
            learned, held_out: the stage's images, uint8 [N, 3, H, W].

        Returns:
            For each stage, which of its images stay, int64, in the order in which they are stored: of those that were stored so
            far, or for the new stage were given. What else is kept of an image stays with it by that.
        """
        given = Images.of(learned).on(_CPU), Images.of(held_out).on(_CPU)
        self.storage.see(given[0])
        sizes = [*((len(one), len(other)) for one, other in self._stored), (len(given[0]), len(given[1]))]
        if self.selection == "reservoir":
            self._seen = torch.cat([self._seen, torch.tensor([sizes[-1]])])
        orders = [self._orders(stage, owner, counts, given) for owner, counts in enumerate(sizes)]
        costs = self._costs(orders, given) if self.budget is not None else None
        choose = self._from_all if self.selection == "reservoir" else self._from_each
        rows: list[Pair] = []
        for (first, second), counts, (one, other) in zip(orders, sizes, choose(orders, costs), strict=True):
            if not any(counts):  # as in most stages of a long stream with a reservoir
                rows.append((_NO_ROWS, _NO_ROWS))
                continue
            pair = first[:one], second[:other]
            rows.append(
                (pair[0].sort().values, pair[1].sort().values) if self.selection == "random" else pair
            )
        kept = [
            (one.some(first), other.some(second)) if any(counts) else (one, other)
            for (one, other), (first, second), counts in zip(self._stored, rows, sizes, strict=False)
        ]
        new = [
            self.storage.store(images.some(chosen)) for images, chosen in zip(given, rows[-1], strict=True)
        ]
        self._stored = [*kept, (new[0], new[1])]
        self.storage.ready(())  # lets go of what was dropped
        self._ready = False
        return rows

    def _orders(self, stage: int, owner: int, counts: tuple[int, int], given: tuple[Images, Images]) -> Pair:
        """The orders in which images of a share are chosen, learned ones and held-out ones, int64 [M] each.

        Args:
            stage: the new stage.
            owner: whose share it is.
            counts: how many images of it there are.
            given: the new stage's images.
        """
        if not any(counts):
            one = other = _NO_ROWS
        elif self.selection == "random":
            random = generator(self.seed, "replay buffer", stage, owner)
            one, other = (torch.randperm(count, generator=random) for count in counts)
        elif owner < stage:
            one, other = map(torch.arange, counts)
        elif self.selection == "reservoir":
            one, other = (drawn.argsort() for drawn in self._drawn(stage))
        else:
            assert self._order is not None and self.selection in BY_FEATURES
            one, other = map(self._order, given)
        return one, other

    def _drawn(self, stage: int) -> Sequence[Tensor]:
        """What each image of a stage drew, float64 in [0, 1): those learned from, and those held out."""
        counts = self._seen[stage].tolist()
        random = generator(self.seed, "reservoir", stage)
        return torch.rand(sum(counts), generator=random, dtype=torch.float64).split(counts)

    def _costs(
        self, orders: Sequence[Pair], given: tuple[Images, Images]
    ) -> list[tuple[list[int], list[int]]]:
        """What the beginnings of each order take: bytes of the first 0, 1, 2, ... images."""
        each = [(one.costs(), other.costs()) for one, other in self._stored]
        each.append((self.storage.costs(given[0]), self.storage.costs(given[1])))
        fixed = self.storage.store(given[0].some(slice(0))).fixed
        found = []
        for pair, costs in zip(orders, each, strict=True):
            one, other = (
                [0, *(fixed + cost[order].cumsum(0)).tolist()]
                for order, cost in zip(pair, costs, strict=True)
            )
            found.append((one, other))
        return found

    def _from_each(
        self, orders: Sequence[Pair], costs: Sequence[tuple[list[int], list[int]]] | None
    ) -> list[tuple[int, int]]:
        """How many images of each stage stay, learned ones and held-out ones: equal shares.

        What does not divide evenly goes to the oldest stages, an image each.

        Args:
            orders: of each stage.
            costs: see `_costs`; None where images count.
        """
        there = [(len(first), len(second)) for first, second in orders]
        whole, extra = divmod(self._room, len(orders))
        if costs is None:
            wanted = [min(whole + (owner < extra), sum(counts)) for owner, counts in enumerate(there)]
            return [_parts(*counts, count) for counts, count in zip(there, wanted, strict=True)]
        taken = [
            [
                one[first] + other[second]
                for first, second in (_parts(*counts, n) for n in range(sum(counts) + 1))
            ]
            for counts, (one, other) in zip(there, costs, strict=True)
        ]
        found = [bisect.bisect_right(bytes_of, whole) - 1 for bytes_of in taken]
        left = self._room - sum(bytes_of[count] for bytes_of, count in zip(taken, found, strict=True))
        for owner, (bytes_of, count) in enumerate(zip(taken, found, strict=True)):
            if count + 1 < len(bytes_of) and bytes_of[count + 1] - bytes_of[count] <= left:
                found[owner] += 1
                left -= bytes_of[count + 1] - bytes_of[count]
        return [_parts(*counts, count) for counts, count in zip(there, found, strict=True)]

    def _from_all(
        self, orders: Sequence[Pair], costs: Sequence[tuple[list[int], list[int]]] | None
    ) -> list[tuple[int, int]]:
        """How many images of each stage stay, learned ones and held-out ones: those that drew the least of all.

        Args:
            orders, costs: as for `_from_each`.
        """
        drawn: list[tuple[float, int, int]] = []
        limit = 1.0  # no image that was dropped drew less
        for owner, pair in enumerate(orders):
            if not any(map(len, pair)):
                if owner not in self._least:
                    self._least[owner] = min([1.0, *torch.cat([*self._drawn(owner)]).tolist()])
                limit = min(limit, self._least[owner])
                continue
            for kind, (order, numbers) in enumerate(zip(pair, self._drawn(owner), strict=True)):
                ascending = numbers.sort().values.tolist()
                drawn += [(number, owner, kind) for number in ascending[: len(order)]]
                limit = min([limit, *ascending[len(order) : len(order) + 1]])
        counts = [[0, 0] for _ in orders]
        spent = self._fixed(len(orders))
        for done, (number, owner, kind) in enumerate(sorted(drawn)):
            if number >= limit or (self.size is not None and done == self.size):
                break
            if costs is not None:
                own = costs[owner][kind]
                count = counts[owner][kind]
                spent += own[count + 1] - own[count]
                if spent > self._room:
                    break
            counts[owner][kind] += 1
        return [(one, other) for one, other in counts]

    def _fixed(self, stages: int) -> int:
        """Bytes that are kept beside images after so many stages."""
        return self._seen.element_size() * len(_KINDS) * stages if self.selection == "reservoir" else 0

    def tensors(self) -> dict[str, Tensor]:
        """All that is kept, name -> tensor, for `Strategy.kept`: of images that are kept as they are, uint8 [M, 3, H, W].

        A stage without images has no tensors, the last one excepted: there are as many as images at most, whatever the stages.
        """
        last = len(self._stored) - 1
        found = {
            f"{PREFIX}{stage}.{kind}{ending}": tensor
            for stage, pair in enumerate(self._stored)
            for kind, share in zip(_KINDS, pair, strict=True)
            if len(share) or stage == last
            for ending, tensor in share.tensors().items()
        }
        return {**found, **({_SEEN: self._seen} if self.selection == "reservoir" else {})}

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Take what `tensors` gave, which may be among others."""
        parts: dict[tuple[int, str], dict[str, Tensor]] = {}
        for name, tensor in tensors.items():
            if found := _NAME.fullmatch(name):
                stage, kind, ending = found.groups()
                parts.setdefault((int(stage), kind), {})[ending] = tensor.cpu()
        last = max((stage for stage, _ in parts), default=-1)
        none = {kind: self.storage.restored(parts[last, kind]).some(_NO_ROWS) for kind in _KINDS if parts}
        learned, held_out = (
            [
                self.storage.restored(parts[stage, kind]) if (stage, kind) in parts else none[kind]
                for stage in range(last + 1)
            ]
            for kind in _KINDS
        )
        self._stored = list(zip(learned, held_out, strict=True))
        self._ready = False
        self._seen = tensors.get(_SEEN, self._seen[:0]).cpu()
        self._least = {}


PREFIX = "buffer."  # of the names of its tensors
_KINDS = ("learned", "held_out")
_SEEN = f"{PREFIX}seen"
_NAME = re.compile(rf"buffer\.(\d+)\.({'|'.join(_KINDS)})(.*)")
_CPU = torch.device("cpu")
_NO_ROWS = torch.empty(0, dtype=torch.int64)


def _parts(learned: int, held_out: int, count: int) -> tuple[int, int]:
    """How many of `count` images that stay are learned ones and held-out ones, in the proportion that there are.

    The first is a learned one.
    """
    second = min(round(count * held_out / (learned + held_out)), count - 1) if count else 0
    return count - second, second


def _rounded_up(size: int) -> str:
    """Bytes in MB, of which no digit is lost but those below 0.0001 MB, rounded up."""
    return f"{-(-size // 100) / 10_000:g}"
