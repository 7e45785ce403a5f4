"""Summaries of a run from the R matrix of one metric.

R[stage][task] is the metric on a task's test set after a stage, None where it is undefined or was not
evaluated (a row may also end early); learned[task] is the stage at which a task was learned. A joint run
has one stage that learns every task. Entries that are None are left out of a mean; a mean of nothing is
None.
"""

from collections.abc import Iterable, Sequence

Matrix = Sequence[Sequence[float | None]]


def final_mean(R: Matrix) -> float | None:
    """Mean over tasks after the last stage."""
    return mean(R[-1]) if R else None


def average_forgetting_pct(R: Matrix, learned: Sequence[int]) -> float | None:
    """Percent of the just-learned value that is lost after the last stage: the paper's average forgetting.

    Mean of (just learned - final) / just learned over the tasks learned before the last stage, None for a
    run of one stage. A task whose just-learned value is 0 has nothing to lose and is left out.
    """
    return mean(100 * (just - final) / just for just, final in _just_learned_and_final(R, learned) if just)


def forgetting(R: Matrix, learned: Sequence[int]) -> float | None:
    """Best earlier value minus the final one (Chaudhry et al., 2018), over tasks learned before the last.

    The best is taken over the stages from the one that learned the task to the last but one.
    """
    final = len(R) - 1
    losses = []
    for task, stage in enumerate(learned):
        earlier = [value for s in range(stage, final) if (value := _entry(R, s, task)) is not None]
        last = _entry(R, final, task) if earlier else None
        losses.append(max(earlier) - last if last is not None else None)
    return mean(losses)


def backward_transfer(R: Matrix, learned: Sequence[int]) -> float | None:
    """Mean of final minus just learned (Lopez-Paz & Ranzato, 2017); negative when tasks are forgotten."""
    return mean(final - just for just, final in _just_learned_and_final(R, learned))


def forward_transfer(R: Matrix, learned: Sequence[int]) -> float | None:
    """Mean over the stages before a task is learned (Díaz-Rodríguez et al., 2018): above R's diagonal.

    None when unseen tasks were not evaluated.
    """
    stages = len(R)
    return mean(_entry(R, s, task) for task, stage in enumerate(learned) for s in range(min(stage, stages)))


def _just_learned_and_final(R: Matrix, learned: Sequence[int]) -> list[tuple[float, float]]:
    """Both values, where defined, of each task learned before the last stage."""
    last = len(R) - 1
    pairs = [
        (_entry(R, stage, task), _entry(R, last, task)) for task, stage in enumerate(learned) if stage < last
    ]
    return [(just, final) for just, final in pairs if just is not None and final is not None]


def _entry(R: Matrix, stage: int, task: int) -> float | None:
    return R[stage][task] if task < len(R[stage]) else None


def mean(values: Iterable[float | None]) -> float | None:
    defined = [value for value in values if value is not None]
    return sum(defined) / len(defined) if defined else None
