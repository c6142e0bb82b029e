"""Which fused kernels a run computes with: each is tried on the run's own shapes before the first step.

One forward pass shows what they are given; each kind of call is then tried against plain operators (``kernels.trial``).
"""

import logging
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from qlora_lite.errors import TrainingError, first_line
from qlora_lite.experts.packing import described_experts, first_experts
from qlora_lite.experts.routed import routed
from qlora_lite.kernels.attention import row_by_row
from qlora_lite.kernels.block_attention import block_attention
from qlora_lite.kernels.flex_attention import VALUES, flex_attention
from qlora_lite.kernels.gated import GatedMLP, gated
from qlora_lite.kernels.norm import LeanNorm, exact_norm
from qlora_lite.kernels.packed_attention import FORWARD, packed_attention, sequence_ends
from qlora_lite.kernels.trial import Trial, choose, foreign_errors, timed
from qlora_lite.memory.shapes import has_triton
from qlora_lite.models.kernels import EXPERTS, FLEX, GATED, kernels_of, use_kernels
from qlora_lite.offload.around import wrappers

from .forward import Inputs, hidden_states
from .out_of_memory import is_out_of_memory

log = logging.getLogger("qlora_lite")

SETTING = "memory.kernels"
TRIED_TOKENS = 2048  # of an MLP, whose products are large
CHECKED_ROWS, CHECKED_LENGTHS, CHECKED_WINDOW = 64, (100, 37, 100, 5), 33  # in float64
CHECKED_TOKENS, CHECKED_FLEX_WINDOW = 300, 150  # of a sequence: some blocks of keys are seen whole, and some in part
Function = Callable[..., torch.Tensor]


def choose_kernels(model: nn.Module, inputs: Inputs) -> None:
    """Leave a model those of its kernels (``models.kernels``) that are no worse than plain operators; say why.

    None where the same bits are wanted each time: which one is faster may change from one run to the next.

    Args:
        inputs: the largest micro-batch, on a GPU.

    Raises:
        RuntimeError: memory ran out.
    """
    if torch.are_deterministic_algorithms_enabled():
        use_kernels(model, ())
        return
    kept = set(kernels_of(model))
    use_kernels(model, kept - {EXPERTS, GATED})
    try:
        with _gated_products(model) as products, _Calls() as calls:
            for each in _micro_batches(inputs):
                norms, experts = _seen(model, each)
        if EXPERTS in kept and not (experts and has_triton() and _experts_are_better(*experts[0])):
            kept.discard(EXPERTS)
        if not norms or not all([_norm_is_better(*seen) for seen in norms]):  # each of them says how it is
            kept.discard("norms")
        if not calls.packed or not all([_is_better_packed(*call) for call in calls.packed.values()]):
            kept.discard("sequences")
        if not calls.flex or not all([_flex_is_better(*call) for call in calls.flex.values()]):
            kept.discard(FLEX)
        if GATED in kept and not (products and all([_gated_is_better(product) for product in products.values()])):
            kept.discard(GATED)
    except foreign_errors() as error:
        if is_out_of_memory(error):
            raise
        log.info("%s: fused kernels do not run here (%s)", SETTING, first_line(error))
        kept.clear()
    use_kernels(model, kept)


def _micro_batches(inputs: Inputs) -> list[Inputs]:
    """Return the largest micro-batch, and if it is one sequence its halves too: smaller ones may have several.

    Not the halves alone, which may be no longer than a window.
    """
    longest, *others = inputs.row_lengths
    if others or longest == 1:
        return [inputs]
    halves = longest // 2, longest - longest // 2
    return [inputs, inputs._replace(row_lengths=halves, row_ends=sequence_ends(halves, inputs.input_ids.device))]


def check_kernels(model: nn.Module, names: Collection[str], inputs: Inputs) -> None:
    """Run the kernels of a run that is resumed once, on a GPU.

    Args:
        names: of those that it computed with; ``use_kernels`` was given them.

    Raises:
        TrainingError: they do not run here any more.
    """
    reason = "liger-kernel is not installed" if {*names} - kernels_of(model) else ""
    if {EXPERTS, FLEX} & {*names} and not has_triton():
        reason = "they need Triton, and a GPU of compute capability 8.0 or later"
    try:
        for each in _micro_batches(inputs):
            _seen(model, each)
    except foreign_errors() as error:
        if is_out_of_memory(error):
            raise
        reason = first_line(error)
    if reason:
        raise TrainingError(
            f"{SETTING}: the run began with fused kernels ({', '.join(sorted(names))}), which do not run here any more "
            f"({reason}). Install what it began with (torch, triton and a C compiler, liger-kernel), or resume with "
            f"{SETTING}=plain and --force, which rounds otherwise"
        )


