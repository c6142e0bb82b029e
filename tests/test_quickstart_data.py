"""The quickstart's rows: reproducible, well formed, answerable, nothing shared between the two files."""

import json
import re
import runpy
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent.parent / "recipes" / "data"
SCRIPT = runpy.run_path(str(FOLDER / "make_orders.py"))
CHOICES = SCRIPT["choices"]


def read(name):
    lines = (FOLDER / f"orders-{name}.jsonl").read_text(encoding="utf-8").splitlines()
    return [[message["content"] for message in json.loads(line)["messages"]] for line in lines]


TRAIN, EVAL = read("train"), read("eval")


def words(text):
    return re.findall(r"[\w'&]+", text.lower())


def either(forms):
    return "|".join(re.escape(form) for form in CHOICES(forms))


def without_values(note, answer):
    """Return a note in lower case with `|` for its name, its order and its day; each must be there once."""
    filed = json.loads(answer)
    quantity = either(SCRIPT["QUANTITIES"][filed["quantity"]])
    plural = "s" if filed["quantity"] > 1 else ""
    text = note.lower()
    for pattern in (
        rf"\b({quantity}) {filed['item']}{plural}\b",
        rf"\b{filed['name'].lower()}\b",
        rf"\b({either(SCRIPT['DAYS'][filed['day']])})\b",
    ):
        text, count = re.subn(pattern, "|", text, flags=re.IGNORECASE)
        assert count == 1, (pattern, note)
    return text


def runs_of_three(rows):
    """Return every three words in a row that stand outside the values."""
    pieces = [words(piece) for _, note, answer in rows for piece in without_values(note, answer).split("|")]
    return {tuple(piece[at : at + 3]) for piece in pieces for at in range(len(piece) - 2)}


def test_the_files_are_what_the_script_writes(tmp_path):
    SCRIPT["write_files"](tmp_path)
    for name in ("orders-train.jsonl", "orders-eval.jsonl"):
        assert (tmp_path / name).read_bytes() == (FOLDER / name).read_bytes()


def test_there_are_enough_rows_in_small_files():
    assert len(TRAIN) >= 600 and len(EVAL) >= 100
    assert sum((FOLDER / f"orders-{name}.jsonl").stat().st_size for name in ("train", "eval")) < 2**20


def test_no_row_occurs_twice():
    notes = [note for _, note, _ in TRAIN + EVAL]
    assert len(set(notes)) == len(notes)


@pytest.mark.parametrize("rows", [TRAIN, EVAL], ids=["train", "eval"])
def test_every_answer_is_one_line_of_json_with_exactly_the_four_keys(rows):
    for _, _, answer in rows:
        filed = json.loads(answer)
        assert list(filed) == ["name", "item", "quantity", "day"]
        assert [type(value) for value in filed.values()] == [str, str, int, str]
        assert filed["quantity"] in SCRIPT["QUANTITIES"] and filed["day"] in SCRIPT["DAYS"]
        assert answer == json.dumps(filed)


@pytest.mark.parametrize("rows", [TRAIN, EVAL], ids=["train", "eval"])
def test_every_value_stands_in_the_note_once_and_no_second_day_does(rows):
    any_day = "|".join(either(forms) for forms in SCRIPT["DAYS"].values())
    for _, note, answer in rows:
        assert not re.search(rf"\b({any_day})\b", without_values(note, answer))


def test_no_name_of_the_evaluation_rows_occurs_in_training():
    seen = {word for row in TRAIN for text in row for word in words(text)}
    assert not seen & {json.loads(answer)["name"].lower() for _, _, answer in EVAL}


def test_no_word_of_an_item_of_the_evaluation_rows_occurs_in_training():
    seen = {word for row in TRAIN for text in row for word in words(text)}
    held_out = {word for _, _, answer in EVAL for word in words(json.loads(answer)["item"])}
    assert not seen & (held_out | {word + "s" for word in held_out})


def test_no_three_words_in_a_row_occur_in_both_files():
    assert len(runs_of_three(EVAL)) > 50
    assert not runs_of_three(TRAIN) & runs_of_three(EVAL)


def test_the_wording_varies():
    assert len({without_values(note, answer) for _, note, answer in TRAIN}) > 0.8 * len(TRAIN)


def test_every_list_of_values_is_used_by_both_files():
    for rows in (TRAIN, EVAL):
        answers = [json.loads(answer) for _, _, answer in rows]
        assert {answer["quantity"] for answer in answers} == set(SCRIPT["QUANTITIES"])
        assert {answer["day"] for answer in answers} == set(SCRIPT["DAYS"])
