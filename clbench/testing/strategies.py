"""The tests that every strategy must pass."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from clbench import footprint
from clbench.methods.base import Detector, kept_state
from clbench.strategies.base import Strategy
from clbench.testing.small import (
    Leaving,
    SmallDetector,
    assert_equal,
    copied,
    images,
    left_at_every_place,
    tensors_in,
)

BuildStrategy = Callable[[Detector], Strategy]

STAGES = 3  # tasks of the stream


class StrategyContract:
    """The tests of a strategy. Subclass it, and give a fixture `build` that returns a function, which takes a
    new detector and makes the strategy with it.

    For a strategy that only suits some detectors, override `detector` too.
    """

    size = 48  # pixels of both sides of the images

    @pytest.fixture
    def build(self) -> BuildStrategy:
        raise NotImplementedError("give a fixture `build`")

    def detector(self) -> Detector:
        """A new detector for the strategy to work with."""
        return SmallDetector()

    def given(self, stage: int) -> Tensor:
        """The images that a stage learns from, uint8 [6, 3, H, W].

        A joint strategy is given those of stage 0 alone.
        """
        return images(6, stage, self.size)

    def stages(self, strategy: Strategy) -> int:
        """The number of stages in which the strategy learns the stream."""
        return len(strategy.stages(STAGES))

    def learned(self, build: BuildStrategy, stages: int | None = None) -> Strategy:
        """The strategy after so many stages; None for all."""
        strategy = build(self.detector())
        for stage in range(self.stages(strategy) if stages is None else stages):
            strategy.learn(stage, self.given(stage))
        return strategy

    def continued(self, build: BuildStrategy, state: dict[str, Tensor]) -> Strategy:
        """A new strategy, as of another process, that has restored what `Strategy.state` gave."""
        strategy = build(self.detector())
        strategy.detector.prepare(self.given(0))
        strategy.restore(copied(state))
        return strategy

    @torch.no_grad()
    def judged(self, strategy: Strategy, task: int, seed: int | None = None) -> Tensor:
        """Anomaly maps of 3 images as of a task, [3, H, W]: of its own product, or of the one by `seed`."""
        strategy.detector_for(task).eval()
        return strategy.predict(images(3, task if seed is None else seed, self.size), task).maps

    def test_its_flags_say_what_it_does(self, build: BuildStrategy) -> None:
        strategy = self.learned(build)
        assert all(isinstance(value, bool) for value in strategy.flags().values())
        stages = strategy.stages(STAGES)
        assert sorted(task for stage in stages for task in stage) == list(range(STAGES))
        assert strategy.joint == (len(stages) == 1)
        assert strategy.has_buffer == (strategy.stored_images() is not None)
        assert strategy.task_known or len(strategy.detectors()) == 1
        assert not (strategy.continual and (strategy.joint or strategy.task_known))

    def test_a_state_brings_it_back(self, build: BuildStrategy) -> None:
        strategy = self.learned(build)
        again = self.continued(build, strategy.state())
        assert_equal(again.state(), strategy.state(), "restored")
        for task in range(STAGES):
            assert torch.equal(self.judged(again, task), self.judged(strategy, task))

    def test_a_process_that_ends_between_stages_loses_nothing(self, build: BuildStrategy) -> None:
        whole = self.learned(build)
        stages = self.stages(whole)
        strategy = build(self.detector())
        for stage in range(stages):
            if stage > 0:
                strategy = self.continued(build, strategy.state())
            strategy.learn(stage, self.given(stage))
        assert_equal(strategy.state(), whole.state(), "continued after every stage")

    def test_a_process_that_ends_at_any_step_loses_nothing(self, build: BuildStrategy) -> None:
        stages = self.stages(build(self.detector()))
        last = stages - 1
        whole = self.learned(build, last)
        before = copied(whole.state()) if last else None
        bookmark = Leaving()
        whole.bookmark = bookmark
        whole.learn(last, self.given(last))

        def process(leaving: Leaving) -> dict[str, Tensor]:
            strategy = self.continued(build, before) if before else build(self.detector())
            strategy.bookmark = leaving
            strategy.learn(last, self.given(last))
            return strategy.state()

        for case, state in left_at_every_place(bookmark.places, process):
            assert_equal(state, whole.state(), case)

    def test_no_test_image_influences_what_is_learned(self, build: BuildStrategy) -> None:
        expected = self.learned(build).state()
        for seed in (7, 8):
            strategy = build(self.detector())
            for stage in range(self.stages(strategy)):
                strategy.learn(stage, self.given(stage))
                for task in range(STAGES):  # also such as are not learned yet
                    self.judged(strategy, task, seed)
            assert_equal(strategy.state(), expected, f"judged other images ({seed}) after every stage")

    def test_the_footprint_counts_every_byte_that_it_keeps(self, build: BuildStrategy) -> None:
        strategy = self.learned(build)
        counted = footprint.measure(strategy)
        kept = sum(tensor.numel() * tensor.element_size() for tensor in strategy.kept().values())
        named = {name for name, _ in strategy.detector.named_parameters()}
        buffers = sum(
            tensor.numel() * tensor.element_size()
            for state in strategy.detectors()
            for name, tensor in state.items()
            if name not in named and "running_" not in name and "num_batches" not in name
        )
        assert counted["additional_mb"] == pytest.approx((kept + buffers) / footprint.MB)
        known = [*strategy.kept().values(), *(t for state in strategy.detectors() for t in state.values())]
        places = {tensor.untyped_storage().data_ptr() for tensor in known}
        held = [value for name, value in vars(strategy).items() if name not in ("bookmark", "on_epoch")]
        hidden = [t for t in tensors_in(held) if t.untyped_storage().data_ptr() not in places and t.numel()]
        assert not hidden, f"held and not among kept(): tensors of shapes {[tuple(t.shape) for t in hidden]}"

    def test_stored_images_are_images_that_were_learned_or_held_out(self, build: BuildStrategy) -> None:
        strategy = self.learned(build)
        stored = strategy.stored_images()
        if stored is None:
            assert not strategy.has_buffer
            return
        shown = torch.cat([self.given(stage) for stage in range(STAGES)])
        assert all((shown == image).flatten(1).all(1).any() for image in stored)

    def test_what_it_calls_unchanged_is_unchanged(self, build: BuildStrategy) -> None:
        strategy = build(self.detector())
        before: dict[int, Tensor] = {}
        for stage in range(self.stages(strategy)):
            strategy.learn(stage, self.given(stage))
            for task in range(stage + 1):
                maps = self.judged(strategy, task)
                if task in before and strategy.unchanged(stage, task):
                    assert torch.equal(maps, before[task])
                before[task] = maps

    def test_it_predicts_without_being_told_the_task_unless_it_says_so(self, build: BuildStrategy) -> None:
        strategy = self.learned(build)
        if strategy.task_known:
            return
        assert all(strategy.detector_for(task) is strategy.detector for task in range(STAGES))
        assert kept_state(strategy.detector_for(0)).keys() == kept_state(strategy.detector).keys()
