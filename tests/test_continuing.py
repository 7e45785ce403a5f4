"""Checkpoints: what is kept, what is passed over. That a training that is left and continued is the training is a contract's."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from clbench.backbones import Backbone
from clbench.methods.stfpm import STFPM
from clbench.recording.checkpoint import Checkpoints
from clbench.testing import DetectorContract
from clbench.testing.detectors import BuildDetector


class TestSTFPMWithoutMomentum(DetectorContract):
    """The optimizer keeps nothing of some parameters."""

    exports = False  # as with momentum

    @pytest.fixture
    def build(self) -> BuildDetector:
        def backbone() -> Backbone:
            return Backbone("resnet18", pretrained=False, arguments={"channels": [8, 16, 32, 64]})

        return lambda: STFPM(backbone(), layers=[1, 2], epochs=2, batch_size=4, momentum=0.0)


def test_the_newest_two_of_a_training_are_kept_until_its_stage_is(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path)
    for number in range(4):
        checkpoints.place(0, {"x": torch.tensor([number])}, {"number": number})
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == [f"learning-0000-00000{n}.{kind}" for n in (2, 3) for kind in ("json", "safetensors")]
    for stage in range(3):
        checkpoints.save_stage(stage, {"x": torch.tensor([stage])}, {"number": stage})
    assert sorted(path.stem for path in tmp_path.glob("*.json")) == ["stage-0001", "stage-0002"]
    stage, tensors, data = Checkpoints(tmp_path).load_stage() or (None, {}, {})
    assert (stage, tensors["x"].tolist(), data) == (2, [2], {"number": 2})


def test_tensors_come_back_in_the_order_in_which_they_were_kept(tmp_path: Path) -> None:
    names = [f"task {number}" for number in (11, 2, 0, 10, 1)]
    Checkpoints(tmp_path).save_stage(0, {name: torch.zeros(len(name)) for name in names}, {})
    _, tensors, _ = Checkpoints(tmp_path).load_stage() or (None, {}, {})
    assert list(tensors) == names


@pytest.mark.parametrize("kind", ["json", "safetensors"])
@pytest.mark.parametrize("damage", ["a bit", "cut off", "empty", "gone"])
def test_a_damaged_checkpoint_is_passed_over(kind: str, damage: str, tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path)
    for number in range(2):
        checkpoints.place(0, {"x": torch.full((100,), number)}, {"number": number})
        checkpoints.save_stage(number, {"x": torch.full((100,), number)}, {"number": number})
        checkpoints.place(number + 1, {"x": torch.full((100,), number)}, {"number": number})
    checkpoints.place(2, {"x": torch.full((100,), 2)}, {"number": 2})
    for name in ("stage-0001", "learning-0002-000001"):
        path = tmp_path / f"{name}.{kind}"
        content = bytearray(path.read_bytes())
        content[-10] ^= 1
        path.unlink()
        if damage != "gone":
            path.write_bytes({"a bit": content, "cut off": content[:-20], "empty": b""}[damage])
    again = Checkpoints(tmp_path)
    stage, tensors, data = again.load_stage() or (None, {}, {})
    assert (stage, tensors["x"][0], data["number"]) == (0, 0, 0)
    tensors, data = again.find(2) or ({}, {})
    assert (tensors["x"][0], data["number"]) == (1, 1)
    assert (again.peek(2) or {})["number"] == 1
    assert again.find(1) is None and again.peek(1) is None


def test_a_checkpoint_is_due_when_time_has_passed_when_asked_for_and_at_a_cheap_epoch_s_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [0.0]
    monkeypatch.setattr("clbench.recording.checkpoint.time.perf_counter", lambda: now[0])
    asked: list[str] = []
    checkpoints = Checkpoints(tmp_path, every_s=60, urgent=lambda: bool(asked))

    def save_for(seconds: float) -> None:
        save = checkpoints._save
        monkeypatch.setattr(
            checkpoints, "_save", lambda *given: (save(*given), now.__setitem__(0, now[0] + seconds))
        )
        checkpoints.place(0, {}, {})
        monkeypatch.undo()
        monkeypatch.setattr("clbench.recording.checkpoint.time.perf_counter", lambda: now[0])

    save_for(1.0)  # so an epoch that ends within 20 s is not worth one
    for waited, epoch_ended, due in (
        (59, False, False),
        (60, False, True),
        (19, True, False),
        (20, True, True),
    ):
        begin = now[0]
        now[0] = begin + waited
        assert checkpoints.due(epoch_ended) == due
        now[0] = begin
    asked.append("SIGTERM")
    assert checkpoints.due(False)


def test_data_beside_is_read_without_tensors(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, beside=lambda: {"spent": {"train_s": 1.5}})
    checkpoints.place(3, {"x": torch.zeros(2)}, {"epoch": 4})
    data = Checkpoints(tmp_path).peek(3)
    assert data is not None and data["spent"] == {"train_s": 1.5} and data["epoch"] == 4
    assert Checkpoints(tmp_path).peek(2) is None
    (path,) = tmp_path.glob("*.json")
    assert json.loads(path.read_text().split("\n")[1])["epoch"] == 4


def test_tensors_of_one_storage_are_kept_each(tmp_path: Path) -> None:
    values = torch.arange(6.0)
    tensors = {"all": values, "again": values, "half": values[3:], "turned": values.view(2, 3).T}
    Checkpoints(tmp_path).save_stage(0, tensors, {})
    _, found, _ = Checkpoints(tmp_path).load_stage() or (None, {}, {})
    assert found.keys() == tensors.keys() and all(torch.equal(found[name], tensors[name]) for name in tensors)


def sizes(folder: Path) -> dict[str, int]:
    return {path.name: path.stat().st_size for path in folder.rglob("*.safetensors")}


def test_what_did_not_change_is_written_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Models that stay, a tensor that grows by rows, one that is cut; small tensors go together."""
    monkeypatch.setattr("clbench.recording.checkpoint._LARGE", 4000)
    checkpoints = Checkpoints(tmp_path)
    expected: dict[str, torch.Tensor] = {}
    written: list[int] = []
    random = torch.Generator().manual_seed(0)
    before: dict[str, int] = {}
    for stage in range(5):
        new = {f"detectors.{stage}.{name}": torch.randn(700, generator=random) for name in "abc"}
        rows = torch.randn(1, 2000, generator=random)
        grown = torch.cat([expected["grown"], rows]) if stage else rows
        bank = torch.randn(3000 - 100 * stage, generator=random)
        expected = {**expected, **new, "grown": grown, "bank": bank, "flag": torch.tensor(stage > 2)}
        checkpoints.save_stage(stage, expected, {})
        now = sizes(tmp_path)
        written.append(sum(size for name, size in now.items() if before.get(name) != size))
        before = now
        if stage % 2:
            checkpoints = Checkpoints(tmp_path)  # another process
        found_stage, found, _ = Checkpoints(tmp_path).load_stage() or (None, {}, {})
        assert found_stage == stage and list(found) == list(expected)
        assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert max(written[1:]) < 1.5 * written[0] < 0.5 * sum(4 * each.numel() for each in expected.values())
    checkpoints.save_stage(5, {"bank": expected["bank"]}, {})
    checkpoints.save_stage(6, {"bank": expected["bank"]}, {})
    assert len(list((tmp_path / "parts").iterdir())) == 1  # what no checkpoint has any more goes


