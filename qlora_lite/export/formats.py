"""Export a run: write the form that was asked for, read it back, and compare what it does with the run's adapter."""

import copy
import gc
import json
import re
import shlex
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path

import torch
from torch import nn

from qlora_lite.adapters.checkpoint_names import prefixes_of
from qlora_lite.adapters.files import attach_adapter, load_adapter
from qlora_lite.adapters.read import Adapter
from qlora_lite.artifacts.trained_run import TrainedRun, open_trained
from qlora_lite.data.template import begin_of_text
from qlora_lite.errors import DataError, ModelError, require_one_of
from qlora_lite.files import explain_write_errors, replacing_folder, require_empty, write_text
from qlora_lite.models.gguf_names import gguf_names
from qlora_lite.models.gguf_settings import check_config
from qlora_lite.models.load import KEEP, load_model
from qlora_lite.models.locate import locate, read_json
from qlora_lite.models.merge import ORIGINAL, TRAINED, Merged
from qlora_lite.models.skeleton import meta_model
from qlora_lite.models.streamed import streamed_model
from qlora_lite.models.tokenizer import load_tokenizer
from qlora_lite.models.weights import open_weights
from qlora_lite.prepare.build import build_to_use, without_start
from qlora_lite.quant.formats import FORMATS
from qlora_lite.quant.merging import OFF
from qlora_lite.quant.tensor_file import write_tensors

from .adapters import (
    ADAPTER_FILE,
    for_vllm,
    read_gguf_adapter,
    refuse_all_but_lora,
    refuse_dora_without_peft,
    write_gguf_adapter,
    write_peft,
)
from .check import (
    Change,
    change_of,
    check_change,
    check_merged,
    check_model,
    distance_of,
    logits_of,
)
from .gguf_model import KINDS, MODEL_FILE, as_read, in_q4_0, write_gguf
from .kohya import kohya_tensors
from .merge import BASES, UNKNOWN_BASE, check_choice, held_out, is_lost, measure, measuring, open_for_merge
from .ollama import check_template, go_template, modelfile, pieces_of
from .own_codes import calibration_rows, q4_0_weights

REPORT = "export_report.json"
KOHYA = "kohya"  # the form of denoisers, and of nothing else
# Distance of logits that rounding every weight of a file explains, see ``check.check_merged``.
LIMITS = {"f16": 0.02, "bf16": 0.1, "q8_0": 0.2}
# In float32: a larger model is not loaded as a whole for the check, but read block by block, see ``models.streamed``.
WHOLE_BYTES = 4 * 2**30
MEASURED_ROWS = 32


@dataclass(frozen=True, slots=True)
class ExportSettings:
    """What is exported and how.

    Args:
        to: "peft", "vllm", "gguf", "gguf-adapter" or "ollama"; of a denoiser "kohya".
        base: of a merged model, see ``export.merge.MergeSettings``.
        dtype: of a GGUF model's matrices: "f16", "bf16", "q8_0" or "q4_0"; None takes what the run was trained to be
            merged into (``train.merge_aware``), else "f16".
    """

    to: str
    base: str | None = None
    dtype: str | None = None

    def __post_init__(self) -> None:
        require_one_of("to", self.to, FORMS)
        require_one_of("base", self.base, BASES)
        require_one_of("dtype", self.dtype, (None, *KINDS))


@dataclass(frozen=True, slots=True)
class _Job:
    """What every form needs: the run, its base model's shapes, its adapter."""

    trained: TrainedRun
    skeleton: nn.Module
    adapter: Adapter
    settings: ExportSettings
    out: Path


