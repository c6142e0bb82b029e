"""``train.compile``: blocks as compiled graphs, with the gradients of the blocks as they are and no weight dequantised.

Graphs run operator by operator here; one test compiles them to machine code.
"""

import inspect
import shutil
from dataclasses import replace
from functools import partial

import pytest
import torch
from memory_option_cases import DEPTH, FOLDER, PLAIN, build, gradients, gradients_in_backward
from tiny import quantized_pair, random_batch
from torch import nn
from torch._decomp import get_decompositions
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.aot_autograd import make_boxed_func
from torch._functorch.partitioners import min_cut_rematerialization_partition
from torch._inductor.exc import InductorError

from qlora_lite.adapters.lora.inject import add_lora, lora_layers
from qlora_lite.errors import ModelError, TrainingError
from qlora_lite.kernels.attention import _gradient_operator, _rows_operator
from qlora_lite.memory.shapes import planning_for
from qlora_lite.models.anatomy import blocks
from qlora_lite.models.memory_options import MemoryOptions, set_memory_options
from qlora_lite.offload import compiled
from qlora_lite.offload.checkpoint import Run, running
from qlora_lite.quant import product
from qlora_lite.quant.formats import four_bit
from qlora_lite.quant.linear import QuantLinear, frozen_weight
from qlora_lite.train.causal_lm import causal_lm
from qlora_lite.train.forward import prepare
from qlora_lite.train.step import accumulate_gradients
from qlora_lite.train.text_guards import check_compilable

CPU = torch.device("cpu")
pytestmark = [
    pytest.mark.filterwarnings(f"ignore:{words}")  # what torch 2.13 does itself while it compiles
    for words in (".*should not be instantiated", "The .grad attribute", "`torch.jit.script_method` is deprecated")
]
BOTH = MemoryOptions(uncheckpointed_layers=2, compile=True)
HOST = MemoryOptions(
    offload_checkpoints=True, host_embeddings=True, host_head=True, cache_dequantized=True, compile=True
)
CHECKPOINTED = MemoryOptions(compile=True)
FAMILIES = [  # beside other tests'
    pytest.param("gemma2", {"layer_types": ["sliding_attention"] * DEPTH}, id="gemma2", marks=pytest.mark.slow),
    pytest.param("gpt2", {}, id="gpt2", marks=pytest.mark.slow),
]


OPERATOR_BY_OPERATOR = aot_autograd(  # torch's "aot_eager"
    fw_compiler=lambda graph, _inputs: make_boxed_func(graph.forward),
    partition_fn=min_cut_rematerialization_partition,
    keep_inference_input_mutations=True,
    decompositions=get_decompositions([torch.ops.aten.new_zeros]),  # which reads no value: as torch's compiler has it
)


class Graphs:
    """Graphs that are run operator by operator, and a list of those that ran."""

    def __init__(self):
        self.ran = []
        self.functions = {
            each: torch.compile(each, fullgraph=True, backend=self.backend)
            for each in (compiled._value, compiled._root)
        }

    def backend(self, graph, inputs):
        run = OPERATOR_BY_OPERATOR(graph, inputs)

        def noted(*arguments):
            self.ran.append(graph)
            return run(*arguments)

        return noted


@pytest.fixture(scope="module")
def shared():
    """Graphs of blocks, compiled once for all tests of blocks that are alike: tracing one takes seconds."""
    return Graphs()


@pytest.fixture
def graphs(shared, monkeypatch):
    """Run compiled graphs operator by operator; give a list of those that ran."""
    shared.ran.clear()
    monkeypatch.setattr(compiled, "_compiled", shared.functions.__getitem__)
    return shared.ran


@pytest.fixture
def new_graphs(monkeypatch):
    """Give what ``graphs`` gives where no other test has compiled any."""
    torch._dynamo.reset()
    own = Graphs()
    monkeypatch.setattr(compiled, "_compiled", own.functions.__getitem__)
    yield own.ran
    torch._dynamo.reset()


def assert_close(found, expected, tolerance=1e-5):
    for one, other in zip(found, expected, strict=True):
        assert (one - other).norm() <= tolerance * other.norm()


@pytest.mark.parametrize("options", [BOTH, pytest.param(HOST, marks=pytest.mark.slow)])
def test_compiled_blocks_have_the_gradients_of_the_blocks(graphs, options):
    assert_close(gradients(build(options=options), options), gradients(build(), PLAIN))
    assert graphs


