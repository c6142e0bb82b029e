"""Checks that stop a run of a causal language model which would end well and mean nothing.

Before training: a few short rows packed together, and the chunked head, must give the logits that the model itself
gives for each row by itself; the model has an embedding for every token; the settings can be combined for this model.
"""

import logging
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import MODEL_FOR_MASKED_LM_MAPPING

from qlora_lite.compilers import missing_for_compile
from qlora_lite.constraints import STREAMED_TRAINED, UPDATES_IN_FLOAT16, WITH_COMPILE, WITH_UPDATES_IN_BACKWARD
from qlora_lite.data.tokens.batch import IGNORED_LABEL, Batch
from qlora_lite.data.tokens.storage import Example, largest_token
from qlora_lite.errors import DataError, ModelError, TrainingError
from qlora_lite.experts.packing import adapts_experts, packs_experts
from qlora_lite.kernels.loss import Head, head_logits
from qlora_lite.models.anatomy import blocks, device_of, head, position_limit, text_config, vocabulary_size
from qlora_lite.models.load import use_row_attention, uses_row_attention
from qlora_lite.models.memory_options import MemoryOptions, trained_on_host
from qlora_lite.models.packing import run_unpacked, runs_unpacked, use_own_attention, why_unpacked

from .divided_weights import parts_of
from .forward import hidden_states, prepare
from .guards import FLOAT16_ENDS
from .settings import TrainSettings

log = logging.getLogger("qlora_lite")
BAD_FILES = "the model's files are damaged, or it was trained or merged badly: take another copy of it"

# Relative L2 error of logits, above which more than rounding may be at work. Rounding mostly gives a few steps of the
# type (1.2e-7 in float32, 0.8 % in bf16); a head scaled 1.1 times gives 10 %, and rows that see each other far more.
LOGITS_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 0.05, torch.float16: 0.05}
# But rounding alone gives more in bf16 for some tokens (9 % of SmolLM2's; tests/models/test_demo_models.py), and
# wherever it chooses other experts (14 % and more of a small gpt-oss). How much it gives shows in the median token when
# each block's output is rounded once more: exact rows differ about as much or less, rows that see each other several
# times as much.
MOST_ROUNDINGS = 4


def check_forward(
    model: nn.Module, longest: int = 0, error_of: Callable[[nn.Module], float] | None = None, must_pack: bool = False
) -> float:
    """Compare packed rows and the chunked head with the model's own logits, row by row with its own attention.

    A model in which packed rows see each other is switched to running them one by one, which is exact, with one
    logged line because packing then saves no time: where the model says so (``models.packing``), or the comparison
    shows it (distances counted over the whole sequence: Bloom, MPT). Where ours leaves something out, it goes back to
    the attention that transformers has for it.

    Args:
        longest: tokens of the longest row that there may be; the comparison is of short ones.
        error_of: returns the relative L2 error; None is of a language model's logits.
        must_pack: refuse a model whose rows have to run one by one.

    Returns:
        The relative L2 error.

    Raises:
        ModelError: the difference is more than rounding, or weights are not finite or too large to compute with.
    """
    compare = error_of or logits_error
    _check_embeddings_finite(model)
    if not runs_unpacked(model) and (why := why_unpacked(model, longest)):
        if must_pack:
            raise ModelError(
                f"{type(model).__name__} cannot be trained on pictures in chats: each row would have to "
                f"run by itself, since {why}; choose another model"
            )
        run_unpacked(model)
        log.warning("%s: each row is run by itself, since %s", type(model).__name__, why)
    tolerance = LOGITS_TOLERANCE[model.dtype]
    error = compare(model)
    together = error
    changes = (
        (run_unpacked, "packed sequences see each other"),
        (use_own_attention, "attention over rows leaves something out, and transformers' own takes its place"),
    )
    for change, why in () if must_pack else changes:
        if not error <= tolerance:
            change(model)
            error = compare(model)
            if error <= tolerance:
                log.warning(
                    "%s: %s (relative error %.1e), so each row is run by itself: exact, but packing saves no time",
                    type(model).__name__,
                    why,
                    together,
                )
    if not error <= tolerance:
        raise ModelError(
            f"{type(model).__name__}: rows trained here give other logits than the model itself gives "
            f"(relative error {error:.1e}). Its attention or its head does something this package does "
            "not know; it cannot be trained exactly"
        )
    return error


def check_shared_keys(model: nn.Module) -> None:
    """Check that no block reads keys and values of another one, as those of Gemma 3n and the small Gemma 4 do.

    A checkpointed block is recomputed by itself: what it read from another would have no gradient, and logits, which
    ``check_forward`` compares, would not show it.

    Raises:
        ModelError: the configuration says that blocks share them.
    """
    if shared := getattr(text_config(model), "num_kv_shared_layers", 0):
        raise ModelError(
            f"{type(model).__name__} cannot be trained exactly: its last {shared} blocks read the keys and values of "
            "earlier ones (num_kv_shared_layers), whose gradients are lost where blocks are recomputed one by one; "
            "choose a model without that, such as google/gemma-4-12B-it"
        )


