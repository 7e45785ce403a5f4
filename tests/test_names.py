"""Whatever a category is called: it works, or is refused before anything is learned."""

import csv
import html
import os
from pathlib import Path

import numpy as np
import pytest
from conftest import Train, clbench, make_category

from clbench.data.stream import name_problem

ODD = [
    "a*b",
    "a,b",
    "a=b",
    "1e3",
    "null",
    "01",
    "my part",
    " lead",
    'say "it\'s"',
    "${oops}",
    "{a: b}",
    "[bold]",
    "a+b",
    "a\\b",
    "<b>&amp;",
    "a_b%c#d$",
    "-x",
    "бутылка",
    "瓶子",
    "🔩",
    "é",  # as Macs write it
    "б" * 100,
]


def test_odd_names_give_what_plain_names_give(train: Train, tmp_path: Path) -> None:
    names = sorted(ODD)
    plain = {name: f"part_{number:02d}" for number, name in enumerate(names)}
    for number, name in enumerate(names):
        for folder, called in (("odd", name), ("plain", plain[name])):
            make_category(tmp_path / "made", np.random.default_rng(number), train=2)
            (tmp_path / folder).mkdir(exist_ok=True)
            (tmp_path / "made").rename(tmp_path / folder / called)
    given = ("method=patchcore", "strategy=joint", "maps=few")
    tables = []
    for folder in ("odd", "plain"):
        result = train(*given, f"dataset.root={tmp_path / folder}", f"experiment={folder}", "wandb=offline")
        assert result.returncode == 0, result.stderr
        (run,) = (path.parent for path in (tmp_path / "outputs" / folder).glob("*/summary.json"))
        with open(run / "metrics.csv", encoding="utf-8", newline="") as file:
            tables.append(list(csv.DictReader(file)))
    for row in tables[0]:
        row["task"], row["category"] = plain[row["task"]], plain[row["category"]]
    assert tables[0] == tables[1]
    odd = tmp_path / "outputs" / "odd"
    assert clbench("report", str(odd)).returncode == 0
    page = (odd / "report" / "index.html").read_text(encoding="utf-8")
    assert all(html.escape(name, quote=False) in page for name in ("<b>&amp;", "a=b", "бутылка"))


@pytest.mark.parametrize(
    "name",
    [
        "a\nb",
        "a\tb",
        "a\x1b[31mb",
        "a\u2028b",
        os.fsdecode(b"caf\xe9"),
        "x" * 250,
        "б" * 101,
        "mean",
        "final",
        "R",
    ],
)
def test_other_names_are_refused_in_one_line_before_anything_is_learned(
    name: str, train: Train, tmp_path: Path
) -> None:
    for number, category in enumerate(("brick", "odd")):
        make_category(tmp_path / "data" / category, np.random.default_rng(number))
    (tmp_path / "data" / "odd").rename(tmp_path / "data" / name)
    result = train(f"dataset.root={tmp_path / 'data'}")
    assert result.returncode == 1 and result.stderr.count("\n") == 1
    assert "the category '" in result.stderr and "rename its folder" in result.stderr
    assert not list(tmp_path.glob("outputs/*/*/metrics.csv"))
    checked = clbench("data", "check", str(tmp_path / "data"))
    assert checked.returncode == 1 and "rename its folder" in checked.stdout


@pytest.mark.parametrize("name", ["", ".", "..", "a/b"])
def test_names_from_a_list_can_be_no_paths(name: str) -> None:
    assert (
        name_problem(name) == f"the category '{name}' has a name that no folder can have; rename its folder"
    )


def test_two_tasks_cannot_have_one_name(train: Train, tmp_path: Path) -> None:
    for number, name in enumerate(("a", "b", "a+b")):
        make_category(tmp_path / "data" / name, np.random.default_rng(number), train=2)
    given = ("strategy=joint", f"dataset.root={tmp_path / 'data'}")
    refused = train(*given, "task_order.tasks=[[a,b],'a+b']")
    assert refused.returncode == 1 and "two tasks would be called 'a+b'" in refused.stderr
    assert train(*given, "task_order.tasks=[a,b,'a+b']").returncode == 0
