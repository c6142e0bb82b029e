"""Fine-tune a 4-bit language model with LoRA in the memory you have.

The names in ``__all__`` are the Python API; they are imported on first use, so that
``import qlora_lite`` (and with it ``qlora-lite --help``) never imports torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING

__version__ = "0.1.0"

_API = {
    "load_recipe": "qlora_lite.recipe.load",
    "load_model": "qlora_lite.models.load",
    "load_tokenizer": "qlora_lite.models.tokenizer",
    "add_lora": "qlora_lite.adapters.lora.inject",
    "save_adapter": "qlora_lite.adapters.files",
    "load_adapter": "qlora_lite.adapters.files",
    "Source": "qlora_lite.data.readers.sources",
    "build_examples": "qlora_lite.data.tokens.examples",
    "Trainer": "qlora_lite.train.loop",
    "train_settings": "qlora_lite.prepare.settings",
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
    "Turn": "qlora_lite.data.chat.conversation",
    "compare_runs": "qlora_lite.inference.compare",
    "predict_file": "qlora_lite.inference.predict",
    "PredictSettings": "qlora_lite.inference.predict",
    "TrainSettings": "qlora_lite.train.settings",
    "MemoryOptions": "qlora_lite.models.memory_options",
    "AdapterMethod": "qlora_lite.adapters.method",
    "Lora": "qlora_lite.adapters.files",
    "Full": "qlora_lite.adapters.full",
    "Objective": "qlora_lite.train.objective",
    "LossSum": "qlora_lite.train.objective",
    "CrossEntropy": "qlora_lite.train.causal_lm",
    "Workload": "qlora_lite.train.workload",
    "ModelSpec": "qlora_lite.train.model_spec",
    "Batches": "qlora_lite.train.batches",
    "BatchShape": "qlora_lite.train.batches",
    "causal_lm": "qlora_lite.train.causal_lm",
    "MethodEntry": "qlora_lite.prepare.method",
    "ObjectiveEntry": "qlora_lite.prepare.objective",
    "Task": "qlora_lite.prepare.task",
    "Text": "qlora_lite.tasks.text",
    "Section": "qlora_lite.recipe.schema",
    "ExportForm": "qlora_lite.export.form",
    "Written": "qlora_lite.export.form",
    "QloraLiteError": "qlora_lite.errors",
}

__all__ = [*_API, "__version__"]


if TYPE_CHECKING:  # what editors and type checkers read; a test compares it with the table
    from .adapters.files import Lora as Lora
    from .adapters.files import load_adapter as load_adapter
    from .adapters.files import save_adapter as save_adapter
    from .adapters.full import Full as Full
    from .adapters.lora.inject import add_lora as add_lora
    from .adapters.method import AdapterMethod as AdapterMethod
    from .data.chat.conversation import Turn as Turn
    from .data.readers.sources import Source as Source
    from .data.tokens.examples import build_examples as build_examples
    from .errors import QloraLiteError as QloraLiteError
    from .export.form import ExportForm as ExportForm
    from .export.form import Written as Written
    from .export.formats import ExportSettings as ExportSettings
    from .export.formats import export_run as export_run
    from .export.merge import MergeSettings as MergeSettings
    from .export.merge import merge_run as merge_run
    from .inference.compare import compare_runs as compare_runs
    from .inference.evaluate import evaluate_recipe as evaluate_recipe
    from .inference.multi_adapter import open_tasks as open_tasks
    from .inference.predict import PredictSettings as PredictSettings
    from .inference.predict import predict_file as predict_file
    from .memory.gpus import find_gpu as find_gpu
    from .models.load import load_model as load_model
    from .models.memory_options import MemoryOptions as MemoryOptions
    from .models.tokenizer import load_tokenizer as load_tokenizer
    from .planning.machine import machine_of_gpu as machine_of_gpu
    from .prepare.method import MethodEntry as MethodEntry
    from .prepare.objective import ObjectiveEntry as ObjectiveEntry
    from .prepare.plan import plan_recipe as plan_recipe
    from .prepare.settings import train_settings as train_settings
    from .prepare.task import Task as Task
    from .recipe.load import load_recipe as load_recipe
    from .recipe.schema import Section as Section
    from .runs.run import run_recipe as run_recipe
    from .tasks.text import Text as Text
    from .train.batches import Batches as Batches
    from .train.batches import BatchShape as BatchShape
    from .train.causal_lm import CrossEntropy as CrossEntropy
    from .train.causal_lm import causal_lm as causal_lm
    from .train.loop import Trainer as Trainer
    from .train.model_spec import ModelSpec as ModelSpec
    from .train.objective import LossSum as LossSum
    from .train.objective import Objective as Objective
    from .train.settings import TrainSettings as TrainSettings
    from .train.workload import Workload as Workload
else:

    def __getattr__(name: str):
        if name in _API:
            return getattr(import_module(_API[name]), name)
        raise AttributeError(f"module 'qlora_lite' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*__all__, *(name for name in globals() if name.startswith("__"))})
