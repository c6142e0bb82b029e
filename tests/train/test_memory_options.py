"""Every memory option, alone and with others, gives the gradients of the plain step."""

import weakref
from collections import defaultdict
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import replace
from functools import cache
from itertools import chain, combinations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from memory_option_cases import (
    COPYING,
    CPU,
    DEPTH,
    FEW_WORDS,
    FOLDER,
    PLAIN,
    SAME_ARITHMETIC,
    build,
    gradients,
    gradients_in_backward,
    gradients_of_steps,
    losses_without_gradients,
)
from tiny import ARCHITECTURES, UNUSUAL, build_tiny, config_of, quantized_pair, random_batch, random_factors
from tiny_trainer import trainer
from torch.utils._python_dispatch import TorchDispatchMode

from qlora_lite.adapters.lora.inject import add_lora, lora_parameters
from qlora_lite.adapters.lora.layer import LoraLinear
from qlora_lite.errors import ModelError
from qlora_lite.kernels.kept_attention import FUSED
from qlora_lite.memory.marks import marks
from qlora_lite.models.anatomy import blocks
from qlora_lite.models.load import use_row_attention
from qlora_lite.models.memory_options import MemoryOptions, on_host, place, set_memory_options, stream_of
from qlora_lite.models.packing import runs_unpacked
from qlora_lite.models.quantizer import quantize_head
from qlora_lite.models.skeleton import meta_model
from qlora_lite.offload.tile import Tiled
from qlora_lite.quant.linear import QuantLinear
from qlora_lite.quant.nf4 import dequantize, quantize
from qlora_lite.quant.product import keeping_weights
from qlora_lite.train.causal_lm import causal_lm
from qlora_lite.train.forward import prepare
from qlora_lite.train.guards import frozen_checksum
from qlora_lite.train.step import accumulate_gradients, evaluate_loss
from qlora_lite.train.text_guards import check_forward


def assert_close(found, expected):
    for one, other in zip(found, expected, strict=True):
        assert (one - other).norm() <= 1e-5 * other.norm()


