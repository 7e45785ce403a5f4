"""clbench report: from run directories to a page, tables and figures."""

from __future__ import annotations

import argparse

from rich.markup import escape

from clbench import terminal
from clbench.paths import expanded
from clbench.report import page, tables
from clbench.report.reading import read


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


def main(options: argparse.Namespace) -> int:
    """Write the report, print its main table, and say where the page is.

    Raises:
        UserError: a folder is not there or has no runs, or the report cannot be written.
    """
    runs = read(options.folders)
    title = ", ".join(dict.fromkeys(path.resolve().name for path in options.folders))
    report = page.write_page(runs, page.output_folder(options.folders, options.output), title)
    console = terminal.console()
    for group in report.groups:
        if group.found:
            console.print(tables.for_terminal(group))
        if group.differs_in:
            console.print(f"   it differs from the other groups: {escape('; '.join(group.differs_in))}\n")
    for run in runs:
        if run.state != "finished":
            console.print(f"[yellow]{run.state}[/] {escape(run.name)}: {escape(run.reason)}", soft_wrap=True)
    console.print(
        f"{sum(run.state == 'finished' for run in runs)} of {len(runs)} runs are finished; "
        f"the page, and {report.files} tables and figures beside it:\n{escape(str(report.page))}",
        soft_wrap=True,
        highlight=False,
    )
    return 0
