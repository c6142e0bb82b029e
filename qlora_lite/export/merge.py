"""Merge a run's adapter into its base model, and measure what the merge made of the trained model.

Nobody says how much a merge loses; here the merged model, and the merged model quantised again, are compared with the
model as it was trained on rows that training did not see. The figures and every choice are in ``merge_report.json``.

Where it is not said, the type is f16, whose three more bits keep more of an update than bf16 does, but bf16 where f16
does not hold a weight, or the activations of the family leave its range (Gemma). The report has both shares.

A run with ``train.merge_aware`` computed with weights that are on the grid of a 4-bit format already. They are written
as they are: their codes as a 4-bit checkpoint, or their values in the type that the run computed in. An update that was
trained beside NF4 codes is put into them likewise (``own_codes``). Merging first and quantising then rounds it away.
What each way costs is in ``tools/results/merged.json``.
"""

import gc
import json
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import nn

from qlora_lite.adapters.files import attach_adapter
from qlora_lite.adapters.read import Adapter
from qlora_lite.artifacts.run_folder import weights_sha256
from qlora_lite.artifacts.trained_run import TrainedRun, open_trained
from qlora_lite.errors import DataError, ModelError, require_one_of
from qlora_lite.files import replacing_folder, require_empty, require_space, write_text
from qlora_lite.memory.meter import PeakMeter
from qlora_lite.models.load import KEEP, auto_dtype, load_model, stored_quantization
from qlora_lite.models.merge import (
    ORIGINAL,
    PROCESSOR_FILES,
    TRAINED,
    BeyondRange,
    Merged,
    open_merged,
    write_merged,
)
from qlora_lite.models.save import SHARD_BYTES, bnb_config, save_quantized
from qlora_lite.models.skeleton import meta_model
from qlora_lite.prepare.datasets import build_data, warn_of_other_rows
from qlora_lite.prepare.job import likelihood_workload
from qlora_lite.prepare.model import build_to_use
from qlora_lite.prepare.settings import train_settings
from qlora_lite.prepare.start import resolve_start
from qlora_lite.prepare.task import find_task
from qlora_lite.quant.formats import FOUR_BIT
from qlora_lite.quant.linear import QuantLinear
from qlora_lite.quant.merging import NF4, OFF
from qlora_lite.train.loop import eval_batches
from qlora_lite.train.out_of_memory import explaining_memory
from qlora_lite.train.workload import Workload

from .agreement import Outputs, compare, outputs
from .own_codes import calibration_rows, write_codes

REPORT = "merge_report.json"
ADAPTER_DIGEST = "adapter_sha256"  # in it, of the adapter's weights
KEPT = 0.5  # of the base's distance to the trained model: a 4-bit model farther away than that has lost the adapter
UNKNOWN_BASE = "the adapter does not say what it was trained on; if that was a 16-bit model: --base original"
_UNMEASURED = "--rows 0 merges without measuring (not with --quantize)"
BASES = (None, "nf4", "fp4", "original")
DTYPES = {"bf16": torch.bfloat16, "f16": torch.float16, "f32": torch.float32}
AUTO = "auto"


def loses_its_update(model_path: str) -> bool:
    """Check whether a folder holds a merged model in 16 bit or more: quantised again, it loses much or all of it."""
    try:
        return json.loads((Path(model_path) / REPORT).read_text(encoding="utf-8")).get("quantized") is None
    except (OSError, ValueError, AttributeError):
        return False


@dataclass(frozen=True, slots=True)
class MergeSettings:
    """What is merged and how.

    Args:
        base: "nf4" or "fp4" for the 4-bit weights that the run saw, "original" for those of the files; None takes
            what the run saw.
        dtype: a key of DTYPES, of the merged weights; "auto" as this module says.
        quantize: write the merged model as a 4-bit checkpoint of this type; None for none.
        rows: held-out rows to measure on; 0 measures nothing, and goes without ``quantize`` only.
        shard_bytes: of a weights file.
    """

    base: str | None = None
    dtype: str = AUTO
    quantize: str | None = None
    rows: int = 32
    shard_bytes: int = SHARD_BYTES

    def __post_init__(self) -> None:
        require_one_of("base", self.base, BASES)
        require_one_of("dtype", self.dtype, (AUTO, *DTYPES))
        require_one_of("quantize", self.quantize, (None, "nf4", "fp4"))
        if not isinstance(self.rows, int) or self.rows < 0:
            raise ModelError(f"rows is {self.rows!r}; give a whole number of at least 0")


