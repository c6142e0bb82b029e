"""Follow every tensor of a step: live bytes by category, phase and module, and the peak.

A torch dispatch mode sees the result of every operation below autograd, counts each *storage* once (views
and aliases share one) and drops it when the storage dies. Meta tensors have storages with sizes like real
ones, so the same code counts a run that never happens. (Patterns over names guess what a tensor is; the
allocator's own counters know bytes but not what they are for, and exist only on CUDA.)

A storage's category is decided where it is born:
- weights: from the modules that hold them, through ``claim``;
- gradients: a hook on each trainable parameter;
- saved activations: autograd's saved-tensor hooks, forward and recomputation alike;
- logits, optimizer, offloaded, on disk: marked by the code that makes them (``memory.marks``);
- workspace: everything else, such as dequantised weights and the results on their way to the next operation.

What no operation returns is not seen: scratch inside kernels and what an allocator rounds up to. Those are
the named constants of ``memory.process``; a plan adds what a kernel states of itself (``Ledger.holding``).
"""

import sys
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import NamedTuple

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from .bar import CATEGORIES
from .marks import marks
from .work import WorkCounter


class Moment(NamedTuple):
    """One point of the timeline: live bytes by category (in the order of ``CATEGORIES``) after a change."""

    phase: str
    module: str
    bytes: tuple[int, ...]

    @property
    def total(self) -> int:
        """Bytes of all categories on the device (offloaded ones lie in host memory, or on a disk)."""
        return sum(self.bytes) - self.bytes[_OFFLOADED] - self.bytes[_ON_DISK]

    def with_category(self, name: str, size: int) -> "Moment":
        """Return the same point with other live bytes of a category."""
        return self._replace(bytes=(*self.bytes[: _INDEX[name]], size, *self.bytes[_INDEX[name] + 1 :]))

    @property
    def breakdown(self) -> dict[str, int]:
        """Live bytes by category, empty ones left out."""
        return {name: size for name, size in zip(CATEGORIES, self.bytes, strict=True) if size}

    @property
    def on_device(self) -> dict[str, int]:
        """The breakdown of ``total``."""
        return {name: size for name, size in self.breakdown.items() if _INDEX[name] not in (_OFFLOADED, _ON_DISK)}


_INDEX = {name: number for number, name in enumerate(CATEGORIES)}
_OFFLOADED, _ON_DISK = _INDEX["offloaded"], _INDEX["on disk"]
_ADD = torch.ops.aten.add.Tensor
_PASSING = frozenset({_INDEX["workspace"], _INDEX["logits"]})  # categories that a hook may still change


class _Entry(weakref.ref):
    """A live storage: its address, its bytes, and how many are counted of them in which category."""

    __slots__ = ("category", "key", "nbytes", "size")
    category: int
    key: int
    nbytes: int
    size: int


def _run(func, args: tuple, kwargs: dict):
    return func(*args, **kwargs)


def _references(tensor: torch.Tensor) -> tuple[int, int, int]:
    """Return how many references there are to a tensor, to its storage, and to its Python object."""
    storage = tensor.untyped_storage()
    return tensor._use_count(), torch._C._storage_Use_Count(storage._cdata), sys.getrefcount(tensor)


class _Watch(TorchDispatchMode):
    """Note the references to what the engine adds to."""

    found: tuple[int, int, int] | None = None

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is _ADD and not torch.is_grad_enabled():
            self.found = _references(args[0])
        return func(*args, **(kwargs or {}))


@cache
def _of_sole_gradient() -> tuple[int, int, int] | None:
    """Return the references to a gradient that nobody else holds, where the engine adds another one to it.

    The engine then adds in place (``can_accumulate_inplace`` in torch's input_buffer.cpp), but not while a mode is
    active, as a ledger is. None where torch does not tell.
    """
    if not hasattr(torch.Tensor, "_use_count"):
        return None
    with torch.enable_grad(), _Watch() as watch:
        x = torch.ones(1, device="meta", requires_grad=True) * 1
        (x.sin() * x.cos()).sum().backward()
    return watch.found


