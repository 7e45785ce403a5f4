"""UCAD: for each task a key, a prompt of a frozen transformer, and a memory of its patches (Liu et al., 2024)."""

import math
from collections.abc import Callable
from typing import Annotated, Any, Literal

import torch
from annotated_types import Ge
from pydantic import NonNegativeInt, PositiveFloat, PositiveInt
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn
from torch.nn import functional as F

from clbench.backbones import Backbone, unit
from clbench.data.images import Images
from clbench.errors import UserError
from clbench.methods.banks import Numbers, without
from clbench.methods.base import Detector, Prediction, Share
from clbench.methods.coreset import farthest_first
from clbench.methods.maps import Sigma, to_image_size
from clbench.precision import single_precision
from clbench.randomness import generator

_TEMPERATURE = 0.5  # that cosine similarities are divided by
_PROJECTED = 128  # numbers of a patch that a coreset's distances are taken from
_ROUNDS = 10  # of k-means
_POSITION = 0.5  # weight of a patch's place, its sides from 0 to 1, beside its mean colour


class UCAD(Detector):
    """Distance to the memorised patches of the task whose key is nearest, under that task's prompt.

    The paper's figures (MVTec AD, image AUROC 0.930) are not to be expected. The released code scores the test set after
    each epoch and keeps the best one; its scores are averaged over all epochs so far, each rescaled on the test set; and what
    tells the task is given the whole test set of one category at once. Here epochs are fixed, and each image is scored, and its
    task found, by itself; another clean version has 0.798 (Weatherly and Lin, 2026). Other differences:

    - the released code mixes up keys and values of its prompts in batches of more than one image: it reshapes where it would
      have to transpose. Here a block's first vector is a key and the second a value, for each image;
    - it has prompts for all 12 blocks, 18,432 numbers, of which those after the block that features come from do nothing:
      here they are left out, and half of the numbers is left;
    - it stretches features from 768 to 1,024 numbers by means of neighbours, in which nothing is learned: left out;
    - its segments come from SAM, a network with a licence and a download of its own, and are blended at their borders; here
      they are clusters, of which `segment_count` is our choice, and a patch is of one;
    - it chooses coresets by approximate distances to ten first entries; here they are exact, from one;
    - it normalises images as for ImageNet, where its network was trained with means and deviations of 0.5. A backbone of ours
      is given what it was trained with.

    Args:
        backbone: a vision transformer of timm whose attention takes a prefix.
        block: whose tokens are the features, numbered from 0, without the network's last normalisation.
        key_size: patches in a task's key.
        memory_size: patches in a task's memory.
        segments: what patches are clustered by: `tokens`, the frozen network's, or `colours`, means of patches beside
            their place.
        segment_count: clusters of an image.
        epochs, batch_size, learning_rate, gradient_clip: settings of the prompts' training with Adam.
        sigma: standard deviation of the map's Gaussian smoothing, in pixels.
        held_out: share of the normal images that are not learned from; thresholds are set on them.
        seed: of prompts, and of coresets.

    Buffers, of T tasks:
        keys: patches without a prompt, float32 [T, key_size, d].
        prompts: for each block up to `block` a key and a value, float32 [T, blocks, 2, d].
        knowledge: patches under the task's prompt, float32 [T, memory_size, d].

    Tasks with fewer patches than a key or memory has room for have some twice.
    """

    native = True
    chooses = True
    lasting_weights = False

    keys: Tensor
    prompts: Tensor
    knowledge: Tensor

    def __init__(
        self,
        backbone: Backbone,
        *,
        block: NonNegativeInt = 5,
        key_size: PositiveInt = 196,
        memory_size: PositiveInt = 196,
        segments: Literal["tokens", "colours"] = "tokens",
        segment_count: Annotated[int, Ge(2)] = 8,
        epochs: PositiveInt = 25,
        batch_size: PositiveInt = 8,
        learning_rate: PositiveFloat = 5e-4,
        gradient_clip: PositiveFloat | None = 1.0,
        sigma: Sigma = 4.0,
        held_out: Share = 0.0,
        seed: int = 0,
    ):
        super().__init__()
        self.encoder = backbone.blocks([[block]], f"method.block={block}")
        _check_attention(backbone, self.encoder.network)
        self.prefix: int = self.encoder.network.before  # type: ignore[assignment]
        width = self.encoder.channels[0]
        self.prompt = nn.Parameter(torch.zeros(block + 1, 2, width))
        self.key_size, self.memory_size = key_size, memory_size
        self.segments, self.segment_count = segments, segment_count
        self.epochs, self.batch_size, self.learning_rate = epochs, batch_size, learning_rate
        self.gradient_clip = gradient_clip
        self.sigma, self.held_out, self.seed = sigma, held_out, seed
        self.register_buffer("keys", torch.empty(0, key_size, width))
        self.register_buffer("prompts", torch.empty(0, block + 1, 2, width))
        self.register_buffer("knowledge", torch.empty(0, memory_size, width))
        self._numbers = Numbers()

    def forget(self) -> None:
        self.keys, self.prompts, self.knowledge = self.keys[:0], self.prompts[:0], self.knowledge[:0]

    def drop(self, task: int) -> None:
        self.keys, self.prompts, self.knowledge = (
            without(kept, task) for kept in (self.keys, self.prompts, self.knowledge)
        )

    def start_task(self, task: int, images: Images, stored: Images) -> None:
        """Begin with a new prompt, uniform in (-1, 1)."""
        drawn = torch.rand(self.prompt.shape, generator=generator(self.seed, "ucad prompt", task))
        self.prompt.copy_(2 * drawn - 1)

    def optimizer(self) -> torch.optim.Optimizer:
        return torch.optim.Adam([self.prompt], self.learning_rate, fused=True)

    def training_step(self, images: Tensor) -> Tensor:
        """Images [B, 3, H, W] -> the loss, a scalar: `contrast` of patches under the prompt, by segments."""
        features = self._under_the_prompt(images)
        self.note([self._placed(features, images)])
        with torch.no_grad(), single_precision(images.device):
            labels = clusters(self._segmented(images), self.segment_count)
        return contrast(features, labels)

    def _segmented(self, images: Tensor) -> Tensor:
        """Images [B, 3, H, W] -> what segments are clusters of, float32 [B, N, D]."""
        if self.segments == "tokens":
            return F.normalize(self.plain(images), dim=2)
        height, width = self.encoder.network.grid(images.shape[-2:])  # type: ignore[operator]
        colours = F.adaptive_avg_pool2d(unit(images), (height, width))
        rows = torch.linspace(0, _POSITION, height, device=images.device)[:, None].expand(height, width)
        columns = torch.linspace(0, _POSITION, width, device=images.device).expand(height, width)
        places = torch.stack([rows, columns]).expand(len(images), -1, -1, -1)
        return torch.cat([colours, places], 1).flatten(2).mT

    def outputs(self, images: Tensor) -> list[Tensor]:
        """Images [B, 3, H, W] -> their patches under the prompt that is being learned, float32 [B, d, h, w], in a list."""
        return [self._placed(self._under_the_prompt(images), images)]

    def _under_the_prompt(self, images: Tensor) -> Tensor:
        """Images [B, 3, H, W] -> their patches under the prompt that is being learned, float32 [B, N, d]."""
        return self.prompted(images, self.prompt.expand(len(images), -1, -1, -1))

    def _placed(self, patches: Tensor, images: Tensor) -> Tensor:
        """Patches of images, [B, N, d] -> [B, d, h, w]."""
        return patches.mT.unflatten(2, self.encoder.network.grid(images.shape[-2:]))  # type: ignore[operator]

    def consolidate(self, images: Images, stored: Images) -> None:
        """Add the task's key, prompt and memory: coresets of its patches, without the prompt and under it."""
        learned = Images.concatenate([images, stored])
        key = self._coreset(learned, self.plain, self.key_size, "key")
        memory = self._coreset(learned, self._under_the_prompt, self.memory_size, "knowledge")
        numbers = self._numbers.of(self.keys, len(self.keys))
        self.keys = torch.cat([self.keys, key[None]])
        self._numbers.one_more(self.keys, numbers)
        self.prompts = torch.cat([self.prompts, self.prompt.detach()[None]])
        self.knowledge = torch.cat([self.knowledge, memory[None]])

    def _coreset(self, images: Images, patches: Callable[[Tensor], Tensor], count: int, what: str) -> Tensor:
        """So many patches of images [M, 3, H, W], chosen farthest first after a random projection, float32 [count, d].

        All are computed, and of those only the projections kept; what is chosen is computed again.
        """
        random = generator(self.seed, f"ucad {what}", len(self.keys))
        width = self.encoder.channels[0]
        size = min(width, _PROJECTED)
        projection = (torch.randn(width, size, generator=random) / math.sqrt(size)).to(self.device)
        parts = []
        for part in images.split(self.batch_size):
            with self.mixed():
                found = patches(part).float()
            with single_precision(self.device):
                parts.append(found @ projection)
            self.progress(what, min(len(parts) * self.batch_size, len(images)), len(images))
        points = torch.cat(parts)  # [M, N, size]
        start = int(torch.randint(points.shape[0] * points.shape[1], (1,), generator=random))
        chosen = farthest_first(points.flatten(0, 1), count, start).cpu()
        chosen = chosen[torch.arange(count) % len(chosen)]
        of, place = chosen // points.shape[1], chosen % points.shape[1]
        taken = torch.empty(count, width, device=self.device)
        for rows in of.unique().split(self.batch_size):
            with self.mixed():
                found = patches(images[rows]).float()
            here = torch.isin(of, rows).nonzero()[:, 0]
            own = found[torch.searchsorted(rows, of[here]).to(self.device), place[here].to(self.device)]
            taken[here.to(self.device)] = own
        return taken

    def forward(self, images: Tensor) -> Prediction:
        """Images [B, 3, H, W] -> maps [B, H, W], the smoothed squared distances, and scores [B], the largest of them.

        The task is the one to whose key the patches without a prompt have the smallest sum of distances (equation 4).
        """
        recollection = self.recollection
        numbers = self._numbers.of(self.keys, len(self.keys)) if recollection else ()
        kept = recollection.get(images, numbers) if recollection else None
        sums = list(kept.tensors[0].T) if kept else []  # of distances to each key; those to earlier ones stay
        if len(sums) < len(self.keys):
            plain = self.plain(images)
            with single_precision(images.device):
                for key in self.keys[len(sums) :]:
                    sums.append(nearest_squared(plain, key.expand(len(images), -1, -1)).sqrt().sum(1))
        summed = torch.stack(sums, 1)
        chosen = summed.argmin(1)
        if kept and torch.equal(chosen, kept.tensors[0].argmin(1)):
            squared = kept.tensors[1]
        else:
            patches = self.prompted(images, self.prompts[chosen]).float()
            with single_precision(images.device):
                squared = nearest_squared(patches, self.knowledge[chosen])
        if recollection:
            recollection.put(images, numbers, summed, squared)
        grid = squared.unflatten(1, self.encoder.network.grid(images.shape[-2:]))  # type: ignore[operator]
        return Prediction(to_image_size(grid, images.shape[-2:], self.sigma), squared.amax(1), chosen)

    def plain(self, images: Tensor) -> Tensor:
        """Images [B, 3, H, W] -> their patches without a prompt, float32 [B, N, d]; each image's are computed once."""
        return self.encoder(images)[0][:, self.prefix :]

    def prompted(self, images: Tensor, prompts: Tensor) -> Tensor:
        """Images [B, 3, H, W] and a prompt for each, [B, blocks, 2, d] -> their patches under it, float32 [B, N, d]."""
        network: Any = self.encoder.network.model
        tokens = network.patch_embed(self.encoder.normalisation(images))
        tokens = network.norm_pre(network.patch_drop(network._pos_embed(tokens)))
        for number, block in enumerate(network.blocks):
            attended = attention(block.attn, block.norm1(tokens), prompts[:, number])
            tokens = tokens + block.drop_path1(block.ls1(attended))
            tokens = tokens + block.drop_path2(block.ls2(block.mlp(block.norm2(tokens))))
        return tokens[:, self.prefix :].float()