def export_run(
    run: str | Path, out: str | Path, settings: ExportSettings, model_path: str | None = None, unfinished: bool = False
) -> dict:
    """Write a run in another program's form into a new folder and prove that it works; return the report.

    Raises:
        QloraLiteError: the run cannot be used, the form cannot hold it, or what was written does something else.
    """
    if not isinstance(settings, ExportSettings):
        raise ModelError(f'settings is {settings!r}; give ExportSettings("peft") or another form')
    require_empty(out := Path(out))
    trained = open_trained(run, model_path, unfinished, draws=settings.to == KOHYA)
    if settings.to not in ("gguf", "ollama"):
        others = "transformers and vLLM load it as it is, --to gguf and ollama convert it"
        trained.require_adapter("diffusers loads it as it is" if settings.to == KOHYA else others)
    skeleton = trained.skeleton()
    job, notes = _for_files(_Job(trained, skeleton, trained.adapter_to_merge(skeleton), settings, out))
    with ExitStack() as unproven:  # new or empty before: what is not proven, or stopped, is not left lying around
        unproven.callback(shutil.rmtree, out, ignore_errors=True)
        found = FORMS[settings.to](job)
        unproven.pop_all()
    report = {
        "run": trained.name,
        "form": settings.to,
        "base_model": trained.files.name,
        "layers": len(job.adapter.layers),
        "size_bytes": sum(file.stat().st_size for file in out.iterdir()),
        **found,
        "notes": [*notes, *found.get("notes", [])],
    }
    write_text(out / REPORT, json.dumps(report, indent=2) + "\n")
    return report


def _for_files(job: _Job) -> tuple[_Job, list[str]]:
    """Return a job whose adapter fits the model as its files have it, for programs that load that, and notes."""
    trained, start = job.trained, job.trained.start
    if job.settings.to in ("gguf", "ollama"):
        return job, []
    if (aware := job.adapter.merge_aware) != OFF:
        job = replace(job, adapter=replace(job.adapter, merge_aware=OFF))
        return job, [
            f"the run was trained to be merged into {aware} weights (train.merge_aware): as an adapter beside "
            "the model it is not quite what was trained"
        ]
    if start is None:
        return job, []
    adapter = trained.for_files(job.adapter)
    plain = without_start(trained.recipe)
    plain = plain.model_copy(update={"model": plain.model.model_copy(update={"quant": "none", "keep_16bit": ()})})
    own = logits_of(attach_adapter(trained.build_base(), job.adapter))  # in the run's type, which the cache has
    fitted = replace(trained, recipe=plain)
    job = replace(job, trained=fitted, skeleton=fitted.skeleton(), adapter=adapter)
    distance = distance_of(logits_of(attach_adapter(_base(job), adapter)), own)
    return job, [
        f"the run began with lora.start {start}: this adapter, of twice the rank, is for the model's "
        f"16-bit files, where its logits are {distance:.1e} of their size from those of the run"
    ]


def _peft(job: _Job) -> dict:
    refuse_dora_without_peft(job.adapter, job.skeleton)
    change = _adapter_change(job)
    write_peft(job.adapter, job.skeleton, job.out, job.trained.recipe.model.path, job.trained.tokenizer())
    use = f'PeftModel.from_pretrained(base, "{job.out}")'
    return {"error": _check_folder(job, change), "notes": _of_the_whole(job), "use": use}


def _of_the_whole(job: _Job) -> list[str]:
    """Return what an adapter folder fits, if the run's model is part of a larger one."""
    if (begins := prefixes_of(job.skeleton)) is None:
        return []
    return [
        f"the adapter fits the whole of {job.trained.files.name} as transformers loads it, with layer names that "
        f"begin with {begins[1]!r}, and not its language model alone"
    ]


def _vllm(job: _Job) -> dict:
    family = job.skeleton.config.model_type
    adapter, needed_rank = for_vllm(job.adapter, job.skeleton, str(family))
    change = _adapter_change(job)
    write_peft(adapter, job.skeleton, job.out, job.trained.recipe.model.path, job.trained.tokenizer())
    module = shlex.quote(f"{job.trained.name}={job.out}")
    use = f"vllm serve BASE --enable-lora --max-lora-rank {needed_rank} --lora-modules {module}"
    return {"error": _check_folder(job, change), "notes": [*_of_the_whole(job), *_to_tell_vllm(job)], "use": use}


def _to_tell_vllm(job: _Job) -> Iterator[str]:
    """Yield what a server of the base model does not know of the run: its chat template, and what ends its answers."""
    trained = job.trained
    own, model = trained.tokenizer().chat_template, trained.recipe.model
    if own is not None and own != load_tokenizer(model.path, model.revision).chat_template:
        template = shlex.quote(str(job.out / "chat_template.jinja"))
        yield f"vLLM renders chats with the base's template: serve with --chat-template {template}"
    generation = trained.files.folder / "generation_config.json"
    config = read_json(generation) if generation.is_file() else trained.files.config
    known = config.get("eos_token_id")
    if ends := sorted(set(trained.end_token_ids) - set(known if isinstance(known, list) else [known])):
        yield f"vLLM does not stop at the end tokens of the training data: send stop_token_ids {ends} with requests"


