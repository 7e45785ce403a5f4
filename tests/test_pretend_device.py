"""A GPU where there is none: runs on a device that refuses what CUDA refuses, and counts what CUDA waits for.

CLBENCH_TEST_PRETEND=all tries each method with each strategy in each precision, deterministic or not, which takes a
quarter of an hour and more. Without it a part is tried: some methods in fp16 and two otherwise, and (make test-long) the others in
fp16, but banks of tokens and SimpleNet at most once in any; every second one of the paper's methods in bf16 too, and some
strategies with two methods. None is killed in bf16, which goes on as fp32 does, nor in fp32 where it is killed in fp16, which has a
gradient scale beside that.
"""

import copy
import json
import os
import signal
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from itertools import product
from pathlib import Path

import pytest
import torch
from conftest import Train, run_directories
from pretend_device import NAME, OnDevice, Refused, install, phase, watch, why_not
from pretend_runs import METHODS, Phases, count, in_process, words
from processes import CONTEXT
from torch import Tensor, nn
from torch.nn import functional as F

pytestmark = pytest.mark.skipif(why_not() is not None, reason=str(why_not()))

ALL = os.environ.get("CLBENCH_TEST_PRETEND") == "all"
TOKEN_BANKS = ("anomalydino", "dinosaur", "cadic")
COLLECTING = (
    "patchcore",
    "padim",
    *TOKEN_BANKS,
)  # methods that learn a task in one step here, without an optimizer
OWN_UPDATE = (*COLLECTING, "cfa", "ucad")  # methods that strategy=native is for
USUAL = {
    method: "native" if method in (*COLLECTING, "ucad") else "replay" for method in METHODS
}  # the paper's strategies
PAPERS = 7  # the first methods are the paper's
FIRST = ("patchcore", "cfa", "stfpm", "efficientad", "dinomaly")  # the others are killed by the long tests
PRECISIONS = ("fp32", "bf16", "fp16")

Scenario = tuple[str, str, str, bool]  # method, strategy, precision, deterministic


def scenarios() -> list[Scenario]:
    """What is tried, by CLBENCH_TEST_PRETEND."""
    pairs = [
        (method, strategy)
        for method in METHODS
        for strategy in ("finetune", "joint", "single", "replay", "native")
        if strategy != "native" or method in OWN_UPDATE
    ]
    if ALL:
        return [(*pair, *rest) for pair, *rest in product(pairs, PRECISIONS, (False, True))]  # type: ignore[misc]
    once = [pair for pair in USUAL.items() if pair[0] not in (*TOKEN_BANKS, "simplenet")]
    usual = [("dinosaur", "native", "fp32", True), ("cadic", "native", "fp16", False)]
    usual += [(*pair, "fp16", False) for pair in once if pair[0] in FIRST]
    usual += [("draem", "replay", "bf16", True)]
    further = [(*pair, "fp16", False) for pair in once if pair[0] not in FIRST]
    further += [(*pair, "bf16", True) for pair in once[1:PAPERS:2] if pair[0] != "draem"]
    others = [pair for pair in pairs if pair[0] in ("padim", "stfpm") and pair not in USUAL.items()]
    further += [(*pair, PRECISIONS[n % 3], n % 2 == 1) for n, pair in enumerate(others[::2])]
    return [*usual, *(pytest.param(one, marks=pytest.mark.long) for one in further)]  # type: ignore[list-item]


def run_on_device(
    commands: Sequence[Sequence[str]], folder: Path, kill_after: tuple[int, int] | None = None
) -> list[Phases]:
    """What commands asked of the device, each, in a process of their own; nothing where it killed itself.

    Args:
        folder: for files between here and there.
        kill_after: a stage and a number of steps of it, after which it does.
    """
    log, found = folder / "log.txt", folder / "found.json"
    process = CONTEXT.Process(target=in_process, args=(commands, list(sys.path), log, found, kill_after))
    process.start()
    process.join()
    if kill_after is not None:
        assert process.exitcode == -signal.SIGKILL, log.read_text(encoding="utf-8")[-5000:]
        return []
    assert process.exitcode == 0, log.read_text(encoding="utf-8")[-5000:]
    return json.loads(found.read_text(encoding="utf-8"))


