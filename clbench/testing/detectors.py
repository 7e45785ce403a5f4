"""The tests that every detector must pass."""

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor, nn

from clbench import footprint
from clbench.methods.base import Detector, kept_state
from clbench.strategies.native import Native
from clbench.testing.small import Leaving, assert_equal, copied, images, left_at_every_place
from clbench.training import train

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

    @torch.no_grad()
    def judged(self, detector: Detector, given: Tensor) -> tuple[Tensor, Tensor]:
        """Images, uint8 [B, 3, H, W] -> maps [B, H, W] and scores [B]."""
        found = detector.eval()(given)
        return found.maps, found.scores

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
        detector = self.learned(build)
        again = build()
        again.prepare(images(6, 0, self.sizes[0]))
        again.restore(copied(kept_state(detector)))
        assert_equal(kept_state(again), kept_state(detector), "restored")
        given = images(3, 0, self.sizes[0])
        for found, expected in zip(self.judged(again, given), self.judged(detector, given), strict=True):
            assert torch.equal(found, expected)

    def test_an_image_is_judged_the_same_alone_and_beside_others(self, build: BuildDetector) -> None:
        detector, given = self.learned(build), images(4, 1, self.sizes[0])
        together, _ = self.judged(detector, given)
        alone, _ = self.judged(detector, given[2:3])
        torch.testing.assert_close(alone[0], together[2], rtol=1e-3, atol=1e-3 * float(together.abs().max()))

    def test_a_training_left_at_any_step_and_continued_is_the_training(self, build: BuildDetector) -> None:
        whole = self.learned(build, stages=1)
        before, bookmark = copied(kept_state(whole)), Leaving()
        self.learn(whole, 1, bookmark)

        def process(leaving: Leaving) -> dict[str, Tensor]:
            detector = build()
            detector.prepare(images(6, 0, self.sizes[0]))
            detector.restore(copied(before))
            self.learn(detector, 1, leaving)
            return kept_state(detector)

        for case, state in left_at_every_place(bookmark.places, process):
            assert_equal(state, kept_state(whole), case)

    def test_no_test_image_influences_what_is_learned(self, build: BuildDetector) -> None:
        expected = kept_state(self.learned(build))
        for seed in (7, 8):
            detector = self.learned(build, stages=1)
            state = copied(kept_state(detector))
            self.judged(detector, images(3, seed, self.sizes[0]))
            assert_equal(kept_state(detector), state, "after judging")
            self.learn(detector, 1)
            assert_equal(kept_state(detector), expected, f"learned after judging other images ({seed})")

    def test_the_footprint_counts_every_byte_of_the_state(self, build: BuildDetector) -> None:
        detector = self.learned(build)
        counted = footprint.measure(Native(detector))
        state = kept_state(detector)
        bytes_kept = sum(tensor.numel() * tensor.element_size() for tensor in state.values())
        trained = {name for name, _ in detector.named_parameters()} & state.keys()
        weights = sum(state[name].numel() * state[name].element_size() for name in trained)
        running = sum(
            tensor.numel() * tensor.element_size()
            for module in detector.modules()
            if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d)
            for name, tensor in module.named_buffers()
            if any(tensor is kept for kept in detector.state_dict(keep_vars=True).values())
            and not self._is_frozen(detector, module)
        )
        assert counted["additional_mb"] == pytest.approx((bytes_kept - weights - running) / footprint.MB)
        assert counted["executed_mb"] >= (weights + running) / footprint.MB - 1e-9

    @staticmethod
    def _is_frozen(detector: Detector, module: nn.Module) -> bool:
        from clbench.backbones import FeaturePyramid

        return any(
            module is inside
            for pyramid in detector.modules()
            if isinstance(pyramid, FeaturePyramid)
            for inside in pyramid.modules()
        )

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

    def test_an_export_says_the_same(self, build: BuildDetector) -> None:
        if not self.exports:
            pytest.skip("this detector is not exported")
        from clbench import exporting

        detector, given = self.learned(build), images(2, 1, self.sizes[0])
        expected, _ = self.judged(detector, given)
        program, any_number = exporting.trace(detector, given)
        batches = [given] if any_number else given.split(1)
        found = torch.cat([program.module()(batch)[0] for batch in batches])
        spread = float(expected.max() - expected.min())
        torch.testing.assert_close(found, expected, rtol=0, atol=max(exporting.TOLERANCE * spread, 1e-6))
