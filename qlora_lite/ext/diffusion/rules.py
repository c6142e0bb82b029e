"""Settings of a denoiser that do not go with others."""

from qlora_lite.ext.heads.rules import labels, no_text
from qlora_lite.ext.pictures.rules import ONLY_PICTURES, no_tokens
from qlora_lite.recipe.part import Found, Needs, Value
from qlora_lite.recipe.reference import written
from qlora_lite.recipe.schema import Diffusion

_NEEDS: Needs = {
    **ONLY_PICTURES,
    ("memory", "optimizer_in_backward"): (False,),
    ("memory", "layers_per_checkpoint"): (1,),
    ("memory", "stream_from"): ("host",),
    ("model", "compute_dtype"): ("bfloat16", "float32"),
    ("model", "keep_16bit"): ([],),
}


def conflicts(value: Value) -> Found:
    """Yield place and message of each."""
    yield from labels(value, are_exclusive=False)
    yield from no_text(value, ("lora", "full"), "a denoiser")
    yield from no_tokens(value, _NEEDS)
    if value("lora", "targets") == [] and value("adapter", "method") in (None, "lora"):
        yield ("lora", "targets"), "lora.targets = []: nothing is trained; name layers, or remove it"
    prediction, weighting = value("diffusion", "prediction"), value("diffusion", "weighting")
    fitting = {"flow": ("sigma_sqrt", "cosmap"), "epsilon": ("min_snr",), "v": ("min_snr",)}.get(str(prediction), ())
    if fitting and weighting not in (None, "none", *fitting):
        message = f"diffusion.weighting = {written(weighting)}: not with diffusion.prediction {prediction}"
        yield ("diffusion", "weighting"), f"{message}; write none or {' or '.join(fitting)}"
    usual_gamma = Diffusion.model_fields["min_snr_gamma"].default
    if value("diffusion", "min_snr_gamma") not in (None, usual_gamma) and weighting != "min_snr":
        message = "diffusion.min_snr_gamma: only with diffusion.weighting min_snr"
        yield ("diffusion", "min_snr_gamma"), f"{message}; remove it, or write that"
    if prediction in ("epsilon", "v") and value("diffusion", "shift") not in (None, "auto", 1):
        yield ("diffusion", "shift"), "diffusion.shift: only with diffusion.prediction flow; remove it"
