"""Make one token of each prompt in memory that stays, so that on a GPU a step is started as one CUDA graph.

transformers' loop starts every operation of a step from the host, 60 to 80 a block, and its cache grows by a copy of
itself for every token. Here keys and values have room for the tokens to come, the step reads and writes tensors that
stay where they are, and what it starts is recorded once and then started whole. ``torch.compile`` could do it too, in a
minute for each shape and with a compiler that must be there.

The prompt is read as ever, with the cache that grows: only so is it attended to without a mask. Its keys and values are
then moved. Room is made for ``CHUNK_TOKENS`` tokens at a time, block by block: an answer that ends early has not
taken the memory of the longest, and attention reads no more than it must.

What depends on a value or on the host cannot be recorded, or would be recorded as it was: weights that travel, blocks
with a window that is full, routed experts, positions whose tables grow. The first two are known before
(``has_fixed_step``). The others wait for the device, which the first step, not recorded, is made to raise.

Source: CUDA graphs, ``torch.cuda.graph``; fixed keys and values, transformers' ``StaticCache``.
"""

import logging
import warnings
from collections.abc import Callable
from functools import cache, partial

import torch
from torch import nn
from transformers.cache_utils import (
    Cache,
    CacheLayerMixin,
    DynamicCache,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    StaticLayer,
)

from qlora_lite.errors import first_line
from qlora_lite.models.anatomy import device_of, text_config
from qlora_lite.models.load import uses_row_attention
from qlora_lite.models.memory_options import stream_of

log = logging.getLogger(__name__)
CHUNK_TOKENS = 512  # that room is made for at a time
_FEW_STEPS = 8  # are not worth recording one, which takes as long as some that are not recorded
_MASK_MULTIPLE = 16  # entries, of a mask's rows in memory: a GPU's kernel copies others


def decoding(model: nn.Module, tokens: int, streamer=None) -> Callable | None:
    """Return what ``generate`` takes as ``custom_generate``; None where transformers' own loop is to run.

    Args:
        tokens: of the padded prompts with their answers, at most.
    """
    on_gpu = device_of(model).type == "cuda"
    return partial(decode, streamer=streamer) if on_gpu and has_fixed_step(model, tokens) else None


def has_fixed_step(model: nn.Module, tokens: int) -> bool:
    """Return whether a step of the model is the same operations on the same memory for each of so many tokens."""
    layers, device = DynamicCache(config=text_config(model)).layers, device_of(model)
    is_here = all(tensor.device == device for tensor in (*model.parameters(), *model.buffers()))
    is_here = is_here and stream_of(model) is None
    return is_here and uses_row_attention(model) and all(_keeps_all(layer, tokens) for layer in layers)


def _keeps_all(layer: CacheLayerMixin, tokens: int) -> bool:
    if type(layer) is DynamicSlidingWindowLayer:
        return tokens <= layer.sliding_window
    return type(layer) is DynamicLayer


def decode(
    model: nn.Module,
    input_ids: torch.Tensor,
    logits_processor,
    stopping_criteria,
    generation_config,
    streamer=None,
    **inputs,
) -> torch.Tensor:
    """Take the place of the loop in transformers' ``generate``, greedy but for what the processors leave.

    Returns:
        int64 [prompts, tokens], the padded prompts with their answers.
    """
    if streamer is not None:
        streamer.put(input_ids.cpu())
    given = model.prepare_inputs_for_generation(input_ids, is_first_iteration=True, **inputs)
    logits = model(**given, return_dict=True).logits[:, -1]
    steps = FixedSteps(model, given, inputs.get("attention_mask"), generation_config.max_length - 1)
    unfinished = torch.ones(len(input_ids), dtype=torch.bool, device=input_ids.device)
    while True:
        scores = logits_processor(input_ids, logits.to(torch.float32, copy=True))
        token = scores.argmax(-1).masked_fill_(~unfinished, generation_config.pad_token_id)
        input_ids = torch.cat([input_ids, token[:, None]], dim=1)
        if streamer is not None:
            streamer.put(token.cpu())
        unfinished &= ~stopping_criteria(input_ids, None)
        if not unfinished.any():
            break
        logits = steps(token)
    if streamer is not None:
        streamer.end()
    return input_ids


