"""The part of Go's text/template that a chat template for Ollama needs: rendered here, to check what is exported.

Text, ``{{ .System }}``, ``{{ .Role }}``, ``{{ .Content }}``, ``{{ if .System }}`` and ``{{ if eq .Role "user" }}`` with
``else if``, ``else`` and ``end``, and ``{{ range .Messages }}``. Anything else is an error, so a template that Go would
read otherwise is never taken as checked.

A reader of our own and not Go's, because an export must be checked where it is made.
Source: the documentation of Go's package text/template; ollama's ``template/template.go`` for the values.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from qlora_lite.errors import ModelError

_ACTION = re.compile(r"\{\{\s*([^}]*?)\s*\}\}")
_EQUALS = re.compile(r'eq \.(\w+) "(\w+)"')
_FIELD = re.compile(r"\.(\w+)")


@dataclass(slots=True)
class _Block:
    """An ``if`` with its branches, or a ``range`` with its body as the only one; the condition of an else is ""."""

    kind: str
    branches: list[tuple[str, list]] = field(default_factory=list)


def render_go(template: str, system: str, messages: Sequence[Mapping[str, str]]) -> str:
    """Render a template as Ollama does for a conversation.

    Args:
        template: Go text.
        system: what ``.System`` is.
        messages: ``.Messages``, each with "Role" and "Content".

    Raises:
        ModelError: the template uses what is not read here, or is not closed.
    """
    return _render(_parse(template), {"System": system, "Messages": messages})


def _tokens(template: str) -> list[tuple[str, str]]:
    found, end = [], 0
    for action in _ACTION.finditer(template):
        found += [("text", template[end : action.start()]), ("action", action[1])]
        end = action.end()
    return [*found, ("text", template[end:])]


def _parse(template: str) -> list:
    root: list = []
    open_blocks: list[_Block] = []
    here = root
    for kind, text in _tokens(template):
        if kind == "text" or not text.startswith(("if ", "range ", "else", "end")):
            here.append((kind, text))
            continue
        if text.startswith(("if ", "range ")):
            word, _, condition = text.partition(" ")
            block = _Block(word, [(condition, [])])
            here.append(("block", block))
            open_blocks.append(block)
        elif not open_blocks:
            raise ModelError(f"the Go template closes what it did not open: {text}")
        elif text == "end":
            open_blocks.pop()
        else:
            open_blocks[-1].branches.append((text.removeprefix("else").strip().removeprefix("if ").strip(), []))
        here = open_blocks[-1].branches[-1][1] if open_blocks else root
    if open_blocks:
        raise ModelError("the Go template is not closed")
    return root


def _render(nodes: list, values: Mapping) -> str:
    written = []
    for kind, content in nodes:
        if kind == "text":
            written.append(content)
        elif kind == "action":
            written.append(str(_value(content, values)))
        elif content.kind == "range":
            condition, body = content.branches[0]
            written += [_render(body, message) for message in _value(condition, values)]
        else:
            taken: list = next((body for condition, body in content.branches if _holds(condition, values)), [])
            written.append(_render(taken, values))
    return "".join(written)


def _holds(condition: str, values: Mapping) -> bool:
    if not condition:
        return True
    if equal := _EQUALS.fullmatch(condition):
        return values[equal[1]] == equal[2]
    return bool(_value(condition, values))


def _value(expression: str, values: Mapping):
    name = _FIELD.fullmatch(expression)
    if name is None or name[1] not in values:
        raise ModelError(f"the Go template uses {expression!r}, which is not read here")
    return values[name[1]]
