"""Files of other trainers become recipes that train the same; what cannot is named, and nothing in them runs."""

import json
import re

import pytest
import yaml
from recipe.foreign_shapes import SHAPES, Code, write_files

from qlora_lite.errors import RecipeError
from qlora_lite.ext.convert.recipe import _THEIR_DEFAULTS, convert
from qlora_lite.prepare.preflight import preflight
from qlora_lite.prepare.task import find_preference, find_task
from qlora_lite.recipe import reference
from qlora_lite.recipe.foreign_names import _ANSWERS
from qlora_lite.recipe.load import load_recipe
from qlora_lite.recipe.schema import Target

AXOLOTL = """\
base_model: NousResearch/Llama-3.2-1B
load_in_8bit: false
load_in_4bit: true
datasets:
  - path: tatsu-lab/alpaca
    type: alpaca
    split: train
val_set_size: 0.05
output_dir: ./outputs/qlora-out
adapter: qlora
sequence_len: 2048
sample_packing: true
lora_r: 32
lora_alpha: 64
lora_dropout: 0.05
lora_target_modules:
lora_target_linear: true
wandb_project: demo
gradient_accumulation_steps: 4
micro_batch_size: 2
num_epochs: 3
optimizer: adamw_bnb_8bit
lr_scheduler: linear
learning_rate: "1e-4"
bf16: auto
flash_attention: true
warmup_steps: 10
evals_per_epoch: 4
eval_steps: 50
special_tokens:
  pad_token: "<|end_of_text|>"
weight_decay: 0.0
"""
LLAMA_FACTORY = """\
model_name_or_path: Qwen/Qwen2.5-7B-Instruct
quantization_bit: 4
stage: sft
finetuning_type: lora
lora_target: q_proj,v_proj
dataset: tickets,replies
template: qwen
cutoff_len: 4096
per_device_train_batch_size: 1
gradient_accumulation_steps: 8
learning_rate: 1.0e-4
lr_scheduler_type: cosine
warmup_ratio: 0.1
ddp_timeout: 180000000
val_size: 0.1
eval_strategy: steps
eval_steps: 200
report_to: none
"""
DATASET_INFO = {
    "tickets": {"file_name": "tickets.json", "columns": {"prompt": "question", "query": "", "response": "answer"}},
    "replies": {"hf_hub_url": "acme/replies", "split": "gold", "formatting": "sharegpt"},
    "pairs": {"file_name": "pairs.json", "ranking": True},
}
TORCHTUNE = """\
output_dir: /tmp/torchtune/out
model:
  _component_: torchtune.models.llama3_1.qlora_llama3_1_8b
  lora_attn_modules: ['q_proj', 'output_proj']
  apply_lora_to_mlp: True
  apply_lora_to_output: False
  lora_rank: 8
  lora_alpha: 16
tokenizer:
  _component_: torchtune.models.llama3.llama3_tokenizer
  path: /models/llama/original/tokenizer.model
  max_seq_len: 2048
checkpointer:
  _component_: torchtune.training.FullModelHFCheckpointer
  checkpoint_dir: /models/llama
  output_dir: ${output_dir}
dataset:
  _component_: torchtune.datasets.instruct_dataset
  source: json
  data_files: ${output_dir}/rows.json
  column_map: {input: question, output: answer}
  packed: True
shuffle: False
batch_size: 2
optimizer:
  _component_: bitsandbytes.optim.PagedAdamW8bit
  lr: 3e-4
lr_scheduler:
  _component_: torchtune.training.lr_schedulers.get_cosine_schedule_with_warmup
  num_warmup_steps: 20
loss:
  _component_: torchtune.modules.loss.LinearCrossEntropyLoss
epochs: 2
metric_logger:
  _component_: torchtune.training.metric_logging.WandBLogger
dtype: fp32
profiler:
  enabled: False
  output_dir: ${output_dir}/profile
"""
SCRIPT = """\
from unsloth import FastLanguageModel, is_bfloat16_supported
import os
open("executed", "w")
max_seq_length = 2048
model, tokenizer = FastLanguageModel.from_pretrained(
    "unsloth/llama-3-8b-bnb-4bit", max_seq_length=max_seq_length, dtype=None, load_in_4bit=True, token="hf_mine",
)
model = FastLanguageModel.get_peft_model(
    model, r=8, target_modules=["q_proj", "k_proj"], lora_alpha=16, bias="none", use_gradient_checkpointing="unsloth",
    random_state=3407,
)
dataset = load_dataset("json", data_files={"train": "chats.jsonl"}, split="train")
trainer = SFTTrainer(model=model, train_dataset=dataset, args=SFTConfig(
    per_device_train_batch_size=2, gradient_accumulation_steps=4, warmup_steps=6, max_steps=60, learning_rate=2e-4,
    bf16=is_bfloat16_supported(), fp16=not is_bfloat16_supported(), optim="adamw_8bit",
))
trainer = train_on_responses_only(trainer, instruction_part="user", response_part="assistant")
if False:
    model, _ = FastLanguageModel.from_pretrained(model_name="lora_model")
"""
STUDIO = """\
model: unsloth/Qwen2.5-0.5B
data: {local_dataset: [chats.jsonl], format_type: sharegpt}
training: {training_type: lora, num_epochs: 2, warmup_steps: 0, random_seed: 7, train_on_completions: true}
lora: {lora_r: 32, lora_alpha: 64, finetune_vision_layers: true}
logging: {enable_wandb: false, wandb_project: demo, hf_token: hf_mine}
"""


@pytest.fixture
def made(tmp_path, monkeypatch):
    """Return a function that converts a text, and gives the conversion and the recipe that it loads as."""
    monkeypatch.chdir(tmp_path)

    def convert_text(text, *overrides, name="theirs.yml", **options):
        (tmp_path / name).write_text(text)
        conversion = convert(name, overrides, **options)
        (tmp_path / "ours.yaml").write_text(conversion.text)
        return conversion, load_recipe(tmp_path / "ours.yaml", check_files=False)

    return convert_text


@pytest.fixture
def refused(made):
    """Return a function that gives the problems that a text is refused with."""

    def problems(text, *overrides, **options):
        with pytest.raises(RecipeError) as caught:
            made(text, *overrides, **options)
        assert caught.value.exit_code == 2
        return [str(problem) for problem in caught.value.problems]

    return problems


def notes(conversion, kind):
    return [str(note) for note in conversion.notes if note.kind == kind]


