"""Rows are multiplied by their experts' weights, whatever the router chose."""

import importlib.util
import os
import re
import subprocess
import sys

import pytest
import torch
from counted import counted

from qlora_lite.kernels.grouped_product import (
    add_grouped_sums,
    grouped_product,
    one_by_one,
    pairs_by_expert,
    sums_one_by_one,
)
from qlora_lite.memory.marks import phase

ROUTERS = "even", "one", "few"


def chosen_by(router, tokens, per_token, experts):
    """Return numbers [T, K] of different experts: any, the same ones for all tokens, or any but some."""
    random = torch.Generator().manual_seed(0)
    if router == "one":
        return torch.arange(experts).roll(1)[:per_token].expand(tokens, -1)
    scores = torch.rand(tokens, experts, generator=random)
    scores[:, [0, 2]] -= 2.0 * (router == "few")
    return scores.topk(per_token).indices


def case(
    router,
    tokens=35,
    per_token=2,
    experts=4,
    sizes=(48, 200),
    of_pairs=False,
    transposed=False,
    extras=False,
    dtype=torch.float32,
    device="cpu",
):
    """Return the arguments of ``grouped_product`` without ``out`` and ``first``: no size is a multiple of a tile's."""
    random = torch.Generator().manual_seed(1)
    pairs = pairs_by_expert(chosen_by(router, tokens, per_token, experts), experts)
    size_in, size_out = sizes
    rows = torch.randn(tokens * (per_token if of_pairs else 1), size_in, generator=random)
    weights = torch.randn(experts, size_out, size_in, generator=random)
    weights = weights.transpose(1, 2).contiguous().transpose(1, 2) if transposed else weights
    bias, scale = torch.randn(experts, size_out, generator=random), torch.rand(len(pairs.places), generator=random)
    given = rows.to(dtype), weights.to(dtype), *pairs, *((bias.to(dtype), scale) if extras else (None, None))
    return tuple(each if each is None else each.to(device) for each in given)


def exact(rows, weights, places, offsets, bias, scale, added=0.0):
    """Return all rows of the result in float64, each by itself; ``added`` is what stands in all of them."""
    expert = torch.empty_like(places)
    expert[places] = torch.repeat_interleave(offsets.diff())
    row = torch.arange(len(places), device=rows.device) // (len(places) // len(rows))
    y = torch.einsum("poi,pi->po", weights.double()[expert], rows.double()[row]) + added
    y = y if bias is None else y + bias.double()[expert]
    return y if scale is None else y * scale.double()[:, None]


def in_groups(product, given, at_once=3, added=None):
    """Return the result of a product in place for all groups; what no group has written is NaN, or was there before."""
    rows, weights, places, offsets, *extras = given
    there = torch.nan if added is None else added
    out = torch.full((len(places), weights.shape[1]), there, dtype=rows.dtype, device=rows.device)
    for first in range(0, len(weights), at_once):
        product(out, rows, weights[first : first + at_once], places, offsets, first, *extras, added is not None)
    return out


def error(found, truth):
    return float((found.double() - truth).norm() / truth.norm())


# settings of ``case`` that differ in all that a kernel could get wrong
CASES = [
    *(dict(router=router) for router in ROUTERS),
    *(dict(router=router, of_pairs=True, transposed=True, extras=True) for router in ROUTERS),
    dict(router="even", tokens=1, experts=9, extras=True),
    dict(router="one", tokens=70, sizes=(130, 64)),
]


@pytest.mark.parametrize("added", [None, 3.0])
@pytest.mark.parametrize("settings", CASES)
def test_rows_of_all_groups_are_those_of_their_experts_alone(settings, added):
    given = case(**settings)
    assert error(in_groups(grouped_product, given, added=added), exact(*given, added or 0.0)) < 1e-6


def sums_case(
    router,
    tokens=35,
    per_token=2,
    experts=4,
    sizes=(48, 200),
    of_pairs=False,
    dtype=torch.float32,
    device="cpu",
    **_unused,
):
    """Return the arguments of ``add_grouped_sums``: rows of tokens on one side, of pairs on the other."""
    random = torch.Generator().manual_seed(1)
    pairs = pairs_by_expert(chosen_by(router, tokens, per_token, experts), experts)
    counts = (tokens, tokens * per_token)[:: -1 if of_pairs else 1]
    left, right = (
        torch.randn(n, size, generator=random) for n, size in zip(counts, (sizes[0] % 32, sizes[1]), strict=True)
    )
    out = torch.randn(experts, left.shape[1], right.shape[1], generator=random)
    return tuple(each.to(device) for each in (out.to(dtype), left.to(dtype), right.to(dtype), *pairs))


