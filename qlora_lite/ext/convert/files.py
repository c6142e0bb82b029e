"""Read the settings of another trainer's file: name, value and place, without running anything in it.

YAML of axolotl, LlamaFactory, torchtune, trl and unsloth's studio goes through `strict_yaml`, so that no alias is
expanded. A Python script or notebook (unsloth, trl) is parsed with `ast`; of the calls that configure a run the keyword
arguments are read where they are literals, names that are assigned nothing but one literal, or arithmetic with these.
Anything else is code, and is listed as such. Importing the script, or its trainer's own configuration class, would be
exact, and would run it. trl's own scripts hold no values: the command that starts one is read in its place, as it
stands or as the one line of a shell script.
"""

from __future__ import annotations

import ast
import json
import operator
import os
import re
import shlex
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qlora_lite.errors import Problem, RecipeError
from qlora_lite.recipe.foreign_names import trainer_of
from qlora_lite.recipe.strict_yaml import MAX_BYTES, NOT_TEXT, Node, parse, plain, scalar_value, shown

MAX_CODE_BYTES = 4 * MAX_BYTES
MAX_NOTEBOOK_BYTES = 8 * 2**20  # with the pictures among its outputs
_VISION_MODELS = {"FastVisionModel", "AutoModelForImageTextToText", "AutoModelForVision2Seq"}
_MODELS = {"FastLanguageModel", "FastModel", "AutoModelForCausalLM", *_VISION_MODELS}
_TRL = "SFT", "DPO", "KTO", "ORPO", "CPO", "Reward", "GRPO"
_TRL_CONFIGS = {f"{name}Config" for name in _TRL}
_CALLS = {
    "get_peft_model",
    "LoraConfig",
    "BitsAndBytesConfig",
    "TrainingArguments",
    "UnslothTrainingArguments",
    "UnslothTrainer",
    "Trainer",
    "get_chat_template",
    *_TRL_CONFIGS,
    *(f"{name}Trainer" for name in _TRL),
}
_PARSERS = {"TrlParser", "HfArgumentParser"}
_OF_CLASSES = {"stage", "kind", "config_class", "use_peft"}  # what the names of classes and arguments say
_STAGE = re.compile(r"(sft|dpo|kto|orpo|cpo|grpo|reward)(?![a-z])")
_OTHER_TRAINERS = re.compile(r"(?!SFT|Unsloth|Patch)[A-Z]\w+Trainer|(DPO|KTO|ORPO|CPO|PPO|GRPO|RLOO|Reward|GKD)Config")
_ARITHMETIC = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
}
_MAX_STEPS = 8  # from a name to its literal, and down in arithmetic
ALPACA, CHAT_TEMPLATE = "Alpaca's prompt", "the chat template"  # what a function that makes texts of rows applies
_PLUMBING = {
    "model",
    "tokenizer",
    "processing_class",
    "args",
    "train_dataset",
    "peft_config",
    "callbacks",
    "mapping",
    "quantization_config",
    "config",
    "map_eos_token",
    "num_labels",
    "optimizers",
    "data_collator",
}
_MAGIC = re.compile(r"^(\s*)[!%].*$", re.MULTILINE)
_TRAINERS = re.compile(r"\b(llamafactory-cli|axolotl|tune run)\b")
_STARTS = re.compile(rf"(\btrl +[a-z]+|\.py) +-|{_TRAINERS.pattern}")
_ASSIGNED = re.compile(r"""^\s*(?:export )?(\w+)=([\w./:@-]+|'[^']*'|"[^"$`]*")\s*$""", re.MULTILINE)
_VARIABLE = re.compile(r"\$\{?(\w+)\}?")
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


_Names = Mapping[str, ast.expr]
_Functions = Mapping[str, str | None]


def is_command(text: str) -> bool:
    """Return whether a text is the command that starts a script, and not a file's name."""
    return " --" in text and not os.path.exists(text)


