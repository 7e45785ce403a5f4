"""Datasets in the layouts that they are published in, in miniature: what is read, and what is refused."""

import csv
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from conftest import ROOT, Train, run_directories
from hydra import compose, initialize_config_dir

from clbench.cli import main
from clbench.config import check, register
from clbench.data.acquire.published import datasets, recognise
from clbench.data.bmad import BMAD
from clbench.data.btad import BTAD
from clbench.data.cache import load_cached
from clbench.data.images import ImageSet
from clbench.data.mpdd import MPDD
from clbench.data.mvtec import MVTec
from clbench.data.mvtec_ad_2 import MVTecAD2
from clbench.data.mvtec_loco import MVTecLOCO
from clbench.data.on_disk import OnDisk
from clbench.data.real_iad import RealIAD
from clbench.data.samples import GOOD, Geometry
from clbench.data.visa import SPLIT, VisA
from clbench.errors import UserError
from clbench.evaluation import metrics_of
from clbench.methods.base import Prediction
from clbench.metrics.curves import pixel_metrics
from clbench.metrics.names import USUAL

SIDE = 40  # pixels


class Folder:
    """Writes images, each another one, and masks."""

    def __init__(self, root: Path):
        self.root, self.random = root, np.random.default_rng(0)

    def images(self, folder: str, *names: str) -> None:
        for name in names:
            self._write(f"{folder}/{name}", self.random.integers(0, 255, (SIDE, SIDE, 3), dtype=np.uint8))

    def masks(self, folder: str, *names: str, at: int = 8, value: int = 255) -> None:
        for name in names:
            mask = np.zeros((SIDE, SIDE), np.uint8)
            mask[at : at + 8, 8:16] = value
            self._write(f"{folder}/{name}", mask)

    def _write(self, name: str, pixels: np.ndarray) -> None:
        path = self.root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        assert cv2.imwrite(str(path), pixels)


