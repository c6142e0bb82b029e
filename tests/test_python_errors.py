"""What is wrong in a call of the Python interface is one error of this package that says what to give instead."""

from pathlib import Path

import pytest
import torch
from tiny_files import byte_tokenizer, save_tiny, write_recipe
from tiny_runs import make_run

import qlora_lite as q
from qlora_lite.adapters.lora.inject import Target
from qlora_lite.errors import QloraLiteError

ROWS = [{"prompt": f"{number}?", "completion": "yes"} for number in range(4)]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("place")
    save_tiny(folder / "model")
    write_recipe(folder, folder / "model")
    make_run(folder / "work", folder / "model")
    return folder


@pytest.fixture
def base(place):
    """Load the base model."""
    return q.load_model(place / "model", compute_dtype=torch.float32)


@pytest.fixture
def examples():
    return q.build_examples([q.Source("mine", rows=ROWS)], byte_tokenizer()).examples


def settings_of(place):
    return q.train_settings(q.load_recipe(place / "recipe.yaml"))


def says(call, text):
    with pytest.raises(QloraLiteError, match=text):
        call()


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("r", "has no argument r; here it is rank"),
        ("lora_alpha", "here it is alpha"),
        ("rnak", "here it is rank"),
        ("target_modules", "here it is targets"),
        ("use_gradient_checkpointing", "it has model, targets, rank, alpha"),
    ],
)
def test_an_argument_that_lora_has_under_another_name(name, text):
    says(lambda: q.add_lora(None, **{name: 8}), text)


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (({"model": {}},), "path of a YAML file, not as dict"),
        ((None,), "path of a YAML file, not as NoneType"),
        (("recipe.yaml", "lora.rank=8"), r'such as \["lora\.rank=32"\], not \'lora\.rank=8\''),
        (("recipe.yaml", [8]), r"overrides must be a list of strings"),
        (("nowhere.yaml",), "no such file"),
    ],
)
def test_a_recipe_s_path_and_overrides(arguments, text):
    says(lambda: q.load_recipe(*arguments), text)


@pytest.mark.parametrize("given", ["recipe.yaml", Path("recipe.yaml"), {"model": {"path": "x"}}, None])
def test_the_path_of_a_recipe_in_place_of_the_recipe(given, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    machine = q.machine_of_gpu(q.find_gpu("rtx-4060"))
    for call in (
        lambda: q.run_recipe(given),
        lambda: q.train_settings(given),
        lambda: q.evaluate_recipe(given, None, 0),
        lambda: q.plan_recipe(given, machine, 2**33),
    ):
        says(call, rf"not {type(given).__name__}; qlora_lite\.load_recipe\(PATH\) loads one")
    assert not list(tmp_path.iterdir())


def test_an_evaluation_without_rows(place):
    recipe = q.load_recipe(place / "recipe.yaml", ["data.eval=null", "train.metrics_examples=0"])
    says(lambda: q.evaluate_recipe(recipe, None, 0), "no evaluation data; name some")


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"quant": "nf5"}, "quant is 'nf5'; choose one of nf4, fp4, keep, none"),
        ({"quant": None}, "quant is None"),
        ({"compute_dtype": "float33"}, "compute_dtype is 'float33'"),
        ({"compute_dtype": torch.int8}, "torch.int8; give"),
        ({"device": "gpu"}, "device is 'gpu'; give cpu or cuda"),
        ({"device": None, "path": "/nowhere"}, "device is None"),
        ({"path": "/nowhere"}, "no folder '/nowhere' here"),
    ],
)
def test_what_a_model_is_loaded_as(options, text, place):
    says(lambda: q.load_model(**({"path": place / "model"} | options)), text)


