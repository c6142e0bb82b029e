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
    "add_lora": "qlora_lite.adapters.lora.inject",
    "save_adapter": "qlora_lite.adapters.files",
    "load_adapter": "qlora_lite.adapters.files",
    "Source": "qlora_lite.data.sources",
    "build_examples": "qlora_lite.data.examples",
    "Trainer": "qlora_lite.train.loop",
    "train_settings": "qlora_lite.prepare.build",
    "run_recipe": "qlora_lite.runs.run",
    "plan_recipe": "qlora_lite.prepare.plan",
    "find_gpu": "qlora_lite.memory.gpus",
    "machine_of_gpu": "qlora_lite.planning.machine",
    "evaluate_recipe": "qlora_lite.inference.evaluate",
    "merge_run": "qlora_lite.export.merge",
    "MergeSettings": "qlora_lite.export.merge",
    "export_run": "qlora_lite.export.formats",
    "ExportSettings": "qlora_lite.export.formats",
    "open_tasks": "qlora_lite.inference.multi_adapter",
    "Turn": "qlora_lite.data.row_formats",
    "compare_runs": "qlora_lite.inference.compare",
    "predict_file": "qlora_lite.inference.predict",
    "PredictSettings": "qlora_lite.inference.predict",
}

__all__ = [*_API, "__version__"]


def __getattr__(name: str):
    if name in _API:
        return getattr(import_module(_API[name]), name)
    raise AttributeError(f"module 'qlora_lite' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
