"""The pictures of docs/gallery.md: products of the synthetic stream, and maps before and after forgetting.

python scripts/draw_gallery.py docs/gallery outputs/pictures/*strategy=finetune* outputs/pictures/*strategy=native*

It takes runs with maps=few, as `make pictures` does them, and prints the rows of the page's tables.
"""

import argparse
import json
from pathlib import Path

import cv2
import numpy as np

from clbench.data.samples import GOOD, Geometry
from clbench.data.synthetic import Drawn, Synthetic
from clbench.recording.heat_maps import write_picture
from clbench.report.titles import method_title

_SIDE = 150  # pixels of a picture in a strip
_GAP = 4


def main() -> None:
    """A strip for each product, and one for each run."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("output", type=Path)
    parser.add_argument("runs", type=Path, nargs="+")
    given = parser.parse_args()
    given.output.mkdir(parents=True, exist_ok=True)
    stream = Synthetic()
    for number, category in enumerate(stream.categories):
        samples = [one for one in stream.samples(category, "test") if isinstance(one, Drawn)]
        kinds = sorted({one.kind for one in samples} - {GOOD})
        kind = kinds[number % len(kinds)]
        good, bad = (next(one for one in samples if one.kind == each) for each in (GOOD, kind))
        image, mask = bad.read()
        assert mask is not None
        white = np.repeat(255 * mask[:, :, None].astype(np.uint8), 3, axis=2)
        write_picture(
            given.output / f"{category}.jpg", strip(good.read()[0][..., ::-1], image[..., ::-1], white)
        )
        print(
            f"| {category} | {kind} | ![{category}: a good one, one with a {kind}, and its mask](gallery/{category}.jpg) |"
        )
    for run in given.runs:
        summary = json.loads((run / "summary.json").read_text(encoding="utf-8"))
        method, strategy = summary["method"], summary["strategy"]
        first = summary["tasks"][0]
        picture = next(path for path in sorted((run / "maps" / first / "few").glob("*-stage-00.jpg")))
        begin = picture.name.removesuffix("-stage-00.jpg")
        names = [f"{begin}.jpg", f"{begin}-mask.png", picture.name, last_drawn(picture.parent, begin)]
        parts = [cv2.imread(str(picture.parent / name)) for name in names]
        write_picture(given.output / f"{method}-{strategy}.jpg", strip(*parts))
        words = f"{method_title(method)}, {strategy}: image, mask, map when learned, map at the end"
        print(f"| {method_title(method)} | `{strategy}` | ![{words}](gallery/{method}-{strategy}.jpg) |")


def last_drawn(folder: Path, begin: str) -> str:
    """The name of the map of the last stage that drew one: nothing changed in later ones."""
    return max(path.name for path in folder.glob(f"{begin}-stage-*.jpg"))


def strip(*pictures: np.ndarray) -> np.ndarray:
    """Pictures, BGR uint8 [H, W, 3], side by side on white: uint8 [150, …, 3]."""
    geometry = Geometry(_SIDE)
    gap = np.full((_SIDE, _GAP, 3), 255, np.uint8)
    parts = [part for picture in pictures for part in (gap, geometry.image(np.ascontiguousarray(picture)))]
    return np.hstack(parts[1:])


if __name__ == "__main__":
    main()
