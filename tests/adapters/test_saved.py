"""Runs of methods whose adapters are used as they are: resumed, evaluated, answered with, and not merged."""

import pytest
import torch
from safetensors.torch import load_file
from tiny_files import save_tiny, write_recipe
from tiny_runs import summary_of

from qlora_lite.adapters.read import WEIGHTS_NAME
from qlora_lite.errors import Interrupted
from qlora_lite.inference.evaluate import evaluate_recipe
from qlora_lite.models.memory_options import MemoryOptions
from qlora_lite.prepare import model as base_model
from qlora_lite.recipe.load import load_recipe
from qlora_lite.runs.run import run_recipe

pytestmark = pytest.mark.usefixtures("simulations")


@pytest.mark.parametrize(
    ("method", "settings", "quant"),
    [
        ("bottleneck", {"width": 6, "placement": "houlsby"}, "nf4"),
        pytest.param("bottleneck", {"width": 6}, "none", marks=pytest.mark.slow),
        pytest.param("prompt", {"virtual_tokens": 4}, "nf4", marks=pytest.mark.slow),
        ("prefix", {"virtual_tokens": 3}, "nf4"),
        ("prompt", {"virtual_tokens": 2, "encoder_width": 8, "init_text": "3?"}, "none"),
    ],
)
def test_a_run_is_resumed_to_the_bit_evaluated_and_used_and_not_merged(
    tmp_path, command, monkeypatch, method, settings, quant
):
    save_tiny(tmp_path / "model")
    path = write_recipe(
        tmp_path,
        tmp_path / "model",
        lora={"rank": 16, "alpha": 32.0},
        adapter={"method": method},
        train={"save_every_steps": 2, "metrics_examples": 0},
        **{method.replace("prefix", "prompt"): settings},
    )
    changes = [f"model.quant={quant}"]
    whole, cut = (load_recipe(path, [*changes, f"output.dir={tmp_path / name}"]) for name in ("whole", "cut"))
    run_recipe(whole)

    def stop(metrics, _total):
        if metrics.step == 3:
            raise KeyboardInterrupt

    with pytest.raises(Interrupted):
        run_recipe(cut, stop)
    run_recipe(cut, resume="")
    one, two = (load_file(tmp_path / name / "adapter" / WEIGHTS_NAME) for name in ("whole", "cut"))
    assert all(torch.equal(tensor, two[name]) for name, tensor in one.items())
    summary = summary_of(tmp_path / "whole")
    found = evaluate_recipe(whole, tmp_path / "whole" / "adapter", 0)
    assert found["eval_loss"] == pytest.approx(summary["eval_loss_after"], rel=1e-4)
    assert found["eval_loss"] < summary["eval_loss_before"]
    said = [command("generate", tmp_path / "whole", "--prompt", "3?", *base) for base in ((), ("--base",))]
    assert [code for code, *_ in said] == [0, 0] and said[0][1] != said[1][1]
    monkeypatch.setattr(base_model, "memory_to_use", lambda *_: 0)
    for places in (MemoryOptions(resident_layers=0), MemoryOptions(resident_layers=0, stream_from="disk")):
        monkeypatch.setattr(base_model, "placement", lambda *_, places=places: places)
        streamed = evaluate_recipe(whole, tmp_path / "whole" / "adapter", 0)
        assert streamed["eval_loss"] == pytest.approx(found["eval_loss"], rel=1e-6)
        assert command("generate", tmp_path / "whole", "--prompt", "3?")[1] == said[0][1]
    for use in (("merge", "--rows", 0), ("export", "--to", "gguf"), ("export", "--to", "vllm")):
        code, out, err = command(use[0], tmp_path / "whole", "--out", tmp_path / "out", *use[1:])
        assert (code, out) == (2, "") and "can be neither merged nor exported" in err and err.count("\n") == 1
