"""Read the settings of another trainer's file: name, value and place, without running anything in it.

YAML of axolotl, LLaMA-Factory, torchtune, trl and unsloth's studio goes through `strict_yaml`, so that no alias is
expanded. A Python script or notebook (unsloth, trl) is parsed with `ast`; of the calls that configure a run the keyword
arguments are read where they are literals, or a name that is assigned once, to a literal. Anything else is code, and
is listed as such. Importing the script, or its trainer's own configuration class, would be exact, and would run it.
"""

from __future__ import annotations

import ast
import json
import re
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from qlora_lite.errors import Problem, RecipeError

from .schema import Recipe
from .strict_yaml import MAX_BYTES, NOT_TEXT, Node, parse, plain

MAX_CODE_BYTES = 4 * MAX_BYTES
MAX_NOTEBOOK_BYTES = 8 * 2**20  # with the pictures among its outputs
_LLAMA_FACTORY = {"stage", "finetuning_type", "cutoff_len", "dataset_dir", "template", "lora_target", "do_train"}
_MODELS = {"FastLanguageModel", "FastModel", "AutoModelForCausalLM"}
_TRL = "SFT", "DPO", "KTO", "ORPO", "CPO", "Reward"
_TRL_CONFIGS = {f"{name}Config" for name in _TRL}
_CALLS = {
    "get_peft_model", "LoraConfig", "BitsAndBytesConfig", "TrainingArguments", "UnslothTrainingArguments",
    "UnslothTrainer", "Trainer", "get_chat_template", *_TRL_CONFIGS, *(f"{name}Trainer" for name in _TRL),
}  # fmt: skip
_OTHER_TRAINERS = re.compile(r"(?!SFT|Unsloth)[A-Z]\w+Trainer|(DPO|KTO|ORPO|CPO|PPO|GRPO|RLOO|Reward|GKD)Config")
_PLUMBING = {
    "model", "tokenizer", "processing_class", "args", "train_dataset", "peft_config", "callbacks", "mapping",
    "quantization_config", "config", "map_eos_token", "num_labels", "optimizers",
}  # fmt: skip
_MAGIC = re.compile(r"^(\s*)[!%].*$", re.MULTILINE)
_INTERPOLATED = re.compile(r"\$\{([\w.]+)\}")


@dataclass(frozen=True, slots=True)
class Code:
    """Stand for a value that is an expression, which is not evaluated."""

    text: str


@dataclass(frozen=True, slots=True)
class Setting:
    """Hold one setting of another trainer.

    Args:
        name: dotted, with the number of a list's item, such as "datasets.0.path".
        value: plain, a list of plain ones, an empty mapping, or Code.
        where: "file.yml:7", or "file.ipynb, cell 3, line 5".
    """

    name: str
    value: object
    where: str


def trainer_of(root: Node) -> str | None:
    """Return whose file a YAML mapping is, by its keys; None where it is nobody's that is known, such as a recipe."""
    values = root.value if isinstance(root.value, dict) else {}
    training, model = values.get("training"), values.get("model")
    if training and model and isinstance(training.value, dict) and isinstance(model.value, str):
        return "unsloth-studio"
    if len(values.keys() - Recipe.model_fields.keys()) < 3:
        return None
    if any(isinstance(child.value, dict) and "_component_" in child.value for child in values.values()):
        return "torchtune"
    if "model_name_or_path" in values:
        return "LLaMA-Factory" if values.keys() & _LLAMA_FACTORY else "trl"
    return "axolotl" if "base_model" in values else None