@pytest.mark.parametrize("options", SAME_ARITHMETIC, ids=str)
def test_where_tensors_lie_and_whether_they_are_kept_changes_no_bit(options, monkeypatch):
    monkeypatch.setattr("qlora_lite.kernels.loss.TILE_WORDS", FEW_WORDS)
    expected = gradients(build(), PLAIN)
    for one, other in zip(gradients(build(options=options), options), expected, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("on_disk", [False, True])
@pytest.mark.parametrize(
    "more", [{}, {"resident_layers": 1, "uncheckpointed_layers": 1}, {"checkpointing": "selective"}], ids=str
)
def test_block_inputs_of_steps_of_any_length_come_back_from_the_host_or_a_disk(more, on_disk, tmp_path, copies):
    options = MemoryOptions(offload_checkpoints=True, offload_folder=str(tmp_path) if on_disk else None, **more)
    found, expected = gradients_of_steps(build(options=options), options), gradients_of_steps(build(), PLAIN)
    assert all(map(torch.equal, found, expected))


@contextmanager
def on_path_of(device_type):
    """Let attention run as on such a device, a GPU's through torch's fused kernels, and cut the head into slices."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("qlora_lite.kernels.loss.TILE_WORDS", FEW_WORDS)
        for module in ("attention", "fused_attention"):
            patch.setattr(f"qlora_lite.kernels.{module}.device_type", lambda device: device_type)
        yield


@pytest.fixture
def on_path_of_a_card():
    with on_path_of("cuda"):
        yield


@pytest.mark.parametrize("options", COPYING, ids=str)
def test_copies_that_end_late_change_no_bit_of_steps_and_evaluations(options, late_copies, on_path_of_a_card):
    found, expected = (
        gradients_of_steps(build(options=each), each, losses_without_gradients)
        for each in (options, replace(PLAIN, tile_tokens=options.tile_tokens))
    )
    assert all(map(torch.equal, found, expected))


class Kernels(TorchDispatchMode):
    """Count the fused operators of attention that run."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function.overloadpacket in FUSED
        return function(*args, **(kwargs or {}))


WITH_ATTENTION_KEPT = [
    {"offload_checkpoints": True},
    {"uncheckpointed_layers": 1},
    {"tile_tokens": 7},
    {"cache_dequantized": True},
    {"resident_layers": 0, "offload_checkpoints": True},
]
COMPUTED_AGAIN = "gemma2", "falcon"  # its scores are capped, for which there is no kernel; it calls torch's by itself
WITH_WINDOW = "mistral", "gemma3_text"


@pytest.mark.parametrize(
    ("model_type", "changes"),
    [
        *((name, {}) for name in ARCHITECTURES),
        *((name, changes) for name in ("llama", "gemma3_text") for changes in WITH_ATTENTION_KEPT),
    ],
    ids=str,
)
def test_attention_that_is_kept_changes_no_bit_and_runs_once(model_type, changes, on_path_of_a_card):
    found, counts = [], []
    for checkpointing in ("block", "selective"):
        options = MemoryOptions(checkpointing, **changes)
        with Kernels() as kernels:
            found.append(gradients(build(model_type, options), options, batches=1))
        counts.append(kernels.count)
    for one, other in zip(*found, strict=True):
        assert torch.equal(one, other)
    again = (2 if model_type == "gpt2" else DEPTH) - changes.get("uncheckpointed_layers", 0)
    calls = 3 * (3 if model_type in WITH_WINDOW else 1)  # rows, and the parts that a window makes of a row
    assert counts[0] - counts[1] == (0 if model_type in COMPUTED_AGAIN else again * calls)


@pytest.mark.parametrize("checkpointing", ["none", "block"])
@pytest.mark.parametrize("model_type", [*ARCHITECTURES, *UNUSUAL])
def test_tiles_give_the_plain_gradients(model_type, checkpointing):
    options = MemoryOptions(checkpointing, tile_tokens=7)
    found, expected = (gradients(build(model_type), each, batches=1) for each in (options, PLAIN))
    assert_close(found, expected)


@pytest.mark.parametrize(
    "options", [MemoryOptions(), MemoryOptions(tile_tokens=7), MemoryOptions("none", tile_tokens=7)], ids=str
)
@pytest.mark.parametrize(
    ("model_type", "dropout"), [("llama", 0.0), ("llama", 0.3), ("gemma3_text", 0.0), ("gpt2", 0.0)]
)
def test_weights_that_are_unpacked_once_for_a_backward_change_no_bit(model_type, options, dropout):
    expected = gradients(build(model_type, dropout=dropout), options)
    found = gradients(build(model_type, dropout=dropout), replace(options, cache_dequantized=True))
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one, other)


class Unpacked(TorchDispatchMode):
    """Count weights as they are dequantised, and how many of them were alive at once."""

    def __init__(self):
        super().__init__()
        self.count = self.most = 0
        self._alive = []

    @property
    def alive(self):
        return sum(storage() is not None for storage in self._alive)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if function is torch.ops.bitsandbytes.dequantize_4bit.default:
            self._alive.append(weakref.ref(result.untyped_storage()))
            self.count, self.most = self.count + 1, max(self.most, self.alive)
        return result


@pytest.mark.parametrize("where", [{}, {"resident_layers": 0, "offload_checkpoints": True}], ids=["device", "host"])
@pytest.mark.parametrize("tile_tokens", [None, 7])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_unpacked_weights_never_outlive_their_block(where, tile_tokens, dropout):
    options = MemoryOptions(tile_tokens=tile_tokens, cache_dequantized=True, **where)
    model = build(options=options, dropout=dropout)
    gradients(model, options)  # which product of a block is left out shows the first time
    with Unpacked() as seen:
        gradients(model, options)
    assert seen.alive == 0
    assert seen.most <= 7  # the linear layers of a block
    with Unpacked() as plain:
        gradients(model, replace(options, cache_dequantized=False))
    assert plain.most == 1
    assert seen.count < 0.75 * plain.count


