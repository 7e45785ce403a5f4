"""metrics.csv is read as it was written, that of an earlier version too."""

import pytest

from clbench.recording.metrics_file import HEADER, MetricRow, as_text, rows_of


def test_rows_are_read_as_they_were_written() -> None:
    rows = [
        MetricRow(0, 0, "cap+pin", 'a "cap", red', "aupro", 0.25),
        MetricRow(1, 0, "t", "c", "aupro", None),
    ]
    assert list(rows_of(HEADER + as_text(rows))) == rows
    assert list(rows_of("")) == list(rows_of(HEADER)) == []
    of_tasks = "stage,task_index,task,metric,value\n0,1,nut,pixel_f1,0.5\n"
    assert list(rows_of(of_tasks)) == [MetricRow(0, 1, "nut", "nut", "pixel_f1", 0.5)]


@pytest.mark.parametrize(
    "row", ["0,0,a,a,aupro,inf", "0,0,a,a,aupro,x", "x,0,a,a,aupro,1", "0,0,a", '0,0,a,"a\r']
)
def test_what_is_no_row_is_refused(row: str) -> None:
    with pytest.raises(ValueError):
        list(rows_of(HEADER + row))
