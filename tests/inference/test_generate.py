"""Prompts answered together give what each gives alone, and what plain transformers gives."""

import json
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tiny import ARCHITECTURES, UNUSUAL, build_tiny, quantized_pair
from tiny_files import VOCABULARY, byte_tokenizer
from tokenizers import normalizers

from qlora_lite.data.chat.conversation import Turn
from qlora_lite.data.chat.template import NAMED_TEMPLATES
from qlora_lite.data.checks.matching import Matching
from qlora_lite.data.checks.metrics import Measures
from qlora_lite.data.picture_reader import PictureReader
from qlora_lite.data.picture_turns import MARK
from qlora_lite.data.readers.sources import Source
from qlora_lite.data.tokens.examples import build_examples
from qlora_lite.data.tokens.storage import Example
from qlora_lite.errors import DataError, DoesNotFitError, ModelError
from qlora_lite.inference.chat import Session
from qlora_lite.inference.evaluate import CUT, measure
from qlora_lite.inference.generate import Sampling, answer, answers, shown_prompt, stop_ids
from qlora_lite.models.load import _mask_for_padding_only, adopt, use_row_attention
from qlora_lite.models.memory_options import MemoryOptions, place, set_memory_options

PROMPTS = ["a", "the quick brown fox", "hello", "", "zz top"]
PROMPTS = [f"<s>{prompt}" for prompt in PROMPTS]


def model_of(model_type, rows=True):
    model = build_tiny(model_type, vocab_size=VOCABULARY)
    if rows:
        use_row_attention(model)
    return model


@pytest.mark.parametrize(
    "model_type", ["llama", "mistral", "gemma2", "gemma3_text", "gpt2", "gpt_neox", "cohere", "falcon"]
)
def test_a_batch_of_ragged_prompts_gives_each_its_own_answer(model_type):
    model, tokenizer = model_of(model_type), byte_tokenizer()
    together = answer(model, tokenizer, PROMPTS, 12, stop=[2])
    assert together == [answer(model, tokenizer, [prompt], 12, stop=[2])[0] for prompt in PROMPTS]
    assert together == answer(model, tokenizer, PROMPTS, 12, stop=[2], batch_size=2)
    assert len(set(together)) > 1


@pytest.mark.parametrize("model_type", ["llama", "mistral", "gemma2"])
def test_greedy_answers_are_those_of_plain_transformers(model_type):
    tokenizer, plain = byte_tokenizer(), model_of(model_type, rows=False)
    ids = tokenizer(PROMPTS[1], add_special_tokens=False, return_tensors="pt").input_ids
    for _ in range(10):  # no cache, no mask, no generation code
        ids = torch.cat([ids, plain(input_ids=ids, use_cache=False).logits[:, -1:].argmax(-1)], dim=1)
    (text,) = answer(model_of(model_type), tokenizer, [PROMPTS[1]], 10)
    assert text == tokenizer.decode(ids[0, -10:], skip_special_tokens=True)


def test_a_prompt_without_padding_is_read_without_a_mask():
    made = partial(_mask_for_padding_only, 6, 6, batch_size=2, local_size=3, allow_is_causal_skip=False)
    whole, padded = torch.ones(2, 6, dtype=torch.bool), torch.arange(12).view(2, 6) > 0
    assert made(attention_mask=whole) is None
    assert made(attention_mask=padded).shape == (2, 1, 6, 6)
    assert _mask_for_padding_only(1, 6, attention_mask=whole, batch_size=2, allow_is_causal_skip=False) is not None


def test_an_answer_ends_with_a_stop_token():
    model, tokenizer = model_of("llama"), byte_tokenizer()
    (text,) = answer(model, tokenizer, [PROMPTS[1]], 12)
    letter = next(letter for letter in text if letter.isascii())  # one byte, so one token
    stop = tokenizer(letter, add_special_tokens=False).input_ids
    assert answer(model, tokenizer, [PROMPTS[1]], 12, stop) == [text[: text.index(letter) + 1]]


def test_an_answer_that_had_to_be_cut_is_told_from_one_that_ended_and_shown_as_such():
    model, tokenizer = model_of("llama"), byte_tokenizer()
    texts = answer(model, tokenizer, PROMPTS, 6)
    stop = tokenizer(next(letter for letter in texts[1] if letter.isascii()), add_special_tokens=False).input_ids
    ended = answers(model, tokenizer, PROMPTS, 6, stop)
    cut = {i for i, each in enumerate(ended) if each.finish == "length"}
    assert 1 not in cut and cut == {i for i, each in enumerate(ended) if each.text == texts[i]} != set()
    examples = [Example(np.zeros(9, np.int32), np.ones(9, bool), prompt, "x", "f:1") for prompt in PROMPTS]
    shown = measure(model, tokenizer, examples, stop).answers
    assert not shown[1].endswith(CUT) and any(each.endswith(CUT) for each in shown)


