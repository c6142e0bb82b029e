"""The workload that is a causal language model: tokenised rows, packed; cross-entropy over the target tokens."""

from bisect import bisect_left
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate, chain, pairwise
from typing import Any, ClassVar, Self

import torch
from torch import nn

from qlora_lite.adapters.files import Lora
from qlora_lite.adapters.lora.inject import merged_once, require_model
from qlora_lite.adapters.method import AdapterMethod
from qlora_lite.data.tokens.batch import Batch, Extent, collate, enlarged
from qlora_lite.data.tokens.storage import Example, longest_sequences, row_lengths, target_counts, with_virtual
from qlora_lite.errors import DataError, ModelError
from qlora_lite.kernels.fused_attention import PlannedKernels
from qlora_lite.kernels.fused_loss import FUSED, candidates, choose_loss
from qlora_lite.kernels.loss import AUTO_CHUNK_TOKENS, chunked_cross_entropy, token_losses
from qlora_lite.memory.marks import category
from qlora_lite.models import anatomy
from qlora_lite.models.kernels import use_kernels
from qlora_lite.models.load import is_converted, uses_row_attention
from qlora_lite.models.memory_options import MemoryOptions, place, set_memory_options
from qlora_lite.models.nested import of_blocks
from qlora_lite.models.packing import longest_possible, run_unpacked, runs_unpacked, why_unpacked
from qlora_lite.models.skeleton import give_storage, meta_copy

from .batches import Batches, BatchShape
from .forward import Inputs, filler_tokens, hidden_states, labelled_count, prepare, row_ends
from .kernels import check_kernels, choose_kernels
from .model_spec import TRAINED_WEIGHTS, ModelSpec, TransformerSpec
from .objective import LossSum, Objective
from .settings import TrainSettings
from .step import evaluating
from .text_guards import (
    can_reach_every_layer,
    check_causal,
    check_compilable,
    check_embeddings,
    check_forward,
    check_shared_keys,
    check_updates_in_backward,
)
from .workload import Workload

TYPICAL_SEQUENCES = 8  # of a pack whose rows are not known: 2,048 tokens of instructions and answers of 256
CHECKED_TILE_TOKENS = 5
CHUNKED = "chunked"  # the loss that is this package's own


@dataclass(frozen=True)
class CrossEntropy(Objective):
    """The sum over target tokens of minus the logarithm of their probabilities.

    Args:
        chunk_tokens: tokens whose logits exist at once.
        fused: name of the loss in ``kernels.fused_loss`` that takes the place of the chunked one.
    """

    chunk_tokens: int = AUTO_CHUNK_TOKENS
    fused: str | None = None

    def __call__(self, model: nn.Module, outputs: torch.Tensor, inputs: Inputs) -> LossSum:
        """Return the loss of hidden states [N, D] of the tokens before the targets."""
        its_head = anatomy.head(model)
        with category("logits"):
            if self.fused:
                return LossSum(FUSED[self.fused][1](outputs, inputs.targets, its_head))
            return LossSum(chunked_cross_entropy(outputs, inputs.targets, its_head, self.chunk_tokens))

    def with_options(self, options: MemoryOptions) -> Self:
        """Take the tokens at once from memory options."""
        return replace(self, chunk_tokens=options.loss_chunk_tokens or AUTO_CHUNK_TOKENS)

    def plain(self) -> Self:
        """Return the chunked one."""
        return replace(self, fused=None)

    def choose(
        self, model: nn.Module, spec: ModelSpec, largest: Callable[[], Any], setting: str, recorded: str | None
    ) -> Self:
        """Choose on the hidden states of the largest micro-batch; see ``kernels.fused_loss``."""
        its_head = anatomy.head(model)
        names = candidates(setting, its_head, spec.device(model))
        if recorded is not None:
            fused = recorded if recorded in names else None
        elif names:
            inputs, was_training = largest(), model.training
            with torch.no_grad():
                hidden = spec.outputs(model.eval(), inputs)
            model.train(was_training)
            fused = choose_loss(names, hidden, inputs.targets, its_head, self.chunk_tokens)
        else:
            fused = None
        return replace(self, fused=fused)

    @property
    def name(self) -> str:
        """The package whose loss it is, or ``CHUNKED``."""
        return self.fused or CHUNKED