def test_a_gpu_that_is_not_there(place, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    says(lambda: q.load_model(place / "model", device="cuda"), "torch finds no CUDA device")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    says(lambda: q.load_model(place / "model", device="cuda:2"), "torch finds 2 CUDA devices, numbered from 0")


def test_no_path_at_all_is_python_s_own_error():
    for load in (q.load_model, q.load_tokenizer):
        with pytest.raises(TypeError, match="not NoneType"):
            load(None)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"targets": ["q_porj"]}, "'q_porj' matches no linear layer of this model; did you mean"),
        ({"targets": []}, "targets must be 'all-linear', or a list"),
        ({"targets": None}, "targets must be"),
        ({"targets": [{"pattern": "q_proj"}]}, "targets must be"),
        ({"rank": 0}, "rank is 0; give a whole number"),
        ({"rank": 4.0}, "rank is 4.0"),
        ({"rank": "8"}, "rank is '8'"),
        ({"alpha": 0}, "alpha is 0; give a number above"),
        ({"alpha": float("inf")}, "alpha is inf"),
        ({"alpha": "x"}, "alpha is 'x'"),
        ({"dropout": 1}, "dropout is 1"),
        ({"dtype": "bfloat16"}, "dtype is 'bfloat16'"),
        ({"dtype": torch.int8}, "dtype is torch.int8"),
        ({"dtype": torch.float16}, "dtype is torch.float16"),
    ],
)
def test_weights_that_cannot_be(options, text, base):
    says(lambda: q.add_lora(base, **options), text)
    assert not any("lora" in name for name, _ in base.named_parameters())


@pytest.mark.parametrize("own", [{"rank": 0}, {"rank": -3}, {"rank": 2.5}, {"alpha": 0}, {"alpha": float("inf")}])
def test_a_target_s_own_rank_or_alpha_that_cannot_be(own):
    says(lambda: Target("q_proj", **own), f"{next(iter(own))} is")


def test_one_name_of_layers_to_keep_is_no_list(place):
    says(lambda: q.load_model(place / "model", keep_16bit="q_proj"), "keep_16bit is 'q_proj'; give a list of names")
    says(lambda: q.load_model(place / "model", compute_dtype=torch.float64), "compute_dtype is torch.float64; give")


def test_one_target_stands_for_a_list_of_one(base):
    q.add_lora(base, Target("q_proj", rank=2), rank=4)
    assert {p.shape[0] for name, p in base.named_parameters() if name.endswith("lora_A")} == {2}


def test_weights_twice(base, place):
    adapter = place / "work" / "run" / "adapter"
    q.load_adapter(base, adapter)
    for call in (lambda: q.add_lora(base), lambda: q.load_adapter(base, adapter)):
        says(call, "has LoRA layers already; load the base model again")


@pytest.mark.parametrize("given", ["model", torch.nn.Linear(2, 2), None])
def test_something_else_than_a_model(given, place, examples, tmp_path):
    for call in (
        lambda: q.add_lora(given),
        lambda: q.save_adapter(given, tmp_path / "a"),
        lambda: q.load_adapter(given, tmp_path),
        lambda: q.Trainer(given, examples, settings_of(place)),
    ):
        says(call, rf"not {type(given).__name__}; qlora_lite\.load_model\(PATH\) loads one")


def test_an_adapter_that_names_its_base_by_a_path(base, place, tmp_path):
    q.save_adapter(q.add_lora(base), tmp_path / "adapter", place / "model")
    assert q.open_tasks(tmp_path / "adapter").names == ("adapter",)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"sources": "rows.jsonl"}, "a source is str"),
        ({"sources": q.Source("x", rows=ROWS)}, "put it into a list"),
        ({"sources": ROWS}, "a source is dict"),
        ({"sources": [q.Source("x", rows="abc")]}, "x: rows is str; give a list"),
        ({"sources": [q.Source("x", rows={"prompt": ["a"]})]}, "x: rows is dict"),
        ({"sources": [q.Source("x", rows=5)]}, "x: rows is int"),
        ({"sources": [q.Source("x", rows=[])]}, "no rows"),
        ({"tokenizer": "model"}, r"a tokenizer is wanted, not str; qlora_lite\.load_tokenizer"),
        ({"tokenizer": None}, "a tokenizer is wanted, not NoneType"),
        ({"max_tokens": "512"}, "max_tokens is '512'"),
    ],
)
def test_rows_and_tokenizers_that_are_none(options, text):
    given = {"sources": [q.Source("x", rows=ROWS)], "tokenizer": byte_tokenizer()} | options
    says(lambda: q.build_examples(**given), text)


