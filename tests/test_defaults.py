"""Whatever a recipe can set has the recipe's default in the Python API too."""

import inspect

import pytest
import torch

from qlora_lite.adapters.files import Lora
from qlora_lite.adapters.lora.inject import ALL_LINEAR, Target, add_lora
from qlora_lite.adapters.lora.layer import LoraLinear
from qlora_lite.data.tokens.batch import plan_epoch
from qlora_lite.data.tokens.examples import ReadSettings, build_examples
from qlora_lite.models.load import load_model
from qlora_lite.models.memory_options import MemoryOptions
from qlora_lite.planning.simulate import Job
from qlora_lite.recipe import schema
from qlora_lite.train.causal_lm import TextSpec
from qlora_lite.train.settings import TrainSettings

SAME = [
    (load_model, schema.Model),
    (TextSpec, schema.Model),
    (add_lora, schema.Lora),
    (Lora, schema.Lora),
    (build_examples, schema.Data),
    (ReadSettings, schema.Data),
    (plan_epoch, schema.Data),
    (Job, schema.Train),
    (MemoryOptions, schema.Train),
    (MemoryOptions, schema.Memory),
    (TrainSettings, schema.Train),
    (TrainSettings, schema.Data),
    (TrainSettings, schema.Memory),
]


def defaults_of(function):
    parameters = inspect.signature(function).parameters.items()
    return {name: parameter.default for name, parameter in parameters if parameter.default is not parameter.empty}


def in_a_recipe(value):
    if isinstance(value, torch.dtype):
        return str(value).removeprefix("torch.")
    return ALL_LINEAR if value in ((Target(ALL_LINEAR),), (schema.Target(pattern=ALL_LINEAR),)) else value


@pytest.mark.parametrize(("function", "section"), SAME, ids=lambda each: each.__name__)
def test_a_default_of_the_python_api_is_the_recipe_s(function, section):
    ours = defaults_of(function)
    theirs = {name: field.default for name, field in section.model_fields.items()}
    both = {name: (in_a_recipe(ours[name]), in_a_recipe(theirs[name])) for name in ours.keys() & theirs.keys()}
    assert both
    differing = {name: (our, their) for name, (our, their) in both.items() if their not in (our, "auto")}
    assert not differing, "in the Python API, in a recipe"


@pytest.mark.parametrize("inner", [LoraLinear])
def test_what_only_the_package_calls_has_no_defaults_of_its_own(inner):
    assert not defaults_of(inner)
