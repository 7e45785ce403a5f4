"""A saved view in Weights & Biases that compares the runs of an experiment.

    python -m clbench.recording.dashboard EXPERIMENT --entity TEAM [--project clbench]    # prints its address

It needs the runs to be sent, and wandb-workspaces (pip install 'clbench[dashboard]'). With --print, and no server, it
prints the view's specification.
"""

import argparse
import json
import sys
from typing import Any

from clbench.errors import UserError

CURVES = ("pixel_f1", "pixel_auroc", "pixel_ap", "aupro", "image_auroc", "image_f1")
FOOTPRINT = ("memory/architecture_mb", "memory/executed_mb", "memory/additional_mb", "memory/peak_mb")


def view(entity: str, project: str, experiment: str, tasks: list[str]) -> Any:
    """The view: a wandb_workspaces Workspace, its runs grouped by method and strategy.

    Raises:
        UserError: wandb-workspaces is not installed.
    """
    try:
        import wandb_workspaces.reports.v2 as panels
        from wandb_workspaces import workspaces
        from wandb_workspaces.expr import And, Config, Metric
    except ImportError as error:
        raise UserError(
            "the dashboard is built with wandb-workspaces: pip install 'clbench[dashboard]'"
        ) from error

    def curve(key: str, over: str = "stage") -> Any:
        return panels.LinePlot(title=key, x=over, y=[key], groupby_rangefunc="stddev")

    def summary(key: str) -> Any:
        return panels.SummaryMetric(key)

    def bars(title: str, *names: str) -> Any:
        return panels.BarPlot(title=title, metrics=list(names), orientation="h")

    return workspaces.Workspace(
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
            workspaces.Section("Each task", panels=[curve(f"{task}/pixel_f1") for task in tasks]),
            workspaces.Section(
                "Heat maps over stages",
                panels=[
                    panels.MediaBrowser(title=task, media_keys=[f"maps/{task}"], num_columns=2)
                    for task in tasks
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
            filters=And(Metric("group") == experiment),
            groupby=[Config("method.name"), Config("strategy.name"), Config("replay.size")],
        ),
    )


def main() -> None:
    """The command; see the module's text."""
    about, _, _ = (__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser(prog="python -m clbench.recording.dashboard", description=about)
    parser.add_argument("experiment")
    parser.add_argument("--entity", required=True, help="user or team that the project is of")
    parser.add_argument("--project", default="clbench")
    parser.add_argument(
        "--tasks", nargs="*", help="left out: those of the experiment's runs, which are asked for"
    )
    parser.add_argument(
        "--print", action="store_true", help="the specification, and ask no server but for tasks"
    )
    given = parser.parse_args()
    try:
        tasks = (
            given.tasks if given.tasks is not None else _tasks(given.entity, given.project, given.experiment)
        )
        built = view(given.entity, given.project, given.experiment, tasks)
        if given.print:
            print(json.dumps(specification(built), indent=2))
        else:
            built.save()
            print(built.url)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


def specification(built: Any) -> dict[str, Any]:
    """What is sent of a view, as plain data."""
    return json.loads(built._to_model().model_dump_json(by_alias=True, exclude_none=True))


def _tasks(entity: str, project: str, experiment: str) -> list[str]:
    """The tasks of an experiment's runs, in the order of the first.

    Raises:
        UserError: they cannot be had.
    """
    import wandb

    try:
        runs = wandb.Api(timeout=20).runs(f"{entity}/{project}", filters={"group": experiment})
        logged = [key for run in runs for key in run.summary.keys() if key.startswith("maps/")]  # noqa: SIM118
    except (wandb.errors.CommError, wandb.errors.UsageError, ValueError) as error:
        raise UserError(
            f"{entity}/{project} cannot be read ({str(error).splitlines()[0]}): name the tasks with --tasks"
        ) from error
    if not logged:
        raise UserError(f"{entity}/{project} has no runs of experiment '{experiment}' that were sent")
    return list(dict.fromkeys(key.removeprefix("maps/") for key in logged))


if __name__ == "__main__":
    main()
