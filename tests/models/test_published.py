"""A checkpoint that is published packed is trained on its own codes, with the logits of the dequantised model."""

import copy
import json
import re

import pytest
import torch
from memory_option_cases import CPU, PLAIN, gradients
from remembered_plans import remember_predictions
from safetensors.torch import load_file, save_file
from tiny import random_factors
from tiny_files import write_recipe
from tiny_published import CASES, SINGLE_EXPERTS, WITH_EXPERTS, by_transformers, random_mxfp4, save_published
from tiny_runs import logits, make_run, stop_at
from transformers import AutoModelForCausalLM

from qlora_lite.adapters.files import load_adapter
from qlora_lite.adapters.lora.inject import add_lora, lora_layers
from qlora_lite.errors import Interrupted, ModelError
from qlora_lite.experts.grouped import _both
from qlora_lite.experts.packing import described_experts, expert_weights, first_experts
from qlora_lite.export.merge import MergeSettings, merge_run
from qlora_lite.files import sha256
from qlora_lite.models.load import adopt, load_model
from qlora_lite.models.memory_options import MemoryOptions, place
from qlora_lite.models.published import published_formats
from qlora_lite.models.quantizer import InFiles
from qlora_lite.models.skeleton import meta_model, read_config
from qlora_lite.quant import pieces
from qlora_lite.quant.formats import FORMATS
from qlora_lite.quant.linear import WeightRows, frozen_weight
from qlora_lite.quant.packed import PackedWeight
from qlora_lite.quant.product import materialize
from qlora_lite.recipe.load import load_recipe
from qlora_lite.runs.run import run_recipe


@pytest.mark.parametrize("key", ["checkpoint_format", "format"])  # what transformers 4 and 5 call it
def test_gptq_is_read_as_the_format_that_it_says(key, tmp_path):
    save_published(tmp_path, "gptq")
    path = tmp_path / "config.json"
    said = json.loads(path.read_text())
    said["quantization_config"].pop("checkpoint_format", None)
    for form in ("gptq", "gptq_v2"):
        said["quantization_config"][key] = form
        path.write_text(json.dumps(said))
        assert {kind.rpartition("_4_")[0] for _, kind in published_formats(read_config(str(tmp_path)))} == {form}