def make_visa(folder: Folder) -> None:
    rows = []
    for category in ("candle", "pcb1"):
        data = f"{category}/Data"
        folder.images(f"{data}/Images/Normal", *(f"{i:04}.JPG" for i in range(5)))
        folder.images(f"{data}/Images/Anomaly", "000.JPG", "001.JPG")
        folder.masks(f"{data}/Masks/Anomaly", "000.png", "001.png", value=3)  # the kind of defect, not 255
        rows += [(category, "train", "normal", f"{data}/Images/Normal/{i:04}.JPG", "") for i in (3, 0, 4)]
        rows += [(category, "test", "normal", f"{data}/Images/Normal/{i:04}.JPG", "") for i in (1, 2)]
        rows += [
            (
                category,
                "test",
                "anomaly",
                f"{data}/Images/Anomaly/{i:03}.JPG",
                f"{data}/Masks/Anomaly/{i:03}.png",
            )
            for i in (0, 1)
        ]
    (folder.root / SPLIT).parent.mkdir()
    with open(folder.root / SPLIT, "w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([("object", "split", "label", "image", "mask"), *rows])


def make_btad(folder: Folder) -> None:
    for category, suffix in (("01", "bmp"), ("02", "png")):
        folder.images(f"{category}/train/ok", *(f"{i:04}.{suffix}" for i in range(3)))
        folder.images(f"{category}/test/ok", f"0000.{suffix}", f"0001.{suffix}")
        folder.images(f"{category}/test/ko", f"0000.{suffix}", f"0001.{suffix}")
        folder.masks(f"{category}/ground_truth/ko", "0000.png", "0001.png")


def make_mpdd(folder: Folder) -> None:
    for category, kind in (("connector", "parts_mismatch"), ("tubes", "anomalous")):
        folder.images(f"{category}/train/good", *(f"{i:03}.png" for i in range(3)))
        folder.images(f"{category}/test/good", "000.png", "001.png")
        folder.images(f"{category}/test/{kind}", "000.png", "001.png")
        folder.masks(f"{category}/ground_truth/{kind}", "000_mask.png", "001_mask.png")


def make_mvtec_ad_2(folder: Folder) -> None:
    for category in ("can", "walnuts"):
        folder.images(f"{category}/train/good", *(f"{i:03}_regular.png" for i in range(3)))
        folder.images(f"{category}/validation/good", "000_regular.png")
        folder.images(f"{category}/test_public/good", "000_regular.png", "000_overexposed.png")
        folder.images(f"{category}/test_public/bad", "000_regular.png", "000_shift_1.png")
        folder.masks(
            f"{category}/test_public/ground_truth/bad", "000_regular_mask.png", "000_shift_1_mask.png"
        )
        folder.images(f"{category}/test_private", "000_regular.png")
        folder.images(f"{category}/test_private_mixed", "000_mixed.png")


def make_mvtec_loco(folder: Folder) -> None:
    for category in ("juice_bottle", "pushpins"):
        folder.images(f"{category}/train/good", *(f"{i:03}.png" for i in range(3)))
        folder.images(f"{category}/validation/good", "000.png")
        folder.images(f"{category}/test/good", "000.png", "001.png")
        for kind in ("logical_anomalies", "structural_anomalies"):
            folder.images(f"{category}/test/{kind}", "000.png")
            folder.masks(f"{category}/ground_truth/{kind}/000", "000.png", value=221)
        folder.masks(f"{category}/ground_truth/logical_anomalies/000", "001.png", at=24, value=250)
        (folder.root / category / "defects_config.json").write_text("[]")


def make_real_iad(folder: Folder) -> None:
    for category in ("audiojack", "toy"):
        listed: dict = {"meta": {"prefix": f"{category}/", "normal_class": "OK"}, "train": [], "test": []}

        def add(split: str, kind: str, number: int, view: str, defective: bool = False) -> None:
            where = f"OK/S{number:04}" if kind == "OK" else f"NG/{kind}/S{number:04}"
            label = "OK" if kind == "OK" else f"NG_{kind}"
            stem = f"{category}_{number:04}_{label}_{view}_20231027100000"  # noqa: B023
            folder.images(f"realiad_1024/{category}/{where}", f"{stem}.jpg")  # noqa: B023
            if defective:
                folder.masks(f"realiad_1024/{category}/{where}", f"{stem}.png")  # noqa: B023
            listed[split].append(  # noqa: B023
                {
                    "category": category,  # noqa: B023
                    "anomaly_class": kind,
                    "image_path": f"{where}/{stem}.jpg",
                    "mask_path": f"{where}/{stem}.png" if defective else None,
                }
            )

        for number in range(3):
            add("train", "OK", number, "C1")
        add("test", "OK", 3, "C1")
        add("test", "AK", 1, "C1", defective=True)
        add("test", "AK", 1, "C2")  # the same part from a side that does not show it
        add("test", "HS", 2, "C3", defective=True)
        path = folder.root / "realiad_jsons" / f"{category}.json"
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(listed))


def make_bmad(folder: Folder) -> None:
    brain = "Brain_AD/BraTS2021_slice"
    folder.images(f"{brain}/train/good", *(f"00003_{i}.png" for i in range(3)))
    folder.images(f"{brain}/valid/good/img", "00025_99.png")
    folder.images(f"{brain}/valid/Ungood/img", "00124_60.png")
    folder.images(f"{brain}/test/good/img", "00000_96.png", "00000_97.png")
    folder.images(f"{brain}/test/Ungood/img", "00002_60.png", "00002_68.png")
    folder.masks(f"{brain}/test/Ungood/label", "00002_60.png", "00002_68.png")
    chest = "Chest_AD/Chest-RSNA"
    folder.images(f"{chest}/train/good/img", *(f"{i}.png" for i in range(3)))
    folder.images(f"{chest}/val/ungood/img", "9.png")
    folder.images(f"{chest}/test/good", "0.png", "1.png")
    folder.images(f"{chest}/test/ungood", "2.png", "3.png")


MAKERS: dict[type[OnDisk], Callable[[Folder], None]] = {
    VisA: make_visa,
    BTAD: make_btad,
    MPDD: make_mpdd,
    MVTecAD2: make_mvtec_ad_2,
    MVTecLOCO: make_mvtec_loco,
    RealIAD: make_real_iad,
    BMAD: make_bmad,
}
ALL = pytest.mark.parametrize("layout", MAKERS, ids=lambda layout: layout.name)


