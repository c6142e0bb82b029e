"""Where memory runs out the step is done again in smaller pieces and stays the same step; other faults stay faults."""

import math
import weakref

import pytest
import torch
from tiny_trainer import examples, trainer

from qlora_lite.data.tokens.storage import row_lengths
from qlora_lite.errors import DoesNotFitError, TrainingError
from qlora_lite.models.memory_options import MemoryOptions, stream_of
from qlora_lite.offload.stream import BlockStream
from qlora_lite.train import loop
from qlora_lite.train.causal_lm import causal_lm
from qlora_lite.train.out_of_memory import (
    cut,
    free_cached_memory,
    is_out_of_device_memory,
    is_out_of_memory,
    lower_limit,
)
from qlora_lite.train.workload import Workload

CPU_WORDS = "[enforce fail at alloc_cpu.cpp:121] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes."  # noqa: E501
WORDINGS = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity"),
    RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported"),
    RuntimeError("HIP out of memory. Tried to allocate"),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    RuntimeError("CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate(handle)`"),
    RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
    RuntimeError('NVML_SUCCESS == r INTERNAL ASSERT FAILED at "../c10/cuda/CUDACachingAllocator.cpp":1407'),
    RuntimeError(CPU_WORDS),
    RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 12 bytes."),
    RuntimeError("std::bad_alloc"),
    MemoryError(),
]
OTHERS = [
    RuntimeError("mat1 and mat2 shapes cannot be multiplied"),
    RuntimeError("CUDA error: an illegal memory access"),
    RuntimeError("CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasSetStream(handle, stream)`"),
    RuntimeError("CUDA error: device-side assert triggered"),
    ValueError("out of memory"),
    OSError("out of memory"),
]
OPTIONS = dict(max_tokens=40, gradient_accumulation_steps=2, max_steps=3, dtype=torch.float32)


@pytest.mark.parametrize("error", WORDINGS, ids=lambda error: str(error)[:30] or type(error).__name__)
def test_every_allocator_s_words_are_known(error):
    assert is_out_of_memory(error)
    of_the_host = isinstance(error, MemoryError) or "DefaultCPU" in str(error) or "bad_alloc" in str(error)
    assert is_out_of_device_memory(error) is not of_the_host


@pytest.mark.parametrize("error", OTHERS, ids=lambda error: str(error)[:30])
def test_other_errors_are_no_lack_of_memory(error):
    assert not is_out_of_memory(error)


@pytest.mark.parametrize("limit", [None, 1, 7, 14, 20, 25, 10_000])
def test_micro_batches_are_cut_between_rows_and_no_row_is_lost(limit):
    rows = examples(12)
    groups = [rows[:5], rows[5:6], rows[6:]]
    parts = cut(causal_lm(), groups, limit)
    assert [row for part in parts for row in part] == rows
    borders = {0, 5, 6, 12}
    assert borders <= {sum(map(len, parts[:n])) for n in range(len(parts) + 1)}
    if limit is None:
        assert parts == groups
    else:
        assert all(len(part) == 1 or sum(row_lengths(part)) <= limit for part in parts)


def fail_above(monkeypatch, limit, error=WORDINGS[0]):
    """Let memory run out in the loss of inputs that have more tokens than the limit."""
    real, failures = Workload.loss, []

    def limited(workload, model, inputs):
        if sum(inputs.row_lengths) > limit:
            failures.append(sum(inputs.row_lengths))
            raise type(error)(*error.args)  # a new one, since it keeps what was on the way of its raising
        return real(workload, model, inputs)

    monkeypatch.setattr(Workload, "loss", limited)
    return failures


def assert_same_steps(found, expected):
    """Equal within the rounding of float32 in another order."""
    assert [(m.step, m.tokens, m.target_tokens, m.learning_rate) for m in found] == [
        (m.step, m.tokens, m.target_tokens, m.learning_rate) for m in expected
    ]
    for one, other in zip(found, expected, strict=True):
        assert one.loss == pytest.approx(other.loss, rel=1e-5)
        assert one.grad_norm == pytest.approx(other.grad_norm, rel=1e-4)


@pytest.mark.parametrize("error", WORDINGS, ids=lambda error: str(error)[:30] or type(error).__name__)
def test_memory_that_runs_out_in_forward_changes_no_step(monkeypatch, caplog, error):
    whole = trainer(**OPTIONS)
    expected = list(whole)
    failures = fail_above(monkeypatch, 25, error)
    training = trainer(**OPTIONS)
    assert_same_steps(list(training), expected)
    assert failures and training.most_tokens <= 25
    assert sum("memory ran out" in message for message in caplog.messages) == len(failures)
    assert len(failures) <= 2  # later steps are cut before they fail
    for one, other in zip(training.parameters, whole.parameters, strict=True):
        assert (one - other).norm() <= 1e-4 * other.norm()


