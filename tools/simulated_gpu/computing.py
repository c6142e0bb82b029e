"""A GPU that computes, on the CPU, in any order that streams and events allow.

``runtime.c`` stands for CUDA's. Inside ``ComputingCard`` an operator on the GPU's tensors is called twice: as
torch has it for CUDA, where kernels do nothing, for the form of its results and for all that it allocates; and as work
in the queue of its stream, which computes the operator on the same addresses with the CPU's kernels. Copies between
host and GPU are the runtime's own. So results are true only if each stream waits for what it needs: a wait that is
missing, or memory that is used again too soon, gives wrong numbers in one of the orders.

What it cannot show: what a GPU's kernels compute and how long they take. Not seen at all are a compiler's kernels, and
operators that a thread calls which is neither the one that entered nor autograd's.
"""

from __future__ import annotations

import ctypes
import itertools
import math
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from bitsandbytes.functional import get_4bit_type
from torch._decomp import decomposition_table
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map_only

from simulated_gpu.runtime import LIBRARY

aten = torch.ops.aten
ORDERS = {  # when a stream's work is done: when it is waited for, or as soon as it may be, on which streams
    "late": 0,
    "computing first": 1,
    "copies first": 2,
    "at random": 3,
}
OF_VALUES = {  # what the host learns, or the form of the results, comes from values on the GPU
    aten._local_scalar_dense.default,
    aten.equal.default,
    aten.is_nonzero.default,
    aten.nonzero.default,
    aten.masked_select.default,
    aten._unique2.default,
    aten.unique_consecutive.default,
    aten.repeat_interleave.Tensor,
}
MEMORY_ONLY = {
    aten.empty.memory_format,
    aten.empty_strided.default,
    aten.empty_like.default,
    aten.new_empty.default,
    aten.new_empty_strided.default,
    aten.lift_fresh.default,
    aten.record_stream.default,
    aten.set_.source_Storage_storage_offset,
}


class ComputingCard(TorchDispatchMode):
    """Compute what is asked of the GPU.

    Args:
        order: of ``ORDERS``.
        seed: of the order at random.
    """

    def __init__(self, order: str = "late", seed: int = 0):
        super().__init__()
        self._card = ctypes.CDLL(os.environ[LIBRARY])
        self._works: dict[int, Callable[[], None]] = {}
        self._numbers = itertools.count(1)
        self._run = ctypes.CFUNCTYPE(None, ctypes.c_long)(self._compute)  # held here, since C has only its address
        self._card.card_compute(self._run, ORDERS[order], seed)

    def __exit__(self, *error):
        torch.cuda.synchronize()
        self._card.card_compute(None, 0, 0)
        super().__exit__(*error)

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        tensors = _tensors((args, kwargs))
        if not any(tensor.is_cuda for tensor in tensors) and _device(kwargs, "cpu") != "cuda":
            return operator(*args, **kwargs)
        if operator.namespace == "qlora_lite":  # made of other operators
            with self:
                return operator(*args, **kwargs)
        if operator in MEMORY_ONLY or _gives_a_view(operator):
            return operator(*args, **kwargs)
        if operator in OF_VALUES or _indexed_by_bools(operator, args):
            return self._of_values(operator, args, kwargs)
        if operator is aten.copy_.default and args[0].device != args[1].device:
            return self._travel(*args, **kwargs)
        if operator is aten._to_copy.default and _device(kwargs, "cuda") != args[0].device.type:
            with self._quiet():
                target = operator(*args, **kwargs)
            return self._travel(target, args[0], kwargs.get("non_blocking", False))
        return self._queue(operator, args, kwargs)

    def _queue(self, operator, args, kwargs):
        gpu = _gpu_of(args, kwargs)
        seed = _seed(operator, kwargs, gpu)
        with self._quiet():
            results = operator(*args, **kwargs)
        inputs, more = _seen_by_the_cpu((args, kwargs))
        targets = _seen_by_the_cpu(_tensors(results))
        more = {name: torch.device("cpu") if name == "device" else value for name, value in more.items()}
        more |= dict.fromkeys({"generator"} & more.keys())  # the GPU's: the CPU draws by the seed
        compute = WRITTEN_OUT.get(operator, operator)
        if operator in PRODUCTS and any(tensor.dtype == torch.float16 for tensor in _tensors((args, kwargs))):
            compute = _by_float32(compute)

        def work():
            with torch.random.fork_rng([], enabled=seed is not None):
                if seed is not None:
                    torch.default_generator.manual_seed(seed)  # the CPU's only: the GPU's goes on by itself
                found = _tensors(compute(*inputs, **more))
            for target, value in zip(targets, found, strict=operator not in WRITTEN_OUT):
                if target.data_ptr() != value.data_ptr():  # else it was written in place
                    target.copy_(value)

        number = next(self._numbers)
        self._works[number] = work
        with torch.cuda.device(gpu):  # the stream's, if it is the default one
            self._card.card_work(_current_stream(gpu), ctypes.c_long(number))
        return results

    def _compute(self, number: int) -> None:
        """Do a piece of work. C calls this; an error goes to ``sys.unraisablehook``, for pytest a failure."""
        with torch.utils._python_dispatch._disable_current_modes(), torch.no_grad():
            self._works.pop(number)()

    def _of_values(self, operator, args, kwargs):
        gpu = _gpu_of(args, kwargs)
        torch.cuda.current_stream(gpu).synchronize()
        found = operator(*_seen_by_the_cpu(args), **_seen_by_the_cpu(kwargs))
        if operator._schema.is_mutable:
            return args[0]

        def on_gpu(value):
            return self._travel(value.new_empty(value.shape, device=gpu), value)

        return tree_map_only(torch.Tensor, on_gpu, found)

    def _travel(self, target, source, non_blocking=False):
        """Copy between host and GPU: bytes as the runtime does it, and their form where they come from or go to."""
        if source.dtype != target.dtype or source.shape != target.shape or not source.is_contiguous():
            form = torch.empty(target.shape, dtype=target.dtype, device=source.device)
            source = self._copy(form, source)
        if target.is_contiguous():
            return target.copy_(source, non_blocking)
        arrived = torch.empty(target.shape, dtype=target.dtype, device=target.device)
        return self._copy(target, arrived.copy_(source, non_blocking and target.is_cuda))

    def _copy(self, target, source):
        """Copy on one side."""
        return self._queue(aten.copy_.default, (target, source), {}) if target.is_cuda else target.copy_(source)

    @contextmanager
    def _quiet(self) -> Iterator[None]:
        """Have copies that are a part of an operator's code for CUDA not made beside the work."""
        self._card.card_quiet(1)
        try:
            yield
        finally:
            self._card.card_quiet(0)


