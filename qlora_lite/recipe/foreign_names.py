"""What settings of other trainers, and their values, are called here, for the message about an unknown one.

Covers axolotl, LLaMA-Factory, trl and transformers, unsloth, litgpt and torchtune. A name that is the last
part of one of our own keys is found by that (`learning_rate` outside of `train`) and does not stand here.
"""

from __future__ import annotations

from collections.abc import Sequence
from difflib import get_close_matches

from .schema import Source

_RENAMED = {
    "model.path":
        "base_model model_name_or_path model_name model_id model_id_or_path "
        "pretrained_model_name_or_path checkpoint_dir tokenizer_model",
    "model.quant":
        "load_in_4bit quantization_bit quantization quantize bnb_4bit_quant_type bits "
        "quant_type quantization_method quantization_type",
    "model.double_quant":
        "double_quantization bnb_4bit_use_double_quant use_double_quant",
    "model.compute_dtype":
        "bf16 fp16 bf16_true precision torch_dtype bnb_4bit_compute_dtype float16 bfloat16 pure_bf16",
    "model.device":
        "device_map use_cpu no_cuda",
    "model.revision":
        "model_revision",
    "lora.rank":
        "lora_r r lora_rank lora_dim network_dim",
    "lora.alpha":
        "lora_alpha",
    "lora.dropout":
        "lora_dropout",
    "lora.targets":
        "lora_target_modules target_modules lora_target lora_target_linear lora_modules "
        "lora_attn_modules",
    "lora.rslora":
        "use_rslora peft_use_rslora lora_use_rslora",
    "data.train":
        "dataset datasets dataset_name dataset_path train_file train_path train_data train_dataset "
        "data_path train_files dataset_dir training_data",
    "data.eval":
        "test_datasets eval_dataset validation_file val_file val_dataset valid_data eval_path "
        "test_file validation_data",
    "data.template":
        "chat_template prompt_template prompt_style chat_template_jinja",
    "data.train_on":
        "train_on_inputs train_on_input train_on_responses_only assistant_only_loss "
        "completion_only_loss train_on_prompt mask_prompt mask_history roles_to_train",
    "data.max_tokens":
        "sequence_len cutoff_len max_seq_length max_seq_len max_length model_max_length seq_len "
        "sequence_length context_length block_size",
    "data.overflow":
        "excess_length_strategy truncation drop_long_rows",
    "data.packing":
        "sample_packing pack multipack neat_packing packed padding_free",
    "data.order":
        "shuffle shuffle_dataset disable_shuffling shuffle_merged_datasets",
    "train.max_steps":
        "max_iters iters num_steps max_train_steps train_steps",
    "train.epochs":
        "num_epochs num_train_epochs n_epochs max_epochs",
    "train.learning_rate":
        "lr learningrate max_lr peak_lr",
    "train.micro_batch_size":
        "per_device_train_batch_size batch_size train_batch_size device_train_batch_size "
        "per_device_batch_size per_device_eval_batch_size eval_batch_size",
    "train.gradient_accumulation_steps":
        "grad_accumulation_steps gradient_accumulation grad_accum accumulate_grad_batches "
        "global_batch_size gradient_accumulation_iters",
    "train.optimizer":
        "optim optimizer_name optimizer_type",
    "train.lr_scheduler":
        "lr_scheduler_type scheduler lr_schedule",
    "train.warmup_ratio":
        "warmup",
    "train.max_grad_norm":
        "gradient_clipping clip_grad max_norm gradient_clip_val grad_clip",
    "train.weight_decay":
        "wd decay",
    "train.compile":
        "torch_compile compile_model use_compile torch_compile_backend",
    "train.seed":
        "random_seed random_state data_seed",
    "train.eval_every_steps":
        "eval_steps evals_per_epoch eval_strategy evaluation_strategy steps_per_eval do_eval "
        "eval_interval",
    "train.early_stopping_patience":
        "early_stopping early_stop early_stopping_steps early_stopping_rounds patience",
    "train.save_every_steps":
        "save_steps saves_per_epoch save_strategy save_every save_interval",
    "train.keep_checkpoints":
        "save_total_limit keep_last_n max_checkpoints",
    "train.max_hours":
        "max_time max_train_time time_limit",
    "train.on_not_finite":
        "skip_nan_steps nan_policy",
    "train.trackers":
        "report_to wandb_project wandb_entity use_wandb logger logger_name log_with wandb_name "
        "mlflow_experiment_name use_tensorboard",
    "memory.checkpointing":
        "gradient_checkpointing use_gradient_checkpointing activation_checkpointing "
        "enable_activation_checkpointing grad_checkpoint",
    "memory.budget":
        "gpu_memory_limit max_memory memory_limit vram gpu_memory_utilization",
    "memory.optimizer_in_backward":
        "optimizer_in_bwd fused_backward",
    "output.dir":
        "output_dir out_dir save_dir adapter_path",
    "output.name":
        "run_name experiment_name exp_name",
}  # fmt: skip
_KEY_OF = {name: key for key, names in _RENAMED.items() for name in names.split()}