def merge_run(
    run: str | Path, out: str | Path, settings: MergeSettings, model_path: str | None = None, unfinished: bool = False
) -> dict:
    """Write the merged model of a run into a new folder; return the report.

    Raises:
        QloraLiteError: the run cannot be used, the choice is impossible, or the folder cannot be written.
    """
    if not isinstance(settings, MergeSettings):
        raise ModelError(f"settings is {settings!r}; give MergeSettings(...)")
    require_empty(out := Path(out))
    if settings.quantize and not settings.rows:
        raise ModelError(
            "--quantize needs --rows 1 or more: only a measurement shows whether rounding took the update away"
        )
    trained = open_trained(run, model_path, unfinished)
    trained.require_adapter("there is nothing to merge, and `qlora-lite quantize` writes it in 4 bit")
    onto = check_choice(trained, settings.base)
    rows = held_out(trained, settings.rows) if settings.rows else None
    started = time.monotonic()
    merged = prepare_merge(trained, onto)
    if merged.has_new_tokens:
        if settings.quantize:
            raise ModelError(
                "the base model has no rows for new tokens, so that nothing shows whether rounding takes "
                "the update away: leave out --quantize"
            )
        rows = None
    if settings.quantize and merged.packs_experts:
        raise ModelError("transformers does not load experts in 4 bit: leave out --quantize")
    if settings.quantize:  # before anything large is read
        bnb_config(meta_model(merged.config, settings.quantize, True, torch.bfloat16))
    on_codes = _keeps_codes(trained, merged, settings)
    calibration, unread = None, ""
    if on_codes and merged.adapter.merge_aware == OFF:
        try:
            calibration = calibration_rows(trained)
        except DataError as error:
            unread = f"the training rows, which codes are chosen by, cannot be read ({error}): updates were rounded "
            unread += "stochastically instead, which loses about three times as much"
    with PeakMeter("cpu") as meter, replacing_folder(out) as new, _place_of_dense_model(new, settings) as dense:
        before_bytes = meter.peak_bytes()
        settings, kept = _write_dense(trained, merged, dense, settings)
        report = _describe(trained, merged, settings) | {"update_kept": kept}
        if on_codes:
            write_codes(trained, merged.adapter, calibration, new)
        report["notes"] = _notes(trained, merged, settings, report["update_kept"]) + [unread] * bool(unread)
        report |= {"peak_bytes_above_start": meter.peak_bytes() - before_bytes, "seconds": time.monotonic() - started}
        if settings.quantize and not on_codes:
            _write_quantized(trained, dense, new, settings.quantize)
        if rows is not None:
            report |= {"measured_on": rows.where, "rows": rows.rows}
            with measuring():
                report["models"] = _measure(trained, merged, dense, rows, settings, new if settings.quantize else None)
        if settings.quantize:
            _check_quantized(trained, report["models"], f"merged, then {settings.quantize}", merged.onto)
            # what the dense model says of ends and pictures is true of this one
            for name in ("generation_config.json", *(PROCESSOR_FILES if find_task(trained.recipe).multimodal else ())):
                if (dense / name).is_file():
                    shutil.copyfile(dense / name, new / name)
        write_text(new / REPORT, json.dumps(report, indent=2) + "\n")
    return report


def check_choice(trained: TrainedRun, base: str | None) -> str:
    """Return what a choice of base means for this run.

    Raises:
        ModelError: the run did not see such weights.
    """
    quant, _ = trained.quantization
    if base == "original" and quant in FOUR_BIT and (aware := trained.recipe.train.merge_aware) != OFF:
        raise ModelError(
            f"the run was trained to be merged into its {quant} weights (train.merge_aware {aware}): leave out --base"
        )
    if base in (None, quant):
        return TRAINED if base or quant in FOUR_BIT else ORIGINAL
    if base != "original":
        raise ModelError(f"the run trained on {quant} weights, not on {base}: leave out --base, or choose original")
    return ORIGINAL


