"""Answer prompts with a model, greedily by default, many at a time.

Generation is transformers' own (cache, stopping), on a GPU with another loop in it (``decode``); this module pads on
the left, stops at the end tokens that training taught, and cuts the prompt off. It also draws the tokens: transformers'
sampling takes the random numbers of a whole batch from one generator, so that an answer depends on the prompts beside
it. Here each prompt has random numbers of its own, one for each token, which picks the token by inverting the
cumulative distribution.
"""

import logging
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from torch import nn
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from qlora_lite.adapters.lora.shared import forget_begun
from qlora_lite.adapters.prompt import count_virtual
from qlora_lite.data.chat.template import Template
from qlora_lite.data.picture_grids import grids_of
from qlora_lite.data.picture_reader import PictureReader
from qlora_lite.data.tokens.mask import Row, with_pictures
from qlora_lite.data.tokens.storage import virtual_ids
from qlora_lite.errors import DataError, DoesNotFitError, ModelError, tokenizer_faults
from qlora_lite.memory.meter import use_device
from qlora_lite.models.anatomy import device_of
from qlora_lite.models.vision_language import arguments_of, sees_whole
from qlora_lite.train.out_of_memory import free_cached_memory, is_out_of_memory
from qlora_lite.train.text_guards import own_attention

from .decode import decoding

log = logging.getLogger(__name__)
COLDEST = 1e-6  # below, drawing is taking the most probable token, and logits over the temperature are infinite


@dataclass(frozen=True, slots=True)
class Sampling:
    """How tokens are drawn: ``temperature`` 0, or below ``COLDEST``, takes the most probable one.

    This is all there is: the penalties and limits that a model's own ``generation_config.json`` may ask for are not
    applied, so that answers tell what the weights say.

    Args:
        top_p: the smallest set of most probable tokens whose probabilities sum to this is sampled from; 1 is all.
        top_k: only so many of the most probable tokens are sampled from; 0 is all.
        seed: with the number of a prompt, decides what is drawn for it, whatever else is in its batch; None draws from
            torch's global generator.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int | None = None


class Shown(NamedTuple):
    """A rendered prompt in which pictures are written out as the tokens that stand for them, what returns their pixels,
    float32 [N, ...], and the grids of those that keep their shapes."""

    text: str
    pixels: Callable[[], np.ndarray]
    grids: tuple[tuple[int, int], ...] = ()


def shown_prompt(text: str, pictures: Sequence[str], template: Template, reader: PictureReader | None) -> str | Shown:
    """Return a rendered prompt with its pictures, if it has some.

    Args:
        pictures: their files.
        reader: reads them.

    Raises:
        DataError: a picture cannot be read, a text holds what stands for one, or the template left one out.
    """
    if reader is None:
        return text
    if text.count(template.picture) > len(pictures):
        raise DataError(
            f"a text holds the character U+FFFC or {template.picture}, which stands for a picture; remove it"
        )
    if not pictures:
        return text
    (shown,) = reader.looked_at([pictures])
    if isinstance(shown, DataError):
        raise shown
    row = with_pictures(Row(text, (), (), ""), template.picture, shown)
    return Shown(row.text, partial(reader.of_files, row.pictures), grids_of(row.pictures))


def text_of_prompt(prompt: str | Shown) -> str:
    """Return the text of a rendered prompt."""
    return prompt.text if isinstance(prompt, Shown) else prompt


class Answer(NamedTuple):
    """An answer's text without special tokens, why it ended (stop or length), and its tokens with the end token."""

    text: str
    finish: str
    token_ids: tuple[int, ...]

    @property
    def tokens(self) -> int:
        """How many there are."""
        return len(self.token_ids)


def stop_ids(model: nn.Module, tokenizer, end_token_ids: Iterable[int] = ()) -> list[int]:
    """Return the tokens that end an answer: the tokenizer's, the model's, and those that training taught."""
    stated = model.generation_config.eos_token_id
    stated = stated if isinstance(stated, list) else [stated]
    return sorted({token for token in (tokenizer.eos_token_id, *stated, *end_token_ids) if token is not None})


def answer(*arguments, **options) -> list[str]:
    """Return the texts of ``answers``, which takes the same arguments."""
    return [each.text for each in answers(*arguments, **options)]