def read_settings(path: Path) -> tuple[str, list[Setting]]:
    """Return whose file it is, and its settings in its order.

    Raises:
        RecipeError: it cannot be read, is too large, or is of no trainer that is known.
    """
    limit = {".ipynb": MAX_NOTEBOOK_BYTES, ".py": MAX_CODE_BYTES}.get(path.suffix, MAX_BYTES)
    try:
        with path.open("rb") as file:
            content = file.read(limit + 1)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise RecipeError(Problem(f"cannot be read: {reason}", str(path))) from None
    if len(content) > limit:
        raise RecipeError(Problem(f"is too large to convert; the limit is {limit:,} bytes", str(path)))
    if path.suffix in (".py", ".ipynb"):
        cells = _cells(content, path) if path.suffix == ".ipynb" else [(f"{path}:", _decoded(content, path))]
        is_unsloth = any("FastLanguageModel" in text or "FastModel" in text for _, text in cells)
        return "unsloth" if is_unsloth else "trl", _settings_of_code(cells, path)
    document = parse(content, str(path))
    if document.problems:
        raise RecipeError(document.problems)
    root = document.root
    trainer = trainer_of(root) if root is not None else None
    if root is None or trainer is None:
        known = "axolotl, LLaMA-Factory, torchtune, trl or unsloth"
        raise RecipeError(Problem(f"is not a YAML file of {known}, nor a .py or .ipynb file", str(path)))
    flat = list(_flat(root, ""))
    texts = {setting.name: setting.value for setting in flat if isinstance(setting.value, str | int | float)}
    return trainer, [Setting(s.name, _interpolated(s.value, texts), s.where) for s in flat]


def _flat(node: Node, name: str) -> Iterator[Setting]:
    """Yield the settings below a node; a list of plain values is one value."""
    prefix = f"{name}." if name else ""
    if isinstance(node.value, dict) and node.value:
        for key, child in node.value.items():
            yield from _flat(child, f"{prefix}{key}")
    elif isinstance(node.value, list) and any(isinstance(item.value, dict | list) for item in node.value):
        for number, item in enumerate(node.value):
            yield from _flat(item, f"{prefix}{number}")
    else:
        yield Setting(name, plain(node), node.where)


def _interpolated(value: object, texts: Mapping[str, object]) -> object:
    """Return a value with the ${name} that torchtune's files have replaced once, or Code where one names nothing."""
    if not isinstance(value, str) or "${" not in value:
        return value
    replaced = _INTERPOLATED.sub(lambda found: str(texts.get(found[1], found[0])), value)
    return Code(value) if "${" in replaced else replaced


def _decoded(content: bytes, path: Path) -> str:
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise RecipeError(Problem("is not UTF-8; save it as UTF-8", str(path))) from None


def _cells(content: bytes, path: Path) -> list[tuple[str, str]]:
    """Return (place, text) of a notebook's cells of code."""
    try:
        cells = json.loads(_decoded(content, path))["cells"]
        texts = [("".join(cell["source"]), cell["cell_type"]) for cell in cells]
    except (ValueError, KeyError, TypeError, RecursionError):
        raise RecipeError(Problem("is not a notebook; save it as .ipynb again", str(path))) from None
    numbered = enumerate(texts, start=1)
    return [(f"{path}, cell {number}, line ", text) for number, (text, kind) in numbered if kind == "code"]


def _settings_of_code(cells: list[tuple[str, str]], path: Path) -> list[Setting]:
    """Return the settings of the calls that configure a run.

    Raises:
        RecipeError: it is no Python, or calls nothing that is known.
    """
    if sum(len(text) for _, text in cells) > MAX_CODE_BYTES:
        raise RecipeError(Problem(f"has too much code to convert; the limit is {MAX_CODE_BYTES:,} bytes", str(path)))
    trees = [(place, _parsed(place, text)) for place, text in cells]
    nodes = [(place, node) for place, tree in trees for node in _walk(tree)]
    constants = _constants([node for _, node in nodes])
    found = [
        Setting(name, value, f"{place}{line}")
        for place, call in nodes if isinstance(call, ast.Call)
        for name, value, line in _arguments(call, constants)
    ]  # fmt: skip
    if not found:
        names = "FastLanguageModel.from_pretrained, get_peft_model, SFTConfig, TrainingArguments, SFTTrainer"
        raise RecipeError(Problem(f"calls none of {names}; nothing to convert", str(path)))
    return _numbered(found)


def _parsed(place: str, text: str) -> ast.Module:
    text = _MAGIC.sub(r"\1pass", text)  # !pip and %%capture, also as the only line below an `if`
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of escapes such as "\d"
            return ast.parse(text)
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        line = getattr(error, "lineno", None) or 1
        reason = getattr(error, "msg", None) or type(error).__name__
        raise RecipeError(Problem(f"is not Python ({reason}); correct or remove it", f"{place}{line}")) from None