def prepare_merge(trained: TrainedRun, onto: str) -> Merged:
    """Open a run's base model and adapter for merging; nothing large is loaded, but for a base that was split."""
    skeleton = trained.skeleton()
    adapter = trained.adapter_to_merge(skeleton)
    return open_for_merge(trained, skeleton, adapter, onto)


def open_for_merge(trained: TrainedRun, skeleton: nn.Module, adapter: Adapter, onto: str) -> Merged:
    """Open a run's base model for merging its adapter; see ``open_merged``."""
    packed = None
    if onto == ORIGINAL:
        adapter = trained.for_files(adapter)
    elif (base := trained.split_base()) is not None:
        layers = ((path, base.get_submodule(path)) for path in adapter.layers)
        packed = {path: layer.packed for path, layer in layers if isinstance(layer, QuantLinear)}
    return open_merged(trained.files, skeleton, adapter, onto, trained.compute_dtype, packed)


@dataclass(frozen=True, slots=True)
class HeldOut:
    """Batches of rows to measure on, how many rows they hold, and which setting of the recipe named them."""

    batches: list
    rows: int
    where: str
    work: Workload


def held_out(trained: TrainedRun, count: int) -> HeldOut:
    """Read the run's evaluation rows, or its training rows where it has none (the report says which).

    Raises:
        DataError: there are none, or they cannot be read.
    """
    recipe = trained.recipe
    if trained.is_alone:
        raise DataError(
            f"the adapter {trained.adapter} comes without a run, and so without data to measure on; {_UNMEASURED}"
        )
    which = "eval" if recipe.data.has_eval else "train"
    name = "data.eval_share" if recipe.data.eval_share else f"data.{which}"
    if which == "train" and recipe.data.streaming:
        raise DataError(f"the run has no data.eval and streams its data: there is nothing to measure on; {_UNMEASURED}")
    try:
        tokenizer = trained.tokenizer()
        data = build_data(recipe, tokenizer, "eval") or build_data(recipe, tokenizer)
    except DataError as error:
        raise DataError(f"{error}\n{_UNMEASURED}") from error
    warn_of_other_rows(recipe, data, trained.held_out)
    examples = data.examples[:count]
    work = likelihood_workload(recipe)
    return HeldOut(list(eval_batches(work, examples, train_settings(recipe))), len(examples), name, work)


def _describe(trained: TrainedRun, merged: Merged, settings: MergeSettings) -> dict:
    return {
        "run": trained.name,
        "adapter": str(trained.adapter),
        ADAPTER_DIGEST: weights_sha256(trained.adapter) if trained.adapter else None,
        "base_model": trained.files.name,
        "merged_into": trained.quantization[0] if merged.onto == TRAINED else "original",
        "dtype": settings.dtype,
        "compute_dtype": str(trained.compute_dtype).removeprefix("torch."),
        "quantized": settings.quantize,
        "layers": len(merged.adapter.layers),
    }


def _notes(trained: TrainedRun, merged: Merged, settings: MergeSettings, kept: dict) -> list[str]:
    notes = []
    if trained.is_alone and merged.onto == TRAINED:
        notes.append(UNKNOWN_BASE)
    if merged.onto == ORIGINAL and not trained.is_alone and trained.quantization[0] in FOUR_BIT:
        notes.append("the adapter was trained on the quantised weights; on the original ones the model differs")
    if stored_quantization(trained.files.config) == (KEEP, False):
        notes.append(
            "the base's published codes are dequantised, since nothing can be merged into them: the model "
            "takes several times as much memory as with the adapter beside them"
        )
    if merged.has_new_tokens:
        notes.append("nothing was measured, since the base model has no rows for the new tokens")
    if merged.packs_experts and merged.onto == TRAINED:
        notes.append("the experts are in 16 bit, as the files have them; the run computed with them in 4 bit")
    tied = merged.config.tie_word_embeddings
    if trained.recipe.model.quant_head and (merged.onto == ORIGINAL or settings.quantize or tied):
        notes.append("the run computed with a 4-bit copy of the head; the merged model has the original head")
    aware = trained.recipe.train.merge_aware
    if aware != OFF:
        notes.append(f"the weights are the {aware} ones that the run computed with (train.merge_aware)")
    elif settings.dtype != "f32" and not settings.quantize:
        half = settings.dtype
        share = f"{kept[half]:.1%} of the update" + (_of_f16(kept) if half == "bf16" else "")
        notes.append(
            f"the sum of weight and update is rounded once, to {half}, which keeps {share}; --dtype f32 keeps it exact"
        )
    if merged.base.in_memory:
        notes.append(
            "the tensors have the names and layout that transformers uses in memory: other programs may not "
            "recognise the model"
        )
    if _keeps_codes(trained, merged, settings):
        if aware == OFF:
            notes.append(
                "the update was put into the run's own codes, which is never exact; "
                "with train.merge_aware: nf4 a run trains the very weights that it leaves"
            )
    elif settings.quantize:
        notes.append(f"the merged weights are quantised again to {settings.quantize}, which is never exact")
    elif merged.onto == TRAINED:
        notes.append("use it with model.quant: none; quantised again it loses much or all of the update")
    else:
        notes.append("quantised again, as with model.quant: nf4, it is rounded once more, which is never exact")
    return notes


