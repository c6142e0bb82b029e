"""Weights of the base that are trained beside LoRA: gradients, files of the real peft, resumed runs, refusals."""

import copy

import peft
import pytest
import torch
from tiny import add_reference_lora, build_tiny, quantized_pair, random_batch, reference_loss
from tiny_trainer import SETTINGS, examples

from qlora_lite.adapters.files import (
    Lora,
    attach_adapter,
    begin_with,
    detach_adapter,
    load_adapter,
    save_adapter,
    weights_before,
)
from qlora_lite.adapters.lora.inject import Target, lora_layers
from qlora_lite.adapters.lora.switch import add_switch
from qlora_lite.adapters.parts import BIASES, EMBEDDINGS, HEAD, NORMS, NormInFloat32, trained_weights
from qlora_lite.adapters.read import read_adapter
from qlora_lite.errors import ModelError
from qlora_lite.export.adapters import for_vllm
from qlora_lite.models.memory_options import MemoryOptions, place
from qlora_lite.models.quantizer import quantize_head
from qlora_lite.train.causal_lm import causal_lm
from qlora_lite.train.checkpoints import Checkpoint
from qlora_lite.train.loop import Trainer
from qlora_lite.train.settings import TrainSettings
from qlora_lite.train.state import STATE, capture, restore

pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning"),  # peft asks transformers
    pytest.mark.filterwarnings("ignore:fan_in_fan_out"),  # peft corrects it for Conv1D, and says so
    pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings"),
]
CPU = torch.device("cpu")
IDS = torch.randint(3, 160, (2, 11), generator=torch.Generator().manual_seed(0))
TABLES = EMBEDDINGS, HEAD
CASES = {  # the model, what is trained, and peft's settings for it
    "tables": ("llama", TABLES, dict(modules_to_save=["embed_tokens", "lm_head"])),
    "tied": ("gemma2", (EMBEDDINGS,), dict(modules_to_save=["embed_tokens"], ensure_weight_tying=True)),
    "norms": ("qwen3", (NORMS,), dict(modules_to_save=["layernorm", "q_norm", "k_norm", "model.norm"])),
    "layer norms": ("gpt2", (NORMS,), dict(modules_to_save=["ln_1", "ln_2", "ln_f"])),
    "biases": ("qwen2", (BIASES,), dict(bias="all")),
    "biases, norms": ("gpt2", (NORMS, BIASES), dict(modules_to_save=["ln_1", "ln_2", "ln_f"], bias="all")),
    "all": (
        "qwen2",
        (*TABLES, NORMS, BIASES),
        dict(modules_to_save=["embed_tokens", "lm_head", "layernorm", "model.norm"], bias="all"),
    ),
}
ATTENTION = {"gpt2": "c_attn"}


def method(also, model_type="llama", targets=None, **options):
    targets = (Target(ATTENTION.get(model_type, "q_proj")),) if targets is None else targets
    return Lora(targets, 3, 6.0, dtype=torch.float32, also=also, **options)


@torch.no_grad()
def moved(model):
    """The model, everything trained moved away from where it began; equal names get equal values."""
    chance = torch.Generator().manual_seed(3)
    for _, parameter in sorted((name, each) for name, each in model.named_parameters() if each.requires_grad):
        parameter.add_(0.1 * torch.randn(parameter.shape, generator=chance).to(parameter.dtype))
    return model


def adapted(model_type, also, **options):
    model = build_tiny(model_type)
    method(also, model_type, **options).apply(model)
    return moved(model)


@torch.no_grad()
def logits(model, rows=IDS):
    return model.eval()(input_ids=rows, use_cache=False).logits


@pytest.fixture(params=CASES)
def case(request):
    return CASES[request.param]


def test_a_saved_adapter_gives_the_same_logits_in_peft_and_comes_back_from_it(case, tmp_path):
    model_type, also, _ = case
    ours, base = adapted(model_type, also), logits(build_tiny(model_type))
    save_adapter(ours, tmp_path / "ours")
    theirs = peft.PeftModel.from_pretrained(build_tiny(model_type), tmp_path / "ours")
    assert (logits(ours) - base).abs().max() > 1e-2
    assert torch.allclose(logits(theirs), logits(ours), atol=2e-4)
    theirs.save_pretrained(tmp_path / "theirs")
    again = load_adapter(build_tiny(model_type), tmp_path / "theirs")
    assert torch.equal(logits(again), logits(ours))
    assert {name for name, _ in trained_weights(again)} == {name for name, _ in trained_weights(ours)}


