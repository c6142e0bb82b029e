import inspect
from collections import Counter
from contextlib import nullcontext
from fnmatch import fnmatchcase

import pytest

from qlora_lite.data.chat import row_formats
from qlora_lite.data.chat.template import NAMED_TEMPLATES
from qlora_lite.data.readers import hub
from qlora_lite.data.tokens import batch, examples
from qlora_lite.errors import DataError
from qlora_lite.recipe import reference
from qlora_lite.recipe.foreign_names import _ANSWERS, _TABLES
from qlora_lite.recipe.paths import TEMPLATES, PathProblem, find_data
from qlora_lite.recipe.schema import Data, Recipe, Source, Target


def test_every_setting_has_a_description_and_is_in_the_reference_of_its_section():
    for section, field in Recipe.model_fields.items():
        text = reference.section_markdown(section)
        assert field.annotation.__doc__ in text
        for name, setting in field.annotation.model_fields.items():
            assert setting.description and text.count(f"- `{section}.{name}`: ") == 1
            assert reference.setting_markdown(f"{section}.{name}") in text
    for key, model in (("data.train", Source), ("lora.targets", Target)):
        text = reference.section_markdown(key.partition(".")[0])
        for name, field in model.model_fields.items():
            assert field.description and text.count(f"- `{key}.{name}`: ") == 1


@pytest.mark.parametrize(
    "start",
    [
        "- `lora.rank`: a whole number of at least 1; default `16`.",
        "- `lora.dropout`: a number of at least 0 and below 1; default `0`.",
        "- `train.learning_rate`: a number above 0, or auto; default `auto`.",
        "- `train.warmup_ratio`: a number from 0 to 1; default `0.03`.",
        "- `train.max_steps`: a whole number of at least 1, or null; default `null`.",
        "- `model.path`: text; required.",
        "- `model.quant`: nf4, fp4, keep or none; default `nf4`.",
        "- `lora.targets`: all-linear, experts, or a list of names, glob patterns and {pattern, rank, alpha}; default",
        "- `lora.targets.pattern`: text; required.",
        "- `data.eval.weight`: a number above 0; default `1`.",
        "- `memory.loss_chunk_tokens`: a whole number of at least 1, or auto; default `auto`.",
    ],
)
def test_the_reference_words_type_range_and_default(start):
    assert reference.setting_markdown(start.split("`")[1]).startswith(start)


def test_every_local_name_in_the_foreign_table_exists_and_no_foreign_name_is_one_of_ours():
    known = reference.known_keys()
    leaves = {key.rpartition(".")[2] for key in known if "." in key}  # axolotl's adapter is a value, ours a section
    assert {answer.text for answer in _ANSWERS.values() if answer.effect == "renamed"} <= set(known)
    assert not [leaf for leaf in leaves for name in _ANSWERS if fnmatchcase(leaf, name)]
    names = [name for table in _TABLES.values() for text in table.values() for name in text.split()]
    assert [name for name, count in Counter(names).items() if count > 1] == [], "one name, one answer"


def test_the_choices_of_the_recipe_are_those_of_the_layers_that_do_the_work():
    for (section, name), choices in {
        ("data", "train_on"): examples.TRAIN_ON,
        ("data", "overflow"): examples.OVERFLOW,
        ("data", "order"): batch.ORDERS,
    }.items():
        assert reference.choices_of(reference.field_at((section, name))) == choices, name
    assert tuple(NAMED_TEMPLATES) == TEMPLATES
    row_format = reference.rule_of(Source.model_fields["format"])
    *others, last = row_formats.FORMATS
    assert row_format == f"{', '.join(others)} or {last}, or null"


@pytest.mark.parametrize("function", [examples.build_examples, examples.ReadSettings])
def test_the_functions_that_make_rows_have_the_defaults_of_the_recipe(function):
    parameters = inspect.signature(function).parameters.values()
    defaults = {p.name: p.default for p in parameters if p.name in Data.model_fields}
    assert len(defaults) >= 5
    assert defaults == {name: Data.model_fields[name].default for name in defaults}


@pytest.mark.parametrize(
    ("path", "is_good"),
    [
        ("hub:a/b", True),
        ("hub:a/b/c:d", True),
        ("hub:a/b:c", True),
        ("hub:a", False),
        ("hub:a/b/c/d", False),
        ("hub:a/b:c[:5]", False),
        ("hub:a/b:", False),
        ("hub:a/ö", False),
    ],
)
def test_the_recipe_and_the_reader_of_the_hub_know_the_same_paths(path, is_good):
    for check, fault in ((lambda: find_data(path, "."), PathProblem), (lambda: hub.parse(path), DataError)):
        with nullcontext() if is_good else pytest.raises(fault, match="must be hub:OWNER/NAME, hub:OWNER/NAME/CONFIG"):
            check()
