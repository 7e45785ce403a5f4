"""Messages count one thing in the singular."""

from clbench.errors import counted


def test_one_thing_is_in_the_singular() -> None:
    assert [counted(number, "run") for number in (0, 1, 2, 2000)] == [
        "0 runs",
        "1 run",
        "2 runs",
        "2,000 runs",
    ]
    assert counted(1, "category", "categories") == "1 category"
    assert counted(3, "category", "categories") == "3 categories"
