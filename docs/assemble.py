"""Assemble the site's folder from the texts where they live: README, explain pages, schema, results, .github.

There is no second copy of any text in the repository. Pages are written for a terminal and for a repository's front
page, so what is a name there becomes a link here: ``explain TOPIC``, ``lora.rank``, ``tools/results/speed.md``.

    python docs/assemble.py build/site
"""

import os
import re
import shutil
import sys
import tomllib
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from posixpath import relpath

from qlora_lite.explain import SETTINGS, topics
from qlora_lite.recipe.reference import known_keys, section_markdown
from qlora_lite.recipe.schema import Recipe

ROOT = Path(__file__).resolve().parent.parent
ASSETS = (".svg", ".png")
FENCE = re.compile(r"^```.*?^```[^\n]*$", re.MULTILINE | re.DOTALL)
REPOSITORY_PATH = re.compile(r"(tools|tests|recipes|docs|\.github)/[\w./-]+")
SETTING = re.compile(r"^- `([\w.]+)`: (.*?)\.  \n  (.*)$", re.MULTILINE)
SETTINGS_PAGE = f"{SETTINGS}/index.md"


@cache
def sources() -> dict[str, str]:
    """Return the page of each text of the repository, both as paths from their roots."""
    pages = {"README.md": "index.md"}
    pages |= {f"qlora_lite/explain/{name}.md": f"explain/{name}.md" for name in topics() if name != SETTINGS}
    pages |= {f"tools/results/{path.name}": f"results/{path.name}" for path in results() if path.suffix == ".md"}
    pages |= {f".github/{path.name}": path.name.lower() for path in sorted((ROOT / ".github").glob("*.md"))}
    return pages


def results() -> list[Path]:
    """Return the pages of results and their pictures."""
    return sorted(path for path in (ROOT / "tools/results").iterdir() if path.suffix in (".md", *ASSETS))


def repository_url() -> str | None:
    """Return the address of the repository's files, or None outside of GitHub's actions."""
    names = [os.environ.get(name) for name in ("GITHUB_SERVER_URL", "GITHUB_REPOSITORY")]
    return f"{names[0]}/{names[1]}/blob/main" if all(names) else None


def page_of_name(name: str) -> str | None:
    """Return the page, with its anchor, of a name that `explain` knows."""
    if name == SETTINGS:
        return SETTINGS_PAGE
    if (page := f"explain/{name}.md") in sources().values():
        return page
    if name in Recipe.model_fields:
        return f"{SETTINGS}/{name}.md"
    return f"{SETTINGS}/{name.partition('.')[0]}.md#{name}" if name in known_keys() else None


def page_of_path(path: str) -> str | None:
    """Return the page or address of a file of the repository, or None where the site has neither.

    Raises:
        ValueError: there is no such file.
    """
    if path in (pages := sources()):
        return pages[path]
    if path == "tools/results":
        return "results/quickstart.md"
    if not (ROOT / path).exists():
        raise ValueError(f"no file {path}")
    if path.startswith("tools/results/") and path.endswith(ASSETS):
        return path.removeprefix("tools/")
    return f"{repository}/{path}" if (repository := repository_url()) else None


def link_names(text: str, page: str, source: str) -> str:
    """Return a page's Markdown with its relative links redirected, and with links at the names of other pages."""

    def target(to: str) -> str:
        return to if "://" in to else relpath(to, os.path.dirname(page) or ".")

    def redirect(match: re.Match[str]) -> str:
        shown, link = match.groups()
        if "://" in link or link.startswith("#"):
            return match[0]
        path, mark, anchor = link.partition("#")
        to = page_of_path(os.path.normpath(os.path.join(os.path.dirname(source), path)))
        return f"[{shown}]({target(to)}{mark}{anchor})" if to else shown

    def link(match: re.Match[str]) -> str:
        words = match[1].split()
        name = words[-1] if "explain" in words[:-1] else words[0].partition(":")[0]
        to = page_of_name(name) if "explain" in words[:-1] or "." in name else None
        if REPOSITORY_PATH.fullmatch(match[1]) and (ROOT / match[1]).exists():
            to = page_of_path(match[1])
        return f"[{match[0]}]({target(to)})" if to and to.partition("#")[0] != page else match[0]

    pieces = re.split(r"(!?\[(?:[^\[\]`]|`[^`]*`)*\]\([^)\s]+\)|^#.*$)", text, flags=re.MULTILINE)
    for index, piece in enumerate(pieces):
        if index % 2:
            pieces[index] = re.sub(r"\[((?:[^\[\]`]|`[^`]*`)*)\]\(([^)\s]+)\)", redirect, piece)
        else:
            pieces[index] = re.sub(r"`([^`\n]+(?:\n[^`\n]+)?)`", link, piece)
    return "".join(pieces)