def _of_f16(kept: dict) -> str:
    """Return how much of the update f16 would have kept, for a model that is rounded to bf16."""
    if kept["f16"] is None:
        return " (the largest weight exceeds f16)"
    return (
        f" (f16 would keep {kept['f16']:.1%}: --dtype f16, but not to compute in float16 with a model whose "
        "activations exceed its range, such as a Gemma)"
    )


@contextmanager
def measuring() -> Iterator[None]:
    """Explain errors of measuring, so that a file's error is not taken for one of writing the output.

    Raises:
        DoesNotFitError: memory ran out.
        ModelError: a file of the base model could not be read, or a program not be run.
    """
    try:
        with explaining_memory(f"to measure the models, free some, or lower --rows; {_UNMEASURED}"):
            yield
    except OSError as error:
        raise ModelError(f"the models cannot be measured: {error}; {_UNMEASURED}") from error


@contextmanager
def _place_of_dense_model(out: Path, settings: MergeSettings) -> Iterator[Path]:
    """Give a new folder for the 16-bit or 32-bit model: the output, or a temporary one beside it."""
    if not settings.quantize:
        yield out
        return
    with tempfile.TemporaryDirectory(prefix=f"{out.name}.", dir=out.absolute().parent) as beside:
        yield Path(beside)


def _write_dense(
    trained: TrainedRun, merged: Merged, folder: Path, settings: MergeSettings
) -> tuple[MergeSettings, dict]:
    """Write the model in 16 or 32 bit; return the settings with the type that it has now, and what that kept."""
    tokenizer = trained.tokenizer()
    ends = sorted({*trained.end_token_ids, tokenizer.eos_token_id} - {None})
    *first, last = _dtypes(trained, merged) if settings.dtype == AUTO else (settings.dtype,)

    def write(name: str) -> tuple[MergeSettings, dict]:
        kept = write_merged(merged, folder, DTYPES[name], tokenizer, ends, settings.shard_bytes)
        return replace(settings, dtype=name), kept

    for name in first:
        try:
            return write(name)
        except BeyondRange:
            for file in folder.iterdir():
                file.unlink()
    return write(last)


def _dtypes(trained: TrainedRun, merged: Merged) -> tuple[str, ...]:
    """Return the types to try, in this order."""
    if trained.recipe.train.merge_aware != OFF:
        return (next(name for name, dtype in DTYPES.items() if dtype == trained.compute_dtype),)
    fits = auto_dtype(torch.float16, merged.config.model_type) == torch.float16
    return ("f16", "bf16") if fits else ("bf16",)


def _keeps_codes(trained: TrainedRun, merged: Merged, settings: MergeSettings) -> bool:
    """Return whether the update is put into the run's own NF4 codes, as ``quant.merging`` does."""
    own = settings.quantize == NF4 == trained.quantization[0] and merged.onto == TRAINED
    plain = all(
        each.experts == 1 and each.lora_magnitude_vector is None and each.lora_A.shape[1] % 2 == 0
        for each in merged.adapter.layers.values()
    )
    plain = plain and not find_task(trained.recipe).multimodal  # whose codes would be chosen without their pictures
    return own and plain and merged.adapter.merge_aware in (OFF, NF4)


