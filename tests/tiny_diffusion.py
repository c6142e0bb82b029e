"""Tiny random diffusion pipelines with all their parts, pictures with captions, and recipes for both."""

import json
import string
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tiny_files import save_recipe

COLOURS = {"cool": (20, 60, 200), "hot": (220, 70, 30)}
_BLOCKS = dict(
    sample_size=8,
    in_channels=4,
    out_channels=4,
    layers_per_block=1,
    norm_num_groups=8,
    block_out_channels=[16, 32],
    down_block_types=["DownBlock2D", "CrossAttnDownBlock2D"],
    up_block_types=["CrossAttnUpBlock2D", "UpBlock2D"],
    cross_attention_dim=32,
    attention_head_dim=8,
)


def _stirred(model: torch.nn.Module) -> torch.nn.Module:
    """Return a model none of whose weights is zero, as some are that begin untrained."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape))
    return model


def save_dit_pipeline(folder: Path, channels: int = 3, classes: int = 2, layers: int = 2, **changes) -> Path:
    """Write a DiT of 8 x 8 pixels with a DDIM scheduler, without autoencoder."""
    import diffusers

    torch.manual_seed(0)
    sizes = dict(
        sample_size=8,
        patch_size=2,
        in_channels=channels,
        out_channels=channels,
        num_layers=layers,
        num_attention_heads=2,
        attention_head_dim=16,
        num_embeds_ada_norm=classes,
    )
    _stirred(diffusers.DiTTransformer2DModel(**(sizes | changes))).save_pretrained(folder / "transformer")
    diffusers.DDIMScheduler(beta_schedule="linear").save_pretrained(folder / "scheduler")
    index = {
        "_class_name": "DiTPipeline",
        "scheduler": ["diffusers", "DDIMScheduler"],
        "transformer": ["diffusers", "DiTTransformer2DModel"],
    }
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


def _tokenizer(folder: Path):
    from transformers import CLIPTokenizer

    letters = [*string.ascii_lowercase, *string.digits]
    names = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps({name: number for number, name in enumerate(names)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    return CLIPTokenizer.from_pretrained(folder, model_max_length=8)


def _encoder(folder: Path, with_projection: bool = False):
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    config = CLIPTextConfig(
        vocab_size=76,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=8,
        projection_dim=32,
        bos_token_id=72,
        eos_token_id=73,
    )
    return _stirred((CLIPTextModelWithProjection if with_projection else CLIPTextModel)(config))


def _autoencoder(**changes):
    import diffusers

    sizes = dict(
        block_out_channels=[8, 8],
        down_block_types=["DownEncoderBlock2D"] * 2,
        up_block_types=["UpDecoderBlock2D"] * 2,
        latent_channels=4,
        norm_num_groups=4,
        sample_size=16,
        scaling_factor=0.7,
    )
    return _stirred(diffusers.AutoencoderKL(**(sizes | changes)))


def save_sd_pipeline(folder: Path) -> Path:
    """Write a Stable Diffusion pipeline of 16 x 16 pixels."""
    import diffusers

    torch.manual_seed(0)
    diffusers.StableDiffusionPipeline(
        _autoencoder(),
        _encoder(folder),
        _tokenizer(folder / "tokenizer"),
        _stirred(diffusers.UNet2DConditionModel(**_BLOCKS)),
        diffusers.DDIMScheduler(
            beta_schedule="scaled_linear",
            beta_start=0.00085,
            beta_end=0.012,
            steps_offset=1,
            set_alpha_to_one=False,
            clip_sample=False,
        ),
        None,
        None,
        requires_safety_checker=False,
    ).save_pretrained(folder)
    return folder


def save_sdxl_pipeline(folder: Path) -> Path:
    """Write an SDXL pipeline of 16 x 16 pixels."""
    import diffusers

    torch.manual_seed(0)
    told = dict(
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        cross_attention_dim=64,
        projection_class_embeddings_input_dim=32 + 6 * 8,
        use_linear_projection=True,
    )
    tokenizer = _tokenizer(folder / "tokenizer")
    diffusers.StableDiffusionXLPipeline(
        _autoencoder(),
        _encoder(folder),
        _encoder(folder, True),
        tokenizer,
        tokenizer,
        _stirred(diffusers.UNet2DConditionModel(**(_BLOCKS | told))),
        diffusers.EulerDiscreteScheduler(
            beta_schedule="scaled_linear",
            beta_start=0.00085,
            beta_end=0.012,
            timestep_spacing="leading",
            steps_offset=1,
        ),
    ).save_pretrained(folder)
    return folder


def save_sd3_pipeline(folder: Path) -> Path:
    """Write an SD3 pipeline of 16 x 16 pixels, without its third text encoder."""
    import diffusers

    torch.manual_seed(0)
    tokenizer = _tokenizer(folder / "tokenizer")
    transformer = diffusers.SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=64,
        caption_projection_dim=32,
        pooled_projection_dim=64,
        pos_embed_max_size=8,
    )
    diffusers.StableDiffusion3Pipeline(
        _stirred(transformer),
        diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
        _autoencoder(shift_factor=0.1, use_quant_conv=False, use_post_quant_conv=False),
        _encoder(folder, True),
        tokenizer,
        _encoder(folder, True),
        tokenizer,
        None,
        None,
    ).save_pretrained(folder)
    return folder


def _t5(folder: Path):
    """A tokenizer of letters and a random T5 encoder."""
    from transformers import T5Config, T5EncoderModel, T5Tokenizer

    pieces = [
        *((name, 0.0) for name in ("<pad>", "</s>", "<unk>")),
        *((letter, -3.0) for letter in string.ascii_lowercase),
    ]
    tokenizer = T5Tokenizer(vocab=[*pieces, ("\u2581", -2.0)], extra_ids=0)
    config = T5Config(vocab_size=len(tokenizer), d_model=32, d_kv=16, d_ff=48, num_layers=2, num_heads=2)
    return tokenizer, _stirred(T5EncoderModel(config))


def save_pixart_pipeline(folder: Path) -> Path:
    """Write a PixArt-alpha pipeline of 16 x 16 pixels."""
    import diffusers

    torch.manual_seed(0)
    tokenizer, encoder = _t5(folder)
    transformer = diffusers.PixArtTransformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        out_channels=8,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=4,
        cross_attention_dim=32,
        caption_channels=32,
    )
    diffusers.PixArtAlphaPipeline(
        tokenizer,
        encoder,
        _autoencoder(),
        _stirred(transformer),
        diffusers.DDIMScheduler(beta_schedule="linear", clip_sample=False),
    ).save_pretrained(folder)
    return folder


def save_flux_pipeline(folder: Path) -> Path:
    """Write a FLUX.1 pipeline of 16 x 16 pixels."""
    import diffusers

    torch.manual_seed(0)
    tokenizer, encoder = _t5(folder)
    transformer = diffusers.FluxTransformer2DModel(
        patch_size=1,
        in_channels=16,
        num_layers=1,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        pooled_projection_dim=32,
        guidance_embeds=True,
        axes_dims_rope=(4, 6, 6),
    )
    diffusers.FluxPipeline(
        diffusers.FlowMatchEulerDiscreteScheduler(),  # schnell's; others shift by the picture's size
        _autoencoder(shift_factor=0.1, use_quant_conv=False, use_post_quant_conv=False),
        _encoder(folder),
        _tokenizer(folder / "tokenizer"),
        encoder,
        tokenizer,
        _stirred(transformer),
    ).save_pretrained(folder)
    return folder


def save_klein_pipeline(folder: Path) -> Path:
    """Write a FLUX.2-klein pipeline of 16 x 16 pixels, whose text is three hidden states of a Qwen3."""
    import diffusers
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import Qwen2Tokenizer, Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(0)
    names = [*sorted(ByteLevel.alphabet()), "<|im_start|>", "<|im_end|>"]
    tokenizer = Qwen2Tokenizer(
        vocab={name: number for number, name in enumerate(names)},
        merges=[],
        unk_token=None,
        eos_token="<|im_end|>",
        pad_token="<|im_end|>",
    )
    tokenizer.chat_template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    encoder = Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=len(names),
            hidden_size=16,
            intermediate_size=16,
            num_hidden_layers=28,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=8,
            tie_word_embeddings=True,
        )
    )
    transformer = diffusers.Flux2Transformer2DModel(
        patch_size=1,
        in_channels=16,
        num_layers=1,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=48,
        timestep_guidance_channels=32,
        axes_dims_rope=(4, 4, 4, 4),
        guidance_embeds=False,
    )
    autoencoder = diffusers.AutoencoderKLFlux2(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4,
        norm_num_groups=4,
        sample_size=16,
    )
    autoencoder.bn.running_mean.normal_()
    autoencoder.bn.running_var.uniform_(0.5, 2)
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True)
    diffusers.Flux2KleinPipeline(
        scheduler,
        _stirred(autoencoder),
        encoder,
        tokenizer,
        _stirred(transformer),
    ).save_pretrained(folder)
    return folder


PIPELINES = {
    "sd": save_sd_pipeline,
    "sdxl": save_sdxl_pipeline,
    "sd3": save_sd3_pipeline,
    "pixart": save_pixart_pipeline,
    "flux": save_flux_pipeline,
    "klein": save_klein_pipeline,
}


def picture(label: str, number: int, width: int, height: int) -> Image.Image:
    """A noisy picture in the colour of its caption."""
    noise = np.random.default_rng([number, len(label)]).normal(0, 15, (height, width, 3))
    return Image.fromarray(np.clip(np.array(COLOURS[label]) + noise, 0, 255).astype(np.uint8))


def write_captioned(folder: Path, count: int, first: int = 0, size: int = 16) -> Path:
    """Write pictures of three aspect ratios, each with its caption beside it."""
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(first, first + count):
        label = [*COLOURS][number % 2]
        width, height = ((size, size), (2 * size, size), (size, 2 * size))[number % 3]
        picture(label, number, width, height).save(folder / f"{number:03}.png")
        (folder / f"{number:03}.txt").write_text(f"{label}\n")
    return folder


def diffusion_recipe(folder: Path, base: Path, **sections) -> Path:
    """Write pictures and a recipe of a run that takes a second; ``sections`` are merged over its own."""
    folder.mkdir(parents=True, exist_ok=True)
    recipe = {
        "model": {"path": str(base), "compute_dtype": "float32", "device": "cpu", "quant": "none"},
        "task": {"kind": "image-generation"},
        "lora": {"rank": 4, "alpha": 8, "dtype": "float32"},
        "data": {
            "train": str(write_captioned(folder / "train", 12)),
            "eval": str(write_captioned(folder / "eval", 4, 100)),
        },
        "diffusion": {"sample_prompts": ["hot", ""], "sample_steps": 3},
        "train": {"max_steps": 6, "learning_rate": 0.01, "optimizer": "adamw_torch", "micro_batch_size": 2},
        "memory": {"checkpointing": "block", "micro_batches": "as-given"},
        "output": {"dir": str(folder / "out")},
    }
    return save_recipe(folder, recipe, sections)
