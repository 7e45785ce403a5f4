"""Exact nearest neighbours against plain products in blocks: patches of ResNet-18 and random features.

    python -m benchmarks.nearest [--queries N] [--features patches|random] [--checkpoint FILE] [--root FOLDER]

Ten coresets of 3,000 patches, and the same 30,000 as one: each from some of a category's training images; queries are
patches of test images. Both ways get the same queries in turn, 16 images at a time as in evaluation; preparing counts.
"""

import argparse
import itertools
import math
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor

from clbench.backbones import Backbone
from clbench.data import stream
from clbench.data.mvtec import MVTec
from clbench.data.samples import Geometry
from clbench.data.synthetic import Synthetic
from clbench.methods.coreset import farthest_first
from clbench.methods.nearest import Search
from clbench.methods.patchcore import PatchCore

BANKS, ENTRIES = 10, 3000
IMAGES, PATCHES = 16, 784  # of a call, and of an image
LEARNED = 12  # images of a bank: 9,408 patches
WIDE = 1536  # features of Wide ResNet-50-2's levels 2 and 3
QUERIES = 62_720

Ways = tuple[Callable[[Tensor], tuple[Tensor, ...]], Callable[[Tensor], tuple[Tensor, ...]]]


def plain(queries: Tensor, bank: Tensor, sizes: list[int]) -> tuple[Tensor, Tensor]:
    """Nearest entries by products in blocks of 16 MB and minima of 64 at a time, with distances from differences."""
    norms = bank.square().sum(1)
    distances = torch.empty(len(sizes), len(queries))
    rows = torch.empty(len(sizes), len(queries), dtype=torch.int64)
    width = 64 * math.ceil(max(sizes) / 64)
    memory = torch.full((max(1, (1 << 22) // max(width, queries.shape[1])), width), math.inf)
    for index, end in enumerate(itertools.accumulate(sizes)):
        begin = end - sizes[index]
        memory[:, sizes[index] :] = math.inf
        for first in range(0, len(queries), len(memory)):
            part = queries[first : first + len(memory)]
            block = memory[: len(part)]
            torch.addmm(norms[begin:end], part, bank[begin:end].T, alpha=-2, out=block[:, : sizes[index]])
            groups = block.view(len(part), -1, 64)
            group = groups.amin(2).argmin(1)
            found = 64 * group + groups[torch.arange(len(part)), group].argmin(1) + begin
            rows[index, first : first + len(part)] = found
            distances[index, first : first + len(part)] = (part - bank[found]).square_().sum(1).sqrt_()
    return distances, rows


def plain_closest(images: Tensor, bank: Tensor, sizes: list[int]) -> tuple[Tensor, ...]:
    """The bank with the smallest mean distance of each image [B, P, D], and distances and rows in it."""
    distances, rows = (
        found.view(-1, *images.shape[:2]) for found in plain(images.flatten(0, 1), bank, sizes)
    )
    selected = distances.mean(2).argmin(0)
    each = torch.arange(len(images))
    return selected, distances[selected, each], rows[selected, each]


def patches(checkpoint: str | None, root: str | None) -> tuple[Tensor, Callable[[], Iterator[Tensor]]]:
    """Banks float32 [10 * 3,000, 384] one after the other, and batches of queries [16, 784, 384] without end."""
    dataset = (
        MVTec(root) if root else Synthetic(train=LEARNED, test_good=IMAGES // 2, test_defect=IMAGES // 2)
    )
    detector = PatchCore(
        Backbone("resnet18", pretrained=False, checkpoint=checkpoint, feature_memory_mb=0), layers=[2, 3]
    )
    names = sorted(dataset.categories)
    with tempfile.TemporaryDirectory() as cache:
        tasks = stream.load_tasks(
            dataset, [[name] for name in names], Geometry(256, 224), Path(cache), lambda *_: None
        )
        learned = [torch.as_tensor(task.train.images).clone() for task in tasks]
        tested = [torch.as_tensor(task.categories[0].test.images).clone() for task in tasks]

    @torch.no_grad()
    def features(images: Tensor) -> Tensor:
        return detector.patches(images).flatten(1, 2)

    banks = []
    for index in track(range(BANKS), "coresets", transient=True):
        # Where there are fewer than ten categories, a category's next images.
        first = LEARNED * (index // len(learned))
        points = features(learned[index % len(learned)][first : first + LEARNED]).flatten(0, 1)
        banks.append(points[farthest_first(points, ENTRIES)])

    def queries() -> Iterator[Tensor]:
        for batch in itertools.count():
            images = tested[batch % len(tested)]
            at = torch.arange(IMAGES) + IMAGES * (batch // len(tested))
            yield features(images[at % len(images)])

    return torch.cat(banks), queries


def measured(ways: Ways, queries: Iterator[Tensor], count: int, title: str) -> tuple[float, float, str]:
    """Microseconds a query of both ways, and for how many queries of a bank their rows and distances differ."""
    times, rows, distances, farther = [0.0, 0.0], 0, 0, 0
    batches = math.ceil(count / (IMAGES * PATCHES))
    for batch in track(range(batches), title, transient=True):
        given = next(queries)
        found: list[tuple[Tensor, ...]] = [(), ()]
        for way in (0, 1) if batch % 2 else (1, 0):
            begin = time.perf_counter()
            found[way] = ways[way](given)
            times[way] += time.perf_counter() - begin
        (*_, before, theirs), (*_, after, ours) = found
        rows += int((theirs != ours).sum())
        distances += int((before != after).sum())
        farther += int((after > before).sum())
    each = 1e6 / (batches * IMAGES * PATCHES)
    return each * times[0], each * times[1], f"{rows:,}, {distances:,}, {farther:,}"


def table(
    checkpoint: str | None = None, root: str | None = None, count: int = QUERIES, features: str | None = None
) -> Table:
    """Microseconds a query in all banks, by plain products and as PatchCore searches, and whether results are equal."""
    random = torch.Generator().manual_seed(0)
    ten, one = [ENTRIES] * BANKS, [ENTRIES * BANKS]

    def normal() -> Iterator[Tensor]:
        while True:
            yield torch.randn(IMAGES, PATCHES, WIDE, generator=random)

    def nearest(entries: Tensor, sizes: list[int]) -> Ways:
        search = Search()
        return (
            lambda given: plain(given.flatten(0, 1), entries, sizes),
            lambda given: search(given.flatten(0, 1), entries, sizes),
        )

    def closest(entries: Tensor, sizes: list[int]) -> Ways:
        search = Search()
        return (
            lambda given: plain_closest(given, entries, sizes),
            lambda given: search.closest_bank(given, entries, sizes),
        )

    rows: list[tuple] = []
    if features != "random":
        bank, images = patches(checkpoint, root)
        name = f"ResNet-18 ({Path(checkpoint).name if checkpoint else 'random weights'}), {bank.shape[1]}"
        rows.append((name, images, bank, ten, closest, "in the closest bank"))
        rows.append((name, images, bank, ten, nearest, "in each bank"))
        rows.append((name, images, bank, one, nearest, "in the bank"))
    if features != "patches":
        wide = torch.randn(BANKS * ENTRIES, WIDE, generator=random)
        rows.append((f"random, {WIDE}", normal, wide, ten, nearest, "in each bank"))
        rows.append((f"random, {WIDE}", normal, wide, one, nearest, "in the bank"))
    shown = Table(
        "features", "entries", "found", "plain, us", "ours, us", "ratio", "differ: rows, distances, ours farther",
        title=f"Nearest neighbours, {count:,} queries, {torch.get_num_threads()} threads",
    )  # fmt: skip
    for name, batches, entries, sizes, ways, found in rows:
        label = f"{sizes[0]:,}" + (f" x {len(sizes)}" if len(sizes) > 1 else "")
        before, after, differ = measured(ways(entries, sizes), batches(), count, f"{name}, {label}")
        ratio = before / after
        shown.add_row(name, label, found, f"{before:.1f}", f"{after:.1f}", f"{ratio:.2f}", differ)
    return shown


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.nearest",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--queries", type=int, default=QUERIES)
    parser.add_argument("--features", choices=["patches", "random"], help="these alone")
    parser.add_argument("--checkpoint", help="weights of timm's resnet18, .safetensors or .pth")
    parser.add_argument("--root", help="a folder of categories in the MVTec AD layout")
    options = parser.parse_args()
    Console(width=120).print(table(options.checkpoint, options.root, options.queries, options.features))
