"""Tiny random vision-language models as they are published, and chats about pictures that a few steps can learn."""

import json
from math import prod
from pathlib import Path

import numpy as np
import torch
from data.tiny_tokenizer import make_tokenizer
from PIL import Image
from tiny_files import save_recipe
from tiny_pictures import COLOURS, drawn
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    AutoTokenizer,
    Gemma3Processor,
    Idefics3Processor,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil
from transformers.models.gemma4.image_processing_pil_gemma4 import Gemma4ImageProcessorPil
from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil
from transformers.models.pixtral.image_processing_pil_pixtral import PixtralImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from qlora_lite.data.picture_grids import BudgetReader, GridReader, RowsReader
from qlora_lite.data.picture_reader import PictureReader
from qlora_lite.data.tokens.storage import Example, PictureFile
from qlora_lite.models.pretrained import processor_of

_TEXT = dict(
    model_type="llama",
    vocab_size=400,
    hidden_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    intermediate_size=96,
    max_position_embeddings=512,
    pad_token_id=2,
    bos_token_id=1,
    eos_token_id=2,
)
_VISION = dict(
    hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, image_size=32, patch_size=8
)
_ROPE = dict(rope_type="default", rope_theta=10000.0, mrope_section=[3, 3, 2], mrope_interleaved=True)
_ROPE_IN_PARTS = dict(rope_type="default", rope_theta=10000.0, mrope_section=[2, 3, 3])
_ROPE_BY_PLACE = dict(
    rope_type="default", rope_theta=10000.0, llama_4_scaling_beta=0.5, original_max_position_embeddings=4
)
_TOWER = dict(
    depth=2,
    hidden_size=64,
    intermediate_size=64,
    num_heads=2,
    patch_size=8,
    out_hidden_size=64,
    num_position_embeddings=16,
    deepstack_visual_indexes=[0, 1],
)
_WITHOUT_FEATURES = {name: value for name, value in _TOWER.items() if name != "deepstack_visual_indexes"}
TOKEN = 3  # of the token that stands for pictures
_QWEN = dict(image_token_id=TOKEN, video_token_id=8, vision_start_token_id=6, vision_end_token_id=7)
OF_QWEN = "qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe", "qwen3_5", "qwen3_5_moe"
WITH_GRIDS = *OF_QWEN, "mistral3", "gemma4"
_STATES = dict(
    linear_num_value_heads=4,
    linear_num_key_heads=2,
    linear_key_head_dim=16,
    linear_value_head_dim=16,
    layer_types=["linear_attention", "full_attention"],
    head_dim=16,
    rope_parameters=_ROPE | dict(partial_rotary_factor=0.5, mrope_section=[2, 1, 1]),
)
# model_type -> settings; 16 tokens a picture, or 4
FAMILIES = {
    "llava": dict(
        text_config=_TEXT,
        vision_config=_VISION | dict(model_type="clip_vision_model"),
        image_token_id=TOKEN,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
    ),
    "idefics3": dict(text_config=_TEXT, vision_config=_VISION, image_token_id=TOKEN, scale_factor=2),
    "smolvlm": dict(
        text_config=_TEXT | dict(tie_word_embeddings=True),
        vision_config=_VISION,
        image_token_id=TOKEN,
        scale_factor=2,
        tie_word_embeddings=True,
    ),
    # a window that is shorter than a picture
    "gemma3": dict(
        text_config=_TEXT
        | dict(
            model_type="gemma3_text",
            head_dim=16,
            query_pre_attn_scalar=16,
            sliding_window=3,
            layer_types=["sliding_attention", "full_attention"],
        ),
        vision_config=_VISION | dict(model_type="siglip_vision_model", vision_use_head=False),
        mm_tokens_per_image=4,
        image_token_index=TOKEN,
        boi_token_index=6,
        eoi_token_index=7,
    ),
    "qwen2_vl": dict(
        text_config=_TEXT | dict(model_type="qwen2_vl_text", rope_parameters=_ROPE_IN_PARTS),
        vision_config=dict(depth=2, embed_dim=64, hidden_size=64, mlp_ratio=1, num_heads=2, patch_size=8),
        **_QWEN,
    ),
    # windows of two by two tokens in the first of two blocks
    "qwen2_5_vl": dict(
        text_config=_TEXT | dict(model_type="qwen2_5_vl_text", rope_parameters=_ROPE_IN_PARTS),
        vision_config=dict(
            depth=2,
            hidden_size=64,
            intermediate_size=64,
            num_heads=2,
            patch_size=8,
            out_hidden_size=64,
            window_size=32,
            fullatt_block_indexes=[1],
        ),
        **_QWEN,
    ),
    # features behind two of three blocks
    "qwen3_vl": dict(
        text_config=_TEXT | dict(model_type="qwen3_vl_text", head_dim=16, rope_parameters=_ROPE, num_hidden_layers=3),
        vision_config=_TOWER,
        **_QWEN,
    ),
    "qwen3_vl_moe": dict(
        text_config=_TEXT
        | dict(
            model_type="qwen3_vl_moe_text",
            head_dim=16,
            rope_parameters=_ROPE,
            num_hidden_layers=3,
            num_experts=4,
            num_experts_per_tok=2,
            moe_intermediate_size=48,
        ),
        vision_config=_TOWER,
        **_QWEN,
    ),
    # a row of whose picture is longer than the positions that have one scale
    "mistral3": dict(
        text_config=_TEXT | dict(model_type="ministral3", head_dim=16, rope_parameters=_ROPE_BY_PLACE),
        vision_config=_VISION | dict(model_type="pixtral"),
        image_token_index=TOKEN,
        tie_word_embeddings=False,
    ),
    # a window that is shorter than a picture, and embeddings for each block
    "gemma4": dict(
        text_config=_TEXT
        | dict(
            model_type="gemma4_text",
            head_dim=16,
            global_head_dim=32,
            sliding_window=3,
            attention_k_eq_v=True,
            num_global_key_value_heads=1,
            layer_types=["full_attention", "sliding_attention", "full_attention"],
            num_hidden_layers=3,
            hidden_size_per_layer_input=8,
            vocab_size_per_layer_input=400,
            use_bidirectional_attention="vision",
            final_logit_softcapping=9.0,
        ),
        vision_config=dict(
            hidden_size=64,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=2,
            head_dim=32,
            patch_size=8,
            pooling_kernel_size=2,
            position_embedding_size=1024,
            standardize=True,
            use_clipped_linears=True,
        ),
        image_token_id=TOKEN,
        boi_token_id=6,
        eoi_token_id=7,
    ),
    "qwen3_5": dict(
        text_config=_TEXT | _STATES | dict(model_type="qwen3_5_text"), vision_config=_WITHOUT_FEATURES, **_QWEN
    ),
    "qwen3_5_moe": dict(
        text_config=_TEXT
        | _STATES
        | dict(
            model_type="qwen3_5_moe_text",
            num_experts=4,
            num_experts_per_tok=2,
            moe_intermediate_size=48,
            shared_expert_intermediate_size=32,
        ),
        vision_config=_WITHOUT_FEATURES,
        **_QWEN,
    ),
}
TOKENS = {"llava": 16, "idefics3": 4, "smolvlm": 4, "gemma3": 4, **dict.fromkeys(WITH_GRIDS, 1)}
UNITS = dict.fromkeys(
    ("mistral3", "gemma4"), (4, 3 * 8 * 8)
)  # of a token's pixels, where pictures have no second moment
ENDS = {"mistral3": ("<fake_token_around_image>", "<end_of_image>")}  # of a picture's rows, and of a picture
GRIDS = {1: (2, 3), 2: (4, 1)}


