"""Texts cut at special tokens have the tokens of the whole, or are not cut."""

from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_tokenizer import make_tokenizer
from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from qlora_lite.data.chat.template import choose_template
from qlora_lite.data.chat.tokenizer_facts import can_be_cut, lengths_of_tokens
from qlora_lite.data.tokens.mask import tokenise
from qlora_lite.data.tokens.tokenise import tokenise_rows

CORPUS = ["user assistant the answer is 42", "ab  a b\n\nab ä user<a", "b a  >b"] * 5


def words_tokenizer(normalizer=None, pre_tokenizer=None, tokens=()):
    """Make a tokenizer in the manner of SentencePiece: a space is a letter, and may be put before the text."""
    backend = Tokenizer(models.BPE(unk_token="<unk>"))
    backend.normalizer, backend.pre_tokenizer = normalizer, pre_tokenizer
    trainer = trainers.BpeTrainer(vocab_size=80, special_tokens=["<unk>", "<s>", "</s>"], show_progress=False)
    backend.train_from_iterator(CORPUS, trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    tokenizer.chat_template = "{% for m in messages %}{{ m.content + eos_token }}{% endfor %}"
    tokenizer.add_tokens(list(tokens), special_tokens=True)
    return tokenizer


def trimming_tokenizer():
    """Make a tokenizer whose offsets leave out the space before a word, as GPT-2's do; a space has no characters."""
    tokenizer = make_tokenizer()
    tokenizer.backend_tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    return tokenizer


def with_tokens(*tokens):
    tokenizer = make_tokenizer()
    for token in tokens:
        tokenizer.add_tokens([token], special_tokens=token.special)
    return tokenizer


def special(text, **settings):
    return AddedToken(text, special=True, normalized=settings.pop("normalized", False), **settings)


def plain(text, **settings):
    return AddedToken(text, special=False, normalized=settings.pop("normalized", False), **settings)


# name -> tokenizer whose texts may be cut
CUT = {
    "byte level": make_tokenizer(),
    "offsets without spaces": trimming_tokenizer(),
    "a space before the first word": words_tokenizer(pre_tokenizer=pre_tokenizers.Metaspace(prepend_scheme="first")),
    "a space before each piece": words_tokenizer(pre_tokenizer=pre_tokenizers.Metaspace(prepend_scheme="always")),
    "a space from the normalizer": words_tokenizer(
        normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    ),
    "a space before each piece and white space after": words_tokenizer(
        normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]),
        tokens=[AddedToken("<|x|>", rstrip=True, normalized=False)],
    ),
    "pieces stripped": words_tokenizer(normalizers.Strip(), pre_tokenizers.Metaspace(prepend_scheme="first")),
    "white space after": with_tokens(special("<|x|>", rstrip=True)),
    "ordinary tokens": with_tokens(plain("ab"), plain("\n\n"), plain("a ", lstrip=True), plain("b<", normalized=True)),
    "one special token longer than another": with_tokens(special("</s>ab")),
}
# name -> tokenizer whose texts must stay whole, and a text that shows why
WHOLE = {
    "white space before": (with_tokens(special("<|x|>", lstrip=True)), "a <|x|>"),
    "whole words only": (with_tokens(special("xy", single_word=True)), "axy"),
    "found after normalising": (with_tokens(special("<|x|>", normalized=True)), None),
    "an ordinary token that swallows the beginning": (with_tokens(plain("b<")), "ab</s>"),
    "an ordinary token around": (with_tokens(plain("a</s>a")), "a</s>a"),
    "a special token around": (with_tokens(special("a</s>")), None),
}
texts = st.lists(
    st.sampled_from(["a", "b", " ", "\n", "ä", "<", ">", "user", "</s>", "<s>", "<|im_start|>", "<|x|>", "xy", "🙂"]),
    min_size=1,
    max_size=12,
).map("".join)


def assert_as_whole(rows, tokenizer, cut, lengths=None):
    tokens = tokenise_rows(rows, tokenizer, cut, lengths)
    assert tokens.text_borders.tolist() == np.cumsum([0, *map(len, rows)]).tolist()
    for index, whole in enumerate(tokenise(rows, tokenizer)):
        of_row = slice(tokens.borders[index], tokens.borders[index + 1])
        assert tokens.ids.dtype == np.int32 and np.array_equal(tokens.ids[of_row], whole.ids)
        assert np.array_equal(tokens.starts[of_row] - tokens.text_borders[index], whole.starts)
        assert np.array_equal(tokens.ends[of_row] - tokens.text_borders[index], whole.ends)


@pytest.mark.parametrize("name", CUT)
@settings(deadline=None, max_examples=60)
@given(rows=st.lists(texts, min_size=1, max_size=5))
def test_the_tokens_of_the_pieces_are_those_of_the_whole(name, rows):
    tokenizer = CUT[name]
    template = choose_template(tokenizer)
    assert template.cut is not None
    assert_as_whole(rows, tokenizer, template.cut)
    assert_as_whole(rows, tokenizer, template.cut, template.token_lengths)