@pytest.fixture(scope="module", params=CASES)
def published(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    return request.param, folder, save_published(folder, request.param)


def load(folder, quant="nf4", **options):
    return load_model(folder, quant, compute_dtype=torch.float32, use_cache=False, **options)


def adapted(model, options=PLAIN):
    """The model with random LoRA weights, beside its experts too, its own where the memory options want them."""
    torch.manual_seed(0)
    targets = ["all-linear", "experts"] if any(expert_weights(model)) else ["all-linear"]
    add_lora(model, targets, rank=4, dtype=torch.float32)
    random_factors(model)
    return place(model, CPU, options)


def test_mxfp4_is_what_transformers_makes_of_it_bit_for_bit():
    blocks, scales = random_mxfp4(3, 5, 64, torch.Generator().manual_seed(0))
    for dtype in (torch.float32, torch.bfloat16):
        expected = by_transformers(blocks, scales, dtype=dtype).transpose(1, 2)
        found = FORMATS["mxfp4"].dequantize([blocks, scales], (3, 5, 64), dtype)
        assert torch.equal(found, expected)
        for which in (slice(1, 3), torch.tensor([2, 0])):
            some = FORMATS["mxfp4"].dequantize_rows([blocks, scales], (3, 5, 64), which, dtype)
            assert torch.equal(some, expected[which])


def test_it_gives_the_logits_and_gradients_of_the_dequantised_model(published, caplog):
    _, folder, plain = published
    model = load(folder)
    assert "is quantised already and keeps its codes: model.quant keep" in caplog.text
    assert torch.allclose(logits(model), logits(plain), atol=1e-5)
    found, expected = (gradients(adapted(each), PLAIN) for each in (model, adopt(copy.deepcopy(plain))))
    assert all((one - other).norm() <= 1e-5 * other.norm() for one, other in zip(found, expected, strict=True))
    kinds = {module.quant_type for module in model.modules() if isinstance(module, PackedWeight)}
    assert kinds == {kind for _, kind in published_formats(read_config(str(folder)))}


def test_layers_that_are_published_in_16_bit_may_be_named_and_others_are_refused(tmp_path):
    plain = save_published(tmp_path, "fp8")
    model = load(tmp_path, keep_16bit=["model.layers.1.self_attn.o_proj"])
    assert torch.equal(logits(model), logits(load(tmp_path)))
    assert torch.allclose(logits(model), logits(plain), atol=1e-5)
    with pytest.raises(ModelError, match=r"published with 1 of these layers packed, such as model.layers.0.self_attn"):
        load(tmp_path, keep_16bit=["o_proj"])


@pytest.mark.parametrize("case", WITH_EXPERTS)
def test_groups_of_experts_are_dequantised_without_the_others(case, tmp_path, monkeypatch):
    plain = next(module for module in save_published(tmp_path, case).modules() if hasattr(module, "has_gate"))
    described, tensors = described_experts(first_experts(load(tmp_path)))
    for at_once in (pieces.ROWS_AT_ONCE, 5 * described.up.shape[2]):
        monkeypatch.setattr(pieces, "ROWS_AT_ONCE", at_once)
        for dtype in (torch.float32, torch.bfloat16):
            for found, name in zip(_both(described, tensors, dtype), ("gate_up_proj", "down_proj"), strict=True):
                expected = getattr(plain, name).to(dtype)
                expected = expected.transpose(1, 2) if plain.is_transposed else expected
                assert torch.equal(found._group(slice(1, 3), dtype), expected[1:3])
                for which in (slice(2, 4), torch.tensor([3, 0])):
                    some = FORMATS[found.spec.quant_type].dequantize_rows(found.stored, found.spec.shape, which, dtype)
                    assert torch.equal(some, expected[which])
                assert torch.equal(materialize(found.spec, found.stored, dtype), expected)


@pytest.mark.parametrize(
    "options",
    [
        MemoryOptions(resident_layers=0, stream_from="disk"),
        MemoryOptions(resident_layers=1, cache_dequantized=True),
    ],
    ids=str,
)
def test_streamed_it_has_every_bit_of_the_gradients_of_the_resident_one(published, options):
    _, folder, _ = published
    found, resident = (gradients(adapted(load(folder), where), where) for where in (options, PLAIN))
    assert all(torch.equal(one, other) for one, other in zip(found, resident, strict=True))


def test_it_is_planned_with_the_tensors_that_it_has(published):
    _, folder, _ = published
    config, model = read_config(str(folder)), load(folder)
    planned = meta_model(config, "keep", False, torch.float32, formats=published_formats(config))
    described = [
        {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in each.state_dict().items()}
        for each in (planned, model)
    ]
    assert described[0] == described[1]


def test_a_merge_writes_the_dequantised_model_with_the_update(published, tmp_path, caplog):
    case, folder, plain = published
    targets = ["all-linear", *["experts"] * (case in WITH_EXPERTS)]
    run = make_run(tmp_path, folder, lora={"targets": targets, "rank": 4, "alpha": 8})
    report = merge_run(run, tmp_path / "merged", MergeSettings(dtype="f32", rows=0))
    assert any("are dequantised" in note for note in report["notes"])
    assert ("tensors of blocks that the model lacks" in caplog.text) == (case == "fp8_experts")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert not hasattr(merged.config, "quantization_config") and merged.state_dict().keys() == plain.state_dict().keys()
    trained = load_adapter(load(folder), run / "adapter")
    assert torch.allclose(logits(merged), logits(trained), atol=2e-4)
    changed = {
        name.rpartition(".")[0]
        for name, tensor in merged.state_dict().items()
        if not torch.equal(tensor, plain.state_dict()[name])
    }
    assert changed == {
        re.sub(r"\.(gate_up|down)_proj$", "", path) if ".experts." in f"{path}." else path
        for path, _ in lora_layers(trained)
    }


@pytest.mark.parametrize("case", ["int8", "fp8", "gptq", "awq"])
def test_every_bit_is_that_of_the_reference_whole_or_some_rows_at_a_time(case, tmp_path, monkeypatch):
    plain = save_published(tmp_path, case)
    layer = load(tmp_path).model.layers[0].mlp.up_proj
    expected, rows = plain.model.layers[0].mlp.up_proj.weight, torch.tensor([9, 0, 95, 9])
    assert torch.equal(WeightRows(layer, torch.float32)[rows], expected[rows])
    for at_once in (pieces.ROWS_AT_ONCE, 5 * expected.shape[1]):
        monkeypatch.setattr(pieces, "ROWS_AT_ONCE", at_once)
        for dtype in (torch.float32, torch.bfloat16):
            assert torch.equal(materialize(*frozen_weight(layer), dtype), expected.to(dtype))


def test_a_packed_layer_of_which_the_configuration_does_not_say_so_is_an_error(tmp_path):
    save_published(tmp_path, "fp8")
    path = tmp_path / "config.json"
    path.write_text(path.read_text().replace('"lm_head"', '"model.layers.0.mlp"'))
    with pytest.raises(ModelError, match=r"tensor model\.layers\.0\.mlp\.\w+\.weight\w* is packed"):
        load(tmp_path)


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ({"quant_method": "fp8"}, r"with fp8 \(no more is said\), of which is read: blocks of 128 x 128 with a scale"),
        ({"quant_method": "fp8", "weight_block_size": [1, 32]}, r"fp8 \(weight_block_size \[1, 32\]\), of"),
        ({"quant_method": "fp8", "weight_block_size": 128}, r"fp8 \(weight_block_size 128\), of"),
        (
            {"quant_method": "gptq", "bits": 3, "group_size": 128},
            r"with gptq \(bits 3, group_size 128\), of .+: 4 or 8 b",
        ),
        (
            {"quant_method": "awq", "bits": 4, "group_size": 128, "version": "gemv"},
            r"with awq \(bits 4, group_size 128, version gemv\), of which is read: 4 bits in groups of .+, version",
        ),
    ],
)
def test_blocks_of_another_size_are_refused(said, message, tmp_path):
    save_published(tmp_path, "fp8")
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"quantization_config": said}))
    with pytest.raises(ModelError, match=message):
        load(tmp_path)