def _gguf_adapter(job: _Job) -> dict:
    refuse_all_but_lora(job.adapter, "llama.cpp's --lora")
    names, adapter = gguf_names(job.skeleton.config), job.adapter
    change = _adapter_change(job)
    write_gguf_adapter(adapter, names, job.out)
    read = read_gguf_adapter(job.out / ADAPTER_FILE, names, list(adapter.layers))
    error = check_change(change, logits_of(attach_adapter(_base(job), read)), str(job.out / ADAPTER_FILE))
    files = job.trained.files
    base = shlex.quote(str(files.folder / files.gguf_file)) if files.gguf_file else "BASE.gguf"
    return {"error": error, "use": f"llama-cli -m {base} --lora {shlex.quote(str(job.out / ADAPTER_FILE))}"}


def _gguf(job: _Job) -> dict:
    use = f"llama-server -m {shlex.quote(str(job.out / MODEL_FILE))} --jinja"
    return _merged_model(job, lambda _folder: None, None) | {"use": use}


def _ollama(job: _Job) -> dict:
    trained, tokenizer = job.trained, job.trained.tokenizer()
    template = trained.template(tokenizer)
    pieces = pieces_of(template)
    begin = begin_of_text(tokenizer)  # SmolLM's is also what begins a turn; llama.cpp must not add that
    adds_begin = bool(begin) and all(
        piece is None or piece.startswith(begin) for piece in (pieces.opening, pieces.before_system)
    )
    go = go_template(pieces.without_begin(begin) if adds_begin else pieces)
    compared = check_template(go, template, tokenizer, pieces.before_system is not None, adds_begin)
    stops = tokenizer.convert_ids_to_tokens(sorted({*trained.end_token_ids, tokenizer.eos_token_id} - {None}))
    try:
        system = trained.shared_system()
        notes = (
            [
                "the SYSTEM line is the message that the training examples share; generate, chat and serve use only "
                "what they are given"
            ]
            if system
            else []
        )
    except DataError as error:  # the rows are needed for nothing else
        system, notes = None, [f"no SYSTEM line: the training data, where it would be found, cannot be read ({error})"]
    if "tool_calls" in template.source:
        notes.append(
            "the Modelfile's template writes no tools, tool calls or results, and Ollama refuses requests "
            "with tools; serve the GGUF file with llama.cpp, which reads the chat template"
        )
    text = modelfile(go, stops, system)
    found = _merged_model(job, lambda folder: (folder / "Modelfile").write_text(text, encoding="utf-8"), adds_begin)
    letters = re.sub(r"[^\w.-]+", "-", trained.name, flags=re.ASCII)  # Ollama takes no others
    name = letters.strip("-.") or "model"
    use = f"ollama create {shlex.quote(name)} -f {shlex.quote(str(job.out / 'Modelfile'))}"
    found["notes"] += notes
    return found | {"conversations_compared": compared, "use": use}


def _kohya(job: _Job) -> dict:
    tensors = kohya_tensors(job.adapter.layers, job.trained.files.config["_class_name"])
    path = job.out / f"{job.trained.name}.safetensors"
    with explain_write_errors(path):
        job.out.mkdir(parents=True, exist_ok=True)
        write_tensors(path, tensors)
    return {"use": f"in ComfyUI, put {path} into models/loras, and name it in a LoraLoader"}


FORMS: dict[str, Callable[[_Job], dict]] = {
    "peft": _peft,
    "vllm": _vllm,
    "gguf": _gguf,
    "gguf-adapter": _gguf_adapter,
    "ollama": _ollama,
    KOHYA: _kohya,
}


