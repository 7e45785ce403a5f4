"""A finished run's detector, for use elsewhere."""

from pathlib import Path

from clbench import instantiation
from clbench.errors import UserError
from clbench.methods.base import Detector
from clbench.recording.checkpoint import Checkpoints
from clbench.recording.run_directory import RunDirectory


def load(run_directory: Path | str, *, task: str | None = None, device: str = "auto") -> Detector:
    """The detector that a run has trained so far: call it on images to get maps and scores.

    Args:
        run_directory: outputs/<experiment>/<run>.
        task: whose model, under `strategy=single`, which has one for each.
        device: `auto`, `cpu`, `cuda` or `cuda:1`.

    Returns:
        A detector in evaluation mode. It takes images, uint8 or float in [0, 1], [B, 3, H, W], of the size
        that the run was trained at, and gives `maps` [B, H, W] and `scores` [B].

    Raises:
        UserError: the directory holds no trained run, or the task is not one of its tasks.
    """
    directory = RunDirectory(run_directory)
    config, summary = directory.config(), directory.summary()
    chosen = instantiation.device(
        {"deterministic": False, "threads": None, **(config or {}).get("gpu", {}), "device": device}
    )
    saved = Checkpoints(directory.path / "checkpoint", str(chosen)).load_stage()
    if config is None or summary is None or saved is None:
        raise UserError(
            f"{directory.path} holds no trained detector (config.yaml, summary.json and checkpoint/): "
            "give the directory of a run, outputs/<experiment>/<run>"
        )
    strategy = instantiation.strategy(config, instantiation.detector(config).to(chosen))
    stage, tensors, _ = saved
    strategy.restore(tensors)
    tasks = summary["tasks"][: stage + 1]
    if config["strategy"]["name"] != "single":
        task = tasks[0]
    if task not in tasks:
        raise UserError(f"load(task={task!r}): this run has a model for each of {', '.join(tasks)}")
    return strategy.detector_for(tasks.index(task)).eval()