def test_an_axolotl_file_becomes_a_recipe_that_trains_the_same(made):
    conversion, r = made(AXOLOTL)
    assert (r.model.path, r.model.quant, r.output.dir.endswith("/outputs/qlora-out")) == (
        "NousResearch/Llama-3.2-1B",
        "nf4",
        True,
    )
    assert (r.lora.rank, r.lora.alpha, r.lora.dropout, r.lora.targets) == (
        32,
        64,
        0.05,
        (Target(pattern="all-linear"),),
    )
    (source,) = r.data.train
    assert (source.path, source.format, r.data.template) == ("hub:tatsu-lab/alpaca", "alpaca", "alpaca")
    assert (r.data.max_tokens, r.data.packing, r.data.eval_share, r.data.train_on) == (2048, True, 0.05, "assistant")
    assert (r.train.micro_batch_size, r.train.gradient_accumulation_steps, r.train.epochs) == (2, 4, 3)
    assert (r.train.learning_rate, r.train.optimizer, r.train.lr_scheduler) == (1e-4, "adamw_8bit", "linear")
    assert (r.train.trackers, r.train.eval_every_steps) == (("wandb",), 50)
    assert notes(conversion, "lost") == []
    assert any(note.startswith("theirs.yml:27: warmup_steps = 10: here") for note in notes(conversion, "changed"))
    assert any(note.startswith("theirs.yml:28: evals_per_epoch = 4: ") for note in notes(conversion, "unused"))
    assert all(f"#   {note}\n" in conversion.text for note in conversion.notes), "they are comments of the recipe"
    settings = [line for line in conversion.text.splitlines() if not line.startswith("#")]
    assert not any("weight_decay" in line or "warmup" in line for line in settings), "only what differs is written"
    assert settings.index("  micro_batch_size: 2") < settings.index("  lr_scheduler: linear"), "in the file's order"


def test_float16_is_left_to_the_gpu(made):
    conversion, r = made(AXOLOTL.replace("bf16: auto", "fp16: true"))
    assert r.model.compute_dtype == "auto"
    assert any("model.compute_dtype is auto: bfloat16, or float16 on" in note for note in notes(conversion, "unused"))


def test_axolotl_s_own_columns_chats_and_files_are_places_that_examples_come_from(made):
    item = """\
  - path: data/chats.jsonl
    ds_type: json
    type: chat_template
    field_messages: conversations
    message_property_mappings: {role: from, content: value}
  - path: json
    data_files: faq.json
    type: {field_instruction: question, field_input: context, field_output: answer, format: "{instruction} ({input})"}
"""
    text = AXOLOTL.replace("  - path: tatsu-lab/alpaca\n    type: alpaca\n    split: train\n", item)
    conversion, r = made(text)
    chats, faq = r.data.train
    assert (chats.path.endswith("data/chats.jsonl"), chats.format, r.data.template) == (True, None, None)
    assert (faq.path.endswith("faq.json"), faq.prompt, faq.completion) == (True, "{question} ({context})", "{answer}")
    assert any("the chat template is written around it" in note for note in notes(conversion, "changed"))


def test_what_another_trainer_does_by_default_is_written_where_it_is_another_default(made):
    text = "\n".join(
        line for line in AXOLOTL.splitlines() if not line.startswith(("sample_", "load_in_4", "optimizer"))
    )
    conversion, r = made(text.replace("adapter: qlora", "adapter: lora"))
    assert (r.model.quant, r.data.packing, r.train.optimizer) == ("none", False, "adamw_torch")
    assert "  quant: none  # the default of axolotl\n" in conversion.text
    for trainer, defaults in _THEIR_DEFAULTS.items():
        assert set(defaults) <= set(reference.known_keys()), trainer


def test_a_llama_factory_file_is_read_with_its_list_of_data_sets(made, tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "dataset_info.json").write_text(json.dumps(DATASET_INFO))
    conversion, r = made(LLAMA_FACTORY)
    tickets, replies = r.data.train
    assert tickets.path == str(tmp_path / "data" / "tickets.json")
    assert (tickets.prompt, tickets.completion) == ("{question}", "{answer}")
    assert (replies.path, replies.format) == ("hub:acme/replies:gold", "sharegpt")
    assert (r.model.quant, r.lora.rank, r.lora.alpha, r.data.packing) == ("nf4", 8, 16, False)
    assert r.lora.targets == (Target(pattern="q_proj"), Target(pattern="v_proj"))
    assert (r.train.epochs, r.train.warmup_ratio, r.train.lr_scheduler) == (3, 0.1, "cosine")
    assert (r.data.eval_share, r.train.eval_every_steps, r.train.trackers) == (0.1, 200, ())
    assert any("template = qwen: the model's own chat template" in note for note in notes(conversion, "changed"))


def test_the_list_of_data_sets_may_lie_above_the_file(made, tmp_path):
    (tmp_path / "mine" / "data").mkdir(parents=True)
    (tmp_path / "mine" / "data" / "dataset_info.json").write_text(json.dumps(DATASET_INFO))
    (tmp_path / "mine" / "examples" / "lora").mkdir(parents=True)
    (source, _) = made(LLAMA_FACTORY, name="mine/examples/lora/sft.yml")[1].data.train
    assert source.path == str(tmp_path / "mine" / "data" / "tickets.json")


def test_names_of_data_sets_that_cannot_be_looked_up_are_given_by_an_override(made, refused):
    problems = refused(LLAMA_FACTORY)
    assert (
        "theirs.yml:6: dataset = tickets,replies: tickets is a name in data/dataset_info.json, which no" in problems[0]
    )
    assert problems[-1].endswith("2 settings not converted; give data.train=... after the file")
    assert refused(LLAMA_FACTORY, partial=True) == problems, "a recipe without data is none"
    assert made(LLAMA_FACTORY, "data.train=rows.jsonl")[1].data.train[0].path.endswith("rows.jsonl")


