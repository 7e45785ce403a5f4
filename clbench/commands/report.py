"""clbench report: from run directories to a page, tables and figures."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from rich.markup import escape

from clbench import terminal
from clbench.errors import UserError, counted
from clbench.paths import expanded
from clbench.report import leaderboard, page, tables
from clbench.report.comparison import grouped
from clbench.report.reading import FoundRun, read


def arguments(parser: argparse.ArgumentParser) -> None:
    """Give a parser the arguments of the command."""
    parser.add_argument(
        "folders",
        nargs="+",
        type=expanded,
        metavar="outputs/EXPERIMENT",
        help="folders of runs, one an experiment",
    )
    parser.add_argument(
        "--output",
        type=expanded,
        help="folder of the report (report/ in the first experiment's, where it is left out)",
    )
    parser.add_argument(
        "--leaderboard",
        action="store_true",
        help="write one table over all experiments in place of the page: leaderboard.csv, .md and .tex",
    )


def main(options: argparse.Namespace) -> int:
    """Write the report, print its main table, and say where the page is.

    Raises:
        UserError: a folder is not there or has no runs, or the report cannot be written.
    """
    runs = read(options.folders)
    if options.leaderboard:
        return _leaderboard(runs, page.output_folder(options.folders, options.output))
    title = ", ".join(dict.fromkeys(path.resolve().name for path in options.folders))
    report = page.write_page(runs, page.output_folder(options.folders, options.output), title)
    console = terminal.console()
    for group in report.groups:
        if group.found:
            console.print(tables.for_terminal(group, console))
        if group.differs_in:
            console.print(f"   it differs from the other groups: {escape('; '.join(group.differs_in))}\n")
    for run in runs:
        if run.state != "finished":
            console.print(f"[yellow]{run.state}[/] {escape(run.name)}: {escape(run.reason)}", soft_wrap=True)
    console.print(
        f"finished: {sum(run.state == 'finished' for run in runs)} of {counted(len(runs), 'run')}; "
        f"the page, and {counted(report.files, 'table or figure', 'tables and figures')} beside it:\n"
        f"{escape(str(report.page))}",
        soft_wrap=True,
        highlight=False,
    )
    return 0


def _leaderboard(runs: Sequence[FoundRun], folder: Path) -> int:
    """Write the table over all experiments, and say where it is and which runs are not in it.

    Raises:
        UserError: no run is finished, or a file cannot be written.
    """
    groups = [group for group in grouped(runs) if group.found]
    if not groups:
        raise UserError(
            f"none of {counted(len(runs), 'run')} is finished, so a leaderboard has no rows: finish some, or "
            "give more folders"
        )
    paths = leaderboard.write(groups, folder)
    console = terminal.console()
    for run in runs:
        if run.state != "finished":
            console.print(f"[yellow]{run.state}[/] {escape(run.name)}: {escape(run.reason)}", soft_wrap=True)
    rows = sum(len(group.found) for group in groups)
    console.print(
        f"{counted(rows, 'row')} of {counted(len(groups), 'group')} of runs that compare:",
        soft_wrap=True,
        highlight=False,
    )
    for path in paths:
        console.print(escape(str(path)), soft_wrap=True, highlight=False)
    return 0
