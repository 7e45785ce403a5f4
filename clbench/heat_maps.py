"""Pictures of anomaly maps: image, mask and overlay side by side."""

from pathlib import Path

import cv2
import numpy as np

from clbench.data.images import ImageSet
from clbench.methods.base import Prediction
from clbench.recording.run_directory import write_whole


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
        _, encoded = cv2.imencode(".png", picture)
        data = encoded.tobytes()
        name = f"{kind}-{number:03d}-stage-{stage:02d}.png"
        write_whole(directory / name, lambda part, data=data: part.write_bytes(data))  # type: ignore[misc]


def few(prediction: Prediction, images: ImageSet, count: int = 2) -> list[np.ndarray]:
    """Panels of a task's first defective test images, or of its first where none is defective."""
    maps = prediction.maps.numpy()
    low, high = float(maps.min()), float(maps.max())
    chosen = np.flatnonzero(images.labels.numpy())[:count].tolist() or [0]
    return [panel(images.images[i].numpy(), images.masks[i].numpy(), maps[i], low, high) for i in chosen]


def panel(image: np.ndarray, mask: np.ndarray, heat: np.ndarray, low: float, high: float) -> np.ndarray:
    """Image uint8 [3, H, W], mask bool [H, W] and map [H, W] -> one BGR picture [H, 3 W, 3]."""
    picture = cv2.cvtColor(np.ascontiguousarray(image.transpose(1, 2, 0)), cv2.COLOR_RGB2BGR)
    white = np.repeat(255 * mask[:, :, None].astype(np.uint8), 3, axis=2)
    return np.hstack([picture, white, overlay(picture, mask, heat, low, high)])


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
