"""The sections of tools/gpu_check: each yields findings as plain values, the most valuable first.

A finding with "problem" is a failure; one with "skipped" says why something could not run. ``REHEARSAL`` runs the same
code on tiny shapes on any machine, so that the kit cannot rot between two GPUs.
"""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from itertools import product
from pathlib import Path

import torch
from transformers import GenerationConfig

from common.cases import (
    OUT_OF_MEMORY,
    check_case,
    free_memory,
    memory_options_of,
    model_of,
    plan_cases,
    rearranged,
    trainer_of,
)
from common.memory_options import by_saving, measure, memory_option_cases, resident_cases, saving_options
from common.models import DEMO_MODELS, config_of, dtype_of
from gpu.caps import CappedDevice, chosen_row, length_rows, machine_at_hand, plan_below
from gpu.numbers import gradient_rows, lengths_row, rate_rows
from gpu.peers import SIDES, STEPS, WARMUP, Comparison, compare_losses, why_not_compiled
from gpu.process import LIMIT_SECONDS
from gpu.ranks import STEPS as RANK_STEPS
from gpu.ranks import rank_rows
from qlora_lite.adapters.lora.inject import lora_parameters
from qlora_lite.errors import QloraLiteError
from qlora_lite.inference.decode import decode
from qlora_lite.memory.meter import free_bytes
from qlora_lite.models.anatomy import device_of
from qlora_lite.models.load import resolve_device
from qlora_lite.models.memory_options import MemoryOptions, set_memory_options
from qlora_lite.planning.machine import Machine
from qlora_lite.planning.predict import Prediction, predict
from qlora_lite.planning.simulate import Job
from qlora_lite.train.batches import BatchShape
from qlora_lite.train.causal_lm import TextSpec, causal_lm
from qlora_lite.train.forward import prepare
from qlora_lite.train.loop import largest_batches
from qlora_lite.train.optim import build_optimizer, can_page
from qlora_lite.train.state import capture
from qlora_lite.train.step import accumulate_gradients
from qlora_lite.units import format_bytes
from simulated_gpu.runtime import LIBRARY

GIB, MIB = 2**30, 2**20
# Whole runs and compiling take long: last. ("compile" is in the names of all cases of memory options, as
# compile=False.)
ORDER = "not compiled and not goes_on", "goes_on and not compiled", "compiled"
EQUAL_SCALE = 2.0**10  # of the loss in float16, so that there are gradients to compare, and finite ones
COUNTED = 20  # passed tests after which a row says how many, so that it is known where there was no time for all
PAGED_RANK = 64
REHEARSED_SECONDS = 180  # of each run of several processes, where nothing is measured
TIMED = 3  # passes, of which the fastest counts
ROOT = Path(__file__).resolve().parents[2]
FREE = """
import sys
import torch
from qlora_lite.memory.meter import free_bytes
device = torch.device(sys.argv[1])
for _ in sys.stdin:
    print(free_bytes(device), flush=True)
"""  # asked from another process, since a process that asks has a context
# Of a prediction, beyond which it counts as wrong. Allocated memory has the rests of pieces that are not worth cutting,
# which a plan counts apart (``memory.process.GROWING_SEGMENT_BYTES``).
TENSOR_ERROR, ALLOCATED_ERRORS = 0.03, (-0.03, 0.05)
HOST_WEIGHTS = MemoryOptions(resident_layers=0, host_embeddings=True, host_head=True)
FROM_DISK = replace(HOST_WEIGHTS, stream_from="disk")  # random weights have no file: what a disk takes is not in it
SAME_BITS = (  # weights leave the device once
    MemoryOptions("selective"),
    MemoryOptions("selective", offload_checkpoints=True),
    MemoryOptions(offload_checkpoints=True),
    HOST_WEIGHTS,
    replace(HOST_WEIGHTS, offload_checkpoints=True),
    FROM_DISK,
)


@dataclass(frozen=True)
class Scale:
    """The sizes of all sections: those for a GPU, or tiny ones; ``small_model`` is for a small or slow GPU."""

    dry_run: bool
    models: tuple[str, ...]
    small_model: str
    tokens: int
    long_tokens: int
    caps_bytes: tuple[int, ...]
    long_caps_bytes: tuple[int, ...]
    shapes: tuple[tuple[int, int], ...]  # rows, tokens a row, of the comparison with the peers
    short_shapes: tuple[tuple[int, int], ...]
    paged_weights: int
    spare_bytes: int
    random_steps: int  # of random lengths
    prompts: tuple[int, ...]  # that are answered at once
    answered: int  # tokens of each


