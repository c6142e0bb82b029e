from pathlib import Path

import pytest

from qlora_lite.errors import OutputError, RecipeError
from qlora_lite.recipe import catalog
from qlora_lite.recipe.load import load_recipe

NAMES = [name for name, _ in catalog.list_recipes()]


def test_the_recipes_that_must_ship_are_there():
    cards = {f"{model}-{size}gb" for size in (8, 12, 24)
             for model in ("llama3.1-8b", "mistral-7b", "qwen2.5-7b", "qwen3-30b-a3b")}  # fmt: skip
    assert {"gemma3-270m", "gsm8k"} | cards <= set(NAMES)


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


@pytest.mark.parametrize("name", [name for name in NAMES if name.endswith("gb")])
def test_a_recipe_for_a_card_lacks_only_the_users_rows(name):
    with pytest.raises(RecipeError) as caught:
        load_recipe(catalog.recipes_folder() / f"{name}.yaml")
    assert [problem.key for problem in caught.value.problems] == ["data.train"]


@pytest.mark.parametrize("name", NAMES)
def test_a_recipe_holds_only_what_differs_from_the_defaults(name):
    written = catalog.plain(catalog.parse((catalog.recipes_folder() / f"{name}.yaml").read_bytes(), name).root)
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
    assert catalog.copy_recipe("mistral-7b-8gb") == Path("mistral-7b-8gb.yaml")
    assert catalog.copy_recipe("mistral-7b-8gb.yaml", "mine.yaml") == Path("mine.yaml")
    assert load_recipe("mine.yaml", check_files=False).output.name == "mine"


def test_two_recipes_with_the_same_data_can_be_copied_to_one_folder(tmp_path):
    catalog.copy_recipe("gemma3-270m", tmp_path)
    assert catalog.copy_recipe("gemma3-270m", tmp_path / "second.yaml").exists()


def test_a_copy_to_where_nothing_can_be_written_is_one_clean_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="cannot write"):
        catalog.copy_recipe("gemma3-270m", tmp_path / "file" / "sub")


def test_an_unknown_recipe_is_answered_with_the_nearest_name():
    with pytest.raises(RecipeError, match=r"no built-in recipe 'gsm8'; did you mean gsm8k\?"):
        catalog.show_recipe("gsm8")
    with pytest.raises(RecipeError, match="there are "):
        catalog.show_recipe("../../etc/passwd")
