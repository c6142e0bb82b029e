"""What settings of other trainers, and their values, are called here, for the message about an unknown one.

Covers axolotl, LLaMA-Factory, trl and transformers, unsloth, litgpt and torchtune. A name that is the last
part of one of our own keys is found by that (`learning_rate` outside of `train`) and does not stand here.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from difflib import get_close_matches

from .schema import Source

_NUMBER = re.compile(r"\.\d+\.")
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
        "lora_attn_modules apply_lora_to_mlp apply_lora_to_output",
    "lora.rslora":
        "use_rslora peft_use_rslora lora_use_rslora",
    "lora.init_from":
        "lora_model_dir adapter_name_or_path adapter_model_id adapter_checkpoint is_trainable",
    "data.train":
        "dataset datasets dataset_name dataset_path train_file train_path train_data train_dataset "
        "data_path train_files dataset_dir training_data",
    "data.eval":
        "test_datasets eval_dataset validation_file val_file val_dataset valid_data eval_path "
        "test_file validation_data",
    "data.eval_share":
        "val_set_size val_size val_split_fraction test_size validation_split_percentage",
    "data.template":
        "chat_template prompt_template prompt_style chat_template_jinja",
    "data.train_on":
        "train_on_inputs train_on_input train_on_responses_only assistant_only_loss "
        "completion_only_loss train_on_prompt mask_prompt mask_history roles_to_train response_template "
        "instruction_template response_part instruction_part",
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
        "gradient_clipping clip_grad clip_grad_norm max_norm gradient_clip_val grad_clip",
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
        "enable_activation_checkpointing grad_checkpoint gradient_checkpointing_kwargs",
    "memory.offload_checkpoints":
        "enable_activation_offloading activation_offloading",
    "memory.budget":
        "gpu_memory_limit max_memory memory_limit vram gpu_memory_utilization",
    "memory.micro_batches":
        "auto_find_batch_size",
    "memory.fused_loss":
        "use_liger_kernel liger_kernel use_liger enable_liger_kernel liger_fused_linear_cross_entropy "
        "cut_cross_entropy use_cce",
    "memory.optimizer_in_backward":
        "optimizer_in_bwd fused_backward",
    "output.dir":
        "output_dir out_dir save_dir adapter_path",
    "output.name":
        "run_name experiment_name exp_name",
}  # fmt: skip
_KEY_OF = {name: key for key, names in _RENAMED.items() for name in names.split()}

_ADVICE_ON = {
    "write train.warmup_ratio, the warm-up's share of all steps, instead": "warmup_steps lr_warmup_steps",
    "rows are never dropped silently; give their place in data.train a weight below 1, or set train.max_steps":
        "max_samples max_train_samples",
    "name the column text, or write {path: FILE, prompt: ..., completion: ...} in data.train":
        "dataset_text_field text_column field_instruction field_output",
    'here they are items of lora.targets, such as {pattern: "model.layers.1?.*", rank: 8}; the last that matches wins':
        "rank_pattern alpha_pattern layers_to_transform layers_pattern exclude_modules lora_layers_to_transform",
    "remove it; nothing but LoRA factors is trained":
        "modules_to_save lora_modules_to_save full_finetuning unfrozen_parameters",
    "remove it; LoRA on a 4-bit model is what this program does (model.quant)": "adapter finetuning_type",
    "remove it; supervised fine-tuning is what this program does": "stage",
    "remove it; `qlora-lite train` trains": "do_train",
    "remove it; the fastest attention of the device is used":
        "flash_attention flash_attn attn_implementation xformers_attention",
    "remove it; nothing is ever padded": "pad_to_sequence_len",
    "remove it; evaluation rows are batched as training rows are": "eval_sample_packing",
    "remove it; one device is used, which model.device names": "local_rank",
    "remove it; model.path says where the model is, and adapters are written as peft has them": "checkpointer",
    "write data.order: by-length, which puts rows of like length together": "group_by_length",
    "remove it; there is no 8-bit base here: model.quant is nf4 or fp4 (4 bit), or none (16 bit)": "load_in_8bit",
    "remove it; factors are plain LoRA's here, without DoRA's norms": "dora use_dora peft_use_dora lora_use_dora",
    "remove it; every step is written to metrics.jsonl":
        "logging_steps logging_first_step logging_dir log_every_n_steps",
    "remove it; any lower evaluation loss is a better one": "early_stopping_threshold early_stopping_min_delta",
    "remove it; the best factors by evaluation loss are always kept, in adapter": "load_best_model_at_end",
    "remove it; the best factors are those with the lowest evaluation loss":
        "metric_for_best_model greater_is_better",
    "remove it; a run folder is never overwritten": "overwrite_output_dir",
    "remove it; `qlora-lite train RECIPE --resume` goes on from the newest checkpoint":
        "resume_from_checkpoint auto_resume_from_checkpoints",
    "remove it; code from a model's repository is never run": "trust_remote_code",
    "remove it; a model's files say what it is": "model_type tokenizer_type is_llama_derived_model",
    "remove it; recipes are always checked strictly": "strict",
    "remove it; model.compute_dtype says what is computed in": "tf32 bf16_full_eval fp16_full_eval",
    "remove it; the model's own configuration is used": "overrides_of_model_config rope_scaling",
    "write data.streaming: true, with data.order: as-is and train.max_steps": "pretraining_dataset iterable_dataset",
    "remove it; set model.device": "lora_on_cpu",
    "remove it; the model's tokenizer is used as it is": "special_tokens",
    "remove it; LoRA factors have no bias": "bias",
    "remove it; models are causal language models": "task_type",
    "remove it; new factors begin with B at zero, or with those of an adapter (lora.init_from)": "init_lora_weights",
    "remove it; one device is used (memory.budget limits its memory)": "deepspeed fsdp fsdp_config",
    "remove it; optimizers have their usual betas and epsilon":
        "adam_beta1 adam_beta2 adam_epsilon optim_args",
    "remove it; the cosine ends at zero": "cosine_min_lr_ratio lr_scheduler_kwargs",
    "remove it; no noise is added to embeddings": "neftune_noise_alpha noisy_embedding_alpha",
    "remove it; tokens are made once and kept": "dataset_num_proc dataset_processes preprocessing_num_workers "
        "dataloader_num_workers dataloader_pin_memory dataset_prepared_path overwrite_cache",
    "remove it; `qlora-lite data` names the columns that are not used": "remove_unused_columns",
    "remove it; `qlora-lite export` writes a folder that can be uploaded": "push_to_hub hub_model_id hub_strategy",
    "remove it; weights are written as safetensors and as nothing else": "save_safetensors",
    "log in with `hf auth login`": "token hf_token use_auth_token hub_token hf_hub_token",
}  # fmt: skip
_ADVICE = {name: advice for advice, names in _ADVICE_ON.items() for name in names.split()}
_IN_SOURCES = {
    "type": "here it is format",
    "ds_type": "remove it; a file's name says what it is",
    "split": "write it behind the name, as in hub:OWNER/NAME:SPLIT",
    "name": "write it behind the name, as in hub:OWNER/NAME/CONFIG",
}
_ADVICE_AT = dict.fromkeys(("model.dtype", ".dtype"), "here it is model.compute_dtype") | {
    f"data.{which}.*.{name}": advice for which in ("train", "eval") for name, advice in _IN_SOURCES.items()
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
    if advice := _ADVICE_AT.get(_NUMBER.sub(".*.", f"{section}.{name}")):
        return advice, None
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
