"""A run computes with those fused kernels of a GPU that are no worse on its own shapes."""

import sys
import types

import pytest
import tiny_trainer
import torch
from tiny import quantized_pair
from tiny_trainer import trainer
from torch._decomp import decomposition_table

from qlora_lite.errors import TrainingError
from qlora_lite.kernels import attention, flex_attention, gated, norm, trial
from qlora_lite.kernels.block_attention import block_attention
from qlora_lite.kernels.gated import GatedMLP
from qlora_lite.kernels.norm import LeanNorm
from qlora_lite.kernels.packed_attention import FORWARD, sequence_ends
from qlora_lite.models import kernels as model_kernels
from qlora_lite.models.kernels import EXPERTS, FLEX, GATED, KERNELS, kernels_of, use_kernels
from qlora_lite.models.memory_options import MemoryOptions, place, set_memory_options, stream_of
from qlora_lite.offload.around import wrappers
from qlora_lite.train import kernels
from qlora_lite.train.forward import Inputs
from qlora_lite.train.kernels import check_kernels, choose_kernels

aten = torch.ops.aten
OF_LLAMA = {*KERNELS} - {EXPERTS, GATED}


@pytest.fixture(autouse=True)
def no_liger(monkeypatch):
    monkeypatch.setattr(model_kernels, "installed", lambda: [])


def fused_norms(model):
    return {norm.fused for norm in wrappers(model, LeanNorm)}


@pytest.mark.parametrize(
    ("options", "names"),
    [
        (MemoryOptions(), OF_LLAMA),
        (MemoryOptions(kernels="plain"), set()),
        (MemoryOptions(compile=True), set()),
    ],
)
def test_kernels_are_allowed_unless_plain_operators_are_asked_for_or_a_compiler_makes_its_own(options, names):
    model, _ = quantized_pair("llama")
    assert fused_norms(model) == {False} and not kernels_of(model)
    set_memory_options(model, options)
    assert fused_norms(model) == {bool(names)} and kernels_of(model) == names


def test_norms_that_run_tile_by_tile_are_fused_like_the_others():
    model, _ = quantized_pair("llama")
    count = len(list(wrappers(model, LeanNorm)))
    set_memory_options(model, MemoryOptions(tile_tokens=5, kernels="plain"))
    set_memory_options(model, MemoryOptions(tile_tokens=8))
    assert len(list(wrappers(model, LeanNorm))) == count and fused_norms(model) == {True}
    use_kernels(model, ())
    assert fused_norms(model) == {False}


def test_norms_that_are_tried_are_there_although_blocks_are_streamed():
    model, _ = quantized_pair("qwen3", num_hidden_layers=4)
    options, tokens = MemoryOptions(resident_layers=1, tile_tokens=4), torch.arange(9)
    set_memory_options(place(model, torch.device("cpu"), options), options)
    norms, *_ = kernels._seen(model, Inputs(tokens[None] + 3, tokens[None], (5, 4), tokens, tokens))
    assert len(norms) == 2, "of hidden states and of heads"
    assert not any(stream_of(model).holds(norm.weight) for norm, _ in norms)
    assert norms[0][1].shape[1] == 4, "a whole tile"


def test_a_trainer_computes_with_no_kernel_that_nobody_has_tried():
    training = trainer()
    assert not kernels_of(training.model) and fused_norms(training.model) == {False}


def test_a_run_that_goes_on_keeps_its_kernels():
    for recorded, kept in (([], set()), (["norms"], {"norms"}), (["norms", "gone"], {"norms"}), (None, set())):
        training = trainer()
        training.choose_kernels(recorded)
        assert kernels_of(training.model) == kept
    plain = trainer(options=MemoryOptions(kernels="plain"))
    plain.choose_kernels(["norms"])
    assert not kernels_of(plain.model)


def test_a_resumed_run_whose_kernels_do_not_run_any_more_ends_with_the_cure(monkeypatch):
    model, tokens = quantized_pair("llama")[0], torch.arange(9)
    inputs = Inputs(tokens[None] + 3, tokens[None], (5, 4), tokens, tokens)
    use_kernels(model, ["norms"])
    check_kernels(model, ["norms"], inputs)
    with pytest.raises(TrainingError, match=r"memory.kernels: .*\(gated, norms\).* \(liger-kernel is not installed\)"):
        check_kernels(model, ["norms", GATED], inputs)

    def broken(*_):
        raise RuntimeError("no compiler\nmore")

    monkeypatch.setattr(kernels, "hidden_states", broken)
    with pytest.raises(TrainingError, match=r"\(norms\).* \(no compiler\)\. .*memory.kernels=plain and --force"):
        check_kernels(model, ["norms"], inputs)


