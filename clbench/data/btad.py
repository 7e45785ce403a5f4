"""BTAD, the beanTech Anomaly Detection dataset (Mishra et al., ISIE 2021, arXiv 2104.10036)."""

from clbench.data.mvtec import MVTec


class BTAD(MVTec):
    """MVTec AD's layout with three other names: `ok` for `good`, `ko` for defects, and masks without `_mask`.

    The images of the products 01, 02 and 03 have 1600 x 1600, 600 x 600 and 800 x 600 pixels: dataset.resize
    brings them to one size.
    """

    name = "btad"
    good = "ok"
    mask = "{stem}.png"
