"""What a step's products are counted as, beside their operations: how many large ones differ."""

import pytest
import torch
from counted import counted
from jobs import new_job
from torch.utils.flop_counter import flop_registry
from transformers import AutoConfig

from qlora_lite.memory.marks import phase, repeated
from qlora_lite.memory.process import CPU_BUFFERS_BYTES, CPU_HOLES_SHARE, CPU_KERNEL_BYTES
from qlora_lite.memory.work import FLOP_FORMULAS, FUSED_ATTENTION, Work, of_this_torch
from qlora_lite.models.families import known_config
from qlora_lite.models.memory_options import MemoryOptions
from qlora_lite.planning.machine import OPERATION_SECONDS, Machine
from qlora_lite.planning.predict import predict
from qlora_lite.planning.simulate import simulate
from qlora_lite.train.batches import BatchShape


def test_compiled_products_of_one_operator_and_shape_count_once():
    large, other, small = torch.ones(256, 128), torch.ones(512, 128), torch.ones(16, 16)
    with counted() as counter, phase("forward"):
        for _ in range(3):
            large @ large.t()
        other @ large.t()
        large.addmm(large, torch.ones(128, 128))
        small @ small
        large + large
    assert counter.work.compiled_products == 3


def test_a_small_product_counts_as_compiled_in_16_bit_only():
    for dtype, compiled in ((torch.float32, 0), (torch.bfloat16, 2)):
        with counted() as counter, phase("forward"):
            for rows in (24, 32, 4):  # that of four rows is below oneDNN's minimum
                torch.ones(rows, 16, dtype=dtype) @ torch.ones(16, 16, dtype=dtype)
        assert counter.work.compiled_products == compiled


def test_grouped_products_count_their_flops_and_a_kernel_for_each_count_of_rows():
    rows, weights = torch.ones(24, 16, dtype=torch.bfloat16), torch.ones(3, 16, 32, dtype=torch.bfloat16)
    with counted() as counter, phase("forward"):
        torch._grouped_mm(rows, weights, torch.tensor([8, 16, 24], dtype=torch.int32))
        assert counter.work.flops == 2 * 24 * 16 * 32 and counter.work.compiled_products == 24
        torch._grouped_mm(rows.t(), torch.ones(24, 32, dtype=torch.bfloat16), torch.tensor([8, 24], dtype=torch.int32))
    assert counter.work.flops == 4 * 24 * 16 * 32 and counter.work.compiled_products == 48  # of the weights' gradient


@pytest.mark.parametrize(
    ("operator", "shapes"),
    [
        ("mm", [(2, 3), (3, 5)]),
        ("addmm", [(2, 5), (2, 3), (3, 5)]),
        ("bmm", [(7, 2, 3), (7, 3, 5)]),
        ("baddbmm", [(7, 2, 5), (7, 2, 3), (7, 3, 5)]),
    ],
)
def test_formulas_of_products_are_torch_s(operator, shapes):
    packet, tensors = getattr(torch.ops.aten, operator), [torch.ones(shape) for shape in shapes]
    assert FLOP_FORMULAS[packet](*tensors, alpha=2) == flop_registry[packet](*tensors, out_val=packet(*tensors))
    if "add" in operator:
        in_place = getattr(torch.ops.aten, f"{operator}_")
        assert FLOP_FORMULAS[in_place](*tensors) == FLOP_FORMULAS[packet](*tensors)


def test_a_product_of_weights_that_are_loaded_does_not_count():
    with counted() as counter:
        torch.ones(256, 128) @ torch.ones(128, 256)
    assert counter.work.compiled_products == 0


def test_operations_of_forward_and_backward_are_counted_but_no_views_and_memory_alone():
    x = torch.ones(4, 4)
    with counted() as counter:
        for name in ("load", "forward", "backward", "optimizer", "evaluation"):
            with phase(name), repeated(3):
                (x.t().contiguous().view(2, 8) + 1).sum()
                torch.empty(4)
    assert counter.work.operations == 2 * 3 * 3  # a copy, an addition, a sum


def test_how_many_operations_compiled_blocks_start_is_not_known():
    config = AutoConfig.for_model(**known_config("HuggingFaceTB/SmolLM2-135M") | {"num_hidden_layers": 2})
    plain, compiled = (
        simulate(new_job(config, BatchShape((64,), 63), None, options=MemoryOptions(compile=value))).work
        for value in (False, True)
    )
    assert plain.operations and compiled == plain._replace(operations=0)


