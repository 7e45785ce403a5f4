"""The field's protocols: datasets split into tasks that published figures are of. Imports no torch.

Each is a file of conf/task_order, which says where its list is from; docs/protocols.md says what they are.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

import yaml

from clbench.config.sources import conf

_NAMED_OTHERWISE = {"paper": "mvtec"}  # protocols whose file is not named after their dataset -> that dataset


@dataclass(frozen=True)
class Protocol:
    """A stream of tasks that several works have used.

    Attributes:
        dataset: name of the dataset.
        tasks: the categories of each task, in the order of the stream.
    """

    dataset: str
    tasks: tuple[tuple[str, ...], ...]


@lru_cache
def protocols() -> Mapping[str, Protocol]:
    """The protocols by name, which is the choice of `task_order` that they are.

    A list of tasks in conf/task_order is a protocol of the dataset that its file is named after: mvtec_10_5 of mvtec.
    """
    datasets = [file.stem for file in conf().glob("dataset/*.yaml")]
    found = {}
    for file in sorted(conf().glob("task_order/*.yaml")):
        order = yaml.safe_load(file.read_text(encoding="utf-8"))
        named_after = [dataset for dataset in datasets if file.stem.startswith(f"{dataset}_")]
        dataset = _NAMED_OTHERWISE.get(file.stem) or max(named_after, key=len, default=None)
        if dataset is not None and order["kind"] == "listed":
            found[file.stem] = Protocol(dataset, _grouped(order["tasks"]))
    return found


def protocol_of(dataset: str | None, tasks: Sequence[str | Sequence[str]]) -> str | None:
    """The name of the protocol that a stream follows, such as `mvtec_10_5`; None where it is none.

    What counts is which categories arrive in which order, not how that was asked for; those of one task have no order.

    Args:
        dataset: name of the stream's dataset; None for any.
        tasks: the categories of each task, or its name, in which they are joined by `+`.
    """
    given = list(map(frozenset, _grouped(tasks)))
    for name, protocol in protocols().items():
        if dataset in (None, protocol.dataset) and list(map(frozenset, protocol.tasks)) == given:
            return name
    return None


def _grouped(tasks: Sequence[str | Sequence[str]]) -> tuple[tuple[str, ...], ...]:
    """The categories of each task."""
    return tuple(tuple(task.split("+") if isinstance(task, str) else task) for task in tasks)