@pytest.mark.parametrize("scenario", scenarios(), ids=lambda given: "-".join(map(str, given)))
def test_no_run_breaks_a_rule_of_cuda_and_a_killed_one_ends_in_the_same_results(
    scenario: Scenario, folder: Path, tmp_path: Path
) -> None:
    method, strategy, precision, deterministic = scenario
    own = [f"strategy={strategy}", f"gpu.precision={precision}", f"gpu.deterministic={deterministic}"]
    own += ["replay.size=4"] if strategy == "replay" else []
    whole = words(method, tmp_path / "whole", folder, *own)
    killed = words(method, tmp_path / "killed", folder, *own, "checkpoint_s=0")
    killed_in_fp16 = USUAL[method] == strategy
    if not ALL and (precision == "bf16" or (precision == "fp32" and killed_in_fp16)):
        asked = run_on_device([whole], tmp_path)
        (run,) = run_directories(tmp_path / "whole")
    else:
        stage = 0 if strategy == "joint" else 1
        run_on_device([killed], tmp_path, kill_after=(stage, 1 if method in COLLECTING else 3))
        asked = run_on_device([killed, whole], tmp_path)
        (other,), (run,) = run_directories(tmp_path / "whole"), run_directories(tmp_path / "killed")
        assert (run / "metrics.csv").read_bytes() == (other / "metrics.csv").read_bytes()
        after, all_steps = (sum(one[name]["calls"] for name in STEPS if name in one) for one in asked)
        begun_again = method in COLLECTING and strategy == "joint"
        assert 0 < after < all_steps or begun_again
    task = ["--task", "cloth"] if strategy == "single" else []
    test = str(folder / "brick" / "test")
    commands = [["predict", str(run), test, "--output", str(tmp_path / "predicted"), *task]]
    if precision == "fp32":  # a graph is in single precision
        commands += [["export", str(run), "--formats", "torch", "--output", str(tmp_path / "export"), *task]]
    asked += run_on_device(commands, tmp_path)
    refused = [
        event
        for phases in asked
        for name in phases
        for event in phases[name]["events"]
        if event[0] == "refusal"
    ]
    assert not refused  # not even one that the code went on after


# What is waited for


STEPS = ("early step", "step")
BATCHES = ("batch", "timed batch")
TABLES = "methods/tables.py"  # a copy for each table, once in a process
COPIED = {
    "patchcore": 1,
    "anomalydino": 2,  # one turns images
    "dinosaur": 1,
    "cadic": 1,
    "padim": 1,
    "cfa": 1,
    "draem": 2,
    "efficientad": 1,
    "rd4ad": 3,
    "supersimplenet": 2,
    "simplenet": 1,
    "dinomaly": 2,
    "ucad": 1,
}  # tables; CFA's other one before its steps
# Waits of a predicted batch at most: a search, see `clbench.methods.nearest.Search.closest_bank`, in one or two banks; which
# task each image is of, for PatchCore twice; a search of one bank, of up to four.
IN_BATCH = {"patchcore": 4 * 2 + 3, "anomalydino": 4 * 2 + 2, "dinosaur": 1, "cadic": 4}
READ = 2  # and once a stage, where there are banks of tasks, their sizes


@pytest.mark.parametrize(
    "method",
    # Those that share their steps and their search with another are tried with the long tests.
    [
        pytest.param(name, marks=pytest.mark.long)
        if name in ("simplenet", "dinosaur", "anomalydino", "efficientad", "rd4ad", "supersimplenet", "ucad")
        else name
        for name in METHODS
    ],
)
def test_no_step_waits_for_the_device(method: str, folder: Path, tmp_path: Path) -> None:
    buffer = ["replay.size=4"] if USUAL[method] == "replay" else []
    own = ["gpu.precision=fp16"] if method in TOKEN_BANKS else []  # CUDA's autocast has operations of its own
    own += ["method.masking=true"] if method == "anomalydino" else []
    (asked,) = run_on_device([words(method, tmp_path, folder, *buffer, *own)], tmp_path)

    def waits(*phases: str, within: str = "", besides: tuple[str, ...] = (TABLES,)) -> float:
        """Waits for the device in all calls of these phases, copies to it that wait among them."""
        return sum(
            asked[name]["calls"] * count(asked, name, kind, within, besides)
            for name in phases
            if name in asked
            for kind in ("wait", "blocking copy")
        )

    if method == "cadic":  # each choice depends on the one before
        assert waits(*STEPS, besides=("methods/cadic.py", TABLES)) == 0
    else:
        assert waits(*STEPS) == 0
    batches = sum(asked[name]["calls"] for name in BATCHES)
    assert waits(*BATCHES) <= (READ + batches * IN_BATCH[method] if method in IN_BATCH else 0)
    assert waits(*STEPS, *BATCHES, within=TABLES, besides=()) == COPIED.get(method, 0)
    # At most: once an epoch for the loss that is shown, and for an evaluated batch once for its maps, its scores, and which
    # banks were chosen. (Not on CUDA, where they come back while the next batch runs.)
    chooses = method in ("patchcore", "anomalydino", "dinosaur", "ucad")
    for name, most in (("epoch", 1), ("validation", 1), ("evaluation", 3 if chooses else 2)):
        assert waits(name) <= most * asked.get(name, {"calls": 0})["calls"]