def is_lost(models: Mapping[str, Mapping[str, float]], name: str) -> bool:
    """Return whether a model is not much nearer to the trained one than the base is; see ``measure``."""
    return "base" in models and models[name]["kl"] > KEPT * models["base"]["kl"]


def _check_quantized(trained: TrainedRun, models: dict, name: str, onto: str) -> None:
    """Refuse a 4-bit model in which rounding took the adapter away again.

    Merged into 4-bit weights, an update smaller than half a step of their grid rounds back to where it came from: seen
    on the quickstart's adapter, whose loss of 0.03 went back to 1.32, the base's being 1.39.
    """
    if not is_lost(models, name):
        return
    why = "rounding takes the update away"
    if trained.quantization[0] in FOUR_BIT:
        why = (
            f"{why}; try --base original"
            if onto == TRAINED
            else f"the original weights are others than those that the run saw, and {why}; leave out --base"
        )
    raise ModelError(
        f"in 4 bits the merged model is nearly the base: KL to the trained model {models[name]['kl']:.2e}, the base's "
        f"is {models['base']['kl']:.2e}. {why[0].upper()}{why[1:]}, write 16 bit (no --quantize), or use the adapter "
        "unmerged"
    )


def _write_quantized(trained: TrainedRun, dense: Path, out: Path, quant: str) -> None:
    require_space(out, sum(file.stat().st_size for file in dense.glob("*.safetensors")) // 3)
    m = trained.recipe.model
    model = load_model(
        str(dense),
        quant,
        m.double_quant,
        torch.bfloat16,
        use_cache=False,
        keep_16bit=m.keep_16bit,
        with_vision=find_task(trained.recipe).multimodal,
    )
    save_quantized(model, out, trained.tokenizer())


def _measure(
    trained: TrainedRun, merged: Merged, dense: Path, rows: HeldOut, settings: MergeSettings, in_4_bit: Path | None
) -> dict:
    """Compare base, merged and merged-then-quantised models with the one that was trained.

    Args:
        dense: folder of the merged model in 16 or 32 bit.
        in_4_bit: folder of the 4-bit one, if it is written; None quantises the dense one.
    """
    m, dtype = trained.recipe.model, DTYPES[settings.dtype]
    if dtype == torch.float16 and trained.device.type == "cpu":
        dtype = torch.float32  # CPUs multiply float16 far slower; its values are exact in float32
    again = settings.quantize or (m.quant if m.quant in FOUR_BIT else "nf4")

    def written(quant: str, dtype: torch.dtype, folder: Path = dense) -> nn.Module:
        here = {
            "path": str(folder),
            "revision": None,
            "quant": quant,
            "quant_head": False,
            "keep_16bit": () if quant == "none" or folder == in_4_bit else m.keep_16bit,
            "compute_dtype": str(dtype).removeprefix("torch."),
        }
        recipe = trained.recipe.model_copy(update={"model": m.model_copy(update=here)})
        return build_to_use(recipe, use_cache=False)

    return measure(
        trained,
        rows,
        {
            "merged": lambda: written("none", dtype),
            f"merged, then {again}": lambda: written(again, trained.compute_dtype, in_4_bit or dense),
        },
    )


def measure(trained: TrainedRun, rows: HeldOut, others: Mapping[str, Callable[[], nn.Module]]) -> dict[str, dict]:
    """Compare the base of a run, and other models, with what was trained.

    Args:
        others: each builds a model; one is in memory at a time.

    Returns:
        ``agreement.Likeness`` by name; where all weights were trained, there is no base.
    """

    def said(model: nn.Module) -> Outputs:
        return outputs(model, rows.batches, rows.work)

    found = {"base": said(build_to_use(trained.recipe))} if resolve_start(trained.recipe) else {}
    model = trained.build_base()
    if not trained.began_as:
        found = found or {"base": said(model)}
        attach_adapter(model, trained.adapter_to_merge(trained.skeleton()))
    found["trained"] = said(model)
    del model
    for name, build in others.items():
        gc.collect()  # the model before this one
        found[name] = said(build())
    return {name: compare(found["trained"], each)._asdict() for name, each in found.items()}
