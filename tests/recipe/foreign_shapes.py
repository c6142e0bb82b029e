"""Configurations with the keys and structure of public ones of five trainers, and the small files that they name.

Each shape is data, so that a test can change one setting of it: a mapping for a YAML file, the keywords of calls for a
script or notebook, or the arguments of a command. Names of models and data are folders and files of ``write_files``.
source: the examples of axolotl and LlamaFactory, unsloth's notebooks, trl's scripts, torchtune's recipes/configs.
"""

import json
import shlex
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import yaml
from tiny_files import save_tiny
from tiny_pictures import COLOURS, drawn
from tiny_vision_language import save_vision_language


class Code(str):
    """An expression of a script."""

    __repr__ = str.__str__


@dataclass(frozen=True)
class Shape:
    """Hold a configuration.

    Args:
        file: its name; of a command the words that it begins with.
        settings: nested as in a YAML file; by call in a script.
        code: of a script, in which "@NAME" stands for the keywords of a call.
        given: what a user adds, since the configuration does not say it.
        wanted: settings of the recipe, dotted.
    """

    file: str
    settings: dict
    code: str = ""
    given: tuple[str, ...] = ()
    wanted: dict = field(default_factory=dict)

    @property
    def is_command(self) -> bool:
        """Whether it is a command, and not a file."""
        return " " in self.file

    def source(self, settings: dict | None = None) -> str:
        """Return the text of the file, or the command."""
        settings = self.settings if settings is None else settings
        if self.is_command:
            words = [self.file]
            for name, value in settings.items():
                values = value if isinstance(value, list) else [value]
                words += [f"--{name}", *(shlex.quote(str(value)) for value in values if value is not True)]
            return " ".join(words)
        if self.code:
            text = self.code
            for call, keywords in settings.items():
                text = text.replace(f"@{call}", ", ".join(f"{name}={value!r}" for name, value in keywords.items()))
            if self.file.endswith(".py"):
                return text
            cells = [{"cell_type": "code", "source": cell} for cell in text.split("\n\n\n")]
            return json.dumps({"cells": [{"cell_type": "markdown", "source": "# A title"}, *cells]})
        return yaml.safe_dump(settings, sort_keys=False)

    def leaves(self, at: object = None, path: tuple = ()) -> Iterator[tuple[tuple, object]]:
        """Yield the place and value of every setting that says something."""
        at = self.settings if at is None else at
        if isinstance(at, dict) or (isinstance(at, list) and any(isinstance(item, dict) for item in at)):
            for key, value in at.items() if isinstance(at, dict) else enumerate(at):
                yield from self.leaves(value, (*path, key)) if value not in (None, "") else ()
        else:
            yield path, at


_ROWS = [("What is two plus two?", "4"), ("Name a colour.", "green"), ("Say no.", "no"), ("Which day?", "Monday")]


