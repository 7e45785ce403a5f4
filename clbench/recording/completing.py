"""Writing what W&B was not told of complete runs, and what names files where they are no more, from their directories."""

import sys
from collections.abc import Sequence
from pathlib import Path

from clbench.config.schema import BESIDE_SETTINGS
from clbench.errors import UserError, first_line
from clbench.recording.run_directory import RunDirectory
from clbench.recording.wandb import UNTOLD_END, WandbRun, moved
from clbench.results import Results

_COMPLETED = "W&B failed in this run, and may lack heat maps; clbench wandb sync completed the rest"


def complete(folders: Sequence[Path]) -> None:
    """Write what W&B was not told of complete runs, and runs that were moved, to be sent.

    Heat maps that were not written into the run directory, as on a full disk, stay lost.

    What goes wrong with a run is printed in a line, and the others go on.

    Args:
        folders: run directories, or folders of run directories at any depth.
    """
    for path in sorted({file.parent for folder in folders for file in folder.rglob("summary.json")}):
        try:
            _complete(RunDirectory(path))
        except Exception as error:  # noqa: BLE001  (wandb's are of many kinds)
            print(f"warning: {path}: W&B cannot be told the rest: {first_line(error)}", file=sys.stderr)


def _complete(directory: RunDirectory) -> None:
    """Write a run anew where W&B was not told all of it, or it was moved; nothing where it is not complete.

    Raises:
        UserError: another process works in the directory, or a file of it cannot be read or written.
        Exception: what wandb raises.
    """
    summary = directory.summary()
    if summary is None or summary["status"] != "complete":
        return
    missing = summary.pop("not_recorded", None)
    if missing in (None, _COMPLETED) and not moved(directory.path / "wandb"):
        return
    tasks = summary["categories"]
    every = range(len(tasks))
    stages = [[*every]] if summary["strategy_flags"]["joint"] else [[task] for task in every]
    results = Results(tasks, stages, tuple(summary["final"]))
    config = {key: value for key, value in (directory.config() or {}).items() if key not in BESIDE_SETTINGS}
    with directory.lock():
        recorder = WandbRun(
            directory.path, {**config["wandb"], "mode": "offline"}, config, results.categories
        )
        journal = directory.journal()
        journal.close()
        epoch = 0
        for entry in journal.entries:
            if entry["kind"] == "epoch":
                recorder.epoch(entry["stage"], epoch, entry["loss"])
                epoch += 1
            elif entry["kind"] == "evaluation":
                results.add(entry["stage"], results.categories.index(entry["category"]), entry["values"])
        for stage in sorted({entry["stage"] for entry in journal.entries if entry["kind"] == "evaluation"}):
            recorder.stage(stage, results.after(stage))
        said = recorder.finish(summary, {metric: results.matrix(metric) for metric in results.metrics})
        if recorder.missing() is not None:
            raise UserError(said or UNTOLD_END)
        if missing is not None:
            rest = {} if missing.startswith(UNTOLD_END) else {"not_recorded": _COMPLETED}
            directory.write_summary({**summary, **rest})
