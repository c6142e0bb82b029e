"""Train a denoiser: latents are given noise, and the model says which it was.

An example is one picture and one sequence of length 1: all texts of a run have one length, and pictures, of which a
plan takes the largest, about one area, so that memory depends on how many there are. Those of other aspect ratios in a
micro-batch run one shape after the other. Text encoders and autoencoder have done their part before (``latents``).

With x the latents, e noise of a standard normal distribution, and (a, s) how much there is of either at a timestep t:

    noisy = a x + s e
    epsilon:  target = e           a = sqrt(p), s = sqrt(1 - p), p the product of 1 - beta up to t
    v:        target = a e - s x   the same
    flow:     target = e - x       a = 1 - s, t = 1000 s

The loss of a picture is the mean square of the difference over its latents, times a weight that depends on t. Noise and
timesteps follow from the seed, the step and the example's number alone: not from its place in a micro-batch, or how
many there are, so that a step is the same however it is cut, and a resumed run draws what it would have drawn.
(diffusers' training scripts draw from one generator for all.) Evaluations draw the same each time.

Sources: DDPM, arXiv 2006.11239; v, arXiv 2202.00512; rectified flow with its sampling and weights, arXiv 2403.03206,
section 3; min-SNR, arXiv 2303.09556.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import ClassVar, Generic, NamedTuple, Self, TypeVar

import numpy as np
import torch
from torch import nn

from qlora_lite.adapters.files import Lora
from qlora_lite.adapters.lora.inject import blocks_of, in_blocks, linear_layers
from qlora_lite.adapters.method import AdapterMethod
from qlora_lite.constraints import STREAMED_TRAINED
from qlora_lite.data.tokens.batch import Extent
from qlora_lite.errors import DataError, ModelError, TrainingError, require_one_of
from qlora_lite.kernels.fused_attention import PlannedKernels
from qlora_lite.models.memory_options import MemoryOptions, place, set_memory_options, trained_on_host
from qlora_lite.models.skeleton import give_storage
from qlora_lite.offload.checkpoint import sequence_alone
from qlora_lite.train.batches import Batches, BatchShape
from qlora_lite.train.model_spec import ONLY_BLOCKS, TRAINED_WEIGHTS, ModelSpec
from qlora_lite.train.objective import LossSum, Objective
from qlora_lite.train.settings import TrainSettings
from qlora_lite.train.workload import Workload

from .denoisers import (
    TIMESTEPS,
    Conditions,
    DenoiserModel,
    DenoiserSpec,
    blocks_alike,
    count_blocks,
    meta_denoiser,
    skeleton_of,
    with_depth,
)
from .latents import LatentExample, LatentSet, LatentShapes, check_shapes, stacked

EPSILON, V, FLOW = "epsilon", "v", "flow"
UNIFORM, LOGIT_NORMAL = "uniform", "logit_normal"
PLAIN, MIN_SNR, SIGMA_SQRT, COSMAP = "none", "min_snr", "sigma_sqrt", "cosmap"
EVALUATION = 0, 0  # seed and step that evaluations draw by; steps count from 1
_LEAST_FLOW = 1e-4  # of the noise, so that no weight is infinite


Number = TypeVar("Number")  # float, or of a batch a tensor


class Draw(NamedTuple, Generic[Number]):
    """What is drawn for a picture beside its noise: its timestep, how much of latents and noise it has, its weight."""

    timestep: Number
    signal: Number
    noise: Number
    weight: Number


class Noised(NamedTuple):
    """A batch, in host memory: latents and noise [N, C, H, W], what a ``Draw`` has [N], and conditions.

    ``others``: pictures of other shapes, likewise.
    """

    latents: torch.Tensor
    noise: torch.Tensor
    draws: Draw[torch.Tensor]  # float32 [N]
    conditions: Conditions
    others: tuple["Noised", ...] = ()

    @property
    def parts(self) -> tuple["Noised", ...]:
        """Batches of one shape each."""
        return self, *self.others

    @property
    def pictures(self) -> int:
        """How many pictures there are."""
        return sum(len(part.latents) for part in self.parts)


@dataclass(frozen=True)
class DenoisingLoss(Objective):
    """The mean square of what the model predicts less what it is to predict.

    Args:
        prediction: "epsilon" (SD 1.5, SDXL, PixArt), "v" (SD 2), or "flow" (SD3, FLUX).
        sampling: of timesteps: "uniform", or "logit_normal", which has more in the middle.
        logit_mean, logit_std: of the normal distribution whose logistic function is sampled.
        shift: of flow: more noise at each timestep, for larger pictures; s becomes shift s / (1 + (shift - 1) s).
        weighting: "none"; of epsilon and v "min_snr"; of flow "sigma_sqrt" or "cosmap".
        min_snr_gamma: the largest ratio of signal and noise that counts.
        schedule, beta_start, beta_end: of epsilon and v: betas grow in a straight line ("linear") or their roots do
            ("scaled_linear").
    """

    prediction: str = EPSILON
    sampling: str = UNIFORM
    logit_mean: float = 0.0
    logit_std: float = 1.0
    shift: float = 1.0
    weighting: str = PLAIN
    min_snr_gamma: float = 5.0
    schedule: str = "scaled_linear"
    beta_start: float = 0.00085
    beta_end: float = 0.012

    is_likelihood: ClassVar[bool] = False

    def __post_init__(self):
        require_one_of("prediction", self.prediction, (EPSILON, V, FLOW))
        require_one_of("sampling", self.sampling, (UNIFORM, LOGIT_NORMAL))
        fitting = (PLAIN, SIGMA_SQRT, COSMAP) if self.prediction == FLOW else (PLAIN, MIN_SNR)
        require_one_of("weighting", self.weighting, fitting)
        require_one_of("schedule", self.schedule, ("linear", "scaled_linear"))
        if not (0 < self.shift < math.inf and self.logit_std > 0 and self.min_snr_gamma > 0):
            raise ModelError("shift, logit_std and min_snr_gamma are above 0")
        if not 0 < self.beta_start <= self.beta_end < 1:
            raise ModelError(
                f"a scheduler's betas rise between 0 and 1, and these are from {self.beta_start} to "
                f"{self.beta_end}; fetch the pipeline again"
            )
        if self.shift != 1 and self.prediction != FLOW:
            raise ModelError(f"shift is for the prediction {FLOW}: set it to 1")

    @property
    def name(self) -> str:
        """What a run's record calls it."""
        return f"denoising ({self.prediction})"

    def draw(self, generator: torch.Generator) -> Draw:
        """Draw a timestep."""
        if self.sampling == UNIFORM:
            place = float(torch.rand((), dtype=torch.float64, generator=generator))
        else:
            normal = float(torch.randn((), dtype=torch.float64, generator=generator))
            place = 1 / (1 + math.exp(-(self.logit_mean + self.logit_std * normal)))
        return self.at(place)

    def at(self, place: float) -> Draw:
        """Return what belongs to a place between 0, no noise, and 1."""
        if self.prediction == FLOW:
            noise = max(_LEAST_FLOW, self.shift * place / (1 + (self.shift - 1) * place))
            return Draw(TIMESTEPS * noise, 1 - noise, noise, self._flow_weight(noise))
        timestep = min(int(place * TIMESTEPS), TIMESTEPS - 1)
        kept = _kept_signal(self.schedule, self.beta_start, self.beta_end)[timestep]
        return Draw(timestep, math.sqrt(kept), math.sqrt(1 - kept), self._snr_weight(kept / (1 - kept)))

    def _flow_weight(self, noise: float) -> float:
        if self.weighting == SIGMA_SQRT:
            return noise**-2
        return 2 / (math.pi * (1 - 2 * noise + 2 * noise**2)) if self.weighting == COSMAP else 1.0

    def _snr_weight(self, snr: float) -> float:
        if self.weighting == PLAIN:
            return 1.0
        return min(snr, self.min_snr_gamma) / (snr if self.prediction == EPSILON else snr + 1)

    def target(self, latents: torch.Tensor, noise: torch.Tensor, draws: Draw) -> torch.Tensor:
        """Return what the model is to predict, [N, C, H, W]."""
        if self.prediction == EPSILON:
            return noise
        if self.prediction == FLOW:
            return noise - latents
        return _each(draws.signal) * noise - _each(draws.noise) * latents

    def __call__(self, model: nn.Module, outputs: torch.Tensor, inputs: Noised) -> LossSum:
        """Return the sum of the pictures' losses; their unweighted ones are reported where weights differ."""
        target = self.target(inputs.latents, inputs.noise, inputs.draws)
        squares = (outputs.float() - target).square().flatten(1).mean(1)
        metrics = {} if self.weighting == PLAIN else {"unweighted_loss": squares.detach().sum()}
        return LossSum((squares * inputs.draws.weight).sum(), metrics)

    def loss(self, model: DenoiserModel, spec: ModelSpec, inputs: Noised) -> LossSum:
        """Return the sum of the losses of the pictures."""
        found = []
        for number, part in enumerate(inputs.parts):
            with sequence_alone(number):  # what is stored of one shape is not that of another
                found.append(super().loss(model, spec, on_device(part, spec.device(model))))
        first, *others = found
        for each in others:
            metrics = {name: value + each.metrics[name] for name, value in first.metrics.items()}
            first = LossSum(first.sum + each.sum, metrics)
        return first

    def weight(self, inputs: Noised) -> float:
        """Return how many pictures there are."""
        return inputs.pictures


