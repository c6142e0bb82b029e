"""Load a base model's tokenizer, without the code that loads the model."""

import logging
from pathlib import Path

from qlora_lite.errors import ModelError, OutputError, tokenizer_faults
from qlora_lite.files import replacing_folder

from .cache import cache_entry
from .locate import ModelFiles, locate
from .pretrained import tokenizer_of

log = logging.getLogger("qlora_lite")


@tokenizer_faults()
def load_tokenizer(path: str | Path, revision: str | None = None):
    """Load the model's fast tokenizer.

    Raises:
        ModelError: there is none, or it cannot be read.
    """
    files = locate(path, revision, with_weights=False)
    try:
        tokenizer = _gguf_tokenizer(files) if files.gguf_file else tokenizer_of(files.folder)
    except (OSError, ValueError, TypeError, KeyError, IndexError, ImportError) as error:
        raise ModelError(f"cannot load the tokenizer of {path}: {str(error).strip().splitlines()[0]}") from error
    if not tokenizer.is_fast:
        raise ModelError(f"{path} has only a slow tokenizer; the masks need the token offsets of a fast one")
    return tokenizer


def _gguf_tokenizer(files: ModelFiles):
    """Convert a GGUF file's tokenizer once (seconds) and keep it beside the quantised model."""
    entry = cache_entry(files, part="tokenizer")
    if (entry / "tokenizer_config.json").is_file():
        return tokenizer_of(entry)
    tokenizer = tokenizer_of(files.folder, gguf_file=files.gguf_file)
    try:
        with replacing_folder(entry) as new:
            tokenizer.save_pretrained(new)
    except OutputError as error:
        log.warning("the tokenizer is not cached: %s", error)
    return tokenizer
