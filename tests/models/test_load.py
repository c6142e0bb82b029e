"""Every way into a 4-bit model gives the same packed bytes, and the same logits as transformers and bitsandbytes."""

import errno
import json
import re
from pathlib import Path

import pytest
import torch
from bitsandbytes.functional import quantize_4bit
from safetensors import safe_open
from safetensors.torch import save_file
from tiny import ARCHITECTURES, EAGER, build_tiny
from tiny_files import MERGES, save_tiny
from tiny_runs import tiny_run
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

from qlora_lite import doctor
from qlora_lite.errors import ModelError
from qlora_lite.export.formats import ExportSettings, export_run
from qlora_lite.ext.gguf.model import MODEL_FILE
from qlora_lite.models import unused_gpu
from qlora_lite.models.load import _warn_once, adopt, load_model, missing_kernels, resolve_compute_dtype, resolve_device
from qlora_lite.models.quantizer import OnArrivalQuantizer, QuantizeOnArrival, quantize_head, quantize_in_place
from qlora_lite.models.save import save_quantized
from qlora_lite.models.skeleton import meta_model, read_config
from qlora_lite.models.tokenizer import load_tokenizer
from qlora_lite.quant.linear import QuantLinear
from qlora_lite.quant.packed import PackedWeight
from qlora_lite.train.text_guards import check_forward

IDS = torch.randint(3, 160, (2, 11), generator=torch.Generator().manual_seed(0))


def load(folder, quant="nf4", **options):
    return load_model(str(folder), quant, **({"compute_dtype": torch.float32, "use_cache": False} | options))


def packed(model):
    """Every tensor of every 4-bit layer."""
    layers = {name: m for name, m in model.named_modules() if isinstance(m, QuantLinear)}
    return {(name, i): t for name, m in layers.items() for i, t in enumerate(m.packed) if t is not None}


def assert_same_weights(model, other):
    ours, theirs = packed(model), packed(other)
    assert ours and ours.keys() == theirs.keys()
    for key, tensor in ours.items():
        assert torch.equal(tensor, theirs[key]), key
    plain, others = dict(model.named_parameters()), dict(other.named_parameters())
    assert plain.keys() == others.keys()
    assert all(torch.equal(plain[name], others[name]) for name in plain)


def logits(model):
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits


@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_quantising_on_arrival_gives_the_bytes_of_quantising_in_place(model_type, tmp_path):
    model = build_tiny(model_type)
    model.save_pretrained(tmp_path)
    loaded = load(tmp_path)
    quantize_in_place(model, "nf4", double_quant=True)
    assert_same_weights(loaded, model)
    assert check_forward(loaded) < 1e-5
    assert not loaded.training
    assert not any(p.requires_grad for p in loaded.parameters())


@pytest.mark.parametrize("quant", ["nf4", "fp4"])
@pytest.mark.parametrize("double_quant", [True, False])
def test_a_sharded_checkpoint_gives_the_bytes_of_one_file(quant, double_quant, tmp_path):
    save_tiny(tmp_path / "one")
    save_tiny(tmp_path / "many", shard="60KB")
    assert len(list((tmp_path / "many").glob("*.safetensors"))) > 3
    assert_same_weights(*(load(tmp_path / name, quant, double_quant=double_quant) for name in ("one", "many")))


@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_the_head_the_embeddings_and_the_norms_are_never_4_bit(model_type, tmp_path):
    build_tiny(model_type).save_pretrained(tmp_path)
    model = load(tmp_path, compute_dtype=torch.bfloat16)
    assert not isinstance(model.get_output_embeddings(), QuantLinear)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    large = [
        n for n, p in model.named_parameters() if p.ndim == 2 and "emb" not in n and "wpe" not in n and "wte" not in n
    ]
    assert set(large) <= {"lm_head.weight"}, "a linear layer stayed in 16 bit"


def test_tied_weights_stay_tied_and_untied_ones_apart(tmp_path):
    save_tiny(tmp_path / "tied", tie_word_embeddings=True)
    save_tiny(tmp_path / "untied", tie_word_embeddings=False)
    for attempt in ("first load", "load from the cache"):
        tied, untied = (load(tmp_path / name, use_cache=True) for name in ("tied", "untied"))
        assert tied.get_output_embeddings().weight is tied.get_input_embeddings().weight, attempt
        assert untied.get_output_embeddings().weight.data_ptr() != untied.get_input_embeddings().weight.data_ptr()


