"""Run a base model in many variants at once that differ in which of its weights are in 4 bit, a block at a time.

Each block's 16-bit weights are read from the model's files and quantised, and the hidden states of every variant go
through the block with the weights that it has there. In memory are one block in 16 bit and once more dequantised, the
largest table (twice while the forward is checked), and the hidden states of all variants on the host, so that the
16-bit model may be larger than the machine. A model that computes something between its blocks is refused. Rows that
the device has no room for at once go through in several passes, each of which reads the files. A variant that has had
no other weights so far shares the hidden states of the 4-bit model: one that has its 16 bit in block j is computed from
block j on.

Legend: T tokens, N target tokens, D hidden size.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import NamedTuple

import torch
from torch import nn

from qlora_lite.adapters.lora.inject import in_blocks, linear_layers
from qlora_lite.data.tokens.batch import Batch
from qlora_lite.errors import DoesNotFitError, ModelError, RecipeError
from qlora_lite.experts.packing import expert_weights
from qlora_lite.kernels.loss import Head, head_logits
from qlora_lite.memory.meter import free_bytes, held_bytes
from qlora_lite.models.anatomy import blocks, decoder, head
from qlora_lite.models.kept import check_kept, kept_layers
from qlora_lite.models.load import adopt, resolve_device, stored_quantization
from qlora_lite.models.locate import locate
from qlora_lite.models.nested import without_weights
from qlora_lite.models.packing import runs_unpacked
from qlora_lite.models.skeleton import read_part
from qlora_lite.models.streamed import Read, streamed_model
from qlora_lite.models.tokenizer import load_tokenizer
from qlora_lite.models.weights import open_weights
from qlora_lite.planning.answering import UNPLANNED, memory_to_use, prompt_bytes
from qlora_lite.planning.meta_results import NeedsValuesError
from qlora_lite.prepare.datasets import build_data
from qlora_lite.prepare.settings import train_settings
from qlora_lite.prepare.task import find_task
from qlora_lite.quant.formats import FOUR_BIT
from qlora_lite.quant.linear import is_conv1d
from qlora_lite.quant.nf4 import dequantize, empty_packed, quantize
from qlora_lite.recipe.schema import Recipe
from qlora_lite.train.causal_lm import TextBatches, causal_lm
from qlora_lite.train.forward import hidden_states
from qlora_lite.train.loop import eval_batches
from qlora_lite.train.text_guards import check_forward, check_shared_keys, logits_error

from .evaluate import Watch

CHUNK_TOKENS = 64  # of logits at once
HOST_SHARE = 0.5  # of the free host memory, that hidden states may take
TIMES_THERE = 3  # that the weights of a block are there at one time: as they are, dequantised, and while packed
SIXTEEN = "16 bit"


class Variant(NamedTuple):
    """A model with some weights in 4 bit: the type of these, and the paths of those that stay in 16 bit."""

    quant: str
    kept: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True)
class Weight:
    """The weight of a linear layer, or of a block's experts, in a model that is read block by block."""

    module: nn.Module
    name: str
    is_transposed: bool

    @property
    def parameter(self) -> nn.Parameter:
        """The weight in 16 bit, while its block is there."""
        return self.module.get_parameter(self.name)

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape [out, in], of experts [E, out, in]."""
        shape = tuple(self.parameter.shape)
        return (*shape[:-2], shape[-1], shape[-2]) if self.is_transposed else shape

    def in_4_bit(self, quant: str, double_quant: bool) -> torch.Tensor:
        """Return the weight as it is after quantisation, in its own type and layout."""
        weight = self.parameter.detach()
        straight = weight.transpose(-1, -2).contiguous() if self.is_transposed else weight
        found = dequantize(quantize(straight, quant, double_quant), straight.shape, weight.dtype, quant)
        return found.transpose(-1, -2) if self.is_transposed else found


def weights_of(model: nn.Module) -> dict[str, Weight]:
    """Return the weights of linear layers and experts inside the blocks by path; the model may be a skeleton.

    Raises:
        ModelError: there are linear layers elsewhere.
    """
    inside, layers = in_blocks(model), linear_layers(model)
    if outside := sorted(layers.keys() - inside):
        raise ModelError(
            f"{type(model).__name__} has linear layers outside of its blocks, such as {outside[0]}: it "
            "cannot be measured block by block"
        )
    found = {path: Weight(layer, "weight", is_conv1d(layer)) for path, layer in layers.items()}
    experts = expert_weights(model).items()
    return found | {path: Weight(each.experts, each.name, each.experts.is_transposed) for path, each in experts}


@dataclass(slots=True)
class _Pass:
    """The hidden states [1, T, D] of all variants while they go through the blocks of a model, on the host.

    Args:
        begun: by name; a variant that is not in it has had the weights of the one called like its type so far.
    """

    variants: Mapping[str, Variant]
    weights: Sequence[Mapping[str, Weight]]
    double_quant: bool
    done: Callable[[int], None]
    begun: dict[str, torch.Tensor] = field(default_factory=dict)

    def advance(self, number: int, block: nn.Module, args: tuple, kwargs: dict, output) -> None:
        """Take every variant through a block; a forward hook of it, while its 16-bit weights are there."""
        here = self.weights[number]
        first = args[0] if args else kwargs["hidden_states"]
        before = self.begun.get(SIXTEEN)
        if before is not None and not _near(first.cpu(), before):  # Zamba's shared transformer
            raise ModelError(
                f"what is computed before {type(block).__name__} {number} is not known: the model cannot "
                "be measured block by block"
            )
        for quant in {variant.quant: None for variant in self.variants.values()}:
            packed = {path: weight.in_4_bit(quant, self.double_quant) for path, weight in here.items()}
            plain = {path: weight.parameter.data for path, weight in here.items()}
            so_far = self.begun.get(quant, first)
            after = {}
            for name, variant in self.variants.items():
                if variant.quant != quant or not (name == quant or name in self.begun or here.keys() & variant.kept):
                    continue
                for path, weight in here.items():
                    weight.parameter.data = (plain if path in variant.kept else packed)[path]
                hidden = self.begun.get(name, so_far).to(first.device)
                new = _computed(block, hidden, args, kwargs)
                after[name] = new.cpu()
            for path, weight in here.items():
                weight.parameter.data = plain[path]
            self.begun |= after
        self.begun[SIXTEEN] = _first(output).cpu()
        self.done(number + 1)

    def ends(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield what each variant has behind the last block; one that keeps nothing is its base."""
        yield SIXTEEN, self.begun[SIXTEEN]
        for name, variant in self.variants.items():
            yield name, self.begun.get(name, self.begun[variant.quant])