@pytest.mark.parametrize(
    ("case", "said"),
    [("awq", r"quantised already, and keeps its codes \(awq_4_32\)"), ("mxfp4", "no 4-bit layers to save")],
)
def test_it_is_not_quantised_a_second_time(case, said, tmp_path, command):
    save_published(tmp_path / "model", case)
    code, _, error = command("quantize", str(tmp_path / "model"), "--out", str(tmp_path / "out"))
    assert code == 2 and re.search(said, error) and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("case", "part", "value", "message"),
    [
        ("gptq", "g_idx", 99, r"names groups from 0 to 99, and there are \d+: the checkpoint is damaged"),
        ("gptq", "g_idx", -1, "names groups from -1 to"),
        ("gptq", "scales", torch.nan, "holds NaN or infinity"),
        ("int8", "SCB", torch.inf, "holds NaN or infinity"),
    ],
)
def test_constants_that_mean_nothing_are_one_error_that_names_tensor_and_file(case, part, value, message, tmp_path):
    save_published(tmp_path, case)
    tensors = load_file(tmp_path / "model.safetensors")
    next(tensor for name, tensor in tensors.items() if name.endswith(part))[0] = value
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelError, match=rf"model\.safetensors: the tensor model\.\S+\.{part} {message}"):
        load(tmp_path)


def test_a_layout_may_be_named_in_capitals(tmp_path):
    save_published(tmp_path, "awq")
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"]["version"] = "GEMM"
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert {each for _, each in published_formats(read_config(str(tmp_path)))} == {"awq_4_32"}


@pytest.mark.parametrize("fault", ["missing", "shape"])
def test_a_file_without_a_part_or_with_another_shape_is_one_error_that_names_both(published, fault, tmp_path):
    _, folder, _ = published
    for path in folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    tensors = load_file(folder / "model.safetensors")
    first = published_formats(read_config(str(folder)))[0][0]
    name = next(name for name in tensors if re.fullmatch(rf"{re.escape(first)}(\.q?weight|_blocks)", name))
    tensor = tensors.pop(name)
    if fault == "shape":
        tensors[name] = tensor[:-1].contiguous()
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    said = {"missing": "no file has the tensor", "shape": r"model\.safetensors: the tensor"}[fault]
    with pytest.raises(ModelError, match=f"{said} {name}"):
        load(tmp_path)


@pytest.mark.parametrize("case", SINGLE_EXPERTS)
def test_experts_that_are_put_together_go_to_a_file_where_memory_has_no_room(case, tmp_path, monkeypatch):
    save_published(tmp_path, case)
    empty, made = InFiles.empty, []
    monkeypatch.setattr(InFiles, "empty", lambda self, *of: made.append(empty(self, *of)) or made[-1])
    found, expected = load(tmp_path, in_files=True), load(tmp_path)
    assert torch.equal(logits(found), logits(expected))
    parts = [each.described[1] for path, each in expert_weights(found).items()]
    assert {tensor.data_ptr() for part in parts for tensor in part} == {tensor.data_ptr() for tensor in made}