def run_out_in_backward(training, micro_batch):
    """Let memory run out once, in the backward pass of a micro-batch, when later layers have their gradients."""
    calls = []

    def run_out(grad):
        calls.append(1)
        if len(calls) == micro_batch:
            raise RuntimeError(CPU_WORDS)
        return grad

    training.model.get_submodule("model.layers.0.mlp.up_proj").lora_B.register_hook(run_out)


@pytest.mark.parametrize(
    "options", [MemoryOptions(), MemoryOptions(offload_checkpoints=True, resident_layers=0, tile_tokens=5)]
)
@pytest.mark.parametrize("micro_batch", [1, 2])
def test_memory_that_runs_out_in_backward_leaves_no_gradient_of_the_attempt(micro_batch, options):
    expected = list(trainer(**OPTIONS, options=options))
    training = trainer(**OPTIONS, options=options)
    run_out_in_backward(training, micro_batch)
    assert_same_steps(list(training), expected)
    assert training.most_tokens is not None


def test_a_step_done_again_begins_without_gradients_of_streamed_weights(monkeypatch):
    training, forgotten = trainer(**OPTIONS, options=MemoryOptions(resident_layers=0)), []
    monkeypatch.setattr(BlockStream, "forget", lambda stream: forgotten.append(stream))
    run_out_in_backward(training, 1)
    next(iter(training))
    assert forgotten == [stream_of(training.model)]


def test_a_step_done_again_draws_the_dropout_that_it_would_have_drawn():
    steps = []
    most_tokens = None
    for _ in range(2):
        training = trainer(**OPTIONS, dropout=0.3)
        training.most_tokens = most_tokens
        if most_tokens is None:
            run_out_in_backward(training, 2)
        torch.manual_seed(5)
        steps.append([metrics.loss for metrics in training])
        assert most_tokens in (None, training.most_tokens)
        most_tokens = training.most_tokens
    assert steps[0] == steps[1]


def test_one_row_too_large_is_an_error_that_names_it_and_the_cure(monkeypatch):
    fail_above(monkeypatch, 5)
    training = trainer(**OPTIONS)
    before = [parameter.detach().clone() for parameter in training.parameters]
    with pytest.raises(DoesNotFitError, match=r"the row rows\.jsonl:\d+ alone, with \d+ tokens, needs .*max_tokens"):
        next(iter(training))
    assert all(torch.equal(a, b) for a, b in zip(before, training.parameters, strict=True))


def test_an_unrelated_error_is_raised_as_it_is(monkeypatch):
    fail_above(monkeypatch, 5, OTHERS[0])
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        next(iter(trainer(**OPTIONS)))


@pytest.mark.parametrize("name", ["k_proj", "up_proj"])
def test_what_a_forward_left_between_two_layers_of_one_input_is_gone_before_it_is_tried_again(name, monkeypatch):
    training, left = trainer(**OPTIONS, options=MemoryOptions("none")), []
    layer = next(module for path, module in training.model.named_modules() if path.endswith(name))

    def fails_once(x):
        if not left:
            left.append(weakref.ref(layer.shared._begun.x))
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return type(layer).forward(layer, x)

    layer.forward = fails_once
    monkeypatch.setattr(loop, "free_cached_memory", lambda _device: left.append(left[0]() is None))
    assert_same_steps(list(training), list(trainer(**OPTIONS, options=MemoryOptions("none"))))
    assert left[1] is True


def test_memory_that_runs_out_in_the_update_is_not_tried_again(monkeypatch):
    training = trainer(**OPTIONS)

    def run_out(**_):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(training.optimizer, "step", run_out)
    with pytest.raises(DoesNotFitError, match=r"while the weights were updated .*resume from the last checkpoint"):
        next(iter(training))


def test_memory_that_runs_out_in_evaluation_gives_the_same_loss(monkeypatch):
    training = trainer(**OPTIONS)
    training.model.train()
    expected = training.evaluate(examples(9))
    fail_above(monkeypatch, 25)
    result = training.evaluate(examples(9))
    assert result.loss == pytest.approx(expected.loss, rel=1e-6)
    assert result.target_tokens == expected.target_tokens
    assert training.model.training


def test_the_largest_part_is_halved_and_one_row_cannot_be():
    rows = examples(6)
    parts = [rows[:4], rows[4:]]
    assert lower_limit(causal_lm(), parts, "why") == sum(row_lengths(rows[:4])) // 2
    with pytest.raises(DoesNotFitError, match="why"):
        lower_limit(causal_lm(), [rows[:1]], "why")


def nan_at(training, *steps):
    """Let the gradient of one factor be NaN in the steps given."""
    layer = training.model.get_submodule("model.layers.1.self_attn.o_proj")
    layer.lora_B.register_hook(lambda grad: grad * float("nan") if training.step in steps else grad)


