"""Pictures from a folder, or procedural ones, for methods that train on more than normal images."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
from pydantic import AfterValidator
from torch import Tensor

from clbench.data import cache
from clbench.data.files import FileSample
from clbench.data.listing import SUFFIXES, LeftOut, images_in
from clbench.data.samples import GOOD, Geometry, Sample
from clbench.data.textures import texture
from clbench.errors import UserError
from clbench.randomness import generator

_SIDE = 256  # pixels of a procedural texture, before it is brought to the size asked for


@dataclass(frozen=True)
class Texture(Sample):
    """A procedural texture: its number says which."""

    name: str
    kind: str
    identity: str
    number: int

    def read(self) -> tuple[np.ndarray, None]:
        return texture(self.number, 0, _SIDE).mul(255).byte().permute(1, 2, 0).numpy(), None


_NO_FOLDER = "is no folder: give one with images, or leave it out for procedural ones"


def _existing(folder: str) -> str:
    if not Path(folder).expanduser().is_dir():
        raise ValueError(f"it {_NO_FOLDER}")
    return folder


Folder = Annotated[str, AfterValidator(_existing)]


class Pictures:
    """Pictures that can be loaded at any size: from a folder and those inside it, or procedural textures.

    Args:
        folder: folder of the pictures; None for procedural ones.
        count: number of pictures, at most; which of a folder's is random.
        setting: name of the config key that the folder comes from, quoted in error messages.
        seed: seed of the choice of pictures.
        directory: folder of the cache of decoded images.

    Attributes:
        left_out: what was left out of the folder.

    Raises:
        UserError: the folder does not exist or holds no image.
    """

    def __init__(self, folder: str | None, count: int, setting: str, seed: int, directory: str):
        self.directory = Path(directory).expanduser()
        self.left_out = LeftOut()
        random = generator(seed, "pictures")
        if folder is None:
            numbers = torch.randint(2**31, (count,), generator=random).tolist()
            self.samples: list[Sample] = [
                Texture(f"texture {number}", GOOD, f"texture 1 {number} {_SIDE}", number)
                for number in numbers
            ]
            return
        root = Path(folder).expanduser()
        if not root.is_dir():
            raise UserError(f"{setting}={folder} {_NO_FOLDER}")
        paths = images_in(root, self.left_out)
        if not paths:
            raise UserError(
                f"{setting}={folder} holds no image ({', '.join(SUFFIXES)}), nor do the folders in it: "
                "give another, or leave it out for procedural ones"
            )
        order = torch.randperm(len(paths), generator=random)[:count].sort().values
        self.samples = [
            FileSample(str(path), GOOD, path) for path in (paths[index] for index in order.tolist())
        ]

    def load(self, height: int, width: int) -> Tensor:
        """The pictures, uint8 [N, 3, height, width], mapped from the cache.

        Raises:
            UserError: one cannot be read.
        """
        geometry = Geometry(resize=max(height, width))
        return cache.load_cached(self.samples, geometry, self.directory).images[..., :height, :width]
