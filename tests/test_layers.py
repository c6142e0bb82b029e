"""Imports point down: each layer may use the layers before it, never itself or a later one, and no files use each other
in a circle."""

import re
import subprocess
import sys
import tomllib

import pytest

from check.source import PACKAGE, import_cycles, imported_names

LAYERS = [
    {"errors", "units", "terminal", "constraints", "compilers"},
    {"files", "registry"},
    {"recipe", "memory"},
    {"quant", "offload", "data"},
    {"kernels"},
    {"experts"},
    {"adapters"},
    {"models"},
    {"train"},
    {"planning"},
    {"prepare"},
    {"artifacts"},
    {"reporting"},
    {"inference"},
    {"export"},
    {"runs"},
    {"tasks", "methods"},
    {"doctor", "explain"},
    {"cli"},
    {"ext"},  # which the core finds by name (``registry``)
]
# Rooms with floors of their own: each folder may use itself and those before it.
FLOORS = {"data": ["readers", "chat", "tokens", "checks"]}
LAYER_OF = {unit: number for number, layer in enumerate(LAYERS) for unit in layer}
ENTRY_POINTS = {"__init__", "__main__"}  # the package's own front door: imports lazily


def unit_of(path, package=PACKAGE):
    """Return the package or module directly below qlora_lite that a file belongs to."""
    return path.relative_to(package).with_suffix("").parts[0]


def forbidden_imports(package=PACKAGE):
    found = []
    for path in sorted(package.rglob("*.py")):
        unit = unit_of(path, package)
        if unit in ENTRY_POINTS:
            continue
        for name in imported_names(path, package):
            parts = name.split(".")
            target = parts[1] if parts[0] == "qlora_lite" and len(parts) > 1 else unit
            if target in ("__version__", unit):
                continue
            if LAYER_OF.get(target, len(LAYERS)) >= LAYER_OF.get(unit, -1):
                found.append(f"{path.relative_to(package)} imports {name}")
    return found


def test_every_package_and_module_has_a_layer():
    units = {unit_of(path) for path in PACKAGE.rglob("*.py")}
    assert units - LAYER_OF.keys() - ENTRY_POINTS == set()


def test_no_import_points_up_or_sideways():
    assert forbidden_imports() == []


def imports_of_higher_floors(package=PACKAGE):
    found = []
    for room, floors in FLOORS.items():
        for number, floor in enumerate(floors, start=1):
            higher = tuple(f"qlora_lite.{room}.{name}." for name in floors[number:])
            for path in (package / room / floor).rglob("*.py"):
                names = (name for name in imported_names(path, package) if f"{name}.".startswith(higher))
                found += [f"{path.relative_to(package)} imports {name}" for name in names]
    return found


def test_no_import_inside_a_room_points_to_a_higher_floor():
    assert imports_of_higher_floors() == []
    folders = {path.parent.name for room in FLOORS for path in (PACKAGE / room).glob("*/__init__.py")}
    assert folders == {floor for floors in FLOORS.values() for floor in floors}


@pytest.mark.parametrize(
    "line", ["from ..chat import mask", "import qlora_lite.data.tokens.batch", "from .. import checks"]
)
def test_the_walk_finds_an_import_of_a_higher_floor(tmp_path, line):
    (tmp_path / "data" / "readers").mkdir(parents=True)
    (tmp_path / "data" / "readers" / "hub.py").write_text(f"from . import fields\nif True:\n    {line}")
    assert len(imports_of_higher_floors(tmp_path)) == 1


@pytest.mark.parametrize(
    ("file", "line"),
    [
        ("quant/nf4.py", "from qlora_lite.adapters.lora import layer"),
        ("quant/nf4.py", "import qlora_lite.train.loop"),
        ("quant/nf4.py", "from ..models.load import load_model"),
        ("quant/nf4.py", "def f():\n    from qlora_lite.data.readers import sources"),
        ("quant/nf4.py", "from qlora_lite import kernels"),
        ("errors.py", "from .recipe import load"),
        ("units.py", "from . import errors"),
    ],
)
def test_the_walk_finds_an_upward_or_sideways_import(tmp_path, file, line):
    path = tmp_path / file
    path.parent.mkdir(exist_ok=True)
    path.write_text(line)
    assert len(forbidden_imports(tmp_path)) == 1


