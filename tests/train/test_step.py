"""Accumulation, schedules, clipping and optimizers do what their definitions say."""

import ctypes
import math
from copy import deepcopy
from types import SimpleNamespace

import pytest
import torch
from tiny import quantized_pair, random_batch, random_factors
from tiny_trainer import trainer

from qlora_lite.adapters.lora.inject import add_lora, lora_parameters
from qlora_lite.data.tokens.batch import Batch
from qlora_lite.memory.shapes import planning_for
from qlora_lite.models.memory_options import MemoryOptions, set_memory_options
from qlora_lite.quant.small_batch import few
from qlora_lite.recipe.reference import choices_of, field_at
from qlora_lite.train import loop, optim
from qlora_lite.train.causal_lm import CrossEntropy, causal_lm
from qlora_lite.train.forward import labelled_count, prepare
from qlora_lite.train.gradients import clip_scale, gradient_norms
from qlora_lite.train.objective import LossSum
from qlora_lite.train.optim import BITSANDBYTES_NAMES, build_optimizer, can_page
from qlora_lite.train.settings import lr_factor
from qlora_lite.train.step import accumulate_gradients, evaluate_loss, train_step
from qlora_lite.train.workload import Workload

SCHEDULES = choices_of(field_at(("train", "lr_scheduler")))
LENGTHS = (4, 31, 9, 17, 5, 26, 12, 3)


@pytest.fixture(scope="module")
def model():
    model, _ = quantized_pair("llama")
    add_lora(model, rank=4, alpha=8, dtype=torch.float32)
    random_factors(model)
    return model.train()


def micro_batches(per_batch: int) -> list[Batch]:
    """The same eight ragged rows, so many to a batch; their target tokens differ widely."""
    whole = random_batch(LENGTHS)
    rows = list(
        zip(
            whole.input_ids.split(LENGTHS, 1),
            whole.position_ids.split(LENGTHS, 1),
            whole.labels.split(LENGTHS),
            LENGTHS,
            whole.where,
            strict=True,
        )
    )
    groups = [rows[start : start + per_batch] for start in range(0, len(rows), per_batch)]
    return [
        Batch(torch.cat(ids, 1), torch.cat(positions, 1), torch.cat(labels), lengths, where)
        for ids, positions, labels, lengths, where in (zip(*group, strict=True) for group in groups)
    ]


def gradient(model, batches):
    model.zero_grad(set_to_none=True)
    loss = accumulate_gradients(
        causal_lm(objective=CrossEntropy(32)), model, [prepare(batch, model.device) for batch in batches]
    ).loss.item()
    return loss, torch.cat([p.grad.flatten() for _, p in lora_parameters(model)])


@pytest.mark.parametrize("per_batch", [1, 2, 4])
def test_gradient_accumulation_over_ragged_rows_equals_one_large_batch(model, per_batch):
    loss, whole = gradient(model, micro_batches(8))
    other, parts = gradient(model, micro_batches(per_batch))
    assert other == pytest.approx(loss, rel=1e-6)
    assert (parts - whole).norm() < 1e-5 * whole.norm()


def test_the_loss_of_a_step_is_the_mean_over_target_tokens_and_not_over_batches(model):
    batches = micro_batches(1)
    losses = [evaluate_loss(causal_lm(), model, [batch]).loss for batch in batches]
    counts = [labelled_count(batch) for batch in batches]
    by_token = sum(loss * count for loss, count in zip(losses, counts, strict=True)) / sum(counts)
    assert gradient(model, batches)[0] == pytest.approx(by_token, rel=1e-5)
    assert abs(by_token - sum(losses) / len(losses)) > 1e-2