def test_compiled_blocks_go_with_a_head_in_four_bits_files_and_updates_in_backward(graphs):
    options = MemoryOptions(
        loss_chunk_tokens=3, offload_checkpoints=True, offload_folder=FOLDER, optimizer_in_backward=True, compile=True
    )
    found = gradients_in_backward(build(options=options, quant_head=True), options)
    assert_close(found, gradients(build(quant_head=True), PLAIN, batches=1))
    assert graphs


@pytest.mark.parametrize(("model_type", "settings"), FAMILIES)
def test_compiled_blocks_of_every_kind_have_the_gradients_of_the_blocks(graphs, model_type, settings):
    model, plain = (build(model_type, **settings) for _ in range(2))
    assert_close(gradients(model, CHECKPOINTED), gradients(plain, PLAIN))
    assert graphs


@pytest.mark.slow
def test_frozen_layers_without_weights_are_compiled_too(graphs):
    def built():
        model = build("qwen2")  # q, k and v have biases
        for block in blocks(model)[1:]:
            block.mlp.gate_proj, block.self_attn.q_proj = block.mlp.gate_proj.base, block.self_attn.q_proj.base
            for layer in (block.mlp.up_proj, block.self_attn.k_proj, block.self_attn.v_proj):
                layer.shared = None
        return model

    assert_close(gradients(built(), CHECKPOINTED), gradients(built(), PLAIN))


def kept_for_backward(options):
    """Shapes of what autograd keeps of a batch, and its bytes beside the model's own tensors."""
    model, shapes, sizes = build(), set(), {}
    owned = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}
    set_memory_options(model, options)

    def pack(tensor):
        shapes.add(tuple(tensor.shape))
        sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    inputs = prepare(random_batch((60, 61)), CPU)  # no side of a weight
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = causal_lm().loss(model.train(), inputs).sum
    weights = {frozen_weight(layer.base)[0].shape for _, layer in lora_layers(model)}
    return loss, shapes & (weights | {shape[::-1] for shape in weights}), sum(sizes[p] for p in sizes.keys() - owned)


@pytest.mark.parametrize("options", [MemoryOptions("none", compile=True), BOTH])
def test_compiled_blocks_keep_no_unpacked_weight_and_no_more_than_the_blocks(graphs, options):
    _, weights, size = kept_for_backward(options)
    _, _, size_of_blocks = kept_for_backward(replace(options, compile=False))
    assert not weights
    assert 0 < size <= size_of_blocks


def test_weights_are_unpacked_once_for_a_block_s_second_run_and_its_gradients(graphs, monkeypatch):
    model, dequantized, dequantize = build(), [], four_bit.dequantize
    set_memory_options(model, MemoryOptions(compile=True, cache_dequantized=True))
    monkeypatch.setattr(four_bit, "dequantize", lambda *arguments: dequantized.append(1) or dequantize(*arguments))
    accumulate_gradients(causal_lm(), model.train(), [prepare(random_batch(), CPU)])
    assert len(dequantized) == 2 * len(list(lora_layers(model)))


def test_what_a_block_keeps_of_attention_is_not_the_compiler_s_to_write_to():
    q, k, v = (torch.randn(1, heads, 12, 16) for heads in (4, 2, 2))
    with running(Run()) as first:
        out = _rows_operator(q, k, v, torch.tensor([5, 7]), None, None, None, None)
    (kept,) = first.kept
    expected = kept.clone()
    out.zero_()
    with running(Run([kept])):
        again = _rows_operator(q, k, v, torch.tensor([5, 7]), None, None, None, None)
    assert torch.equal(again, expected)