def attention(layer: Any, tokens: Tensor, pair: Tensor) -> Tensor:
    """A layer of timm's attention whose keys and values begin with one token more (prefix tuning).

    Args:
        tokens: [B, N, d].
        pair: for each image a key and a value, [B, 2, d].
    """
    heads = layer.num_heads
    queries, keys, values = layer.qkv(tokens).unflatten(2, (3, heads, -1)).permute(2, 0, 3, 1, 4)
    queries, keys = layer.q_norm(queries), layer.k_norm(keys)
    key, value = (
        pair.to(keys.dtype).unflatten(2, (heads, -1))[:, :, :, None].unbind(1)
    )  # [B, heads, 1, d / heads]
    found = F.scaled_dot_product_attention(queries, torch.cat([key, keys], 2), torch.cat([value, values], 2))
    return layer.proj(layer.norm(found.transpose(1, 2).flatten(2)))


def contrast(features: Tensor, labels: Tensor) -> Tensor:
    """The structure-based contrastive loss, a scalar, as the released code has it.

    Over all pairs of an image's patches, each with itself too: minus their similarity where they are of one segment, else
    its exponential; a similarity is a cosine over 0.5.

    Args:
        features: [B, N, d].
        labels: segments, int64 [B, N].
    """
    with single_precision(features.device):
        direction = F.normalize(features.float(), dim=2)
        similarity = direction @ direction.mT / _TEMPERATURE
        together = labels[:, :, None] == labels[:, None]
        return torch.where(together, -similarity, similarity.exp()).mean()


