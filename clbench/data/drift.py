"""Drift: light that fades, a lens that loses focus and a camera that turns, the further the stream has come."""

from dataclasses import dataclass, replace

import cv2
import numpy as np
import torch
from torch import Tensor

from clbench.data.images import Images, ImageSet, Made


@dataclass(frozen=True)
class Drift:
    """What the end of a stream differs in from its beginning; in between by its share.

    Args:
        light: share of the light that is lost.
        blur: standard deviation of the Gaussian that images are blurred with, in pixels.
        geometry: degrees by which the camera has turned about the middle of the image.
    """

    light: float = 0.0
    blur: float = 0.0
    geometry: float = 0.0

    def __bool__(self) -> bool:
        """Whether anything changes."""
        return bool(self.light or self.blur or self.geometry)

    def image(self, image: np.ndarray, place: float) -> np.ndarray:
        """An image, uint8 [H, W, 3], as it is at a place of the stream, from 0 to 1; what turns in is mirrored."""
        image = self._turned(image, place, cv2.INTER_LINEAR)
        if self.blur * place > 0:
            image = cv2.GaussianBlur(image, (0, 0), self.blur * place, borderType=cv2.BORDER_REFLECT_101)
        return np.rint(image * (1 - self.light * place)).astype(np.uint8)

    def mask(self, mask: np.ndarray, place: float) -> np.ndarray:
        """A mask, bool [H, W], as it is at a place of the stream."""
        return self._turned(mask.astype(np.uint8), place, cv2.INTER_NEAREST) > 0

    def _turned(self, picture: np.ndarray, place: float, interpolation: int) -> np.ndarray:
        if not self.geometry * place:
            return picture
        height, width = picture.shape[:2]
        turn = cv2.getRotationMatrix2D(((width - 1) / 2, (height - 1) / 2), self.geometry * place, 1)
        return cv2.warpAffine(
            picture, turn, (width, height), flags=interpolation, borderMode=cv2.BORDER_REFLECT_101
        )

    def images(self, images: Tensor | Images, places: Tensor) -> Images:
        """Images, uint8 [N, 3, H, W], each at its place of the stream, float64 [N]; they are made when they are asked for."""
        return Images([_Drifted(Images.of(images), places, self)]) if self else Images.of(images)

    def tests(self, images: ImageSet, first: float, last: float) -> ImageSet:
        """Test images, with their masks, at places evenly spread from `first` to `last`."""
        if not self or not len(images):
            return images
        places = torch.linspace(first, last, len(images), dtype=torch.float64)
        masks = images.masks
        if self.geometry:
            pairs = zip(masks.numpy(), places.tolist(), strict=True)
            masks = torch.from_numpy(np.stack([self.mask(mask, place) for mask, place in pairs]))
        return replace(images, images=self.images(images.images, places), masks=masks)


class _Drifted(Made):
    """Images that have drifted.

    Args:
        images: as they are without, uint8 [N, 3, H, W].
        places: of each, float64 [N].
        drift: what happens to them.
    """

    def __init__(self, images: Images, places: Tensor, drift: Drift):
        self._images, self._places, self._drift = images, places, drift
        self.shape = images.shape

    def made(self, rows: Tensor) -> Tensor:
        pictures = self._images[rows].permute(0, 2, 3, 1).numpy()
        drifted = [
            self._drift.image(np.ascontiguousarray(picture), place)
            for picture, place in zip(pictures, self._places[rows].tolist(), strict=True)
        ]
        if not drifted:
            return torch.empty((0, *self.shape[1:]), dtype=torch.uint8)
        return torch.from_numpy(np.stack(drifted)).permute(0, 3, 1, 2).contiguous()
