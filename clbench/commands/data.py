"""clbench data: which datasets there are, how to get them, whether a folder of one is sound, the synthetic one."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from clbench.commands.numbers import whole
from clbench.errors import UserError
from clbench.paths import expanded

if TYPE_CHECKING:
    from collections.abc import Callable

    from clbench.data.acquire.check import CategoryCheck
    from clbench.data.acquire.published import Published


def arguments(parser: argparse.ArgumentParser) -> None:
    """What each action takes: check, list, get and synthetic."""
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    check = actions.add_parser(
        "check",
        help="read all of a dataset, and list all that is wrong",
        description="Reads every image and mask; the exit status is 1 where something is wrong. That there are "
        "more or fewer images than published is said, and is not wrong.",
        epilog="for example: clbench data check data/mvtec_ad",
    )
    check.add_argument("root", type=expanded, metavar="ROOT", help="its folder, what would be dataset.root")
    check.add_argument(
        "--dataset", metavar="NAME", help="which it is; by default it is recognised by its layout"
    )
    known = "the datasets that are known: licence, size, where from"
    actions.add_parser("list", help=known, description=f"Lists {known}.")
    get = actions.add_parser(
        "get",
        help="download and unpack a dataset; clbench data list says which can be",
        description="Shows the licence, asks, downloads (the same command goes on where a download broke off), "
        "checks and unpacks.",
        epilog="for example: clbench data get btad --root data",
    )
    get.add_argument("name", metavar="NAME", help="as clbench data list says it")
    get.add_argument(
        "--root", type=expanded, default=Path("data"), metavar="FOLDER", help="where to; default: data"
    )
    get.add_argument("--accept-licence", action="store_true", help="as a y to the question would")
    get.add_argument("--url", help="of another copy, or the link that a publisher's form leads to")
    get.add_argument(
        "--sha256", metavar="HEX", help="that the archive should have, in place of the known one"
    )
    get.add_argument("--keep-archive", action="store_true", help="do not remove it when it is unpacked")
    synthetic = actions.add_parser(
        "synthetic",
        help="write the synthetic stream to disk",
        description="Draws the ten products of dataset=synthetic and writes them in the MVTec AD layout, as PNG.",
        epilog="for example: clbench data synthetic data/synthetic && "
        "clbench run dataset=mvtec dataset.root=data/synthetic",
    )
    synthetic.add_argument("root", type=expanded, metavar="FOLDER", help="where to; it must be new or empty")
    for name, least, default, what in (
        ("seed", 0, 0, "another one draws other pictures of the same products"),
        ("size", 32, 256, "pixels a side"),  # the least is Synthetic's
        ("train", 1, 40, "normal images a category to learn from"),
        ("test-good", 0, 12, "normal images a category to test with"),
        ("test-defect", 0, 20, "defective images a category to test with"),
    ):
        synthetic.add_argument(
            f"--{name}", type=whole(least), default=default, metavar="N", help=f"{what} ({default})"
        )


def main(options: argparse.Namespace) -> int:
    """Do what was asked, and give the exit status."""
    actions: dict[str, Callable[[argparse.Namespace], int]] = {
        "check": _check,
        "list": _list,
        "get": _get,
        "synthetic": _synthetic,
    }
    try:
        return actions[options.action](options)
    except OSError as error:  # what the file system refuses on the way
        raise UserError(
            f"{error.filename or options.root}: {error.strerror or error}; mend that, or give another folder"
        ) from error


def _check(options: argparse.Namespace) -> int:
    from clbench.data.acquire.check import check_files
    from clbench.data.acquire.published import layout_of, named, recognise, recognise_all

    given = root = options.root.absolute()
    if not root.is_dir():
        raise UserError(f"{root} is no folder: give that of a dataset")
    if options.dataset:
        dataset = named(options.dataset)
        if not dataset.layout.recognises(root):
            root = next((folder for entry, folder in recognise_all(root) if entry == dataset), root)
    else:
        known = recognise(root)
        if known is None:
            above = layout_of(root.parent)
            hint = (
                f"; {root.parent} is {above.title}: check that"
                if above
                else ": say which it is with --dataset NAME"
            )
            raise UserError(f"{root} has the layout of no dataset that is known{hint}")
        dataset, root = known
    with _bar("reading") as (progress, write):
        report = check_files(dataset, root, progress)
        write(f"{root}: dataset={dataset.name}")
        _print_table(report.categories)
        for note in (*report.notes, *_not_checked(given, root)):
            write(f"note: {note}")
        for problem in report.problems:
            write(f"wrong: {problem}")
        write(f"{len(report.problems) or 'nothing'} wrong")
    return 1 if report.problems else 0


def _not_checked(given: Path, root: Path) -> list[str]:
    """A note where the folder that was given holds more datasets than the one that was checked."""
    from clbench.data.acquire.published import recognise_all

    try:
        others = [str(folder) for _, folder in recognise_all(given) if folder != root]
    except (OSError, UserError) as error:  # of no concern for the one that was checked
        return [f"what else there is was not looked for: {error}"]
    return [f"there are more folders like datasets, not checked: {', '.join(others)}"] if others else []


def _print_table(categories: list[CategoryCheck]) -> None:
    from rich.table import Table

    from clbench.terminal import console

    table = Table("category")
    for title in ("train", "test good", "defective", "with mask", "width x height"):
        table.add_column(title, justify="right")
    for category in categories:
        sizes = sorted((width, height) for height, width in category.sizes)
        texts = list(dict.fromkeys(f"{width}x{height}" for width, height in (sizes[:1] + sizes[-1:])))
        size = " to ".join(texts) + (f", {len(sizes)} sizes" if len(sizes) > 1 else "")
        counts = (*category.counts, category.outlined)
        table.add_row(category.name, *map(str, counts), size)
    console().print(table)


def _list(options: argparse.Namespace) -> int:
    from rich.filesize import decimal

    from clbench.data.acquire.published import datasets

    for dataset in sorted(datasets().values(), key=lambda dataset: dataset.name):
        train, good, defective = dataset.total
        size = f", {decimal(dataset.bytes)}" if dataset.bytes else ""
        print(
            f"{dataset.name}: {dataset.title}, {train + good + defective:,} images{size}; {dataset.licence}"
        )
        print(f"    {dataset.page}")
        print(f"    {f'clbench data get {dataset.name}' if dataset.url else dataset.how}")
    return 0


def _get(options: argparse.Namespace) -> int:
    from rich.filesize import decimal

    from clbench.data.acquire.checksums import pin
    from clbench.data.acquire.download import fetch
    from clbench.data.acquire.published import named

    dataset = named(options.name)
    root = options.root.absolute()
    folder = root / dataset.name
    if folder.is_dir() and any(folder.iterdir()):
        print(f"{folder} is there already; to download it anew, remove it first")
        return _say_how(folder)
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder} is a file, where a folder would be: remove it, or give another --root")
    url = options.url or dataset.url
    archive = root / _archive_name(dataset, url)
    by_hand = archive.is_file()
    if not by_hand and url is None:
        place = f"; or download it by hand to {archive}" if dataset.archive else f", in {folder}"
        raise UserError(
            f"{dataset.title} cannot be had from a plain address; see {dataset.page}: {dataset.how}{place}"
        )
    if not by_hand:
        _ask_to_accept(dataset, options.accept_licence)
    try:
        root.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--root={root} cannot be made ({error.strerror}): give another") from error
    with _bar("downloading") as (progress, write):
        if by_hand:
            write(f"{archive} is there already")
        else:
            assert url is not None
            fetch(url, archive, progress)
            write(f"{archive}: {decimal(archive.stat().st_size)}")
    found = _unpack(archive, folder, options.sha256 or dataset.sha256, by_hand)
    if not options.keep_archive:
        archive.unlink()
    status = _say_how(folder)
    if not dataset.sha256:
        pin(archive, found)
    return status


def _archive_name(dataset: Published, url: str | None) -> str:
    """The publisher's name for the archive, or the address's, or another where that is the unpacked folder's name."""
    from clbench.data.acquire.download import address

    name = dataset.archive or (PurePosixPath(urlsplit(address(url)).path).name if url else "")
    return f"{dataset.name}.archive" if name in ("", "..", dataset.name) else name


