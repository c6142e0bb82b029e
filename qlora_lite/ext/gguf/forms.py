"""A run merged into one GGUF file for llama.cpp or Ollama, or its adapter alone for llama.cpp's ``--lora``."""

import copy
import re
import shlex
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path

import torch
from torch import nn

from qlora_lite.adapters.checkpoint_names import prefixes_of
from qlora_lite.adapters.files import attach_adapter
from qlora_lite.data.chat.template import begin_of_text
from qlora_lite.errors import DataError, ModelError
from qlora_lite.export.adapters import refuse_all_but_lora
from qlora_lite.export.check import Change, change_of, check_change, check_merged, check_model, logits_of
from qlora_lite.export.form import WHOLE_BYTES, Job, Written, adapter_change, load_base
from qlora_lite.export.merge import UNKNOWN_BASE, check_choice, held_out, is_lost, measure, measuring, open_for_merge
from qlora_lite.export.own_codes import calibration_rows, q4_0_weights
from qlora_lite.files import replacing_folder
from qlora_lite.models.gguf_names import gguf_names
from qlora_lite.models.gguf_settings import check_config
from qlora_lite.models.load import KEEP, load_model
from qlora_lite.models.locate import locate
from qlora_lite.models.merge import ORIGINAL, TRAINED, Merged
from qlora_lite.models.skeleton import meta_model
from qlora_lite.models.streamed import streamed_model
from qlora_lite.models.weights import open_weights
from qlora_lite.prepare.model import build_to_use
from qlora_lite.prepare.task import find_task
from qlora_lite.quant.formats import FORMATS

from .adapter import ADAPTER_FILE, read_gguf_adapter, write_gguf_adapter
from .model import KINDS, MODEL_FILE, as_read, in_q4_0, write_gguf
from .ollama import check_template, go_template, modelfile, pieces_of

# Distance of logits that rounding every weight of a file explains, see ``export.check.check_merged``.
LIMITS = {"f16": 0.02, "bf16": 0.1, "q8_0": 0.2}
MEASURED_ROWS = 32


class GgufAdapter:
    """An adapter file for llama.cpp."""

    dtypes = ()
    draws = False

    def write(self, job: Job) -> Written:
        """Write the file."""
        refuse_all_but_lora(job.adapter, "llama.cpp's --lora")
        write_gguf_adapter(job.adapter, gguf_names(job.skeleton.config), job.out)
        files = job.trained.files
        base = shlex.quote(str(files.folder / files.gguf_file)) if files.gguf_file else "BASE.gguf"
        return Written({"use": f"llama-cli -m {base} --lora {shlex.quote(str(job.out / ADAPTER_FILE))}"})

    def check(self, job: Job, _written: Written) -> dict:
        """Compare what the file's adapter changes in the base's logits with what the run's changes."""
        change, path = adapter_change(job), job.out / ADAPTER_FILE
        read = read_gguf_adapter(path, gguf_names(job.skeleton.config), list(job.adapter.layers))
        return {"error": check_change(change, logits_of(attach_adapter(load_base(job), read)), str(path))}


@dataclass(frozen=True)
class _Model:
    """A merged model as it was written.

    Args:
        kind: type of its matrices.
        chosen: codes of Q4_0 by parameter, where ``chooses``.
    """

    merged: Merged
    kind: str
    chooses: bool
    chosen: Mapping[str, torch.Tensor]


class GgufModel:
    """The whole model in one file."""

    dtypes = tuple(KINDS)
    draws = False

    def write(self, job: Job) -> Written:
        """Write the file."""
        use = f"llama-server -m {shlex.quote(str(job.out / MODEL_FILE))} --jinja"
        return self._write_model(job, lambda _folder: None, None, use)

    def _write_model(
        self, job: Job, write_beside: Callable[[Path], object], adds_begin: bool | None, use: str
    ) -> Written:
        """Write ``model.gguf``; ``write_beside`` adds files to the folder."""
        trained, aware = job.trained, job.adapter.merge_aware
        kind = job.dtype or (aware if aware in KINDS else "f16")
        onto = check_choice(trained, job.base)
        check_config(job.skeleton.config, gguf_names(job.skeleton.config).architecture)  # before anything takes time
        merged = open_for_merge(trained, job.skeleton, job.adapter, onto)
        chooses = kind == "q4_0" != aware
        if chooses and not in_q4_0(merged):
            raise ModelError(
                "no layer has rows of whole blocks of 32 weights, as Q4_0 needs them; export with --dtype f16"
            )
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
        return Written({"use": use, "notes": notes}, _Model(merged, kind, chooses, chosen))

    def check(self, job: Job, written: Written) -> dict:
        """Compare the logits of the file with those of the merged weights; in 4 bits, measure what they cost."""
        assert isinstance(written.kept, _Model)
        return _checked(job, written.kept)


