"""The report says what can be worked out by hand, and its page works in a browser without network."""

import csv
import io
import json
import re
import shutil
import time
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import ROOT, Train

from clbench import cli
from clbench.config import check, flat, sources
from clbench.errors import UserError
from clbench.metrics import continual
from clbench.metrics.names import USUAL
from clbench.recording.run_directory import RunDirectory
from clbench.report import earlier, page, tables, titles
from clbench.report.comparison import PAPER_TASKS, Group, grouped
from clbench.report.figures import figures
from clbench.report.reading import FoundRun, read
from clbench.report.rows import marks
from clbench.report.titles import strategy_styles

Matrix = Sequence[Sequence[float | None]]
JUST_AND_FINAL: Matrix = [[0.6], [0.3, 0.5], [0.15, 0.4, 0.45]]  # a mean of 1/3 after the last of three tasks
JOINT: Matrix = [[0.5, 0.6, 0.7]]


@cache
def composed(*overrides: str) -> str:
    return json.dumps(check(sources.composed(*overrides)).plain())


FLAGS = {  # of the strategies in the package, as their classes say
    "native": {"joint": False, "continual": True, "needs_gradients": False},
    "replay": {"joint": False, "continual": True, "needs_gradients": False},
    "finetune": {"joint": False, "continual": True, "needs_gradients": False},
    "joint": {"joint": True, "continual": False, "needs_gradients": False},
    "single": {"joint": False, "continual": False, "needs_gradients": False},
}