def test_an_adapter_trained_by_peft_gives_the_same_logits_here(case, tmp_path):
    model_type, _, settings = case
    config = peft.LoraConfig(
        task_type="CAUSAL_LM", target_modules=[ATTENTION.get(model_type, "q_proj")], r=4, **settings
    )
    theirs = peft.get_peft_model(build_tiny(model_type), config)
    optimizer = torch.optim.SGD([p for p in theirs.parameters() if p.requires_grad], lr=0.1)
    for _ in range(2):  # after one step only B has moved
        theirs.train()(input_ids=IDS, labels=IDS).loss.backward()
        optimizer.step()
    theirs.save_pretrained(tmp_path)
    expected = logits(theirs)
    assert (expected - logits(build_tiny(model_type))).abs().max() > 1e-2
    assert torch.allclose(logits(load_adapter(build_tiny(model_type), tmp_path)), expected, atol=2e-4)


def test_gradients_are_those_of_plain_autograd(case):
    """The trainer's loss, packed and with 4-bit layers, against the model itself on each row alone."""
    model_type, also, _ = case
    ours, theirs = quantized_pair(model_type)
    work = causal_lm(method=method(also, model_type))
    work.method.apply(ours)
    moved(ours)
    add_reference_lora(theirs, ours)
    trained = dict(trained_weights(ours))
    for name, parameter in trained.items():
        theirs.get_parameter(name).data.copy_(parameter.detach())
        theirs.get_parameter(name).requires_grad_()
    batch = random_batch()
    reference_loss(theirs, batch).backward()
    work.check_model(ours, TrainSettings(**SETTINGS))
    work.loss(ours.train(), work.batches.inputs(batch, CPU)).sum.backward()
    for name, parameter in trained.items():
        expected = theirs.get_parameter(name).grad
        assert (parameter.grad - expected).norm() <= 1e-4 * expected.norm() + 1e-6, name


def new_trainer(also, model_type="llama", compute_dtype=torch.float32, head=False, targets=None, **changes):
    """A trainer of a tiny 4-bit model; equal arguments give equal ones."""
    model = quantized_pair(model_type, dtype=compute_dtype)[0]
    how = method(also, model_type, targets, also_lr_ratio=1.0)
    torch.manual_seed(0)
    how.apply(model)
    place(model, CPU, changes.get("options", MemoryOptions()))
    found = Trainer(model, examples(), TrainSettings(**(SETTINGS | changes)), workload=causal_lm(method=how))
    found.check()
    return found


@pytest.mark.parametrize(("optimizer", "dtype"), [("adamw_torch", torch.float32), ("adamw_8bit", torch.bfloat16)])
@pytest.mark.parametrize("name", ["tied", "all", "biases, norms"])
def test_killed_and_resumed_it_goes_on_to_the_bit(name, optimizer, dtype):
    model_type, also, _ = CASES[name]
    settings = dict(also=also, model_type=model_type, compute_dtype=dtype, optimizer=optimizer)
    whole = new_trainer(**settings)
    begun = [parameter.detach().clone() for parameter in whole.parameters]
    steps = list(whole)
    assert not any(torch.equal(a, b) for a, b in zip(whole.parameters, begun, strict=True))
    first, resumed = new_trainer(**settings), new_trainer(**settings)
    metrics = iter(first)
    next(metrics), next(metrics)
    tensors, numbers = capture(first)
    restore(resumed, Checkpoint(first.step, tensors, {STATE: numbers}))
    assert [step.loss for step in resumed] == [step.loss for step in steps[2:]]
    assert all(torch.equal(a, b) for a, b in zip(resumed.parameters, whole.parameters, strict=True))


