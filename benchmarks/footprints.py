"""The footprints of whole runs with random Wide ResNet-50-2 weights at the paper's sizes, beside the paper's."""

from rich.table import Table

from benchmarks.running import run

PAPER = {"patchcore": (275.6, 184.3), "padim": (275.6, 1541.0)}  # architecture, additional; MB
SMALL = ("dataset.categories=[wood]", "dataset.test_good=1", "dataset.test_defect=3")


def table(checkpoint: str | None = None, root: str | None = None) -> Table:
    """MB counted from live tensors after learning 40 images of 224 x 224 pixels."""
    shown = Table(
        "method", "what", "paper, MB", "counted, MB", "difference", title="Footprints, Wide ResNet-50-2"
    )
    for method, (architecture, additional) in PAPER.items():
        summary, _ = run(
            f"method={method}",
            "strategy=native",
            "backbone=wide_resnet50_2",
            "backbone.pretrained=false",
            "dataset.resize=256",
            "dataset.crop=224",
            *SMALL,
        )
        memory = summary["memory"]
        for what, paper in (("architecture", architecture), ("additional", additional)):
            counted = memory[f"{what}_mb"]
            shown.add_row(method, what, f"{paper:.1f}", f"{counted:.1f}", f"{counted / paper - 1:+.2%}")
        shown.add_row(method, "executed part", "", f"{memory['executed_mb']:.1f}", "")
        shown.add_row(method, "peak", "", f"{memory['peak_mb']:.0f}", "")
        shown.add_section()
    return shown