def test_images_beyond_their_budget_are_sent_a_batch_at_a_time(folder: Path, tmp_path: Path) -> None:
    """With the same results, and without a wait."""
    own = ("stfpm", folder, "replay.size=4", "method.epochs=2")
    there = words(own[0], tmp_path / "there", *own[1:])
    streamed = words(own[0], tmp_path / "streamed", *own[1:], "gpu.image_memory_mb=0")
    asked = run_on_device([there, streamed], tmp_path)
    whole = [count(one, "stage", "launch", "data/images.py") for one in asked]  # before the epochs
    assert whole[0] > 0 == whole[1]
    for one in asked:
        assert sum(count(one, name, kind) for name in STEPS for kind in ("wait", "blocking copy")) == 0
    (run,), (other,) = run_directories(tmp_path / "there"), run_directories(tmp_path / "streamed")
    assert (run / "metrics.csv").read_bytes() == (other / "metrics.csv").read_bytes()


# The device itself


def in_own_process(function: Callable[[], None]) -> None:
    """Call a function in a process that has the device, and raise what it raises."""
    with ProcessPoolExecutor(1, mp_context=CONTEXT) as pool:
        pool.submit(_with_device, function).result()


def _with_device(function: Callable[[], None]) -> None:
    install()
    torch.manual_seed(0)
    function()


def there(*shape: int) -> Tensor:
    """Random numbers on the device, float32 of this shape."""
    return torch.randn(shape).to(NAME)


def test_it_refuses_what_cuda_refuses() -> None:
    in_own_process(_refusals)


def _refusals() -> None:
    x, y, generator = there(8, 4), torch.randn(8, 4), torch.Generator()
    index, grid, where = torch.tensor([1, 2]), there(1, 2, 2, 2).requires_grad_(), there(1, 2, 2, 2)
    refused: dict[str, Callable[[], object]] = {
        "a sum": lambda: x + y,
        "a product": lambda: x @ y.T,
        "a layer": lambda: nn.Linear(4, 2)(x),
        "concatenation": lambda: torch.cat([x, y]),
        "a number in concatenation": lambda: torch.stack([x[0, 0], y[0, 0]]),
        "a choice": lambda: torch.where(x > 0, x, y),
        "an index of a CPU tensor": lambda: y[index.to(NAME)],
        "writing to a CPU tensor": lambda: y.add_(x),
        "writing to a number on the CPU": lambda: torch.tensor(0.0).add_(x[0, 0]),
        "a result on the CPU": lambda: torch.add(x, 1, out=torch.empty(8, 4)),
        "rows by a CPU index": lambda: x.index_select(0, index),
        "gathering by a CPU index": lambda: x.gather(0, torch.zeros(1, 4, dtype=torch.int64)),
        "copying to rows by a CPU index": lambda: x.index_copy_(0, index, x[:2]),
        "whole numbers drawn by a CPU generator": lambda: torch.randint(
            3, (2,), generator=generator, device=NAME
        ),
        "normal numbers drawn by it": lambda: torch.randn(2, generator=generator, device=NAME),
        "an order drawn by it": lambda: torch.randperm(3, generator=generator, device=NAME),
        "numbers drawn by it in place": lambda: x.uniform_(generator=generator),
        "a product of whole numbers": lambda: x.long() @ x.long().T,
        "a convolution of whole numbers": lambda: F.conv2d(
            x[None, None].long(), x[None, None, :1, :1].long()
        ),
        "a factorisation in half precision": lambda: torch.linalg.cholesky(torch.eye(2, device=NAME).half()),
        "an array": lambda: x.numpy(),
    }
    only_deterministic: dict[str, Callable[[], object]] = {
        "reflection's gradient": lambda: (F.pad(grid, (1, 1, 1, 1), mode="reflect").sum().backward(), x + 1),
        "sampling's gradient": lambda: (
            F.grid_sample(grid, where, align_corners=True).sum().backward(),
            x + 1,
        ),
        "a running sum": lambda: x.cumsum(0),
        "a median": lambda: x.median(0),
    }
    with watch() as asked:
        for name, call in refused.items():
            with pytest.raises(Refused):
                call()
                pytest.fail(f"it takes {name}")
        for call in only_deterministic.values():
            call()
        torch.use_deterministic_algorithms(True)
        for name, call in only_deterministic.items():
            with pytest.raises(Refused):
                call()
                pytest.fail(f"it takes {name}")
    total = len(refused) + len(only_deterministic)
    assert count(asked.plain(), "elsewhere", "refusal") == total


def test_it_takes_what_cuda_takes_and_gives_the_cpu_s_numbers() -> None:
    in_own_process(_taken)


