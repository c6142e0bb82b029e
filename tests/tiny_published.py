"""Tiny checkpoints whose weights are published packed, with values that share no code with the package's."""

import itertools
import json
import re

import torch
from safetensors.torch import load_file, save_file
from tiny import build_tiny
from tiny_files import VOCABULARY, byte_tokenizer
from transformers.integrations.mxfp4 import _convert_moe_packed_tensors as by_transformers

from qlora_lite.quant.bnb import functional


def random_mxfp4(experts: int, out: int, width: int, generator) -> tuple[torch.Tensor, torch.Tensor]:
    blocks = torch.randint(0, 256, (experts, out, width // 32, 16), dtype=torch.uint8, generator=generator)
    return blocks, torch.randint(119, 124, blocks.shape[:-1], dtype=torch.uint8, generator=generator)


def mxfp4(stored, generator):
    """Pack the experts of a model's files; return what files call the parts, and the values that transformers gives
    them."""
    packed, values = {}, {}
    for name, weight in stored.items():
        if weight.ndim == 3:
            blocks, scales = random_mxfp4(*weight.transpose(1, 2).shape, generator)
            packed |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
            values[name] = by_transformers(blocks, scales, dtype=torch.float32)
    said = {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn", "lm_head"]}
    return packed, values, said


def linear_weights(stored):
    """Those of linear layers, single experts among them, which Mixtral calls w1, w2 and w3."""
    return {name: weight for name, weight in stored.items() if re.search(r"(_proj\w*|\.w\d)\.weight$", name)}


def int8(stored, generator):
    """Pack the linear layers as bitsandbytes does, with its own dequantised values."""
    packed, values = {}, {}
    for name, weight in linear_weights(stored).items():
        codes, scales, _ = functional.int8_vectorwise_quant(weight.half())
        packed |= {name: codes, name.replace("weight", "SCB"): scales}
        packed[name.replace("weight", "weight_format")] = torch.tensor(0, dtype=torch.uint8)
        values[name] = functional.int8_vectorwise_dequant(codes, scales)
    return packed, values, {"quant_method": "bitsandbytes", "load_in_8bit": True, "llm_int8_skip_modules": ["lm_head"]}


def fp8(stored, generator):
    """Pack the linear layers but one in blocks of 128 by 128, with values block by block."""
    packed, values = {}, {}
    for name, weight in linear_weights(stored).items():
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


def fp8_beside_a_further_block(stored, generator):
    """Do so, and add a block that the model has not, as DeepSeek-V3 has one that predicts a further token."""
    packed, values, said = fp8(stored, generator)
    further = {name.replace("layers.1", "layers.2"): tensor.clone() for name, tensor in packed.items()}
    return packed | further, values, said


def words(codes):
    """Pack eight codes of 4 bits, the last dimension of [..., n, 8], the first lowest."""
    packed = (codes.long() << torch.arange(0, 32, 4)).sum(-1)
    return (packed - ((packed >> 31) << 32)).to(torch.int32)


def in_groups(stored, generator, is_awq):
    """Pack the linear layers in groups of 32, of GPTQ in an order of its own (act-order), which layers that have the
    same inputs share."""
    packed, values, orders = {}, {}, {}
    for name, weight in linear_weights(stored).items():
        out, width = weight.shape
        path, groups = name.removesuffix(".weight"), torch.arange(width) // 32
        if not is_awq:
            order = torch.randperm(width, generator=generator)
            groups = groups[orders.setdefault(path.replace("gate_proj", "up_proj"), order)]
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


def gptq(stored, generator):
    packed, values, said = in_groups(stored, generator, is_awq=False)
    return packed, values, said | {"quant_method": "gptq", "desc_act": True}


def awq(stored, generator):
    packed, values, said = in_groups(stored, generator, is_awq=True)
    said |= {"quant_method": "awq", "version": "gemm", "zero_point": True, "modules_to_not_convert": ["gate"]}
    return packed, values, said


CASES = {
    "gptq": ("llama", gptq, {}),
    "awq": ("llama", awq, {}),
    "mxfp4": ("gpt_oss", mxfp4, {}),
    "int8": ("llama", int8, {}),
    "fp8": ("qwen3", fp8, {"hidden_size": 192, "intermediate_size": 320}),  # blocks at the edges are smaller
    "fp8_experts": (
        "deepseek_v3",
        fp8_beside_a_further_block,
        {
            "hidden_size": 192,
            "moe_intermediate_size": 128,
            "v_head_dim": 12,
        },
    ),
    "gptq_experts": ("qwen3_moe", gptq, {}),
    "awq_experts": ("mixtral", awq, {}),
}
WITH_EXPERTS = [case for case in CASES if case == "mxfp4" or "experts" in case]
SINGLE_EXPERTS = [case for case in WITH_EXPERTS if case != "mxfp4"]  # that files have one by one


def save_published(folder, case):
    """Write a tiny checkpoint in one of the published forms; return the model with its dequantised weights, as
    transformers loads those."""
    family, pack, changes = CASES[case]
    plain = build_tiny(family, vocab_size=VOCABULARY, **changes)
    plain.save_pretrained(folder)
    stored = {name: tensor.clone() for name, tensor in load_file(folder / "model.safetensors").items()}
    packed, values, said = pack(stored, torch.Generator().manual_seed(5))
    save_file(
        {name: tensor for name, tensor in stored.items() if name not in values} | packed,
        folder / "model.safetensors",
        {"format": "pt"},
    )
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"quantization_config": said}))
    byte_tokenizer().save_pretrained(folder)
    how = {"experts_implementation": "eager"} if case in WITH_EXPERTS else {}
    how |= {"config": plain.config, "state_dict": stored | values, "dtype": torch.float32}
    plain = type(plain).from_pretrained(None, **how)
    return plain.eval().requires_grad_(False)
