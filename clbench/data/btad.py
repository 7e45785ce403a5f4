"""BTAD, the beanTech Anomaly Detection dataset (Mishra et al., ISIE 2021, arXiv 2104.10036)."""

from clbench.data.mvtec import MVTec


class BTAD(MVTec):
    """MVTec AD's layout, but for `ok` in place of `good`, defects in `ko`, and masks without `_mask`.

    Products 01, 02 and 03, of 1600 x 1600, 600 x 600 and 800 x 600 pixels, are as unlike in size as in kind:
    dataset.resize brings them to one.
    """

    name = "btad"
    good = "ok"
    mask = "{stem}.png"
