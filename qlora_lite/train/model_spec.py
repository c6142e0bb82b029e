"""What is known of a kind of model: its parts, its choices of memory, and how a plan builds one without weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any, Self

import torch
from torch import nn

from qlora_lite.adapters.method import AdapterMethod
from qlora_lite.errors import ModelError
from qlora_lite.models import anatomy
from qlora_lite.models.gguf_codes import Formats
from qlora_lite.models.memory_options import MemoryOptions, set_memory_options
from qlora_lite.models.nested import of_blocks
from qlora_lite.models.published import stacked_bytes
from qlora_lite.models.skeleton import block_pattern, shallow_config

from .batches import Batches, BatchShape
from .settings import TrainSettings

# What only a model of tokens has, or is not known of any blocks: tiles, a loss in chunks, tables, compiled blocks.
ONLY_BLOCKS = {
    "tile_tokens": None,
    "loss_chunk_tokens": None,
    "host_embeddings": False,
    "host_head": False,
    "compile": False,
    "optimizer_in_backward": False,
}
# Memory options that are no choice where the model's own weights are trained: tables stay on the device, in 16 bit.
TRAINED_WEIGHTS = MappingProxyType({"host_embeddings": False, "host_head": False, "cache_dequantized": False})


class ModelSpec:
    """A kind of model. What raises here is a kind's own; the rest has defaults.

    Subclasses are frozen dataclasses: a plan looks them up.
    """

    @property
    def has_tokenwise_parts(self) -> bool:
        """Whether some part of the model can be run tile by tile."""
        return True

    @property
    def name(self) -> str:
        """What a plan calls the kind of model."""
        return ""

    @property
    def depth(self) -> int:
        """How many blocks there are, for a plan."""
        return 1

    @property
    def most_tokens(self) -> int | None:
        """How many tokens the model can compute at once, where anything limits them."""
        return None

    @property
    def most_positions(self) -> int | None:
        """How many the model was made for, so that a plan warns of longer examples."""
        return None

    @property
    def compute_dtype(self) -> torch.dtype:
        """The type of a planned model."""
        return torch.bfloat16

    @property
    def is_quantized(self) -> bool:
        """Whether any weight is packed."""
        return False

    @property
    def keeps_codes(self) -> bool:
        """Whether packed weights are those of the model's files, so that nothing is prepared."""
        return False

    @property
    def stacked_bytes(self) -> int:
        """Of packed weights that are put together of several in the files, each time they are loaded."""
        return 0

    @property
    def tables_are_tied(self) -> bool:
        """Whether embeddings and head are one table, so that they lie in one place."""
        return False

    @property
    def blocks_before(self) -> Mapping[str, int]:
        """By the path of each list of blocks but the last, how many there are."""
        return {}

    @property
    def beside_blocks(self) -> tuple[str, ...]:
        """Paths of modules that have blocks of their own, such as a vision tower."""
        return ()

    def read_by(self, reader: Any) -> Self:
        """Return the model for rows that were read by a tokenizer or a picture processor."""
        return self

    # For a plan.

    def planned_model(
        self, method: AdapterMethod, device: torch.device, options: MemoryOptions, shape: BatchShape
    ) -> nn.Module:
        """Return the model for a plan, adapted and its weights placed, its blocks run as training would run them.

        Args:
            device: the meta device, or the CPU where an operator needs storage.
            options: ``models.memory_options.place`` and ``set_memory_options`` apply them.
            shape: of the micro-batch that it is for.
        """
        raise NotImplementedError

    def fixed_options(self, method: AdapterMethod) -> Mapping[str, object]:
        """Return the memory options that it has no choice of."""
        return ONLY_BLOCKS

    def movable_tables(self, method: AdapterMethod) -> tuple[str, ...]:
        """Return the fields of ``MemoryOptions`` for tables that can lie in host memory."""
        return ()

    def runs_row_by_row(self, longest: int) -> bool:
        """Whether models of this kind run the rows of a batch one by one, where they may have so many tokens."""
        return False

    def needs_values(self, model: nn.Module) -> bool:
        """Return whether a result's shape may follow from values that a plan has: positions, masks."""
        return False

    def pattern(self, method: AdapterMethod) -> tuple[int, int]:
        """Return how many of the first blocks are of kinds of their own, and after how many the others repeat.

        The default says that no two are known to be alike: then a plan runs all of them.
        """
        return self.depth, 1

    def at_depth(self, depth: int) -> Self:
        """Return the model with fewer blocks, of the same kinds."""
        if depth == self.depth:
            return self
        raise NotImplementedError

    # Of a model.

    def outputs(self, model: nn.Module, inputs: Any) -> Any:
        """Return what the objective is given of a micro-batch."""
        raise NotImplementedError

    def unused_parameters(self, model: nn.Module, inputs: Any) -> Sequence[nn.Parameter]:
        """Return what learns and has no part in these inputs' outputs, so that it gets gradients of zero."""
        return ()

    def device(self, model: nn.Module) -> torch.device:
        """Return the device that a model computes on, wherever its weights lie: where what it learns does."""
        parameters = list(model.parameters())
        return next((p for p in parameters if p.requires_grad), parameters[0]).device

    def blocks(self, model: nn.Module) -> list[nn.Module]:
        """Return what is checkpointed, streamed and compiled one by one, in order: of transformers' class
        ``GradientCheckpointingLayer``.
        """
        raise NotImplementedError

    def tables(self, model: nn.Module) -> tuple[nn.Module | None, nn.Module | None]:
        """Return the modules of embeddings and of the head, None where a model has none."""
        return None, None

    def needs_loss_scale(self, model: nn.Module) -> bool:
        """Return whether the model computes in float16, whose gradients would underflow."""
        return False

    # What is checked and found out before the first step.

    def check(self, model: object) -> None:
        """Check that it is a model of the kind.

        Raises:
            ModelError: it is not.
        """
        if not isinstance(model, nn.Module):
            raise ModelError(f"a model is wanted, not {type(model).__name__}; qlora_lite.load_model(PATH) loads one")

    def check_model(self, model: nn.Module, method: AdapterMethod, settings: TrainSettings, batches: Batches) -> None:
        """Set the memory options, and check that training computes what the model computes, and with the settings.

        Raises:
            ModelError, TrainingError: it would not.
        """
        set_memory_options(model, replace(settings.options, kernels="plain"), self.blocks(model))

    def check_forward(self, model: nn.Module, longest: int, batches: Batches) -> None:
        """Check that a model computes what its own code does, in examples of at most so many tokens.

        Raises:
            ModelError: it does not.
        """

    def choose_kernels(
        self, model: nn.Module, largest: Callable[[], Any], options: MemoryOptions, recorded: Sequence[str] | None
    ) -> None:
        """Try fused kernels on a GPU, or take those that are recorded.

        Args:
            largest: makes the inputs of the largest micro-batch.

        Raises:
            TrainingError: one of those that are recorded does not run here any more.
        """


