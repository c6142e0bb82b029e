"""Load a base model's tokenizer, without the code that loads the model."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path

from transformers import AddedToken, PreTrainedTokenizerFast

from qlora_lite.errors import ModelError, first_line, tokenizer_faults

from .cache import from_gguf_header
from .locate import ModelFiles, locate
from .pretrained import BUILD_ERRORS, tokenizer_of


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
    except (OSError, IndexError, *BUILD_ERRORS) as error:  # it reads the model's configuration, too
        raise ModelError(f"cannot load the tokenizer of {path}: {_reason(files, error)}") from error
    if not tokenizer.is_fast:
        raise ModelError(f"{path} has only a slow tokenizer; the masks need the token offsets of a fast one")
    if tokens:  # one that is there stays what it is: special, or a part of words
        known = tokenizer.get_vocab()
        tokenizer.add_tokens([AddedToken(token, normalized=False) for token in tokens if token not in known])
    return tokenizer


def _reason(files: ModelFiles, error: Exception) -> str:
    """Say why a tokenizer cannot be loaded: transformers' words for files that are not there name none of them."""
    named = (name for pattern in ("tokenizer*", "vocab*", "*.model") for name in files.folder.glob(pattern))
    if files.gguf_file or any(named):
        return first_line(error)
    if (files.folder / "preprocessor_config.json").is_file():
        cure = "if it reads pictures alone, write task.kind image-classification (qlora-lite explain pictures)"
    else:
        cure = "add its tokenizer.json"
    return f"none of a tokenizer's files lies in {files.folder}; {cure}"
