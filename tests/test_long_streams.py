"""Streams of very many tasks: what a stage writes and what people are shown does not grow with them."""

import itertools
import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from test_report import make, only_group

from clbench.data.images import Images, ImageSet
from clbench.data.stream import Category, Task
from clbench.errors import UserError
from clbench.history import History
from clbench.interruption import Interruption
from clbench.metrics import continual
from clbench.metrics.names import METRICS, USUAL
from clbench.metrics.percentiles import MANY, PERCENTILES, percentiles, some
from clbench.recording import wandb
from clbench.recording.checkpoint import Checkpoints
from clbench.recording.recorder import Recorder
from clbench.recording.run_directory import RunDirectory
from clbench.report import tables
from clbench.report.figures import figures
from clbench.results import Evaluation, Results
from clbench.strategies.buffer import Buffer
from clbench.strategies.finetune import Finetune
from clbench.strategies.replay import Replay
from clbench.strategies.single import Single
from clbench.terminal import run_table
from clbench.testing.small import SmallDetector, bytes_of, images

CATEGORIES = [f"c{number:03d}" for number in range(100)]


def test_what_is_the_same_in_every_checkpoint_is_written_once(tmp_path: Path) -> None:
    about = {"stream": {name: [name * 30, name * 30] for name in CATEGORIES}}
    checkpoints = Checkpoints(tmp_path, beside=lambda: {"spent": 1}, about=about)
    for stage in range(3):
        checkpoints.place(stage, {"x": torch.tensor([stage])}, {"epoch": stage})
        checkpoints.save_stage(stage, {"x": torch.tensor([stage])}, {})
    assert (tmp_path / "stage-0002.json").stat().st_size < 1000 < len(str(about))
    assert len(list((tmp_path / "parts").iterdir())) == 1
    _, tensors, data = Checkpoints(tmp_path).load_stage() or (None, {}, {})
    assert data == {**about, "spent": 1} and list(tensors) == ["x"]
    Checkpoints(tmp_path).copy_newest(tmp_path / "copy")
    assert (Checkpoints(tmp_path / "copy").load_stage() or (0, 0, {}))[2] == data
    (part,) = (tmp_path / "parts").iterdir()
    part.write_bytes(part.read_bytes().replace(b"c001", b"c002"))  # as a disk may
    assert Checkpoints(tmp_path).load_stage() is None and Checkpoints(tmp_path).peek(3) is None


def test_a_model_of_one_task_is_loaded_without_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("clbench.recording.checkpoint._LARGE", 400)
    state = {
        f"detectors.{task}.{name}": torch.full((60,), 10.0 * task) for task in range(12) for name in "ab"
    }
    state["detectors.1.rows"] = torch.arange(240.0).view(2, 120)
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save_stage(11, {**state, "kept.images": torch.zeros(200)}, {})

    def loaded(task: int) -> dict[str, torch.Tensor]:
        saved = Checkpoints(tmp_path).load_stage(lambda name: Single.predicts_with(name, task))
        return {} if saved is None else saved[1]

    for task in (1, 11):
        expected = {name: tensor for name, tensor in state.items() if name.startswith(f"detectors.{task}.")}
        assert loaded(task).keys() == expected.keys()
        assert all(torch.equal(loaded(task)[name], tensor) for name, tensor in expected.items())
    damaged = next(
        path for path in (tmp_path / "parts").iterdir() if b'"detectors.4.b"' in path.read_bytes()[:2000]
    )
    damaged.write_bytes(damaged.read_bytes()[:-4] + b"\1\1\1\1")
    assert loaded(1) and not loaded(4) and Checkpoints(tmp_path).load_stage() is None
    assert not Replay.predicts_with("kept.buffer.0.learned", 0) and Replay.predicts_with("detector.bank", 0)


