"""Jobs of causal language models with LoRA for plans in tests: fields of model, adapter and step in one list."""

from dataclasses import fields, replace

from qlora_lite.adapters.files import Lora
from qlora_lite.planning.simulate import Job
from qlora_lite.train.causal_lm import TextSpec, causal_lm


def new_job(config, shape, eval_shape=None, **settings):
    """A job of a model's configuration; what settings there are is in ``changed``."""
    return changed(Job(causal_lm(spec=TextSpec(config)), shape, eval_shape), **settings)


def changed(job, **changes):
    """The job with other fields of ``TextSpec``, of ``Lora`` (``factor_dtype`` is its dtype) or of ``Job`` itself."""
    parts = {}
    for kind in (TextSpec, Lora):
        names = {field.name for field in fields(kind)}
        parts[kind] = {name: changes.pop(name) for name in names & changes.keys()}
    if "factor_dtype" in changes:
        parts[Lora]["dtype"] = changes.pop("factor_dtype")
    work = job.workload
    work = replace(work, spec=replace(work.spec, **parts[TextSpec]), method=replace(work.method, **parts[Lora]))
    return replace(job, workload=work, **changes)
