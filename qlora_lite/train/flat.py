"""bitsandbytes' optimizers, many small weights at a time: the same bits in a fraction of the operations.

bitsandbytes updates one factor after the other: ten operations for each of hundreds of factors, which cost a GPU's
host, and a CPU, more than the arithmetic. Here factors are views of one tensor, each from a multiple of 256 values on,
and so are their states: a chunk of them is updated as if it were a single factor. Blocks of 8-bit states have 256
values, so none reaches across factors, and every bit is bitsandbytes' own. What an optimizer keeps of a factor has
bitsandbytes' names, types and shapes. Factors of fewer than 4,096 values, whose states have 32 bits, are chunks of
their own. A weight that is larger than a chunk should be (of a model that is trained whole) is updated piece by piece,
so that what an update needs on the way stays that of a chunk. Parts of weights that ranks have divided are updated one
by one, where they lie, with states of as many bits as the whole weight's. Gradients stay where autograd puts them, and
are copied together: to add them into one tensor in backward would take an operation more for each factor.

A step can be left out without the host's waiting for a GPU: the update is computed in any case, and the GPU takes it
or what was there before. That costs a copy of a chunk's states (2 bytes a value) and two operations. A CPU's step, and
one of paged states, which are the host's memory to torch, is left out by the host, which looks first.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import pad

from qlora_lite.memory.shapes import device_type, pieces
from qlora_lite.quant import bnb
from qlora_lite.quant.blockwise import BLOCK_VALUES

from .divided_weights import Parts
from .eight_bit import CpuAdamW8bit, CpuLion8bit
from .gradients import are_finite, parameters_of
from .rounding import places_of, round_stochastically

# Values that are updated at once, if several factors have them. A CPU's float32 copies of them have 1 MiB: larger ones
# leave the cache, smaller ones pay more for operators. A GPU's take 10 bytes a value: 240 MiB.
CHUNK_VALUES = {"cpu": 1 << 18, "cuda": 24 << 20}


class _Chunk:
    """Factors of one type that are concatenated.

    Args:
        parameters: the factors.
        sizes: values of each, with those that fill its last block up.
        state: bitsandbytes' state of all values, as if they were one parameter's; empty before the first update.
        stored: the tensors that ``state`` is made of.
    """

    def __init__(self, parameters: list[Tensor], sizes: list[int], state: dict | None = None, stored=()):
        self.parameters, self.sizes, self.state, self.stored = parameters, sizes, state or {}, stored
        self._padded: Tensor | None = None  # that the factors lie in with something between them

    def _is_filled(self) -> bool:
        return sum(self.sizes) == sum(p.numel() for p in self.parameters)

    def weights(self) -> Tensor:
        """Return the factors' values [sum of sizes]; factors that are not concatenated are first made views of
        it."""
        first, end = self.parameters[0], self.parameters[0].storage_offset()
        storage, filled = first.untyped_storage(), self._is_filled()
        # what lies between factors is changed too, and has to be nobody else's
        lie_so = filled or (self._padded is not None and self._padded.untyped_storage()._cdata == storage._cdata)
        for p, size in zip(self.parameters, self.sizes, strict=True):
            lie_so &= p.untyped_storage()._cdata == storage._cdata and p.storage_offset() == end and p.is_contiguous()
            end += size
        if lie_so and end * first.itemsize <= storage.nbytes():
            return first.detach().as_strided((sum(self.sizes),), (1,))
        joined = first.new_zeros(sum(self.sizes), requires_grad=False)
        for p, part in zip(self.parameters, self.views(joined), strict=True):
            p.data = part.copy_(p.detach())
        self._padded = None if filled else joined
        return joined

    def views(self, joined: Tensor) -> list[Tensor]:
        """Return the part of each factor, in its shape, of a tensor of their values [sum of sizes]."""
        parts = zip(self.parameters, joined.split(list(self.sizes)), strict=True)
        return [(part if len(part) == p.numel() else part[: p.numel()]).view(p.shape) for p, part in parts]

    def gradients(self, piece: slice, dtype: torch.dtype, scale: Tensor | None) -> Tensor:
        """Return a piece of the gradients [sum of sizes], scaled, with zeros between them; a factor's own where that
        will do. Several factors are one piece."""
        if len(self.parameters) == 1:
            found = self.parameters[0].grad.reshape(-1)[piece].to(dtype, copy=scale is not None)
            if missing := piece.stop - piece.start - len(found):
                found = pad(found, (0, missing))
            return found if scale is None else found.mul_(scale)
        make = torch.empty if self._is_filled() else torch.zeros
        joined = make(sum(self.sizes), dtype=dtype, device=self.parameters[0].device)
        torch._foreach_copy_(self.views(joined), [p.grad for p in self.parameters])
        return joined if scale is None else joined.mul_(scale)


def _chunks(parameters: Sequence[Tensor], smallest: int) -> list[_Chunk]:
    """Cut parameters into chunks of one type and one kind of states, in their order.

    Args:
        smallest: values from which on states have 8 bits, if they can.
    """
    chunks: dict[tuple, list[_Chunk]] = {}
    for p in parameters:
        size = -(-p.numel() // BLOCK_VALUES) * BLOCK_VALUES
        alike = chunks.setdefault((p.dtype, p.numel() < smallest), [])
        if not alike or sum(alike[-1].sizes) + size > CHUNK_VALUES[device_type(p.device)]:
            alike.append(_Chunk([], []))
        alike[-1].parameters.append(p)
        alike[-1].sizes.append(size)
    return [chunk for alike in chunks.values() for chunk in alike]


class _Flat(bnb.optim.optimizer.Optimizer8bit):
    """The step of a bitsandbytes optimizer, in chunks.

    Args:
        stochastic_rounding: update bfloat16 weights in float32 and round them stochastically; see ``rounding``.
        on_host: parameters that are updated alone, and stay where they lie.
        steps_before: see ``optim.build_optimizer``, as is the next.
    """

    def __init__(
        self,
        *args,
        stochastic_rounding: bool,
        on_host: frozenset[Tensor] = frozenset(),
        steps_before: int = 0,
        parts: Parts | None = None,
        **kwargs,
    ):
        super().__init__(*args, **kwargs)
        self._steps_before = steps_before
        self.stochastic_rounding, self.on_host = stochastic_rounding, on_host
        self._parts = parts or Parts()
        self._alone = {*on_host, *self._parts.values}
        self._chunks = [
            _chunks([p for p in group["params"] if p not in self._alone], self.args.min_8bit_size)
            for group in self.param_groups
        ]
        parameters = parameters_of(self)
        self._places = places_of(parameters, [-(-p.numel() // _piece_values(p)) for p in parameters], self._parts)
        self._counted: list[Tensor] = []  # the factors that the last step was counted of
        for chunk in (chunk for chunks in self._chunks for chunk in chunks):
            chunk.weights()

    @torch.no_grad()
    def step(self, if_finite: Tensor | None = None, scale: Tensor | None = None) -> None:
        """Update every factor that has a gradient.

        Args:
            if_finite: numbers; if one is not finite, all factors and states stay as they are. ``forget_step`` has to be
                told of it, since the host may not know yet.
            scale: a number that gradients are multiplied by.
        """
        self._counted, take = [], None
        if if_finite is not None and device_type(if_finite.device) == "cuda" and not self.is_paged:
            take = torch.linalg.vector_norm(if_finite, math.inf) < math.inf
        elif not are_finite(if_finite):
            return
        for gindex, (group, chunks) in enumerate(zip(self.param_groups, self._chunks, strict=True)):
            for chunk in chunks:
                learning = [p for p in chunk.parameters if p.grad is not None]
                if learning and not chunk.state:
                    self._make_state(chunk, group, gindex, chunk.parameters[0].numel())
                whole = len(learning) == len(chunk.parameters) and len({self.state[p]["step"] for p in learning}) == 1
                for part in [chunk] if whole else map(self._chunk_of, learning):
                    self._update(part, group, gindex, take, scale)
            for p in group["params"]:
                if p in self._alone and p.grad is not None:
                    if not self.state[p]:
                        self._make_state_alone(p, group, gindex)
                    self._update(self._chunk_of(p), group, gindex, take, scale)

    def forget_step(self) -> None:
        """Do not count the last step: it was left out."""
        for p in self._counted:
            self.state[p]["step"] -= 1
        self._counted = []

    def _update(self, chunk: _Chunk, group: dict, gindex: int, take: Tensor | None, scale: Tensor | None) -> None:
        weights, first = chunk.weights(), chunk.parameters[0]
        for tensor in chunk.stored:
            if getattr(tensor, "is_paged", False):
                bnb.functional.prefetch_tensor(tensor)
        chunk.state["step"] = self.state[first]["step"]
        # a chunk of several fits in a piece, but for the blocks that its last one fills up
        size = _piece_values(first) if len(chunk.parameters) == 1 else len(weights)
        for number, piece in enumerate(pieces(len(weights), size)):
            whole = piece.stop - piece.start == len(weights)
            state = chunk.state if whole else _piece_of(chunk.state, piece, len(weights))
            stored = chunk.stored if whole else [value for key, value in state.items() if _is_stored(key, value)]
            place = self._places[first] + number
            self._update_piece(chunk, piece, weights[piece], state, stored, place, group, gindex, take, scale)
        for p in chunk.parameters:
            self.state[p]["step"] = state["step"]
        chunk.state["step"] = state["step"]
        self._counted += chunk.parameters

    def _update_piece(
        self,
        chunk: _Chunk,
        piece: slice,
        weights: Tensor,
        state: dict,
        stored: Sequence[Tensor],
        place: int,
        group: dict,
        gindex: int,
        take: Tensor | None,
        scale: Tensor | None,
    ) -> None:
        rounds = self.stochastic_rounding and weights.dtype == torch.bfloat16
        gradients = chunk.gradients(piece, torch.float32 if rounds else weights.dtype, scale)
        values = weights.float() if rounds else weights if take is None else weights.clone()
        before = [] if take is None else [tensor.clone() for tensor in stored]
        joined = torch.nn.Parameter(values, requires_grad=False)
        joined.grad, self.state[joined] = gradients, state
        del gradients
        try:
            self.update_step(group, joined, gindex, 0)
        finally:
            del self.state[joined]
            joined.grad = None
        for tensor in stored if before else ():
            torch.where(take, tensor, before.pop(0), out=tensor)
        if rounds:
            values = round_stochastically(values, self._steps_before + state["step"], place)
        if take is not None:
            torch.where(take, values, weights, out=weights)
        elif rounds:
            weights.copy_(values)

    def _make_state_alone(self, p: Tensor, group: dict, gindex: int) -> None:
        if p in self._parts.values:
            size = -(-p.numel() // BLOCK_VALUES) * BLOCK_VALUES
            self._make_state(_Chunk([p], [size]), group, gindex, self._parts.values[p])
        else:
            self.init_state(group, p, gindex, 0)

    def _make_state(self, chunk: _Chunk, group: dict, gindex: int, whole_values: int) -> None:
        """Make a chunk's state in one tensor, and each factor's of views of it, as bitsandbytes would have it.

        Args:
            whole_values: how many values a factor has that is to have such a state.
        """
        first, values = chunk.parameters[0], sum(chunk.sizes)
        eight_bit = whole_values >= self.args.min_8bit_size
        example = first.new_empty(self.args.min_8bit_size if eight_bit else BLOCK_VALUES)
        self.init_state(group, example, gindex, 0)
        form = self.state.pop(example)
        sizes = {key: value.nbytes * values // example.numel() for key, value in form.items() if _is_stored(key, value)}
        storage = self.get_state_buffer(first.new_empty(()).expand(sum(sizes.values())), dtype=torch.uint8)
        parts = dict(zip(sizes, storage.split(list(sizes.values())), strict=True))
        chunk.stored = [storage]
        chunk.state = form | {key: _of(storage, part.view(form[key].dtype)) for key, part in parts.items()}
        for p in chunk.parameters:
            self.state[p] = dict(chunk.state)
        for key in parts:
            joined = chunk.state[key]
            blocks = [size * joined.numel() // values for size in chunk.sizes]
            views = chunk.views(joined) if joined.numel() == values else joined.split(blocks)
            for p, view in zip(chunk.parameters, views, strict=True):
                self.state[p][key] = _of(storage, view)

    def _chunk_of(self, p: Tensor) -> _Chunk:
        """Return a chunk of a single factor."""
        stored = {key: _of(value, value.view(-1)) for key, value in self.state[p].items() if _is_stored(key, value)}
        return _Chunk([p], [p.numel()], self.state[p] | stored, list(stored.values()))


def _piece_values(parameter: Tensor) -> int:
    """Return how many values of a large weight are updated at once: whole blocks of its states."""
    return max(1, CHUNK_VALUES[device_type(parameter.device)] // BLOCK_VALUES) * BLOCK_VALUES


def _piece_of(state: dict, piece: slice, values: int) -> dict:
    """Return the state of a piece of so many values, as views."""
    ends = {1: (piece.start, piece.stop), BLOCK_VALUES: (piece.start // BLOCK_VALUES, -(-piece.stop // BLOCK_VALUES))}
    found = dict(state)
    for key, value in state.items():
        if _is_stored(key, value):
            start, end = ends[1 if value.numel() == values else BLOCK_VALUES]
            found[key] = _of(value, value[start:end])
    return found


def _is_stored(key: str, value: object) -> bool:
    """Return whether part of a state is a tensor of a factor's own: code tables are all factors'."""
    return isinstance(value, Tensor) and not key.startswith("qmap")


def _of(storage: Tensor, view: Tensor) -> Tensor:
    """Mark the view of a paged tensor as bitsandbytes marks the tensor, which would take it for one of the host's."""
    if getattr(storage, "is_paged", False):
        view.is_paged, view.page_deviceid = True, storage.page_deviceid
    return view


