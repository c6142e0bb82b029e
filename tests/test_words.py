"""The package, its help and its pages speak the field's language: words of our own do not come back.

Names, comments, messages, the README, recipes and the texts of ``qlora-lite explain`` are read; the former names of
settings, by which recipes and runs of earlier versions still load, are let through.
"""

import re
from pathlib import Path

import pytest

from qlora_lite.artifacts import run_files
from qlora_lite.recipe.schema import FORMER_NAMES

ROOT = Path(__file__).parent.parent
INSTEAD_OF = {
    r"levers?": "memory option",
    r"comput(ed?|es|ing) again|second run": "recompute, recomputation",
    r"rehears\w*": "memory probe",
    r"LoRA factors": "LoRA weights",
    r"(laid|lie|lay) end to end|rows_(run_)?alone": "packed sequences, unpacked",
    r"(learned|labelled)[ _]tokens?": "target tokens",
    r"kept[ _]blocks": "uncheckpointed layers",
    r"stretches|stand-ins?|(?<!words_)stand_ins?": "segments, placeholder",
    r"unpack(s|ed|ing)? (the |a )?(4-bit )?weights?|unpacked weights?": "dequantise",
    r"held to|hold_to": "capped at, set_memory_limit",
    r"by[ _]chance": "stochastic",
    r"likeness": "agreement, divergence",
    r"reckon(ed|s)?|spoil(ed|s)?|made again": "estimate, corrupt, rebuild",
    r"of like length|good in spite": "of similar length, still valid",
    r"(go|goes|gone) on with|goes on from|go on from": "resume",
    r"(a|an?other|the|no|each|this|that|of|for|on|one|more) cards?(?! (leaves|before))": "GPU",
    r"lies? (on|in) the host": "is in host memory",
    r"Tell whether|tell whether": "return whether",
    r"(machine|option|settings|examples|conversation|state|record|or) (is|are) none": "is not a ..., is invalid",
}
FORMER = re.compile("|".join(name.rpartition(".")[2] for name in (*FORMER_NAMES, *run_files.FORMER_NAMES)))


def texts() -> list[Path]:
    found = [*ROOT.glob("qlora_lite/**/*.py"), *ROOT.glob("qlora_lite/**/*.md"), *ROOT.glob("recipes/*.yaml")]
    return [*found, ROOT / "README.md"]


def said_in(text: str, word: str) -> list[str]:
    """Return the lines with a word, where it stands as a word or as a part of a name."""
    pattern = re.compile(rf"(?<![A-Za-z]){word}(?![A-Za-z])")
    return [line.strip() for line in text.splitlines() if pattern.search(FORMER.sub("", line))]


@pytest.mark.parametrize("word", INSTEAD_OF)
def test_words_of_our_own_do_not_come_back(word):
    found = {
        f"{path.relative_to(ROOT)}: {line}"
        for path in texts()
        for line in said_in(path.read_text(encoding="utf-8"), word)
    }
    assert not found, f"write {INSTEAD_OF[word]}: {sorted(found)}"


def test_words_are_found_as_words_and_in_names():
    assert said_in("a lever\nset_levers(x)\nclever", "levers?") == ["a lever", "set_levers(x)"]
    assert said_in("memory.kept_blocks", r"kept[ _]blocks") == []


def test_the_formatter_formats_all_but_tables_of_data():
    directive = "# fmt" + ": "
    files = [
        *ROOT.glob("qlora_lite/**/*.py"),
        *ROOT.glob("tests/**/*.py"),
        *(p for p in ROOT.glob("tools/**/*") if p.is_file()),
    ]
    skipped = [
        path.name
        for path in files
        if path.suffix in ("", ".py")
        for _ in range(path.read_text(encoding="utf-8").count(directive))
    ]
    assert len(skipped) <= 20 and {*skipped} <= {"foreign_names.py", "foreign_shapes.py"}, skipped
