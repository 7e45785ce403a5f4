"""What a run does when its images changed, or are doubtful."""

import re
import shutil
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import pytest
from conftest import Train, clbench, run_directories


def shifted(path: Path) -> None:
    """Move what a mask marks, as somebody who corrects it does; the file's name and size may stay as they are."""
    cv2.imwrite(str(path), np.roll(cv2.imread(str(path), cv2.IMREAD_GRAYSCALE), 5, axis=1))


def inverted(path: Path) -> None:
    cv2.imwrite(str(path), 255 - cv2.imread(str(path)))


@pytest.mark.parametrize(
    ("change", "file", "said"),
    [
        (shifted, "cloth/ground_truth/blot/001_mask.png", "(test images of 'cloth' changed)"),
        (inverted, "brick/train/good/003.png", "(training images of 'brick' changed)"),
        pytest.param(
            inverted, "plate/test/good/000.png", "(test images of 'plate' changed)", marks=pytest.mark.long
        ),
        pytest.param(
            Path.unlink, "plate/test/good/001.png", "(test images of 'plate' changed)", marks=pytest.mark.long
        ),
        (Path.unlink, "plate/ground_truth/blot/000_mask.png", "blot/000.png has no mask"),
    ],
)
def test_a_finished_run_whose_images_changed_is_not_taken_for_finished(
    change: Callable[[Path], object], file: str, said: str, folder: Path, train: Train, tmp_path: Path
) -> None:
    root = shutil.copytree(folder, tmp_path / "changes")
    assert train(f"dataset.root={root}").returncode == 0
    assert "finished already" in train(f"dataset.root={root}").stdout
    before = (root / file).read_bytes()
    change(root / file)
    refused = train(f"dataset.root={root}")
    assert refused.returncode == 2 and said in refused.stderr and "finished already" not in refused.stdout
    assert "overwrite=true" in refused.stderr and refused.stderr.count("\n") == 1
    (root / file).write_bytes(before)
    assert "finished already" in train(f"dataset.root={root}").stdout


def test_a_finished_run_whose_dataset_is_gone_is_finished(folder: Path, train: Train, tmp_path: Path) -> None:
    root = shutil.copytree(folder, tmp_path / "goes")
    assert train(f"dataset.root={root}").returncode == 0
    shutil.rmtree(root)
    again = train(f"dataset.root={root}")
    assert again.returncode == 0 and "finished already" in again.stdout
    assert f"cannot be compared with what they were: dataset.root={root} does not exist" in again.stdout


def test_what_is_doubtful_about_images_is_said_by_every_run(
    folder: Path, train: Train, tmp_path: Path
) -> None:
    root = shutil.copytree(folder, tmp_path / "doubtful")
    for path in (root / "brick").rglob("[0-9]*[0-9].png"):
        cv2.imwrite(str(path), cv2.imread(str(path)).astype(np.uint16) * 16)  # as a camera of 12 bits
    mask = root / "cloth" / "ground_truth" / "blot" / "000_mask.png"
    cv2.imwrite(str(mask), 255 - cv2.imread(str(mask)))
    for seed in (1, 2):  # decoded by the first
        said = train(f"dataset.root={root}", f"seed={seed}").stdout
        assert re.search(r"note: brick: the largest value of the 16-bit images is [34]\d{3} of 65535", said)
        assert (
            "note: cloth: masks that mark nearly all of their image: 1, such as that of cloth/test/blot/000.png"
            in said
        )
        assert said.count("note: ") == 2
    checked = clbench("data", "check", str(root)).stdout
    for line in (line for line in said.splitlines() if line.startswith("note: ")):
        assert line in checked.splitlines()
    deep = train(f"dataset.root={root}", "dataset.bit_depth=12")
    assert deep.returncode == 0 and deep.stdout.count("note: ") == 1


def test_a_run_whose_settings_name_a_file_that_changed_is_neither_finished_nor_continued(
    train: Train, tmp_path: Path
) -> None:
    textures = tmp_path / "textures"
    textures.mkdir()
    for number in range(3):
        cv2.imwrite(str(textures / f"{number}.png"), np.full((40, 40, 3), 60 * number, np.uint8))
    given = (
        *(
            "method=draem",
            "strategy=finetune",
            "method.epochs=1",
            "method.batch_size=2",
            f"method.textures={textures}",
        ),
        *("method.reconstructive_width=4", "method.discriminative_width=4", "task_order.tasks=[brick,cloth]"),
    )
    assert train(*given).returncode == 0
    assert "finished already" in train(*given).stdout
    before = (textures / "1.png").read_bytes()
    inverted(textures / "1.png")
    refused = train(*given)
    assert refused.returncode == 2 and "finished already" not in refused.stdout
    assert "made with other files (what method.textures names changed)" in refused.stderr
    (directory,) = run_directories(tmp_path)
    (directory / "summary.json").unlink()
    refused = train(*given)
    assert refused.returncode == 1 and "begun with other files (what method.textures names" in refused.stderr
    (textures / "1.png").write_bytes(before)
    assert train(*given).returncode == 0


def test_images_of_a_camera_with_fewer_bits_are_told_of_where_they_are_predicted(
    folder: Path, train: Train, tmp_path: Path
) -> None:
    assert train("method=padim", "method.held_out=0.4").returncode == 0
    (directory,) = run_directories(tmp_path)
    photo = tmp_path / "photos" / "one.png"
    photo.parent.mkdir()
    grey = cv2.imread(str(next((folder / "brick" / "test" / "good").iterdir())))
    cv2.imwrite(str(photo), grey.astype(np.uint16) * 16)
    said = clbench("predict", str(directory), str(photo.parent), "--output", str(tmp_path / "found"))
    assert (
        said.returncode == 0
        and "note: these images: the largest value of the 16-bit images is" in said.stdout
    )
    assert "dataset.bit_depth=12" in said.stdout
