"""Evaluation of PatchCore after every stage of long streams: by plain products, by bounds too, and with what is kept.

    python -m benchmarks.evaluation [--tasks N ...]

Two categories of a stream are evaluated, learned at its beginning and in its middle, on 32 test images of 64 x 64 pixels each,
whose features are known. Banks are patches of normal images drawn at random in place of coresets.
"""

import argparse
import math
import time
from contextlib import nullcontext
from unittest import mock

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor
from torch.nn import functional as F
from typing_extensions import Self

from clbench import evaluation
from clbench.backbones import Backbone
from clbench.data.images import Images, ImageSet
from clbench.methods import nearest
from clbench.methods.base import silent
from clbench.methods.patchcore import PatchCore
from clbench.recollection import Recollection
from clbench.strategies.native import Native

TASKS = (10, 100)
MEMORY = 30_000  # patches, as in the paper
_SIDE = 64  # pixels
_PATCHES = (_SIDE // 4) ** 2  # of an image
_TESTED = 32  # images of a category


class _Counting:
    """Inside, counts the pairs of a patch and an entry that are searched, and of those that are only bounded."""

    def __enter__(self) -> Self:
        self.searched = self.bounded = 0
        self._before = nearest._Banks._distances, nearest._Banks._lower_means
        search, bound = self._before

        def searching(banks: nearest._Banks, queries: Tensor, bank: Tensor, only: int | None = None) -> tuple:
            self.searched += len(queries) * sum(banks._sizes if only is None else [banks._sizes[only]])
            return search(banks, queries, bank, only)

        def bounding(banks: nearest._Banks, queries: Tensor, first: int = 0) -> Tensor:
            self.bounded += queries.shape[0] * queries.shape[1] * sum(banks._sizes[first:])
            return bound(banks, queries, first)

        nearest._Banks._distances, nearest._Banks._lower_means = searching, bounding  # type: ignore[method-assign]
        return self

    def __exit__(self, *_: object) -> None:
        nearest._Banks._distances, nearest._Banks._lower_means = self._before  # type: ignore[method-assign]


def table(checkpoint: str | None = None, root: str | None = None, streams: tuple[int, ...] = TASKS) -> Table:
    """Passes of test images over the memory, CPU seconds of predictions and metrics; maps and scores must be equal.

    To rounding, where plain products alone have found them.
    """
    shown = Table(title=f"Evaluation of PatchCore, {MEMORY:,} patches", title_justify="left")
    titles = "tasks", "evaluations", "", "passes searched", "passes bounded", "CPU, s", "ratio"
    for title in titles:
        shown.add_column(title, justify="right")
    for tasks in streams:
        searched, bounded, seconds, evaluations = _stream(tasks)
        one = _TESTED * _PATCHES * MEMORY  # pairs of a category's pass over the memory
        for way, name in enumerate(("products alone", "anew", "kept")):
            shown.add_row(
                str(tasks),
                str(evaluations),
                name,
                f"{searched[way] / one:.1f}",
                f"{bounded[way] / one:.1f}",
                f"{seconds[way]:.1f}",
                f"{seconds[0] / seconds[way]:.1f}",
            )
    return shown


@torch.no_grad()
def _stream(tasks: int) -> tuple[list[int], list[int], list[float], int]:
    """Pairs searched and bounded and CPU seconds, each way, and the number of evaluations."""
    network = Backbone("resnet18", pretrained=False, arguments={"channels": [64, 128, 8, 8]})
    detector = PatchCore(network, layers=[1, 2], memory_size=MEMORY).eval()
    strategy, cpu = Native(detector), torch.device("cpu")
    tested = {task: _tested(task) for task in (0, tasks // 2)}
    for images in tested.values():
        detector.patches(images.images[:])  # so that features are known
    ways = None, None, Recollection(10**9)
    searches = nearest.Search(), nearest.Search(), nearest.Search()
    searched, bounded, seconds, evaluations = [0, 0, 0], [0, 0, 0], [0.0, 0.0, 0.0], 0
    for stage in track(range(tasks), f"{tasks} tasks", transient=True):
        share = MEMORY // (stage + 1)
        with detector.uncached():
            patches = detector.patches(_product(stage, 1 + share // _PATCHES)).flatten(0, 2)
        drawn = torch.randperm(len(patches), generator=torch.Generator().manual_seed(stage))
        detector.add_bank(patches[drawn[:share]], share)
        for task, images in tested.items():
            if task > stage:
                continue
            evaluations += 1
            found = []
            for way, recollection in enumerate(ways):
                detector._search = searches[way]  # none has what another has prepared
                never = mock.patch.multiple(nearest, _WORTH=math.inf, _LEAST=0) if way == 0 else nullcontext()
                with _Counting() as counted, never:
                    begin = time.process_time()
                    found.append(evaluation.predict(strategy, images, task, cpu, silent, recollection))
                    evaluation.metrics_of(found[-1], images)
                    seconds[way] += time.process_time() - begin
                searched[way] += counted.searched
                bounded[way] += counted.bounded
            plain, anew, kept = found
            assert torch.equal(kept.maps, anew.maps) and torch.equal(kept.scores, anew.scores)
            assert torch.allclose(plain.maps, anew.maps, rtol=1e-4)
    return searched, bounded, seconds, evaluations


def _product(number: int, count: int, first: int = 0) -> Tensor:
    """Images of a pattern with noise, uint8 [N, 3, 64, 64]."""
    random = torch.Generator().manual_seed(number)
    coarse = 40 + 160 * torch.rand(1, 3, 6, 6, generator=random)
    noise = 10 * torch.randn(
        count, 3, _SIDE, _SIDE, generator=random.manual_seed(10**6 * (1 + first) + number)
    )
    return (F.interpolate(coarse, (_SIDE, _SIDE), mode="bilinear") + noise).clamp(0, 255).byte()


def _tested(number: int) -> ImageSet:
    """Test images of a product, half of them with a bright square."""
    images = _product(number, _TESTED, first=1)
    masks = torch.zeros(_TESTED, _SIDE, _SIDE, dtype=torch.bool)
    masks[_TESTED // 2 :, 20:30, 24:34] = True
    images[masks[:, None].expand_as(images)] = 250
    kinds = ["good"] * (_TESTED // 2) + ["spot"] * (_TESTED // 2)
    return ImageSet(Images([images]), masks, kinds, [str(image) for image in range(_TESTED)])


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.evaluation",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--tasks", type=int, nargs="+", default=TASKS, help="lengths of streams")
    Console(width=120).print(table(streams=tuple(parser.parse_args().tasks)))
