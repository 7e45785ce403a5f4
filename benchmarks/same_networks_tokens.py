"""Detectors of a transformer's tokens against anomalib's own: a part of `benchmarks.same_networks`.

Where anomalib differs from the published code, the difference is taken out: its perceptrons have no biases, so ours are 0,
dropout is off, and it brings AnomalyDINO's distances to image size by repetition, which is replaced by the original's
bilinear way. Position embeddings are resized by the same function in both, which anomalib replaces in timm when it is
imported.
"""

from collections.abc import Callable, Iterator
from unittest import mock

import timm
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.nn import functional as F

from clbench.backbones import Backbone
from clbench.methods.anomalydino import AnomalyDINO
from clbench.methods.dinomaly import Dinomaly
from clbench.training import train

SIDE = 196  # pixels: 14 x 14 patches
GROUPS = [[2, 3, 4, 5], [6, 7, 8, 9]]

Pairs = Iterator[tuple[str, Tensor, Tensor]]  # what it is, ours, anomalib's


def dinomaly() -> Pairs:
    """On DINOv2 of size S with registers, with and without recentring."""
    from anomalib.models.image.dinomaly.torch_model import DinomalyModel

    name = "vit_small_patch14_reg4_dinov2"
    for recentred in (False, True):
        title = "recentred" if recentred else "plain"
        with without_weights():
            theirs = DinomalyModel(name, bottleneck_dropout=0.0, use_context_recentering=recentred)
        backbone = Backbone(name, pretrained=False, arguments={"dynamic_img_size": True})
        ours = Dinomaly(backbone, groups=GROUPS, dropout=0.0, recentred=recentred, map_side=SIDE, sigma=0.0)
        randomise(theirs)
        copy_transformer(theirs, ours.encoder.network)
        linear = {"fc1": "0", "fc2": "2"}
        copy(theirs.bottleneck[0], ours.bottleneck, lambda key: _first(key, {"fc1": "1", "fc2": "3"}))
        parts = {"norm1": "first_norm", "norm2": "second_norm"}
        parts |= {"attn.qkv": "attention.inward", "attn.proj": "attention.outward"}
        parts |= {f"mlp.{old}": f"perceptron.{new}" for old, new in linear.items()}
        for one, other in zip(ours.decoder, theirs.decoder, strict=True):
            copy(other, one, lambda key, parts=parts: _first(key, parts))

        images = torch.randint(256, (3, 3, SIDE, SIDE), dtype=torch.uint8)
        normalised = ours.encoder.normalisation(images)
        theirs.eval(), ours.eval()
        found = ours.groups_of(images)
        for what, own, wanted in zip(
            ("encoder", "decoder"), found, theirs.get_encoder_decoder_outputs(normalised), strict=True
        ):
            for number, pair in enumerate(zip(own, wanted, strict=True), 1):
                yield f"{title}: {what}'s group {number}", pair[0], pair[1].flatten(2).mT
        maps = theirs(normalised).anomaly_map
        yield f"{title}: map before its smoothing", ours(images).maps, maps[:, 0]
        ours.sigma = 4.0
        smooth = theirs.gaussian_blur(maps)[:, 0]
        yield f"{title}: smoothed map", ours(images).maps[:, 2:-2, 2:-2], smooth[:, 2:-2, 2:-2]
        theirs.train(), ours.train()
        for step in (0, 500, 5000):
            ours.done = step / ours.steps
            theirs.zero_grad(), ours.zero_grad()
            loss, expected = ours.training_step(images), theirs(normalised, global_step=step)
            loss.backward(), expected.backward()
            yield f"{title}, step {step}: loss", loss, expected
            for what, own_part, their_part in (
                ("bottleneck", ours.bottleneck[1], theirs.bottleneck[0].fc1),
                ("first block's attention", ours.decoder[0].attention.inward, theirs.decoder[0].attn.qkv),
                ("last block's perceptron", ours.decoder[-1].perceptron[2], theirs.decoder[-1].mlp.fc2),
            ):
                yield (
                    f"{title}, step {step}: gradient of {what}",
                    own_part.weight.grad,
                    their_part.weight.grad,
                )


