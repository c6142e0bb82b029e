"""The workload that is a causal language model: tokenised rows, packed; cross-entropy over the target tokens."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import chain, pairwise
from typing import ClassVar, Self

import numpy as np
import torch
from torch import nn

from qlora_lite.adapters.lora.inject import merged_once, require_model
from qlora_lite.data.tokens.batch import Batch, Extent, collate, enlarged
from qlora_lite.data.tokens.storage import Example, learned_counts, longest_sequences, row_lengths, with_virtual
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

from .forward import Inputs, filler_tokens, hidden_states, labelled_count, prepare, row_ends
from .kernels import check_kernels, choose_kernels
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
from .transformer import TRAINED_WEIGHTS, TransformerWorkload
from .workload import BatchShape, LossSum, Objective

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

    @property
    def name(self) -> str:
        """The package whose loss it is, or ``CHUNKED``."""
        return self.fused or CHUNKED


@dataclass(frozen=True)
class CausalLM(TransformerWorkload):
    """A causal language model. Its objective is given the last hidden states [N, D] of the tokens before the targets.

    Args:
        virtual: tokens before each row; None are the method's, and an evaluation says those of its model.
    """

    objective: Objective = field(default_factory=CrossEntropy)
    virtual: int | None = None

    reads_pictures: ClassVar[bool] = False
    fewer_positions: ClassVar[str] = "set data.max_tokens to {limit}, and data.overflow to what becomes of longer rows"

    @property
    def _virtual(self) -> int:
        return self.method.virtual_tokens if self.virtual is None else self.virtual

    def lengths(self, examples: Sequence[Example]) -> Sequence[int]:
        """Return the tokens of each, virtual ones included."""
        lengths, virtual = row_lengths(examples), self._virtual
        return [length + virtual for length in lengths] if virtual else lengths

    def positions(self, examples: Sequence[Example]) -> Sequence[int]:
        """Return how many positions the longest sequence of each takes; each sequence begins at the first."""
        return [self._virtual + tokens for tokens in longest_sequences(examples)]

    def target_counts(self, examples: Sequence[Example]) -> Sequence[int]:
        """Return the target tokens of each."""
        return learned_counts(examples)

    def enlarged(self, examples: Sequence[Example], most: Extent) -> Sequence[Example]:
        """See ``data.tokens.batch.enlarged``."""
        virtual = self._virtual
        tokens = max(most.rows, most.tokens - virtual * most.rows)
        return enlarged(examples, most._replace(tokens=tokens, longest=most.longest - virtual))

    def collate(self, examples: Sequence[Example]) -> Batch:
        """Pack rows into one sequence, each behind the method's virtual tokens.

        Raises:
            DataError: a row has pictures.
        """
        if not self.reads_pictures and (shown := next((each.where for each in examples if each.pictures), None)):
            raise DataError(f"{shown}: the row has pictures, which are not read here; give rows of text")
        virtual = self._virtual
        return collate([with_virtual(each, virtual) for each in examples] if virtual else examples)

    def shape(self, batch: Batch) -> BatchShape:
        """Return the tokens of each row, and how many are labelled."""
        return BatchShape(batch.row_lengths, labelled_count(batch))

    def inputs(self, batch: Batch, device: torch.device) -> Inputs:
        """See ``forward.prepare``."""
        return prepare(batch, device)

    def planned_inputs(self, shape: BatchShape, device: torch.device) -> Inputs:
        """Return inputs of zeros, with positions."""
        tokens = shape.tokens + filler_tokens(shape.lengths, device)
        shapes = (1, tokens), (shape.targets,), (shape.targets,)
        ids, learned, targets = (torch.zeros(size, dtype=torch.int64, device=device) for size in shapes)
        counted = (*shape.lengths, tokens - shape.tokens)
        positions = torch.cat([torch.arange(length, device=device) for length in counted])[None]
        return Inputs(ids, positions, shape.lengths, learned, targets, row_ends(shape.lengths, device))

    def loss(self, model: nn.Module, inputs: Inputs) -> LossSum:
        """Return the loss over a micro-batch's targets."""
        return self.objective(model, hidden_states(model, inputs)[inputs.learned], inputs)

    def token_losses(self, model: nn.Module, inputs: Inputs) -> torch.Tensor:
        """Return minus the logarithm of each target's probability, float32 [N], with the objective's chunks."""
        hidden = hidden_states(model, inputs)[inputs.learned]
        with category("logits"):
            return token_losses(hidden, inputs.targets, anatomy.head(model), self.objective.chunk_tokens)

    @property
    def most_tokens(self) -> int | None:
        """See ``models.packing.longest_possible``."""
        return longest_possible(self.spec.config)

    @property
    def most_positions(self) -> int | None:
        """``max_position_embeddings`` of the configuration."""
        return getattr(of_blocks(self.spec.config), "max_position_embeddings", None)

    @property
    def fixed_options(self) -> Mapping[str, object]:
        """None, each can be set; of weights that are trained, where they lie is."""
        return TRAINED_WEIGHTS if self.method.trains_base else {}

    @cached_property
    def has_tokenwise_parts(self) -> bool:
        """Whether some part of the model can be run tile by tile."""
        model = self._without_values()
        return any(map(anatomy.tokenwise_parts, (anatomy.decoder(model), *anatomy.blocks(model))))

    @property
    def movable_tables(self) -> tuple[str, ...]:
        """Embeddings, and the head if it is in 16 bit; but for those that are trained."""
        trained = self.method.trained_tables
        if self.method.trains_base or (trained and self.tables_are_tied):
            return ()
        still = [f"host_{table}" for table in ("embeddings", "head") if table not in trained]
        return tuple(table for table in still if table != "host_head" or not self.spec.quant_head)

    @property
    def tables_are_tied(self) -> bool:
        """Whether the embeddings are the head too, so that they can only lie in one place."""
        return bool(self.spec.config.tie_word_embeddings) and not self.spec.quant_head

    def runs_row_by_row(self, longest: int) -> bool:
        """Whether the model is one that runs the rows of a pack one by one (``why_unpacked``)."""
        return bool(why_unpacked(self._without_values(), max(self.spec.longest, longest)))

    def _without_values(self) -> nn.Module:
        spec = self.spec
        how = spec.quant, spec.double_quant, spec.compute_dtype, spec.quant_head, spec.keep_16bit, spec.formats
        return meta_copy(spec.config, *how)

    def planned_model(self, device: torch.device, options: MemoryOptions, shape: BatchShape) -> nn.Module:
        """See ``Workload``."""
        model = self._without_values()
        check_causal(model)
        check_shared_keys(model)
        self.method.apply(model)
        if device.type != "meta":
            give_storage(model, device)
        in_files = not is_converted(self.spec.config, self.spec.quant, self.spec.compute_dtype)
        place(model, device, options, trains_base=self.method.trains_base, in_files=in_files)
        if why_unpacked(model, max(self.spec.longest, *shape.lengths)):
            run_unpacked(model)
            self._check_unpacked(model)
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

    def check_examples(self, model: object, examples: object) -> None:
        """Check that it is a model of transformers, with embeddings for the tokens of examples that are rows."""
        require_model(model)
        if not isinstance(examples, Sequence) or not isinstance(next(iter(examples), None), Example | None):
            raise DataError(f"examples is {type(examples).__name__}; give build_examples(...).examples")
        check_embeddings(model, examples, self.positions, self.fewer_positions)

    def check_model(self, model: nn.Module, settings: TrainSettings) -> None:
        """See ``text_guards``."""
        check_causal(model)
        check_shared_keys(model)
        plain = replace(settings.options, kernels="plain")  # until ``choose_kernels`` has tried others
        tiny_tiles = plain.tile_tokens and CHECKED_TILE_TOKENS  # so that the check's few tokens are cut
        set_memory_options(model, replace(plain, tile_tokens=tiny_tiles))
        self.check_forward(model, settings.max_tokens)
        self._check_unpacked(model)
        set_memory_options(model, plain)
        check_updates_in_backward(model, settings)
        check_compilable(model, settings.options)

    def _check_unpacked(self, model: nn.Module) -> None:
        if runs_unpacked(model) and not self.method.trains_unpacked:
            raise ModelError(
                f"{type(model).__name__} runs row by row, where prefix tuning's places would be those of "
                "another row; take adapter.method prompt"
            )

    def check_forward(self, model: nn.Module, longest: int) -> None:
        """See ``text_guards.check_forward``."""
        check_forward(model, longest)

    def choose_kernels(
        self, model: nn.Module, largest: Callable[[], Inputs], options: MemoryOptions, recorded: Sequence[str] | None
    ) -> None:
        """See ``kernels``."""
        on_gpu, allowed = self.device(model).type == "cuda", {*options.allowed_kernels}
        names = allowed if recorded is None else allowed & {*recorded}
        if recorded is not None or on_gpu:
            use_kernels(model, names)
        if on_gpu and names and recorded is None:
            choose_kernels(model, largest())
        elif on_gpu and names:
            check_kernels(model, names, largest())

    def choose_loss(self, model: nn.Module, largest: Callable[[], Inputs], setting: str, recorded: str | None) -> Self:
        """Choose on the hidden states of the largest micro-batch; see ``kernels.fused_loss``."""
        its_head, objective = anatomy.head(model), self.objective
        if not isinstance(objective, CrossEntropy):
            return self
        names = candidates(setting, its_head, self.device(model))
        if recorded is not None:
            fused = recorded if recorded in names else None
        elif names:
            inputs, was_training = largest(), model.training
            with torch.no_grad():
                hidden = hidden_states(model.eval(), inputs)[inputs.learned]
            model.train(was_training)
            fused = choose_loss(names, hidden, inputs.targets, its_head, objective.chunk_tokens)
        else:
            fused = None
        return replace(self, objective=replace(objective, fused=fused))

    def can_reach_every_layer(self, examples: Sequence[Example]) -> bool:
        """See ``text_guards.can_reach_every_layer``."""
        return can_reach_every_layer(examples)


@torch.no_grad()
def answer_losses(workload: CausalLM, model: nn.Module, batches: Iterable[Batch]) -> list[list[float]]:
    """Return the losses of each sequence's targets, in nats, by the computation of ``evaluate_loss``."""
    found, device = [], workload.device(model)
    with evaluating(model), merged_once(model):
        for batch in batches:
            inputs = workload.inputs(batch, device)
            losses = workload.token_losses(model, inputs).tolist()
            ends = np.searchsorted(inputs.learned.tolist(), np.cumsum(inputs.row_lengths))
            found += [losses[start:end] for start, end in pairwise([0, *ends.tolist()])]
    return found
