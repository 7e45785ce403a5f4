"""DER++: DER, and the method's own loss of a second draw of stored images (Buzzega et al., 2020)."""

from typing import Any

from pydantic import NonNegativeFloat
from torch import Tensor

from clbench.methods.base import Detector
from clbench.strategies.der import DER, Form
from clbench.training import Batch


class DERpp(DER):
    """DER, and `beta` times the method's loss of as many replayed images again, drawn independently.

    Args:
        detector, seed: as for `Strategy`.
        alpha, outputs: as for `DER`.
        beta: weight of the second draw's loss.
        replay: settings of the buffer, as for `Replay`.
    """

    draws = 2

    def __init__(
        self,
        detector: Detector,
        *,
        seed: int = 0,
        alpha: NonNegativeFloat = 0.5,
        beta: NonNegativeFloat = 0.5,
        outputs: Form = "full",
        **replay: Any,
    ):
        super().__init__(detector, seed=seed, alpha=alpha, outputs=outputs, **replay)
        self.beta = beta

    def penalty(self, detector: Detector, batch: Batch) -> Tensor | None:
        close = super().penalty(detector, batch)
        if close is None:
            return None
        past = batch.past
        loss = detector.training_step(past.some(slice(len(past) // 2, None)).images)
        assert loss is not None
        return close + self.beta * loss