def test_the_operators_are_what_torch_asks_of_operators():
    torch.manual_seed(0)
    layer = QuantLinear.from_weight(torch.randn(96, 64), None, "nf4", True)
    _, tensors = frozen_weight(layer)
    checks = ("test_schema", "test_faketensor")
    for x, of_gradient, *low_rank in ((64, False), (96, True), (64, False, torch.randn(5, 4), torch.randn(96, 4))):
        arguments = torch.randn(5, x), list(tensors), [96, 64], "nf4", False, of_gradient, *low_rank
        torch.library.opcheck(product._operator, arguments, test_utils=checks)
    q, k, v = (torch.randn(1, heads, 12, 16) for heads in (4, 2, 2))
    lengths, sinks = torch.tensor([5, 7]), torch.randn(4)
    for last in ((None, None, None, None), (None, 0.3, 4, None), (None, None, None, 2.0), (sinks, None, 4, None)):
        torch.library.opcheck(_rows_operator, (q, k, v, lengths, *last), test_utils=checks)
        torch.library.opcheck(
            _gradient_operator, (torch.randn(1, 12, 4, 16), q, k, v, lengths, *last), test_utils=checks
        )


@pytest.mark.parametrize(
    ("model_type", "options", "spared"),
    [
        pytest.param("llama", CHECKPOINTED, 1, marks=pytest.mark.slow),  # of which machine code is made below
        pytest.param("gpt_neox", CHECKPOINTED, 2, marks=pytest.mark.slow),
        pytest.param("gemma3_text", BOTH, 0, marks=pytest.mark.slow),
    ],
)
def test_what_nobody_reads_is_left_out(graphs, monkeypatch, model_type, options, spared):
    """A recomputation spares its last product; both, of parallel attention and MLP (GPT-NeoX); none before a norm
    (Gemma).

    Kept blocks have no recomputation.
    """
    assert_gradients_without_spared_products(monkeypatch, model_type, options, spared)
    assert graphs


@pytest.mark.slow
def test_a_gpu_s_attention_is_compiled_too(new_graphs):
    """Its kernels' gradients are torch's, and the operator has to let autograd see them."""
    with planning_for("cuda"):
        assert_close(gradients(build("gemma3_text"), CHECKPOINTED), gradients(build("gemma3_text"), PLAIN))


@pytest.mark.slow
def test_other_rows_and_lengths_need_no_other_graph(new_graphs):
    model = build("gemma3_text")
    set_memory_options(model, MemoryOptions(compile=True))
    counts = []
    for lengths in ((7, 12, 5), (31, 8), (24,), (3, 40, 20, 9), (150, 160)):
        accumulate_gradients(causal_lm(), model.train(), [prepare(random_batch(lengths), CPU)])
        counts.append(len(set(map(id, new_graphs))))
    assert counts == [counts[0]] * 5
    # forward; gradients; those of the first block, whose input needs none: each for layers with a window and without
    assert counts[0] <= 6


def test_an_input_s_gradient_is_rounded_once_and_has_no_second_tensor():
    """Added outside of the product's operator, an update's gradient would lie in memory beside it, as large as x."""
    model, _ = quantized_pair("llama", dtype=torch.bfloat16)
    _, layer = next(iter(lora_layers(add_lora(model, rank=4))))
    nn.init.normal_(layer.lora_B)
    x = torch.randn(1, 40, layer.lora_A.shape[1], generator=torch.Generator().manual_seed(0)).bfloat16()
    run = torch.compile(nn.Module.__call__, fullgraph=True, backend="aot_eager")
    found = []
    for call in (layer, lambda inputs: run(layer, inputs)):
        inputs = x.clone().requires_grad_()
        found.append(torch.autograd.grad(call(inputs).float().square().sum(), inputs)[0])
    torch._dynamo.reset()
    assert torch.equal(*found)


@pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler")
@pytest.mark.slow
def test_machine_code_has_the_gradients_and_leaves_out_what_nobody_reads(monkeypatch):
    torch._dynamo.reset()
    assert_gradients_without_spared_products(monkeypatch, "llama", CHECKPOINTED, 1)


def assert_gradients_without_spared_products(monkeypatch, model_type, options, spared):
    expected, model, products = gradients(build(model_type), PLAIN), build(model_type), []
    assert_close(gradients(model, options), expected)
    product_beside = product.product_beside

    def counting(*arguments):
        *_, of_gradient = arguments
        products.extend([arguments] * (not of_gradient))
        return product_beside(*arguments)

    monkeypatch.setattr(product, "product_beside", counting)  # what the operator calls for a layer's value
    assert_close(gradients(model, options, batches=1), gradients(build(model_type), PLAIN, batches=1))
    depth, each = len(blocks(model)), len(list(lora_layers(blocks(model)[0])))
    first_runs, second_runs = depth * each, (depth - options.uncheckpointed_layers) * (each - spared)
    assert len(products) == first_runs + second_runs


