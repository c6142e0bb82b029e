"""What another distribution brings is found by its name, and what is wrong with it is one error that names it."""

import json
import re
import subprocess
import sys

import pytest
from tiny_runs import tiny_run

from qlora_lite import registry
from qlora_lite.cli.main import main
from qlora_lite.errors import ExtensionError, ModelError
from qlora_lite.explain import explain
from qlora_lite.export.form import ExportForm

PAGE = next(code for code in re.findall(r"```python\n(.*?)```", explain("extending"), re.S) if "class Sums" in code)


def distribution(folder, name, entries, module=None, kind="forms"):
    """Write a distribution as an installer leaves it, with entry points of a kind."""
    info = folder / f"{name}-1.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1\n")
    lines = [f"{each} = {value}" for each, value in entries.items()]
    (info / "entry_points.txt").write_text("\n".join([f"[qlora_lite.{kind}]", *lines, ""]))
    if module is not None:
        (folder / f"{name}.py").write_text(module)


def test_a_form_of_another_distribution_is_written_by_the_command(tmp_path):
    distribution(tmp_path / "site", "sums", {"sums": "sums:SUMS"}, PAGE)
    run = tiny_run(tmp_path)
    code = f"import sys; sys.path.insert(0, {str(tmp_path / 'site')!r}); from qlora_lite.cli.main import main; main()"
    command = sys.executable, "-c", code, "export", str(run), "--to", "sums", "--out", str(tmp_path / "out")
    found = subprocess.run(command, capture_output=True, text=True)
    assert found.returncode == 0, found.stderr
    assert "add them up" in found.stdout
    assert json.loads((tmp_path / "out" / "export_report.json").read_text())["form"] == "sums"
    assert len(json.loads((tmp_path / "out" / "sums.json").read_text())) == 14


def test_a_command_of_another_distribution_is_listed_without_an_import_and_runs(tmp_path, capsys, monkeypatch):
    code = '"""Say hello."""\nimport click, sys\nhello = click.Command("hello", callback=lambda: click.echo("hi"))\n'
    distribution(tmp_path, "greeting", {"hello": "greeting:hello", "lost": "nowhere:LOST"}, code, "commands")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(SystemExit):
        main(["--help"])
    shown = capsys.readouterr().out
    assert re.search(r"  hello +Say hello\.\n", shown) and re.search(
        r"  lost +of greeting, and cannot be read\n", shown
    )
    assert "greeting" not in sys.modules
    with pytest.raises(SystemExit):
        main(["hello"])
    assert capsys.readouterr().out == "hi\n"
    with pytest.raises(SystemExit):
        main(["lost"])
    assert "error: the command lost of greeting cannot be loaded (nowhere:LOST: " in capsys.readouterr().err


def test_the_line_of_a_command_is_read_without_importing_the_packages_it_is_in(tmp_path, monkeypatch):
    distribution(tmp_path, "others", {"hello": "others_package.hello:hello"}, kind="commands")
    (tmp_path / "others_package").mkdir()
    (tmp_path / "others_package" / "__init__.py").write_text("raise RuntimeError")
    (tmp_path / "others_package" / "hello.py").write_text('"""Say hello."""')
    monkeypatch.syspath_prepend(tmp_path)
    assert registry.summary("commands", "hello") == "Say hello."


def test_a_command_of_a_group_is_listed_and_runs_there_alone(tmp_path, command, monkeypatch):
    code = '"""Say hello."""\nimport click\nhello = click.Command("hello", callback=lambda: click.echo("hi"))\n'
    distribution(tmp_path, "greeted", {"recipes.hello": "greeted:hello"}, code, "commands")
    monkeypatch.syspath_prepend(tmp_path)
    assert re.search(r"  hello +Say hello\.\n", command("recipes", "--help")[1])
    assert "hello" not in command("--help")[1] and command("hello")[0] == 2
    assert command("recipes", "hello")[:2] == (0, "hi\n")


@pytest.mark.parametrize(("name", "group"), [("train", []), ("recipes.list", ["recipes"])])
def test_a_command_named_like_one_of_the_core_is_an_error_where_commands_are_listed(
    name, group, tmp_path, command, monkeypatch
):
    distribution(tmp_path, "other", {name: "nowhere:COMMAND"}, kind="commands")
    monkeypatch.syspath_prepend(tmp_path)
    code, _, err = command(*group, "--help")
    assert code != 0 and re.search(rf"^error: .* {name}, which qlora-lite has itself; update or uninstall", err)
    assert err.count("\n") == 1


def test_names_are_listed_without_an_import(tmp_path, monkeypatch):
    distribution(tmp_path, "other", {"onnx": "nowhere:ONNX"})
    monkeypatch.syspath_prepend(tmp_path)
    own = {"peft", "vllm", "gguf", "gguf-adapter", "ollama", "kohya"}
    assert registry.names("forms") == sorted({*own, "onnx"}) and "nowhere" not in sys.modules


def test_an_old_build_in_a_clone_does_not_hide_what_is_installed(tmp_path, monkeypatch):
    info = tmp_path / "qlora_lite.egg-info"
    info.mkdir()
    (info / "PKG-INFO").write_text("Metadata-Version: 2.1\nName: qlora-lite\nVersion: 0.0.1\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert "peft" in registry.names("forms")


@pytest.mark.parametrize(
    ("value", "module", "said"),
    [
        ("nowhere:ONNX", None, "nowhere:ONNX: ModuleNotFoundError: No module named 'nowhere'"),
        ("other_form:ONNX", "", "other_form:ONNX: AttributeError"),
        ("other_form:ONNX", "raise RuntimeError('two\\nlines')", "other_form:ONNX: RuntimeError: two lines"),
        ("other_form:ONNX", "raise SystemExit(0)", "other_form:ONNX: SystemExit: 0"),
        ("other_form:ONNX", "ONNX = lambda job: None", "is no export form (other_form:ONNX is no object with the"),
        ("other_form:Sums", PAGE, "is no export form (other_form:Sums is no object with the"),
    ],
)
def test_what_cannot_be_loaded_is_one_line_that_names_the_distribution(value, module, said, tmp_path, monkeypatch):
    distribution(tmp_path, "other_form", {"onnx": value}, module)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "other_form", raising=False)
    with pytest.raises(ExtensionError) as refused:
        registry.find("forms", "onnx", ExportForm)
    text = str(refused.value)
    assert said in text and "update or uninstall other_form" in text and "\n" not in text


def test_one_name_of_two_distributions_is_an_error_that_names_both(tmp_path, monkeypatch):
    distribution(tmp_path, "other", {"peft": "other:PEFT"})
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ExtensionError, match=r"peft is registered twice, by .*other.*; uninstall one of them"):
        registry.names("forms")


def test_a_name_that_nothing_has_is_refused_with_those_there_are():
    with pytest.raises(ModelError, match="export form is 'onnx'; choose one of gguf, gguf-adapter, kohya, ollama"):
        registry.find("forms", "onnx", ExportForm)


def test_a_clone_that_is_not_installed_says_how_to_install_it(monkeypatch):
    monkeypatch.setattr("sys.path", [])
    with pytest.raises(ExtensionError, match=r"not registered: .*pip install -e \."):
        registry.names("forms")