_NO_DORA = "remove it; factors are plain LoRA's here, without DoRA's norms"
_ADVICE = {
    "warmup_steps": "write train.warmup_ratio, the warm-up's share of all steps, instead",
    "lr_warmup_steps": "write train.warmup_ratio, the warm-up's share of all steps, instead",
    "val_set_size": "put the evaluation rows in a file of their own and name it in data.eval",
    "val_size": "put the evaluation rows in a file of their own and name it in data.eval",
    "val_split_fraction": "put the evaluation rows in a file of their own and name it in data.eval",
    "max_samples": "rows are never dropped silently; shorten the file, or set train.max_steps",
    "adapter": "remove it; LoRA on a 4-bit model is what this program does (model.quant)",
    "finetuning_type": "remove it; LoRA on a 4-bit model is what this program does (model.quant)",
    "stage": "remove it; supervised fine-tuning is what this program does",
    "do_train": "remove it; `qlora-lite train` trains",
    "flash_attention": "remove it; the fastest attention of the device is used",
    "flash_attn": "remove it; the fastest attention of the device is used",
    "attn_implementation": "remove it; the fastest attention of the device is used",
    "pad_to_sequence_len": "remove it; nothing is ever padded",
    "group_by_length": "write data.order: by-length, which puts rows of like length together",
    "load_in_8bit": "remove it; there is no 8-bit base here: model.quant is nf4 or fp4 (4 bit), or none (16 bit)",
    "use_dora": _NO_DORA,
    "peft_use_dora": _NO_DORA,
    "lora_use_dora": _NO_DORA,
    "logging_steps": "remove it; every step is written to metrics.jsonl",
    "early_stopping_threshold": "remove it; any lower evaluation loss is a better one",
    "early_stopping_min_delta": "remove it; any lower evaluation loss is a better one",
    "load_best_model_at_end": "remove it; the best factors by evaluation loss are always kept, in adapter",
    "metric_for_best_model": "remove it; the best factors are those with the lowest evaluation loss",
    "overwrite_output_dir": "remove it; a run folder is never overwritten",
    "resume_from_checkpoint": "remove it; `qlora-lite train RECIPE --resume` goes on from the newest checkpoint",
    "auto_resume_from_checkpoints": "remove it; `qlora-lite train RECIPE --resume` goes on from the newest checkpoint",
    "trust_remote_code": "remove it; code from a model's repository is never run",
    "lora_on_cpu": "remove it; set model.device",
    "special_tokens": "remove it; the model's tokenizer is used as it is",
    "bias": "remove it; LoRA factors have no bias",
    "task_type": "remove it; models are causal language models",
    "init_lora_weights": "remove it; B starts at zero, A is Kaiming-uniform",
    "deepspeed": "remove it; one device is used (memory.budget limits its memory)",
    "fsdp": "remove it; one device is used (memory.budget limits its memory)",
}

_VALUES = {  # what letters alone would take for another value
    "gpu": "cuda", "bf16": "bfloat16", "fp32": "float32", "adamw": "adamw_torch", "none": "constant",
    "int4": "nf4", "4bit": "nf4", "random": "shuffle", "full": "block",
}  # fmt: skip


def meant_value(value: str, choices: Sequence[str]) -> str | None:
    """Return which of a setting's choices a wrong value means, None where nothing is near."""
    word = value.lower()
    if (known := _VALUES.get(word)) in choices:
        return known
    return next(iter(get_close_matches(word, choices, 1, 0.6)), None)


def cure(key: str, known: Sequence[str]) -> tuple[str, str | None]:
    """Say what to write instead of an unknown key.

    Args:
        key: the dotted key as written, such as "lora.rnak" or "sequence_len".
        known: every dotted key there is.

    Returns:
        The text after "is not a setting; ", and the known key that it proposes, if one.
    """
    section, _, leaf = key[:80].rpartition(".")
    name = leaf.lower().replace("-", "_")
    if section == "data" and name in Source.model_fields:
        item = "path: FILE" if name == "path" else f"path: FILE, {name}: ..."
        return f"it belongs to a place that rows come from, as in data.train: [{{{item}}}]", "data.train"
    for proposal in (_KEY_OF.get(name), *(k for k in known if k.rpartition(".")[2] == name)):
        if proposal is not None:
            return f"here it is {proposal}", proposal
    if name in _ADVICE:
        return _ADVICE[name], None
    dotted = key[:80].lower()
    siblings = [k for k in known if k.rpartition(".")[0] == section]
    close = get_close_matches(dotted, siblings, 1, 0.75) or get_close_matches(dotted, known, 1, 0.75)
    if not close:
        leaves = {k.rpartition(".")[2]: k for k in known}
        close = [leaves[match] for match in get_close_matches(name, leaves, 1, 0.75)]
    if close:
        return f"did you mean {close[0]}?", close[0]
    names = [k.rpartition(".")[2] for k in siblings]
    if not names:
        return "`qlora-lite recipes show quickstart` has an example", None
    what = f"the settings of {section} are" if section else "the sections are"
    return f"{what} {', '.join(names)}", None
