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
from clbench.paths import Place, expanded
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
    if not Path(folder).is_dir():
        raise ValueError(f"it {_NO_FOLDER}")
    return folder


# A folder of pictures: it must be there when a config is checked, and not when the trained detector is used.
Folder = Annotated[Place, AfterValidator(_existing)]


class Pictures:
    """Pictures that can be loaded at any size: from a folder and those inside it, or procedural textures.

    They are looked for when learning begins, since a trained detector is made without them.

    Args:
        folder: folder of the pictures; None for procedural ones.
        count: number of pictures, at most; which of a folder's is random.
        setting: name of the config key that the folder comes from, quoted in error messages.
        seed: seed of the choice of pictures.
        directory: folder of the cache of decoded images.

    Attributes:
        left_out: what was left out of the folder.
    """

    def __init__(self, folder: str | None, count: int, setting: str, seed: int, directory: str):
        self.folder, self.count, self.setting = folder, count, setting
        self.seed, self.directory = seed, directory
        self.left_out = LeftOut()
        self._samples: list[Sample] | None = None

    def look_up(self) -> list[Sample]:
        """The pictures, which are looked for once.

        Raises:
            UserError: the folder does not exist or holds no image.
        """
        if self._samples is None:
            self._samples = self._found()
        return self._samples

    def _found(self) -> list[Sample]:
        folder, count, setting = self.folder, self.count, self.setting
        random = generator(self.seed, "pictures")
        if folder is None:
            numbers = torch.randint(2**31, (count,), generator=random).tolist()
            return [
                Texture(f"texture {number}", GOOD, f"texture 1 {number} {_SIDE}", number)
                for number in numbers
            ]
        root = expanded(folder, setting)
        if not root.is_dir():
            raise UserError(f"{setting}={folder} {_NO_FOLDER}")
        paths = images_in(root, self.left_out)
        if not paths:
            raise UserError(
                f"{setting}={folder} holds no image ({', '.join(SUFFIXES)}), nor do the folders in it: "
                "give another, or leave it out for procedural ones"
            )
        order = torch.randperm(len(paths), generator=random)[:count].sort().values
        return [FileSample(str(path), GOOD, path) for path in (paths[index] for index in order.tolist())]

    def load(self, height: int, width: int) -> Tensor:
        """The pictures, uint8 [N, 3, height, width], mapped from the cache.

        Raises:
            UserError: as `look_up`, or one cannot be read.
        """
        geometry = Geometry(resize=max(height, width))
        cached = cache.load_cached(self.look_up(), geometry, expanded(self.directory, "cache"))
        return cached.images[..., :height, :width]
