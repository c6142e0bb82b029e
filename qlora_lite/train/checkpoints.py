"""Checkpoints on disk: one folder each, whole or not there, and never trusted without its hashes.

    checkpoints/step-00000012/manifest.json            step, versions, recipe, and size and SHA-256 of each other file
                              *.json, *.safetensors    what ``train.state`` and the run put there

A folder is written beside its place, flushed to disk and renamed, so a name that is there has all of its content
unless the disk lost some; the manifest finds that out. Which one is newest is asked of the manifests. (A file that
names the latest, or the highest number taken on trust, points at a torn folder after a crash: 4 of 29 killed runs of
the transformers Trainer could not go on for that reason, and 6 of 20 damaged files went unnoticed.)

Nothing is ever read but JSON and safetensors, and no name in a manifest leaves its folder.
"""

import hashlib
import json
import os
import re
import shutil
import stat
from collections.abc import Collection, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from qlora_lite.errors import CheckpointError
from qlora_lite.files import explain_write_errors, flush_to_disk, refuse_link, replacing_folder, sha256
from qlora_lite.quant.tensor_file import stream_tensors

FORMAT = 2  # of all that lies in a checkpoint; one of another format is not resumed
MANIFEST = "manifest.json"
CHECKPOINTS = "checkpoints"  # the folder of a run's
MAX_JSON_BYTES = 64 * 2**20
_FOLDER_NAME = re.compile(r"step-(\d{8,12})")
_FILE_NAME = re.compile(r"\w[\w-]*\.(json|safetensors)", re.ASCII)

Tensors = Mapping[str, torch.Tensor]


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """What a checkpoint holds: tensors and JSON objects by the name of their file."""

    step: int
    tensors: Mapping[str, Tensors]
    documents: Mapping[str, dict]


def folder_of(root: Path, step: int) -> Path:
    """Return where the checkpoint of a step lies."""
    return root / f"step-{step:08d}"


def steps_on_disk(root: Path) -> list[int]:
    """Return the steps of the checkpoint folders that are there, newest first, whole or not."""
    names = [path.name for path in root.iterdir()] if root.is_dir() else []
    return sorted((int(match[1]) for match in map(_FOLDER_NAME.fullmatch, names) if match), reverse=True)


def write_checkpoint(root: Path, checkpoint: Checkpoint, versions: Mapping[str, str], recipe_hash: str) -> Path:
    """Write a checkpoint, all or nothing, and return its folder.

    Args:
        root: the folder of checkpoints; made if it is not there, but not the one around it: where a run's folder is
            gone (its disk, perhaps), a new one in the same place is not the same.
        versions: of the packages that the run depends on.
        recipe_hash: of the run's recipe.

    Raises:
        OutputError: it cannot be written; what was there before is untouched.
    """
    refuse_link(root)
    with explain_write_errors(root):
        if not root.is_dir():
            root.mkdir()
            flush_to_disk(root.parent)
    folder = folder_of(root, checkpoint.step)
    with replacing_folder(folder) as new:
        for name, tensors in checkpoint.tensors.items():
            entries = {key: (tensor.dtype, tuple(tensor.shape)) for key, tensor in tensors.items()}
            aligned = dict(sorted(entries.items(), key=lambda entry: -entry[1][0].itemsize))
            stream_tensors(new / name, aligned, partial(_on_host, tensors))
        for name, document in checkpoint.documents.items():
            (new / name).write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
        files = {path.name: {"bytes": path.stat().st_size, "sha256": sha256(path)} for path in sorted(new.iterdir())}
        manifest = {
            "format": FORMAT,
            "step": checkpoint.step,
            "versions": dict(versions),
            "recipe_sha256": recipe_hash,
            "files": files,
        }
        (new / MANIFEST).write_text(sealed(manifest), encoding="utf-8")
    return folder


def sealed(manifest: object) -> str:
    """Return a manifest's text with its own SHA-256; equal manifests give equal texts."""
    digest = hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()
    return json.dumps({"manifest": manifest, "sha256": digest}, sort_keys=True, indent=1) + "\n"


def _on_host(tensors: Mapping[str, torch.Tensor], key: str) -> torch.Tensor:
    return tensors[key].cpu()