def build_vision_language(name: str, seed: int = 0, dtype=torch.float32):
    """Build a random model whose every part shows in the logits."""
    torch.manual_seed(seed)
    model = AutoModelForImageTextToText.from_config(AutoConfig.for_model(name, **FAMILIES[name]), dtype=dtype)
    large = 1.0 if name == "gemma4" else 5.0  # whose gradients such weights leave ill-conditioned
    with torch.no_grad():
        for path, parameter in model.named_parameters():
            if path.endswith("mm_input_projection_weight"):  # which begins as zeros
                parameter.normal_(0, 0.1)
            elif parameter.ndim >= 2:
                parameter.mul_(large if "text_model" in path or "language_model" in path else 2.0)
        for path, buffer in model.named_buffers():  # of Gemma 4's tower
            if path.endswith(("_min", "_max")):
                buffer.fill_(-0.8 if path.endswith("_min") else 0.8)
            elif "std_" in path:
                buffer.normal_(0.5, 0.1)
    return model.eval().requires_grad_(False)


def reader(name: str) -> PictureReader:
    """What reads made-up pictures, which need no processor."""
    if name in WITH_GRIDS:
        kind = {"mistral3": NoiseRows, "gemma4": NoiseBudget}.get(name, NoiseGrids)
        return kind(TOKEN, 1, 16, token_pixels=UNITS.get(name, (4, 3 * 2 * 8 * 8)))
    return Noise(TOKEN, TOKENS[name], 32)


