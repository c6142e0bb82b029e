"""Every file of ../shared/data trains: the recipe that each needs, and what comes of its rows."""

from pathlib import Path

import pytest
from tiny import DEMO_MODEL

from qlora_lite.models.tokenizer import load_tokenizer
from qlora_lite.recipe.load import load_recipe
from qlora_lite.rows import build_data

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"

PATH = "train: {}"
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
    # one document per line, as there is no blank line; the label is the first word
    "sst2.train": (PATH, 6920, 6920, 0),
    "sst2.dev": (PATH, 872, 872, 0),
    # documents between blank lines; long ones become windows
    "tinyshakespeare.txt": (WINDOWS, 7222, 7341, 106),
    "wikitext2_valid.txt": (WINDOWS, 1160, 1940, 374),
}


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(DEMO_MODEL)


@pytest.mark.model
@pytest.mark.skipif(not SHARED.is_dir(), reason="../shared/data is not here")
@pytest.mark.parametrize("name", FILES)
def test_a_real_file_trains_with_its_recipe(name, tokenizer, tmp_path):
    section, rows_read, examples, split = FILES[name]
    text = f"model:\n  path: {DEMO_MODEL}\ndata:\n  {section.replace('{}', str(SHARED / name))}\n"
    (tmp_path / "recipe.yaml").write_text(text, encoding="utf-8")
    data = build_data(load_recipe(tmp_path / "recipe.yaml"), tokenizer)
    assert (data.rows_read, len(data.examples), data.split, data.dropped) == (rows_read, examples, split, {})
    assert data.learned_tokens > data.rows_read
    assert tokenizer.convert_ids_to_tokens(list(data.end_token_ids)) == ["<|im_end|>"]
