"""A form gives what rendering gives, and a template that looks at what turns say has none."""

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_random_templates import TOKENIZERS, conversations, forms
from tiny_tokenizer import make_tokenizer

from qlora_lite.data.fast_render import make_form
from qlora_lite.data.mask import render_row
from qlora_lite.data.render import render
from qlora_lite.data.row_formats import ROW_DAY, Conversation, Turn
from qlora_lite.data.template import NAMED_TEMPLATES, choose_template
from qlora_lite.errors import DataError

CHATML = NAMED_TEMPLATES["chatml"]
TALK = (Turn("system", "zero"), Turn("user", "one"), Turn("assistant", "two"))


def template_of(source, tokenizer=None):
    tokenizer = tokenizer or make_tokenizer()
    tokenizer.chat_template = source
    return choose_template(tokenizer)


def form_of(source, turns=TALK):
    return make_form(template_of(source), Conversation(turns, "f:1"))


def outcome(turns, template, form):
    try:
        return render_row(Conversation(turns, "f:1"), template, "last", True, form)
    except DataError as error:
        return str(error)


def assert_fills_as_rendered(form, template, turns):
    conversation = Conversation(turns, "f:1")
    for index in (index for index, turn in enumerate(turns) if turn.role == "assistant"):
        if index in form.answers:
            assert form.fill(template, turns, [index]) == render(template, conversation, [index])
        else:
            with pytest.raises(DataError):
                render(template, conversation, [index])


@settings(deadline=None)
@given(forms(), st.lists(conversations(), min_size=2, max_size=2), st.booleans())
def test_a_form_of_a_random_template_gives_what_rendering_gives(form, talks, adds_begin):
    template = template_of(form.source(), TOKENIZERS[adds_begin])
    first, second = (tuple(Turn(role, content) for role, content, _ in turns) for turns in talks)
    made = make_form(template, Conversation(first, "f:1"))
    assert made is not None
    assert_fills_as_rendered(made, template, first)
    if [turn.role for turn in first] == [turn.role for turn in second]:
        assert_fills_as_rendered(made, template, second)


@pytest.mark.parametrize("code", ["%d %b %Y", "%-d %B", "%A, %j", "%Y-%m-%d %H:%M:%S", "%y%U%p %x", "%F %T", "none"])
def test_a_template_that_writes_the_date_has_a_form_since_the_clock_in_jinja_is_that_of_python(code):
    chatml = "{% set today = strftime_now(format='" + code + "') %}\n  {{ today }}\n" + NAMED_TEMPLATES["chatml"]
    template = template_of(chatml)
    form = make_form(template, Conversation(TALK, "f:1"))
    assert form.own[0].startswith(f"  {ROW_DAY.strftime(code)}\n<|im_start|>")
    assert_fills_as_rendered(form, template, TALK)


@pytest.mark.parametrize("name", NAMED_TEMPLATES)
@settings(deadline=None, max_examples=30)
@given(turns=conversations())
def test_a_form_of_a_named_template_gives_what_rendering_gives(name, turns):
    template = choose_template(TOKENIZERS[True], name)
    turns = tuple(Turn(role, content) for role, content, _ in turns)
    made = make_form(template, Conversation(tuple(Turn(turn.role, "word") for turn in turns), "f:1"))
    assert made is not None
    assert_fills_as_rendered(made, template, turns)


# what a template may do with a turn's words, and the text that it then writes for " x "
WRITES = {
    "{{ m.content }}": " x ",
    "{{ m['content'] }}": " x ",
    "{{ m.get('content') }}": " x ",
    "{{ m.content|trim }}": "x",
    "{{ m.content.strip() }}": "x",
    "{{ m.content.lstrip() + '!' }}": "x !",
    "{{ '!' + m.content.rstrip() }}": "! x",
    "{{ (m.content + '\n')|trim }}": "x",
    "{{ ('!' + m.content + '\n')|trim }}": "! x",
    "{% set words = m.content|trim %}{{ words + '!' }}": "x!",
    "{% set n = namespace(words='') %}{% set n.words = n.words + m.content %}{{ n.words }}": " x ",
    "{% if m.content is string %}{{ m.content }}{% endif %}": " x ",
    "{% if m.content is iterable and m.content is not mapping %}{{ m.content }}{% endif %}": " x ",
    "{{ m.content if m.content else '' }}": " x ",
    "{{ m.content or '' }}": " x ",
    "{% if not m.content %}none{% endif %}{{ m.content }}{{ m.content }}": " x  x ",
    "{{ (messages|first).role + m.content + messages|length|string }}": "user x 2",
    "{% if m == messages[0] %}{% endif %}{{ m.content }}": " x ",
    "{% if m.role in ['user', 'system'] and 'tools' not in m %}{% endif %}{{ m.content }}": " x ",
    "{% generation %}{{ m.content }}{% endgeneration %}": " x ",
}


