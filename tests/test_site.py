"""The site's pages are assembled from where the texts live: every topic has its place, no link is broken."""

import re
import shutil
import subprocess
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from posixpath import dirname, join, normpath

import pytest

from qlora_lite import explain
from qlora_lite.recipe.reference import known_keys
from qlora_lite.recipe.schema import Recipe

DOCS = Path(__file__).parent.parent / "docs"
LINK = re.compile(r"\]\(([^)\s]+)\)")


@pytest.fixture(scope="module")
def site():
    spec = spec_from_file_location("assemble", DOCS / "assemble.py")
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def folder(site, tmp_path_factory):
    folder = tmp_path_factory.mktemp("site") / "new"
    site.assemble(folder)
    return folder


def test_every_topic_section_and_page_of_results_is_in_the_navigation(site):
    pages = site.navigation()
    assert len(pages) == len(set(pages))
    topics = {f"explain/{name}.md" for name in explain.topics() if name != explain.SETTINGS}
    assert {*pages} >= topics | {f"settings/{section}.md" for section in ("index", *Recipe.model_fields)}
    assert {*pages} >= {"index.md", "contributing.md", "results/plans.md", "results/memory_options.md"}


def test_every_link_leads_to_a_page_and_an_anchor_of_it(folder):
    broken = []
    for page in (folder / "docs").rglob("*.md"):
        name = page.relative_to(folder / "docs").as_posix()
        for link in LINK.findall(re.sub(r"^```.*?^```", "", page.read_text("utf-8"), flags=re.MULTILINE | re.DOTALL)):
            path, _, anchor = link.partition("#")
            to = folder / "docs" / normpath(join(dirname(name), path))
            if "://" not in link and not (to.is_file() and (not anchor or f"{{#{anchor}}}" in to.read_text("utf-8"))):
                broken.append(f"{name}: {link}")
    assert not broken


def test_names_of_topics_settings_and_results_are_links_outside_of_code(site):
    shown = site.link_names(
        "see `qlora-lite explain\nmemory`, `lora.rank: 8` and `tools/results/speed.md`", "index.md", ""
    )
    assert shown == (
        "see [`qlora-lite explain\nmemory`](explain/memory.md), [`lora.rank: 8`](settings/lora.md#lora.rank) and "
        "[`tools/results/speed.md`](results/speed.md)"
    )
    code = "```\n`lora.rank`\n```"
    assert site.outside_of_code(lambda text: site.link_names(text, "index.md", ""), code) == code
    with pytest.raises(ValueError, match="no file nowhere"):
        site.link_names("[x](nowhere.md)", "index.md", "README.md")


def test_lists_and_bars_in_code_are_in_the_dialect_of_the_site(site):
    assert site.adapt("these:\n- one\n  more\n- two\n") == "these:\n\n- one\n  more\n- two\n"
    assert site.adapt("| `a \\| b` | c |") == "| `a | b` | c |"


def test_files_that_have_no_page_are_links_where_the_repository_has_an_address(site, monkeypatch):
    monkeypatch.delenv("GITHUB_REPOSITORY", raising=False)
    assert site.link_names("[license](LICENSE)", "index.md", "README.md") == "license"
    monkeypatch.setenv("GITHUB_SERVER_URL", "https://example.org")
    monkeypatch.setenv("GITHUB_REPOSITORY", "owner/name")
    linked = site.link_names("[license](LICENSE)", "index.md", "README.md")
    assert linked == "[license](https://example.org/owner/name/blob/main/LICENSE)"


def test_every_setting_has_a_heading_of_its_own(folder):
    for key in known_keys():
        section, _, name = key.partition(".")
        page = (folder / "docs" / "settings" / f"{section}.md").read_text("utf-8")
        assert not name or f"### `{key}` {{#{key}}}" in page, key


def test_a_page_without_a_place_is_an_error(site, monkeypatch, tmp_path):
    monkeypatch.setattr(site, "navigation", lambda: ["index.md"])
    with pytest.raises(ValueError, match=r"explain/memory\.md"):
        site.assemble(tmp_path / "new")


def test_the_site_is_built_without_a_warning(folder):
    pytest.importorskip("zensical", reason="pip install '.[docs]'")
    command = [shutil.which("zensical"), "build", "--strict", "--config-file", folder / "zensical.toml"]
    subprocess.run(command, check=True, capture_output=True)
    assert (folder / "site/explain/memory/index.html").is_file()
