"""SuperSimpleNet's training against anomalib's: both loops with the same draws, and the draws of each.

    python3 -m venv ENV && ENV/bin/pip install anomalib==2.7.0 .
    PYTHONPATH=$PWD ENV/bin/python -m benchmarks.same_training
    PYTHONPATH=$PWD ENV/bin/python -m benchmarks.same_training --root MVTEC --category bottle --checkpoint resnet18.safetensors

First our loop and Lightning's train the same network from the same weights, with the same batches, noise and masks: on random
images, or on a category, of which the metrics of both are shown then. What they end with is compared by the norm of the
difference, of weights that of how far training moved them. Then what each side draws for itself is compared over many draws.
Where both agree, results of two trainings differ by chance alone.
"""

import argparse
import itertools
import sys
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import cv2
import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from benchmarks.anomalib_worker import use_local_weights
from benchmarks.running import composed
from benchmarks.same_networks import copy_supersimplenet, layers_of_supersimplenet
from benchmarks.same_networks_tokens import Pairs, without_weights
from clbench import assembly, evaluation
from clbench.backbones import Backbone
from clbench.data.images import Images, ImageSet
from clbench.methods import supersimplenet
from clbench.methods.base import Prediction
from clbench.methods.supersimplenet import SuperSimpleNet
from clbench.terminal import SHOWN
from clbench.training import train

TOLERANCE = 0.01  # each step carries on the rounding of those before it
MASKS = 10_000  # drawn on each side
GRID = 64  # positions along a side of a mask: of images of 256 pixels


def trained(images: Tensor, test: ImageSet | None, given: argparse.Namespace) -> Pairs:
    """Both sides after a training on images, uint8 [N, 3, H, W]; then the metrics of both on test images, as tensors of one number."""
    from anomalib.data import ImageBatch
    from lightning.pytorch import Trainer

    module, ours = pair(given)
    theirs = module.model
    copy_supersimplenet(theirs, ours)
    layers = layers_of_supersimplenet(theirs, ours)
    first = [other.weight.detach().clone() for _, _, other in layers]
    shown: list[Tensor] = []
    masks: list[Tensor] = []
    ours_lost: list[Tensor] = []
    theirs_lost: list[Tensor] = []
    step, masked, loss = ours.training_step, ours.masks, ours.loss

    def training_step(images: Tensor) -> Tensor | None:
        shown.append(images)
        return step(images)

    def noted_masks(features: Tensor, count: int) -> Tensor:
        masks.append(masked(features, count))
        return masks[-1]

    def noted_loss(features: Tensor, noise: Tensor, masks: Tensor) -> Tensor:
        found = loss(features, noise, masks)
        ours_lost.append(found.detach())
        return found

    ours.training_step, ours.masks, ours.loss = training_step, noted_masks, noted_loss  # type: ignore[method-assign]
    noise = noise_by_step(ours.noise)
    same = mock.patch.object(
        supersimplenet, "gaussian_noise", lambda features, count, _: noise((count, *features.shape[1:]))
    )
    with same:
        train(ours, 0, images, [], seed=0)
    per_epoch = len(shown) // given.epochs

    class Shown:
        """The batches of one epoch after another, as ours saw them."""

        left = iter(shown)

        def __len__(self) -> int:
            return per_epoch

        def __iter__(self) -> Iterator[ImageBatch]:
            for batch in itertools.islice(self.left, per_epoch):
                seen = ours.pyramid.normalisation(batch)
                yield ImageBatch(image=seen, gt_label=torch.zeros(len(batch), dtype=torch.bool))

    module.loss.register_forward_hook(lambda _module, _given, loss: theirs_lost.append(loss.detach()))
    again, left = noise_by_step(ours.noise), iter(masks)
    their_noise = mock.patch.object(torch, "normal", lambda **given: again(tuple(given["size"])))
    their_masks = mock.patch.object(theirs.anomaly_generator, "generate_perlin", lambda *_: next(left))
    silent = ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary")
    settings = {**dict.fromkeys(silent, False), **module.trainer_arguments}
    with their_noise, their_masks:
        Trainer(max_epochs=given.epochs, accelerator="cpu", **settings).fit(module, Shown())
    assert len(ours_lost) == len(theirs_lost) == len(shown)
    yield "losses of all steps", torch.stack(ours_lost), torch.stack(theirs_lost)
    for (name, one, other), begun in zip(layers, first, strict=True):
        yield f"weights of {name}", one.weight - begun, other.weight - begun
    theirs.eval(), ours.eval()
    with torch.no_grad():
        features = ours.features(images[:16])
        maps, scores = theirs.segdec(seg_features=theirs.adaptor(features), cls_features=features)
        yield "grid", ours.outputs(images[:16])[0], maps
        yield "scores", ours.outputs(images[:16])[1], scores
        if test is None:
            return
        found = []
        for predict in (ours, lambda seen: _prediction(theirs(ours.pyramid.normalisation(seen)))):
            batches = [predict(batch) for batch in Images.of(test.images).split(16)]
            whole = Prediction(torch.cat([b.maps for b in batches]), torch.cat([b.scores for b in batches]))
            found.append(evaluation.metrics_of(whole, test))
        for metric in SHOWN:
            one, other = (torch.tensor(float(each[metric] or 0)) for each in found)
            yield f"{metric}: {one:.3f} / {other:.3f}", one, other