def read_script(path: Path) -> str:
    """Return the command of a shell script that starts a training, or the one YAML file that it gives to a trainer.

    Raises:
        RecipeError: there is no such line, or several, or one that a shell would have to evaluate.
    """
    text = _decoded(_content(path), path).replace("\\\n", " ")
    assigned = dict(_ASSIGNED.findall(text))
    lines = [line for whole in text.splitlines() if _STARTS.search(line := whole.partition("#")[0].strip())]
    command = _VARIABLE.sub(lambda found: assigned.get(found[1], found[0]).strip("'\""), lines[0]) if lines else ""
    if len(lines) != 1 or set("$`|;&<>()") & set(command):
        example = "qlora-lite recipes convert 'trl sft --model_name_or_path ...'"
        raise RecipeError(Problem(f"has no one plain line that starts a training; paste it: {example}", str(path)))
    files = [word for word in command.split() if word.endswith((".yaml", ".yml"))]
    is_whole = len(files) == 1 and (command.endswith(files[0]) and _TRAINERS.search(command))
    return files[0] if is_whole and "--" not in command.replace("--config", "") else command


def read_command(text: str) -> tuple[str, list[Setting]]:
    """Return the name and the settings of a command that starts a script of trl, such as "trl sft --lora_r 8".

    Those of the file that it names with --config come after its own.

    Raises:
        RecipeError: it is no such command, or that file cannot be read.
    """
    try:
        words = shlex.split(text.replace("\\\n", " "))
    except ValueError as error:
        raise RecipeError(Problem(f"is not a command: {error}", shown(text))) from None
    scripts = [word for word, before in zip(words[1:], words, strict=False) if before == "trl" or word.endswith(".py")]
    stage = _STAGE.match(Path(scripts[0]).stem) if scripts else None
    if scripts and not stage and os.path.isfile(scripts[0]):
        stage = re.search(rf"\b({'|'.join(_TRL)})(?=Trainer\()", _content(Path(scripts[0])).decode(errors="replace"))
    if not stage:
        message = "names no script of trl; write the whole command, such as 'trl sft --model_name_or_path ...'"
        raise RecipeError(Problem(message, shown(text)))
    given: dict[str, list[str]] = {}
    for word in words:
        if word.startswith("--"):
            key, is_given, value = word[2:].partition("=")
            given[key] = [value] if is_given else []
        elif given and not word.endswith(".py"):
            given[next(reversed(given))].append(word)
    name = f"trl {stage[0].lower()}"
    settings = [Setting("stage", stage[0].lower(), name)]
    for key, texts in given.items():
        values: list[Any] = [scalar_value(value) for value in texts] or [not key.startswith("no_")]
        named = key if texts else key.removeprefix("no_")
        settings.append(Setting(named, values if len(values) > 1 else values[0], name))
    own = {"config", *(setting.name for setting in settings)}
    for file in given.get("config", ()):
        settings += [setting for setting in _read_yaml(Path(file))[1] if setting.name not in own]
    return name, [setting for setting in settings if setting.name != "config"]


def read_settings(path: Path) -> tuple[str, list[Setting]]:
    """Return whose file it is, and its settings in its order.

    Raises:
        RecipeError: it cannot be read, is too large, or is of no trainer that is known.
    """
    if path.suffix in (".py", ".ipynb"):
        content = _content(path)
        cells = _cells(content, path) if path.suffix == ".ipynb" else [(f"{path}:", _decoded(content, path))]
        is_unsloth = any(re.search(r"\bFast(Language|Vision)?Model\b", text) for _, text in cells)
        return "unsloth" if is_unsloth else "trl", _settings_of_code(cells, path)
    root, settings = _read_yaml(path)
    trainer = trainer_of(root) if root is not None else None
    if trainer is None:
        known = "axolotl, LlamaFactory, torchtune, trl or unsloth"
        raise RecipeError(Problem(f"is not a YAML file of {known}, nor a .py or .ipynb file", str(path)))
    return trainer, settings


def _content(path: Path) -> bytes:
    limit = {".ipynb": MAX_NOTEBOOK_BYTES, ".py": MAX_CODE_BYTES}.get(path.suffix, MAX_BYTES)
    try:
        with path.open("rb") as file:
            content = file.read(limit + 1)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise RecipeError(Problem(f"cannot be read: {reason}", str(path))) from None
    if len(content) > limit:
        raise RecipeError(Problem(f"is too large to convert; the limit is {limit:,} bytes", str(path)))
    return content


