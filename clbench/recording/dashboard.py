"""A saved view in Weights & Biases that compares the runs of an experiment, built with wandb-workspaces."""

import json
from collections.abc import Sequence
from typing import Any

from clbench.errors import UserError
from clbench.recording.wandb import cut_name

CURVES = ("pixel_f1", "pixel_auroc", "pixel_ap", "aupro", "image_auroc", "image_f1")
FOOTPRINT = ("memory/architecture_mb", "memory/executed_mb", "memory/additional_mb", "memory/peak_mb")


def view(entity: str, project: str, experiment: str, categories: Sequence[str]) -> Any:
    """Build the view, without asking a server: its runs are grouped by method, strategy and replay size.

    Args:
        entity: user or team that the project belongs to.
        project: the project.
        experiment: name of the experiment, which is the group of its runs.
        categories: names of the categories to show panels of.

    Returns:
        A `wandb_workspaces.workspaces.Workspace`: `save()` sends it, `url` is its address then.

    Raises:
        UserError: wandb-workspaces is not installed, or does not fit the installed wandb.
    """
    try:
        import wandb_workspaces.reports.v2 as panels
        from wandb_workspaces import workspaces
        from wandb_workspaces.expr import And, Config, Metric
    except ImportError as error:
        raise UserError(
            f"the dashboard is built with wandb-workspaces ({error}): pip install 'clbench[dashboard]'"
        ) from error

    def curve(key: str, over: str = "stage") -> Any:
        return panels.LinePlot(title=key, x=over, y=[key], groupby_rangefunc="stddev")

    def summary(key: str) -> Any:
        return panels.SummaryMetric(key)

    def bars(title: str, *names: str) -> Any:
        return panels.BarPlot(title=title, metrics=list(names), orientation="h")

    return (
        workspaces.Workspace(  # one thing, written as it is seen: longer than a screen, and nothing to follow
            entity=entity,
            project=project,
            name=f"clbench {experiment}",
            sections=[
                workspaces.Section(
                    "Quality over stages",
                    is_open=True,
                    panels=[*(curve(f"mean/{metric}") for metric in CURVES), curve("forgetting/pixel_f1")],
                ),
                workspaces.Section(
                    "Memory against quality",
                    is_open=True,
                    panels=[
                        panels.ScatterPlot(
                            title="additional memory, quality",
                            x=summary("memory/additional_mb"),
                            y=summary("final/pixel_f1"),
                            log_x=True,
                        ),
                        bars("footprint, MB", *FOOTPRINT),
                        bars("forgotten, %", "average_forgetting_pct"),
                        bars("training, s", "time/train_s"),
                        bars("an image, ms", "time/inference_ms_per_image"),
                    ],
                ),
                workspaces.Section(
                    "Each category", panels=[curve(f"{name}/pixel_f1") for name in categories]
                ),
                workspaces.Section(
                    "Heat maps over stages",
                    panels=[
                        panels.MediaBrowser(title=name, media_keys=[f"maps/{name}"], num_columns=2)
                        for name in categories
                    ],
                ),
                workspaces.Section(
                    "Training and R matrices",
                    panels=[
                        curve("training/loss", "epoch"),
                        panels.WeavePanelSummaryTable(table_name="R/pixel_f1"),
                    ],
                ),
            ],
            runset_settings=workspaces.RunsetSettings(
                filters=And(Metric("group") == cut_name(experiment)),
                groupby=[Config("method.name"), Config("strategy.name"), Config("replay.size")],
            ),
        )
    )


def specification(built: Any) -> dict[str, Any]:
    """What `save()` sends of a view, as plain data. The one place that uses a private part of wandb-workspaces."""
    return json.loads(built._to_model().model_dump_json(by_alias=True, exclude_none=True))


def categories_sent(entity: str, project: str, experiment: str) -> list[str]:
    """Ask the server for the categories of an experiment's runs; in the order in which the runs have them.

    Raises:
        UserError: the server cannot be asked, or has no runs of the experiment.
    """
    import wandb

    try:
        runs = wandb.Api(timeout=20).runs(f"{entity}/{project}", filters={"group": cut_name(experiment)})
        logged = [key for run in runs for key in run.summary.keys() if key.startswith("maps/")]  # noqa: SIM118
    except (wandb.errors.CommError, wandb.errors.UsageError, ValueError) as error:
        raise UserError(
            f"{entity}/{project} cannot be read ({str(error).splitlines()[0]}): name the categories with --categories"
        ) from error
    if not logged:
        raise UserError(f"{entity}/{project} has no runs of experiment '{experiment}' that were sent")
    return list(dict.fromkeys(key.removeprefix("maps/") for key in logged))
