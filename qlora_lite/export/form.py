"""What a form of another program is, in which a run is exported: the interface, and what every form needs.

A form is registered by its name in the group ``qlora_lite.forms`` (``registry``), the package's own forms too. It
writes files and, apart from that, reads them back and compares what they do with the run: without this proof nothing
is left in the folder.
"""

import copy
import gc
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol, runtime_checkable

import torch
from torch import nn

from qlora_lite.adapters.read import Adapter
from qlora_lite.artifacts.trained_run import TrainedRun
from qlora_lite.models.streamed import streamed_model
from qlora_lite.models.weights import open_weights
from qlora_lite.prepare.model import build_to_use
from qlora_lite.prepare.task import find_task

from .check import Change, change_of

# In float32: a larger model is not loaded as a whole for the check, but read block by block, see ``models.streamed``.
WHOLE_BYTES = 4 * 2**30


@dataclass(frozen=True, slots=True)
class Job:
    """What every form needs.

    Args:
        trained: the run.
        skeleton: its base model on the meta device.
        adapter: its LoRA weights.
        out: the folder to write, new or empty.
        base, dtype: see ``export.formats.ExportSettings``.
    """

    trained: TrainedRun
    skeleton: nn.Module
    adapter: Adapter
    out: Path
    base: str | None = None
    dtype: str | None = None


@dataclass(frozen=True, slots=True)
class Written:
    """What a form has written.

    Args:
        report: entries of ``export_report.json``: "use", the command or call that loads it, and "notes", a list.
        kept: what the form's own check needs.
    """

    report: dict = field(default_factory=dict)
    kept: object = None


@runtime_checkable
class ExportForm(Protocol):
    """A form of another program.

    ``dtypes`` are the types that a form with the whole model can be written in; a form without any holds the adapter
    alone. ``draws`` says that it is for denoisers, and for no other model.
    """

    dtypes: tuple[str, ...]
    draws: bool

    def write(self, job: Job) -> Written:
        """Write files into ``job.out``.

        Raises:
            ModelError: the form cannot hold the run.
        """

    def check(self, job: Job, written: Written) -> dict:
        """Read the files back, compare what they do with the run, and return entries of the report.

        Raises:
            ModelError: they do something else.
        """


def load_base(job: Job) -> nn.Module:
    """Load the base as the run saw it, in float32, where rounding does not hide what an adapter does.

    A large one in 16 bit, which would take twice its bytes, is read block by block.
    """
    gc.collect()  # the model before this one
    recipe, adapter, config = job.trained.recipe, job.trained.adapter, job.skeleton.config
    is_large = 4 * sum(parameter.numel() for parameter in job.skeleton.parameters()) > WHOLE_BYTES
    if is_large and recipe.model.quant == "none" and not find_task(recipe).multimodal and not config.problem_type:
        read = open_weights(job.trained.files, job.skeleton, torch.float32).reader()
        return streamed_model(copy.deepcopy(config), lambda name: read(name).float())
    model = recipe.model.model_copy(update={"compute_dtype": "float32"})
    return build_to_use(recipe.model_copy(update={"model": model}), [adapter] if adapter else [])


def adapter_change(job: Job) -> Change:
    """Return what the adapter changes in its base."""
    return change_of(load_base(job), job.adapter)
