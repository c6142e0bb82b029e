"""Cut rows that are longer than max_tokens into parts that can each be learned from.

A document becomes windows of max_tokens. Each begins with the last token of the one before, which is context there
and not learned, so every token of the document is learned exactly once, as in the whole. Begin-of-text and the end
token stay where the document has them: a window does not pretend to be a document.

A conversation is cut between exchanges (a user turn and all up to the next one), never inside an answer, which
without its question would teach to invent. Each part holds as many exchanges as fit, and the system turn and tools
again. Every answer stands in exactly one part. What was said in earlier parts is not seen: the price of the cut. An
exchange that does not fit alone is left out and counted.

Cutting the tokens of a conversation at max_tokens, the other known way, gives parts that begin in the middle of a
turn, without the template around it: text that the model never sees when it is used.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace

from .row_formats import Conversation
from .storage import Example


def windows(example: Example, max_tokens: int) -> Iterator[Example]:
    """Cut a document into windows that overlap by one token.

    Args:
        example: more than max_tokens tokens.
        max_tokens: most tokens of a window, at least 2.
    """
    for start in range(0, len(example.token_ids) - 1, max_tokens - 1):
        part = slice(start, start + max_tokens)
        learned = example.learned[part].copy()
        learned[0] = False
        if learned.any():
            yield replace(example, token_ids=example.token_ids[part].copy(), learned=learned)


def parts(conversation: Conversation, length_of: Callable[[Conversation], int], max_tokens: int) -> list[Conversation]:
    """Cut a conversation between exchanges into parts that fit.

    Args:
        conversation: the row.
        length_of: gives the tokens of a conversation.
        max_tokens: most tokens of a part.

    Returns:
        The parts in order; those that hold one exchange may still be too long.
    """
    turns = conversation.turns
    begins = [index for index, turn in enumerate(turns) if turn.role == "user"]
    system, ends = turns[: begins[0]], [*begins[1:], len(turns)]
    found, first = [], 0
    while first < len(begins):
        last = first
        part = replace(conversation, turns=system + turns[begins[first] : ends[first]])
        while last + 1 < len(begins):
            longer = replace(conversation, turns=system + turns[begins[first] : ends[last + 1]])
            if length_of(longer) > max_tokens:
                break
            part, last = longer, last + 1
        found.append(part)
        first = last + 1
    return found


def only_last_answer(conversation: Conversation) -> Conversation:
    """Return a conversation of which no answer but the last is learned."""
    *earlier, last = conversation.turns
    return replace(conversation, turns=(*(replace(turn, learned=False) for turn in earlier), last))
