"""Each guard stops the run it is there for and names the place; the trainer's memory probe leaves no trace."""

import copy
import gc
import threading
from dataclasses import replace

import numpy as np
import pytest
import torch
from tiny import ARCHITECTURES, UNUSUAL, build_tiny, quantized_pair, random_factors
from tiny_trainer import SETTINGS, TWO_TOKENS, examples, trainer

from qlora_lite.adapters.files import Lora
from qlora_lite.adapters.lora.inject import add_lora, lora_layers, lora_parameters
from qlora_lite.data.tokens.batch import collate
from qlora_lite.data.tokens.storage import Example, stored
from qlora_lite.errors import DataError, ModelError, TrainingError
from qlora_lite.ext.grpo.policy import GroupPolicy, policy_lm
from qlora_lite.ext.preferences.objective import Preference, preference_lm
from qlora_lite.models.anatomy import position_limit
from qlora_lite.models.load import use_row_attention, uses_row_attention
from qlora_lite.models.memory_options import MemoryOptions
from qlora_lite.models.packing import runs_unpacked
from qlora_lite.models.quantizer import quantize_head
from qlora_lite.quant.linear import QuantLinear
from qlora_lite.quant.tensor_file import HASHED_WORDS, bit_sums
from qlora_lite.train.causal_lm import causal_lm
from qlora_lite.train.forward import prepare
from qlora_lite.train.guards import check_frozen, check_trainable, frozen_checksum
from qlora_lite.train.inventory import inventory, total_parameters
from qlora_lite.train.loop import Trainer
from qlora_lite.train.settings import TrainSettings
from qlora_lite.train.step import accumulate_gradients
from qlora_lite.train.text_guards import check_causal, check_forward, logits_error, relative_error
from qlora_lite.train.workload import Workload

CPU = torch.device("cpu")


def test_a_nan_in_a_frozen_weight_names_the_step_the_rows_and_the_module():
    training = trainer()
    steps = iter(training)
    next(steps)
    training.model.get_submodule("model.layers.1.mlp.up_proj.base").absmax_scale.fill_(float("nan"))
    with pytest.raises(
        TrainingError, match=r"step 2: the output of model\.layers\.1\.mlp\.up_proj is not finite"
    ) as caught:
        next(steps)
    assert "rows rows.jsonl:" in str(caught.value)


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        (
            "model.norm.weight",
            float("nan"),
            r"its own logits are not finite: model\.norm\.weight holds NaN or infinity",
        ),
        ("lm_head.weight", 3e38, r"its own logits are not finite: weights are too large, most of all lm_head\.weight"),
        ("model.embed_tokens.weight", float("nan"), "the embedding of token 7 is not finite"),
    ],
)
def test_weights_that_cannot_be_computed_with_are_named_as_such(name, value, said):
    model, _ = quantized_pair("llama")
    model.get_parameter(name).data[7] = value
    with pytest.raises(ModelError, match=f"{said}.*; the model's files are damaged"):
        check_forward(model)


@pytest.mark.parametrize("model_type", ["gpt_oss", "qwen3_moe"])
def test_another_expert_by_rounding_is_not_taken_for_rows_that_see_each_other(model_type, monkeypatch):
    model = build_tiny(model_type).to(torch.bfloat16)
    use_row_attention(model)

    def with_another_expert(packed, *others):
        packed[3] = packed[4]  # one token's logits differ by far more than rounding, and the others' do not
        return relative_error(packed, *others)

    monkeypatch.setattr("qlora_lite.train.text_guards.relative_error", with_another_expert)
    assert check_forward(model) == 0.05
    assert uses_row_attention(model) and not runs_unpacked(model)
    with monkeypatch.context() as patched:
        patched.setattr("qlora_lite.train.text_guards.MOST_ROUNDINGS", -1)
        assert logits_error(model) > 0.1

    def as_one_row(batch, device):
        return prepare(replace(batch, row_lengths=(batch.input_ids.shape[1],)), device)

    monkeypatch.setattr("qlora_lite.train.text_guards.prepare", as_one_row)
    assert logits_error(model) > 0.3