class OllamaModel(GgufModel):
    """The same file with a Modelfile beside it."""

    def write(self, job: Job) -> Written:
        """Write both; the Modelfile's template gives the tokens of the chat template."""
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
        notes = []
        try:
            if system := trained.shared_system():
                notes.append(
                    "the SYSTEM line is the message that the training examples share; generate, chat and serve use "
                    "only what they are given"
                )
        except DataError as error:  # the rows are needed for nothing else
            system = None
            notes.append(f"no SYSTEM line: the training data, where it would be found, cannot be read ({error})")
        if "tool_calls" in template.source:
            notes.append(
                "the Modelfile's template writes no tools, tool calls or results, and Ollama refuses requests "
                "with tools; serve the GGUF file with llama.cpp, which reads the chat template"
            )
        text = modelfile(go, stops, system)
        letters = re.sub(r"[^\w.-]+", "-", trained.name, flags=re.ASCII)  # Ollama takes no others
        name = letters.strip("-.") or "model"
        use = f"ollama create {shlex.quote(name)} -f {shlex.quote(str(job.out / 'Modelfile'))}"
        written = self._write_model(
            job, lambda folder: (folder / "Modelfile").write_text(text, encoding="utf-8"), adds_begin, use
        )
        report = {"notes": written.report["notes"] + notes, "conversations_compared": compared, "use": use}
        return replace(written, report=report)


GGUF, GGUF_ADAPTER, OLLAMA = GgufModel(), GgufAdapter(), OllamaModel()


def _checked(job: Job, model: _Model) -> dict:
    trained, merged, kind = job.trained, model.merged, model.kind
    what, config, notes = str(job.out / MODEL_FILE), copy.deepcopy(job.skeleton.config), []
    into = "original" if merged.onto == ORIGINAL else trained.quantization[0]
    entries = merged.entries(torch.float32)
    is_large = sum(4 * prod(entries[stored][1]) for stored in merged.base.parameters) > WHOLE_BYTES
    if model.chooses:
        logits = logits_of(_streamed_file(Path(what), config)) if is_large else _gguf_logits(job)
        error = check_model(logits_of(_streamed_q4_0(merged, config, model.chosen)), logits, what, LIMITS["f16"])
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
    if kind == job.adapter.merge_aware:  # the run's own weights, but for tables
        distance = check_model(change.adapted, logits, what, LIMITS["q8_0"])
        return {"distance": distance, "dtype": kind, "merged_into": trained.quantization[0], "notes": notes}
    rounded = logits_of(_streamed_base(merged, config, lambda name, weight: as_read(name, weight, kind)))
    # as the file's weights are, where the base beside them dequantises its own in float32
    seen_rounded = merged.onto == TRAINED and trained.compute_dtype == torch.bfloat16
    limit = max(LIMITS[kind], LIMITS["bf16"] * seen_rounded)
    share, distance = check_merged(change, logits, rounded, what, limit)
    return {"share": share, "distance": distance, "dtype": kind, "merged_into": into, "notes": notes}


def _chosen(job: Job, merged: Merged) -> tuple[dict[str, torch.Tensor], list[str]]:
    """Return weights in Q4_0 that were chosen by training rows; none where these cannot be read, and a note on that."""
    recipe, why = job.trained.recipe, ""
    if job.trained.is_alone:
        why = "an adapter alone names none"
    elif recipe.data.streaming or find_task(recipe).multimodal:
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


def _cost(job: Job, has_new_tokens: bool) -> dict:
    """Return how far the file's model is from the trained one on held-out rows, or a note on why it is not known."""
    try:
        if has_new_tokens or find_task(job.trained.recipe).multimodal:
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


def _merged_change(job: Job, merged: Merged) -> Change:
    """Return what the adapter changes in the base that it was merged into."""
    m = job.trained.recipe.model
    if merged.onto == ORIGINAL:
        base = load_model(m.path, "none", compute_dtype=torch.float32, revision=m.revision)
        return change_of(base, merged.adapter)
    return adapter_change(job)


def _gguf_logits(job: Job) -> torch.Tensor:
    """Read the file back as a base model, with the settings that it says."""
    return logits_of(load_model(str(job.out / MODEL_FILE), "none", compute_dtype=torch.float32))
