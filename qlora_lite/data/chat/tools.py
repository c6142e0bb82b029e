"""Read tool definitions and tool calls from rows, in the shapes found in the wild, into the one transformers takes.

Definitions become {"type": "function", "function": {"name", "description"?, "parameters"?}}, calls become
{"type": "function", "id"?, "function": {"name", "arguments"}} with arguments as an object: chat templates write
them out themselves (OpenAI's JSON text as arguments would be quoted twice). What stands inside a definition or in
arguments is passed on untouched.

source: transformers documentation, "Tool use"; OpenAI API reference, chat completions.
"""

from collections.abc import Mapping, Sequence

from qlora_lite.data.readers.json_rows import decode_text
from qlora_lite.errors import DataError

UNBALANCED = "unbalanced tool calls"


def tool_definitions(value: object) -> tuple[dict, ...]:
    """Read the tools of a row.

    Args:
        value: a list of definitions, with or without the {"type": "function"} around them, the same as JSON
            text, or null.

    Raises:
        DataError: it is something else, or two tools have one name.
    """
    tools = _parsed(value, "tools")
    if tools in (None, "", []):
        return ()
    if not isinstance(tools, list):
        raise DataError("'tools' must be a list of function definitions")
    wrapped = tuple(tool if _is_wrapped(tool) else {"type": "function", "function": tool} for tool in tools)
    names = [_name(tool["function"], f"tool {number}") for number, tool in enumerate(wrapped, start=1)]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise DataError(f"the tool {twice!r} is defined twice; keep one")
    return wrapped


def tool_calls(value: object) -> tuple[dict, ...]:
    """Read the calls of a turn.

    Args:
        value: one call or a list of calls, {"name", "arguments"} or {"function": {"name", "arguments"}}, the
            same as JSON text, or null.

    Raises:
        DataError: a call has no name, or arguments that are no object.
    """
    calls = _parsed(value, "the tool call")
    if isinstance(calls, dict):
        calls = [calls]
    if calls in (None, "", []):
        return ()
    if not isinstance(calls, list):
        raise DataError("a tool call must be an object with a name and arguments")
    return tuple(_call(call) for call in calls)


def check_calls(turns: Sequence, tools: Sequence[Mapping]) -> None:
    """Check that calls and results belong together.

    Every call is answered by one result right after its turn, in any order if both have ids, except in the last
    turn, where the call is what the row teaches. Where the row defines tools, only those are called.

    Args:
        turns: ``conversation.Turn``s.
        tools: from ``tool_definitions``.

    Raises:
        DataError: calls and results are not balanced, or an undefined tool is called.
    """
    defined = [tool["function"]["name"] for tool in tools]
    open_calls: list[dict] = []
    for number, turn in enumerate(turns, start=1):
        if turn.role == "tool":
            open_calls.remove(_answered(turns, open_calls, number))
            continue
        if open_calls:
            names = ", ".join(repr(call["function"]["name"]) for call in open_calls)
            raise DataError(
                f"turn {number} is {turn.role}, but the call of {names} before it has no result; add a turn with "
                "the role tool for each call",
                UNBALANCED,
            )
        open_calls = list(turn.calls)
        for call in open_calls:
            if defined and call["function"]["name"] not in defined:
                raise DataError(
                    f"turn {number} calls {call['function']['name']!r}, which the row's tools do not define "
                    f"({', '.join(defined)}); add it there or correct the name",
                    UNBALANCED,
                )


def _answered(turns: Sequence, open_calls: Sequence[dict], number: int) -> dict:
    """Return the call that turn ``number`` is the result of."""
    turn = turns[number - 1]
    if not open_calls:
        fault = f"turn {number} is the result of a tool that no turn before it called"
        raise DataError(f"{fault}; {_cure_of_result(turns[: number - 1])}", UNBALANCED)
    if turn.call_id is None:
        return open_calls[0]
    for call in open_calls:
        if call.get("id", turn.call_id) == turn.call_id:
            return call
    ids = ", ".join(repr(call["id"]) for call in open_calls)
    raise DataError(
        f"turn {number} answers the call {turn.call_id!r}, but the open calls are {ids}; correct the id", UNBALANCED
    )


def _cure_of_result(before: Sequence) -> str:
    """Say what to do about a result without a call; without it, an answer before it and one after it would meet."""
    if not before or before[-1].role != "assistant":
        return "remove it"
    as_text = " in place of its <tool_call> text" if "<tool_call>" in before[-1].content else ""
    call = '"tool_calls": [{"name": "...", "arguments": {...}}]'
    return f"give turn {len(before)}, which is the assistant's, its call as {call}{as_text}"


def written_names(functions: Sequence[Mapping]) -> list[str]:
    """Return the names that a template must write for calls or definitions: of each function and argument."""
    inside = [holder["function"] for holder in functions]
    return [word for function in inside for word in (function["name"], *function.get("arguments", ()))]


def _parsed(value: object, what: str) -> object:
    if not isinstance(value, str) or not value.strip():
        return value
    try:
        return decode_text(value)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{what} holds text that is not JSON ({error}); correct it") from None


def _is_wrapped(tool: object) -> bool:
    return isinstance(tool, dict) and isinstance(tool.get("function"), dict)


def _name(function: object, what: str) -> str:
    name = function.get("name") if isinstance(function, dict) else None
    if not isinstance(name, str) or not name.strip():
        raise DataError(f"{what} has no name; it needs a function with a name")
    return name


def _call(call: object) -> dict:
    function = call["function"] if _is_wrapped(call) else call
    name = _name(function, "a tool call")
    arguments = _parsed(function.get("arguments", {}), f"the call of {name!r}")
    if arguments in (None, ""):
        arguments = {}
    if not isinstance(arguments, dict):
        raise DataError(f"the arguments of {name!r} are no object; write {{}} for none")
    identity = {"id": call["id"]} if isinstance(call.get("id"), str) else {}
    return {"type": "function", **identity, "function": {"name": name, "arguments": arguments}}
