"""Detectors against anomalib's own networks: the same weights, the same images, the same noise.

    python3 -m venv ENV && ENV/bin/pip install anomalib==2.7.0 .
    PYTHONPATH=$PWD ENV/bin/python -m benchmarks.same_networks [METHOD ...]

anomalib's model is built with random weights and random running statistics, which are copied into ours by name; its known
differences from the published code are switched on our side. Then both see the same images, and what they compute is
compared: features, loss, a gradient of each module, and maps, those away from the border, where the two blur differently.
A row is a largest difference, relative to the largest absolute value of anomalib's. Ends with status 1 where one is above
the tolerance.

A method is a function, listed in `METHODS`, that gives pairs of tensors, ours and anomalib's, by what they are.
"""

import argparse
import sys
from collections.abc import Callable
from unittest import mock

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from benchmarks.same_networks_tokens import Pairs, anomalydino, dinomaly, without_weights
from clbench.backbones import Backbone
from clbench.methods.base import Detector
from clbench.methods.rd4ad import RD4AD
from clbench.methods.supersimplenet import SuperSimpleNet

TOLERANCE = 1e-4
SIDE = 128  # pixels
BORDER = 32  # pixels along a map's border that are not compared: twice the radius of its blur


def rd4ad() -> Pairs:
    """On WideResNet-50-2, with the embedding of 512 channels that anomalib has, and on ResNet-18."""
    yield from _rd4ad("wide_resnet50_2", 512)
    yield from _rd4ad("resnet18", None)


def _rd4ad(name: str, width: int | None) -> Pairs:
    from anomalib.models.image.reverse_distillation.anomaly_map import AnomalyMapGenerationMode
    from anomalib.models.image.reverse_distillation.loss import ReverseDistillationLoss
    from anomalib.models.image.reverse_distillation.torch_model import ReverseDistillationModel

    levels = ["layer1", "layer2", "layer3"]
    theirs = ReverseDistillationModel(
        name, (SIDE, SIDE), levels, AnomalyMapGenerationMode.ADD, pre_trained=False
    )
    ours = RD4AD(Backbone(name, pretrained=False), embedding_width=width)
    randomise(theirs)
    copy(theirs.encoder.feature_extractor, ours.encoder.network)
    layers = {"conv1": "body.0", "bn1": "body.1", "conv2": "body.3", "bn2": "body.4"}
    layers |= {"conv3": "body.6", "bn3": "body.7", "upsample": "shortcut", "downsample": "shortcut"}
    heads = {"conv1": "first.0", "bn1": "first.1", "conv2": "first.3", "bn2": "first.4"}
    heads |= {"conv3": "second.0", "bn3": "second.1", "bn_layer": "fused"}

    def block(key: str) -> str:
        """Within a stage of blocks: `0.conv1.weight`."""
        number, layer, rest = key.split(".", 2)
        return f"{number}.{layers[layer]}.{rest}"

    def embedding(key: str) -> str | None:
        first, rest = key.split(".", 1)
        if first in ("conv4", "bn4"):  # never called
            return None
        return f"{heads[first]}.{block(rest) if first == 'bn_layer' else rest}"

    def decoder(key: str) -> str:
        first, rest = key.split(".", 1)
        return f"stages.{int(first.removeprefix('layer')) - 1}.{block(rest)}"

    copy(theirs.bottleneck, ours.embedding, embedding)
    copy(theirs.decoder, ours.decoder, decoder)

    images, normalised = some_images(ours)
    theirs.eval(), ours.eval()
    with torch.no_grad():
        seen, taught = ours.encoder(images), list(theirs.encoder(normalised).values())
        made, expected = ours.reconstructed(seen), theirs.decoder(theirs.bottleneck(taught))
        for number in range(3):
            yield f"{name}: encoder's level {number + 1}", seen[number], taught[number]
            yield f"{name}: decoder's level {number + 1}", made[number], expected[number]
        maps = theirs(normalised).anomaly_map[:, 0]
        yield f"{name}: map away from its border", inside(ours(images).maps), inside(maps)
    theirs.train(), ours.train()
    # The last digits of ours are those of whole batches: a deep network with random weights makes much of them in a gradient.
    with mock.patch.object(ours.encoder, "forward", lambda images: taught):
        loss, expected_loss = ours.training_step(images), ReverseDistillationLoss()(*theirs(normalised))
    loss.backward(), expected_loss.backward()
    yield f"{name}: loss", loss, expected_loss
    for title, one, other in (
        ("first convolution", ours.embedding.first[0], theirs.bottleneck.conv1),
        ("fused block", ours.embedding.fused[0].body[0], theirs.bottleneck.bn_layer[0].conv1),
        ("decoder's first stage", ours.decoder.stages[0][0].body[0], theirs.decoder.layer1[0].conv1),
        ("decoder's last stage", ours.decoder.stages[2][1].body[1], theirs.decoder.layer3[1].bn1),
    ):
        yield f"{name}: gradient of {title}", one.weight.grad, other.weight.grad


def supersimplenet() -> Pairs:
    """Both versions, on WideResNet-50-2, with anomalib's way to upsample; noise and masks are given."""
    yield from _supersimplenet("ICPR", adapted=True)
    yield from _supersimplenet("2025", adapted=False)