class FixedSteps:
    """The steps behind a prompt; ``steps(token)`` takes a token of each prompt and returns the logits of the next.

    Args:
        given: inputs of the model that read the prompt, its cache among them, which is changed.
        prompt_mask: [prompts, tokens], 0 for padding; None where nothing is padded.
        most: tokens that are ever kept.
    """

    def __init__(self, model: nn.Module, given: dict, prompt_mask: torch.Tensor | None, most: int):
        ids, dtype = given["input_ids"], model.dtype
        self._model, self._most = model, most
        self._cache = next(value for value in given.values() if isinstance(value, Cache))
        self._length = self._room = ids.shape[1]  # tokens that are kept, and that there is room for
        self._at = torch.full((1,), self._length, device=ids.device)
        self._mask = torch.zeros(len(ids), 1, 1, self._room, dtype=dtype, device=ids.device)
        if prompt_mask is not None:
            self._mask.masked_fill_(prompt_mask[:, None, None] == 0, -torch.inf)
        self._inputs = given | {"input_ids": torch.empty_like(ids[:, :1])}
        if "position_ids" in given:
            self._inputs["position_ids"] = given["position_ids"][..., -1:] + 1
        self._graph: torch.cuda.CUDAGraph | None = None
        self._logits: torch.Tensor | None = None  # that the graph writes

    def __call__(self, token: torch.Tensor) -> torch.Tensor:
        """Return the logits [prompts, vocabulary] behind a token of each prompt [prompts].

        They may lie where those of the next step will.
        """
        self._inputs["input_ids"].copy_(token[:, None])
        self._length += 1
        if self._length > self._room:
            self._make_room()
            if token.is_cuda and self._room - self._length >= _FEW_STEPS:
                return self._recorded()
        if self._graph is None:
            return self.step()
        self._graph.replay()
        return self._logits

    def step(self) -> torch.Tensor:
        """Read the token, its place and all that was kept; keep the token's keys and values, and move on a place."""
        self._mask.index_fill_(3, self._at, 0.0)
        logits = self._model(**self._inputs, return_dict=True).logits[:, -1]
        self._at.add_(1)
        if "position_ids" in self._inputs:
            self._inputs["position_ids"].add_(1)
        return logits

    def _make_room(self) -> None:
        self._graph = self._logits = None  # before other memory is taken
        kept, self._room = self._room, min(self._most, self._room + CHUNK_TOKENS)
        row = -(-self._room // _MASK_MULTIPLE) * _MASK_MULTIPLE
        mask = self._mask.new_full((len(self._mask), 1, 1, row), -torch.inf)[..., : self._room]
        mask[..., :kept] = self._mask
        self._mask = self._inputs["attention_mask"] = mask
        for number, layer in enumerate(self._cache.layers):
            if layer.is_initialized:  # others use the keys and values of one before
                self._cache.layers[number] = _FixedLayer(layer, self._room, self._at)

    def _recorded(self) -> torch.Tensor:
        """Step, and record the step for those that follow, where that is possible."""
        before, logits = torch.cuda.get_sync_debug_mode(), None
        graph = torch.cuda.CUDAGraph()
        try:
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")  # torch's, that the mode is a prototype
                    torch.cuda.set_sync_debug_mode("error")
                logits = self.step()
            finally:
                torch.cuda.set_sync_debug_mode(before)
            # the outer one gives the stream back where recording could not begin
            with (
                torch.cuda.stream(torch.cuda.current_stream()),
                torch.cuda.graph(graph, capture_error_mode="thread_local"),
            ):
                recorded = self.step()
            self._graph, self._logits = graph, recorded
        except RuntimeError as error:  # where memory ran out, there may be enough for the step alone
            _warn(first_line(error))
        return self.step() if logits is None else logits


@cache
def _warn(reason: str) -> None:
    """Log it once, not for every batch."""
    log.warning("tokens are generated without a CUDA graph, which is slower (%s)", reason)


class _FixedLayer(StaticLayer):
    """Keys and values of a block with room for more; a token's are written where ``at`` [1] says, for all blocks."""

    def __init__(self, layer: CacheLayerMixin, room: int, at: torch.Tensor):
        super().__init__(room)
        self._at, self.is_initialized = at, True
        self.keys, self.values = (_with_room(tensor, room) for tensor in (layer.keys, layer.values))

    def update(self, key_states, value_states, *_arguments, **_options):
        """Keep a token's keys and values; return all there is room for."""
        self.keys.index_copy_(2, self._at, key_states)
        self.values.index_copy_(2, self._at, value_states)
        return self.keys, self.values

    def get_seq_length(self) -> torch.Tensor:
        """Return the tokens that are kept."""
        return self._at


def _with_room(tensor: torch.Tensor, room: int) -> torch.Tensor:
    larger = tensor.new_zeros(*tensor.shape[:2], room, tensor.shape[3])
    larger[:, :, : tensor.shape[2]] = tensor
    return larger
