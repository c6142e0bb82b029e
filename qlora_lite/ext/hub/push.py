"""Upload a run's adapter, a model that it was merged into, or one that was trained whole, to the hub with a model card.

What is sent is a list of files by name and never a folder: checkpoints, logs and data cannot slip in, nor what
somebody has put beside a merged model. The caller shows the list and the card before ``send``; nothing is written to
the hub before.
"""

import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

from huggingface_hub import CommitOperationAdd, HfApi, ModelInfo, get_token
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    HTTPError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
)
from huggingface_hub.utils import validate_repo_id

from qlora_lite.adapters.read import CONFIG_NAME
from qlora_lite.artifacts.run_folder import is_adapter_alone, open_run, weights_sha256
from qlora_lite.artifacts.trained_run import TrainedRun, open_trained, require_kind
from qlora_lite.errors import ModelError, OutputError, RecipeError, first_line
from qlora_lite.export.formats import ExportSettings, export_run
from qlora_lite.export.merge import ADAPTER_DIGEST, REPORT
from qlora_lite.models.load import KEEP, stored_quantization
from qlora_lite.models.locate import read_json
from qlora_lite.models.merge import PROCESSOR_FILES
from qlora_lite.models.skeleton import read_config
from qlora_lite.prepare.transformer import kept_codes
from qlora_lite.quant.formats import FORMATS

from .card import CardFacts, model_card

README = "README.md"
SENT = (
    "adapter_model.safetensors",
    CONFIG_NAME,
    "model.safetensors",
    "model-*-of-*.safetensors",
    "model.safetensors.index.json",
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "*.model",
    "chat_template.jinja",
    *PROCESSOR_FILES,
)
_MODEL = "name_or_path"  # ends a key whose value names a model
_PATH = re.compile(r"[/\\]|~[\w-]*/|\.{1,2}[/\\]|\.{1,2}$|[A-Za-z]:[/\\]|file:")
_TEXT = re.compile(r"tokens?$|^content$|^chat_template$")  # keys of what the model reads, which may look like a path
_LICENCE = ("license", "license_name", "license_link")
LOG_IN = "run `hf auth login`, or set HF_TOKEN"


@dataclass(frozen=True, slots=True)
class PushSettings:
    """What is pushed and where.

    Args:
        repo: OWNER/NAME of the repository.
        merged: folder that ``qlora-lite merge`` wrote of the run; None pushes the adapter, or the whole model.
        base_model: OWNER/NAME of the base model, where the run names a file or folder of this machine.
        public: whether everybody may see a new repository.
    """

    repo: str
    merged: Path | None = None
    base_model: str | None = None
    public: bool = False

    def __post_init__(self) -> None:
        for name in filter(None, (self.repo, self.base_model)):
            if not _is_hub_name(name):
                raise OutputError(f"{name!r} is not a valid name on the hub; write it as OWNER/NAME")


@dataclass(frozen=True, slots=True)
class Push:
    """What will be sent.

    Args:
        files: name in the repository -> a file here, or its content; the model card is one of them.
        private: whether the repository is private, or will be.
        there: names of the repository's files; None if it is to be made.
        notes: what a user should know before sending.
    """

    repo: str
    files: dict[str, Path | bytes]
    private: bool
    there: frozenset[str] | None
    notes: tuple[str, ...]

    @property
    def card(self) -> str:
        """Return the model card's text."""
        content = self.files[README]
        assert isinstance(content, bytes)  # made here, see ``prepare_push``
        return content.decode()

    def size_bytes(self, name: str) -> int:
        """Return the size of a file to send."""
        content = self.files[name]
        return len(content) if isinstance(content, bytes) else content.stat().st_size


