"""PaDiM's map in GFLOP/s, against the machine's own matrix products."""

import time
from collections.abc import Callable

import torch
from rich.table import Table

from clbench.methods.padim import mahalanobis


def seconds(call: Callable[[], object], repeats: int = 5) -> float:
    """The shortest of some calls, after one that warms up."""
    call()
    times = []
    for _ in range(repeats):
        begin = time.perf_counter()
        call()
        times.append(time.perf_counter() - begin)
    return min(times)


def table(checkpoint: str | None = None, root: str | None = None) -> Table:
    """GFLOP/s of the map, and of the same products alone."""
    random = torch.Generator().manual_seed(0)
    shown = Table("operation", "GFLOP/s", "of plain products", title="Against matrix products (GEMM)")

    # 56 x 56 positions, 350 features, 16 images: PaDiM at the paper's size.
    factor = torch.randn(3136, 350, 350, generator=random).tril_()
    factor.diagonal(dim1=1, dim2=2).copy_(100 * torch.ones(350))
    embedding, mean = torch.randn(3136, 350, 16, generator=random), torch.randn(3136, 350, generator=random)

    products = torch.empty_like(embedding)
    flops = 2 * 3136 * 350 * 350 * 16  # a triangular solve needs half of them
    gemm = flops / seconds(lambda: torch.bmm(factor, embedding, out=products))
    found = flops / seconds(lambda: mahalanobis(embedding, mean, factor))
    shown.add_row("batched GEMM, 3,136 x (350 x 350 x 16)", f"{gemm / 1e9:.0f}", "")
    shown.add_row("PaDiM's map, 3,136 positions, 16 images", f"{found / 1e9:.0f}", f"{found / gemm:.0%}")
    return shown