@pytest.fixture
def chosen(monkeypatch, caplog):
    """Give what is chosen, and said, where a norm's kernels give so much times the right value."""
    monkeypatch.setattr(kernels, "timed", lambda run, _: (run(), (1.0, 0))[1])
    monkeypatch.setattr(norm, "_kernels_take", lambda *_: True)
    backward = decomposition_table[aten._fused_rms_norm_backward.default]
    monkeypatch.setattr(norm, "_FUSED_BACKWARD", backward)

    def choose(factor=1.0, faster=2.0, forward=None):
        def value(*args):
            y, one_over_rms = aten._fused_rms_norm(*args)
            return factor * y, one_over_rms

        monkeypatch.setattr(norm, "_FUSED", forward or value)
        monkeypatch.setattr(trial, "FASTER", faster)
        model, _ = quantized_pair("llama")
        set_memory_options(model, MemoryOptions())
        tokens = torch.arange(9)
        caplog.clear()
        with caplog.at_level("INFO"):
            choose_kernels(model, Inputs(tokens[None] + 3, tokens[None], (5, 4), tokens, tokens))
        names = kernels_of(model)
        assert fused_norms(model) == {"norms" in names} and not model.training
        return names, caplog.text

    return choose


def test_norms_are_fused_where_that_is_faster_and_as_exact(chosen):
    names, said = chosen()
    assert names == {"norms"}, "and no packed attention, which is not seen on a CPU"
    assert "memory.kernels: torch's fused norm is used" in said
    names, said = chosen(factor=1.01)
    assert not names and "since its value is off by 1.0e-02" in said and "the plain norm stays" in said
    names, said = chosen(faster=0.95)
    assert not names and "takes 1.00 of the time of the plain norm" in said


def test_none_is_used_where_bits_must_repeat(chosen, monkeypatch):
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: True)
    names, said = chosen()
    assert not names and not said


def test_kernels_that_do_not_run_are_left_out(chosen):
    def missing(*_):
        raise RuntimeError("no kernel image is available\nmore")

    names, said = chosen(forward=missing)
    assert not names and "fused kernels do not run here (no kernel image is available)" in said

    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    with pytest.raises(torch.OutOfMemoryError):
        chosen(forward=full)


def test_packed_attention_is_tried_although_the_largest_micro_batch_is_one_sequence(monkeypatch):
    seen = []
    monkeypatch.setattr(kernels, "_seen", lambda _, inputs: (seen.append(inputs), ([], []))[1])
    model, _ = quantized_pair("llama")
    tokens = torch.arange(9)
    choose_kernels(model, Inputs(tokens[None], tokens[None], (9,), tokens, tokens))
    whole, halves = seen
    assert whole.row_lengths == (9,), "which may be longer than a window that no half exceeds"
    assert halves.row_lengths == (4, 5) and halves.row_ends.tolist() == [0, 4, 9]


def test_a_window_s_kernel_is_tried_where_half_of_the_largest_row_is_no_longer_than_the_window(monkeypatch):
    tried, window = {}, 6

    def attend(_, inputs):
        query, longest = torch.empty(9, 2, 8, dtype=torch.bfloat16, device="meta"), max(inputs.row_lengths)
        sees = {"window_size_left": window - 1, "window_size_right": 0} if longest > window else {}
        ends = sequence_ends(inputs.row_lengths, torch.device("cpu"))
        FORWARD(query, query, query, ends, ends, longest, longest, 0.0, not sees, False, scale=None, **sees)
        return [], []

    def note(tensors, scaling, window, lengths):
        tried[window] = lengths
        return True

    monkeypatch.setattr(kernels, "_seen", attend)
    monkeypatch.setattr(kernels, "_is_better_packed", note)
    model, tokens = quantized_pair("llama")[0], torch.arange(9)
    set_memory_options(model, MemoryOptions())
    choose_kernels(model, Inputs(tokens[None], tokens[None], (9,), tokens, tokens))
    assert tried == {None: [4, 5], window: [9]} and "sequences" in kernels_of(model)


class LigerSiLUMulFunction(torch.autograd.Function):
    """Liger's gated product as it treats memory: gradients are written over the factors."""

    factor = 1.0

    @staticmethod
    def forward(ctx, gate, up):
        ctx.save_for_backward(gate, up)
        return LigerSiLUMulFunction.factor * torch.nn.functional.silu(gate) * up

    @staticmethod
    def backward(ctx, grad):
        gate, up = ctx.saved_tensors
        share = gate.sigmoid()
        grad_up, grad_gate = grad * gate * share, grad * up * (share + gate * share * (1 - share))
        return gate.copy_(grad_gate).detach(), up.copy_(grad_up).detach()


@pytest.fixture
def liger(monkeypatch):
    """Liger's package on a GPU, by a class of this file."""
    module = types.SimpleNamespace(LigerSiLUMulFunction=LigerSiLUMulFunction)
    monkeypatch.setitem(sys.modules, "liger_kernel.ops.swiglu", module)
    monkeypatch.setattr(LigerSiLUMulFunction, "factor", 1.0)
    monkeypatch.setattr(gated, "_LIGERS_DEVICE", "cpu")
    monkeypatch.setattr(model_kernels, "installed", lambda: ["liger"])


def test_liger_s_kernels_are_used_where_they_are_faster_and_as_exact(liger, chosen, monkeypatch):
    names, said = chosen()
    assert names == {"norms", GATED} and "Liger's gated product is used" in said
    monkeypatch.setattr(LigerSiLUMulFunction, "factor", 1.01)
    names, said = chosen()
    assert names == {"norms"} and "Liger's gated product" in said and "since its value is off" in said
    names, said = chosen(faster=0.95)
    assert not names


