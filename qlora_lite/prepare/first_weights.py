"""Run a recipe's base model on some of its training rows for what LoRA weights begin as: ``lora.start: eva``, ``qera``.

The model is loaded as for answers, within the budget, before the run is planned: so the plan knows each layer's rank,
which eva finds. What is found is cached by the content of model, settings and those rows.
"""

import gc
import hashlib
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Generic, Protocol, TypeVar

import torch
from torch import nn

from qlora_lite.adapters.lora.eva import EVA, RATIO, Directions, kept_scale, share_out
from qlora_lite.adapters.lora.layer import lora_scale
from qlora_lite.adapters.lora.qera import QERA, RandomSums, correction
from qlora_lite.adapters.lora.start import FIRST_NAME, First, chosen_layers, load_first
from qlora_lite.adapters.parts import train_tokens
from qlora_lite.data.tokens.batch import plan_epoch
from qlora_lite.data.tokens.storage import Example, sequences_of
from qlora_lite.errors import ModelError
from qlora_lite.memory.meter import set_memory_limit
from qlora_lite.models.cache import cache_entry
from qlora_lite.models.load import refuse_stored, resolve_device, stored_quantization
from qlora_lite.models.locate import locate
from qlora_lite.models.packing import runs_unpacked
from qlora_lite.models.progress import Progress
from qlora_lite.models.split import read_first, save_first
from qlora_lite.models.weights import open_weights
from qlora_lite.quant.linear import QuantLinear, frozen_weight
from qlora_lite.quant.product import materialize
from qlora_lite.recipe import schema
from qlora_lite.recipe.schema import Recipe
from qlora_lite.train.causal_lm import TextBatches, causal_lm
from qlora_lite.train.forward import hidden_states
from qlora_lite.train.out_of_memory import explaining_memory, free_cached_memory

from .model import build_skeleton, build_to_use
from .start import lora_targets, trained_tokens
from .task import find_task
from .transformer import quantization

log = logging.getLogger("qlora_lite")
Ranks = Mapping[str, tuple[int, float]]  # rank and alpha by path
TOKENS = {EVA: 8192, QERA: 1024}  # that the model is run on, at least, where there are so many
FROM_ROWS = EVA, QERA  # starts that are found so


def finds_ranks(recipe: Recipe) -> bool:
    """Return whether the rank of each layer follows from rows."""
    return recipe.lora.start == EVA


def initial_weights(
    recipe: Recipe, examples: Sequence[Example], written: Sequence[Path] = (), ranks: Ranks | None = None
) -> tuple[First | None, Ranks | None]:
    """Return what LoRA weights begin as, and which rank each layer has, where rows decide that.

    Args:
        examples: the training rows.
        written: folders that may hold what a run found before; another version or machine may find others.
        ranks: of a run that resumes, whose checkpoint has the weights.
    """
    start = recipe.lora.start
    if start not in FROM_ROWS or ranks:
        return None, ranks
    known = [folder for folder in written if (folder / FIRST_NAME).is_file()]
    first = load_first(known[0]) if known else first_of(recipe, examples)
    return first, ranks_of(recipe, first) if start == EVA else None


def first_of(recipe: Recipe, examples: Sequence[Example]) -> First:
    """Return what the LoRA weights of a recipe's layers begin as, each of its own rank, from the cache if it is there.

    Args:
        examples: the training rows. Those of the first sequences of the first epoch are taken.

    Raises:
        ModelError: see ``chosen_layers``, ``share_out`` and ``refuse_stored``; or no row passes through a layer.
        DoesNotFitError: memory ran out.
    """
    m, d, device = recipe.model, recipe.data, resolve_device(recipe.model.device)
    own, start = _layers(recipe), recipe.lora.start
    batches = _batches(examples, TOKENS[start], d.max_tokens, d.order, recipe.train.seed)
    rows = hashlib.sha256(repr([each.token_ids.tolist() for batch in batches for each in batch]).encode())
    files = locate(m.path, m.revision)
    refuse_stored(QERA if start == QERA else None, stored_quantization(files.config))
    scales = {"scales": _scales(recipe, own)} if start == QERA else {}  # which the product of A and B is divided by
    entry = cache_entry(
        files,
        start=start,
        ranks={path: rank for path, (rank, _) in own.items()},
        keep_16bit=m.keep_16bit,
        quantization=quantization(recipe, files.config),
        dtype=str(find_task(recipe).compute_dtype(recipe, device)),
        lora_dtype=recipe.lora.dtype,
        rows=rows.hexdigest(),
        run="each sequence alone",
        **scales,
    )
    if (first := read_first(entry)) is not None:
        return first
    with explaining_memory("lower data.max_tokens, or set lora.start to kaiming"):
        first = (_corrections if start == QERA else _directions)(recipe, own, batches)
    gc.collect()  # the model
    free_cached_memory(device)
    set_memory_limit(device, None)  # loading may take more for a moment
    save_first(entry, first)
    return first