class Noise(PictureReader):
    """A reader whose pictures are noise that depends on their names."""

    def _pixels_of(self, picture):
        chance = np.random.default_rng([*picture.path.encode()])
        units = prod(picture.grid) if picture.grid else int(picture.digest or 1)
        return chance.normal(0, 1, (units, *self.unit)).astype(np.float32)


class NoiseGrids(Noise, GridReader):
    """The same of pictures that keep their shapes."""


class NoiseRows(Noise, RowsReader):
    """The same of pictures whose rows have ends."""


class NoiseBudget(Noise, BudgetReader):
    """The same of pictures that fill a number of tokens."""

    def _budget(self):
        return 70


def noise_rows(name: str, pictures=((1,), (), (2, 1), (1,)), seed: int = 0) -> list[Example]:
    """Rows of random tokens; those of each row say of how many parts each of its pictures is, or its shape."""
    chance, found = np.random.default_rng(seed), []
    for number, parts in enumerate(pictures):
        ids = [1, *chance.integers(5, 400, 4)]
        parts = [1] * len(parts) if name in ("llava", "gemma3") else parts  # which cut none
        grids = [GRIDS[count] if name in WITH_GRIDS else () for count in parts]
        for count, grid in zip(parts, grids, strict=True):
            shown = [TOKEN] * (TOKENS[name] * (prod(grid) if grid else count))
            if name in ENDS:
                shown = [*([TOKEN] * grid[1] + [4]) * grid[0]][:-1]
            ids += [*shown, *chance.integers(5, 400, 2)]
        answer = chance.integers(5, 400, 6)
        is_target = np.arange(len(ids) + 6) >= len(ids)
        shown = enumerate(zip(parts, grids, strict=True))
        files = tuple(PictureFile(f"{number}/{index}", str(count), grid) for index, (count, grid) in shown)
        found.append(Example(np.array([*ids, *answer], np.int32), is_target, "", "", f"row {number}", pictures=files))
    return found


_PARTS = tuple(f"<row_{row}_col_{column}>" for row in range(1, 3) for column in range(1, 3))
SPECIAL = (
    "<unk>",
    "<s>",
    "</s>",
    "<image>",
    "<|im_start|>",
    "<|im_end|>",
    "<fake_token_around_image>",
    "<global-img>",
    "<end_of_utterance>",
    "<begin_of_image>",
    "<end_of_image>",
    *_PARTS,
)
# as SmolVLM's, which takes turns as lists of parts alone
OF_PARTS = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] }}"
    "{% if message['content'][0]['type'] == 'image' %}{{ ':' }}{% else %}{{ ': ' }}{% endif %}"
    "{% for part in message['content'] %}{% if part['type'] == 'text' %}{{ part['text'] }}"
    "{% elif part['type'] == 'image' %}{{ '<image>' }}{% endif %}{% endfor %}{{ '<end_of_utterance>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant: ' }}{% endif %}"
)


def template_of(name: str) -> str:
    """Return a family's chat template."""
    written = dict.fromkeys(OF_QWEN, "<begin_of_image><image><end_of_image>") | {"gemma3": "<begin_of_image>"}
    return OF_PARTS.replace("<image>", written.get(name, "<image>"))