@torch.no_grad()
def answers(
    model: nn.Module,
    tokenizer,
    prompts: Sequence[str | list[int] | Shown],
    max_new_tokens: int,
    stop: Sequence[int] = (),
    batch_size: int = 32,
    sampling: Sampling | None = None,
    streamer=None,
    before_batch: Callable[[list[int]], None] | None = None,
    stopping=None,
    first: int = 0,
    done: Callable[[int], None] | None = None,
    numbers: Sequence[int] | None = None,
) -> list[Answer]:
    """Continue each rendered prompt.

    Args:
        prompts: rendered text, begin-of-text included where the model wants it, or its tokens; those with pictures run
            one by one.
        max_new_tokens: at most this many tokens per answer.
        stop: from ``stop_ids``.
        batch_size: prompts that run together, alike in length; half as many once memory runs out.
        streamer: a transformers streamer; only with one prompt.
        before_batch: called with the indices of the prompts that run together next, in the order of the rows.
        stopping: a transformers ``StoppingCriteriaList``, asked after every token.
        first: number of the first prompt, for ``Sampling.seed``.
        done: called after each batch with the number of prompts answered so far.
        numbers: of the prompts, where they are not counted from ``first`` on.

    Raises:
        DoesNotFitError: memory ran out over a single prompt.
        ModelError: logits are NaN or infinite, so that no token can be chosen; or the tokenizer fails.
    """
    before = virtual_ids(count_virtual(model))
    shown = {number: prompt for number, prompt in enumerate(prompts) if isinstance(prompt, Shown)}
    prompts = [prompt.text if isinstance(prompt, Shown) else prompt for prompt in prompts]
    with tokenizer_faults():
        tokens = [
            tokenizer(prompt, add_special_tokens=False).input_ids if isinstance(prompt, str) else prompt
            for prompt in prompts
        ]
    tokens = [before + ids for ids in tokens]
    order = sorted(range(len(prompts)), key=lambda i: len(tokens[i]))
    numbers = range(first, first + len(prompts)) if numbers is None else numbers
    config = _generation_config(max_new_tokens, list(stop))
    found: list[Answer | None] = [None] * len(prompts)
    was_training, device = model.training, device_of(model)
    use_device(device)
    model.eval()
    # transformers takes from it what a call's own config leaves open
    stated, model.generation_config = model.generation_config, GenerationConfig()
    head = model.get_output_embeddings().register_forward_pre_hook(_contiguous_input)
    try:
        while order:
            rows = order[: 1 if shown else batch_size]
            ids, mask = _pad_left([tokens[i] for i in rows], config.pad_token_id)
            ids, mask = ids.to(device), mask.to(device)
            if before_batch:
                before_batch(rows)
            try:
                given = _arguments(model, shown.get(rows[0]), ids)
                own = None if given else decoding(model, ids.shape[1] + max_new_tokens, streamer)
                # by a mask, transformers' own attention is told what a picture's tokens see
                with own_attention(model) if given and sees_whole(model) else nullcontext():
                    out = model.generate(
                        input_ids=ids,
                        attention_mask=mask,
                        generation_config=config,
                        stopping_criteria=stopping,
                        streamer=None if own else streamer,
                        custom_generate=own,
                        **given,
                        logits_processor=_choosing(sampling, ids, max_new_tokens, [numbers[row] for row in rows], stop),
                    )
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
            else:
                order = order[len(rows) :]
                for row, new in zip(rows, out[:, ids.shape[1] :].tolist(), strict=True):
                    found[row] = _read(new, stop, tokenizer)
                if done:
                    done(len(prompts) - len(order))
                continue
            forget_begun(model)  # here, where the error is gone, whose trace held the tensors of the attempt
            free_cached_memory(device)
            if len(rows) == 1:
                length = ids.shape[1]
                raise DoesNotFitError(
                    f"memory ran out over a prompt of {length} tokens and its answer of at most {max_new_tokens}: "
                    "shorten it, free memory, or reserve room for it on a GPU (generate, chat and serve with "
                    f"--context-tokens {length + max_new_tokens})"
                )
            batch_size = len(rows) // 2
            log.warning("memory ran out; from now on %d prompts are answered at a time", batch_size)
    finally:
        head.remove()
        model.generation_config = stated
        model.train(was_training)
    return found


