"""Fine-tuning: learn each task as if there had been no other; the lower bound."""

from clbench.data.images import Images
from clbench.strategies.base import Strategy


class Finetune(Strategy):
    """Each stage sees its own images: networks are trained further, banks and statistics replaced."""

    why_no_buffer = "fine-tuning keeps nothing of earlier tasks"

    def begin_stage(self, stage: int, images: Images) -> None:
        self.detector.forget()