@pytest.mark.parametrize("case", SINGLE_EXPERTS[:2])
def test_a_stopped_run_of_adapted_experts_continues_to_the_bit(case, tmp_path, monkeypatch):
    remember_predictions(monkeypatch.setattr)
    save_published(tmp_path / "model", case)

    def run(name, progress=None, resume=None):
        (tmp_path / name).mkdir(exist_ok=True)
        recipe = write_recipe(
            tmp_path / name,
            tmp_path / "model",
            train={"max_steps": 4, "save_every_steps": 2},
            lora={"rank": 4, "alpha": 8, "targets": ["all-linear", "experts"]},
        )
        run_recipe(load_recipe(recipe, ["train.metrics_examples=0"]), progress, resume)
        return sha256(tmp_path / name / "out" / "adapter" / "adapter_model.safetensors")

    with pytest.raises(Interrupted):
        run("stopped", stop_at(3))
    assert run("stopped", resume="") == run("whole")


def rewrite(folder, change):
    """Change the tensors of a model's file."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


EXPERT = "model.layers.1.mlp.experts.2.up_proj"


@pytest.mark.parametrize(
    ("case", "change", "said"),
    [
        (
            "fp8_experts",
            lambda tensors: tensors.pop(f"{EXPERT}.weight_scale_inv"),
            rf"no file has the tensor {EXPERT}\.weight_scale_inv",
        ),
        (
            "fp8_experts",
            lambda tensors: [tensors.pop(name) for name in [*tensors] if ".1.mlp.experts." in name],
            r"no file has packed weights of single experts of model\.layers\.1\.mlp\.experts\.gate_up_proj",
        ),
        (
            "gptq_experts",
            lambda tensors: tensors.update({f"{EXPERT}.qweight": tensors[f"{EXPERT}.qweight"][:-1].clone()}),
            rf"model\.safetensors: the tensor {EXPERT}\.qweight is int32 \(7, 32\), and int32 \(8, 32\) is needed",
        ),
        (
            "gptq_experts",
            lambda tensors: tensors.update({f"{EXPERT}.g_idx": tensors[f"{EXPERT}.g_idx"].flip(0)}),
            rf"model\.safetensors: the tensor {EXPERT}\.g_idx is another than that of the weight that it is computed",
        ),
    ],
)
def test_a_fault_of_one_expert_is_one_error_that_names_it(case, change, said, tmp_path):
    save_published(tmp_path, case)
    rewrite(tmp_path, change)
    with pytest.raises(ModelError, match=said):
        load(tmp_path)


def said_of(folder, **changes):
    """Change what the configuration of a model says of quantisation."""
    path = folder / "config.json"
    said = json.loads(path.read_text())
    path.write_text(json.dumps(said | {"quantization_config": said["quantization_config"] | changes}))


@pytest.mark.parametrize(
    ("case", "changes", "message"),
    [
        (
            "fp8",
            {"quant_method": "fp8", "weight_block_size": [128, 128]},
            "have 32 inner features, and fp8_128x128 has a scale for 128, so that two such weights cannot be joined",
        ),
        (
            "int8",
            {"quant_method": "bitsandbytes", "load_in_8bit": True},
            "experts are quantised with bitsandbytes in a form that is not known here",
        ),
    ],
)
def test_experts_that_cannot_be_put_together_are_refused_by_the_configuration_alone(case, changes, message, tmp_path):
    save_published(tmp_path, "gptq_experts")
    said_of(tmp_path, **changes)
    with pytest.raises(ModelError, match=message):
        published_formats(read_config(str(tmp_path)))


def test_experts_that_are_published_in_16_bit_stay_so(tmp_path):
    plain = save_published(tmp_path, "fp8_experts")
    values = {
        f"{path}.{number}.{name}_proj.weight": weight.clone()
        for path, module in plain.named_modules()
        if hasattr(module, "has_gate")
        for number in range(module.num_experts)
        for name, weight in zip(
            ("gate", "up", "down"), (*module.gate_up_proj[number].chunk(2), module.down_proj[number]), strict=True
        )
    }
    rewrite(tmp_path, lambda tensors: [tensors.pop(f"{name}_scale_inv") for name in values] and tensors.update(values))
    said_of(tmp_path, modules_to_not_convert=["lm_head", "model.layers.1.self_attn.o_proj", "model.layers.*.experts.*"])
    model = load(tmp_path)
    assert torch.allclose(logits(model), logits(plain), atol=1e-5)
    assert not any(hasattr(module, "packed_down_proj") for module in model.modules())
    config = read_config(str(tmp_path))
    planned = meta_model(config, "keep", False, torch.float32, formats=published_formats(config))
    assert {name: tensor.shape for name, tensor in planned.state_dict().items()} == {
        name: tensor.shape for name, tensor in model.state_dict().items()
    }