def test_a_torchtune_file_is_read_by_its_components(made):
    conversion, r = made(TORCHTUNE)
    assert (r.model.path, r.model.quant, r.model.compute_dtype) == ("/models/llama", "nf4", "float32")
    assert [target.pattern for target in r.lora.targets] == ["q_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    (source,) = r.data.train
    assert (source.path, source.prompt, source.completion) == ("/tmp/torchtune/out/rows.json", "{question}", "{answer}")
    assert (r.data.max_tokens, r.data.packing, r.data.order) == (2048, True, "as-is")
    assert (r.train.optimizer, r.train.learning_rate, r.train.max_grad_norm) == ("paged_adamw_8bit", 3e-4, 0)
    assert (r.train.lr_scheduler, r.train.epochs, r.train.trackers, r.output.dir) == (
        "cosine",
        2,
        ("wandb",),
        "/tmp/torchtune/out",
    )
    assert len([note for note in conversion.notes if "profiler" in note.text]) == 1, "one line for a section"


def test_an_unsloth_script_is_read_and_not_run(made, tmp_path):
    conversion, r = made(SCRIPT, name="train.py")
    assert not (tmp_path / "executed").exists()
    assert (r.model.path, r.model.quant, r.data.max_tokens) == ("unsloth/llama-3-8b-bnb-4bit", "nf4", 2048)
    assert (r.lora.rank, r.lora.alpha, r.train.seed, r.data.train_on) == (8, 16, 3407, "assistant")
    assert r.data.train[0].path == str(tmp_path / "chats.jsonl")
    assert (r.train.micro_batch_size, r.train.gradient_accumulation_steps, r.train.max_steps) == (2, 4, 60)
    assert (r.train.warmup_ratio, r.train.lr_scheduler, r.train.optimizer) == (0.1, "linear", "adamw_8bit")
    assert any(note.startswith("train.py:9: use_gradient_checkpointing") for note in notes(conversion, "unused"))
    assert "hf_mine" not in conversion.text + str(conversion.notes), "no secret is written"
    assert "lora_model" not in conversion.text, "what stands below `if False:` is not read"
    without = SCRIPT.replace("trainer = train_on_responses_only", "pass  # ")
    assert made(without, name="train.py")[1].data.train_on == "all", "as trl learns them"


def test_what_is_computed_in_a_script_is_not_guessed(made, refused):
    text = SCRIPT.replace("learning_rate=2e-4", "learning_rate=2e-4 * scale").replace("r=8", "r=rank")
    text = text.replace("max_seq_length = 2048", "max_seq_length = 2048\nmax_seq_length = 4096\nrank: int = f()")
    assert [problem.partition("; ")[0] for problem in refused(text, name="train.py")][:3] == [
        "train.py:8: max_seq_length = max_seq_length: an expression, which is not evaluated",
        "train.py:11: r = rank: an expression, which is not evaluated",
        "train.py:16: learning_rate = 0.0002 * scale: an expression, which is not evaluated",
    ]
    given = "data.max_tokens=512", "lora.rank=4", "train.learning_rate=1e-3"
    r = made(text, *given, name="train.py")[1]
    assert (r.data.max_tokens, r.lora.rank, r.train.learning_rate) == (512, 4, 1e-3)
    mapped = SCRIPT.replace('split="train")', 'split="train")\ndataset = dataset.map(to_text)')
    assert "train.py:13: formatting_func = to_text: rows are rebuilt by code" in refused(mapped, name="train.py")[0]
    assert made(mapped, "data.train=rows.jsonl", name="train.py")[1].data.train[0].path.endswith("rows.jsonl")


@pytest.mark.parametrize("value", ["1j", "b'x'", "...", "{1: {2}}", "'\\ud800'", "'\\x00'", "f'{x}'", "[f()]"])
def test_a_value_of_a_script_that_yaml_has_not_is_an_expression(refused, value):
    (problem, _) = refused(SCRIPT.replace("r=8", f"r={value}"), name="train.py")
    assert problem.endswith(": an expression, which is not evaluated; here it is lora.rank")


def test_a_notebook_is_read_by_its_cells_of_code(made):
    cells = [
        {"cell_type": "markdown", "source": ["# not code ("]},
        {"cell_type": "code", "source": ["%%capture\n", "if True:\n", "    !pip install unsloth\n"]},
        {"cell_type": "code", "source": SCRIPT.splitlines(keepends=True), "outputs": [{"data": "x" * 300_000}]},
    ]
    conversion, r = made(json.dumps({"cells": cells}), name="book.ipynb")
    assert (r.lora.rank, r.train.max_steps) == (8, 60)
    assert any(note.startswith("book.ipynb, cell 3, line 9: ") for note in notes(conversion, "unused"))


def test_a_file_of_unsloth_s_studio_is_read(made):
    conversion, r = made(STUDIO)
    assert (r.model.path, r.lora.rank, r.lora.alpha, r.train.seed) == ("unsloth/Qwen2.5-0.5B", 32, 64, 7)
    assert (r.data.train[0].format, r.data.train_on, r.train.epochs) == ("sharegpt", "assistant", 2)
    assert (r.train.micro_batch_size, r.train.gradient_accumulation_steps, r.train.warmup_ratio) == (2, 4, 0)
    assert (r.train.trackers, r.train.weight_decay) == ((), 0.01) and "hf_mine" not in conversion.text


@pytest.mark.parametrize(
    ("text", "why"),
    [
        (AXOLOTL + "rl: gkd\n", "theirs.yml:33: rl = gkd: fine-tuning, preferences and GRPO are offered"),
        (AXOLOTL + "teacher_model: x/y\n", "teacher_model = x/y: fine-tuning, preferences and GRPO"),
        (AXOLOTL.replace("adapter: qlora", "adapter: llama-adapter"), "is trained with lora, dora or full"),
        (LLAMA_FACTORY.replace("stage: sft", "stage: ppo"), "theirs.yml:3: stage = ppo: fine-tuning, preferences"),
        (LLAMA_FACTORY.replace("stage: sft", "stage: pt"), "continued pre-training is fine-tuning on text files"),
        (LLAMA_FACTORY.replace("type: lora", "type: freeze"), "finetuning_type = freeze: what is converted is"),
        (TORCHTUNE.replace("modules.loss.LinearCrossEntropyLoss", "rlhf.loss.PPOLoss"), "PPOLoss: not among"),
        (STUDIO.replace("training_type: lora", "training_type: oft"), "training_type = oft: `qlora-lite explain meth"),
    ],
)
def test_a_file_that_trains_another_thing_is_refused(refused, tmp_path, text, why):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "dataset_info.json").write_text(json.dumps(DATASET_INFO))
    (problem,) = refused(text, partial=True)
    assert why in problem


@pytest.mark.parametrize("call", ["PPOTrainer(args=1)", "trl.GKDConfig(temperature=2)", "RLOOTrainer()"])
def test_a_script_of_another_trainer_class_is_refused(refused, call):
    (problem,) = refused(f"{SCRIPT}{call}\n", name="train.py", partial=True)
    assert problem.startswith(f"train.py:20: stage = {call.partition('(')[0].removeprefix('trl.')}: fine-tuning")


