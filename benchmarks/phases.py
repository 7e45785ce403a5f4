"""A whole five-task PatchCore run on the synthetic stream, split by phase."""

from rich.table import Table

from benchmarks.running import run

FIVE = "task_order=alphabetical", "dataset.categories=[bottle_top,capsule,circuit,fabric,gear]"


def table(checkpoint: str | None = None, root: str | None = None) -> Table:
    """Seconds of each phase and its share."""
    _, seconds = run("method=patchcore", "strategy=native", *FIVE)
    network = seconds.pop("backbone")
    total = sum(seconds.values())
    shown = Table("phase", "seconds", "share", title="PatchCore, native, five synthetic tasks")
    for phase, spent in sorted(seconds.items(), key=lambda item: -item[1]):
        shown.add_row(phase, f"{spent:.1f}", f"{spent / total:.0%}")
    shown.add_section()
    shown.add_row("all", f"{total:.1f}", "100%")
    shown.add_row("of which in the backbone", f"{network:.1f}", f"{network / total:.0%}")
    return shown