def test_norms_are_trained_in_float32_and_computed_with_as_the_model_computes(tmp_path):
    trainer = new_trainer((NORMS, EMBEDDINGS), "qwen3", torch.bfloat16)
    dtypes = {name: parameter.dtype for name, parameter in trained_weights(trainer.model)}
    assert {t for name, t in dtypes.items() if "norm" in name} == {torch.float32}
    assert dtypes["model.embed_tokens.weight"] == torch.bfloat16
    list(trainer)
    assert logits(trainer.model).dtype == torch.bfloat16
    save_adapter(trainer.model, tmp_path)
    again = load_adapter(quantized_pair("qwen3", dtype=torch.bfloat16)[0], tmp_path)
    assert torch.equal(logits(again), logits(trainer.model))


OPTIONS = [
    MemoryOptions("none"),
    MemoryOptions(cache_dequantized=True),
    MemoryOptions(layers_per_checkpoint=2),
    MemoryOptions(offload_checkpoints=True, resident_layers=0),
    MemoryOptions(uncheckpointed_layers=1),
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("name", ["all", "biases, norms"])
def test_memory_options_change_no_bit(options, name):
    model_type, also, _ = CASES[name]
    plain = new_trainer(also, model_type)
    steps, other = list(plain), new_trainer(also, model_type, options=options)
    assert [step.loss for step in other] == [step.loss for step in steps]
    assert all(torch.equal(a, b) for a, b in zip(other.parameters, plain.parameters, strict=True))


@pytest.mark.parametrize("name", ["norms", "layer norms"])
def test_tiles_change_rounding_alone(name):
    model_type, also, _ = CASES[name]
    whole, tiled = (
        [step.loss for step in new_trainer(also, model_type, options=MemoryOptions(tile_tokens=tile))]
        for tile in (None, 5)
    )
    assert tiled == pytest.approx(whole, rel=1e-5)


def test_updates_in_backward_are_those_of_a_step():
    settings = dict(max_grad_norm=0.0, gradient_accumulation_steps=1)
    plain = new_trainer((EMBEDDINGS, NORMS), "gemma2", **settings)
    steps = list(plain)
    other = new_trainer((EMBEDDINGS, NORMS), "gemma2", options=MemoryOptions(optimizer_in_backward=True), **settings)
    assert [step.loss for step in other] == [step.loss for step in steps]


@pytest.mark.parametrize(
    ("model_type", "also"), [("qwen2", (BIASES,)), ("gpt2", (NORMS, BIASES)), ("gemma2", (NORMS,))]
)
def test_without_lora_layers_the_others_alone_are_trained(model_type, also, tmp_path):
    def new():
        return new_trainer(also, model_type, targets=())

    whole = new()
    frozen = {name: p.clone() for name, p in whole.model.named_parameters() if not p.requires_grad}
    assert not any(True for _ in lora_layers(whole.model)) and frozen
    method(also, model_type, ()).apply(plain := build_tiny(model_type).requires_grad_(True))
    assert {name for name, p in plain.named_parameters() if p.requires_grad} == {*whole.names}
    begun = [parameter.detach().clone() for parameter in whole.parameters]
    steps = list(whole)
    assert begun and not any(torch.equal(a, b) for a, b in zip(whole.parameters, begun, strict=True))
    assert all(torch.equal(whole.model.get_parameter(name), p) for name, p in frozen.items())
    first, resumed = new(), new()
    metrics = iter(first)
    next(metrics), next(metrics)
    tensors, numbers = capture(first)
    restore(resumed, Checkpoint(first.step, tensors, {STATE: numbers}))
    assert [step.loss for step in resumed] == [step.loss for step in steps[2:]]
    save_adapter(whole.model, tmp_path, method=whole.workload.method)
    again = load_adapter(quantized_pair(model_type)[0], tmp_path)
    assert torch.equal(logits(again), logits(whole.model))
    theirs = peft.PeftModel.from_pretrained(build_tiny(model_type), tmp_path)
    assert torch.allclose(logits(theirs), logits(load_adapter(build_tiny(model_type), tmp_path)), atol=2e-4)
    theirs.save_pretrained(tmp_path / "theirs")
    assert torch.equal(logits(load_adapter(quantized_pair(model_type)[0], tmp_path / "theirs")), logits(whole.model))
    with pytest.raises(ModelError, match="weights of the base that were trained too"):
        for_vllm(read_adapter(build_tiny(model_type), tmp_path), build_tiny(model_type), "llama")


def test_rows_of_a_batch_have_their_own_weights(tmp_path):
    model = build_tiny("qwen2")
    adapters, expected = {}, {None: logits(copy.deepcopy(model))}
    for number, also in enumerate([(*TABLES, NORMS, BIASES), (BIASES,), ()]):
        save_adapter(adapted("qwen2", also), tmp_path / str(number))
        name = f"adapter {number}"
        adapters[name] = read_adapter(model, tmp_path / str(number))
        expected[name] = logits(load_adapter(build_tiny("qwen2"), tmp_path / str(number)))
    switch = add_switch(model, adapters)
    for name, wanted in expected.items():
        switch.use(name)
        assert torch.allclose(logits(model), wanted, atol=1e-4), name
    for rows in (("adapter 0", "adapter 1"), (None, "adapter 0"), ("adapter 2", "adapter 0")):
        switch.use_rows(rows)
        together = logits(model)
        assert all(torch.allclose(together[i], expected[name][i], atol=2e-4) for i, name in enumerate(rows))


@pytest.mark.parametrize(
    ("model_type", "also"), [("opt", (NORMS, BIASES)), ("qwen3_next", (NORMS,)), ("qwen3_5_text", (NORMS,))]
)
def test_rows_whose_tokens_an_architecture_joins_have_their_own_weights(model_type, also, tmp_path):
    save_adapter(adapted(model_type, also, targets=(Target("all-linear"),)), tmp_path)
    model = build_tiny(model_type)
    switch = add_switch(model, {"own": read_adapter(model, tmp_path)})
    expected = {None: logits(build_tiny(model_type)), "own": logits(load_adapter(build_tiny(model_type), tmp_path))}
    for rows in ((None, "own"), ("own", None)):
        switch.use_rows(rows)
        together = logits(model)
        assert all(torch.allclose(together[i], expected[name][i], atol=2e-4) for i, name in enumerate(rows))


def test_rows_with_different_weights_of_a_module_that_gives_several_tensors_are_refused(tmp_path):
    save_adapter(adapted("gpt_oss", (BIASES,)), tmp_path)
    model = build_tiny("gpt_oss")
    switch = add_switch(model, {"own": read_adapter(model, tmp_path)})
    expected = logits(load_adapter(build_tiny("gpt_oss"), tmp_path))
    switch.use_rows((None, "own"))
    with pytest.raises(ModelError, match=r"GptOssTopKRouter gives more than one tensor, .*; answer them separately"):
        logits(model)
    switch.use("own")
    assert torch.allclose(logits(model), expected, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize(
    ("model_type", "target"), [("mamba", "in_proj"), ("mamba2", "in_proj"), ("recurrent_gemma", "linear_x")]
)
def test_biases_that_an_architecture_reads_itself_are_those_in_use(model_type, target, tmp_path):
    """Of Mamba's convolution and time steps, past ``forward``; Recurrent Gemma's convolution only with a cache."""

    def answered(model):
        found = model.generate(
            IDS,
            max_new_tokens=4,
            do_sample=False,
            use_cache=True,
            eos_token_id=None,
            output_logits=True,
            return_dict_in_generate=True,
        )
        return torch.stack(found.logits)

    save_adapter(adapted(model_type, (BIASES,), targets=(Target(target),)), tmp_path)
    model, trained = build_tiny(model_type), load_adapter(build_tiny(model_type), tmp_path)
    expected = {None: answered(build_tiny(model_type)), "own": answered(trained)}
    assert (expected[None] - expected["own"]).abs().max() > 1e-2
    switch = add_switch(model, {"own": read_adapter(model, tmp_path)})
    for name in ("own", None, "own"):
        switch.use(name)
        assert torch.allclose(answered(model), expected[name], atol=1e-4), name
    switch.use_rows((None, "own"))
    with pytest.raises(ModelError, match=r"reads the bias of .*conv.* itself, .*; answer them separately"):
        answered(model)


def test_a_weight_that_an_architecture_reads_itself_is_refused_with_factors_and_given_without(tmp_path):
    save_adapter(adapted("mamba", (), targets=(Target("out_proj"),)), tmp_path / "read")
    save_adapter(adapted("mamba", (), targets=(Target("in_proj"),)), tmp_path / "other")
    model = build_tiny("mamba")
    base = logits(model)
    switch = add_switch(model, {name: read_adapter(model, tmp_path / name) for name in ("read", "other")})
    assert torch.equal(logits(model), base)
    expected = logits(load_adapter(build_tiny("mamba"), tmp_path / "other"))
    switch.use("other")
    assert torch.allclose(logits(model), expected, atol=1e-4)
    switch.use("read")
    with pytest.raises(ModelError, match=r"reads the weight of backbone.layers.0.mixer.out_proj itself"):
        model.train()(IDS)  # as which it looks for a kernel that takes its weights


def test_an_adapter_taken_out_again_leaves_the_base(case, tmp_path):
    model_type, also, _ = case
    save_adapter(adapted(model_type, also), tmp_path)
    model = build_tiny(model_type, torch.bfloat16)
    base, adapter = logits(model), read_adapter(model, tmp_path)
    before = weights_before(model, adapter)
    assert not torch.equal(logits(attach_adapter(model, adapter)), base)
    detach_adapter(model, before)
    assert torch.equal(logits(model), base)
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert not any(isinstance(module, NormInFloat32) for module in model.modules())


def test_training_begins_with_an_adapter_of_the_same_weights(tmp_path):
    first = adapted("qwen2", (NORMS, BIASES))
    save_adapter(first, tmp_path)
    model = build_tiny("qwen2")
    adapter = read_adapter(model, tmp_path)
    method((NORMS, BIASES)).apply(model)
    assert torch.equal(logits(begin_with(model, adapter)), logits(first))
    other = build_tiny("qwen2")
    method((EMBEDDINGS, BIASES)).apply(other)
    with pytest.raises(ModelError, match=r"no trained .*embed_tokens.*adapter.train_also lacks .*norm.weight"):
        begin_with(other, adapter)


@pytest.mark.parametrize("also", [(NORMS,), (BIASES,)])
def test_vllm_which_would_leave_them_out_does_not_get_them(also, tmp_path):
    save_adapter(adapted("qwen2", also), tmp_path)
    with pytest.raises(ModelError, match="weights of the base that were trained too"):
        for_vllm(read_adapter(build_tiny("qwen2"), tmp_path), build_tiny("qwen2"), "qwen2")


REFUSED = {
    "a tied head alone": ("gemma2", {}, (HEAD,), "write embeddings"),
    "no biases": ("llama", {}, (BIASES,), "has none"),
    "float16": ("llama", {"dtype": torch.float16}, (NORMS,), "compute_dtype to float32"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_a_model_cannot_have_trained_is_refused(name):
    model_type, options, also, words = REFUSED[name]
    with pytest.raises(ModelError, match=words):
        method(also, model_type).apply(build_tiny(model_type, **options))


@pytest.mark.parametrize(("model_type", "also"), [("llama", HEAD), ("gemma2", EMBEDDINGS)])
def test_a_4_bit_head_is_not_trained(model_type, also):
    model = build_tiny(model_type)
    quantize_head(model, "nf4", True)
    with pytest.raises(ModelError, match="quant_head to false"):
        method((also,)).apply(model)


@pytest.mark.parametrize("table", TABLES)
def test_a_trained_table_is_not_left_in_host_memory(table):
    model = build_tiny("llama")
    method((table,)).apply(model)
    with pytest.raises(ModelError, match=f"memory.{table} host"):
        place(model, CPU, MemoryOptions(**{f"host_{table}": True}))


UNREADABLE = {
    "a layer trained whole": ("llama", dict(modules_to_save=["up_proj"]), "up_proj.weight was trained whole"),
    "tied tables apart": ("gemma2", dict(modules_to_save=["embed_tokens"]), "apart from each other"),
}


@pytest.mark.parametrize("name", UNREADABLE)
def test_what_is_not_computed_here_is_refused_in_files_of_peft(name, tmp_path):
    model_type, settings, words = UNREADABLE[name]
    config = peft.LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], **settings)
    theirs = peft.get_peft_model(build_tiny(model_type), config)
    for parameter in theirs.parameters():
        parameter.data.mul_(1.1) if parameter.requires_grad else None
    theirs.save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=words):
        load_adapter(build_tiny(model_type), tmp_path)