def _computed(block: nn.Module, hidden: torch.Tensor, args: tuple, kwargs: dict) -> torch.Tensor:
    """Return what a block gives for other hidden states, with the arguments that it was called with."""
    if args:
        return _first(block.forward(hidden, *args[1:], **kwargs))
    return _first(block.forward(**kwargs | {"hidden_states": hidden}))


def _near(found: torch.Tensor, expected: torch.Tensor) -> bool:
    return torch.allclose(found, expected, rtol=1e-3, atol=1e-3, equal_nan=True)  # of which the logits tell


def _first(output) -> torch.Tensor:
    return output[0] if isinstance(output, tuple) else output


def _finite(name: str, weight: torch.Tensor) -> torch.Tensor:
    if not torch.stack(torch.aminmax(weight)).isfinite().all():
        dtype = str(weight.dtype).removeprefix("torch.")
        raise ModelError(f"{name} holds NaN or infinity in {dtype}: the checkpoint is damaged, or has larger numbers")
    return weight


class _Behind:
    """What a decoder does behind its last block (a norm, in most), found by watching it once."""

    def __init__(self, model: nn.Module, its_blocks: Sequence[nn.Module]):
        holders = [m for m in decoder(model).modules() if any(b in list(m.modules()) for b in its_blocks)]
        inside = {id(part) for block in its_blocks for part in block.modules()}
        self._called: list[nn.Module] | None = None
        self._handles = [its_blocks[-1].register_forward_hook(self._begin)]
        for holder in holders:
            for part in holder.children():
                if part not in holders and id(part) not in inside and not isinstance(part, nn.ModuleList):
                    self._handles.append(part.register_forward_hook(self._note))

    def _begin(self, *_arguments) -> None:
        self._called = []

    def _note(self, module, *_arguments) -> None:
        if self._called is not None:
            self._called.append(module)

    def forget(self) -> None:
        """Stop watching."""
        for handle in self._handles:
            handle.remove()

    def __call__(self, hidden: torch.Tensor) -> torch.Tensor:
        """Return the last hidden states of those behind the last block."""
        for module in self._called or []:
            hidden = module(hidden)
        return hidden