@pytest.mark.parametrize("words", WRITES)
def test_a_template_that_only_writes_words_has_a_form(words):
    source = "{% for m in messages %}" + words + "{{ eos_token }}{% endfor %}"
    template = template_of(source)
    turns = (Turn("user", " x "), Turn("assistant", " x "))
    made = make_form(template, Conversation((Turn("user", "other"), Turn("assistant", "words")), "f:1"))
    assert made.fill(template, turns, []).text == f"{WRITES[words]}</s>" * 2
    assert_fills_as_rendered(made, template, turns)


LOOKS = [
    "{% if 'x' in m.content %}{% endif %}",  # it is in the words that stand for all
    "{% if m.role in m.content %}{% endif %}{% if m.content + 'x' in m.content %}{% endif %}",
    "{% if m.content.startswith(m.content) %}{% endif %}",
    "{% if 'abc' in 'a' + m.content %}{% endif %}",
    "{% if (m.content + 'a').endswith('a') %}{% endif %}",
    "{% if m.content.startswith('abc', 1) %}{% endif %}",
    "{% if m.content.find('abc') == 0 %}{% endif %}",
    "{% if m.content in 'abc' %}{% endif %}",
    "{% if m.content in ['abc'] %}{% endif %}",
    "{% if m.content == 'abc' %}{% endif %}",
    "{% if 'abc' != m.content %}{% endif %}",
    "{% if m.content < 'abc' %}{% endif %}",
    "{% if m.content|length > 3 %}{% endif %}",
    "{% if m.content|int > 3 %}{% endif %}",
    "{% if m.content is in 'abc' %}{% endif %}",
    "{% if m.content is sameas 'abc' %}{% endif %}",
    "{% if m.content is lower %}{% endif %}",
    "{% if 'abc'.startswith(m.content) %}{% endif %}",
    "{% if 'abc'.count(m.content|trim) %}{% endif %}",
    "{% if ('a' + m.content) == 'abc' %}{% endif %}",
    "{% if (m.content|trim + 'a')[0] == 'b' %}{% endif %}",
    "{% set n = namespace(w='') %}{% set n.w = m.content %}{% if 'x' in n.w %}{% endif %}",
    "{% set n = namespace(w=m.content) %}",
    "{% set w = 'a' ~ m.content %}{% if 'x' in w %}{% endif %}",
    "{% set w %}{{ m.content }}{% endset %}{% if 'x' in w %}{% endif %}",
    "{% macro w() %}{{ m.content }}{% endmacro %}{% if 'x' in w() %}{% endif %}",
    "{% macro w(c) %}{{ c }}{% endmacro %}{{ w(m.content) }}",
    "{% filter upper %}{{ m.content }}{% endfilter %}",
    "{% set w = [m.content]|join %}{% if 'x' in w %}{% endif %}",
    "{% set w = ''.join([m.content]) %}{% if 'x' in w %}{% endif %}",
    "{% set w = '%s' % m.content %}{% if 'x' in w %}{% endif %}",
    "{% set w = '{}'.format(m.content) %}{% if 'x' in w %}{% endif %}",
    "{% set w = 'a'.replace('a', m.content) %}{% if 'x' in w %}{% endif %}",
    "{% set w = m.content|string|upper %}",
    "{% set w = m.content * 2 %}",
    "{% set w = 2 * m.content %}",
    "{% set w = {'abc': 1}[m.content] %}",
    "{% set w = {'abc': 1}.get(m.content) %}",
    "{% set w = m.content.split('x') %}",
    "{% set w = m.content[1:] %}",
    "{% set w = m.content[0] %}",
    "{% set w = m.content|first %}",
    "{% set w = m.content|last %}",
    "{% set w = m.content|list %}",
    "{% set w = m.content|title %}",
    "{% set w = m.content|capitalize %}",
    "{% set w = m.content|reverse %}",
    "{% for letter in m.content %}{% endfor %}",
    "{{ m.content|tojson }}",
    "{{ m|tojson }}",
    "{{ m|string }}",
    "{{ [m.content] }}",
    "{{ {'a': m.content} }}",
    "{{ m.content|e }}",
    "{{ m.content|replace('x', 'y') }}",
    "{{ m.content.removeprefix('x') }}",
    "{{ messages|map(attribute='content')|join }}",
    "{{ messages|selectattr('content', 'equalto', 'x')|list|length }}",
    "{{ messages|sort(attribute='content')|length }}",
    "{% if messages.index(m) == 0 %}{% endif %}",
    "{% if loop.changed(m.content) %}{% endif %}",
    "{% if messages[0] == {'role': 'system', 'content': 'x'} %}{% endif %}",
]