def _supersimplenet(version: str, adapted: bool) -> Pairs:
    from anomalib.models.image.supersimplenet.loss import SSNLoss
    from anomalib.models.image.supersimplenet.torch_model import SupersimplenetModel

    name = "wide_resnet50_2.tv_in1k"
    with without_weights():
        theirs = SupersimplenetModel(backbone=name, adapt_cls_features=adapted)
    backbone = Backbone(name, pretrained=False)
    ours = SuperSimpleNet(backbone, layers=[2, 3], align_corners=False, adapt_cls_features=adapted)
    randomise(theirs)
    copy_supersimplenet(theirs, ours)

    images, normalised = some_images(ours)
    theirs.eval(), ours.eval()
    with torch.no_grad():
        features, expected = ours.features(images), theirs.feature_extractor(normalised)
        yield f"{version}: features", features, expected
        moved = theirs.adaptor(expected)
        yield f"{version}: adapted features", ours.adaptor(features), moved
        grid, scores = ours.outputs(images)
        logits = theirs.segdec(seg_features=moved, cls_features=moved if adapted else expected)
        yield f"{version}: grid", grid, logits[0]
        yield f"{version}: score", scores, logits[1]
        # Before the blur, which is cut off after 12 pixels there and after 16 here, and after the sigmoid that they take.
        ours.sigma, theirs.anomaly_map_generator.smoothing = 0.0, nn.Identity()
        yield (
            f"{version}: map before its blur",
            ours(images).maps.sigmoid(),
            theirs(normalised).anomaly_map[:, 0],
        )

    theirs.train(), ours.train()
    noise, masks = ours.noise * torch.randn(4, *features.shape[1:]), torch.zeros(4, 1, *features.shape[2:])
    masks[1, :, :9], masks[2, ..., 5:] = 1, 1
    their_noise = mock.patch.object(torch, "normal", lambda **_: noise)
    their_masks = mock.patch.object(theirs.anomaly_generator, "generate_perlin", lambda *_: masks)
    with their_noise, their_masks:
        expected_loss = SSNLoss()(*theirs(normalised, labels=torch.zeros(2)))
    loss = ours.loss(features, noise, masks)
    loss.backward(), expected_loss.backward()
    yield f"{version}: loss", loss, expected_loss
    for title, one, other in layers_of_supersimplenet(theirs, ours):
        yield f"{version}: gradient of {title}", one.weight.grad, other.weight.grad


def copy_supersimplenet(theirs: nn.Module, ours: SuperSimpleNet) -> None:
    """Give ours the weights and statistics of anomalib's."""
    copy(theirs.feature_extractor.feature_extractor.feature_extractor, ours.pyramid.network)
    copy(theirs.adaptor, ours.adaptor, lambda key: key.removeprefix("projection."))
    heads = {"seg_head": "segmentation", "cls_conv": "classification", "cls_fc": "score"}

    def head(key: str) -> str:
        first, rest = key.split(".", 1)
        return f"{heads[first]}.{rest}"

    copy(theirs.segdec, ours.heads, head)


def layers_of_supersimplenet(
    theirs: nn.Module, ours: SuperSimpleNet
) -> list[tuple[str, nn.Module, nn.Module]]:
    """A layer of each part: its name, ours, and anomalib's."""
    return [
        ("adaptor", ours.adaptor, theirs.adaptor.projection),
        ("segmentation head", ours.heads.segmentation[0], theirs.segdec.seg_head[0]),
        ("classification head", ours.heads.classification[0], theirs.segdec.cls_conv[0]),
        ("score", ours.heads.score, theirs.segdec.cls_fc),
    ]


METHODS: dict[str, Callable[[], Pairs]] = {
    "rd4ad": rd4ad,
    "supersimplenet": supersimplenet,
    "dinomaly": dinomaly,
    "anomalydino": anomalydino,
}


@torch.no_grad()
def randomise(network: nn.Module) -> None:
    """Give normalisation running statistics, factors and offsets that are not those of a new network."""
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.5)
            module.running_var.uniform_(0.5, 2)
            module.weight.uniform_(0.5, 1.5)
            module.bias.normal_(0, 0.2)


def copy(theirs: nn.Module, ours: nn.Module, renamed: Callable[[str], str | None] = lambda key: key) -> None:
    """Copy every weight and statistic: each of ours is to have one of theirs.

    Args:
        renamed: their name -> ours; None for what is left out on purpose.
    """
    state = {renamed(key): tensor for key, tensor in theirs.state_dict().items()}
    state.pop(None, None)
    ours.load_state_dict(state)


def some_images(ours: Detector) -> tuple[Tensor, Tensor]:
    """Two images, uint8 [2, 3, H, W], and the same as networks see them, float32."""
    images = torch.randint(256, (2, 3, SIDE, SIDE), dtype=torch.uint8)
    (pyramid,) = ours.pyramids()
    return images, pyramid.normalisation(images)


def inside(maps: Tensor) -> Tensor:
    """Maps [B, H, W] without their border."""
    return maps[:, BORDER:-BORDER, BORDER:-BORDER]


def main() -> int:
    """Print a table of the methods asked for; the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("methods", nargs="*", metavar="METHOD", help=f"of {', '.join(METHODS)}; all")
    given = parser.parse_args()
    table = Table("method", "what", "largest difference", title="ours and anomalib's, same weights")
    worst = 0.0
    for method in given.methods or METHODS:
        torch.manual_seed(0)
        for what, ours, theirs in METHODS[method]():
            assert ours.shape == theirs.shape, (what, ours.shape, theirs.shape)
            difference = float((ours - theirs).detach().abs().max() / theirs.detach().abs().max())
            worst = max(worst, difference)
            table.add_row(method, what, f"{difference:.1e}" + (" !" if difference > TOLERANCE else ""))
    Console().print(table)
    return int(worst > TOLERANCE)


if __name__ == "__main__":
    sys.exit(main())