def make(layout: type[OnDisk], root: Path) -> Path:
    MAKERS[layout](Folder(root))
    return root


def kinds(dataset: OnDisk, category: str) -> list[str]:
    return [sample.kind for sample in dataset.samples(category, "test")]


@ALL
def test_a_dataset_has_its_published_splits(layout: type[OnDisk], tmp_path: Path) -> None:
    dataset = layout(str(make(layout, tmp_path)))
    assert len(dataset.categories) == 2 and dataset.categories == sorted(dataset.categories)
    for category in dataset.categories:
        train = dataset.samples(category, "train")
        assert len(train) == 3 and {sample.kind for sample in train} == {GOOD}
        test = dataset.samples(category, "test")
        assert [sample.kind == GOOD for sample in test].count(True) == 2 and len(test) == 4
        for sample in test:
            image, mask = sample.read()
            assert image.shape == (SIDE, SIDE, 3)
            assert (mask is None) == (sample.kind == GOOD or not sample.outlined)
            assert mask is None or mask[8:16, 8:16].all()
        names = {sample.name for sample in train + test}
        assert len(names) == 7 and not any("valid" in name or "private" in name for name in names)


@ALL
def test_a_dataset_is_recognised_and_its_entry_names_its_class(layout: type[OnDisk], tmp_path: Path) -> None:
    root = make(layout, tmp_path / "outer" / "inner")
    for given in (root, root.parent, root.parent.parent):
        found = recognise(given)
        assert found is not None and found[0].layout is layout and found[1] == root
        assert found[0].name == layout.name


@ALL
def test_an_unknown_category_and_a_wrong_root_are_refused(layout: type[OnDisk], tmp_path: Path) -> None:
    root = make(layout, tmp_path / "data")
    known = layout(str(root)).categories
    wrong = known[0][:-1] + "_"
    with pytest.raises(UserError, match=rf"has no category '{wrong}'.*found: .*{known[1]}"):
        layout(str(root), categories=[wrong])
    with pytest.raises(UserError, match="nowhere does not exist: set dataset.root="):
        layout(str(tmp_path / "nowhere"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"dataset.root=\S*empty has no .*set dataset\."):
        layout(str(tmp_path / "empty"))
    assert layout(str(root), categories=known[::-1]).categories == known[::-1]


GAPS = [
    (VisA, "candle/Data/Images/Normal/0003.JPG", "line 2 lists 'candle/Data/Images/Normal/0003.JPG'"),
    (VisA, "pcb1/Data/Masks/Anomaly/001.png", "lists 'pcb1/Data/Masks/Anomaly/001.png'.*unpack VisA again"),
    (BTAD, "01/ground_truth/ko/0001.png", "ko/0001.bmp has no mask: expected .*01/ground_truth/ko/0001.png"),
    (MPDD, "tubes/ground_truth/anomalous/000_mask.png", "expected .*anomalous/000_mask.png"),
    (
        MVTecAD2,
        "can/test_public/ground_truth/bad/000_shift_1_mask.png",
        "expected .*bad/000_shift_1_mask.png",
    ),
    (MVTecLOCO, "pushpins/ground_truth/structural_anomalies/000/000.png", "expected .*anomalies/000/000.png"),
    (RealIAD, "realiad_1024/toy/OK/S0001/toy_0001_OK_C1_20231027100000.jpg", "toy_0001_OK.* is missing"),
    (RealIAD, "realiad_jsons/toy.json", "realiad_jsons/toy.json does not exist: unpack realiad_jsons.zip"),
    (BMAD, "Brain_AD/BraTS2021_slice/test/Ungood/label/00002_60.png", "expected .*Ungood/label/00002_60.png"),
]


@pytest.mark.parametrize(("layout", "lost", "message"), GAPS)
def test_a_missing_file_is_found_before_training(
    layout: type[OnDisk], lost: str, message: str, tmp_path: Path
) -> None:
    make(layout, tmp_path)
    (tmp_path / lost).unlink()
    with pytest.raises(UserError, match=message):
        layout(str(tmp_path))
    told: list[UserError] = []
    dataset = layout(str(tmp_path), gap=told.append)  # asked to go on, it has the rest
    assert message.split(".*")[-1] in str(told[0])
    assert sum(len(dataset.samples(name, "test")) for name in dataset.categories) >= 4


def test_a_split_that_cannot_be_read_is_refused(tmp_path: Path) -> None:
    make(VisA, tmp_path)
    path = tmp_path / SPLIT
    text = path.read_text()
    path.write_text(text.replace("object,", "thing,"))
    with pytest.raises(UserError, match="1cls.csv has no column object: copy it again"):
        VisA(str(tmp_path))
    path.write_text(text.replace("train,normal", "train,anomaly", 1))
    with pytest.raises(UserError, match="line 2: label 'anomaly' in train"):
        VisA(str(tmp_path))
    path.write_text(text + "candle,test\n")
    with pytest.raises(UserError, match="1cls.csv, line 16 is incomplete"):
        VisA(str(tmp_path))
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="1cls.csv is no CSV"):
        VisA(str(tmp_path))
    path.write_text(text.splitlines()[0])
    with pytest.raises(UserError, match="1cls.csv lists no image"):
        VisA(str(tmp_path))
    path.unlink()
    with pytest.raises(UserError, match=r"has no split_csv/1cls.csv.*dataset.root=.*dataset=mvtec"):
        VisA(str(tmp_path))


