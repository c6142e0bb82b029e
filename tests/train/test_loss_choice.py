"""The loss that a memory probe chooses is the one that training computes."""

import pytest
import torch
from tiny_trainer import trainer

from qlora_lite.errors import TrainingError
from qlora_lite.kernels import fused_loss, trial
from qlora_lite.kernels.loss import AUTO_CHUNK_TOKENS, chunked_cross_entropy, head_logits
from qlora_lite.models.memory_options import MemoryOptions
from qlora_lite.train import causal_lm

WHOLE = dict(max_grad_norm=0.0, gradient_accumulation_steps=1, options=MemoryOptions(optimizer_in_backward=True))


@pytest.fixture
def other(monkeypatch):
    """Another package's loss, chosen wherever one is looked for; gives what it was called with."""
    calls = []

    def loss(hidden, targets, head):
        calls.append((hidden.requires_grad, tuple(hidden.shape), len(targets)))
        return torch.nn.functional.cross_entropy(head_logits(hidden, head), targets, reduction="sum")

    monkeypatch.setitem(fused_loss.FUSED, "other", ("json", loss))
    monkeypatch.setattr(causal_lm, "candidates", lambda setting, *_: [] if setting == "off" else ["other"])
    monkeypatch.setattr(causal_lm, "choose_loss", lambda names, *_: names[0])
    return calls


def chosen(training):
    return training.workload.objective.fused


@pytest.mark.parametrize("changes", [{}, WHOLE])
def test_every_step_and_the_memory_probe_compute_the_chosen_loss_and_evaluations_ours(other, changes):
    training, plain = trainer(**changes, fused_loss="auto"), trainer(**changes)
    for each in (training, plain):
        each.choose_loss()
        each.probe_memory(each.examples[:2])
    assert chosen(training) == "other" and chosen(plain) is None
    assert len(other) == 1 and other[0][0]
    steps, losses = list(training), [metrics.loss for metrics in plain]
    assert len(other) == 1 + sum(training.settings.gradient_accumulation_steps for _ in steps)
    assert all(with_gradient and shape[0] == count > 0 for with_gradient, shape, count in other)
    assert [metrics.loss for metrics in steps] == pytest.approx(losses, rel=1e-5)
    training.evaluate(training.examples[:2])
    assert len(other) == 1 + sum(training.settings.gradient_accumulation_steps for _ in steps)


def test_the_losses_are_tried_on_the_hidden_states_of_the_largest_micro_batch(other, monkeypatch):
    tried = []
    monkeypatch.setattr(causal_lm, "choose_loss", lambda *given: tried.append(given))
    training = trainer("gemma2", fused_loss="auto", options=MemoryOptions(loss_chunk_tokens=7), dropout=0.5)
    training.choose_loss()
    assert not training.model.training
    [(names, hidden, targets, head, chunk_tokens)] = tried
    assert (names, chunk_tokens, chosen(training)) == (["other"], 7, None)
    assert hidden.shape == (len(targets), head.weight.shape[1]) and not hidden.requires_grad
    assert head.softcap == training.model.config.final_logit_softcapping
    losses = [metrics.loss for metrics in training]
    again = trainer("gemma2", options=MemoryOptions(loss_chunk_tokens=7), dropout=0.5)
    assert losses == [metrics.loss for metrics in again]


@pytest.mark.parametrize(("recorded", "kept"), [("other", "other"), ("chunked", None), ("gone", None)])
def test_a_run_that_goes_on_keeps_its_loss_where_it_can_be_had(other, recorded, kept):
    training = trainer(fused_loss="auto")
    training.choose_loss(recorded)
    assert chosen(training) == kept and not other


def test_a_chosen_loss_that_is_not_finite_is_named_with_the_cure(other, monkeypatch):
    training = trainer(fused_loss="auto")
    training.choose_loss()
    monkeypatch.setitem(fused_loss.FUSED, "other", ("json", lambda hidden, *_: hidden.float().sum() * float("nan")))
    with pytest.raises(TrainingError, match=r"The step's loss was other's, .* which memory\.fused_loss off computes"):
        list(training)


@pytest.mark.gpu
@pytest.mark.parametrize("repeatable", [False, True])
def test_a_gpu_tries_what_is_installed_unless_bits_must_repeat(monkeypatch, repeatable):
    same = lambda *inputs: chunked_cross_entropy(*inputs, AUTO_CHUNK_TOKENS)  # noqa: E731
    for name in list(fused_loss.FUSED):
        monkeypatch.setitem(fused_loss.FUSED, name, ("no_such_package", None))
    monkeypatch.setitem(fused_loss.FUSED, "same", ("json", same))
    monkeypatch.setattr(trial, "FASTER", 1e9)
    training = trainer(device="cuda", fused_loss="auto")
    torch.use_deterministic_algorithms(repeatable)
    try:
        training.choose_loss()
    finally:
        torch.use_deterministic_algorithms(False)
    assert chosen(training) == (None if repeatable else "same")
    assert training.meter.peak_bytes() > 0 and len(list(training)) == 4
