"""What searches of memory banks need of features and of a GPU's sums."""

import pytest
import torch
from torch import Tensor

from clbench.methods import bounds as narrow
from clbench.methods import nearest as searching
from clbench.methods.bounds import Bounds, bounds_of
from clbench.methods.nearest import _of_rows


def test_bounds_ask_for_three_features(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(narrow, "_quicker_in_bfloat16", lambda device: True)
    for size in (1, 2, 3, 4):
        bank = torch.randn(20, size, generator=torch.Generator().manual_seed(size))
        pieces, nothing = [(0, 20)], torch.zeros(20, dtype=torch.bool)
        found = bounds_of(bank, pieces, nothing)
        assert (found is None) == (size < 3)
        if size < 3:
            with pytest.raises(ValueError, match=f"3 features or more, and these have {size}"):
                Bounds(bank, pieces, torch.bfloat16, None, bank[0], nothing)


class OnGpu(Tensor):
    """A tensor that says that it is on a GPU."""

    @property
    def device(self) -> torch.device:
        return torch.device("cuda", 0)


def by_number_of_rows(values: Tensor, dimension: int) -> Tensor:
    """A stand-in for a GPU's sums, which adds few rows up in another order: by 32 threads a row, or by more."""
    threads = max(32, 512 // len(values))
    parts = torch.nn.functional.pad(values, (0, -values.shape[1] % threads)).unflatten(1, (-1, threads))
    columns = parts.sum(1)
    total = torch.zeros(len(values))
    for column in columns.unbind(1):
        total = total + column
    return total


def test_a_row_s_sum_is_the_same_whichever_rows_are_beside_it() -> None:
    values = torch.randn(100, 600, generator=torch.Generator().manual_seed(0)).square()
    whole = by_number_of_rows(values, 1)
    beside = {count: whole[:count] for count in (1, 2, 5, 15, 63, 64, 100)}
    assert not all(torch.equal(by_number_of_rows(values[:count], 1), sums) for count, sums in beside.items())
    for count, sums in beside.items():
        assert torch.equal(
            _of_rows(by_number_of_rows, values[:count].as_subclass(OnGpu)).as_subclass(Tensor), sums
        )
        assert torch.equal(_of_rows(torch.sum, values[:count]), values[:count].sum(1))


def test_blocks_are_a_gpu_s_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """16 MB stay in a CPU's caches; a GPU is given enough for a launch, and where digits go by blocks the same always."""
    cpu, gpu = torch.device("cpu"), torch.device("cuda", 0)
    bank = torch.empty(5, 1024)
    for free, room in ((10**6, 1 << 24), (16 * 10**9, 10**9), (10**12, 1 << 32)):
        monkeypatch.setattr(searching, "free_on_gpu", lambda device, free=free: free)
        assert searching._room(gpu) == room and searching._bytes(gpu) == 1 << 28
    assert searching._room(cpu) == searching._bytes(cpu) == 1 << 24
    assert searching._differences(bank) == 1024
    assert searching._differences(bank.as_subclass(OnGpu)) == 16 * 1024
