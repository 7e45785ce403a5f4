"""Backbones: what they refuse, and that the way out that is told leads out."""

import inspect
import re
import shlex

import pytest
import torch
from conftest import ROOT, Train

from clbench.backbones import Backbone
from clbench.config import check, composed
from clbench.errors import UserError, first_line

# Every choice that a transformer can be named in; `small` has arguments of a ResNet, and says so.
GROUPS = sorted(path.stem for path in (ROOT / "conf" / "backbone").glob("*.yaml") if path.stem != "small")


@pytest.mark.parametrize("size", [(48, 48), (48, 64)], ids=["square", "oblong"])
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
