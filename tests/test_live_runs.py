"""Runs that are read while they go on."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import clbench
from clbench.config import check
from clbench.config.sources import composed
from clbench.errors import UserError
from clbench.recording import checkpoint
from clbench.recording.checkpoint import Checkpoints


@pytest.mark.parametrize("written", [1, 2, 5])
def test_a_checkpoint_is_read_beside_a_run_that_replaces_it(
    written: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The run saves `written` further stages after the reader found a checkpoint whole, and before it opens the last file."""
    monkeypatch.setattr(checkpoint, "_LARGE", 64)  # every tensor is a part
    writer, reader = Checkpoints(tmp_path), Checkpoints(tmp_path)

    def save(stage: int) -> None:
        tensors = {
            name: torch.full((16,), float(stage + place)) for place, name in enumerate(("one", "other"))
        }
        writer.save_stage(stage, tensors, {"stage": stage})

    save(0)
    opened: list[Path] = []
    opens = checkpoint.safe_open

    def replaced_then_opened(path: Path, **settings: Any) -> Any:
        opened.append(path)
        if len(opened) == 5:  # two parts are looked at, then the tensors and the first part are loaded
            for stage in range(1, written + 1):
                save(stage)
        return opens(path, **settings)

    monkeypatch.setattr(checkpoint, "safe_open", replaced_then_opened)
    found = reader.load_stage()
    assert found is not None
    stage, tensors, data = found
    # Two stages are kept: the one that was being read is there still, or the newest is taken.
    assert stage == data["stage"] == (0 if written < 2 else written)
    assert [tensor.tolist() for tensor in tensors.values()] == [[stage] * 16, [stage + 1] * 16]


def test_a_run_that_has_learned_nothing_yet_says_so(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(check(composed("method=padim")).plain()))
    (tmp_path / "summary.json").write_text(json.dumps({"status": "running", "tasks": ["brick"]}))
    with pytest.raises(
        UserError, match=r"has not ended, and has learned no stage yet .*: wait until one is learned"
    ):
        clbench.load(tmp_path)