def test_the_masks_of_an_image_are_merged(tmp_path: Path) -> None:
    dataset = MVTecLOCO(str(make(MVTecLOCO, tmp_path)))
    logical, structural = (s.read()[1] for s in dataset.samples("pushpins", "test") if s.kind != GOOD)
    assert logical is not None and logical[24:32, 8:16].all() and logical.sum() == 128
    assert structural is not None and structural.sum() == 64


def test_real_iad_by_view_and_size_and_where_its_lists_may_lie(tmp_path: Path) -> None:
    make(RealIAD, tmp_path)
    whole = [GOOD, "AK", GOOD, "HS"]  # a side without a mask is good
    assert kinds(RealIAD(str(tmp_path)), "toy") == whole
    assert kinds(RealIAD(str(tmp_path), views=["C1"]), "toy") == [GOOD, "AK"]
    with pytest.raises(UserError, match="has no realiad_512; found: realiad_1024; set dataset.size="):
        RealIAD(str(tmp_path), size=512)
    (tmp_path / "realiad_1024").rename(tmp_path / "realiad_256")
    assert kinds(RealIAD(str(tmp_path)), "toy") == whole  # the only size there
    with pytest.raises(UserError, match="realiad_jsons_sv/audiojack.json does not exist"):
        RealIAD(str(tmp_path), split="realiad_jsons_sv")
    (tmp_path / "realiad_jsons").rename(tmp_path / "inner")
    (tmp_path / "realiad_jsons").mkdir()
    (tmp_path / "inner").rename(tmp_path / "realiad_jsons" / "realiad_jsons")
    assert kinds(RealIAD(str(tmp_path)), "toy") == whole


def test_real_iad_refuses_lists_that_are_none_or_train_on_defects(tmp_path: Path) -> None:
    make(RealIAD, tmp_path)
    path = tmp_path / "realiad_jsons" / "toy.json"
    listed = json.loads(path.read_text())
    noisy = tmp_path / "realiad_jsons_fuiad_0.1"
    shutil.copytree(path.parent, noisy)
    listed["train"].append(listed["test"][1])
    (noisy / "toy.json").write_text(json.dumps(listed))
    with pytest.raises(UserError, match=r"dataset.split=realiad_jsons_fuiad_0.1 trains on defects .*'AK'"):
        RealIAD(str(tmp_path), split=noisy.name)
    for text in ("[", "[]", '{"meta": {"normal_class": "OK"}, "train": [{}], "test": []}'):
        path.write_text(text)
        with pytest.raises(UserError, match="toy.json is no split of Real-IAD"):
            RealIAD(str(tmp_path))


