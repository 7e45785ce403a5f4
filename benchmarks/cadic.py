"""CADIC's update of its coreset: against the plain loop, which computes all distances anew for each replacement."""

import time

import torch
from rich.progress import track
from rich.table import Table
from torch import Tensor

from clbench.methods.cadic import Coreset

CASES = (  # entries, numbers of each, tokens of an image, and replacements that are waited for
    (2_500, 768, 784, 50),
    (10_000, 384, 784, 20),
)


def plain(entries: Tensor, candidates: Tensor, most: int) -> int:
    """The rule as it is written, with all distances by one product: replacements, `most` of them at most."""
    left = candidates.clone()
    norms = entries.square().sum(1)
    replaced = 0
    for _ in track(range(most), f"plain loop, {len(entries):,} entries", transient=True):
        distances = torch.addmm(norms, left, entries.T, alpha=-2).amin(1) + left.square().sum(1)
        gaps = torch.addmm(norms, entries, entries.T, alpha=-2).add_(norms[:, None])
        gaps.fill_diagonal_(torch.inf)
        farthest, pair = int(distances.argmax()), int(gaps.argmin())
        place = min(divmod(pair, len(entries)))
        if not distances[farthest] > gaps.view(-1)[pair]:
            break
        entries[place] = left[farthest]
        norms[place] = entries[place] @ entries[place]
        left = torch.cat([left[:farthest], left[farthest + 1 :]])
        replaced += 1
    return replaced


def stream(size: int, images: int, tokens: int) -> Tensor:
    """Tokens of images that are alike, float32 [images * tokens, size]: normal around normal centers."""
    random = torch.Generator().manual_seed(0)
    centers = torch.randn(200, size, generator=random)
    which = torch.randint(200, (images * tokens,), generator=random)
    return centers[which] + 0.5 * torch.randn(images * tokens, size, generator=random)


def table(checkpoint: str | None = None, root: str | None = None) -> Table:
    """Milliseconds of a replacement in each way, their ratio, and whether the coresets are the same."""
    shown = Table(
        "coreset", "plain loop", "clbench", "ratio", "same", "whole image", "its replacements",
        title="CADIC: ms for a replacement, among 784 candidates",
    )  # fmt: skip
    for entries, size, tokens, most in CASES:
        points = stream(size, -(-entries // tokens) + 1, tokens)
        kept, candidates = points[:entries], points[-tokens:]
        begin = time.perf_counter()
        expected = kept.clone()
        replaced = plain(expected, candidates, most)
        slow = (time.perf_counter() - begin) / max(replaced, 1)
        coreset = Coreset(kept.clone())
        begin = time.perf_counter()
        coreset.update(candidates, replaced)
        quick = (time.perf_counter() - begin) / max(replaced, 1)
        same = torch.equal(coreset.entries, expected)
        coreset = Coreset(kept.clone())
        begin = time.perf_counter()
        count = coreset.update(candidates)
        whole = time.perf_counter() - begin
        shown.add_row(
            f"{entries:,} x {size}",
            f"{1000 * slow:.1f}",
            f"{1000 * quick:.2f}",
            f"{slow / quick:.0f}",
            "yes" if same else "no",
            f"{whole:.2f} s",
            str(count),
        )
    return shown
