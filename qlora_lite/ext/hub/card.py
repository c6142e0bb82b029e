"""Write the model card of a run for the hub: a README.md with metadata, from what the run recorded.

It says nothing that the run did not measure, and nothing of the machine or its files: no paths, no examples of the
data, and of data sets only those that the hub has.
"""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import yaml

from qlora_lite.prepare.task import find_task
from qlora_lite.recipe.schema import Recipe
from qlora_lite.terminal import printable
from qlora_lite.units import format_score, format_seconds

PROJECT = "qlora-lite"
METHODS = {"lora": "LoRA", "dora": "DoRA", "full": "full fine-tuning"}  # of what can be exported
_HUB_DATA = "hub:"


@dataclass(frozen=True, slots=True)
class CardFacts:
    """What a model card is written from.

    Args:
        repo: OWNER/NAME of the repository.
        base_model: OWNER/NAME of the base model; None if it has none.
        licence: metadata of the base model that begins with "license"; empty where it has none.
        recipe: of the run.
        summary: what the run's ``summary.json`` holds.
        merged_into: for a merged model what it was merged into ("nf4", "original"); None for another.
        has_template: the tokenizer beside it has a chat template.
        notes: what a user of the files has to know.
        packed_as: how the files of the base model have the weights that were trained on; empty where they are in 16
            bit.
    """

    repo: str
    base_model: str | None
    licence: Mapping[str, str]
    recipe: Recipe
    summary: Mapping[str, Any]
    merged_into: str | None
    has_template: bool
    notes: tuple[str, ...] = ()
    packed_as: str = ""

    @property
    def is_model(self) -> bool:
        """Whether the files are a model, and no adapter."""
        return self.merged_into is not None or self.recipe.adapter.method == "full"