def test_quant_none_keeps_the_plain_weights(tmp_path):
    plain = save_tiny(tmp_path)
    model = load(tmp_path, "none")
    assert not packed(model)
    assert torch.allclose(logits(model), logits(plain), atol=1e-4)


# Rows of a multiple of 64: otherwise bitsandbytes' CPU kernel takes wrong block maxima (see quant/nf4.py).
WIDTHS = {"gpt2": {}, "qwen3": {"head_dim": 32, "intermediate_size": 128}}


@pytest.mark.parametrize("model_type", [name for name in ARCHITECTURES if name != "falcon"])
@pytest.mark.parametrize("tied", [True, False])
def test_a_saved_4_bit_model_gives_equal_logits_in_plain_transformers(model_type, tied, tmp_path):
    changes = WIDTHS.get(model_type, {"intermediate_size": 128}) | {"tie_word_embeddings": tied}
    build_tiny(model_type, **changes).save_pretrained(tmp_path / "plain")
    model = load(tmp_path / "plain")
    save_quantized(model, tmp_path / "quantized")

    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "quantized", dtype=torch.float32, **EAGER)

    assert sum(type(m).__name__ == "Linear4bit" for m in theirs.modules()) == len(packed(model)) // 5
    theirs.train()  # its inference kernel rounds to bf16
    assert torch.allclose(theirs(input_ids=IDS).logits, logits(model), atol=1e-4)
    assert_same_weights(load(tmp_path / "quantized"), model)


@pytest.mark.parametrize("model_type", ["llama", "qwen2", "gpt2", "opt"])
def test_a_saved_4_bit_model_is_loaded_in_the_type_that_is_asked_for_whatever_it_is_saved_in(model_type, tmp_path):
    build_tiny(model_type).save_pretrained(tmp_path / "plain")
    save_quantized(load(tmp_path / "plain", compute_dtype=torch.bfloat16), tmp_path / "quantized")
    found = load(tmp_path / "quantized")
    assert {weight.dtype for weight in found.parameters()} == {torch.float32} and found.dtype == torch.float32
    stored = load(tmp_path / "quantized", compute_dtype=torch.bfloat16)
    assert {weight.dtype for weight in stored.parameters()} == {torch.bfloat16}
    assert torch.allclose(logits(found), logits(stored).float(), atol=0.05)


@pytest.mark.parametrize("base", ["folder", "gguf"])
def test_a_saved_4_bit_model_says_its_class_and_keeps_its_cache_of_keys(base, tmp_path):
    path = tmp_path / "model"
    if base == "gguf":
        run = tiny_run(tmp_path, merges=MERGES)
        export_run(run, tmp_path / "gguf", ExportSettings("gguf"))
        path = tmp_path / "gguf" / MODEL_FILE
    else:
        save_tiny(path)
    save_quantized(load(path), tmp_path / "quantized")
    config = json.loads((tmp_path / "quantized" / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"] and config["use_cache"]


def test_layers_that_transformers_cannot_load_in_4_bit_are_not_saved_and_not_cached(tmp_path, caplog):
    build_tiny("falcon").save_pretrained(tmp_path / "plain")
    model = load(tmp_path / "plain", use_cache=True)
    assert packed(model)
    assert "not cached: transformers does not load 4-bit weights into layers of class FalconLinear" in caplog.text
    with pytest.raises(ModelError, match="class FalconLinear"):
        save_quantized(model, tmp_path / "quantized")
    assert not (tmp_path / "quantized").exists()


@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("quant", ["nf4", "fp4"])
def test_a_checkpoint_that_bitsandbytes_quantised_is_taken_over_as_it_is(quant, double_quant, tmp_path, caplog):
    from transformers import BitsAndBytesConfig

    save_tiny(tmp_path / "plain")
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type=quant, bnb_4bit_use_double_quant=double_quant)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "plain", quantization_config=config, dtype=torch.float32)
    theirs.save_pretrained(tmp_path / "theirs")
    ours = load(tmp_path / "plain", quant, double_quant=double_quant)
    for asked in ((quant, double_quant), ("none", True)):  # what is asked for does not count, and that is said
        caplog.clear()
        assert_same_weights(load(tmp_path / "theirs", asked[0], double_quant=asked[1]), ours)
        stored = f"model.quant {quant}, model.double_quant {str(double_quant).lower()}"
        said = f"is stored in 4 bit already and is taken as it is: {stored}"
        assert (said in caplog.text) == (asked != (quant, double_quant))
    head = load(tmp_path / "theirs", "none", quant_head=True).get_output_embeddings()
    assert (head.quant_type, head.double_quant) == (quant, double_quant)