CARD = Scale(
    False,
    ("llama-8b", "llama-7b"),
    "llama-1b",
    2048,
    16384,
    tuple(n * GIB for n in (8, 12, 6, 16, 24)),
    (6 * GIB, 8 * GIB),
    ((1, 2048), (4, 512)),
    ((32, 128), (64, 64)),
    2**28,
    768 * MIB,
    50,
    (1, 8, 32),
    64,
)
REHEARSAL = Scale(
    True,
    ("tiny",),
    "tiny",
    256,
    512,
    (104 * MIB, 88 * MIB, 700 * MIB),
    (96 * MIB,),
    ((2, 64),),
    ((8, 16),),
    2**24,
    64 * MIB,
    5,
    (1, 2),
    12,
)


def resident_task(
    section: str, steps: float, scale: Scale, machine: Machine, parts: tuple[int, ...] = (1, 2, 4)
) -> tuple[str, int]:
    """Return the largest model and row that the GPU has room for and, by estimate, time for in half of a section.

    Args:
        steps: that the section takes with it, all weights on the GPU.
        parts: of the scale's tokens that a row may have.
    """
    for name, part in product((scale.models[0], scale.small_model), parts):
        tokens = scale.tokens // part
        needed = needs(name, tokens, MemoryOptions(), machine)
        seconds = steps * machine.seconds(needed.simulation.work)
        if needed.peak_bytes <= machine.memory_bytes and seconds <= LIMIT_SECONDS[section] / 2:
            break
    return name, tokens


def needs(name: str, tokens: int, options: MemoryOptions, machine: Machine) -> Prediction:
    """Predict a step of one row, all of it learned."""
    config = config_of(name)
    work = causal_lm(spec=TextSpec(config, compute_dtype=dtype_of(config)))
    return predict(Job(work, BatchShape((tokens,), tokens - 1), None, machine.device_type, options=options))


def gpu_tests() -> list[Path]:
    """Return the files with tests marked gpu."""
    return [path for path in sorted((ROOT / "tests").rglob("test_*.py")) if "mark.gpu" in path.read_text("utf-8")]


def tests(scale: Scale) -> Iterator[dict]:
    """Run the tests marked gpu; without a GPU they are collected and skip."""
    files = gpu_tests()
    if dtype_of(config_of(scale.small_model)) != torch.bfloat16:
        yield {"skipped": "they compute in bfloat16"}
        return
    if LIBRARY in os.environ:
        yield {"skipped": "tools/check/order runs them over a simulated GPU"}
        return
    if importlib.util.find_spec("pytest") is None:
        yield {"skipped": "pytest is not installed"}
        return
    if importlib.util.find_spec("hypothesis") is None:
        left_out = [path for path in files if "hypothesis" in path.read_text("utf-8")]
        files = [path for path in files if path not in left_out]
        yield {"left_out": [path.name for path in left_out], "why": "hypothesis is not installed"}
    command = [sys.executable, "-m", "pytest", "-v", "-m", "gpu", "-p", "no:cacheprovider", *map(str, files)]
    if importlib.util.find_spec("pytest_timeout") is None:
        command += ["-o", "addopts=-ra", "-W", "ignore:Unknown config option:pytest.PytestConfigWarning"]
    if not scale.dry_run:
        command.append("--require-gpu")
    passed = 0
    for which in ORDER:
        for row in _pytest([*command, "-k", which]):
            passed += "passed" in row
            if "passed" not in row:
                yield row
            elif passed % COUNTED == 0:
                yield {"passed": passed}


def _pytest(command: list[str]) -> Iterator[dict]:
    """Run pytest; yield each test that ended as soon as it has, and its last line."""
    last = ""
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        for line in process.stdout:
            print(line, end="", flush=True)
            last = line.strip() or last
            outcome = re.match(r"(\S+::.*) (PASSED|FAILED|ERROR) ", line)
            if outcome and outcome[2] == "PASSED":
                yield {"passed": outcome[1]}
            elif outcome:
                yield {"test": outcome[1], "problem": outcome[2].lower()}
    yield {"summary": last} | ({"problem": "a test failed"} if process.returncode else {})