def write_files(folder: Path) -> None:
    """Write the models and rows that the shapes name."""
    for name, template in (("chat", "chatml"), ("base", None)):
        save_tiny(folder / "models" / name, template=template)
    save_vision_language(folder / "models" / "qwen2.5-vl", "qwen2_5_vl")
    user, assistant = ("user", "content", "role"), ("assistant", "content", "role")
    human, model = ("human", "value", "from"), ("gpt", "value", "from")

    def turn(who: tuple[str, str, str], text: str) -> dict:
        return {who[2]: who[0], who[1]: text}

    rows = {
        "alpaca": [{"instruction": q, "input": "", "output": a} for q, a in _ROWS],
        "chats": [{"conversations": [turn(human, q), turn(model, a)]} for q, a in _ROWS],
        "turns": [{"messages": [turn(user, q), turn(assistant, a)]} for q, a in _ROWS],
        "pairs": [{"conversations": [turn(human, q)], "chosen": turn(model, a), "rejected": turn(model, "no idea")}
                  for q, a in _ROWS],
        "compared": [{"conversation": [turn(user, q)], "chosen": turn(assistant, a), "rejected": turn(assistant, "?")}
                     for q, a in _ROWS],
        "chosen": [{"chosen": [turn(user, q), turn(assistant, a)], "rejected": [turn(user, q), turn(assistant, "?")]}
                   for q, a in _ROWS],
        "judged": [{"messages": [turn(user, q), turn(assistant, a)], "label": len(a) > 3} for q, a in _ROWS],
        "good": [{"prompt": q, "completion": a, "label": len(a) > 3} for q, a in _ROWS],
        "sums": [{"question": q, "answer": a} for q, a in _ROWS],
        "captions": [{"image": "dot.png", "caption": "it is red"} for _ in _ROWS],
        "pictures": [{"messages": [turn(user, "<image>what is it"), turn(assistant, "it is red")],
                      "images": ["dot.png"]} for _ in _ROWS],
    }  # fmt: skip
    info = {
        "mine": {"file_name": "alpaca/rows.json"},
        "dpo": {"file_name": "pairs/rows.json", "ranking": True, "formatting": "sharegpt",
                "columns": {"messages": "conversations", "chosen": "chosen", "rejected": "rejected"}},
        "kto": {"file_name": "judged/rows.json", "formatting": "sharegpt",
                "columns": {"messages": "messages", "kto_tag": "label"},
                "tags": {"role_tag": "role", "content_tag": "content", "user_tag": "user",
                         "assistant_tag": "assistant"}},
        "seen": {"file_name": "pictures/rows.json", "formatting": "sharegpt",
                 "columns": {"messages": "messages", "images": "images"},
                 "tags": {"role_tag": "role", "content_tag": "content", "user_tag": "user",
                          "assistant_tag": "assistant"}},
    }  # fmt: skip
    for name, content in rows.items():
        (folder / "data" / name).mkdir(parents=True)
        (folder / "data" / name / "rows.json").write_text(json.dumps(content))
    for name in ("pictures", "captions"):
        drawn(next(iter(COLOURS)), 0).save(folder / "data" / name / "dot.png")
    (folder / "data" / "dataset_info.json").write_text(json.dumps(info))
    (folder / "rewards.py").write_text(
        "def right(completions, references):\n    return [float(a == b) for a, b in zip(completions, references)]\n"
        "\n\ndef short(completions):\n    return [float(len(text) < 9) for text in completions]\n"
    )


