"""Choose a chat template: the model's own, one of the named ones, or a file (such as the one that a run recorded).

Templates are Jinja, rendered by transformers in its sandbox. All but the named ones are tried out once under limits
(see ``probe``) before they are used.

Begin-of-text: the tokenizer's own template is the authority. The named templates and plain documents get it exactly
when the tokenizer puts it before ordinary text.

The named templates are for models that come without one, in the form their families are known for. They are written
here from the published formats and are shorter than the models' own: no dates, no default system message. chatml-tools
writes tool definitions, calls and results; of the others, all but chatml refuse rows with tool turns: the families
write those in forms of their own, and a result written as if the user or the model had said it would teach the wrong
thing. Llama 3.1's and Mistral's forms of calls are not here: Llama's takes one call per turn and Mistral's wants call
ids that most rows lack, and the models that know them bring a template that writes them.

| name         | ends answers with | format                                                                     |
|--------------|-------------------|----------------------------------------------------------------------------|
| chatml       | <|im_end|>        | OpenAI's ChatML; Qwen, SmolLM                                              |
| chatml-tools | <|im_end|>        | ChatML with <tool_call> and <tool_response>; Hermes 2 Pro, Qwen 2.5 and 3  |
| llama3       | <|eot_id|>        | Llama 3                                                                    |
| mistral      | end of text       | [INST] ... [/INST]; the system message is put before the first user turn  |
| gemma        | <end_of_turn>     | Gemma 1 to 3; the system message is put before the first user turn         |
| alpaca       | end of text       | Stanford Alpaca's "### Instruction:"                                       |
| plain        | end of text       | prompt, line end, answer: for base models                                  |
| joined       | end of text       | prompt and answer as they are, nothing between: for base models            |

joined is what trl makes of prompt and completion as text. plain does not look at the answer to leave its line end out
where that begins with a space: a prompt for an answer to come would be written otherwise than in training.
Where a tokenizer has no <|im_end|>, chatml-tools ends turns with its own end token (``choose_template``), so
that rows with tools can be trained on with any tokenizer.

source: the chat templates of Qwen2.5-7B-Instruct and Qwen3-8B for the words of chatml-tools.
"""

import json
import os
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from qlora_lite.errors import DataError, tokenizer_faults

from .probe import probe
from .tokenizer_facts import can_be_cut, lengths_of_tokens

if TYPE_CHECKING:  # transformers takes seconds to import, and a check of a recipe needs none of it
    from transformers import PreTrainedTokenizerFast

IM_END = "<|im_end|>"
CHATML_TOOLS = "chatml-tools"

