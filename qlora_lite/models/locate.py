"""Turn ``model.path`` into files on this disk, and check them before anything is built.

A path is a folder with safetensors, a ``.gguf`` file, ``package:NAME/FILE`` (a file inside an installed
package, found without importing the package), or a hub id. Weights are only ever read from safetensors and
GGUF: pickled checkpoints are refused.
"""

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from qlora_lite.errors import ModelError, first_line
from qlora_lite.files import PACKAGE_PREFIX, package_file

from .gguf_header import SplitFile, end_of_tensors, read_header

WHOLE_NAME, INDEX_NAME = "model.safetensors", "model.safetensors.index.json"
HUB_FILES, HUB_WEIGHTS = ["*.json", "*.model", "*.txt", "*.jinja"], ["*.safetensors"]
HUB_DOUBLES = ["consolidated*", "original/*"]  # the same weights again, in other layouts
_LLAMA_LAYERS = {  # by their names in a GGUF file
    "attn_q": "q_proj",
    "attn_k": "k_proj",
    "attn_v": "v_proj",
    "attn_output": "o_proj",
    "ffn_gate": "gate_proj",
    "ffn_up": "up_proj",
    "ffn_down": "down_proj",
}
_OTHER_PARTS = {"token_embd", "output", "rope_freqs", "embed_tokens", "lm_head"}  # beside layers and norms


@dataclass(frozen=True, slots=True)
class ModelFiles:
    """Where a base model lies.

    ``folder`` holds the configuration and tokenizer; ``weights`` are the safetensors shards or the one GGUF
    file; ``name`` is what the user wrote.
    """

    name: str
    folder: Path
    weights: tuple[Path, ...]

    @property
    def gguf_file(self) -> str | None:
        """The GGUF file's name inside ``folder``, or None."""
        return next((path.name for path in self.weights if path.suffix == ".gguf"), None)

    @property
    def config(self) -> dict:
        """What ``config.json`` says; nothing for a GGUF file, which has its own.

        Raises:
            ModelError: it cannot be read.
        """
        return {} if self.gguf_file else read_json(self.folder / "config.json")


def locate(path: str | Path, revision: str | None = None, with_weights: bool = True) -> ModelFiles:
    """Find a model's files, downloading a hub model on first use, and check that they are whole.

    Args:
        with_weights: False downloads no weights of a hub model, for who needs only its tokenizer.

    Raises:
        ModelError: nothing is there, a file is missing, cut short or of a kind that is not read.
    """
    path = os.fspath(path)
    local = _package_file(path) if path.startswith(PACKAGE_PREFIX) else Path(os.path.expanduser(path))
    if local.suffix == ".gguf":
        if not os.path.isfile(local):
            raise ModelError(f"no file {local}; check model.path")
        return ModelFiles(path, local.parent, (check_gguf(local),))
    if os.path.isdir(local):
        read_json(local / "config.json")
        return ModelFiles(path, local, _check_weights(local))
    folder = download(path, revision, with_weights)
    read_json(folder / "config.json")
    return ModelFiles(path, folder, _downloaded_weights(folder) if with_weights else ())


def folder_of(path: str, revision: str | None = None) -> Path | None:
    """Return where a model's small files lie, on this disk or in the hub's cache; None where they do not."""
    if os.path.isdir(local := Path(os.path.expanduser(path))):
        return local
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        cached = try_to_load_from_cache(path, "config.json", revision=revision)
    except HFValidationError:  # it is no hub id
        return None
    return Path(cached).parent if isinstance(cached, str) else None


def layer_names(path: str, revision: str | None = None) -> tuple[str, ...]:
    """Return what the linear layers of a model's blocks are called, as far as that is certain before it is built:
    where its files on this disk have the layers of Llama and no others, which transformers gives no other names."""
    local = Path(os.path.expanduser(path))
    try:
        if path.startswith(PACKAGE_PREFIX) or local.suffix == ".gguf":
            tensors = list(read_header(locate(path).weights[0]).tensors)
        elif (folder := folder_of(path, revision)) is None:
            return ()
        else:
            tensors = [name for file in _check_weights(folder) for name in _read_header(file)]
    except (ModelError, OSError, ValueError):  # for whoever loads it to report
        return ()
    found = set()
    for name in tensors:
        parts = name.split(".")
        layers = {_LLAMA_LAYERS.get(part, part) for part in parts} & {*_LLAMA_LAYERS.values()}
        if not layers and not any("norm" in part or part in _OTHER_PARTS for part in parts):
            return ()
        found |= layers
    return tuple(_LLAMA_LAYERS.values()) if len(found) == len(_LLAMA_LAYERS) else ()


def _package_file(path: str) -> Path:
    try:
        return package_file(path)
    except LookupError as error:
        raise ModelError(f"model.path {path!r}: {error.args[0]}") from None