def streamed(scale: Scale) -> Iterator[dict]:
    """Compare weights and checkpoints in host memory with the resident step: gradients bit for bit, memory, speed."""
    device = resolve_device()
    machine, steps = machine_at_hand(device), 2 + TIMED + (1 + TIMED) * len(SAME_BITS)
    name, tokens = resident_task("streamed", steps, scale, machine)
    case = {"model": name, "tokens": tokens, "checkpointing": "block"}
    yield {"kind": "task", **case}
    model = _with_factors(case, device)
    trainer = trainer_of(case, model)
    inputs = prepare(largest_batches(causal_lm(), trainer.examples, (), trainer.epochs)[0], device_of(model))
    trainer.meter.close()
    del trainer  # and with it the model, when another takes its place
    torch.use_deterministic_algorithms(True)
    expected = _gradients(model, inputs, MemoryOptions())
    again = _gradients(model, inputs, MemoryOptions())
    yield {"kind": "equal", "options": "resident, a second time"} | _equality(again, expected)
    resident = _speed(model, inputs, MemoryOptions())
    yield {"kind": "speed", "options": "resident", **resident}
    for options in SAME_BITS:
        if options == HOST_WEIGHTS:
            model = rearranged(model, device, options)
        if options == FROM_DISK:
            del model  # which is tied to where its weights are
            model = rearranged(_with_factors(case, device), device, options)
        needed = needs(name, tokens, options, machine).peak_bytes
        if needed > machine.memory_bytes:
            yield {"side": _named(options), "skipped": f"needs {format_bytes(needed)}, more than there is"}
            continue
        torch.use_deterministic_algorithms(True)
        yield {"kind": "equal", "options": _named(options)} | _equality(_gradients(model, inputs, options), expected)
        found = _speed(model, inputs, options)
        found["of_resident_speed"] = found["tokens_per_second"] / resident["tokens_per_second"]
        yield {"kind": "speed", "options": _named(options), **found}


def _with_factors(case: dict, device: torch.device):
    """Return the case's model with factors that change its results, the same on every call."""
    torch.manual_seed(0)
    model = model_of(case, device)
    for path, parameter in lora_parameters(model):
        if path.endswith("lora_B"):
            torch.nn.init.normal_(parameter, std=0.01)
    return model


def _named(options: MemoryOptions) -> str:
    """Name what differs from the defaults."""
    plain = asdict(MemoryOptions())
    return ", ".join(f"{name} {value}" for name, value in asdict(options).items() if value != plain[name])


def _gradients(model, inputs, options: MemoryOptions) -> list[torch.Tensor]:
    set_memory_options(model, options)
    scale = EQUAL_SCALE if model.dtype == torch.float16 else 1.0
    loss = accumulate_gradients(causal_lm(), model.train(), [inputs], scale).loss
    found = [loss.cpu(), *(parameter.grad.cpu() for _, parameter in lora_parameters(model))]
    for _, parameter in lora_parameters(model):
        parameter.grad = None
    return found


def _equality(found: list[torch.Tensor], expected: list[torch.Tensor]) -> dict:
    different = sum(not torch.equal(one, other) for one, other in zip(found, expected, strict=True))
    row = {"tensors": len(found), "different": different, "finite": all(each.isfinite().all() for each in found)}
    return row | ({"problem": f"{different} of {len(found)} tensors differ"} if different else {})


def _speed(model, inputs, options: MemoryOptions) -> dict:
    """Return tokens a second of forward and backward in the ordinary mode, and the allocator's peak."""
    torch.use_deterministic_algorithms(False)
    on_gpu = inputs.input_ids.is_cuda
    seconds = []
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    for _ in range(TIMED):
        started = time.perf_counter()
        _gradients(model, inputs, options)
        seconds.append(time.perf_counter() - started)
    peak = {"peak_bytes": torch.cuda.max_memory_allocated()} if on_gpu else {}
    return {"tokens_per_second": inputs.input_ids.numel() / min(seconds), **peak}