_ALPACA_OPENING = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request."
)
_NO_TOOLS = (
    "{% for m in messages if m.role == 'tool' %}{{ raise_exception('it has no form for tool turns') }}{% endfor %}"
)
NAMED_TEMPLATES = {
    "chatml": (
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    ),
    CHATML_TOOLS: (
        "{% if tools %}{{ '<|im_start|>system\n' }}"
        "{% if messages[0].role == 'system' %}{{ messages[0].content + '\n\n' }}{% endif %}"
        "{{ '# Tools\n\nYou may call one or more functions to assist with the user query.\n\nYou are provided with "
        "function signatures within <tools></tools> XML tags:\n<tools>' }}"
        "{% for tool in tools %}{{ '\n' }}{{ tool | tojson }}{% endfor %}"
        "{{ '\n</tools>\n\nFor each function call, return a json object with function name and arguments within "
        '<tool_call></tool_call> XML tags:\n<tool_call>\n{"name": <function-name>, "arguments": <args-json-object>}\n'
        "</tool_call><|im_end|>\n' }}{% endif %}"
        "{% for m in messages %}{% if m.role == 'tool' %}"
        "{% if loop.previtem.role != 'tool' %}{{ '<|im_start|>user' }}{% endif %}"
        "{{ '\n<tool_response>\n' + m.content + '\n</tool_response>' }}"
        "{% if loop.last or loop.nextitem.role != 'tool' %}{{ '<|im_end|>\n' }}{% endif %}"
        "{% elif m.role != 'system' or not tools %}"
        "{{ '<|im_start|>' + m.role }}{% if m.content %}{{ '\n' + m.content }}{% endif %}"
        "{% for call in m.tool_calls or [] %}"
        "{{ '\n<tool_call>\n{\"name\": ' }}{{ call.function.name | tojson }}{{ ', \"arguments\": ' }}"
        "{{ call.function.arguments | tojson }}{{ '}\n</tool_call>' }}{% endfor %}"
        "{{ '<|im_end|>\n' }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    ),
    "llama3": (
        _NO_TOOLS
        + "{% for m in messages %}{{ '<|start_header_id|>' + m.role + '<|end_header_id|>\n\n' + m.content|trim"
        " + '<|eot_id|>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
    ),
    "mistral": (
        _NO_TOOLS + "{% set n = namespace(system='') %}{% for m in messages %}{% if m.role == 'system' %}"
        "{% set n.system = m.content + '\n\n' %}{% elif m.role == 'user' %}"
        "{{ '[INST] ' + n.system + m.content|trim + ' [/INST]' }}{% set n.system = '' %}"
        "{% else %}{{ ' ' + m.content|trim + eos_token }}{% endif %}{% endfor %}"
    ),
    "gemma": (
        _NO_TOOLS + "{% set n = namespace(system='') %}{% for m in messages %}{% if m.role == 'system' %}"
        "{% set n.system = m.content|trim + '\n\n' %}{% else %}"
        "{{ '<start_of_turn>' + ('model' if m.role == 'assistant' else 'user') + '\n' + n.system"
        " + m.content|trim + '<end_of_turn>\n' }}{% set n.system = '' %}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
    ),
    "alpaca": (
        _NO_TOOLS + "{% if messages[0].role != 'system' %}{{ '" + _ALPACA_OPENING + "\n\n' }}{% endif %}"
        "{% for m in messages %}{% if m.role == 'system' %}{{ m.content + '\n\n' }}"
        "{% elif m.role == 'user' %}{{ '### Instruction:\n' + m.content + '\n\n' }}"
        "{% else %}{{ '### Response:\n' + m.content + eos_token + '\n\n' }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '### Response:\n' }}{% endif %}"
    ),
    "plain": (
        _NO_TOOLS
        + "{% for m in messages %}{{ m.content + (eos_token if m.role == 'assistant' else '\n') }}{% endfor %}"
    ),
    "joined": (
        _NO_TOOLS + "{% for m in messages %}{{ m.content }}{% if m.role == 'assistant' %}{{ eos_token }}"
        "{% elif m.role == 'system' %}{{ '\n' }}{% endif %}{% endfor %}"
    ),
}


@dataclass(frozen=True, slots=True)
class Template:
    """Hold a chat template with what is needed to render it.

    Args:
        name: "model" for the tokenizer's own, a name of NAMED_TEMPLATES, or the path of a .jinja file.
        source: the Jinja text.
        tokenizer: supplies the special tokens.
        begin: text written before every rendering: begin-of-text, or "".
        special: matches any special token of the tokenizer.
        ending: matches the special tokens and white space that end a text; group 1 is the first token.
        cut: ``special`` where a text may be cut before each match and tokenised piece by piece, else None.
        special_ids: the ids of the special tokens.
        token_lengths: see ``tokenizer_facts.lengths_of_tokens``.
        picture: what stands for a picture in what it writes; "" where turns are text alone.
        takes_parts: whether it is given turns as lists of parts, as those of vision-language models want them.
    """

    name: str
    source: str
    tokenizer: "PreTrainedTokenizerFast"
    begin: str
    special: re.Pattern[str]
    ending: re.Pattern[str]
    cut: re.Pattern[str] | None
    special_ids: frozenset[int]
    token_lengths: np.ndarray | None = field(compare=False)
    picture: str = ""
    takes_parts: bool = False


@tokenizer_faults()
def choose_template(tokenizer: "PreTrainedTokenizerFast", name: str | None = None, own: str | None = None) -> Template:
    """Choose the chat template of a run.

    Args:
        tokenizer: the model's tokenizer.
        name: None for the tokenizer's own, a name of NAMED_TEMPLATES, or the path of a file ending in .jinja.
        own: Jinja text that stands for the tokenizer's own; None is what it has.

    Raises:
        DataError: there is no such template, or the tokenizer has none of its own.
    """
    names = ", ".join(NAMED_TEMPLATES)
    if name is None:
        if own is not None:
            return _template("model", own, tokenizer, "")
        if not tokenizer.chat_template:
            raise DataError(
                f"the tokenizer has no chat template; set data.template to one of {names} (plain suits a "
                "base model) or to a .jinja file"
            )
        try:
            return _template("model", tokenizer.get_chat_template(), tokenizer, "")
        except ValueError as error:
            raise DataError(
                "the tokenizer has several chat templates and no default; set data.template to one of "
                f"{names} or to a .jinja file"
            ) from error
    if name in NAMED_TEMPLATES:
        source = NAMED_TEMPLATES[name]
        if name == CHATML_TOOLS and IM_END not in _special_tokens(tokenizer):
            source = source.replace(IM_END, "' + eos_token + '")
        return _template(name, source, tokenizer, begin_of_text(tokenizer))
    if not name.endswith(".jinja"):
        raise DataError(f"data.template {name!r} is unknown; choose one of {names}, or a file ending in .jinja")
    try:
        source = Path(os.path.expanduser(name)).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"data.template {name!r} cannot be read ({error})") from error
    return _template(name, source, tokenizer, "" if _mentions_begin(source, tokenizer) else begin_of_text(tokenizer))


