"""Updating each factor in the backward pass is the same step, and its gradient is gone then."""

from dataclasses import replace
from itertools import islice, product

import pytest
import torch
from jobs import changed, new_job
from tiny import config_of
from tiny_trainer import examples, trainer

from qlora_lite.adapters.lora.inject import lora_layers
from qlora_lite.errors import DoesNotFitError, TrainingError
from qlora_lite.memory.ledger import Ledger
from qlora_lite.models.memory_options import MemoryOptions
from qlora_lite.models.packing import runs_unpacked
from qlora_lite.planning import simulate
from qlora_lite.train.batches import BatchShape
from qlora_lite.train.causal_lm import causal_lm
from qlora_lite.train.checkpoints import Checkpoint
from qlora_lite.train.loop import largest_batches
from qlora_lite.train.objective import LossSum
from qlora_lite.train.optim import UpdatesInBackward, build_optimizer
from qlora_lite.train.state import STATE, capture, restore
from qlora_lite.train.workload import Workload

IN_BACKWARD = MemoryOptions(optimizer_in_backward=True)
WHOLE = dict(max_grad_norm=0.0, gradient_accumulation_steps=1, micro_batch_size=2)


def run(options, **changes):
    training = trainer(**(WHOLE | changes), options=options)
    return training, list(training)


OPTIMIZERS = "adamw_torch", "adamw_8bit", "paged_adamw_32bit", "lion_8bit"
WITHOUT_AND_WITH_MORE = [
    MemoryOptions("none"),
    MemoryOptions(offload_checkpoints=True, resident_layers=0, tile_tokens=5),
]


@pytest.mark.parametrize(
    ("optimizer", "dtype", "options"),
    [
        *product(OPTIMIZERS, [torch.float32, torch.bfloat16], [MemoryOptions()]),
        *product(["adamw_torch"], [torch.float32, torch.bfloat16], WITHOUT_AND_WITH_MORE),
        *product(["lion_8bit"], [torch.bfloat16], WITHOUT_AND_WITH_MORE),
    ],
)
def test_the_steps_are_those_of_updates_after_backward(optimizer, dtype, options):
    # what is rounded stochastically depends on what is updated together, which adamw_torch's does not
    rounds = optimizer == "adamw_torch"
    settings = dict(optimizer=optimizer, dtype=dtype, rank=64, max_steps=2, stochastic_rounding=rounds)
    plain, steps = run(options, **settings)
    training, in_backward = run(replace(options, optimizer_in_backward=True), **settings)
    assert len(steps) == 2
    for one, other in zip(in_backward, steps, strict=True):
        assert (one.loss, one.grad_norm, one.tokens) == (other.loss, other.grad_norm, other.tokens)
    assert all(torch.equal(a, b) for a, b in zip(training.parameters, plain.parameters, strict=True))


@pytest.mark.parametrize("options", [IN_BACKWARD, replace(IN_BACKWARD, checkpointing="none")])
@pytest.mark.parametrize("work", [lambda training: next(iter(training)), lambda training: training.probe_memory()])
def test_no_gradients_exist_at_one_time_but_those_of_projections_that_share_an_input(options, work):
    training = trainer(**WHOLE, options=options)
    with Ledger(timeline=True) as ledger:
        ledger.watch(training.model)
        work(training)
    gradients = max(moment.breakdown.get("gradients", 0) for moment in ledger.timeline)
    layers = [layer for _, layer in lora_layers(training.model)]
    sets = {layer.shared.layers if layer.shared else (layer,) for layer in layers}
    sizes = {layers: sum(layer.lora_A.nbytes + layer.lora_B.nbytes for layer in layers) for layers in sets}
    assert 0 < gradients <= max(sizes.values()) < sum(sizes.values()) / 4