@pytest.mark.parametrize("look", LOOKS)
def test_a_template_that_looks_at_words_has_no_form(look):
    source = CHATML.replace("{{ '<|im_start|>'", look + "{{ '<|im_start|>'", 1)
    assert source != CHATML
    assert form_of(CHATML) is not None
    assert form_of(source) is None


# what a template may ask about a turn's words, and words of which the answer is yes
QUESTIONS = {
    "{% if '</think>' in m.content %}yes{% endif %}{{ m.content }}": "a</think>b",
    "{% if '</think>' not in m.content %}no{% endif %}{{ m.content }}": "a</think>b",
    "{% if m.content.startswith('<r>') %}yes{% endif %}{{ m.content }}": "<r>a",
    "{% if m.content.endswith('</r>') %}yes{% endif %}{{ m.content }}": "a</r>",
    "{% if (m.content|trim).startswith('<r>') %}yes{% endif %}{{ m.content }}": " <r>a",
    "{{ m.content.lstrip('\n') }}": "\na",
    "{{ m.content.rstrip('\n') }}": "a\n",
    "{{ m.content.strip('-*') }}": "*a",
    "{{ m.content|trim('-*') }}": "a-",
    "{{ (m.content|trim).strip('-*') }}": " -a",
    "{% if add_generation_prompt and '</think>' in messages[0].content %}yes{% endif %}{{ m.content }}": "</think>",
}


@pytest.mark.parametrize("asking", QUESTIONS)
def test_rows_fit_the_form_of_a_template_that_asks_questions_if_all_answers_are_no(asking):
    template = template_of("{% for m in messages %}" + asking + "{{ eos_token }}{% endfor %}")
    turns = Turn("user", " other"), Turn("assistant", "words ")
    made = make_form(template, Conversation(turns, "f:1"))
    assert made.fits(turns, []) and made.fits(turns, made.answers)
    assert_fills_as_rendered(made, template, turns)
    for index in (0, 1):
        yes = tuple(Turn(turn.role, QUESTIONS[asking]) if i == index else turn for i, turn in enumerate(turns))
        answered = not made.fits(yes, [])
        assert answered or (index == 1 and "add_generation_prompt" in asking)
        assert outcome(yes, template, made) == outcome(yes, template, None)


# in the manner of models that think: asks where the thoughts of an answer end, and writes them for the last one alone
THINKS = """
{%- set n = namespace(asking=true, last_question=messages|length - 1) %}
{%- for m in messages[::-1] %}
    {%- set place = (messages|length - 1) - loop.index0 %}
    {%- if n.asking and m.role == 'user' and not (m.content.startswith('<r>') and m.content.endswith('</r>')) %}
        {%- set n.asking = false %}
        {%- set n.last_question = place %}
    {%- endif %}
{%- endfor %}
{%- for m in messages %}
    {%- set content = m.content if m.content is string else '' %}
    {%- if m.role == 'assistant' %}
        {%- set thoughts = '' %}
        {%- if '</think>' in content %}
            {%- set thoughts = content.split('</think>')[0].split('<think>')[-1] %}
            {%- set content = content.split('</think>')[-1].lstrip('\n') %}
        {%- endif %}
        {{- '<|im_start|>assistant\n' }}
        {%- if loop.index0 > n.last_question %}
            {{- '<think>\n' + thoughts.strip('\n') + '\n</think>\n\n' + content.lstrip('\n') }}
        {%- else %}
            {{- content }}
        {%- endif %}
        {{- '<|im_end|>\n' }}
    {%- else %}
        {{- '<|im_start|>' + m.role + '\n' + content + '<|im_end|>\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\n' }}
{%- endif %}"""
said = st.sampled_from(
    ["a", " b ", "\nc", "<r>d", "<r>e</r>", "<think>\nf\n</think>\n\ng", "h</think>", "\n</think>\n"]
)


@settings(deadline=None)
@given(st.lists(said, min_size=5, max_size=5))
def test_rows_of_a_template_that_writes_thoughts_are_those_that_rendering_gives(contents):
    template = template_of(THINKS)
    roles = ("system", "user", "assistant", "user", "assistant")
    turns = tuple(Turn(role, content) for role, content in zip(roles, contents, strict=True))
    made = make_form(template, Conversation(turns, "f:1"))
    assert made.fits(tuple(Turn(role, "word") for role in roles), [4])
    assert outcome(turns, template, made) == outcome(turns, template, None)


