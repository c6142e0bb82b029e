"""Heads of sequences: loss and gradients are those of transformers and peft, packed or not; planned, resumed, saved."""

from dataclasses import replace

import numpy as np
import peft
import pytest
import torch
from methods import Case, assert_as_planned, assert_gradients_of_peft, gradients, plan, with_factors
from rank_processes import together
from safetensors.torch import load_file
from tiny_gguf import write_tiny_gguf
from tiny_heads import DECODERS, ENCODERS, FAMILIES, encoder_tokenizer, save_headless
from transformers import AutoConfig, AutoModelForSequenceClassification, MambaConfig

from qlora_lite.adapters.files import Lora, load_adapter, save_adapter
from qlora_lite.adapters.full import Full
from qlora_lite.adapters.lora.inject import Target, lora_layers
from qlora_lite.adapters.parts import LinearInFloat32, head_parameters, head_paths
from qlora_lite.adapters.read import WEIGHTS_NAME
from qlora_lite.data.labels import LABELS, NUMBER, ONE_LABEL
from qlora_lite.data.tokens.storage import Example
from qlora_lite.errors import DataError, ModelError
from qlora_lite.ext.heads.text import TextHeadSpec, text_head
from qlora_lite.kernels import attention
from qlora_lite.models.heads import Head, new_weights, with_head
from qlora_lite.models.load import load_model, uses_row_attention
from qlora_lite.models.memory_options import MemoryOptions, place, set_memory_options, stream_of
from qlora_lite.models.packing import runs_unpacked
from qlora_lite.models.skeleton import read_part
from qlora_lite.train.batches import BatchShape
from qlora_lite.train.causal_lm import TextSpec, causal_lm
from qlora_lite.train.checkpoints import Checkpoint, read_checkpoint, write_checkpoint
from qlora_lite.train.process_group import ProcessGroup
from qlora_lite.train.processes import ALONE
from qlora_lite.train.state import STATE, capture, restore
from qlora_lite.train.step import accumulate_gradients
from qlora_lite.train.text_guards import check_forward

CPU = torch.device("cpu")
NAMES = ("a", "b", "c")
METHOD = Lora(rank=4, alpha=8.0, dtype=torch.float32, head=True)
PROBLEMS = {ONE_LABEL: NAMES, LABELS: NAMES, NUMBER: ("number",)}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    folder = tmp_path_factory.mktemp("headless")
    return {name: save_headless(folder / name, name) for name in FAMILIES}


@pytest.fixture(params=FAMILIES)
def family(request):
    return request.param