@pytest.mark.parametrize("options", [IN_BACKWARD, replace(IN_BACKWARD, offload_checkpoints=True, resident_layers=0)])
def test_the_plan_is_what_a_step_on_real_tensors_needs(options):
    config = config_of("llama", num_hidden_layers=5)
    rows = BatchShape((20, 11), 29)
    job = new_job(config, rows, rows, rank=32, compute_dtype=torch.float32, max_grad_norm=0.0, options=options)
    planned, real = (simulate._run(job, device, False) for device in (simulate.META, simulate.CPU))
    assert planned.moments == real.moments
    assert planned.work == real.work
    after = simulate.simulate_whole(changed(job, options=replace(options, optimizer_in_backward=False)))
    assert planned.peak().total < after.peak().total


@pytest.mark.parametrize("optimizer", ["adamw_8bit", "adamw_32bit"])
def test_a_run_that_goes_on_rounds_by_chance_as_one_that_was_not_interrupted(optimizer):
    settings = dict(optimizer=optimizer, dtype=torch.bfloat16, rank=64)
    plain, steps = run(IN_BACKWARD, **settings)
    first, second = (trainer(**(WHOLE | settings), options=IN_BACKWARD) for _ in range(2))
    begun = list(islice(first, 2))
    tensors, numbers = capture(first)
    restore(second, Checkpoint(first.step, tensors, {STATE: numbers}))
    assert [metrics.loss for metrics in (*begun, *second)] == [metrics.loss for metrics in steps]
    assert all(torch.equal(a, b) for a, b in zip(second.parameters, plain.parameters, strict=True))


def test_a_memory_probe_leaves_no_trace():
    plain, steps = run(IN_BACKWARD)
    training = trainer(**WHOLE, options=IN_BACKWARD)
    layer = training.model.get_submodule("model.layers.0.self_attn.o_proj")
    broken = layer.lora_B.register_hook(lambda grad: grad * float("nan"))
    training.probe_memory(training.examples[:2])
    broken.remove()
    assert [metrics.loss for metrics in training] == [metrics.loss for metrics in steps]
    assert all(torch.equal(a, b) for a, b in zip(training.parameters, plain.parameters, strict=True))


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"max_grad_norm": 1.0}, r"train\.max_grad_norm 1\.0 \(set it to 0\)"),
        ({"gradient_accumulation_steps": 2}, r"train\.gradient_accumulation_steps 2 \(set it to 1\)"),
        ({"on_not_finite": "skip"}, r"train\.on_not_finite skip \(set it to stop\)"),
        ({"max_grad_norm": 1.0, "on_not_finite": "skip"}, r"train\.max_.* to 0\); train\.on_.* \(set it to stop\)"),
    ],
)
def test_what_needs_all_gradients_is_refused(changes, reason):
    with pytest.raises(TrainingError, match=f"optimizer_in_backward is incompatible with: {reason}$"):
        trainer(**(WHOLE | changes), options=IN_BACKWARD)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("mamba", MemoryOptions()),
        ("lfm2", MemoryOptions(layers_per_checkpoint=2)),
        ("lfm2", MemoryOptions(resident_layers=0, offload_checkpoints=True)),
        ("lfm2", MemoryOptions("none")),
        ("recurrent_gemma", MemoryOptions(uncheckpointed_layers=1)),
    ],
)
def test_sequences_that_run_one_by_one_add_up_their_parts_of_a_gradient_before_its_update(name, options):
    plain, steps = run(options, model_type=name, max_steps=2)
    training, in_backward = run(replace(options, optimizer_in_backward=True), model_type=name, max_steps=2)
    assert runs_unpacked(training.model)
    for one, other in zip(in_backward, steps, strict=True):
        assert (one.loss, one.grad_norm) == (other.loss, other.grad_norm)
    assert all(torch.equal(a, b) for a, b in zip(training.parameters, plain.parameters, strict=True))