_AXOLOTL = {
    "base_model": "./models/chat", "model_type": "LlamaForCausalLM", "tokenizer_type": "AutoTokenizer",
    "load_in_8bit": False, "load_in_4bit": True, "strict": False,
    "dataset_prepared_path": "prepared", "output_dir": "./out/axolotl", "sequence_len": 3072,
    "lora_r": 24, "lora_alpha": 48, "lora_dropout": 0.1, "lora_target_linear": True, "lora_model_dir": None,
    "lora_fan_in_fan_out": None, "wandb_project": None, "wandb_watch": None,
    "gradient_accumulation_steps": 6, "micro_batch_size": 3, "num_epochs": 2, "optimizer": "adamw_bnb_8bit",
    "lr_scheduler": "cosine", "learning_rate": 0.00015, "bf16": "auto", "tf32": True, "fp16": None,
    "gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False},
    "resume_from_checkpoint": None, "logging_steps": 2, "flash_attention": True, "warmup_ratio": 0.05,
    "evals_per_epoch": 3, "saves_per_epoch": 1, "weight_decay": 0.02, "debug": None, "deepspeed": None, "fsdp": None,
    "special_tokens": {"pad_token": "<pad>"},
}  # fmt: skip
_FACTORY = {
    "model_name_or_path": "./models/chat", "trust_remote_code": True, "stage": "sft", "do_train": True,
    "finetuning_type": "lora", "lora_rank": 12, "lora_target": "all", "dataset": "mine", "template": "qwen3_nothink",
    "cutoff_len": 1536, "max_samples": 700, "overwrite_cache": True, "preprocessing_num_workers": 9,
    "dataloader_num_workers": 3, "output_dir": "saves/factory", "logging_steps": 7, "save_steps": 300,
    "plot_loss": True, "overwrite_output_dir": True, "save_only_model": False, "report_to": "none",
    "per_device_train_batch_size": 2, "gradient_accumulation_steps": 6, "learning_rate": 0.00012,
    "num_train_epochs": 2.0, "lr_scheduler_type": "cosine", "warmup_ratio": 0.15, "bf16": True,
    "ddp_timeout": 180000, "resume_from_checkpoint": None,
}  # fmt: skip
_TORCHTUNE = {
    "output_dir": "/tmp/tuned",
    "tokenizer": {"_component_": "torchtune.models.llama3.llama3_tokenizer", "path": "./models/chat/tokenizer.model",
                  "max_seq_len": None},
    "checkpointer": {"_component_": "torchtune.training.FullModelHFCheckpointer", "checkpoint_dir": "./models/chat",
                     "checkpoint_files": ["one.safetensors", "two.safetensors"], "recipe_checkpoint": None,
                     "output_dir": "${output_dir}", "model_type": "LLAMA3"},
    "resume_from_checkpoint": False, "save_adapter_weights_only": False,
    "dataset": {"_component_": "torchtune.datasets.alpaca_cleaned_dataset", "source": "data/alpaca", "packed": False},
    "seed": None, "shuffle": True, "batch_size": 3,
    "optimizer": {"_component_": "torch.optim.AdamW", "fused": True, "weight_decay": 0.03, "lr": 0.00025},
    "lr_scheduler": {"_component_": "torchtune.training.lr_schedulers.get_cosine_schedule_with_warmup",
                     "num_warmup_steps": 90},
    "loss": {"_component_": "torchtune.modules.loss.LinearCrossEntropyLoss"},
    "epochs": 2, "max_steps_per_epoch": None, "gradient_accumulation_steps": 7, "clip_grad_norm": None,
    "compile": False,
    "metric_logger": {"_component_": "torchtune.training.metric_logging.DiskLogger", "log_dir": "${output_dir}/logs"},
    "log_every_n_steps": 1, "log_peak_memory_stats": True, "device": "cuda", "dtype": "bf16",
    "enable_activation_checkpointing": True, "enable_activation_offloading": False,
    "profiler": {"_component_": "torchtune.training.setup_torch_profiler", "enabled": False, "wait_steps": 4,
                 "warmup_steps": 3, "active_steps": 2, "num_cycles": 1},
    "low_cpu_ram": False,
}  # fmt: skip
_TUNED_MODEL = {"_component_": "torchtune.models.llama3_1.lora_llama3_1_8b",
                "lora_attn_modules": ["q_proj", "v_proj", "output_proj"], "apply_lora_to_mlp": True,
                "apply_lora_to_output": False, "lora_rank": 12, "lora_alpha": 24, "lora_dropout": 0.0}  # fmt: skip
_TRL = {
    "model_name_or_path": "./models/chat", "dataset_name": "data/turns", "learning_rate": 3.0e-5,
    "num_train_epochs": 2, "per_device_train_batch_size": 3, "gradient_accumulation_steps": 5,
    "gradient_checkpointing": True, "logging_steps": 20, "output_dir": "trained", "report_to": "wandb",
}  # fmt: skip
_PEFT = {"use_peft": True, "lora_r": 24, "lora_alpha": 12}
_LOADED = {"model_name": "./models/chat", "max_seq_length": Code("max_seq_length"), "dtype": Code("dtype"),
           "load_in_4bit": Code("load_in_4bit")}  # fmt: skip
