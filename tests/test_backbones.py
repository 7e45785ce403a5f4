"""Backbones: what they refuse, and that the way out that is told leads out."""

import inspect
import re

import pytest
import torch

from clbench.backbones import Backbone
from clbench.config import check, composed
from clbench.errors import UserError, first_line


@pytest.mark.parametrize("group", ["timm", "deit_base_distilled_patch16_384"])
def test_the_hint_for_images_of_another_size_leads_out_when_it_is_followed(group: str) -> None:
    small = ["backbone.name=deit_tiny_patch16_224", "backbone.pretrained=false"]

    def levels(*overrides: str) -> list[torch.Tensor]:
        config = check(composed(f"backbone={group}", *small, *overrides))
        return (
            Backbone(**config.backbone.settings)
            .pyramid([2])
            .check(torch.zeros(1, 3, 48, 48, dtype=torch.uint8))
        )

    with pytest.raises(UserError, match="deit_tiny_patch16_224 takes no images of 48x48") as refused:
        levels()
    override = re.search(r"or for a transformer (\S+)$", str(refused.value))
    assert override
    assert [tuple(level.shape) for level in levels(override[1])] == [(1, 192, 3, 3)]


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
