"""Choose a chat template: the model's own, one of the named ones, or a file (such as the one that a run recorded).

Templates are Jinja, rendered by transformers in its sandbox. All but the named ones are tried out once under limits
(see ``probe``) before they are used.

Begin-of-text: the tokenizer's own template is the authority. The named templates and plain documents get it exactly
when the tokenizer puts it before ordinary text.
"""

import json
import os
import re
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from transformers import PreTrainedTokenizerFast

from qlora_lite.errors import DataError, tokenizer_faults

from .named_templates import CHATML_TOOLS, IM_END, NAMED_TEMPLATES
from .probe import probe
from .tokenise import can_be_cut, lengths_of_tokens


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
        token_lengths: see ``tokenise.lengths_of_tokens``.
    """

    name: str
    source: str
    tokenizer: PreTrainedTokenizerFast
    begin: str
    special: re.Pattern[str]
    ending: re.Pattern[str]
    cut: re.Pattern[str] | None
    special_ids: frozenset[int]
    token_lengths: np.ndarray | None = field(compare=False)


@tokenizer_faults()
def choose_template(
    tokenizer: PreTrainedTokenizerFast, name: str | None = None, own: str | None = None
) -> Template:  # fmt: skip
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


def _mentions_begin(source: str, tokenizer: PreTrainedTokenizerFast) -> bool:
    """Tell whether a template takes care of begin-of-text itself."""
    return "bos_token" in source or (tokenizer.bos_token or "\0") in source


def _template(name: str, source: str, tokenizer: PreTrainedTokenizerFast, begin: str) -> Template:
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


def _special_tokens(tokenizer: PreTrainedTokenizerFast) -> set[str]:
    return {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}


def special_ids_of(tokenizer: PreTrainedTokenizerFast) -> frozenset[int]:
    """Return the ids of the tokenizer's special tokens."""
    return frozenset(index for index, token in tokenizer.added_tokens_decoder.items() if token.special)


def begin_of_text(tokenizer: PreTrainedTokenizerFast) -> str:
    """Return the begin-of-text token if the tokenizer puts it before ordinary text, else ""."""
    if tokenizer.bos_token_id is None:
        return ""
    return tokenizer.bos_token if tokenizer("a")["input_ids"][0] == tokenizer.bos_token_id else ""