def _prediction(found: Any) -> Prediction:
    """What anomalib's model gives, as ours."""
    return Prediction(found.anomaly_map[:, 0], found.pred_score)


def noise_by_step(deviation: float) -> Callable[[tuple[int, ...]], Tensor]:
    """A function of a shape, whose n-th call gives the same noise whoever calls."""
    steps = itertools.count()

    def noise(shape: tuple[int, ...]) -> Tensor:
        return deviation * torch.randn(shape, generator=torch.Generator().manual_seed(next(steps)))

    return noise


def pair(given: argparse.Namespace) -> tuple[Any, SuperSimpleNet]:
    """anomalib's module and our detector, both new, on ResNet-18 with weights of a file or random ones."""
    from anomalib.models import Supersimplenet

    off = dict.fromkeys(("pre_processor", "post_processor", "evaluator", "visualizer"), False)
    if given.checkpoint:
        use_local_weights(given.checkpoint)
        module = Supersimplenet(backbone="resnet18", **off)
    else:
        with without_weights():
            module = Supersimplenet(backbone="resnet18", **off)
    ours = SuperSimpleNet(
        Backbone("resnet18", pretrained=False),
        layers=[2, 3],
        align_corners=False,
        adapt_cls_features=False,
        epochs=given.epochs,
        batch_size=given.batch_size,
    )
    return module, ours


def draws(given: argparse.Namespace) -> Iterator[tuple[str, np.ndarray, np.ndarray]]:
    """What each side draws, ours and anomalib's: what it is, and a number of each draw."""
    module, ours = pair(given)
    theirs = module.model
    like = torch.zeros(1, 1, GRID, GRID)
    masks = [
        ours.masks(like, MASKS)[:, 0].numpy(),
        theirs.anomaly_generator.generate_perlin(MASKS, GRID, GRID)[:, 0].numpy(),
    ]
    areas = [mask.mean((1, 2)) for mask in masks]
    yield "masks that are not empty", *(1.0 * (area > 0) for area in areas)
    yield "their area, as a share", *(area[area > 0] for area in areas)
    filled = [mask[area > 0].astype(np.uint8) for mask, area in zip(masks, areas, strict=True)]
    yield (
        "their connected regions",
        *(np.array([cv2.connectedComponents(one)[0] - 1.0 for one in each]) for each in filled),
    )
    for name, one, other in layers_of_supersimplenet(theirs, ours):
        yield (
            f"squares of first weights, {name}",
            *(layer.weight.detach().square().flatten().double().numpy() for layer in (one, other)),
        )


def main() -> int:
    """Print both tables; 1 where trainings end differently, or draws by more than four standard errors."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--root", help="a folder of categories in the MVTec AD layout; else random images")
    parser.add_argument("--category", default="bottle")
    parser.add_argument("--checkpoint", help="weights of timm's resnet18, .safetensors; else random ones")
    parser.add_argument("--size", type=int, default=64, help="pixels along a side")
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--batch-size", type=int, default=4)
    given = parser.parse_args()
    torch.manual_seed(0)
    images, test = torch.randint(256, (12, 3, given.size, given.size), dtype=torch.uint8), None
    if given.root:
        settings = composed(
            "method=supersimplenet",
            "gpu.device=cpu",
            f"dataset.root={given.root}",
            "dataset=mvtec",
            f"dataset.resize={given.size}",
            "dataset.crop=null",
            "task_order=alphabetical",
            f"dataset.categories=[{given.category}]",
        )
        task = assembly.reader(settings, assembly.build_dataset(settings))(lambda *_: None)[0]
        images, test = Images.of(task.train.images)[:], task.categories[0].test
    table, worst = Table("trained by both loops, same draws", "difference"), 0.0
    for what, ours, theirs in trained(images, test, given):
        difference = float((ours - theirs).norm() / theirs.norm())
        # After hundreds of steps weights are apart by what was rounded, and metrics are not.
        if test is None or ":" in what:
            worst = max(worst, difference)
        table.add_row(what, f"{difference:.1e}" + (" !" if difference > TOLERANCE else ""))
    Console(width=120).print(table)
    drawn, furthest = Table("drawn, mean", "ours", "anomalib", "standard errors apart"), 0.0
    for what, mine, other in draws(given):
        error = np.hypot(*(each.std() / len(each) ** 0.5 for each in (mine, other)))
        apart = float(abs(mine.mean() - other.mean()) / error)
        furthest = max(furthest, apart)
        drawn.add_row(what, f"{mine.mean():.4g}", f"{other.mean():.4g}", f"{apart:.1f}" + " !" * (apart > 4))
    Console(width=120).print(drawn)
    return int(worst > TOLERANCE or furthest > 4)


if __name__ == "__main__":
    sys.exit(main())