def _unpack(archive: Path, folder: Path, expected: str | None, by_hand: bool) -> str:
    """Check and unpack an archive, and give its checksum; a bad one is removed, unless it was put there by hand.

    Args:
        expected: its SHA-256 checksum; None where none is known.
        by_hand: whether it was there before the command was started.

    Raises:
        UserError: it is another file, is damaged or does not fit on the disk.
    """
    from clbench.data.acquire.checksums import BadArchive, checksum, pinned, verify
    from clbench.data.acquire.unpack import unpack

    try:
        with _bar("checking") as (progress, write):
            found = checksum(archive, progress)
            write(verify(archive, found, expected))
        with _bar("unpacking") as (progress, _):
            unpack(archive, folder, progress)
        return found
    except BadArchive as error:
        another = "download it again, or give the address of another copy as --url"
        if by_hand or (not expected and pinned(archive)):  # the checksum kept may be what is wrong
            raise UserError(f"{error}; remove it, and {another}") from error
        archive.unlink()  # so that the next try is one
        raise UserError(f"{error}; it was removed: {another}") from error


def _ask_to_accept(dataset: Published, accepted: bool) -> None:
    """Show the licence, and ask on a terminal whether it is accepted.

    Raises:
        UserError: it is not accepted.
    """
    print(f"{dataset.title} is under {dataset.licence}: {dataset.page}")
    if accepted:
        return
    if sys.stdin.isatty() and input("Do you accept its terms? [y/N] ").strip().lower() in ("y", "yes"):
        return
    raise UserError(
        f"nothing was downloaded: {dataset.title} needs its licence accepted; give --accept-licence"
    )


def _say_how(folder: Path) -> int:
    """Print the commands that check and use a dataset.

    Raises:
        UserError: the folder holds none that is known.
    """
    from clbench.data.acquire.published import recognise

    found = recognise(folder)
    if found is None:
        raise UserError(
            f"{folder} has the layout of no dataset that is known: remove it, and get the right archive"
        )
    dataset, root = found
    print(f"clbench data check {root}")
    print(f"clbench run dataset={dataset.name} dataset.root={root}")
    return 0


def _synthetic(options: argparse.Namespace) -> int:
    from clbench.data.synthetic import Synthetic, write_folder

    folder = options.root
    sizes = {name: getattr(options, name) for name in ("seed", "size", "train", "test_good", "test_defect")}
    write_folder(Synthetic(**sizes), folder)
    print(f"clbench run dataset=mvtec dataset.root={folder}")
    return 0


@contextmanager
def _bar(what: str) -> Iterator[tuple[Callable[[int, int | None], None], Callable[[str], None]]]:
    """A progress bar where output is a terminal: functions that move it, and that print a line above it."""
    from rich.progress import Progress

    from clbench.terminal import console

    out = console()
    with Progress(console=out, transient=True, disable=not out.is_terminal) as bar:
        row = bar.add_task(what, total=None)
        yield (
            lambda done, total: bar.update(row, completed=done, total=total),
            lambda text: out.print(text, markup=False, highlight=False, soft_wrap=True),
        )
