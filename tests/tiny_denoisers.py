"""Random denoisers of diffusers, of one or two blocks, and examples for them."""

import numpy as np
import torch

from qlora_lite.ext.diffusion.latents import LatentExample

_STREAMS = dict(attention_head_dim=16, num_attention_heads=2, joint_attention_dim=32)
CONFIGS = {
    "unet": dict(
        _class_name="UNet2DConditionModel",
        sample_size=8,
        in_channels=4,
        out_channels=4,
        layers_per_block=1,
        down_block_types=["DownBlock2D", "CrossAttnDownBlock2D"],
        up_block_types=["CrossAttnUpBlock2D", "UpBlock2D"],
        block_out_channels=[32, 32],
        cross_attention_dim=32,
        attention_head_dim=8,
        norm_num_groups=8,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=64,
    ),
    "pixart": dict(
        _class_name="PixArtTransformer2DModel",
        sample_size=8,
        patch_size=2,
        in_channels=4,
        out_channels=8,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=4,
        cross_attention_dim=32,
        caption_channels=32,
    ),
    "sd3": dict(
        _class_name="SD3Transformer2DModel",
        sample_size=8,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        caption_projection_dim=32,
        pooled_projection_dim=16,
        pos_embed_max_size=8,
        **_STREAMS,
    ),
    "flux": dict(
        _class_name="FluxTransformer2DModel",
        patch_size=1,
        in_channels=16,
        num_layers=1,
        num_single_layers=2,
        pooled_projection_dim=16,
        guidance_embeds=True,
        axes_dims_rope=[4, 6, 6],
        **_STREAMS,
    ),
    "flux2": dict(
        _class_name="Flux2Transformer2DModel",
        patch_size=1,
        in_channels=4,
        num_layers=1,
        num_single_layers=2,
        timestep_guidance_channels=32,
        axes_dims_rope=[4, 4, 4, 4],
        guidance_embeds=False,
        **_STREAMS,
    ),
    "dit": dict(
        _class_name="DiTTransformer2DModel",
        sample_size=8,
        patch_size=2,
        in_channels=4,
        out_channels=8,
        num_layers=2,
        num_attention_heads=2,
        attention_head_dim=16,
        num_embeds_ada_norm=3,
    ),
    "unet2d": dict(
        _class_name="UNet2DModel",
        sample_size=8,
        in_channels=4,
        out_channels=4,
        layers_per_block=1,
        down_block_types=["DownBlock2D", "AttnDownBlock2D"],
        up_block_types=["AttnUpBlock2D", "UpBlock2D"],
        block_out_channels=[32, 32],
        attention_head_dim=8,
        norm_num_groups=8,
        num_class_embeds=4,
    ),
}
OF_CLASSES = "dit", "unet2d"


def save_denoiser(folder, name):
    """Write the files of a tiny denoiser, as diffusers does; return the folder."""
    import diffusers

    torch.manual_seed(0)
    model = getattr(diffusers, CONFIGS[name]["_class_name"]).from_config(CONFIGS[name])
    with torch.no_grad():
        for parameter in model.parameters():  # PixArt's and others' begin with zeros
            parameter.add_(0.02 * torch.randn(parameter.shape))
    model.save_pretrained(folder)
    return folder


def latent_examples(name, count=10):
    """Examples with what a denoiser takes: texts of five tokens."""
    chance = np.random.default_rng(0)

    def normal(*shape):
        return chance.standard_normal(shape, dtype=np.float32)

    return [
        LatentExample(
            normal(4, 8, 8),
            None if name in OF_CLASSES else normal(5, 32),
            number,
            None if name in ("pixart", "flux2", *OF_CLASSES) else normal(16),
            np.array([1, 1, 1, 1, number % 2], np.float32) if name == "pixart" else None,
            np.array([64, 64, 0, number, 64, 64], np.float32) if name == "unet" else None,
            f"pictures/{number}.png",
            np.array(number % 3) if name in OF_CLASSES else None,
        )
        for number in range(count)
    ]