def test_a_nan_in_the_embeddings_names_them():
    training = trainer()
    training.model.get_input_embeddings().weight[:] = float("inf")
    with pytest.raises(TrainingError, match=r"step 1: the output of model\.embed_tokens is not finite"):
        next(iter(training))


def test_a_nan_in_the_head_alone_names_the_loss():
    training = trainer()
    training.model.get_output_embeddings().weight[7] = float("nan")
    with pytest.raises(TrainingError, match="step 1: the loss is not finite"):
        next(iter(training))


def test_a_nan_in_a_factor_names_the_factor():
    training = trainer()
    training.model.get_submodule("model.layers.0.mlp.down_proj").lora_A.data[1, 2] = float("nan")
    with pytest.raises(
        TrainingError, match=r"the adapter weight model\.layers\.0\.mlp\.down_proj\.lora_A is not finite"
    ):
        next(iter(training))


@pytest.mark.parametrize("max_grad_norm", [0.0, 1.0])
def test_a_nan_in_one_gradient_names_that_factor_and_leaves_the_weights(max_grad_norm):
    training = trainer(max_grad_norm=max_grad_norm)
    before = [p.detach().clone() for p in training.parameters]
    layer = training.model.get_submodule("model.layers.1.self_attn.o_proj")
    layer.lora_B.register_hook(lambda grad: grad * float("nan"))
    with pytest.raises(TrainingError, match=r"the gradient of model\.layers\.1\.self_attn\.o_proj\.lora_B is not"):
        next(iter(training))
    assert all(torch.equal(a, b) for a, b in zip(before, training.parameters, strict=True))


def test_an_adapter_that_takes_no_part_is_named_after_the_first_step(monkeypatch):
    training = trainer()
    layer = training.model.get_submodule("model.layers.1.mlp.up_proj")
    layer.lora_B.register_hook(torch.zeros_like)
    with pytest.raises(TrainingError, match=r"1 of the wrapped layers got no gradient, first .*\.1\.mlp\.up_proj"):
        next(iter(training))


@pytest.mark.parametrize("whole", [False, True])
def test_rows_in_which_tokens_see_only_themselves_do_not_show_who_takes_part(whole):
    step = dict(max_grad_norm=0.0, options=MemoryOptions(optimizer_in_backward=True)) if whole else {}
    training = trainer(
        rows=[TWO_TOKENS, *examples(3)], packing=False, gradient_accumulation_steps=1, order="as-is", **step
    )
    queries = training.model.get_submodule("model.layers.0.self_attn.q_proj").lora_B
    steps = iter(training)
    next(steps)
    assert not queries.any() and not training.took_part
    next(steps)
    assert queries.any() and training.took_part


def test_an_adapter_that_takes_no_part_is_named_after_the_first_step_that_shows_it():
    training = trainer(rows=[TWO_TOKENS, *examples(3)], packing=False, gradient_accumulation_steps=1, order="as-is")
    training.model.get_submodule("model.layers.1.mlp.up_proj").lora_B.register_hook(torch.zeros_like)
    steps = iter(training)
    next(steps)
    with pytest.raises(TrainingError, match=r"1 of the wrapped layers got no gradient, first .*\.1\.mlp\.up_proj"):
        next(steps)


def test_a_parameter_that_should_be_frozen_is_noticed():
    training = trainer()
    training.model.model.norm.weight.requires_grad_(True)
    announced = sum(p.numel() for p in training.parameters)
    with pytest.raises(TrainingError, match=f"{announced + 64} weights are trainable, {announced} were announced"):
        check_trainable(training.model, announced)
    with pytest.raises(TrainingError):
        Trainer(training.model, training.examples, training.settings)