class AdamW8bit(_Flat, bnb.optim.AdamW8bit):
    """bitsandbytes' AdamW with states in 8 bits."""


class AdamW32bit(_Flat, bnb.optim.AdamW32bit):
    """bitsandbytes' AdamW."""


class Lion8bit(_Flat, bnb.optim.Lion8bit):
    """bitsandbytes' Lion with its state in 8 bits."""


class Lion32bit(_Flat, bnb.optim.Lion32bit):
    """bitsandbytes' Lion."""


class PagedAdamW8bit(_Flat, bnb.optim.PagedAdamW8bit):
    """``AdamW8bit`` with paged states."""


class PagedAdamW32bit(_Flat, bnb.optim.PagedAdamW32bit):
    """``AdamW32bit`` with paged states."""


class PagedLion8bit(_Flat, bnb.optim.PagedLion8bit):
    """``Lion8bit`` with paged states."""


class AdamW8bitOnCpu(_Flat, CpuAdamW8bit):
    """``AdamW8bit`` for LoRA weights on a CPU."""


class Lion8bitOnCpu(_Flat, CpuLion8bit):
    """``Lion8bit`` for LoRA weights on a CPU."""


ON_CPU = {AdamW8bit: AdamW8bitOnCpu, Lion8bit: Lion8bitOnCpu}
