"""clbench distil: a network that imitates a backbone's levels, and that EfficientAD takes for its teacher."""

from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import load_file

from clbench.cli import main
from clbench.methods.efficientad import EfficientAD, patch_description_network

SMALL = ["--checkpoint", "package:small.safetensors", "--channels", "48", "96", "192", "384"]
SIZES = ["--count", "6", "--size", "32", "--width", "8", "--batch-size", "2", "--device", "cpu"]


def distil(output: Path, *words: str) -> int:
    return main(["distil", "--backbone", "resnet18", *SMALL, *SIZES, "--output", str(output), *words])


def test_what_is_distilled_is_a_teacher(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    output = tmp_path / "new" / "teacher.safetensors"
    assert distil(output, "--steps", "3", "--seed", "1") == 0
    said = capsys.readouterr().out
    assert "reading 6 images\n" in said and "distilling: 3 of 3 steps, loss " in said
    assert f"{output}: " in said and "of the features' variance explained" in said
    given = load_file(output)
    wanted = patch_description_network(8, 12).state_dict()
    assert {name: tensor.shape for name, tensor in given.items()} == {
        name: tensor.shape for name, tensor in wanted.items()
    }
    EfficientAD(teacher=str(output), width=8, penalty_count=2, batch_size=2, cache=str(tmp_path))

    assert distil(tmp_path / "again.safetensors", "--steps", "3", "--seed", "1") == 0
    again = load_file(tmp_path / "again.safetensors")
    assert all(torch.equal(tensor, again[name]) for name, tensor in given.items())
    assert distil(tmp_path / "other.safetensors", "--steps", "3", "--seed", "2") == 0
    other = load_file(tmp_path / "other.safetensors")
    assert not any(torch.equal(tensor, other[name]) for name, tensor in given.items())


def test_it_learns_to_explain_the_features(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    def explained(*words: str) -> int:
        words = (*words, "--layers", "1", "--learning-rate", "0.003", "--batch-size", "4")
        assert distil(tmp_path / "teacher.safetensors", *words) == 0
        return int(capsys.readouterr().out.splitlines()[-1].split()[1])

    assert explained("--steps", "1") <= 0
    assert explained("--steps", "100") >= 15


def test_a_transformer_says_which_option_its_image_size_is_given_with(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    weights = tmp_path / "deit.pth"
    torch.save(timm.create_model("deit_tiny_patch16_224").state_dict(), weights)
    network = ["distil", "--backbone", "deit_tiny_patch16_224", "--checkpoint", str(weights), "--layers", "2"]
    words = [*network, *SIZES, "--steps", "1", "--output", str(tmp_path / "teacher.safetensors")]
    assert main(words) == 1
    error = capsys.readouterr().err
    assert "takes no images of 64x64" in error and error.count("\n") == 1
    _, _, hint = error.rpartition("or for a transformer ")
    weights.unlink()
    torch.save(timm.create_model("deit_tiny_patch16_224", img_size=64).state_dict(), weights)
    assert main([*words, *hint.split()]) == 0


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--output", "teacher.pth"], "--output=teacher.pth: its name must end in .safetensors"),
        (["--checkpoint", "/nowhere.pth"], "backbone.checkpoint=/nowhere.pth does not exist"),
        (["--images", "/nowhere"], "--images=/nowhere is no folder"),
        (["--backbone", "resnet19"], "backbone.name=resnet19 is not a timm model"),
        (["--device", "gpu"], "--device=gpu is not to be had here"),
        (["--images", "$NOT_SET_HERE"], "$NOT_SET_HERE: the environment variable NOT_SET_HERE is not set"),
    ],
)
def test_what_cannot_be_had_is_told_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture, words: list[str], message: str
) -> None:
    assert distil(tmp_path / "teacher.safetensors", "--steps", "1", *words) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ") and message in error and error.count("\n") == 1
    assert not list(tmp_path.iterdir())
