"""Which files in folders are images, for training, prediction and pictures alike, and what is said of the rest."""

import csv
import os
import re
import shutil
import tempfile
from pathlib import Path

import cv2
import numpy as np
import pytest
from conftest import Train, clbench, make_category, run_directories

from clbench.data.bmad import BMAD
from clbench.data.files import find_images, read_image
from clbench.data.listing import SUFFIXES, LeftOut, folders, images_in
from clbench.data.mvtec import MVTec
from clbench.data.mvtec_loco import MVTecLOCO
from clbench.data.pictures import Pictures
from clbench.data.samples import Split
from clbench.errors import UserError

WRITTEN_BY_OPENCV = (
    ".png",
    ".jpg",
    ".jpeg",
    ".jpe",
    ".bmp",
    ".dib",
    ".tif",
    ".tiff",
    ".webp",
    ".pgm",
    ".pnm",
)


def touch(root: Path, *names: str) -> None:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()


def listed(folder: Path) -> tuple[list[str], str]:
    """The names of the images in a folder, and what is said of the rest."""
    left_out = LeftOut()
    found = images_in(folder, left_out)
    return [path.relative_to(folder).as_posix() for path in found], str(left_out)


def test_every_suffix_counts_in_any_case_and_in_any_depth(tmp_path: Path) -> None:
    names = [f"{number}{suffix}" for number, suffix in enumerate(SUFFIXES)]
    names += [f"in/side/{number}{suffix.upper()}" for number, suffix in enumerate(SUFFIXES)]
    touch(tmp_path, *names)
    found, said = listed(tmp_path)
    assert sorted(found) == sorted(names) and said == ""


@pytest.mark.parametrize("suffix", WRITTEN_BY_OPENCV)
def test_files_of_these_suffixes_are_read(tmp_path: Path, suffix: str) -> None:
    grey = np.random.default_rng(0).integers(0, 256, (9, 12), dtype=np.uint8)
    assert cv2.imwrite(str(tmp_path / f"a{suffix}"), grey)
    assert read_image(tmp_path / f"a{suffix}").shape == (9, 12, 3)


def test_what_is_left_out_is_counted_with_the_reason(tmp_path: Path) -> None:
    touch(tmp_path, "1.png", "dir.png/2.png", ".hidden.png", ".git/3.png", "a.txt", "b.txt", "c.HEIC", "none")
    touch(tmp_path, "@eaDir/1.png", "x/Thumbs.db", "x/._1.png", "x/$RECYCLE.BIN/4.png", "lost+found/5.png")
    touch(tmp_path, "__MACOSX/6.png", ".Trashes/7.png", "#recycle/8.png", "System Volume Information/9.png")
    (tmp_path / "gone").symlink_to("nowhere")
    found, said = listed(tmp_path)
    assert found == ["1.png", "dir.png/2.png"]
    assert said == (
        "2 hidden, 4 not images (.txt, .heic), 9 of a storage system (#recycle, $RECYCLE.BIN, .Trashes, ._1.png, @eaDir, "
        "...), 1 link that leads nowhere (gone)"
    )
    assert [path.name for path in folders(tmp_path)] == ["dir.png", "x"]


def test_names_are_told_in_one_line(tmp_path: Path) -> None:
    touch(tmp_path, "a.t\nxt", "b.é", os.fsdecode(b"c.\xff"))
    assert listed(tmp_path)[1] == r"3 not images (.t\nxt, .é, .\udcff)"


def test_links_are_followed_once_and_never_in_a_circle(tmp_path: Path) -> None:
    inside, outside = tmp_path / "inside", tmp_path / "outside"
    touch(inside, "1.png", "real/2.png")
    touch(outside, "3.png", "deeper/4.png")
    (inside / "file.png").symlink_to(outside / "3.png")
    (inside / "a link to real").symlink_to("real")  # sorted before it
    (inside / "far").symlink_to(outside)
    (inside / "far again").symlink_to(outside / "deeper")
    (outside / "circle").symlink_to(inside)
    (inside / "up").symlink_to(tmp_path)
    (inside / "self.png").symlink_to("self.png")
    (inside / "lost.png").symlink_to("nowhere.png")
    found, said = listed(inside)
    assert found == [
        "1.png",
        "far/3.png",
        "far/deeper/4.png",
        "file.png",
        "lost.png",  # for whoever reads it to tell
        "real/2.png",
        "self.png",
    ]
    assert said == "4 folders that links lead to again (a link to real, circle, far again, up)"


