"""`qlora-lite explain`: a text for every topic, section and setting, and the nearest name for any other."""

import io
import re
import sys
from pathlib import Path

import pytest

from qlora_lite import explain as texts
from qlora_lite.errors import RecipeError
from qlora_lite.recipe.reference import known_keys
from qlora_lite.recipe.schema import Recipe

FOLDER = Path(texts.__file__).parent
MAX_LINES = 80
MAX_FIGURES = 8  # measured ones belong to tools/results
MEASURED = re.compile(r"(?<![\w.:])\d{1,3}\.\d{2,}(?![\w.]*\.\d)")


def test_the_topics_are_listed_with_their_titles(command):
    code, out, _ = command("explain")
    titles = dict(line.split(maxsplit=1) for line in out.partition("\n\n")[0].splitlines())
    assert code == 0 and titles == texts.topics()
    assert titles.keys() >= {"data", "memory", "resume", "export", "errors", "settings"}
    assert all(len(title) > 10 for title in titles.values())


@pytest.mark.parametrize("topic", texts.topics())
def test_every_topic_is_printed(topic, command):
    code, out, err = command("explain", topic)
    assert (code, err) == (0, "") and out.strip() == texts.explain(topic)
    if topic != texts.SETTINGS:
        page = (FOLDER / f"{topic}.md").read_text(encoding="utf-8")
        assert page.startswith("# ") and page.strip() in out


@pytest.mark.parametrize("page", sorted(FOLDER.glob("*.md")), ids=lambda page: page.stem)
def test_a_page_tells_what_to_do_and_is_no_report_of_measurements(page):
    text = page.read_text(encoding="utf-8")
    figures = MEASURED.findall(re.sub(r"arXiv [\d.]+|'[^']*[<>=][^']*'", "", text))
    assert text.count("\n") <= MAX_LINES, "make two pages, with names that a reader would guess"
    assert len(figures) <= MAX_FIGURES, figures


def test_every_setting_and_section_is_explained():
    for key in known_keys():
        assert f"- `{key}`: " in texts.explain(key) or f"## Settings of `{key}`" in texts.explain(key), key
    assert all(f"## Settings of `{section}`" in texts.explain(texts.SETTINGS) for section in Recipe.model_fields)


def test_a_section_that_is_a_topic_too_has_its_text_and_its_settings():
    assert texts.explain("memory").startswith("# ") and "- `memory.budget`: " in texts.explain("memory")


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("resum", "did you mean resume?"),
        ("lora.rnak", "did you mean lora.rank?"),
        ("rank", "here it is lora.rank"),
        ("lora_r", "here it is lora.rank"),
        ("../README", "lists the topics"),
        ("", "lists the topics"),
    ],
)
def test_another_name_is_answered_with_the_nearest_one(name, meant, command):
    with pytest.raises(RecipeError, match="is not a topic or a setting"):
        texts.explain(name)
    code, out, err = command("explain", name)
    assert (code, out) == (2, "") and meant in err and err.count("\n") == 1


@pytest.mark.parametrize("name", ["custom", "plugin", "callbacks", "python"])
def test_who_wants_to_add_something_finds_the_page_about_it(name, command):
    code, out, _ = command("explain", name)
    assert code == 0 and out.strip() == texts.explain("extending") and "Objective" in out


def test_a_command_that_is_no_topic_is_answered_with_its_help(command):
    code, out, err = command("explain", "report")
    assert (code, out) == (2, "") and "report is a command: qlora-lite report --help explains it" in err


def test_a_terminal_gets_it_formatted(command, monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    monkeypatch.setattr(sys, "stdout", terminal := Terminal())
    command("explain", "lora.rank")
    assert "lora.rank" in terminal.getvalue() and "`" not in terminal.getvalue()
