"""What a person is shown is the text of the tensors, with the marks of the labels."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from tiny_tokenizer import make_tokenizer

from qlora_lite.data.chat.template import special_ids_of
from qlora_lite.data.tokens.batch import collate, pieces_of
from qlora_lite.data.tokens.storage import Example

TOKENIZER = make_tokenizer()
SPECIAL = special_ids_of(TOKENIZER)
PARTS = ["user\n", "<|im_end|>", " the answer", "ä🙂", "<s>", "42", "\n"]

marked_rows = st.lists(
    st.lists(st.tuples(st.sampled_from(PARTS), st.booleans()), min_size=2, max_size=8).filter(
        lambda row: any(learns for _, learns in row[1:])
    ),
    min_size=1,
    max_size=3,
)


def example(row):
    ids, is_target = [], []
    for text, learns in row:
        tokens = TOKENIZER(text, add_special_tokens=False)["input_ids"]
        ids += tokens
        is_target += [learns] * len(tokens)
    is_target[0] = False  # nothing precedes it
    return Example(np.array(ids, np.int32), np.array(is_target), "", "", "f:1")


@given(marked_rows)
def test_the_pieces_are_the_text_of_the_row_and_the_learned_ones_what_it_learns(rows):
    examples = [example(row) for row in rows]
    for made, pieces in zip(examples, pieces_of(collate(examples), TOKENIZER, SPECIAL), strict=True):
        assert "".join(piece.text for piece in pieces) == TOKENIZER.decode(made.token_ids)
        targets = "".join(piece.text for piece in pieces if piece.is_target)
        starts_inside_a_letter = TOKENIZER.decode(made.token_ids[:1]) == "\ufffd"
        assert starts_inside_a_letter or targets == TOKENIZER.decode(made.token_ids[made.is_target])
        specials = [piece.text for piece in pieces if piece.special]
        assert specials == [TOKENIZER.decode([t]) for t in made.token_ids.tolist() if t in SPECIAL]
