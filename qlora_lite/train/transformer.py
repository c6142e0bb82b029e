"""What all workloads with a model of transformers have in common, be it of text or of pictures."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Self

import torch
from torch import nn

from qlora_lite.adapters.files import Lora
from qlora_lite.adapters.method import AdapterMethod
from qlora_lite.data.tokens.storage import Example
from qlora_lite.models import anatomy
from qlora_lite.models.gguf_codes import Formats
from qlora_lite.models.memory_options import MemoryOptions
from qlora_lite.models.nested import of_blocks
from qlora_lite.models.published import stacked_bytes
from qlora_lite.models.skeleton import block_pattern, shallow_config

from .workload import Objective, Workload

# Memory options that are no choice where the model's own weights are trained: tables stay on the device, in 16 bit.
TRAINED_WEIGHTS = MappingProxyType({"host_embeddings": False, "host_head": False, "cache_dequantized": False})


@dataclass(frozen=True, eq=False)
class ModelSpec:
    """A model of which a plan needs no weights.

    Args:
        config: transformers'.
        quant, double_quant, quant_head, compute_dtype, keep_16bit: as in the recipe's model section.
        formats: of layers that keep the codes of their file, by path.
        longest: tokens of the longest row that there may be.
    """

    config: object
    quant: str = "nf4"
    double_quant: bool = True
    quant_head: bool = False
    compute_dtype: torch.dtype = torch.bfloat16
    longest: int = 0
    keep_16bit: tuple[str, ...] = ()
    formats: Formats = ()


@dataclass(frozen=True)
class TransformerWorkload(Workload):
    """A model of transformers, whose blocks are the decoder's or the encoder's.

    Args:
        spec: of the model, for a plan; training takes the model as it was loaded.
    """

    objective: Objective
    method: AdapterMethod = field(default_factory=Lora)
    spec: ModelSpec | None = field(default=None, repr=False)

    def places(self, examples: Sequence[Example]) -> list[str]:
        """Return file and line of each."""
        return [example.where for example in examples]

    def weight(self, inputs) -> int:
        """Return the number of targets."""
        return len(inputs.targets)

    def with_options(self, options: MemoryOptions) -> Self:
        """See ``Objective.with_options``."""
        return replace(self, objective=self.objective.with_options(options))

    def plain(self) -> Self:
        """See ``Objective.plain``."""
        return replace(self, objective=self.objective.plain())

    @property
    def name(self) -> str:
        """The architecture's name in transformers."""
        return self.spec.config.model_type

    @property
    def depth(self) -> int:
        """The model's blocks."""
        return of_blocks(self.spec.config).num_hidden_layers

    @property
    def compute_dtype(self) -> torch.dtype:
        """The type that the model computes in."""
        return self.spec.compute_dtype

    @property
    def is_quantized(self) -> bool:
        """Whether linear layers are packed."""
        return self.spec.quant != "none"

    @property
    def keeps_codes(self) -> bool:
        """Whether layers keep the codes of their file."""
        return bool(self.spec.formats) or hasattr(self.spec.config, "quantization_config")

    @property
    def stacked_bytes(self) -> int:
        """See ``Workload``; those of experts."""
        return stacked_bytes(self.spec.config, self.spec.formats)

    def pattern(self) -> tuple[int, int]:
        """See ``models.skeleton.block_pattern``."""
        return block_pattern(self.spec.config, self.method, self.spec.keep_16bit, self.spec.formats)

    def at_depth(self, depth: int) -> Self:
        """Return the workload with fewer blocks."""
        return replace(self, spec=replace(self.spec, config=shallow_config(self.spec.config, depth)))

    def blocks(self, model: nn.Module) -> list[nn.Module]:
        """Return the decoder's or encoder's."""
        return anatomy.blocks(model)

    def device(self, model: nn.Module) -> torch.device:
        """Return the device of the head, which an adapter need not be there for."""
        return anatomy.device_of(model)

    def needs_loss_scale(self, model: nn.Module) -> bool:
        """Return whether the model is in float16."""
        return model.dtype == torch.float16
