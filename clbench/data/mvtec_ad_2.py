"""MVTec AD 2 (Heckler-Kram et al., 2025, arXiv 2503.21622)."""

from clbench.data.mvtec import MVTec


class MVTecAD2(MVTec):
    """`<category>/train/good`, `test_public/{good,bad}` and `test_public/ground_truth/bad/<stem>_mask.png`.

    Left out: `validation/good`, normal images that no metric here needs, and `test_private` and
    `test_private_mixed`, which come without labels and masks: only the publisher's server can judge them, so
    that results here are those of the public test images, and are not the leaderboard's.
    """

    name = "mvtec_ad_2"
    test = "test_public"
    truth = "test_public/ground_truth"
