"""A checkpoint that is published packed is trained on its own codes, with the logits of the dequantised model."""

import copy
import itertools
import json
import re

import pytest
import torch
from memory_option_cases import PLAIN, gradients
from safetensors.torch import load_file, save_file
from test_kept_codes import adapted
from tiny import build_tiny
from tiny_files import VOCABULARY, byte_tokenizer
from tiny_runs import logits, make_run
from transformers.integrations.mxfp4 import _convert_moe_packed_tensors as by_transformers

from qlora_lite.errors import ModelError
from qlora_lite.experts.grouped import _both
from qlora_lite.experts.packing import described_experts, first_experts
from qlora_lite.export.merge import MergeSettings, merge_run
from qlora_lite.models.load import adopt, load_model
from qlora_lite.models.memory_options import MemoryOptions
from qlora_lite.models.published import published_formats
from qlora_lite.models.skeleton import meta_model, read_config
from qlora_lite.quant.bnb import functional
from qlora_lite.quant.formats import FORMATS, grouped, scaled
from qlora_lite.quant.linear import WeightRows, frozen_weight
from qlora_lite.quant.packed import PackedWeight
from qlora_lite.quant.product import materialize


def random_mxfp4(experts: int, out: int, width: int, generator) -> tuple[torch.Tensor, torch.Tensor]:
    blocks = torch.randint(0, 256, (experts, out, width // 32, 16), dtype=torch.uint8, generator=generator)
    return blocks, torch.randint(119, 124, blocks.shape[:-1], dtype=torch.uint8, generator=generator)


def mxfp4(model, generator):
    """Pack the experts of a model; return what files call the parts, and the values that transformers gives them."""
    packed, values = {}, {}
    for name, parameter in model.named_parameters():
        if parameter.ndim == 3:
            blocks, scales = random_mxfp4(*parameter.transpose(1, 2).shape, generator)
            packed |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
            values[name] = by_transformers(blocks, scales, dtype=torch.float32)
    said = {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn", "lm_head"]}
    return packed, values, said


def linear_weights(model):
    return {name: parameter for name, parameter in model.named_parameters() if "_proj.weight" in name}


def int8(model, generator):
    """Pack the linear layers as bitsandbytes does, with its own dequantised values."""
    packed, values = {}, {}
    for name, weight in linear_weights(model).items():
        codes, scales, _ = functional.int8_vectorwise_quant(weight.detach().half())
        packed |= {name: codes, name.replace("weight", "SCB"): scales}
        packed[name.replace("weight", "weight_format")] = torch.tensor(0, dtype=torch.uint8)
        values[name] = functional.int8_vectorwise_dequant(codes, scales)
    return packed, values, {"quant_method": "bitsandbytes", "load_in_8bit": True, "llm_int8_skip_modules": ["lm_head"]}


def fp8(model, generator):
    """Pack the linear layers but two in blocks of 128 by 128, with values block by block."""
    packed, values = {}, {}
    for name, weight in linear_weights(model).items():
        if "layers.1.self_attn.o_proj" in name:
            continue
        codes = torch.randn(weight.shape, generator=generator).to(torch.float8_e4m3fn)
        sizes = [-(-size // 128) for size in weight.shape]
        scales = torch.rand(sizes, generator=generator).to(torch.bfloat16) * 0.05
        packed |= {name: codes, f"{name}_scale_inv": scales}
        values[name] = codes.float()
        for row, column in itertools.product(*map(range, sizes)):
            block = slice(128 * row, 128 * row + 128), slice(128 * column, 128 * column + 128)
            values[name][block] *= scales[row, column].float()
    skipped = ["lm_head", "model.layers.1.self_attn.o_proj"]
    said = {"activation_scheme": "dynamic", "weight_block_size": [128, 128], "modules_to_not_convert": skipped}
    return packed, values, {"quant_method": "fp8", **said}


def words(codes):
    """Pack eight codes of 4 bits, the last dimension of [..., n, 8], the first lowest."""
    packed = (codes.long() << torch.arange(0, 32, 4)).sum(-1)
    return (packed - ((packed >> 31) << 32)).to(torch.int32)


def in_groups(model, generator, is_awq):
    """Pack the linear layers in groups of 32, of GPTQ in an order of its own (act-order)."""
    packed, values = {}, {}
    for name, weight in linear_weights(model).items():
        out, width = weight.shape
        path, groups = name.removesuffix(".weight"), torch.arange(width) // 32
        if not is_awq:
            groups = groups[torch.randperm(width, generator=generator)]
        codes = torch.randint(0, 16, (width, out), generator=generator)
        zeros = torch.randint(0, 16, (width // 32, out), generator=generator)
        scales = (torch.rand(zeros.shape, generator=generator) * 0.03).half()
        order = (0, 2, 4, 6, 1, 3, 5, 7) if is_awq else range(8)
        packed[f"{path}.qzeros"] = words(zeros.view(-1, out // 8, 8)[..., order])
        packed[f"{path}.scales"] = scales
        if is_awq:
            packed[f"{path}.qweight"] = words(codes.view(width, out // 8, 8)[..., order])
        else:
            packed[f"{path}.qweight"] = words(codes.view(width // 8, 8, out).transpose(1, 2))
            packed[f"{path}.g_idx"] = groups.int()
        values[name] = (scales.float()[groups] * (codes - zeros[groups] - (0 if is_awq else 1))).t().contiguous()
    return packed, values, {"bits": 4, "group_size": 32}


def gptq(model, generator):
    packed, values, said = in_groups(model, generator, is_awq=False)
    return packed, values, said | {"quant_method": "gptq", "desc_act": True}


def awq(model, generator):
    packed, values, said = in_groups(model, generator, is_awq=True)
    return packed, values, said | {"quant_method": "awq", "version": "gemm", "zero_point": True}


CASES = {
    "gptq": ("llama", gptq, {}),
    "awq": ("llama", awq, {}),
    "mxfp4": ("gpt_oss", mxfp4, {}),
    "int8": ("llama", int8, {}),
    "fp8": ("qwen3", fp8, {"hidden_size": 192, "intermediate_size": 320}),  # blocks at the edges are smaller
}  # fmt: skip


def save_published(folder, case):
    """Write a tiny checkpoint in one of the published forms; return the model with its dequantised weights."""
    family, pack, changes = CASES[case]
    plain = build_tiny(family, vocab_size=VOCABULARY, **changes)
    packed, values, said = pack(plain, torch.Generator().manual_seed(5))
    state = {name: tensor.clone() for name, tensor in plain.state_dict().items()}
    plain.save_pretrained(folder)
    save_file({name: tensor for name, tensor in state.items() if name not in values} | packed,
              folder / "model.safetensors", {"format": "pt"})  # fmt: skip
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"quantization_config": said}))
    byte_tokenizer().save_pretrained(folder)
    plain.load_state_dict(values, strict=False)
    if case == "mxfp4":
        plain.set_experts_implementation("eager")
    return plain


@pytest.fixture(scope="module", params=CASES)
def published(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    return request.param, folder, save_published(folder, request.param)


def load(folder, quant="nf4", **options):
    return load_model(folder, quant, compute_dtype=torch.float32, use_cache=False, **options)


def test_mxfp4_is_what_transformers_makes_of_it_bit_for_bit():
    blocks, scales = random_mxfp4(3, 5, 64, torch.Generator().manual_seed(0))
    for dtype in (torch.float32, torch.bfloat16):
        expected = by_transformers(blocks, scales, dtype=dtype).transpose(1, 2)
        found = FORMATS["mxfp4"].dequantize([blocks, scales], (3, 5, 64), dtype)
        assert torch.equal(found, expected)
        for which in (slice(1, 3), torch.tensor([2, 0])):
            rows = FORMATS["mxfp4"].dequantize_rows([blocks, scales], (3, 5 * 64), which, dtype)
            assert torch.equal(rows.view(-1, 5, 64), expected[which])


def test_it_gives_the_logits_and_gradients_of_the_dequantised_model(published, caplog):
    _, folder, plain = published
    model = load(folder)
    assert "is quantised already and keeps its codes: model.quant keep" in caplog.text
    assert torch.allclose(logits(model), logits(plain), atol=1e-5)
    found, expected = (gradients(adapted(each), PLAIN) for each in (model, adopt(copy.deepcopy(plain))))
    assert all((one - other).norm() <= 1e-5 * other.norm() for one, other in zip(found, expected, strict=True))
    kinds = {module.quant_type for module in model.modules() if isinstance(module, PackedWeight)}
    assert kinds == {kind for _, kind in published_formats(read_config(str(folder)))}


def test_groups_of_experts_are_dequantised_without_the_others(tmp_path):
    plain = save_published(tmp_path, "mxfp4")
    described, tensors = described_experts(first_experts(load(tmp_path)))
    _, down = _both(described, tensors, torch.float32)
    expected = plain.model.layers[0].mlp.experts.down_proj[1:3]
    assert torch.equal(down._group(slice(1, 3), torch.float32), expected.transpose(1, 2))


@pytest.mark.parametrize("options", [
    MemoryOptions(resident_layers=0, stream_from_disk=True), MemoryOptions(resident_layers=1, cache_dequantized=True),
], ids=str)  # fmt: skip
def test_streamed_it_has_every_bit_of_the_gradients_of_the_resident_one(published, options):
    _, folder, _ = published
    found, resident = (gradients(adapted(load(folder), where), where) for where in (options, PLAIN))
    assert all(torch.equal(one, other) for one, other in zip(found, resident, strict=True))


def test_it_is_planned_with_the_tensors_that_it_has(published):
    _, folder, _ = published
    config, model = read_config(str(folder)), load(folder)
    planned = meta_model(config, "keep", False, torch.float32, formats=published_formats(config))
    described = [{name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in each.state_dict().items()}
                 for each in (planned, model)]  # fmt: skip
    assert described[0] == described[1]


def test_a_run_trains_beside_its_codes_and_is_not_merged_into_them(published, tmp_path):
    _, folder, _ = published
    run = make_run(tmp_path, folder, lora={"rank": 4, "alpha": 8})
    with pytest.raises(ModelError, match="nothing is merged into codes"):
        merge_run(run, tmp_path / "merged", MergeSettings(rows=0))


@pytest.mark.parametrize(("case", "module"), [("int8", scaled), ("fp8", scaled), ("gptq", grouped), ("awq", grouped)])
def test_every_bit_is_that_of_the_reference_whole_or_some_rows_at_a_time(case, module, tmp_path, monkeypatch):
    plain = save_published(tmp_path, case)
    layer = load(tmp_path).model.layers[0].mlp.up_proj
    expected, rows = plain.model.layers[0].mlp.up_proj.weight, torch.tensor([9, 0, 95, 9])
    assert torch.equal(WeightRows(layer, torch.float32)[rows], expected[rows])
    for at_once in (module.AT_ONCE, 5 * expected.shape[1]):
        monkeypatch.setattr(module, "AT_ONCE", at_once)
        for dtype in (torch.float32, torch.bfloat16):
            assert torch.equal(materialize(*frozen_weight(layer), dtype), expected.to(dtype))


def test_a_packed_layer_of_which_the_configuration_does_not_say_so_is_an_error(tmp_path):
    save_published(tmp_path, "fp8")
    path = tmp_path / "config.json"
    path.write_text(path.read_text().replace('"lm_head"', '"model.layers.0.mlp"'))
    with pytest.raises(ModelError, match=r"tensor model\.layers\.0\.mlp\.\w+\.weight\w* is packed"):
        load(tmp_path)


@pytest.mark.parametrize(("said", "message"), [
    ({"quant_method": "fp8"}, "quantised with fp8 as fp8_a whole weight, which is not known here"),
    ({"quant_method": "fp8", "weight_block_size": [1, 32]}, "as fp8_1x32, which"),
    ({"quant_method": "gptq", "bits": 3, "group_size": 128}, "with gptq as gptq_3_128, which"),
    ({"quant_method": "awq", "bits": 4, "group_size": 128, "version": "gemv"}, "with awq as awq_4_128 for gemv, which"),
])  # fmt: skip
def test_blocks_of_another_size_are_refused(said, message, tmp_path):
    save_published(tmp_path, "fp8")
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"quantization_config": said}))
    with pytest.raises(ModelError, match=message):
        load(tmp_path)


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
