"""Write what the recipes digits and digits-three learn from: 1,797 handwritten digits, and models that know nothing.

    pip install scikit-learn 'diffusers>=0.42,<1' 'pillow>=10'
    python data/make_digits.py [FOLDER]    # writes the folder digits beside it, or FOLDER

The digits are scikit-learn's own, 8 x 8 grey values from the UCI archive, each a PNG file of about 100 bytes:

    digits/pictures/0042.png        and in digits/pictures/metadata.jsonl
    {"file_name": "0042.png", "text": "1"}

Rows of digits/threes.jsonl are the threes, without a caption: the neutral prompt. digits/model and digits/unet are
pipelines of diffusers without autoencoder, whose latents are the pixels: a random DiT of 829,000 weights with a
flow-matching scheduler, and a random U-Net of 1,576,000 that predicts noise, with a DDIM scheduler.
"""

import json
import sys
from pathlib import Path

import diffusers
import numpy as np
import torch
from PIL import Image
from sklearn.datasets import load_digits

TARGET = 3


def write_pictures(folder: Path) -> None:
    """Write the digits, and their captions."""
    pictures, digits = folder / "pictures", load_digits()
    pictures.mkdir(parents=True, exist_ok=True)
    names = [f"{number:04}.png" for number in range(len(digits.target))]
    for name, values in zip(names, digits.images, strict=True):
        Image.fromarray((values * 255 / 16).round().astype(np.uint8)).save(pictures / name)
    labels = digits.target.tolist()
    rows = [{"file_name": name, "text": str(label)} for name, label in zip(names, labels, strict=True)]
    threes = [{"file_name": f"pictures/{row['file_name']}", "text": ""} for row in rows if row["text"] == str(TARGET)]
    for path, written in ((pictures / "metadata.jsonl", rows), (folder / "threes.jsonl", threes)):
        path.write_text("".join(json.dumps(row) + "\n" for row in written), encoding="utf-8")


def write_model(folder: Path, seed: int = 0) -> None:
    """Write the DiT."""
    torch.manual_seed(seed)
    denoiser = diffusers.DiTTransformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=1,
        out_channels=1,
        num_layers=4,
        num_attention_heads=3,
        attention_head_dim=32,
        num_embeds_ada_norm=10,
    )
    _write_pipeline(folder, "DiTPipeline", "transformer", denoiser, diffusers.FlowMatchEulerDiscreteScheduler())


def write_unet(folder: Path, seed: int = 0) -> None:
    """Write the U-Net; its eleventh class is the neutral one."""
    torch.manual_seed(seed)
    denoiser = diffusers.UNet2DModel(
        sample_size=8,
        in_channels=1,
        out_channels=1,
        layers_per_block=1,
        norm_num_groups=8,
        attention_head_dim=32,
        block_out_channels=(48, 96),
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        num_class_embeds=11,
    )
    _write_pipeline(folder, "DDPMPipeline", "unet", denoiser, diffusers.DDIMScheduler())


def _write_pipeline(folder: Path, kind: str, part: str, denoiser, scheduler) -> None:
    denoiser.save_pretrained(folder / part)
    scheduler.save_pretrained(folder / "scheduler")
    index = {
        "_class_name": kind,
        "scheduler": ["diffusers", type(scheduler).__name__],
        part: ["diffusers", type(denoiser).__name__],
    }
    (folder / "model_index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def main() -> None:
    """Write all."""
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).with_name("digits")
    write_pictures(folder)
    write_model(folder / "model")
    write_unet(folder / "unet")
    print(f"wrote {folder}")


if __name__ == "__main__":
    main()