def test_a_trainer_of_what_cannot_be_trained(base, place, examples):
    recipe, settings = q.load_recipe(place / "recipe.yaml"), settings_of(place)
    data = q.build_examples([q.Source("mine", rows=ROWS)], byte_tokenizer())
    says(lambda: q.Trainer(base, examples, settings), "has no LoRA layers; call add_lora first")
    q.add_lora(base)
    for given in (data, ROWS, None, "rows.jsonl"):
        says(lambda given=given: q.Trainer(base, given, settings), r"give build_examples\(\.\.\.\)\.examples")
    says(lambda: q.Trainer(base, examples, recipe), r"settings is Recipe; give qlora_lite\.train_settings\(RECIPE\)")
    says(lambda: next(iter(q.Trainer(base, [], settings))), "there are no rows to train on")


def test_gpus_machines_and_budgets(place):
    recipe, card = q.load_recipe(place / "recipe.yaml"), q.find_gpu(4060)
    says(lambda: q.find_gpu("rtx-9999"), "there is no GPU 'rtx-9999'")
    says(lambda: q.machine_of_gpu("rtx-4060"), r"not 'rtx-4060'; qlora_lite\.find_gpu\(NAME\)")
    says(lambda: q.plan_recipe(recipe, card, 2**33), r"not Gpu; qlora_lite\.machine_of_gpu\(GPU\)")
    says(lambda: q.plan_recipe(recipe, q.machine_of_gpu(card), "8GiB"), r"budget_bytes is '8GiB'")


@pytest.mark.parametrize(
    ("settings", "options", "text"),
    [
        (q.MergeSettings, {"dtype": "f64"}, "dtype is 'f64'; choose one of auto, bf16, f16, f32"),
        (q.MergeSettings, {"base": "int8"}, "base is 'int8'"),
        (q.MergeSettings, {"quantize": "q4"}, "quantize is 'q4'"),
        (q.MergeSettings, {"rows": -1}, "rows is -1"),
        (q.MergeSettings, {"rows": None}, "rows is None"),
        (q.ExportSettings, {"to": "onnx"}, "to is 'onnx'; choose one of gguf, gguf-adapter, kohya, ollama"),
        (q.ExportSettings, {"to": "gguf", "dtype": "f64"}, "dtype is 'f64'; choose one of None, f16"),
        (q.ExportSettings, {"to": "gguf", "base": "x"}, "base is 'x'"),
    ],
)
def test_choices_that_there_are_not(settings, options, text):
    says(lambda: settings(**options), text)


def test_runs_and_folders_are_paths_or_texts(place, tmp_path):
    run = place / "work" / "run"
    q.merge_run(run, str(tmp_path / "merged"), q.MergeSettings(rows=0))
    q.export_run(str(run), str(tmp_path / "peft"), q.ExportSettings("peft"))
    says(lambda: q.merge_run(run, tmp_path / "m", "nf4"), r"give MergeSettings\(")
    says(lambda: q.export_run(run, tmp_path / "e", "peft"), r'give ExportSettings\("peft"\)')
    for call in (q.open_tasks, q.compare_runs):
        says(lambda call=call: call([]), "no run is given")
        says(lambda call=call: call("/nowhere"), "/nowhere is not a run folder")
    tasks = q.open_tasks(str(run))
    for said in ("Hello", [{"role": "user", "content": "Hello"}]):
        says(lambda said=said: tasks.answer(["run"], [said], 4), r'such as \[qlora_lite\.Turn\("user", "Hello"\)\]')
    says(lambda: tasks.answer(["run"], [], 4), "1 names are given for 0 conversations")
    assert len(tasks.answer(["run"], [[q.Turn("user", "Hello")]], 4)) == 1
