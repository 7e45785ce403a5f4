"""CFA: patches drawn to centroids of normal ones, by coupled hyperspheres (Lee et al., 2022)."""

from collections.abc import Mapping
from typing import Any

import torch
from pydantic import NonNegativeFloat, PositiveFloat, PositiveInt
from torch import Tensor, nn

from clbench.backbones import Backbone, Layers
from clbench.data.images import Images
from clbench.errors import UserError
from clbench.methods.base import Detector, Prediction, Share
from clbench.methods.maps import Sigma, to_image_size
from clbench.methods.nearest import k_nearest
from clbench.methods.patches import neighbourhood_patches
from clbench.methods.tables import table
from clbench.randomness import seed_for


class CFA(Detector):
    """A descriptor that learns to place normal patches close to the centroids (supplement, section 1.3).

    The descriptor may be in half precision; centroids and distances are in single precision.

    Args:
        backbone: where patch features come from.
        layers: levels of its pyramid; all are brought to the grid of the first.
        attracted: K, the nearest centroids that attract a patch, and that its score looks at.
        repelled: J, the next nearest, which repel it.
        alpha: margin of the repulsion: a repelling centroid costs nothing from a squared distance of
            r^2 - alpha on, with r the learned radius.
        nu: what the loss is divided by.
        sigma: standard deviation of the map's Gaussian smoothing, in pixels.
        epochs, batch_size, learning_rate, weight_decay: settings of the training, with AdamW and AMSGrad.
        held_out: share of the normal images that training does not see; thresholds are set on them.
        seed: seed of the descriptor's first weights.

    Buffers:
        centroids: the memory bank C, float32 [P, D]: one centroid for each position of the grid.
        tasks: number of tasks that the centroids are the average of, int64 scalar (Algorithm 3).
    """

    native = True
    needs_only_features = True
    rebuilt_by_replay = False  # under replay too, the paper averages the centroids over tasks (Algorithm 3)

    centroids: Tensor
    tasks: Tensor

    def __init__(
        self,
        backbone: Backbone,
        *,
        layers: Layers,
        attracted: PositiveInt = 3,
        repelled: PositiveInt = 3,
        alpha: NonNegativeFloat = 0.1,
        nu: PositiveFloat = 1e-3,
        sigma: Sigma = 4.0,
        epochs: PositiveInt = 30,
        batch_size: PositiveInt = 4,
        learning_rate: PositiveFloat = 1e-3,
        weight_decay: NonNegativeFloat = 5e-4,
        held_out: Share = 0.0,
        seed: int = 0,
    ):
        super().__init__()
        self.pyramid = backbone.pyramid(layers)
        self.attracted, self.repelled = attracted, repelled
        self.alpha, self.nu, self.sigma = alpha, nu, sigma
        self.epochs, self.batch_size = epochs, batch_size
        self.learning_rate, self.weight_decay = learning_rate, weight_decay
        self.held_out = held_out
        size = sum(self.pyramid.channels)
        torch.manual_seed(seed_for(seed, "cfa weights"))
        self.descriptor = nn.Linear(size + 2, size)  # a 1x1 convolution over features and their coordinates
        self.radius = nn.Parameter(torch.tensor(1e-5))
        self.register_buffer("centroids", torch.empty(0, size))
        self.register_buffer("tasks", torch.tensor(0))

    @classmethod
    def why_no_tiles(cls, settings: Mapping[str, Any]) -> str:
        return "its centroids are means over images at each place"

    def check(self, images: Tensor) -> None:
        grid = self.pyramid.check(images)[0].shape[-2:]  # all levels are brought to the first one's grid
        positions = grid.numel()
        wanted = self.attracted + self.repelled
        if wanted > positions:
            raise UserError(
                f"method.attracted={self.attracted} and method.repelled={self.repelled} are {wanted} centroids, and "
                f"images of this size have {positions}, one for each position: give less of them, or a larger "
                "dataset.resize"
            )

    def forget(self) -> None:
        self.centroids, self.tasks = self.centroids[:0], torch.zeros_like(self.tasks)

    def start_task(self, task: int, images: Images, stored: Images) -> None:
        """Update the centroids from the task's images, uint8 [N, 3, H, W] (supplement, Algorithm 3).

        A task's centroids are the mean of the images' descriptions at each position; the bank is the running
        average of them over tasks.
        """
        mean, done = None, 0
        for part in images.split(self.batch_size):
            total = self.describe(part).sum(0)
            done += len(part)
            mean = total / done if mean is None else mean + (total - len(part) * mean) / done
            self.progress("centroids", done, len(images))
        assert mean is not None
        seen = int(self.tasks)
        self.centroids = self.centroids * (seen / (seen + 1)) + mean / (seen + 1) if seen else mean
        self.tasks = self.tasks + 1

    def optimizer(self) -> torch.optim.Optimizer:
        parameters = [*self.descriptor.parameters(), self.radius]
        return torch.optim.AdamW(
            parameters, self.learning_rate, weight_decay=self.weight_decay, amsgrad=True, fused=True
        )

    def training_step(self, images: Tensor) -> Tensor:
        """Images [B, 3, H, W] -> the loss, a scalar: (L_att + L_rep) / nu (supplement, section 1.3.2).

        D is the squared Euclidean distance.
        """
        described = self.describe(images)
        self.note([self._placed(described)])
        described = described.flatten(0, 1)
        distances, _ = k_nearest(described, self.centroids, self.attracted + self.repelled)
        boundary = self.radius.square()
        attraction = (distances[:, : self.attracted] - boundary).clamp_min(0).mean()
        repulsion = (boundary - distances[:, self.attracted :] - self.alpha).clamp_min(0).mean()
        return (attraction + repulsion) / self.nu

    def forward(self, images: Tensor) -> Prediction:
        """Images [B, 3, H, W] -> maps [B, H, W], and scores [B], their maxima (supplement, section 1.3.3).

        At each position: the distance to the nearest centroid, times its softmin over the K nearest.
        """
        described = self.describe(images)
        distances, _ = k_nearest(described.flatten(0, 1), self.centroids, self.attracted)
        distances = distances.sqrt()
        weighted = torch.softmax(-distances, 1)[:, 0] * distances[:, 0]
        maps = to_image_size(weighted.view(images.shape[0], *self._grid), images.shape[-2:], self.sigma)
        return Prediction(maps, maps.amax((1, 2)))

    def outputs(self, images: Tensor) -> list[Tensor]:
        """Images [B, 3, H, W] -> the adapted features of patches, [B, D, h, w], in a list."""
        return [self._placed(self.describe(images))]

    def _placed(self, described: Tensor) -> Tensor:
        """What `describe` gave last, [B, P, D], as maps [B, D, h, w]."""
        return described.mT.unflatten(2, self._grid)

    def describe(self, images: Tensor) -> Tensor:
        """Images [B, 3, H, W] -> the adapted features phi(p_t) of every patch, float32 [B, P, D]."""
        patches = neighbourhood_patches(self.pyramid(images))
        batch, height, width, _ = patches.shape
        self._grid = height, width
        coordinates = table(_coordinates, height, width, device=patches.device)
        placed = torch.cat([patches, coordinates.expand(batch, -1, -1, -1)], 3)
        return self.descriptor(placed.flatten(1, 2)).float()


def _coordinates(height: int, width: int) -> Tensor:
    """x and y of each position of a grid, from -1 to 1: [height, width, 2]."""
    columns, rows = torch.linspace(-1, 1, width), torch.linspace(-1, 1, height)
    return torch.stack(torch.meshgrid(columns, rows, indexing="xy"), -1)
