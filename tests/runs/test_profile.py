"""Profiles: figures that agree with the plan, a page, and the same page when memory runs out."""

import json

import pytest
import torch
from tiny_files import save_tiny, write_recipe

from qlora_lite.errors import DoesNotFitError, OutputError
from qlora_lite.memory.bar import CATEGORIES
from qlora_lite.memory.ledger import Moment
from qlora_lite.memory.marks import phase, timing
from qlora_lite.models.kernels import kernels_of, use_kernels
from qlora_lite.recipe.load import load_recipe
from qlora_lite.runs import profile
from qlora_lite.train.loop import Trainer
from qlora_lite.units import format_bytes


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    folder = tmp_path_factory.mktemp("profile")
    save_tiny(folder / "model")
    return load_recipe(write_recipe(folder, folder / "model"))


def test_predicted_and_measured_agree_and_the_time_of_each_phase_is_told(recipe, tmp_path):
    done = profile.profile_recipe(recipe, tmp_path / "out", steps=3)
    figures = json.loads((tmp_path / "out" / "memory.json").read_text())
    assert done.figures == figures
    assert figures["peak_bytes"] == pytest.approx(figures["predicted_peak_bytes"], rel=0.01)
    assert {"forward", "backward", "optimizer"} <= set(figures["seconds_by_phase"])
    assert all(seconds >= 0 for seconds in figures["seconds_by_phase"].values())
    for name in ("base weights", "adapter", "embeddings", "optimizer"):
        assert figures["measured"].get(name, 0) == figures["predicted"].get(name, 0)
    page = done.page.read_text()
    outside = format_bytes(figures["process_peak_bytes"] - figures["peak_bytes"])
    assert f'<td>process</td><td class="number">{outside}</td>' in page
    assert "<svg" in page and "saved activations" in page and figures["peak_module"].rpartition(".")[2] in page


def test_a_start_from_activations_has_its_own_ranks(tmp_path):
    save_tiny(tmp_path / "model")
    own = load_recipe(write_recipe(tmp_path, tmp_path / "model"), ["lora.start=eva"])
    figures = profile.profile_recipe(own, tmp_path / "out", steps=2).figures
    for name in ("adapter", "optimizer"):
        assert figures["measured"][name] == figures["predicted"][name]
    plain = profile.profile_recipe(load_recipe(tmp_path / "recipe.yaml"), tmp_path / "plain", steps=2).figures
    assert figures["measured"]["adapter"] != plain["measured"]["adapter"], "layers differ in size"


@pytest.mark.parametrize(
    ("kind", "words"),
    [(torch.OutOfMemoryError, "out of memory. Tried 20 MiB"), (RuntimeError, "DefaultCPUAllocator: out of memory")],
)
def test_when_memory_runs_out_the_page_shows_the_state_at_the_failure(kind, words, recipe, tmp_path, monkeypatch):
    probe_memory = Trainer.probe_memory

    def run_out(trainer, examples):
        handle = trainer.model.lm_head.register_forward_pre_hook(lambda *_: None)
        layer = trainer.model.model.layers[1].mlp

        def fail(*_):
            raise kind(words)

        hook = layer.register_forward_hook(fail)
        try:
            probe_memory(trainer, examples)
        finally:
            hook.remove()
            handle.remove()

    monkeypatch.setattr(Trainer, "probe_memory", run_out)
    with pytest.raises(DoesNotFitError, match=r"ran out of memory: .*out of memory.*memory\.html shows"):
        profile.profile_recipe(recipe, tmp_path / "out", steps=1)
    figures = json.loads((tmp_path / "out" / "memory.json").read_text())
    assert figures["out_of_memory"] == words
    assert figures["peak_phase"] == "forward" and figures["peak_bytes"] > 0
    assert "ran out of memory" in (tmp_path / "out" / "memory.html").read_text()


def test_it_computes_with_the_kernels_that_a_trial_has_left(recipe, tmp_path, monkeypatch):
    used, probe_memory = [], Trainer.probe_memory
    monkeypatch.setattr(Trainer, "choose_kernels", lambda trainer: use_kernels(trainer.model, ["norms"]))
    monkeypatch.setattr(
        Trainer,
        "probe_memory",
        lambda trainer, rows: used.append(kernels_of(trainer.model)) or probe_memory(trainer, rows),
    )
    profile.profile_recipe(recipe, tmp_path / "out", steps=1)
    assert used == [{"norms"}]


def test_a_folder_that_cannot_be_written_is_told_before_anything_is_loaded(recipe, tmp_path, monkeypatch):
    monkeypatch.setattr(profile, "build_model", lambda *_args, **_options: pytest.fail("the model was loaded"))
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match=r"cannot write .*file/out: Not a directory; check the path .*--out"):
        profile.profile_recipe(recipe, tmp_path / "file" / "out", steps=1)


def test_the_peak_is_told_in_words_with_its_largest_parts():
    sizes = {"base weights": 600, "saved activations": 300, "logits": 100}
    words = profile.in_words(Moment("backward", "model.layers.17", tuple(sizes.get(name, 0) for name in CATEGORIES)))
    assert words == (
        "peak in backward, model.layers.17: 1000 B (base weights 60 %, saved activations 30 %, logits 10 %)"
    )


def test_seconds_go_to_the_phase_they_were_spent_in(monkeypatch):
    now = iter(range(100))
    monkeypatch.setattr("qlora_lite.memory.marks.time.perf_counter", lambda: next(now))
    with timing(torch.device("cpu")) as seconds:
        with phase("forward"):
            pass
        with phase("backward"), phase("optimizer"):
            pass
    assert seconds == {"other": 3, "forward": 1, "backward": 2, "optimizer": 1}