@pytest.mark.parametrize(("needs_gradient", "kept"), [(True, 2), (False, 1)])
def test_a_kept_weight_goes_with_the_gradient_it_was_kept_for(needs_gradient, kept):
    first, second = (
        LoraLinear(QuantLinear.from_weight(torch.randn(64, 64), None, "nf4", True), 4, 8, 0.0, False, torch.float32)
        for _ in range(2)
    )
    alive = []
    with Unpacked() as seen:
        with keeping_weights(stay=False):
            middle = first(torch.randn(5, 64, requires_grad=needs_gradient))
            y = second(middle)
        middle.register_hook(lambda _: alive.append(seen.alive))
        assert seen.alive == kept
        y.sum().backward()
    assert [*alive, seen.alive] == [kept - 1, 0]


def test_bf16_gradients_of_many_tiles_are_rounded_once():
    def of(tile_tokens, dtype):
        model = build_tiny("llama", dtype=dtype)
        add_lora(model, rank=4, dtype=dtype)
        random_factors(model)
        return gradients(model, MemoryOptions(tile_tokens=tile_tokens), batches=1)[1:]

    exact = of(None, torch.float64)
    errors = [
        sum((one.double() - other).norm() for one, other in zip(of(tile, torch.bfloat16), exact, strict=True))
        for tile in (None, 1)
    ]
    assert errors[1] <= 1.2 * errors[0]


def test_a_step_that_ends_in_the_middle_of_a_stream_is_followed_by_a_right_one():
    options = MemoryOptions(resident_layers=1)
    model = build(options=options)
    expected = gradients(build(), PLAIN)
    set_memory_options(model, options)
    blocks(model)[2](torch.randn(1, 8, 64), position_embeddings=(torch.ones(1, 8, 16), torch.zeros(1, 8, 16)))
    for one, other in zip(gradients(model, options), expected, strict=True):
        assert torch.equal(one, other)


class RunsOut(TorchDispatchMode):
    """Let memory run out where a step makes its n-th tensor; note the category of each that it makes."""

    def __init__(self, number=None):
        super().__init__()
        self.number, self.made = number, []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if all(result.alias_info is None for result in function._schema.returns):
            self.made.append(marks.category)
            if len(self.made) == self.number:
                raise MemoryError
        return function(*args, **(kwargs or {}))


