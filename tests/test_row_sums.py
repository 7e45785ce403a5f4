"""What searches of memory banks need of features and of a GPU's sums."""

import pytest
import torch
from torch import Tensor

from clbench.methods import bounds as narrow
from clbench.methods.bounds import Bounds, bounds_of


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