def _read_yaml(path: Path) -> tuple[Node | None, list[Setting]]:
    document = parse(_content(path), str(path))
    if document.problems:
        raise RecipeError(document.problems)
    flat = list(_flat(document.root, "")) if document.root is not None else []
    texts = {setting.name: setting.value for setting in flat if isinstance(setting.value, str | int | float)}
    return document.root, [Setting(s.name, _interpolated(s.value, texts), s.where) for s in flat]


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
    assigned = _assignments([node for _, node in nodes])
    functions = {node.name: _applied(node, assigned) for _, node in nodes if isinstance(node, ast.FunctionDef)}
    found = [
        Setting(name, value, f"{place}{line}")
        for place, call in nodes
        if isinstance(call, ast.Call)
        for name, value, line in _arguments(call, assigned, functions)
    ]
    if not found:
        names = "FastLanguageModel.from_pretrained, get_peft_model, SFTConfig, TrainingArguments, SFTTrainer"
        raise RecipeError(Problem(f"calls none of {names}; nothing to convert", str(path)))
    named = {getattr(node, "id", "") for _, node in nodes}
    if named & _PARSERS and all(s.name in _OF_CLASSES or isinstance(s.value, Code | None) for s in found):
        command = f"qlora-lite recipes convert 'python {path} --model_name_or_path ...'"
        raise RecipeError(Problem(f"its settings are on the command line; convert that: {command}", str(path)))
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


def _assignments(nodes: Sequence[ast.AST]) -> dict[str, ast.expr]:
    """Return the expression that each name is assigned, of names that are never assigned another."""
    found: dict[str, list[ast.expr]] = {}
    for node in nodes:
        pairs: list[tuple[ast.expr, ast.expr]] = []
        if isinstance(node, ast.AnnAssign) and node.value:
            pairs = [(node.target, node.value)]
        elif isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Tuple):
            pairs = list(zip(node.targets[0].elts, getattr(node.value, "elts", ()), strict=False))
        elif isinstance(node, ast.Assign):
            pairs = [(node.targets[0], node.value)]
        for target, value in pairs:
            if isinstance(target, ast.Name):
                found.setdefault(target.id, []).append(value)
    stored = [node.id for node in nodes if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)]
    counts = Counter(stored + [node.arg for node in nodes if isinstance(node, ast.arg)])
    return {
        name: values[0]
        for name, values in found.items()
        if len(values) == counts[name] and len(set(map(_source, values))) == 1
    }


def _literal(node: ast.expr, assigned: _Names, steps: int = _MAX_STEPS) -> object:
    """Return the value of an expression that comes to a literal, and Code for any other."""
    if steps and isinstance(node, ast.Name) and node.id in assigned:
        value = _literal(assigned[node.id], assigned, steps - 1)
        return Code(node.id) if isinstance(value, Code) else value
    if steps and isinstance(node, ast.BinOp) and (compute := _ARITHMETIC.get(type(node.op))):
        sides = [_literal(side, assigned, steps - 1) for side in (node.left, node.right)]
        if all(type(side) in (int, float) for side in sides):
            try:
                return compute(*sides)
            except (ZeroDivisionError, OverflowError):
                return Code(_source(node))
    try:
        value = ast.literal_eval(node)
    except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
        return Code(_source(node))
    value = list(value) if isinstance(value, tuple) else value
    return value if _is_plain(value) else Code(_source(node))


def _applied(function: ast.AST, assigned: _Names) -> str | None:
    """Return what a function that makes texts of rows applies to them: ALPACA, CHAT_TEMPLATE, or nothing known."""
    inside = list(_walk(function))
    if any(isinstance(part, ast.Attribute) and part.attr == "apply_chat_template" for part in inside):
        return CHAT_TEMPLATE
    named = [assigned[part.id] for part in inside if isinstance(part, ast.Name) and part.id in assigned]
    texts = [part.value for part in (*inside, *named) if isinstance(part, ast.Constant) and isinstance(part.value, str)]
    headings = {heading for text in texts for heading in re.findall("### (.*)", text)}
    is_alpaca = any("### Instruction:\n{" in text for text in texts)
    return ALPACA if is_alpaca and headings <= {"Instruction:", "Input:", "Response:"} else None


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


