"""A GPU that is none: PyTorch's spare device, computing on the CPU under CUDA's rules, with all that is asked of it counted.

PyTorch leaves one device for backends of others, PrivateUse1. `install` gives it the name `pretend`, and a backend of a
few lines of Python: a tensor on it holds a CPU tensor, which its operations work on. So code for a GPU runs unchanged,
with real numbers, and before each operation is looked at

- what CUDA would refuse, which raises `Refused`: operands on two devices, a CPU generator, types that it has no
  kernel for, and under `torch.use_deterministic_algorithms` operations that have only another kind;
- what CUDA would take time for, which `watch` counts: launches; waits for the device, where a number, or a size that
  depends on numbers, goes back to Python; and copies to it that wait too, since nothing says `non_blocking`.

It does not see what CUDA's own kernels do (rounding, TF32, atomics), how many of them an operation is made of, memory
that runs out, streams, nor code that asks `torch.cuda`.
"""

import re
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils import backend_registration
from typing_extensions import Self

NAME = "pretend"
HALVES = (torch.bfloat16, torch.float16)
aten = torch.ops.aten

_SETUP = "_setup_privateuseone_for_python_backend"  # experimental, of torch 2.9 and later
_LISTS = Path(torch.__file__).parent / "include/ATen/autocast_mode.h"  # what CUDA's autocast does with what
_OURS = f"{Path(__file__).parent.parent / 'clbench'}/"  # code whose lines are named
_libraries: list[Any] = []  # registrations that last as long as this


def why_not() -> str | None:
    """Why this PyTorch cannot have the device; None where it can."""
    if not hasattr(backend_registration, _SETUP):
        return f"torch {torch.__version__} takes no backend in Python (torch.utils.backend_registration.{_SETUP})"
    return None if _LISTS.is_file() else f"torch {torch.__version__} came without {_LISTS.name}"


# What is counted


class Refused(RuntimeError):
    """CUDA would refuse this operation.

    Raised by the operation, or for one of a backward pass, which PyTorch ends this process in, by the next one after it.
    """


class Event(NamedTuple):
    """Something that was asked of the device.

    Attributes:
        kind: `launch`, `wait`, `blocking copy` (to the device; it waits too) or `refusal`.
        operation: its name in ATen.
        place: lines of the package that asked for it, the innermost first; those of a backward pass are the
            loop's, which asked for that.
    """

    kind: str
    operation: str
    place: str


@dataclass
class Watch:
    """What was asked of the device, phase by phase.

    Attributes:
        events: phase -> how often each thing was asked for.
        calls: how often each phase was entered.
        phase: the innermost phase that is entered now.
        refused: what is to be raised once a backward pass is over.
    """

    events: dict[str, Counter[Event]] = field(default_factory=dict)
    calls: Counter[str] = field(default_factory=Counter)
    phase: str = "elsewhere"
    refused: Refused | None = None

    def note(self, kind: str, operation: str) -> None:
        """Count an event of the current phase."""
        self.events.setdefault(self.phase, Counter())[Event(kind, operation, _place())] += 1

    def plain(self) -> dict[str, Any]:
        """All of it as JSON can hold it: phase -> its `calls`, and `events`, a list of kind, operation, place and number."""
        phases = dict.fromkeys((*self.calls, *self.events))
        return {
            name: {
                "calls": self.calls[name] or 1,
                "events": [[*event, n] for event, n in self.events.get(name, Counter()).most_common()],
            }
            for name in phases
        }


_watch = Watch()


@contextmanager
def watch() -> Iterator[Watch]:
    """Inside, what is asked of the device is counted anew."""
    global _watch
    before, _watch = _watch, Watch()
    # Gradients are computed by this thread, so that the lines that ask for them are known.
    with torch.autograd.set_multithreading_enabled(False):
        try:
            yield _watch
            _raise_refused()
        finally:
            _watch = before