@pytest.mark.parametrize("selection", ["random", "reservoir"])
def test_a_buffer_has_no_more_tensors_than_images_and_comes_back(selection: str) -> None:
    def buffer() -> Buffer:
        return Buffer(6, 0, selection=selection)  # type: ignore[arg-type]

    kept, counts = buffer(), []
    for stage in range(40):
        new = images(3, stage, 4)
        kept.add(stage, new[:2], new[2:])
        counts.append(len(kept.tensors()))
        again = buffer()
        again.restore(kept.tensors())
        pairs = zip(itertools.chain(*kept.shares), itertools.chain(*again.shares), strict=True)
        assert all(torch.equal(one[:], other[:]) for one, other in pairs)
        kept = again if stage % 7 == 3 else kept
    assert sum(len(share) for pair in kept.shares for share in pair) == 6 and len(kept.shares) == 40
    assert max(counts) <= 6 + 2 + 1  # images, the last stage's two, and the reservoir's counts
    assert bytes_of(kept.tensors().values()) - 6 * 48 == (40 * 16 if selection == "reservoir" else 0)


def sparse(every: int = 25) -> Results:
    """Results of 100 tasks that were evaluated after every so many."""
    results = Results([[name] for name in CATEGORIES], [[task] for task in range(len(CATEGORIES))])
    for stage in range(every - 1, len(CATEGORIES), every):
        for category in range(stage + 1):
            results.add(stage, category, dict.fromkeys(USUAL, (category + 1) / (stage + 2)))
    return results