def test_a_part_that_does_not_come_leaves_the_update_to_the_end():
    used, unused = (torch.nn.Parameter(torch.ones(4)) for _ in range(2))
    with UpdatesInBackward(build_optimizer([used, unused], "adamw_torch", 0.1, 0.0), passes=3) as updates:
        for _ in range(2):
            used.sum().backward()
        assert used.eq(1).all() and used.grad is None
    updates.update_rest()
    assert torch.allclose(used, torch.tensor(0.9)) and updates.norms().tolist() == [4.0, 0.0]


def test_a_loss_that_is_not_finite_leaves_the_weights(monkeypatch):
    training = trainer(**WHOLE, options=IN_BACKWARD)
    before = [parameter.detach().clone() for parameter in training.parameters]
    plain = Workload.loss
    monkeypatch.setattr(Workload, "loss", lambda *arguments: LossSum(plain(*arguments).sum * float("nan")))
    with pytest.raises(TrainingError, match=r"not finite.*weights were left as they were"):
        next(iter(training))
    assert all(torch.equal(a, b) for a, b in zip(before, training.parameters, strict=True))


def test_a_gradient_that_is_not_finite_ends_the_run():
    training = trainer(**WHOLE, options=IN_BACKWARD)
    layer = training.model.get_submodule("model.layers.1.self_attn.o_proj")
    layer.lora_B.register_hook(lambda grad: grad * float("nan"))
    with pytest.raises(TrainingError, match=r"lora_\w+ is not finite.*has changed weights already.*--resume"):
        next(iter(training))


def test_a_layer_without_a_gradient_is_named_after_the_first_step():
    training = trainer(**WHOLE, options=IN_BACKWARD)
    training.model.get_submodule("model.layers.1.mlp.up_proj").lora_B.register_hook(torch.zeros_like)
    with pytest.raises(TrainingError, match=r"1 of the wrapped layers got no gradient, first .*\.1\.mlp\.up_proj"):
        next(iter(training))


@pytest.mark.parametrize("layer", ["model.layers.0.mlp.up_proj", "model.layers.1.mlp.up_proj"])
def test_memory_that_runs_out_is_an_error_with_the_cure(layer):
    training = trainer(**WHOLE, options=IN_BACKWARD)

    def run_out(grad):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 64 bytes.")

    training.model.get_submodule(layer).lora_B.register_hook(run_out)
    with pytest.raises(DoesNotFitError, match=r"in a step that memory.optimizer_in_backward keeps whole.*--resume"):
        next(iter(training))


def test_memory_that_runs_out_in_forward_is_no_reason_to_cut_the_step(monkeypatch):
    training = trainer(**WHOLE, options=IN_BACKWARD)

    def run_out(*arguments):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(Workload, "loss", run_out)
    with pytest.raises(DoesNotFitError, match=r"optimizer_in_backward keeps whole \(CUDA out of memory"):
        next(iter(training))


def test_an_evaluation_that_was_cut_leaves_the_steps_whole(monkeypatch):
    expected = list(trainer(**WHOLE, options=IN_BACKWARD))
    training = trainer(**WHOLE, options=IN_BACKWARD)
    plain = Workload.loss

    def limited(workload, model, inputs):
        if not model.training and sum(inputs.row_lengths) > 20:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return plain(workload, model, inputs)

    monkeypatch.setattr(Workload, "loss", limited)
    training.evaluate(examples(9))
    largest, _ = largest_batches(causal_lm(), training.examples, (), training.epochs, training.most_tokens)
    assert training.most_tokens <= 20 < sum(largest.row_lengths)
    assert [metrics.loss for metrics in training] == [metrics.loss for metrics in expected]


def test_a_weight_whose_gradient_comes_in_two_parts_is_refused():
    shared = torch.nn.Parameter(torch.ones(4))
    with UpdatesInBackward(build_optimizer([shared], "adamw_torch", 0.1, 0.0)):
        shared.sum().backward()
        with pytest.raises(TrainingError, match="got its gradient in two parts"):
            shared.sum().backward()