def prepare_push(
    run: str | Path,
    settings: PushSettings,
    scratch: Path,
    api: HfApi,
    model_path: str | None = None,
    unfinished: bool = False,
    dry_run: bool = False,
) -> Push:
    """Collect what a push will send; the hub is only asked.

    Args:
        run: a run folder.
        scratch: empty folder for an exported adapter, which must be there until it is sent.
        api: of the hub.
        model_path: where the base model lies, if not where the run says.
        unfinished: take what a run that did not reach its end has.
        dry_run: do without a token, and without the hub where it cannot be reached.

    Raises:
        QloraLiteError: the run cannot be used, its base model has no name on the hub, or the hub refuses.
    """
    if is_adapter_alone(Path(run)):
        raise RecipeError(f"{run} is an adapter without a run to write a model card from; use `hf upload`")
    opened = open_run(run)
    require_kind(opened.recipe, run, has_head=False)
    if not dry_run and get_token() is None:
        raise OutputError(f"you are not logged in to the hub: {LOG_IN}")
    trained = open_trained(run, model_path, unfinished)
    is_whole = opened.recipe.adapter.method == "full"
    if is_whole and settings.merged:
        raise ModelError(f"{run} has a whole model, which no merge has made; leave out --merged")
    base_model = settings.base_model or _name_on_the_hub(opened.recipe.model.path)
    if base_model is None and settings.merged is None and not is_whole:
        raise ModelError(
            f"{opened.recipe.model.path} is on this machine, where nobody else finds it; name the base model on the "
            "hub with --base-model OWNER/NAME"
        )
    private, there, notes = _repository(api, settings, dry_run)
    licence = _licence(api, base_model) if base_model else {}
    if not licence:
        notes.append("the base model's licence is not known, the card leaves it out")
    folder = settings.merged or (opened.adapter if is_whole else scratch / "adapter")
    about_files, merged_into = (), None
    if settings.merged:
        merged_into = _merged_into(folder, trained)
    elif not is_whole:
        report = export_run(run, folder, ExportSettings("peft"), model_path, unfinished)
        about_files = tuple(note.replace(trained.files.name, base_model) for note in report["notes"])
    files, left_out, changes = _files(folder, base_model, opened.recipe.model.path)
    notes += changes
    if left_out and (settings.merged or is_whole):
        notes.append(f"not sent: {', '.join(left_out)}")
    facts = CardFacts(
        settings.repo,
        base_model,
        licence,
        opened.recipe,
        opened.summary,
        merged_into,
        "chat_template.jinja" in files,
        about_files,
        _packed_as(trained),
    )
    card: dict[str, Path | bytes] = {README: model_card(facts).encode()}
    return Push(settings.repo, card | files, private, there, tuple(notes))


def send(push: Push, api: HfApi) -> str:
    """Make the repository if it is not there, and send everything as one commit; return the commit's address.

    Raises:
        OutputError: the hub refuses or cannot be reached.
    """
    operations = [CommitOperationAdd(name, content) for name, content in push.files.items()]
    with _explaining_hub_errors(push.repo):
        if push.there is None:
            api.create_repo(push.repo, private=push.private)
        return api.create_commit(push.repo, operations, commit_message=f"Upload {push.repo} with qlora-lite").commit_url


def _packed_as(trained: TrainedRun) -> str:
    """Return how the base model's files have the weights that a run was trained on; "" where they are in 16 bit."""
    m, (quant, _) = trained.recipe.model, trained.quantization
    if quant == KEEP:
        kinds = {kind for _, kind in kept_codes(trained.recipe, read_config(m.path, m.revision))}
        return ", ".join(sorted({FORMATS[kind].about for kind in kinds}))
    return f"{quant} codes as published" if stored_quantization(trained.files.config) else ""


def _is_hub_name(name: str) -> bool:
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return "/" in name


def _name_on_the_hub(path: str) -> str | None:
    return path if _is_hub_name(path) and not Path(path).exists() else None


def _repository(api: HfApi, settings: PushSettings, dry_run: bool) -> tuple[bool, frozenset[str] | None, list[str]]:
    """Return whether the repository is private or will be, the files in it if it exists, and what to tell.

    Raises:
        OutputError: it exists, and more people would see what is sent than was asked for; or the hub cannot be asked.
    """
    try:
        found = _ask(api, settings.repo)
    except OutputError as error:
        if not dry_run:
            raise
        return not settings.public, None, [f"assumed to be a new repository, without checking: {error}"]
    if found is None:
        return not settings.public, None, []
    if not found.private and not settings.public:
        raise OutputError(f"{settings.repo} exists and is public; add --public to push to it, or choose another name")
    stays = ["the repository exists and stays private; its page has the setting"] if settings.public else []
    return bool(found.private), frozenset(file.rfilename for file in found.siblings or ()), stays


def _licence(api: HfApi, base_model: str) -> dict[str, str]:
    """Return what the base model's metadata says of its licence; nothing where the hub cannot be asked."""
    try:
        found = _ask(api, base_model)
    except OutputError:
        return {}
    known = {key: getattr(found and found.card_data, key, None) for key in _LICENCE}
    return {key: value for key, value in known.items() if isinstance(value, str)} if known["license"] else {}