def template_in(folder: Path) -> str | None:
    """Return the chat template that a tokenizer's files in a folder hold; None where there is none.

    Raises:
        DataError: it cannot be read, or there are several and no default.
    """
    file, config = folder / "chat_template.jinja", folder / "tokenizer_config.json"
    try:
        if file.is_file():
            return file.read_text(encoding="utf-8") or None
        found = json.loads(config.read_text(encoding="utf-8")).get("chat_template") if config.is_file() else None
        if isinstance(found, list):
            found = {each["name"]: each["template"] for each in found}["default"]
        if not isinstance(found, str | None):
            raise TypeError(f"{found!r} is no text")
    except (OSError, ValueError, AttributeError, KeyError, TypeError, RecursionError) as error:
        raise DataError(f"{folder} has a chat template that cannot be read ({error!r}); write it as {file}") from error
    return found or None


def portable_source(template: Template) -> str:
    """Return Jinja text that, as a .jinja file, writes all that this template does, begin-of-text or none included."""
    if template.begin:
        return "{{ bos_token }}" + template.source
    tokenizer = template.tokenizer
    is_silent = begin_of_text(tokenizer) and not _mentions_begin(template.source, tokenizer)
    return "{{ '' if bos_token else '' }}" + template.source if is_silent else template.source


def _mentions_begin(source: str, tokenizer: "PreTrainedTokenizerFast") -> bool:
    """Return whether a template takes care of begin-of-text itself."""
    return "bos_token" in source or (tokenizer.bos_token or "\0") in source


def _template(name: str, source: str, tokenizer: "PreTrainedTokenizerFast", begin: str) -> Template:
    if source not in NAMED_TEMPLATES.values():
        probe(name, source, tokenizer.special_tokens_map)
    special = re.compile(_any_of(_special_tokens(tokenizer)) or r"(?!)")
    ending = re.compile(rf"({special.pattern})(?:\s|{special.pattern})*\Z")
    cut = special if can_be_cut(tokenizer) else None
    lengths = lengths_of_tokens(tokenizer)
    return Template(name, source, tokenizer, begin, special, ending, cut, special_ids_of(tokenizer), lengths)


def _any_of(words: set[str]) -> str:
    """Return a regular expression that matches the longest of the words, branching letter by letter.

    A plain word|word|... tries every word at every "<"; with the 6,249 of Gemma
    that took as long as rendering.
    """
    after: dict[str, set[str]] = {}
    for word in filter(None, words):
        after.setdefault(word[0], set()).add(word[1:])
    branches = "|".join(re.escape(letter) + _any_of(rest) for letter, rest in sorted(after.items()))
    return f"(?:{branches}){'?' if '' in words else ''}" if branches else ""


def _special_tokens(tokenizer: "PreTrainedTokenizerFast") -> set[str]:
    return {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}


def special_ids_of(tokenizer: "PreTrainedTokenizerFast") -> frozenset[int]:
    """Return the ids of the tokenizer's special tokens."""
    return frozenset(index for index, token in tokenizer.added_tokens_decoder.items() if token.special)


def begin_of_text(tokenizer: "PreTrainedTokenizerFast") -> str:
    """Return the begin-of-text token if the tokenizer puts it before ordinary text, else ""."""
    if tokenizer.bos_token_id is None:
        return ""
    return tokenizer.bos_token if tokenizer("a")["input_ids"][0] == tokenizer.bos_token_id else ""
