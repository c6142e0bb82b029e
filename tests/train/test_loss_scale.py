"""In float16 the loss is scaled, which keeps small gradients and changes nothing else."""

import math
from types import SimpleNamespace

import pytest
import torch
from tiny import quantized_pair, random_batch, random_factors
from tiny_trainer import trainer

from qlora_lite.adapters.lora.inject import add_lora, lora_parameters
from qlora_lite.errors import TrainingError
from qlora_lite.models.memory_options import MemoryOptions
from qlora_lite.train import loop, loss_scale, text_guards
from qlora_lite.train.causal_lm import causal_lm
from qlora_lite.train.forward import prepare
from qlora_lite.train.loss_scale import LossScale, unscale
from qlora_lite.train.step import accumulate_gradients


def model_in(dtype, norm=1.0):
    """A model whose last norm, and with it every gradient behind it, is that many times as large."""
    model, _ = quantized_pair("llama", dtype=torch.float16)
    model.to(dtype).model.norm.weight.mul_(norm)
    add_lora(model, rank=4, dtype=torch.float32)
    random_factors(model)
    return model.train()


def gradients(model, scale=1.0):
    """Return the gradients of a batch, computed at a scale and divided by it."""
    parameters = [parameter for _, parameter in lora_parameters(model)]
    accumulate_gradients(causal_lm(), model, [prepare(random_batch(), model.device)], scale=scale)
    unscale(parameters, scale)
    found = [parameter.grad for parameter in parameters]
    for parameter in parameters:
        parameter.grad = None
    return found


@pytest.mark.parametrize("scale", [2.0**-10, 2.0**16])
def test_where_nothing_is_too_small_or_too_large_a_scale_changes_no_bit(scale):
    model = model_in(torch.float32)
    assert all(torch.equal(one, other) for one, other in zip(gradients(model, scale), gradients(model), strict=True))


def test_a_gradient_below_what_float16_holds_is_kept_with_a_scale():
    norm = 2.0**-20
    lost, kept = (gradients(model_in(torch.float16, norm), scale) for scale in (1.0, 2.0**16))
    exact = gradients(model_in(torch.float32, norm))
    assert not any(gradient.any() for gradient in lost)
    for gradient, wanted in zip(kept, exact, strict=True):
        assert 0 < (gradient - wanted).norm() <= 0.03 * wanted.norm()


def scaled_trainer(value=2.0**16, **changes):
    training = trainer(compute_dtype=torch.float16, **changes)
    training.loss_scale = LossScale(value)
    return training


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_run_in_float16_learns_what_one_in_float32_does(dtype):
    exact, half = (list(trainer(compute_dtype=type_, dtype=dtype)) for type_ in (torch.float32, torch.float16))
    for one, other in zip(half, exact, strict=True):
        assert one.loss == pytest.approx(other.loss, rel=0.01)
        assert one.grad_norm == pytest.approx(other.grad_norm, rel=0.05)


def test_only_float16_has_a_scale():
    assert [
        trainer(compute_dtype=dtype).loss_scale is None for dtype in (torch.float32, torch.bfloat16, torch.float16)
    ] == [True, True, False]


def test_a_step_that_overflows_is_recomputed_at_half_the_scale_until_it_does_not(monkeypatch, caplog):
    training, seen = scaled_trainer(2.0**20), []
    step = loop.train_step

    def watched(workload, model, batches, optimizer, *rest):
        before = [parameter.detach().clone() for parameter in training.parameters]
        assert all(parameter.grad is None for parameter in training.parameters)
        result = step(workload, model, batches, optimizer, *rest)
        same = all(torch.equal(a, b) for a, b in zip(before, training.parameters, strict=True))
        seen.append((rest[1], math.isfinite(result.grad_norm), same))
        return result

    monkeypatch.setattr(loop, "train_step", watched)
    with caplog.at_level("INFO", "qlora_lite"):
        steps = iter(training)
        first = next(steps)
    assert len(seen) >= 3 and [scale for scale, *_ in seen] == [2.0**20 / 2**n for n in range(len(seen))]
    assert [fine for _, fine, _ in seen] == [False] * (len(seen) - 1) + [True] == [same is False for *_, same in seen]
    found = seen[-1][0]
    assert training.loss_scale == LossScale(found, 0) and (training.step, training.skipped) == (1, 0)
    assert [r.message for r in caplog.records if "loss scale" in r.message] == [
        f"step 1: the loss scale of float16 is {found:g} from now on, after 1.04858e+06"
    ]
    expected = next(iter(same := scaled_trainer(found)))
    assert (first.loss, first.grad_norm) == (expected.loss, expected.grad_norm)
    assert all(torch.equal(a, b) for a, b in zip(training.parameters, same.parameters, strict=True))
    next(steps)
    assert training.loss_scale == LossScale(found, 1)


