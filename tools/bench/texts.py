"""The texts that the tools train on and measure with: GSM8K rows with their answers learned, windows of running text.

Imports the package inside the functions, because memory is counted from a tool's imports on.
"""

from __future__ import annotations

import tempfile
from itertools import islice
from pathlib import Path

DATA = Path(__file__).resolve().parents[3] / "shared" / "data"
GSM8K = DATA / "gsm8k_train.jsonl"
WIKITEXT = DATA / "wikitext2_valid.txt"


def gsm8k_examples(path: Path, count: int, tokenizer, max_tokens: int):
    """Return the first rows of a GSM8K file as examples, in the tokenizer's chat template if it has one."""
    from qlora_lite.data.readers.sources import Source
    from qlora_lite.data.tokens.examples import build_examples

    with tempfile.TemporaryDirectory() as folder, path.open(encoding="utf-8") as lines:
        part = Path(folder) / "rows.jsonl"
        part.write_text("".join(islice(lines, count)), encoding="utf-8")
        source = Source(str(part), "table", prompt="{question}", completion="{answer}")
        template = None if tokenizer.chat_template else "plain"
        return build_examples([source], tokenizer, template, max_tokens=max_tokens).examples


def text_windows(text: str, count: int, tokens: int, tokenizer) -> list[list[int]]:
    """Cut a text, repeated if it is too short, into windows of token ids that begin as the model's texts begin.

    Args:
        tokens: of each window, the begin-of-text token included where the tokenizer has one.
    """
    begin = tokenizer("").input_ids
    width = tokens - len(begin)
    stream = tokenizer(text, add_special_tokens=False).input_ids
    stream *= -(-count * width // len(stream))
    return [begin + stream[start : start + width] for start in range(0, count * width, width)]