@lru_cache
def _kept_signal(schedule: str, start: float, end: float) -> list[float]:
    """Return the products of 1 - beta, rounded to float32 as in diffusers."""
    if schedule == "linear":
        betas = torch.linspace(start, end, TIMESTEPS)
    else:
        betas = torch.linspace(start**0.5, end**0.5, TIMESTEPS) ** 2
    return (1 - betas).cumprod(0).tolist()


def _each(numbers: torch.Tensor) -> torch.Tensor:
    """Return a number for each picture so that it multiplies all of it."""
    return numbers[:, None, None, None]


@lru_cache
def _pattern(spec: DenoiserSpec, method: AdapterMethod) -> tuple[int, int] | None:
    """Return what ``ModelSpec.pattern`` does; None where no two blocks are known to be alike."""
    model, lists = meta_denoiser(spec), list(blocks_alike(spec).values())
    kinds = method.layer_kinds(list(linear_layers(model)), (), in_blocks(model))
    adapted = [
        {name.removeprefix(path): kind for name, kind in kinds.items() if name.startswith(f"{path}.")}
        for path in blocks_of(model)
    ]
    are_alike = lists and all(each == adapted[-1] for each in adapted[lists[-1] :])
    return (lists[-1], 1) if are_alike else None


@dataclass(frozen=True)
class LatentBatches(Batches):
    """Latents with noise, drawn anew for each step.

    Args:
        shapes: of the examples, with the largest latents; see ``latents.shapes_of``.
        draws: the objective, which draws timesteps.
        dtype: that the model computes in.
        caption_dropout: share of examples that are told ``neutral`` in training, drawn anew in each step.
        pixels_per_latent: of the edge of a latent, which sizes of pictures follow from.
        neutral: an example whose text (or class) is none.
    """

    shapes: LatentShapes
    draws: DenoisingLoss
    dtype: torch.dtype
    caption_dropout: float = 0.0
    pixels_per_latent: int = 1
    neutral: LatentExample | None = None

    has_large_inputs: ClassVar[bool] = True

    def check(self, model: object, examples: object) -> None:
        """Check that all examples have the shapes of the run.

        Raises:
            DataError: one has not.
        """
        if not isinstance(examples, Sequence) or not isinstance(next(iter(examples), None), LatentExample | None):
            raise DataError(f"examples is {type(examples).__name__}; give a list of data.latents.LatentExample")
        check_shapes(examples[:1] if isinstance(examples, LatentSet) else examples, self.shapes)

    def places(self, examples: Sequence[LatentExample]) -> list[str]:
        """See ``Batches``."""
        return [example.place for example in examples]

    def enlarged(self, examples: Sequence[LatentExample], most: Extent) -> Sequence[LatentExample]:
        """Return pictures of the largest shape."""
        largest: np.ndarray = np.zeros(self.shapes.latents, np.float32)
        return [replace(example, latents=largest) for example in examples]

    def collate(self, examples: Sequence[LatentExample]) -> Noised:
        """Return pictures with noise that is the same at each evaluation."""
        return self._batch(examples, *EVALUATION, 0.0)

    def training_batch(self, examples: Sequence[LatentExample], seed: int, step: int) -> Noised:
        """Return pictures with the noise of a step."""
        return self._batch(examples, seed, step, self.caption_dropout)

    def _batch(self, examples: Sequence[LatentExample], seed: int, step: int, dropout: float) -> Noised:
        shapes: dict[tuple[int, ...], list[LatentExample]] = {}
        for example in examples:
            shapes.setdefault(example.latents.shape, []).append(example)
        first, *others = (self._of_one_shape(group, seed, step, dropout) for group in shapes.values())
        return first._replace(others=tuple(others))

    def _of_one_shape(self, examples: Sequence[LatentExample], seed: int, step: int, dropout: float) -> Noised:
        draws, noise, told = [], [], []
        neutral = self.neutral if dropout else None
        for example in examples:
            generator = _generator(seed, step, example.number)
            draws.append(self.draws.draw(generator))
            noise.append(torch.randn(example.latents.shape, generator=generator))
            is_left_out = neutral and float(torch.rand((), generator=generator)) < dropout
            told.append(replace(neutral, sizes=example.sizes) if neutral and is_left_out else example)
        latents = torch.from_numpy(np.stack([example.latents for example in examples]))
        numbers = Draw(*(torch.tensor(column, dtype=torch.float32) for column in zip(*draws, strict=True)))
        return Noised(latents.float(), torch.stack(noise), numbers, conditions_of(told, self.dtype))

    def shape(self, batch: Noised) -> BatchShape:
        """Return how many pictures there are."""
        return BatchShape((1,) * batch.pictures, batch.pictures)

    def inputs(self, batch: Noised, device: torch.device) -> Noised:
        """Return the batch, in host memory: a step has all of its micro-batches' inputs at once."""
        return batch

    def planned_inputs(self, shape: BatchShape, device: torch.device) -> Noised:
        """Return a batch of zeros."""

        def zeros(each: tuple[int, ...] | None, dtype: torch.dtype = torch.float32) -> torch.Tensor | None:
            return None if each is None else torch.zeros(len(shape.lengths), *each, dtype=dtype, device=device)

        s, dtype = self.shapes, self.dtype
        told = zeros(s.text, dtype), zeros(s.pooled, dtype), zeros(s.mask, dtype), zeros(s.sizes)
        conditions = Conditions(*told, zeros(s.labels, torch.int64))
        return Noised(zeros(s.latents), zeros(s.latents), Draw(*(zeros(()) for _ in Draw._fields)), conditions)