def test_a_step_that_memory_ran_out_in_wherever_it_was_is_done_again_and_right(late_copies, monkeypatch):
    monkeypatch.setattr("qlora_lite.kernels.loss.TILE_WORDS", FEW_WORDS)
    options = MemoryOptions(resident_layers=1, offload_checkpoints=True, host_head=True)
    expected, model = gradients(build(), PLAIN, batches=1)[1:], build(options=options)
    set_memory_options(model.train(), options)
    parameters = [parameter for _, parameter in lora_parameters(model)]

    def step(number=None):
        for parameter in parameters:
            parameter.grad = None
        with RunsOut(number) as seen, suppress(MemoryError):
            accumulate_gradients(causal_lm(), model, [prepare(random_batch(seed=0), CPU)])
        return seen.made

    step()  # the first also takes host memory
    made, numbers_of = step(), defaultdict(list)
    for number, category in enumerate(made, 1):
        numbers_of[category].append(number)
    assert {"saved activations", "head", "logits"} <= set(numbers_of)  # what comes from the host, and what is beside it
    for number in chain.from_iterable(numbers[:: 1 + len(numbers) // 6] for numbers in numbers_of.values()):
        assert step(number) == made[:number]
        step()
        assert all(map(torch.equal, (parameter.grad for parameter in parameters), expected))


def test_more_resident_blocks_than_there_are_leave_none_to_stream():
    options = MemoryOptions("none", resident_layers=DEPTH + 2)  # which streamed blocks could not have
    model = build(options=options)
    assert stream_of(model) is None
    assert all(map(torch.equal, gradients(model, options), gradients(build(), PLAIN)))


def test_more_kept_blocks_than_there_are_keep_all():
    assert all(
        map(torch.equal, gradients(build(), MemoryOptions(uncheckpointed_layers=DEPTH + 2)), gradients(build(), PLAIN))
    )


def test_streamed_weights_are_never_written():
    options = MemoryOptions(resident_layers=0, host_embeddings=True, host_head=True)
    checksum = frozen_checksum(build())
    model = build(options=options)
    assert frozen_checksum(model) == checksum
    gradients(model, options)
    assert frozen_checksum(model) == checksum


def test_of_streamed_blocks_at_most_two_are_on_the_device():
    model = build(options=MemoryOptions(resident_layers=1))
    stream = stream_of(model)
    evaluate_loss(causal_lm(), model, [random_batch()])
    on_device = {
        number
        for number, block in enumerate(blocks(model))
        for module in block.modules()
        for tensor in (*module._parameters.values(), *module._buffers.values())
        if tensor is not None and not tensor.requires_grad and not on_host(model, module, tensor)
    }
    assert on_device == {DEPTH - 3, DEPTH - 2, DEPTH - 1}  # the last two that ran, and the resident one
    assert len(stream.slots) == 2


def test_streamed_blocks_compute_with_weights_that_are_on_the_device():
    options = MemoryOptions(resident_layers=1)
    model, parts = build(options=options), []

    def check(part, _inputs, _output):
        for module in part.modules():
            for tensor in (*module._parameters.values(), *module._buffers.values()):
                assert tensor is None or not on_host(model, module, tensor)
        parts.append(part)

    for block in blocks(model):
        for part in block.children():
            part.register_forward_hook(check)
    gradients(model, options, batches=1)
    assert len(parts) == 2 * DEPTH * len(list(blocks(model)[0].children()))


def test_the_names_of_tiled_and_streamed_parts_stay_what_they_were():
    plain, changed = build(), build(options=MemoryOptions(resident_layers=0, host_embeddings=True, host_head=True))
    set_memory_options(changed, MemoryOptions(resident_layers=0, host_embeddings=True, host_head=True, tile_tokens=4))
    assert [name for name, _ in changed.named_parameters()] == [name for name, _ in plain.named_parameters()]
    assert list(changed.state_dict()) == list(plain.state_dict())
    assert any(isinstance(module, Tiled) for module in changed.modules())
    set_memory_options(changed, MemoryOptions(resident_layers=0))
    assert not any(isinstance(module, Tiled) for module in changed.modules())


def test_train_and_eval_reach_the_module_inside_a_tile():
    model = build()
    set_memory_options(model, MemoryOptions(tile_tokens=4))
    inner = next(module for module in model.modules() if isinstance(module, Tiled)).inner
    assert model.train() and inner.training
    assert model.eval() and not inner.training


def test_what_is_no_longer_than_a_tile_is_used_as_it_is(monkeypatch):
    model, ids = build(), torch.zeros(1, 4, dtype=torch.int64)
    set_memory_options(model, MemoryOptions(tile_tokens=4))
    monkeypatch.setattr("qlora_lite.offload.tile.tiled", None)
    model.eval()(ids, use_cache=False)
    for mode, tokens in ((True, 4), (False, 5)):
        with pytest.raises(TypeError, match="NoneType"):
            model.train(mode)(ids[:, :1].expand(1, tokens), use_cache=False)


def test_dropout_in_a_tile_is_repeated_in_backward():
    model = build(dropout=0.3)
    options = MemoryOptions(tile_tokens=64)  # one tile: the same random numbers in the same order
    assert_close(gradients(model, options), gradients(model, MemoryOptions()))
    for tile_tokens in (7, 64):  # the gradient is that of the loss: it predicts what a small change does
        options = MemoryOptions(tile_tokens=tile_tokens)
        loss, *grads = gradients(model, options, batches=1)
        (_, parameter), grad = next(zip(lora_parameters(model), grads, strict=False))
        with torch.no_grad():
            parameter += 1e-3 * grad / grad.norm()
        moved = gradients(model, options, batches=1)[0]
        assert (moved - loss).item() == pytest.approx(1e-3 * grad.norm().item(), rel=0.05)


@pytest.mark.parametrize(
    "options", [MemoryOptions("none", resident_layers=0), MemoryOptions(uncheckpointed_layers=3, resident_layers=2)]
)
def test_streamed_blocks_that_keep_their_activations_are_refused(options):
    with pytest.raises(ModelError, match="resident_layers"):
        set_memory_options(build(), options)


@pytest.mark.parametrize(
    "options", [MemoryOptions(resident_layers=1), MemoryOptions(host_embeddings=True), MemoryOptions(host_head=True)]
)
def test_weights_that_were_not_left_on_the_host_are_not_taken_for_streamed(options):
    with pytest.raises(ModelError, match="place"):
        set_memory_options(build(), options)
    set_memory_options(build(options=options), options)
    set_memory_options(build(), MemoryOptions(resident_layers=DEPTH))  # all of them: nothing to stream


@pytest.mark.parametrize("options", [MemoryOptions(host_embeddings=True), MemoryOptions(host_head=True)])
def test_embeddings_that_are_the_head_go_to_the_host_with_it_or_stay(options):
    with pytest.raises(ModelError, match=r"set memory\.embeddings and memory\.head to the same"):
        place(build_tiny("llama", tie_word_embeddings=True), CPU, options)


@pytest.mark.parametrize("model_type", ["gemma2", "gpt2", "cohere"])
def test_one_table_in_host_memory_serves_as_embeddings_and_head(model_type, monkeypatch):
    monkeypatch.setattr("qlora_lite.kernels.loss.TILE_WORDS", FEW_WORDS)
    options = MemoryOptions(host_embeddings=True, host_head=True)
    model, plain = build(model_type, options), build(model_type)
    assert model.get_input_embeddings().weight is model.get_output_embeddings().weight
    for one, other in zip(gradients(model, options), gradients(plain, PLAIN), strict=True):
        assert torch.equal(one, other)
    ids = torch.arange(3, 23)[None]
    assert torch.allclose(model.eval()(ids).logits, plain.eval()(ids).logits, atol=1e-5)
    assert check_forward(model) < 1e-5


def test_the_bias_of_a_head_in_host_memory_is_added(monkeypatch):
    monkeypatch.setattr("qlora_lite.kernels.loss.TILE_WORDS", FEW_WORDS)
    options, found = MemoryOptions(host_head=True), []
    for each in (PLAIN, options):
        model = build(options=PLAIN)
        model.lm_head.bias = torch.nn.Parameter(torch.linspace(-1, 1, 160), False)
        found.append(gradients(place(model, CPU, each), each))
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))
    assert [on_host(model, model.lm_head, tensor) for tensor in (model.lm_head.weight, model.lm_head.bias)] == [1, 0]