def given_to_transformers(folder: Path, name: str, turns: list, **how) -> dict:
    """Return what transformers' own processor makes of a chat, with the pictures' files in its turns."""
    how = {"tokenize": True, "return_dict": True, "return_tensors": "pt"} | how
    if name not in WITH_GRIDS:
        return processor_of(folder, name, 4).apply_chat_template([turns], template_of(name), **how)
    # whose own processor needs further libraries; it repeats the token for each that the grid has
    tokenizer = AutoTokenizer.from_pretrained(folder)
    parts = [part for turn in turns for part in turn["content"] if part["type"] == "image"]
    found, counts = {}, []
    opened = [Image.open(part["image"]).convert("RGB") for part in parts]
    if parts and name in ENDS:
        patch = {"height": 16, "width": 16}
        found = dict(PixtralImageProcessorPil.from_pretrained(folder)(opened, patch_size=patch, return_tensors="pt"))
    elif parts and name == "gemma4":
        found = dict(Gemma4ImageProcessorPil.from_pretrained(folder)(opened, return_tensors="pt"))
        counts = found.pop("num_soft_tokens_per_image").tolist()
    elif parts:
        found = dict(Qwen2VLImageProcessorPil.from_pretrained(folder)(opened, return_tensors="pt"))
        counts = (found["image_grid_thw"].prod(-1) // 4).tolist()
    text = tokenizer.apply_chat_template(turns, tokenize=False, **{k: v for k, v in how.items() if k[:3] == "add"})
    for count in counts:
        shown = "<placeholder>" * count
        text = text.replace("<image>", f"<begin_of_image>{shown}<end_of_image>" if name == "gemma4" else shown, 1)
    for height, width in found.get("image_sizes", torch.zeros(0)).tolist():
        rows = [row + ENDS[name][0] for row in ["<placeholder>" * (width // 16)] * (height // 16)]
        text = text.replace("<image>", "".join(rows).removesuffix(ENDS[name][0]) + ENDS[name][1], 1)
    ids = tokenizer(text.replace("<placeholder>", "<image>"), return_tensors="pt", add_special_tokens=False).input_ids
    types = {"mm_token_type_ids": (ids == TOKEN).int()} if parts and name not in ENDS else {}
    return found | {"input_ids": ids} | types


def save_vision_language(folder: Path, name: str, seed: int = 0, parts: bool = True) -> Path:
    """Write a tiny model of a family as it is published, with tokenizer and processor; parts: cut pictures."""
    build_vision_language(name, seed).save_pretrained(folder)
    tokenizer = make_tokenizer(special=SPECIAL)
    tokenizer.chat_template = template = template_of(name)
    if name in ("gemma3", "gemma4"):
        named = {"image_token": "<image>", "boi_token": "<begin_of_image>", "eoi_token": "<end_of_image>"}
        tokenizer = PreTrainedTokenizerFast(
            tokenizer_object=tokenizer.backend_tokenizer,
            bos_token="<s>",
            eos_token="</s>",
            unk_token="<unk>",
            pad_token="</s>",
            extra_special_tokens=named,
        )
        tokenizer.chat_template = template
    if name == "gemma4":
        pixels = Gemma4ImageProcessorPil(patch_size=8, pooling_kernel_size=2, max_soft_tokens=70)
        pixels.save_pretrained(folder)
        processor = tokenizer
    elif name == "gemma3":
        pixels = Gemma3ImageProcessorPil(size={"height": 32, "width": 32})
        processor = Gemma3Processor(pixels, tokenizer, template, 4)
    elif name == "llava":
        pixels = CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
        processor = LlavaProcessor(pixels, tokenizer, 8, "default", template, num_additional_image_tokens=1)
    elif name in ENDS:
        pixels = PixtralImageProcessorPil(patch_size=8, size={"longest_edge": 64})
        pixels.save_pretrained(folder)
        said = dict(zip(("image_break_token", "image_end_token"), ENDS[name], strict=True))
        (folder / "processor_config.json").write_text(json.dumps(said | {"patch_size": 8, "spatial_merge_size": 2}))
        processor = tokenizer
    elif name in OF_QWEN:
        pixels = Qwen2VLImageProcessorPil(patch_size=8, size={"shortest_edge": 16**2, "longest_edge": 96**2})
        pixels.save_pretrained(folder)
        processor = tokenizer
    else:
        pixels = Idefics3ImageProcessorPil(
            size={"longest_edge": 64 if parts else 32}, max_image_size={"longest_edge": 32}
        )
        processor = Idefics3Processor(pixels, tokenizer, 4, template)
    processor.save_pretrained(folder)
    return folder


def write_chats(folder: Path, count: int, first: int = 0) -> Path:
    """Write pictures of two colours and two shapes, and chats that ask for the colour, in the forms that sets have."""
    (folder / "pictures").mkdir(parents=True, exist_ok=True)
    rows = []
    for number in range(first, first + count):
        label = list(COLOURS)[number % 2]
        name = f"pictures/{number:03}.png"
        drawn(label, number).crop((0, 0, 34, 34 if number % 3 else 22)).save(folder / name)
        asked = [{"type": "image", "path": name}, {"type": "text", "text": "what is it"}]
        answer = {"role": "assistant", "content": f"it is {label}"}
        rows.append({"messages": [{"role": "user", "content": asked}, answer]})
    path = folder / f"chats-{first}.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def chat_recipe(folder: Path, base: Path | str, **sections) -> Path:
    """Write chats and a recipe of a run that takes seconds; ``sections`` are merged over its own."""
    recipe = {
        "model": {"path": str(base), "compute_dtype": "float32", "device": "cpu"},
        "task": {"kind": "image-text-to-text"},
        "lora": {"rank": 4, "alpha": 8, "dtype": "float32"},
        "data": {
            "train": str(write_chats(folder / "rows", 12)),
            "eval": str(write_chats(folder / "rows", 4, 100)),
            "max_tokens": 160,
        },
        "train": {"max_steps": 6, "learning_rate": 0.01, "optimizer": "adamw_torch"},
        "output": {"dir": str(folder / "out")},
    }
    return save_recipe(folder, recipe, sections)