def newest_whole(root: Path) -> tuple[Checkpoint | None, list[str]]:
    """Return the newest checkpoint that is whole, and why each newer one is not."""
    reasons: list[str] = []
    for step in steps_on_disk(root):
        try:
            return read_checkpoint(folder_of(root, step)), reasons
        except CheckpointError as error:
            reasons.append(str(error))
    return None, reasons


def read_checkpoint(folder: Path) -> Checkpoint:
    """Read a checkpoint and check every byte of it.

    Raises:
        CheckpointError: a file is missing, or is not what was written.
    """
    manifest = _read_manifest(folder)
    tensors, documents = {}, {}
    for name, entry in manifest["files"].items():
        path = _plain_file(folder / name, entry["bytes"])
        if sha256(path) != entry["sha256"]:
            raise _damaged(folder, f"the content of {name} is not what was written (its SHA-256 differs)")
        try:
            if name.endswith(".json"):
                documents[name] = _object(path.read_bytes())
            else:
                tensors[name] = load_file(path)  # file pages, which are no memory of the process's
        except (ValueError, TypeError, KeyError, RecursionError, SafetensorError, RuntimeError) as error:
            raise _damaged(folder, f"{name} cannot be read: {error}") from None
    return Checkpoint(manifest["step"], tensors, documents)


def _read_manifest(folder: Path) -> dict:
    text = _plain_file(folder / MANIFEST, None).read_bytes()
    try:
        manifest = _object(text)["manifest"]
        if text.decode() != sealed(manifest):
            raise ValueError("its content is not what was written")
        _check_entries(manifest["files"])
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise _damaged(folder, f"{MANIFEST} is no whole manifest: {error}") from None
    if manifest.get("format") != FORMAT:
        raise _damaged(
            folder, f"its format {manifest.get('format')!r} is not {FORMAT}: resume with the version that wrote it"
        )
    step = manifest.get("step")
    if type(step) is not int or folder_of(folder.parent, step) != folder:
        raise _damaged(folder, f"{MANIFEST} is that of step {step!r}")
    return manifest


def _check_entries(files: dict) -> None:
    for name, entry in files.items():
        if not _FILE_NAME.fullmatch(name) or name == MANIFEST:
            raise ValueError(f"{name!r} is no name of a file in it")
        if type(entry["bytes"]) is not int or type(entry["sha256"]) is not str:
            raise ValueError(f"{name} has no size and SHA-256")


def _object(content: bytes) -> dict:
    if len(content) > MAX_JSON_BYTES:
        raise ValueError(f"it is larger than {MAX_JSON_BYTES} bytes")
    value = json.loads(content)
    if not isinstance(value, dict):
        raise TypeError("it is not a JSON object")
    return value


def _plain_file(path: Path, size: int | None) -> Path:
    """Check that there is a plain file of the size given (any, for None); nothing else is opened."""
    try:
        found = path.lstat()
        if not stat.S_ISREG(found.st_mode):
            raise _damaged(path.parent, f"{path.name} is not a plain file")
        if size is not None and found.st_size != size:
            raise _damaged(path.parent, f"{path.name} has {found.st_size} bytes of {size}")
        if size is None and found.st_size > MAX_JSON_BYTES:
            raise _damaged(path.parent, f"{path.name} is larger than {MAX_JSON_BYTES} bytes")
        return path
    except OSError as error:
        missing = isinstance(error, FileNotFoundError)
        raise _damaged(
            path.parent, f"{path.name} {'is missing' if missing else f'cannot be read: {error.strerror}'}"
        ) from None


def _damaged(folder: Path, reason: str) -> CheckpointError:
    return CheckpointError(f"{folder}: {reason}")


def keep_only(root: Path, steps: Collection[int]) -> None:
    """Remove the checkpoints of all other steps; one that cannot be removed stays.

    A folder loses its name before its content, so that a half-removed one is never taken for a checkpoint.
    """
    for step in steps_on_disk(root):
        if step not in steps:
            folder = folder_of(root, step)
            doomed = folder.with_name(f".{folder.name}.{os.getpid()}.old")
            with suppress(OSError):
                folder.rename(doomed)
                shutil.rmtree(doomed)