def _arguments(call: ast.Call, assigned: _Names, functions: _Functions) -> Iterator[tuple[str, object, int]]:
    """Yield (name, value, line) of a call's settings, where it is one that configures a run."""
    func, owner = call.func, None
    if is_method := isinstance(func, ast.Attribute):
        name, owner = func.attr, getattr(func.value, "id", "")
    else:
        name = getattr(func, "id", "")
    is_model = name == "from_pretrained" and owner in _MODELS
    prefix, positional = "", []
    if is_model and owner in _VISION_MODELS:
        yield "kind", "image-text-to-text", call.lineno
    if _OTHER_TRAINERS.fullmatch(name):
        yield "stage", name, call.lineno
    elif name == "train_on_responses_only":
        yield name, True, call.lineno
    elif name == "map" and is_method and call.args:
        yield "formatting_func", _made_by(call.args[0], assigned, functions), call.lineno
    elif name in ("select", "filter") and is_method and (call.args or call.keywords):
        first = call.args[0] if call.args else call.keywords[0].value
        yield name, Code(_source(first)), call.lineno
    elif name == "train_test_split" and is_method:
        words = {word.arg: word.value for word in call.keywords}
        size = call.args[0] if call.args else words.get("test_size", words.get("train_size"))
        is_test = size is None or call.args or "test_size" in words
        held_out = 0.25 if size is None else _literal(size, assigned)
        yield "test_size", held_out if is_test else Code(_source(call)), call.lineno
    elif name == "load_dataset":
        prefix, positional = "load_dataset.", ["path", "name"]
    elif is_model:
        positional = ["model_name"]
    elif name not in _CALLS:
        return
    if name in _TRL_CONFIGS:
        yield "config_class", name, call.lineno
    elif name in ("LoraConfig", "get_peft_model"):
        yield "use_peft", True, call.lineno
    if prefix or is_model or name in _CALLS:
        for word, value in [*zip(positional, call.args, strict=False), *_keywords(call, assigned)]:
            yield from _argument(prefix + word, value, assigned, functions)


def _argument(word: str, value: ast.expr, assigned: _Names, functions: _Functions) -> Iterator[tuple[str, object, int]]:
    """Yield what one argument says, if it is a setting."""
    made = assigned.get(value.id) if isinstance(value, ast.Name) else None
    if word == "peft_config" and not (isinstance(value, ast.Constant) and value.value is None):
        yield "use_peft", True, value.lineno
    elif word == "reward_funcs" and isinstance(value, ast.List):
        yield word, [_source(part) for part in value.elts], value.lineno
    elif word == "formatting_func":
        yield word, _made_by(value, assigned, functions), value.lineno
    elif word == "train_dataset" and isinstance(made, ast.ListComp) and isinstance(made.elt, ast.Call):
        yield "formatting_func", _made_by(made.elt.func, assigned, functions), made.lineno
    elif word not in _PLUMBING:
        yield word, _literal(value, assigned), value.lineno


def _made_by(function: ast.expr, assigned: _Names, functions: _Functions) -> object:
    name = getattr(function, "id", "")
    applied = functions[name] if name in functions else _applied(function, assigned)
    return applied or Code(_source(function))


def _keywords(call: ast.Call, assigned: _Names) -> Iterator[tuple[str, ast.expr]]:
    """Yield the keywords of a call, also those of a mapping that it is given with two asterisks."""
    for word in call.keywords:
        given: ast.expr = assigned.get(getattr(word.value, "id", ""), word.value)
        if word.arg:
            yield word.arg, word.value
        elif isinstance(given, ast.Call) and getattr(given.func, "id", "") == "dict" and not given.args:
            yield from ((part.arg or "**", part.value) for part in given.keywords)
        elif isinstance(given, ast.Dict):
            for key, value in zip(given.keys, given.values, strict=True):
                yield (str(key.value) if isinstance(key, ast.Constant) else "**"), value
        else:
            yield "**", word.value


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