def test_flat_folders_come_in_the_order_of_names(tmp_path: Path) -> None:
    touch(tmp_path, "b.png", "B.png", "a.JPG", "a b.png", "a-b.png", "10.png", "9.png")
    assert listed(tmp_path)[0] == sorted(os.listdir(tmp_path))


def test_a_folder_that_may_not_be_listed_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    with tempfile.TemporaryDirectory() as folder:  # pytest's own may not be entered by others
        root = Path(folder)
        root.chmod(0o755)
        make_category(root / "brick", np.random.default_rng(0))
        closed = root / "brick/train/good/closed"
        closed.mkdir(mode=0)
        if os.geteuid() == 0:
            os.seteuid(65534)  # nothing is forbidden to root
        try:
            for listing in (find_images, lambda given: MVTec(str(root))):
                with pytest.raises(
                    UserError, match=rf"{closed} cannot be listed \(Permission denied\): give"
                ):
                    listing([root])  # type: ignore[operator]
            gaps: list[UserError] = []
            MVTec(str(root), gap=gaps.append)
            assert len(gaps) == 2 and "cannot be listed" in str(gaps[0]) and "has no images" in str(gaps[1])
        finally:
            if os.getuid() == 0:
                os.seteuid(0)


def test_training_takes_what_prediction_takes_with_masks_under_the_same_names(tmp_path: Path) -> None:
    brick = tmp_path / "brick"
    make_category(brick, np.random.default_rng(0))
    for name in ("train/good", "test/blot", "ground_truth/blot"):
        for file in sorted((brick / name).iterdir())[:2]:
            (brick / name / "day1").mkdir(exist_ok=True)
            shutil.copy(file, brick / name / "day1" / file.name)
    cv2.imwrite(str(brick / "train/good/x.pgm"), np.zeros((48, 48), np.uint8))
    shutil.copy(brick / "train/good/000.png", brick / "train/good/y.jfif")
    touch(
        brick, "train/good/@eaDir/000.png", "test/@eaDir/000.png", "test/.Trashes/1.png", "train/good/a.txt"
    )
    dataset = MVTec(str(tmp_path))
    splits: tuple[Split, ...] = ("train", "test")
    train, test = ([sample.name for sample in dataset.samples("brick", split)] for split in splits)
    left_out = LeftOut()
    assert train == [
        str(path.relative_to(tmp_path)) for path in find_images([brick / "train/good"], left_out=left_out)
    ]
    assert len(train) == 10 and str(left_out) == "1 not an image (.txt), 1 of a storage system (@eaDir)"
    assert [name for name in test if "blot" in name] == [
        f"brick/test/blot/{name}.png" for name in ("000", "001", "day1/000", "day1/001")
    ]
    for sample in dataset.samples("brick", "test"):
        if sample.kind != "good":
            again = brick / "ground_truth/blot" / f"{Path(sample.name).stem}_mask.png"
            np.testing.assert_array_equal(sample.read()[1], cv2.imread(str(again), 0) > 0)
    (note,) = dataset.notes
    assert note == (
        f"left out of {tmp_path}: 1 not an image (.txt), 3 of a storage system (@eaDir, .Trashes); "
        "in brick/test, brick/train/good"
    )
    (brick / "ground_truth/blot/day1/001_mask.png").unlink()
    with pytest.raises(UserError, match=r"day1/001.png has no mask: expected .*blot/day1/001_mask.png"):
        MVTec(str(tmp_path))