@pytest.mark.parametrize(
    ("text", "objective", "settings"),
    [
        (AXOLOTL + "rl: dpo\ndpo_beta: 0.3\n", "dpo", {"beta": 0.3}),
        (
            AXOLOTL + "rl: simpo\nrl_beta: 2.5\nsimpo_gamma: 1.5\ncpo_alpha: 0.2\n",
            "simpo",
            {"beta": 2.5, "gamma": 1.5, "sft_weight": 0.2},
        ),
        (AXOLOTL + "rl: orpo\norpo_alpha: 0.2\n", "orpo", {"beta": 0.2}),
        (AXOLOTL + "rl: kto\nkto_undesirable_weight: 0.2\n", "kto", {"undesirable_weight": 0.2}),
        (
            LLAMA_FACTORY.replace("stage: sft", "stage: dpo\npref_beta: 0.2\npref_loss: sigmoid\npref_ftx: 0.5"),
            "dpo",
            {"beta": 0.2, "sft_weight": 0.5},
        ),
        (LLAMA_FACTORY.replace("stage: sft", "pref_loss: orpo\nstage: dpo"), "orpo", {}),
    ],
)
def test_preferences_are_converted(made, text, objective, settings, tmp_path):
    (tmp_path / "data").mkdir()
    info = DATASET_INFO | {
        "tickets": {
            "file_name": "t.json",
            "ranking": True,
            "columns": {"prompt": "question", "chosen": "good", "rejected": "bad"},
        }
    }
    (tmp_path / "data" / "dataset_info.json").write_text(json.dumps(info))
    conversion, recipe = made(text)
    assert recipe.train.objective == objective
    assert {name: getattr(recipe.objective, name) for name in settings} == settings
    doubled = 1 if objective == "kto" else 2
    assert recipe.data.max_tokens == doubled * (2048 if "axolotl" in conversion.text else 4096)
    if "LlamaFactory" in conversion.text:
        source = recipe.data.train[0]
        assert (source.prompt, source.completion, source.rejected) == ("{question}", "{good}", "{bad}")


def test_a_reward_model_is_converted(made, tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "dataset_info.json").write_text(json.dumps(DATASET_INFO))
    _, recipe = made(LLAMA_FACTORY.replace("stage: sft", "stage: rm").replace("tickets,replies", "pairs"), partial=True)
    assert recipe.task.kind == "reward" and find_preference(recipe) == "pairs"


def test_pairs_without_an_objective_are_named(refused, tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "dataset_info.json").write_text(json.dumps(DATASET_INFO))
    problem, _ = refused(LLAMA_FACTORY.replace("tickets,replies", "pairs"))
    assert "its examples are pairs or judgements, and the file names no objective" in problem


def test_a_script_of_trl_s_dpo_trainer_is_converted(made):
    script = SCRIPT.replace("SFTTrainer", "DPOTrainer").replace("SFTConfig", "DPOConfig")
    calls = "DPOConfig(beta=0.4, loss_type='ipo', label_smoothing=0.0)\nDPOTrainer(model=1)\n"
    _, recipe = made(f"{script}{calls}", name="train.py", partial=True)
    assert recipe.train.objective == "ipo" and recipe.objective.beta == 0.4


PEFT_SCRIPT = """\
from trl import SFTTrainer
config = BitsAndBytesConfig(load_in_4bit=True{bits})
peft_config = LoraConfig(r=16, lora_alpha=32{targets}, task_type="CAUSAL_LM")
data = load_dataset("json", data_files="chats.jsonl", split="train")
args = SFTConfig(per_device_train_batch_size=2, learning_rate=2e-4, max_length=512)
model = AutoModelForCausalLM.from_pretrained("acme/model", quantization_config=config)
trainer = SFTTrainer(model=model, args=args, train_dataset=data, peft_config=peft_config)
"""


@pytest.mark.parametrize(
    ("bits", "quant", "double"),
    [
        ("", "fp4", False),
        (', bnb_4bit_quant_type="nf4"', "nf4", False),
        (', bnb_4bit_quant_type="fp4"', "fp4", False),
        (', bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True', "nf4", True),
    ],
)
def test_four_bits_are_those_that_bitsandbytes_would_take(made, bits, quant, double):
    _, recipe = made(PEFT_SCRIPT.format(bits=bits, targets=', target_modules="all-linear"'), name="train.py")
    assert (recipe.model.quant, recipe.model.double_quant) == (quant, double)


def test_layers_that_peft_would_choose_by_the_family_are_named(made):
    conversion, recipe = made(PEFT_SCRIPT.format(bits="", targets=""), name="train.py")
    assert [target.pattern for target in recipe.lora.targets] == ["q_proj", "v_proj"]
    said = "no layers are named, and peft takes those of its list for the family"
    assert any(said in note for note in notes(conversion, "changed"))


def test_settings_that_what_is_learned_depends_on_are_not_lost_without_a_word(made, refused):
    text = AXOLOTL + "neftune_noise_alpha: 5\nlora_modules_to_save: [up_proj]\nval_set: 3\nuse_dora: false\n"
    problems = refused(text.replace("optimizer: adamw_bnb_8bit", "optimizer: adafactor"))
    assert [problem.partition(" = ")[0] for problem in problems[:-1]] == [
        "theirs.yml:22: optimizer",
        "theirs.yml:33: neftune_noise_alpha",
        "theirs.yml:34: lora_modules_to_save",
        "theirs.yml:35: val_set",
    ]
    assert problems[-1].endswith(
        "4 settings not converted; give train.optimizer=... adapter.train_also=... "
        "after the file, or leave them out, with --partial"
    )
    conversion, _ = made(text, partial=True)
    assert conversion.text.splitlines()[2] == "# NOT CONVERTED, although training depends on it:"
    assert len(notes(conversion, "lost")) == 3


@pytest.mark.parametrize("line", ["load_in_8bit: true", "quantization_bit: 8"])
def test_a_base_of_8_bits_is_one_of_4_and_named(made, line):
    conversion, recipe = made(AXOLOTL.replace("load_in_4bit: true", line).replace("load_in_8bit: false\n", ""))
    assert recipe.model.quant == "nf4"
    assert any("model.quant none keeps it in 16 bit" in note for note in notes(conversion, "changed"))


