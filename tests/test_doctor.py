"""clbench doctor: what it says of machines that lack something, and that it is right."""

import os
import tempfile
from pathlib import Path

import pytest
from conftest import ROOT, clbench

from clbench.commands import doctor
from clbench.commands.doctor import Finding, findings


def found() -> dict[str, Finding]:
    return {one.about: one for one in findings(offline=True)}


def test_a_sound_machine_has_no_problem_and_says_what_it_has(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("CLBENCH_CACHE", str(tmp_path / "cache"))
    result = clbench("doctor", "--offline")
    assert result.returncode == 0 and "nothing stands in the way of a run" in result.stdout
    said = found()
    assert said["cache"].text.startswith(f"{tmp_path / 'cache'} (to be made in {tmp_path})")
    assert not (tmp_path / "cache").exists() and not list(tmp_path.iterdir())  # it leaves nothing behind


def test_what_a_machine_lacks_is_a_problem_only_where_a_run_would_fail(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(doctor, "find_spec", lambda name: None)
    monkeypatch.setenv("WANDB_MODE", "offline")
    said = found()
    for about, words in {"SLURM": "none here", "export": "no onnx", "weights": "was not asked"}.items():
        assert said[about].state == "note" and words in said[about].text
    (tmp_path / "sbatch").symlink_to("/bin/false")
    (tmp_path / "squeue").symlink_to("/bin/false")
    assert found()["SLURM"].state == "note" and "no sweep can be sent there" in found()["SLURM"].text


def test_folders_that_cannot_be_written_and_homes_that_are_not_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("CLBENCH_CACHE", str(tmp_path / "file" / "cache"))
    assert found()["cache"].state == "problem" and "cannot be written" in found()["cache"].text
    monkeypatch.delenv("CLBENCH_CACHE")
    monkeypatch.setenv("HOME", "")
    assert found()["cache"] == Finding("problem", "cache", found()["cache"].text)
    assert "no home folder" in found()["cache"].text
    assert clbench("doctor", "--offline").returncode == 1


def test_a_full_disk_is_a_problem(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(**_: object) -> None:
        raise OSError(28, os.strerror(28))

    monkeypatch.setenv("CLBENCH_CACHE", str(tmp_path))
    monkeypatch.setattr(tempfile, "NamedTemporaryFile", full)
    said = found()["cache"]
    assert said.state == "problem" and "No space left on device" in said.text and "cache=FOLDER" in said.text


def test_the_hub_is_asked_and_a_silent_one_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    (said,) = (one for one in findings() if one.about == "weights")
    assert (
        said.state == "note" and "cannot be reached" in said.text and "backbone.checkpoint=FILE" in said.text
    )
