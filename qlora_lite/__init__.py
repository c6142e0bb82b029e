"""Fine-tune a 4-bit language model with LoRA in the memory you have.

The names in ``__all__`` are the Python API; they are imported on first use, so that
``import qlora_lite`` (and with it ``qlora-lite --help``) never imports torch.
"""

from importlib import import_module

__version__ = "0.1.0"

_API = {
    "load_recipe": "qlora_lite.recipe.load",
    "load_model": "qlora_lite.models.load",
    "load_tokenizer": "qlora_lite.models.tokenizer",
    "add_lora": "qlora_lite.lora.inject",
    "save_adapter": "qlora_lite.lora.adapter",
    "load_adapter": "qlora_lite.lora.adapter",
    "Source": "qlora_lite.data.read",
    "build_examples": "qlora_lite.data.examples",
    "Trainer": "qlora_lite.train.loop",
    "train_settings": "qlora_lite.build",
    "run_recipe": "qlora_lite.run",
    "plan_recipe": "qlora_lite.plan",
    "find_card": "qlora_lite.memory.cards",
    "machine_of_card": "qlora_lite.planning.machine",
    "evaluate_recipe": "qlora_lite.evaluate",
    "merge_run": "qlora_lite.merge",
    "MergeSettings": "qlora_lite.merge",
    "export_run": "qlora_lite.export.forms",
    "ExportSettings": "qlora_lite.export.forms",
    "open_tasks": "qlora_lite.tasks",
    "Turn": "qlora_lite.data.formats",
    "compare_runs": "qlora_lite.compare",
    "predict_file": "qlora_lite.predict",
    "PredictSettings": "qlora_lite.predict",
}

__all__ = [*_API, "__version__"]


def __getattr__(name: str):
    if name in _API:
        return getattr(import_module(_API[name]), name)
    raise AttributeError(f"module 'qlora_lite' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