@pytest.mark.parametrize("place", ["gradient", "loss"])
def test_what_no_scale_helps_is_skipped_as_in_other_types_and_leaves_the_scale(place):
    training = scaled_trainer(4.0, on_not_finite="skip", max_skipped_steps=1)
    calls = []
    if place == "gradient":
        handle = training.parameters[3].register_hook(lambda grad: calls.append(1) or grad * float("nan"))
    else:
        norm = training.model.model.norm
        handle = norm.register_forward_hook(lambda *_: calls.append(1) or _[2] * float("inf"))
    before = [parameter.detach().clone() for parameter in training.parameters]
    steps = iter(training)
    next(steps)
    # of two micro-batches at 4, 2 and 1; a loss that is not finite is looked at once more, and not halved for
    assert len(calls) == (6 if place == "gradient" else 3)
    assert training.loss_scale == LossScale(4.0, 0) and training.skipped == 1
    assert all(torch.equal(a, b) for a, b in zip(before, training.parameters, strict=True))
    handle.remove()
    next(steps)
    assert training.loss_scale == LossScale(4.0, 1)
    assert not all(torch.equal(a, b) for a, b in zip(before, training.parameters, strict=True))


def test_a_loss_beyond_float16_is_answered_with_float32():
    training = scaled_trainer()
    training.model.model.layers[1].mlp.down_proj.lora_B.data.fill_(3e4)
    with pytest.raises(TrainingError, match=r"float16 ends at 65,504: set model\.compute_dtype to float32, lower"):
        next(iter(training))


def test_after_many_steps_without_an_overflow_the_scale_is_doubled():
    scale, finite = LossScale(8.0), SimpleNamespace(loss=1.0, grad_norm=1.0)
    for _ in range(loss_scale.GROWTH_STEPS - 1):
        assert scale.step(lambda _: finite) is finite
    assert scale == LossScale(8.0, loss_scale.GROWTH_STEPS - 1)
    scale.step(lambda _: finite)
    assert scale == LossScale(16.0, 0)
    infinite = SimpleNamespace(loss=1.0, grad_norm=math.inf)
    assert scale.step(lambda value: infinite if value > 8 else finite) is finite
    assert scale == LossScale(8.0, 0)


def test_updates_in_backward_are_refused_in_float16():
    with pytest.raises(TrainingError, match="incompatible with: a model in float16"):
        trainer(
            compute_dtype=torch.float16,
            max_grad_norm=0.0,
            gradient_accumulation_steps=1,
            options=MemoryOptions(optimizer_in_backward=True),
        )


def test_scores_that_exceed_float16_before_they_are_scaled_are_no_fault_of_the_model():
    """transformers writes attention out and scales afterwards; those of Qwen2 are that large."""
    model, _ = quantized_pair("qwen2", dtype=torch.float16)
    for block in model.model.layers:
        for layer in (block.self_attn.q_proj, block.self_attn.k_proj):
            layer.bias.data.fill_(90.0)  # 16 x 90 x 90 is more than 65,504, and a quarter of it is not
    assert math.isfinite(text_guards.logits_error(model))
    model.set_attn_implementation("eager")
    assert not model(torch.arange(5)[None]).logits.isfinite().all()
