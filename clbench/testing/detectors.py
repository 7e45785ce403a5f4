"""The tests that every detector must pass."""

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

from clbench import footprint
from clbench.data.images import Images
from clbench.evaluation import BATCH_SIZE
from clbench.methods.base import Detector, Prediction, kept_state, trained_state
from clbench.strategies.base import copy_of
from clbench.strategies.native import Native
from clbench.strategies.storage import Features, Latent
from clbench.testing.small import (
    Leaving,
    among,
    assert_all_counted,
    assert_equal,
    assert_same,
    bytes_of,
    copied,
    images,
    left_at_every_place,
    strange_images,
)
from clbench.training import Batch, Hooks, split_rows, train

BuildDetector = Callable[[], Detector]


class DetectorContract:
    """The tests of a detector. Subclass it, and give a fixture `build` that returns a function without
    arguments, which makes a small detector that has learned nothing.

    Attributes:
        sizes: two sizes of square images, in pixels, that a new detector takes.
        exports: whether the detector can be exported.
        precisions: types of mixed-precision training that it supports on the CPU.
    """

    sizes: tuple[int, int] = (48, 64)
    exports = True
    precisions: Sequence[torch.dtype] = (torch.bfloat16,)

    @pytest.fixture
    def build(self) -> BuildDetector:
        raise NotImplementedError("give a fixture `build`")

    def learned(self, build: BuildDetector, stages: int = 2, size: int | None = None) -> Detector:
        """A detector that has learned so many stages, with replay of the earlier ones' images.

        Args:
            size: pixels of both sides of the images; None for the first of `sizes`.
        """
        detector = build()
        for stage in range(stages):
            self.learn(detector, stage, size=size)
        return detector

    def learn(
        self, detector: Detector, stage: int, bookmark: Leaving | None = None, size: int | None = None
    ) -> None:
        """Teach a stage of 6 images, with replay of 2 images of each earlier stage.

        Args:
            stage: 0-based.
            bookmark: where the training is kept and left; None for nowhere.
            size: pixels of both sides of the images; None for the first of `sizes`.
        """
        side = size or self.sizes[0]
        stored = [(images(2, earlier, side), images(0, earlier, side)) for earlier in range(stage)]
        train(detector, stage, images(6, stage, side), stored, 0, bookmark)

    def learn_alone(self, detector: Detector, stage: int, product: int) -> None:
        """Teach a stage of 6 images of a product, without replay."""
        train(detector, stage, images(6, product, self.sizes[0]), [], 0)

    @torch.no_grad()
    def judged(self, detector: Detector, given: Tensor) -> Prediction:
        """Images, uint8 [B, 3, H, W] -> maps [B, H, W] and scores [B]."""
        return Prediction(*detector.eval()(given))

    def judge_others(self, detector: Detector, product: int) -> None:
        """Let it judge batches of a product that it has not learned, and of what is no product."""
        for given in strange_images(product, self.sizes[0]):
            self.judged(detector, given)

    @pytest.mark.parametrize("which", [0, 1])
    def test_maps_and_scores_fit_images_of_two_sizes(self, build: BuildDetector, which: int) -> None:
        size = self.sizes[which]
        maps, scores = self.judged(self.learned(build, size=size), images(5, 0, size))
        assert maps.shape == (5, size, size) and scores.shape == (5,)
        assert maps.dtype == scores.dtype == torch.float32
        assert maps.isfinite().all() and scores.isfinite().all()

    def test_the_same_seed_learns_the_same(self, build: BuildDetector) -> None:
        torch.manual_seed(1)
        one = kept_state(self.learned(build))
        torch.manual_seed(2)  # what a detector draws it draws from seeds of its own
        assert_equal(kept_state(self.learned(build)), one, "learned again")

    def test_a_state_brings_a_detector_back(self, build: BuildDetector) -> None:
        detector, given = self.learned(build), images(3, 0, self.sizes[0])
        state, expected = copied(kept_state(detector)), self.judged(detector, given)
        self.learn_alone(build(), 0, product=9)  # a new process has not what a class or a file kept
        again = build()
        again.prepare(Images.of(images(6, 0, self.sizes[0])))
        again.restore(copied(state))
        assert_equal(kept_state(again), state, "restored")
        assert_same(self.judged(again, given), expected, "restored, after another detector has learned")

    def test_an_image_is_judged_the_same_alone_and_beside_others(self, build: BuildDetector) -> None:
        """In batches of every size up to that of evaluation, and at every place in them."""
        detector, half = self.learned(build), BATCH_SIZE // 2
        products = [images(half, product, self.sizes[0]) for product in (1, 9)]
        given = torch.stack(products, 1).flatten(0, 1)  # in turns, so that every batch has both
        each = [self.judged(detector, image) for image in given.split(1)]
        alone = Prediction(*(torch.cat(values) for values in zip(*each, strict=True)))
        for count in range(2, BATCH_SIZE + 1):
            together = self.judged(detector, given[-count:])
            for name, found, expected in zip(Prediction._fields, together, alone, strict=True):
                error = float((found - expected[-count:]).abs().max())
                assert error <= 1e-3 * float(expected.abs().max()), (
                    f"{name} of a batch of {count} images differ by up to {error:.3g} from those of each alone"
                )

    def test_a_training_left_at_any_step_and_continued_is_the_training(self, build: BuildDetector) -> None:
        whole = self.learned(build, stages=1)
        before, bookmark = copied(kept_state(whole)), Leaving()
        self.learn(whole, 1, bookmark)

        def process(leaving: Leaving) -> dict[str, Tensor]:
            detector = build()
            detector.prepare(Images.of(images(6, 0, self.sizes[0])))
            detector.restore(copied(before))
            self.learn(detector, 1, leaving)
            return kept_state(detector)

        for case, state in left_at_every_place(bookmark.places, process):
            assert_equal(state, kept_state(whole), case)

    def test_no_test_image_influences_what_is_learned_or_predicted(self, build: BuildDetector) -> None:
        detector, given = self.learned(build, stages=1), images(3, 1, self.sizes[0])
        state, apart = copied(kept_state(detector)), copy_of(detector)
        self.learn(apart, 1)
        expected = copied(kept_state(apart)), self.judged(apart, given)
        for product in (7, 8):
            judging = copy_of(detector)
            self.judge_others(judging, product)
            assert_equal(kept_state(judging), state, "after judging")
            self.learn(judging, 1)
            self.judge_others(judging, product)
            case = f"after judging other images ({product})"
            assert_equal(kept_state(judging), expected[0], f"learned {case}")
            assert_same(self.judged(judging, given), expected[1], f"predicted {case}")

    def test_held_out_images_change_no_weights(self, build: BuildDetector) -> None:
        """But for early stopping, which chooses among the weights that steps have made, and is turned off here."""
        if not build().has_gradients():
            return
        given = images(9, 0, self.sizes[0])
        other = given.clone()
        _, rows = split_rows(len(given), 1 / 3, 0, 0)
        other[rows] = images(len(rows), 9, self.sizes[0])

        def trained(shown: Tensor) -> dict[str, Tensor]:
            detector = build()
            detector.held_out, detector.patience = 1 / 3, None
            train(detector, 0, shown, [], 0)
            return trained_state(detector)

        assert_equal(trained(other), trained(given), "learned beside other held-out images")

    def test_it_leaves_the_images_that_it_is_given_as_they_are(self, build: BuildDetector) -> None:
        detector, given = build(), images(6, 0, self.sizes[0])
        shown = given.clone()

        class Looking(Hooks):
            def penalty(self, detector: Detector, batch: Batch) -> None:
                assert among(batch.images, shown).all(), "training_step changed its images"

        train(detector, 0, given, [], 0, hooks=Looking())
        assert torch.equal(given, shown), "learning changed a task's images"
        self.judged(detector, given)
        assert torch.equal(given, shown), "judging changed its images"

    def test_its_own_update_keeps_what_forgetting_drops(self, build: BuildDetector) -> None:
        """With an update of its own, and for all that only collect, where nothing else remembers."""
        native, collects = build().native, not build().has_gradients()
        if not (native or collects):
            return

        def after(product: int, forgets: bool) -> Detector:
            detector = build()
            self.learn_alone(detector, 0, product)
            if forgets:
                detector.forget()
            self.learn_alone(detector, 1, product=1)
            return detector

        forgetful, earlier = after(0, forgets=True), images(3, 0, self.sizes[0])
        if native:
            kept = self.judged(after(0, forgets=False), earlier)
            assert not torch.equal(kept.maps, self.judged(forgetful, earlier).maps), (
                "strategy=native and finetune predict the same: nothing of an earlier task is kept, or forget() does "
                "not drop it"
            )
        if collects:
            other = after(9, forgets=True)
            assert_equal(kept_state(forgetful), kept_state(other), "learned after forget() of another task")

    def test_the_footprint_counts_every_byte_of_the_state(self, build: BuildDetector) -> None:
        """And the state has every byte that is kept of what was learned."""
        detector, new = self.learned(build), build()
        counted = footprint.measure(Native(detector))
        state, weights = kept_state(detector), bytes_of(trained_state(detector).values())
        assert counted["additional_mb"] == pytest.approx((bytes_of(state.values()) - weights) / footprint.MB)
        assert counted["executed_mb"] >= weights / footprint.MB - 1e-9
        new.prepare(Images.of(images(6, 0, self.sizes[0])))
        assert_all_counted(detector, state, new)

    def test_mixed_precision_gives_finite_maps_and_keeps_weights_in_single_precision(
        self, build: BuildDetector
    ) -> None:
        given = images(3, 1, self.sizes[0])
        for precision in self.precisions:
            detector = build()
            detector.precision = precision
            self.learn(detector, 0)
            maps, scores = self.judged(detector, given)
            assert maps.dtype == scores.dtype == torch.float32
            assert maps.isfinite().all() and scores.isfinite().all()
            assert all(
                parameter.dtype == torch.float32
                for parameter in detector.parameters()
                if parameter.requires_grad
            )

    def test_it_learns_the_same_from_features_alone_where_it_says_so(self, build: BuildDetector) -> None:
        """Of stored images, whose features are not rounded to half precision here as a buffer keeps them."""
        if not build().needs_only_features:
            pytest.skip("this detector needs more of an image than its features")
        states, old, side = [], images(2, 0, self.sizes[0]), self.sizes[0]
        for by_features in (False, True):
            detector = build()
            storage = Latent(detector)
            storage.see(old)
            features = [[level.contiguous() for level in net.compute(old)] for net in detector.pyramids()]
            replayed = Features(features, storage)
            storage.ready([replayed])
            again = replayed.images if by_features else Images.of(old)
            train(detector, 1, images(4, 1, side), [(again, again.some(slice(1)))], 0)
            states.append(kept_state(detector))
        assert_equal(states[1], states[0], "learned from stored features in place of images")

    def test_an_export_says_the_same(self, build: BuildDetector) -> None:
        if not self.exports:
            pytest.skip("this detector is not exported")
        from clbench import exporting

        detector, given = self.learned(build), images(2, 1, self.sizes[0])
        expected = self.judged(detector, given)
        program, any_number = exporting.trace(detector, given)
        error = exporting.difference(expected, program.module(), given, any_number)
        assert error <= exporting.TOLERANCE, (
            f"maps or scores of the export differ by {error:.3g} of the maps' range"
        )
