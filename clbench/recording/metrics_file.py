"""The text of metrics.csv: a row for each metric of a category after a stage. Imports no torch."""

import csv
import io
import math
from collections.abc import Iterable, Iterator
from typing import NamedTuple

HEADER = "stage,task_index,task,category,metric,value\n"


class MetricRow(NamedTuple):
    """A row of metrics.csv.

    Attributes:
        stage, task_index: 0-based.
        task, category: their names; an earlier version, which had no categories, wrote of tasks alone.
        value: None where the metric is undefined.
    """

    stage: int
    task_index: int
    task: str
    category: str
    metric: str
    value: float | None


def as_text(rows: Iterable[MetricRow]) -> str:
    """Rows as text, without the header; None is written as `undefined`."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    for *names, value in rows:
        writer.writerow((*names, "undefined" if value is None else f"{value:.6f}"))
    return text.getvalue()


def rows_of(text: str) -> Iterator[MetricRow]:
    """The rows of a metrics.csv, in their order, with or without the column `category`.

    Args:
        text: all of it, with the header; empty gives no rows.

    Raises:
        ValueError: it cannot be read as one, or a value is not finite.
    """
    reader = csv.reader(io.StringIO(text))
    try:
        next(reader, None)
        for stage, task_index, task, *category, metric, value in reader:
            name = category[0] if category else task
            number = None if value == "undefined" else float(value)
            if number is not None and not math.isfinite(number):
                raise ValueError(f"{metric} of '{name}' in metrics.csv is {value}")
            yield MetricRow(int(stage), int(task_index), task, name, metric, number)
    except csv.Error as error:
        raise ValueError(f"metrics.csv is no CSV ({error})") from error