def test_modules_to_save_are_converted(made):
    _, recipe = made(AXOLOTL + "lora_modules_to_save: [embed_tokens, lm_head, input_layernorm, model.norm]\n")
    assert recipe.adapter.train_also == ("embeddings", "head", "norms")


def test_dora_and_lora_plus_are_converted(made):
    _, recipe = made(AXOLOTL + "peft_use_dora: true\nloraplus_lr_ratio: 16\n")
    assert recipe.adapter.method == "dora" and recipe.train.loraplus_lr_ratio == 16
    _, recipe = made(AXOLOTL + "peft_use_dora: false\n")
    assert recipe.adapter.method == "lora" and recipe.train.loraplus_lr_ratio == 1


def test_a_converted_value_that_a_recipe_refuses_is_named(refused):
    problems = refused(AXOLOTL.replace("lora_r: 32", "lora_r: 0").replace('"1e-4"', "0.0"))
    assert "lora.rank = 0: must be a whole number of at least 1" in problems[0]
    assert "train.learning_rate = 0.0: must be a number above 0, or auto" in problems[1]


def test_alpaca_prompts_beside_chats_are_named_since_all_data_have_one_template(refused):
    text = AXOLOTL.replace("    split: train\n", "  - {path: chats.jsonl, type: chat_template}\n")
    assert "Alpaca's prompts and others are mixed" in refused(text)[0]


@pytest.mark.parametrize(
    ("name", "content", "why"),
    [
        ("bomb.yml", "a: &a [x, x]\nb: &b [*a, *a]\nc: [*b, *b]\n", "is an anchor, which is not allowed"),
        ("large.yml", "base_model: x\n" + "# " + "x" * 2**20, "is too large to convert; the limit is 65,536 bytes"),
        ("large.py", "x = 1\n" * 2**18, "is too large to convert"),
        ("deep.yml", "a: " + "[" * 999, "nested more than"),
        ("deep.py", "x = " + "(" * 999, "is not Python"),
        ("deeper.py", "x = " + "-" * 9999 + "1", "is not Python"),
        ("longer.py", "SFTConfig(seed=" + "1+" * 20000 + "1)", ""),
        ("broken.py", "def f(:\n", "broken.py:1: is not Python"),
        ("other.py", "print('SFTTrainer')\n", "calls none of FastLanguageModel.from_pretrained"),
        ("book.ipynb", "[" * 99999, "is not a notebook"),
        ("list.ipynb", '{"cells": [3]}', "is not a notebook"),
        ("ours.yml", "model: {path: a/b}\ndata: {train: x.jsonl}\n", "is not a YAML file of axolotl, LlamaFactory"),
        ("latin.py", "x = '\udcff'\n", "is not UTF-8"),
        ("nothing.yml", None, "cannot be read: No such file"),
    ],
)
def test_a_hostile_or_foreign_file_is_one_clean_error(tmp_path, name, content, why):
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content.encode("utf-8", "surrogateescape"))
    with pytest.raises(RecipeError) as caught:
        convert(path)
    assert why in str(caught.value)
    assert all("\n" not in str(problem) and len(str(problem)) < 500 for problem in caught.value.problems)


@pytest.mark.parametrize("value", ["-1", "x", "[[a], b]", "{a: {b: [1]}}", "'1e-4'", "${x}", '"\\x9b\\u202e: x"'])
def test_whatever_the_values_are_the_outcome_is_a_recipe_or_an_error(made, value):
    known = {line.partition(":")[0] for line in AXOLOTL.splitlines()} | {"rl", "stage"}  # which can be another training
    known |= {"adapter", "finetuning_type", "training_type", "peft_type", "full_finetuning", "use_peft"}
    names = [name for name, answer in _ANSWERS.items() if answer.effect != "other training" and name not in known]
    text = AXOLOTL + "".join(f"{name.replace('*', 'x')}: {value}\n" for name in names)
    conversion, _ = made(text, "data.train=rows.jsonl", partial=True)
    assert all(letter.isprintable() for note in conversion.notes for letter in str(note))


def test_a_pasted_file_of_another_trainer_is_told_of_the_command(tmp_path):
    for text, trainer in ((AXOLOTL, "axolotl"), (LLAMA_FACTORY, "LlamaFactory"), (TORCHTUNE, "torchtune")):
        (tmp_path / "r.yaml").write_text(text)
        with pytest.raises(RecipeError) as caught:
            load_recipe(tmp_path / "r.yaml")
        command = f"qlora-lite recipes convert {tmp_path}/r.yaml"
        said = f"this looks like a file of {trainer}: `{command}` turns it into a recipe"
        assert caught.value.problems[-1].message == said and len(caught.value.problems) > 5
    (tmp_path / "r.yaml").write_text("model: {path: a/b}\ndata: {train: x}\nlora_r: 3\nbase_model: x\n")
    with pytest.raises(RecipeError) as caught:
        load_recipe(tmp_path / "r.yaml")
    assert "convert" not in str(caught.value)


def test_the_folder_of_data_sets_may_be_named_after_them(made, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "dataset_info.json").write_text(json.dumps(DATASET_INFO))
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "dataset_info.json").write_text(json.dumps(DATASET_INFO))
    _, recipe = made(LLAMA_FACTORY + "dataset_dir: mine\n")
    assert recipe.data.train[0].path == str(tmp_path / "mine" / "tickets.json")


def test_a_constant_learning_rate_has_no_warm_up_as_in_transformers(made):
    constant = AXOLOTL.replace("lr_scheduler: linear", "lr_scheduler: constant")
    conversion, recipe = made(constant)
    assert (recipe.train.lr_scheduler, recipe.train.warmup_ratio) == ("constant", 0)
    assert any("a constant rate has no warm-up there" in note for note in notes(conversion, "changed"))
    assert made(constant.replace("warmup_steps: 10\n", ""))[1].train.warmup_ratio == 0
    warmed = constant.replace("constant", "constant_with_warmup").replace("warmup_steps: 10", "warmup_ratio: 0.1")
    assert made(warmed)[1].train.warmup_ratio == 0.1


def test_steps_of_warm_up_beside_a_ratio_are_named(made):
    conversion, recipe = made(AXOLOTL + "warmup_ratio: 0.1\n")
    assert recipe.train.warmup_ratio == 0.1
    (note,) = [note for note in notes(conversion, "changed") if "warm" in note]
    assert note.startswith("theirs.yml:27: warmup_steps = 10: train.warmup_ratio is 0.1 already")


