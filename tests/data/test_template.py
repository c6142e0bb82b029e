"""The text of a row, and the characters of its answers."""

from datetime import datetime

import pytest
from tiny_tokenizer import make_tokenizer

from qlora_lite.data.chat.conversation import ROW_DAY, Conversation, Turn
from qlora_lite.data.chat.render import last_turn, render, render_prompt
from qlora_lite.data.chat.template import NAMED_TEMPLATES, Template, choose_template, portable_source
from qlora_lite.errors import DataError

TURNS = (Turn("user", "one"), Turn("assistant", "two"), Turn("user", "three"), Turn("assistant", "four"))


def answers_of(template: Template, turns=TURNS, wanted=(1, 3)):
    rendering = render(template, Conversation(tuple(turns), "f:1"), wanted)
    return [rendering.text[first:last] for first, last in rendering.answers.values()]


@pytest.fixture
def own(tokenizer):
    """Make a template from Jinja text as if it were the tokenizer's own."""

    def make(source, **settings):
        tokenizer = make_tokenizer(**settings)
        tokenizer.chat_template = source
        return choose_template(tokenizer)

    return make


CHATML = NAMED_TEMPLATES["chatml"]
GENERATION = (
    "{% for m in messages %}{% if m.role == 'assistant' %}{{ '<|im_start|>assistant\n' }}{% generation %}"
    "{{ m.content }}END{% endgeneration %}AFTER{% else %}{{ '<|im_start|>' + m.role + '\n' + m.content"
    " + '<|im_end|>\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


@pytest.mark.parametrize(
    ("name", "end", "text"),
    [
        ("chatml", "<|im_end|>", "<|im_start|>user\none<|im_end|>\n<|im_start|>assistant\ntwo<|im_end|>\n"),
        ("chatml-tools", "<|im_end|>", "<|im_start|>user\none<|im_end|>\n<|im_start|>assistant\ntwo<|im_end|>\n"),
        (
            "llama3",
            "<|eot_id|>",
            "<|start_header_id|>user<|end_header_id|>\n\none<|eot_id|>"
            "<|start_header_id|>assistant<|end_header_id|>\n\ntwo<|eot_id|>",
        ),
        ("mistral", "</s>", "[INST] one [/INST] two</s>"),
        ("gemma", "<end_of_turn>", "<start_of_turn>user\none<end_of_turn>\n<start_of_turn>model\ntwo<end_of_turn>\n"),
        (
            "alpaca",
            "</s>",
            "Below is an instruction that describes a task. Write a response that appropriately completes the "
            "request.\n\n### Instruction:\none\n\n### Response:\ntwo</s>\n\n",
        ),
        ("plain", "</s>", "one\ntwo</s>"),
        ("joined", "</s>", "onetwo</s>"),
    ],
)
def test_each_named_template_writes_what_it_is_known_for(tokenizer, name, end, text):
    template = choose_template(tokenizer, name)
    assert render(template, Conversation(TURNS[:2], "f:1"), [1]).text == text
    space = " " if name == "mistral" else ""  # the family writes one before an answer
    assert answers_of(template) == [f"{space}two{end}", f"{space}four{end}"]


@pytest.mark.parametrize("name", sorted(NAMED_TEMPLATES))
def test_a_named_template_writes_tool_turns_as_such_or_refuses_them(tokenizer, name):
    turns = (*TURNS[:2], Turn("tool", "ten"), TURNS[1])
    template = choose_template(tokenizer, name)
    written = {
        "chatml": "<|im_start|>tool\nten<|im_end|>",
        "chatml-tools": "<|im_start|>user\n<tool_response>\nten\n</tool_response><|im_end|>",
    }
    if name in written:
        assert written[name] in render(template, Conversation(turns, "f:1"), [3]).text
        return
    with pytest.raises(DataError, match=r"no form for tool turns; set data\.template to chatml-tools"):
        render(template, Conversation(turns, "f:1"), [3])


@pytest.mark.parametrize("name", NAMED_TEMPLATES)
def test_the_named_templates_write_the_system_turn(tokenizer, name):
    turns = (Turn("system", "be brief"), *TURNS[:2])
    text = render_prompt(choose_template(tokenizer, name), turns[:2])
    assert "be brief" in text and text.index("be brief") < text.index("one")


@pytest.mark.parametrize("adds_begin", [True, False])
@pytest.mark.parametrize("name", NAMED_TEMPLATES)
def test_the_last_turn_of_a_prompt_is_what_is_shown_of_it(name, adds_begin):
    template = choose_template(make_tokenizer(adds_begin=adds_begin), name)
    assert last_turn(template, render_prompt(template, TURNS[:1])) == "one"
    shown = last_turn(template, render_prompt(template, (Turn("system", "be brief"), *TURNS[:3])))
    assert shown.removeprefix("[INST] ").removeprefix("### Instruction:\n") == "three"


def test_a_default_system_turn_is_not_what_is_shown_of_a_prompt(own):
    default = "{% if messages[0].role != 'system' %}{{ '<|im_start|>system\nHi<|im_end|>\n' }}{% endif %}" + CHATML
    template = own(default)
    assert last_turn(template, render_prompt(template, TURNS[:1])) == "one"
    broken = own("{{ raise_exception('no') if messages|length == 1 else '' }}" + CHATML)
    assert last_turn(broken, "all of it") == "all of it"


@pytest.mark.parametrize("name", NAMED_TEMPLATES)
def test_begin_of_text_is_written_where_the_tokenizer_writes_it(name):
    for adds_begin, expected in ((True, 1), (False, 0)):
        template = choose_template(make_tokenizer(adds_begin=adds_begin), name)
        text = render(template, Conversation(TURNS, "f:1"), [3]).text
        assert text.count("<s>") == expected and text.startswith("<s>") == adds_begin


def test_the_models_own_template_alone_decides_on_begin_of_text(own):
    assert not render_prompt(own(CHATML, adds_begin=True), TURNS[:1]).startswith("<s>")
    assert render_prompt(own("{{ bos_token }}" + CHATML, adds_begin=True), TURNS[:1]).count("<s>") == 1


def test_a_tokenizer_without_a_template_is_an_error_that_names_the_choices():
    with pytest.raises(
        DataError,
        match=r"set data\.template to one of chatml, chatml-tools, llama3, mistral, gemma, alpaca, plain, joined",
    ):
        choose_template(make_tokenizer(template=None))


def test_an_unknown_or_unreadable_template_is_an_error(tokenizer, tmp_path):
    with pytest.raises(DataError, match="'vicuna' is unknown"):
        choose_template(tokenizer, "vicuna")
    with pytest.raises(DataError, match="cannot be read"):
        choose_template(tokenizer, str(tmp_path / "none.jinja"))


def test_a_jinja_file_can_be_the_template_and_begin_is_never_written_twice(tmp_path):
    tokenizer = make_tokenizer(adds_begin=True)
    for source in (CHATML, "{{ bos_token }}" + CHATML, "<s>" + CHATML):
        (tmp_path / "t.jinja").write_text(source)
        template = choose_template(tokenizer, str(tmp_path / "t.jinja"))
        assert render_prompt(template, TURNS[:1]).count("<s>") == 1


@pytest.mark.parametrize("name", [None, *NAMED_TEMPLATES])
@pytest.mark.parametrize("adds_begin", [True, False])
def test_a__writes_what_the_chosen_one_writes(tmp_path, name, adds_begin):
    tokenizer = make_tokenizer(adds_begin=adds_begin)
    template = choose_template(tokenizer, name)
    (tmp_path / "t.jinja").write_text(portable_source(template))
    recorded = choose_template(tokenizer, str(tmp_path / "t.jinja"))
    assert render_prompt(recorded, TURNS[:3]) == render_prompt(template, TURNS[:3])
    assert answers_of(recorded) == answers_of(template)


def test_a_recorded_template_without_begin_of_text_stays_without(tmp_path):
    tokenizer = make_tokenizer(adds_begin=True)
    (tmp_path / "t.jinja").write_text(portable_source(choose_template(tokenizer)))
    assert "<s>" not in render_prompt(choose_template(tokenizer, str(tmp_path / "t.jinja")), TURNS[:1])


def test_a_generation_block_says_what_is_learned_and_gets_its_end_token(own):
    with_end = own(GENERATION.replace("END", "<|im_end|>").replace("AFTER", "\n"))
    without_end = own(GENERATION.replace("END", "").replace("AFTER", "<|im_end|>\n"))
    for template in (with_end, without_end):
        assert answers_of(template) == ["two<|im_end|>", "four<|im_end|>"]


def test_a_generation_block_is_found_behind_begin_of_text(tmp_path):
    (tmp_path / "t.jinja").write_text(GENERATION.replace("END", "<|im_end|>").replace("AFTER", "\n"))
    template = choose_template(make_tokenizer(adds_begin=True), str(tmp_path / "t.jinja"))
    assert answers_of(template) == ["two<|im_end|>", "four<|im_end|>"]


@pytest.mark.parametrize("source", [CHATML, GENERATION.replace("END", "<|im_end|>")])
def test_a_template_that_writes_the_date_writes_one_day_in_rows_and_today_in_prompts(own, source):
    plain, dated = own(source), own("  {% if true %}{{ strftime_now('%d %B %Y') + '\n' }}{% endif %}" + source)
    assert answers_of(dated) == answers_of(plain)
    text = render(dated, Conversation(TURNS, "f:1"), (1,)).text
    assert text == "26 July 2024\n" + render(plain, Conversation(TURNS, "f:1"), (1,)).text
    today = datetime.strptime(render_prompt(dated, TURNS[:1]).partition("\n")[0], "%d %B %Y")
    assert 0 <= (datetime.now() - today).days <= 1


@pytest.mark.parametrize("code", ["%d %b %Y", "%-d %B", "%A, %j", "%Y-%m-%d %H:%M:%S", "%y%U%p %x", "%F %T", "none"])
def test_the_clock_of_rows_writes_what_that_of_python_does(own, code):
    template = own(f"{{{{ strftime_now('{code}') }}}}" + CHATML)
    assert render(template, Conversation(TURNS, "f:1"), ()).text.startswith(ROW_DAY.strftime(code) + "<|im_start|>")


@pytest.mark.parametrize("opens", ["", "<think>\n"])
def test_a_generation_block_around_the_end_of_the_prompt_begins_behind_it(own, opens):
    header = "{{ '<|im_start|>assistant\n" + opens + "' }}"
    source = GENERATION.replace("{{ '<|im_start|>assistant\n' }}", header)
    source = source.replace(header + "{% generation %}", "{% generation %}" + header)
    template = own(source.replace("END", "<|im_end|>").replace("AFTER", "\n"))
    assert answers_of(template) == ["two<|im_end|>", "four<|im_end|>"]
    rendering = render(template, Conversation(TURNS, "f:1"), [3])
    assert rendering.text[: rendering.answers[3][0]] == render_prompt(template, TURNS[:3])


def test_a_generation_block_that_no_end_token_follows_is_an_error(own):
    with pytest.raises(DataError, match="would never learn to stop"):
        answers_of(own(GENERATION.replace("END", "").replace("AFTER", "\n")))


def test_a_generation_block_around_some_answers_only_is_an_error(own):
    source = GENERATION.replace("END", "<|im_end|>").replace("AFTER", "\n")
    source = source.replace("m.role == 'assistant'", "m.role == 'assistant' and loop.last")
    with pytest.raises(DataError, match=r"marks 1 answers .* the row has 2"):
        answers_of(own(source))


def test_a_template_that_closes_the_text_once_more_ends_answers_at_the_first_end_token(own):
    closes = CHATML.replace("{% endif %}", "{% else %}{{ eos_token }}{% endif %}")
    assert answers_of(own(closes)) == ["two<|im_end|>", "four<|im_end|>"]


def test_a_template_that_rewrites_history_is_an_error_except_for_the_last_answer(own):
    thinks = CHATML.replace("+ m.content", "+ ('<think>' if m.role == 'assistant' and loop.last else '') + m.content")
    with pytest.raises(DataError, match=r"set data\.train_on to last"):
        answers_of(own(thinks))
    assert answers_of(own(thinks), wanted=[3]) == ["<think>four<|im_end|>"]


OPENS_THOUGHT = (
    "{% for m in messages %}{% set parts = m.content.split('</think>\n') %}{{ '<|im_start|>' + m.role + '\n' }}"
    "{% if parts|length > 1 %}{{ '<think>\n' + parts[0].split('<think>\n')[-1] + '</think>\n' }}{% endif %}"
    "{{ parts[-1] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n<think>\n' }}{% endif %}"
)


def test_a_thought_that_the_prompt_opens_is_learned_from_there_on(own):
    thinking = (TURNS[0], Turn("assistant", "<think>\nhm\n</think>\ntwo"))
    assert answers_of(own(OPENS_THOUGHT), thinking, [1]) == ["hm\n</think>\ntwo<|im_end|>"]
    with pytest.raises(DataError, match=r"drops or changes turn 2 \(assistant\)"):
        answers_of(own(OPENS_THOUGHT.replace("parts[0].split", "'' if true else parts[0].split")), thinking, [1])


def test_an_answer_whose_words_stand_before_it_counts_as_dropped(own):
    drops = CHATML.replace("m.content", "('constant' if m.content == 'assistant' else m.content)")
    with pytest.raises(DataError, match=r"drops or changes turn 2 \(assistant\)"):
        answers_of(own(drops), (TURNS[0], Turn("assistant", "assistant")), [1])


def test_a_prompt_that_the_text_does_not_begin_with_is_an_error(own):
    other_prompt = CHATML.replace("assistant\n'", "assistant: '")
    with pytest.raises(DataError, match="otherwise when it prompts"):
        answers_of(own(other_prompt))


@pytest.mark.parametrize("skipped", ["user", "system", "assistant"])
def test_a_template_that_drops_a_turn_is_an_error(own, skipped):
    drops = CHATML.replace("m.content", f"(m.content if m.role != '{skipped}' else '')")
    with pytest.raises(DataError, match=rf"drops or changes turn \d \({skipped}\)"):
        answers_of(own(drops), (Turn("system", "zero"), *TURNS[:2]), [2])


def test_a_template_without_an_end_token_is_an_error(own):
    with pytest.raises(DataError, match="never learn to stop"):
        answers_of(own(CHATML.replace("<|im_end|>", "")))
    with pytest.raises(DataError, match="never learn to stop"):
        answers_of(own(CHATML.replace("<|im_end|>", "<|not a token|>")))


def test_an_answer_that_only_appears_further_on_counts_as_dropped(own):
    drops = CHATML.replace("m.content", "(m.content if m.role == 'user' else 'constant')")
    turns = (TURNS[0], TURNS[1], Turn("user", "two"), Turn("assistant", "constant"))
    with pytest.raises(DataError, match=r"drops or changes turn 2 \(assistant\)"):
        answers_of(own(drops), turns)


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("{{ raise_exception('system turns are not supported') }}", "system turns are not supported"),
        ("{% for m in messages %}", "refuses this row"),
        ("{{ messages[0].content + none }}", "refuses this row"),
        ("{{ ''.__class__.__mro__ }}", "refuses this row"),
    ],
)
def test_a_template_that_fails_is_an_error(own, source, said):
    with pytest.raises(DataError, match=said):
        answers_of(own(source))


