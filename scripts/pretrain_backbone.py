"""Pretrain the packaged backbone on procedural images alone: no dataset, no other network's weights.

    python scripts/pretrain_backbone.py --steps 6000 --output clbench/weights/small.safetensors

The pretext is dense: each image is a collage of procedural textures with warped borders, under random
colour and light, with blemishes strewn over it. Every position is to tell the recipe it was drawn by, and
whether it is blemished. Levels 1 to 3 each predict both, so that each is discriminative on its own; and each
is to say the same of two views that differ by light, tint, noise and a few pixels, since a detector takes
whatever features differ by for an anomaly.
"""

import argparse
from pathlib import Path

import timm
import torch
from rich.progress import Progress
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

from clbench.data.textures import texture

MODEL = {"model_name": "resnet18", "features_only": True, "out_indices": (1, 2, 3)}
CHANNELS = (48, 96, 192, 384)
RECIPES = 400
VARIANTS = 4  # pictures kept of each recipe
SIDE = 160  # pixels of such a picture
CROP = 112  # pixels of what the network sees
SHIFT = 3  # pixels, at most, between two views of a collage
CANVAS = CROP + SHIFT  # pixels of a collage
PARTS = 3  # recipes in a collage
BATCH = 10  # collages


def collages(bank: Tensor, random: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Images [BATCH, 3, CANVAS, CANVAS]; the recipe at every position, int64; where it is blemished, 0 or 1."""
    recipes = torch.randint(RECIPES, (BATCH, PARTS), generator=random)
    variants = torch.randint(VARIANTS, (BATCH, PARTS), generator=random)
    zoom = CANVAS / SIDE * 2 ** (0.6 * torch.rand(BATCH * PARTS, 1, 1, generator=random) - 0.3)
    turn = 0.25 * torch.randn(BATCH * PARTS, generator=random)
    rotation = torch.stack([turn.cos(), -turn.sin(), turn.sin(), turn.cos()], 1).view(-1, 2, 2)
    shift = (1 - zoom) * (2 * torch.rand(BATCH * PARTS, 2, 1, generator=random) - 1)
    affine = torch.cat([rotation * zoom, shift], 2)
    pictures = bank[recipes, variants].view(-1, 3, SIDE, SIDE)
    where = F.affine_grid(affine, [len(pictures), 3, CANVAS, CANVAS], align_corners=False)
    parts = F.grid_sample(pictures, where, padding_mode="reflection", align_corners=False)
    parts = parts.view(BATCH, PARTS, 3, CANVAS, CANVAS)
    # Colours vary more than a recipe's own do, so that colour alone does not tell the recipe.
    shape = (BATCH, PARTS, 3, 1, 1)
    parts = parts * (1 + 0.25 * torch.randn(shape, generator=random)) + 0.12 * torch.randn(
        shape, generator=random
    )
    coarse = torch.randn(BATCH, PARTS, 3, 3, generator=random)
    rough = 0.12 * torch.randn(BATCH, PARTS, 14, 14, generator=random)
    fields = sum(F.interpolate(part, size=(CANVAS, CANVAS), mode="bicubic") for part in (coarse, rough))
    owner = fields.argmax(1)
    images = parts.gather(1, owner[:, None, None].expand(-1, -1, 3, -1, -1))[:, 0]
    images, blemished = blemish(images, random)
    return images, recipes.gather(1, owner.flatten(1)).view_as(owner), blemished


def view(whole: tuple[Tensor, Tensor, Tensor], random: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """A crop of collages and what belongs to it, under light, tint and noise of its own."""
    top, left = torch.randint(SHIFT + 1, (2,), generator=random).tolist()
    images, recipes, blemished = (part[..., top : top + CROP, left : left + CROP] for part in whole)
    light = 1 + 0.1 * torch.randn(BATCH, 1, 3, 3, generator=random)
    tint = 1 + 0.03 * torch.randn(BATCH, 3, 1, 1, generator=random)
    images = images * tint * F.interpolate(light, size=(CROP, CROP), mode="bicubic")
    noise = 0.03 * torch.rand(BATCH, 1, 1, 1, generator=random) * torch.randn(images.shape, generator=random)
    return (images + noise).clamp(0, 1), recipes, blemished


def blemish(images: Tensor, random: torch.Generator) -> tuple[Tensor, Tensor]:
    """Spots and strokes over images [B, 3, H, W]; the images, and where they are blemished, [B, 1, H, W]."""

    def draw(*shape: int) -> Tensor:
        return torch.rand(len(images), *shape, generator=random)

    def field(cells: int) -> Tensor:
        noise = torch.randn(len(images), 1, cells, cells, generator=random)
        return F.interpolate(noise, size=images.shape[-2:], mode="bicubic")

    grain = (8, 14, 24)[int(torch.randint(3, (), generator=random))]
    spots = field(grain)
    # Along lines where a field is zero, in pieces.
    strokes = -field(grain // 2).abs() - 4.0 * (field(6) < 0.3)
    score = torch.where(draw(1, 1, 1) < 0.5, spots, strokes).flatten(1)
    share = 0.002 + 0.05 * draw(1) ** 2
    rank = (len(score[0]) * (1 - share)).long().clamp(max=len(score[0]) - 1)
    alpha = (score > score.sort(1).values.gather(1, rank)).float().view(-1, 1, *images.shape[-2:])
    soft = torch.where(draw(1, 1, 1) < 0.5, alpha, F.avg_pool2d(alpha, 3, 1, 1)) * (0.4 + 0.6 * draw(1, 1, 1))
    paint = draw(3, 1, 1).expand_as(images)
    shade = images * torch.where(draw(1, 1, 1) < 0.5, 0.3 + 0.4 * draw(1, 1, 1), 1.4 + 0.6 * draw(1, 1, 1))
    foreign = images.roll(1, 0)
    kind = draw(1, 1, 1)
    fill = torch.where(kind < 0.33, paint, torch.where(kind < 0.66, shade, foreign))
    return images + soft * (fill - images), alpha


def dense_loss(logits: Tensor, recipes: Tensor, blemished: Tensor) -> Tensor:
    """Logits [B, RECIPES + 1, h, w] against the recipe in each position's middle, and whether it is blemished."""
    size = logits.shape[-2:]
    # A position near a border sees both sides; the recipe in its middle is asked of it all the same.
    recipe = F.interpolate(recipes[:, None].float(), size=size, mode="nearest-exact").long()[:, 0]
    share = (3 * F.adaptive_avg_pool2d(blemished, size)).clamp(max=1)
    return F.cross_entropy(logits[:, :-1], recipe) + 5 * F.binary_cross_entropy_with_logits(
        logits[:, -1:], share
    )


def disagreement(level: Tensor) -> Tensor:
    """How far the features [2 B, C, h, w] of two views are apart, relative to how far features are apart at all."""
    one, other = level.chunk(2)
    return (one - other).square().mean() / (2 * level.var((0, 2, 3)).mean() + 1e-6)


def main() -> None:
    """Train and write the weights; the same seed and steps give the same network on one machine."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=6000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path("clbench/weights/small.safetensors"))
    given = parser.parse_args()
    torch.manual_seed(given.seed)
    random = torch.Generator().manual_seed(given.seed)
    print(f"drawing {RECIPES * VARIANTS} textures")
    bank = torch.stack([torch.stack([texture(r, v, SIDE) for v in range(VARIANTS)]) for r in range(RECIPES)])
    network = timm.create_model(**MODEL, pretrained=False, channels=CHANNELS)
    heads = nn.ModuleList(nn.Conv2d(size, RECIPES + 1, 1) for size in CHANNELS[:3])
    parameters = [*network.parameters(), *heads.parameters()]
    optimizer = torch.optim.AdamW(parameters, weight_decay=0.02)
    mean, deviation = (
        torch.tensor(values).view(1, 3, 1, 1) for values in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    )
    network = network.to(memory_format=torch.channels_last)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, given.steps, pct_start=0.1)
    smooth = 0.0
    with Progress() as progress:
        row = progress.add_task("pretraining", total=given.steps)
        for step in range(1, given.steps + 1):
            whole = collages(bank, random)
            views = zip(view(whole, random), view(whole, random), strict=True)
            images, recipes, blemished = (torch.cat(both) for both in views)
            normal = ((images - mean) / deviation).contiguous(memory_format=torch.channels_last)
            with torch.autocast("cpu", torch.bfloat16):
                levels = network(normal)
                predicted = [head(level) for level, head in zip(levels, heads, strict=True)]
            losses = [
                dense_loss(logits.float(), recipes, blemished) + disagreement(level.float())
                for logits, level in zip(predicted, levels, strict=True)
            ]
            optimizer.zero_grad()
            sum(losses).backward()
            optimizer.step()
            schedule.step()
            smooth = 0.98 * smooth + 0.02 * sum(loss.item() for loss in losses)
            progress.update(row, advance=1, description=f"loss {smooth / (1 - 0.98**step):.2f}")
    print("last losses by level:", *(f"{loss.item():.2f}" for loss in losses))
    given.output.parent.mkdir(parents=True, exist_ok=True)
    halves = {
        name: (tensor.half() if tensor.is_floating_point() else tensor).contiguous()
        for name, tensor in network.state_dict().items()
    }
    save_file(halves, given.output)


if __name__ == "__main__":
    main()
