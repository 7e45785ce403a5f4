"""Images as tensors: where they lie, what is known about them, and how they come to the device."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate
from typing import TYPE_CHECKING, Any, Union

import torch
from torch import Tensor
from torch.utils._pytree import tree_map
from torch.utils.weak import WeakTensorKeyDictionary

from clbench import digests
from clbench.data.cache import Contents
from clbench.data.samples import GOOD, Defect, different_sizes
from clbench.out_of_memory import pinning

if TYPE_CHECKING:
    from clbench.data.tiles import Tiling

Identity = str  # the SHA-256 of an image's pixels

_PIECE = 64  # images that are copied to a device at a time
_PINNED = 1 << 28  # bytes of a tensor that is pinned to be copied, at most


class Made:
    """Images that are made when rows of them are asked for, as from compressed bytes: a part of `Images` beside tensors.

    The same rows are always the same pixels. They are on the CPU.

    Attributes:
        shape: [N, 3, H, W].
    """

    shape: torch.Size
    dtype = torch.uint8
    device = torch.device("cpu")
    _version = 0  # as of a tensor that is never changed

    def made(self, rows: Tensor) -> Tensor:
        """The images of some rows, int64 [M] -> uint8 [M, 3, H, W]."""
        raise NotImplementedError

    def made_of(self) -> tuple[Union[Tensor, "Made"], Any]:
        """What they are made of, and how: identities are kept for as long as there is the first; itself, and None."""
        return self, None

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows: Any) -> Tensor:
        return self.made(torch.arange(len(self))[rows])

    def split(self, size: int) -> Iterator[Tensor]:
        """All of them in their order, uint8 [at most `size`, 3, H, W] each."""
        return (self[begin : begin + size] for begin in range(0, len(self), size))


class Images:
    """Images of one size in one or several tensors, which come to a device when they are asked for.

    They are used as the one tensor that they would make, uint8 [N, 3, H, W]: `len`, `shape`, `device`, `split`, and rows,
    `images[rows]`, which are a tensor on the device. Methods and functions of tensors work on all of them there,
    `images[:]`.

    Args:
        parts: uint8 [M, 3, H, W] each, at least one: files that are mapped into memory, for example, or `Made`.
        device: what rows are on; None for that of the first part.
        places: which of all parts' images these are, int64 [N] on the CPU; None for all of them in their order.
        parents: where these are tiles, the image that each was cut from, int64 [N] on the CPU: tiles of one image have the
            same number.
    """

    def __init__(
        self,
        parts: Sequence[Tensor | Made],
        device: torch.device | None = None,
        places: Tensor | None = None,
        parents: Tensor | None = None,
    ):
        self._parts = list(parts)
        self._starts = torch.tensor([0, *accumulate(map(len, self._parts))])
        self._places = torch.arange(int(self._starts[-1])) if places is None else places
        self.parents = parents
        self._origin: Images | None = None  # the same images where they were before they were copied
        self.device = self._parts[0].device if device is None else device
        self.dtype = self._parts[0].dtype

    @staticmethod
    def of(images: Union[Tensor, "Images"]) -> "Images":
        """The images that a tensor has, uint8 [N, 3, H, W]; what are some already stays as it is."""
        return images if isinstance(images, Images) else Images([images])

    @staticmethod
    def concatenate(several: Sequence[Union[Tensor, "Images"]]) -> "Images":
        """The images of several, at least one, in their order; nothing is copied. Their device is that of the first."""
        first, *others = several  # of shares of a buffer most may be empty, where the stream is long
        each = [Images.of(images) for images in (first, *filter(len, others))]
        if len(each) == 1:
            return each[0]
        begins = accumulate((int(images._starts[-1]) for images in each), initial=0)
        places = [images._places + begin for images, begin in zip(each, begins, strict=False)]
        parts = [part for images in each for part in images._parts]
        found = Images(parts, each[0].device, torch.cat(places), _numbered_through(each))
        if any(images._origin is not None for images in each):
            found._origin = Images.concatenate(
                [images if images._origin is None else images._origin for images in each]
            )
        return found

    def on(self, device: torch.device) -> "Images":
        """The same images with rows on another device; they stay where they are until they are asked for."""
        return self if device == self.device else Images(self._parts, device, self._places, self.parents)

    def copied(self, limit: float) -> "Images":
        """The same images, copied to a GPU once where they take at most so many bytes; else as they are.

        They go there in pieces of 64, each of which is waited for: no more memory is pinned than for one.
        """
        there_already = len(self._parts) == 1 and self._parts[0].device == self.device
        if self.device.type == "cpu" or there_already or self.shape.numel() > limit or not len(self):
            return self
        there = torch.empty(self.shape, dtype=self.dtype, device=self.device)
        for begin in range(0, len(self), _PIECE):
            there[begin : begin + _PIECE] = self[begin : begin + _PIECE]
            if self.device.type == "cuda":
                torch.cuda.current_stream(self.device).synchronize()
        found = Images([there], parents=self.parents)
        found._origin = self
        return found

    @property
    def copied_bytes(self) -> int:
        """What `copied` has taken for them."""
        return 0 if self._origin is None else self.shape.numel()

    def some(self, rows: Tensor | slice) -> "Images":
        """Some of the images, by a slice or by rows, int64 [M] on the CPU; nothing is copied."""
        parents = None if self.parents is None else self.parents[rows]
        found = Images(self._parts, self.device, self._places[rows], parents)
        if self._origin is not None:
            found._origin = self._origin.some(rows)
        return found

    def divided(self, divide: Callable[[Any], Made]) -> "Images":
        """What a function makes of the images, equally many of each one of a part, image by image; their `parents` are these.

        Args:
            divide: gives what it makes of a part, which may be of another size than the others.
        """
        parts = [divide(part) for part in self._parts]
        each = torch.tensor(
            [len(made) // max(len(part), 1) for made, part in zip(parts, self._parts, strict=True)]
        )
        starts = torch.tensor([0, *accumulate(map(len, parts))])
        owners = self._owners(self._places)
        counts = each[owners]
        firsts = starts[owners] + (self._places - self._starts[owners]) * counts
        parents = torch.arange(len(self)).repeat_interleave(counts)
        within = torch.arange(len(parents)) - (counts.cumsum(0) - counts)[parents]
        return Images(parts, self.device, firsts[parents] + within, parents)

    @property
    def sizes(self) -> list[tuple[int, int]]:
        """The size (H, W) of each image: those of different parts may differ where they are only cut into tiles."""
        of_parts = [(part.shape[-2], part.shape[-1]) for part in self._parts]
        return [of_parts[owner] for owner in self._owners(self._places).tolist()]

    def __len__(self) -> int:
        return len(self._places)

    @property
    def shape(self) -> torch.Size:
        """[N, 3, H, W]."""
        return torch.Size((len(self), *self._parts[0].shape[1:]))

    def __getitem__(self, rows: Any) -> Tensor:
        """A slice, or indices or a mask [N] on the CPU -> uint8 [M, 3, H, W] on the device; a number -> [3, H, W]."""
        if isinstance(rows, int):
            return self[[range(len(self))[rows]]][0]
        if isinstance(rows, tuple):
            return self[:][rows]
        chosen = torch.arange(len(self))[rows]
        return self._noted(self._gathered(self._places[chosen], view=isinstance(rows, slice)), chosen)

    def batches(self, rows: Sequence[Tensor]) -> Iterator[Tensor]:
        """The images of several lists of rows, int64 [B] on the CPU each: uint8 [B, 3, H, W], one after the other.

        Of images that are all on the device, the rows are sent there together: no batch waits for it.
        """
        (first, *others), columns = self._parts, torch.cat([torch.empty(0, dtype=torch.int64), *rows])
        if others or first.device != self.device:
            yield from (self[each] for each in rows)
            return
        there = sent(self._places[columns], self.device).split([len(each) for each in rows])
        for each, places in zip(rows, there, strict=True):
            yield self._noted(first[places], each)

    def split(self, size: int) -> Iterator[Tensor]:
        """All of them in their order, uint8 [at most `size`, 3, H, W] each."""
        return (self[begin : begin + size] for begin in range(0, len(self), size))

    def __iter__(self) -> Iterator[Tensor]:
        return (images[0] for images in self.split(1))

    def identities(self, rows: Tensor) -> list[Identity]:
        """What the images of some rows, int64 [M] on the CPU, are known by.

        That is computed once for each part, and kept for as long as there is the part.
        """
        if self._origin is not None:
            return self._origin.identities(rows)
        places = self._places[rows]
        owners = self._owners(places)
        found = {owner: _identities_of_part(self._parts[owner]) for owner in owners.unique().tolist()}
        inside = (places - self._starts[owners]).tolist()
        return [found[owner][place] for owner, place in zip(owners.tolist(), inside, strict=True)]

    def _owners(self, places: Tensor) -> Tensor:
        """Which part the images at some places are in, int64 [M]."""
        return torch.bucketize(places, self._starts, right=True) - 1

    def _gathered(self, places: Tensor, view: bool) -> Tensor:
        """The images at some places, int64 [M], on the device; a view where that is wanted and they lie side by side."""
        home = self._parts[0]
        owners = self._owners(places)
        alone = len(self._parts) == 1 or bool((owners == owners[:1]).all())
        owner = int(owners[0]) if len(owners) else 0
        inside = places - self._starts[owners]
        if view and alone and bool((inside[1:] - inside[:-1] == 1).all()):
            begin = int(inside[0]) if len(inside) else 0
            found = self._parts[owner][begin : begin + len(inside)]
        elif alone:
            found = self._parts[owner][sent(inside, self._parts[owner].device)]
        else:
            found = torch.empty((len(places), *home.shape[1:]), dtype=self.dtype, device=home.device)
            for owner in owners.unique().tolist():
                mine = (owners == owner).nonzero().flatten()
                part = self._parts[owner]
                found[sent(mine, home.device)] = part[sent(inside[mine], part.device)].to(home.device)
        return sent(found, self.device)

    def _noted(self, found: Tensor, rows: Tensor) -> Tensor:
        """The tensor, of which `origin` then knows that it is these rows."""
        _ORIGINS[found] = self, rows, found._version
        return found

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):  # what Python asks for by itself
            raise AttributeError(name)
        return getattr(self[:], name)

    @classmethod
    def __torch_function__(
        cls,
        function: Callable[..., Any],
        types: Any,
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        def whole(given: Any) -> Any:
            return given[:] if isinstance(given, Images) else given

        return function(*tree_map(whole, args), **tree_map(whole, dict(kwargs or {})))


# Rows of images -> these images, the rows, and the tensor's version then.
_ORIGINS: Any = WeakTensorKeyDictionary()
# Parts -> what is made of them, or None for themselves -> their version then, and the identity of each image.
_IDENTITIES: Any = WeakTensorKeyDictionary()


def origin(images: Tensor) -> tuple[Images, Tensor] | None:
    """The images that a tensor [B, 3, H, W] was taken from, and which rows of them it is, int64 [B].

    None where that is not known, or the tensor was changed since.
    """
    found = _ORIGINS.get(images)
    return found[:2] if found is not None and found[2] == images._version else None


def part_of(images: Tensor, rows: slice) -> Tensor:
    """Some images of a tensor [B, 3, H, W], a view of which `origin` knows what it knows of the tensor."""
    known = origin(images)
    return images[rows] if known is None else known[0]._noted(images[rows], known[1][rows])


def identities(images: Tensor) -> list[Identity]:
    """What images [B, 3, H, W], uint8 or float32, are known by; computed anew unless `origin` knows them."""
    if (known := origin(images)) is not None:
        return known[0].identities(known[1])
    return [digests.of_bytes(image.data) for image in images.cpu().contiguous().numpy()]


def _identities_of_part(part: Tensor | Made) -> list[Identity]:
    source, how = (part, None) if isinstance(part, Tensor) else part.made_of()
    kept = _IDENTITIES.get(source)
    if kept is None:
        _IDENTITIES[source] = kept = {}
    if how not in kept or kept[how][0] != part._version:
        found = [each for some in part.split(_PIECE) for each in identities(some)]
        kept[how] = part._version, found
    return kept[how][1]


def _numbered_through(several: Sequence[Images]) -> Tensor | None:
    """The `parents` of several, one after the other; None where some have none."""
    begin, found = 0, []
    for images in several:
        if images.parents is None:
            return None
        found.append(images.parents + begin)
        begin += int(images.parents.max()) + 1 if len(images) else 0
    return torch.cat(found)


def sent(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor on a device; nothing waits until one of the CPU is on a GPU, unless it takes more than 256 MB.

    Such a one is not pinned. PyTorch pins the next power of two of a tensor's bytes, and keeps that for others: as much as is
    ever on its way together, which is a few batches where steps are asked for before the GPU has taken those before.

    Raises:
        PinnedMemoryError: there is not enough memory that can be pinned.
    """
    if tensor.device == device:
        return tensor
    if tensor.device.type == "cpu" and device.type == "cuda" and tensor.nbytes <= _PINNED:
        with pinning():
            tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=tensor.device.type == "cpu")