def exact_sums(out, left, right, places, offsets):
    """Return the sums in float64, each pair by itself."""
    expert = torch.empty_like(places)
    expert[places] = torch.repeat_interleave(offsets.diff())
    pair = torch.arange(len(places), device=out.device)
    rows = (each.double()[pair // (len(places) // len(each))] for each in (left, right))
    return out.double().index_add(0, expert, torch.einsum("pm,pn->pmn", *rows))


def sums_by(add, given):
    out, *others = given
    add(out := out.clone(), *others)
    return out


@pytest.mark.parametrize("settings", CASES)
def test_sums_are_those_of_an_expert_s_pairs_beside_what_was_there(settings):
    given = sums_case(**settings)
    assert error(sums_by(add_grouped_sums, given), exact_sums(*given)) < 1e-6


def test_sums_are_an_operator_whose_products_are_counted():
    given = sums_case("even")
    torch.library.opcheck(add_grouped_sums, given, test_utils=("test_schema", "test_faketensor"))
    with counted() as counter, phase("forward"):
        add_grouped_sums(*given)
    assert counter.work.flops == 2 * len(given[3]) * given[0][0].numel()


def test_a_group_writes_no_row_of_another():
    rows, weights, places, offsets, *_ = case("even")
    out = torch.full((len(places), weights.shape[1]), 7.0)
    grouped_product(out, rows, weights[1:3], places, offsets, 1)
    own = places[offsets[1] : offsets[3]]
    assert (out == 7.0).all(1).sum() == len(places) - len(own) and (out[own] != 7.0).any(1).all()


def test_it_is_an_operator_as_torch_wants_them():
    rows, weights, places, offsets, *extras = case("even", extras=True)
    out = torch.zeros(len(places), weights.shape[1])
    checks = "test_schema", "test_faketensor"
    torch.library.opcheck(grouped_product, (out, rows, weights, places, offsets, 0, *extras), test_utils=checks)


def test_groups_count_the_products_of_all_pairs_between_them():
    given = case("even")
    with counted() as counter, phase("forward"):
        in_groups(grouped_product, given)
    _, weights, places, *_ = given
    assert counter.work.flops == pytest.approx(2 * len(places) * weights[0].numel(), rel=1e-3)


INTERPRETED = """
import sys, torch
sys.path[:0] = sys.argv[1:]
from test_grouped_product import CASES, case, error, exact, exact_sums, in_groups, sums_by, sums_case
from qlora_lite.kernels.grouped_kernel import launch, launch_sums
for number, settings in enumerate(CASES):
    dtype, limit = ((torch.float32, 1e-6), (torch.bfloat16, 2.0**-7), (torch.float16, 2.0**-10))[number % 3]
    given = case(**settings, dtype=dtype)
    added, sums = (None, 3.0)[number % 2], sums_case(**settings, dtype=dtype)
    off = max(error(in_groups(launch, given, added=added), exact(*given, added or 0.0)),
              error(sums_by(launch_sums, sums), exact_sums(*sums)))  # the interpreter rounds to bfloat16 towards zero
    assert off <= limit, (settings, dtype, off)
print("compared")
"""


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
def test_the_kernel_computes_the_same_over_triton_s_interpreter():
    folders = os.path.dirname(__file__), os.path.dirname(os.path.dirname(__file__))
    done = subprocess.run(
        [sys.executable, "-c", INTERPRETED, *folders],
        env=os.environ | {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
    )
    assert "compared" in done.stdout, done.stderr


def compiled(capability, across):
    """Compile the kernel for bfloat16 and a generation of GPUs, with weights whose elements lie one by one across."""
    from triton import compile
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from qlora_lite.kernels import grouped_kernel as ours

    names = ours._kernel.arg_names
    kinds = dict.fromkeys(names, "i32") | dict.fromkeys(("out", "rows", "weights", "bias"), "*bf16")
    kinds |= {"places": "*i64", "offsets": "*i64", "scale": "*fp32"}
    tile = {"PAIRS": ours.BLOCK_PAIRS, "OUT": ours.BLOCK_OUT, "IN": ours.BLOCK_IN_BYTES // 2}
    fixed = {across: 1, "EXPERTS": 128, "IN_FLOAT32": False, "ADD": True} | tile
    whole = {"in_features", "out_features", "expert_stride", "in_stride", "out_stride"} - {across}
    constants = {(names.index(name),): value for name, value in fixed.items()}
    aligned = [number for number, name in enumerate(names) if name in whole or "*" in kinds[name]]
    source = ASTSource(
        ours._kernel,
        kinds | dict.fromkeys(fixed, "constexpr"),
        constants,
        {(number,): [["tt.divisibility", 16]] for number in aligned},
    )
    target = GPUTarget("cuda", 10 * capability[0] + capability[1], 32)
    return compile(source, target=target, options=ours.launch_options(capability, torch.bfloat16))


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
@pytest.mark.parametrize("across", ["in_stride", "out_stride"])
@pytest.mark.parametrize(
    ("capability", "product", "warps", "shared_kib"),
    [
        ((8, 9), "mma.sync", 8, 100),
        *(
            pytest.param(*each, marks=pytest.mark.slow)
            for each in (
                ((8, 0), "mma.sync", 8, 164),
                ((8, 6), "mma.sync", 8, 100),
                ((12, 0), "mma.sync", 8, 100),
                ((9, 0), "wgmma", 4, 228),
                ((10, 0), "tcgen05.mma", 4, 228),
            )
        ),
    ],
)
def test_a_multiprocessor_holds_two_programs_whose_sums_stay_in_registers(
    capability, product, warps, shared_kib, across, tmp_path
):
    from triton import knobs

    found, file = compiled(capability, across), tmp_path / "kernel.cubin"
    file.write_bytes(found.asm["cubin"])
    used = subprocess.check_output([knobs.nvidia.cuobjdump.path, "-res-usage", file], text=True)
    registers, stack = map(int, re.search(r"REG:(\d+) STACK:(\d+)", used).groups())
    assert product in found.asm["ptx"] and found.metadata.num_warps == warps and stack <= 24  # bytes
    assert 2 * registers * 32 * warps <= 2**16 and 2 * (found.metadata.shared + 1024) <= shared_kib * 1024


@pytest.mark.gpu
@pytest.mark.real_card
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_kernel_is_as_exact_as_the_loop_on_a_gpu(dtype):
    for settings in CASES:
        given = case(**settings, dtype=dtype, device="cuda")
        off, limit = (error(in_groups(each, given), exact(*given)) for each in (grouped_product, one_by_one))
        assert off <= 1.1 * limit + 1e-6
        given = sums_case(**settings, dtype=dtype, device="cuda")
        ways = add_grouped_sums, sums_one_by_one
        off, limit = (error(sums_by(each, given), exact_sums(*given)) for each in ways)
        assert off <= 1.1 * limit + 1e-6