def _ask(api: HfApi, repo: str) -> ModelInfo | None:
    with _explaining_hub_errors(repo):
        try:
            return api.model_info(repo)
        except RepositoryNotFoundError:
            return None


def _merged_into(folder: Path, trained: TrainedRun) -> str:
    """Return the weights that a run was merged into, by the merge's report.

    Raises:
        ModelError: the folder is not this run's merged model.
    """
    report = read_json(folder / REPORT) if (folder / REPORT).is_file() else {}
    if report.get("run") != trained.name:
        raise ModelError(f"{folder} is not a merged model of {trained.name}; write one with qlora-lite merge")
    merged = report.get(ADAPTER_DIGEST)  # earlier versions did not write it
    if trained.adapter and merged not in (None, weights_sha256(trained.adapter)):
        raise ModelError(
            f"{folder} is a merged model of another adapter than {trained.adapter} (by their SHA-256); "
            "write one with qlora-lite merge"
        )
    return str(report.get("merged_into"))


def _files(
    folder: Path, base_model: str | None, model_path: str
) -> tuple[dict[str, Path | bytes], list[str], list[str]]:
    """Return the files of a folder to send, configurations without local paths, the names of the others, and changes.

    Args:
        base_model: name on the hub.
        model_path: the run's ``model.path``, which may be relative to another folder than the one of now.
    """
    found: dict[str, Path | bytes] = {}
    changes: list[str] = []
    names = sorted(path.name for path in folder.iterdir())
    run_model = None if _name_on_the_hub(model_path) else model_path
    for name in names:
        if any(fnmatch(name, pattern) for pattern in SENT) and _is_own_file(folder / name):
            found[name] = folder / name
            if name.endswith("config.json"):
                config = _without_paths(read_json(folder / name), name, base_model, run_model, changes)
                if name == CONFIG_NAME:
                    config[f"base_model_{_MODEL}"] = base_model
                found[name] = (json.dumps(config, indent=2) + "\n").encode()
    return found, [name for name in names if name not in found], changes


def _is_own_file(path: Path) -> bool:
    return path.is_file() and not path.is_symlink()  # which may lead to any file of this machine


def _without_paths(value, where: str, base_model: str | None, run_model: str | None, changes: list[str]):
    """Return a part of a configuration without paths of this machine; None where it is one itself.

    A path under a key that names a model becomes the base model's name on the hub, any other is left out.

    Args:
        where: file and keys, with a space between.
        run_model: the run's base model, if that is a path.
        changes: a line is added for each path.
    """
    if isinstance(value, dict | list):
        parts = value.items() if isinstance(value, dict) else ((where.rpartition(" ")[2], part) for part in value)
        kept = [
            (key, new)
            for key, old in parts
            if (new := _without_paths(old, f"{where} {key}", base_model, run_model, changes)) is not None or old is None
        ]
        return dict(kept) if isinstance(value, dict) else [new for _, new in kept]
    key = where.rpartition(" ")[2]
    if not isinstance(value, str) or not (value == run_model or _is_path(key, value)):
        return value
    instead = base_model if key.endswith(_MODEL) else None
    changes.append(f"{where}: {value} is a path of this machine; {instead or 'nothing'} is sent instead")
    return instead


def _is_path(key: str, value: str) -> bool:
    """Check whether a setting is a path, or may be one and something is there."""
    is_text = _TEXT.search(key) is not None
    may_be = "/" in value or key.endswith(_MODEL)
    return not is_text and (_PATH.match(value) is not None or (may_be and os.path.exists(value)))


@contextmanager
def _explaining_hub_errors(repo: str) -> Iterator[None]:
    """Return in one line what the hub's answer means for a repository.

    Raises:
        OutputError: the hub refuses or cannot be reached.
    """
    try:
        yield
    except OfflineModeIsEnabled:
        raise OutputError("the hub is not contacted while HF_HUB_OFFLINE is set; unset it") from None
    except HfHubHTTPError as error:
        status = error.response.status_code
        known = {
            401: f"the hub does not accept the token: {LOG_IN}",
            403: f"the token has no write access to {repo}: {LOG_IN} with one that may, or choose another OWNER",
            409: f"{repo} exists already, or was changed just now; try again, or choose another name",
        }
        raise OutputError(known.get(status, f"the hub refuses {repo}: {first_line(error)}")) from error
    except HTTPError as error:
        raise OutputError(f"the hub cannot be reached ({first_line(error)}); connect to the network") from error
