"""MPDD, painted metal parts in many positions (Jezek et al., ICUMT 2021)."""

from pathlib import Path

from clbench.data.mvtec import MVTec
from clbench.data.on_disk import folders

CATEGORIES = ("bracket_black", "bracket_brown", "bracket_white", "connector", "metal_plate", "tubes")


class MPDD(MVTec):
    """MVTec AD's layout, recognised by the names of its six parts."""

    name = "mpdd"

    @classmethod
    def recognises(cls, root: Path) -> bool:
        return super().recognises(root) and {folder.name for folder in folders(root)} <= set(CATEGORIES)
