"""clbench wandb: send runs to Weights & Biases, and make a view there that compares them."""

from __future__ import annotations

import argparse
import json

from clbench.config import wandb_key
from clbench.errors import UserError
from clbench.paths import expanded


def arguments(parser: argparse.ArgumentParser) -> None:
    """The actions sync and dashboard, and what each takes."""
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    sync = actions.add_parser(
        "sync",
        help="send what is not sent yet of runs",
        description="Sends what is not sent yet of runs. A server that cannot be reached is tried again until Ctrl-C.",
        epilog="for example: clbench wandb sync outputs/demo",
    )
    sync.add_argument(
        "folders",
        nargs="+",
        type=expanded,
        metavar="DIR",
        help="a run directory, or a folder of them: outputs/EXPERIMENT",
    )
    dashboard = actions.add_parser(
        "dashboard",
        help="make a saved view that compares an experiment's methods and strategies",
        description="Makes a saved view that compares an experiment's methods and strategies, memory against quality, "
        "and heat maps, and prints its address. The runs must have been sent. Needs wandb-workspaces: "
        "pip install 'clbench[dashboard]'.",
        epilog="for example: clbench wandb dashboard demo --entity TEAM",
    )
    dashboard.add_argument("experiment", metavar="EXPERIMENT", help="name of the experiment, not its folder")
    dashboard.add_argument("--entity", required=True, help="user or team that the project belongs to")
    dashboard.add_argument("--project", default="clbench", help="default: clbench")
    dashboard.add_argument(
        "--categories",
        nargs="*",
        help="to show panels of; by default those of the runs, which the server is asked for",
    )
    dashboard.add_argument(
        "--print",
        action="store_true",
        help="print the view's specification and send nothing; with --categories, no server is asked either",
    )


def main(options: argparse.Namespace) -> int:
    """Do what was asked, and give the exit status.

    Raises:
        UserError: there is nothing to send, no key to send it with, not all could be sent; or the view cannot be made.
    """
    return _sync(options) if options.action == "sync" else _dashboard(options)


def _sync(options: argparse.Namespace) -> int:
    from clbench.recording.completing import complete
    from clbench.recording.sending import sync

    if missing := [str(folder) for folder in options.folders if not folder.exists()]:
        raise UserError(f"{', '.join(missing)}: there is no such folder; give outputs/EXPERIMENT")
    _need_key("sending")
    complete(options.folders)
    sync(options.folders)
    return 0


def _dashboard(options: argparse.Namespace) -> int:
    from clbench.recording.dashboard import categories_sent, specification, view

    if not options.print or options.categories is None:
        _need_key("a dashboard")
    where = (options.entity, options.project, options.experiment)
    categories = options.categories if options.categories is not None else categories_sent(*where)
    built = view(*where, categories)
    if options.print:
        print(json.dumps(specification(built), indent=2))
    else:
        built.save()
        print(built.url)
    return 0


def _need_key(purpose: str) -> None:
    """Check that there is a key for W&B's server.

    Raises:
        UserError: there is none.
    """
    if not wandb_key():
        raise UserError(f"{purpose} needs a key: set WANDB_API_KEY or run wandb login")