def test_evaluation_leaves_mode_and_gradients_and_has_the_exponential_as_perplexity(model):
    model.zero_grad(set_to_none=True)
    result = evaluate_loss(causal_lm(), model, micro_batches(4))
    assert model.training
    assert all(p.grad is None for p in model.parameters())
    assert result.perplexity == pytest.approx(math.exp(result.loss))
    assert result.target_tokens == sum(map(labelled_count, micro_batches(4)))


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_schedule_warms_up_to_the_peak_and_then_follows_its_name(schedule):
    factors = [lr_factor(step, 20, schedule, 0.25) for step in range(1, 21)]
    assert factors[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert factors[5] == 1.0
    expected = {
        "constant": lambda i: 1.0,
        "linear": lambda i: 1 - i / 15,
        "cosine": lambda i: (1 + math.cos(math.pi * i / 15)) / 2,
    }[schedule]
    assert factors[5:] == pytest.approx([expected(i) for i in range(15)])
    assert min(factors) > 0, "no step is wasted"


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("warmup", [0.0, 0.03, 1.0])
@pytest.mark.parametrize("total", [1, 2, 7])
def test_a_short_run_has_positive_rates_up_to_the_peak(schedule, warmup, total):
    factors = [lr_factor(step, total, schedule, warmup) for step in range(1, total + 1)]
    assert all(0 < factor <= 1 for factor in factors)
    assert max(factors) == 1


@pytest.mark.parametrize(
    ("total", "warmup", "peak"), [(100, 0.07, 7), (50, 0.14, 7), (100, 0.071, 8), (1000, 0.03, 30)]
)
def test_a_share_of_the_steps_is_what_it_is_in_decimals(total, warmup, peak):
    assert next(step for step in range(1, total) if lr_factor(step, total, "constant", warmup) == 1) == peak


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_clipping_scales_the_gradients_to_the_norm(dtype):
    parameters = [torch.nn.Parameter(torch.zeros(3, dtype=dtype)), torch.nn.Parameter(torch.zeros(1, dtype=dtype))]
    parameters[0].grad, parameters[1].grad = torch.tensor([3, 4, 0], dtype=dtype), torch.tensor([12], dtype=dtype)
    norms = gradient_norms(parameters)
    assert norms.tolist() == [5.0, 12.0] and norms.dtype == torch.float32
    norm = torch.linalg.vector_norm(norms)
    for max_norm, after in ((1.0, 1.0), (5.0, 5.0), (100.0, 13.0)):
        assert norm * clip_scale(norm, max_norm) == pytest.approx(after, rel=1e-6)
    assert clip_scale(norm, 0.0) is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", [*BITSANDBYTES_NAMES, "adamw_torch"])
def test_every_optimizer_takes_a_step_and_lowers_the_loss(name, dtype):
    model, _ = quantized_pair("llama")
    torch.manual_seed(0)
    add_lora(model, ["q_proj", "up_proj"], rank=64, alpha=64, dtype=dtype)  # 4,096 weights and more: 8-bit states
    parameters = [p for _, p in lora_parameters(model)]
    assert max(p.numel() for p in parameters) >= 4096
    optimizer = build_optimizer(parameters, name, 1e-3 if "lion" in name else 5e-3, weight_decay=0.0)
    batch = random_batch()
    losses = []
    for _ in range(8):
        losses.append(train_step(causal_lm(), model.train(), [batch], optimizer, 1.0).loss)
        optimizer.zero_grad(set_to_none=True)
    assert losses[-1] < losses[0] - 0.1
    assert all(p.isfinite().all() for p in parameters)
    eight_bit = {t.dtype for state in optimizer.state.values() for t in state.values() if isinstance(t, torch.Tensor)}
    assert (torch.uint8 in eight_bit) == name.endswith("8bit")


@pytest.mark.parametrize(("error", "attribute", "pages"), [(0, 1, True), (0, 0, False), (801, 1, False)])
def test_a_gpu_s_driver_is_asked_whether_states_can_be_paged(error, attribute, pages, monkeypatch):
    def get_attribute(found, number, device):
        assert (number, device) == (89, 1)  # as cuda.h has it
        found._obj.value = attribute
        return error

    monkeypatch.setattr(ctypes, "CDLL", lambda name: SimpleNamespace(cuDeviceGetAttribute=get_attribute))
    assert can_page(torch.device("cuda", 1)) is pages
    assert not can_page(torch.device("cpu")) and not can_page(torch.device("meta"))


def test_without_a_driver_nothing_is_paged(monkeypatch):
    def load(name):
        raise OSError(f"{name}: cannot open shared object file")

    monkeypatch.setattr(ctypes, "CDLL", load)
    assert not can_page(torch.device("cuda", 0))


@pytest.mark.gpu
@pytest.mark.parametrize("pages", [True, False])
@pytest.mark.parametrize("name", [name for name in BITSANDBYTES_NAMES if name.startswith("paged")])
def test_on_a_gpu_states_are_paged_where_that_can_be(name, pages, monkeypatch):
    monkeypatch.setattr(optim, "can_page", lambda device: pages)
    weight = torch.nn.Parameter(torch.zeros(512, 512, device="cuda"))
    assert build_optimizer([weight], name, 0.1, 0.0).is_paged is pages


@pytest.mark.parametrize("name", [*BITSANDBYTES_NAMES, "adamw_torch"])
def test_weight_decay_shrinks_a_weight_by_its_share_of_the_rate(name):
    weight = torch.nn.Parameter(torch.ones(64, 64))
    optimizer = build_optimizer([weight], name, 0.1, weight_decay=0.5)
    weight.grad = torch.zeros_like(weight)
    optimizer.step()
    assert torch.allclose(weight, torch.full_like(weight, 1 - 0.1 * 0.5), atol=1e-6)


@pytest.mark.parametrize("name", ["adamw_torch", "adamw_8bit"])
@pytest.mark.parametrize("device_type", ["cpu", "cuda"])
def test_a_step_that_is_not_finite_leaves_the_weights_the_states_and_the_other_gradients(model, name, device_type):
    parameters = [p for _, p in lora_parameters(model)]
    before = [p.detach().clone() for p in parameters]
    optimizer = build_optimizer(parameters, name, 0.1, 0.0)
    model.zero_grad(set_to_none=True)
    with planning_for(device_type):  # as if on a GPU, which looks by itself
        train_step(causal_lm(), model, micro_batches(8), optimizer, 1.0)
        is_target = [p.detach().clone() for p in parameters]
        states = deepcopy([optimizer.state[p] for p in parameters])
        handle = parameters[3].register_hook(lambda grad: grad * float("nan"))
        model.zero_grad(set_to_none=True)
        result = train_step(causal_lm(), model, micro_batches(8), optimizer, 1.0)
        handle.remove()
    assert math.isfinite(result.loss) and math.isnan(result.grad_norm)
    assert result.norms.isnan().nonzero().tolist() == [[3]]
    assert [number for number, p in enumerate(parameters) if not p.grad.isfinite().all()] == [3]
    assert all(torch.equal(a, b) for a, b in zip(is_target, parameters, strict=True))
    for p, state in zip(parameters, states, strict=True):
        assert all(torch.equal(torch.as_tensor(state[key]), torch.as_tensor(optimizer.state[p][key])) for key in state)
        p.data.copy_(before.pop(0))


def test_kept_blocks_are_not_recomputed_and_change_no_gradient(model):
    runs = [0, 0]
    model.train()

    def note(number):
        def hook(*_):
            runs[number] += 1

        return hook

    hooks = [layer.mlp.register_forward_pre_hook(note(n)) for n, layer in enumerate(model.model.layers)]
    gradients = {}
    try:
        for kept, expected in ((0, [2, 2]), (1, [2, 1]), (9, [1, 1])):
            runs[:] = [0, 0]
            set_memory_options(model, MemoryOptions(uncheckpointed_layers=kept))
            gradients[kept] = gradient(model, [random_batch(LENGTHS)])[1]
            assert runs == expected
    finally:
        set_memory_options(model, MemoryOptions("none"))
        for hook in hooks:
            hook.remove()
    assert torch.equal(gradients[0], gradients[1])
    assert torch.equal(gradients[0], gradients[9])


def test_gradients_that_are_zero_are_told_once(monkeypatch, caplog):
    still = trainer(max_steps=3)
    step = loop.train_step
    monkeypatch.setattr(loop, "train_step", lambda *given: step(*given)._replace(grad_norm=0.0))
    assert len(list(still)) == 3
    (said,) = [message for message in caplog.messages if "every gradient is zero" in message]
    assert said.startswith("step 2 learned nothing: every gradient is zero")


def sums_in_float32() -> bool:
    settings = torch.backends.cuda.matmul
    return not (settings.allow_bf16_reduced_precision_reduction or settings.allow_fp16_reduced_precision_reduction)


def test_a_trainer_s_products_add_in_float32_and_the_process_is_left_as_it_was():
    training, found, settings = trainer(max_steps=1), [], torch.backends.cuda.matmul
    training.model.get_input_embeddings().register_forward_hook(lambda *_: found.append(sums_in_float32()))
    for parameter in training.parameters:
        parameter.register_post_accumulate_grad_hook(lambda _: found.append(sums_in_float32()))
    for call in (
        lambda: training.probe_memory(training.examples),
        lambda: training.evaluate(training.examples),
        lambda: list(training),
    ):
        found.clear()
        call()
        assert found and all(found)
        assert not sums_in_float32()
    settings.allow_bf16_reduced_precision_reduction = False, False  # with split K forbidden too
    try:
        list(trainer(max_steps=1))
        assert not settings.allow_bf16_reduced_precision_reduction
        assert not settings.allow_bf16_reduced_precision_reduction_split_k
        assert settings.allow_fp16_reduced_precision_reduction
    finally:
        settings.allow_bf16_reduced_precision_reduction = True


def test_the_loss_of_few_rows_is_evaluated_with_the_products_of_training(model, monkeypatch):
    """A GPU's fused product rounds before an update of LoRA is added, which would swallow small ones."""
    seen, few_tokens = [], torch.zeros(1, 16)
    monkeypatch.setattr(Workload, "loss", lambda *_: seen.append(few(few_tokens)) or LossSum(torch.zeros(())))
    evaluate_loss(causal_lm(), model, [random_batch((9,))])
    assert few(few_tokens) and seen == [False]