def _seen(model: nn.Module, inputs: Inputs) -> tuple[list, list]:
    """Run a model once; return a norm of each kind with its input, and packed or adapted experts with theirs.

    Of a kind's norms the last one is returned, of its tiles the last of the largest: the first blocks may be streamed.
    """
    norms: dict[tuple, tuple[LeanNorm, torch.Tensor]] = {}

    def note(norm: LeanNorm, given: tuple) -> None:
        x, kind = given[0].detach(), (type(norm.inner), len(norm.weight))
        if kind not in norms or x.numel() >= norms[kind][1].numel():
            norms[kind] = norm, x

    handles = [norm.register_forward_pre_hook(note) for norm in wrappers(model, LeanNorm) if norm.fused]
    experts = []
    if (first := first_experts(model)) is not None:
        handles.append(first.register_forward_pre_hook(lambda module, given: experts.append((module, *given))))
    was_training = model.training
    try:
        with torch.no_grad():
            hidden_states(model.eval(), inputs)
    finally:
        model.train(was_training)
        for handle in handles:
            handle.remove()
    return list(norms.values()), experts


@contextmanager
def _gated_products(model: nn.Module) -> Iterator[dict[tuple, torch.Tensor]]:
    """Note a product of a gated MLP of each kind."""
    products: dict[tuple, torch.Tensor] = {}

    def note(down: nn.Module, given: tuple) -> None:
        product = given[0].flatten(0, -2)[:TRIED_TOKENS]
        products.setdefault((product.dtype, product.shape[-1]), torch.empty_like(product))

    handles = [mlp.down_proj.register_forward_pre_hook(note) for mlp in wrappers(model, GatedMLP)]
    try:
        yield products
    finally:
        for handle in handles:
            handle.remove()


class _Calls(TorchDispatchMode):
    """Note one call of each kind: of packed attention query, key and value [T, H, D], scale, window and lengths, those
    of the last call; of flex attention its operator's arguments, while plain operators compute its result."""

    def __init__(self):
        super().__init__()
        self.packed: dict[tuple, tuple] = {}
        self.flex: dict[tuple, tuple] = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.overloadpacket is FORWARD:
            left = kwargs.get("window_size_left")
            settings = kwargs.get("scale"), None if left is None else left + 1
            self.packed[args[0].shape, args[1].shape, *settings] = args[:3], *settings, args[3].diff().tolist()
        if function.overloadpacket is VALUES:
            query, key, value, sinks, lengths, scaling, window, softcap = args
            self.flex.setdefault((query.shape, key.shape, scaling, window, softcap), args)
            return block_attention(query, key, value, lengths, scaling, window, softcap, sinks).transpose(1, 2)
        return function(*args, **(kwargs or {}))


def _norm_is_better(norm: LeanNorm, x: torch.Tensor) -> bool:
    few = x.reshape(-1, x.shape[-1])[:CHECKED_ROWS]

    def attempt(fused: bool) -> Trial:
        norm.fused = fused
        return _tried(norm, [x], norm, [few], lambda x: exact_norm(norm, x))

    return choose(SETTING, ("the plain norm", False), {"torch's fused norm": True}, attempt, False) is not None


def _is_better_packed(tensors: Sequence[torch.Tensor], scaling, window: int | None, lengths: Sequence[int]) -> bool:
    tensors = [tensor[None].transpose(1, 2) for tensor in tensors]
    few_lengths = [min(pair) for pair in zip(lengths, CHECKED_LENGTHS, strict=False)]
    few = [tensor[:, :, : sum(few_lengths)] for tensor in tensors]
    few_window = window and min(window, CHECKED_WINDOW)

    def one_by_one(lengths: Sequence[int], window: int | None) -> Function:
        return lambda q, k, v: row_by_row(q, k, v, lengths, scaling, window, 0.0)

    def at_once(lengths: Sequence[int], window: int | None) -> Function:
        ends = sequence_ends(lengths, tensors[0].device)
        return lambda q, k, v: packed_attention(q, k, v, ends, lengths, scaling, window).transpose(1, 2)

    def attempt(way: Callable[..., Function]) -> Trial:
        exact = lambda q, k, v: block_attention(q, k, v, few_lengths, scaling, few_window)  # noqa: E731
        return _tried(way(lengths, window), tensors, way(few_lengths, few_window), few, exact)

    ours, others = ("attention to one sequence after the other", one_by_one), {"packed attention": at_once}
    return choose(SETTING, ours, others, attempt, False) is not None