TRL = """\
model_name_or_path: Qwen/Qwen2.5-0.5B-Instruct
dataset_name: trl-lib/Capybara
learning_rate: 2.0e-4
per_device_train_batch_size: 2
use_peft: true
lora_r: 16
lora_alpha: 32
lora_target_modules: all-linear
load_in_4bit: true
"""


def test_batches_without_padding_are_no_packed_sequences(made):
    conversion, recipe = made(TRL + "padding_free: true\n")
    assert recipe.data.packing is False, "a step has as many examples as there"
    assert any("padding_free" in note for note in notes(conversion, "unused"))


def test_trl_s_own_names_are_known(made):
    names = "use_bnb_nested_quant: true\nlora_task_type: CAUSAL_LM\ndataset_streaming: false\n"
    conversion, recipe = made(TRL + names + "shuffle_dataset: false\ndataset_test_split: test\n")
    assert (recipe.model.double_quant, recipe.data.order) == (True, "shuffle")
    assert not notes(conversion, "lost")
    _, recipe = made(TRL + "dataset_config: main\ndataset_train_split: train_sft\n")
    assert recipe.data.train[0].path == "hub:trl-lib/Capybara/main:train_sft"


def test_what_trl_learns_of_prompts_by_default_is_named(made):
    conversion, recipe = made(TRL)
    said = "prompts of rows with prompt and completion are not learned there"
    assert recipe.data.train_on == "all" and any(said in note for note in notes(conversion, "changed"))
    conversion, recipe = made(TRL + "completion_only_loss: false\n")
    assert recipe.data.train_on == "all" and not any(said in note for note in notes(conversion, "changed"))


def test_rows_that_a_script_leaves_out_are_named(made, refused):
    cut = SCRIPT.replace('split="train")', 'split="train").select(range(1000)).filter(is_long)')
    chosen, kept, way = refused(cut, name="train.py")
    assert "give data.train a file of those examples" in chosen + kept and "data.train=..." in way
    assert {"filter = is_long" in chosen, "select = range(1000)" in kept} == {True}
    divided = SCRIPT.replace('split="train")', 'split="train").train_test_split(test_size=0.2, seed=1)')
    assert made(divided, name="train.py")[1].data.eval_share == 0.2
    assert made(divided.replace("test_size=0.2, ", ""), name="train.py")[1].data.eval_share == 0.25
    assert "a number of examples" in refused(divided.replace("0.2", "200"), name="train.py")[0]


def test_unsloth_reads_2048_tokens_where_a_script_says_nothing(made):
    text = SCRIPT.replace("max_seq_length=max_seq_length, ", "")
    assert made(text, name="train.py")[1].data.max_tokens == 2048


def test_unsloth_s_own_defaults_are_those_of_trl_s_classes(made):
    def found(text, *overrides):
        train = made(text, *overrides, name="train.py")[1].train
        return train.gradient_accumulation_steps, train.warmup_ratio, train.optimizer, train.weight_decay

    bare = SCRIPT.replace("gradient_accumulation_steps=4, warmup_steps=6, ", "").replace('optim="adamw_8bit",', "")
    assert found(bare) == (2, 0.1, "adamw_8bit", 0.01)
    assert found(SCRIPT) == (4, 0.1, "adamw_8bit", 0.01), "what the script says"
    assert found(bare.replace("SFTConfig", "TrainingArguments")) == (1, 0, "adamw_torch", 0)
    assert found(bare.replace("FastLanguageModel", "AutoModelForCausalLM")) == (1, 0, "adamw_torch", 0), "trl alone"


def test_what_a_list_of_data_sets_says_of_rows_is_not_lost(refused, tmp_path):
    (tmp_path / "data").mkdir()
    info = {
        "tickets": {"file_name": "t", "num_samples": 9, "columns": {"prompt": "q", "response": "a", "system": "s"}},
        "replies": {"ms_hub_url": "acme/replies"},
    }
    (tmp_path / "data" / "dataset_info.json").write_text(json.dumps(info))
    system, nowhere, way = refused(LLAMA_FACTORY)
    assert "system: rows with other columns" in system
    assert "no readable entry for replies that names a file or a data set" in nowhere and "data.train=..." in way


def test_a_folder_of_axolotl_s_that_is_there_is_no_data_set_of_the_hub(made, tmp_path):
    text = AXOLOTL.replace("tatsu-lab/alpaca", "rows/alpaca")
    assert made(text)[1].data.train[0].path == "hub:rows/alpaca"
    (tmp_path / "rows" / "alpaca").mkdir(parents=True)
    assert made(text)[1].data.train[0].path == str(tmp_path / "rows" / "alpaca")


def test_names_that_are_assigned_one_literal_are_followed(made, refused):
    text = SCRIPT.replace("max_seq_length = 2048", "max_seq_length: int = 512\nmax_seq_length = 512\nrank, ways = 4, 2")
    text = text.replace("r=8", "r=rank * ways").replace("load_in_4bit=True, token", "**options, token")
    r = made(f"options = dict(load_in_4bit=False, revision='v2')\n{text}", name="train.py")[1]
    assert (r.data.max_tokens, r.lora.rank, r.model.quant, r.model.revision) == (512, 8, "none", "v2")
    loop = text.replace("rank, ways", "rank = ways\nways = rank\nrank, ways")
    assert "r = rank * ways: an expression" in refused(loop.replace("**options, ", ""), name="train.py")[0]
    assert "** = options: " in refused(text, name="train.py")[0], "what it is given stands nowhere"


@pytest.mark.parametrize(
    ("form", "template"),
    [
        ("Do it.\n### Instruction:\n{}\n### Input:\n{}\n### Response:\n{}", "alpaca"),
        ("### Instruction:\nYou know SQL.\n### Query:\n{}\n### Response:\n{}", None),
        ("### Instruction:\n{}\n### Thoughts:\n{}\n### Response:\n{}", None),
    ],
)
def test_alpaca_s_prompt_is_told_from_others_with_headings(made, form, template):
    code = f"form = {form!r}\ndef render(row):\n    return {{'text': form.format(*row.values())}}\n"
    mapped = SCRIPT.replace('split="train")', 'split="train").map(render)')
    assert made(code + mapped, name="train.py", partial=True)[1].data.template == template