@dataclass(frozen=True, eq=False)
class ImageSet:
    """Images of one size, and what is known about each.

    Args:
        images: uint8 [N, 3, H, W], RGB.
        masks: bool [N, H, W], True on defects.
        kinds: `GOOD` or the kind of defect, one for each image.
        names: names to show to people, one for each image.
        unknown: indices of the defective images whose defect was not outlined: their masks mean nothing.
        contents: what was found when they were decoded; nothing where they come from elsewhere.
        defects: each defect by itself, where saturation areas are asked for; else none.
        tiling: how images are cut for detectors; None where they are not.
    """

    images: Tensor | Images
    masks: Tensor
    kinds: list[str]
    names: list[str]
    unknown: list[int] = field(default_factory=list)
    contents: Contents = field(default_factory=lambda: Contents("", None, []))
    defects: Sequence[Defect] = ()
    tiling: "Tiling | None" = None

    def __len__(self) -> int:
        return len(self.images)

    @property
    def pieces(self) -> Images:
        """What detectors learn and judge: the images, uint8 [N, 3, H, W], or all tiles of them."""
        return Images.of(self.images) if self.tiling is None else self.tiling.cut(self.images)

    @property
    def labels(self) -> Tensor:
        """bool [N], True where the image shows a defect."""
        return torch.tensor([kind != GOOD for kind in self.kinds], dtype=torch.bool)

    def same_size(self, other: "ImageSet") -> None:
        """Check that another set has images of the same size.

        Raises:
            UserError: it has not.
        """
        if other.images.shape[1:] != self.images.shape[1:]:
            raise different_sizes(self.names[0], self.masks.shape[1:], other.names[0], other.masks.shape[1:])

    @staticmethod
    def none(size: tuple[int, ...]) -> "ImageSet":
        """No images of a size (H, W)."""
        images = torch.empty(0, 3, *size, dtype=torch.uint8)
        return ImageSet(images, torch.empty(0, *size, dtype=torch.bool), [], [])

    @staticmethod
    def concatenate(sets: Sequence["ImageSet"]) -> "ImageSet":
        """The images of several sets in their order; images are not copied, masks are.

        Raises:
            UserError: the sets differ in image size.
        """
        sets = [part for part in sets if len(part)] or sets[:1]
        if len(sets) == 1:
            return sets[0]
        for other in sets[1:]:
            sets[0].same_size(other)
        begins = list(accumulate((len(part) for part in sets), initial=0))
        return ImageSet(
            images=Images.concatenate([part.images for part in sets]),
            masks=torch.cat([part.masks for part in sets]),
            kinds=[kind for part in sets for kind in part.kinds],
            names=[name for part in sets for name in part.names],
            unknown=[begin + at for begin, part in zip(begins, sets, strict=False) for at in part.unknown],
            defects=[
                replace(defect, image=begin + defect.image)
                for begin, part in zip(begins, sets, strict=False)
                for defect in part.defects
            ],
            tiling=sets[0].tiling,
        )