class Ledger(TorchDispatchMode):
    """Count live tensors while it is the active mode (``with Ledger() as ledger:``).

    Args:
        timeline: also keep every change as a ``Moment`` (for pictures; some MiB per step).
        allocation_bytes: each storage is counted in whole multiples of this, as an allocator would.
        work: counts the operations' work too.
        run: runs an operator, given its arguments as a tuple and a dict.
    """

    def __init__(
        self, timeline: bool = False, allocation_bytes: int = 1, work: WorkCounter | None = None, run: Callable = _run
    ):
        super().__init__()
        self._work, self._run = work, run
        self.allocation_bytes = allocation_bytes
        self.live = [0] * len(CATEGORIES)
        self.live_bytes = 0  # on the device
        self.timeline: list[Moment] | None = [] if timeline else None
        self.peaks: dict[tuple[str, str], Moment] = {}  # by phase and module
        self.offloaded_peak_bytes = self.disk_peak_bytes = 0
        self._entries: dict[int, _Entry] = {}
        self._modules: list[str] = []
        self._backward_module = ""
        self._handles: list = []
        self._sole = _of_sole_gradient()
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._saved, _unchanged)

    @property
    def peak(self) -> Moment:
        """The highest point so far, over all phases."""
        return max(self.peaks.values(), key=lambda moment: moment.total)

    def now(self) -> Moment:
        """Return what is alive at this moment."""
        return Moment(marks.phase, self._modules[-1] if self._modules else self._backward_module, (*self.live,))

    def claim(self, tensors: Iterable[torch.Tensor], category: str) -> None:
        """Count tensors that exist already, or give those that are counted their category."""
        for tensor in tensors:
            self._count(tensor, _INDEX[category])

    @contextmanager
    def holding(self, nbytes: int) -> Iterator[None]:
        """Count bytes of workspace that no tensor shows, for as long as the context lasts."""
        size = self._allocated(nbytes)
        self._change(_INDEX["workspace"], size)
        try:
            yield
        finally:
            self._change(_INDEX["workspace"], -size)

    def watch(self, model: nn.Module) -> None:
        """Follow which module runs, and count the gradients of the trainable parameters as such."""
        for name, module in model.named_modules():
            if module is model:
                continue
            self._handles.append(module.register_forward_pre_hook(self._entering(name)))
            self._handles.append(module.register_forward_hook(self._leaving(name), always_call=True))
        for parameter in model.parameters():
            if parameter.requires_grad:
                self._handles.append(parameter.register_post_accumulate_grad_hook(self._has_gradient))

    def __enter__(self):
        self._hooks.__enter__()
        return super().__enter__()

    def __exit__(self, *error):
        super().__exit__(*error)
        self._hooks.__exit__(*error)
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return self.follow(func, args, kwargs or {})

    def follow(self, func, args: tuple, kwargs: dict):
        """Run an operator, count what it gives and does, and return its result."""
        by_engine = func is _ADD and self._sole and not torch.is_grad_enabled()
        # of a number there are no references; a name for the tensor would be one more
        if by_engine and isinstance(args[0], torch.Tensor) and _references(args[0]) == self._sole:
            self._hand_on(args[0])
        result = self._run(func, args, kwargs)
        if self._work is not None:
            self._work.see(func, args, kwargs, result)
        if isinstance(result, torch.Tensor):
            self._count(result)
        elif isinstance(result, tuple | list):
            for item in result:
                if isinstance(item, torch.Tensor):
                    self._count(item)
        return result

    def _count(self, tensor: torch.Tensor, category: int | None = None) -> None:
        storage = tensor.untyped_storage()
        key, nbytes = storage._cdata, storage.nbytes()
        entry = self._entries.get(key)
        if entry is None:
            if nbytes:
                self._begin(storage, key, nbytes, _INDEX[marks.category] if category is None else category)
            return
        if nbytes != entry.nbytes:  # resized in place
            earlier = entry.size
            entry.nbytes, entry.size = nbytes, self._allocated(nbytes)
            self._change(entry.category, entry.size - earlier)
        if category is not None:
            self._move(entry, category)

    def _allocated(self, nbytes: int) -> int:
        return -(-nbytes // self.allocation_bytes) * self.allocation_bytes

    def _begin(self, storage: torch.UntypedStorage, key: int, nbytes: int, category: int) -> None:
        self._entries[key] = entry = _Entry(storage, self._forget)
        entry.key, entry.nbytes, entry.size, entry.category = key, nbytes, self._allocated(nbytes), category
        self._change(category, entry.size)

    def _forget(self, entry: _Entry) -> None:
        del self._entries[entry.key]
        self._change(entry.category, -entry.size)

    def _hand_on(self, tensor: torch.Tensor) -> None:
        """Count a gradient no longer: the sum that comes next is written into it where no mode is active."""
        entry = self._entries.get(tensor.untyped_storage()._cdata)
        if entry is not None:
            self._change(entry.category, -entry.size)
            entry.size = 0

    def _move(self, entry: _Entry, category: int) -> None:
        if entry.category != category:
            self._add(entry.category, -entry.size)
            entry.category = category
            self._change(category, entry.size)

    def _add(self, category: int, size: int) -> None:
        self.live[category] += size
        if category == _OFFLOADED:
            self.offloaded_peak_bytes = max(self.offloaded_peak_bytes, self.live[_OFFLOADED])
        elif category == _ON_DISK:
            self.disk_peak_bytes = max(self.disk_peak_bytes, self.live[_ON_DISK])
        else:
            self.live_bytes += size

    def _change(self, category: int, size: int) -> None:
        self._add(category, size)
        if self.timeline is not None:
            self.timeline.append(self.now())
        if size > 0:
            place = marks.phase, self._modules[-1] if self._modules else self._backward_module
            highest = self.peaks.get(place)
            if highest is None or self.live_bytes > highest.total:
                self.peaks[place] = Moment(*place, (*self.live,))

    def _saved(self, tensor: torch.Tensor) -> torch.Tensor:
        entry = self._entries.get(tensor.untyped_storage()._cdata)
        if entry is not None and entry.category in _PASSING:
            self._move(entry, _INDEX["saved activations"])
        if tensor.grad_fn is None:
            return tensor
        return tensor.data  # for with an operator's own result, graph and tensor would hold each other

    def _has_gradient(self, parameter: torch.Tensor) -> None:
        if parameter.grad is not None:
            weight = self._entries.get(parameter.untyped_storage()._cdata)
            is_on_host = weight is not None and weight.category == _OFFLOADED
            self.claim([parameter.grad], "offloaded" if is_on_host else "gradients")

    def _entering(self, name: str):
        def enter(_module, _inputs):
            self._modules.append(name)

        return enter

    def _leaving(self, name: str):
        def begin_backward(_grad):
            if not self._backward_module.startswith(f"{name}."):  # of modules with one output, the innermost
                self._backward_module = name

        def leave(_module, _inputs, output):
            self._modules.pop()
            first = output[0] if isinstance(output, tuple) and output else output
            if isinstance(first, torch.Tensor) and first.requires_grad:
                first.register_hook(begin_backward)

        return leave


def _unchanged(tensor: torch.Tensor) -> torch.Tensor:
    return tensor