def test_liger_s_kernels_that_do_not_run_are_left_out(liger, chosen, monkeypatch):
    monkeypatch.setitem(sys.modules, "liger_kernel.ops.swiglu", None)
    names, said = chosen()
    assert names == {"norms"} and "Liger's gated product does not run here (ModuleNotFoundError" in said


@pytest.mark.parametrize(
    "options", [MemoryOptions(), MemoryOptions(checkpointing="none"), MemoryOptions(tile_tokens=8)]
)
def test_a_run_with_liger_s_kernels_is_the_run_without_within_rounding(liger, options):
    runs, used = [], []
    for names in ([GATED], ()):
        training = trainer("qwen3", options=options)
        use_kernels(training.model, names)
        used.append([mlp.fused for mlp in wrappers(training.model, GatedMLP)])
        runs.append([(metrics.loss, metrics.grad_norm) for metrics in training])
    assert used == [[True] * 2, [False] * 2]
    for found, wanted in zip(*runs, strict=True):
        assert found == pytest.approx(wanted, rel=1e-5)


def test_only_installed_kernels_are_used():
    model, _ = quantized_pair("llama")
    use_kernels(model, KERNELS)
    assert GATED not in kernels_of(model) and not any(mlp.fused for mlp in wrappers(model, GatedMLP))


@pytest.fixture
def chosen_attention(monkeypatch, caplog):
    """Give what is chosen, and said, where flex attention gives so much times the right value, and what it was given.

    Args of the function given: that factor; the time that is called faster; an error that it ends with.
    """
    given = []

    def choose(model_type="gemma2", factor=1.0, faster=2.0, error=None):
        def attend(tensors, sinks, lengths, scaling, window, softcap):
            given.append((*lengths, window))
            if error:
                raise error
            out = factor * block_attention(*tensors, lengths, scaling, window, softcap, sinks)
            return out.transpose(1, 2)

        monkeypatch.setattr(flex_attention, "_attend", attend)
        monkeypatch.setattr(attention, "flex_takes", lambda *_: True)
        monkeypatch.setattr(kernels, "timed", lambda run, _: (run(), (1.0, 0))[1])
        monkeypatch.setattr(trial, "FASTER", faster)
        model, _ = quantized_pair(model_type)
        set_memory_options(model, MemoryOptions())
        tokens = torch.arange(9)
        with caplog.at_level("INFO"):
            choose_kernels(model, Inputs(tokens[None] + 3, tokens[None], (7, 2), tokens, tokens))
        return kernels_of(model), caplog.text

    return choose, given


@pytest.mark.parametrize("model_type", ["gemma2", "gpt_oss"])
def test_flex_attention_is_used_where_each_kind_of_layer_is_faster_and_as_exact(model_type, chosen_attention):
    choose, given = chosen_attention
    names, said = choose(model_type)
    assert "flex" in names and said.count("flex attention is used") == 2
    assert {*given} == {(7, 2, 5), (7, 2, None)}, "a window, and none"


def test_attention_stays_block_by_block_where_flex_attention_is_no_better(chosen_attention):
    choose, _ = chosen_attention
    names, said = choose(factor=1.1)
    assert "flex" not in names and "not used, since its value is off by 1.0e-01" in said
    names, said = choose(faster=0.95)
    assert "flex" not in names and "attention block by block stays" in said


def test_a_compiler_that_fails_leaves_the_other_kernels(chosen_attention, monkeypatch):
    choose, given = chosen_attention
    monkeypatch.setattr(kernels, "_norm_is_better", lambda *_: True)
    names, said = choose(error=torch._dynamo.exc.TorchDynamoException("no C compiler\nmore"))
    assert names == {"norms"} and "flex attention does not run here (TorchDynamoException: no C compiler)" in said
    assert len(given) == 2, "not run before it was tried, and once for each kind of layer"


@pytest.mark.gpu
@pytest.mark.parametrize("model_type", ["llama", "gemma3_text"])
def test_on_a_gpu_a_run_with_kernels_is_the_run_without_within_rounding(model_type, monkeypatch, caplog):
    def in_bfloat16(name, **options):
        model, plain = quantized_pair(name, **options)
        return model.to(torch.bfloat16), plain

    monkeypatch.setattr(tiny_trainer, "quantized_pair", in_bfloat16)
    monkeypatch.setattr(trial, "FASTER", 1e9)
    losses = []
    for options in (MemoryOptions(), MemoryOptions(kernels="plain")):
        training = trainer(model_type, device="cuda", micro_batch_size=2, options=options)
        with caplog.at_level("INFO"):
            training.choose_kernels()
        losses.append([metrics.loss for metrics in training])
        tried = OF_LLAMA - {FLEX}  # these have neither caps nor sinks
        assert kernels_of(training.model) == (set() if options.kernels == "plain" else tried)
    assert "packed attention is used" in caplog.text
    assert losses[0] == pytest.approx(losses[1], rel=2e-3)