@pytest.mark.parametrize("is_stored", [True, False])
def test_a_token_that_the_model_has_no_embedding_for_is_named_with_its_row(is_stored):
    training, rows = trainer(), examples()
    words = training.model.get_input_embeddings().weight.shape[0]
    rows[7].token_ids[2] = words
    rows = stored(rows) if is_stored else rows
    said = rf"rows\.jsonl:8: there is no embedding for token {words}, the model has {words}; use the tokenizer"
    with pytest.raises(DataError, match=said):
        Trainer(training.model, rows, training.settings)
    with pytest.raises(DataError, match=said):
        training.probe_memory(rows)
    if is_stored:
        Trainer(training.model, rows[:7], training.settings)  # a row that a weight leaves out is no harm


def test_a_weight_that_is_nan_before_training_stops_it_there():
    model, _ = quantized_pair("llama")
    model.model.norm.weight[3] = float("nan")
    with pytest.raises(ModelError, match=r"model\.norm\.weight holds NaN"):
        next(iter(Trainer(add_lora(model, rank=2, dtype=torch.float32), examples(), TrainSettings(**SETTINGS))))


def test_steps_are_preceded_by_the_check_where_nobody_has_asked_for_it(monkeypatch):
    calls = []
    monkeypatch.setattr(Workload, "check_model", lambda _workload, model, _settings: calls.append(model))
    checked = trainer()
    training = Trainer(checked.model, checked.examples, checked.settings)
    assert calls == [training.model], "not by the constructor"
    list(training)
    training.evaluate(checked.examples)
    assert calls == [training.model] * 2


def frozen_tensors(model):
    factors = {id(p) for _, p in lora_parameters(model)}
    return [t for t in model.state_dict(keep_vars=True).values() if id(t) not in factors]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_checksum_notices_one_flipped_bit_in_any_frozen_tensor(dtype):
    model, _ = quantized_pair("qwen2", dtype=dtype)
    add_lora(model, rank=2)
    checksum = frozen_checksum(model)
    for tensor in frozen_tensors(model):
        flat = tensor.detach().view(-1)[-1:].view(torch.uint8)
        flat[0] ^= 1
        with pytest.raises(TrainingError, match="a frozen weight changed"):
            check_frozen(model, checksum)
        flat[0] ^= 1
    check_frozen(model, checksum)