def texts(problem=ONE_LABEL, count=9):
    """Texts of random tokens; every third is a pair, of which the separator is token 2."""
    chance, found = np.random.default_rng(0), []
    for number in range(count):
        length = int(chance.integers(5, 20))
        ids = chance.integers(100, 260, length).astype(np.int32)
        ids[0], ids[-1] = 1, 2
        if number % 3 == 0:
            ids[length // 2] = 2
        label = {
            ONE_LABEL: NAMES[number % 3],
            LABELS: ("[]", '["a", "c"]', '["b"]')[number % 3],
            NUMBER: repr(number / 4 - 1),
        }[problem]
        found.append(Example(ids, np.arange(length) == length - 1, "", label, f"rows.jsonl:{number + 1}"))
    return found


def config_of(folder, problem=ONE_LABEL):
    return with_head(read_part(str(folder)), Head(problem, PROBLEMS[problem])).config


def loaded(folder, problem=ONE_LABEL, quant="none", seed=0, dtype=torch.float32):
    head = Head(problem, PROBLEMS[problem], seed)
    return load_model(folder, quant, compute_dtype=dtype, use_cache=False, head=head)


def workload(folder, problem=ONE_LABEL, quant="none"):
    spec = TextHeadSpec(config_of(folder, problem), quant, compute_dtype=torch.float32, longest=32)
    work = text_head(METHOD, problem, PROBLEMS[problem], spec)
    return replace(work, batches=replace(work.batches, separator=2))


def reference(folder, adapter, problem):
    """transformers' model with peft's adapter, in training mode without dropout."""
    config = AutoConfig.from_pretrained(adapter)
    base = AutoModelForSequenceClassification.from_pretrained(folder, config=config, dtype=torch.float32)
    model = peft.PeftModel.from_pretrained(base, adapter, is_trainable=True).train()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    assert model.config.problem_type == problem
    return model


def as_peft_takes_them(examples, problem, types):
    """A padded batch of transformers for each example alone, and its label."""
    for example in examples:
        ids = torch.from_numpy(example.token_ids.astype(np.int64))[None]
        label = {
            ONE_LABEL: lambda e: torch.tensor([NAMES.index(e.answer)]),
            LABELS: lambda e: torch.tensor([[float(f'"{name}"' in e.answer) for name in NAMES]]),
            NUMBER: lambda e: torch.tensor([float(e.answer)]),
        }[problem](example)
        more = {}
        if types:
            seps = (ids == 2).long()
            more["token_type_ids"] = ((seps.cumsum(1) - seps) > 0).long()
        yield {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": label} | more


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")  # peft's
@pytest.mark.parametrize("problem", PROBLEMS)
def test_loss_and_gradients_are_those_of_transformers_and_peft(folders, family, problem, tmp_path):
    if problem != ONE_LABEL and family in ("modernbert", "deberta-v2"):
        pytest.skip("the loss is the same code for all families")
    folder, work, examples = folders[family], workload(folders[family], problem), texts(problem)
    model = loaded(folder, problem)
    torch.manual_seed(0)
    METHOD.apply(model)
    with_factors(model)
    work.spec.check_forward(model, 32, work.batches)
    save_adapter(model, tmp_path / "adapter", folder, method=METHOD)
    batch = work.batches.inputs(work.batches.collate(examples), CPU)
    ours = accumulate_gradients(work, model, [batch]).loss.item()

    theirs = reference(folder, tmp_path / "adapter", problem)
    losses = []
    for inputs in as_peft_takes_them(examples, problem, types=family == "bert"):
        loss = theirs(**inputs).loss
        (loss / len(examples)).backward()
        losses.append(loss.item())
    assert ours == pytest.approx(np.mean(losses), rel=1e-5, abs=1e-6)
    assert_gradients_of_peft(gradients(METHOD, model), theirs)


@pytest.mark.parametrize("options", [MemoryOptions(), MemoryOptions(offload_checkpoints=True)], ids=["", "host"])
def test_gradients_of_all_weights_are_those_of_transformers_where_blocks_are_recomputed(folders, family, options):
    """DeBERTa's blocks share relative positions, which are trained, and are given them by name."""
    folder, work, examples = folders[family], replace(workload(folders[family]), method=Full()), texts()
    model, theirs = loaded(folder), loaded(folder)
    for each in (model, theirs):
        Full().apply(each)
    work.spec.check_forward(model, 32, work.batches)
    set_memory_options(model, options)
    batches = [work.batches.inputs(work.batches.collate(part), CPU) for part in (examples[:4], examples[4:])]
    accumulate_gradients(work, model.train(), batches)
    theirs.train()
    for inputs in as_peft_takes_them(examples, ONE_LABEL, types=family == "bert"):
        (theirs(**inputs).loss / len(examples)).backward()
    expected = {name: weight.grad for name, weight in theirs.named_parameters()}
    for name, weight in model.named_parameters():
        if weight.grad is None:
            assert expected[name] is None
        else:
            torch.testing.assert_close(weight.grad, expected[name], rtol=1e-4, atol=1e-5, msg=name)


def test_an_encoder_is_packed_where_it_can_be_and_a_pair_s_texts_have_types(folders, family):
    model, work = loaded(folders[family]), workload(folders[family])
    check_forward(model, 32, lambda _: 0.0)
    assert runs_unpacked(model) == (family == "deberta-v2")
    assert uses_row_attention(model) == (family != "deberta-v2")
    assert work.spec.runs_row_by_row(32) == (family == "deberta-v2")
    inputs = work.batches.inputs(work.batches.collate(texts()[:2]), CPU)
    assert (inputs.token_types is not None) == (family == "bert")
    if family == "bert":
        first, second = (len(example.token_ids) for example in texts()[:2])
        assert not inputs.token_types[0, : first // 2 + 1].any()
        assert inputs.token_types[0, first // 2 + 1 : first].all()
        assert not inputs.token_types[0, first : first + second].any()


def test_packed_texts_that_see_each_other_are_an_error_or_run_alone(folders, monkeypatch, caplog):
    model = loaded(folders["bert"])
    whole = lambda query, key, value, lengths, *how: attention._fused(  # noqa: E731
        query, key, value, query.new_zeros(query.shape[2], query.shape[2]), None, 0.0
    ).transpose(1, 2)
    monkeypatch.setattr(attention, "encoder_attention", whole)
    work = workload(folders["bert"])
    work.spec.check_forward(model, 32, work.batches)
    assert runs_unpacked(model) and "each row is run by itself" in caplog.text


def test_the_head_begins_by_the_seed_and_is_taken_from_files_that_have_one(folders, tmp_path):
    one, same, other = (loaded(folders["bert"], seed=seed) for seed in (0, 0, 1))
    heads = [model.classifier.weight for model in (one, same, other)]
    assert torch.equal(heads[0], heads[1]) and not torch.equal(heads[0], heads[2])
    assert new_weights(one) == {"classifier.weight", "classifier.bias"}  # the pooler is BERT's own
    one.save_pretrained(tmp_path / "with-head")
    encoder_tokenizer().save_pretrained(tmp_path / "with-head")
    again = loaded(tmp_path / "with-head", seed=5)
    assert torch.equal(again.classifier.weight, heads[0]) and not new_weights(again)


@pytest.mark.parametrize("quant", ["nf4", "keep", "none"])
def test_a_gguf_file_s_model_gets_a_head_too(tmp_path, quant):
    path = write_tiny_gguf(tmp_path / "model.gguf")
    model = load_model(str(path), quant, compute_dtype=torch.float32, use_cache=False, head=Head(ONE_LABEL, NAMES))
    assert new_weights(model) == {"score.weight"} and model.score.weight.std() > 0
    METHOD.apply(model)
    TextHeadSpec().check_forward(model, 32, None)
    assert not runs_unpacked(model)


def test_a_cached_model_has_no_drawn_head_in_it(folders, tmp_path, monkeypatch):
    monkeypatch.setenv("QLORA_LITE_CACHE", str(tmp_path))
    head = Head(ONE_LABEL, NAMES, 0)
    first, cached = (load_model(folders["bert"], compute_dtype=torch.float32, head=head) for _ in range(2))
    other = load_model(folders["bert"], compute_dtype=torch.float32, head=Head(NUMBER, ("x", "y", "z"), 1))
    assert (other.config.problem_type, other.config.id2label) == (NUMBER, {0: "x", 1: "y", 2: "z"})
    one = load_model(folders["bert"], compute_dtype=torch.float32, head=Head(NUMBER, ("x",)))
    assert one.classifier.out_features == 1
    assert torch.equal(first.classifier.weight, cached.classifier.weight)
    assert not torch.equal(first.classifier.weight, other.classifier.weight)
    assert torch.equal(first.bert.pooler.dense.weight, other.bert.pooler.dense.weight)
    assert not any("classifier" in name for file in tmp_path.rglob("*.safetensors") for name in load_file(file))


def test_lora_and_four_bits_leave_the_head_alone_and_it_learns_in_float32(folders, family):
    model = loaded(folders[family], quant="nf4", dtype=torch.bfloat16)
    METHOD.apply(model)
    head = head_parameters(model)
    assert head and all(p.requires_grad and p.dtype == torch.float32 for p in head.values())
    kinds = {type(model.get_submodule(path)).__name__ for path in head_paths(model)}
    assert not kinds & {"QuantLinear", "LoraLinear"} and LinearInFloat32.__name__ in kinds
    work = workload(folders[family], quant="nf4")
    work.spec.check_forward(model, 32, work.batches)
    batch = work.batches.inputs(work.batches.collate(texts()), CPU)
    accumulate_gradients(work, model, [batch])
    assert all(p.grad is not None and p.grad.any() for p in head.values())


def test_a_layer_s_name_means_none_of_the_head(folders):
    model = loaded(folders["bert"])
    replace(METHOD, targets=(Target("dense"),)).apply(model)
    paths = [path for path, _ in lora_layers(model)]
    assert len(paths) == 6 and not any("pooler" in path for path in paths)


def test_the_head_learns_at_the_rate_of_the_lora_weights(folders):
    model = loaded(folders["bert"])
    METHOD.apply(model)
    names = [name for name, _ in METHOD.parameters(model)]
    ratios = dict(zip(names, METHOD.lr_ratios(names, 16.0), strict=True))
    assert {ratios[name] for name in head_parameters(model)} == {1.0}
    assert {ratios[name] for name in names if name.endswith("lora_B")} == {16.0}


def case(folder, quant="nf4", method=METHOD):
    work = replace(workload(folder, quant=quant), method=method)
    return Case(work, lambda: loaded(folder, quant=quant), texts(), {"max_tokens": 48})


@pytest.mark.parametrize("name", ["bert", "modernbert", "deberta-v2", "llama"])
def test_the_plan_is_the_ledger_s_peak_whatever_the_memory_options(folders, name):
    one = case(folders[name])
    assert_as_planned(one, plan(one, 2**40))


def test_all_weights_are_planned_where_blocks_share_some(folders):
    one = case(folders["deberta-v2"], "none", Full())
    found = plan(one, 2**40)
    assert found[1].options.checkpointing == "block"
    assert_as_planned(one, found)


@pytest.mark.parametrize("name", ["bert", "llama"])
def test_killed_and_resumed_it_goes_on_to_the_bit(folders, name, tmp_path):
    whole = case(folders[name]).trainer()
    steps = list(whole)
    first = case(folders[name]).trainer()
    metrics = iter(first)
    next(metrics), next(metrics)
    tensors, state = capture(first)
    folder = write_checkpoint(tmp_path / "checkpoints", Checkpoint(first.step, tensors, {STATE: state}), {}, "")
    torch.manual_seed(1)
    resumed = case(folders[name]).trainer()
    restore(resumed, read_checkpoint(folder))
    assert [step.loss for step in resumed] == [step.loss for step in steps[2:]]
    assert all(torch.equal(a, b) for a, b in zip(resumed.parameters, whole.parameters, strict=True))
    assert all("accuracy" in step.metrics for step in steps)


def test_memory_options_change_no_gradient(folders, family):
    found = {}
    for name, options in (("none", {"checkpointing": "none"}), ("block", {}), ("streamed", {"resident_layers": 1})):
        one = case(folders[family])
        model = one.build()
        torch.manual_seed(0)
        METHOD.apply(model)
        chosen = MemoryOptions(**options)
        place(model, CPU, chosen)
        one.workload.spec.check_forward(model, 32, one.workload.batches)
        set_memory_options(model, chosen)
        with_factors(model).train()
        work = one.workload
        torch.manual_seed(0)
        loss = accumulate_gradients(work, model, [work.batches.inputs(work.batches.collate(one.examples), CPU)]).loss
        found[name] = loss, gradients(METHOD, model)
        if stream := stream_of(model):
            stream.settle()
    for loss, gradient in found.values():
        assert torch.equal(loss, found["block"][0])
        if family == "deberta-v2":  # whose texts run one by one: their gradients are added up in another order
            torch.testing.assert_close(gradient, found["block"][1])
        else:
            assert all(torch.equal(gradient[name], found["block"][1][name]) for name in gradient)


def test_an_adapter_of_a_language_model_is_no_head_s(folders, tmp_path):
    model = load_model(folders["llama"], "none", compute_dtype=torch.float32, use_cache=False)
    plain = Lora(rank=4, alpha=8.0, dtype=torch.float32)
    plain.apply(model)
    save_adapter(with_factors(model), tmp_path / "adapter", "base", method=plain)
    assert not (tmp_path / "adapter" / "config.json").exists()
    with pytest.raises(ModelError, match="no weights of a head"):
        load_adapter(loaded(folders["llama"]), tmp_path / "adapter")


def test_a_saved_adapter_gives_the_same_outputs_again(folders, family, tmp_path):
    model, work = loaded(folders[family], dtype=torch.bfloat16), workload(folders[family])
    METHOD.apply(model)
    save_adapter(with_factors(model), tmp_path / "adapter", "base", method=METHOD)
    again = load_adapter(loaded(folders[family], seed=4, dtype=torch.bfloat16), tmp_path / "adapter")
    for one in (model, again):
        work.spec.check_forward(one, 32, work.batches)
    batch = work.batches.inputs(work.batches.collate(texts()), CPU)
    assert torch.equal(work.spec.outputs(model.eval(), batch), work.spec.outputs(again.eval(), batch))
    assert (tmp_path / "adapter" / WEIGHTS_NAME).is_file()


def test_a_label_without_an_output_is_named():
    work = text_head(METHOD, ONE_LABEL, ("a", "b"), None)
    with pytest.raises(DataError, match=r"rows.jsonl:3: the label 'c' is none of a, b"):
        work.batches.collate(texts())


def test_an_encoder_without_a_head_is_no_language_model(folders):
    config = read_part(str(folders["bert"])).config
    work = causal_lm(method=Lora(dtype=torch.float32), spec=TextSpec(config, "none"))
    with pytest.raises(ModelError, match=r"a bert model reads texts in both directions.*task\.kind"):
        work.spec.planned_model(work.method, torch.device("meta"), MemoryOptions(), BatchShape((8,), 7))


def test_families_without_a_head_are_an_error(folders):
    part = read_part(str(folders["llama"]))
    with pytest.raises(ModelError, match="no model of the type mamba for sequence classification"):
        with_head(replace(part, config=MambaConfig()), Head(ONE_LABEL, NAMES))


def test_all_families_are_tested():
    assert {*ENCODERS, *DECODERS} == {"bert", "roberta", "modernbert", "deberta-v2", "llama"}


def course(folder, processes=ALONE):
    """An evaluation, some steps and another evaluation, and what was learned."""
    changes = {"max_tokens": 24, "gradient_accumulation_steps": 4, "max_steps": 3}
    trainer = replace(case(folder), changes=changes).trainer(MemoryOptions())
    trainer.processes = processes
    rows = trainer.examples
    losses = [trainer.evaluate(rows).loss, *(metrics.loss for metrics in trainer), trainer.evaluate(rows).loss]
    return losses, [parameter.detach().clone() for parameter in trainer.parameters]


def shared_course(number, count, folder, model):
    """What each process does."""
    losses, is_target = course(model, ProcessGroup(number, count))
    torch.save({"losses": losses, "is_target": is_target}, f"{folder}/{number}.pt")


@pytest.mark.parametrize("name", ["bert", "llama"])
def test_ranks_learn_what_one_process_learns(folders, name, tmp_path):
    together(2, "train.test_sequence_head", "shared_course", tmp_path, str(folders[name]))
    one, other = (torch.load(tmp_path / f"{number}.pt", weights_only=True) for number in (0, 1))
    losses, is_target = course(folders[name])
    assert all(map(torch.equal, one["is_target"], other["is_target"]))
    assert one["losses"] == pytest.approx(losses, rel=1e-4)
    for ours, theirs in zip(one["is_target"], is_target, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=3e-4)