def test_a_head_in_four_bits_stays_on_the_device():
    model = build_tiny("llama")
    quantize_head(model, "nf4", True)
    with pytest.raises(ModelError, match=r"memory\.head host is for a 16-bit head, and this one is a QuantLinear"):
        place(model, CPU, MemoryOptions(host_head=True))


@pytest.mark.parametrize("name", ["mamba", "mamba2"])
def test_a_packed_head_is_refused_where_the_model_reads_its_type(name):
    with pytest.raises(ModelError, match=r"4-bit codes are not: set model\.quant_head to false"):
        meta_model(config_of(name), "nf4", True, torch.float32, quant_head=True)


def test_a_model_without_a_tokenwise_part_cannot_be_tiled():
    model = build()
    for block in blocks(model):
        for name in ("mlp", "input_layernorm", "post_attention_layernorm"):
            setattr(block, name, torch.nn.Sequential(getattr(block, name)))
    model.model.norm = torch.nn.Sequential(model.model.norm)
    with pytest.raises(ModelError, match="tile_tokens"):
        set_memory_options(model, MemoryOptions(tile_tokens=4))


@cache
def plain_gradients(model_type, batches, device_type, quant_head, **cuts):
    """Return the gradients of a model on the device whose blocks keep everything, its work cut into the same parts."""
    with on_path_of(device_type):
        return gradients(build(model_type, quant_head=quant_head), replace(PLAIN, **cuts), batches)