def check_causal(model: nn.Module) -> None:
    """Check that a model is not an encoder, whose tokens see those that they would have to predict.

    Raises:
        ModelError: it is one.
    """
    config = model.config
    is_encoder = type(config) in MODEL_FOR_MASKED_LM_MAPPING and not getattr(config, "is_decoder", False)
    is_encoder |= getattr(text_config(model), "use_bidirectional_attention", None) is True  # EmbeddingGemma
    if is_encoder and not config.problem_type:
        raise ModelError(
            f"a {config.model_type} model reads texts in both directions and cannot write them: set "
            "task.kind to classification or regression, or choose a decoder"
        )


@torch.no_grad()
def logits_error(model: nn.Module, seed: int = 0, own: Head | None = None) -> float:
    """Return the relative L2 error of the logits of packed rows of random tokens; see ``relative_error``.

    Args:
        own: the model's head, of one that has its weights only while it runs.
    """
    generator = torch.Generator().manual_seed(seed)
    vocabulary = model.get_input_embeddings().weight.shape[0]
    lengths = (7, 12, 5)
    rows = [torch.randint(0, vocabulary, (1, length), generator=generator) for length in lengths]
    positions = [torch.arange(length)[None] for length in lengths]
    ids, position_ids = torch.cat(rows, dim=1), torch.cat(positions, dim=1)
    batch = Batch(ids, position_ids, torch.full((ids.shape[1],), IGNORED_LABEL), lengths, ("",) * len(lengths))
    was_training, its_head = model.training, own or head(model)
    device = its_head.weight.device if own else device_of(model)
    model.eval()
    packed = head_logits(hidden_states(model, prepare(batch, device)), its_head)

    def alone() -> torch.Tensor:
        return torch.cat([model(input_ids=row.to(device), use_cache=False).logits[0] for row in rows])

    error = relative_error(packed, alone, model)
    model.train(was_training)
    return error


def relative_error(packed: torch.Tensor, alone: Callable[[], torch.Tensor], model: nn.Module) -> float:
    """Return the relative L2 error of outputs [N, C] as against those that ``alone`` returns, with the model's own
    attention; at most ``LOGITS_TOLERANCE`` where it is no more than the rounding of 16 bits.

    Raises:
        ModelError: its own are not finite.
    """
    with own_attention(model):
        expected = alone().float()
    size = expected.norm()
    if not math.isfinite(size.item()):
        raise ModelError(f"{type(model).__name__}: its own logits are not finite: {_bad_weight(model)}; {_cure(model)}")
    error = ((packed - expected).norm() / size).item()
    tolerance = LOGITS_TOLERANCE[model.dtype]
    if error <= tolerance or model.dtype == torch.float32 or not uses_row_attention(model):
        return error
    with own_attention(model), _rounded_again(model):
        rounded = alone().float()
    median, rounding = ((each - expected).norm(dim=-1).median().item() for each in (packed, rounded))
    return tolerance if median <= MOST_ROUNDINGS * rounding else error


def check_weights(model: nn.Module) -> None:
    """Check that no weight holds NaN or infinity, where there are no logits to find that out by.

    Raises:
        ModelError: one does.
    """
    for name, each in model.state_dict().items():
        if each.is_floating_point() and not each.is_meta and not math.isfinite(_largest(each)):
            raise ModelError(f"{name} holds NaN or infinity; {BAD_FILES}")


def _bad_weight(model: nn.Module) -> str:
    """Name a weight that is not finite, or else the one with the largest number."""
    there = {name: each for name, each in model.state_dict().items() if each.is_floating_point() and not each.is_meta}
    if not (sizes := {name: _largest(each) for name, each in there.items()}):
        return "weights are too large"
    name = next((name for name, size in sizes.items() if not math.isfinite(size)), None)
    if name:
        return f"{name} holds NaN or infinity"
    name = max(sizes, key=lambda name: sizes[name])
    return f"weights are too large, most of all {name} with {sizes[name]:.1e}"


def _cure(model: nn.Module) -> str:
    return FLOAT16_ENDS if model.dtype == torch.float16 else BAD_FILES


def _largest(tensor: torch.Tensor) -> float:
    """Return the largest magnitude in a tensor, NaN if it holds one, without a copy of it."""
    return torch.linalg.vector_norm(tensor.detach(), math.inf).item() if tensor.numel() else 0.0


def _check_embeddings_finite(model: nn.Module) -> None:
    """Check that no token's embedding is NaN or infinite, also of tokens that no row has; linear weights are checked
    when they are quantised.

    Raises:
        ModelError: naming the first token.
    """
    weight = model.get_input_embeddings().weight.detach()
    if weight.is_meta or math.isfinite(_largest(weight)):  # of a model that is read while it runs
        return
    token = next(token for token, row in enumerate(weight) if not row.isfinite().all())
    raise ModelError(f"{type(model).__name__}: the embedding of token {token} is not finite; {_cure(model)}")