def test_bmad_calls_categories_by_the_upper_folder_whatever_the_case(tmp_path: Path) -> None:
    make(BMAD, tmp_path)
    assert BMAD(str(tmp_path)).categories == ["Brain", "Chest"]
    assert BMAD(str(tmp_path / "Brain_AD")).categories == ["BraTS2021_slice"]
    shutil.copytree(tmp_path / "Brain_AD/BraTS2021_slice", tmp_path / "flat/BMAD/Brain")
    shutil.copytree(tmp_path / "Chest_AD/Chest-RSNA", tmp_path / "flat/BMAD/Chest")
    found = recognise(tmp_path / "flat")
    assert found is not None and found[1] == tmp_path / "flat/BMAD"
    shutil.rmtree(tmp_path / "flat")
    label = tmp_path / "Brain_AD/BraTS2021_slice/test/Ungood/label"
    label.rename(label.with_name("anomaly_mask"))
    assert all(sample.outlined for sample in BMAD(str(tmp_path)).samples("Brain", "test"))


# Defects that nobody outlined


def bmad_sets(root: Path, cache: Path) -> dict[str, ImageSet]:
    dataset = BMAD(str(make(BMAD, root)))
    return {
        name: load_cached(dataset.samples(name, "test"), Geometry(None), cache) for name in dataset.categories
    }


def test_pixel_metrics_are_over_known_pixels_and_undefined_without_any(tmp_path: Path) -> None:
    sets = bmad_sets(tmp_path / "data", tmp_path / "cache")
    assert sets["Brain"].unknown == [] and sets["Chest"].unknown == [2, 3]
    random = torch.Generator().manual_seed(0)
    both = ImageSet.concatenate([sets["Chest"], sets["Brain"], sets["Chest"]])
    assert both.unknown == [2, 3, 10, 11]
    maps, scores = torch.rand(both.masks.shape, generator=random), torch.rand(len(both), generator=random)
    kept = [0, 1, 4, 5, 6, 7, 8, 9]
    found = metrics_of(Prediction(maps, scores), both)
    assert {m: found[m] for m in USUAL[3:]} == pixel_metrics(maps[kept].numpy(), both.masks[kept].numpy())
    alone = metrics_of(Prediction(maps[:4], scores[:4]), sets["Chest"])
    assert all(alone[metric] is None for metric in USUAL[3:])
    assert all(alone[metric] is not None for metric in USUAL[:3])


# Runs


@pytest.mark.parametrize("layout", [VisA, BMAD], ids=["visa", "bmad"])
def test_a_run_on_it(layout: type[OnDisk], train: Train, tmp_path: Path) -> None:
    root = make(layout, tmp_path / "data")
    result = train(f"dataset={layout.name}", f"dataset.root={root}", "method.memory_size=20")
    assert result.returncode == 0, result.stdout + result.stderr
    summary = json.loads((run_directories(tmp_path)[0] / "summary.json").read_text())
    assert summary["dataset"] == layout.name and summary["tasks"] == layout(str(root)).categories
    assert summary["final"]["image_auroc"] is not None
    rows = csv.DictReader((run_directories(tmp_path)[0] / "metrics.csv").read_text().splitlines())
    defined = {(row["task"], row["metric"]): row["value"] not in ("", "undefined") for row in rows}
    assert defined[summary["tasks"][0], "pixel_auroc"]
    assert defined[summary["tasks"][1], "pixel_auroc"] == (layout is VisA)


def test_settings_of_a_dataset_are_checked(tmp_path: Path) -> None:
    def checked(*overrides: str) -> None:
        with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
            check(compose("config", ["dataset=real_iad", f"dataset.root={tmp_path}", *overrides]))

    register()
    checked("dataset.size=256", "dataset.views=[C1,C2]")
    for override in ("dataset.size=300", "dataset.views=[C6]", "+dataset.gap=x"):
        with pytest.raises(UserError, match=re.escape(override.lstrip("+").split("=")[0])):
            checked(override)


def test_every_dataset_that_is_known_can_be_chosen() -> None:
    for name, entry in datasets().items():
        assert f"_target_: {entry.reader}\n" in (ROOT / "conf" / "dataset" / f"{name}.yaml").read_text()
        assert entry.layout.name == name


# What is published