def test_a_row_whose_answers_the_form_does_not_have_does_not_fit():
    assert not form_of("{% for m in messages %}{{ m.content }}{{ eos_token }}{% endfor %}").fits(TALK, [0])


def test_a_template_that_looks_at_words_where_it_prompts_alone_has_no_form_either():
    prompt = "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}"
    assert prompt in CHATML
    looks = "{% if add_generation_prompt %}{% if messages[-1].content == '/no_think' %}{% endif %}{{ '<|im_start|>"
    source = CHATML.replace(prompt, looks + "assistant\n' }}")
    assert render(template_of(source), Conversation(TALK, "f:1"), [2]).text.endswith("two<|im_end|>\n")
    assert form_of(source) is None


def test_a_template_that_looks_at_words_where_an_answer_is_the_last_alone_has_no_form_either():
    source = "{% if messages|length == 3 and messages[2].content == 'x' %}{% endif %}" + CHATML
    longer = (*TALK, *TALK[1:])
    render(template_of(source), Conversation(longer, "f:1"), [2, 4])
    assert form_of(CHATML, longer) is not None and form_of(source, longer) is None


def test_rows_with_tools_calls_or_results_have_no_form():
    call = {"type": "function", "function": {"name": "f", "arguments": {}}}
    tool = {"type": "function", "function": {"name": "f"}}
    template = template_of(CHATML)
    assert make_form(template, Conversation((TALK[1], Turn("assistant", "x", calls=(call,))), "f:1")) is None
    assert make_form(template, Conversation((*TALK, Turn("tool", "x"), TALK[2]), "f:1")) is None
    assert make_form(template, Conversation(TALK, "f:1", (tool,))) is None


def test_a_template_that_fails_or_writes_something_else_here_than_in_transformers_has_no_form():
    assert form_of("{{ raise_exception('no') }}") is None
    assert form_of("{% for m in messages %}") is None
    assert form_of(CHATML + "{{ range(1000)|random }}") is None
    assert form_of(CHATML + "{{ lipsum() }}") is None


@pytest.mark.timeout(60)
def test_a_template_that_does_its_harm_where_words_cannot_be_looked_at_alone_has_no_form():
    loops = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
    for harm in (loops, "{{ 'a' * 10**10 }}"):
        template = template_of("{% if range(3) is not iterable %}" + harm + "{% endif %}" + CHATML)
        assert render(template, Conversation(TALK, "f:1"), [2]).text.endswith("two<|im_end|>\n")
        assert make_form(template, Conversation(TALK, "f:1")) is None


def test_words_may_hold_what_marks_the_places_of_a_form():
    template = template_of(CHATML)
    turns = (Turn("user", "\u2002qzx1xzq\u2003"), Turn("assistant", "qzx0xzq"))
    made = make_form(template, Conversation(turns, "f:1"))
    assert_fills_as_rendered(made, template, turns)


def test_an_answer_that_cannot_be_found_is_left_to_rendering():
    thinks = CHATML.replace("+ m.content", "+ ('<think>' if m.role == 'assistant' and loop.last else '') + m.content")
    turns = (*TALK, *TALK[1:])
    made = form_of(thinks, turns)
    assert set(made.answers) == {4}
    assert_fills_as_rendered(made, template_of(thinks), turns)


@pytest.mark.parametrize("token", ["<|im_end|>", "</s>"])
def test_a_special_token_inside_a_turn_is_an_error_of_the_form_too(token):
    template = template_of(CHATML)
    turns = (TALK[1], Turn("assistant", f"x{token}y"))
    made = make_form(template, Conversation(TALK[1:], "f:1"))
    with pytest.raises(DataError, match=re.escape(f"turn 2 holds the text {token!r}")):
        made.fill(template, turns, [1])


@pytest.mark.parametrize("prompt", ["<think>", "{{ '<think>' if messages[-1].content == 'one' else '' }}"])
def test_a_generation_block_that_may_begin_with_what_the_prompt_writes_is_found_row_by_row(prompt):
    template = template_of(
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{% if m.role == 'assistant' %}{% generation %}"
        "{{ m.content + '<|im_end|>' }}{% endgeneration %}{% else %}{{ m.content + '<|im_end|>' }}{% endif %}"
        "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}" + prompt + "{% endif %}"
    )
    form, starts = make_form(template, Conversation(TALK, "f:1")), []
    for words in ("two", "<think>two"):
        turns = (*TALK[:2], Turn("assistant", words))
        row = outcome(turns, template, form)
        assert row == outcome(turns, template, None)
        starts.append(row.text[row.answers[-1][0] :])
    assert starts == ["two<|im_end|>"] * 2