def free_memory_row(scale: Scale, device: torch.device) -> dict:
    """Return what is free before this process has a context, with one, after a first step and after a first save.

    A context is the first difference; what kernels take that are loaded later is the others' without what torch's
    allocator holds then.
    """
    command = [sys.executable, "-c", FREE, str(device)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:

        def free() -> int:
            if device.type == "cuda" and torch.cuda.is_initialized():
                torch.cuda.synchronize(device)
            print(file=other.stdin, flush=True)
            return int(other.stdout.readline())

        def held() -> int:
            return torch.cuda.memory_reserved(device) if device.type == "cuda" else 0

        row = {"kind": "free memory", "before_context_bytes": free()}
        torch.empty(1, device=device).fill_(0)
        row |= {"after_context_bytes": free(), "context_held_bytes": held()}
        case = {"model": scale.small_model, "tokens": scale.tokens, "checkpointing": "block"}
        trainer = trainer_of(case, model_of(case, device))
        next(iter(trainer))
        row |= {"after_step_bytes": free(), "step_held_bytes": held()}
        capture(trainer)
        row |= {"after_save_bytes": free(), "save_held_bytes": held()}
        other.stdin.close()
    trainer.meter.close()
    return row


def plan(scale: Scale) -> Iterator[dict]:
    """Compare predicted with measured memory for the table of results; first what a process takes beside tensors."""
    device = resolve_device()
    yield free_memory_row(scale, device)
    machine = machine_at_hand(device)
    tiny = [{"model": "tiny", "tokens": scale.tokens, "checkpointing": way} for way in ("block", "none")]
    for case in tiny if scale.dry_run else plan_cases(True):
        free_memory(device)
        random = case["model"] not in DEMO_MODELS  # and large
        needed = needs(case["model"], case["tokens"], memory_options_of(case), machine).peak_bytes if random else 0
        if needed > machine.memory_bytes:
            yield {"side": str(case), "skipped": f"needs {format_bytes(needed)}, more than there is"}
            continue
        try:
            row = check_case(case)
        except OUT_OF_MEMORY as error:
            yield case | {"problem": str(error).partition(".")[0]}
            continue
        errors = prediction_errors(row["predicted_tensor_bytes"] / row["measured_tensor_bytes"], row, device.type)
        yield row | ({"problem": f"prediction of {' and '.join(errors)} is off"} if errors else {})


def numbers(scale: Scale) -> Iterator[dict]:
    """Compare gradients with float64, zeros with random operands, and steps of random lengths with their budget."""
    device = resolve_device()
    machine = machine_at_hand(device)
    dtype = dtype_of(config_of(scale.models[0]))
    types = (torch.float16,) if dtype == torch.float16 else (dtype, torch.float16)
    yield from gradient_rows(scale.models[0], scale.tokens, device, types)
    yield from rate_rows(scale.models[0], scale.tokens, device, dtype)
    name, tokens = resident_task("numbers", scale.random_steps, scale, machine)
    budget = needs(name, tokens, MemoryOptions(), machine).peak_bytes
    yield lengths_row(name, tokens, scale.random_steps, budget, device)


def caps(scale: Scale) -> Iterator[dict]:
    """Run the planner's choices below caps, then longest sequences."""
    capped = CappedDevice()
    for name, cap in product(scale.models, scale.caps_bytes):
        yield chosen_row(capped, name, scale.tokens, cap)
    for cap in scale.long_caps_bytes:  # long steps: what there is no time for is the last
        yield from length_rows(capped, scale.models[0], scale.tokens, cap)


def peers(scale: Scale) -> Iterator[dict]:
    """Compare tokens a second with peft + bitsandbytes + transformers, and Liger where it is installed; then the loss
    alone with Liger's and cut-cross-entropy's."""
    device = resolve_device()
    machine = CappedDevice().machine
    comparisons = []
    # each group of rows has half of the time; short rows stay as short as they are, of a smaller model if need be
    for shapes, parts in ((scale.shapes, (1, 2, 4)), (scale.short_shapes, (1,))):
        steps = 2 * SIDES * (WARMUP + STEPS) * sum(rows * length for rows, length in shapes) / scale.tokens
        name, tokens = resident_task("peers", steps, scale, machine, parts)
        for rows, whole in shapes:
            length = whole * tokens // scale.tokens
            planned = plan_below(machine, name, rows * length, machine.memory_bytes)
            comparisons.append(Comparison(name, rows, length, planned, device))
            yield from comparisons[-1].plain()
    yield from compare_losses(comparisons[0].name, comparisons[0].tokens, device)
    for comparison in comparisons:  # last: a compiler may take all the time that is left
        yield from comparison.compiled()


def answers(scale: Scale) -> Iterator[dict]:
    """Compare tokens a second behind prompts, by transformers' loop and by steps in memory that stays."""
    device = resolve_device()
    name, tokens = resident_task("answers", 2, scale, machine_at_hand(device))
    model = model_of({"model": name, "tokens": tokens, "checkpointing": "none"}, device).eval()
    for prompts in scale.prompts:
        ids = torch.randint(0, model.config.vocab_size, (prompts, tokens // 8), device=device)
        loop, fixed = (_answered(model, ids, scale.answered, own) for own in (None, decode))
        same = (loop.pop("ids") == fixed.pop("ids")).float().mean().item()
        for side, row in (("loop", loop), ("fixed", fixed)):
            yield {"side": side, "model": name, "prompts": prompts, "tokens": tokens // 8, **row, "same_tokens": same}


def _answered(model, ids: torch.Tensor, tokens: int, own: Callable | None) -> dict:
    """Answer greedily; return the tokens, how many are made a second behind the first, and the allocator's peak."""
    seconds = []
    for new in (1, tokens):
        if ids.is_cuda:
            torch.cuda.reset_peak_memory_stats()
        config = GenerationConfig(max_new_tokens=new, do_sample=False, use_cache=True, pad_token_id=0)
        started = time.perf_counter()
        out = model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), generation_config=config, custom_generate=own
        )
        found = out[:, ids.shape[1] :].tolist()  # waits for the GPU
        seconds.append(time.perf_counter() - started)
    peak = {"peak_bytes": torch.cuda.max_memory_allocated()} if ids.is_cuda else {}
    each = max(1e-9, seconds[1] - seconds[0]) / (tokens - 1)  # one token of every prompt
    return {"ids": torch.tensor(found), "tokens_per_second": len(ids) / each, "token_seconds": each, **peak}


def options(scale: Scale) -> Iterator[dict]:
    """Measure the memory option table, every row in this process: a GPU's counters are exact from row to row.

    The first with attention's results kept, and the one before it, are then measured at a long row, where it shows;
    then the memory options that need their weights on the device, compiled blocks last.
    """
    device = resolve_device()
    machine = machine_at_hand(device)
    rows = len(memory_option_cases(scale.models[0], scale.tokens, list(saving_options(scale.tokens))))
    rows += len(resident_cases(scale.models[0], scale.tokens))
    name, tokens = resident_task("options", 3 * rows, scale, machine)
    order = by_saving(name, tokens, machine.device_type)
    if dtype_of(config_of(name)) == torch.float16:  # whose overflows are seen too late to update in backward
        saving = saving_options(tokens)
        order = [option for option in order if not saving[option].get("optimizer_in_backward")]
    table = memory_option_cases(name, tokens, order)
    at_length = memory_option_cases(name, scale.long_tokens * tokens // scale.tokens, order)
    first = next(number for number, case in enumerate(at_length) if case["checkpointing"] == "selective")
    rows = [(case, 2) for case in table] + [(case, 1) for case in at_length[first - 1 : first + 1]]
    for case, steps in [*rows, *((case, 2) for case in resident_cases(name, tokens))]:
        yield option_row(case, steps, machine)
        free_memory(device)


def option_row(case: dict, steps: int, machine: Machine) -> dict:
    """Measure a row of the memory option table."""
    if case.get("compile") and (reason := why_not_compiled(machine.device_type)):
        return {"side": case["option"], "skipped": reason}
    try:
        row = measure(case, warmup=1, steps=steps)
    except QloraLiteError as error:  # blocks that cannot be compiled here
        return case | {"problem": str(error)}
    problem = option_problem(row, machine)
    return row | ({"problem": problem} if problem else {})


def option_problem(row: dict, machine: Machine) -> str:
    """Say what is wrong with a row of the memory option table that was measured on a machine; "" is nothing."""
    if "failed" in row:
        return "it was predicted to fit, and memory ran out" if row["planned_bytes"] <= machine.memory_bytes else ""
    errors = prediction_errors(row["predicted_bytes"] / row["measured_bytes"], row, machine.device_type)
    return f"prediction of {' and '.join(errors)} is off" if errors else ""


def prediction_errors(tensor_share: float, row: dict, device_type: str) -> list[str]:
    """Name what was predicted wrong; ``tensor_share`` is predicted over measured, of the tensors."""
    errors = ["tensors"] if abs(tensor_share - 1) > TENSOR_ERROR else []
    if device_type == "cuda":
        allocated = row["predicted_process_bytes"] / row["measured_process_bytes"] - 1
        errors += [] if ALLOCATED_ERRORS[0] <= allocated <= ALLOCATED_ERRORS[1] else ["allocated memory"]
    return errors


def paged(scale: Scale) -> Iterator[dict]:
    """Step an optimizer whose states do not fit beside what fills the GPU: paged it must work, and change nothing."""
    device = resolve_device()
    if device.type == "cuda" and not can_page(device):
        yield {"skipped": "the GPU and the host cannot use the same memory at one time (WSL, or a share of a GPU)"}
        return
    expected, seconds = _optimized("adamw_32bit", scale, device)
    yield {"kind": "with room", "optimizer": "adamw_32bit", "seconds": seconds}
    filled = None
    if device.type == "cuda":
        free_memory(device)
        needed = 2 * 2 * scale.paged_weights  # bf16 weights and gradients
        filled = torch.empty(
            torch.cuda.mem_get_info()[0] - needed - scale.spare_bytes, dtype=torch.uint8, device=device
        )
        try:
            _optimized("adamw_32bit", scale, device)
            yield {"kind": "filled GPU", "optimizer": "adamw_32bit", "problem": "it should not have fitted"}
        except torch.OutOfMemoryError:
            yield {"kind": "filled GPU", "optimizer": "adamw_32bit", "fits": False}
        free_memory(device)
    found, seconds = _optimized("paged_adamw_32bit", scale, device)
    equal = torch.equal(found, expected)
    row = {
        "kind": "filled GPU",
        "optimizer": "paged_adamw_32bit",
        "fits": True,
        "seconds": seconds,
        "equal": equal,
        "states_bytes": 8 * scale.paged_weights,
        "free_bytes": scale.spare_bytes,
    }
    if filled is None:
        row |= {"kind": "without a GPU", "note": "without CUDA nothing is paged: ordinary memory, the same numbers"}
    yield row | ({} if equal else {"problem": "paged states changed the update"})
    del filled
    for name in ("adamw_32bit", "paged_adamw_32bit"):
        yield paged_run(name, scale, device)


def paged_run(optimizer: str, scale: Scale, device: torch.device) -> dict:
    """Train a model with adapters of high rank, whose states are worth paging; return speed and memory."""
    free_memory(device)
    case = {
        "model": scale.small_model,
        "tokens": scale.tokens // 4,
        "checkpointing": "block",
        "rank": PAGED_RANK,
        "optimizer": optimizer,
    }
    trainer = trainer_of(case, model_of(case, device), 1 + TIMED)
    before = free_bytes(device)
    metrics = list(trainer)
    trainer.meter.close()
    return {
        "kind": f"a run, r = {PAGED_RANK}",
        "model": case["model"],
        "tokens": case["tokens"],
        "optimizer": optimizer,
        "seconds": min(step.seconds for step in metrics[1:]),
        "loss": metrics[-1].loss,
        "peak_bytes": metrics[-1].peak_bytes,
        "states_bytes": 8 * sum(p.numel() for p in trainer.parameters),
        "free_before_bytes": before,
        "free_after_bytes": free_bytes(device),
    }


def _optimized(name: str, scale: Scale, device: torch.device) -> tuple[torch.Tensor, float]:
    """Take three steps on weights of a fixed seed; return a part of them and the seconds of the last step."""
    pieces = max(1, scale.paged_weights // 2**25)  # too large to be joined: there is no room for copies
    generator = torch.Generator(device).manual_seed(0)
    weights = []
    for _ in range(pieces):
        values = torch.randn(scale.paged_weights // pieces, generator=generator, device=device).bfloat16()
        weights.append(torch.nn.Parameter(values))
        weights[-1].grad = values.flip(0) * 0.01
    optimizer = build_optimizer(weights, name, 1e-2, 0.0, stochastic_rounding=False)  # there is no room for copies
    for _ in range(3):
        started = time.perf_counter()
        optimizer.step()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    return torch.cat([weight.detach()[:4096].cpu() for weight in weights]), time.perf_counter() - started


def ranks(scale: Scale) -> Iterator[dict]:
    """Compare all GPUs, a process each and data parallel, with one of them; kill one of the processes."""
    device = resolve_device()
    count = torch.cuda.device_count() if device.type == "cuda" else 2
    if count < 2:
        yield {"skipped": "this machine has one GPU, and two or more can train together"}
        return
    name, tokens = resident_task("ranks", RANK_STEPS * (count + 2), scale, machine_at_hand(device))
    yield from rank_rows(name, tokens, count, REHEARSED_SECONDS if scale.dry_run else LIMIT_SECONDS["ranks"])


SECTIONS: dict[str, Callable[[Scale], Iterator[dict]]] = {
    "tests": tests,
    "streamed": streamed,
    "plan": plan,
    "numbers": numbers,
    "caps": caps,
    "peers": peers,
    "answers": answers,
    "options": options,
    "paged": paged,
    "ranks": ranks,
}
