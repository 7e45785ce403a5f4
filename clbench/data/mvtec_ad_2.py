"""MVTec AD 2 (Heckler-Kram et al., 2025, arXiv 2503.21622)."""

from clbench.data.mvtec import MVTec


class MVTecAD2(MVTec):
    """`<category>/train/good`, `test_public/{good,bad}` and `test_public/ground_truth/bad/<stem>_mask.png`.

    Left out are `validation/good`, normal images that no metric here needs, and `test_private` and
    `test_private_mixed`, which come without labels and masks. Only the publisher's server can judge those:
    results here are of the public test images, and cannot be compared with the leaderboard.
    """

    name = "mvtec_ad_2"
    test = "test_public"
    truth = "test_public/ground_truth"
