"""What a dry run says of a run's memory before anything is trained."""

from typing import Any

import pytest
from conftest import Train

from clbench import assembly, footprint
from clbench.config import check
from clbench.config.sources import composed


@pytest.mark.parametrize("method", ["patchcore", "padim", "efficientad", "fastflow"])
def test_a_model_s_bytes_are_known_without_its_weights(method: str) -> None:
    config = check(composed(f"method={method}"))
    detector = assembly.build_detector(config)
    expected = footprint.measure(assembly.build_strategy(config, detector))["executed_mb"] * 1e6
    if method == "patchcore":
        expected += 4 * sum(detector.pyramids()[0].channels) * config.method.settings["memory_size"]
    assert assembly.model_bytes(config) == pytest.approx(expected, rel=1e-12)


def test_a_dry_run_shows_it_where_it_is_known(train: Train, monkeypatch: pytest.MonkeyPatch) -> None:
    words = (
        "method=patchcore",
        "backbone=resnet18",
        "method.memory_size=1000",
        "backbone.arguments={}",
        "dry_run=true",
    )

    def row() -> str:
        planned = train(*words)  # pretrained weights are not here, and cannot be downloaded
        assert planned.returncode == 0, planned.stderr
        (found,) = [line for line in planned.stdout.splitlines() if "missing" in line]
        return found

    # The stem and the first three levels of ResNet-18, with the normalisation after each convolution.
    networks = (9_408 + 128) + (147_456 + 512) + (524_288 + 1_280) + (2_097_152 + 2_560)
    assert f" {4 * (networks + 1000 * (128 + 256)) / 1e6:.1f} " in row()

    def unknown(_: Any) -> float:
        raise ValueError("a user's own class looks at its weights")

    monkeypatch.setattr(assembly, "model_bytes", unknown)
    assert " 12.7 " not in row()