def download(
    name: str,
    revision: str | None,
    with_weights: bool,
    weights: Sequence[str] = HUB_WEIGHTS,
    doubles: Sequence[str] = HUB_DOUBLES,
) -> Path:
    """Return the folder in the hub's cache that holds a hub model, of which what is missing is downloaded.

    Args:
        weights, doubles: patterns of its files with weights, and of those that are not wanted.

    Raises:
        ModelError: there is no such model, or it cannot be reached.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    missing = f"no folder {name!r} here, and it"
    wanted = [*HUB_FILES, *(weights if with_weights else ())]
    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=wanted, ignore_patterns=[*doubles]))
    except HFValidationError:
        raise ModelError(f"{missing} is not a hub id of the form owner/model; check model.path") from None
    except LocalEntryNotFoundError:
        raise ModelError(
            f"{missing} is not in the hub cache, and the hub cannot be reached; connect to the network once, "
            "or set model.path to a local folder or .gguf file"
        ) from None
    except HfHubHTTPError as error:
        raise ModelError(f"{missing} cannot be downloaded from the hub: {first_line(error)}") from None


def read_json(path: Path) -> dict:
    """Read a JSON object.

    Raises:
        ModelError: the file is missing, or is not a JSON object.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        is_pipeline = (path.parent / "model_index.json").is_file()
        cure = "; of a diffusion pipeline task.kind image-generation trains the denoiser" if is_pipeline else ""
        what = f"{path.parent} has no {path.name}; model.path must be a whole model folder"
        raise ModelError(what + cure) from None
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"cannot read {path}: {error}") from None
    if not isinstance(value, dict):
        raise ModelError(f"{path} is not a JSON object")
    return value


def _downloaded_weights(folder: Path) -> tuple[Path, ...]:
    try:
        return _check_weights(folder)
    except ModelError as error:
        cure = "if it was not downloaded whole, connect to the network once"
        raise ModelError(f"{error}; {cure}") from None


def _check_weights(folder: Path) -> tuple[Path, ...]:
    if (folder / WHOLE_NAME).exists():  # whatever lies beside it, such as the index of an earlier save: as transformers
        names = [WHOLE_NAME]
    elif (folder / INDEX_NAME).exists():
        weight_map = read_json(folder / INDEX_NAME).get("weight_map")
        if not isinstance(weight_map, dict) or not all(isinstance(v, str) for v in weight_map.values()):
            raise ModelError(f"{folder / INDEX_NAME} has no weight_map of file names")
        names = sorted(set(weight_map.values()))
        outside = [name for name in names if Path(name).name != name]
        if outside:
            raise ModelError(f"{folder / INDEX_NAME} points outside its folder: {outside[0]!r}")
    else:
        names = sorted(path.name for path in folder.glob("*.safetensors") if path.name != "adapter_model.safetensors")
    if not names:
        pickled = [*folder.glob("*.bin"), *folder.glob("*.pt"), *folder.glob("*.pth")]
        hint = "; pickled weights are not read, convert them to safetensors" if pickled else ""
        raise ModelError(f"{folder} has a config.json but no .safetensors weights{hint}")
    missing = [name for name in names if not os.path.isfile(folder / name)]  # False for a name too long, too
    if missing:
        raise ModelError(f"{folder} lacks {len(missing)} of {len(names)} weight files: {', '.join(missing[:4])}")
    return tuple(_check_safetensors(folder / name) for name in names)


def _check_safetensors(path: Path) -> Path:
    """Compare the file's size with what its header announces."""
    _read_header(path)
    return path


def _read_header(path: Path) -> dict:
    """Return what a safetensors file's header says of its tensors, by name.

    Raises:
        ModelError: the file's size is not what its header announces.
    """
    cut = ModelError(f"{path} is cut short or not a safetensors file; download it again")
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > size - 8:
            raise cut
        try:
            header = json.loads(file.read(length))
            tensors = {name: entry for name, entry in header.items() if name != "__metadata__"}
            end = max((entry["data_offsets"][1] for entry in tensors.values()), default=0)
        except (ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError):
            raise cut from None
    if size != 8 + length + end:
        raise cut
    return tensors


def check_gguf(path: Path) -> Path:
    """Compare the file's size with the tensors that its header announces; return the path.

    Raises:
        ModelError: the file is cut short or not GGUF.
    """
    try:
        end = end_of_tensors(path)
    except SplitFile as error:
        raise ModelError(f"{path}: {error}; join them with `llama-gguf-split --merge`, and name the result") from None
    except (ValueError, OSError) as error:
        raise ModelError(f"{path} is cut short or not a GGUF file ({error}); download it again") from None
    if path.stat().st_size < end:
        raise ModelError(f"{path} is cut short: {path.stat().st_size} bytes of {end}; download it again")
    return path