@contextmanager
def _rounded_again(model: nn.Module) -> Iterator[None]:
    """Have each block's output differ by about what one more rounding to the model's type may change."""
    generator, unit = torch.Generator().manual_seed(0), torch.finfo(model.dtype).eps / 2

    def change(_block: nn.Module, _inputs: object, output: Any) -> Any:
        hidden, *others = output if isinstance(output, tuple) else (output,)
        noise = torch.randn(hidden.shape, generator=generator).to(hidden.device)
        hidden = (hidden.float() * (1 + unit * noise)).to(hidden.dtype)
        return (hidden, *others) if isinstance(output, tuple) else hidden

    handles = [block.register_forward_hook(change) for block in blocks(model)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def own_attention(model: nn.Module) -> Iterator[None]:
    """Attend as transformers writes it out for this model, and not row by row.

    In float16 it is fused where that computes all that the model has, not caps: scores that are written out are not
    scaled yet, and those of Qwen2 exceed float16.
    """
    if not uses_row_attention(model):
        yield
        return
    capped = getattr(text_config(model), "attn_logit_softcapping", None)
    fused = model.dtype == torch.float16 and model._supports_sdpa and not capped
    model.set_attn_implementation("sdpa" if fused else "eager")
    try:
        yield
    finally:
        use_row_attention(model)


def can_reach_every_layer(rows: Iterable[Example]) -> bool:
    """Return whether a step of these rows can give every wrapped layer a gradient.

    The first target token that can has two before it: where a token sees only itself, queries and keys change nothing.
    """
    return any(row.is_target[2:].any() for row in rows)


def check_updates_in_backward(model: nn.Module, settings: TrainSettings) -> None:
    """Check that one backward pass is a whole step, where it updates the factors.

    Raises:
        TrainingError: naming what would need the gradients of a whole step, or several passes.
    """
    if not settings.options.optimizer_in_backward:
        if trained_on_host(model):
            cure = "set memory.optimizer_in_backward to true, or memory.resident_layers to all"
            raise TrainingError(f"{STREAMED_TRAINED}; {cure}")
        return
    given = {name: getattr(settings, name) for name in WITH_UPDATES_IN_BACKWARD}
    if given["gradient_accumulation_steps"] == parts_of(model).count:  # one micro-batch for each rank
        given["gradient_accumulation_steps"] = 1
    found = [
        f"train.{name} {given[name]} (set it to {only})"
        for name, only in WITH_UPDATES_IN_BACKWARD.items()
        if given[name] != only
    ]
    if model.dtype == torch.float16:
        found.append(f"a model in float16 ({UPDATES_IN_FLOAT16})")
    if found:
        raise TrainingError(f"memory.optimizer_in_backward is incompatible with: {'; '.join(found)}")


def check_compilable(model: nn.Module, options: MemoryOptions) -> None:
    """Check that the blocks can be compiled, where they are to be.

    Raises:
        TrainingError: naming what stands in the way.
    """
    if not options.compile:
        return
    hindrances = {
        "rows that run one by one": runs_unpacked(model),
        "attention other than this package's": not uses_row_attention(model),
        "memory.checkpointing selective": options.checkpointing == "selective",
        "dropout": any(map(_drops, model.modules())),
        "experts in 4 bit": packs_experts(model),
        "LoRA weights on experts": adapts_experts(model),
        **{f"memory.{name}": options.settings[name] != only for name, only in WITH_COMPILE.items()},
    }
    found = [reason for reason, applies in hindrances.items() if applies]
    if found:
        raise TrainingError(f"set train.compile to false: it is incompatible with {', '.join(found)}")
    if missing := missing_for_compile(device_of(model).type):
        raise TrainingError(f"train.compile needs {missing}: install it, or set train.compile to false")


def _drops(module: nn.Module) -> bool:
    """Return whether a module zeroes values at random, by a layer or by a rate that it hands to a function."""
    rates = [value for name, value in vars(module).items() if "drop" in name and isinstance(value, float)]
    return any(rates) or (isinstance(module, nn.Dropout) and module.p > 0)


def check_embeddings(
    model: nn.Module, examples: Sequence[Example], positions: Callable[[Sequence[Example]], Sequence[int]], cure: str
) -> None:
    """Check that the model has an embedding for every token of the rows, and for every position.

    Args:
        positions: returns how many each example takes; called where a model has a table of them.
        cure: what makes them fewer, of which {limit} is how many there are and {over} how many are too many.

    Raises:
        DataError: it lacks one, which a GPU would answer with an assertion of its own.
    """
    limit = position_limit(model)
    taken = [] if limit is None else list(positions(examples))
    if limit is not None and (longest := max(taken, default=0)) > limit:
        raise DataError(
            f"{examples[taken.index(longest)].where}: the row takes {longest} positions, and the model has embeddings "
            f"of {limit}; {cure.format(limit=limit, over=longest - limit)}"
        )
    words = vocabulary_size(model)
    if largest_token(examples) < words:
        return
    for example in examples:  # rows that a weight leaves out are among those looked at above, and none of these
        if (token := int(example.token_ids.max(initial=-1))) >= words:
            raise DataError(
                f"{example.where}: there is no embedding for token {token}, the model has {words}; use the tokenizer "
                "that came with the model, or a model that was given embeddings for the tokens added"
            )
