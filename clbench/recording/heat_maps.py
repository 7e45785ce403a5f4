"""Pictures of anomaly maps: an image, its mask, and the map over the image in colours."""

from pathlib import Path

import cv2
import numpy as np
from torch import Tensor

from clbench.data.images import ImageSet
from clbench.recording.files import write_whole

_SMALL = 256  # pixels: the longest height or width of a small picture
_LARGE = 1024  # pixels: that of a picture beside others in a panel that is sent elsewhere
_QUALITY = 85  # of JPEG
_ROWS = 256  # of a picture that are coloured at a time


def write_all(maps: Tensor, images: ImageSet, directory: Path, stage: int) -> None:
    """Write a panel of every test image: `<kind>-<number>-stage-<stage>.png`, numbers from 0 within a kind.

    Args:
        maps: anomaly maps [B, H, W] of the images, on the CPU. Colours span the range of all of them, so that the
            pictures of a category can be compared.
        images: the test images and masks, in the same order.
        directory: folder to write into; made where it is missing.
        stage: number of the stage, from 0.

    Raises:
        UserError: a file cannot be written.
    """
    heat = maps.numpy()
    low, high = float(heat.min()), float(heat.max())
    numbers: dict[str, int] = {}
    for index, kind in enumerate(images.kinds):
        number = numbers[kind] = numbers.get(kind, -1) + 1
        picture = panel(images.images[index].numpy(), images.masks[index].numpy(), heat[index], low, high)
        write_picture(directory / f"{kind}-{number:03d}-stage-{stage:02d}.png", picture)


def write_few(maps: Tensor, images: ImageSet, directory: Path, stage: int) -> None:
    """Write small pictures of the images that `few` shows, for a page with many of them side by side.

    For each image: `<kind>-<index>.jpg`, its mask `<kind>-<index>-mask.png`, and its map over it
    `<kind>-<index>-stage-<stage>.jpg`. Arguments and errors are those of `write_all`.
    """
    heat = maps.numpy()
    low, high = float(heat.min()), float(heat.max())
    for index in chosen(images):
        shown = parts(images.images[index].numpy(), images.masks[index].numpy(), heat[index], low, high)
        endings = (".jpg", "-mask.png", f"-stage-{stage:02d}.jpg")
        for picture, ending in zip(shown, endings, strict=True):
            write_picture(directory / f"{images.kinds[index]}-{index:03d}{ending}", _shrunk(picture, _SMALL))


def few(maps: Tensor, images: ImageSet) -> list[np.ndarray]:
    """Panels of the images that `chosen` picks: BGR uint8 [h, 3 w, 3] each, of large images at 1024 pixels.

    Args:
        maps: anomaly maps [B, H, W] of the images, on the CPU.
        images: the test images and masks of a category, in the same order.
    """
    heat = maps.numpy()
    low, high = float(heat.min()), float(heat.max())
    shown = (
        parts(images.images[i].numpy(), images.masks[i].numpy(), heat[i], low, high) for i in chosen(images)
    )
    return [np.hstack([_shrunk(picture, _LARGE) for picture in each]) for each in shown]


def _shrunk(picture: np.ndarray, longest: int) -> np.ndarray:
    """A picture [H, W, 3] with at most so many pixels in height and width."""
    scale = min(1.0, longest / max(picture.shape))
    return cv2.resize(picture, None, fx=scale, fy=scale, interpolation=cv2.INTER_AREA)


def chosen(images: ImageSet, count: int = 2) -> list[int]:
    """Indices of `count` defective images, far from one another; of the first image where none is defective."""
    defective = np.flatnonzero(images.labels.numpy())
    return defective[:: max(len(defective) // count, 1)][:count].tolist() or [0]


def panel(image: np.ndarray, mask: np.ndarray, heat: np.ndarray, low: float, high: float) -> np.ndarray:
    """Image, mask and overlay side by side: see `parts`; one BGR picture uint8 [H, 3 W, 3]."""
    return np.hstack(parts(image, mask, heat, low, high))


def parts(
    image: np.ndarray, mask: np.ndarray, heat: np.ndarray, low: float, high: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Three BGR pictures uint8 [H, W, 3]: the image, its mask, and the map over the image.

    Args:
        image: RGB uint8 [3, H, W].
        mask: bool [H, W], True where the image is defective.
        heat: anomaly map [H, W].
        low: value of the map that gets the darkest colour.
        high: value of the map that gets the brightest colour.
    """
    picture = cv2.cvtColor(np.ascontiguousarray(image.transpose(1, 2, 0)), cv2.COLOR_RGB2BGR)
    white = np.repeat(255 * mask[:, :, None].astype(np.uint8), 3, axis=2)
    return picture, white, overlay(picture, mask, heat, low, high)


def overlay(picture: np.ndarray, mask: np.ndarray, heat: np.ndarray, low: float, high: float) -> np.ndarray:
    """A picture, BGR uint8 [H, W, 3], blended with the colours of a map [H, W]; outlines of the mask in white.

    Where the map is NaN (the detector did not look there) the picture stays as it is. `low` and `high` are the values
    of the map that get the darkest and the brightest colour.
    """
    coloured = np.empty_like(picture)
    # In strips, as what is computed on the way takes several times an image's memory.
    for begin in range(0, len(picture), _ROWS):
        rows = slice(begin, begin + _ROWS)
        known = np.isfinite(heat[rows])
        scaled = np.clip((np.where(known, heat[rows], low) - low) / max(high - low, 1e-12), 0, 1)
        colours = cv2.applyColorMap((255 * scaled).astype(np.uint8), cv2.COLORMAP_INFERNO)
        blended = cv2.addWeighted(picture[rows], 0.5, colours, 0.5, 0)
        coloured[rows] = np.where(known[:, :, None], blended, picture[rows])
    outlines, _ = cv2.findContours(mask.astype(np.uint8), cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
    cv2.drawContours(coloured, outlines, -1, (255, 255, 255), max(1, min(mask.shape) // 400))
    return coloured


def write_picture(path: Path, picture: np.ndarray) -> None:
    """Write a BGR picture uint8 [H, W, 3] in the format that the ending of its name says.

    Raises:
        UserError: the file cannot be written.
    """
    quality = [cv2.IMWRITE_JPEG_QUALITY, _QUALITY] if path.suffix == ".jpg" else []
    _, encoded = cv2.imencode(path.suffix, picture, quality)
    data = encoded.tobytes()
    write_whole(path, lambda part: part.write_bytes(data))