def _flex_is_better(query, key, value, sinks, lengths: Sequence[int], scaling, window: int | None, softcap) -> bool:
    few_lengths: list[int] = []
    for length in lengths:
        if sum(few_lengths) <= CHECKED_TOKENS:
            few_lengths.append(min(length, CHECKED_TOKENS))
    few = [tensor[:, :, : sum(few_lengths)] for tensor in (query, key, value)]
    few_window = window and min(window, CHECKED_FLEX_WINDOW)

    def computed(way: Function, lengths: Sequence[int], window: int | None) -> Function:
        return lambda *tensors: way(*tensors, lengths, scaling, window, softcap, sinks)

    def attempt(way: Function) -> Trial:
        of_few = computed(way, few_lengths, few_window)
        exact = computed(block_attention, few_lengths, few_window)
        return _tried(computed(way, lengths, window), (query, key, value), of_few, few, exact)

    ours, others = ("attention block by block", block_attention), {"flex attention": flex_attention}
    return choose(SETTING, ours, others, attempt, False) is not None


def _gated_is_better(product: torch.Tensor) -> bool:
    """Return whether Liger's kernels are the better ones for factors of a product's shape, of random numbers."""
    generator = torch.Generator(product.device).manual_seed(0)
    factors = [torch.empty_like(product).normal_(generator=generator) for _ in range(2)]
    few = [factor.reshape(-1, factor.shape[-1])[:CHECKED_ROWS] for factor in factors]

    def attempt(fused: bool) -> Trial:
        # of copies, since Liger's writes gradients over them
        function = lambda gate, up: gated(gate.clone(), up.clone(), fused)  # noqa: E731
        return _tried(function, factors, function, few, lambda gate, up: gate.sigmoid() * gate * up)

    return choose(SETTING, ("a gated product in parts", False), {"Liger's gated product": True}, attempt) is not None


def _experts_are_better(experts: nn.Module, hidden: torch.Tensor, chosen: torch.Tensor, weights: torch.Tensor) -> bool:
    """Return whether a block's own experts are the better ones in groups, on what it was given.

    Both ways are compared with one expert after the other in float32, all rows of it. LoRA weights are random ones for
    that: beside a B of zeros, as it begins, A has no gradient.
    """
    described, given = described_experts(experts)
    if chosen.numel() < described.up.shape[0]:
        return False
    given = [tensor.to(hidden.device) for tensor in given]  # of a block whose weights are streamed
    end, generator = len(given) - described.lora_tensors, torch.Generator(hidden.device).manual_seed(0)
    frozen = given[:end]
    lora = [torch.empty_like(tensor).normal_(0, 0.02, generator=generator) for tensor in given[end:]]

    def computed(grouped: bool, dtype: torch.dtype) -> Function:
        own = described._replace(grouped=grouped)
        biases = [bias.to(dtype) for bias in frozen[-2:]] if described.has_bias else []
        tensors = [*frozen[: len(frozen) - len(biases)], *biases]
        return lambda hidden, weights, *lora: routed(
            hidden.to(dtype), chosen, weights.to(dtype), own, [*tensors, *lora]
        )

    def attempt(grouped: bool) -> Trial:
        way, inputs = computed(grouped, hidden.dtype), [hidden, weights, *lora]
        return _tried(way, inputs, way, inputs, computed(False, torch.float32))

    ours, others = ("one expert after the other", False), {"the experts' grouped kernel": True}
    return choose(SETTING, ours, others, attempt, False) is not None


def _tried(
    function: Function,
    tensors: Sequence[torch.Tensor],
    of_few: Function,
    few: Sequence[torch.Tensor],
    exact: Function,
) -> Trial:
    """Time a function of the run's tensors, and compare it on a few numbers with the exact one in float64."""
    took = timed(lambda: _value_and_gradients(function, tensors), tensors[0].device)
    found = _value_and_gradients(of_few, few)
    wanted = _value_and_gradients(exact, [tensor.double() for tensor in few])
    value, *gradients = (float((a - b).norm() / b.norm()) for a, b in zip(found, wanted, strict=True))
    return Trial(*took, value, max(gradients))


def _value_and_gradients(function: Function, tensors: Sequence[torch.Tensor]) -> tuple[torch.Tensor, ...]:
    inputs = [tensor.detach().requires_grad_() for tensor in tensors]
    with torch.enable_grad():
        out = function(*inputs)
    generator = torch.Generator(out.device).manual_seed(0)
    upstream = (
        torch.empty(out.shape, device=out.device).normal_(generator=generator).bfloat16()
    )  # the same in each type
    return out.detach(), *torch.autograd.grad(out, inputs, upstream.to(out.dtype))