@pytest.mark.parametrize("block_size", [32, 128])
def test_a_bitsandbytes_checkpoint_in_blocks_of_another_size_is_refused(block_size, tmp_path):
    plain, tensors = save_tiny(tmp_path), {}
    for name, tensor in plain.state_dict().items():
        if name.endswith("proj.weight"):
            codes, state = quantize_4bit(tensor, blocksize=block_size, quant_type="nf4", compress_statistics=True)
            tensors |= {name: codes, **{f"{name}.{key}": part for key, part in state.as_dict(packed=True).items()}}
        else:
            tensors[name] = tensor
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, tmp_path / "model.safetensors")
    path, stored = tmp_path / "config.json", {"quant_method": "bitsandbytes", "load_in_4bit": True}
    stored |= {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
    path.write_text(json.dumps(json.loads(path.read_text()) | {"quantization_config": stored}))
    with pytest.raises(ModelError, match=rf"has block sizes \({block_size}, 256\)"):
        load(tmp_path)


def test_16_bit_weights_that_config_json_says_are_in_4_bit_are_refused_in_plan_and_load(tmp_path):
    save_tiny(tmp_path)
    path, stored = tmp_path / "config.json", {"quant_method": "bitsandbytes", "load_in_4bit": True}
    path.write_text(json.dumps(json.loads(path.read_text()) | {"quantization_config": stored}))
    for read in (load, lambda folder: read_config(str(folder))):
        with pytest.raises(ModelError, match=r"files hold them in 16 bit: remove quantization_config from it"):
            read(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    assert read_config(str(tmp_path)).quantization_config["load_in_4bit"]  # nothing is known of weights elsewhere


def test_a_checkpoint_of_another_quantisation_is_refused(tmp_path):
    save_tiny(tmp_path)
    path = tmp_path / "config.json"
    for stored, text in (({"quant_method": "gptq", "bits": 4}, "quantised with gptq"), ("nf4", "must be an object")):
        path.write_text(json.dumps(json.loads(path.read_text()) | {"quantization_config": stored}))
        with pytest.raises(ModelError, match=text):
            load(tmp_path)


@pytest.mark.parametrize("quant", ["nf4", "fp4"])
def test_experts_of_an_unknown_form_are_refused_with_their_bytes(quant, tmp_path):
    config = AutoConfig.for_model(
        "llama4_text",
        vocab_size=160,
        hidden_size=64,
        intermediate_size=192,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        num_local_experts=8,
        intermediate_size_mlp=96,
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    stacked = 2 * 8 * (192 * 2 * 64 + 64 * 192) * 2  # layers, experts, the two weights of each, bytes
    size = f"{stacked / 2**20:.1f} MiB"
    with pytest.raises(ModelError, match=f"4 weights hold several experts .* {size} of them in 16 bit"):
        load(tmp_path, quant)


def test_large_convolutions_are_no_experts_and_stay_as_they_are():
    config = AutoConfig.for_model("mamba", vocab_size=160, hidden_size=16_384, num_hidden_layers=1, state_size=8)
    model = meta_model(config, "nf4", True, torch.bfloat16)
    assert model.backbone.layers[0].mixer.conv1d.weight.numel() > 2**16
    assert isinstance(model.backbone.layers[0].mixer.in_proj, QuantLinear)


def test_the_tokenizer_comes_with_its_template(tmp_path):
    save_tiny(tmp_path)
    tokenizer = load_tokenizer(str(tmp_path))
    assert tokenizer.is_fast
    text = tokenizer.apply_chat_template([{"role": "user", "content": "é?"}], tokenize=False)
    assert text == "<|im_start|>user\né?<|im_end|>\n"
    assert tokenizer.decode(tokenizer(text).input_ids) == text


def test_asking_for_cuda_without_a_device_is_an_error(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ModelError, match="torch finds no CUDA device"):
        resolve_device("cuda")
    assert resolve_device("auto") == torch.device("cpu")


DRIVER = "NVRM version: NVIDIA UNIX {}x86_64 Kernel Module  {}  Thu Jun 27 14:27:41 UTC 2024\nGCC version:  gcc 12\n"


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """Make a machine on which torch sees no GPU, of a driver's text, names in /dev, and torch's CUDA."""

    def make(driver=None, devices=("nvidia0", "nvidiactl"), cuda="13.0"):
        monkeypatch.setattr(unused_gpu, "_KERNEL_MODULE", tmp_path / "version")
        monkeypatch.setattr(unused_gpu, "_DEVICES", tmp_path / "dev")
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        monkeypatch.setattr(torch.version, "cuda", cuda)
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        (tmp_path / "dev").mkdir()
        for name in devices:
            (tmp_path / "dev" / name).touch()
        if driver:
            (tmp_path / "version").write_text(driver)

    _warn_once.cache_clear()
    return make


@pytest.mark.parametrize(
    ("driver", "version", "cuda", "said"),
    [
        (
            DRIVER.format("", "535.104.05"),
            "535.104.05",
            "13.0",
            "is built for CUDA 13.0, which needs driver 580 or later",
        ),
        (DRIVER.format("Open Kernel Module for ", "560.35.03"), "560.35.03", "13.0", "needs driver 580 or later"),
        (DRIVER.format("", "470.82"), "470.82", "12.6", "for it too, update the driver"),
        (
            DRIVER.format("", "580.65.06"),
            "580.65.06",
            None,
            r"without CUDA: install a build with it \(choose CUDA 13 at",
        ),
        (DRIVER.format("", "551.23"), "551.23", None, r"without CUDA: install a build with it \(choose CUDA 12.6 at"),
        (DRIVER.format("", "580.65.06"), "580.65.06", "13.0", "but CUDA 13.0 does not start"),
    ],
)
@pytest.mark.parametrize("name", ["auto", "cuda"])
def test_a_gpu_that_torch_cannot_use_is_no_reason_to_take_the_cpu(machine, name, driver, version, cuda, said):
    machine(driver, cuda=cuda)
    with pytest.raises(
        ModelError, match=rf"NVIDIA GPU \(driver {version}\).*{said}.*set model.device to cpu"
    ) as caught:
        resolve_device(name)
    assert ("pytorch.org/get-started" in str(caught.value)) is ("does not start" not in said)
    assert resolve_device("cpu") == torch.device("cpu")
    found = doctor.examine()
    assert re.search(said, found["notes"][0]) and found["machine"]["bitsandbytes_backend"].startswith("cpu")


def test_where_nvidia_smi_alone_knows_the_driver_it_is_asked(machine, tmp_path, monkeypatch):
    machine()
    program = tmp_path / "nvidia-smi"
    program.write_text("#!/bin/sh\necho 551.23\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ModelError, match=r"driver 551\.23.*needs driver 580"):
        resolve_device("auto")
    program.write_text("#!/bin/sh\necho 'NVIDIA-SMI has failed' 551.23\nexit 9\n")
    assert resolve_device("auto").type == "cpu"


def test_a_container_without_a_gpu_takes_the_cpu_with_one_warning(machine, caplog):
    machine(DRIVER.format("", "535.104.05"), devices=())
    for _ in range(2):
        assert resolve_device("auto").type == "cpu"
    assert [record.levelname for record in caplog.records] == ["WARNING"] and "--gpus all" in caplog.text
    assert any("--gpus all" in note for note in doctor.examine()["notes"])
    with pytest.raises(ModelError, match="torch finds no CUDA device"):
        resolve_device("cuda")


@pytest.mark.parametrize("hidden", ["", "-1"])
def test_who_hides_the_gpu_means_the_cpu(machine, hidden, monkeypatch, caplog):
    machine(DRIVER.format("", "535.104.05"))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", hidden)
    assert resolve_device("auto").type == "cpu" and not caplog.records


@pytest.mark.parametrize("kind", ["mps", "xpu"])
def test_a_gpu_that_is_not_supported_is_named_once_and_refused_by_name(machine, kind, monkeypatch, caplog):
    machine()
    monkeypatch.setattr({"mps": torch.backends.mps, "xpu": torch.xpu}[kind], "is_available", lambda: True)
    for _ in range(2):
        assert resolve_device("auto").type == "cpu"
    assert len(caplog.records) == 1 and f"GPU ({kind}) is not supported" in caplog.text
    assert any(f"GPU ({kind}) is not supported" in note for note in doctor.examine()["notes"])
    with pytest.raises(ModelError, match=f"device is {kind}, which is not supported"):
        load("none", device=kind)


def test_a_cpu_build_of_torch_beside_an_amd_gpu_is_said(machine, monkeypatch, caplog):
    machine(devices=["kfd"], cuda=None)
    assert resolve_device("auto").type == "cpu" and "built without ROCm" in caplog.text
    monkeypatch.setattr(torch.version, "hip", "6.4")
    assert resolve_device("auto").type == "cpu" and "finds none with ROCm 6.4" in caplog.text
    assert any("unverified" in note for note in doctor.examine()["notes"])


@pytest.mark.parametrize(
    ("card", "built", "cure"),
    [
        ((8, 6), ["sm_80", "sm_90"], ""),
        ((8, 0), ["sm_86"], "an earlier"),
        ((6, 1), ["sm_75", "sm_120"], "an earlier"),
        ((12, 1), ["sm_120"], ""),
        ((12, 0), ["sm_90", "compute_90"], ""),
        ((10, 3), ["sm_100a"], "a later"),
        ((10, 0), ["sm_100a"], ""),
        ((6, 1), [], ""),
        ((7, 5), ["sm_75", "compute_120"], ""),
        ((7, 0), ["compute_75"], "an earlier"),
        ((12, 0), ["sm_75", "sm_90"], "a later"),
    ],
)
def test_a_gpu_for_which_this_torch_has_no_kernels_is_refused_by_name(card, built, cure, monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: built)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _device: card)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _device: "Old GPU")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr("qlora_lite.models.load.grow_segments", lambda _device: None)
    monkeypatch.setattr("qlora_lite.models.load.architectures", lambda: [])
    if not cure:
        assert resolve_device("auto").type == "cuda"
    else:
        said = rf"no kernels for Old GPU, compute capability {card[0]}\.{card[1]} \(it.* such as one for {cure} CUDA"
        with pytest.raises(ModelError, match=said):
            resolve_device("auto")
    assert resolve_device("cpu").type == "cpu"


@pytest.mark.parametrize(
    ("card", "built", "missing"),
    [
        ((8, 7), ["sm_80", "sm_90"], False),
        ((12, 1), ["sm_120"], False),
        ((11, 0), ["sm_100", "sm_120"], True),
        ((5, 2), ["sm_60", "compute_90"], True),
        ((11, 0), [], False),
    ],
)
def test_a_gpu_for_which_bitsandbytes_has_no_kernels_is_refused_by_name(card, built, missing, monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: ["sm_50", "compute_50"])
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _device: card)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _device: "Thor")
    monkeypatch.setattr("qlora_lite.models.load.architectures", lambda: built)
    said = missing_kernels(torch.device("cuda"))
    assert said.startswith("bitsandbytes has no kernels for Thor, compute capability") is missing is bool(said)


