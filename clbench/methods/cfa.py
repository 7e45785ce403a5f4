"""CFA: patches drawn to centroids of normal ones, by coupled hyperspheres (Lee et al., 2022)."""

import torch
from pydantic import NonNegativeFloat, PositiveFloat, PositiveInt
from torch import Tensor, nn

from clbench.backbones import Backbone, Layers
from clbench.errors import UserError
from clbench.methods.base import Detector, Prediction, Share
from clbench.methods.maps import Sigma, to_image_size
from clbench.methods.nearest import k_nearest
from clbench.methods.patches import neighbourhood_patches
from clbench.randomness import seed_for


class CFA(Detector):
    """A descriptor that learns to place normal patches close to the centroids (supplement, section 1.3).

    Args:
        backbone: where patch features come from.
        layers: levels of its pyramid; all are brought to the grid of the first.
        attracted: K, the nearest centroids that attract a patch, and that its score looks at.
        repelled: J, the next nearest, which repel it.
        alpha: how far within the hypersphere a repelling centroid may be at no cost.
        nu: of the soft boundary: the smaller, the more a patch outside its hypersphere costs.
        sigma: of the map's smoothing, pixels.
        epochs, batch_size, learning_rate, weight_decay: of AdamW with AMSGrad.
        held_out: share of normal images that no step sees, for thresholds, see `Detector`.
        seed: of the descriptor's first weights.

    Buffers:
        centroids: C, float32 [P, D], one for each position.
        tasks: int64, of how many tasks they are the average (Algorithm 3).
    """

    native = True
    rebuilt_by_replay = False  # Algorithm 3, which averages over tasks, is the paper's for replay

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

    def check(self, images: Tensor) -> None:
        positions = self.pyramid.check(images)[0][
            0, 0
        ].numel()  # patches are brought to the first level's grid
        wanted = self.attracted + self.repelled
        if wanted > positions:
            raise UserError(
                f"method.attracted={self.attracted} and method.repelled={self.repelled} are {wanted} centroids, and "
                f"images of this size have {positions}, one for each position: give less of them, or a larger "
                "dataset.resize"
            )

    def forget(self) -> None:
        self.centroids, self.tasks = self.centroids[:0], torch.zeros_like(self.tasks)

    def start_task(self, task: int, images: Tensor, stored: Tensor) -> None:
        """Algorithm 3: the running average over tasks of the mean description of every position."""
        mean = None
        for done, part in zip(
            range(0, len(images), self.batch_size), images.split(self.batch_size), strict=True
        ):
            total = self.describe(part).sum(0)
            mean = (
                total / len(part) if mean is None else mean + (total - len(part) * mean) / (done + len(part))
            )
            self.progress("centroids", done + len(part), len(images))
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
        """Images [B, 3, H, W] -> L_att + L_rep, with D the squared distance."""
        described = self.describe(images).flatten(0, 1)
        distances, _ = k_nearest(described, self.centroids, self.attracted + self.repelled)
        boundary = self.radius.square()
        attraction = (distances[:, : self.attracted] - boundary).clamp_min(0).mean()
        repulsion = (boundary - distances[:, self.attracted :] - self.alpha).clamp_min(0).mean()
        return (attraction + repulsion) / self.nu

    def forward(self, images: Tensor) -> Prediction:
        """The distance to the nearest centroid, weighted by how surely it is the nearest (softmin over K)."""
        described = self.describe(images)
        distances, _ = k_nearest(described.flatten(0, 1), self.centroids, self.attracted)
        distances = distances.sqrt()
        weighted = torch.softmax(-distances, 1)[:, 0] * distances[:, 0]
        maps = to_image_size(weighted.view(images.shape[0], *self._grid), images.shape[-2:], self.sigma)
        return Prediction(maps, maps.amax((1, 2)))

    def describe(self, images: Tensor) -> Tensor:
        """The descriptor's output phi for every patch, [B, P, D]."""
        patches = neighbourhood_patches(self.pyramid(images))
        batch, height, width, _ = patches.shape
        self._grid = height, width
        rows = torch.linspace(-1, 1, height, device=patches.device)
        columns = torch.linspace(-1, 1, width, device=patches.device)
        coordinates = torch.stack(torch.meshgrid(columns, rows, indexing="xy"), -1)
        placed = torch.cat([patches, coordinates.expand(batch, -1, -1, -1)], 3)
        return self.descriptor(placed.flatten(1, 2))
