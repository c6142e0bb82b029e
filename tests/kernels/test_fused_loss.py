"""Another package's loss in place of ours: tried, compared, and taken only where it is better."""

import importlib.util
import os
import subprocess
import sys

import pytest
import torch

from qlora_lite.kernels import fused_loss
from qlora_lite.kernels.fused_loss import candidates, choose_loss, errors_of, exact_loss
from qlora_lite.kernels.loss import Head, chunked_cross_entropy, head_logits
from qlora_lite.kernels.trial import Trial, foreign_errors

CPU = torch.device("cpu")
OURS = Trial(1.0, 1000, 1e-5, 2e-3)


def inputs(tokens=13, hidden_size=24, words=5000, softcap=None, dtype=torch.bfloat16):
    random = torch.Generator().manual_seed(0)
    hidden = torch.randn(tokens, hidden_size, generator=random).to(dtype)
    weight = (torch.randn(words, hidden_size, generator=random) * 0.3).to(dtype)
    return hidden, torch.randint(words, (tokens,), generator=random), Head(weight, softcap=softcap)


def ours(hidden, targets, head):
    return chunked_cross_entropy(hidden, targets, head, 5)


@pytest.mark.parametrize("softcap", [None, 3.0])
def test_the_reference_is_float64_s_loss_and_gradient_of_its_mean(softcap):
    hidden, targets, head = inputs(softcap=softcap, dtype=torch.float64)
    leaf = hidden.clone().requires_grad_()
    logits = leaf @ head.weight.T
    logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
    total = torch.nn.functional.cross_entropy(logits, targets, reduction="sum")
    (total / len(targets)).backward()
    found = exact_loss(hidden, targets, head)
    assert torch.allclose(found[0], total, rtol=1e-12) and torch.allclose(found[1], leaf.grad, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("softcap", [None, 3.0])
def test_the_errors_of_ours_are_those_of_bfloat16_and_of_a_wrong_one_large(softcap):
    given = inputs(softcap=softcap)
    loss_error, gradient_error = errors_of(ours, *given)
    assert loss_error < 1e-4 and gradient_error < 4e-3
    loss_error, gradient_error = errors_of(lambda *x: ours(*x) + ours(*x).detach(), *given)
    assert loss_error > 0.9 and gradient_error < 4e-3
    assert errors_of(lambda *x: 2 * ours(*x) - ours(*x).detach(), *given)[1] > 0.9


def chosen(monkeypatch, caplog, **trials):
    """What is chosen among losses that took so much, or ended with an error; and what is said."""
    table = {name: (name, lambda *_: None) for name in trials}

    def trial_of(loss, *_):
        name = next((name for name, (_, other) in table.items() if other is loss), None)
        found = OURS if name is None else trials[name]
        if isinstance(found, Exception):
            raise found
        return found

    monkeypatch.setattr(fused_loss, "FUSED", table)
    monkeypatch.setattr(fused_loss, "try_loss", trial_of)
    with caplog.at_level("INFO"):
        return choose_loss(list(trials), *inputs(), 5), caplog.text


def test_the_fastest_of_those_that_are_as_good_is_chosen(monkeypatch, caplog):
    fast, faster = OURS._replace(seconds=0.8, gradient_error=5e-3), OURS._replace(seconds=0.7, peak_bytes=10)
    assert chosen(monkeypatch, caplog, a=fast)[0] == "a"
    assert chosen(monkeypatch, caplog, a=fast, b=faster)[0] == "b"
    name, said = chosen(monkeypatch, caplog, b=faster, a=fast)
    assert name == "b" and "b takes 0.70 of the time" in said and "b is used" in said


@pytest.mark.parametrize(
    ("trial", "why"),
    [
        (OURS._replace(seconds=0.96), "takes 0.96 of the time of the chunked loss\n"),
        (OURS._replace(seconds=0.5, peak_bytes=2**21), "not used, since it takes 2 MiB and not 0"),
        (OURS._replace(seconds=0.5, gradient_error=7e-3), "not used, since its gradient is off by 7.0e-03, at most 6"),
        (OURS._replace(seconds=0.5, gradient_error=float("nan")), "not used, since its gradient is off by nan"),
        (OURS._replace(seconds=0.5, value_error=0.01), "not used, since its value is off by 1.0e-02, at most 7.3e-04"),
        (ImportError("no triton\nmore"), "a does not run here (ImportError: no triton)\n"),
        (torch.OutOfMemoryError("CUDA out of memory."), "a does not run here (OutOfMemoryError: CUDA out of memory.)"),
    ],
)
def test_a_loss_that_is_no_better_or_fails_leaves_ours_and_the_reason_is_said(monkeypatch, caplog, trial, why):
    name, said = chosen(monkeypatch, caplog, a=trial)
    assert name is None and why in said and "the chunked loss stays" in said


def test_what_is_no_error_of_a_foreign_package_is_not_hidden(monkeypatch, caplog):
    with pytest.raises(ZeroDivisionError):
        chosen(monkeypatch, caplog, a=ZeroDivisionError())
    assert subprocess.SubprocessError in foreign_errors()


class Gpu:
    """A device that says it is a GPU, and is equal to a tensor's that lies on the CPU."""

    type = "cuda"

    def __eq__(self, other):
        return other == CPU

    __hash__ = None


@pytest.fixture
def there(monkeypatch):
    monkeypatch.setattr(fused_loss, "installed", lambda: ["liger"])


def test_auto_tries_what_is_installed_on_a_gpu_with_a_plain_head(there):
    head = inputs()[2]
    assert candidates("auto", head, Gpu()) == ["liger"]
    for other in (head._replace(scale=0.5), head._replace(bias=head.weight[0]), head._replace(weight=object())):
        assert candidates("auto", other, Gpu()) == []
    assert candidates("auto", head, CPU) == [] == candidates("off", head, Gpu())


def test_a_repeatable_run_tries_none(there):
    torch.use_deterministic_algorithms(True)
    try:
        assert candidates("auto", inputs()[2], Gpu()) == []
    finally:
        torch.use_deterministic_algorithms(False)


def test_only_packages_that_are_there_are_found(monkeypatch):
    monkeypatch.setattr(fused_loss, "FUSED", {"a": ("json", None), "b": ("no_such_package", None)})
    assert fused_loss.installed() == ["a"]


INTERPRETED = """
import sys, torch
sys.path[:0] = sys.argv[1:]
from test_fused_loss import errors_of, inputs, ours
from qlora_lite.kernels.fused_loss import FUSED
from qlora_lite.kernels.trial import GRADIENT_ROUNDING, VALUE_ROUNDING, WORSE
given = inputs()
found, own = errors_of(FUSED["liger"][1], *given), errors_of(ours, *given)
for found, own, least in zip(found, own, (VALUE_ROUNDING, GRADIENT_ROUNDING)):
    assert found <= WORSE * max(own, least), (found, own)
print("compared")
"""


@pytest.mark.skipif(
    not (importlib.util.find_spec("liger_kernel") and importlib.util.find_spec("triton")),
    reason="liger-kernel and triton are not installed",
)
def test_liger_s_loss_is_about_as_exact_as_ours_over_triton_s_interpreter():
    done = subprocess.run(
        [sys.executable, "-c", INTERPRETED, os.path.dirname(__file__)],
        env=os.environ | {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
    )
    assert "compared" in done.stdout, done.stderr


@pytest.mark.gpu
def test_ours_is_tried_on_a_gpu():
    hidden, targets, head = inputs(tokens=64)
    given = hidden.cuda(), targets.cuda(), head._replace(weight=head.weight.cuda())
    trial = fused_loss.try_loss(ours, *given)
    logits = head_logits(given[0], given[2]).nbytes
    assert trial.seconds > 0 and trial.gradient_error < 4e-3 and trial.value_error < 1e-3
    assert hidden.nbytes < trial.peak_bytes < 2 * logits
    plain = fused_loss.try_loss(
        lambda h, t, x: torch.nn.functional.cross_entropy(head_logits(h, x), t, reduction="sum"), *given
    )
    assert plain.peak_bytes > trial.peak_bytes and plain.gradient_error < 4e-3