@dataclass(frozen=True)
class TextBatches(Batches):
    """Tokenised rows, packed into one sequence.

    Args:
        virtual: tokens that the method puts before each row.
    """

    virtual: int = 0

    reads_pictures: ClassVar[bool] = False

    @property
    def fewer_positions(self) -> str:
        """What to do about rows that are too long for the model, whose positions end at ``limit``, ``over`` before."""
        return "set data.max_tokens to {limit}, and data.overflow to what becomes of longer rows"

    def behind(self, virtual_tokens: int) -> Self:
        """See ``Batches``."""
        return replace(self, virtual=virtual_tokens)

    def check(self, model: nn.Module, examples: object) -> None:
        """Check that examples are rows, with tokens that the model has embeddings for."""
        if not isinstance(examples, Sequence) or not isinstance(next(iter(examples), None), Example | None):
            raise DataError(f"examples is {type(examples).__name__}; give build_examples(...).examples")
        check_embeddings(model, examples, self.positions, self.fewer_positions)

    def places(self, examples: Sequence[Example]) -> list[str]:
        """Return file and line of each."""
        return [example.where for example in examples]

    def lengths(self, examples: Sequence[Example]) -> Sequence[int]:
        """Return the tokens of each, virtual ones included."""
        lengths = row_lengths(examples)
        return [length + self.virtual for length in lengths] if self.virtual else lengths

    def positions(self, examples: Sequence[Example]) -> Sequence[int]:
        """Return how many positions the longest sequence of each takes; each sequence begins at the first."""
        return [self.virtual + tokens for tokens in longest_sequences(examples)]

    def target_counts(self, examples: Sequence[Example]) -> Sequence[int]:
        """Return the target tokens of each."""
        return target_counts(examples)

    def enlarged(self, examples: Sequence[Example], most: Extent) -> Sequence[Example]:
        """See ``data.tokens.batch.enlarged``."""
        tokens = max(most.rows, most.tokens - self.virtual * most.rows)
        return enlarged(examples, most._replace(tokens=tokens, longest=most.longest - self.virtual))

    def can_reach_every_layer(self, examples: Sequence[Example]) -> bool:
        """See ``text_guards.can_reach_every_layer``."""
        return can_reach_every_layer(examples)

    def collate(self, examples: Sequence[Example]) -> Any:
        """Pack rows into one sequence, each behind the method's virtual tokens.

        Raises:
            DataError: a row has pictures.
        """
        return self.packed(examples)

    def packed(self, examples: Sequence[Example]) -> Batch:
        """See ``collate``."""
        if not self.reads_pictures and (shown := next((each.where for each in examples if each.pictures), None)):
            raise DataError(f"{shown}: the row has pictures, which are not read here; give rows of text")
        return collate([with_virtual(each, self.virtual) for each in examples] if self.virtual else examples)

    def shape(self, batch: Any) -> BatchShape:
        """Return the tokens of each row, and how many are labelled."""
        return BatchShape(batch.row_lengths, labelled_count(batch))

    def inputs(self, batch: Any, device: torch.device) -> Any:
        """See ``forward.prepare``."""
        return prepare(batch, device)

    def full_pack(self, tokens: int, packing: bool) -> BatchShape:
        """Return the shape of a pack of so many tokens, all learned, for a plan where no row is known.

        It needs as much as any of ``TYPICAL_SEQUENCES`` or fewer: what runs once for each takes its time, and one has
        nearly all tokens, since attention needs most for a long one. Each more takes up to 128 tokens' more inside of a
        GPU's attention (``kernels.packed_attention``); a run is planned with its own rows.
        """
        others = min(TYPICAL_SEQUENCES - 1, (tokens - 1) // 2) if packing else 0
        return BatchShape((tokens - others, *(1,) * others), tokens - 1)

    def planned_inputs(self, shape: BatchShape, device: torch.device) -> Any:
        """Return inputs of zeros, with positions."""
        return planned_rows(shape, device)


def planned_rows(shape: BatchShape, device: torch.device) -> Inputs:
    """Return rows of a shape, of zeros, with positions."""
    tokens = shape.tokens + filler_tokens(shape.lengths, device)
    shapes = (1, tokens), (shape.targets,), (shape.targets,)
    ids, target_positions, targets = (torch.zeros(size, dtype=torch.int64, device=device) for size in shapes)
    counted = (*shape.lengths, tokens - shape.tokens)
    positions = torch.cat([torch.arange(length, device=device) for length in counted])[None]
    return Inputs(ids, positions, shape.lengths, target_positions, targets, row_ends(shape.lengths, device))


@dataclass(frozen=True, eq=False)
class TextSpec(TransformerSpec):
    """A causal language model. Its outputs are the last hidden states [N, D] of the tokens before the targets."""

    def outputs(self, model: nn.Module, inputs: Any) -> torch.Tensor:
        """See the class.

        Args:
            inputs: with ``tokens``, see ``forward.Inputs``.
        """
        return hidden_states(model, inputs.tokens)[inputs.tokens.target_positions]

    @property
    def most_tokens(self) -> int | None:
        """See ``models.packing.longest_possible``."""
        return longest_possible(self.config)

    @property
    def most_positions(self) -> int | None:
        """``max_position_embeddings`` of the configuration."""
        return getattr(of_blocks(self.config), "max_position_embeddings", None)

    def fixed_options(self, method: AdapterMethod) -> Mapping[str, object]:
        """None, each can be set; of weights that are trained, where they lie is."""
        return TRAINED_WEIGHTS if method.trains_base else {}

    @cached_property
    def has_tokenwise_parts(self) -> bool:
        """Whether some part of the model can be run tile by tile."""
        model = self._without_values()
        return any(map(anatomy.tokenwise_parts, (anatomy.decoder(model), *anatomy.blocks(model))))

    def movable_tables(self, method: AdapterMethod) -> tuple[str, ...]:
        """Embeddings, and the head if it is in 16 bit; but for those that are trained."""
        trained = method.trained_tables
        if method.trains_base or (trained and self.tables_are_tied):
            return ()
        still = [f"host_{table}" for table in ("embeddings", "head") if table not in trained]
        return tuple(table for table in still if table != "host_head" or not self.quant_head)

    @property
    def tables_are_tied(self) -> bool:
        """Whether the embeddings are the head too, so that they can only lie in one place."""
        return bool(self.config.tie_word_embeddings) and not self.quant_head

    def runs_row_by_row(self, longest: int) -> bool:
        """Whether the model is one that runs the rows of a pack one by one (``why_unpacked``)."""
        return bool(why_unpacked(self._without_values(), max(self.longest, longest)))

    def _without_values(self) -> nn.Module:
        how = self.quant, self.double_quant, self.compute_dtype, self.quant_head, self.keep_16bit, self.formats
        return meta_copy(self.config, *how)

    def planned_model(
        self, method: AdapterMethod, device: torch.device, options: MemoryOptions, shape: BatchShape
    ) -> nn.Module:
        """See ``ModelSpec``."""
        model = self._without_values()
        check_causal(model)
        check_shared_keys(model)
        method.apply(model)
        if device.type != "meta":
            give_storage(model, device)
        in_files = not is_converted(self.config, self.quant, self.compute_dtype)
        place(model, device, options, trains_base=method.trains_base, in_files=in_files)
        if why_unpacked(model, max(self.longest, *shape.lengths)):
            run_unpacked(model)
            _check_unpacked(model, method)
        set_memory_options(model, options)
        if device.type == "meta" and not uses_row_attention(model):
            # hooks of a block itself are not called where it runs again
            parts = (part for block in self.blocks(model) for part in block.children())
            for part in chain(parts, map(model.get_submodule, self.beside_blocks)):
                PlannedKernels().during(part)
        return model

    def needs_values(self, model: nn.Module) -> bool:
        """Whether attention is transformers' own, whose masks follow from values."""
        return not uses_row_attention(model)

    def tables(self, model: nn.Module) -> tuple[nn.Module | None, nn.Module | None]:
        """Return embeddings and head."""
        return model.get_input_embeddings(), model.get_output_embeddings()

    def check(self, model: object) -> None:
        """Check that it is a model of transformers."""
        require_model(model)

    def check_model(self, model: nn.Module, method: AdapterMethod, settings: TrainSettings, batches: Batches) -> None:
        """See ``text_guards``."""
        check_causal(model)
        check_shared_keys(model)
        plain = replace(settings.options, kernels="plain")  # until ``choose_kernels`` has tried others
        tiny_tiles = plain.tile_tokens and CHECKED_TILE_TOKENS  # so that the check's few tokens are cut
        set_memory_options(model, replace(plain, tile_tokens=tiny_tiles))
        self.check_forward(model, settings.max_tokens, batches)
        _check_unpacked(model, method)
        set_memory_options(model, plain)
        check_updates_in_backward(model, settings)
        check_compilable(model, settings.options)

    def check_forward(self, model: nn.Module, longest: int, batches: Batches) -> None:
        """See ``text_guards.check_forward``."""
        check_forward(model, longest)

    def choose_kernels(
        self, model: nn.Module, largest: Callable[[], Any], options: MemoryOptions, recorded: Sequence[str] | None
    ) -> None:
        """See ``kernels``."""
        on_gpu, allowed = self.device(model).type == "cuda", {*options.allowed_kernels}
        names = allowed if recorded is None else allowed & {*recorded}
        if recorded is not None or on_gpu:
            use_kernels(model, names)
        if on_gpu and names and recorded is None:
            choose_kernels(model, largest().tokens)
        elif on_gpu and names:
            check_kernels(model, names, largest().tokens)


def _check_unpacked(model: nn.Module, method: AdapterMethod) -> None:
    if runs_unpacked(model) and not method.trains_unpacked:
        raise ModelError(
            f"{type(model).__name__} runs row by row, where prefix tuning's places would be those of "
            "another row; take adapter.method prompt"
        )


def causal_lm(
    method: AdapterMethod | None = None, objective: Objective | None = None, spec: ModelSpec | None = None
) -> Workload:
    """Return a causal language model that learns from rows of text.

    Args:
        method: None is LoRA.
        objective: None is cross-entropy.
        spec: of the model, for a plan.
    """
    method = method or Lora()
    return Workload(spec or TextSpec(), TextBatches(method.virtual_tokens), objective or CrossEntropy(), method)


def target_losses(work: Workload, model: nn.Module, inputs: Inputs) -> torch.Tensor:
    """Return minus the logarithm of each target's probability, float32 [N], in the objective's chunks if it has any."""
    hidden = work.spec.outputs(model, inputs)
    chunk = getattr(work.objective, "chunk_tokens", AUTO_CHUNK_TOKENS)
    with category("logits"):
        return token_losses(hidden, inputs.targets, anatomy.head(model), chunk)


@torch.no_grad()
def answer_losses(work: Workload, model: nn.Module, batches: Iterable[Batch]) -> list[list[float]]:
    """Return the losses of each sequence's targets, in nats, by the computation of ``evaluate_loss``."""
    found, device = [], work.spec.device(model)
    with evaluating(model), merged_once(model):
        for batch in batches:
            inputs = work.batches.inputs(batch, device)
            losses = target_losses(work, model, inputs).tolist()
            places = inputs.target_positions.tolist()
            ends = [bisect_left(places, end) for end in accumulate(inputs.row_lengths)]
            found += [losses[start:end] for start, end in pairwise([0, *ends])]
    return found