def adapt(text: str) -> str:
    """Return Markdown in the site's dialect: a list follows an empty line, and code in a table holds plain bars."""
    text = re.sub(r"^((?![-*|#\d ])[^\n]+)\n(?=[-*] |1\. )", r"\1\n\n", text, flags=re.MULTILINE)
    return re.sub(r"`[^`\n]*\\\|[^`\n]*`", lambda code: code[0].replace("\\|", "|"), text)


def outside_of_code(change: Callable[[str], str], text: str) -> str:
    """Return Markdown with a change made to all but its code blocks."""
    ends = [(match.start(), match.end()) for match in FENCE.finditer(text)]
    parts, begin = [], 0
    for start, end in [*ends, (len(text), len(text))]:
        parts += [change(text[begin:start]), text[start:end]]
        begin = end
    return "".join(parts)


def settings_pages() -> Iterator[tuple[str, str]]:
    """Yield the settings reference: a page of all sections, and one for each, with a heading at every setting."""
    rows = []
    for section, field in Recipe.model_fields.items():
        text = section_markdown(section)
        rows.append(f"| [`{section}`]({section}.md) | {' '.join((field.annotation.__doc__ or '').split())} |")
        page = SETTING.sub(r"### `\1` {#\1}\n\n*\2*\n\n\3", text.replace("### An item", "## An item"))
        yield f"{SETTINGS}/{section}.md", page.replace("## Settings of", "# Settings of", 1)
    yield SETTINGS_PAGE, "\n".join([f"# {topics()[SETTINGS]}", "", "| section | |", "|---|---|", *rows])


def pages() -> dict[str, str]:
    """Return the Markdown of all pages of the site, by path."""
    texts = {page: (source, (ROOT / source).read_text(encoding="utf-8")) for source, page in sources().items()}
    texts |= {page: (f"docs/{page}", text) for page, text in settings_pages() if page != SETTINGS_PAGE}
    done = dict(settings_pages())
    for page, (source, text) in texts.items():
        done[page] = outside_of_code(lambda part, at=(page, source): adapt(link_names(part, *at)), text)
    return done


def navigation() -> list[str]:
    """Return the pages of the navigation, in its order."""

    def leaves(items: list) -> Iterator[str]:
        for item in items:
            for entry in item.values() if isinstance(item, dict) else (item,):
                yield from leaves(entry) if isinstance(entry, list) else (entry,)

    with (ROOT / "docs/zensical.toml").open("rb") as file:
        return list(leaves(tomllib.load(file)["project"]["nav"]))


def assemble(folder: Path) -> None:
    """Write the site's configuration and pages into a new folder.

    Raises:
        ValueError: the navigation lacks a page or names one that does not exist, or a link leads nowhere.
    """
    texts = pages()
    if differing := set(texts) ^ set(navigation()):
        raise ValueError(f"the navigation (docs/zensical.toml) and the pages differ in {sorted(differing)}")
    shutil.rmtree(folder, ignore_errors=True)
    for page, text in texts.items():
        path = folder / "docs" / page
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n", encoding="utf-8")
    for path in results():
        if path.suffix in ASSETS:
            shutil.copy(path, folder / "docs/results" / path.name)
    shutil.copy(ROOT / "docs/site.css", folder / "docs/site.css")
    shutil.copy(ROOT / "docs/zensical.toml", folder / "zensical.toml")


if __name__ == "__main__":
    assemble(Path(sys.argv[1]))