def test_a_block_that_cannot_be_compiled_is_an_error_with_the_cure(graphs):
    model = build()
    set_memory_options(model, MemoryOptions(compile=True))

    class Breaks(nn.Module):
        def forward(self, x):
            torch._dynamo.graph_break()
            return x

    blocks(model)[1].mlp.act_fn = Breaks()
    with pytest.raises(ModelError, match=r"train\.compile: the blocks cannot be compiled \(.*\); set it to false"):
        accumulate_gradients(causal_lm(), model.train(), [prepare(random_batch(), CPU)])


def test_a_gradient_that_cannot_be_compiled_is_told_and_memory_that_runs_out_as_such(monkeypatch):
    def forward(graph, inputs):
        return graph.forward

    def backward(graph, inputs):
        raise InductorError(reasons[-1], inspect.currentframe())  # as torch's own compiler does

    torch._dynamo.reset()
    reasons = []
    backend = aot_autograd(fw_compiler=forward, bw_compiler=backward)
    failing = torch.compile(compiled._value, fullgraph=True, backend=backend)
    monkeypatch.setattr(compiled, "_compiled", lambda function: failing)
    model = build(num_hidden_layers=1)
    set_memory_options(model, MemoryOptions("none", compile=True))
    for reason, told, words in (
        (NotImplementedError("no kernel"), ModelError, r"cannot be compiled \(.*no kernel.*\); set it to false"),
        (torch.OutOfMemoryError("out of memory"), torch.OutOfMemoryError, "out of memory"),
        (MemoryError("none left"), MemoryError, "none left"),
    ):
        reasons.append(reason)
        with pytest.raises(told, match=words):
            accumulate_gradients(causal_lm(), model.train(), [prepare(random_batch(), CPU)])
    torch._dynamo.reset()


def test_dropout_by_a_rate_that_a_block_hands_to_a_function_is_refused():
    model = build()
    blocks(model)[0].mlp.residual_dropout = 0.1  # as Starcoder2 and OPT do
    with pytest.raises(TrainingError, match=r"set train\.compile to false: it is incompatible with dropout$"):
        check_compilable(model, MemoryOptions(compile=True))


def test_nine_kinds_of_blocks_are_not_too_many_graphs(new_graphs):
    for outputs in range(1, 10):
        layer, x = nn.Linear(4, outputs), torch.ones(1, 3, 4)
        assert torch.allclose(compiled.value(partial(layer.forward), x), layer(x))
    assert len(set(map(id, new_graphs))) == 9  # torch's own limit is eight


@pytest.mark.parametrize(
    ("model_type", "settings", "options", "reason"),
    [
        ("llama", {"dropout": 0.1}, MemoryOptions(), "dropout"),
        ("llama", {"attention_dropout": 0.1}, MemoryOptions(), "dropout"),
        ("gpt2", {"resid_pdrop": 0.1}, MemoryOptions(), "dropout"),
        ("granite", {"attention_dropout": 0.1}, MemoryOptions(), "dropout"),
        ("llama", {}, MemoryOptions(tile_tokens=8, resident_layers=0), "memory.tile_tokens, memory.resident_layers"),
        ("llama", {}, MemoryOptions(layers_per_checkpoint=2), "memory.layers_per_checkpoint"),
        ("llama", {}, MemoryOptions("selective", tile_tokens=8), "memory.checkpointing selective, memory.tile_tokens"),
    ],
)
def test_what_compiled_blocks_would_do_otherwise_is_refused(model_type, settings, options, reason):
    model = build(model_type, **settings)
    check_compilable(model, options)
    with pytest.raises(TrainingError, match=f"set train.compile to false: it is incompatible with {reason}$"):
        check_compilable(model, replace(options, compile=True))


def test_a_compiler_that_is_missing_is_told_before_the_first_step(monkeypatch):
    model = build("llama")
    monkeypatch.setattr("shutil.which", lambda _name: "a path")
    check_compilable(model, MemoryOptions(compile=True))
    monkeypatch.setattr("shutil.which", lambda _name: None)
    check_compilable(model, MemoryOptions())
    with pytest.raises(TrainingError, match=r"train\.compile needs a C\+\+ compiler \(g\+\+\): install it, or set"):
        check_compilable(model, MemoryOptions(compile=True))
