"""Train a vision encoder with a head: one label for each picture.

An example is one picture and one sequence of length 1, whatever its patches, since all pictures of a run have one
size: a micro-batch is a batch [N, 3, H, W], and memory depends on N. The model runs as transformers wrote it, head
included (DINOv2's reads the first token beside the mean of the patches, SigLIP's and CLIP's the mean), so that there is
nothing of its inputs or outputs that could differ from what transformers and peft compute.

Pixels are made by ``examples.Decoder``, in threads, of the next step while the present one computes.
"""

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, NamedTuple, Self

import numpy as np
import torch
from torch import nn

from qlora_lite.adapters.method import AdapterMethod
from qlora_lite.adapters.parts import base_path
from qlora_lite.data.labels import ONE_LABEL, target_of
from qlora_lite.data.tokens.storage import Example
from qlora_lite.errors import DataError, ModelError, first_line
from qlora_lite.ext.heads.loss import HeadLoss
from qlora_lite.memory.marks import category
from qlora_lite.models import anatomy
from qlora_lite.models.memory_options import MemoryOptions, place, set_memory_options
from qlora_lite.models.nested import of_blocks
from qlora_lite.models.skeleton import give_storage, meta_copy
from qlora_lite.train.batches import Batches, BatchShape
from qlora_lite.train.model_spec import ONLY_BLOCKS, TRAINED_WEIGHTS, ModelSpec, TransformerSpec
from qlora_lite.train.settings import TrainSettings
from qlora_lite.train.text_guards import check_updates_in_backward, check_weights
from qlora_lite.train.workload import Workload

from .examples import decoder
from .pixels import Processor

_RESIZES = "interpolate_pos_encoding"  # transformers' argument for pictures of another size than the model's own


class Pictures(NamedTuple):
    """Pixels, float32 [N, 3, H, W], and the number of each picture's label, int64 [N]."""

    pixels: torch.Tensor
    targets: torch.Tensor


@dataclass(frozen=True)
class PictureBatches(Batches):
    """Pictures of one size, with what is to be found for each.

    Args:
        processor: what makes pixels of pictures.
        labels: the names of the head's outputs, in order.
        problem: ONE_LABEL or MASKS.
    """

    processor: Processor
    labels: tuple[str, ...] = ()
    problem: str = ONE_LABEL

    has_large_inputs: ClassVar[bool] = True

    def read_by(self, reader: Processor) -> Self:
        """Take the processor that reads the rows."""
        return replace(self, processor=reader)

    def check(self, model: object, examples: object) -> None:
        """Check that examples are rows."""
        if not isinstance(examples, Sequence) or not isinstance(next(iter(examples), None), Example | None):
            raise DataError(f"examples is {type(examples).__name__}; give those of data.examples.read_examples")

    def places(self, examples: Sequence[Example]) -> list[str]:
        """Return file and line of each."""
        return [example.where for example in examples]

    def expect(self, examples: Sequence[Example], seed: int, step: int) -> None:
        """See ``Batches.expect``."""
        decoder().expect(examples, self.processor, self._draw(seed, step), self.problem)

    def training_batch(self, examples: Sequence[Example], seed: int, step: int) -> Pictures:
        """Return augmented pictures with what is to be found for each."""
        return self._batch(examples, self._draw(seed, step))

    def collate(self, examples: Sequence[Example]) -> Pictures:
        """Return pictures as they are, with what is to be found for each."""
        return self._batch(examples, None)

    def _draw(self, seed: int, step: int) -> tuple[int, int] | None:
        return None if self.processor.augment == "none" else (seed, step)

    def _batch(self, examples: Sequence[Example], draw: tuple[int, int] | None) -> Pictures:
        made = decoder().made(examples, self.processor, draw, self.problem)
        pixels = torch.from_numpy(np.stack([each for each, _ in made]))
        return Pictures(pixels, self._targets(examples, [classes for _, classes in made]))

    def _targets(self, examples: Sequence[Example], classes: list[np.ndarray | None]) -> torch.Tensor:
        """Return what is to be found for pictures.

        Args:
            classes: of their pixels, where they have masks.
        """
        numbers = {label: number for number, label in enumerate(self.labels)}
        return torch.tensor([target_of(example, self.problem, numbers) for example in examples])

    def shape(self, batch: Pictures) -> BatchShape:
        """Return how many pictures there are."""
        return BatchShape((1,) * len(batch.targets), len(batch.targets))

    def inputs(self, batch: Pictures, device: torch.device) -> Pictures:
        """Return the batch, in host memory: a step has all of its micro-batches' inputs at once."""
        return batch

    def planned_inputs(self, shape: BatchShape, device: torch.device) -> Pictures:
        """Return pictures of zeros."""
        count, p = len(shape.lengths), self.processor
        pixels = torch.zeros(count, 3, p.height, p.width, device=device)
        return Pictures(pixels, torch.zeros(count, dtype=torch.int64, device=device))


