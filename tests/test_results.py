"""R and its summaries, and the file that evaluations are appended to."""

import json
import resource
from pathlib import Path
from random import Random

import pytest

from clbench.errors import UserError
from clbench.metrics import continual
from clbench.metrics.names import USUAL
from clbench.recording.journal import Journal
from clbench.results import Results


def filled(tasks: list[list[str]], stages: list[list[int]], everything: bool, seed: int = 0) -> Results:
    """Results of random values, a tenth of them undefined."""
    random = Random(seed)
    results = Results(tasks, stages)
    for stage in range(len(stages)):
        for category in range(len(results.categories)) if everything else results.seen(stage):
            values = {m: None if random.random() < 0.1 else random.random() for m in USUAL}
            results.add(stage, category, values)
    return results


def test_categories_of_a_task_are_learned_together_and_counted_each() -> None:
    results = Results([["bottle"], ["cable", "screw"]], [[0], [1]])
    assert results.categories == ["bottle", "cable", "screw"]
    assert results.task_of == [0, 1, 1] and results.learned == [0, 1, 1]
    assert results.seen(0) == [0] and results.seen(1) == [0, 1, 2]
    results.add(0, 0, dict.fromkeys(USUAL, 0.9))
    for category, value in enumerate((0.6, 0.5, 0.1)):
        results.add(1, category, dict.fromkeys(USUAL, value))
    assert results.matrix("aupro") == [[0.9, None, None], [0.6, 0.5, 0.1]]
    summary = results.summary()
    assert summary["final"]["aupro"] == pytest.approx((0.6 + 0.5 + 0.1) / 3)  # not of (0.6 + 0.3) / 2
    assert summary["average_forgetting_pct"] == pytest.approx(100 / 3)
    assert results.just_learned("aupro") == [0.9, 0.5, 0.1]


@pytest.mark.parametrize("everything", [False, True])
@pytest.mark.parametrize(
    ("tasks", "stages"),
    [
        ([["a"], ["b"], ["c"], ["d"]], [[0], [1], [2], [3]]),
        ([["a", "b"], ["c"], ["d", "e", "f"]], [[0], [1], [2]]),
        ([["a", "b"], ["c"]], [[0, 1]]),
    ],
)
def test_a_stage_s_results_are_those_of_the_matrices_so_far(
    tasks: list[list[str]], stages: list[list[int]], everything: bool
) -> None:
    results = filled(tasks, stages, everything)
    order = list(range(len(stages)))
    for stage in [*order, *reversed(order)]:  # in any order, the same
        found = results.after(stage)
        for metric in USUAL:
            R = [list(row) for row in results.matrix(metric)[: stage + 1]]
            seen = [R[stage][category] for category in results.seen(stage)]
            assert found["mean"][metric] == continual.final_mean([seen])
            assert found["forgetting"][metric] == continual.forgetting(R, results.learned)
            for category, name in enumerate(results.categories):
                if name in found:
                    assert found[name][metric] == R[stage][category]
        assert found.keys() - {"mean", "forgetting"} == {
            results.categories[category]
            for category in (range(len(results.categories)) if everything else results.seen(stage))
        }


def numbered(path: Path, count: int) -> Path:
    """A journal of entries that can be told apart, closed."""
    journal = Journal(path)
    for number in range(count):
        journal.append({"number": number, "name": "Größe"})
    journal.close()
    return path


def test_a_journal_holds_what_was_appended_at_full_precision(tmp_path: Path) -> None:
    entries = [{"stage": 0, "value": 0.1 + 0.2}, {"name": 'größe "x"\n', "value": None}]
    journal = Journal(tmp_path / "journal.jsonl")
    for entry in entries:
        journal.append(entry)
    journal.close()
    assert Journal(tmp_path / "journal.jsonl").entries == entries
    lines = (tmp_path / "journal.jsonl").read_text(encoding="utf-8").splitlines()
    assert [{k: v for k, v in json.loads(line).items() if k != "check"} for line in lines] == entries


def test_a_line_cut_off_at_any_byte_is_taken_away_and_the_next_is_appended_after_what_was_whole(
    tmp_path: Path,
) -> None:
    path = numbered(tmp_path / "journal.jsonl", 3)
    content = path.read_bytes()
    whole = content.rindex(b"\n", 0, -1) + 1
    for cut in range(whole, len(content)):
        path.write_bytes(content[:cut])
        journal = Journal(path)
        assert [entry["number"] for entry in journal.entries] == [0, 1]
        journal.append({"number": 9})
        journal.close()
        assert [entry["number"] for entry in Journal(path).entries] == [0, 1, 9]


def test_a_journal_that_is_damaged_within_is_refused(tmp_path: Path) -> None:
    path = numbered(tmp_path / "journal.jsonl", 3)
    path.write_text(path.read_text(encoding="utf-8").replace('"number": 1', '"number": 7'))
    with pytest.raises(UserError, match=r"journal\.jsonl is damaged in line 2: remove"):
        Journal(path)


def test_a_journal_is_rewritten_and_goes_on(tmp_path: Path) -> None:
    journal = Journal(numbered(tmp_path / "journal.jsonl", 4))
    journal.rewrite([{"number": 2}])
    journal.append({"number": 5})
    journal.flush()
    assert [entry["number"] for entry in Journal(tmp_path / "journal.jsonl").entries] == [2, 5]


def test_a_journal_that_may_lose_what_is_damaged_keeps_what_comes_before(tmp_path: Path) -> None:
    path = numbered(tmp_path / "journal.jsonl", 3)
    path.write_text(path.read_text(encoding="utf-8").replace('"number": 1', '"number": 7') + "\0\0\0\n")
    journal = Journal(path, lose_damaged=True)
    first = {"number": 0, "name": "Größe"}
    assert journal.entries == [first] and journal.count == 1
    journal.append({"number": 5})
    assert Journal(path).entries == [first, {"number": 5}] and journal.count == 2


def test_a_line_that_the_disk_has_no_room_for_is_not_there_in_part(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "journal.jsonl")
    journal.append({"number": 0})
    size = (tmp_path / "journal.jsonl").stat().st_size
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size + 10, hard))
    try:
        with pytest.raises(UserError, match="free space there"):
            journal.append({"number": 1})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    journal.append({"number": 2})
    assert journal.count == 2
    assert Journal(tmp_path / "journal.jsonl").entries == [{"number": 0}, {"number": 2}]
