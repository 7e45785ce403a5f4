"""What a training step and a predicted batch ask of a GPU: launches, waits and copies, counted on a device that is none.

The pretend device of the tests. Networks are as deep as the paper's, and narrow; batches are the paper's.
"""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from rich.table import Table

ROOT = Path(__file__).parent.parent
LAUNCH_US = 5.0  # of the CPU's time that a launch takes beside an H100: an estimate
SETTINGS = {
    "patchcore": (12, ["dataset.resize=224", "method.memory_size=6000"]),
    "padim": (12, ["dataset.resize=224", "method.features=100"]),
    "cfa": (12, ["dataset.resize=224", "method.batch_size=4"]),
    "stfpm": (24, ["method.batch_size=8"]),
    "fastflow": (64, ["method.batch_size=32", "method.steps=8", "method.trained_normalisation=false"]),
    "draem": (20, ["method.batch_size=4", "method.rotated_share=0.3", "method.texture_count=20"]),
    "efficientad": (12, ["method.batch_size=1", "method.penalty_count=20"]),
}  # images of a task; what is not as in the tests


def table(checkpoint: str | None = None, root: str | None = None) -> Table:
    """Launches, waits and blocking copies of a step and of a predicted batch, and what launches alone take."""
    sys.path.append(str(ROOT / "tests"))
    from pretend_runs import count

    shown = Table(
        "method",
        "a step: launches",
        "waits",
        "copies",
        "ms, estimated",
        "16 images: launches",
        "waits",
        "copies",
        title="A training step, replay included, and 16 images predicted, whose features are computed anew. Copies are "
        f"such as wait; an H100's CPU is thought to take {LAUNCH_US:g} us a launch",
    )
    for method in SETTINGS:
        asked = _asked(method)
        step, batch = (
            [count(asked, name, kind) for kind in ("launch", "wait", "blocking copy")]
            for name in ("step", "timed batch")
        )
        estimate = f"{step[0] * LAUNCH_US / 1000:.1f}"
        shown.add_row(method, *(f"{n:.4g}" for n in step), estimate, *(f"{n:.4g}" for n in batch))
    return shown


def _asked(method: str) -> dict[str, Any]:
    images, settings = SETTINGS[method]
    replay = [] if method in ("patchcore", "padim") else [f"replay.size={images}"]
    command = [
        sys.executable,
        "tests/pretend_runs.py",
        "--json",
        "--images",
        str(images),
        method,
        *settings,
        *replay,
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(done.stderr[-2000:])
    return json.loads(done.stdout)