def ranks_of(recipe: Recipe, first: First) -> Ranks:
    """Return rank and alpha by path of layers that begin so, each with the scale that it has in the recipe."""
    before = _layers(recipe)
    return {
        path: (len(lora_a), kept_scale(before[path][1], before[path][0], len(lora_a), recipe.lora.rslora))
        for path, (lora_a, _) in first.items()
    }


def with_ranks(recipe: Recipe, ranks: Ranks) -> Recipe:
    """Return a recipe whose LoRA weights are on some layers alone, each with a rank and an alpha of its own."""
    targets = tuple(schema.Target(pattern=path, rank=rank, alpha=alpha) for path, (rank, alpha) in ranks.items())
    return recipe.model_copy(update={"lora": recipe.lora.model_copy(update={"targets": targets})})


def _layers(recipe: Recipe) -> Ranks:
    x = recipe.lora
    return chosen_layers(build_skeleton(recipe), lora_targets(recipe), x.rank, x.alpha, x.start)


def _scales(recipe: Recipe, own: Ranks) -> dict[str, float]:
    return {path: lora_scale(alpha, rank, recipe.lora.rslora) for path, (rank, alpha) in own.items()}


def _batches(examples: Sequence[Example], enough: int, max_tokens: int, order: str, seed: int) -> list[list[Example]]:
    """Return the rows of the first sequences of the first epoch, of enough tokens."""
    lengths, found, tokens = TextBatches().lengths(examples), [], 0
    for rows in plan_epoch(lengths, max_tokens, True, 1, order, seed, 0):
        if tokens >= enough:
            break
        found.append([examples[row] for row in rows])
        tokens += sum(lengths[row] for row in rows)
    return found


@torch.no_grad()
def _directions(recipe: Recipe, own: Ranks, batches: Sequence[Sequence[Example]]) -> First:
    """Return what LoRA weights begin as by eva, of a model that is loaded for it."""
    model, seen = _run(recipe, own, batches, lambda: Directions(RATIO * max(rank for rank, _ in own.values())))
    first, dtype = {}, getattr(torch, recipe.lora.dtype)
    before = {path: rank for path, (rank, _) in own.items()}
    found = {path: seen[path].found(RATIO * rank) for path, rank in before.items()}
    ranks = share_out({path: shares for path, (_, shares) in found.items()}, before)
    explained = [sum(sum(found[path][1][:rank]) for path, rank in each.items()) / len(own) for each in (ranks, before)]
    log.info(
        "lora.start eva: ranks from %d to %d, on %d of %d layers, explain %.1f %% of the variance of a layer's "
        "inputs; equal ones %.1f %%",
        min(ranks.values()),
        max(ranks.values()),
        len(ranks),
        len(own),
        *(100 * share for share in explained),
    )
    for path, rank in ranks.items():
        out_features = frozen_weight(model.get_submodule(path))[0].shape[0]
        first[path] = found[path][0][:rank].to(dtype), torch.zeros(out_features, rank, dtype=dtype)
    return first