def _base(job: _Job) -> nn.Module:
    """Load the base as the run saw it, in float32, where rounding does not hide what an adapter does.

    A large one in 16 bit, which would take twice its bytes, is read block by block.
    """
    gc.collect()  # the model before this one
    recipe, adapter, config = job.trained.recipe, job.trained.adapter, job.skeleton.config
    is_large = 4 * sum(parameter.numel() for parameter in job.skeleton.parameters()) > WHOLE_BYTES
    if is_large and recipe.model.quant == "none" and not recipe.with_vision and not config.problem_type:
        read = open_weights(job.trained.files, job.skeleton, torch.float32).reader()
        return streamed_model(copy.deepcopy(config), lambda name: read(name).float())
    model = recipe.model.model_copy(update={"compute_dtype": "float32"})
    return build_to_use(recipe.model_copy(update={"model": model}), [adapter] if adapter else [])


def _adapter_change(job: _Job) -> Change:
    return change_of(_base(job), job.adapter)


def _check_folder(job: _Job, change: Change) -> float:
    return check_change(change, logits_of(load_adapter(_base(job), job.out)), str(job.out))


def _merged_model(job: _Job, write_beside: Callable[[Path], object], adds_begin: bool | None) -> dict:
    """Write and check ``model.gguf``; ``write_beside`` adds files to the folder."""
    trained, aware = job.trained, job.adapter.merge_aware
    kind = job.settings.dtype or (aware if aware in KINDS else "f16")
    onto = check_choice(trained, job.settings.base)
    check_config(job.skeleton.config, gguf_names(job.skeleton.config).architecture)  # before anything takes time
    merged = open_for_merge(trained, job.skeleton, job.adapter, onto)
    into, chooses = "original" if onto == ORIGINAL else trained.quantization[0], kind == "q4_0" != aware
    if chooses and not in_q4_0(merged):
        raise ModelError("no layer has rows of whole blocks of 32 weights, as Q4_0 needs them; export with --dtype f16")
    chosen, unread = _chosen(job, merged) if chooses else ({}, [])
    with replacing_folder(job.out) as new:
        notes = unread + write_gguf(
            merged, new, kind, trained.name, trained.tokenizer(), tuple(trained.end_token_ids), adds_begin, chosen
        )
        write_beside(new)
    if trained.is_alone and onto == TRAINED:
        notes.append(UNKNOWN_BASE)
    if prefixes_of(job.skeleton) is not None:
        notes.append(f"the file holds the language model alone, without the other parts of {trained.files.name}")
    what, config = str(job.out / MODEL_FILE), copy.deepcopy(job.skeleton.config)
    entries = merged.entries(torch.float32)
    is_large = sum(4 * prod(entries[stored][1]) for stored in merged.base.parameters) > WHOLE_BYTES
    if chooses:
        logits = logits_of(_streamed_file(Path(what), config)) if is_large else _gguf_logits(job)
        error = check_model(logits_of(_streamed_q4_0(merged, config, chosen)), logits, what, LIMITS["f16"])
        cost = _cost(job, merged.has_new_tokens)
        notes += cost.get("notes", [])
        if is_lost(models := cost.get("models", {}), kind):
            notes.append(
                f"4 bits moved the model by KL {models[kind]['kl']:.1e}, and training had by "
                f"{models['base']['kl']:.1e}: little of that may be left; --dtype q8_0 keeps it"
            )
        return {"read_back": error, "dtype": kind, "merged_into": into, **cost, "notes": notes}
    if trained.began_as:
        own = logits_of(_streamed_base(merged, config, _in_float32))
        logits = logits_of(_streamed_file(Path(what), config)) if is_large else _gguf_logits(job)
        return {"distance": check_model(own, logits, what, LIMITS[kind]), "dtype": kind, "notes": notes}
    if is_large:
        notes.append("the file was read back block by block, by this package's own reader: it is large for others")
    if is_large or trained.start:  # in float32 another base would be split for it
        change = change_of(_streamed_base(merged, config, _in_float32), merged.adapter)
    else:
        change = _merged_change(job, merged)
    logits = logits_of(_streamed_file(Path(what), config)) if is_large else _gguf_logits(job)
    if kind == aware:  # the run's own weights, but for tables
        distance = check_model(change.adapted, logits, what, LIMITS["q8_0"])
        return {"distance": distance, "dtype": kind, "merged_into": trained.quantization[0], "notes": notes}
    rounded = logits_of(_streamed_base(merged, config, lambda name, weight: as_read(name, weight, kind)))
    # as the file's weights are, where the base beside them dequantises its own in float32
    seen_rounded = onto == TRAINED and trained.compute_dtype == torch.bfloat16
    limit = max(LIMITS[kind], LIMITS["bf16"] * seen_rounded)
    share, distance = check_merged(change, logits, rounded, what, limit)
    return {"share": share, "distance": distance, "dtype": kind, "merged_into": into, "notes": notes}


