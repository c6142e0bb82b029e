"""Load a base model's tokenizer, without the code that loads the model."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path

from transformers import AddedToken, PreTrainedTokenizerFast

from qlora_lite.errors import ModelError, first_line, tokenizer_faults

from .cache import from_gguf_header
from .locate import locate
from .pretrained import tokenizer_of


@tokenizer_faults()
def load_tokenizer(path: str | Path, revision: str | None = None, tokens: Sequence[str] = ()):
    """Load the model's fast tokenizer.

    Args:
        tokens: to be added where it lacks them. They are no special tokens, so that answers show them.

    Raises:
        ModelError: there is none, or it cannot be read.
    """
    files = locate(path, revision, with_weights=False)
    try:
        if files.gguf_file:
            # AutoTokenizer would give some families' (Qwen, Gemma) other rules than the conversion did
            load = partial(tokenizer_of, auto=PreTrainedTokenizerFast)
            tokenizer = from_gguf_header(files.folder / files.gguf_file, "tokenizer", tokenizer_of, load)
        else:
            tokenizer = tokenizer_of(files.folder)
    except (OSError, ValueError, TypeError, KeyError, IndexError, ImportError) as error:
        raise ModelError(f"cannot load the tokenizer of {path}: {first_line(error)}") from error
    if not tokenizer.is_fast:
        raise ModelError(f"{path} has only a slow tokenizer; the masks need the token offsets of a fast one")
    tokenizer.add_tokens([AddedToken(token, normalized=False) for token in tokens])
    return tokenizer