def test_stop_tokens_are_those_of_tokenizer_model_and_training():
    model = model_of("llama")
    model.generation_config.eos_token_id = [7, 2]
    assert stop_ids(model, byte_tokenizer(), {9}) == [2, 7, 9]
    model.generation_config.eos_token_id = None
    assert stop_ids(model, byte_tokenizer()) == [2]


def test_a_model_that_writes_what_its_rows_teach_matches_all_of_them(tmp_path, monkeypatch):
    tokenizer, model = byte_tokenizer(), model_of("llama")
    words = "('<think></think>' if m.role == 'assistant' else '') + m.content"
    tokenizer.chat_template = NAMED_TEMPLATES["chatml"].replace("m.content", words)
    tokenizer.backend_tokenizer.normalizer = normalizers.Lowercase()
    rows = [{"prompt": f"{i}?", "completion": f"Answer {i} " + "o" * 9 * i} for i in range(3)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = build_examples([Source(str(tmp_path / "rows.jsonl"))], tokenizer)
    given = [tokenizer(example.prompt, add_special_tokens=False).input_ids for example in data.examples]
    taught = {tuple(ids): e.token_ids[len(ids) :].tolist() for ids, e in zip(given, data.examples, strict=True)}

    def generate(input_ids, attention_mask, generation_config, **_):
        prompts = [tuple(ids[mask.bool()].tolist()) for ids, mask in zip(input_ids, attention_mask, strict=True)]
        said = [torch.tensor(taught[prompt][: generation_config.max_new_tokens]) for prompt in prompts]
        padded = torch.nn.utils.rnn.pad_sequence(said, batch_first=True, padding_value=generation_config.pad_token_id)
        return torch.cat([input_ids, padded], dim=1)

    monkeypatch.setattr(model, "generate", generate)
    match = measure(model, tokenizer, data.examples, data.end_token_ids)
    assert match.scores["exact_match"].value == 1 and match.answers[1] == "<think></think>answer 1 ooooooooo"
    cut = [replace(example, answer="") if index == 1 else example for index, example in enumerate(data.examples)]
    left_out = measure(model, tokenizer, cut, data.end_token_ids)
    assert left_out.scores["exact_match"][::2] == (1, 2) and len(left_out.records) == 2
    assert left_out.answers == (match.answers[0], "", match.answers[2])
    taught[tuple(given[2])][0] += 1
    whole = measure(model, tokenizer, data.examples, data.end_token_ids)
    number = Matching(r"(?i)answer (\d)|(x)")
    found = measure(model, tokenizer, data.examples, data.end_token_ids, measures=Measures(matching=number))
    assert [record["match"] for record in whole.records] == [True, True, False]
    scores = [each.scores["exact_match"].value for each in (whole, found)]
    assert (*scores, found.records[2]["compared_answer"]) == (2 / 3, 1, "2")
    assert "compared_answer" not in whole.records[2] and whole.records[0]["prompt"] == data.examples[0].prompt
    few = measure(model, tokenizer, data.examples, data.end_token_ids, new_tokens=5)
    assert {record["finish"] for record in few.records} == {"length"} and few.answers[0] == "<thin" + CUT


def test_generation_gives_the_mode_back_and_works_in_a_checkpointed_model():
    model, tokenizer = model_of("llama"), byte_tokenizer()
    expected = answer(model, tokenizer, PROMPTS, 6)
    set_memory_options(model.train(), MemoryOptions())
    assert answer(model, tokenizer, PROMPTS, 6) == expected
    assert model.training


def test_sampling_varies_and_greedy_does_not():
    model, tokenizer = model_of("llama"), byte_tokenizer()
    torch.manual_seed(0)
    drawn = {answer(model, tokenizer, [PROMPTS[1]], 8, sampling=Sampling(temperature=5.0))[0] for _ in range(4)}
    assert len(drawn) > 1
    assert len({answer(model, tokenizer, [PROMPTS[1]], 8)[0] for _ in range(4)}) == 1


def test_a_model_s_own_settings_of_generation_do_not_change_its_answers():
    model, tokenizer = model_of("llama"), byte_tokenizer()
    greedy = answer(model, tokenizer, PROMPTS, 12)
    warm = Sampling(temperature=50.0)  # about as likely all
    torch.manual_seed(0)
    drawn = answer(model, tokenizer, PROMPTS, 12, sampling=warm)
    stated = model.generation_config
    stated.repetition_penalty, stated.top_k, stated.min_p, stated.suppress_tokens = 5.0, 2, 0.9, list(range(100, 200))
    assert answer(model, tokenizer, PROMPTS, 12) == greedy
    torch.manual_seed(0)
    assert answer(model, tokenizer, PROMPTS, 12, sampling=warm) == drawn
    assert model.generation_config is stated


def test_sampling_draws_from_every_token():
    model, tokenizer = model_of("llama"), byte_tokenizer()
    torch.manual_seed(0)
    drawn = answer(model, tokenizer, ["a"] * 400, 1, batch_size=400, sampling=Sampling(temperature=50.0))
    assert len(set(drawn)) > 60  # of about 128 that one byte can be; transformers' own setting has 50 in all


def test_with_a_seed_what_is_drawn_depends_on_the_number_of_the_prompt_and_not_on_its_batch():
    model, tokenizer = model_of("llama"), byte_tokenizer()
    warm = Sampling(temperature=3.0, top_p=0.95, seed=7)
    drawn = answers(model, tokenizer, PROMPTS, 12, stop=[2], sampling=warm)
    assert drawn == answers(model, tokenizer, PROMPTS, 12, stop=[2], batch_size=2, sampling=warm)
    alone = [answers(model, tokenizer, [p], 12, [2], sampling=warm, first=i)[0] for i, p in enumerate(PROMPTS)]
    assert drawn == alone
    assert drawn != answers(model, tokenizer, PROMPTS, 12, stop=[2], sampling=replace(warm, seed=8))
    assert len({each.text for each in answers(model, tokenizer, PROMPTS[:1] * 4, 12, sampling=warm)}) == 4


def test_each_token_is_drawn_from_the_softmax_with_the_random_number_of_its_prompt():
    model, tokenizer, count = model_of("llama", rows=False), byte_tokenizer(), 40
    ids = torch.tensor([tokenizer("<s>hello", add_special_tokens=False).input_ids])
    for settings, kept in (({}, VOCABULARY), ({"top_k": 3}, 3)):
        logits = model(input_ids=ids).logits[0, -1].double() / 2.0
        logits[logits < logits.topk(kept).values[-1]] = -torch.inf
        cumulative = logits.softmax(-1).cumsum(-1).numpy()
        random = [np.random.default_rng([5, number]).random(1)[0] for number in range(count)]
        expected = [tokenizer.decode([int(np.argmax(cumulative > u))], skip_special_tokens=True) for u in random]
        sampling = Sampling(temperature=2.0, seed=5, **settings)
        assert answer(model, tokenizer, ["<s>hello"] * count, 1, sampling=sampling) == expected
        assert 1 < len(set(expected)) <= kept


def test_an_answer_says_why_it_ended_and_how_many_tokens_it_has():
    model, tokenizer = model_of("llama"), byte_tokenizer()
    (text,) = answer(model, tokenizer, [PROMPTS[1]], 12)
    letter = next(letter for letter in text if letter.isascii())
    stop = tokenizer(letter, add_special_tokens=False).input_ids
    found, seen = answers(model, tokenizer, PROMPTS, 12, stop, batch_size=2, done=None), []
    assert (found[1].finish, found[1].text[-1]) == ("stop", letter) and {each.finish for each in found} != {"stop"}
    for each in found:  # one byte a token, and no end token behind the first
        assert each.tokens == 12 if each.finish == "length" else each.text.count(letter) == 1
    answers(model, tokenizer, PROMPTS, 1, batch_size=2, done=seen.append)
    assert seen == [2, 4, 5]


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("sampling", [None, Sampling(temperature=1.0, top_p=0.9, seed=1)])
def test_logits_that_are_not_finite_are_an_error_that_names_the_token_unless_the_answer_has_ended(value, sampling):
    model, tokenizer, stop = model_of("llama"), byte_tokenizer(), [VOCABULARY - 1]

    def spoil(row, at, end=None):
        steps = []

        def hook(_head, _inputs, logits):
            steps.append(1)
            if end and len(steps) == end:
                logits[row, -1] = torch.where(torch.arange(VOCABULARY) == stop[0], 0.0, -torch.inf)
            if len(steps) == at:
                logits[row, -1, 7] = value
            return logits

        return model.get_output_embeddings().register_forward_hook(hook)

    with spoil(1, 3), pytest.raises(ModelError, match=r"^token 3 of the answer to prompt 12 .*NaN or infinite"):
        answers(model, tokenizer, ["<s>a", "<s>b"], 4, stop, sampling=sampling, first=10)
    model.train()
    plain = answers(model, tokenizer, ["<s>a", "<s>b"], 4, stop, sampling=sampling)
    with spoil(1, 3, end=2):
        ended = answers(model, tokenizer, ["<s>a", "<s>b"], 4, stop, sampling=sampling)
    assert ended[0] == plain[0] and (ended[1].finish, ended[1].tokens) == ("stop", 2) and model.training


def test_only_what_the_tokenizer_raises_is_called_its_fault(monkeypatch):
    model, tokenizer = model_of("llama"), byte_tokenizer()

    def fail(*_, **__):
        raise Exception("a fault")

    with monkeypatch.context() as patch, pytest.raises(Exception, match=r"^a fault$"):
        patch.setattr(model, "generate", fail)
        answers(model, tokenizer, ["<s>a"], 2)
    for name in ("__call__", "decode"):
        with monkeypatch.context() as patch, pytest.raises(ModelError, match=r"the tokenizer fails \(a fault\)"):
            patch.setattr(type(tokenizer), name, fail)
            answers(model, tokenizer, ["<s>a"], 2)


def test_where_memory_runs_out_fewer_prompts_are_answered_at_once(monkeypatch, caplog):
    model, tokenizer, at_once = model_of("llama"), byte_tokenizer(), []
    expected, real = answer(model, tokenizer, PROMPTS, 6), model.generate

    def generate(input_ids, **options):
        at_once.append(len(input_ids))
        if len(input_ids) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return real(input_ids=input_ids, **options)

    monkeypatch.setattr(model, "generate", generate)
    assert answer(model, tokenizer, PROMPTS, 6) == expected
    assert at_once == [5, 2, 2, 1] and "2 prompts are answered at a time" in caplog.text


@pytest.mark.parametrize(
    ("prompts", "error", "raised", "text"),
    [
        (PROMPTS[:1], torch.OutOfMemoryError, DoesNotFitError, "2 tokens and its answer of at most 6: .*-tokens 8"),
        (PROMPTS, ValueError, ValueError, "as it is"),
    ],
)
def test_one_prompt_too_large_and_other_faults_are_raised(prompts, error, raised, text, monkeypatch):
    model = model_of("llama")

    def generate(**_options):
        raise error("as it is")

    monkeypatch.setattr(model, "generate", generate)
    with pytest.raises(raised, match=text):
        answer(model, byte_tokenizer(), prompts, 6)


@pytest.mark.gpu
@pytest.mark.parametrize("placed", [False, True])
@pytest.mark.parametrize("model_type", sorted({*ARCHITECTURES, *UNUSUAL}))
def test_on_a_gpu_answers_are_those_of_the_cpu(model_type, placed):
    def made():
        if model_type in ARCHITECTURES:
            return quantized_pair(model_type, vocab_size=VOCABULARY)[0]
        return adopt(build_tiny(model_type, vocab_size=VOCABULARY))

    tokenizer, expected = byte_tokenizer(), answer(made(), byte_tokenizer(), PROMPTS, 8)
    model, card = made(), torch.device("cuda", 0)
    options = MemoryOptions(resident_layers=0, host_embeddings=True, host_head=True) if placed else MemoryOptions()
    assert answer(place(model, card, options), tokenizer, PROMPTS, 8) == expected
    assert len(set(expected)) > 1


def test_a_text_with_the_character_that_stands_for_a_picture_is_refused_and_takes_no_picture_along():
    template, reader = SimpleNamespace(picture="<image>"), PictureReader(0, 1, 1)
    for pictures in ([], ["a.png"]):
        with pytest.raises(DataError, match=r"the character U\+FFFC"):
            shown_prompt("<image>" * (len(pictures) + 1), pictures, template, reader)
    assert shown_prompt("what", [], template, reader) == "what"
    session = Session(None, None, 1, Sampling(), [Turn("user", f"{MARK}what"), Turn("assistant", "it")], ["a.png"])
    session.say(f"and {MARK}")
    session.take_back()
    assert session.pictures == ["a.png"] and len(session.turns) == 2