def test_without_fast_bf16_the_compute_type_is_float32_with_one_line_saying_so(monkeypatch, caplog):
    monkeypatch.setattr(torch.cpu, "get_capabilities", dict)
    with caplog.at_level("INFO", "qlora_lite"):
        assert resolve_compute_dtype("auto", torch.device("cpu")) == torch.float32
    assert [record.message.startswith("compute type float32") for record in caplog.records] == [True]
    assert resolve_compute_dtype("bfloat16", torch.device("cpu")) == torch.bfloat16


def test_bfloat16_is_not_computed_where_avx512_is_hidden_from_torch(monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": True, "amx_bf16": True})
    assert resolve_compute_dtype("auto", torch.device("cpu")) == torch.bfloat16
    monkeypatch.setenv("ATEN_CPU_CAPABILITY", "avx2")
    assert resolve_compute_dtype("auto", torch.device("cpu")) == torch.float32
    with pytest.raises(ModelError, match="ATEN_CPU_CAPABILITY keeps torch from AVX-512"):
        resolve_compute_dtype("bfloat16", torch.device("cpu"))


@pytest.mark.parametrize(
    ("card", "model_type", "dtype"),
    [
        ((6, 1), "llama", torch.float32),
        ((7, 0), "llama", torch.float16),
        ((7, 5), "qwen2", torch.float16),
        ((7, 5), "gemma3_text", torch.float32),
        ((7, 5), "gemma", torch.float16),
        ((8, 0), "gemma3_text", torch.bfloat16),
    ],
)
def test_a_gpu_computes_in_its_narrowest_type_that_holds_the_model(card, model_type, dtype, monkeypatch, caplog):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _device: card)
    with caplog.at_level("INFO", "qlora_lite"):
        assert resolve_compute_dtype("auto", torch.device("cuda"), model_type) == dtype
    assert [record.message.partition(":")[0] for record in caplog.records] == [
        f"compute type {str(dtype).removeprefix('torch.')}"
    ] * (dtype != torch.bfloat16)
    assert resolve_compute_dtype("float16", torch.device("cuda"), model_type) == torch.float16