def test_the_warm_up_of_a_profiler_is_not_the_learning_rate_s(made):
    text = TORCHTUNE.replace("  enabled: False", "  enabled: False\n  warmup_steps: 3")
    (note,) = [note for note in notes(made(text)[0], "changed") if "warm" in note]
    assert "lr_scheduler.num_warmup_steps = 20: " in note


def test_a_length_that_cuts_nothing_there_is_named(made):
    conversion, recipe = made(TORCHTUNE.replace("max_seq_len: 2048", "max_seq_len: null"))
    assert recipe.data.max_tokens == 1024
    (note,) = [note for note in notes(conversion, "changed") if "data.max_tokens" in note]
    assert "an example may have any length there" in note


def test_all_weights_are_trained_where_no_adapter_is_named(made, refused):
    full = "\n".join(line for line in AXOLOTL.splitlines() if not line.startswith(("adapter", "load_in_4bit")))
    conversion, recipe = made(full)
    assert (recipe.adapter.method, recipe.model.quant) == ("full", "none")
    assert any("lora_r = 32: all weights are trained" in note for note in notes(conversion, "unused"))
    problem, _ = refused(f"{full}\nunfrozen_parameters: [^lm_head]\n")
    assert "unfrozen_parameters" in problem and "adapter.train_also, with lora.targets []" in problem
    r = made(LLAMA_FACTORY.replace("type: lora", "type: full"), "data.train=x.jsonl")[1]
    assert (r.adapter.method, r.model.quant) == ("full", "none")
    assert made(STUDIO.replace("training_type: lora", "training_type: full"))[1].adapter.method == "full"


def test_a_script_without_adapters_trains_all_weights(made):
    code = PEFT_SCRIPT.format(bits="", targets="").replace("load_in_4bit=True", "")
    assert made(code, name="train.py")[1].adapter.method == "lora"
    code = "\n".join(line for line in code.splitlines() if "LoraConfig" not in line)
    assert made(code.replace(", peft_config=peft_config", ""), name="train.py")[1].adapter.method == "full"
    lora = code.replace("=peft_config", "=lora_of_mine"), "lora.rank=8", "lora.alpha=8"
    assert made(*lora, name="train.py")[1].adapter.method == "lora"


def test_a_switch_that_is_on_by_default_is_not_lost_when_it_is_off(refused):
    text = SCRIPT.replace("r=8,", "r=8, finetune_mlp_modules=False,")
    assert "finetune_mlp_modules = false: lora.targets names the layers" in refused(text, name="train.py")[0]


def test_a_command_is_read_with_the_file_and_the_script_that_it_names(of_commands, tmp_path):
    (tmp_path / "mine.yaml").write_text("dataset_name: them/rows\nlearning_rate: 1.0e-5\n")
    (tmp_path / "judge.py").write_text("KTOTrainer(args=parsed)\n")
    command = (
        "accelerate launch --config_file a.yaml judge.py \\\n --config mine.yaml --learning_rate=2e-6 --no_packing"
    )
    recipe = of_commands(f"{command} --model_name_or_path a/b --eval_strategy epoch")
    assert (recipe.model.path, recipe.adapter.method, recipe.train.objective) == ("a/b", "full", "kto")
    assert (recipe.train.learning_rate, recipe.data.packing) == (2e-6, False)
    assert [recipe.data.train[0].path, recipe.data.eval[0].path] == ["hub:them/rows", "hub:them/rows:test"]


@pytest.mark.parametrize(
    ("command", "why"),
    [
        ("trl sft --run_name 'x", "is not a command: No closing quotation"),
        ("tune run lora --config x.yaml", "names no script of trl; write the whole command"),
        ("trl env --x", "names no script of trl"),
        ("trl sft --config none.yaml", "none.yaml: cannot be read: No such file"),
        ("trl sft --learning_rate 1e-5 --dataset_name a/b", "model.path is not in it"),
        ("trl sft --use_peft --learning_rate x --model_name_or_path a/b --dataset_name a/b", "learning_rate = x: must"),
    ],
)
def test_a_command_that_says_too_little_is_one_clean_error(of_commands, command, why):
    with pytest.raises(RecipeError, match=re.escape(why)) as caught:
        of_commands(command)
    assert all("\n" not in str(problem) and len(str(problem)) < 500 for problem in caught.value.problems)


def test_a_script_whose_settings_are_on_the_command_line_asks_for_it(refused):
    script = "args = TrlParser(C).parse()\nmodel = AutoModelForCausalLM.from_pretrained(args.model, dtype=args.dtype)\n"
    (problem,) = refused(f"{script}SFTTrainer(model=model, args=args)\n", name="sft.py", partial=True)
    assert "`qlora-lite" not in problem and "qlora-lite recipes convert 'python sft.py --model_name_or_path" in problem


@pytest.fixture
def of_commands(tmp_path, monkeypatch):
    """Return a function that gives the recipe of a command."""
    monkeypatch.chdir(tmp_path)

    def recipe_of_command(command):
        (tmp_path / "ours.yaml").write_text(convert(command).text)
        return load_recipe(tmp_path / "ours.yaml", check_files=False)

    return recipe_of_command


@pytest.fixture(scope="module")
def named_files(tmp_path_factory):
    """The models and rows that the shapes name."""
    folder = tmp_path_factory.mktemp("shapes")
    write_files(folder)
    return folder


@pytest.fixture
def of_shape(named_files, monkeypatch):
    """Return a function that converts a shape, where its files are."""
    monkeypatch.chdir(named_files)

    def convert_shape(shape, settings=None):
        source = shape.source(settings)
        if not shape.is_command:
            (named_files / shape.file).write_text(source)
        return convert(source if shape.is_command else shape.file, shape.given)

    return convert_shape


@pytest.mark.parametrize("name", SHAPES)
def test_public_configurations_become_recipes_that_data_accepts(name, of_shape, named_files):
    conversion = of_shape(SHAPES[name])
    (named_files / "recipe.yaml").write_text(conversion.text)
    recipe = load_recipe("recipe.yaml")
    assert conversion.trainer == name.partition(",")[0] and not notes(conversion, "lost")
    got = {key: getattr(getattr(recipe, key.split(".")[0]), key.split(".")[1]) for key in SHAPES[name].wanted}
    assert got == SHAPES[name].wanted
    preflight(recipe, find_task(recipe).reader(recipe), 0).raise_if_unusable()


def another(value):
    """Return a value of the same kind that is another one."""
    if isinstance(value, list):
        return [*value[:-1], another(value[-1])]
    if isinstance(value, bool):
        return not value
    if isinstance(value, str):
        return Code(f"other({value})") if isinstance(value, Code) else f"{value}x"
    return 2 * value + 3


