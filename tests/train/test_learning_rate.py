"""Learning rate auto: the published rule, the same in plan, run and model card, and kept by a run that resumes."""

import json
import signal

import pytest
from tiny_files import write_recipe

from qlora_lite.adapters.lora.layer import lora_scale
from qlora_lite.errors import CheckpointError, Interrupted
from qlora_lite.ext.hub.card import CardFacts, model_card
from qlora_lite.memory.gpus import find_gpu
from qlora_lite.models.skeleton import read_config
from qlora_lite.planning.machine import machine_of_gpu
from qlora_lite.prepare.plan import budget_of, plan_recipe
from qlora_lite.prepare.settings import learning_rate, train_settings
from qlora_lite.recipe.load import load_recipe
from qlora_lite.reporting.plan_text import as_json, describe
from qlora_lite.runs.run import run_recipe
from qlora_lite.train.settings import auto_learning_rate

pytestmark = pytest.mark.usefixtures("simulations")


@pytest.mark.parametrize(
    ("model", "rate"),
    [
        ("meta-llama/Llama-3.2-1B", 4.9e-4),  # Llama and Qwen as the rule's authors print them
        ("meta-llama/Llama-3.2-3B", 3.6e-4),
        ("meta-llama/Llama-3.1-8B", 2.9e-4),
        ("meta-llama/Llama-3.1-70B", 1.7e-4),
        ("Qwen/Qwen2.5-7B", 4.8e-4),
        ("google/gemma-3-270m", 5.5e-4),  # of a sweep
        ("mistralai/Mistral-7B-v0.3", 2.9e-4),  # as wide as Llama's
    ],
)
def test_the_rule_gives_the_rates_that_were_published_or_swept(model, rate):
    config = read_config(model)
    assert auto_learning_rate(config.model_type, config.hidden_size, 16, 32 / 16) == rate


@pytest.mark.parametrize("rank", [1, 8, 16, 256])
def test_an_update_is_of_the_same_size_whatever_rank_and_scale(rank):
    base = auto_learning_rate("llama", 2000, 16, lora_scale(32, 16, False))
    assert base == 5e-4
    for alpha in (8, 32, 64):
        for rslora in (False, True):
            scale = lora_scale(alpha, rank, rslora)
            found = auto_learning_rate("llama", 2000, rank, scale) * rank * scale
            assert found == pytest.approx(base * 32, rel=0.04)  # two digits are kept


def auto(folder, model, **train):
    return load_recipe(write_recipe(folder, model, train={"learning_rate": "auto", "max_steps": 4, **train}))


def test_rank_alpha_and_scale_are_those_of_the_recipe(tmp_path, model_folder):
    path = write_recipe(tmp_path, model_folder, train={"learning_rate": "auto"}, lora={"rank": 4, "alpha": 8})
    rate = learning_rate(load_recipe(path))  # two digits of it are kept
    for override, factor in (
        ("lora.rslora=true", 1 / 2),
        ("lora.alpha=16", 1 / 2),
        ("lora.rank=16", 1),
        ("lora.start=qera", 1 / 2),
        ("lora.start=loftq", 1 / 2),
        ("lora.start=olora", 1 / 4),
        ("lora.start=pissa", 1 / 4),
        ("lora.start=eva", 1 / 4),
    ):
        assert learning_rate(load_recipe(path, [override])) == pytest.approx(rate * factor, rel=0.06)
    none = ["lora.start=loftq", "lora.start_alternations=0"]
    assert learning_rate(load_recipe(path, none)) == rate, "which is the plain start"


def test_other_methods_have_rates_of_their_own(tmp_path, model_folder):
    path = write_recipe(tmp_path, model_folder, train={"learning_rate": "auto"}, lora={"rank": 16, "alpha": 32})
    rate = learning_rate(load_recipe(path))
    for overrides, factor in (
        (["adapter.method=dora"], 1),
        (["adapter.method=full", "model.quant=none"], 1 / 10),
        (["adapter.method=bottleneck"], 1.5),
    ):
        assert learning_rate(load_recipe(path, overrides)) == pytest.approx(rate * factor, rel=0.03), overrides


def test_plan_settings_run_and_model_card_have_one_rate(tmp_path, model_folder):
    recipe = auto(tmp_path, model_folder)
    rate = learning_rate(recipe)
    assert rate > 1e-3 and train_settings(recipe).learning_rate == rate
    machine = machine_of_gpu(find_gpu("rtx-4090"))
    plan = plan_recipe(recipe, machine, budget_of(recipe, machine))
    assert as_json(plan, [])["learning_rate"] == rate and f"learning rate    {rate:g}" in describe(plan, [])
    out = run_recipe(recipe)
    rates = [json.loads(line).get("learning_rate", 0) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert max(rates) == rate
    summary = json.loads((out / "summary.json").read_text())
    assert summary["learning_rate"] == rate
    card = model_card(CardFacts("o/n", None, {}, recipe, summary, None, False))
    assert f"| learning rate | {rate}, cosine" in card


@pytest.fixture
def stopped(tmp_path, model_folder):
    """A recipe whose run was stopped after its second step."""

    def stop(**train):
        recipe = auto(tmp_path, model_folder, **train)

        def at_step(metrics, _total):
            if metrics.step == 2:
                signal.raise_signal(signal.SIGTERM)

        with pytest.raises(Interrupted):
            run_recipe(recipe, at_step)
        return tmp_path / "out"

    return stop


def test_a_resumed_run_keeps_its_rate_though_the_rule_is_another_now(stopped, tmp_path, model_folder, monkeypatch):
    out = stopped()
    began = json.loads((out / "summary.json").read_text())["learning_rate"]
    monkeypatch.setattr("qlora_lite.train.settings.auto_learning_rate", lambda *_: 0.5)
    run_recipe(auto(tmp_path, model_folder), resume=out)
    summary = json.loads((out / "summary.json").read_text())
    assert (summary["learning_rate"], summary["steps"]) == (began, 4) and summary["resumed"][0]["changes"] == []


def test_a_run_that_began_with_a_number_keeps_it_under_auto_and_refuses_another_number(stopped, tmp_path, model_folder):
    out = stopped(learning_rate=2e-4)
    with pytest.raises(CheckpointError, match=r"train\.learning_rate: 0\.0002 -> 0\.0003"):
        run_recipe(auto(tmp_path, model_folder, learning_rate=3e-4), resume=out)
    run_recipe(auto(tmp_path, model_folder), resume=out)
    assert json.loads((out / "summary.json").read_text())["learning_rate"] == 2e-4