def _taken() -> None:
    x, index = torch.randn(8, 4), torch.tensor([1, 2])

    def set_to(values: Tensor) -> Tensor:
        values[torch.tensor([3])] = torch.tensor(7.0)
        values[values > 1] = -1.0
        return values

    def raised(values: Tensor) -> Tensor:
        """The gradient of upsampling, which PyTorch makes of other operations on CUDA, to be deterministic."""
        leaf = values.clone().requires_grad_()
        F.interpolate(leaf[None, None], size=(11, 6), mode="bilinear").square().sum().backward()
        assert leaf.grad is not None
        return leaf.grad

    taken: dict[str, Callable[[Tensor], Tensor]] = {
        "a number on the CPU": lambda t: t * torch.tensor(2.0) + 1,
        "a CPU index": lambda t: t[index],
        "a list as index": lambda t: t[[0, 3]],
        "writing by an index and by a mask": lambda t: set_to(t.clone()),
        "a choice with a number": lambda t: torch.where(t > 0, 0.0, t),
        "a running sum of whole numbers": lambda t: (10 * t).long().cumsum(0),
        "the gradient of upsampling": raised,
        "an order": lambda t: t.argsort(0),
        "nothing": lambda t: t[:0].clone(),
    }
    torch.use_deterministic_algorithms(True)
    for name, call in taken.items():
        found = call(x.to(NAME))
        assert isinstance(found, OnDevice), name
        torch.testing.assert_close(found.cpu(), call(x))
    assert x.to(NAME).tolist() == x.tolist() and x.to(NAME).numpy(force=True).tolist() == x.tolist()
    assert f"{x.to(NAME).sum():.3f}" == f"{x.sum():.3f}"


def test_it_trains_as_the_cpu_does_and_its_autocast_is_cuda_s() -> None:
    in_own_process(_training)


def _training() -> None:
    layers = [nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten()]
    network = nn.Sequential(*layers, nn.Linear(8 * 16, 5)).to(memory_format=torch.channels_last)
    images = torch.randn(4, 3, 8, 8)
    networks = {"cpu": network, NAME: copy.deepcopy(network).to(NAME)}
    for where, one in networks.items():
        optimizer = torch.optim.Adam(one.parameters(), 1e-2, fused=True)
        for _ in range(3):
            optimizer.zero_grad()
            one(images.to(where)).square().mean().backward()
            optimizer.step()
    for name, tensor in networks["cpu"].state_dict().items():
        torch.testing.assert_close(networks[NAME].state_dict()[name].cpu(), tensor)
    with torch.autocast(NAME, torch.float16):
        features = networks[NAME][0](images.to(NAME))
        assert features.dtype is torch.float16  # convolutions are in half precision,
        assert (
            F.mse_loss(features, features).dtype is features.square().dtype is torch.float32
        )  # squares in single,
        assert torch.maximum(features, features).dtype is torch.float16  # most others in what they are given


def test_it_counts_launches_waits_and_copies() -> None:
    in_own_process(_counts)


def _counts() -> None:
    x = there(8, 4)
    expected: dict[
        str, tuple[Callable[[], object], tuple[int, int, int]]
    ] = {  # launches, waits, blocking copies
        "arithmetic": (lambda: (x + 1) * 2, (2, 0, 0)),
        "views": (lambda: x.T[None, 1:].expand(2, 3, 8).unbind(), (0, 0, 0)),
        "what can be no view": (lambda: x.T.reshape(32), (1, 0, 0)),
        "a number": (lambda: float(x[0, 0]), (0, 1, 0)),
        "a condition": (lambda: bool((x > 0).any()), (2, 1, 0)),
        "to the CPU": (lambda: x.cpu(), (0, 1, 0)),
        "into a CPU tensor": (lambda: torch.empty(8, 4).copy_(x), (0, 1, 0)),
        "from the CPU": (lambda: torch.ones(3).to(NAME), (0, 0, 1)),
        "from the CPU without a wait": (lambda: torch.ones(3).to(NAME, non_blocking=True), (1, 0, 0)),
        "a list": (lambda: x.new_tensor([1.0, 2.0]), (0, 0, 1)),
        "a CPU index": (lambda: x[torch.tensor([1])], (1, 0, 1)),
        "a mask": (lambda: x[x > 0], (2, 1, 0)),
        "writing a number by a mask": (lambda: x.__setitem__(x > 9, 0.0), (3, 0, 0)),
        "places": (lambda: (x > 0).nonzero(), (2, 1, 0)),
        "a factorisation": (lambda: torch.linalg.cholesky(torch.eye(2, device=NAME)), (3, 1, 0)),
    }
    kinds = ("launch", "wait", "blocking copy")
    for name, (call, numbers) in expected.items():
        with watch() as asked, phase("this"):
            call()
        assert tuple(count(asked.plain(), "this", kind) for kind in kinds) == numbers, (name, asked.plain())


def test_a_run_takes_it_for_no_gpu_by_itself(train: Train) -> None:
    ended = train(f"gpu.device={NAME}")
    assert ended.returncode == 2 and f"gpu.device={NAME}" in ended.stderr