def _arguments(model: nn.Module, prompt: Shown | None, ids: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return what transformers is given of a prompt's pictures."""
    return {} if prompt is None else arguments_of(model, torch.from_numpy(prompt.pixels()), ids, prompt.grids)


def _read(new: list[int], stop: Sequence[int], tokenizer) -> Answer:
    """Cut off what follows the end token, which pads a batch, and decode."""
    end = next((index for index, token in enumerate(new, 1) if token in stop), None)
    with tokenizer_faults():
        text = tokenizer.decode(new[:end], skip_special_tokens=True)
    return Answer(text, "length" if end is None else "stop", tuple(new[:end]))


def _contiguous_input(_head, inputs):
    """Hand the head a contiguous input.

    Of the prompt, transformers passes only the last position: a strided view, for which torch 2.13's matmul
    copies the head's weight once per prompt (0.9 GiB for 16 prompts of SmolLM2).
    """
    return tuple(tensor.contiguous() for tensor in inputs)


def _generation_config(max_new_tokens: int, stop: list[int]) -> GenerationConfig:
    pad = stop[0] if stop else 0  # masked out on the left, cut off on the right
    return GenerationConfig(
        max_new_tokens=max_new_tokens, eos_token_id=stop or None, pad_token_id=pad, use_cache=True, do_sample=False
    )


def _choosing(
    sampling: Sampling | None, ids: torch.Tensor, max_new_tokens: int, numbers: list[int], stop: Sequence[int]
) -> LogitsProcessorList:
    """Return what looks at the logits of a batch, and draws its tokens where they are not the most probable ones.

    Args:
        ids: int64 [rows, T], the padded prompts.
        numbers: of the prompts.
        stop: tokens that end an answer.
    """
    finite = _RequireFinite(numbers, ids.shape[1], ids.new_tensor(stop))
    if sampling is None or sampling.temperature < COLDEST:
        return LogitsProcessorList([finite])
    if sampling.seed is None:
        random = torch.rand(len(ids), max_new_tokens, dtype=torch.float64)
    else:
        drawn = [np.random.default_rng([sampling.seed, number]).random(max_new_tokens) for number in numbers]
        random = torch.from_numpy(np.stack(drawn))
    warpers = [TemperatureLogitsWarper(sampling.temperature)]
    warpers += [TopKLogitsWarper(sampling.top_k)] if sampling.top_k else []
    warpers += [TopPLogitsWarper(sampling.top_p)] if sampling.top_p < 1 else []
    return LogitsProcessorList([finite, *warpers, _Draw(random.to(ids.device), ids.shape[1])])


class _RequireFinite(LogitsProcessor):
    """Refuse logits that no token can be chosen by: NaN has no order, and infinity has no probability.

    Args:
        numbers: of the prompts, one for each row.
        width: tokens of the padded prompts.
        stop: int64 [tokens], those that end an answer: what a row's logits are behind one is of no account.
    """

    def __init__(self, numbers: list[int], width: int, stop: torch.Tensor):
        self.numbers, self.width, self.stop = numbers, width, stop

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        finite = scores.amax(-1).isfinite()  # -inf beside others is a token that cannot be
        if not finite.all():
            new = input_ids[:, self.width :]
            broken = (~finite & ~torch.isin(new, self.stop).any(-1)).nonzero().flatten().tolist()
            if broken:
                raise ModelError(
                    f"token {new.shape[1] + 1} of the answer to prompt {self.numbers[broken[0]] + 1} cannot be chosen: "
                    "the model's logits are NaN or infinite; compute in another type (model.compute_dtype float32), "
                    "or check whether the adapter's training went wrong"
                )
        return scores


class _Draw(LogitsProcessor):
    """Leave each row the one token that its random number of this step picks.

    Args:
        random: float64 [rows, steps], in [0, 1).
        width: tokens of the padded prompts.
    """

    def __init__(self, random: torch.Tensor, width: int):
        self.random, self.width = random, width

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        step = input_ids.shape[1] - self.width
        cumulative = scores.softmax(-1, dtype=torch.float32).cumsum(-1, dtype=torch.float64)
        drawn = self.random[:, step, None] * cumulative[:, -1:]
        token = torch.searchsorted(cumulative, drawn, right=True).clamp_(max=scores.shape[1] - 1)
        return torch.full_like(scores, -torch.inf).scatter_(1, token, 0.0)


def _pad_left(rows: list[list[int]], pad: int) -> tuple[torch.Tensor, torch.Tensor]:
    width = max(len(row) for row in rows)
    ids = torch.tensor([[pad] * (width - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
    return ids, mask
