"""Defects one by one, each with its saturation area, as MVTec LOCO AD has them. Imports no torch.

A mask file is one defect, and the value of its pixels says which kind. The masks are decoded once for a machine, like
images, into a file of the cache.
"""

import json
import zipfile
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import astuple, dataclass
from functools import partial
from pathlib import Path
from typing import Annotated

import numpy as np
from pydantic import BaseModel, Field, TypeAdapter, ValidationError, model_validator

from clbench import digests
from clbench.data.cache import THREADS, whole_file
from clbench.data.files import FileSample
from clbench.data.samples import Defect, Geometry
from clbench.errors import UserError

CONFIG = "defects_config.json"
_FORMAT = 1  # raise it when the same outlines would be stored differently


class Saturation(BaseModel, frozen=True, strict=True):
    """An entry of defects_config.json: how much of a kind of defect must be found.

    A logical anomaly such as a missing part may be anywhere in its compartment, all of which is outlined: a part of
    the outline is enough.

    Attributes:
        defect_name: the kind.
        pixel_value: value of its pixels in masks.
        saturation_threshold: share of the outlined pixels where `relative_saturation`, else a whole number of them.
    """

    defect_name: str
    pixel_value: Annotated[int, Field(ge=1, le=65535)]
    saturation_threshold: Annotated[float, Field(gt=0, allow_inf_nan=False)]
    relative_saturation: bool

    @model_validator(mode="after")
    def _of_its_kind(self) -> "Saturation":
        if self.relative_saturation and self.saturation_threshold > 1:
            raise ValueError(f"a share of {self.saturation_threshold:g} is more than all")
        if not self.relative_saturation and not self.saturation_threshold.is_integer():
            raise ValueError(
                f"{self.saturation_threshold:g} is no whole number of pixels, and no share of them"
            )
        return self

    def area(self, pixels: int, enlargement: float = 1.0) -> int:
        """The saturation area of a defect, in pixels of the run's size, at least 1.

        A share is cut to whole pixels, as the evaluation code of the dataset does (Bergmann et al., IJCV 2022); a number
        of pixels is never more than the defect has.

        Args:
            pixels: of the defect, at the run's size.
            enlargement: pixels at the run's size for one of the mask's file: a threshold in pixels is one of the file's.
        """
        if self.relative_saturation:
            found = int(self.saturation_threshold * pixels)
        else:
            found = min(int(self.saturation_threshold * enlargement), pixels)
        return max(found, 1)


Saturations = Mapping[int, Saturation]  # value of pixels in masks -> entry


def read_saturations(path: Path) -> Saturations:
    """The entries of a category's defects_config.json.

    Raises:
        UserError: the file is missing or damaged, or two entries have one value.
    """
    way_out = (
        "copy it again from the dataset's archive, or leave auspro_* out of metrics.further, which need it"
    )
    try:
        entries = TypeAdapter(list[Saturation]).validate_json(path.read_bytes())
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}): {way_out}") from error
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        reason = f"{where}: {first['msg']}" if where else first["msg"]
        raise UserError(f"{path} is no list of saturation areas ({reason}): {way_out}") from error
    found: dict[int, Saturation] = {}
    for entry in entries:
        if (other := found.setdefault(entry.pixel_value, entry)) != entry:
            raise UserError(
                f"{path} gives the value {entry.pixel_value} to '{other.defect_name}' and '{entry.defect_name}': {way_out}"
            )
    return found


@dataclass(frozen=True)
class Outlines:
    """The mask files of a test set at the run's size, each by itself.

    Attributes:
        image: index of the image in the set, int32 [D].
        number: which of the image's mask files it is, int32 [D].
        value: of its pixels in the file, int32 [D].
        enlargement: pixels at the run's size for one of the file, float64 [D].
        ends: where its pixels end in `pixels`, int64 [D].
        pixels: places in the flattened mask, int32, of all masks one after another.
    """

    image: np.ndarray
    number: np.ndarray
    value: np.ndarray
    enlargement: np.ndarray
    ends: np.ndarray
    pixels: np.ndarray