@pytest.mark.parametrize("name", SHAPES)
def test_no_setting_of_a_public_configuration_is_lost_without_a_line(name, of_shape):
    shape = SHAPES[name]
    before = of_shape(shape)
    named = {re.split(" = |: ", note.text)[0] for note in before.notes}

    def outcome(path):
        settings = json.loads(json.dumps(shape.settings)) if not shape.code else {**shape.settings}
        at = settings
        for key in path[:-1]:
            at[key] = at[key].copy()
            at = at[key]
        at[path[-1]] = another(at[path[-1]])
        try:
            return of_shape(shape, settings).text
        except RecipeError as error:
            return str(error)

    def is_named(path):
        return any(".".join(map(str, path[first:last])) in named for first in range(len(path)) for last in (None, -1))

    assert not [path for path, _ in shape.leaves() if not is_named(path) and outcome(path) == before.text]


UNUSUAL = {
    "a word": lambda name, _number: f"odd-{name}",
    "a number": lambda _name, number: 1_000_003 + number,
    "a share": lambda _name, number: 0.3 + number / 10_000,
    "a negative number": lambda _name, number: -1_000_003 - number,
    "a list": lambda name, _number: [f"odd-{name}"],
    "a mapping": lambda _name, number: {"odd": 1_000_003 + number},
}


@pytest.mark.parametrize("kind", UNUSUAL)
def test_an_unusual_value_of_any_known_setting_is_taken_over_or_named(kind, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    base = {
        "base_model": "a/b",
        "adapter": "lora",
        "lora_target_linear": True,
        "lora_r": 8,
        "sequence_len": 512,
        "datasets": [{"path": "./rows.jsonl", "type": "alpaca"}],
        "val_set_size": 0.1,
    }

    def lines(settings):
        (tmp_path / "theirs.yml").write_text(yaml.safe_dump(base | settings))
        try:
            made = convert("theirs.yml", partial=True)
        except RecipeError as error:
            return [problem.message for problem in error.problems], ""
        return [note.text for note in made.notes], re.sub("(?m)^#.*\n", "", made.text)

    _, before = lines({})
    names = [name.replace("*", "odd") for name, found in _ANSWERS.items() if found.effect != "other training"]
    settings = {name: UNUSUAL[kind](name, number) for number, name in enumerate(names) if name not in base}
    silent, texts = dict(settings), []
    while len(texts) < 2 and settings:  # a value by which the file trains another thing is the only problem
        texts, _ = lines(settings)
        for name in {re.split("[ :.]", text)[0] for text in texts}:
            silent.pop(name, None)
            settings.pop(name, None)
    assert len(silent) < 100, "most are named at once"

    def is_silent(name, value):
        found, recipe = lines({name: value})
        return not any(re.split("[ :.]", text)[0] == name for text in found) and recipe == before

    assert [name for name, value in silent.items() if is_silent(name, value)] == []


@pytest.mark.parametrize(
    ("script", "wanted"),
    [
        (
            "#!/bin/bash\n# trl sft --packing\npip install trl\nMODEL=a/b\nexport LR='2e-6'\ntrl sft \\\n"
            '  --model_name_or_path $MODEL --learning_rate "${LR}" \\\n  --dataset_name them/rows\n',
            2e-6,
        ),
        ("cd ..\nllamafactory-cli train theirs.yml\n", 1e-4),
        ("accelerate launch -m axolotl.cli.train theirs.yml  # all of it\n", 1e-4),
        ("trl sft --model_name_or_path $1 --learning_rate 1e-5\n", None),
        ("trl sft --x 1\ntrl dpo --x 1\n", None),
        ("trl sft --x 1 > log.txt\n", None),
        ("echo hello\n", None),
    ],
)
def test_a_shell_script_is_read_where_one_plain_line_starts_the_training(made, tmp_path, script, wanted):
    (tmp_path / "theirs.yml").write_text(AXOLOTL)
    (tmp_path / "train.sh").write_text(script)
    if wanted is None:
        with pytest.raises(RecipeError, match=r"^train.sh: has no one plain line .* paste it: qlora-lite recipes con"):
            convert("train.sh")
        return
    (tmp_path / "ours.yaml").write_text(convert("train.sh").text)
    assert load_recipe(tmp_path / "ours.yaml", check_files=False).train.learning_rate == wanted


@pytest.mark.parametrize(
    ("item", "named", "path"),
    [
        ("{path: them/rows, type: alpaca, data_files: a.jsonl}", "data_files", None),
        ("{path: them/rows, type: alpaca, data_dir: part}", "data_dir", None),
        ("{path: json, type: alpaca, data_files: a.jsonl, split: test}", "split", None),
        ("{path: json, type: alpaca, data_files: a.jsonl, name: part}", "name", None),
        ("{path: here, type: alpaca, data_dir: part}", "", "here/part"),
        ("{path: here, type: alpaca, data_files: [a.jsonl]}", "", "here/a.jsonl"),
    ],
)
def test_what_of_a_data_set_is_read_is_a_path_or_named(made, refused, tmp_path, item, named, path):
    (tmp_path / "here").mkdir()
    text = re.sub("(?s)  - path:.*?split: train", f"  - {item}", AXOLOTL)
    if named:
        assert refused(text)[0].partition(" = ")[0] == f"theirs.yml:5: datasets.0.{named}"
    else:
        assert made(text)[1].data.train[0].path == str(tmp_path / path)


def test_torchtune_s_paired_data_are_one_folder_of_a_data_set(refused):
    text = TORCHTUNE.replace("modules.loss.LinearCrossEntropyLoss", "rlhf.loss.DPOLoss")
    text = re.sub("(?s)(torchtune.datasets.)instruct.*?packed: True", r"\1stack_exchange_paired_dataset", text)
    assert "the folder data/rl of it; give data.train the files in that" in refused(text)[0]


def test_a_tracker_s_own_names_are_named(made):
    conversion, recipe = made(AXOLOTL + "wandb_entity: us\nwandb_name: third\n")
    assert recipe.train.trackers == ("wandb",)
    unused = [note for note in notes(conversion, "unused") if "project has the name output.name" in note]
    assert ["wandb_project = demo" in unused[0], "wandb_entity = us" in unused[1], "wandb_name" in unused[2]] == [
        True
    ] * 3
