"""Training images for the benchmarks: a folder's where one is given, else synthetic ones."""

import tempfile
from pathlib import Path

import torch
from torch import Tensor

from clbench.data import stream
from clbench.data.mvtec import MVTec
from clbench.data.samples import Geometry
from clbench.data.synthetic import Synthetic


def training_images(root: str | None, count: int, size: int) -> Tensor:
    """uint8 [count, 3, size, size], of one category."""
    dataset = MVTec(root) if root else Synthetic(train=count, test_good=1, test_defect=1)
    category = dataset.categories[0]
    with tempfile.TemporaryDirectory() as cache:
        task = stream.load_tasks(dataset, [[category]], Geometry(256, size), Path(cache), lambda *_: None)[0]
        images = torch.as_tensor(task.train.images).clone()
    return images.repeat(-(-count // len(images)), 1, 1, 1)[:count]
