"""Backbones: what they refuse, and that the way out that is told leads out."""

import inspect
import re
import shlex
import time

import pytest
import torch
from conftest import ROOT, Train
from huggingface_hub import constants

from clbench.backbones import Backbone
from clbench.config import check, composed
from clbench.errors import UserError, first_line

# Every choice that a transformer can be named in: `small` has arguments of a ResNet, and says so; DINOv2 and `small_vit` take
# any size.
GROUPS = sorted(
    path.stem
    for path in (ROOT / "conf" / "backbone").glob("*.yaml")
    if not path.stem.startswith(("small", "dinov2"))
)


@pytest.mark.parametrize(
    "size", [pytest.param((48, 48), marks=pytest.mark.long), (48, 64)], ids=["square", "oblong"]
)
@pytest.mark.parametrize("group", GROUPS)
def test_the_hint_for_images_of_another_size_leads_out_when_it_is_followed(
    group: str, size: tuple[int, int]
) -> None:
    small = ["backbone.name=deit_tiny_patch16_224", "backbone.pretrained=false"]

    def levels(*overrides: str) -> list[torch.Tensor]:
        config = check(composed(f"backbone={group}", *small, *overrides))
        pyramid = Backbone(**config.backbone.settings).pyramid([2])
        return pyramid.check(torch.zeros(1, 3, *size, dtype=torch.uint8))

    height, width = size
    with pytest.raises(
        UserError, match=f"deit_tiny_patch16_224 takes no images of {width}x{height}"
    ) as refused:
        levels()
    _, _, hint = str(refused.value).rpartition("or for a transformer ")
    (override,) = shlex.split(hint)  # as a shell takes it
    assert [tuple(level.shape) for level in levels(override)] == [(1, 192, height // 16, width // 16)]


def test_a_command_line_takes_the_hint_as_it_is_printed(train: Train) -> None:
    transformer = ["backbone=timm", "backbone.name=deit_tiny_patch16_224", "backbone.pretrained=false"]
    given = [*transformer, "backbone.arguments={}", "method=padim", "method.features=20", "method.layers=[7]"]
    refused = train(*given, "task_order.tasks=[brick]")
    assert refused.returncode == 1
    (override,) = shlex.split(refused.stderr.rpartition("or for a transformer ")[2])
    assert train(*given, "task_order.tasks=[brick]", override).returncode == 0


def test_arguments_of_another_network_say_which_choice_has_none() -> None:
    given = ["backbone.name=deit_tiny_patch16_224", "backbone.checkpoint=null"]
    small = check(composed("backbone=small", *given)).backbone.settings
    with pytest.raises(
        UserError, match="do not suit deit_tiny_patch16_224 .* backbone=timm backbone.name=deit"
    ):
        Backbone(**small).pyramid([2])


def test_backbone_documents_what_it_takes() -> None:
    about, _, _ = (inspect.getdoc(Backbone) or "").partition("Raises:")
    documented = re.findall(r"^    (\w+): ", about, re.MULTILINE)
    assert documented == list(inspect.signature(Backbone).parameters)


@pytest.mark.parametrize(
    ("error", "line"),
    [(ValueError("  a.\nb"), "a."), (ValueError(), "ValueError"), (OSError(" \n"), "OSError")],
)
def test_a_first_line_is_never_empty(error: Exception, line: str) -> None:
    assert first_line(error) == line


def test_where_no_hub_is_known_it_is_asked_once_and_in_silence(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", "https://hub.invalid")
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    begin = time.monotonic()
    with pytest.raises(
        UserError, match=r"hub.invalid is not known on this machine\).*backbone.checkpoint=FILE"
    ):
        Backbone("resnet10t", pretrained=True).pyramid([1])
    assert time.monotonic() - begin < 20 and "Retry" not in "".join(capfd.readouterr())
    assert not constants.HF_HUB_OFFLINE


@pytest.mark.parametrize(
    "name",
    [
        pytest.param("swin_tiny_patch4_window7_224", marks=pytest.mark.long),
        pytest.param("swinv2_cr_tiny_ns_224", marks=pytest.mark.long),
        "convnext_atto",
        "vit_tiny_patch16_224",
    ],
)
def test_levels_have_their_channels_first_whatever_network_they_are_of(name: str) -> None:
    pyramid = Backbone(name, pretrained=False).pyramid([1, 2])
    levels = pyramid(torch.zeros(2, 3, 224, 224, dtype=torch.uint8))
    assert [level.shape[1] for level in levels] == list(pyramid.channels)
    assert all(level.shape[0] == 2 and level.shape[2] == level.shape[3] for level in levels)