@pytest.mark.parametrize("damage", ["a bit", "gone"])
def test_a_checkpoint_with_a_damaged_part_is_passed_over(
    damage: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("clbench.recording.checkpoint._LARGE", 400)
    checkpoints = Checkpoints(tmp_path)
    same = torch.ones(200)
    parts: list[set[Path]] = []
    for stage in range(2):
        checkpoints.save_stage(stage, {"same": same, "new": torch.full((200,), float(stage))}, {})
        parts.append(set((tmp_path / "parts").iterdir()))
    (path,) = parts[1] - parts[0]
    content = bytearray(path.read_bytes())
    content[-10] ^= 1
    path.unlink()
    if damage != "gone":
        path.write_bytes(content)
    stage, tensors, _ = Checkpoints(tmp_path).load_stage() or (None, {}, {})
    assert stage == 0 and torch.equal(tensors["new"], torch.zeros(200)) and torch.equal(tensors["same"], same)
    # A part that is written again mends it.
    Checkpoints(tmp_path).save_stage(1, {"same": same, "new": torch.ones(200).float()}, {})
    stage, tensors, _ = Checkpoints(tmp_path).load_stage() or (None, {}, {})
    assert stage == 1 and torch.equal(tensors["new"], torch.ones(200))


def test_checkpoints_of_earlier_versions_are_read(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    from clbench import digests

    save_file({"x": torch.arange(3.0)}, tmp_path / "stage-0002.safetensors")
    digest = digests.of_file(tmp_path / "stage-0002.safetensors")
    for about in ({"tensors": digest}, {"tensors": digest, "devices": {"x": "cpu"}}):
        text = json.dumps({**about, "frozen": "f"})
        (tmp_path / "stage-0002.json").write_text(f"{digests.of_text(text)}\n{text}\n")
        stage, tensors, data = Checkpoints(tmp_path).load_stage() or (None, {}, {})
        assert (stage, tensors["x"].tolist(), data) == (2, [0, 1, 2], {"frozen": "f"})


def test_parts_that_were_removed_are_written_again_where_their_content_comes_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where early stopping brings back the best weights, of which only an older checkpoint had the parts."""
    monkeypatch.setattr("clbench.recording.checkpoint._LARGE", 1000)

    def weights(value: float) -> dict[str, torch.Tensor]:
        return {"detector.weight": torch.full((10, 100), value), "of rows": torch.full((3, 300), value)}

    checkpoints = Checkpoints(tmp_path)
    for epoch in range(4):
        checkpoints.place(0, weights(epoch), {"epoch": epoch})
    checkpoints.save_stage(0, weights(0), {})
    stage, found, _ = Checkpoints(tmp_path).load_stage() or (None, {}, {})
    assert stage == 0 and all(torch.equal(found[name], tensor) for name, tensor in weights(0).items())
    for stage, value in enumerate((1.0, 2.0, 1.0), 1):
        checkpoints.save_stage(stage, weights(value), {})
    stage, found, _ = Checkpoints(tmp_path).load_stage() or (None, {}, {})
    assert stage == 3 and torch.equal(found["of rows"], weights(1)["of rows"])
    for part in (tmp_path / "parts").iterdir():  # others may remove files too
        part.unlink()
    checkpoints.save_stage(4, weights(1), {})
    assert (Checkpoints(tmp_path).load_stage() or (None,))[0] == 4


def test_parts_stay_where_a_checkpoint_cannot_be_read_and_a_damaged_one_keeps_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("clbench.recording.checkpoint._LARGE", 1000)
    checkpoints, read = Checkpoints(tmp_path), Path.read_text

    def unreadable(path: Path, *given: Any, **named: Any) -> str:
        if path.name == "stage-0000.json":
            raise OSError(116, "Stale file handle")
        return read(path, *given, **named)

    checkpoints.save_stage(0, {"x": torch.zeros(1000)}, {})
    with monkeypatch.context() as patched:
        patched.setattr(Path, "read_text", unreadable)
        checkpoints.save_stage(1, {"x": torch.ones(1000)}, {})
    (tmp_path / "stage-0001.json").write_text("")
    assert (Checkpoints(tmp_path).load_stage() or (None,))[0] == 0
    checkpoints.save_stage(2, {"x": torch.ones(1000)}, {})
    checkpoints.save_stage(3, {"x": torch.full((1000,), 3.0)}, {})
    assert len(list((tmp_path / "parts").iterdir())) == 2


def test_what_changes_behind_a_tensor_s_version_is_written_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("clbench.recording.checkpoint._LARGE", 1000)
    checkpoints, kept = Checkpoints(tmp_path), torch.zeros(50, 10, dtype=torch.float16)
    for change in (lambda: None, lambda: kept.data.add_(1), lambda: kept.numpy().__setitem__((3, 4), 7)):
        change()
        checkpoints.save_stage(0, {"x": kept}, {})
        _, found, _ = Checkpoints(tmp_path).load_stage() or (None, {}, {})
        assert torch.equal(found["x"], kept)
