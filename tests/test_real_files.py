"""Every file of ../shared/data trains: the recipe that each needs, and what comes of its rows."""

from pathlib import Path

import pytest
from tiny import DEMO_MODEL

from qlora_lite.data.chat.conversation import Conversation
from qlora_lite.data.chat.row_formats import read_conversations
from qlora_lite.data.chat.template import choose_template
from qlora_lite.data.readers.problems import Problems
from qlora_lite.data.tokens.mask import mark_row, render_row, tokenise
from qlora_lite.models.tokenizer import load_tokenizer
from qlora_lite.prepare.datasets import build_data, build_sources
from qlora_lite.recipe.load import load_recipe

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"

PATH = "train: {}"
TEXT = "train: [{path: '{}', format: text}]"
TABLE = "train: [{path: '{}', prompt: '{PROMPT}', completion: '{COMPLETION}'}]"
WINDOWS = "train: {}\n  max_tokens: 256\n  overflow: split"

# file -> the data section, rows read, examples, rows split
FILES = {
    # questions and answers in columns of their own names: a table
    "gsm8k_train.jsonl": (TABLE.replace("PROMPT", "question").replace("COMPLETION", "answer"), 7473, 7473, 0),
    "e2e_devset.csv": (TABLE.replace("PROMPT", "mr").replace("COMPLETION", "ref"), 4672, 4672, 0),
    # recognised by their keys: alpaca twice, then messages with text parts and loss weights
    "lf_alpaca_en_demo.json": (PATH, 999, 999, 0),
    "lf_identity.json": (PATH, 91, 91, 0),
    "lf_v1_sft_demo.jsonl": (PATH, 500, 500, 0),
    # text whose name does not say so, one document per line, as there is no blank line; the label is the first word
    "sst2.train": (TEXT, 6920, 6920, 0),
    "sst2.dev": (TEXT, 872, 872, 0),
    # documents between blank lines; long ones become windows
    "tinyshakespeare.txt": (WINDOWS, 7222, 7341, 106),
    "wikitext2_valid.txt": (WINDOWS, 1160, 1940, 374),
}


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(DEMO_MODEL)


@pytest.fixture
def recipe_of(tmp_path):
    def make(name):
        section = FILES[name][0].replace("{}", str(SHARED / name))
        (tmp_path / "recipe.yaml").write_text(f"model:\n  path: {DEMO_MODEL}\ndata:\n  {section}\n", encoding="utf-8")
        return load_recipe(tmp_path / "recipe.yaml")

    return make


needs_files = pytest.mark.skipif(not SHARED.is_dir(), reason="../shared/data is not here")


@pytest.mark.model
@needs_files
@pytest.mark.parametrize("name", FILES)
def test_a_real_file_trains_with_its_recipe(name, tokenizer, recipe_of):
    _, rows_read, examples, split = FILES[name]
    data = build_data(recipe_of(name), tokenizer)
    assert (data.rows_read, len(data.examples), data.split, data.dropped) == (rows_read, examples, split, {})
    assert data.target_tokens > data.rows_read
    assert tokenizer.convert_ids_to_tokens(list(data.end_token_ids)) == ["<|im_end|>"]


@pytest.mark.model
@needs_files
@pytest.mark.parametrize("name", [name for name in FILES if not name.endswith((".txt", ".dev", ".train"))])
def test_its_rows_are_those_that_rendering_and_tokenising_each_alone_gives(name, tokenizer, recipe_of):
    recipe = recipe_of(name)
    (source,), template = build_sources(recipe, "train"), choose_template(tokenizer)
    for example, row in zip(
        build_data(recipe, tokenizer).examples, read_conversations(source, Problems()), strict=True
    ):
        assert isinstance(row, Conversation)
        rendered = render_row(row, template, "assistant")
        (tokens,) = tokenise([rendered.text], tokenizer)
        is_target, ends = mark_row(rendered, tokens, template, True)
        assert example.token_ids.tolist() == tokens.ids.tolist() and example.is_target.tolist() == is_target.tolist()
        first = rendered.answers[-1][0]
        assert example.prompt == rendered.text[:first]
        assert (example.answer, example.where) == (rendered.text[first : tokens.starts[ends[-1]]], rendered.where)