def _gpu_of(args, kwargs) -> torch.device:
    """Return the GPU that an operator computes on: that of its tensors, or where it makes one."""
    made_on = torch.device(kwargs.get("device") or "cuda")
    if made_on.type != "cuda" or made_on.index is None:
        made_on = torch.device("cuda", torch.cuda.current_device())
    return next((tensor.device for tensor in _tensors((args, kwargs)) if tensor.is_cuda), made_on)


def _current_stream(gpu: torch.device) -> ctypes.c_void_p:
    return ctypes.c_void_p(torch._C._cuda_getCurrentRawStream(gpu.index))


def _device(kwargs, default: str) -> str:
    return torch.device(kwargs.get("device") or default).type


def _tensors(values) -> list[torch.Tensor]:
    return [each for each in tree_flatten(values)[0] if isinstance(each, torch.Tensor)]


def _gives_a_view(operator) -> bool:
    return any(each.alias_info is not None and not each.alias_info.is_write for each in operator._schema.returns)


def _indexed_by_bools(operator, args) -> bool:
    indexed = operator in (aten.index.Tensor, aten.index_put_.default, aten.index_put.default)
    return indexed and any(index is not None and index.dtype == torch.bool for index in args[1])


def _seed(operator, kwargs, gpu: torch.device) -> int | None:
    """Return what stands for the state of the GPU's random numbers, before an operator that draws some."""
    if torch.Tag.nondeterministic_seeded not in operator.tags:
        return None
    torch.cuda.init()
    generator = kwargs.get("generator") or torch.cuda.default_generators[gpu.index]
    return (generator.initial_seed() * 1_000_003 + generator.get_offset()) % 2**63


def _seen_by_the_cpu(values):
    """Return tensors of the CPU over the same memory, which hold nothing of the GPU alive.

    A single value of the host is read when it is passed; more of them, as paged states, are memory for the GPU too.
    """

    def seen(tensor):
        if not tensor.is_cuda:
            return tensor.clone() if tensor.dim() == 0 else tensor
        storage = tensor.untyped_storage()
        if not storage.nbytes():
            return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype)
        memory = (ctypes.c_char * storage.nbytes()).from_address(storage.data_ptr())
        flat = torch.frombuffer(memory, dtype=torch.uint8).untyped_storage()
        return torch.empty(0, dtype=tensor.dtype).set_(flat, tensor.storage_offset(), tensor.shape, tensor.stride())

    return tree_map_only(torch.Tensor, seen, values)


