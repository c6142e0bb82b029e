import pytest

from qlora_lite.data import formats
from qlora_lite.data.named_templates import NAMED_TEMPLATES
from qlora_lite.recipe import reference
from qlora_lite.recipe.foreign_names import _ADVICE, _KEY_OF
from qlora_lite.recipe.paths import TEMPLATES
from qlora_lite.recipe.schema import Recipe, Source, Target


def test_every_setting_has_a_description_and_a_row_in_the_reference():
    table = reference.reference_markdown()
    for section, field in Recipe.model_fields.items():
        for name, setting in field.annotation.model_fields.items():
            assert setting.description
            assert table.count(f"| `{section}.{name}` |") == 1
    for model in (Source, Target):
        assert all(field.description for field in model.model_fields.values())


@pytest.mark.parametrize(
    "row",
    [
        "| `lora.rank` | a whole number of at least 1 | `16` |",
        "| `lora.dropout` | a number of at least 0 and below 1 | `0` |",
        "| `train.learning_rate` | a number above 0 | `0.0002` |",
        "| `train.warmup_ratio` | a number from 0 to 1 | `0.03` |",
        "| `train.max_steps` | a whole number of at least 1, or null | `null` |",
        "| `model.path` | text | required |",
        "| `model.quant` | nf4, fp4 or none | `nf4` |",
        "| `lora.targets` | all-linear, or a list of names, glob patterns and {pattern, rank, alpha} | `all",
        "| `memory.loss_chunk_tokens` | a whole number of at least 1, or auto | `auto` |",
    ],
)
def test_the_reference_words_type_range_and_default(row):
    assert row in reference.reference_markdown()


def test_every_local_name_in_the_foreign_table_exists_and_no_foreign_name_is_one_of_ours():
    known = reference.known_keys()
    leaves = {key.rpartition(".")[2] for key in known}
    assert set(_KEY_OF.values()) <= set(known)
    assert leaves.isdisjoint(_KEY_OF)
    assert leaves.isdisjoint(_ADVICE)
    assert set(_KEY_OF).isdisjoint(_ADVICE)


def test_the_choices_of_the_recipe_are_those_of_the_layers_that_do_the_work():
    assert tuple(NAMED_TEMPLATES) == TEMPLATES
    row_format = reference.rule_of(Source.model_fields["format"])
    assert row_format == f"{', '.join(formats.FORMATS[:-1])} or {formats.FORMATS[-1]}, or null"