def on_device(inputs: Noised, device: torch.device) -> Noised:
    """Return pictures of one shape on a device."""
    draws = Draw(*(numbers.to(device) for numbers in inputs.draws))
    conditions = Conditions(*(None if each is None else each.to(device) for each in inputs.conditions))
    return Noised(inputs.latents.to(device), inputs.noise.to(device), draws, conditions)


@dataclass(frozen=True)
class DiffusersSpec(ModelSpec):
    """A denoiser of diffusers; its outputs are what it predicts [N, C, H, W].

    Args:
        base: see ``denoisers.spec_of``.
    """

    base: DenoiserSpec

    name: ClassVar[str] = "denoiser"

    def outputs(self, model: DenoiserModel, inputs: Noised) -> torch.Tensor:
        """Return what it predicts for noisy latents."""
        noisy = _each(inputs.draws.signal) * inputs.latents + _each(inputs.draws.noise) * inputs.noise
        return model(noisy.to(self.compute_dtype), inputs.draws.timestep, inputs.conditions)

    def check(self, model: object) -> None:
        """Check that it is a denoiser.

        Raises:
            ModelError: it is not.
        """
        if not isinstance(model, DenoiserModel):
            raise ModelError(
                f"a denoiser is wanted, not {type(model).__name__}; models.denoisers.load_denoiser loads one"
            )

    def fixed_options(self, method: AdapterMethod) -> Mapping[str, object]:
        """See ``ModelSpec``: blocks take more than one tensor, so that none goes on where another ended."""
        found = {**ONLY_BLOCKS, "layers_per_checkpoint": 1, "stream_from": "host"}
        found |= dict(TRAINED_WEIGHTS) if method.trains_base else {}
        return found if skeleton_of(self.base).can_stream else {**found, "resident_layers": None}

    @property
    def depth(self) -> int:
        """The model's blocks."""
        return count_blocks(self.base)

    @property
    def blocks_before(self) -> Mapping[str, int]:
        """See ``denoisers.blocks_alike``."""
        return blocks_alike(self.base)

    def pattern(self, method: AdapterMethod) -> tuple[int, int]:
        """See ``ModelSpec``: the last list's blocks are alike, where they are adapted alike."""
        return _pattern(self.base, method) or super().pattern(method)

    def at_depth(self, depth: int) -> Self:
        """See ``ModelSpec``."""
        return self if depth == self.depth else replace(self, base=with_depth(self.base, depth))

    @property
    def compute_dtype(self) -> torch.dtype:
        """Of the spec."""
        return self.base.compute_dtype

    @property
    def is_quantized(self) -> bool:
        """Whether any weight is packed."""
        return self.base.quant != "none"

    def planned_model(
        self, method: AdapterMethod, device: torch.device, options: MemoryOptions, shape: BatchShape
    ) -> DenoiserModel:
        """See ``ModelSpec``."""
        model = meta_denoiser(self.base)
        method.apply(model)
        if device.type != "meta":
            give_storage(model, device)
        place(model, device, options, self.blocks(model), trains_base=method.trains_base)
        set_memory_options(model, options, self.blocks(model))
        if device.type == "meta":
            for module in (*self.blocks(model), *model.attention_outside()):
                PlannedKernels().during(module)
        return model

    def blocks(self, model: DenoiserModel) -> list[nn.Module]:
        """See ``denoisers``."""
        return [model.get_submodule(path) for path in model.block_paths()]

    def check_model(
        self, model: DenoiserModel, method: AdapterMethod, settings: TrainSettings, batches: Batches
    ) -> None:
        """Set the memory options; the model computes as diffusers wrote it, so that there is nothing to compare.

        Raises:
            TrainingError: it computes in float16, whose gradients would underflow, or streams weights that are trained.
        """
        if self.compute_dtype == torch.float16:
            raise TrainingError("denoisers are trained in bfloat16 or float32: set model.compute_dtype to one of them")
        if trained_on_host(model):
            raise TrainingError(
                f"{STREAMED_TRAINED}, and a denoiser's are updated together; set memory.resident_layers to all"
            )
        set_memory_options(model, replace(settings.options, kernels="plain"), self.blocks(model))


