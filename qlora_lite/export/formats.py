"""Export a run: write the form that was asked for, read it back, and compare what it does with the run's adapter."""

import json
import shutil
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

from qlora_lite.adapters.files import attach_adapter
from qlora_lite.artifacts.trained_run import open_trained
from qlora_lite.errors import ModelError, require_one_of
from qlora_lite.files import require_empty, write_text
from qlora_lite.prepare.start import without_start
from qlora_lite.quant.merging import OFF
from qlora_lite.registry import find, names

from .check import distance_of, logits_of
from .form import ExportForm, Job, load_base
from .merge import BASES

REPORT = "export_report.json"


@dataclass(frozen=True, slots=True)
class ExportSettings:
    """What is exported and how.

    Args:
        to: name of a form, such as "peft", "vllm", "gguf", "gguf-adapter" or "ollama"; of a denoiser "kohya".
        base: of a merged model, see ``export.merge.MergeSettings``.
        dtype: of a GGUF model's matrices: "f16", "bf16", "q8_0" or "q4_0"; None takes what the run was trained to be
            merged into (``train.merge_aware``), else "f16".
    """

    to: str
    base: str | None = None
    dtype: str | None = None

    def __post_init__(self) -> None:
        require_one_of("to", self.to, names("forms"))
        require_one_of("base", self.base, BASES)
        if (self.base or self.dtype) and not self.form.dtypes:
            raise ModelError(f"base and dtype are for merged models (gguf, ollama), not for {self.to}; leave them out")
        require_one_of("dtype", self.dtype, (None, *self.form.dtypes))

    @property
    def form(self) -> ExportForm:
        """The form of that name."""
        return find("forms", self.to, ExportForm)


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
    form = settings.form
    trained = open_trained(run, model_path, unfinished, draws=form.draws)
    if not form.dtypes:
        others = "transformers and vLLM load it as it is, --to gguf and ollama convert it"
        trained.require_adapter("diffusers loads it as it is" if form.draws else others)
    skeleton = trained.skeleton()
    job = Job(trained, skeleton, trained.adapter_to_merge(skeleton), out, settings.base, settings.dtype)
    job, notes = (job, []) if form.dtypes else _for_files(job)
    with ExitStack() as unproven:  # new or empty before: what is not proven, or stopped, is not left lying around
        unproven.callback(shutil.rmtree, out, ignore_errors=True)
        written = form.write(job)
        found = form.check(job, written)
        unproven.pop_all()
    report = {
        "run": trained.name,
        "form": settings.to,
        "base_model": trained.files.name,
        "layers": len(job.adapter.layers),
        "size_bytes": sum(file.stat().st_size for file in out.iterdir()),
        **found,
        **written.report,
        "notes": [*notes, *written.report.get("notes", []), *found.get("notes", [])],
    }
    write_text(out / REPORT, json.dumps(report, indent=2) + "\n")
    return report


def _for_files(job: Job) -> tuple[Job, list[str]]:
    """Return a job whose adapter fits the model as its files have it, for programs that load that, and notes."""
    trained, start = job.trained, job.trained.start
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
    distance = distance_of(logits_of(attach_adapter(load_base(job), adapter)), own)
    return job, [
        f"the run began with lora.start {start}: this adapter, of twice the rank, is for the model's "
        f"16-bit files, where its logits are {distance:.1e} of their size from those of the run"
    ]