def test_of_a_4_bit_weight_transformers_reserves_on_a_gpu_what_its_codes_take(tmp_path, monkeypatch):
    build_tiny("llama").save_pretrained(tmp_path)
    reserved, real = [], OnArrivalQuantizer._process_model_before_weight_loading

    def seen(self, model, **options):
        real(self, model, **options)
        for name, tensor in (*model.named_parameters(), *model.named_buffers()):
            is_code = isinstance(model.get_submodule(name.rpartition(".")[0]), QuantLinear) and name.endswith("weight")
            reserved.append((is_code, tensor.numel() * self.param_element_size(model, name, tensor)))

    monkeypatch.setattr(OnArrivalQuantizer, "_process_model_before_weight_loading", seen)
    model = load(tmp_path)
    layers = [module for module in model.modules() if isinstance(module, QuantLinear)]
    assert sum(size for is_code, size in reserved if is_code) == sum(layer.weight.nbytes for layer in layers) > 0
    assert sum(size for is_code, size in reserved if not is_code) >= sum(p.nbytes for p in model.parameters())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("double_quant", [True, False])
def test_another_type_for_a_model_leaves_what_is_stored_in_4_bit_as_it_is(double_quant, dtype):
    model = build_tiny("qwen2")  # which has biases
    quantize_in_place(model, "nf4", double_quant)
    quantize_head(model, "nf4", double_quant)
    before = packed(model)
    after = packed(model.to(dtype))
    assert after.keys() == before.keys() and any("lm_head" in name for name, _ in after)
    for key, tensor in after.items():
        assert tensor.dtype == before[key].dtype and torch.equal(tensor, before[key]), key
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    assert {tensor.device.type for tensor in packed(model.to("meta", torch.float32)).values()} == {"meta"}


