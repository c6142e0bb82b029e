"""A plan's ledger holds the scratch memory of a GPU's kernels, and has no need of the GPU."""

import pytest
import torch
from jobs import new_job
from tiny import build_tiny

from qlora_lite.kernels import fused_attention
from qlora_lite.memory.marks import phase
from qlora_lite.memory.shapes import planning_for
from qlora_lite.models.memory_options import MemoryOptions
from qlora_lite.planning.plan_ledger import GPU_SCRATCH, PlanLedger, on_real_tensors
from qlora_lite.planning.simulate import CPU, META, _run, remembered
from qlora_lite.train.batches import BatchShape


def gradients(device_type, device, **settings):
    """Return a ledger of attention's backward, and the gradients."""
    inputs = [torch.empty(1, 2, 40, 16, dtype=torch.bfloat16, device=device, requires_grad=True) for _ in range(3)]
    with planning_for(device_type), PlanLedger(device_type, allocation_bytes=1, **settings) as ledger:
        out = fused_attention.fused_attention(*inputs, None, None)
        with phase("backward"):
            found = torch.autograd.grad(out, inputs, torch.empty_like(out))
    return ledger, found


@pytest.mark.parametrize(("device_type", "held"), [("cuda", 12_345), ("cpu", 0)])
def test_scratch_is_held_while_an_operator_runs_and_on_a_gpu_alone(device_type, held, monkeypatch):
    peaks = []
    for scratch_bytes in (held, 0):
        monkeypatch.setitem(GPU_SCRATCH, fused_attention.BACKWARDS[0], lambda *_, size=scratch_bytes, **__: size)
        ledger, found = gradients(device_type, "meta", run=remembered)
        peaks.append(ledger.peak.total)
        assert ledger.now().total == sum(tensor.nbytes for tensor in found)
    assert peaks[0] - peaks[1] == held


def test_operators_that_only_a_gpu_has_give_memory_where_a_plan_needs_real_tensors(monkeypatch):
    monkeypatch.setattr(fused_attention, "MAX_SCRATCH_BYTES", 1)  # so that one head goes back at a time
    with pytest.raises(NotImplementedError):
        gradients("cuda", "cpu")
    ledger, found = gradients("cuda", "cpu", run=on_real_tensors)
    assert [tensor.shape for tensor in found] == [(1, 2, 40, 16)] * 3
    planned, _ = gradients("cuda", "meta", run=remembered)
    assert ledger.peak.total == planned.peak.total


def test_scratch_keeps_no_tensor_longer_than_autograd_does_on_real_ones():
    job = new_job(
        build_tiny("llama").config,
        BatchShape((200, 60), 250),
        None,
        device_type="cuda",
        compute_dtype=torch.float32,
        optimizer="adamw_torch",
        options=MemoryOptions(kernels="plain"),
    )
    planned, real = (_run(job, device, False).moments for device in (META, CPU))
    saved = [
        {key: moment.breakdown.get("saved activations") for key, moment in moments.items() if key[0] == "backward"}
        for moments in (planned, real)
    ]
    assert saved[0] == saved[1] and len(saved[0]) > 20