def denoiser(
    spec: DenoiserSpec,
    shapes: LatentShapes,
    objective: DenoisingLoss | None = None,
    method: AdapterMethod | None = None,
    caption_dropout: float = 0.0,
    pixels_per_latent: int = 1,
) -> Workload:
    """Return a denoiser that learns from latents.

    Args:
        spec: of the model; see ``denoisers.spec_of``.
        shapes, caption_dropout, pixels_per_latent: see ``LatentBatches``.
        objective: None predicts the noise.
        method: None is LoRA.
    """
    objective = objective or DenoisingLoss()
    batches = LatentBatches(shapes, objective, spec.compute_dtype, caption_dropout, pixels_per_latent)
    return Workload(DiffusersSpec(spec), batches, objective, method or Lora())


def conditions_of(examples: Sequence[LatentExample], dtype: torch.dtype) -> Conditions:
    """Return what a denoiser is told of some examples, in the type that it computes in."""
    text, pooled, mask, sizes, labels = (stacked(examples, name) for name in LatentShapes._fields[1:])
    text, pooled, mask = (None if each is None else each.to(dtype) for each in (text, pooled, mask))
    return Conditions(text, pooled, mask, sizes, labels)


def _generator(seed: int, step: int, number: int) -> torch.Generator:
    """Return a random generator for one example in one step."""
    mixed = np.random.SeedSequence((seed, step, number)).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(mixed))
