"""Code from a model's or an adapter's folder is never run, whatever standard input would answer."""

import ast
import io
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from tiny_files import write_recipe

from qlora_lite.models import pretrained
from qlora_lite.models.load import load_model
from qlora_lite.models.skeleton import meta_model, read_config
from qlora_lite.models.tokenizer import load_tokenizer

PACKAGE = Path(__file__).parent.parent / "qlora_lite"
DOOR = PACKAGE / "models" / "pretrained.py"
LOADERS = {"from_pretrained", "from_config", "_from_config", "get_class_from_dynamic_module", "load_custom_generate"}
CODE = "from pathlib import Path\nPath({trap!r}).touch()\nclass Foreign: pass\n"
AUTO_MAP = {"AutoConfig": "foreign.Foreign", "AutoModelForCausalLM": "foreign.Foreign"}
TOKENIZER_MAP = {"AutoTokenizer": [None, "foreign.Foreign"]}
FOREIGN = {
    "tokenizer": {"tokenizer_config.json": {"tokenizer_class": "Foreign", "auto_map": TOKENIZER_MAP}},
    "configuration": {"config.json": {"model_type": "no_such_model", "auto_map": AUTO_MAP}},
    "both": {
        "config.json": {"model_type": "no_such_model"},
        "tokenizer_config.json": {"tokenizer_class": "Foreign", "auto_map": TOKENIZER_MAP},
    },
    "no language model": {"config.json": {"model_type": "siglip", "auto_map": AUTO_MAP}},
}
COMMANDS = {
    "data": ["data", "RECIPE"],
    "plan": ["plan", "RECIPE"],
    "train": ["train", "RECIPE"],
    "profile": ["profile", "RECIPE", "--out", "OUT"],
    "evaluate a recipe": ["evaluate", "RECIPE"],
    "evaluate": ["evaluate", "ADAPTER", "data.eval=ROWS"],
    "generate": ["generate", "ADAPTER", "--prompt", "hi"],
    "chat": ["chat", "ADAPTER"],
    "merge": ["merge", "ADAPTER", "--rows", "0", "--out", "OUT"],
    "export": ["export", "ADAPTER", "--to", "gguf", "--out", "OUT"],
    "quantize": ["quantize", "MODEL", "--out", "OUT"],
    "serve": ["serve", "ADAPTER", "--port", "0"],
    "compare": ["compare", "ADAPTER"],
}


@pytest.fixture
def foreign(tmp_path, model_folder, monkeypatch):
    """Write a model whose files name code; return its folder and what the code would leave behind."""

    def write(changes: dict[str, dict]):
        model, trap = tmp_path / "model", tmp_path / "trap"
        model.mkdir()
        for file in model_folder.iterdir():
            (model / file.name).write_bytes(file.read_bytes())
        for name, change in changes.items():
            (model / name).write_text(json.dumps(json.loads((model / name).read_text()) | change))
        (model / "foreign.py").write_text(CODE.format(trap=str(trap)))
        return model, trap

    monkeypatch.setattr("sys.stdin", io.StringIO("y\n" * 100))
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("it asks"))
    return write


@pytest.mark.parametrize("kind", FOREIGN)
def test_no_command_runs_code_of_a_model_or_asks(foreign, tmp_path, command, kind):
    model, trap = foreign(FOREIGN[kind])
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text(
        json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 4, "base_model_name_or_path": str(model)})
    )
    save_file({"base_model.model.x.lora_A.weight": torch.zeros(2, 2)}, adapter / "adapter_model.safetensors")
    words = {
        "RECIPE": write_recipe(tmp_path, model),
        "MODEL": model,
        "ADAPTER": adapter,
        "OUT": tmp_path / "new",
        "ROWS": tmp_path / "eval.jsonl",
    }
    for name, arguments in COMMANDS.items():
        code, out, err = command(*(str(words.get(a, a)).replace("ROWS", str(words["ROWS"])) for a in arguments))
        errors = [line for line in err.splitlines() if line.startswith("error: ")]
        assert code == 2 and len(errors) == 1, (name, out, err)
        assert "code from a model's folder is never run" in errors[0], (name, err)
        assert not trap.exists() and not (tmp_path / "new").exists(), name


@pytest.mark.parametrize(
    "change", [{"config.json": {"auto_map": AUTO_MAP}}, {"tokenizer_config.json": {"auto_map": TOKENIZER_MAP}}]
)
def test_what_transformers_has_itself_is_loaded_without_the_code_beside_it(foreign, change):
    model, trap = foreign(change)
    assert load_tokenizer(model).is_fast
    loaded = load_model(model, compute_dtype=torch.float32, use_cache=False)
    assert type(loaded).__module__.startswith("transformers.") and not trap.exists()


@pytest.mark.parametrize("part", ["attn_implementation", "experts_implementation"])
def test_no_kernel_is_fetched_that_a_configuration_names(foreign, monkeypatch, part):
    from transformers.integrations import hub_kernels

    monkeypatch.setattr(hub_kernels, "get_kernel", lambda *_, **__: pytest.fail("it fetches a kernel"))
    model, _ = foreign({"config.json": {part: "kernels-community/flash-attn"}})
    meta_model(read_config(str(model)), "nf4", True, torch.float32)
    load_model(model, compute_dtype=torch.float32, use_cache=False)


def loaders_in(source: str) -> list[str]:
    """Return what a file says that loads by way of transformers, or asks for code to be trusted."""
    found = []
    for node in ast.walk(ast.parse(source)):
        names = [getattr(node, key, None) for key in ("attr", "id", "value", "arg", "name")]
        found += [name for name in names if isinstance(name, str) and (name in LOADERS or name == "trust_remote_code")]
    return found


def test_transformers_loads_nothing_but_by_the_one_door():
    found = {path.relative_to(PACKAGE).as_posix(): loaders_in(path.read_text()) for path in PACKAGE.rglob("*.py")}
    assert {name: said for name, said in found.items() if said} == {
        "models/pretrained.py": found["models/pretrained.py"],
        "ext/diffusion/pipelines.py": ["trust_remote_code", *2 * ["from_pretrained"]],  # of diffusers
        "ext/diffusion/draw.py": ["from_config"],  # of a scheduler of diffusers
        "recipe/foreign_names.py": ["trust_remote_code"],  # a name of other trainers
        "ext/convert/files.py": ["from_pretrained"],  # in their scripts, which are read and not run
    }
    calls = [node for node in ast.walk(ast.parse(DOOR.read_text())) if isinstance(node, ast.Call)]
    calls = [call for call in calls if getattr(call.func, "attr", "") in LOADERS]
    given = [[ast.unparse(keyword) for keyword in call.keywords] for call in calls]
    assert len(calls) == 9 and all({"**_NO_CODE", "trust_remote_code=False"} & set(each) for each in given)
    assert pretrained._NO_CODE["trust_remote_code"] is False


@pytest.mark.parametrize(
    "line",
    [
        "AutoTokenizer.from_pretrained(x)",
        "load = Auto.from_config",
        "getattr(auto, 'from_pretrained')(x)",
        "f(x, trust_remote_code=True)",
        "f(**{'trust_remote_code': True})",
        "Model._from_config(c)",
        "from transformers.dynamic_module_utils import get_class_from_dynamic_module",
    ],
)
def test_the_walk_finds_another_way_in(line):
    assert loaders_in(line)