def assert_plain_gradients(options, model_type="llama", batches=2, device_type="cpu", quant_head=False):
    """Assert that not a bit differs where work is cut into the same parts, and little where it is not cut at all."""
    model = build(model_type, options, quant_head=quant_head)
    frozen = frozen_checksum(model)
    with on_path_of(device_type):
        if options.optimizer_in_backward:
            batches, found = 1, gradients_in_backward(model, options)
        else:
            found = gradients(model, options, batches)
    cuts = {"loss_chunk_tokens": options.loss_chunk_tokens, "tile_tokens": options.tile_tokens}
    assert all(map(torch.equal, found, plain_gradients(model_type, batches, device_type, quant_head, **cuts)))
    assert_close(found, plain_gradients(model_type, batches, "cpu", quant_head))
    assert frozen_checksum(model) == frozen


ONE_LEVER = {
    "none": {"checkpointing": "none"},
    "selective": {"checkpointing": "selective"},
    "uncheckpointed_layers": {"uncheckpointed_layers": 2},
    "layers_per_checkpoint": {"layers_per_checkpoint": 2},
    "loss_chunk_tokens": {"loss_chunk_tokens": 3},
    "tile_tokens": {"tile_tokens": 7},
    "host_embeddings": {"host_embeddings": True},
    "host_head": {"host_head": True},
    "offload_checkpoints": {"offload_checkpoints": True},
    "resident_layers": {"resident_layers": 2},
    "offload_folder": {"offload_checkpoints": True, "offload_folder": FOLDER},
    "stream_from": {"resident_layers": 0, "stream_from": "disk"},
    "optimizer_in_backward": {"optimizer_in_backward": True},
    "cache_dequantized": {"cache_dequantized": True},
    "quant_head": {"quant_head": True},
}
REFUSED = {
    ("none", "resident_layers"): "streamed blocks cannot keep",
    ("host_head", "quant_head"): "16-bit head",
    ("none", "stream_from"): "streamed blocks cannot keep",
    ("uncheckpointed_layers", "stream_from"): "cannot keep",
    ("layers_per_checkpoint", "resident_layers"): "streamed blocks are recomputed one by one",
    ("layers_per_checkpoint", "stream_from"): "streamed blocks are recomputed one by one",
}
PAIRS = [pair for pair in combinations(ONE_LEVER, 2) if pair != ("none", "selective")]  # two values of one setting


@pytest.mark.parametrize("pair", PAIRS, ids=" ".join)
def test_any_two_memory_options_give_the_plain_gradients(pair):
    one, other = (ONE_LEVER[name] for name in pair)
    both = one | other
    quant_head = both.pop("quant_head", False)
    with pytest.raises(ModelError, match=REFUSED[pair]) if pair in REFUSED else nullcontext():
        assert_plain_gradients(MemoryOptions(**both), batches=1, device_type="cuda", quant_head=quant_head)


options_strategy = st.builds(
    MemoryOptions,
    checkpointing=st.sampled_from(["block", "selective", "none"]),
    uncheckpointed_layers=st.integers(0, DEPTH),
    layers_per_checkpoint=st.sampled_from([1, 1, 2, DEPTH]),
    loss_chunk_tokens=st.sampled_from([None, 3, 50]),
    tile_tokens=st.sampled_from([None, 1, 5, 64]),
    offload_checkpoints=st.booleans(),
    resident_layers=st.sampled_from([None, 0, 1, 3, DEPTH]),
    host_embeddings=st.booleans(),
    host_head=st.booleans(),
    cache_dequantized=st.booleans(),
    optimizer_in_backward=st.booleans(),
    offload_folder=st.sampled_from([None, FOLDER]),
    stream_from=st.sampled_from(["host", "disk"]),
)  # ``compile`` is in tests/train/test_compiled.py: a graph takes seconds


