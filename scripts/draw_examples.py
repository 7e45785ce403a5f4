"""The picture in docs/own-images.md: defects of the synthetic stream, their masks, and what a trained run makes of them.

python scripts/draw_examples.py outputs/demo/method=patchcore,strategy=native docs/maps.jpg
"""

import argparse
from pathlib import Path

import cv2
import numpy as np
import torch

import clbench
from clbench.data.samples import Geometry
from clbench.data.synthetic import Drawn, Synthetic
from clbench.recording.heat_maps import panel

SHOWN = {
    "bottle_top": "crack",
    "circuit": "thread",
    "gear": "crack",
    "leather": "hole",
    "metal": "deformation",
    "washer": "scratch",
}


def main() -> None:
    """One column of image, mask and map for each product."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path)
    parser.add_argument("output", type=Path)
    given = parser.parse_args()
    detector, geometry, columns = clbench.load(given.run), Geometry(160), []
    for category, kind in SHOWN.items():
        samples = [one for one in Synthetic().samples(category, "test") if isinstance(one, Drawn)]
        image, mask = next(one for one in samples if one.kind == kind).read()
        assert mask is not None
        picture, outline = geometry.image(image), geometry.mask(mask)
        pixels = torch.from_numpy(picture.transpose(2, 0, 1).copy())
        with torch.no_grad():
            heat = detector(pixels[None]).maps[0].numpy()
        whole = panel(pixels.numpy(), outline, heat, float(heat.min()), float(heat.max()))
        columns.append(np.vstack(np.hsplit(whole, 3)))
    given.output.parent.mkdir(parents=True, exist_ok=True)
    cv2.imwrite(str(given.output), np.hstack(columns))


if __name__ == "__main__":
    main()
