"""A denoiser's LoRA weights as ComfyUI and other programs that draw pictures name them: kohya's layout.

A layer is called by its path in the model, with "_" for ".", behind "lora_unet_". It has A as ``lora_down``, B as
``lora_up`` and ``alpha``, and alpha / r times their product is added. alpha is r here: the scale is multiplied into B,
as in diffusers' own files. A U-Net has diffusers' paths. FLUX.1 and FLUX.2 have those of Black Forest Labs' own code,
in which one layer computes queries, keys and values: the A of diffusers' layers then stand above each other, their B
along a diagonal, and r is the sum of theirs.

Shapes: A [r, in], B [out, r].
Source: diffusers, ``loaders/lora_conversion_utils.py`` and ``utils.convert_state_dict_to_kohya``.
"""

import re
from collections.abc import Mapping

import torch

from qlora_lite.adapters.diffusers_files import scaled
from qlora_lite.adapters.read import Factors
from qlora_lite.errors import ModelError
from qlora_lite.export.form import Job, Written
from qlora_lite.files import explain_write_errors
from qlora_lite.quant.tensor_file import write_tensors

UNET, FLUX = "UNet2DConditionModel", ("FluxTransformer2DModel", "Flux2Transformer2DModel")
_OF_UNETS = {"add_embedding.linear_1": "label_emb.0.0", "add_embedding.linear_2": "label_emb.0.2"}
_BLOCK = re.compile(r"transformer\.(single_)?transformer_blocks\.(\d+)\.(.+)")
_OF_STREAMS = {
    "attn.to_out.0": "img_attn_proj",
    "ff.net.0.proj": "img_mlp_0",
    "ff.net.2": "img_mlp_2",
    "ff.linear_in": "img_mlp_0",
    "ff.linear_out": "img_mlp_2",
    "norm1.linear": "img_mod_lin",
    "attn.to_add_out": "txt_attn_proj",
    "ff_context.net.0.proj": "txt_mlp_0",
    "ff_context.net.2": "txt_mlp_2",
    "ff_context.linear_in": "txt_mlp_0",
    "ff_context.linear_out": "txt_mlp_2",
    "norm1_context.linear": "txt_mod_lin",
}
_OF_SINGLE = {
    "proj_out": "linear2",
    "norm.linear": "modulation_lin",
    "attn.to_qkv_mlp_proj": "linear1",
    "attn.to_out": "linear2",
}
_QKV = "attn.to_q", "attn.to_k", "attn.to_v"
# What one layer computes: the paths of diffusers' layers, in order, and their outputs by the layer's inputs.
_JOINED = {
    "img_attn_qkv": dict.fromkeys(_QKV, 1),
    "linear1": dict.fromkeys(_QKV, 1) | {"proj_mlp": 4},
    "txt_attn_qkv": dict.fromkeys(("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"), 1),
}


def kohya_tensors(layers: Mapping[str, Factors], denoiser: str) -> dict[str, torch.Tensor]:
    """Return LoRA weights under kohya's names.

    Args:
        layers: by path in a ``denoisers.DenoiserModel``, as "unet.down_blocks.0...".
        denoiser: the denoiser's class in diffusers.

    Raises:
        ModelError: the layout has no names for the denoiser, or for one of the layers.
    """
    parts: dict[str, dict[str, Factors]] = {}
    for path, factors in layers.items():
        name, part = _named(path, denoiser)
        parts.setdefault(f"lora_unet_{name}", {})[part] = factors
    found = {}
    for name, held in parts.items():
        down, up = _joined(held, next((order for end, order in _JOINED.items() if name.endswith(end)), {}))
        found[f"{name}.lora_down.weight"], found[f"{name}.lora_up.weight"] = down.contiguous(), up.contiguous()
        found[f"{name}.alpha"] = torch.tensor(float(len(down)))
    return found


def _named(path: str, denoiser: str) -> tuple[str, str]:
    """Return the name of the layer that a layer of diffusers is, or is a part of, and which part."""
    if denoiser == UNET:
        inside = path.removeprefix("unet.")
        return _OF_UNETS.get(inside, inside).replace(".", "_"), inside
    if denoiser not in FLUX:
        raise ModelError(
            f"kohya's layout is known for U-Nets with texts, FLUX.1 and FLUX.2, not for {denoiser}; "
            "take pytorch_lora_weights.safetensors of the run's adapter"
        )
    if match := _BLOCK.fullmatch(path):
        is_single, number, inside = bool(match[1]), match[2], match[3]
        joined = ("linear1",) if is_single else ("img_attn_qkv", "txt_attn_qkv")
        of = _OF_SINGLE if is_single else _OF_STREAMS
        if name := of.get(inside) or next((name for name in joined if inside in _JOINED[name]), None):
            return f"{'single' if is_single else 'double'}_blocks_{number}_{name}", inside
    raise ModelError(f"kohya's layout has no name for {path}; leave it out of lora.targets")


def _joined(held: Mapping[str, Factors], order: Mapping[str, int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return A and B of a layer that computes what several do, of which some may have no LoRA weights."""
    if not held.keys() & order.keys():
        (alone,) = held.values()
        return alone.lora_A, scaled(alone.lora_B, alone.scale)
    there = [held[part] for part in order if part in held]
    width, none = there[0].lora_A.shape[1], there[0].lora_B.new_zeros
    blocks = [
        scaled(held[part].lora_B, held[part].scale) if part in held else none(times * width, 0)
        for part, times in order.items()
    ]
    return torch.cat([factors.lora_A for factors in there]), torch.block_diag(*blocks)


class KohyaFile:
    """One safetensors file."""

    dtypes = ()
    draws = True

    def write(self, job: Job) -> Written:
        """Write the file."""
        tensors = kohya_tensors(job.adapter.layers, job.trained.files.config["_class_name"])
        path = job.out / f"{job.trained.name}.safetensors"
        with explain_write_errors(path):
            job.out.mkdir(parents=True, exist_ok=True)
            write_tensors(path, tensors)
        return Written({"use": f"in ComfyUI, put {path} into models/loras, and name it in a LoraLoader"})

    def check(self, _job: Job, _written: Written) -> dict:
        """Return nothing: the programs that read this layout are no Python packages."""
        return {}


KOHYA = KohyaFile()
