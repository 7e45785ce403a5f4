"""The synthetic stream: the same by seed, its masks exact, its layout the one that users have."""

from pathlib import Path

import numpy as np
import pytest

from clbench.cli import main
from clbench.data.mvtec import MVTec
from clbench.data.samples import Dataset, Split
from clbench.data.synthetic import (
    KINDS,
    LEAST_AREA,
    LEAST_SIZE,
    MOST_AREA,
    PLAIN,
    PRODUCTS,
    VISIBLE,
    Drawn,
    Synthetic,
)
from clbench.errors import UserError


def test_ten_products_with_several_kinds_of_defect() -> None:
    dataset = Synthetic()
    assert len(dataset.categories) == 10 == len(PRODUCTS)
    for category in dataset.categories:
        assert len(dataset.samples(category, "train")) == 40
        kinds = [sample.kind for sample in dataset.samples(category, "test") if isinstance(sample, Drawn)]
        assert len(kinds) == 32
        assert set(kinds) == {"good", *KINDS[category]}
        assert len(KINDS[category]) >= 3


@pytest.mark.parametrize("category", sorted(PRODUCTS))
def test_a_mask_is_exactly_where_the_picture_differs_from_its_flawless_twin(category: str) -> None:
    areas = []
    for sample in Synthetic(size=128, test_good=1, test_defect=8).samples(category, "test"):
        image, mask = sample.read()
        assert isinstance(sample, Drawn)
        twin = sample.without_defect()
        assert image.shape == (128, 128, 3)
        assert image.dtype == np.uint8
        if mask is None:
            assert (image == twin).all()
            continue
        difference = np.abs(image.astype(int) - twin).max(2)
        assert difference[mask].min() >= VISIBLE > difference[~mask].max()
        assert difference[mask].mean() >= PLAIN
        areas.append(mask.mean())
    assert len(areas) == 8
    assert LEAST_AREA <= min(areas)
    assert max(areas) <= MOST_AREA


def test_pictures_are_a_function_of_the_seed_and_differ_from_each_other() -> None:
    def pictures(seed: int, split: str = "train") -> list[np.ndarray]:
        dataset = Synthetic(seed=seed, size=64, train=3, test_good=3)
        return [sample.read()[0] for name in ("gear", "wood") for sample in dataset.samples(name, split)[:3]]

    first, again, other = pictures(0), pictures(0), pictures(1)
    assert all((a == b).all() for a, b in zip(first, again, strict=True))
    assert all((a != b).any() for a, b in zip(first, other, strict=True))
    distinct = {picture.tobytes() for picture in [*first, *other, *pictures(0, "test")]}
    assert len(distinct) == 18


def test_identities_differ_where_pictures_do() -> None:
    identities = [
        sample.identity
        for dataset in (Synthetic(size=64), Synthetic(size=64, seed=1), Synthetic(size=32))
        for category in ("gear", "wood")
        for split in ("train", "test")
        for sample in dataset.samples(category, split)
    ]
    assert len(identities) == len(set(identities))


def contents(dataset: Dataset, category: str, split: Split) -> list[tuple[bytes, bytes]]:
    """Pixels and mask of every sample, whatever their order."""
    pairs = (sample.read() for sample in dataset.samples(category, split))
    return sorted(
        (image.tobytes(), b"" if mask is None else mask.astype(bool).tobytes()) for image, mask in pairs
    )


def test_the_stream_on_disk_is_the_stream_in_memory(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    folder = tmp_path / "stream"
    sizes = {"seed": 3, "size": 48, "train": 2, "test_good": 1, "test_defect": 4}
    flags = [text for name, size in sizes.items() for text in (f"--{name.replace('_', '-')}", str(size))]
    assert main(["data", "synthetic", str(folder), *flags]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == f"clbench run dataset=mvtec dataset.root={folder}"
    drawn, stored = Synthetic(**sizes), MVTec(str(folder))
    assert stored.categories == drawn.categories
    for category in drawn.categories:
        for split in ("train", "test"):
            assert contents(drawn, category, split) == contents(stored, category, split)
    assert main(["data", "check", str(folder)]) == 0

    assert main(["data", "synthetic", str(folder), *flags]) == 1
    assert "is not empty: give a new directory" in capsys.readouterr().err


def test_sizes_that_the_config_refuses_the_command_refuses_too(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    limits = {"size": LEAST_SIZE, "train": 1, "test-good": 0, "test-defect": 0, "seed": 0}
    for name, least in limits.items():
        with pytest.raises(SystemExit):
            main(["data", "synthetic", str(tmp_path / "stream"), f"--{name}", str(least - 1)])
        assert f"argument --{name}: {least - 1} is less than {least}" in capsys.readouterr().err
    (tmp_path / "file").write_text("")
    assert main(["data", "synthetic", str(tmp_path / "file" / "stream"), "--size", "32", "--train", "1"]) == 1
    assert f"{tmp_path}/file" in (error := capsys.readouterr().err) and error.count("\n") == 1


def test_an_unknown_category_names_the_nearest() -> None:
    with pytest.raises(UserError, match="no category 'wod'; nearest: wood"):
        Synthetic(categories=["wod"])
