"""Which images a buffer keeps: orders of a stage's images of which every beginning is a choice itself."""

from typing import Literal

import torch
from torch import Tensor

from clbench.data.images import Images
from clbench.methods.base import Detector
from clbench.methods.coreset import farthest_first

Selection = Literal["random", "reservoir", "herding", "kcenter"]
BY_FEATURES = ("herding", "kcenter")

_BATCH = 16  # images whose features are there at a time


def by_features(selection: Selection, detector: Detector, images: Images) -> Tensor:
    """The order in which images, uint8 [N, 3, H, W], are chosen by their `mean_features`, int64 [N]."""
    features = mean_features(detector, images)
    return herding(features) if selection == "herding" else kcenter(features)


@torch.no_grad()
def mean_features(detector: Detector, images: Images) -> Tensor:
    """Images, uint8 [N, 3, H, W] -> features of a detector's frozen networks, float32 [N, D], on the CPU.

    They are the means over all positions of each level, or over all tokens, one level after the other, as they are: levels
    of larger numbers weigh more.
    """
    found = []
    with detector.learning():
        for batch in images.on(detector.device).split(_BATCH):
            levels = [level for pyramid in detector.pyramids() for level in pyramid(batch)]
            means = [level.mean((2, 3) if level.ndim == 4 else 1) for level in levels]
            found.append(torch.cat(means, 1).float().cpu())
    return torch.cat(found) if found else torch.empty(0, 0)


def herding(features: Tensor) -> Tensor:
    """The order of herding (Rebuffi et al., 2017, Algorithm 4), int64 [N]: each next image brings the mean nearest to that of all.

    Computed in double precision; of equally good images the first is taken. Features are taken as they are, and not at unit
    length as there.

    Args:
        features: float [N, D].
    """
    features = features.double()
    mean, total = features.mean(0), torch.zeros(features.shape[1], dtype=torch.float64)
    free = torch.ones(len(features), dtype=torch.bool)
    order = []
    for count in range(1, len(features) + 1):
        distances = (count * mean - total - features).square().sum(1)
        chosen = int(distances.masked_fill(~free, torch.inf).argmin())
        free[chosen] = False
        total += features[chosen]
        order.append(chosen)
    return torch.tensor(order, dtype=torch.int64)


def kcenter(features: Tensor) -> Tensor:
    """The order of a greedy k-center, int64 [N]: it begins nearest to the mean, and goes on with what is farthest from those before.

    Args:
        features: float32 [N, D].
    """
    if not len(features):
        return torch.empty(0, dtype=torch.int64)
    start = int((features - features.mean(0)).square().sum(1).argmin())
    return farthest_first(features, len(features), start)