@torch.no_grad()
def _corrections(recipe: Recipe, own: Ranks, batches: Sequence[Sequence[Example]]) -> First:
    """Return what LoRA weights begin as by qera, of a model that is loaded for it and its files' 16-bit weights.

    Layers that are in 16 bit (``model.keep_16bit``) are not in it.
    """
    model, seen = _run(recipe, own, batches, lambda: RandomSums(max(rank for rank, _ in own.values())))
    files, scales = locate(recipe.model.path, recipe.model.revision), _scales(recipe, own)
    read, first, shares = open_weights(files, build_skeleton(recipe), torch.float32).reader(), {}, []
    progress = Progress("correcting 4 bits", len(own))
    for path, (rank, _) in own.items():
        progress.step()
        layer = model.get_submodule(path)
        if not isinstance(layer, QuantLinear):
            continue
        spec, tensors = frozen_weight(layer)
        weight = read(f"{path}.weight").to(tensors[0].device, torch.float32)
        weight = weight.t() if layer.replaces == "Conv1D" else weight
        error = materialize(spec, tensors, torch.float32)
        torch.sub(weight, error, out=error)
        if not error.any():  # weights that four bits hold: new LoRA weights begin as any do
            continue
        sums = seen[path].sums.to(error.device)
        lora_a, lora_b, share = correction(error, sums, rank, scales[path], getattr(torch, recipe.lora.dtype))
        first[path] = lora_a.cpu(), lora_b.cpu()
        shares += [] if math.isnan(share) else [share]  # of inputs that are all zeros
    if not first:
        raise ModelError(
            "lora.start qera: no layer that lora.targets name has an error of 4 bits to make up for "
            "(those of model.keep_16bit stay in 16 bit): set it to kaiming"
        )
    log.info(
        "lora.start qera: makes up for %.0f %% of what 4 bits change in the outputs of a layer on these rows (of "
        "its squares, mean of %d layers)",
        100 * fmean(shares or [0]),
        len(shares),
    )
    return first


class _Kept(Protocol):
    """What is kept of the inputs of a layer."""

    def add(self, rows: torch.Tensor) -> None:
        """Add rows [T, in]."""


K = TypeVar("K", bound=_Kept)


def _run(
    recipe: Recipe, own: Ranks, batches: Sequence[Sequence[Example]], new: Callable[[], K]
) -> tuple[nn.Module, dict[str, K]]:
    """Load a recipe's model and run it; return it, and what is kept of each layer's inputs by path.

    Raises:
        ModelError: no input of a layer was seen, or the model cannot be computed exactly.
        DataError: the model lacks an embedding for a token or a position of the rows.
    """
    log.info("lora.start %s: running the model on %d sequences of the training rows", recipe.lora.start, len(batches))
    work, model, seen = causal_lm(), build_to_use(recipe), _Inputs(new)
    train_tokens(model, *trained_tokens(recipe), getattr(torch, recipe.lora.dtype))  # rows may have some that it lacks
    work.check_examples(model, [row for batch in batches for row in batch])
    work.spec.check_forward(model, recipe.data.max_tokens, work.batches)
    batches = [[each for row in batch for each in sequences_of(row)] for batch in batches]
    if runs_unpacked(model):
        batches = [[each] for batch in batches for each in batch]
    handles = [model.get_submodule(path).register_forward_pre_hook(partial(seen.take, path)) for path in own]
    for rows in batches:
        if not any(each.is_target[1:].any() for each in rows):  # a second sequence alone may have nothing to learn
            continue
        inputs = work.batches.inputs(work.batches.collate(rows), work.spec.device(model))
        seen.tokens = sum(inputs.row_lengths)
        hidden_states(model, inputs)
    for handle in handles:
        handle.remove()
    if unseen := own.keys() - seen.of.keys():
        raise ModelError(
            f"lora.start {recipe.lora.start}: no row passes through {min(unseen)}: leave it out of "
            "lora.targets, or set it to kaiming"
        )
    return model, seen.of


class _Inputs(Generic[K]):
    """What is kept of layers' inputs by path; layers that are given the same tensor one after the other share it.

    ``tokens`` is how many rows of the inputs are tokens of rows, and no filler behind them.
    """

    def __init__(self, new: Callable[[], K]):
        self.of: dict[str, K] = {}
        self.tokens, self._new = 0, new
        self._last: tuple[torch.Tensor, K] | None = None

    def take(self, path: str, _module: nn.Module, arguments: tuple) -> None:
        """Add the input of a layer; a forward pre-hook of it."""
        x = arguments[0]
        if self._last is None or x is not self._last[0]:
            if path not in self.of:
                self.of[path] = self._new()
            kept = self.of[path]
            kept.add(x.reshape(-1, x.shape[-1])[: self.tokens])
            self._last = x, kept
        self.of[path] = self._last[1]