@pytest.mark.parametrize("words", [HASHED_WORDS, 64])
@pytest.mark.parametrize("name", ["model.embed_tokens.weight", "model.layers.0.mlp.up_proj.base.weight"])
def test_the_checksum_notices_rows_that_changed_places(name, words, monkeypatch):
    monkeypatch.setattr("qlora_lite.quant.tensor_file.HASHED_WORDS", words)
    model, _ = quantized_pair("llama", dtype=torch.bfloat16)
    add_lora(model, rank=2)
    tensor, checksum = dict((*model.named_parameters(), *model.named_buffers()))[name].detach(), frozen_checksum(model)
    for moved in (tensor.flip(0), tensor.roll(1, 0), tensor.roll(len(tensor) // 2, 0)):
        tensor.copy_(moved)
        with pytest.raises(TrainingError, match="a frozen weight changed"):
            check_frozen(model, checksum)


@pytest.mark.parametrize("distance", [1, 2, HASHED_WORDS // 2])
def test_two_words_that_differ_in_one_of_their_last_45_bits_cannot_change_places_unseen(distance):
    words = torch.ones(HASHED_WORDS, dtype=torch.int64)
    for bit in range(45):
        changed = words.clone()
        changed[7] ^= 1 << bit
        assert bit_sums(changed) != bit_sums(changed.roll(distance))


def test_a_tensor_filled_with_one_value_is_not_taken_for_zeros():
    for dtype in (torch.uint8, torch.bfloat16, torch.float32):
        sums = [bit_sums(torch.full((6, 64), value, dtype=dtype)) for value in (0, 1, 2, 3)]
        assert len(set(map(tuple, sums))) == 4


@pytest.mark.parametrize(("start", "stop"), [(0, 0), (0, 1), (3, 20), (1, 2000)])
def test_bits_are_summed_alike_wherever_a_tensor_begins_and_ends(start, stop):
    part = torch.arange(1000, dtype=torch.int16).view(torch.uint8)[start:stop]
    assert bit_sums(part) == bit_sums(part.clone())


def test_training_leaves_every_frozen_bit_and_moves_every_factor():
    training = trainer("gemma2")
    checksum, before = frozen_checksum(training.model), copy.deepcopy(training.parameters)
    list(training)
    check_frozen(training.model, checksum)
    assert all(not torch.equal(a, b) for a, b in zip(before, training.parameters, strict=True))


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_the_memory_probe_leaves_weights_optimizer_gradients_and_random_state(dropout):
    training = trainer(dropout=dropout)
    frozen, state = frozen_checksum(training.model), torch.get_rng_state()
    before = copy.deepcopy(training.parameters)
    training.probe_memory()
    assert torch.equal(torch.get_rng_state(), state)
    assert frozen_checksum(training.model) == frozen
    assert all(torch.equal(a, b) and b.grad is None for a, b in zip(before, training.parameters, strict=True))
    assert not training.optimizer.state
    assert training.step == 0


@pytest.mark.parametrize("checkpointing", ["block", "none"])
@pytest.mark.parametrize("options", [{"dropout": 0.2}, {"targets": ["q_proj"]}, {"targets": ["*.1.*"]}], ids=str)
def test_dropout_and_layers_without_weights_train_under_checkpointing_as_without(options, checkpointing):
    losses = []
    for mode in ("none", checkpointing):
        training = trainer(options=MemoryOptions(mode), **options)
        torch.manual_seed(1)
        losses.append([metrics.loss for metrics in training])
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_the_same_seed_gives_the_same_steps_with_and_without_a_memory_probe(dropout):
    def run(rehearsed):
        training = trainer(dropout=dropout)
        if rehearsed:
            training.probe_memory()
        torch.manual_seed(1)
        return [(m.loss, m.grad_norm, m.tokens) for m in training], [p.detach() for p in training.parameters]

    (steps, factors), (again, same) = run(False), run(True)
    assert steps == again
    assert all(torch.equal(a, b) for a, b in zip(factors, same, strict=True))


def test_metrics_count_what_was_trained_and_the_loop_ends_after_its_steps():
    training = trainer(max_steps=None, epochs=2.0)
    metrics = list(training)
    rows = training.examples
    assert [m.step for m in metrics] == list(range(1, training.total_steps + 1))
    assert sum(m.tokens for m in metrics) == 2 * sum(len(row.token_ids) for row in rows)
    assert sum(m.target_tokens for m in metrics) == 2 * sum(int(row.is_target.sum()) for row in rows)
    assert metrics[-1].loss < metrics[0].loss
    assert list(training) == []


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "cohere"])
def test_the_inventory_counts_every_byte_once(model_type):
    model, plain = quantized_pair(model_type, dtype=torch.bfloat16)
    weights = sum(p.numel() for p in plain.parameters())
    add_lora(model, rank=4)
    table = inventory(causal_lm(), model)
    storages = {
        t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in (*model.parameters(), *model.buffers())
    }
    assert sum(entry.bytes for entry in table) == sum(storages.values())
    groups = {}
    for entry in table:
        groups[entry.group] = groups.get(entry.group, 0) + entry.bytes
    assert groups["adapter"] == 2 * sum(p.numel() for _, p in lora_parameters(model))
    packed = [m for m in model.modules() if isinstance(m, QuantLinear)]
    codes = sum(entry.bytes for entry in table if entry.group == "base weights" and entry.dtype == "uint8")
    assert codes == sum(m.in_features * m.out_features for m in packed) // 2
    assert total_parameters(model, causal_lm().method) == weights
    assert all(entry.why and entry.device == "cpu" for entry in table)


@pytest.mark.parametrize("tied", [True, False])
def test_a_4_bit_copy_of_the_embeddings_is_not_counted_as_weights_of_its_own(tied):
    model = build_tiny("llama", tie_word_embeddings=tied)
    weights = sum(p.numel() for p in model.parameters())
    quantize_head(model, "nf4", True)
    assert total_parameters(model, causal_lm().method) == weights


def test_every_layer_of_a_new_trainer_has_zero_b():
    assert not any(layer.lora_B.any() for _, layer in lora_layers(trainer().model))


def meters():
    return {thread for thread in threading.enumerate() if thread.name == "memory-meter"}


def test_a_trainer_that_is_gone_leaves_no_thread():
    others = meters()  # of what earlier tests of this process still hold
    training = trainer()
    assert meters() - others
    del training
    gc.collect()
    assert not meters() - others


ROTATED_TOGETHER = {
    "phi3": {
        "rope_parameters": {
            "rope_type": "longrope",
            "rope_theta": 1e4,
            "factor": 8.0,
            "original_max_position_embeddings": 64,
            "short_factor": [1.0] * 8,
            "long_factor": [4.0] * 8,
        },
        "original_max_position_embeddings": 64,
        "max_position_embeddings": 512,
    },
}
DYNAMIC = {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}, "max_position_embeddings": 64}


def rows_of(*lengths):
    random = np.random.default_rng(0)
    return [
        Example(random.integers(3, 160, length).astype(np.int32), np.ones(length, bool), "", "", f"rows:{length}")
        for length in lengths
    ]


@pytest.mark.parametrize("model_type", ROTATED_TOGETHER)
def test_rows_that_would_be_rotated_as_the_longest_of_their_batch_run_alone(model_type, monkeypatch):
    monkeypatch.setitem(ARCHITECTURES, model_type, ARCHITECTURES[model_type] | ROTATED_TOGETHER[model_type])
    changes = {"max_tokens": 128, "packing": False, "micro_batch_size": 1, "gradient_accumulation_steps": 1}
    training = trainer(model_type, rows=rows_of(9, 6, 80, 100), max_steps=4, order="as-is", **changes)
    random_factors(training.model)
    rows = rows_of(100, 6)

    def gradient(batches):
        accumulate_gradients(causal_lm(), training.model.train(), [prepare(collate(rows), CPU) for rows in batches])
        parts = [parameter.grad.flatten() for parameter in training.parameters]
        training.optimizer.zero_grad(set_to_none=True)
        return torch.cat(parts)

    apart = gradient([[row] for row in rows])
    assert (gradient([rows]) - apart).norm() <= 1e-5 * apart.norm()
    checksum = frozen_checksum(training.model)
    assert len(list(training)) == 4
    check_frozen(training.model, checksum)  # frequencies that follow the rows are no weights
    short = trainer(model_type, rows=rows_of(60, 6), max_steps=1, **changes | {"max_tokens": 64})
    assert not runs_unpacked(short.model)


def test_rows_that_are_rotated_by_the_longest_ever_seen_are_refused(monkeypatch):
    monkeypatch.setitem(ARCHITECTURES, "llama", ARCHITECTURES["llama"] | DYNAMIC)
    assert len(list(trainer("llama", rows=rows_of(60, 6), max_tokens=64, max_steps=1))) == 1
    with pytest.raises(ModelError, match=r"rows of more than 64 tokens by the longest .* set data.max_tokens to 64"):
        trainer("llama", rows=rows_of(60, 6), max_tokens=65)


def test_a_decoder_that_sees_both_ways_is_no_causal_model():
    check_causal(build_tiny("gemma3_text"))
    with pytest.raises(ModelError, match="reads texts in both directions and cannot write them"):
        check_causal(build_tiny("gemma3_text", use_bidirectional_attention=True))


@pytest.mark.parametrize("model_type", ["gpt2", "opt"])
def test_a_row_longer_than_the_table_of_positions_is_named_with_what_to_set(model_type):
    fits, longer = rows_of(128, 60, 100), rows_of(7, 129)
    assert len(list(trainer(model_type, rows=fits, max_tokens=256))) == 4
    said = r"rows:129: the row takes 129 positions, and the model has embeddings of 128; set data\.max_tokens to 128"
    with pytest.raises(DataError, match=said):
        trainer(model_type, rows=longer, max_tokens=256)
    with pytest.raises(DataError, match=said):
        trainer(model_type, rows=fits, max_tokens=256).probe_memory(longer)
    assert len(list(trainer("llama", rows=rows_of(7, 300), max_tokens=512))) == 4


def test_positions_are_counted_for_each_sequence_with_its_virtual_tokens_and_answers():
    model, ids = build_tiny("gpt2", n_positions=64), np.arange(5, 85, dtype=np.int32)
    pair = Example(ids, np.isin(ids, [44, 84]), "", "", "rows:1", first=40)  # each begins at the first position
    prompt, whole = (Example(ids[:n], ids[:n] >= 41, "", "", f"rows:{n}") for n in (40, 64))
    pairs = preference_lm(Lora(), Preference()).batches
    for rows in ([pair], stored([pair, pair])):
        pairs.check(model, rows)
        assert pairs.positions(rows) == [40] * len(rows)
    with pytest.raises(DataError, match="takes 65 positions"):
        pairs.check(model, [replace(pair, first=15)])
    causal_lm().check_examples(model, stored([prompt, whole]))
    said = r"rows:64: the row takes 84 positions, and the model has embeddings of 64; set data\.max_tokens to 64"
    with pytest.raises(DataError, match=said):
        causal_lm().batches.behind(20).check(model, stored([prompt, whole]))
    groups = GroupPolicy(max_completion_tokens=28)
    policy_lm(Lora(), groups).check_examples(model, [prompt])
    with pytest.raises(DataError, match=r"takes 65 positions, .*; lower objective\.max_completion_tokens by 1"):
        policy_lm(Lora(), replace(groups, max_completion_tokens=29)).check_examples(model, [prompt])


@pytest.mark.parametrize("model_type", sorted({*ARCHITECTURES, *UNUSUAL}))
def test_a_limit_of_positions_is_that_of_a_model_that_cannot_embed_more(model_type):
    model = build_tiny(model_type)
    limit = position_limit(model)
    assert (limit is not None) == (model_type in ("gpt2", "opt", "gpt_neo"))
    if limit:
        with pytest.raises((IndexError, RuntimeError)):
            model(torch.zeros(1, limit + 1, dtype=torch.int64))
        model(torch.zeros(1, limit, dtype=torch.int64))


@pytest.mark.parametrize("micro_batch_size", [1, 2])
def test_more_tokens_than_gpt_neo_has_places_in_its_table_train_row_by_row(micro_batch_size):
    training = trainer("gpt_neo", rows=rows_of(100, 28, 128, 60), max_tokens=128, micro_batch_size=micro_batch_size)
    assert len(list(training)) == 4


@pytest.mark.parametrize(("table", "max_tokens", "advised"), [(128, 129, 128), (100, 97, 96)])
def test_a_row_that_gpt_neo_has_no_table_for_is_refused_with_the_length_that_goes(
    table, max_tokens, advised, monkeypatch
):
    kind, settings = UNUSUAL["gpt_neo"]
    monkeypatch.setitem(UNUSUAL, "gpt_neo", (kind, settings | {"max_position_embeddings": table}))
    with pytest.raises(ModelError, match=rf"computes at most {table} tokens at once: set data.max_tokens to {advised}"):
        trainer("gpt_neo", max_tokens=max_tokens)
    assert len(list(trainer("gpt_neo", rows=rows_of(advised, 7), max_tokens=advised))) == 4