def _chosen(job: _Job, merged: Merged) -> tuple[dict[str, torch.Tensor], list[str]]:
    """Return weights in Q4_0 that were chosen by training rows; none where these cannot be read, and a note on that."""
    recipe, why = job.trained.recipe, ""
    if job.trained.is_alone:
        why = "an adapter alone names none"
    elif recipe.data.streaming or recipe.with_vision:
        why = "they are streamed" if recipe.data.streaming else "they have pictures, and the file has no tower"
    else:
        try:
            return q4_0_weights(job.trained, merged, calibration_rows(job.trained), in_q4_0(merged)), []
        except DataError as error:
            why = str(error)
    return {}, [
        f"codes are chosen by training rows, which cannot be read here ({why}): each weight was rounded by "
        "itself instead, which changes the model several times as much"
    ]


def _cost(job: _Job, has_new_tokens: bool) -> dict:
    """Return how far the file's model is from the trained one on held-out rows, or a note on why it is not known."""
    try:
        if has_new_tokens or job.trained.recipe.with_vision:
            raise DataError("the base has no new tokens" if has_new_tokens else "the file's model takes no pictures")
        rows = held_out(job.trained, MEASURED_ROWS)
    except DataError as error:
        return {"notes": [f"what 4 bits cost was not measured: {error}"]}
    m = job.trained.recipe.model
    file = {"path": str(job.out / MODEL_FILE), "revision": None, "quant": KEEP, "quant_head": False, "keep_16bit": ()}
    recipe = job.trained.recipe.model_copy(update={"model": m.model_copy(update=file)})
    with measuring():
        models = measure(job.trained, rows, {"q4_0": lambda: build_to_use(recipe, use_cache=False)})
    return {"measured_on": rows.where, "rows": rows.rows, "models": models}


def _streamed_q4_0(merged: Merged, config, chosen: Mapping[str, torch.Tensor]) -> nn.Module:
    """Return the model that a q4_0 file is to hold."""
    stored = {parameter: name for name, parameter in merged.base.parameters.items()}

    def read(parameter: str) -> torch.Tensor:
        if parameter not in chosen:
            return as_read(parameter, merged.weight(stored[parameter], torch.float32), "q4_0")
        shape = merged.base.entries[stored[parameter]][1]
        return FORMATS["q4_0"].dequantize([chosen[parameter]], shape, torch.float32)

    return streamed_model(config, read)


def _in_float32(_name: str, weight: torch.Tensor) -> torch.Tensor:
    return weight.float()


def _streamed_base(merged: Merged, config, rounded: Callable[[str, torch.Tensor], torch.Tensor]) -> nn.Module:
    """Return the base that the adapter was merged into, its weights rounded (in float32)."""
    base = replace(merged, adapter=replace(merged.adapter, layers={}, weights={}, tokens={}))
    stored = {parameter: name for name, parameter in merged.base.parameters.items()}

    def read(parameter: str) -> torch.Tensor:
        name = stored[parameter]  # taken in the type that it has, not in float32: a large one is not held twice
        dtype = merged.compute_dtype if merged.onto == TRAINED else merged.base.entries[name][0]
        return rounded(parameter, base.weight(name, dtype))

    return streamed_model(config, read)


def _streamed_file(path: Path, config) -> nn.Module:
    skeleton = meta_model(config, "none", False, torch.float32)
    return streamed_model(config, open_weights(locate(str(path)), skeleton, torch.float32).read)


def _merged_change(job: _Job, merged: Merged) -> Change:
    """Return what the adapter changes in the base that it was merged into."""
    m = job.trained.recipe.model
    if merged.onto == ORIGINAL:
        base = load_model(m.path, "none", compute_dtype=torch.float32, revision=m.revision)
        return change_of(base, merged.adapter)
    return _adapter_change(job)


def _gguf_logits(job: _Job) -> torch.Tensor:
    """Read the file back as a base model, with the settings that it says."""
    return logits_of(load_model(str(job.out / MODEL_FILE), "none", compute_dtype=torch.float32))