_PEFT_MODEL = {
    "r": 24, "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
    "lora_alpha": 12, "lora_dropout": 0, "bias": "none", "use_gradient_checkpointing": "unsloth",
    "random_state": 1234, "use_rslora": False, "loftq_config": None,
}  # fmt: skip
_SFT_CONFIG = {
    "per_device_train_batch_size": 3, "gradient_accumulation_steps": 5, "warmup_steps": 6, "max_steps": 50,
    "learning_rate": 3e-4, "logging_steps": 2, "optim": "adamw_8bit", "weight_decay": 0.002,
    "lr_scheduler_type": "linear", "seed": 1234, "output_dir": "trained", "report_to": "none",
}  # fmt: skip
_START = """\
%%capture
!pip install unsloth


from unsloth import FastLanguageModel
max_seq_length = 1536
dtype = None
load_in_4bit = True
model, tokenizer = FastLanguageModel.from_pretrained(@from_pretrained)


model = FastLanguageModel.get_peft_model(model, @get_peft_model)


"""
_TRAINED = """
dataset = load_dataset("json", data_files="data/{rows}/rows.json", split="train")
dataset = dataset.map(render, batched=True)


trainer = SFTTrainer(model=model, tokenizer=tokenizer, train_dataset=dataset, dataset_text_field="text",
                     max_seq_length=max_seq_length, packing=False, args=SFTConfig(@SFTConfig))
"""
_ALPACA_CODE = (
    _START
    + '''
form = """Do what follows.

### Instruction:
{}

### Input:
{}

### Response:
{}"""
def render(rows):
    filled = zip(rows["instruction"], rows["input"], rows["output"])
    return {"text": [form.format(*row) + tokenizer.eos_token for row in filled]}
'''
    + _TRAINED.replace("{rows}", "alpaca")
)
_CHAT_CODE = (
    _START
    + """
tokenizer = get_chat_template(tokenizer, chat_template="llama-3.1")
def render(rows):
    chats = rows["conversations"]
    return {"text": [tokenizer.apply_chat_template(chat, tokenize=False) for chat in chats]}
"""
    + _TRAINED.replace("{rows}", "chats")
    + "\ntrainer = train_on_responses_only(trainer)\n"
)
_DPO_CODE = (
    """\
from unsloth import PatchDPOTrainer
PatchDPOTrainer()


"""
    + _START
    + """
def mixed(names, splits):
    return [load_dataset(name, split=split).select(range(9)) for name in names for split in splits]

raw = mixed({"them/preferences": 0.01}, ["train_prefs"])


trainer = DPOTrainer(model=model, ref_model=None, args=DPOConfig(@DPOConfig), train_dataset=raw, tokenizer=tokenizer,
                     @DPOTrainer)
"""
)
_GRPO_CODE = (
    _START.replace("dtype = None", "lora_rank = 24\nmax_prompt_length = 128")
    + """
def asked(split="train"):
    rows = load_dataset("them/sums", "main")[split]
    return rows.map(lambda row: {"prompt": [{"role": "user", "content": row["question"]}], "answer": row["answer"]})

def right(prompts, completions, answer, **kwargs):
    return [float(said[0]["content"] == text) for said, text in zip(completions, answer)]

def short(completions, **kwargs):
    return [float(len(said[0]["content"]) < 9) for said in completions]


config = GRPOConfig(@GRPOConfig)
trainer = GRPOTrainer(model=model, processing_class=tokenizer, reward_funcs=[right, short], args=config,
                      train_dataset=asked())
"""
)
_VISION_CODE = """\
from unsloth import FastVisionModel
model, tokenizer = FastVisionModel.from_pretrained("./models/qwen2.5-vl", @from_pretrained)


model = FastVisionModel.get_peft_model(model, @get_peft_model)


dataset = load_dataset("them/captions", split="train")
def as_chat(row):
    asked = [{"type": "text", "text": "What is it?"}, {"type": "image", "image": row["image"]}]
    answer = [{"type": "text", "text": row["caption"]}]
    return {"messages": [{"role": "user", "content": asked}, {"role": "assistant", "content": answer}]}
rows = [as_chat(row) for row in dataset]


FastVisionModel.for_training(model)
trainer = SFTTrainer(model=model, tokenizer=tokenizer, data_collator=UnslothVisionDataCollator(model, tokenizer),
                     train_dataset=rows, args=SFTConfig(@SFTConfig))
"""
_FULL = {"adapter.method": "full", "model.quant": "none"}
SHAPES = {
    "axolotl, fine-tuning": Shape("qlora.yml", _AXOLOTL | {
        "adapter": "qlora", "chat_template": "gemma3", "eot_tokens": ["<end_of_turn>"], "val_set_size": 0.0,
        "unfrozen_parameters": ["^model\\.layers\\..*", "^lm_head\\..*"], "sample_packing": True,
        "eval_sample_packing": False, "ddp_find_unused_parameters": True,
        "datasets": [{"path": "data/chats", "type": "chat_template", "field_messages": "conversations",
                      "message_property_mappings": {"role": "from", "content": "value"}}],
    }, wanted={"model.quant": "nf4", "lora.rank": 24, "data.packing": True}),
    "axolotl, DPO": Shape("dpo.yml", _AXOLOTL | {
        "adapter": "lora", "load_in_8bit": True, "load_in_4bit": False, "chat_template": "chatml", "rl": "dpo",
        "special_tokens": {"pad_token": "<pad>", "eos_token": "<|im_end|>"}, "val_set_size": 0.25,
        "sample_packing": False, "pad_to_sequence_len": True, "warmup_ratio": None, "warmup_steps": 11,
        "datasets": [{"path": "data/compared", "type": "chat_template.default", "field_messages": "conversation",
                      "field_chosen": "chosen", "field_rejected": "rejected",
                      "message_property_mappings": {"role": "role", "content": "content"},
                      "roles": {"system": ["system"], "user": ["human", "user"], "assistant": ["assistant"]}}],
    }, wanted={"train.objective": "dpo", "model.quant": "nf4", "data.max_tokens": 6144, "data.eval_share": 0.25}),
    "axolotl, KTO": Shape("kto.yml", _AXOLOTL | {
        "adapter": "qlora", "rl": "kto", "rl_beta": 0.4, "kto_desirable_weight": 0.3, "remove_unused_columns": False,
        "sample_packing": False, "pad_to_sequence_len": False, "train_on_inputs": False, "group_by_length": False,
        "datasets": [{"path": "data/good", "type": "chatml.ultra", "split": "train"}], "eval_max_new_tokens": 99,
    }, wanted={"train.objective": "kto", "objective.beta": 0.4, "objective.desirable_weight": 0.3}),
    "axolotl, full": Shape("full.yml", {key: value for key, value in _AXOLOTL.items() if "lora" not in key} | {
        "load_in_4bit": False, "val_set_size": 0.25, "sample_packing": True, "optimizer": "paged_adamw_8bit",
        "warmup_ratio": None, "warmup_steps": 80, "base_model": "./models/base",
        "datasets": [{"path": "data/alpaca", "type": "alpaca"}],
    }, wanted={**_FULL, "data.template": "alpaca", "data.max_tokens": 3072}),
    "LlamaFactory, SFT": Shape("sft.yaml", _FACTORY, wanted={"lora.rank": 12, "data.max_tokens": 1536}),
    "LlamaFactory, DPO": Shape("dpo.yaml", _FACTORY | {
        "stage": "dpo", "dataset": "dpo", "pref_beta": 0.2, "pref_loss": "sigmoid", "learning_rate": 4e-06,
    }, wanted={"train.objective": "dpo", "objective.beta": 0.2, "data.max_tokens": 3072}),
    "LlamaFactory, KTO": Shape("kto.yaml", _FACTORY | {"stage": "kto", "dataset": "kto", "pref_beta": 0.2},
                               wanted={"train.objective": "kto", "data.max_tokens": 1536}),
    "LlamaFactory, full": Shape("full.yaml", {key: value for key, value in _FACTORY.items() if "lora" not in key} | {
        "finetuning_type": "full", "deepspeed": "configs/zero3.json"}, wanted=_FULL),
    "LlamaFactory, vision": Shape("vision.yaml", _FACTORY | {
        "model_name_or_path": "./models/qwen2.5-vl", "dataset": "seen,mine", "template": "qwen2_vl",
        "image_max_pixels": 201000, "video_max_pixels": 9000,
    }, wanted={"task.kind": "image-text-to-text", "data.resolution": 448}),
    "torchtune, QLoRA": Shape("qlora.yaml", _TORCHTUNE | {
        "model": _TUNED_MODEL | {"_component_": "torchtune.models.llama3_1.qlora_llama3_1_8b"}},
        wanted={"model.quant": "nf4", "lora.rank": 12, "train.epochs": 2}),
    "torchtune, LoRA": Shape("lora.yaml", _TORCHTUNE | {
        "model": _TUNED_MODEL, "tokenizer": _TORCHTUNE["tokenizer"] | {"max_seq_len": 1536},
        "dataset": _TORCHTUNE["dataset"] | {"packed": True}, "max_steps_per_epoch": 900, "clip_grad_norm": 0.8},
        wanted={"model.quant": "none", "data.max_tokens": 1536, "data.packing": True, "train.max_grad_norm": 0.8}),
    "torchtune, full": Shape("full.yaml", {key: value for key, value in _TORCHTUNE.items() if key != "lr_scheduler"} | {
        "model": {"_component_": "torchtune.models.llama3_1.llama3_1_8b"}, "gradient_accumulation_steps": 1,
        "optimizer": {"_component_": "bitsandbytes.optim.PagedAdamW8bit", "lr": 3e-05}, "optimizer_in_bwd": True},
        wanted={**_FULL, "memory.optimizer_in_backward": True}),
    "torchtune, DPO": Shape("dpo.yaml", {key: value for key, value in _TORCHTUNE.items() if key != "profiler"} | {
        "model": _TUNED_MODEL, "dataset": {"_component_": "torchtune.datasets.stack_exchange_paired_dataset"},
        "loss": {"_component_": "torchtune.rlhf.loss.DPOLoss", "beta": 0.2}, "max_steps_per_epoch": 900},
        given=("data.train=data/pairs",), wanted={"train.objective": "dpo", "objective.beta": 0.2}),
    "unsloth, Alpaca": Shape("alpaca.ipynb", {
        "from_pretrained": _LOADED | {"model_name": "./models/base"}, "get_peft_model": _PEFT_MODEL,
        "SFTConfig": _SFT_CONFIG}, _ALPACA_CODE,
        wanted={"data.template": "alpaca", "data.train_on": "all", "model.quant": "nf4", "data.max_tokens": 1536}),
    "unsloth, conversational": Shape("chat.ipynb", {
        "from_pretrained": _LOADED, "get_peft_model": _PEFT_MODEL, "SFTConfig": _SFT_CONFIG}, _CHAT_CODE,
        wanted={"data.train_on": "assistant", "train.max_steps": 50, "train.warmup_ratio": 0.12}),
    "unsloth, DPO": Shape("dpo.ipynb", {
        "from_pretrained": _LOADED, "get_peft_model": _PEFT_MODEL,
        "DPOConfig": _SFT_CONFIG | {"learning_rate": 4e-6, "max_steps": -1, "num_train_epochs": 2},
        "DPOTrainer": {"beta": 0.2, "max_length": 900, "max_prompt_length": 450}}, _DPO_CODE,
        given=("data.train=data/chosen",),
        wanted={"train.objective": "dpo", "objective.beta": 0.2, "data.max_tokens": 1800}),
    "unsloth, GRPO": Shape("grpo.ipynb", {
        "from_pretrained": _LOADED | {"dtype": None, "fast_inference": True, "max_lora_rank": Code("lora_rank"),
                                      "gpu_memory_utilization": 0.8},
        "get_peft_model": _PEFT_MODEL | {"r": Code("lora_rank"), "lora_alpha": Code("lora_rank")},
        "GRPOConfig": _SFT_CONFIG | {
            "adam_beta1": 0.9, "adam_beta2": 0.98, "num_generations": 5, "max_grad_norm": 0.2, "save_steps": 50,
            "max_prompt_length": Code("max_prompt_length"), "temperature": 0.9, "lr_scheduler_type": "cosine",
            "max_completion_length": Code("max_seq_length - max_prompt_length")}}, _GRPO_CODE,
        given=('data.train=[{path: data/sums, prompt: "{question}", completion: "{answer}"}]',),
        wanted={"train.objective": "grpo", "objective.group_size": 5, "objective.max_completion_tokens": 1408,
                "data.max_tokens": 7680, "lora.rank": 24, "objective.sampling_temperature": 0.9}),
    "unsloth, vision": Shape("vision.py", {
        "from_pretrained": {"load_in_4bit": True, "use_gradient_checkpointing": "unsloth"},
        "get_peft_model": {"finetune_vision_layers": True, "finetune_language_layers": True,
                           "finetune_attention_modules": True, "finetune_mlp_modules": True,
                           **{key: value for key, value in _PEFT_MODEL.items() if "_m" not in key}},
        "SFTConfig": _SFT_CONFIG | {"remove_unused_columns": False, "dataset_text_field": "",
                                    "dataset_kwargs": {"skip_prepare_dataset": True}, "max_length": 1800}},
        _VISION_CODE,
        given=('data.train=[{path: data/captions, prompt: "What is it?", completion: "{caption}"}]',),
        wanted={"task.kind": "image-text-to-text", "data.max_tokens": 1800}),
    "trl, SFT": Shape("trl sft", _TRL | _PEFT | {
        "packing": True, "eos_token": "<|im_end|>", "eval_strategy": "steps", "eval_steps": 90, "push_to_hub": True,
    }, wanted={"lora.rank": 24, "data.packing": True, "model.quant": "none"}),
    "trl, DPO": Shape("python trl/scripts/dpo.py", _TRL | _PEFT | {
        "dataset_name": "data/chosen", "learning_rate": 4e-06, "eval_strategy": "steps", "eval_steps": 40,
        "no_remove_unused_columns": True, "beta": 0.2, "load_in_4bit": True,
        "lora_target_modules": ["q_proj", "o_proj"],
    }, wanted={"train.objective": "dpo", "model.quant": "nf4", "objective.beta": 0.2}),
    "trl, KTO": Shape("accelerate launch --num_processes 2 examples/scripts/kto.py", _TRL | {
        "dataset_name": "data/good", "learning_rate": 6e-07, "lr_scheduler_type": "cosine", "warmup_steps": 0.2,
        "eval_steps": 300, "logging_first_step": True,
    }, wanted={**_FULL, "train.objective": "kto", "train.warmup_ratio": 0.2}),
    "trl, GRPO": Shape("trl grpo", _TRL | _PEFT | {
        "dataset_name": "data/alpaca", "reward_funcs": ["rewards.right", "rewards.short"], "num_generations": 3,
        "max_completion_length": 200, "use_vllm": True, "vllm_mode": "colocate", "log_completions": True,
        "lora_target_modules": "all-linear", "loss_type": "dr_grpo", "scale_rewards": "none",
        "max_prompt_length": 100,
    }, wanted={"train.objective": "grpo", "objective.policy_loss": "dr_grpo", "objective.scale_rewards": False,
               "data.max_tokens": 900, "train.gradient_accumulation_steps": 5}),
}  # fmt: skip
