import re
from pathlib import Path

import pytest

from qlora_lite.errors import OutputError, RecipeError
from qlora_lite.models.families import known_config
from qlora_lite.recipe import catalog
from qlora_lite.recipe.load import load_recipe
from qlora_lite.recipe.strict_yaml import parse, plain

NAMES = [name for name, _ in catalog.list_recipes()]
OF_MODELS = [name for name in NAMES if "\n  train: train.jsonl\n" in catalog.show_recipe(name)]


def test_the_recipes_that_must_ship_are_there():
    assert {"gemma3-270m", "gsm8k", "quickstart"} < set(NAMES) and len(OF_MODELS) >= 12


@pytest.mark.parametrize("name", NAMES)
def test_a_recipe_starts_with_its_summary_command_and_needs(name):
    text = catalog.show_recipe(name)
    comment = text[: text.index("model:")]
    summary = dict(catalog.list_recipes())[name]
    assert text.startswith(f"# {summary}\n")
    assert len(summary) > 20
    assert f"{name}.yaml" in comment
    assert "qlora-lite train " in comment
    assert "Needs" in comment


@pytest.mark.parametrize("name", NAMES)
def test_a_recipe_is_right_but_for_files_that_the_user_brings(name):
    path = catalog.recipes_folder() / f"{name}.yaml"
    load_recipe(path, check_files=False)
    try:
        load_recipe(path)
    except RecipeError as error:
        missing = ("no such file", "no such model", "is not installed")
        assert all(any(words in problem.message for words in missing) for problem in error.problems)


@pytest.mark.parametrize("name", NAMES)
def test_a_recipe_s_rows_lie_beside_it_or_on_the_hub(name):
    data = load_recipe(catalog.recipes_folder() / f"{name}.yaml", check_files=False).data
    for source in (*data.train, *(data.eval or ())):
        is_beside = Path(source.path).resolve().is_relative_to(catalog.recipes_folder())
        assert source.path.startswith("hub:") or is_beside, "a copy somewhere else could not run"


@pytest.mark.parametrize("name", OF_MODELS)
def test_a_recipe_of_a_model_is_of_one_that_is_planned_without_a_network_and_lacks_only_the_users_examples(name):
    settings = load_recipe(catalog.recipes_folder() / f"{name}.yaml", check_files=False)
    assert known_config(settings.model.path)
    with pytest.raises(RecipeError) as caught:
        load_recipe(catalog.recipes_folder() / f"{name}.yaml")
    assert [problem.key for problem in caught.value.problems] == ["data.train"]


@pytest.mark.parametrize("name", NAMES)
def test_a_recipe_holds_only_what_differs_from_the_defaults(name):
    written = plain(parse((catalog.recipes_folder() / f"{name}.yaml").read_bytes(), name).root)
    bare = load_recipe(catalog.recipes_folder() / f"{name}.yaml", check_files=False)
    for section, settings in written.items():
        model = getattr(bare, section)
        for key in settings:
            field = type(model).model_fields[key]
            assert field.is_required() or getattr(model, key) != field.default, f"{section}.{key} is the default"


def test_a_copy_brings_its_data_and_refuses_to_overwrite(tmp_path):
    copy = catalog.copy_recipe("gemma3-270m", tmp_path / "new")
    assert copy == tmp_path / "new" / "gemma3-270m.yaml"
    assert copy.read_text() == catalog.show_recipe("gemma3-270m")
    data = load_recipe(copy, ["model.path=gpt2"]).data
    assert Path(data.train[0].path).parent == tmp_path / "new" / "data"
    with pytest.raises(OutputError, match="exists already"):
        catalog.copy_recipe("gemma3-270m", tmp_path / "new")
    with pytest.raises(OutputError, match="exists already"):
        catalog.copy_recipe("gemma3-270m", copy)


@pytest.mark.parametrize("name", NAMES)
def test_a_copy_brings_every_file_of_ours_that_its_text_names(name, tmp_path):
    text = catalog.copy_recipe(name, tmp_path).read_text(encoding="utf-8")
    for path in re.findall(r"data/[\w-]+\.(?:jsonl|parquet|py)", text):
        original = catalog.recipes_folder() / path
        assert (tmp_path / path).read_bytes() == original.read_bytes()
    assert "recipes/" not in text, "a folder that only a clone has"


def test_a_copy_never_replaces_a_data_file_of_the_user(tmp_path):
    mine = tmp_path / "data" / "orders-eval.jsonl"
    mine.parent.mkdir()
    mine.write_text("mine")
    with pytest.raises(OutputError, match="exists already"):
        catalog.copy_recipe("gemma3-270m", tmp_path)
    assert mine.read_text() == "mine"
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["data", "orders-eval.jsonl"]


def test_a_copy_goes_to_the_current_folder_or_to_a_given_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert catalog.copy_recipe("mistral-7b") == Path("mistral-7b.yaml")
    assert catalog.copy_recipe("mistral-7b.yaml", "mine.yaml") == Path("mine.yaml")
    assert load_recipe("mine.yaml", check_files=False).output.name == "mine"


def test_two_recipes_with_the_same_data_can_be_copied_to_one_folder(tmp_path):
    catalog.copy_recipe("gemma3-270m", tmp_path)
    assert catalog.copy_recipe("gemma3-270m", tmp_path / "second.yaml").exists()


def test_a_copy_to_where_nothing_can_be_written_is_one_clean_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="cannot write"):
        catalog.copy_recipe("gemma3-270m", tmp_path / "file" / "sub")


@pytest.mark.parametrize("name", ["llama3.1-8b-24gb", "llama3.1-8b-8gb", "llama3.1-8b-24gb.yaml"])
def test_who_asks_for_a_recipe_of_a_gpu_s_size_is_told_of_the_one_for_every_gpu(name, tmp_path):
    said = "llama3.1-8b is for every GPU: `qlora-lite plan llama3.1-8b --gpu NAME`"
    for ask in (catalog.show_recipe, catalog.copy_recipe, lambda name: load_recipe(tmp_path / name)):
        with pytest.raises(RecipeError, match=re.escape(said)) as caught:
            ask(name)
        assert str(caught.value).count("\n") == 0
    assert catalog.recipe_for_every_gpu("phi-9-24gb") is None


def test_an_unknown_recipe_is_answered_with_the_nearest_name():
    with pytest.raises(RecipeError, match=r"no built-in recipe 'gsm8'; did you mean gsm8k\?"):
        catalog.show_recipe("gsm8")
    with pytest.raises(RecipeError, match="there are "):
        catalog.show_recipe("../../etc/passwd")
