"""A checkpoint that is published packed is trained on its own codes, with the logits of the dequantised model."""

import copy
import json
import re

import pytest
import torch
from memory_option_cases import PLAIN, gradients
from safetensors.torch import load_file, save_file
from test_kept_codes import adapted
from tiny_published import CASES, by_transformers, random_mxfp4, save_published
from tiny_runs import logits, make_run

from qlora_lite.errors import ModelError
from qlora_lite.experts.grouped import _both
from qlora_lite.experts.packing import described_experts, first_experts
from qlora_lite.export.merge import MergeSettings, merge_run
from qlora_lite.models.load import adopt, load_model
from qlora_lite.models.memory_options import MemoryOptions
from qlora_lite.models.published import published_formats
from qlora_lite.models.skeleton import meta_model, read_config
from qlora_lite.quant import pieces
from qlora_lite.quant.formats import FORMATS
from qlora_lite.quant.linear import WeightRows, frozen_weight
from qlora_lite.quant.packed import PackedWeight
from qlora_lite.quant.product import materialize


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


def test_layers_that_are_published_in_16_bit_may_be_named_and_others_are_refused(tmp_path):
    plain = save_published(tmp_path, "fp8")
    model = load(tmp_path, keep_16bit=["model.layers.1.self_attn.o_proj"])
    assert torch.equal(logits(model), logits(load(tmp_path)))
    assert torch.allclose(logits(model), logits(plain), atol=1e-5)
    with pytest.raises(ModelError, match=r"published with 1 of these layers packed, such as model.layers.0.self_attn"):
        load(tmp_path, keep_16bit=["o_proj"])


def test_groups_of_experts_are_dequantised_without_the_others(tmp_path):
    plain = save_published(tmp_path, "mxfp4")
    described, tensors = described_experts(first_experts(load(tmp_path)))
    _, down = _both(described, tensors, torch.float32)
    expected = plain.model.layers[0].mlp.experts.down_proj[1:3]
    assert torch.equal(down._group(slice(1, 3), torch.float32), expected.transpose(1, 2))


@pytest.mark.parametrize("options", [
    MemoryOptions(resident_layers=0, stream_from="disk"), MemoryOptions(resident_layers=1, cache_dequantized=True),
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


@pytest.mark.parametrize(("case", "said"), [("awq", r"quantised already, and keeps its codes \(awq_4_32\)"),
                                            ("mxfp4", "no 4-bit layers to save")])  # fmt: skip
def test_it_is_not_quantised_a_second_time(case, said, tmp_path, command):
    save_published(tmp_path / "model", case)
    code, _, error = command("quantize", str(tmp_path / "model"), "--out", str(tmp_path / "out"))
    assert code == 2 and re.search(said, error) and not (tmp_path / "out").exists()


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
