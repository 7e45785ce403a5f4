"""Pictures of anomaly maps: image, mask and overlay."""

from pathlib import Path

import cv2
import numpy as np

from clbench.data.images import ImageSet
from clbench.methods.base import Prediction
from clbench.recording.run_directory import write_whole

_SMALL = 256  # pixels of the longer side, at most
_QUALITY = 85  # of JPEG


def write(prediction: Prediction, images: ImageSet, directory: Path, stage: int) -> None:
    """One PNG for each test image, `<kind>-<number>-stage-<stage>.png`.

    Colours span the maps of the whole task, so that pictures of a task compare.
    """
    maps = prediction.maps.numpy()
    low, high = float(maps.min()), float(maps.max())
    numbers: dict[str, int] = {}
    for index, kind in enumerate(images.kinds):
        number = numbers[kind] = numbers.get(kind, -1) + 1
        picture = panel(images.images[index].numpy(), images.masks[index].numpy(), maps[index], low, high)
        write_picture(directory / f"{kind}-{number:03d}-stage-{stage:02d}.png", picture)


def write_few(prediction: Prediction, images: ImageSet, directory: Path, stage: int) -> None:
    """Small pictures of the same images as `few`, for a page that shows many of them side by side.

    `<name>.jpg` and `<name>-mask.png` of each, and `<name>-stage-<stage>.jpg`, its map.
    """
    maps = prediction.maps.numpy()
    low, high = float(maps.min()), float(maps.max())
    for index in chosen(images):
        shown = parts(images.images[index].numpy(), images.masks[index].numpy(), maps[index], low, high)
        endings = (".jpg", "-mask.png", f"-stage-{stage:02d}.jpg")
        scale = min(1.0, _SMALL / max(shown[0].shape))
        for picture, ending in zip(shown, endings, strict=True):
            small = cv2.resize(picture, None, fx=scale, fy=scale, interpolation=cv2.INTER_AREA)
            write_picture(directory / f"{images.kinds[index]}-{index:03d}{ending}", small)


def few(prediction: Prediction, images: ImageSet) -> list[np.ndarray]:
    """Panels of a few of a task's test images, always the same."""
    maps = prediction.maps.numpy()
    low, high = float(maps.min()), float(maps.max())
    return [
        panel(images.images[i].numpy(), images.masks[i].numpy(), maps[i], low, high) for i in chosen(images)
    ]


def chosen(images: ImageSet, count: int = 2) -> list[int]:
    """A few of a task's defective test images, far from one another; its first where none is defective."""
    defective = np.flatnonzero(images.labels.numpy())
    return defective[:: max(len(defective) // count, 1)][:count].tolist() or [0]


def panel(image: np.ndarray, mask: np.ndarray, heat: np.ndarray, low: float, high: float) -> np.ndarray:
    """Image uint8 [3, H, W], mask bool [H, W] and map [H, W] -> one BGR picture [H, 3 W, 3]."""
    return np.hstack(parts(image, mask, heat, low, high))


def parts(
    image: np.ndarray, mask: np.ndarray, heat: np.ndarray, low: float, high: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Image, mask and the map over the image, with the mask's outline: three BGR pictures [H, W, 3]."""
    picture = cv2.cvtColor(np.ascontiguousarray(image.transpose(1, 2, 0)), cv2.COLOR_RGB2BGR)
    white = np.repeat(255 * mask[:, :, None].astype(np.uint8), 3, axis=2)
    return picture, white, overlay(picture, mask, heat, low, high)


def overlay(picture: np.ndarray, mask: np.ndarray, heat: np.ndarray, low: float, high: float) -> np.ndarray:
    """A BGR picture [H, W, 3] in the colours of a map [H, W], a mask's outlines in white.

    Where the map is NaN, nothing is known, and the picture stays as it is.
    """
    known = np.isfinite(heat)
    scaled = np.clip((np.where(known, heat, low) - low) / max(high - low, 1e-12), 0, 1)
    colours = cv2.applyColorMap((255 * scaled).astype(np.uint8), cv2.COLORMAP_INFERNO)
    coloured = np.where(known[:, :, None], cv2.addWeighted(picture, 0.5, colours, 0.5, 0), picture)
    outlines, _ = cv2.findContours(mask.astype(np.uint8), cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
    cv2.drawContours(coloured, outlines, -1, (255, 255, 255), max(1, min(mask.shape) // 400))
    return coloured


def write_picture(path: Path, picture: np.ndarray) -> None:
    """A BGR picture, in the format that its name ends in."""
    quality = [cv2.IMWRITE_JPEG_QUALITY, _QUALITY] if path.suffix == ".jpg" else []
    _, encoded = cv2.imencode(path.suffix, picture, quality)
    data = encoded.tobytes()
    write_whole(path, lambda part: part.write_bytes(data))