def anomalydino() -> Pairs:
    """On DINOv2 of size S, all tokens memorised, without masks of the background."""
    from anomalib.models.image.anomaly_dino.torch_model import AnomalyDINOModel

    name = "vit_small_patch14_dinov2"
    with without_weights():
        theirs = AnomalyDINOModel(encoder_name=name)
    backbone = Backbone(name, pretrained=False, arguments={"dynamic_img_size": True})
    ours = AnomalyDINO(backbone, layers=[11], memory_size=10**6)
    randomise(theirs)
    copy_transformer(theirs, ours.pyramid.network)
    learned, judged = torch.randint(256, (2, 3, 3, SIDE, SIDE), dtype=torch.uint8)
    train(ours, 0, learned, (), seed=0)
    theirs.train()
    theirs(ours.pyramid.normalisation(learned))
    theirs.fit()
    theirs.eval()
    yield "tokens", ours.patches(learned).flatten(0, 2), theirs.memory_bank
    # The same entries, ours in the order in which a coreset chooses them.
    yield "bank", ours.bank.sort(0).values, theirs.memory_bank.sort(0).values
    maps, scores = ours(judged)
    yield "scores", scores, theirs(ours.pyramid.normalisation(judged)).pred_score[:, 0]
    grid = theirs.anomaly_map_generator
    with mock.patch.object(grid, "compute_anomaly_map", lambda scores, size: grid.blur(raised(scores, size))):
        expected = theirs(ours.pyramid.normalisation(judged))
    yield "map away from the border", maps[:, 32:-32, 32:-32], expected.anomaly_map[:, 0, 32:-32, 32:-32]


def raised(grid: Tensor, size: tuple[int, int]) -> Tensor:
    """A grid [B, 1, h, w] at image size, bilinearly as the original; anomalib repeats each value."""
    return F.interpolate(grid, size, mode="bilinear")


def without_weights() -> mock._patch:
    """Inside, timm makes no pretrained network, but a random one."""
    create = timm.create_model
    return mock.patch.object(
        timm, "create_model", lambda *args, **given: create(*args, **{**given, "pretrained": False})
    )


@torch.no_grad()
def randomise(network: nn.Module) -> None:
    """Give normalisations and scales of layers factors and offsets that are not those of a new network."""
    for name, parameter in network.named_parameters():
        if name.endswith("gamma"):
            parameter.uniform_(0.2, 1)
        elif ".norm" in name:
            parameter.normal_(float(name.endswith("weight")), 0.2)


def copy_transformer(theirs: nn.Module, ours: nn.Module) -> None:
    """Copy the weights of the only transformer in `theirs`; ours has as many of its blocks as it needs."""
    (network,) = (module for module in theirs.modules() if isinstance(module, VisionTransformer))
    wanted = ours.model.state_dict()
    ours.model.load_state_dict({name: network.state_dict()[name] for name in wanted})


def _first(key: str, renamed: dict[str, str]) -> str:
    """A key with its beginning renamed."""
    old = next(old for old in renamed if key.startswith(f"{old}."))
    return renamed[old] + key[len(old) :]


@torch.no_grad()
def copy(theirs: nn.Module, ours: nn.Module, renamed: Callable[[str], str]) -> None:
    """Copy every weight: each of ours is to have one of theirs, or is a bias and 0.

    Args:
        renamed: their name -> ours.
    """
    state = {renamed(key): tensor for key, tensor in theirs.state_dict().items()}
    own = ours.state_dict()
    missing = [key for key in own if key not in state]
    assert all(key.endswith("bias") and not own[key].any() for key in missing), missing
    ours.load_state_dict(state | {key: own[key] for key in missing})
