"""Summaries of a run from the R matrix of one metric.

`R[stage][category]` is the metric on a category's test set after a stage, None where it is undefined or was not
evaluated (a row may also end early). `learned[category]` is the stage, 0-based, that learned the category. A
joint run has one stage, which learns all. Entries that are None are left out of a mean; a mean of nothing is
None. Every summary is in the unit of R unless it says percent.
"""

from collections.abc import Iterable, Sequence

Matrix = Sequence[Sequence[float | None]]


def final_mean(R: Matrix) -> float | None:
    """Mean of R over categories after the last stage (ACC, Lopez-Paz & Ranzato, 2017)."""
    return mean(R[-1]) if R else None


def average_forgetting_pct(R: Matrix, learned: Sequence[int]) -> float | None:
    """The paper's average forgetting: percent of the just-learned value that is lost after the last stage.

    Mean of (just learned - final) / just learned over the categories learned before the last stage; None for
    a run of one stage. A category whose just-learned value is 0 has nothing to lose and is left out.
    """
    return mean(100 * (just - final) / just for just, final in _just_learned_and_final(R, learned) if just)


def forgetting(R: Matrix, learned: Sequence[int]) -> float | None:
    """Mean of the best earlier value minus the final one (FM, Chaudhry et al., 2018).

    Over the categories learned before the last stage. The best is taken over the stages from the one that
    learned the category to the last but one.
    """
    final, stages = len(R) - 1, evaluated(R)
    losses = []
    for category, stage in enumerate(learned):
        since = (s for s in stages if stage <= s < final)
        earlier = [value for s in since if (value := _entry(R, s, category)) is not None]
        last = _entry(R, final, category) if earlier else None
        losses.append(max(earlier) - last if last is not None else None)
    return mean(losses)


def backward_transfer(R: Matrix, learned: Sequence[int]) -> float | None:
    """Mean of final minus just-learned values (BWT, Lopez-Paz & Ranzato, 2017).

    Over the categories learned before the last stage; negative where they are forgotten.
    """
    return mean(final - just for just, final in _just_learned_and_final(R, learned))


def forward_transfer(R: Matrix, learned: Sequence[int]) -> float | None:
    """Mean of R over categories and the stages before they are learned (Díaz-Rodríguez et al., 2018).

    These are the entries above R's diagonal; None where no category was evaluated before it was learned.
    """
    stages = evaluated(R)
    return mean(_entry(R, s, category) for category, stage in enumerate(learned) for s in stages if s < stage)


def _just_learned_and_final(R: Matrix, learned: Sequence[int]) -> list[tuple[float, float]]:
    """Both values, where both are defined, of each category learned before the last stage."""
    last = len(R) - 1
    early = [(category, stage) for category, stage in enumerate(learned) if stage < last]
    pairs = [(_entry(R, stage, category), _entry(R, last, category)) for category, stage in early]
    return [(just, final) for just, final in pairs if just is not None and final is not None]


def evaluated(R: Matrix) -> list[int]:
    """The stages with any defined value, ascending."""
    rows = {id(row): row for row in R}  # those without evaluations may be one
    defined = {key for key, row in rows.items() if any(value is not None for value in row)}
    return [stage for stage, row in enumerate(R) if id(row) in defined]


def _entry(R: Matrix, stage: int, category: int) -> float | None:
    return R[stage][category] if category < len(R[stage]) else None


def mean(values: Iterable[float | None]) -> float | None:
    """Mean of the values that are defined; None where none is."""
    defined = [value for value in values if value is not None]
    return sum(defined) / len(defined) if defined else None