@dataclass(frozen=True, eq=False)
class TransformerSpec(ModelSpec):
    """A model of transformers, whose blocks are the decoder's or the encoder's.

    Args:
        config: transformers', for a plan; training takes the model as it was loaded.
        quant, double_quant, quant_head, compute_dtype, keep_16bit: as in the recipe's model section.
        formats: of layers that keep the codes of their file, by path.
        longest: tokens of the longest row that there may be.
    """

    config: Any = None
    quant: str = "nf4"
    double_quant: bool = True
    quant_head: bool = False
    compute_dtype: torch.dtype = torch.bfloat16
    longest: int = 0
    keep_16bit: tuple[str, ...] = ()
    formats: Formats = ()

    @property
    def name(self) -> str:
        """The architecture's name in transformers."""
        return self.config.model_type

    @property
    def depth(self) -> int:
        """The model's blocks."""
        return of_blocks(self.config).num_hidden_layers

    @property
    def is_quantized(self) -> bool:
        """Whether linear layers are packed."""
        return self.quant != "none"

    @property
    def keeps_codes(self) -> bool:
        """Whether layers keep the codes of their file."""
        return bool(self.formats) or hasattr(self.config, "quantization_config")

    @property
    def stacked_bytes(self) -> int:
        """See ``ModelSpec``; those of experts."""
        return stacked_bytes(self.config, self.formats)

    def pattern(self, method: AdapterMethod) -> tuple[int, int]:
        """See ``models.skeleton.block_pattern``."""
        return block_pattern(self.config, method, self.keep_16bit, self.formats)

    def at_depth(self, depth: int) -> Self:
        """Return the model with fewer blocks."""
        return replace(self, config=shallow_config(self.config, depth))

    def blocks(self, model: nn.Module) -> list[nn.Module]:
        """Return the decoder's or encoder's."""
        return anatomy.blocks(model)

    def device(self, model: nn.Module) -> torch.device:
        """Return the device of the head, which an adapter need not be there for."""
        return anatomy.device_of(model)

    def needs_loss_scale(self, model: nn.Module) -> bool:
        """Return whether the model is in float16."""
        return model.dtype == torch.float16