def test_results_hold_what_was_evaluated_alone() -> None:
    results = sparse()
    assert len(list(results.evaluations())) == 25 + 50 + 75 + 100
    assert results.evaluated(24, 24) and not results.evaluated(25, 0) and results.get(25, 0) is None
    R = results.matrix("aupro")
    assert len({id(row) for row in R}) == 4 + 1  # those without evaluations share one
    assert R[24][:26] == [*((category + 1) / 26 for category in range(25)), None] and R[3][3] is None
    assert results.mean_seen("aupro", 30) is None and results.after(99)["mean"]["aupro"] == pytest.approx(0.5)
    # The best of the earlier stages is the earliest one's: what was lost since then is worked out by hand.
    lost = [(category + 1) * (1 / (25 * (category // 25 + 1) + 1) - 1 / 101) for category in range(75)]
    assert results.after(99)["forgetting"]["aupro"] == pytest.approx(sum(lost) / 75)
    assert continual.forgetting(R, results.learned) == pytest.approx(sum(lost) / 75)


def test_many_categories_are_shown_by_percentiles() -> None:
    assert percentiles([None, 0.0, 1.0, 0.5, 0.25, 0.75]) == {
        "lowest": 0.0,
        "10 %": 0.1,
        "median": 0.5,
        "90 %": pytest.approx(0.9),
        "highest": 1.0,
    }
    assert set(percentiles([None]).values()) == {None}
    assert some(CATEGORIES[:MANY]) == CATEGORIES[:MANY] and len(some(CATEGORIES)) == 12 == len(
        some([*CATEGORIES, *CATEGORIES])
    )
    results = sparse()
    summary = {
        **results.summary(),
        "method": "m",
        "strategy": "s",
        "categories": [[name] for name in CATEGORIES],
        "memory": {"architecture_mb": 1, "executed_mb": 1, "additional_mb": 1, "peak_mb": 1},
        "time": {"train_s": 1, "eval_s": 1, "inference_ms_per_image": 1},
    }
    assert run_table(summary, results).row_count == len(PERCENTILES) + 1
    found = wandb._of_many(results.after(99))
    assert set(found) == {"mean", "forgetting", *(f"percentile_{share}" for share in (0, 10, 50, 90, 100))}
    assert found["percentile_0"]["aupro"] == pytest.approx(1 / 101) and found["percentile_50"][
        "aupro"
    ] == pytest.approx(0.5)
    rows = wandb._percentile_rows(results.matrix("aupro"))
    assert [row[0] for row in rows] == [24, 49, 74, 99] and {len(row) for row in rows} == {7}
    assert set(found["mean"]) <= set(METRICS)


def test_the_report_of_many_tasks_is_short(tmp_path: Path) -> None:
    R = sparse().matrix("aupro")
    for strategy in ("native", "finetune"):
        make(tmp_path / "long", "method=padim", f"strategy={strategy}", R=R, tasks=CATEGORIES)
    group = only_group(tmp_path / "long")
    whole = tables.forgetting_table(group)
    short = tables.folded(whole)
    assert len(whole.lines) == 200 and len(short.lines) == 2 * len(PERCENTILES)
    finals = [
        line.cells[[column.key for column in short.columns].index("final")].value for line in short.lines[:5]
    ]
    assert finals == pytest.approx([1 / 101, 10.9 / 101, 50.5 / 101, 90.1 / 101, 100 / 101], abs=1e-6)
    assert tables.folded(short) is short
    shown = {figure.name: figure.spec() for figure in figures(group)}
    assert {"stages", "r-matrices", "forgetting"} <= set(shown)
    for figure in ("r-matrices", "forgetting"):
        (data,) = (
            shown[figure]["datasets"].values()
            if "datasets" in shown[figure]
            else [shown[figure]["data"]["values"]]
        )
        assert 0 < len(data) <= 2 * 51
    assert len(tables.as_csv([(1, whole)]).splitlines()) == 1 + 200
    assert "percentiles over 100 lines each" in tables.as_markdown(short)


def test_many_parts_of_a_stream_of_few_categories_are_percentiles_too(tmp_path: Path) -> None:
    R = [[stage / 100, 0.5] for stage in range(100)]
    path = make(tmp_path, "method=padim", "strategy=native", R=R, tasks=[("cap", "nut"), *[()] * 99])
    summary = json.loads((path / "summary.json").read_text(encoding="utf-8"))
    named = {**summary, "tasks": [f"part {number}" for number in range(1, 101)]}
    (path / "summary.json").write_text(json.dumps(named), encoding="utf-8")
    written = (path / "metrics.csv").read_text(encoding="utf-8")
    (path / "metrics.csv").write_text(written.replace("cap+nut", "part 1"), encoding="utf-8")
    group = only_group(tmp_path)
    assert "100 tasks of 2 categories" in group.title
    (shown,) = (figure.spec() for figure in figures(group) if figure.name == "r-matrices")
    (data,) = shown["datasets"].values() if "datasets" in shown else [shown["data"]["values"]]
    assert len(data) == 100 and {"lowest", "highest"} <= data[0].keys()


def test_a_run_without_a_stage_that_it_once_had_goes_by_what_was_measured(tmp_path: Path) -> None:
    """Of stages 0 to 3, evaluated after 1 and 3, one was forgotten: those after 0 and 2 are left."""
    empty = replace(ImageSet.none((8, 8)), images=torch.zeros(1, 3, 8, 8, dtype=torch.uint8))
    stream = [Task(name, empty, (Category(name, empty),)) for name in "abc"]
    config = SimpleNamespace(checkpoint_s=0, evaluate="every:2")
    strategy = Finetune(SmallDetector())
    about = {"metrics": USUAL, "device": torch.device("cpu"), "identity": {"files": {}}, "config": config}
    made: Any = SimpleNamespace(strategy=strategy, tasks=stream, **about)

    def history() -> History:
        return History(made, RunDirectory(tmp_path), Recorder(), Interruption())

    begun = history()
    for stage in range(3):
        strategy.learn(stage, Images.of(torch.zeros(4, 3, 8, 8, dtype=torch.uint8)))
        begun.add_learned(stage)
    begun.add_evaluation(0, 0, Evaluation(dict.fromkeys(USUAL, 0.5)))
    with pytest.raises(UserError, match="lacks results of stage 2"):
        history()
    RunDirectory(tmp_path).write_parent({})
    assert [history().to_evaluate(stage) for stage in (0, 2)] == [[], [0, 1, 2]]
