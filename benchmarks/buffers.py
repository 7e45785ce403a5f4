"""What a buffer's storages make of 40 images of 256 pixels: bytes, what is lost, and milliseconds on one core, best of three."""

import time
from collections.abc import Callable

import torch
from rich.table import Table

from benchmarks.images import training_images
from clbench.data.images import Images
from clbench.strategies.storage import Compressed, Small, Storage

COUNT, SIDE = 40, 256


def best(call: Callable[[], object]) -> float:
    """Milliseconds an image, the least of three calls."""
    seconds = []
    for _ in range(3):
        begin = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - begin)
    return 1000 * min(seconds) / COUNT


def table(checkpoint: str | None = None, root: str | None = None) -> Table:
    """A row for each storage. The deviation is the root mean square over pixels, of 255."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    images = training_images(root, COUNT, SIDE)
    shown = Table(
        "storage", "bytes an image", "smaller", "deviation", "encode, ms", "decode, ms", title="Stored images"
    )
    storages: dict[str, Storage] = {
        **{f"jpeg {quality}": Compressed("jpeg", quality) for quality in (50, 75, 90)},
        **{f"webp {quality}": Compressed("webp", quality) for quality in (50, 75, 90)},
        **{f"small, scale {scale}": Small(scale) for scale in (2, 4)},
    }
    for name, storage in storages.items():
        storage.see(images)
        stored = storage.store(Images.of(images))
        size = float(stored.costs().double().mean())
        deviation = float((Images.of(stored.images)[:].double() - images).square().mean().sqrt())
        encode = best(lambda storage=storage: storage.store(Images.of(images)))  # type: ignore[misc]
        decode = best(lambda stored=stored: Images.of(stored.images)[:])  # type: ignore[misc]
        smaller = images[0].numel() / size
        shown.add_row(
            name, f"{size:,.0f}", f"{smaller:.1f} times", f"{deviation:.1f}", f"{encode:.1f}", f"{decode:.1f}"
        )
    torch.set_num_threads(threads)
    return shown
