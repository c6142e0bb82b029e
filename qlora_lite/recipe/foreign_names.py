"""Whose a file is, and what its settings and their values are called here: for messages, and to convert it.

Covers axolotl, LlamaFactory, trl and transformers, unsloth, litgpt and torchtune. A name that is the last
part of one of our own keys is found by that (`learning_rate` outside of `train`) and does not stand here.

A name has one answer, in one of five tables: what it is called here; what to know where nothing is lost by leaving it
out; what is done another way here, which changes little; what is not offered although the trained weights depend on
it; what makes the file train something else altogether. When a feature comes, its names move up to the first table. A
name with a * stands for a family.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from fnmatch import fnmatchcase
from typing import Literal

from .schema import Recipe, Source
from .strict_yaml import Node

_NUMBER = re.compile(r"\.\d+\.")
_LLAMA_FACTORY = {"stage", "finetuning_type", "cutoff_len", "dataset_dir", "template", "lora_target", "do_train"}
_RENAMED = {
    "model.path":
        "base_model model_name_or_path model_name model_id model_id_or_path "
        "pretrained_model_name_or_path checkpoint_dir",
    "model.quant":
        "load_in_4bit load_in_8bit load_in_16bit quantization_bit quantization quantize bnb_4bit_quant_type bits "
        "quant_type quantization_method quantization_type",
    "model.double_quant": "double_quantization bnb_4bit_use_double_quant use_double_quant use_bnb_nested_quant",
    "model.keep_16bit": "llm_int8_skip_modules modules_to_not_convert bnb_4bit_skip_modules",
    "model.compute_dtype":
        "bf16 fp16 bf16_true precision torch_dtype bnb_4bit_compute_dtype float16 bfloat16 pure_bf16 float32 "
        "mixed_precision half_precision",
    "model.device": "device_map use_cpu no_cuda",
    "model.revision": "model_revision revision_of_model",
    "adapter.method":
        "dora use_dora peft_use_dora lora_use_dora adapter finetuning_type training_type full_finetuning peft_type "
        "use_peft",
    "adapter.switch_every": "badam_switch_interval badam_switch_interval_every switch_block_every",
    "adapter.train_also": "modules_to_save lora_modules_to_save additional_target",
    "train.objective": "rl stage pref_loss loss_type",
    "objective.beta": "dpo_beta rl_beta pref_beta orpo_alpha",
    "objective.gamma": "simpo_gamma",
    "objective.sft_weight": "pref_ftx rpo_alpha cpo_alpha",
    "objective.label_smoothing": "dpo_label_smoothing",
    "objective.max_completion_tokens": "max_completion_length",
    "objective.group_size": "num_generations",
    "objective.rewards": "reward_funcs",
    "objective.desirable_weight": "kto_desirable_weight kto_chosen_weight",
    "objective.undesirable_weight": "kto_undesirable_weight kto_rejected_weight",
    "lora.rank": "lora_r r lora_rank lora_dim network_dim",
    "lora.alpha": "lora_alpha",
    "lora.dropout": "lora_dropout",
    "lora.targets":
        "lora_target_modules target_modules lora_target lora_target_linear lora_modules "
        "lora_attn_modules apply_lora_to_mlp apply_lora_to_output",
    "lora.rslora": "use_rslora peft_use_rslora lora_use_rslora",
    "lora.init_from": "lora_model_dir adapter_name_or_path adapter_model_id adapter_checkpoint is_trainable",
    "data.train":
        "dataset datasets dataset_name dataset_path train_file train_path train_data train_dataset "
        "data_path train_files dataset_dir training_data local_dataset dataset_name_or_path",
    "data.eval":
        "test_datasets eval_dataset validation_file val_file val_dataset valid_data eval_path "
        "test_file validation_data dataset_val",
    "data.eval_share": "val_set_size val_size val_split_fraction test_size validation_split_percentage",
    "data.template": "conversation chat_template prompt_template prompt_style chat_template_jinja",
    "data.train_on":
        "train_on_inputs train_on_input train_on_responses_only assistant_only_loss "
        "completion_only_loss train_on_prompt mask_prompt mask_history roles_to_train response_template "
        "instruction_template response_part instruction_part train_on_completions",
    "data.max_tokens":
        "sequence_len cutoff_len max_seq_length max_seq_len max_length model_max_length seq_len "
        "sequence_length context_length block_size",
    "data.overflow": "excess_length_strategy truncation drop_long_rows",
    "data.packing": "sample_packing pack multipack neat_packing packed",
    "data.order": "shuffle disable_shuffling shuffle_merged_datasets curriculum curriculum_sampling",
    "train.max_steps": "max_iters iters num_steps max_train_steps train_steps",
    "train.epochs": "num_epochs num_train_epochs n_epochs max_epochs",
    "train.learning_rate": "lr learningrate max_lr peak_lr",
    "train.micro_batch_size":
        "per_device_train_batch_size batch_size train_batch_size device_train_batch_size "
        "per_device_batch_size per_device_eval_batch_size eval_batch_size",
    "train.gradient_accumulation_steps":
        "grad_accumulation_steps gradient_accumulation grad_accum accumulate_grad_batches "
        "global_batch_size gradient_accumulation_iters",
    "train.optimizer": "optim optimizer_name optimizer_type",
    "train.lr_scheduler": "lr_scheduler_type scheduler lr_schedule",
    "train.warmup_ratio": "warmup",
    "train.max_grad_norm": "gradient_clipping clip_grad clip_grad_norm max_norm gradient_clip_val grad_clip",
    "train.weight_decay": "wd decay",
    "train.compile": "torch_compile compile_model use_compile torch_compile_backend",
    "train.seed": "random_seed random_state data_seed",
    "train.deterministic": "full_determinism",
    "train.eval_every_steps":
        "eval_steps evals_per_epoch eval_strategy evaluation_strategy steps_per_eval do_eval "
        "eval_interval run_val_every_n_steps",
    "train.early_stopping_patience": "early_stopping early_stop early_stopping_steps early_stopping_rounds patience",
    "train.save_every_steps": "save_steps saves_per_epoch save_strategy save_every save_interval",
    "train.keep_checkpoints": "save_total_limit keep_last_n max_checkpoints",
    "train.max_hours": "max_time max_train_time time_limit",
    "train.on_not_finite": "skip_nan_steps nan_policy",
    "train.trackers":
        "report_to wandb_project wandb_entity use_wandb logger logger_name log_with wandb_name "
        "mlflow_experiment_name use_tensorboard enable_wandb enable_tensorboard use_swanlab use_mlflow use_comet",
    "memory.checkpointing":
        "gradient_checkpointing use_gradient_checkpointing activation_checkpointing "
        "enable_activation_checkpointing grad_checkpoint gradient_checkpointing_kwargs "
        "disable_gradient_checkpointing use_reentrant",
    "memory.offload_checkpoints": "enable_activation_offloading activation_offloading",
    "memory.budget": "gpu_memory_limit max_memory memory_limit vram gpu_memory_utilization",
    "memory.micro_batches": "auto_find_batch_size",
    "memory.fused_loss":
        "use_liger_kernel liger_kernel use_liger enable_liger_kernel liger_fused_linear_cross_entropy "
        "cut_cross_entropy use_cce chunked_cross_entropy",
    "memory.optimizer_in_backward": "optimizer_in_bwd fused_backward",
    "output.dir": "output_dir out_dir save_dir adapter_path",
    "output.name": "run_name experiment_name exp_name",
}  # fmt: skip
_NOT_NEEDED = {
    "remove it; `qlora-lite train` trains": "do_train",
    "remove it; the fastest attention of the device is used":
        "flash_attention flash_attn attn_implementation xformers_attention sdp_attention flex_attention "
        "eager_attention flash_optimum use_flash_attention_2 flash_attn_*",
    "remove it; nothing is ever padded":
        "pad_to_sequence_len pad_token padding_side pad_to_multiple_of ignore_pad_token_for_loss data_collator "
        "dataset_kwargs collate_fn padding_free pad_to_max_length",
    "remove it; the model that is trained answers by itself, with the memory that the plan gives it":
        "use_vllm vllm vllm_* steps_per_generation generation_batch_size cache_implementation",
    "remove it; qlora-lite has its own kernels":
        "fused foreach use_unsloth use_unsloth_gc unsloth unsloth_* lora_mlp_kernel lora_qkv_kernel lora_o_kernel "
        "plugins torch_empty_cache_steps use_triton custom_sharded_layers fast_inference max_lora_rank "
        "liger_rope liger_rms_norm liger_layer_norm liger_glu_activation liger_cross_entropy",
    "remove it; evaluation examples are batched like training examples": "eval_sample_packing",
    "remove it; `qlora-lite train RECIPE --gpus N` trains on several GPUs, with the whole model on each":
        "local_rank num_gpus gpus n_gpus n_gpu num_gpu world_size num_processes nproc_per_node num_nodes num_machines "
        "config_file accelerate_config ddp ddp_* "
        "dp_* tensor_parallel* sequence_parallel_degree ring_attn_func heads_k_stride accelerator_config "
        "deepspeed fsdp fsdp_* deepspeed_* gpu_ids use_ray ray_* distributed_backend "
        "average_tokens_across_devices",
    "remove it; model.path says where the model is, and adapters are written in PEFT format":
        "checkpointer checkpoint_files recipe_checkpoint save_adapter_weights_only adapter_checkpoint_dir",
    "write data.order: by-length, which groups examples of similar length": "group_by_length",
    "remove it; every step is written to metrics.jsonl":
        "logging_steps logging_first_step logging_dir logging_strategy log_every_n_steps log_dir tensorboard_dir "
        "include_tokens_per_second include_num_input_tokens_seen log_peak_memory_stats metric_logger log_level "
        "include_tkps skip_memory_metrics "
        "logging_nan_inf_filter total_num_tokens wandb_* mlflow_* comet_* swanlab_* trackio_* disable_tqdm "
        "log_completions num_completions_to_print",
    "remove it; report.html has the loss curves": "plot_loss",
    "remove it; `qlora-lite profile RECIPE` measures": "profiler profiler_* profiling gc_steps profile",
    "remove it; the summary and the report show answers and losses": "eval_table_size eval_max_new_tokens",
    "remove it; evaluation reports loss, perplexity, exact match and others (train.metrics)":
        "compute_metrics predict_with_generate do_causal_lm_eval eval_causal_lm_metrics do_bench_eval bench_* "
        "compute_accuracy batch_eval_metrics include_for_metrics label_names eval_accumulation_steps eval_delay "
        "eval_on_start preprocess_logits_for_metrics prediction_loss_only",
    "not a setting of training; give it to `qlora-lite generate` or `chat`, or with a request to `serve`":
        "max_new_tokens temperature top_p top_k do_sample num_beams repetition_penalty min_p presence_penalty "
        "frequency_penalty eval_num_beams generation_config",
    "give it as data.eval, or measure a finished run with `qlora-lite evaluate RUN data.eval=FILE`":
        "test test_data test_dataset data_test test_path dataset_test_split",
    "remove it; train.on_not_finite and train.early_stopping_patience end a run that goes wrong": "loss_watchdog_*",
    "remove it; any lower evaluation loss counts as better": "early_stopping_threshold early_stopping_min_delta",
    "remove it; the best LoRA weights by evaluation loss are always kept, in adapter": "load_best_model_at_end",
    "remove it; the best LoRA weights are those with the lowest evaluation loss":
        "metric_for_best_model greater_is_better",
    "remove it; a run folder is never overwritten": "overwrite_output_dir",
    "remove it; `qlora-lite train RECIPE --resume` continues from the newest checkpoint":
        "resume_from_checkpoint auto_resume_from_checkpoints",
    "remove it; checkpoints hold all that resuming needs":
        "save_only_model save_first_step save_on_each_node ignore_data_skip restore_callback_states_from_checkpoint",
    "remove it; code from a model's repository is never run": "trust_remote_code",
    "remove it; a model's files say what it is":
        "model_type tokenizer_type is_llama_derived_model is_mistral_derived_model is_qwen_derived_model "
        "is_falcon_derived_model tokenizer_use_fast use_fast_tokenizer tokenizer_legacy processor_type "
        "base_model_config tokenizer_config merges_file resume_download low_cpu_mem_usage cache_dir "
        "tokenizer tokenizer_name tokenizer_model low_cpu_ram use_safetensors local_files_only use_cache",
    "remove it; recipes are always checked strictly": "strict",
    "remove it; model.compute_dtype sets the compute type": "tf32 bf16_full_eval fp16_full_eval upcast_layernorm",
    "remove it; in float16, which model.compute_dtype: auto takes on GPUs without fast bfloat16, the loss is scaled "
    "by itself":
        "loss_scale loss_scale_window initial_loss_scale min_loss_scale dynamic_loss_scale initial_scale_power "
        "grad_scaler fp16_opt_level fp16_backend half_precision_backend",
    "remove it; set model.device": "lora_on_cpu",
    "remove it; task.kind says whether texts are labelled": "task_type lora_task_type",
    "remove it; the labels are those of the rows, or task.labels": "num_labels",
    "remove it; the layout of the weights is known from the model": "lora_fan_in_fan_out fan_in_fan_out inference_mode",
    "remove it; data is tokenised once and cached":
        "dataset_num_proc dataset_processes preprocessing_num_workers "
        "dataset_prepared_path overwrite_cache preprocessing_batch_size tokenized_path dataset_keep_in_memory "
        "dataset_shard_num dataset_shard_idx skip_prepare_dataset dataloader_* push_dataset_to_hub dataset_batch_size "
        "num_proc data_seed_workers sample_packing_* eval_packing packing_strategy buffer_size",
    "remove it; examples are shuffled anew for each epoch": "shuffle_dataset",
    "remove it; `qlora-lite data` names the columns that are not used": "remove_unused_columns",
    "remove it; `qlora-lite push RUN OWNER/NAME` uploads the results of a run": "push_to_hub hub_*",
    "remove it; weights are always written as safetensors": "save_safetensors",
    "log in with `hf auth login`": "token hf_token use_auth_token hub_token hf_hub_token hf_use_auth_token",
}  # fmt: skip
_OTHERWISE = {
    "remove it; all rows are used, or the share that a weight below 1 at their source in data.train says":
        "max_samples max_train_samples max_eval_samples max_steps_per_epoch",
    "remove it; prompts are not cut by themselves: data.max_tokens is for prompt and answer": "max_prompt_length",
    "remove it; the model's tokenizer and chat template say what ends an answer: see `qlora-lite data`":
        "special_tokens eos_token eot_tokens embeddings_skip_upcast",
    "remove it; optimizers have their usual betas and epsilon":
        "adam_beta1 adam_beta2 adam_beta3 adam_epsilon adam_epsilon2 optim_args betas eps lion_beta1 lion_beta2",
    "remove it; the cosine ends at zero": "cosine_min_lr_ratio min_lr min_lr_rate",
    "remove it; the base stays frozen, and lora.targets says which layers get LoRA weights":
        "unfrozen_parameters freeze_vision_tower freeze_multi_modal_projector",
    "write data.resolution, the edge of the square with as many pixels (qlora-lite explain pictures)":
        "image_max_pixels image_size",
    "remove it; small pictures keep their size, and video is not supported": "image_min_pixels video_max_pixels",
    "remove it; a step has one update, with fresh answers, so that no ratio is ever clipped":
        "epsilon epsilon_high delta num_iterations importance_sampling_level",
    "remove it; roles are recognised by their usual names": "roles",
}  # fmt: skip
_NOT_OFFERED = {
    "write train.warmup_ratio, the warm-up's share of all steps, instead":
        "warmup_steps lr_warmup_steps num_warmup_steps",
    "give data.train a file of those examples": "select filter",
    "name the column text, or write {path: FILE, prompt: ..., completion: ...} in data.train":
        "dataset_text_field text_column field_instruction field_output column_map",
    "write prompt and completion templates over the columns in data.train, or a .jinja file in data.template":
        "formatting_func formatting_function preprocess_function format_function",
    'here these are items of lora.targets, such as {pattern: "model.layers.1?.*", rank: 8}; the last that matches wins':
        "rank_pattern alpha_pattern layers_to_transform layers_pattern exclude_modules lora_layers_to_transform "
        "peft_layers_to_transform peft_layers_pattern lora_exclude_modules",
    "write adapter.train_also: [embeddings, head]": "train_embeddings",
    "write adapter.train_also: biases": "bias",
    "add experts to lora.targets, or names of their weights such as gate_up_proj; other parameters stay frozen":
        "target_parameters lora_target_parameters",
    "write the tokens in adapter.train_tokens, which adds those that the tokenizer lacks":
        "tokens add_tokens new_tokens new_special_tokens add_special_tokens additional_special_tokens "
        "trainable_token_indices",
    "remove it; adapter.train_tokens adds tokens, and makes embeddings longer where it has to":
        "added_tokens_overrides resize_vocab resize_token_embeddings "
        "resize_token_embeddings_to_32x mean_resizing_embeddings shrink_embeddings fix_untrained_tokens",
    "remove it; train.loraplus_lr_ratio gives B another rate, and adapter.train_also_lr_ratio embeddings and other "
    "whole weights":
        "loraplus_lr_embedding embedding_learning_rate embedding_lr embedding_lr_scale lr_groups lr_scale_b",
    "remove it; there is no 8-bit base here but a file's own (model.quant keep): it is nf4 or fp4 (4 bit), or none":
        "load_in_fp8",
    "remove it; models are quantised to NF4 or FP4 here, and those that are published packed keep their codes":
        "gptq awq hqq eetq aqlm qat qat_scheme quantizer",
    "remove it; LoRA weights have no bias": "lora_bias",
    "remove it; lora.start is kaiming, qera, loftq, pissa, olora or eva, and lora.init_from starts from an adapter":
        "init init_lora_weights peft_init_lora_weights pissa pissa_* use_pissa loftq loftq_config use_loftq "
        "olora eva_config corda_config init_weights",
    "remove it; the model's own configuration is used":
        "overrides_of_model_config rope_scaling rope_theta model_config_kwargs shift_attn use_pose pose_* "
        "mixture_of_depths llama4_linearized_experts s2_attention",
    "write data.streaming: true, with data.order: as-is and train.max_steps":
        "pretraining_dataset iterable_dataset dataset_streaming",
    "remove it; weights of every kind are updated by one optimizer": "optim_target_modules",
    "remove it; the rate is constant, or falls to zero linearly or along half a cosine":
        "cosine_constant_lr_ratio lr_scheduler_kwargs num_cycles lr_quadratic_warmup lr_div_factor",
    "remove it; no noise is added to embeddings": "neftune neftune_alpha neftune_noise_alpha noisy_embedding_alpha",
    "remove it; no average of the weights is kept (EMA)": "ema use_ema ema_*",
    "remove it; the loss is plain cross-entropy":
        "label_smoothing_factor dft use_dft_loss use_eaft_loss z_loss use_asft_loss",
    "write adapter.method: full with adapter.switch_every; blocks learn in an order that is drawn":
        "use_badam badam_mode badam_switch_mode badam_start_block",
    "remove it; weights are updated by train.optimizer alone":
        "galore_* use_galore apollo_* use_apollo lisa_* relora_* use_muon use_adam_mini "
        "torchdistx_path",
    "remove it; examples are mixed by the weight of their source in data.train":
        "mix_strategy interleave_probs data_mixture min_sample_len dataset_exact_deduplication",
    "write the system turn into the data, or into a .jinja file of your own (data.template)":
        "default_system_message default_system system_prompt",
    "remove it; pictures in chats are for task.kind image-text-to-text (qlora-lite explain vision-language), and "
    "their paths begin where the rows lie": "image_resize_algorithm media_dir vision_all_linear",
    "remove it; lora.targets names the layers, those of a vision tower as *vis*":
        "finetune_vision_layers finetune_language_layers finetune_attention_modules finetune_mlp_modules",
    "remove it; roles are recognised, and the assistant's turns are target tokens, or all tokens (data.train_on: all)":
        "train_on_eos message_field_training message_field_training_detail",
    "rename the columns in data.train: the prompt is messages, conversations or prompt, and the answers of a pair are "
    "chosen and rejected": "field_chosen field_rejected field_prompt",
    "rename the columns in data.train: chats are in messages or conversations, as role and content or from and value":
        "field_messages conversation_column conversation_style message_field_role message_field_content "
        "message_property_mappings field_tools field_human field_model",
    "remove it; all of the newest data on the hub is read": "shards shards_idx preprocess_shards",
    "write a function of yours in objective.rewards (qlora-lite explain rewards)":
        "reward_model reward_model_* reward_weights grpo_* mask_truncated_completions top_entropy_quantile trl",
}  # fmt: skip
OTHER_TRAINING = (
    "fine-tuning, preferences and GRPO are offered (train.objective), and reward models (task.kind), but no PPO and no "
    "distillation; continued pre-training is fine-tuning on text files (qlora-lite explain data)"
)
_OTHER_TRAINING = {
    OTHER_TRAINING:
        "ppo_* process_reward_model ref_model ref_model_* kd_* teacher_* training_mode",
    "adapter.method is lora, dora or full, of what is converted; parts of the base that are trained whole are "
    "adapter.train_also, and blocks in turn adapter.switch_every":
        "freeze_trainable_layers freeze_trainable_modules freeze_extra_modules use_llama_pro oft_*",
}  # fmt: skip
Effect = Literal["renamed", "not needed", "otherwise", "not offered", "other training"]
_TABLES: dict[Effect, dict[str, str]] = {
    "renamed": _RENAMED, "not needed": _NOT_NEEDED, "otherwise": _OTHERWISE, "not offered": _NOT_OFFERED,
    "other training": _OTHER_TRAINING,
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Answer:
    """What a setting of another trainer is here.

    Args:
        effect: which table it stands in.
        text: the local key of a renamed one; of the others the advice.
    """

    effect: Effect
    text: str


_ANSWERS = {
    name: Answer(effect, text)
    for effect, table in _TABLES.items() for text, names in table.items() for name in names.split()
}  # fmt: skip
_FAMILIES = [name for name in _ANSWERS if "*" in name]
_IN_SOURCES = {
    "type": "here it is format",
    "ds_type": "remove it; a file's name says what it is",
    "split": "append it to the name, as in hub:OWNER/NAME:SPLIT",
    "name": "append it to the name, as in hub:OWNER/NAME/CONFIG",
}
_ADVICE_AT = {f"data.{which}.*.{name}": advice for which in ("train", "eval") for name, advice in _IN_SOURCES.items()}
_KEY_AT = dict.fromkeys(("model.dtype", ".dtype"), "model.compute_dtype")  # ours means another one in its section

_VALUES = {  # what letters alone would take for another value
    "gpu": "cuda", "bf16": "bfloat16", "fp16": "float16", "half": "float16", "fp32": "float32", "none": "constant",
    "int4": "nf4", "4bit": "nf4",
    "random": "shuffle", "full": "block", "constant_with_warmup": "constant",
    "get_cosine_schedule_with_warmup": "cosine", "adamw": "adamw_torch", "adamw_torch_fused": "adamw_torch",
    "adamw_hf": "adamw_torch", "adamw_bnb_8bit": "adamw_8bit", "adamw_torch_8bit": "adamw_8bit",
    "adamw8bit": "adamw_8bit", "paged_adamw": "paged_adamw_32bit", "pagedadamw": "paged_adamw_32bit",
    "pagedadamw8bit": "paged_adamw_8bit", "lion": "lion_32bit",
}  # fmt: skip
_NO_VALUES = {  # by setting: what to know about values that are not offered
    "model.device": {
        "Apple GPUs are not supported: memory is planned and counted for CUDA and CPUs; write cpu": "mps metal",
        "torch for ROCm calls AMD GPUs cuda; nobody has tried them here": "hip rocm amd",
        "only CUDA GPUs and CPUs are supported: memory is planned and counted for them; write cpu":
            "xpu npu hpu tpu xla mlu vulkan dml directml",
    },
    "adapter.method": {
        "here it is adapter.method: prompt with prompt.encoder_width": "p-tuning p_tuning ptuning",
        "here it is adapter.method: full with adapter.switch_every": "badam",
        "here it is adapter.method: lora with model.quant: nf4": "qlora",
        "here it is adapter.method: lora with lora.rslora: true": "rslora",
        "here it is adapter.method: lora with train.loraplus_lr_ratio": "lora+ loraplus lora_plus",
        "here it is adapter.train_also: biases, with lora.targets: []": "bitfit",
        "`qlora-lite explain methods` says why it is not offered": "vera lora-fa lora_fa miss",
        "`qlora-lite explain methods` says what is offered": "ia3 adalora loha lokr boft oft hra fourierft",
    },
}  # fmt: skip


def trainer_of(root: Node) -> str | None:
    """Return whose file a YAML mapping is, by its keys; None where it is nobody's that is known, such as a recipe."""
    values = root.value if isinstance(root.value, dict) else {}
    training, model = values.get("training"), values.get("model")
    if training and model and isinstance(training.value, dict) and isinstance(model.value, str):
        return "unsloth-studio"
    if len(values.keys() - Recipe.model_fields.keys()) < 3:
        return None
    if any(isinstance(child.value, dict) and "_component_" in child.value for child in values.values()):
        return "torchtune"
    if "model_name_or_path" in values:
        return "LlamaFactory" if values.keys() & _LLAMA_FACTORY else "trl"
    return "axolotl" if "base_model" in values else None