@dataclass(frozen=True, eq=False)
class VisionSpec(TransformerSpec):
    """A vision encoder with a head. Its outputs are the head's for each picture [N, C], float32.

    Args:
        size: height and width of all pictures, for a plan.
    """

    size: tuple[int, int] = (224, 224)

    def read_by(self, reader: Processor) -> Self:
        """Take the size of pictures from the processor that reads them."""
        return replace(self, size=(reader.height, reader.width))

    def outputs(self, model: nn.Module, inputs: Pictures) -> torch.Tensor:
        """See the class.

        Raises:
            ModelError: the model takes pictures of its own size alone.
        """
        pixels = inputs.pixels.to(self.device(model))
        logits = model(pixel_values=pixels, **options_of(model, pixels)).logits
        with category("logits"):
            return logits.float()

    def fixed_options(self, method: AdapterMethod) -> Mapping[str, object]:
        """Those of tokens and logits, of which there are none, and of weights that are trained."""
        only = {name: value for name, value in ONLY_BLOCKS.items() if name != "optimizer_in_backward"}
        return only | (dict(TRAINED_WEIGHTS) if method.trains_base else {})

    def planned_model(
        self, method: AdapterMethod, device: torch.device, options: MemoryOptions, shape: BatchShape
    ) -> nn.Module:
        """See ``ModelSpec``."""
        model = meta_copy(self.config, self.quant, self.double_quant, self.compute_dtype, False, self.keep_16bit, ())
        self._check_kind(model)
        method.apply(model)
        if device.type != "meta":
            give_storage(model, device)
        place(model, device, options, trains_base=method.trains_base)
        set_memory_options(model, options)
        return model

    def _check_kind(self, model: nn.Module) -> None:
        """Check that the model is a transformer whose blocks can be recomputed one by one.

        Raises:
            ModelError: it is not, or cannot take pictures of the size.
        """
        name, config = type(model).__name__, of_blocks(model.config)
        depth = getattr(config, "num_hidden_layers", None)
        if not model._supports_attention_backend or len(anatomy.blocks(model)) != depth:
            raise ModelError(
                f"{name} is no plain vision transformer, whose blocks all have one shape; choose DINOv2, "
                "ViT, SigLIP or CLIP"
            )
        with torch.device("meta"):
            pixels = torch.zeros(1, 3, *self.size)
        if next(model.parameters()).is_meta:
            try:
                self.outputs(model, Pictures(pixels, pixels[:, 0]))
            except (ValueError, RuntimeError) as error:
                reason = first_line(error)
                raise ModelError(
                    f"{name} cannot compute pictures of {' x '.join(map(str, self.size))} pixels ({reason}); "
                    "write another data.resolution, or remove it"
                ) from error

    def check_model(self, model: nn.Module, method: AdapterMethod, settings: TrainSettings, batches: Batches) -> None:
        """Set the memory options; the model computes as transformers wrote it, so that there is nothing to compare.

        Raises:
            ModelError: a weight is not finite.
        """
        check_weights(model)
        set_memory_options(model, replace(settings.options, kernels="plain"))
        check_updates_in_backward(model, settings)


def options_of(model: nn.Module, pixels: torch.Tensor) -> dict[str, bool]:
    """Return what tells a model that pictures are not of its own size; DINOv2 sees that itself."""
    size = of_blocks(model.config).image_size
    if tuple(pixels.shape[-2:]) == (tuple(size) if isinstance(size, list | tuple) else (size, size)):
        return {}
    forwards = (each.forward for each in (model, getattr(model, base_path(model))))
    takes = any(_RESIZES in inspect.signature(forward).parameters for forward in forwards)
    return {_RESIZES: True} if takes else {}


def picture_head(
    method: AdapterMethod, labels: tuple[str, ...], processor: Processor, spec: ModelSpec | None
) -> Workload:
    """Return a vision encoder with a head that gives each picture a label.

    Args:
        spec: of the model, for a plan; that of embeddings trains them.
    """
    spec, batches = (spec or VisionSpec()).read_by(processor), PictureBatches(processor, labels)
    return Workload(spec, batches, HeadLoss(ONE_LABEL), method)