def load_defects(
    samples: Sequence[FileSample], config: Path, geometry: Geometry, directory: Path
) -> list[Defect]:
    """The defects of a test set with their saturation areas; those of which no pixel is left are left out.

    Args:
        samples: the images of the test set, in its order.
        config: the category's defects_config.json.
        geometry: what masks are brought to.
        directory: folder of the cache.

    Raises:
        UserError: as `read_saturations`, or a mask is unreadable or has a value that the file does not list.
    """
    saturations = read_saturations(config)
    outlines = _cached(samples, geometry, directory)
    found, begin = [], 0
    for image, number, value, enlargement, end in zip(
        outlines.image,
        outlines.number,
        outlines.value.tolist(),
        outlines.enlargement,
        outlines.ends,
        strict=True,
    ):
        pixels, begin = outlines.pixels[begin:end], end
        if value not in saturations:
            raise UserError(
                f"mask {samples[image].masks[number]} has the value {value}, which {config} does not list; it lists "
                f"{', '.join(map(str, sorted(saturations))) or 'none'}: copy both again from the dataset's archive"
            )
        if len(pixels):
            area = saturations[value].area(len(pixels), enlargement)
            found.append(Defect(int(image), pixels, area))
    return found


def fingerprint(defects: Sequence[Defect]) -> str:
    """A text that changes where a defect joins, leaves or changes, or its saturation area does."""
    numbers = [(defect.image, defect.saturation, len(defect.pixels)) for defect in defects]
    places = (defect.pixels.data for defect in defects)
    return digests.of_bytes(np.array(numbers, np.int64).data, *places)[:16]


def _cached(samples: Sequence[FileSample], geometry: Geometry, directory: Path) -> Outlines:
    """The outlines of samples from the cache; the masks are decoded, and kept there, where they are not in it.

    The key is of the files as the system describes them: what is moved is decoded again.

    Raises:
        UserError: a mask is unreadable.
    """
    about = [_FORMAT, astuple(geometry), [sample.identity for sample in samples]]
    path = directory / f"{digests.of_text(json.dumps(about))[:32]}.outlines.npz"
    damage = OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile
    with suppress(*damage), np.load(path) as stored:  # never unpickles
        return Outlines(**{name: stored[name] for name in Outlines.__annotations__})
    with ThreadPoolExecutor(THREADS) as pool:
        decoded = list(pool.map(partial(_at_size, geometry=geometry), samples))
    rows = [
        (image, number, *outline)
        for image, outlines in enumerate(decoded)
        for number, outline in enumerate(outlines)
    ]
    pixels = [row[-1] for row in rows]
    found = Outlines(
        image=np.array([row[0] for row in rows], np.int32),
        number=np.array([row[1] for row in rows], np.int32),
        value=np.array([row[2] for row in rows], np.int32),
        enlargement=np.array([row[3] for row in rows], np.float64),
        ends=np.cumsum([len(places) for places in pixels], dtype=np.int64),
        pixels=np.concatenate([np.empty(0, np.int32), *pixels]),
    )
    if all(sample.settled() for sample in samples):
        # Where the cache may not be written to, the next run decodes them again.
        with suppress(OSError):
            directory.mkdir(parents=True, exist_ok=True)
            with whole_file(path) as file:
                np.savez_compressed(file, **vars(found))
    return found


def _at_size(sample: FileSample, geometry: Geometry) -> list[tuple[int, float, np.ndarray]]:
    """Of each mask of a sample: the value, the enlargement, and the places of its pixels, int32 [K]."""
    return [
        (
            value,
            geometry.enlargement((mask.shape[0], mask.shape[1])),
            np.flatnonzero(geometry.mask(mask)).astype(np.int32),
        )
        for mask, value in sample.outlines()
    ]
