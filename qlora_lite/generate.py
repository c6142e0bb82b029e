"""Answer prompts with a model, greedily by default, many at a time.

Generation is transformers' own (cache, stopping, sampling); this module pads on the left, stops at the end
tokens that training taught, and cuts the prompt off.
"""

import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import nn
from transformers import GenerationConfig

from .errors import DoesNotFitError
from .lora.shared import forget_begun
from .models.anatomy import device_of
from .train.out_of_memory import free_cached_memory, is_out_of_memory

log = logging.getLogger(__name__)
COLDEST = 1e-6  # below, drawing is taking the most probable token, and logits over the temperature are infinite


@dataclass(frozen=True, slots=True)
class Sampling:
    """How tokens are drawn: ``temperature`` 0, or below ``COLDEST``, takes the most probable one.

    This is all there is: the penalties and limits that a model's own ``generation_config.json`` may ask for are not
    applied, so that answers tell what the weights say.
    """

    temperature: float = 0.0
    top_p: float = 1.0


def stop_ids(model: nn.Module, tokenizer, end_token_ids: Iterable[int] = ()) -> list[int]:
    """Return the tokens that end an answer: the tokenizer's, the model's, and those that training taught."""
    stated = model.generation_config.eos_token_id
    stated = stated if isinstance(stated, list) else [stated]
    return sorted({token for token in (tokenizer.eos_token_id, *stated, *end_token_ids) if token is not None})


@torch.no_grad()
def answer(
    model: nn.Module, tokenizer, prompts: Sequence[str], max_new_tokens: int, stop: Sequence[int] = (),
    batch_size: int = 32, sampling: Sampling | None = None, streamer=None,
    before_batch: Callable[[list[int]], None] | None = None, stopping=None, cut: set[int] | None = None,
) -> list[str]:  # fmt: skip
    """Continue each rendered prompt and return the new text, without special tokens.

    Args:
        prompts: rendered text, begin-of-text included where the model wants it.
        max_new_tokens: at most this many tokens per answer.
        stop: from ``stop_ids``.
        batch_size: prompts that run together, alike in length; half as many once memory runs out.
        streamer: a transformers streamer; only with one prompt.
        before_batch: called with the indices of the prompts that run together next, in the order of the rows.
        stopping: a transformers ``StoppingCriteriaList``, asked after every token.
        cut: gets the indices of the prompts whose answers ``max_new_tokens`` ended.

    Raises:
        DoesNotFitError: memory ran out over a single prompt.
    """
    tokens = [tokenizer(prompt, add_special_tokens=False).input_ids for prompt in prompts]
    order = sorted(range(len(prompts)), key=lambda i: len(tokens[i]))
    config = _generation_config(sampling or Sampling(), max_new_tokens, list(stop))
    answers = [""] * len(prompts)
    was_training, device = model.training, device_of(model)
    model.eval()
    # transformers takes from it what a call's own config leaves open
    stated, model.generation_config = model.generation_config, GenerationConfig()
    head = model.get_output_embeddings().register_forward_pre_hook(_contiguous_input)
    try:
        while order:
            rows = order[:batch_size]
            ids, mask = _pad_left([tokens[i] for i in rows], config.pad_token_id)
            ids, mask = ids.to(device), mask.to(device)
            if before_batch:
                before_batch(rows)
            try:
                out = model.generate(
                    input_ids=ids, attention_mask=mask, generation_config=config, streamer=streamer,
                    stopping_criteria=stopping,
                )  # fmt: skip
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
            else:
                order = order[batch_size:]
                new = out[:, ids.shape[1] :]
                texts = tokenizer.batch_decode(new, skip_special_tokens=True)
                if cut is not None and new.shape[1] == max_new_tokens:
                    has_ended = torch.isin(new, new.new_tensor(list(stop))).any(1)
                    cut.update(row for row, ended in zip(rows, has_ended.tolist(), strict=True) if not ended)
                for row, text in zip(rows, texts, strict=True):
                    answers[row] = text
                continue
            forget_begun(model)  # here, where the error is gone, whose trace held the tensors of the attempt
            free_cached_memory(device)
            if len(rows) == 1:
                length = ids.shape[1]
                raise DoesNotFitError(
                    f"memory ran out over a prompt of {length} tokens and its answer of at most {max_new_tokens}: "
                    "shorten it, free memory, or have room made for it on a card (generate, chat and serve with "
                    f"--context-tokens {length + max_new_tokens})"
                )
            batch_size = len(rows) // 2
            log.warning("memory ran out; from now on %d prompts are answered at once", batch_size)
    finally:
        head.remove()
        model.generation_config = stated
    model.train(was_training)
    return answers


def _contiguous_input(_head, inputs):
    """Hand the head a contiguous input.

    Of the prompt, transformers passes only the last position: a strided view, for which torch 2.13's matmul
    copies the head's weight once per prompt (0.9 GiB for 16 prompts of SmolLM2).
    """
    return tuple(tensor.contiguous() for tensor in inputs)


def _generation_config(sampling: Sampling, max_new_tokens: int, stop: list[int]) -> GenerationConfig:
    draw = {"do_sample": False}
    if sampling.temperature >= COLDEST:
        draw = {"do_sample": True, "temperature": sampling.temperature, "top_p": sampling.top_p, "top_k": 0}
    pad = stop[0] if stop else 0  # masked out on the left, cut off on the right
    return GenerationConfig(
        max_new_tokens=max_new_tokens, eos_token_id=stop or None, pad_token_id=pad, use_cache=True, **draw
    )


def _pad_left(rows: list[list[int]], pad: int) -> tuple[torch.Tensor, torch.Tensor]:
    width = max(len(row) for row in rows)
    ids = torch.tensor([[pad] * (width - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
    return ids, mask
