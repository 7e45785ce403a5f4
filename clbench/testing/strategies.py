"""The tests that every strategy must pass."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from clbench import footprint
from clbench.data.images import Images
from clbench.methods.base import Detector, Prediction, kept_state
from clbench.strategies.base import Strategy
from clbench.testing.small import (
    Leaving,
    SmallDetector,
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
from clbench.training import OF_STEPS, overrides, split

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
        """A new detector for the strategy to work with; some of a task's images are held out from its steps."""
        return SmallDetector(held_out=1 / 3)

    def given(self, stage: int) -> Tensor:
        """The images that a stage learns from, uint8 [6, 3, H, W].

        A joint strategy is given those of stage 0 alone.
        """
        return images(6, stage, self.size)

    def replayed_as(self, strategy: Strategy, given: Tensor) -> Tensor:
        """What images, uint8 [N, 3, H, W], are when they are replayed; override it where a buffer does not keep them as they are."""
        return given

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
        strategy.detector.prepare(Images.of(self.given(0)))
        strategy.restore(copied(state))
        return strategy

    @torch.no_grad()
    def judged(self, strategy: Strategy, task: int, given: Tensor | None = None) -> Prediction:
        """The prediction of images, uint8 [B, 3, H, W], as of a task; None for 3 images of its own product."""
        strategy.detector_for(task).eval()
        return strategy.predict(images(3, task, self.size) if given is None else given, task)

    def test_its_flags_say_what_it_does(self, build: BuildStrategy) -> None:
        strategy = self.learned(build)
        assert all(isinstance(value, bool) for value in strategy.flags().values())
        stages = strategy.stages(STAGES)
        assert sorted(task for stage in stages for task in stage) == list(range(STAGES))
        assert strategy.joint == (len(stages) == 1)
        if strategy.needs_buffer or not strategy.has_buffer:
            assert strategy.has_buffer == (strategy.stored_images() is not None)
        assert strategy.task_known or len(strategy.detectors()) == 1
        assert not (strategy.continual and (strategy.joint or strategy.task_known))
        otherwise = strategy.has_buffer or strategy.joint or strategy.task_known
        assert strategy.needs_gradients or otherwise or not overrides(type(strategy), OF_STEPS), (
            f"it says needs_gradients=False and overrides one of {', '.join(OF_STEPS)}, which do nothing for a method "
            "without gradients: its results would be those of no strategy"
        )

    def test_a_state_brings_it_back(self, build: BuildStrategy) -> None:
        strategy = self.learned(build)
        state = copied(strategy.state())
        expected = [self.judged(strategy, task) for task in range(STAGES)]
        build(self.detector()).learn(0, images(6, 9, self.size))  # a new process has not what a class kept
        again = self.continued(build, state)
        assert_equal(again.state(), state, "restored")
        for task in range(STAGES):
            assert_same(
                self.judged(again, task), expected[task], "restored, after another strategy has learned"
            )

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

    def test_no_test_image_influences_what_is_learned_or_predicted(self, build: BuildStrategy) -> None:
        apart = self.learned(build)
        state = copied(apart.state())
        expected = [self.judged(apart, task) for task in range(STAGES)]
        for seed in (7, 8):
            strategy = build(self.detector())
            for stage in range(self.stages(strategy)):
                strategy.learn(stage, self.given(stage))
                for task in range(STAGES):  # also such as are not learned yet
                    for given in strange_images(seed, self.size):
                        self.judged(strategy, task, given)
            assert_equal(strategy.state(), state, f"judged other images ({seed}) after every stage")
            for task in range(STAGES):
                assert_same(
                    self.judged(strategy, task), expected[task], f"judged other images ({seed}) before"
                )

    def test_it_leaves_the_images_that_it_is_given_as_they_are(self, build: BuildStrategy) -> None:
        strategy = build(self.detector())
        for stage in range(self.stages(strategy)):
            given = self.given(stage)
            strategy.learn(stage, given)
            assert torch.equal(given, self.given(stage)), "learning changed a task's images"
        given = images(3, 0, self.size)
        self.judged(strategy, 0, given)
        assert torch.equal(given, images(3, 0, self.size)), "predicting changed its images"

    def test_the_footprint_counts_every_byte_that_it_keeps(self, build: BuildStrategy) -> None:
        strategy, new = self.learned(build), build(self.detector())
        counted = footprint.measure(strategy)
        named = {name for name, _ in strategy.detector.named_parameters()}
        buffers = [
            tensor
            for state in strategy.detectors()
            for name, tensor in state.items()
            if name not in named and "running_" not in name and "num_batches" not in name
        ]
        kept = bytes_of([*strategy.kept().values(), *buffers])
        assert counted["additional_mb"] == pytest.approx(kept / footprint.MB)
        # What `detectors` gives may be copies: the one that works has tensors of its own.
        states = [*strategy.detectors(), kept_state(strategy.detector), strategy.kept()]
        known = {
            f"{number}.{name}": tensor
            for number, state in enumerate(states)
            for name, tensor in state.items()
        }
        new.detector.prepare(Images.of(self.given(0)))
        assert_all_counted(strategy, known, new)

    def test_images_that_were_held_out_stay_so_when_others_are_learned_again(
        self, build: BuildStrategy
    ) -> None:
        strategy = self.learned(build)
        shown = torch.cat([self.replayed_as(strategy, self.given(stage)) for stage in range(STAGES)])
        stored = strategy.stored_images()
        assert stored is None or among(stored[:], shown).all(), "images are stored that no stage was given"
        for stage, (again, unseen) in enumerate(strategy.replayed()):
            learned, held_out = split(self.given(stage), strategy.detector.held_out, strategy.seed, stage)
            assert among(again[:], self.replayed_as(strategy, learned[:])).all(), (
                f"images are learned again that stage {stage} did not learn from"
            )
            assert among(unseen[:], self.replayed_as(strategy, held_out[:])).all(), (
                f"images are held out that stage {stage} did not hold out"
            )

    def test_what_it_calls_unchanged_is_unchanged(self, build: BuildStrategy) -> None:
        strategy = build(self.detector())
        before: dict[int, Prediction] = {}
        for stage in range(self.stages(strategy)):
            strategy.learn(stage, self.given(stage))
            for task in range(stage + 1):
                found = self.judged(strategy, task)
                if task in before and strategy.unchanged(stage, task):
                    assert_same(found, before[task], f"task {task} after stage {stage}")
                before[task] = found

    def test_it_predicts_without_being_told_the_task_unless_it_says_so(self, build: BuildStrategy) -> None:
        strategy = self.learned(build)
        if strategy.task_known:
            return
        assert all(strategy.detector_for(task) is strategy.detector for task in range(STAGES))
        given = images(3, 0, self.size)
        expected = self.judged(strategy, 0, given)
        for task in range(1, STAGES):
            assert_same(self.judged(strategy, task, given), expected, f"as images of task {task}")

    def test_a_loaded_run_predicts_the_same(self, build: BuildStrategy) -> None:
        strategy = self.learned(build)
        loaded = build(self.detector())
        loaded.restore_detector(copied(strategy.state()))
        for task in range(STAGES):
            with torch.no_grad():  # as `clbench.load` does
                found = loaded.detector_for(task).eval()(images(3, task, self.size))
            assert_same(Prediction(*found), self.judged(strategy, task), f"loaded for task {task}")