def test_lengths_are_used_where_they_are_never_too_short():
    without = {"offsets without spaces", "pieces stripped", "a space before each piece and white space after"}
    assert {name for name, tokenizer in CUT.items() if lengths_of_tokens(tokenizer) is None} == without
    assert lengths_of_tokens(words_tokenizer(normalizers.Replace("ab", "c"))) is None
    assert lengths_of_tokens(words_tokenizer(normalizers.Replace(Regex("a+"), "c"))) is None
    assert lengths_of_tokens(words_tokenizer(normalizers.Lowercase())) is None
    assert lengths_of_tokens(words_tokenizer(pre_tokenizer=pre_tokenizers.Split(" ", "removed"))) is None
    assert lengths_of_tokens(words_tokenizer(pre_tokenizer=pre_tokenizers.Split(" ", "isolated"))) is not None
    assert lengths_of_tokens(words_tokenizer(normalizers.NFC())) is not None
    assert lengths_of_tokens(PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordPiece()))) is None
    suffixed = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    assert lengths_of_tokens(PreTrainedTokenizerFast(tokenizer_object=suffixed)) is None


def test_a_letter_that_is_left_out_is_not_taken_for_a_space_put_before():
    tokenizer = words_tokenizer(pre_tokenizer=pre_tokenizers.Metaspace(prepend_scheme="always"))
    tokenizer.backend_tokenizer.model.unk_token = None
    assert len(tokenise(["a#"], tokenizer)[0].ids) == 1
    assert_as_whole(["a#", "a#</s>"], tokenizer, None, lengths_of_tokens(tokenizer))


@pytest.mark.parametrize("side", ["lstrip", "rstrip"])
def test_white_space_that_a_token_takes_along_is_not_taken_for_a_space_put_before(side):
    token = AddedToken("<|x|>", normalized=False, **{side: True})
    space_before = pre_tokenizers.Metaspace(prepend_scheme="always", split=False)
    tokenizer = words_tokenizer(pre_tokenizer=space_before, tokens=[token])
    assert_as_whole(["<|x|>\na", "a\n<|x|>"], tokenizer, None, lengths_of_tokens(tokenizer))


def test_an_unknown_letter_is_not_taken_for_the_letters_of_its_token():
    tokenizer = words_tokenizer(pre_tokenizer=pre_tokenizers.Metaspace(prepend_scheme="never"))
    tokenizer.backend_tokenizer.model.fuse_unk = True
    assert len("<unk>") == len("#####")
    assert_as_whole(["#####ab", "a#####</s>"], tokenizer, None, lengths_of_tokens(tokenizer))


def test_the_tokenizer_is_not_asked_where_its_tokens_stand_in_an_ascii_text():
    tokenizer, asked = make_tokenizer(), []
    backend = tokenizer.backend_tokenizer

    class Recorder:
        encode_special_tokens = False
        no_truncation = no_padding = staticmethod(lambda: None)
        encode_batch_fast = staticmethod(backend.encode_batch_fast)

        def encode_batch(self, texts, **settings):
            asked.extend(texts)
            return backend.encode_batch(texts, **settings)

    recording = SimpleNamespace(backend_tokenizer=Recorder(), split_special_tokens=False)
    tokenise_rows(["user a</s>", "ä"], recording, None, lengths_of_tokens(tokenizer))
    assert asked == ["ä"]


@pytest.mark.parametrize("name", WHOLE)
@settings(deadline=None, max_examples=60)
@given(rows=st.lists(texts, min_size=1, max_size=5))
def test_texts_that_cutting_could_change_stay_whole(name, rows):
    tokenizer, _ = WHOLE[name]
    assert choose_template(tokenizer).cut is None
    assert_as_whole(rows, tokenizer, None)


@pytest.mark.parametrize("name", [name for name, (_, text) in WHOLE.items() if text])
def test_cutting_them_would_change_their_tokens(name):
    tokenizer, text = WHOLE[name]
    (whole,) = tokenise([text], tokenizer)
    assert tokenise_rows([text], tokenizer, choose_template(tokenizer).special).ids.tolist() != whole.ids.tolist()


def test_a_tokenizer_that_splits_special_tokens_is_not_cut_and_splits_them():
    tokenizer = make_tokenizer()
    tokenizer.split_special_tokens = True
    assert not can_be_cut(tokenizer)
    assert_as_whole(["a</s>b"], tokenizer, None)
    assert len(tokenise_rows(["</s>"], tokenizer, None).ids) > 1


def test_a_piece_that_rows_share_is_tokenised_once():
    tokenizer, seen = make_tokenizer(), []
    backend = tokenizer.backend_tokenizer

    class Recorder:
        encode_special_tokens = False
        no_truncation = no_padding = staticmethod(lambda: None)

        def encode_batch(self, texts, **settings):
            seen.extend(texts)
            return backend.encode_batch(texts, **settings)

    recording = SimpleNamespace(backend_tokenizer=Recorder(), split_special_tokens=False)
    rows = ["<|im_start|>user\na</s>", "<|im_start|>user\nb</s>"]
    tokens = tokenise_rows(rows, recording, choose_template(tokenizer).cut)
    assert sorted(seen) == ["</s>", "<|im_start|>user\na", "<|im_start|>user\nb"]
    assert tokens.ids.tolist() == [token for whole in tokenise(rows, tokenizer) for token in whole.ids.tolist()]