def departures(config: dict[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """What a run stores: settings that its choices alone are not composed to, each with the usual value."""
    chosen = ("benchmark", "method", "dataset", "strategy", "seed", "dataset.root")
    choices = [text for text in overrides if text.partition("=")[0] in chosen]
    usual = dict(flat(json.loads(composed(*choices))))
    usual["dataset.root"] = "???"
    return {key: usual.get(key, "absent") for key, value in flat(config) if value != usual.get(key, "absent")}


def make(
    experiment: Path,
    *overrides: str,
    R: Matrix = JUST_AND_FINAL,
    tasks: Sequence[str | Sequence[str]] = ("cap", "nut", "pin"),
    status: str = "complete",
    name: str | None = None,
    earlier: bool = False,
    strategy: dict[str, Any] | None = None,
    flags: dict[str, bool] | None = None,
    changes: dict[str, Any] | None = None,
) -> Path:
    """A run directory whose every metric has the matrix R: [stage][category].

    Args:
        tasks: names of categories; a list is a task of several.
        earlier: as earlier versions wrote it, without flags, categories and departures.
        strategy: a user's own strategy in place of the overrides': its node of the config.
        flags: of that strategy.
        changes: keys of config.yaml that are written with other values, not in its departures.
    """
    path = experiment / (name or ",".join(text.replace("/", "-") for text in overrides))
    directory = RunDirectory(path)
    directory.create()
    config = json.loads(composed(*overrides))
    stored = departures(config, overrides)
    if strategy:
        config["strategy"], config["replay"]["size"] = strategy, None
        stored |= {f"strategy.{key}": 1.0 for key in strategy if key not in ("name", "_target_")}
    config |= changes or {}
    groups = [[task] if isinstance(task, str) else list(task) for task in tasks]
    names = ["+".join(group) for group in groups]
    columns = [(task, category) for task, group in enumerate(groups) for category in group]
    if earlier:
        assert len(columns) == len(groups), "earlier versions had no categories"
    rows = [
        "stage,task_index,task,metric,value" if earlier else "stage,task_index,task,category,metric,value"
    ]
    for stage, row in enumerate(R):
        for (task, category), value in zip(columns, row, strict=False):
            where = [str(stage), str(task), names[task], *([] if earlier else [category])]
            word = "undefined" if value is None else f"{value:.6f}"
            rows += [",".join([*where, metric, word]) for metric in USUAL]
    (path / "metrics.csv").write_text("\n".join(rows) + "\n")
    made_by = {"device": "cpu (by hand)", "git_revision": "0"}
    written = {**config, **({} if earlier else {"departures": stored}), "made_by": made_by}
    (path / "config.yaml").write_text(yaml.safe_dump(written, sort_keys=False))
    identity = {
        "status": status,
        "method": config["method"]["name"],
        "strategy": config["strategy"]["name"],
        "replay_size": config["replay"]["size"],
        "backbone": "resnet18",
        "dataset": config["dataset"]["name"],
        "tasks": names,
        "seed": config["seed"],
    }
    if not earlier:
        identity |= {
            "strategy_flags": flags or FLAGS[config["strategy"]["name"]],
            "categories": groups,
        }
    results = {
        "final": {metric: continual.final_mean(R) for metric in USUAL},
        "memory": {"architecture_mb": 20.0, "executed_mb": 9.0, "additional_mb": 30.0, "peak_mb": 800.0},
        "time": {"train_s": 90.0, "eval_s": 30.0, "inference_ms_per_image": 5.0},
    }
    ends = {"complete": results, "failed": {"reason": "ValueError: <it> broke & said so"}, "running": {}}
    directory.write_summary({**identity, **ends[status]})
    return path


def only_group(experiment: Path) -> Group:
    (group,) = grouped(read([experiment]))
    return group


def values(group: Group, strategy: str, key: str) -> Any:
    (row,) = (row for row in group.rows if row.variant.strategy_title == strategy and not row.published)
    return row.values[key]


def test_gap_and_forgetting_are_what_the_paper_defines(tmp_path: Path) -> None:
    make(tmp_path, "method=padim", "strategy=native")
    make(tmp_path, "method=padim", "strategy=joint", R=JOINT)
    group = only_group(tmp_path)
    assert values(group, "native", "pixel_f1").mean == pytest.approx((0.15 + 0.4 + 0.45) / 3)
    assert values(group, "native", "relative_gap_pct").mean == pytest.approx(100 * (0.6 - 1 / 3))
    assert values(group, "native", "average_forgetting_pct").mean == pytest.approx((75 + 20) / 2)
    assert values(group, "joint", "relative_gap_pct").mean is None
    assert values(group, "joint", "average_forgetting_pct").mean is None
    assert values(group, "native", "training_time_min").mean == 1.5


def test_seeds_make_a_mean_and_a_sample_deviation(tmp_path: Path) -> None:
    for seed, final in enumerate((0.2, 0.4, 0.6)):
        make(
            tmp_path, "method=padim", "strategy=native", f"seed={seed}", R=[[0.5], [final, final]], tasks="ab"
        )
    spread = values(only_group(tmp_path), "native", "pixel_f1")
    assert (spread.mean, spread.deviation, spread.count) == (pytest.approx(0.4), pytest.approx(0.2), 3)
    assert tables.spread_text(spread, 3) == "0.400 ± 0.200"


def test_a_gap_is_taken_seed_by_seed(tmp_path: Path) -> None:
    for seed, easier in enumerate((0.0, 0.3)):
        one = ("method=padim", f"seed={seed}")
        make(tmp_path, *one, "strategy=native", R=[[0.5], [0.2 + easier, 0.2 + easier]], tasks="ab")
        make(tmp_path, *one, "strategy=joint", R=[[0.3 + easier, 0.3 + easier]], tasks="ab")
    spread = values(only_group(tmp_path), "native", "relative_gap_pct")
    assert (spread.mean, spread.deviation) == (pytest.approx(10), pytest.approx(0, abs=1e-9))


def test_a_gap_is_taken_from_the_joint_run_of_the_same_settings_alone(tmp_path: Path) -> None:
    make(tmp_path, "method=stfpm", "strategy=finetune", "method.epochs=1")
    make(tmp_path, "method=stfpm", "strategy=joint", "method.epochs=2", R=JOINT)
    make(tmp_path, "method=padim", "strategy=joint", "method.features=7", R=JOINT)
    group = only_group(tmp_path)
    assert all(
        row.values["relative_gap_pct"].mean is None for row in group.rows if row.variant.strategy != "joint"
    )
    titles = {row.variant.method_title for row in group.rows}
    assert titles == {"STFPM, epochs=1", "STFPM, epochs=2", "PaDiM, features=7"}


@pytest.mark.parametrize(
    "setting", ["dataset.resize=64", "backbone.checkpoint=null", "task_order=random", "evaluate=all"]
)
def test_runs_of_other_settings_are_another_group(setting: str, tmp_path: Path) -> None:
    make(tmp_path, "method=padim", "strategy=native")
    make(tmp_path, "method=patchcore", "strategy=finetune", "seed=3")
    make(tmp_path, "method=padim", "strategy=native", setting)
    groups = grouped(read([tmp_path]))
    assert [len(group.runs) for group in groups] == [2, 1]
    assert any(setting.partition("=")[0].split(".")[0] in text for text in groups[1].differs_in)


def test_a_fixed_seed_of_the_data_leaves_all_seeds_in_one_group(tmp_path: Path) -> None:
    for seed in (0, 1, 2):
        make(tmp_path, "method=padim", "strategy=native", "dataset.seed=0", f"seed={seed}")
    assert only_group(tmp_path).rows[0].seeds == [0, 1, 2]


def test_one_size_given_to_all_leaves_methods_whose_own_it_is_in_one_group(tmp_path: Path) -> None:
    given = ("dataset=mvtec", "dataset.root=x", "dataset.crop=null")
    make(tmp_path, "method=padim", "strategy=finetune", *given)
    make(tmp_path, "method=stfpm", "strategy=finetune", *given)  # which takes 256 x 256 anyway
    assert [row.variant.method for row in only_group(tmp_path).rows] == ["padim", "stfpm"]
    make(tmp_path, "method=cfa", "strategy=finetune", *given[:2])
    assert sorted(len(group.runs) for group in grouped(read([tmp_path]))) == [1, 2]


def test_a_run_that_is_there_twice_counts_once(tmp_path: Path) -> None:
    make(tmp_path / "old", "method=padim", "strategy=native")
    time.sleep(0.02)
    make(tmp_path / "new", "method=padim", "strategy=native")
    runs = read([tmp_path / "old", tmp_path / "new"])
    (group,) = grouped(runs)
    assert [run.state for run in runs] == ["repeated", "finished"]
    assert len(group.rows[0].runs) == 1


def test_best_and_worst_are_among_those_that_learn_task_by_task(tmp_path: Path) -> None:
    make(tmp_path, "method=padim", "strategy=native", R=[[0.5], [0.4, 0.4]], tasks="ab")
    make(tmp_path, "method=padim", "strategy=finetune", R=[[0.5], [0.1, 0.3]], tasks="ab")
    make(tmp_path, "method=padim", "strategy=joint", R=[[0.9, 0.9]], tasks="ab")
    rows = only_group(tmp_path).rows
    marked = {(rows[index].variant.strategy_title, key): mark for (index, key), mark in marks(rows).items()}
    assert marked["native", "pixel_f1"] == "best" and marked["finetune", "pixel_f1"] == "worst"
    assert marked["native", "average_forgetting_pct"] == "best"  # where less is better
    assert ("joint", "pixel_f1") not in marked
    assert not any(key == "additional_mb" for _, key in marked)  # all alike


@pytest.fixture
def mixed(tmp_path: Path) -> Path:
    """An experiment in which everything that can be wrong is."""
    make(tmp_path, "method=padim", "strategy=native", R=[[0.5], [None, 0.25]], tasks=("<b>a&b</b>", "50%_$x"))
    make(tmp_path, "method=padim", "strategy=finetune", R=[[0.5]], status="failed")
    make(tmp_path, "method=padim", "strategy=joint", R=[], status="running")
    make(tmp_path, "method=patchcore", "strategy=native", R=[[0.5]], tasks=["alone"])
    make(
        tmp_path, "method=stfpm", "strategy=finetune", R=[[None], [None, None]], tasks="ab", name="undefined"
    )
    cut = make(tmp_path, "method=cfa", "strategy=finetune")
    (cut / "metrics.csv").write_text((cut / "metrics.csv").read_text()[:300])
    torn = make(tmp_path, "method=cfa", "strategy=joint", R=JOINT)
    (torn / "summary.json").write_text("{")
    strange = make(tmp_path, "method=cfa", "strategy=single")
    (strange / "config.yaml").write_text("a: [")
    (tmp_path / "submitted").mkdir()
    (tmp_path / "submitted" / "run.lock").touch()
    return tmp_path


def test_what_is_not_finished_is_listed_with_its_reason(mixed: Path) -> None:
    runs = read([mixed])
    states = {run.path.name: run.state for run in runs}
    assert states["method=padim,strategy=finetune"] == "failed"
    assert states["method=padim,strategy=joint"] == "unfinished" == states["submitted"]
    assert {name for name, state in states.items() if state == "damaged"} == {
        "method=cfa,strategy=finetune",
        "method=cfa,strategy=joint",
        "method=cfa,strategy=single",
    }
    report = page.write_page(runs, mixed / "report", "mixed")
    text = report.page.read_text()
    assert "ValueError: &lt;it&gt; broke &amp; said so" in text and "&lt;b&gt;a&amp;b&lt;/b&gt;" in text
    assert "<b>a&b</b>" not in text and "<it>" not in text
    for run in runs:
        assert run.state == "finished" or f"<code>{mixed.name}/{run.path.name}</code>" in text


def test_what_others_let_expect_is_said_to_be_absent(tmp_path: Path) -> None:
    for seed in (0, 1):
        make(tmp_path, "method=stfpm", "strategy=finetune", f"seed={seed}")
    make(tmp_path, "method=cfa", "strategy=finetune", "seed=1")
    make(tmp_path, "method=cfa", "strategy=joint", "seed=1", R=JOINT)
    assert only_group(tmp_path).absent == [
        "CFA, finetune: seed 0",
        "CFA, joint: seed 0",
        "STFPM, joint: no run",
    ]


def test_csv_markdown_and_latex_say_the_same(tmp_path: Path) -> None:
    for seed in (0, 1):
        make(
            tmp_path,
            "method=padim",
            "strategy=native",
            f"seed={seed}",
            R=[[0.5], [0.1 + seed, 0.4]],
            tasks="ab",
        )
    make(tmp_path, "method=padim", "strategy=finetune", R=[[0.5], [0.2, 0.25]], tasks="ab")
    assert cli.main(["report", str(tmp_path)]) == 0
    folder = tmp_path / "report" / "tables"
    as_csv = list(csv.DictReader(io.StringIO((folder / "comparison.csv").read_text())))
    markdown = [
        [cell.strip().strip("*") for cell in line.strip("|\n").split("|")]
        for line in (folder / "comparison.md").read_text().splitlines()
        if line.startswith("| PaDiM")
    ]
    latex = [
        line.removesuffix(r" \\").split(" & ")
        for line in (folder / "comparison.tex").read_text().splitlines()
        if line.startswith("PaDiM")
    ]
    assert len(as_csv) == len(markdown) == len(latex) == 2
    for one, two, three in zip(as_csv, markdown, latex, strict=True):
        shown = f"{float(one['pixel_f1']):.3f}"
        if one["pixel_f1_deviation"]:
            shown += f" ± {float(one['pixel_f1_deviation']):.3f}"
        plain = (
            three[6]
            .replace(r"\textbf{", "")
            .replace(r"\underline{", "")
            .replace("}", "")
            .replace(r"$\pm$", "±")
        )
        assert two[6] == shown == plain
    assert "**" in (folder / "comparison.md").read_text()
    assert r"\textbf{" in (folder / "comparison.tex").read_text()


def test_a_users_words_stay_words_in_latex_and_markdown() -> None:
    cell = tables.Cell(r"50%_$x & {a} | <b>\#", "x")
    table = tables.Table("t", "of_all", [tables.Column("k", "k")], [tables.Line([cell])])
    assert r"50\%\_\$x \& \{a\} | <b>\textbackslash{}\#" in tables.as_latex(table)
    assert r"50%\_$x & {a} \| \<b\>\\\#" in tables.as_markdown(table)


def test_the_published_row_stands_beside_ours_where_the_setting_is_the_papers(tmp_path: Path) -> None:
    R = [[0.5] * (stage + 1) for stage in range(10)]
    paper = ("benchmark=paper", "dataset.root=/somewhere", "method=padim")
    make(tmp_path, *paper, R=R, tasks=PAPER_TASKS)
    ours, theirs = only_group(tmp_path).rows
    assert (ours.published, theirs.published) == (False, True)
    assert theirs.values["average_forgetting_pct"].mean == 19.12 and theirs.values["pixel_f1"].mean == 0.17
    assert not any(index == 1 for index, _ in marks([ours, theirs]))
    make(tmp_path / "other", *paper, "method.features=100", R=R, tasks=PAPER_TASKS)
    assert not any(row.published for row in only_group(tmp_path / "other").rows)
    # At 256 pixels STFPM is as published, whatever the size that others were given.
    for method in ("padim", "stfpm"):
        given = (*paper[:2], f"method={method}", "replay.size=300", "dataset.crop=null")
        make(tmp_path / "larger", *given, R=R, tasks=PAPER_TASKS)
    rows = only_group(tmp_path / "larger").rows
    assert [row.variant.method for row in rows if row.published] == ["stfpm"]


def test_methods_compare_each_at_the_papers_size_and_backbone_which_is_said(tmp_path: Path) -> None:
    paper = ("benchmark=paper", "dataset.root=/somewhere", "strategy=finetune")
    weights = tmp_path / "w.safetensors"
    weights.touch()
    make(tmp_path, *paper, "method=padim", f"backbone.checkpoint={weights}", tasks="abc")
    make(tmp_path, *paper, "method=stfpm", tasks="abc")
    group = only_group(tmp_path)
    assert any("256 cropped to 224 (PaDiM)" in note and "256 (STFPM)" in note for note in group.notes)
    assert any(f"PaDiM backbone.checkpoint={weights}" in note for note in group.notes)


@pytest.mark.parametrize("case", ["absent", "empty", "run", "file"])
def test_a_folder_that_is_none_of_an_experiment_is_one_line(
    case: str, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    run = make(tmp_path / "there", "method=padim", "strategy=native")
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").touch()
    given = {"absent": tmp_path / "ther", "empty": tmp_path / "empty", "run": run, "file": tmp_path / "file"}[
        case
    ]
    assert cli.main(["report", str(given)]) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and str(given) in error and "give " in error


def test_a_report_of_nothing_finished_says_so(tmp_path: Path) -> None:
    make(tmp_path, "method=padim", "strategy=native", R=[[0.5]], status="failed")
    report = page.write_page(read([tmp_path]), tmp_path / "report", "none")
    assert "No run is finished yet" in report.page.read_text()


def test_output_that_is_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "taken").touch()
    with pytest.raises(UserError, match="is a file"):
        page.output_folder([tmp_path], tmp_path / "taken")


def test_damaged_runs_are_in_no_group(mixed: Path) -> None:
    runs: list[FoundRun] = read([mixed])
    groups = grouped(runs)
    assert not {run.path for run in runs if run.state == "damaged"} & {r.path for g in groups for r in g.runs}


EWC = {"name": "ewc", "_target_": "penalties.EWC"}
DISTILLED = {"joint": False, "continual": True, "needs_gradients": True}


def ewc(weight: float) -> dict[str, Any]:
    """A user's own strategy, whose weight is usually 1."""
    return {**EWC, "weight": weight}


def test_a_strategy_nobody_here_knows_is_reported_like_the_others(tmp_path: Path) -> None:
    make(tmp_path, "method=stfpm", "strategy=finetune", R=[[0.5], [0.1, 0.3]], tasks="ab")
    for weight, final in ((10, 0.4), (1000, 0.2)):
        R = [[0.5], [final, 0.4]]
        own = {"strategy": ewc(weight), "flags": DISTILLED, "name": f"ewc{weight}"}
        make(tmp_path, "method=stfpm", R=R, tasks="ab", **own)
    make(tmp_path, "method=stfpm", "strategy=joint", R=[[0.9, 0.9]], tasks="ab")
    runs = read([tmp_path])
    (group,) = grouped(runs)
    assert [run.state for run in runs] == ["finished"] * 4
    shown = [row.variant.strategy_title for row in group.rows]
    assert shown == [
        "finetune",
        "joint",
        "ewc, weight=10",
        "ewc, weight=1000",
    ]  # known ones first, then by name
    assert values(group, "ewc, weight=10", "relative_gap_pct").mean == pytest.approx(100 * (0.9 - 0.4))
    assert marks(group.rows)[2, "pixel_f1"] == "best"
    report = page.write_page(runs, tmp_path / "report", "own")
    text = report.page.read_text()
    assert "finetune, ewc, which learn task by task" in text and "joint is a bound" in text
    assert '<input type="checkbox" name="strategy" value="ewc" checked>' in text
    (memory,) = (figure.spec() for figure in figures(group) if figure.name == "memory")
    data = memory["data"]["values"]
    assert {entry["strategy_title"]: entry["continual"] for entry in data} == {
        "finetune": True,
        "joint": False,
        "ewc, weight=10": True,
        "ewc, weight=1000": True,
    }
    styles = strategy_styles(group.strategy_titles)
    assert len({(style.colour, style.dash) for style in styles.values()}) == 4
    assert len({style.shape for style in styles.values()}) == 4


def test_a_users_own_joint_strategy_is_the_bound_of_the_others(tmp_path: Path) -> None:
    together = {"joint": True, "continual": False, "needs_gradients": False}
    make(tmp_path, "method=padim", "strategy=finetune")
    own = {"name": "together", "_target_": "mine.Together"}
    make(tmp_path, "method=padim", R=JOINT, strategy=own, flags=together, name="together")
    group = only_group(tmp_path)
    assert values(group, "finetune", "relative_gap_pct").mean == pytest.approx(100 * (0.6 - 1 / 3))
    assert values(group, "together", "relative_gap_pct").mean is None
    assert not any("no finished joint run" in note for note in group.notes)
    assert {line.strategy for line in tables.forgetting_table(group).lines} == {"finetune"}
    assert group.strategies(continual=False) == ["together"]


def test_the_joint_run_of_a_method_is_of_whatever_settings_a_strategy_has(tmp_path: Path) -> None:
    make(tmp_path, "method=stfpm", "method.epochs=3", strategy=ewc(10), flags=DISTILLED, name="ewc")
    make(tmp_path, "method=stfpm", "method.epochs=3", "strategy=joint", R=JOINT)
    group = only_group(tmp_path)
    assert values(group, "ewc, weight=10", "relative_gap_pct").mean == pytest.approx(100 * (0.6 - 1 / 3))


def test_a_users_method_and_many_more_than_colours_are_drawn(tmp_path: Path) -> None:
    method = json.loads(composed("method=padim"))["method"]
    for name in ("zeta", *(f"own{number}" for number in range(12))):
        make(
            tmp_path,
            "method=padim",
            "strategy=finetune",
            name=name,
            changes={"method": {**method, "name": name}},
        )
    make(tmp_path, "method=cfa", "strategy=finetune")
    group = only_group(tmp_path)
    names = [row.variant.method for row in group.rows]
    assert names == ["cfa", *sorted(names[1:])] and len(names) == 14
    colours = titles.method_colours(names)
    assert colours["cfa"] == titles.method_colours(titles.METHODS)["cfa"]
    assert len({colours[name] for name in names[:9]}) == 9  # the first nine are told apart
    assert {figure.name for figure in figures(group)} >= {"stages", "memory", "time"}


def test_titles_for_more_methods_than_colours_crash_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(3):
        monkeypatch.setitem(titles.METHODS, f"new{number}", f"New {number}")
    colours = titles.method_colours([*titles.METHODS, "unknown"])
    assert len(colours) == len(titles.METHODS) + 1 and len(set(colours.values())) == 9
    styles = titles.strategy_styles([f"own {number}" for number in range(25)])
    assert len(set(styles.values())) == 25


def test_editing_conf_later_relabels_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run's departures are those that it stored, whatever conf/ says now."""
    make(tmp_path, "method=padim", "strategy=finetune", "method.features=7")
    shutil.copytree(ROOT / "conf", tmp_path / "edited" / "conf")
    padim = tmp_path / "edited" / "conf" / "method" / "padim.yaml"
    changed = re.sub(r"^features: .*", "features: 7", padim.read_text(), flags=re.MULTILINE)
    assert changed != padim.read_text()
    padim.write_text(changed)
    monkeypatch.setattr(sources, "conf", lambda: tmp_path / "edited" / "conf")
    earlier._usual.cache_clear()
    try:
        (row,) = only_group(tmp_path).rows
        assert row.variant.method_title == "PaDiM, features=7"
        # An earlier version's directory says nothing: there the new conf/ is all that is known.
        make(tmp_path / "old", "method=padim", "strategy=finetune", "method.features=7", earlier=True)
        (row,) = only_group(tmp_path / "old").rows
        assert row.variant.method_title == "PaDiM"
    finally:
        earlier._usual.cache_clear()


def test_directories_of_earlier_versions_report_the_same(tmp_path: Path) -> None:
    settings: list[tuple[tuple[str, ...], Matrix]] = [
        (("method=padim", "strategy=native"), JUST_AND_FINAL),
        (("method=padim", "strategy=native", "seed=3"), [[0.7], [0.6, 0.5], [0.5, 0.4, 0.3]]),
        (("method=padim", "strategy=joint"), JOINT),
        (("method=padim", "strategy=single", "method.features=7"), JUST_AND_FINAL),
        (("method=stfpm", "replay.size=40", "gpu.precision=bf16"), JUST_AND_FINAL),
        (("method=stfpm", "strategy=finetune", "dataset.resize=64"), JUST_AND_FINAL),
        (("method=stfpm", "strategy=finetune", "dataset.seed=0", "seed=1"), JUST_AND_FINAL),
    ]
    for overrides, R in settings:
        make(tmp_path / "runs", *overrides, R=R)
        make(tmp_path / "earlier" / "runs", *overrides, R=R, earlier=True)
    written: list[list[str]] = []
    for experiment in (tmp_path / "runs", tmp_path / "earlier" / "runs"):
        runs = read([experiment])
        groups = grouped(runs)
        makers = (tables.comparison, tables.forgetting_table, tables.stages, tables.matrices)
        built = [[(group.number, maker(group)) for group in groups] for maker in makers]
        written.append([tables.as_csv(one) for one in [*built, [(0, tables.run_list(runs, groups))]]])
    new, old = written
    assert new == old and all(text.count("\n") > 5 for text in new)


@pytest.mark.parametrize(("target", "joint"), [("mine.Together", True), ("nowhere.Strategy", False)])
def test_flags_of_an_earlier_versions_strategy_are_its_classes(
    target: str, joint: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "code").mkdir()
    (tmp_path / "code" / "mine.py").write_text(
        "from clbench.strategies.base import Strategy\n\nclass Together(Strategy):\n    joint = True\n    "
        "continual = False\n"
    )
    monkeypatch.syspath_prepend(tmp_path / "code")
    own = {"name": "together", "_target_": target}
    R = JOINT if joint else JUST_AND_FINAL
    make(tmp_path / "runs", "method=padim", strategy=own, name="own", R=R, earlier=True)
    (run,) = read([tmp_path / "runs"])
    assert (run.state, run.flags.joint, run.flags.continual) == ("finished", joint, not joint)


def test_where_nobody_knows_what_is_usual_all_settings_are_named(tmp_path: Path) -> None:
    method = {**json.loads(composed("method=padim"))["method"], "name": "mine"}
    for seed in (0, 1):
        make(
            tmp_path,
            "method=padim",
            "strategy=finetune",
            f"seed={seed}",
            changes={"method": method},
            earlier=True,
        )
    other = {**method, "features": 7}
    make(tmp_path, "method=padim", "strategy=finetune", name="7", changes={"method": other}, earlier=True)
    group = only_group(tmp_path)
    assert sorted(row.seeds for row in group.rows) == [[0], [0, 1]]
    assert all("features=" in row.variant.method_title for row in group.rows)
    assert any("what the benchmark gives mine is not known" in note for note in group.notes)


GROUPED: Matrix = [[0.6, 0.8], [0.3, 0.6, 0.9]]  # two categories at once, then a third


def test_a_task_of_several_categories_is_reported_category_by_category(tmp_path: Path) -> None:
    make(tmp_path, "method=padim", "strategy=finetune", R=GROUPED, tasks=[("cap", "nut"), "pin"])
    group = only_group(tmp_path)
    (run,) = group.runs
    assert (run.tasks, run.categories, run.learned) == (["cap+nut", "pin"], ["cap", "nut", "pin"], [0, 0, 1])
    assert run.R["aupro"] == [[0.6, 0.8, None], [0.3, 0.6, 0.9]]
    assert run.over_stages("pixel_f1") == [pytest.approx(0.7), pytest.approx(0.6)]
    assert values(group, "finetune", "pixel_f1").mean == pytest.approx(0.6)
    assert values(group, "finetune", "average_forgetting_pct").mean == pytest.approx((50 + 25) / 2)
    assert "2 tasks of 3 categories" in group.title
    lines = list(csv.DictReader(io.StringIO(tables.as_csv([(1, tables.forgetting_table(group))]))))
    assert [(line["task"], line["category"], line["learned_at"]) for line in lines] == [
        ("cap+nut", "cap", "1"),
        ("cap+nut", "nut", "1"),
        ("pin", "pin", "2"),
    ]
    assert [line["forgotten_pct"] for line in lines] == ["50", "25", "0"]
    entries = list(csv.DictReader(io.StringIO(tables.as_csv([(1, tables.matrices(group))]))))
    assert len(entries) == 5 * len(USUAL)
    by_name = {figure.name: json.dumps(figure.spec()) for figure in figures(group)}
    assert '"category": "nut"' in by_name["r-matrices"] and '"category": "nut"' in by_name["forgetting"]


def test_tables_of_groups_with_and_without_tasks_of_several_categories_share_a_file(tmp_path: Path) -> None:
    make(
        tmp_path,
        "method=padim",
        "strategy=finetune",
        R=GROUPED,
        tasks=[("cap", "nut"), "pin"],
        name="several",
    )
    for method in ("padim", "cfa"):
        make(tmp_path, f"method={method}", "strategy=finetune")
    together = [(group.number, tables.forgetting_table(group)) for group in grouped(read([tmp_path]))]
    lines = list(csv.DictReader(io.StringIO(tables.as_csv(together))))
    assert {(line["group"], line["category"]) for line in lines} == {
        ("1", ""),
        ("2", "cap"),
        ("2", "nut"),
        ("2", "pin"),
    }


def test_pooled_tasks_of_earlier_versions_compare_with_no_categories(tmp_path: Path) -> None:
    given = ("method=padim", "strategy=finetune", "task_order.tasks=[[cap,nut],pin]")
    make(tmp_path, *given, R=[[0.5], [0.4, 0.9]], tasks=["cap+nut", "pin"], name="old", earlier=True)
    make(tmp_path, *given, R=GROUPED, tasks=[("cap", "nut"), "pin"], name="new")
    groups = {group.pooled: group for group in grouped(read([tmp_path]))}
    assert set(groups) == {True, False}
    assert any("pooled the test images" in note for note in groups[True].notes)
    assert groups[True].differs_in == ["test images pooled by task"] and not groups[False].differs_in
    assert groups[True].categories == ("cap+nut", "pin")


def test_a_torn_last_line_is_left_out_where_the_run_goes_on_and_damage_where_it_is_complete(
    tmp_path: Path,
) -> None:
    running = make(
        tmp_path, "method=padim", "strategy=native", R=[[0.5], [0.25, 0.125]], tasks="ab", status="running"
    )
    metrics = (running / "metrics.csv").read_bytes()
    (running / "metrics.csv").write_bytes(metrics[:-4])
    (run,) = read([tmp_path])
    assert run.state == "unfinished"
    assert run.R["aupro"] == [[0.5, None], [0.25, None]]  # the last line of all
    assert run.R["pixel_f1"] == [[0.5, None], [0.25, 0.125]]
    (running / "metrics.csv").write_bytes(metrics[:-4] + "é".encode()[:1])  # torn within a letter
    assert read([tmp_path])[0].state == "unfinished"
    complete = make(tmp_path / "complete", "method=padim", "strategy=native")
    (complete / "metrics.csv").write_bytes((complete / "metrics.csv").read_bytes()[:-4])
    (run,) = read([tmp_path / "complete"])
    assert (run.state, run.reason) == ("damaged", "metrics.csv ends within a line")


def test_what_is_expected_of_a_method_follows_from_what_a_strategy_asks_of_it(tmp_path: Path) -> None:
    make(tmp_path, "method=patchcore", "strategy=native")
    make(tmp_path, "method=stfpm", "strategy=finetune")
    make(tmp_path, "method=stfpm", strategy=ewc(10), flags=DISTILLED, name="ewc")
    make(tmp_path, "method=cfa", strategy=ewc(20), flags=DISTILLED, name="cfa")
    assert only_group(tmp_path).absent == [  # neither gradients of PatchCore, nor an update of STFPM's own
        "PatchCore, finetune: no run",
        "CFA, finetune: no run",
        "CFA, ewc, weight=10: no run",
        "STFPM, ewc, weight=20: no run",
    ]


# The page, in a real browser.

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
DRIVER = shutil.which("chromedriver")


@pytest.fixture
def browser() -> Iterator[Any]:
    if not (CHROMIUM and DRIVER):
        pytest.skip(
            "Chromium and its driver are not installed (Debian: apt-get install chromium chromium-driver)"
        )
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for argument in ("--headless=new", "--no-sandbox", "--disable-gpu", "--window-size=1400,1000"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=Service(DRIVER))
    yield driver
    driver.quit()


def until(condition: Any, seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not come about"
        time.sleep(0.1)


def test_the_page_sorts_filters_enlarges_and_asks_no_network(
    browser: Any, train: Train, tmp_path: Path
) -> None:
    result = train("-m", "maps=few", "method=patchcore,padim", "strategy=native,finetune,joint")
    assert result.returncode == 0, result.stderr
    assert cli.main(["report", str(tmp_path / "outputs" / "default")]) == 0
    browser.get((tmp_path / "outputs" / "default" / "report" / "index.html").as_uri())
    until(lambda: browser.execute_script("return document.documentElement.dataset.drawn"))

    def find(selector: str) -> list[Any]:
        return browser.find_elements("css selector", selector)

    assert len(find(".chart svg")) == 7
    assert all(svg.size["width"] > 100 for svg in find(".chart svg"))

    def column(number: int) -> list[str]:
        cells = find(f"#group-1 > .table tbody tr td:nth-child({number})")
        return [cell.get_attribute("data-value") for cell in cells if cell.is_displayed()]

    title = find("#group-1 > .table th")[6]
    assert title.text == "pixel F1"
    for direction, backwards in (("descending", True), ("ascending", False)):
        title.find_element("css selector", "button").send_keys("\n")  # by keyboard
        assert title.get_attribute("aria-sort") == direction
        assert column(7) == sorted(column(7), key=float, reverse=backwards) and len(column(7)) == 6

    find("input[value=padim] + span")[0].click()
    assert set(column(1)) == {"PatchCore"}
    until(lambda: "PaDiM" not in find("#figure-1-time svg")[0].get_attribute("textContent"))
    find("button[type=reset]")[0].click()
    until(lambda: set(column(1)) == {"PatchCore", "PaDiM"})
    find("#group-1 > .table input")[0].send_keys("padim joint")
    assert column(1) == ["PaDiM"]

    shown = [button for button in find(".enlarge") if button.is_displayed()]
    assert len(shown) == 2 * 2 * (3 + 3 + 1) and all(
        browser.execute_script("return arguments[0].naturalWidth", image) == 48
        for image in find(".enlarge img")
    )
    browser.execute_script("arguments[0].scrollIntoView({block: 'center', behavior: 'instant'})", shown[1])
    shown[1].click()
    (words,) = find("dialog[open] .words")
    assert words.text == "PatchCore, native: brick (blot) after stage 2"
    browser.switch_to.active_element.send_keys("\ue014")  # the right arrow
    assert words.text.endswith("after stage 3")
    assert browser.get_screenshot_as_png().startswith(b"\x89PNG")

    assert [entry for entry in browser.get_log("browser") if entry["level"] != "INFO"] == []
    events = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    asked = [e["params"]["request"]["url"] for e in events if e["method"] == "Network.requestWillBeSent"]
    assert asked and all(address.startswith(("file:", "data:")) for address in asked)


def test_a_report_removes_nothing_that_is_not_its_own(tmp_path: Path) -> None:
    make(tmp_path / "runs", "method=padim", "strategy=native")
    for name in ("figures/photo.png", "tables/mine.csv"):
        (tmp_path / "thesis" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "thesis" / name).write_text("mine")
    old = tmp_path / "thesis" / "figures" / "group-9-memory.svg"
    old.write_text("of an earlier report")
    assert cli.main(["report", str(tmp_path / "runs"), "--output", str(tmp_path / "thesis")]) == 0
    assert (tmp_path / "thesis/figures/photo.png").read_text() == "mine"
    assert (tmp_path / "thesis/tables/mine.csv").read_text() == "mine"
    assert not old.exists()


def test_a_run_that_is_damaged_in_any_way_is_listed_and_the_rest_reported(tmp_path: Path) -> None:
    sound = make(tmp_path, "method=padim", "strategy=native")
    for number, (name, change) in enumerate(
        [
            ("metrics.csv", lambda text: "\0" * 300_000),
            ("config.yaml", lambda text: re.sub(r"made_by:(\n .*)+", "made_by: text", text)),
            ("config.yaml", lambda text: text.replace("resize:", "resized:")),
            ("summary.json", lambda text: "[" * 100_000),
            ("summary.json", lambda text: re.sub(r'("additional_mb": )[\d.]+', r"\1Infinity", text)),
            ("metrics.csv", lambda text: re.sub(r"(pixel_auroc,)[\d.]+", r"\1nan", text)),
            ("metrics.csv", lambda text: text.replace("cap,cap,aupro", "cap,nut,aupro")),
            ("summary.json", lambda text: text.replace('"joint": false', '"joint": "no"')),
            ("summary.json", lambda text: re.sub(r'("categories": )\[', r'\1["cap", ', text)),
            ("config.yaml", lambda text: re.sub(r"departures: .*", "departures: text", text)),
        ]
    ):
        copy = Path(shutil.copytree(sound, tmp_path / f"damaged{number}"))
        changed = change((copy / name).read_text())
        assert changed != (copy / name).read_text()
        (copy / name).write_text(changed)
    runs = read([tmp_path])
    assert len(grouped(runs)[0].rows) == 1
    assert sorted(run.state for run in runs) == ["damaged"] * 10 + ["finished"]