def _walk(tree: ast.AST) -> Iterator[ast.AST]:
    """Yield all nodes in the order of the text, but for those below `if False:`; by a stack, however deep they are."""
    stack = [tree]
    while stack:
        node = stack.pop()
        yield node
        if isinstance(node, ast.If) and isinstance(node.test, ast.Constant) and not node.test.value:
            stack += node.orelse[::-1]
        else:
            stack += list(ast.iter_child_nodes(node))[::-1]


def _constants(nodes: Sequence[ast.AST]) -> dict[str, object]:
    """Return the value of each name that is assigned once, and that to a literal."""
    stored = [node.id for node in nodes if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)]
    counts = Counter(stored + [node.arg for node in nodes if isinstance(node, ast.arg)])
    values = {target.id: _literal(node.value, {}) for node in nodes
              if isinstance(node, ast.Assign) and isinstance(target := node.targets[0], ast.Name)}  # fmt: skip
    return {name: value for name, value in values.items() if counts[name] == 1 and not isinstance(value, Code)}


def _literal(node: ast.expr, constants: Mapping[str, object]) -> object:
    if isinstance(node, ast.Name) and node.id in constants:
        return constants[node.id]
    try:
        value = ast.literal_eval(node)
    except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
        return Code(_source(node))
    value = list(value) if isinstance(value, tuple) else value
    return value if _is_plain(value) else Code(_source(node))


def _is_plain(value: object) -> bool:
    """Return whether a value is one that YAML has too."""
    if isinstance(value, list):
        return all(map(_is_plain, value))
    if isinstance(value, dict):
        return all(map(_is_plain, [*value, *value.values()]))
    return (
        value is None
        or isinstance(value, bool | int | float)
        or (isinstance(value, str) and not NOT_TEXT.search(value))
    )


def _source(node: ast.expr) -> str:
    try:
        return ast.unparse(node)
    except RecursionError:
        return "..."


def _arguments(call: ast.Call, constants: Mapping[str, object]) -> Iterator[tuple[str, object, int]]:
    """Yield (name, value, line) of a call's settings, where it is one that configures a run."""
    func, owner = call.func, None
    if is_method := isinstance(func, ast.Attribute):
        name, owner = func.attr, func.value
    else:
        name = getattr(func, "id", "")
    is_model = name == "from_pretrained" and is_method and getattr(owner, "id", "") in _MODELS
    prefix, positional = "", []
    if _OTHER_TRAINERS.fullmatch(name):
        yield "stage", name, call.lineno
    elif name == "train_on_responses_only":
        yield name, True, call.lineno
    elif name == "map" and is_method and call.args:
        yield "formatting_func", Code(_source(call.args[0])), call.lineno
    elif name in ("select", "filter") and is_method and (call.args or call.keywords):
        first = call.args[0] if call.args else call.keywords[0].value
        yield name, Code(_source(first)), call.lineno
    elif name == "train_test_split" and is_method:
        words = {word.arg: word.value for word in call.keywords}
        size = call.args[0] if call.args else words.get("test_size", words.get("train_size"))
        is_test = size is None or call.args or "test_size" in words
        held_out = 0.25 if size is None else _literal(size, constants)
        yield "test_size", held_out if is_test else Code(_source(call)), call.lineno
    elif name == "load_dataset":
        prefix, positional = "load_dataset.", ["path", "name"]
    elif is_model:
        positional = ["model_name"]
    elif name not in _CALLS:
        return
    if name in _TRL_CONFIGS:
        yield "config_class", name, call.lineno
    if prefix or is_model or name in _CALLS:
        given = [*zip(positional, call.args, strict=False), *((word.arg or "**", word.value) for word in call.keywords)]
        for word, value in given:
            if word not in _PLUMBING:
                yield prefix + word, _literal(value, constants), value.lineno


def _numbered(settings: list[Setting]) -> list[Setting]:
    """Return the settings with each call of load_dataset as an item of its own, as a list of data sets has them."""
    number, numbered = -1, []
    for setting in settings:
        head, _, leaf = setting.name.partition(".")
        if head == "load_dataset":
            number += leaf == "path"
            setting = Setting(f"datasets.{number}.{leaf}", setting.value, setting.where)
        numbered.append(setting)
    return numbered
