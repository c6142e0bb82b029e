"""What rows of every format become: turns of a conversation, a document, or a prompt."""

from dataclasses import dataclass
from datetime import datetime

ROLES = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "model": "assistant",
    "bot": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "bard": "assistant",
    "function_call": "assistant",
    "tool": "tool",
    "observation": "tool",
    "ipython": "tool",
}
ROW_DAY = datetime(2024, 7, 26)  # of rows that templates date (``render``): what Llama 3.1's writes without a clock


@dataclass(frozen=True, slots=True)
class Turn:
    """Hold one message.

    Args:
        role: "system", "user", "assistant" or "tool".
        content: its text; empty only where there are calls.
        is_target: False where the row gives this turn the weight 0, or says train: false, and of answers in a prompt.
        calls: the tool calls of an assistant turn, as ``tools.tool_calls`` makes them.
        call_id: of a tool turn, the call that it answers, if the row says so.
        name: of a tool turn, the tool, if the row says so.
        left_out: of an assistant turn, whether the row says that it is not learned (weight 0, train: false); then it is
            not, even where all tokens are.
    """

    role: str
    content: str
    is_target: bool = True
    calls: tuple[dict, ...] = ()
    call_id: str | None = None
    name: str | None = None
    left_out: bool = False


@dataclass(frozen=True, slots=True)
class Conversation:
    """Hold a row as turns: at most one system turn, then user and assistant alternating, an answer last.

    An assistant turn with calls is followed by one tool turn per call and the next assistant turn, or is the last.

    Args:
        turns: the messages.
        where: the row's place.
        tools: definitions of the tools, as ``tools.tool_definitions`` makes them.
        kinds: see ``kinds_of``.
        desirable: whether its answer is one to imitate.
        pictures: the files of those that ``picture_turns.MARK`` stands for in the turns, in order.
    """

    turns: tuple[Turn, ...]
    where: str
    tools: tuple[dict, ...] = ()
    kinds: tuple[str, ...] = ()
    desirable: bool = True
    pictures: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Document:
    """Hold a row of plain text, all of it to be learned."""

    text: str
    where: str
    kinds: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Prompt:
    """Hold a row that is to be answered.

    Args:
        turns: what the model is given, the assistant's turn not begun.
        reference: the answer that the row has; None where it has none.
        where: the row's place.
        tools, pictures: see ``Conversation``.
    """

    turns: tuple[Turn, ...]
    reference: str | None
    where: str
    tools: tuple[dict, ...] = ()
    pictures: tuple[str, ...] = ()


def as_message(turn: Turn) -> dict[str, object]:
    """Return a turn as the object that chat templates take."""
    more = {"tool_calls": list(turn.calls), "tool_call_id": turn.call_id, "name": turn.name}
    return {"role": turn.role, "content": turn.content} | {key: value for key, value in more.items() if value}
