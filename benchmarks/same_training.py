"""SuperSimpleNet's training against anomalib's: both loops with the same draws, and the draws of each.

    python3 -m venv ENV && ENV/bin/pip install anomalib==2.7.0 .
    PYTHONPATH=$PWD ENV/bin/python -m benchmarks.same_training

First our loop and Lightning's train the same network from the same weights, with the same batches, noise and masks. What
they end with is compared by the norm of the difference, of weights that of how far training moved them. Then what each side
draws for itself is compared over many draws. Where both agree, results of two trainings differ by chance alone.
"""

import itertools
import sys
from collections.abc import Callable, Iterator
from unittest import mock

import cv2
import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from benchmarks.same_networks import copy_supersimplenet, layers_of_supersimplenet
from benchmarks.same_networks_tokens import Pairs, without_weights
from clbench.backbones import Backbone
from clbench.methods import supersimplenet
from clbench.methods.supersimplenet import SuperSimpleNet
from clbench.training import train

EPOCHS, STEPS, BATCH, SIDE = (
    10,
    3,
    4,
    64,
)  # so many epochs of so many steps of so many images, of so many pixels
TOLERANCE = 0.01  # each step carries on the rounding of those before it
MASKS = 10_000  # drawn on each side
GRID = 64  # positions along a side of a mask: of images of 256 pixels


def trained() -> Pairs:
    """On ResNet-18 with random weights; both learning rates fall within the ten epochs."""
    from anomalib.data import ImageBatch
    from lightning.pytorch import Trainer

    module, ours = _pair()
    theirs = module.model
    copy_supersimplenet(theirs, ours)
    layers = layers_of_supersimplenet(theirs, ours)
    first = [other.weight.detach().clone() for _, _, other in layers]
    taken: dict[str, list[Tensor]] = {"images": [], "noise": [], "masks": [], "losses": []}

    def kept(name: str, call: Callable[..., Tensor]) -> Callable[..., Tensor]:
        """The same function, but what it gives is kept."""

        def keeping(*given: object) -> Tensor:
            taken[name].append(call(*given).detach())
            return taken[name][-1]

        return keeping

    step, loss = ours.training_step, ours.loss

    def noted_step(images: Tensor) -> Tensor | None:
        taken["images"].append(images)
        return step(images)

    def noted_loss(features: Tensor, noise: Tensor, masks: Tensor) -> Tensor:
        found = loss(features, noise, masks)
        taken["losses"].append(found.detach())
        return found

    ours.training_step, ours.loss = noted_step, noted_loss  # type: ignore[method-assign]
    ours.masks = kept("masks", ours.masks)  # type: ignore[method-assign]
    images = torch.randint(256, (BATCH * STEPS, 3, SIDE, SIDE), dtype=torch.uint8)
    with mock.patch.object(supersimplenet, "gaussian_noise", kept("noise", supersimplenet.gaussian_noise)):
        train(ours, 0, images, [], seed=0)

    class Shown:
        """The batches of one epoch after another, as ours saw them."""

        left = iter(taken["images"])

        def __len__(self) -> int:
            return STEPS

        def __iter__(self) -> Iterator[ImageBatch]:
            for images in itertools.islice(self.left, STEPS):
                seen = ours.pyramid.normalisation(images)
                yield ImageBatch(image=seen, gt_label=torch.zeros(len(images), dtype=torch.bool))

    losses: list[Tensor] = []
    module.loss.register_forward_hook(lambda _module, _given, loss: losses.append(loss.detach()))
    noise, masks = iter(taken["noise"]), iter(taken["masks"])
    their_noise = mock.patch.object(torch, "normal", lambda **_: next(noise))
    their_masks = mock.patch.object(theirs.anomaly_generator, "generate_perlin", lambda *_: next(masks))
    silent = ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary")
    settings = {**dict.fromkeys(silent, False), **module.trainer_arguments}
    with their_noise, their_masks:
        Trainer(max_epochs=EPOCHS, accelerator="cpu", **settings).fit(module, Shown())
    assert len(taken["losses"]) == len(losses) == EPOCHS * STEPS
    yield "losses of all steps", torch.stack(taken["losses"]), torch.stack(losses)
    for (name, one, other), begun in zip(layers, first, strict=True):
        yield f"weights of {name}", one.weight - begun, other.weight - begun
    theirs.eval(), ours.eval()
    with torch.no_grad():
        features = ours.features(images)
        maps, scores = theirs.segdec(seg_features=theirs.adaptor(features), cls_features=features)
        yield "grid", ours.outputs(images)[0], maps
        yield "scores", ours.outputs(images)[1], scores


def _pair() -> tuple:
    """anomalib's module and our detector, both new."""
    from anomalib.models import Supersimplenet

    with without_weights():
        off = dict.fromkeys(("pre_processor", "post_processor", "evaluator", "visualizer"), False)
        module = Supersimplenet(backbone="resnet18", **off)
    ours = SuperSimpleNet(
        Backbone("resnet18", pretrained=False),
        layers=[2, 3],
        align_corners=False,
        adapt_cls_features=False,
        epochs=EPOCHS,
        batch_size=BATCH,
    )
    return module, ours


def draws() -> Iterator[tuple[str, np.ndarray, np.ndarray]]:
    """What each side draws, ours and anomalib's: what it is, and a number of each draw."""
    module, ours = _pair()
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
    torch.manual_seed(0)
    table, worst = Table("trained by both loops, same draws", "difference"), 0.0
    for what, ours, theirs in trained():
        difference = float((ours - theirs).norm() / theirs.norm())
        worst = max(worst, difference)
        table.add_row(what, f"{difference:.1e}" + (" !" if difference > TOLERANCE else ""))
    Console().print(table)
    drawn, furthest = Table("drawn, mean", "ours", "anomalib", "standard errors apart"), 0.0
    for what, mine, other in draws():
        error = np.hypot(*(each.std() / len(each) ** 0.5 for each in (mine, other)))
        apart = float(abs(mine.mean() - other.mean()) / error)
        furthest = max(furthest, apart)
        drawn.add_row(what, f"{mine.mean():.4g}", f"{other.mean():.4g}", f"{apart:.1f}" + " !" * (apart > 4))
    Console().print(drawn)
    return int(worst > TOLERANCE or furthest > 4)


if __name__ == "__main__":
    sys.exit(main())