class _Attention:
    """The formula of attention in float32, of [B, H, Tq, D], with K heads of key and value that divide H."""

    def __init__(self, query, key, value, bias, causal, scale):
        groups = query.shape[1] // key.shape[1]
        self.scale = query.shape[3] ** -0.5 if scale is None else scale
        self.query, self.form = query.float(), (key.shape[0], key.shape[1], groups, *key.shape[2:])
        self.key, self.value = (each.float().repeat_interleave(groups, dim=1) for each in (key, value))
        scores = self.query @ self.key.transpose(2, 3) * self.scale
        if bias is not None:
            scores = scores + bias
        if causal:
            scores = scores.masked_fill(torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1), float("-inf"))
        self.weights = aten._safe_softmax(scores, -1)  # zeros where all is hidden, as the kernels give

    def out(self):
        return self.weights @ self.value

    def gradients(self, grad):
        grad = grad.float()
        of_weights = grad @ self.value.transpose(2, 3)
        of_scores = self.weights * (of_weights - (self.weights * of_weights).sum(-1, keepdim=True)) * self.scale
        of_key, of_value = of_scores.transpose(2, 3) @ self.query, self.weights.transpose(2, 3) @ grad
        return of_scores @ self.key, *(each.view(self.form).sum(2) for each in (of_key, of_value))


def _flash(query, key, value, dropout=0.0, causal=False, _debug=False, *, scale=None):
    return _Attention(query, key, value, None, causal, scale).out()


def _flash_gradients(grad, query, key, value, _out, _sums, _q, _k, _mq, _mk, _dropout, causal, *_seeds, scale=None):
    return _Attention(query, key, value, None, causal, scale).gradients(grad)


def _efficient(query, key, value, bias, _sums, _dropout=0.0, causal=False, *, scale=None):
    return _Attention(query, key, value, bias, causal, scale).out()


def _efficient_gradients(
    grad, query, key, value, bias, _out, _sums, _seed, _offset, _dropout, _wanted, causal=False, *, scale=None
):
    return _Attention(query, key, value, bias, causal, scale).gradients(grad)


def _packed(tensors, ends, causal, scale, window):
    """Attention over packed sequences [T, H, D], of which a token sees itself and ``window`` tokens before it."""
    query, key, value = (each[None].transpose(1, 2) for each in tensors)
    places = torch.arange(query.shape[2])
    sequence, distance = torch.bucketize(places, ends, right=True), places[:, None] - places
    seen = (sequence[:, None] == sequence) & (distance >= 0)
    if not causal:
        seen &= distance <= window
    return _Attention(query, key, value, torch.zeros(seen.shape).masked_fill_(~seen, float("-inf")), False, scale)


def _packed_flash(
    query,
    key,
    value,
    ends,
    _ends,
    _mq,
    _mk,
    _dropout,
    causal,
    _debug,
    *,
    scale=None,
    window_size_left=None,
    window_size_right=None,
):
    return _packed((query, key, value), ends, causal, scale, window_size_left).out()[0].transpose(0, 1)


def _packed_gradients(
    grad,
    query,
    key,
    value,
    _out,
    _sums,
    ends,
    _ends,
    _mq,
    _mk,
    _dropout,
    causal,
    *_seeds,
    scale=None,
    window_size_left=None,
    window_size_right=None,
):
    found = _packed((query, key, value), ends, causal, scale, window_size_left).gradients(grad[None].transpose(1, 2))
    return [each[0].transpose(0, 1) for each in found]


def _dequantized(codes, maxima, block_size, quant_type, shape, dtype):
    """Do what bitsandbytes' kernel for a GPU does, rounded once; its kernel for a CPU rounds otherwise."""
    numbers = torch.stack((codes.view(-1) >> 4, codes.view(-1) & 15), 1).view(-1)[: math.prod(shape)]
    values = get_4bit_type(quant_type, device="cpu")[numbers.long()]
    return (values * maxima.float().repeat_interleave(block_size)[: len(values)]).to(dtype).view(tuple(shape))


def _by_float32(product: Callable) -> Callable:
    """Return a product that takes float32 in the place of float16, in which a CPU is a hundred times slower."""

    def compute(*args, **kwargs):
        args, kwargs = tree_map_only(torch.Tensor, torch.Tensor.float, (args, kwargs))
        return product(*args, **kwargs)

    return compute


def _counts(numbers, bins=100, low=0, high=0):
    """Count whole numbers, which a CPU's kernel does not."""
    return torch.histc(numbers.double(), bins, low, high)


PRODUCTS = {
    getattr(getattr(aten, name), form)
    for name in ("mm", "addmm", "bmm", "baddbmm", "addmm_", "baddbmm_")
    for form in (("default",) if name.endswith("_") else ("default", "out"))
}
WRITTEN_OUT = {  # kernels that a CPU lacks or computes otherwise; of their results the first, the others are not used
    aten._scaled_dot_product_flash_attention.default: _flash,
    aten._scaled_dot_product_flash_attention_backward.default: _flash_gradients,
    aten._scaled_dot_product_efficient_attention.default: _efficient,
    aten._scaled_dot_product_efficient_attention_backward.default: _efficient_gradients,
    aten._flash_attention_forward.default: _packed_flash,
    aten._flash_attention_backward.default: _packed_gradients,
    aten._fused_rms_norm_backward.default: decomposition_table[aten._fused_rms_norm_backward.default],
    aten.histc.default: _counts,
    torch.ops.bitsandbytes.dequantize_4bit.default: _dequantized,
}