def tokens_at_once(skeleton: nn.Module, lengths: Sequence[int], room_bytes: int, device_type: str, unknown: int) -> int:
    """Return how many tokens of rows can go through a model's blocks together; at least the longest row.

    Args:
        skeleton: on the meta device.
        lengths: of the rows.
        unknown: returned, if it is more than that, where the model cannot be planned.
    """
    most, longest = sum(lengths), max(lengths)
    try:
        while most > longest and UNPLANNED * prompt_bytes(skeleton, most, 1, device_type) > room_bytes:
            most = max(most // 2, longest)
    except NeedsValuesError:
        return max(unknown, longest)
    return most


class StreamedBase:
    """A base model in 16 bit, read from its files block by block, and the rows that it is measured on.

    Args:
        recipe: with evaluation rows, of a 16-bit base model.
        rows: at most, of these.

    Raises:
        RecipeError: the recipe has no evaluation rows, or nothing in 4 bit.
        ModelError: the model is in 4 bit itself, or cannot be measured block by block.
    """

    def __init__(self, recipe: Recipe, rows: int, watch: Watch | None = None):
        m = recipe.model
        if m.quant not in FOUR_BIT:
            raise RecipeError(
                f"model.quant is {m.quant}, so that nothing is quantised: set it to nf4 to see what that costs"
            )
        if not recipe.data.has_eval:
            raise RecipeError("there are no held-out rows to measure on: write data.eval or data.eval_share")
        files, part = locate(m.path, m.revision), read_part(m.path, m.revision)
        if stored_quantization(files.config):
            raise ModelError(
                f"{m.path} is published packed, and what that cost cannot be measured without the 16-bit model"
            )
        check_kept(part.config, m.keep_16bit, m.path)
        self.recipe, self.watch, self.name = recipe, watch, files.name
        self.device, dtype = resolve_device(m.device), find_task(recipe).compute_dtype(recipe, resolve_device(m.device))
        self.skeleton = without_weights(part.config, dtype=dtype)
        check_shared_keys(self.skeleton)
        self.weights, work = weights_of(self.skeleton), causal_lm()
        examples = build_data(recipe, load_tokenizer(m.path, m.revision), "eval").examples[:rows]
        work.check_examples(self.skeleton, examples)
        self.examples, self.dtype = examples, dtype
        stored = open_weights(files, self.skeleton, dtype).reader()
        self._read: Read = lambda name: _finite(name, stored(name).to(self.device, dtype))
        self.model = streamed_model(part.config, self._read, dtype)
        self._fill_buffers(stored)
        check_forward(self.model, max(work.batches.lengths(examples)), partial(logits_error, own=self._head()))
        self.batches: list[Batch] = [work.batches.collate([one]) for one in examples]
        if not runs_unpacked(self.model):
            lengths, plan = work.batches.lengths(examples), adopt(without_weights(part.config, dtype=dtype))
            most = tokens_at_once(plan, lengths, self._room(plan), self.device.type, recipe.data.max_tokens)
            self.batches = [*eval_batches(work, examples, replace(train_settings(recipe), max_tokens=most))]
        self.blocks, own = blocks(self.model), weights_of(self.model)
        paths = {id(block): path for path, block in self.model.named_modules()}
        self.block_paths = [paths[id(block)] for block in self.blocks]
        self._in_block = [
            {path: weight for path, weight in own.items() if path.startswith(f"{block}.")} for block in self.block_paths
        ]

    def _room(self, skeleton: nn.Module) -> int:
        """Return the bytes that the device has for rows, beside the weights that are there at one time."""
        budget, host = self.recipe.memory.budget_bytes, torch.device("cpu")
        if (memory := memory_to_use(self.device, budget)) is None:
            memory = int((1 - HOST_SHARE) * free_bytes(host))
            memory = memory if budget is None else min(memory, budget - held_bytes(host))
        largest = max(sum(weight.nbytes for weight in block.parameters()) for block in blocks(skeleton))
        tables = skeleton.get_input_embeddings().weight, skeleton.get_output_embeddings().weight
        return memory - TIMES_THERE * largest - max(table.nbytes for table in tables)

    def _fill_buffers(self, stored: Read) -> None:
        """Give buffers that files hold (the bias of a router) their values, and bring all to the device."""
        saved = self.model.state_dict().keys()
        for name, buffer in self.model.named_buffers():
            value = stored(name) if name in saved else buffer
            buffer.data = value.to(self.device, buffer.dtype)

    def kept(self, patterns: Sequence[str]) -> frozenset[str]:
        """Return the paths that patterns of ``model.keep_16bit`` name."""
        return frozenset(kept_layers(self.skeleton, patterns))

    def bytes_of(self, paths: frozenset[str], quant: str | None) -> int:
        """Return the bytes of weights by path, in 4 bit or, for None, in 16."""
        shapes = [self.weights[path].shape for path in paths]
        if quant is None:
            return sum(torch.empty(shape, dtype=self.dtype, device="meta").nbytes for shape in shapes)
        packed = [empty_packed(shape, self.recipe.model.double_quant, "meta") for shape in shapes]
        return sum(part.nbytes for parts in packed for part in parts if part is not None)

    @property
    def base_bytes(self) -> int:
        """Return the bytes of the whole model with all its layers in 4 bit."""
        whole = sum(tensor.nbytes for tensor in self.skeleton.parameters())
        return whole - self.more_bytes(frozenset(self.weights))

    def more_bytes(self, paths: frozenset[str]) -> int:
        """Return how many bytes more weights take in 16 bit than in 4."""
        return self.bytes_of(paths, None) - self.bytes_of(paths, "nf4")

    @torch.no_grad()
    def measure(self, variants: Mapping[str, Variant], what: str) -> dict[str, dict[str, float]]:
        """Return loss and KL of each variant, and the loss in 16 bit, by name: in nats, the mean over target tokens.

        Args:
            variants: by name; of each 4-bit type that they have, one that keeps nothing is called like the type.
            what: is done, for ``watch``.

        Raises:
            DoesNotFitError: host memory has no room for the hidden states of all.
        """
        self._check_room(len(variants))
        hidden: dict[str, list[torch.Tensor]] = {}
        targets = []
        for count, batch in enumerate(self.batches):
            inputs = TextBatches().inputs(batch, self.device)
            total = len(self.blocks) * len(self.batches)
            done = partial(self._tell, what, count * len(self.blocks), total)
            here = _Pass(variants, self._in_block, self.recipe.model.double_quant, done)
            behind = _Behind(self.model, self.blocks)
            handles = [
                block.register_forward_hook(partial(self._in_hook, here, number), with_kwargs=True, prepend=True)
                for number, block in enumerate(self.blocks)
            ]
            try:
                expected = hidden_states(self.model, inputs)
            finally:
                for handle in handles:
                    handle.remove()
                behind.forget()
            tokens = sum(inputs.row_lengths)
            for name, state in here.ends():
                last = behind(state.to(self.device))[0, :tokens]
                if name == SIXTEEN and not _near(last, expected):
                    raise ModelError(
                        f"what {type(self.model).__name__} does behind its blocks is not known: it cannot "
                        "be measured block by block"
                    )
                hidden.setdefault(name, []).append(last[inputs.target_positions].cpu())
            targets.append(inputs.targets.cpu())
        return self._compared({name: torch.cat(parts) for name, parts in hidden.items()}, torch.cat(targets))

    @staticmethod
    def _in_hook(here: _Pass, number: int, block, args, kwargs, output) -> None:
        here.advance(number, block, args, kwargs, output)

    def _tell(self, what: str, before: int, total: int, done: int) -> None:
        if self.watch:
            self.watch(what, before + done, total)

    def _check_room(self, variants: int) -> None:
        width, shapes = self.skeleton.get_input_embeddings().weight.shape[1], map(TextBatches().shape, self.batches)
        tokens, targets = zip(*((shape.tokens, shape.targets) for shape in shapes), strict=True)
        states = max(tokens) + sum(targets)  # of one pass, and those at the targets of all
        needed, free = variants * width * states * self.dtype.itemsize, free_bytes(torch.device("cpu"))
        if needed > HOST_SHARE * free:
            fitting = int(len(self.examples) * HOST_SHARE * free / needed)
            raise DoesNotFitError(
                f"the hidden states of {variants} models on {len(self.examples)} rows have no room "
                f"in host memory: --rows {max(1, fitting)}"
            )

    def _compared(self, hidden: Mapping[str, torch.Tensor], targets: torch.Tensor) -> dict[str, dict[str, float]]:
        """Return loss and KL(16 bit || variant) of hidden states [N, D] by name."""
        own = self._head()
        sums = {name: [0.0, 0.0] for name in hidden}
        for start in range(0, len(targets), CHUNK_TOKENS):
            rows = slice(start, start + CHUNK_TOKENS)
            expected, wanted = None, targets[rows].to(self.device)
            for name, states in hidden.items():
                found = torch.log_softmax(head_logits(states[rows].to(self.device), own), dim=-1)
                expected = found if expected is None else expected  # 16 bit is the first
                sums[name][0] += nn.functional.nll_loss(found, wanted, reduction="sum").item()
                if found is not expected:
                    sums[name][1] += (expected.exp() * (expected - found)).sum(dtype=torch.float64).item()
        if wrong := next((name for name, each in sums.items() if not math.isfinite(sum(each))), None):
            dtype = str(self.dtype).removeprefix("torch.")
            raise ModelError(f"{wrong}: logits in {dtype} are not finite; set model.compute_dtype to float32")
        count = len(targets)
        return {name: {"loss": loss / count, "kl": max(0.0, kl / count)} for name, (loss, kl) in sums.items()}

    def _head(self) -> Head:
        """Return the head with its weights, which the model itself has only while it runs."""
        names = {id(parameter): name for name, parameter in reversed([*self.model.named_parameters()])}
        own = head(self.model)
        bias = None if own.bias is None else self._read(names[id(own.bias)])
        return own._replace(weight=self._read(names[id(own.weight)]), bias=bias)