def test_layouts_whose_folders_mean_something_keep_their_meaning(tmp_path: Path) -> None:
    picture, mask = np.full((8, 8, 3), 9, np.uint8), np.eye(8, dtype=np.uint8) * 255

    def write(name: str, pixels: np.ndarray) -> None:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        cv2.imwrite(str(tmp_path / name), pixels)

    for name in ("train/good/0", "test/good/1", "test/Ungood/2", "test/Ungood/day1/2"):
        write(f"bmad/Brain/{name}.png", picture)
    for name in ("2", "day1/2"):
        write(f"bmad/Brain/test/Ungood/label/{name}.png", mask)
    brain = BMAD(str(tmp_path / "bmad")).samples("Brain", "test")
    assert [sample.name.removeprefix("Brain/test/") for sample in brain] == [
        *("good/1.png", "Ungood/2.png", "Ungood/day1/2.png")
    ]
    assert all(sample.outlined for sample in brain)

    for name in ("train/good/0", "test/good/1", "test/logical_anomalies/2", "test/logical_anomalies/day1/2"):
        write(f"loco/pins/{name}.png", picture)
    for name in ("2/000", "2/001", "day1/2/000"):
        write(f"loco/pins/ground_truth/logical_anomalies/{name}.png", np.roll(mask, int(name[-1]), 1))
    marked = [sample.read()[1] for sample in MVTecLOCO(str(tmp_path / "loco")).samples("pins", "test")]
    assert [None if each is None else int(each.sum()) for each in marked] == [None, 16, 8]


def test_pictures_pass_over_what_is_no_picture(tmp_path: Path) -> None:
    for name in ("1.png", "in/2.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        cv2.imwrite(str(tmp_path / name), np.full((8, 8), 7, np.uint8))
    touch(tmp_path, ".dot.png", "dir.png/notes.txt", "@eaDir/3.png")
    pictures = Pictures(str(tmp_path), 9, "method.textures", 0, str(tmp_path / "cache"))
    assert pictures.load(8, 8).shape == (2, 3, 8, 8)
    assert str(pictures.left_out) == "1 hidden, 1 not an image (.txt), 1 of a storage system (@eaDir)"


def test_a_run_a_check_and_a_prediction_say_what_they_left_out(train: Train, tmp_path: Path) -> None:
    brick = tmp_path / "data/brick"
    make_category(brick, np.random.default_rng(0), train=20)
    touch(brick, "train/good/@eaDir/000.png", "train/good/notes.txt", "test/good/.hidden.png")
    said = (
        f"left out of {brick.parent}: 1 hidden, 1 not an image (.txt), 1 of a storage system (@eaDir); "
        "in brick/test/good, brick/train/good"
    )
    done = train(f"dataset.root={brick.parent}", "method.held_out=0.5", "strategy=native")
    assert done.returncode == 0 and done.stdout.count(f"note: {said}\n") == 1
    checked = clbench("data", "check", str(brick.parent))
    assert checked.returncode == 0 and checked.stdout.count(f"note: {said}\n") == 1

    photos, elsewhere = tmp_path / "photos", tmp_path / "elsewhere"
    photos.mkdir()
    elsewhere.mkdir()
    for number, path in enumerate(sorted(brick.glob("test/*/00*.png"))):
        shutil.copy(path, (elsewhere if number else photos) / f"{number}.png")
    (photos / "day1").symlink_to("../elsewhere")
    (photos / "gone.png").symlink_to("nowhere.png")
    touch(photos, "Thumbs.db")
    (run,) = run_directories(tmp_path)
    words = ("predict", str(run), str(photos), "--only-scores", "--output", str(photos / "found"))
    for again in ((), ("--overwrite",)):  # its own tables are not told
        done = clbench(*words, *again)
        assert done.returncode == 1
        assert "left out of the folders given: 1 of a storage system (Thumbs.db)\n" in done.stdout
        assert re.search(r"passed over: cannot read image file \S*gone.png: No such file", done.stderr)
        rows = list(csv.DictReader((photos / "found/scores.csv").read_text().splitlines()))
        assert [row["image"] for row in rows] == ["0.png", "day1/1.png", "day1/2.png", "day1/3.png"]


def test_a_name_that_looks_like_a_variable_is_not_replaced_in_what_was_listed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("USER", "me")
    folder = tmp_path / "x$USER"
    folder.mkdir()
    (folder / "a$USER.png").write_bytes(b"")
    listed = find_images([str(folder)])
    assert listed == [folder / "a$USER.png"] == find_images(listed)
    assert find_images([str(tmp_path / "$USER.png")]) == [tmp_path / "me.png"]  # which is not there
