"""Which backbone for the demo: PatchCore and PaDiM, `single`, with random and with pretrained weights."""

from rich.table import Table

from benchmarks.running import run

METRICS = ("image_auroc", "pixel_auroc", "pixel_f1", "aupro")


def table(checkpoint: str | None = None, root: str | None = None) -> Table:
    """Mean metrics over the tasks of the synthetic stream, and of a folder where one is given."""
    backbones = {
        "small, random": ("backbone.checkpoint=null",),
        "small, pretrained on procedural images": (),
    }
    if checkpoint:
        backbones["resnet18, ImageNet"] = ("backbone=resnet18", f"backbone.checkpoint={checkpoint}")
    streams: dict[str, tuple[str, ...]] = {"synthetic": ()}
    if root:
        streams["folder"] = (
            "dataset=mvtec",
            f"dataset.root={root}",
            "dataset.resize=144",
            "dataset.crop=128",
        )
    shown = Table(
        "stream", "method", "backbone", *METRICS, title="Backbones: mean over tasks, strategy=single"
    )
    for stream, dataset in streams.items():
        for method in ("patchcore", "padim"):
            for name, backbone in backbones.items():
                summary, _ = run(f"method={method}", "strategy=single", *dataset, *backbone)
                shown.add_row(
                    stream, method, name, *[f"{summary['final'][metric]:.3f}" for metric in METRICS]
                )
            shown.add_section()
    return shown