def value_advice(key: str, value: str) -> str | None:
    """Return what to know about a setting's value that other trainers have and this one does not, or None."""
    return next((text for text, words in _NO_VALUES.get(key, {}).items() if value.lower() in words.split()), None)


def same_value(value: str, choices: Sequence[str]) -> str | None:
    """Return which of a setting's choices is the same as another trainer's value, None where none is."""
    word = value.lower()
    return word if word in choices else known if (known := _VALUES.get(word)) in choices else None


def meant_value(value: str, choices: Sequence[str]) -> str | None:
    """Return which of a setting's choices a wrong value means, None where nothing is near."""
    return same_value(value, choices) or next(iter(get_close_matches(value.lower(), choices, 1, 0.6)), None)


def answer(name: str, place: str = "") -> Answer | None:
    """Return what a setting of another trainer is here, None where nobody knows it.

    Args:
        name: its last part, such as "lora_r".
        place: the sections above it, joined by dots.
    """
    name = name.lower().replace("-", "_")
    if key := _KEY_AT.get(f"{place}.{name}"):
        return Answer("renamed", key)
    if name in _ANSWERS:
        return _ANSWERS[name]
    return next((_ANSWERS[family] for family in _FAMILIES if fnmatchcase(name, family)), None)


def cure(key: str, known: Sequence[str]) -> tuple[str, str | None]:
    """Return what to write instead of an unknown key.

    Args:
        key: the dotted key as written, such as "lora.rnak" or "sequence_len".
        known: every dotted key there is.

    Returns:
        The text after "is not a setting; ", and the known key that it proposes, if one.
    """
    section, _, leaf = key[:80].rpartition(".")
    name = leaf.lower().replace("-", "_")
    if key in known:
        return f"here it is {key}: write {leaf} in a line of its own, indented below {section}", key
    if section == "data" and name in Source.model_fields:
        item = "path: FILE" if name == "path" else f"path: FILE, {name}: ..."
        return f"it belongs to a source of rows, as in data.train: [{{{item}}}]", "data.train"
    if advice := _ADVICE_AT.get(_NUMBER.sub(".*.", f"{section}.{name}")):
        return advice, None
    found = answer(name, section)
    renamed = found.text if found is not None and found.effect == "renamed" else None
    if proposal := renamed or next((k for k in known if k.rpartition(".")[2] == name), None):
        return f"here it is {proposal}", proposal
    if found is not None:
        return found.text, None
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