def test_a_4_bit_model_in_another_type_computes_alike():
    model = build_tiny("llama")
    quantize_in_place(model, "nf4", double_quant=True)
    model, before = model.float(), logits(model)
    for change in (model.bfloat16, model.half, model.float):
        assert (logits(change()) - before).norm() < 0.02 * before.norm()


def file_of(tensor):
    """Return the path of the file that a tensor's memory is mapped from, "" if from none."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        begin, end = (int(address, 16) for address in line.split()[0].split("-"))
        if begin <= tensor.data_ptr() < end:
            inode, *path = line.split(maxsplit=5)[4:]
            return path[0].strip() if inode != "0" else ""
    raise AssertionError("no such memory")


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="this system does not show what is mapped")
@pytest.mark.parametrize("use_cache", [False, True])
@pytest.mark.parametrize("model_type", ["llama", "qwen3_moe"])
def test_a_model_that_memory_has_no_room_for_lies_in_files_from_its_first_weight_on(
    model_type, use_cache, tmp_path, monkeypatch
):
    build_tiny(model_type).save_pretrained(tmp_path / "model")
    expected, made = load(tmp_path / "model"), []
    convert = QuantizeOnArrival.convert

    def noted(self, *args, **kwargs):
        found = convert(self, *args, **kwargs)
        made.extend(tensor for name, tensor in found.items() if not name.endswith("_proj"))  # of experts, a placeholder
        assert all(map(file_of, made))
        return found

    monkeypatch.setattr(QuantizeOnArrival, "convert", noted)
    monkeypatch.setattr("qlora_lite.models.quantizer.PART_BYTES", 1 << 14)
    monkeypatch.setenv("QLORA_LITE_CACHE", str(tmp_path / "cache"))
    for _ in range(1 + use_cache):
        model = load(tmp_path / "model", use_cache=use_cache, in_files=True)
        held = {name: tensor for name, tensor in packed_parts(model).items() if tensor.nbytes > 1024}  # not tables
        files = {file_of(tensor).rpartition(".")[2] for tensor in held.values()}
        assert len(held) >= 8 and "" not in files
        assert (files == {"safetensors"}) == use_cache, "or else files without a name"
        theirs = packed_parts(expected)
        assert all(torch.equal(tensor, theirs[name]) for name, tensor in packed_parts(model).items())
    assert len({tensor.untyped_storage()._cdata for tensor in made}) > 1, "several parts"


def packed_parts(model):
    """Every tensor of every weight in 4 bit, those of experts too."""
    return {
        name: buffer
        for name, buffer in model.named_buffers()
        if isinstance(model.get_submodule(name.rpartition(".")[0]), PackedWeight)
    }


def test_a_disk_without_room_for_the_weights_is_named_with_its_cure(tmp_path, monkeypatch):
    asked = []

    def full(*_arguments):
        asked.append(_arguments)
        raise OSError(errno.ENOSPC, "No space left on device")

    save_tiny(tmp_path / "model")
    monkeypatch.setattr("os.posix_fallocate", full)
    monkeypatch.setenv("QLORA_LITE_CACHE", str(tmp_path / "cache"))
    with pytest.raises(ModelError, match=r"QLORA_LITE_CACHE: 256.0 MiB cannot be taken .* No space left .* make room"):
        load(tmp_path / "model", in_files=True)
    assert len(asked) == 1, "the other weights are not tried"


SIZES = dict(
    vocab_size=160,
    hidden_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    moe_intermediate_size=32,
    num_experts_per_tok=2,
)
CUT = {
    "sarvam_moe": ("query_key_value", dict(intermediate_size=96, n_routed_experts=4, first_k_dense_replace=1)),
    "lara_mini": (
        "linear_attn.in_proj.",
        dict(
            linear_key_head_dim=16,
            linear_value_head_dim=16,
            linear_num_key_heads=2,
            linear_num_value_heads=4,
            shared_expert_intermediate_size=32,
            num_experts=4,
            layer_types=["linear_attention", "full_attention"],
        ),
    ),
}


@pytest.mark.filterwarnings("ignore")  # what transformers says about missing kernels
@pytest.mark.parametrize("in_files", [False, True])
@pytest.mark.parametrize("model_type", CUT)
def test_layers_that_are_one_weight_in_the_files_are_cut_apart_and_packed(model_type, in_files, tmp_path):
    name, sizes = CUT[model_type]
    if model_type not in CONFIG_MAPPING_NAMES:
        pytest.skip("transformers does not know it yet")
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **SIZES, **sizes)).save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert any(name in key for key in file.keys())  # noqa: SIM118
    found, expected = load(tmp_path, in_files=in_files), load(tmp_path, "none")
    quantize_in_place(expected, "nf4", True)
    assert_same_weights(found, adopt(expected))
    with torch.no_grad():
        assert torch.equal(found(input_ids=IDS).logits, expected(input_ids=IDS).logits)