def clusters(points: Tensor, count: int) -> Tensor:
    """k-means of each image's points, float32 [B, N, D] -> clusters, int64 [B, N]: the same for the same points.

    The first centers are chosen farthest first, from the point that is farthest from the mean on.
    """
    count = min(count, points.shape[1])
    each = torch.arange(len(points), device=points.device)
    distances = (points - points.mean(1, keepdim=True)).square().sum(2)
    chosen: list[Tensor] = []
    for _ in range(count):
        center = points[each, distances.argmax(1)]
        new = (points - center[:, None]).square().sum(2)
        distances = torch.minimum(distances, new) if chosen else new
        chosen.append(center)
    centers, numbers = torch.stack(chosen, 1), torch.arange(count, device=points.device)
    for _ in range(_ROUNDS):
        labels = _closest(points, centers)
        members = (labels[..., None] == numbers).to(points.dtype)  # [B, N, count]
        sizes = members.sum(1)[..., None]
        centers = torch.where(sizes > 0, members.mT @ points / sizes.clamp(min=1), centers)
    return _closest(points, centers)


def _closest(points: Tensor, others: Tensor) -> Tensor:
    """For each of the points [B, N, D] the nearest of others [B, M, D], int64 [B, N]."""
    return torch.baddbmm(others.square().sum(2)[:, None], points, others.mT, alpha=-2).argmin(2)


def nearest_squared(points: Tensor, others: Tensor) -> Tensor:
    """Squared distances of points [B, N, D] to the nearest of others [B, M, D], [B, N]: from differences."""
    closest = _closest(points, others)[..., None].expand(-1, -1, points.shape[2])
    return (points - others.gather(1, closest)).square().sum(2)


def _check_attention(backbone: Backbone, network: nn.Module) -> None:
    """Check that the attention of a pyramid's network takes a prefix.

    Raises:
        UserError: it is of another kind.
    """
    blocks: list[nn.Module] = list(getattr(network.model, "blocks", []))  # type: ignore[arg-type]
    plain = isinstance(network.model, VisionTransformer) and all(type(block) is Block for block in blocks)
    if not plain or any(getattr(block.attn, "gate", None) is not None for block in blocks):
        raise UserError(
            f"backbone.name={backbone.name} has blocks or attention of another kind than prompts are made for (rotary "
            "positions, for instance): take backbone=vit_base_patch16, dinov2_small or dinov2_base"
        )