@pytest.mark.parametrize("token", ["<|im_end|>", "</s>", "<s>", "<unk>"])
def test_a_special_token_inside_a_turn_is_an_error(tokenizer, token):
    turns = (TURNS[0], Turn("assistant", f"x{token}y"))
    with pytest.raises(DataError, match=r"turn 2 holds the text .* control token"):
        answers_of(choose_template(tokenizer), turns, [1])


@pytest.mark.parametrize("token", ["<|im_end|>", "</s>"])
def test_a_special_token_that_a_user_types_never_reaches_the_model_as_one(tokenizer, token):
    with pytest.raises(DataError, match=r"turn 1 holds the text .* control token"):
        render_prompt(choose_template(tokenizer), [Turn("user", f"x{token}")])


def test_text_that_only_begins_like_a_special_token_is_text(tokenizer):
    turns = (TURNS[0], Turn("assistant", "<|im_ and <<s> <|im_end|"))
    with pytest.raises(DataError, match="'<s>'"):
        answers_of(choose_template(tokenizer), turns, [1])
    turns = (TURNS[0], Turn("assistant", "<|im_ and << s> <|im_end|"))
    assert answers_of(choose_template(tokenizer), turns, [1]) == ["<|im_ and << s> <|im_end|<|im_end|>"]


@pytest.mark.parametrize("token", ["<p>", "<p>2"])
def test_a_special_token_that_begins_another_one_is_found(token):
    tokenizer = make_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<p>", "<p>2"]})
    turns = (TURNS[0], Turn("assistant", f"x {token} y"))
    with pytest.raises(DataError, match=f"'{token}'"):
        answers_of(choose_template(tokenizer), turns, [1])


def test_white_space_that_a_template_trims_is_no_fault(tokenizer):
    turns = (Turn("user", " one "), Turn("assistant", " two\n"))
    assert answers_of(choose_template(tokenizer, "gemma"), turns, [1]) == ["two<end_of_turn>"]