def test_no_files_import_each_other_in_a_circle():
    assert import_cycles() == []


@pytest.mark.parametrize(
    "line",
    [
        "from qlora_lite.quant import b",
        "from .b import x",
        "import qlora_lite.quant.b",
        "def f():\n    from .b import x",
        "if TYPE_CHECKING:\n    from .b import x",
    ],
)
def test_the_walk_finds_a_circle_of_files(tmp_path, line):
    (tmp_path / "quant").mkdir()
    for name, text in {"a": line, "b": "from .c import x", "c": "from . import a"}.items():
        (tmp_path / "quant" / f"{name}.py").write_text(text)
    assert import_cycles(tmp_path) == [[f"qlora_lite.quant.{name}" for name in "abc"]]


def test_the_lowest_layer_imports_the_standard_library_only():
    for unit in ("errors", "units", "terminal", "constraints", "files"):
        path = PACKAGE / f"{unit}.py"
        tops = {name.split(".")[0] for name in imported_names(path)} if path.exists() else set()
        assert tops - sys.stdlib_module_names <= {"qlora_lite"}


def test_the_recipe_layer_imports_pydantic_yaml_and_regex_only():
    tops = {name.split(".")[0] for path in (PACKAGE / "recipe").glob("*.py") for name in imported_names(path)}
    assert tops - sys.stdlib_module_names <= {
        "qlora_lite",
        "pydantic",
        "pydantic_core",
        "annotated_types",
        "yaml",
        "regex",
    }


def test_lower_layers_never_see_a_recipe():
    for path in PACKAGE.rglob("*.py"):
        if LAYER_OF["recipe"] < LAYER_OF.get(unit_of(path), 0) < LAYER_OF["prepare"]:
            assert not any(name.startswith("qlora_lite.recipe") for name in imported_names(path)), path


def test_the_package_never_imports_its_oracles():
    for path in PACKAGE.rglob("*.py"):
        tops = {name.split(".")[0] for name in imported_names(path)}
        assert not tops & {"peft", "trl", "torchao"}, path


def test_whatever_is_imported_comes_with_the_installation_or_an_extra():
    project = tomllib.loads((PACKAGE.parent / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    optional = {name: lines for name, lines in project["optional-dependencies"].items() if name not in ("all", "dev")}
    extras = [line for lines in optional.values() for line in lines]
    declared = project["dependencies"] + extras  # of an extra, where it is used
    names = {re.match(r"[\w-]+", line)[0].replace("-", "_") for line in declared}
    names |= {
        "yaml",
        "numpy",
        "jinja2",
        "annotated_types",
        "pydantic_core",
        "pyarrow",
    }  # pyyaml's; torch's, pydantic's and datasets'
    names |= {"triton", "PIL"}  # torch's, where it is built for a GPU; pillow's
    tops = {name.split(".")[0] for path in PACKAGE.rglob("*.py") for name in imported_names(path)}
    assert tops - sys.stdlib_module_names - names == {"qlora_lite"}


def test_triton_is_imported_where_its_kernel_is_alone():
    importing = {path.name for path in PACKAGE.rglob("*.py") if "triton" in imported_names(path)}
    assert importing == {"grouped_kernel.py"}


def test_bitsandbytes_is_imported_by_its_door_alone():
    files = {
        path
        for path in PACKAGE.rglob("*.py")
        if any(name.split(".")[0] == "bitsandbytes" for name in imported_names(path))
    }
    assert files == {PACKAGE / "quant" / "bnb.py"}


def test_loading_a_recipe_never_imports_torch():
    modules = "errors", "units", "files", "recipe.load", "recipe.catalog", "recipe.reference", "explain"
    code = f"import sys, {', '.join(f'qlora_lite.{name}' for name in modules)}; " + (
        "heavy = {'torch', 'transformers', 'numpy'} & set(sys.modules); assert not heavy, heavy"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=PACKAGE.parent, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def test_the_python_interface_is_listed_without_importing_torch():
    code = (
        "import sys, qlora_lite as q; missing = set(q.__all__) - set(dir(q)); assert not missing, missing\n"
        "assert dir(q) == sorted(dir(q)) and 'torch' not in sys.modules"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=PACKAGE.parent, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