@contextmanager
def phase(name: str) -> Iterator[None]:
    """Inside, and not inside of a further one, events are counted under this name."""
    outer, _watch.phase = _watch.phase, name
    _watch.calls[name] += 1
    try:
        yield
    finally:
        _watch.phase = outer


def current_phase() -> str:
    """The innermost phase that is entered now."""
    return _watch.phase


def _place(depth: int = 3) -> str:
    frame, lines = sys._getframe(2), list[str]()
    while frame is not None and len(lines) < depth:
        name = frame.f_code.co_filename
        if name.startswith(_OURS):
            lines.append(f"{name.removeprefix(_OURS)}:{frame.f_lineno} {frame.f_code.co_name}")
        frame = frame.f_back  # type: ignore[assignment]
    return " < ".join(lines) or "(elsewhere)"


# Tensors


class OnDevice(Tensor):
    """A tensor on the device, which holds a CPU tensor with its numbers."""

    held: Tensor
    # Of the branches that PyTorch has in Python, CUDA's are taken: some operations are made of others there.
    is_cuda = property(lambda self: True)  # type: ignore[assignment]
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def __new__(cls, held: Tensor) -> Self:
        """The wrapper of a CPU tensor."""
        made = torch.Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls,
            held.shape,
            strides=held.stride(),
            storage_offset=held.storage_offset(),
            dtype=held.dtype,
            device=torch.device(NAME, 0),
        )
        made.held = held
        return made

    @classmethod
    def __torch_dispatch__(cls, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        return operate(operation, args, kwargs or {})

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"OnDevice({self.held!r})"

    def tolist(self) -> Any:
        return self.cpu().tolist()

    def numpy(self, *, force: bool = False) -> Any:
        if not force:
            _refuse("numpy", "an array cannot lie on the device")
        return self.detach().cpu().numpy()

    def untyped_storage(self) -> Any:
        return self.held.untyped_storage()

    def __format__(self, form: str) -> str:
        return format(self.item(), form) if self.dim() == 0 else super().__format__(form)


def operate(operation: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """Do an operation of ATen as CUDA would: refuse it, or count it and compute on the CPU.

    Raises:
        Refused: CUDA would refuse it.
    """
    _raise_refused()
    name = operation._schema.name.removeprefix("aten::")
    if name == "copy_":
        return _copied(*args, **kwargs)
    if name == "_to_copy":
        return _converted(operation, *args, **kwargs)
    leaves = list(_leaves((args, kwargs)))
    reason = _refusal(operation, name, args, kwargs, leaves)
    if reason:
        _refuse(name, reason)
    if _waits(operation, name, args):
        _watch.note("wait", name)
    if operation in _INDEXING:
        for index in args[1]:
            if isinstance(index, Tensor) and not isinstance(index, OnDevice):
                _watch.note("blocking copy", name)
    if not (operation.is_view or name in _WITHOUT_KERNEL):
        _watch.note("launch", name)
    wrappers = {id(leaf.held): leaf for leaf in leaves if isinstance(leaf, OnDevice)}

    def wrapped(found: Any) -> Any:
        if not isinstance(found, Tensor):
            return found
        known = wrappers.get(id(found))
        if known is not None and known.shape != found.shape:
            raise NotImplementedError(f"{name} gave a tensor of the pretend device another shape in place")
        return OnDevice(found) if known is None else known

    with torch._C._AutoDispatchBelowAutograd():
        found = operation(*_each(args, _on_cpu), **_each(kwargs, _on_cpu))
    return _each(found, wrapped)


def _leaves(value: Any) -> Iterator[Any]:
    """What operands, and lists of them, are made of: tensors, numbers, devices and the like."""
    if isinstance(value, list | tuple):
        for part in value:
            yield from _leaves(part)
    elif isinstance(value, dict):
        yield from _leaves(list(value.values()))
    else:
        yield value


def _each(value: Any, change: Callable[[Any], Any]) -> Any:
    """Operands, or results, with each leaf changed; PyTorch's own trees take ten times as long."""
    if isinstance(value, list | tuple):
        return type(value)([_each(part, change) for part in value])
    if isinstance(value, dict):
        return {name: _each(part, change) for name, part in value.items()}
    return change(value)


def _on_cpu(leaf: Any) -> Any:
    if isinstance(leaf, OnDevice):
        return leaf.held
    return torch.device("cpu") if isinstance(leaf, torch.device) and leaf.type == NAME else leaf


def _converted(operation: Any, source: OnDevice, **settings: Any) -> Tensor:
    """A tensor of the device in another type or layout, or on the CPU."""
    wanted = settings.get("device")
    leaves_it = wanted is not None and torch.device(wanted).type != NAME
    # PyTorch copies into pinned memory where the copy need not be waited for.
    _watch.note("wait" if leaves_it and not settings.get("non_blocking") else "launch", "_to_copy")
    settings |= {"device": torch.device("cpu"), "non_blocking": False}
    with torch._C._AutoDispatchBelowAutograd():
        found = operation(source.held, **settings)
        found = found.clone() if found is source.held else found
    return found if leaves_it else OnDevice(found)


def _copied(target: Tensor, source: Tensor, non_blocking: bool = False) -> Tensor:
    """A tensor into which another one was copied, either of them on the device."""
    if isinstance(target, OnDevice) and isinstance(source, OnDevice):
        _watch.note("launch", "copy_")
    elif isinstance(target, OnDevice):
        _watch.note("launch" if non_blocking else "blocking copy", "copy_")
    else:
        _watch.note("wait", "copy_")  # without a wait only into pinned memory, which there is none of
    with torch._C._AutoDispatchBelowAutograd():
        _on_cpu(target).copy_(_on_cpu(source))
    return target


# What CUDA refuses, waits for, and does for nothing

_INDEXING = {
    aten.index.Tensor,
    aten._unsafe_index.Tensor,
    aten.index_put.default,
    aten.index_put_.default,
    aten._index_put_impl_.default,
}
_WITH_NUMBER = {  # beside pointwise operations, these take a CPU tensor of one number and no dimension
    aten.fill.Tensor, aten.fill_.Tensor, aten.masked_fill.Tensor, aten.masked_fill_.Tensor,
    aten.index_put.default, aten.index_put_.default, aten._index_put_impl_.default,
    aten._foreach_add_.Tensor, aten._foreach_mul_.Tensor, aten._foreach_div_.Tensor,
}  # fmt: skip
_FLOATS = {  # no kernel for whole numbers
    "mm", "bmm", "addmm", "baddbmm", "mv", "dot", "convolution", "avg_pool2d", "max_pool2d_with_indices", "cdist",
    "grid_sampler_2d", "upsample_linear1d", "upsample_bilinear2d", "native_layer_norm", "native_batch_norm",
    "_softmax", "_log_softmax",
}  # fmt: skip
_WHOLE = (torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
_NO_HALVES = {  # none for half precision
    "linalg_cholesky_ex", "linalg_solve_triangular", "linalg_inv_ex", "linalg_lu_factor_ex", "linalg_eigh", "_linalg_svd",
    "_cdist_forward",
}  # fmt: skip
# The documentation of use_deterministic_algorithms, and cumsum, which releases that the project still takes refuse.
_NOT_DETERMINISTIC = {
    "_adaptive_avg_pool2d_backward", "adaptive_max_pool2d_backward", "avg_pool3d_backward", "max_unpool2d",
    "upsample_linear1d_backward", "upsample_bilinear2d_backward", "upsample_bicubic2d_backward",
    "_upsample_bilinear2d_aa_backward", "_upsample_bicubic2d_aa_backward", "grid_sampler_2d_backward",
    "reflection_pad1d_backward", "reflection_pad2d_backward", "nll_loss2d_forward", "_ctc_loss_backward", "put_",
    "histc", "median.dim", "nanmedian.dim", "kthvalue", "cumsum",
}  # fmt: skip
_WHOLE_IS_DETERMINISTIC = {"cumsum", "histc"}
_READING = {
    "_linalg_check_errors",
    "is_nonzero",
    "multinomial",
    "linalg_eigh",
    "_linalg_svd",
    "histc",
}  # numbers of it
_WITHOUT_KERNEL = {
    "empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "_local_scalar_dense", "_unsafe_view",
    "lift_fresh", "set_", "resize_", "is_pinned", "record_stream",
}  # fmt: skip


def _refuse(name: str, reason: str) -> None:
    """Refuse an operation for this reason.

    Raises:
        Refused: at once, unless this is within a backward pass.
    """
    _watch.note("refusal", name)
    _watch.refused = _watch.refused or Refused(f"{name}: {reason}, at {_place()}")
    _raise_refused()


def _raise_refused() -> None:
    refused = _watch.refused
    if refused is not None and torch._C._current_graph_task_id() == -1:  # not in a backward pass
        _watch.refused = None
        raise refused


def _refusal(operation: Any, name: str, args: Any, kwargs: dict[str, Any], leaves: list[Any]) -> str | None:
    """Why CUDA would refuse an operation; None where it would not."""
    ours = [leaf for leaf in leaves if isinstance(leaf, OnDevice)]
    others = [leaf for leaf in leaves if isinstance(leaf, Tensor) and not isinstance(leaf, OnDevice)]
    if any(isinstance(leaf, torch.Generator) and leaf.device.type != NAME for leaf in leaves):
        return "a CPU generator cannot draw on the device"
    if others and not ours:
        return "made on the device out of tensors on the CPU"
    if any(not isinstance(tensor, OnDevice) for tensor in _written(operation, args, kwargs)):
        return "a tensor on the CPU is written to from the device"
    if operation in _INDEXING:
        if not isinstance(args[0], OnDevice):
            return "a tensor on the CPU is indexed by one on the device"
        others = [leaf for leaf in others if not any(leaf is index for index in args[1])]
    if any(leaf.dim() for leaf in others):
        return f"operands on the CPU, of shapes {[tuple(leaf.shape) for leaf in others]}, beside those on the device"
    if others and torch.Tag.pointwise not in operation.tags and operation not in _WITH_NUMBER:
        return "a number on the CPU, where CUDA takes none"
    types = {leaf.dtype for leaf in ours}
    whole = types.intersection(_WHOLE)
    if (name in _FLOATS and whole) or (name in _NO_HALVES and types.intersection(HALVES)):
        return f"no kernel for {types}"
    if torch.are_deterministic_algorithms_enabled():
        full = (
            operation._schema.name.removeprefix("aten::")
            + "."
            + (operation._schema.overload_name or "default")
        )
        if not (whole and name in _WHOLE_IS_DETERMINISTIC) and not _NOT_DETERMINISTIC.isdisjoint(
            (name, full)
        ):
            return "no deterministic kernel"
    return None


def _written(operation: Any, args: Any, kwargs: dict[str, Any]) -> list[Tensor]:
    """The tensors that an operation writes to."""
    if not operation._schema.is_mutable:
        return []
    found = [
        args[place] if place < len(args) else kwargs.get(argument.name)
        for place, argument in enumerate(operation._schema.arguments)
        if argument.alias_info is not None and argument.alias_info.is_write
    ]
    return [leaf for leaf in _leaves(found) if isinstance(leaf, Tensor)]


def _waits(operation: Any, name: str, args: Any) -> bool:
    """Whether the device is waited for, as Python or the size of a result needs its numbers."""
    if operation in _INDEXING:
        masks = [index for index in args[1] if index is not None and index.dtype in (torch.bool, torch.uint8)]
        fills = name.startswith(("index_put", "_index_put")) and args[2].dim() == 0  # which needs no indices
        return bool(masks) and not fills
    sizes = torch.Tag.dynamic_output_shape, torch.Tag.data_dependent_output
    return name in _READING or any(tag in operation.tags for tag in sizes)


# Setting it up


class _Module:
    """What PyTorch asks of `torch.pretend`."""

    is_initialized = is_available = staticmethod(lambda: True)
    _is_in_bad_fork = staticmethod(lambda: False)
    current_device = staticmethod(lambda: 0)
    device_count = staticmethod(lambda: 1)
    manual_seed_all = set_device = staticmethod(lambda _: None)
    get_amp_supported_dtype = staticmethod(lambda: [torch.float32, *HALVES])


def install() -> None:
    """Set the device up, once in a process, which has it until it ends."""
    if _libraries:
        return
    getattr(backend_registration, _SETUP)(NAME, backend_module=_Module())
    # Dispatch comes by the tensors' class, and where that is left out, as within indexing by lists, by their device.
    every = torch.library.Library("_", "IMPL")
    every.fallback(lambda operation, *args, **kwargs: operate(operation, args, kwargs), "PrivateUse1")
    every.fallback(torch.library.fallthrough_kernel, "AutocastPrivateUse1")
    some = torch.library.Library("aten", "IMPL")
    _libraries.extend((every, some))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of kernels that PyTorch has for all devices
        some.impl("copy_", lambda *args, **kwargs: _copied(*args, **kwargs), "PrivateUse1")
        for name in _MADE:
            packet, _, overload = name.partition(".")
            operation = getattr(getattr(aten, packet), overload or "default")
            kernel = lambda *args, operation=operation, **kwargs: operate(operation, args, kwargs)
            some.impl(name, kernel, "PrivateUse1")
        for operation, choose in _autocast():
            some.impl(
                operation._name.removeprefix("aten::"), _casting(operation, choose), "AutocastPrivateUse1"
            )


_MADE = (  # which else make an empty tensor and change its shape
    "arange", "arange.start", "arange.start_step", "linspace", "logspace", "eye", "eye.m", "randperm",
    "randperm.generator", "tril_indices", "triu_indices",
)  # fmt: skip


def _autocast() -> Iterator[tuple[Any, Callable[[list[Tensor]], torch.dtype]]]:
    """The operations that CUDA's autocast changes, and the type that their operands are brought to."""

    def widest(tensors: list[Tensor]) -> torch.dtype:
        single = any(tensor.dtype is torch.float32 for tensor in tensors)
        return torch.float32 if single else torch.get_autocast_dtype(NAME)

    chosen: dict[str, Callable[[list[Tensor]], torch.dtype]] = {
        "LOWER_PRECISION_FP": lambda tensors: torch.get_autocast_dtype(NAME),
        "FP32": lambda tensors: torch.float32,
        "FP32_SET_OPT_DTYPE": lambda tensors: torch.float32,
        "PROMOTE": widest,
    }
    lists = re.findall(r"#define AT_FORALL_(\w+)\(_\)((?:.*\\\n)*.*\n)", _LISTS.read_text(encoding="utf-8"))
    for title, body in lists:
        for packet, overload in re.findall(r"\b_\((\w+)(?:, (\w+))?\)", body) if title in chosen else ():
            operation = getattr(getattr(aten, packet, None), overload or "default", None)
            if operation is not None:
                yield operation, chosen[title]


def _casting(operation: Any, choose: Callable[[list[Tensor]], torch.dtype]) -> Callable[..., Any]:
    """An operation as autocast has it: operands on the device brought to one type first."""
    without = torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastPrivateUse1)  # type: ignore[attr-defined]

    def fits(leaf: Any) -> bool:
        on_device = isinstance(leaf, Tensor) and leaf.device.type == NAME
        return on_device and leaf.is_floating_point() and leaf.dtype is not torch.float64

    def kernel(*args: Any, **kwargs: Any) -> Any:
        with torch._C._ExcludeDispatchKeyGuard(without):
            wanted = choose([leaf for leaf in _leaves((args, kwargs)) if fits(leaf)])
            given = _each((args, kwargs), lambda leaf: leaf.to(wanted) if fits(leaf) else leaf)
            return operation(*given[0], **given[1])

    return kernel