@pytest.mark.parametrize(("device", "seconds"), [("cpu", 3 + 4), ("cuda", 5)])
def test_a_gpu_computes_while_the_host_starts_what_comes_next(device, seconds):
    machine = Machine("", device, 0, 0, 2.0, 4.0, 10.0)
    assert machine.seconds(Work(4, 4, 50, round(4 / OPERATION_SECONDS))) == pytest.approx(seconds)
    assert machine.seconds(Work(4, 4, 0, round(6 / OPERATION_SECONDS))) == pytest.approx(9 if device == "cpu" else 6)
    assert machine.seconds(Work(4, 4, 50, update_bytes=8), 3) == pytest.approx(3 * (3 if device == "cpu" else 5) + 2)


def test_an_update_is_counted_by_itself_since_a_step_of_many_micro_batches_has_one():
    config = AutoConfig.for_model(**known_config("HuggingFaceTB/SmolLM2-135M") | {"num_hidden_layers": 2})
    one, longer = (simulate(new_job(config, BatchShape((n,), n - 1), None, rank=64)).work for n in (64, 128))
    assert one.update_bytes == longer.update_bytes > 0 and one.moved_bytes < longer.moved_bytes


@pytest.mark.parametrize("key_heads", [4, 2, 1])
def test_attention_is_counted_as_its_products_would_be_whatever_the_heads_of_keys(key_heads):
    query = torch.randn(2, 4, 24, 16, requires_grad=True)
    key, value = (torch.randn(2, key_heads, 40, 16, requires_grad=True) for _ in range(2))
    scores = 2 * 2 * 4 * 24 * 40 * 16
    for causal, share in ((False, 1), (True, 2)):
        with counted() as forward, phase("forward"):
            fused = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
            out = fused(query, key, value, 0.0, causal)[0]
        with counted() as backward, phase("backward"):
            out.sum().backward()
        assert forward.work.flops == 2 * scores // share
        assert backward.work.flops == 5 * scores // share


def test_a_kernel_of_attention_that_this_torch_does_not_have_is_left_out():
    assert "flash_attention_for_cpu" in FUSED_ATTENTION
    assert of_this_torch({**FUSED_ATTENTION, "of_another_torch": (4, 7)}) == FUSED_ATTENTION


def test_a_longer_row_takes_more_kernels_on_a_cpu_whatever_the_depth():
    """Attention's products grow with the keys that a block of queries sees."""
    constants = {}
    for tokens in (512, 1024):
        for layers in (4, 12):
            config = AutoConfig.for_model(**known_config("HuggingFaceTB/SmolLM2-135M") | {"num_hidden_layers": layers})
            prediction = predict(new_job(config, BatchShape((tokens,), 100), None))
            held = prediction.simulation.resident.breakdown
            holes = int(CPU_HOLES_SHARE * (held["adapter"] + held["optimizer"]))
            assert [overhead.bytes for overhead in prediction.overheads] == [
                CPU_BUFFERS_BYTES,
                CPU_KERNEL_BYTES * prediction.simulation.work.compiled_products,
                holes,
            ]
            constants[tokens, layers] = prediction.simulation.work.compiled_products
    assert constants[512, 4] == constants[512, 12] < constants[1024, 4] == constants[1024, 12]


TABLE, ROWS, NUMBERS = torch.ones(1000, 8), torch.ones(3, 8), torch.tensor([5, 7, 9])  # 4, 4 and 8 bytes a number


@pytest.mark.parametrize(
    ("run", "moved"),
    [
        (lambda: TABLE[NUMBERS], 2 * ROWS.nbytes + NUMBERS.nbytes),
        (lambda: torch.nn.functional.embedding(NUMBERS, TABLE), 2 * ROWS.nbytes + NUMBERS.nbytes),
        (lambda: TABLE.gather(1, NUMBERS[:, None] % 8), 2 * 3 * 4 + 3 * NUMBERS.nbytes),  # with the remainder
        (lambda: TABLE.index_add_(0, NUMBERS, ROWS), 3 * ROWS.nbytes + NUMBERS.nbytes),
        (lambda: TABLE.copy_(TABLE.double()), TABLE.nbytes * (1 + 2 + 2 + 1)),
        (lambda: TABLE.zero_(), TABLE.nbytes),
        (lambda: TABLE.new_zeros(2, 3), 2 * 3 * 4),
        (lambda: TABLE.add_(TABLE), 3 * TABLE.nbytes),
        (lambda: torch.cat([ROWS, ROWS]), 4 * ROWS.nbytes),
        (lambda: torch.ops.aten._unsafe_view(TABLE, [8000]), 0),
    ],
)
def test_an_operator_moves_what_it_reads_and_writes_and_of_a_table_only_the_rows_it_touches(run, moved):
    with counted() as counter, phase("forward"):
        run()
    assert counter.work.moved_bytes == moved
