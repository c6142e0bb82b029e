"""Run folders as training leaves them, made in a moment: a tiny model, an adapter with random factors, a summary."""

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from tiny import random_factors
from tiny_files import byte_tokenizer, save_tiny, write_recipe

from qlora_lite.adapters.files import save_adapter
from qlora_lite.artifacts.run_files import read_run
from qlora_lite.artifacts.run_folder import digests_of, tokenizer_sha256
from qlora_lite.data.chat.template import NAMED_TEMPLATES
from qlora_lite.errors import Interrupted
from qlora_lite.files import sha256
from qlora_lite.models.locate import locate
from qlora_lite.prepare.model import build_model, fingerprint
from qlora_lite.recipe.load import load_recipe, resolve_to_yaml
from qlora_lite.recipe.schema import Output, Recipe
from qlora_lite.runs.run import run_recipe

END_OF_ANSWER = 4  # <|im_end|> of the byte tokenizer


def make_run(
    folder: Path,
    base: Path | str,
    overrides=(),
    seed: int = 3,
    template: str | None = "chatml",
    status: str = "complete",
    **sections,
) -> Path:
    """Write a run of a base model with random factors; ``sections`` and ``overrides`` go into its recipe."""
    folder.mkdir(parents=True, exist_ok=True)
    recipe = load_recipe(write_recipe(folder, base, **sections), overrides)
    run = folder / "run"
    run.mkdir()
    (run / "recipe.yaml").write_text(resolve_to_yaml(recipe))
    if template:
        (run / "template.jinja").write_text(NAMED_TEMPLATES[template])
    adapted = build_model(recipe)
    random_factors(adapted, seed)
    save_adapter(adapted, run / "adapter", str(base), byte_tokenizer(template))
    files = locate(str(base))
    summary = {
        "status": status,
        "name": "run",
        "model": str(base),
        "data": {"end_token_ids": [END_OF_ANSWER]},
        **digests_of(run / "adapter"),
        "base_fingerprint": fingerprint(recipe, files),
        "tokenizer_sha256": None if files.gguf_file else tokenizer_sha256(files.folder),
    }
    (run / "summary.json").write_text(json.dumps(summary))
    return run


def tiny_run(folder: Path, model_type: str = "llama", lora=None, overrides=(), shard=None, **options) -> Path:
    """Write a tiny model and a run of it; ``options`` are those of ``save_tiny`` and of the model's configuration."""
    folder.mkdir(parents=True, exist_ok=True)
    save_tiny(folder / "model", model_type, shard=shard, **options)
    return make_run(folder, folder / "model", overrides, lora=lora or {"rank": 4, "alpha": 8})


def prompt_tuned(folder: Path, n_positions: int, virtual_tokens: int) -> Path:
    """Write a tiny GPT-2, which has a table of positions, and train virtual tokens for it, for one step."""
    save_tiny(folder / "model", "gpt2", n_positions=n_positions)
    path = write_recipe(
        folder,
        folder / "model",
        lora=None,
        adapter={"method": "prompt"},
        prompt={"virtual_tokens": virtual_tokens},
        train={"max_steps": 1},
    )
    return run_recipe(load_recipe(path))


def summary_of(folder: Path) -> dict:
    """Return what a run says of itself."""
    return json.loads((folder / "summary.json").read_text())


def logits(model, ids=None) -> torch.Tensor:
    """Return a model's logits for a few tokens."""
    ids = torch.randint(5, 160, (2, 11), generator=torch.Generator().manual_seed(0)) if ids is None else ids
    with torch.no_grad():
        return model.eval()(input_ids=ids, use_cache=False).logits.float()


def replace_adapter(run, tensors):
    """Write other weights into a run, as if it had trained them."""
    path = run / "adapter" / "adapter_model.safetensors"
    save_file(tensors, path)
    summary = json.loads((run / "summary.json").read_text()) | {"adapter_sha256": sha256(path)}
    (run / "summary.json").write_text(json.dumps(summary))


def lines(folder: Path) -> list[dict]:
    """Return the metrics of the run of a folder's recipe without what differs from one time to the next."""
    changing = {"seconds", "tokens_per_second", "peak_bytes"}
    return [{k: v for k, v in line.items() if k not in changing} for line in read_run(folder / "out").metrics]


def evaluations(run: Path) -> list[dict]:
    """Return what each evaluation of a run measured."""
    found = [{k: v for k, v in line.items() if k.startswith("eval_")} for line in read_run(run).metrics]
    return [line for line in found if "eval_loss" in line]


def stop_at(step: int) -> Callable:
    """Return what ``run_recipe`` is to call after each step so that a signal ends the run after this one."""
    return lambda metrics, _total: os.kill(os.getpid(), signal.SIGTERM) if metrics.step == step else None


def run_whole_and_stopped(recipe: Recipe, folder: Path) -> Path:
    """Run a recipe to its end in a folder of its own, which is returned, and once more until a signal ends it."""
    whole = run_recipe(recipe.model_copy(update={"output": Output(dir=str(folder / "whole"))}))
    with pytest.raises(Interrupted):
        run_recipe(recipe, stop_at(3))
    return whole
