"""The metrics by name: what each is called and is, and what it needs. Imports no torch and no numpy."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

# False-positive rates that metrics at stored thresholds are measured at, unless `metrics` says others. So few held-out
# images as a category has set no threshold of image scores for a lower rate: 19 images are enough for this one.
PIXEL_RATE, IMAGE_RATE = 0.01, 0.05
# False-positive rates that thresholds are kept for: 0.00001, 0.00002, ..., 0.1, 0.2
RATES = (*(digit / 10**places for places in (5, 4, 3, 2) for digit in range(1, 10)), 0.1, 0.2)


@dataclass(frozen=True)
class Metric:
    """What a metric is.

    Attributes:
        title: in tables.
        about: a line for the reader who points at the title.
        better: which end is good.
        needs: what must be there for it, beside maps, scores and masks: thresholds that were set when a task was
            learned, saturation areas of defects, or a detector that chooses one of the models that it keeps.
    """

    title: str
    about: str
    better: Literal["higher", "lower"] = "higher"
    needs: Literal["thresholds", "saturations", "choice"] | None = None


_BEST = "at the best threshold for the test images, which nobody has: an upper bound"
_STORED = "at the threshold that was set on normal images when a task was learned"

METRICS: Mapping[str, Metric] = {
    "image_auroc": Metric("image AUROC", "of image scores; 0.5 is chance, and below 0.5 stays as it is"),
    "image_ap": Metric("image AP", "average precision of image scores"),
    "image_f1": Metric("image F1", f"F1 of image scores, {_BEST}"),
    "pixel_auroc": Metric("pixel AUROC", "over all pixels of the test images"),
    "pixel_ap": Metric("pixel AP", "average precision over all pixels of the test images"),
    "pixel_f1": Metric("pixel F1", f"over all pixels, {_BEST}"),
    "aupro": Metric("AU-PRO", "area under the per-region overlap up to a false-positive rate of 0.3"),
    "aupro_5": Metric("AU-PRO 5 %", "area under the per-region overlap up to a false-positive rate of 0.05"),
    "aupimo": Metric(
        "AUPIMO",
        "area under the per-image overlap over the logarithm of the false-positive rate, 10^-5 to 10^-4 of the pixels of "
        "normal images; mean over defective images",
    ),
    **{
        f"auspro_{limit}": Metric(
            f"AU-sPRO {limit} %",
            f"area under the saturated per-region overlap up to a false-positive rate of {limit / 100:g}",
            needs="saturations",
        )
        for limit in (1, 5, 10, 30, 100)
    },
    "image_f1_stored": Metric("image F1, stored", f"F1 of image scores {_STORED}", needs="thresholds"),
    "pixel_f1_stored": Metric("pixel F1, stored", f"F1 over all pixels {_STORED}", needs="thresholds"),
    "segf1": Metric(
        "SegF1",
        "F1 over all pixels at mean + 3 deviations of the maps of normal images, as they were when a task was learned",
        needs="thresholds",
    ),
    "image_fpr": Metric(
        "image FPR", f"share of normal test images called defective, {_STORED}", "lower", "thresholds"
    ),
    "pixel_fpr": Metric(
        "pixel FPR", f"share of normal test images' pixels marked, {_STORED}", "lower", "thresholds"
    ),
    "routing_accuracy": Metric(
        "routing", "share of test images that the model of their own task was chosen for", needs="choice"
    ),
}
USUAL = ("image_auroc", "image_ap", "image_f1", "pixel_auroc", "pixel_ap", "pixel_f1", "aupro")
# Those that `metrics.further` may name.
FURTHER = tuple(name for name, metric in METRICS.items() if name not in USUAL and metric.needs != "choice")


def need(names: Sequence[str], what: str) -> bool:
    """Whether one of these metrics needs `what`, see `Metric.needs`."""
    return any(METRICS[name].needs == what for name in names)