def model_card(facts: CardFacts) -> str:
    """Return the text of a model card."""
    parts = [
        f"---\n{yaml.safe_dump(_metadata(facts), sort_keys=False)}---",
        f"# {facts.repo.partition('/')[2]}",
        _introduction(facts),
        *(f"Note: {note}." for note in facts.notes),
        "## Use",
        f"```python\n{_use(facts)}\n```",
        _as_in_training(facts),
        _results(facts.summary),
        "## Training",
        _table(("setting", "value"), _settings(facts)),
        _versions(facts.summary),
        "## Licence",
        _licence(facts),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _metadata(facts: CardFacts) -> dict:
    data = [
        source.path.removeprefix(_HUB_DATA).partition(":")[0].split("/")[:2]
        for source in facts.recipe.data.train
        if source.path.startswith(_HUB_DATA)
    ]
    found = {
        "base_model": facts.base_model,
        "base_model_relation": facts.base_model and ("finetune" if facts.is_model else "adapter"),
        "library_name": "transformers" if facts.is_model else "peft",
        "pipeline_tag": "image-text-to-text" if find_task(facts.recipe).multimodal else "text-generation",
        "tags": [*_methods(facts), PROJECT],
        "datasets": list(dict.fromkeys("/".join(parts) for parts in data)),
    }
    return {key: value for key, value in {**found, **facts.licence}.items() if value}


def _methods(facts: CardFacts) -> list[str]:
    """Return what the hub calls the ways in which a run was trained."""
    method = facts.recipe.adapter.method
    if method == "full":
        return ["full-fine-tuning"]
    names = ["lora", "dora"] if method == "dora" else ["lora"]
    is_plain = facts.recipe.model.quant == "none" and not facts.packed_as
    return names if is_plain else [*names, *(f"q{name}" for name in names)]


def _introduction(facts: CardFacts) -> str:
    base = f"[{facts.base_model}](https://huggingface.co/{facts.base_model})" if facts.base_model else "A base model"
    weights = _weights(facts)
    kind = _name_of_method(facts.recipe)
    if facts.recipe.adapter.method == "full":
        what = f"{base} with all weights trained"
    elif facts.merged_into:
        what = (
            f"{base} with a {kind} adapter merged into its {facts.merged_into} weights, which was trained on {weights}"
        )
    else:
        what = f"A {kind} adapter for {base}, trained on {weights}"
    unfinished = "" if facts.summary.get("status") == "complete" else " The run did not finish."
    return f"{what} with {PROJECT}.{unfinished}"


def _weights(facts: CardFacts) -> str:
    quant = facts.recipe.model.quant
    return facts.packed_as or ("16-bit weights" if quant == "none" else f"{quant.upper()} weights")


def _name_of_method(recipe: Recipe) -> str:
    return METHODS[recipe.adapter.method]


def _use(facts: CardFacts) -> str:
    if find_task(facts.recipe).multimodal:
        return _use_with_pictures(facts)
    if facts.is_model:
        name, imports = "AutoModelForCausalLM", "from transformers import AutoModelForCausalLM, AutoTokenizer"
    else:
        name = "AutoPeftModelForCausalLM"
        imports = f"from peft import {name}\nfrom transformers import AutoTokenizer"
    encode = 'tokenizer("...", return_tensors="pt")'
    if facts.has_template:
        encode = (
            'tokenizer.apply_chat_template([{"role": "user", "content": "..."}], add_generation_prompt=True, '
            'return_tensors="pt", return_dict=True)'
        )
    return f"""{imports}
model = {name}.from_pretrained("{facts.repo}", dtype="auto", device_map="auto")
tokenizer = AutoTokenizer.from_pretrained("{facts.repo}")
inputs = {encode}.to(model.device)
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=128)[0], skip_special_tokens=True))"""


def _use_with_pictures(facts: CardFacts) -> str:
    """Return code for a chat with a picture, whose processor an adapter leaves to its base model."""
    whole = facts.repo if facts.is_model else facts.base_model
    of_peft = "" if facts.is_model else "from peft import PeftModel\n"
    adapted = "" if facts.is_model else f'model = PeftModel.from_pretrained(model, "{facts.repo}")\n'
    return f"""{of_peft}from transformers import AutoModelForImageTextToText, AutoProcessor
model = AutoModelForImageTextToText.from_pretrained("{whole}", dtype="auto", device_map="auto")
{adapted}processor = AutoProcessor.from_pretrained("{whole}")
content = [{{"type": "image", "path": "picture.jpg"}}, {{"type": "text", "text": "..."}}]
inputs = processor.apply_chat_template([{{"role": "user", "content": content}}], add_generation_prompt=True,
                                       tokenize=True, return_tensors="pt", return_dict=True).to(model.device)
print(processor.decode(model.generate(**inputs, max_new_tokens=128)[0], skip_special_tokens=True))"""


def _as_in_training(facts: CardFacts) -> str:
    quant = facts.recipe.model.quant
    if quant == "none" or facts.packed_as or facts.is_model:
        return ""
    double = str(facts.recipe.model.double_quant)
    skipped = [pattern.replace(".", r"\.").replace("*", ".*") for pattern in facts.recipe.model.keep_16bit]
    kept = f", llm_int8_skip_modules={['lm_head', *skipped]}" if skipped else ""
    return (
        "For the weights that training saw, give `from_pretrained` also `quantization_config=BitsAndBytesConfig("
        f'load_in_4bit=True, bnb_4bit_quant_type="{quant}", bnb_4bit_use_double_quant={double}{kept})` of transformers.'
    )


def _results(summary: Mapping[str, Any]) -> str:
    compared, metrics = _count(summary.get("exact_match_rows")), summary.get("metrics")
    rows = [
        (label, *(_figure(summary.get(f"{key}_{when}"), form) for when in ("before", "after")))
        for key, label, form in (
            ("eval_loss", "evaluation loss (nats per target token)", ".4f"),
            ("exact_match", f"exact match of {compared} answers" if compared != "-" else "exact match", ".1%"),
        )
        if any(_figure(summary.get(f"{key}_{when}"), form) != "-" for when in ("before", "after"))
    ]
    scores = [metrics.get(when) for when in ("before", "after")] if isinstance(metrics, dict) else [{}, {}]
    before, after = (found if isinstance(found, dict) else {} for found in scores)
    rows += [
        (
            _text(f"{name.replace('_', ' ')} of {score['examples']} answers {score.get('signature', '')}"),
            *(_score(name, found.get(name)) for found in (before, after)),
        )
        for name, score in after.items()
        if name != "exact_match" and _score(name, score) != "-"
    ]
    return f"## Results\n\n{_table(('on held-out examples', 'before', 'after'), rows)}" if rows else ""


def _score(name: str, score: object) -> str:
    found = score if isinstance(score, dict) else {}
    numbers = {key: value for key, value in found.items() if _figure(value, "g") != "-"}
    return format_score(name, numbers) if numbers.keys() >= {"value", "examples"} else "-"


def _figure(value: object, form: str) -> str:
    is_number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    return format(value, form) if is_number else "-"


def _settings(facts: CardFacts) -> list[tuple[str, str]]:
    r, summary, data = facts.recipe, facts.summary, facts.summary.get("data")
    counted = data if isinstance(data, dict) else {}
    rate = summary.get("learning_rate", r.train.learning_rate)  # earlier runs have it in the recipe alone
    also = ", ".join(r.adapter.train_also)
    targets = ", ".join(_code(target.pattern) for target in r.lora.targets)
    how = "-"
    if targets and r.adapter.method != "full":
        how = (
            f"rank {r.lora.rank}, alpha {r.lora.alpha:g}, dropout {r.lora.dropout:g}"
            f"{', rank-stabilized' if r.lora.rslora else ''}, on {targets}"
            f"{'; initialized from an earlier adapter' if r.lora.init_from else ''}"
        )
    rows = [
        ("examples", _count(counted.get("rows_kept"))),
        ("target tokens", _count(counted.get("target_tokens"))),
        (
            "base weights",
            facts.packed_as
            or "16 bit" * (r.model.quant == "none")
            or f"{r.model.quant.upper()}{', double quantization' if r.model.double_quant else ''}"
            f"{', but for ' + ', '.join(map(_code, kept)) if (kept := r.model.keep_16bit) else ''}",
        ),
        (_name_of_method(r), how),
        ("trained whole", f"{also}, at {r.adapter.train_also_lr_ratio:g} times the learning rate" if also else "-"),
        ("tokens with rows of their own", ", ".join(map(_code, r.adapter.train_tokens)) or "-"),
        ("trainable parameters", _count(summary.get("trainable_parameters"))),
        (
            "optimizer",
            f"{r.train.optimizer}, weight decay {r.train.weight_decay:g}"
            f"{f', gradient norm up to {most:g}' if (most := r.train.max_grad_norm) else ''}",
        ),
        (
            "learning rate",
            f"{_text(rate)}, {r.train.lr_scheduler}, warm-up {100 * r.train.warmup_ratio:g}%"
            f"{f', {r.train.loraplus_lr_ratio:g} times that for B' if r.train.loraplus_lr_ratio != 1 else ''}",
        ),
        ("steps", _count(summary.get("steps"))),
        (
            "sequences per step",
            f"{r.train.micro_batch_size * r.train.gradient_accumulation_steps}, "
            f"{'packed' if r.data.packing else 'not packed'}, of up to {r.data.max_tokens} tokens",
        ),
        (
            "loss on",
            {
                "assistant": "assistant messages",
                "completion": "completions",
                "all": "all tokens",
                "last": "the last assistant message",
            }[r.data.train_on],
        ),
        ("objective", r.train.objective if r.train.objective != "sft" else "-"),
        ("seed", str(r.train.seed)),
        ("time", format_seconds(summary["seconds"]) if _figure(summary.get("seconds"), "g") != "-" else "-"),
        ("device", _text(summary.get("device") or "-")),
    ]
    return [row for row in rows if row[1] != "-"]


def _text(value: object) -> str:
    """Write what the run recorded in one line that is not Markdown."""
    return re.sub(r"([\\`*<>\[\]])", r"\\\1", " ".join(printable(str(value)).split()))


def _code(text: str) -> str:
    text = " ".join(printable(text).split())
    return f"`` {text} ``" if "`" in text else f"`{text}`"


def _count(value: object) -> str:
    return _figure(value, ",")


def _table(head: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    lines = [head, ("---",) * len(head), *rows]
    return "\n".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |" for line in lines)


def _versions(summary: Mapping[str, Any]) -> str:
    versions = summary.get("versions")
    if not isinstance(versions, dict) or not versions:
        return ""
    return f"Versions: {', '.join(_text(f'{name} {version}') for name, version in versions.items())}."


def _licence(facts: CardFacts) -> str:
    if name := facts.licence.get("license_name") or facts.licence.get("license"):
        return f"That of the base model: {name}."
    return "That of the base model; see its page."