def test_a_step_that_is_not_finite_is_skipped_said_and_counted(caplog):
    training = trainer(on_not_finite="skip", max_skipped_steps=2, max_steps=5)
    nan_at(training, 1, 3)
    factors, found = [], []
    for metrics in training:
        found.append(metrics)
        factors.append([parameter.detach().clone() for parameter in training.parameters])
    assert [math.isfinite(metrics.grad_norm) for metrics in found] == [False, True, False, True, True]
    assert all(torch.equal(a, b) for a, b in zip(factors[1], factors[2], strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(factors[2], factors[3], strict=True))
    assert training.skipped == 2
    skipped = [message for message in caplog.messages if "this step is skipped" in message]
    assert len(skipped) == 2 and all("o_proj.lora_B" in message and "rows.jsonl:" in message for message in skipped)


def test_more_skipped_steps_than_allowed_end_the_run():
    training = trainer(on_not_finite="skip", max_skipped_steps=1, max_steps=5)
    nan_at(training, 2, 3)
    with pytest.raises(TrainingError, match=r"step 3: .*; 1 step skipped before, train\.max_skipped_steps"):
        list(training)


def test_a_limit_below_the_steps_that_were_skipped_before_a_run_was_resumed_ends_it():
    training = trainer(on_not_finite="skip", max_skipped_steps=1, max_steps=5)
    training.skipped = 3
    nan_at(training, 2)
    with pytest.raises(TrainingError, match=r"step 2: .*; 3 steps skipped before, train\.max_skipped_steps"):
        list(training)


def test_a_nan_ends_the_run_unless_told_otherwise():
    training = trainer(max_steps=5)
    nan_at(training, 2)
    with pytest.raises(TrainingError, match="step 2: the gradient of"):
        list(training)


def test_a_limit_that_was_lowered_holds_for_the_memory_probe_too(monkeypatch):
    training = trainer(**OPTIONS)
    training.most_tokens = 20
    seen = []
    real = loop.probe_step
    monkeypatch.setattr(
        loop,
        "probe_step",
        lambda w, m, p, o, inputs, *rest: (seen.append(sum(inputs.row_lengths)), real(w, m, p, o, inputs, *rest)),
    )
    training.probe_memory(examples(5))
    assert seen and seen[0] <= 20


def test_a_gpu_s_memory_is_given_back_when_its_copies_have_ended(monkeypatch):
    card, calls = torch.device("cuda", 0), []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: calls.append(("synchronize", device)))
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: calls.append("empty"))
    monkeypatch.setattr(torch._C, "_host_emptyCache", lambda: calls.append("empty host"), raising=False)
    for initialized, expected in ((False, []), (True, [("synchronize", card), "empty", "empty host"])):
        calls.clear()
        monkeypatch.setattr(torch.cuda, "is_initialized", lambda found=initialized: found)
        free_cached_memory(card)
        assert calls == expected


def test_a_cpu_gets_back_what_each_step_freed_so_that_holes_do_not_grow(monkeypatch):
    given = []
    monkeypatch.setattr(loop, "free_cached_memory", given.append)
    list(trainer(max_steps=3))
    assert given == [torch.device("cpu")] * 3


def test_an_allocator_at_its_limit_is_told_of_in_its_step_and_warned_of_once(monkeypatch, caplog):
    training = trainer(max_steps=3)
    counted = iter([4, 4, 4, 6, 7, 8])  # before and after each step: what came before or between is not a step's
    monkeypatch.setattr(training.meter, "device", torch.device("cuda", 0))
    monkeypatch.setattr(torch.cuda, "memory_stats", lambda _device: {"num_alloc_retries": next(counted)})
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda _device: 0)
    with caplog.at_level("INFO"):
        list(training)
    said = [
        (entry.levelname, entry.message.split(",")[:2]) for entry in caplog.records if "no free piece" in entry.message
    ]
    start = "step {}: the GPU had no free piece of memory for a tensor"
    assert said == [("WARNING", [start.format(2), " 2 times"]), ("INFO", [start.format(3), " 1 times"])]
    assert training.meter.device.type == "cuda" and trainer().meter.allocation_retries() == 0


@pytest.mark.parametrize("is_paged", [False, True])
def test_a_memory_probe_leaves_room_for_states_outside_the_allocator(is_paged, monkeypatch):
    training, made, left = trainer(), [], []
    build = loop.build_optimizer

    def remembered(*arguments, **options):
        optimizer = build(*arguments, **options)
        made.append(weakref.ref(optimizer))
        return optimizer

    monkeypatch.setattr(loop, "build_optimizer", remembered)
    monkeypatch.setattr(loop, "free_cached_memory", lambda _device: left.append(made[0]() is None))
    training.optimizer.is_paged = is_paged  # as a GPU's would say
    training.probe_memory()
    assert left == [True] * is_paged and training.optimizer_bytes  # when the memory probe's own states are gone