@settings(max_examples=25, deadline=None)
@given(
    options=options_strategy,
    model_type=st.sampled_from(["llama", "gemma2", "olmo2"]),
    batches=st.integers(1, 2),
    device_type=st.sampled_from(["cpu", "cuda"]),
    quant_head=st.booleans(),
)
def test_any_combination_gives_the_plain_gradients(options, model_type, batches, device_type, quant_head):
    if quant_head:  # which stays on the device
        options = replace(options, host_head=False)
    elif model_type == "gemma2":  # its embeddings are its head
        options = replace(options, host_embeddings=options.host_head)
    kept = options.uncheckpointed_layers if options.recomputes else DEPTH
    segments = options.recomputes and options.layers_per_checkpoint > 1
    streams = options.resident_layers is not None and options.resident_layers < DEPTH
    refused = streams and (kept > options.resident_layers or segments)
    with pytest.raises(ModelError, match="streamed blocks") if refused else nullcontext():
        assert_plain_gradients(options, model_type, batches, device_type, quant_head)


@pytest.mark.parametrize("model_type", ["llama", "gemma3_text", "cohere"])
def test_a_head_in_four_bits_trains_as_its_unpacked_weight_would(model_type):
    def model_with_head(change):
        model = build_tiny(model_type)
        change(model)
        torch.manual_seed(1)
        add_lora(model, rank=4, dtype=torch.float32)
        random_factors(model)
        return gradients(model, PLAIN)

    def dequantized(model):
        head = model.get_output_embeddings()
        weight = dequantize(quantize(head.weight), head.weight.shape, torch.float32)
        model.set_output_embeddings(torch.nn.Linear(*weight.shape[::-1], bias=False))
        model.get_output_embeddings().weight = torch.nn.Parameter(weight)

    packed = model_with_head(lambda model: quantize_head(model, "nf4", True))
    assert_close(packed, model_with_head(dequantized))


def test_a_four_bit_head_is_what_the_model_itself_answers_with():
    model = build_tiny("gemma3_text")
    embeddings = model.get_input_embeddings().weight
    use_row_attention(model)
    quantize_head(model, "nf4", True)
    assert check_forward(model) < 1e-5
    assert model.get_input_embeddings().weight is embeddings
    with pytest.raises(ModelError, match="quant_head"):
        quantize_head(build_tiny("llama", hidden_size=48), "nf4", True)


def test_quantised_and_sixteen_bit_blocks_stream_alike():
    model = build_tiny("gpt2")
    plain = build_tiny("gpt2")
    for each in (model, plain):
        torch.manual_seed(1)
        add_lora(each, rank=4, dtype=torch.float32)
        random_factors(each)
    options = MemoryOptions(resident_layers=0)
    place(model, CPU, options)
    for one, other in zip(gradients(model, options), gradients(plain, PLAIN), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("model_type", ["bloom", "lfm2"])
@pytest.mark.parametrize(
    "options",
    [
        MemoryOptions(offload_checkpoints=True),
        MemoryOptions(offload_checkpoints=True, offload_folder=FOLDER),
        MemoryOptions(layers_per_checkpoint=2),
        MemoryOptions(resident_layers=0, offload_checkpoints=True),
    ],
    ids=str,
)
def test_rows_that_run_one_by_one_come_back_from_the_host_each(options, model_type):
    def steps(options):
        training = trainer(model_type, options=options, max_steps=2)
        assert runs_unpacked(training.model)
        return [step.grad_norm for step in training], [p.detach().clone() for p in training.parameters]

    (norms, found), (expected_norms, expected) = (
        steps(options),
        steps(MemoryOptions()),
    )  # which adds up the rows in its order
    assert norms == expected_norms and all(map(torch.equal, found, expected))


def test_a_second_run_that_is_made_again_draws_the_same_numbers(monkeypatch):
    """Blocks with other factors leave out other products, which shows in the first backward if they are taken for
    alike."""
    monkeypatch.setattr("qlora_lite.models.memory_options._kind", type)
    monkeypatch.setitem(ARCHITECTURES, "llama", ARCHITECTURES["llama"] | {"attention_dropout": 0.3})
    targets = ["model.layers.2.*", "model.layers.1.self_attn.q_proj", "model.layers.0.self_attn.q_proj"]

    def first_gradients(options):
        model = quantized_pair("llama", num_hidden_layers=3)[0]
        add_lora(model, targets, rank=4, dtype=torch.float32)
        random_factors(model)
        return gradients(model, options, batches=1)

    assert all(map(torch.equal, first_gradients(MemoryOptions()), first_gradients(PLAIN)))
