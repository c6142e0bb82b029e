"""Read rows that have a chosen and a rejected answer."""

import re
from collections.abc import Mapping
from itertools import takewhile

from qlora_lite.data.readers.fields import text_of
from qlora_lite.errors import DataError

from .turns import role_of

CHOSEN, ANSWERED = "chosen", "prompt-completion"
_TRANSCRIPT = re.compile(r"\n\n(Human|Assistant):")
_PROMPTS = "messages", "conversations", "conversation", "prompt"  # of preference rows


def is_preference(row: Mapping[str, object]) -> bool:
    """Return whether a row is a prompt with a chosen and a rejected answer, and not a whole conversation beside
    them."""
    if not {"chosen", "rejected"} <= row.keys():
        return False
    turns = next((row[name] for name in ("messages", "conversations") if isinstance(row.get(name), list)), [])
    return not (turns and role_of(turns[-1]) == "assistant")


def chosen_alone(row: Mapping[str, object]) -> dict[str, object]:
    """Return a preference row as a row of prompt and completion, the chosen answer; other columns stay as they are.

    Raises:
        DataError: it has no chosen answer, or no prompt.
    """
    prompt = next((row[name] for name in _PROMPTS if row.get(name)), None)
    if prompt is None and row.get("instruction"):
        prompt = join_instruction(row)
    chosen, rejected = ([turns] if isinstance(turns, dict) else turns for turns in map(row.get, ("chosen", "rejected")))
    if prompt is None:
        chosen, rejected = map(_of_transcript, (chosen, rejected))
    if not chosen:
        raise DataError("'chosen' is missing or empty; every row needs it")
    if isinstance(chosen, list) and role_of(chosen[0]) != "assistant":
        other = rejected if isinstance(rejected, list) else chosen
        shared = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(chosen[:-1], other, strict=False)))
        prompt, chosen = chosen[:shared], chosen[shared:]
    elif prompt is None:
        raise DataError("a preference row without a prompt; write it into a column of its own")
    elif isinstance(chosen, list) and isinstance(prompt, str):
        prompt = [{"role": "user", "content": prompt}]
    elif isinstance(prompt, list) and isinstance(chosen, str):
        chosen = [{"role": "assistant", "content": chosen}]
    taken = {CHOSEN, "rejected", "instruction", "input", *_PROMPTS}
    return {name: value for name, value in row.items() if name not in taken} | {"prompt": prompt, "completion": chosen}


def _of_transcript(text: object) -> object:
    """Return the turns of a text that begins with "Human:" on a paragraph of its own; others as they are."""
    if not isinstance(text, str) or not text.startswith("\n\nHuman:"):
        return text
    _, *parts = _TRANSCRIPT.split(text)
    turns = zip(parts[::2], parts[1::2], strict=True)
    return [{"role": "user" if who == "Human" else "assistant", "content": said.strip()} for who, said in turns]


def join_instruction(row: Mapping[str, object]) -> str:
    """Return the instruction of a row of the format alpaca, with the input that it may have."""
    context = row.get("input")
    is_blank = context is None or (isinstance(context, str) and not context.strip())
    return text_of(row, "instruction") + ("" if is_blank else f"\n\n{text_of(row, 'input')}")