def test_the_published_counts_add_up_to_what_is_said_of_them() -> None:
    known = datasets()
    assert known["visa"].total == (8659, 962, 1200)  # 9,621 normal and 1,200 anomalous images
    assert sum(known["btad"].total) == 2540
    assert known["mvtec"].total == (3629, 467, 1258)
    assert known["mpdd"].total == (888, 176, 282)
    assert known["mvtec_loco"].total == (1778, 575, 993)
    assert sum(known["real_iad"].total) == 151_050


# clbench data check


@ALL
def test_a_sound_folder_is_told_and_is_right(
    layout: type[OnDisk], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    root = make(layout, tmp_path / "outer" / "data")
    assert main(["data", "check", str(root)]) == 0
    told = capsys.readouterr().out
    assert f"{root}: dataset={layout.name}" in told and "nothing wrong" in told
    assert f"{datasets()[layout.name].title} as published: " in told
    assert "40x40" in told
    assert main(["data", "check", str(root.parent), "--dataset", layout.name]) == 0


def test_all_that_is_wrong_is_listed(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    make(MVTecLOCO, tmp_path / "loco")
    root = tmp_path / "data"
    make(BTAD, root)
    (root / "01/train/ok/0001.bmp").write_bytes(b"BM broken")
    png = root / "02/test/ko/0001.png"
    png.write_bytes(png.read_bytes()[:-40])
    (root / "01/ground_truth/ko/0000.png").unlink()
    cv2.imwrite(str(root / "02/ground_truth/ko/0000.png"), np.full((20, 30), 255, np.uint8))
    cv2.imwrite(str(root / "02/ground_truth/ko/0001.png"), np.zeros((SIDE, SIDE), np.uint8))
    shutil.copy(root / "02/train/ok/0002.png", root / "02/test/ok/0001.png")
    assert main(["data", "check", str(root)]) == 1
    wrong = [line for line in capsys.readouterr().out.splitlines() if line.startswith("wrong: ")]
    assert len(wrong) == 6
    for message in (
        "defect image .*01/test/ko/0000.bmp has no mask",
        "01/train/ok/0001.bmp is truncated, corrupt or no image",
        "02/test/ko/0001.png is truncated",
        "mask .*ko/0000.png is 30x20 but its image is 40x40",
        "mask .*ko/0001.png marks no pixel",
        "02/test/ok/0001.png is the same file as .*02/train/ok/0002.png",
    ):
        assert any(re.search(message, line) for line in wrong), message


def test_counts_are_compared_where_it_is_the_published_dataset(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    make(MPDD, tmp_path / "mpdd")
    assert main(["data", "check", str(tmp_path / "mpdd")]) == 0
    told = capsys.readouterr().out
    assert (
        "tubes: 3 to train on, 2 good and 2 defective to test on; published: 122 to train on, 32 good" in told
    )
    assert "not here, of MPDD: bracket_black, bracket_brown, bracket_white, metal_plate" in told
    (tmp_path / "mpdd" / "tubes").rename(tmp_path / "mpdd" / "pipes")
    assert main(["data", "check", str(tmp_path / "mpdd")]) == 0
    told = capsys.readouterr().out
    assert "dataset=mvtec" in told and "not of MVTec AD, and compared with nothing: connector, pipes" in told


def test_a_folder_of_nothing_known_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    for words, message in (
        (["data", "check", str(tmp_path)], "the layout of no dataset that is known: say which it is"),
        (["data", "check", str(tmp_path / "nowhere")], "is no folder"),
        (["data", "check", str(tmp_path), "--dataset", "viza"], "no dataset 'viza'; nearest: visa"),
        (["data", "check", str(tmp_path), "--dataset", "visa"], "has no split_csv/1cls.csv"),
    ):
        assert main(words) == 1
        assert message in capsys.readouterr().err


def test_mvtec_is_what_has_its_layout_and_no_other(tmp_path: Path) -> None:
    folder = Folder(tmp_path)
    folder.images("bracket/train/good", "0.png")
    folder.images("bracket/test/good", "0.png")
    found = recognise(tmp_path)
    assert found is not None and found[0].layout is MVTec
